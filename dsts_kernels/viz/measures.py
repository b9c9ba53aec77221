"""Numbers behind the figures: shares of spatial channels, P(neuron | attribute value), and information in bits.

A *routing* is a dict of what an evaluation pass recorded: ``neuron (L, B)`` int64, ``label (B,)`` int64,
``class_names``, and optionally ``attributes`` (name to ``(B,)`` int64) with ``attribute_names`` (name to the names of
its values), ``frames`` uint8 ``(K, F, H, W)`` or ``(K, F, H, W, 3)`` and ``frame_samples (K,)`` int64 into ``B``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops._checks import describe

__all__ = [
    "activation",
    "attributes",
    "check_routing",
    "gate_band",
    "gate_shares",
    "information_table",
    "information_text",
    "learned_text",
    "mutual_information",
    "shuffled_information",
    "sign_flips",
]


ROUNDING = 1e-12  # bits: of equal tables, counted in another order


def gate_shares(gates: Sequence[Tensor]) -> Tensor:
    """Share of each neuron's channels whose hard gate is spatial: logits above 0. The rest are temporal.

    Args:
        gates: one ``(N, C)`` floating tensor of gate logits for each of ``L`` layers; ``C`` may differ by layer.

    Returns:
        ``(L, N)`` float32, from 0 to 1.

    Raises:
        ValueError: no layers, a gate that is not ``(N, C)`` with channels, or layers of different ``N``.

    Source: data of the paper's Fig. 1; the threshold is that of a hard gate in Algorithm 1.
    """
    gates = list(gates)
    if not gates:
        raise ValueError("gates: got none, wanted a tensor (N, C) for every layer")
    for layer, gate in enumerate(gates):
        if not isinstance(gate, Tensor) or gate.dim() != 2 or gate.numel() == 0:
            raise ValueError(f"gates[{layer}]: got {describe(gate)}, wanted a tensor (N, C)")
        if gate.shape[0] != gates[0].shape[0]:
            raise ValueError(f"gates[{layer}]: got {gate.shape[0]} neurons, wanted {gates[0].shape[0]} as in layer 0")
    return torch.stack([(gate.detach() > 0).float().mean(dim=1).cpu() for gate in gates])


def gate_band(channels: int, bars: int = 1, level: float = 0.95) -> tuple[float, float]:
    """Between which shares random gates lie: ``channels`` fair coins, the exact binomial.

    Args:
        channels: ``C`` of a layer.
        bars: how many neurons are looked at; with ``level``, the chance that *all* of them lie within (Sidak), since a
            reader sees the most extreme first.
        level: that chance, at least.

    Returns:
        The lowest and the highest share.

    Raises:
        ValueError: an argument out of range.

    >>> gate_band(48, bars=12)
    (0.2916666666666667, 0.7083333333333334)
    """
    for name, value in (("channels", channels), ("bars", bars)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, wanted an int of at least 1")
    if not 0 < level < 1:
        raise ValueError(f"level: got {level!r}, wanted a number above 0 and below 1")
    tail = (1 - level ** (1 / bars)) / 2
    below, low = 0, 0
    while (below := below + math.comb(channels, low)) / 2**channels <= tail:
        low += 1
    return low / channels, (channels - low) / channels


def sign_flips(start: Sequence[Tensor], gates: Sequence[Tensor]) -> Tensor:
    """Share of each neuron's gates that are on the other side of the threshold than at the start.

    A share of spatial channels may stay where it was while half of the gates cross; and gates that never cross are
    those of the random start, whatever their share looks like.

    Args:
        start, gates: one ``(N, C)`` floating tensor of gate logits for each of ``L`` layers.

    Returns:
        ``(L, N)`` float32, from 0 to 1.

    Raises:
        ValueError: as :func:`gate_shares`, or layers of other shapes at the start.
    """
    start, gates = list(start), list(gates)
    gate_shares(gates)
    shapes = [[tuple(gate.shape) for gate in some] for some in (start, gates)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"start: got gates of shapes {shapes[0]}, wanted {shapes[1]}")
    pairs = zip(start, gates, strict=True)
    return torch.stack([((s.detach().cpu() > 0) != (g.detach().cpu() > 0)).float().mean(dim=1) for s, g in pairs])


def _indices(name: str, value: object, shape: tuple[int, ...] | None, below: int | None = None) -> Tensor:
    """``value`` as int64 indices on the CPU, or an error that names it."""
    whole = isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
    if not whole or (shape is not None and tuple(value.shape) != shape):
        wanted = "" if shape is None else f" of shape {shape}"
        raise ValueError(f"{name}: got {describe(value)}, wanted an int64 tensor{wanted}")
    value = value.long().cpu()
    if value.numel() and (value.min() < 0 or (below is not None and value.max() >= below)):
        upper = "" if below is None else f" to {below - 1}"
        raise ValueError(f"{name}: got {int(value.min())} to {int(value.max())}, wanted indices from 0{upper}")
    return value


def _pair(attribute: Tensor, neuron: Tensor) -> tuple[Tensor, Tensor]:
    attribute = _indices("attribute", attribute, None).flatten()
    if attribute.numel() == 0:
        raise ValueError("attribute: got no samples, wanted at least 1")
    return attribute, _indices("neuron", neuron, tuple(attribute.shape))


def _counts(attribute: Tensor, neuron: Tensor, neurons: int | None = None, values: int | None = None) -> Tensor:
    """The contingency table ``(A, N)``, float64."""
    neurons = int(neuron.max()) + 1 if neurons is None else neurons
    values = int(attribute.max()) + 1 if values is None else values
    return torch.bincount(attribute * neurons + neuron, minlength=values * neurons).view(values, neurons).double()


def _entropy(counts: Tensor) -> float:
    p = counts.flatten() / counts.sum()
    return float(-torch.xlogy(p, p).sum()) / math.log(2.0)


def _information(counts: Tensor) -> float:
    return max(0.0, _entropy(counts.sum(1)) + _entropy(counts.sum(0)) - _entropy(counts))


def mutual_information(attribute: Tensor, neuron: Tensor, *, normalised: bool = False) -> float:
    """What the neuron tells about an attribute, ``I(attribute; neuron)``, by the plug-in estimate.

    Small samples bias it upwards: compare it with :func:`shuffled_information`.

    Args:
        attribute: ``(B,)`` int64, the value of every sample, from 0.
        neuron: ``(B,)`` int64, the neuron that every sample chose in one layer.
        normalised: divide by the attribute's entropy.

    Returns:
        Bits; normalised, the share of the attribute's entropy that the neuron explains, 0 to 1 (0 where every
        sample has the same value).

    Raises:
        ValueError: not whole numbers from 0, no samples, or two lengths.

    >>> mutual_information(torch.tensor([0, 0, 1, 1]), torch.tensor([3, 3, 5, 5]))
    1.0
    """
    counts = _counts(*_pair(attribute, neuron))
    bits = _information(counts)
    if not normalised:
        return bits
    entropy = _entropy(counts.sum(1))
    return min(1.0, bits / entropy) if entropy > 0 else 0.0


def _shuffled(attribute: Tensor, neuron: Tensor, shuffles: int, seed: int) -> Tensor:
    """:func:`mutual_information` under ``shuffles`` permutations of the samples: ``(shuffles,)`` bits."""
    attribute, neuron = _pair(attribute, neuron)
    if shuffles < 1:
        raise ValueError(f"shuffles: got {shuffles}, wanted at least 1")
    generator = torch.Generator("cpu").manual_seed(seed)
    orders = (torch.randperm(len(neuron), generator=generator, device="cpu") for _ in range(shuffles))
    bits = [_information(_counts(attribute, neuron[order])) for order in orders]
    return torch.tensor(bits, dtype=torch.float64, device="cpu")


def shuffled_information(attribute: Tensor, neuron: Tensor, *, shuffles: int = 100, seed: int = 0) -> float:
    """:func:`mutual_information` expected of chance: its mean, in bits, over permutations of the samples.

    Args:
        attribute, neuron: ``(B,)`` int64.
        shuffles: how many permutations, at least 1.
        seed: of the permutations; torch's own generator is left alone.
    """
    return float(_shuffled(attribute, neuron, shuffles, seed).mean())


def activation(attribute: Tensor, neuron: Tensor, neurons: int, values: int) -> Tensor:
    """``P(neuron | attribute value)``: data of the paper's Fig. 2.

    Returns:
        ``(values, neurons)`` float64, rows that sum to 1; NaN in the rows of values that no sample has.
    """
    attribute, neuron = _pair(attribute, neuron)
    counts = _counts(attribute, neuron, neurons, values)
    return counts / counts.sum(dim=1, keepdim=True)


def check_routing(routing: object) -> dict[str, Any]:
    """A routing with tensors on the CPU and ``attributes`` filled in, or a ValueError that names the key."""
    if not isinstance(routing, Mapping):
        raise ValueError(f"routing: got {type(routing).__name__}, wanted a dict")
    missing = [key for key in ("neuron", "label", "class_names") if key not in routing]
    if missing:
        raise ValueError(f"routing: got no {' and no '.join(map(repr, missing))}")
    checked = dict(routing)
    neuron = checked["neuron"] = _indices("routing['neuron']", routing["neuron"], None)
    if neuron.dim() != 2 or neuron.numel() == 0:
        raise ValueError(f"routing['neuron']: got {describe(routing['neuron'])}, wanted (L, B)")
    samples = neuron.shape[1]
    checked["class_names"] = [str(name) for name in routing["class_names"]]
    checked["label"] = _indices("routing['label']", routing["label"], (samples,), len(checked["class_names"]))
    names = routing.get("attribute_names") or {}
    checked["attributes"] = {}
    for key, value in (routing.get("attributes") or {}).items():
        if key not in names:
            raise ValueError(f"routing['attribute_names']: got no {key!r}, which routing['attributes'] has")
        checked["attributes"][key] = _indices(f"routing['attributes'][{key!r}]", value, (samples,), len(names[key]))
    frames = routing.get("frames")
    if frames is not None:
        size = (*frames.shape[1:4], *((3,) if frames.dim() == 5 else ())) if isinstance(frames, Tensor) else None
        if size is None or frames.dtype != torch.uint8 or tuple(frames.shape[1:]) != size or 0 in size:
            raise ValueError(
                f"routing['frames']: got {describe(frames)}, wanted uint8 of shape (K, F, H, W) or (K, F, H, W, 3)"
            )
        which = routing.get("frame_samples")
        checked["frame_samples"] = _indices("routing['frame_samples']", which, (len(frames),), samples)
    return checked


def attributes(routing: Mapping[str, Any]) -> dict[str, tuple[Tensor, list[str]]]:
    """Every attribute of a checked routing, the class first: values ``(B,)`` and the names of values."""
    found = {"class": (routing["label"], routing["class_names"])}
    for key, value in routing["attributes"].items():
        found[key] = (value, [str(name) for name in routing["attribute_names"][key]])
    return found


def information_table(
    routing: Mapping[str, Any], *, shuffles: int = 100, seed: int = 0
) -> list[dict[str, int | str | float]]:
    """How much the neuron of each layer tells about the class and each attribute.

    Args:
        routing: see the module.
        shuffles, seed: of :func:`shuffled_information`.

    Returns:
        A row for every layer and attribute: ``layer``, ``attribute``, ``bits``, ``share`` of the attribute's entropy,
        and what chance gives: ``shuffled_bits`` in the mean, ``chance_bits`` at most, in 95 of 100 permutations, and
        ``p``, the share of permutations that tell as much (the samples as they are counted in, so never 0).

    Raises:
        ValueError: the routing lacks a key or holds another shape.
    """
    routing = check_routing(routing)
    rows = []
    for layer, neuron in enumerate(routing["neuron"]):
        for name, (attribute, _) in attributes(routing).items():
            row = {"layer": layer, "attribute": name, "bits": mutual_information(attribute, neuron)}
            row["share"] = mutual_information(attribute, neuron, normalised=True)
            chance = _shuffled(attribute, neuron, shuffles, seed)
            row["shuffled_bits"] = float(chance.mean())
            row["chance_bits"] = float(chance.quantile(0.95, interpolation="higher"))
            as_much = int((chance >= row["bits"] - ROUNDING).sum())
            row["p"] = (as_much + 1) / (shuffles + 1)
            rows.append(row)
    return rows


def information_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """:func:`information_table` as aligned lines for a terminal."""
    width = max([len("attribute"), *(len(row["attribute"]) for row in rows)])
    head = f"{'layer':>5}  {'attribute':<{width}}  {'bits':>6}  {'of entropy':>10}  {'shuffled':>8}  {'chance 95%':>10}"
    lines = [f"{head}  {'p':>6}"]
    for row in rows:
        numbers = (
            f"{row['bits']:>6.3f}  {row['share']:>10.1%}  {row['shuffled_bits']:>8.3f}  {row['chance_bits']:>10.3f}"
        )
        lines.append(f"{row['layer']:>5}  {row['attribute']:<{width}}  {numbers}  {row['p']:>6.3f}")
    return "\n".join(lines)


CHANCE = 0.01  # below it chance no longer explains what a table says


def learned_text(routing: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """One line where routing tells nothing yet: all that neurons say of classes and attributes chance says, too.

    Bits times twice the samples are distributed as chi-squared where attribute and neuron are independent. Rows are
    scaled to what shuffled samples give, as small samples go beyond it, and tested at :data:`CHANCE` over all rows.

    Args:
        routing: see the module.
        rows: of :func:`information_table`.

    Returns:
        The line, or ``None`` where some layer tells more than chance.
    """
    routing = check_routing(routing)
    found = attributes(routing)
    for row in rows:
        attribute, neuron = found[row["attribute"]][0], routing["neuron"][row["layer"]]
        freedom = (attribute.unique().numel() - 1) * (neuron.unique().numel() - 1)
        if freedom == 0 or row["shuffled_bits"] <= 0:
            continue
        squared = torch.tensor(freedom * row["bits"] / row["shuffled_bits"], dtype=torch.float64, device="cpu")
        half = torch.tensor(freedom / 2, dtype=torch.float64, device="cpu")
        if float(torch.special.gammaincc(half, squared / 2)) * len(rows) < CHANCE:
            return None
    most = max(rows, key=lambda row: row["bits"])
    return (
        f"nothing learned yet: neurons tell no more than chance does (at most {most['bits']:.3f} bits, of "
        f"{most['attribute']!r} in layer {most['layer']}; shuffled samples give {most['shuffled_bits']:.3f})"
    )
