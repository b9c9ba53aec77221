"""Tables of README and docs beside the commands that make them: ``python -m benchmarks.report.pages``.

A comment before a table, in the same section, says where its figures come from::

    <!-- table: COMMAND -->                  what the command prints, checked by tests/test_tables.py
    <!-- table: COMMAND; log: NAME; ... -->  the same, but for rows or columns of these names, which are of the log
    <!-- table: log, WHAT -->                measured, counted or predicted once: WHAT says so, and when, and how
    <!-- table: held by tests/FILE.py -->    a test compares its figures
    <!-- table: words -->                    its numbers are names, settings and formulas
    <!-- figures: COMMAND -->                of the paragraph or list that follows: each number begins a line of
                                             what the command prints

A page may show fewer rows and columns than a command prints; what it shows is to be the same. A row is found by its
cells before the first column of figures, which is the first that is aligned to the right. ``--write`` puts in what
commands print. Commands are Python's, are fast, and start nothing that measures.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import io
import itertools
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Table", "has_figures", "kind", "main", "named_in_log", "pages", "printed", "remade", "tables"]

ROOT = Path(__file__).resolve().parents[2]
MARKER = re.compile(r"<!-- table: (.+?) -->")
FIGURES = re.compile(r"^ *<!-- figures: (.+?) -->\n+((?:.+\n)+)", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.-])\d+(?:\.\d+)?%?(?!\w)")
SEPARATOR = re.compile(r"\|(\s*:?-+:?\s*\|)+\s*$")
FIGURE = re.compile(r"[*~<>+-]*(about |at most |at least |above |below |under )?[+-]?\d+([.,]\d+)*\b")
MEASURED = re.compile(r"(?<![\w.-])\d+([.,]\d+)*( ?(ms|us|MB|MiB|KiB|GB|GiB|GFLOP|TFLOP)\b| ?%)")
CODE = re.compile(r"`[^`]*`")
LOG = re.compile(r"log, .*(measured|counted|predicted|compiled).*(\b[0-9a-f]{7,12}\b|\d{4}-\d\d-\d\d)")
HELD = re.compile(r"held by (tests/\S+\.py)$")


class Table(NamedTuple):
    """A table of a page, or of what a command printed."""

    line: int  # of its header, from 0
    marker: str | None  # what its comment says
    rows: tuple[tuple[str, ...], ...]  # cells, the header first
    labels: int  # columns before the first that is aligned to the right; one where none is


def cells(line: str) -> tuple[str, ...]:
    """Of a row; a bar in a cell is written with a backslash before it."""
    return tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1])


def tables(text: str) -> list[Table]:
    """All tables of a Markdown text, without those in blocks of code."""
    lines, found = text.splitlines(), []
    marker, fenced = None, False
    for number, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced:
            continue
        elif line.startswith("#"):
            marker = None
        elif said := MARKER.search(line):
            marker = said[1]
        elif line.startswith("|") and number + 1 < len(lines) and SEPARATOR.match(lines[number + 1]):
            end = next((i for i in range(number, len(lines)) if not lines[i].startswith("|")), len(lines))
            rows = (cells(line), *map(cells, lines[number + 2 : end]))
            right = [aligned.endswith(":") for aligned in cells(lines[number + 1])]
            found.append(Table(number, marker, rows, right.index(True) or 1 if True in right else 1))
            marker = None
    return found


def has_figures(table: Table) -> bool:
    """Whether a cell begins with a number or has one with a unit; the header, and numbers in code, do not count."""
    return any(FIGURE.match(cell) or MEASURED.search(CODE.sub("", cell)) for row in table.rows[1:] for cell in row)


def kind(marker: str) -> str:
    """``command``, ``log``, ``held`` or ``words``.

    Raises:
        ValueError: it is none of these.
    """
    if marker == "words":
        return marker
    if LOG.match(marker):
        return "log"
    if HELD.match(marker):
        return "held"
    if marker.startswith("python "):
        return "command"
    wanted = "'python ...', 'log, measured|counted|predicted ... COMMIT or DATE', 'held by tests/FILE.py' or 'words'"
    raise ValueError(f"<!-- table: ... -->: got {marker!r}, wanted {wanted}")


def named_in_log(marker: str) -> tuple[str, list[str]]:
    """The command of a marker, and the rows or columns that it leaves to the log."""
    command, _, names = marker.partition("; log: ")
    return command, [name.strip() for name in names.split(";") if name.strip()]


@functools.cache
def printed(command: str) -> str:
    """What a command of ours prints, in this process: ``python -m MODULE ...`` or ``python FILE ...``.

    Raises:
        ValueError: it is another command, or it failed.
    """
    words = shlex.split(command)
    if words[:2] == ["python", "-m"] and len(words) > 2:
        name, arguments = words[2], words[3:]
    elif words[:1] == ["python"] and len(words) > 1:
        name, arguments = words[1].removesuffix(".py").replace("/", "."), words[2:]
    else:
        raise ValueError(f"got {command!r}, wanted 'python -m MODULE ...' or 'python FILE ...'")
    if importlib.util.find_spec(name).submodule_search_locations is not None:
        name += ".__main__"
    main = importlib.import_module(name).main
    # As a shell would.
    found = [
        sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(one)) if "*" in one else [one] for one in arguments
    ]
    arguments = list(itertools.chain.from_iterable(found))
    before, output = sys.argv, io.StringIO()
    sys.argv = [name, *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.chdir(ROOT):
            code = main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    if code:
        raise ValueError(f"{command}: ended with {code!r}")
    return output.getvalue()


def places(names: Sequence[str], among: Sequence[str]) -> list[int] | None:
    """Where each name is, in order; ``None`` where one is not."""
    found, start = [], 0
    for name in names:
        if name not in among[start:]:
            return None
        start = among.index(name, start) + 1
        found.append(start - 1)
    return found


def remade_from(table: Table, output: Table, log: Sequence[str]) -> list[tuple[str, ...]] | str:
    """Rows of a table with the figures that a command printed, or why there are none."""
    head = table.rows[0]
    own = [i for i, name in enumerate(head) if name not in log]
    columns = places([head[i] for i in own], output.rows[0])
    if columns is None:
        return f"no table with the columns {', '.join(head[i] or repr('') for i in own)} in this order"
    labels = [i for i in range(table.labels) if i in own]
    rows, start = [head], 1
    for row in table.rows[1:]:
        if row[0] in log:
            rows.append(row)
            continue
        wanted = [row[i] for i in labels]
        at = next(
            (
                i
                for i in range(start, len(output.rows))
                if [output.rows[i][columns[own.index(j)]] for j in labels] == wanted
            ),
            None,
        )
        if at is None:
            return f"no row {' | '.join(wanted)!r}, or not in this order"
        start = at + 1
        figures = dict(zip(own, (output.rows[at][column] for column in columns), strict=True))
        rows.append(tuple(figures.get(i, cell) for i, cell in enumerate(row)))
    return rows


def remade(table: Table) -> list[tuple[str, ...]]:
    """A table as its command prints it today.

    Raises:
        ValueError: the command prints no table with these columns and rows, or fails.
    """
    command, log = named_in_log(table.marker or "")
    reasons = []
    for output in tables(printed(command)):
        rows = remade_from(table, output, log)
        if not isinstance(rows, str):
            return rows
        reasons.append(rows)
    # Of a command's tables those with all columns tell most.
    reason = next((text for text in reasons if text.startswith("no row")), reasons[0] if reasons else "no table")
    raise ValueError(f"{command}: prints {reason}")


def pages(root: Path = ROOT) -> list[Path]:
    """Markdown for readers. The results of a run and the history of changes are not among them."""
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]


def rewritten(text: str) -> str:
    """A page with what its commands print."""
    lines = text.split("\n")
    for table in tables(text):
        if table.marker is None or kind(table.marker) != "command":
            continue
        for offset, (row, old) in enumerate(zip(remade(table), table.rows, strict=True)):
            if row != old:
                lines[table.line + offset + (offset > 0)] = f"| {' | '.join(row)} |"
    return "\n".join(lines)


def strangers(text: str) -> Iterable[tuple[int, str]]:
    """Numbers that a command should print and does not, each with the line of its comment, from 0."""
    for said in FIGURES.finditer(text):
        known = {line.split()[0].rstrip(":") for line in printed(said[1]).splitlines() if line.strip()}
        for number in NUMBER.findall(said[2]):
            if number not in known:
                yield text.count("\n", 0, said.start()), f"got {number}, wanted a figure that {said[1]} prints"


def problems(path: Path) -> Iterable[str]:
    """What is wrong with the figures of a page, a line each."""
    for line, complaint in strangers(path.read_text(encoding="utf-8")):
        yield f"{path.relative_to(ROOT)}:{line + 1}: {complaint}"
    for table in tables(path.read_text(encoding="utf-8")):
        place = f"{path.relative_to(ROOT)}:{table.line + 1}"
        try:
            if table.marker is None:
                if has_figures(table):
                    yield f"{place}: figures, and no <!-- table: ... --> that says where they come from"
            elif kind(table.marker) == "held" and not (ROOT / HELD.match(table.marker)[1]).is_file():
                yield f"{place}: {table.marker}, which is not there"
            elif kind(table.marker) == "command":
                for row, old in zip(remade(table), table.rows, strict=True):
                    if row != old:
                        yield f"{place}: got | {' | '.join(old)} |, wanted | {' | '.join(row)} |"
        except ValueError as error:
            yield f"{place}: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.pages", description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=lambda text: Path(text).resolve(strict=True), help="(README and docs)")
    parser.add_argument("--write", action="store_true", help="put in what commands print")
    given = parser.parse_args()
    wrong = 0
    for path in given.pages or pages():
        if given.write:
            text = path.read_text(encoding="utf-8")
            path.write_text(rewritten(text), encoding="utf-8")
        for line in problems(path):
            wrong += 1
            print(line)
    print(f"{wrong} problems" if wrong else "every table is as its command prints it, or says why not")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
