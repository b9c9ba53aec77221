"""All that is measured of a trained DSTS in one record, and as text: costs, usage, information, gates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..viz.measures import gate_band, gate_shares, information_table, information_text, sign_flips
from .changed import dsts_layers
from .counterfactuals import Counterfactual, Measured, counterfactuals

__all__ = ["Report", "probe", "report_text"]


class Report(NamedTuple):
    """What :func:`probe` found; layers are in the order of ``named_modules``.

    Attributes:
        layers: names of the DSTS layers.
        measured: accuracy as it is, and what each change costs, all layers at once.
        by_layer: the same changes, of one layer at a time; empty unless asked for.
        usage: shares of clips that each neuron takes in evaluation, by layer.
        entropy: of the same, in bits.
        information: rows of :func:`~dsts_kernels.viz.information_table`.
        spatial: shares of spatial channels of each neuron, by layer.
        band: lowest and highest share that chance gives in each layer: :func:`~dsts_kernels.viz.gate_band`.
        flipped: shares of gates that crossed the threshold since the start, by layer; ``None`` where it is not known.
    """

    layers: tuple[str, ...]
    measured: Measured
    by_layer: tuple[tuple[Counterfactual, ...], ...]
    usage: tuple[tuple[float, ...], ...]
    entropy: tuple[float, ...]
    information: list[dict[str, Any]]
    spatial: tuple[tuple[float, ...], ...]
    band: tuple[tuple[float, float], ...]
    flipped: tuple[tuple[float, ...], ...] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: of clips only how many there were."""
        m = self.measured
        rows = [row._asdict() | {"costs": row.costs} for row in m.rows]
        own = {"accuracy": m.accuracy, "low": m.low, "high": m.high, "clips": m.clips, "counterfactuals": rows}
        own |= {k: v for k, v in self._asdict().items() if k not in ("measured", "by_layer")}
        return own | {"by_layer": [[row._asdict() for row in rows] for rows in self.by_layer]}


def probe(
    model: nn.Module,
    batches: Iterable,
    *,
    class_names: Iterable[str] | None = None,
    attributes: Mapping[str, Tensor] | None = None,
    attribute_names: Mapping[str, list[str]] | None = None,
    start: Mapping[str, Tensor] | None = None,
    by_layer: bool = False,
    **options: Any,
) -> Report:
    """Measure a trained DSTS so that neither noise nor chance passes for specialisation.

    Args:
        model, batches: of :func:`counterfactuals`.
        class_names: by label; numbers otherwise.
        attributes, attribute_names: of the clips, in the order of ``batches``: see :mod:`dsts_kernels.viz.measures`.
        start: names of DSTS layers to their gate logits ``(N, C)`` when training began.
        by_layer: change each layer alone, too.
        options: others of :func:`counterfactuals`.

    Raises:
        TypeError, ValueError: an argument out of range; names it.
    """
    layers = dsts_layers(model)
    named = {id(part): name for name, part in model.named_modules()}
    names = tuple(named[id(layer)] for layer in layers)
    gates = [layer.gate.detach().cpu() for layer in layers]
    if start is not None and set(start) != set(names):
        raise ValueError(f"start: got layers {', '.join(start)}, wanted {', '.join(names)}")
    flipped = None if start is None else [sign_flips([start[n]], [g])[0] for n, g in zip(names, gates, strict=True)]
    measured = counterfactuals(model, batches, **options)
    alone = ()
    if by_layer and len(layers) > 1:
        each = ({**options, "layers": [index]} for index in range(len(layers)))
        alone = tuple(counterfactuals(model, batches, **one).rows for one in each)
    classes = max(int(measured.label.max()) + 1, 1)
    routing = {
        "neuron": measured.neuron,
        "label": measured.label,
        "class_names": list(map(str, range(classes))) if class_names is None else list(class_names),
        "attributes": attributes or {},
        "attribute_names": attribute_names or {},
    }
    usage = [_usage(neuron, layer) for neuron, layer in zip(measured.neuron, layers, strict=True)]
    bars = sum(len(gate) for gate in gates)
    return Report(
        names,
        measured,
        alone,
        tuple(tuple(share.tolist()) for share in usage),
        tuple(float(-torch.special.xlogy(share, share).sum()) / math.log(2.0) for share in usage),
        information_table(routing),
        tuple(tuple(gate_shares([gate])[0].tolist()) for gate in gates),
        tuple(gate_band(gate.shape[1], bars) for gate in gates),
        None if flipped is None else tuple(tuple(own.tolist()) for own in flipped),
    )


def _usage(neuron: Tensor, layer: nn.Module) -> Tensor:
    """Shares of clips ``(N,)`` that each neuron takes."""
    return torch.bincount(neuron, minlength=layer.num_neurons).double() / len(neuron)


def _rows_text(rows: Iterable[Counterfactual]) -> list[str]:
    lines = [f"{'':<20}  {'top-1 %':>7}  {'cost':>6}  {'95% interval':>15}  {'':<5}  draws %"]
    for row in rows:
        interval = f"{100 * row.low:+.1f} to {100 * row.high:+.1f}"
        drawn = f"{100 * min(row.draws):.1f} to {100 * max(row.draws):.1f}" if len(row.draws) > 1 else ""
        said = "costs" if row.costs else ""
        numbers = f"{100 * row.accuracy:>7.1f}  {100 * row.cost:>+6.1f}"
        lines.append(f"{row.name:<20}  {numbers}  {interval:>15}  {said:<5}  {drawn}".rstrip())
    return lines


def report_text(report: Report) -> str:
    """A :class:`Report` for a terminal."""
    m = report.measured
    lines = [
        f"top-1 {m.accuracy:.1%} of {m.clips} clips, 95% {m.low:.1%} to {m.high:.1%}",
        "",
        "what changes cost, in points of top-1 (all layers at once):",
        *_rows_text(m.rows),
        "",
    ]
    for name, rows in zip(report.layers, report.by_layer, strict=False):
        lines += [f"of {name} alone:", *_rows_text(rows), ""]
    lines += ["neurons that evaluation takes, and their gates:"]
    for index, name in enumerate(report.layers):
        low, high = report.band[index]
        usage = " ".join(f"{100 * share:>4.0f}" for share in report.usage[index])
        spatial = " ".join(f"{100 * share:>4.0f}" for share in report.spatial[index])
        most = math.log2(len(report.usage[index]))
        lines.append(f"{name}")
        lines.append(f"  clips %              {usage}   {report.entropy[index]:.2f} of {most:.2f} bits")
        lines.append(f"  spatial channels %   {spatial}   chance {100 * low:.0f} to {100 * high:.0f}")
        if report.flipped is not None:
            crossed = " ".join(f"{100 * share:>4.0f}" for share in report.flipped[index])
            lines.append(f"  gates that crossed % {crossed}   since the start")
    lines += ["", "what the neuron tells, in bits:", information_text(report.information)]
    return "\n".join(lines)
