"""From the checkpoint of a training run to figures: find its gates, draw all that it has data for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..files import replacing
from .measures import gate_shares, information_table
from .specialization import plot_activation, plot_examples, plot_gates
from .training import plot_saturation, plot_usage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["INFORMATION", "draw", "find_gates", "gates_at_start"]

INFORMATION = "information.json"
DPI = 150


def find_gates(state: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The gates of every :class:`~dsts_kernels.FusedDSTS` in a ``state_dict``.

    Args:
        state: parameter names to tensors.

    Returns:
        The name of each DSTS module, ``""`` for the model itself, to its ``L`` gates ``(N, C)`` in order of layers. A
        gate counts where a layer has scoring kernels too.

    Raises:
        ValueError: a gate is parametrized, pruned or normed: only the model can compute it.
    """
    found: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        if re.search(r"(^|\.)layers\.\d+\.(parametrizations\.gate\.|gate_(orig|g)$)", key):
            raise ValueError(
                f"state: got {key!r}, from which the model computes a gate, wanted the gate itself: save the model "
                "after remove_parametrizations, prune.remove or remove_weight_norm"
            )
        match = re.fullmatch(r"(?:(.+)\.)?layers\.(\d+)\.gate", key)
        if match and key.removesuffix("gate") + "scoring" in state:
            found.setdefault(match[1] or "", {})[int(match[2])] = value
    return {name: [layers[index] for index in sorted(layers)] for name, layers in found.items()}


def gates_at_start(checkpoint: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """Where gates began, as :func:`find_gates` orders them; nothing where the checkpoint does not say.

    ``gates_at_start`` maps the names of DSTS layers to gate logits ``(N, C)``.

    Raises:
        ValueError: the layers named there are not those of the model.
    """
    began = checkpoint.get("gates_at_start")
    if not began:
        return {}
    model = checkpoint["model"]
    found = find_gates({**{f"{name}.gate": gate for name, gate in began.items()}, **_scoring(model)})
    shapes = [{name: [g.shape for g in own] for name, own in some.items()} for some in (found, find_gates(model))]
    if shapes[0] != shapes[1]:
        raise ValueError("checkpoint: got other layers in 'gates_at_start' than in 'model', wanted the same")
    return found


def _scoring(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.endswith("scoring")}


def draw(checkpoint: Mapping[str, Any], directory: str | Path) -> list[Path]:
    """Draw every figure that a checkpoint has data for.

    Args:
        checkpoint: ``model`` gives ``gates.png`` (``gates-NAME.png`` where there are several DSTS modules), with
            ``gates_at_start`` also where they began; ``routing`` gives ``activation.png``, ``information.json`` (rows
            of :func:`information_table`) and, with ``frames``, ``examples.png``; ``history`` gives ``usage.png`` and
            ``saturation.png``.
        directory: where to; made if it is missing.

    Returns:
        The files that were written, ``information.json`` last.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is nothing to draw, or a part has another shape than it should; names the key.
    """
    model, history = checkpoint.get("model") or {}, checkpoint.get("history") or []
    routing = checkpoint.get("routing")
    if not isinstance(model, Mapping):
        raise ValueError(f"checkpoint: got {type(model).__name__} in 'model', wanted a state_dict")
    if not isinstance(history, Sequence) or not all(isinstance(row, Mapping) for row in history):
        raise ValueError(f"checkpoint: got {type(history).__name__} in 'history', wanted a list of dicts")
    gates, start = find_gates(model), gates_at_start(checkpoint)
    plots: dict[str, Callable[[], Figure]] = {}
    for name, layers in gates.items():
        stem = "gates" if len(gates) == 1 else "gates-" + (re.sub(r"[^\w.-]", "_", name) or "model")
        began = start.get(name)
        plots[stem] = lambda layers=layers, began=began: plot_gates(
            gate_shares(layers), [layer.shape[1] for layer in layers], None if began is None else gate_shares(began)
        )
    neurons = max((layer.shape[0] for layers in gates.values() for layer in layers), default=None)
    rows = None
    if routing is not None:
        rows = information_table(routing)
        if routing.get("frames") is not None and len(routing["frames"]):
            plots["examples"] = lambda: plot_examples(routing)
        plots["activation"] = lambda: plot_activation(routing, neurons)
    if any(row.get("usage") is not None for row in history):
        plots["usage"] = lambda: plot_usage(history)
        if all(any(row.get(key) is not None for row in history) for key in ("saturated", "dead")):
            plots["saturation"] = lambda: plot_saturation(history)
    if not plots:
        raise ValueError(
            "checkpoint: got no DSTS gates in 'model', no 'routing' and no 'usage' in 'history', "
            "wanted one of them: a model without DSTS has nothing to draw"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for stem, plot in plots.items():
        written.append(directory / f"{stem}.png")
        with replacing(written[-1]) as beside:
            plot().savefig(beside, dpi=DPI, format="png")
    if rows is not None:
        written.append(directory / INFORMATION)
        with replacing(written[-1]) as beside:
            beside.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return written
