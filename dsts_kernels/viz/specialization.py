"""What neurons specialize in: their spatial and temporal channels, clips that choose them, attributes they follow."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .measures import activation, attributes, check_routing, gate_band, information_table
from .style import CHANCE, SPATIAL, START, TEMPORAL, figure, ink, neuron_color, neuron_ticks, paper

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

__all__ = ["pick_examples", "plot_activation", "plot_examples", "plot_gates"]


def plot_gates(shares: Tensor, channels: Sequence[int] | None = None, start: Tensor | None = None) -> Figure:
    """Share of channels on the spatial and on the temporal operator, for each neuron in each layer.

    Args:
        shares: ``(L, N)``, the spatial share from 0 to 1: :func:`gate_shares`.
        channels: of each layer: then a band shows between which shares all bars of the figure would lie, in 95 of 100
            figures, if every gate were a coin's: :func:`gate_band`.
        start: ``(L, N)``, the shares at the start of training, marked on the bars.

    Returns:
        A matplotlib figure: a panel a layer, a bar a neuron.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: not ``(L, N)`` shares, or other numbers of layers or neurons.

    Source: the counterpart of the paper's Fig. 1.
    """
    if shares.dim() != 2 or shares.numel() == 0 or not bool(((shares >= 0) & (shares <= 1)).all()):
        raise ValueError(f"shares: got shape {tuple(shares.shape)}, wanted (L, N) of numbers from 0 to 1")
    layers, neurons = shares.shape
    if channels is not None and len(channels) != layers:
        raise ValueError(f"channels: got {len(channels)}, wanted a number for each of {layers} layers")
    if start is not None and start.shape != shares.shape:
        raise ValueError(f"start: got shape {tuple(start.shape)}, wanted {tuple(shares.shape)} as shares")
    width = max(2.0, 0.34 * neurons)
    columns = min(layers, max(1, int(12 // width)))
    rows = -(-layers // columns)
    fig = figure(max(5.5, 1.0 + width * columns), 1.1 + 2.5 * rows)
    panels = fig.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    x = range(neurons)
    for layer, axes in enumerate(panels[:layers]):
        spatial = shares[layer].tolist()
        bars = axes.bar(x, spatial, 0.84, color=SPATIAL, label="spatial 1x3x3")
        axes.bar(x, [1 - s for s in spatial], 0.84, bottom=spatial, color=TEMPORAL, label="temporal 3x1x1")
        for bar, share in zip(bars, spatial, strict=True):
            inside = share >= 0.1
            axes.annotate(
                f"{100 * share:.0f}",
                (bar.get_x() + bar.get_width() / 2, 0.0 if inside else share),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7,
                color="white" if inside else "black",
            )
        _beside_chance(
            axes,
            None if channels is None else gate_band(channels[layer], layers * neurons),
            None if start is None else start[layer].tolist(),
        )
        axes.set(xlim=(-0.6, neurons - 0.4), ylim=(0, 1))
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_xlabel("neuron", fontsize=9)
        paper(axes)
        axes.grid(False)
        neuron_ticks(axes, neurons)
    for axes in panels[layers:]:
        axes.set_axis_off()
    for axes in panels[:layers:columns]:
        axes.set_ylabel("share of channels", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    fig.suptitle("Operators that neurons send channels to", fontsize=12)
    return fig


def _beside_chance(axes: Axes, band: tuple[float, float] | None, start: list[float] | None) -> None:
    """Half, and where they are known the band of random gates and the shares at the start, over a panel's bars."""
    axes.axhline(0.5, color="white", linewidth=0.9, linestyle=(0, (4, 3)))
    if band is not None:
        axes.axhspan(*band, facecolor=CHANCE, alpha=0.45, label="chance: random gates lie here, 95 times in 100")
        for edge in band:
            axes.axhline(edge, color=CHANCE, linewidth=1.0)
    if start is not None:
        mark = {"color": START, "markersize": 11, "markeredgewidth": 1.8, "label": "at the start"}
        axes.plot(range(len(start)), start, "_", clip_on=False, zorder=5, **mark)


