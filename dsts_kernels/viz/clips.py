"""Frames of a video, the neurons that they activate, and the class that the model names: a row a window."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .specialization import cells
from .style import badge, figure, ink, neuron_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..classify import Classification, WindowResult

__all__ = ["plot_classification"]

FRAMES = 5  # of a window, at most
ROW, GAP = 0.95, 0.04  # height of a frame in inches, and the space between two
DIMMED = 0.4  # brightness of what a model does not see
NUMBERED = 0.16  # inches of a window over time, from which on the number of its neuron is written in it
LABEL = 30  # characters of a class's name in a line


def plot_classification(found: Classification) -> Figure:
    """Frames of a video's windows, the neuron that each activates in each layer, and the likeliest class.

    Beneath, where there are several windows, the neurons of all of them over time.

    Args:
        found: of :class:`~dsts_kernels.classify.Classifier`, called with ``keep``: windows whose frames to draw. Parts
            of a frame that the model does not see are dark.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no window has its frames.

    Source: the counterpart of the paper's Fig. 2 for one video.
    """
    shown = [result for result in found.windows if result.frames is not None]
    if not shown:
        raise ValueError("found: got no frames, wanted some: classifier(path, keep=12)")
    layers, several = len(shown[0].neurons), len(found.windows) > 1
    pictures = [picture_row(result.frames) for result in shown]
    wide = max(ROW * row.shape[1] / row.shape[0] for row in pictures)
    left, right = 1.3, 2.6 if found.trained or several else 0.3  # inches: times, classes
    body = wide + (0.15 + 0.72 * layers if layers else 0.0)
    rows = len(shown) * (ROW + 0.1)
    beneath = 1.05 + 0.28 * layers if several and layers else 0.3
    width, height = max(left + body + right, 6.0), 0.7 + rows + beneath
    fig = figure(width, height, layout=None)
    top = fig.add_axes((left / width, beneath / height, body / width, rows / height))
    draw_rows(top, found, shown, pictures, wide, body)
    if several and layers:
        strip = fig.add_axes((left / width, 0.7 / height, body / width, 0.28 * layers / height))
        draw_strip(strip, found)
    seen = "The square in the middle of a frame is what the model sees; the rest is darkened."
    fig.text(left / width, 0.08 / height, seen, fontsize=7, color="#555555", va="bottom")
    name = found.path.name if len(found.path.name) <= 60 else f"{found.path.name[:29]}…{found.path.name[-30:]}"
    said = "frames and the neurons they activate" if layers else "frames; the model has no DSTS"
    fig.suptitle(f"{name}: {said}", fontsize=12, x=0.5, y=1 - 0.12 / height)
    if not found.trained:
        fig.text(0.5, 1 - 0.42 / height, "random weights: neurons mean nothing", ha="center", va="top", fontsize=9)
    return fig


def picture_row(frames: Tensor) -> Tensor:
    """Some of a window's frames side by side, what the model does not see darkened: ``(H, W', 3)`` uint8."""
    count, height, width = frames.shape[:3]
    chosen = torch.linspace(0, count - 1, min(count, FRAMES), device="cpu").round().long().tolist()
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    # Of a very wide or high picture only the surroundings of the square: as much on either side as half of it.
    high, broad = min(height, 2 * side), min(width, 2 * side)
    y, x = (height - high) // 2, (width - broad) // 2
    space = torch.full((high, max(1, round(high * GAP)), 3), 255, dtype=torch.uint8, device="cpu")
    parts = []
    for index in chosen:
        frame = (frames[index].float() * DIMMED).to(torch.uint8)
        frame[top : top + side, left : left + side] = frames[index, top : top + side, left : left + side]
        parts += [frame[y : y + high, x : x + broad], space]
    return torch.cat(parts[:-1], 1)


def draw_rows(
    axes: Axes,
    found: Classification,
    shown: list[WindowResult],
    pictures: list[Tensor],
    wide: float,
    body: float,
) -> None:
    """A row a window, in inches: frames, a cell a layer, the class beside."""
    from matplotlib.transforms import blended_transform_factory

    beside = blended_transform_factory(axes.transAxes, axes.transData)
    step = ROW + 0.1
    for place, (result, row) in enumerate(zip(shown, pictures, strict=True)):
        y = place * step + step / 2
        own = ROW * row.shape[1] / row.shape[0]
        extent = ((wide - own) / 2, (wide + own) / 2, y + ROW / 2, y - ROW / 2)
        axes.imshow(row.numpy(), extent=extent, interpolation="antialiased")
        for layer, neuron in enumerate(result.neurons):
            cells(axes, [neuron], wide + 0.15 + 0.72 * layer, y, side=0.64)
            share = f"{result.spatial[layer]:.0%} spatial"
            axes.text(wide + 0.47 + 0.72 * layer, y + 0.42, share, ha="center", va="center", fontsize=6.5)
        if found.trained:
            lines = [
                f"{share:.0%}  {textwrap.shorten(name, LABEL, placeholder='…')}"
                for name, share in top_of(found, result)
            ]
            text = axes.text(1.0, y, "\n".join(lines), transform=beside, va="center", fontsize=8, linespacing=1.5)
            text.set(x=1.0 + 0.12 / body)
    axes.set(xlim=(0, body), ylim=(len(shown) * step, 0), aspect="auto")
    times = [f"{r.window.start:.1f} to {r.window.end:.1f} s" for r in shown]
    axes.set_yticks([place * step + step / 2 for place in range(len(shown))], labels=times, fontsize=8)
    centers = [wide + 0.47 + 0.72 * layer for layer in range(len(shown[0].neurons))]
    names = [f"layer {layer}" for layer in range(len(centers))]
    axes.set_xticks(centers, labels=names, fontsize=8)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)


def top_of(found: Classification, result: WindowResult) -> list[tuple[str, float]]:
    return found.top(3, found.windows.index(result))


def draw_strip(axes: Axes, found: Classification) -> None:
    """The neurons of all windows over time, a line a layer."""
    layers = len(found.windows[0].neurons)
    first, last = found.windows[0].window.start, found.windows[-1].window.end
    starts = [result.window.start for result in found.windows]
    ends = [min(r.window.end, s) for r, s in zip(found.windows, [*starts[1:], last], strict=True)]
    inches = axes.get_figure().get_figwidth() * axes.get_position().width
    narrow = min(end - start for start, end in zip(starts, ends, strict=True)) / (last - first) * inches < NUMBERED
    for layer in range(layers):
        colors = [neuron_color(result.neurons[layer]) for result in found.windows]
        spans = [(start, end - start) for start, end in zip(starts, ends, strict=True)]
        edge = {"linewidth": 0.0} if narrow else {"linewidth": 0.4, "edgecolor": "white"}
        axes.broken_barh(spans, (layer - 0.44, 0.88), facecolors=colors, **edge)
        for (start, length), result in zip(spans, found.windows, strict=True):
            if length / (last - first) * inches < NUMBERED:
                continue
            neuron = result.neurons[layer]
            middle = start + length / 2
            axes.text(middle, layer, str(neuron), ha="center", va="center", fontsize=7, color=ink(neuron_color(neuron)))
    axes.set(xlim=(first, last), ylim=(layers - 0.5, -0.5))
    axes.set_yticks(range(layers), labels=[f"layer {layer}" for layer in range(layers)], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(f"seconds; neurons of all {len(found.windows)} windows", fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if narrow:  # its numbers beside it
        axes.text(1.0 + 0.1 / inches, 1.0, "neurons", transform=axes.transAxes, fontsize=8, va="center")
        tall = axes.get_figure().get_figheight() * axes.get_position().height
        used = sorted({neuron for result in found.windows for neuron in result.neurons})
        for place, neuron in enumerate(used):
            x = 1.0 + (0.18 + 0.24 * (place % 8)) / inches
            y = 1.0 - (0.24 + 0.22 * (place // 8)) / tall
            axes.text(x, y, str(neuron), transform=axes.transAxes, fontsize=7, va="center", **badge(neuron))
