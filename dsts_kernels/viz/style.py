"""The look that all figures share: matplotlib on demand, a colour for every neuron and line for every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "CHANCE",
    "LAYERS",
    "NEURONS",
    "SPATIAL",
    "START",
    "TEMPORAL",
    "badge",
    "figure",
    "ink",
    "neuron_color",
    "neuron_ticks",
    "paper",
]

# Okabe and Ito's hues, told apart under every common colour blindness, then a darker or lighter one of each. Figures
# print the number of the neuron too, since nobody tells sixteen colours apart.
NEURONS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#6B6B6B"),
    *("#003B5C", "#FFD58A", "#7FDCC0", "#7A2F58", "#C4E6FA", "#7A3500", "#8A8200", "#D0D0D0"),
)
SPATIAL, TEMPORAL = "#40307A", "#C8BFE7"  # of no neuron
CHANCE, START = "#8C8C8C", "#D55E00"  # what chance gives, and where training began
LAYERS = (("#222222", "-", "o"), ("#B2457A", "--", "s"), ("#2C7FB8", "-.", "^"), ("#7A9A01", ":", "D"))


def figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    """An empty figure of inches, by default laid out so that texts keep apart. No pyplot: no window and no state.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'dsts_kernels[train]'") from error
    return Figure(figsize=(width, height), layout=layout, facecolor="white")


def neuron_color(neuron: int) -> str:
    """The colour of a neuron, the same in all figures."""
    return NEURONS[neuron % len(NEURONS)]


def ink(color: str) -> str:
    """Black or white, whichever reads better on a colour ``#rrggbb``."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def badge(neuron: int, pad: float = 0.22) -> dict[str, object]:
    """Text properties of a neuron's number on its colour."""
    color = neuron_color(neuron)
    return {"color": ink(color), "bbox": {"boxstyle": f"round,pad={pad}", "facecolor": color, "edgecolor": "none"}}


def neuron_ticks(axes: Axes, neurons: int) -> None:
    """The x axis numbers neurons 0 to ``neurons - 1``, each on its colour."""
    axes.set_xticks(range(neurons), labels=[str(n) for n in range(neurons)], fontsize=7)
    axes.tick_params(axis="x", length=0, pad=5)
    for neuron, label in enumerate(axes.get_xticklabels()):
        label.set(**badge(neuron))


def paper(axes: Axes) -> None:
    """No box, light lines across."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.tick_params(labelsize=8)
