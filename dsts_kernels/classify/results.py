"""What a classifier answers for a video: classes, the neurons that were chosen, times; as text and as JSON's values."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.sampling import Window

__all__ = ["Classification", "LeftOut", "Times", "WindowResult"]


NAMED = 3  # neurons of a layer that a line of text names besides the most frequent one


class Times(NamedTuple):
    """Seconds of wall clock: reading and making clips, the model without DSTS, DSTS."""

    decode: float = 0.0
    backbone: float = 0.0
    dsts: float = 0.0

    def plus(self, **more: float) -> Times:
        return Times(**{name: value + more.get(name, 0.0) for name, value in self._asdict().items()})


class LeftOut(NamedTuple):
    """A window that cannot be decoded, and why."""

    window: Window
    reason: str


@dataclass(frozen=True, eq=False)
class WindowResult:
    """A window's answer.

    Attributes:
        window: its stretch of the video.
        probabilities: ``(classes,)`` float32.
        neurons: chosen, one a DSTS layer.
        spatial: share of the channels that the chosen neuron of each layer sends to its spatial operator.
        frames: ``(F, H, W, 3)`` uint8, where they were kept, for people: the model sees the square in their middle,
            often smaller.
    """

    window: Window
    probabilities: Tensor
    neurons: tuple[int, ...]
    spatial: tuple[float, ...]
    frames: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Classification:
    """A video's answer.

    Attributes:
        path: the video.
        class_names: in the order of the probabilities.
        windows: those that were read, by time; at least one.
        left_out: those that cannot be decoded.
        times: of all windows together.
        trained: the weights are; where they are random, so are classes and neurons.
    """

    path: Path
    class_names: tuple[str, ...]
    windows: tuple[WindowResult, ...]
    left_out: tuple[LeftOut, ...]
    times: Times
    trained: bool = True

    @property
    def probabilities(self) -> Tensor:
        """``(classes,)``: the mean over windows."""
        return torch.stack([result.probabilities for result in self.windows]).mean(0)

    def top(self, count: int = 5, window: int | None = None) -> list[tuple[str, float]]:
        """The likeliest classes of the video, or of a window, with their probabilities."""
        found = self.probabilities if window is None else self.windows[window].probabilities
        values, order = found.topk(min(count, len(found)))
        return [(self.class_names[i], value) for i, value in zip(order.tolist(), values.tolist(), strict=True)]

    def neurons(self) -> list[dict[int, int]]:
        """For each layer the neurons that were chosen, the most frequent first, and by how many windows."""
        return [dict(Counter(layer).most_common()) for layer in zip(*(r.neurons for r in self.windows), strict=True)]

    def spatial(self) -> list[float]:
        """For each layer the share of channels that are spatial, the mean over windows."""
        return [sum(layer) / len(layer) for layer in zip(*(r.spatial for r in self.windows), strict=True)]

    def text(self, count: int = 5, per_window: bool = False) -> str:
        """Lines to read: the likeliest classes, or that weights are random; neurons; times."""
        first, last = self.windows[0].window, self.windows[-1].window
        whole = len(self.windows) + len(self.left_out)
        stretch = f"{last.end - first.start:.1f} s" + ("" if whole == 1 else f" in {whole} windows")
        lines = [f"{self.path}: {stretch}"]
        lines += [f"  left out: {w.start:.1f} to {w.end:.1f} s: {reason}" for w, reason in self.left_out]
        if self.trained:
            lines += [f"  {share:6.1%}  {name}" for name, share in self.top(count)]
        else:
            lines.append("  weights are random: classes and neurons mean nothing")
        for layer, (chosen, share) in enumerate(zip(self.neurons(), self.spatial(), strict=True)):
            lines.append(f"  layer {layer}: {self._chosen(chosen)}; {share:.1%} of its channels spatial")
        if not self.windows[0].neurons:
            lines.append("  no DSTS in this model")
        if per_window and len(self.windows) > 1:
            lines += self._per_window()
        times = ", ".join(f"{name} {self._milliseconds(value)}" for name, value in self._named_times())
        lines.append(f"  time: {times}")
        return "\n".join(lines)

    def _chosen(self, counts: dict[int, int]) -> str:
        if len(self.windows) == 1:
            return f"neuron {next(iter(counts))}"
        (first, windows), *others = counts.items()
        more = "".join(f", {neuron} in {times}" for neuron, times in others[:NAMED])
        rest = sum(times for _, times in others[NAMED:])
        more += f", others in {rest}" if rest else ""
        return f"neuron {first} in {windows} of {len(self.windows)} windows{more}"

    def _per_window(self) -> list[str]:
        lines = ["  window, s        neurons by layer  " + ("likeliest class" if self.trained else "")]
        for index, result in enumerate(self.windows):
            neurons = " ".join(map(str, result.neurons)) or "-"
            best = "{}, {:.1%}".format(*self.top(1, index)[0]) if self.trained else ""
            lines.append(f"  {result.window.start:7.1f} {result.window.end:7.1f}  {neurons:<16}  {best}".rstrip())
        return lines

    def _named_times(self) -> list[tuple[str, float]]:
        names = {"decode": "decode", "backbone": "backbone", "dsts": "DSTS"}
        skipped = () if self.windows[0].neurons else ("dsts",)
        return [(names[name], value) for name, value in self.times._asdict().items() if name not in skipped]

    @staticmethod
    def _milliseconds(seconds: float) -> str:
        return f"{1e3 * seconds:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"

    def to_dict(self, count: int = 5) -> dict[str, Any]:
        """Plain values for JSON. ``top`` is empty where weights are random; seconds everywhere."""
        window_keys = ("start", "end")
        return {
            "path": str(self.path),
            "trained": self.trained,
            "top": self._top(count),
            "layers": [
                {"neurons": {str(n): times for n, times in chosen.items()}, "spatial_share": share}
                for chosen, share in zip(self.neurons(), self.spatial(), strict=True)
            ],
            "seconds": self.times._asdict(),
            "windows": [
                {
                    **dict(zip(window_keys, result.window, strict=True)),
                    "top": self._top(count, index),
                    "neurons": list(result.neurons),
                    "spatial_shares": list(result.spatial),
                }
                for index, result in enumerate(self.windows)
            ],
            "left_out": [
                {**dict(zip(window_keys, window, strict=True)), "reason": reason} for window, reason in self.left_out
            ],
        }

    def _top(self, count: int, window: int | None = None) -> list[dict[str, Any]]:
        found = self.top(count, window) if self.trained else []
        return [{"class": name, "probability": share} for name, share in found]
