"""How neurons and gates came about: usage of neurons, saturated gates and dead neurons by epoch.

A *history* is a list with a dict an epoch. ``epoch`` counts them; ``usage`` ``(L, N)`` are shares of samples that sum
to 1 in a layer, as training chose with its noise; ``test_usage`` are those of the test clips, as evaluation chooses;
``saturated`` are ``L`` shares of gate logits so large that they get no gradient; ``dead`` are ``L``
counts of neurons that no sample chose. Epochs that lack what a figure shows are left out of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .style import LAYERS, figure, neuron_color, paper

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_saturation", "plot_usage", "recorded"]


USAGE = {"usage": "training clips,\nchosen with noise", "test_usage": "test clips,\nas evaluation chooses"}


def recorded(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], Tensor]:
    """``E`` epochs that recorded ``key``, and what they did: ``(E, ...)`` float64.

    Raises:
        ValueError: no epoch did, or shapes differ between epochs.
    """
    rows = [row for row in history if row.get(key) is not None]
    if not rows:
        raise ValueError(f"history: got no epoch with {key!r}, wanted at least one")
    try:
        values = torch.stack([torch.as_tensor(row[key], dtype=torch.float64, device="cpu") for row in rows])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"history: {key!r} is not numbers of one shape in all epochs ({error})") from error
    wanted = 2 if key in USAGE else 1
    if values.dim() != wanted + 1 or values.numel() == 0:
        shape = "(L, N)" if wanted == 2 else "(L,)"
        raise ValueError(f"history: got {key!r} of shape {tuple(values.shape[1:])}, wanted {shape}")
    return [int(row.get("epoch", index)) for index, row in enumerate(rows)], values


def _edges(epochs: Sequence[int]) -> list[float]:
    """Where the step of each epoch starts and ends: halfway to its neighbours."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(epochs)]
    first = epochs[0] - (middles[0] - epochs[0] if middles else 0.5)
    last = epochs[-1] + (epochs[-1] - middles[-1] if middles else 0.5)
    return [first, *middles, last]


def _epoch_axis(axes: Axes, epochs: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    if len(epochs) <= 6:
        axes.set_xticks(epochs)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("epoch", fontsize=9)


def _label_ends(axes: Axes, shares: Tensor, edge: float, height: float) -> None:
    """Number the neurons beside the end of their areas, where these are tall enough for the text."""
    tops = shares.cumsum(0)
    for neuron, (share, top) in enumerate(zip(shares.tolist(), tops.tolist(), strict=True)):
        if share * height >= 0.12:  # inches
            axes.annotate(
                str(neuron),
                (edge, top - share / 2),
                xytext=(3, 0),
                textcoords="offset points",
                ha="left",
                va="center",
                fontsize=7,
            )


def _areas(axes: Axes, epochs: Sequence[int], usage: Tensor, height: float) -> None:
    """A layer's shares ``(E, N)``, stacked."""
    edges, tops = _edges(epochs), usage.cumsum(1)
    for neuron in range(usage.shape[1]):
        top = tops[:, neuron]
        axes.stairs(
            top.tolist(),
            edges,
            baseline=(top - usage[:, neuron]).tolist(),
            fill=True,
            facecolor=neuron_color(neuron),
            edgecolor="white" if len(epochs) <= 30 else "none",
            linewidth=0.4,
            label=str(neuron),
        )
    _label_ends(axes, usage[-1], edges[-1], height)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def plot_usage(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of samples that choose each neuron, over training: a panel a layer, areas stacked from neuron 0 up.

    Args:
        history: see the module; needs ``usage``. Where ``test_usage`` is recorded it has a row of its own: noise
            spreads training clips over neurons that evaluation never takes.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no epoch recorded ``usage``; ``test_usage`` is of other layers or neurons.
    """
    found = {"usage": recorded(history, "usage")}
    layers, neurons = found["usage"][1].shape[1:]
    if any(row.get("test_usage") is not None for row in history):
        found["test_usage"] = recorded(history, "test_usage")
        if found["test_usage"][1].shape[1:] != (layers, neurons):
            shape = tuple(found["test_usage"][1].shape[1:])
            raise ValueError(f"history: got 'test_usage' of shape {shape}, wanted {(layers, neurons)} as 'usage'")
    height = 2.6 if len(found) == 1 else 1.9
    fig = figure(1.5 + 2.9 * layers, height * len(found) + 1.2)
    rows = fig.subplots(len(found), layers, sharey=True, sharex=True, squeeze=False)
    for row, (key, (epochs, usage)) in zip(rows, found.items(), strict=True):
        for layer, axes in enumerate(row):
            _areas(axes, epochs, usage[:, layer], height)
        row[0].yaxis.set_major_formatter("{x:.0%}")
        row[0].set_ylabel(f"share of {USAGE[key]}" if len(found) > 1 else "share of samples", fontsize=9)
    for layer, axes in enumerate(rows[0]):
        axes.set_title(f"layer {layer}", fontsize=10)
    for axes in rows[-1]:
        _epoch_axis(axes, found["usage"][0])
    panels = rows[0]
    handles, labels = panels[0].get_legend_handles_labels()
    columns = 1 if neurons <= 10 else 2
    fig.legend(
        handles[::-1],
        labels[::-1],
        loc="outside right center",
        title="neuron",
        fontsize=8,
        ncols=columns,
        frameon=False,
    )
    fig.suptitle("Which neurons samples choose, by epoch", fontsize=12)
    return fig


def _lines(axes: Axes, epochs: Sequence[int], values: Tensor) -> None:
    """A line a layer; markers while they can be told apart, smaller in later layers so that none hides another."""
    for layer, line in enumerate(values.T):
        color, dash, marker = LAYERS[layer % len(LAYERS)]
        axes.plot(
            epochs,
            line.tolist(),
            color=color,
            linestyle=dash,
            marker=marker if len(epochs) <= 30 else "",
            markersize=max(3.0, 7.0 - 1.4 * layer),
            markerfacecolor="white" if layer == 0 else color,
            linewidth=1.8,
            label=f"layer {layer}",
            clip_on=False,
            zorder=3,
        )
    axes.set_ylim(0, min(1.0, max(0.1, 1.25 * float(values.max()))))  # small shares are seen, too
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.margins(x=0.03)
    if len(epochs) == 1:
        axes.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
    paper(axes)
    _epoch_axis(axes, epochs)


def plot_saturation(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of saturated gates and, beside it, share of dead neurons over training: a line a layer.

    Args:
        history: see the module; needs ``saturated``, ``dead``, and ``usage`` for the number of neurons.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no epoch recorded one of them.
    """
    _, usage = recorded(history, "usage")
    gates_at, saturated = recorded(history, "saturated")
    neurons_at, dead = recorded(history, "dead")
    fig = figure(8.6, 3.5)
    left, right = fig.subplots(1, 2)
    _lines(left, gates_at, saturated)
    left.set_title("saturated: soft gates that are 0 or 1", fontsize=10)
    left.set_ylabel("share of gates", fontsize=9)
    _lines(right, neurons_at, dead / usage.shape[2])
    right.set_title("dead neurons: chosen by no sample in training", fontsize=10)
    right.set_ylabel(f"share of {usage.shape[2]} neurons", fontsize=9)
    handles, labels = left.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False, handlelength=3)
    fig.suptitle("Soft gates that are settled, and neurons that no sample chooses, by epoch", fontsize=12)
    return fig
