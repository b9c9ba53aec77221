"""docs/train.md says what two runs came to: its table is that of the files that ``probe --json`` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"


def told(row: dict[str, Any]) -> str:
    return f"{100 * row['cost']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"


def test_table_of_probed_runs():
    page = (DOCS / "train.md").read_text(encoding="utf-8")
    paper, ours = (json.loads((DOCS / f"training/probe-{name}.json").read_text()) for name in ("paper", "ours"))
    pairs = list(zip(paper["counterfactuals"], ours["counterfactuals"], strict=True))
    assert len(pairs) == 7
    for first, second in pairs:
        assert f"| {first['name']} | {told(first)} | {told(second)} |" in page
    assert f"Their top-1 is {100 * paper['accuracy']:.1f}% and {100 * ours['accuracy']:.1f}%." in page


def test_our_recipe_makes_neurons_that_count():
    """Permuting neurons and flipping gates costs accuracy, beyond the intervals over clips."""
    ours = json.loads((DOCS / "training/probe-ours.json").read_text())
    costs = {row["name"]: row["low"] for row in ours["counterfactuals"]}
    assert costs["permuted neurons"] > 0 and costs["gates flipped"] > 0
