"""Saved results as a Markdown table and a figure: ``python -m benchmarks.report FILE --figure FIGURE.png``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.report.tables import figure, markdown


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="A Markdown table and a figure out of saved benchmark results."
    )
    parser.add_argument("results", type=Path, help="JSON written by --save-results")
    parser.add_argument("--figure", type=Path, help="image to draw; the ending chooses the format")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    print(markdown(results))
    if arguments.figure:
        figure(results, arguments.figure)


if __name__ == "__main__":
    main()
