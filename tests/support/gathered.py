"""What both gathers are held to, launched by whatever stands in for a GPU: panels bit for bit, choices, plans."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsts_kernels.backends.base import FrozenWeights
from dsts_kernels.backends.gpu.kernels import Kernels
from dsts_kernels.backends.gpu.lists import Lists, panel_width
from dsts_kernels.backends.packing import tile_channels

from .inputs import GATES, LAYOUTS

# Channels, share of them that is spatial, taps of the scoring kernel.
ROUTED = {
    "rows": (72, 0.5, 1),
    "ragged": (70, 0.4, 1),
    "all-spatial": (64, 1.0, 1),
    "all-temporal": (128, 0.0, 9),
    "a block more": (256, 0.3, 1),
    "few": (3, 0.5, 1),
    "several rounds": (512, 0.5, 1),
}
BATCH, NEURONS, PARTS, DIVISOR = 2, 3, 2, 7


def same(found: Tensor, wanted: Tensor) -> bool:
    return torch.equal(found.nan_to_num(nan=77), wanted.nan_to_num(nan=77))


def written(rows: Tensor, parts: list[tuple[Tensor, Tensor | None]], width: int) -> Tensor:
    """A panel of ``rows (T, H, W, C)``: lists and what scales them, in K blocks; NaN where nobody writes."""
    block, at = tile_channels(rows.dtype), 0
    wanted = torch.full((*rows.shape[:3], width), torch.nan, dtype=rows.dtype)
    for own, scale in parts:
        columns = -(-len(own) // block) * block
        wanted[..., at : at + columns] = 0
        values = rows[..., own]
        wanted[..., at : at + len(own)] = values if scale is None else (values.float() * scale[own]).to(rows.dtype)
        at += columns
    return wanted


def lists_of(gates: Tensor, block: int) -> Lists:
    """Of every sample of ``gates (B, C)``."""
    orders, plans, channels = [], [], gates.shape[1]
    for b, row in enumerate(gates.float()):
        first, both, second = (mask.nonzero()[:, 0] for mask in (row == 1, (row > 0) & (row < 1), row == 0))
        read, start = len(first) + len(both), len(first)
        orders.append(torch.cat([first, both, second]))
        plans.append([0, -(-read // block), -(-(channels - start) // block), read, start, b])
    return Lists(torch.stack(orders).int(), torch.tensor(plans, dtype=torch.int32), torch.empty(0, dtype=torch.int8))


def check_gather_panel(
    kernels: Kernels, layout: str, channels: int, gate: str, size: Sequence[int], dtype: torch.dtype
) -> None:
    """The second sample's neuron is out of range, so that it becomes NaN."""
    x = LAYOUTS[layout](torch.randn(BATCH, channels, *size).to(dtype))
    gates, block = GATES[gate](BATCH, channels).to(dtype), tile_channels(dtype)
    lists, width = lists_of(gates, block), panel_width(channels, dtype, True)
    panel = kernels.gather_panel(x, gates, torch.tensor([1, NEURONS + 2]), NEURONS, None, lists, width)
    _, _, _, read, start, _ = lists.plans[0].tolist()
    scale, order = gates[0].float(), lists.order[0].long()
    assert same(panel[0], written(x[0].movedim(0, -1), [(order[:read], scale), (order[start:], 1 - scale)], width))
    assert panel[1, ..., : int(lists.plans[1, 1:3].sum()) * block].isnan().all()


def check_route_and_gather(kernels: Kernels, layout: str, case: str, size: Sequence[int], dtype: torch.dtype) -> None:
    """Choice, plan, scores, zeroed counters and panel; NaN of the second sample stays there."""
    channels, share, taps = ROUTED[case]
    block, x = tile_channels(dtype), torch.randn(BATCH, channels, *size)
    x[1, channels // 2] = torch.nan
    x = LAYOUTS[layout](x.to(dtype))
    sums, scoring = torch.randn(BATCH, PARTS, channels * taps), torch.randn(NEURONS, channels, taps)
    sums[1, 0, 0] = torch.nan
    counts = [round(channels * share), channels // 3 if 0 < share < 1 else round(channels * share)]
    counts.append(counts[0])
    orders = [torch.cat([part.sort()[0] for part in torch.randperm(channels).split([n, channels - n])]) for n in counts]
    starts = torch.tensor([0, *counts]).cumsum(0)
    weights = FrozenWeights(
        scoring, torch.stack(orders).int(), starts, torch.empty(0), torch.empty(NEURONS, 4), None
    )  # fmt: skip
    neuron, scores = torch.full((BATCH,), -7), torch.full((BATCH, NEURONS), torch.nan)
    counters = torch.full((300,), 5, dtype=torch.int32)
    panel, plan = kernels.route_and_gather(x, sums, weights, DIVISOR, neuron, scores, counters)
    wanted = torch.einsum("bps,ns->bn", sums.double(), scoring.flatten(1).double()) / DIVISOR
    torch.testing.assert_close(scores, wanted.float(), rtol=1e-4, atol=1e-4, equal_nan=True)
    assert neuron.tolist() == scores.argmax(1).tolist() and not counters.any()
    for b, n in enumerate(neuron.tolist()):
        own, count = orders[n], counts[n]
        blocks = [[-(-m // block), -(-(channels - m) // block)] for m in counts]
        filters = sum(9 * spatial + 3 * temporal for spatial, temporal in blocks[:n])
        assert plan[b].tolist() == [filters, *blocks[n], count, count, n]
        parts = [(own[:count], None), (own[count:], None)]
        assert same(panel[b], written(x[b].movedim(0, -1), parts, panel.shape[-1]))