def pick_examples(routing: Mapping[str, Any], most: int = 12, per_class: int = 3) -> list[int]:
    """Which of the ``K`` clips with frames to show: up to ``per_class`` of a class, classes with more clips first.

    Returns:
        At most ``most`` indices into ``frames``, clips of a class side by side, classes by label.
    """
    by_class: dict[int, list[int]] = {}
    for index, sample in enumerate(routing["frame_samples"].tolist()):
        by_class.setdefault(int(routing["label"][sample]), []).append(index)
    order = sorted(by_class, key=lambda label: (-min(len(by_class[label]), per_class), label))
    chosen: list[tuple[int, int]] = []
    for label in order:
        chosen += [(label, index) for index in by_class[label][:per_class]]
    return [index for _, index in sorted(chosen[:most])]


def cells(axes: Axes, neuron: Sequence[int], left: float, y: float, side: float = 0.8) -> None:
    """A square for every layer, in the colour of the neuron that was chosen there, with its number."""
    from matplotlib.patches import Rectangle

    for layer, chosen in enumerate(neuron):
        color = neuron_color(chosen)
        x = left + layer * 0.9
        axes.add_patch(Rectangle((x, y - side / 2), side, side, facecolor=color, edgecolor="none"))
        axes.text(x + side / 2, y, str(chosen), ha="center", va="center", color=ink(color), fontsize=11)


def plot_examples(routing: Mapping[str, Any], *, most: int = 12, per_class: int = 3) -> Figure:
    """Example clips grouped by class, and the neuron that each activates in each layer.

    Args:
        routing: see :mod:`.measures`; needs ``frames`` and ``frame_samples``.
        most: clips in the figure.
        per_class: clips of one class.

    Returns:
        A matplotlib figure: a row a clip, with up to four of its frames and a cell a layer.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the routing lacks a key or holds another shape.

    Source: the counterpart of the paper's Fig. 2.
    """
    routing = check_routing(routing)
    if routing.get("frames") is None or len(routing["frames"]) == 0:
        raise ValueError("routing: got no 'frames', wanted clips to show")
    frames = routing["frames"].cpu()
    count = min(frames.shape[1], 4)
    steps = torch.linspace(0, frames.shape[1] - 1, count, device="cpu").round().long().tolist()
    aspect = min(max(frames.shape[3] / frames.shape[2], 0.4), 2.5)  # stretched beyond
    left, layers = len(steps) * (aspect + 0.06) + 0.3, len(routing["neuron"])
    right = left + layers * 0.9 - 0.1

    examples = pick_examples(routing, most, per_class)
    groups: dict[int, list[float]] = {}
    y = 0.0
    fig = figure(1.0, 1.0, layout=None)
    axes = fig.add_axes((0.0, 0.0, 1.0, 1.0))
    for index in examples:
        label = int(routing["label"][routing["frame_samples"][index]])
        if groups:
            y += 1.06 if label in groups else 1.45
        if groups and label not in groups:
            axes.axhline(y - 0.725, color="#bbbbbb", linewidth=0.8)
        groups.setdefault(label, []).append(y)
        for place, step in enumerate(steps):
            x = place * (aspect + 0.06)
            axes.imshow(frames[index, step].numpy(), "gray", vmin=0, vmax=255, extent=(x, x + aspect, y + 0.5, y - 0.5))
        cells(axes, routing["neuron"][:, routing["frame_samples"][index]].tolist(), left, y)
    axes.set(xlim=(0, right), ylim=(y + 0.55, -0.55), aspect="auto")
    names = [textwrap.fill(routing["class_names"][label], 24) for label in groups]
    axes.set_yticks([sum(rows) / len(rows) for rows in groups.values()], labels=names, fontsize=9)
    centers = [left + layer * 0.9 + 0.4 for layer in range(layers)]
    columns = ["frames" if len(steps) > 1 else "frame", *(f"layer {layer}" for layer in range(layers))]
    axes.set_xticks([(left - 0.36) / 2, *centers], labels=columns, fontsize=9)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    title = fig.suptitle("Neurons that example clips activate, by layer", fontsize=12)
    fit(fig, axes, title, right * 0.8, (y + 1.1) * 0.8)
    return fig


