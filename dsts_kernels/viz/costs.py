"""What changes of routing and gates cost, as bars with their intervals: a panel for the model, one for each arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .style import LAYERS, figure, paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_costs"]

COSTS, NOTHING = "#40307A", "#B9B4CF"


def plot_costs(rows: Mapping[str, Sequence[Mapping[str, Any]]], said: str = "95% intervals over clips") -> Figure:
    """Points of top-1 that each change costs; a change whose interval does not lie above 0 is pale.

    Args:
        rows: a title to its changes, each with ``name``, ``cost``, ``low`` and ``high`` as shares, such as
            ``Counterfactual._asdict()``; all titles have the same names.
        said: what the intervals are.

    Returns:
        A matplotlib figure: a panel a title, a bar a change.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: nothing to draw, or titles of other changes.
    """
    names = [[row["name"] for row in own] for own in rows.values()]
    if not names or not names[0] or any(one != names[0] for one in names):
        raise ValueError("rows: wanted the same changes for every title, at least one of each")
    places = range(len(names[0]))
    fig = figure(2.0 + 2.7 * len(rows), 1.5 + 0.3 * len(names[0]))
    panels = fig.subplots(1, len(rows), sharey=True, sharex=True, squeeze=False)[0]
    for axes, (title, own) in zip(panels, rows.items(), strict=True):
        cost = [100 * row["cost"] for row in own]
        out = [[100 * max(0.0, row["cost"] - row["low"]) for row in own]]
        out += [[100 * max(0.0, row["high"] - row["cost"]) for row in own]]
        colors = [COSTS if row["low"] > 0 else NOTHING for row in own]
        axes.barh(places, cost, 0.66, color=colors)
        axes.errorbar(cost, places, xerr=out, fmt="none", ecolor=LAYERS[0][0], elinewidth=1.1, capsize=2.5)
        axes.axvline(0.0, color=LAYERS[0][0], linewidth=0.8)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("points of top-1", fontsize=8)
        paper(axes)
        axes.grid(False)
    panels[0].set_yticks(places, labels=names[0], fontsize=8)
    panels[0].invert_yaxis()
    fig.supxlabel(f"{said}; pale: the change does not cost more than its interval", fontsize=8, color="#555555")
    fig.suptitle("What it costs to change routing or gates", fontsize=12)
    return fig
