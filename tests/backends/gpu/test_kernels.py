"""Single kernels by their launchers: grouping, channel lists, gathering, filters' layouts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.gpu.lists import panel_width
from dsts_kernels.backends.packing import tile_channels
from dsts_kernels.testing import assert_close

from ...support.gathered import ROUTED, check_route_and_gather
from ...support.gathered import lists_of as plain_lists
from ...support.inputs import GATES, LAYOUTS, SIZE, TILES, gated_inputs, hard_gate
from ...support.stand_ins import BACKEND, KERNELS, dtypes, emulated

pytestmark = emulated

NEURONS = {
    "any": ([3, 0, 3, 1, 0], 4),
    "one": ([2, 2, 2], 3),
    "single": ([0], 1),
    "more-than-samples": ([16, 3], 17),
    "out-of-range": ([3, -1, 9, 0, 3, -5], 4),
    "none-in-range": ([4, 7], 4),
    "many": ([i * 7 % 13 for i in range(70)], 13),
}


@pytest.mark.parametrize("neuron, neurons", NEURONS.values(), ids=NEURONS)
def test_group_samples(neuron, neurons, in_any_order):
    """Slots number the chosen neurons in order, and each lists its samples in order; strays belong to none."""
    in_any_order()
    found = KERNELS.group_samples(torch.tensor(neuron), neurons)
    chosen = sorted({n for n in neuron if 0 <= n < neurons})
    count = min(len(neuron), neurons)
    assert found.neuron_of.tolist() == chosen + [-1] * (count - len(chosen))
    assert found.slot_of.tolist() == [chosen.index(n) if n in chosen else -1 for n in range(neurons)]
    assert sorted(found.members.tolist()) == list(range(len(neuron)))
    for b, n in enumerate(neuron):
        assert found.slots[b] == (chosen.index(n) if n in chosen else -1)
    for slot, n in enumerate(chosen):
        first, size = found.groups[slot].tolist()
        assert found.members[first : first + size].tolist() == [b for b, m in enumerate(neuron) if m == n]


def lists_of(rows: list[torch.Tensor]) -> tuple[list[int], list[int], list[int]]:
    """Channels that only the first operator reads in all these rows of gates, both do, only the second does."""
    gate = torch.stack(rows)
    first, second = (gate == 1).all(0), (gate == 0).all(0)
    return tuple(mask.nonzero()[:, 0].tolist() for mask in (first, ~first & ~second, second))


@pytest.mark.parametrize("channels", [1, 33, 1100])
@pytest.mark.parametrize("gate", GATES)
def test_list_channels(gate, channels):
    """Each sample's lists, one order whose prefix and suffix they are, and the K blocks they fill; NaN is in both."""
    gate = GATES[gate](4, channels)
    gate[3, 0] = torch.nan
    groups = KERNELS.group_samples(torch.tensor([1, 0, 1, 5]), 3)
    found = KERNELS.list_channels(gate, groups, False, 32)
    for b in range(4):
        first, both, second = lists_of([gate[b]])
        assert found.order[b].tolist() == first + both + second
        read = len(first) + len(both)
        blocks = [-(-read // 32), -(-(channels - len(first)) // 32)]
        assert found.plans[b].tolist() == [int(groups.slots[b]), *blocks, read, len(first), b]
    assert 0 in found.order[3][: found.plans[3, 3]] and 0 in found.order[3][found.plans[3, 4] :]


@pytest.mark.parametrize("channels", [1, 33, 1100])
def test_list_channels_of_a_union(channels):
    """What any sample of a slot reads: the gates of others, and of samples out of range, do not matter."""
    gate, neuron = hard_gate(6, channels), [2, 0, 2, 7, 2, 0]
    gate[2], gate[3] = gate[0], torch.nan
    groups = KERNELS.group_samples(torch.tensor(neuron), 4)
    found = KERNELS.list_channels(gate, groups, True, 32)
    for slot, n in enumerate((0, 2)):
        first, both, second = lists_of([gate[b] for b, m in enumerate(neuron) if m == n])
        assert found.order[slot].tolist() == first + both + second
        read = len(first) + len(both)
        blocks = [-(-read // 32), -(-(channels - len(first)) // 32)]
        assert found.plans[slot].tolist() == [slot, *blocks, read, len(first), slot]
        bits = torch.full((channels,), 3, dtype=torch.int8)
        bits[first], bits[second] = 1, 2
        assert torch.equal(found.listed[slot], bits)
    assert found.plans[2:].count_nonzero() == 0, "a slot without a neuron has an empty plan, for strays read it"


# The last two are several rounds of a block: 16 bytes at a time where channels lie side by side, or positions do.
@dtypes
@pytest.mark.parametrize(
    "channels, size", [(70, SIZE), (72, SIZE), (1040, TILES), (300, (3, 4, 8))], ids=["70", "72", "1040", "300"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_panel(layout, channels, size, dtype):
    """Listed channels, gated, in K blocks with zeros behind each list; not a column beyond, NaN for a stray."""
    block = tile_channels(dtype)
    x, gate = LAYOUTS[layout](torch.randn(3, channels, *size).to(dtype)), GATES["mixed"](3, channels).to(dtype)
    neuron = torch.tensor([1, 0, 2])
    groups = KERNELS.group_samples(neuron, 2)
    found = KERNELS.list_channels(gate, groups, False, block)
    width = panel_width(channels, dtype, True)
    panel = KERNELS.gather_panel(x, gate, neuron, 2, None, found, width)
    rows = x.permute(0, 2, 3, 4, 1)
    for b in range(3):
        _, blocks_1, blocks_2, read, second, _ = found.plans[b].tolist()
        order = found.order[b].long()
        wanted = torch.full((*size, width), torch.nan, dtype=dtype)
        wanted[..., : (blocks_1 + blocks_2) * block] = 0
        for at, own, scale in ((0, order[:read], gate[b]), (blocks_1 * block, order[second:], 1 - gate[b].float())):
            wanted[..., at : at + len(own)] = (rows[b][..., own].float() * scale.float()[own]).to(dtype)
        if b == 2:
            wanted.fill_(torch.nan)
        assert torch.equal(panel[b].nan_to_num(nan=77), wanted.nan_to_num(nan=77))


# 80 and 60 positions: whole 16 bytes of a half type, and not.
@dtypes
@pytest.mark.parametrize("size", [(2, 5, 8), TILES], ids=["80", "60"])
@pytest.mark.parametrize("case", ROUTED)
@pytest.mark.parametrize("layout", ["channels-last", "channels-first", "strided"])
def test_route_and_gather(layout, case, size, dtype):
    """A frozen layer's first launch: choice, plan, panel, and counters zeroed for the next one."""
    check_route_and_gather(KERNELS, layout, case, size, dtype)


@pytest.mark.parametrize("layout", ["channels-last", "channels-first"])
def test_gather_panel_of_one_sample(layout):
    """A batch of one has a stride that says nothing."""
    x = LAYOUTS[layout](torch.randn(1, 64, 3, 4, 8))
    x = x.as_strided(x.shape, (7, *x.stride()[1:]))
    lists = plain_lists(torch.ones(1, 64), tile_channels(x.dtype))
    panel = KERNELS.gather_panel(x, torch.ones(1, 64), torch.tensor([0]), 1, None, lists, 128)
    assert torch.equal(panel[0, ..., :64], x[0].movedim(0, -1))


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same values, an element away from where a tensor is laid."""
    return torch.cat([x.new_empty(1), x.flatten()])[1:].view(x.shape)


@dtypes
@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("outputs, channels", [(5, 3), (40, 33), (70, 64), (24, 136)])
def test_filters_there_and_back(outputs, channels, by_channel, dtype):
    """Chosen neurons' filters by slot and tap; on the way back others, and channels in no list, are zero."""
    spatial, temporal = torch.randn(4, outputs, channels, 1, 3, 3), torch.randn(4, outputs, channels, 3, 1, 1)
    groups = KERNELS.group_samples(torch.tensor([3, 1, 3, 8]), 4)
    packed = KERNELS.pack_filters([spatial, temporal], groups.neuron_of, dtype, by_channel)
    assert packed.dtype == dtype
    found = packed.view(4, 12, *packed.shape[1:])
    taps = torch.cat([spatial.flatten(3), temporal.flatten(3)], 3)[[1, 3]].to(dtype)
    wanted = taps.permute(0, 3, 2, 1) if by_channel else taps.permute(0, 3, 1, 2)
    wanted = F.pad(wanted, (0, found.shape[-1] - wanted.shape[-1]))  # rows may be padded
    assert torch.equal(found[:2], wanted)
    assert found[2:].isnan().all(), "slots without a neuron are not written"
    for change in (lambda x: x.to(dtype), shifted, lambda x: shifted(x.to(dtype))):
        again = KERNELS.pack_filters([change(spatial), change(temporal)], groups.neuron_of, dtype, by_channel)
        assert torch.equal(again.view(found.shape)[:2], wanted)
    listed = torch.full((4, channels), 3, dtype=torch.int8)
    listed[0, 0], listed[1, 1] = 1, 2
    dense = packed[..., : outputs if by_channel else channels].contiguous()  # as products leave gradients
    for like, bit, first in ((spatial, 1, 0), (temporal, 2, 9)):
        for own, filters in itertools.product((None, listed), (packed, dense, shifted(packed))):
            back = KERNELS.unpack_filters(filters, like, groups, own, bit, first, 12, by_channel)
            wanted = like.to(dtype).float()
            wanted[[0, 2]] = 0
            if own is not None:
                for slot, n in enumerate((1, 3)):
                    wanted[n, :, (own[slot] & bit) == 0] = 0
            assert torch.equal(back, wanted)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("outputs, channels", [(5, 3), (40, 33), (24, 136)])
def test_filters_of_channels_that_are_read(outputs, channels, gates):
    """Those that any sample of the slot reads, by each operator; Triton leaves all others as they are."""
    spatial, temporal = torch.randn(4, outputs, channels, 1, 3, 3), torch.randn(4, outputs, channels, 3, 1, 1)
    gate, groups = GATES[gates](4, channels), KERNELS.group_samples(torch.tensor([3, 1, 3, 8]), 4)
    every = KERNELS.pack_filters([spatial, temporal], groups.neuron_of, torch.float32, True)
    found = KERNELS.pack_filters([spatial, temporal], groups.neuron_of, torch.float32, True, (gate, groups))
    every, found = (t.view(4, 12, *t.shape[1:])[..., :outputs] for t in (every, found))
    for slot, samples in enumerate(([1], [0, 2])):
        for operator, unread in ((slice(0, 9), 0.0), (slice(9, 12), 1.0)):
            read = (gate[samples] != unread).any(0)
            assert torch.equal(found[slot, operator][:, read], every[slot, operator][:, read])
            if BACKEND.name == "triton":
                assert found[slot, operator][:, ~read].isnan().all()


def test_an_evaluation_lays_out_what_it_reads(monkeypatch):
    """Without a gradient that reads more; outputs are those of all filters, whatever lies in the others."""
    inputs, original, given = gated_inputs(3, 24, 13, neuron=[2, 0, 2]), KERNELS.pack_filters, []

    def pack(*args):
        given.append(len(args) > 4 and args[4] is not None)
        return original(*args)

    wanted = BACKENDS["eager"].gated_conv3d(*(t.double() if t.is_floating_point() else t for t in inputs))
    monkeypatch.setattr(KERNELS, "pack_filters", pack)
    for needs in ((), (False,) * 5, (True, False, False, False, False), (False, True, False, False, False)):
        out, _ = BACKEND.gated_conv3d_keeping(*inputs, needs)
        assert_close(out, wanted)
    out, _ = BACKEND.gated_conv3d_keeping(*inputs, (False, False, False, True, True))
    assert_close(out, wanted)
    assert given == [True, True, False, False, True]