def fit(fig: Figure, axes: Axes, title: Text, width: float, height: float) -> None:
    """Give the axes exactly these inches, so that frames keep their aspect, and the figure room for names and title."""
    names = max(label.get_window_extent().width for label in axes.get_yticklabels()) / fig.dpi + 0.25
    full = max(names + width + 0.2, title.get_window_extent().width / fig.dpi + 0.3)
    tall = height + 0.75
    start = names + (full - names - width - 0.2) / 2
    fig.set_size_inches(full, tall)
    axes.set_position((start / full, 0.1 / tall, width / full, height / tall))
    title.set_y(1 - 0.12 / tall)


def plot_activation(routing: Mapping[str, Any], neurons: int | None = None) -> Figure:
    """``P(neuron | attribute value)`` by layer, for the class and every attribute.

    Args:
        routing: see :mod:`.measures`.
        neurons: ``N``; ``None`` takes the highest neuron that a sample chose.

    Returns:
        A matplotlib figure: a row of panels an attribute, a column a layer. Titles give the information in bits and as
        a share of the attribute's entropy, and what chance gives. Values that no sample has are grey.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the routing lacks a key or holds another shape.

    Source: the counterpart of the paper's Fig. 2, over all samples.
    """
    routing = check_routing(routing)
    found, layers = attributes(routing), len(routing["neuron"])
    neurons = max(neurons or 0, int(routing["neuron"].max()) + 1)
    information = {(row["layer"], row["attribute"]): row for row in information_table(routing)}
    heights = [0.19 * len(names) for _, names in found.values()]
    labels = {key: _value_labels(attribute, names) for key, (attribute, names) in found.items()}
    beside = 1.6 + 0.062 * max(
        len(label) for column in labels.values() for label in column
    )  # inches, and the color bar
    width = max(5.6, beside + layers * max(2.1, 0.235 * neurons))
    fig = figure(width, 1.4 + sum(heights) + 0.95 * len(found))
    panels = fig.subplots(len(found), layers, squeeze=False, height_ratios=[h + 0.2 for h in heights])
    for row, (key, (attribute, names)) in zip(panels, found.items(), strict=True):
        for layer, axes in enumerate(row):
            share = activation(attribute, routing["neuron"][layer], neurons, len(names))
            image = _heat_map(axes, share, neurons)
            told = information[layer, key]
            axes.set_title(
                f"layer {layer}\n{told['bits']:.2f} bits ({told['share']:.0%}), shuffled {told['shuffled_bits']:.2f}",
                fontsize=8,
            )
        row[0].set_yticks(range(len(names)), labels=labels[key], fontsize=7.5)
        row[0].set_ylabel(key, fontsize=11, fontweight="bold")
    for axes in panels[-1]:
        axes.set_xlabel("neuron", fontsize=9)
    bar = fig.colorbar(image, ax=panels, shrink=min(1.0, 2.5 / fig.get_figheight()), aspect=14, pad=0.02)
    bar.set_label("P(neuron | value)", fontsize=9)
    fig.align_ylabels(panels[:, 0])
    fig.supxlabel(
        "In brackets: samples with a value; how much of the attribute's entropy the neuron explains.\n"
        "Shuffled: bits that the same samples give by chance.",
        fontsize=8,
        color="#555555",
    )
    fig.suptitle("Neurons that each attribute value activates, by layer", fontsize=12)
    return fig


def _value_labels(attribute: Tensor, names: Sequence[str], most: int = 48) -> list[str]:
    """Names, cut in the middle since classes often differ at the end, with how many samples each has."""
    counts = torch.bincount(attribute, minlength=len(names)).tolist()
    short = [name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}" for name in names]
    return [f"{name} ({count})" for name, count in zip(short, counts, strict=True)]


def _heat_map(axes: Axes, share: Tensor, neurons: int) -> Any:
    import matplotlib

    colors = matplotlib.colormaps["magma_r"].with_extremes(bad="#d9d9d9")
    image = axes.imshow(share.numpy(), cmap=colors, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks([])
    axes.tick_params(length=0)
    neuron_ticks(axes, neurons)
    return image
