"""What a backward pass takes from its forward pass: fewer launches, the same bits, and the filters of that pass."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.gpu import switches
from dsts_kernels.backends.gpu.gated_conv import Kept
from dsts_kernels.backends.packing import tile_channels
from dsts_kernels.ops import gated_conv3d
from dsts_kernels.testing import assert_close

from ...support.inputs import SIZE, gated_inputs
from ...support.stand_ins import BACKEND, KERNELS, emulated, pair

pytestmark = emulated
WAYS = {"nothing": dict(keep_lists=False), "lists": dict(keep_filters=False), "all": {}}
LAUNCHERS = ("group_samples", "list_channels", "pack_filters")


@pytest.fixture
def launches(monkeypatch) -> Counter[str]:
    """How often each launcher that keeping spares was called."""
    found: Counter[str] = Counter()

    def watch(name: str) -> None:
        launcher = getattr(KERNELS, name)

        @functools.wraps(launcher)
        def counted(*args, **kwargs):
            found[name] += 1
            return launcher(*args, **kwargs)

        monkeypatch.setattr(KERNELS, name, counted)

    for name in LAUNCHERS:
        watch(name)
    return found


@pytest.fixture
def inputs() -> list[Tensor]:
    """Of a batch in which two samples share a neuron; outputs are no whole 16 bytes."""
    found = gated_inputs(3, 24, 13, neuron=[2, 0, 2])
    for i in (0, 1, 3, 4):
        found[i].requires_grad_()
    return found


def operate(*inputs: Tensor) -> Tensor:
    return gated_conv3d(*inputs, backend=BACKEND.name)


def gradients(inputs: list[Tensor], wanted: tuple[int, ...] = (0, 1, 3, 4), **kwargs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(operate(*inputs).square().sum(), [inputs[i] for i in wanted], **kwargs)


# One for each layer of a module with two, whose mixing kernels group for themselves.
@pytest.mark.parametrize(
    "way, groups, lists, packs", [("nothing", 6, 6, 4), ("lists", 4, 4, 4), ("all", 4, 4, 2)], ids=WAYS
)
def test_launches_of_a_training_step(way, groups, lists, packs, launches):
    """Lists once for samples and once for slots; filters once."""
    _, fused = pair(8)
    x = torch.randn(2, 8, *SIZE, requires_grad=True)
    with switches.switched(**WAYS[way]):
        fused.train()(x).sum().backward()
    assert [launches[name] for name in LAUNCHERS] == [groups, lists, packs]


def test_same_bits(inputs):
    """Of every gradient, however much is kept."""
    results = []
    for way in WAYS.values():
        with switches.switched(**way):
            results.append(gradients(inputs))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("wanted, packs", [((0,), 1), ((1,), 1), ((3, 4), 1), ((3,), 1), ((0, 3), 1)], ids=str)
def test_each_gradient_alone(wanted, packs, inputs, launches):
    """As among all of them; and filters are laid out in the forward pass only."""
    everything = dict(zip((0, 1, 3, 4), gradients(inputs), strict=True))
    for i in (0, 1, 3, 4):
        inputs[i].requires_grad_(i in wanted)
    launches.clear()
    found = gradients(inputs, wanted)
    assert launches["pack_filters"] == packs
    if 1 in wanted or 0 not in wanted:  # the data gradient by lists rounds otherwise
        assert all(torch.equal(everything[i], one) for i, one in zip(wanted, found, strict=True))


def kept_bytes(inputs: list[Tensor]) -> int:
    """Bytes that autograd saves for the op besides its arguments."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = operate(*inputs)
    assert y.grad_fn is not None
    own = {t.data_ptr() for t in inputs}
    return sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in own)


def test_memory(inputs):
    """Filters are kept where a data gradient needs them, and only while they are asked for."""
    filters = KERNELS.pack_filters(list(inputs[3:]), KERNELS.group_samples(inputs[2], 3).neuron_of, torch.float32, True)
    size, lists = filters.numel() * 4, 3 * (24 + 6) * 4 + (3 + 3 + 3 + 6 + 3) * 4
    assert kept_bytes(inputs) == size + lists
    with switches.switched(keep_filters=False):
        assert kept_bytes(inputs) == lists
    with switches.switched(keep_lists=False):
        assert kept_bytes(inputs) == 0
    inputs[0], inputs[1] = inputs[0].detach(), inputs[1].detach()
    assert kept_bytes(inputs) == lists
    with torch.no_grad():
        out, kept = BACKEND.gated_conv3d_keeping(*inputs, [False] * 5)
    assert not kept and torch.equal(out, operate(*inputs))


def test_written_in_place_between(inputs):
    """Autograd refuses, as it does for every saved tensor."""
    y = operate(*inputs)
    with torch.no_grad():
        inputs[3].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_written_past_the_version_between(inputs):
    """What autograd cannot see: the data gradient is that of the forward pass. The next step has the new filters."""
    wanted = gradients(inputs)
    y = operate(*inputs).square().sum()
    inputs[3].data.mul_(2)
    found = torch.autograd.grad(y, [inputs[i] for i in (0, 1, 3, 4)])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    again = gradients(inputs)
    assert not torch.equal(again[0], wanted[0])
    with switches.switched(keep_lists=False):
        assert all(torch.equal(a, b) for a, b in zip(again, gradients(inputs), strict=True))


def test_steps_in_a_row(inputs):
    """After an optimizer's step a forward pass lays out anew: nothing is kept from step to step."""
    spatial, temporal = inputs[3:]
    optimizer = torch.optim.SGD([spatial, temporal], lr=0.1)
    for _ in range(3):
        with switches.switched(keep_lists=False):
            wanted = gradients(inputs)
        optimizer.zero_grad()
        operate(*inputs).square().sum().backward()
        found = [inputs[i].grad for i in (3, 4)]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted[2:], strict=True))
        optimizer.step()


def test_backward_twice(inputs):
    """With the graph retained; without, what was kept is gone."""
    y = operate(*inputs).square().sum()
    operands = [inputs[i] for i in (0, 1, 3, 4)]
    first = torch.autograd.grad(y, operands, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y, operands), strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, operands)


def test_checkpointed(inputs):
    """A forward pass that is run again keeps again."""
    wanted = gradients(inputs)
    y = checkpoint(operate, *inputs, use_reentrant=False).square().sum()
    found = torch.autograd.grad(y, [inputs[i] for i in (0, 1, 3, 4)])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_through_the_dispatcher(watched, inputs):
    """A profiler in one of the passes: that op goes through torch's dispatcher, the other past it."""
    wanted = gradients(inputs)
    with torch.autograd.profiler.profile(enabled=watched == "forward"):
        y = operate(*inputs).square().sum()
    with torch.autograd.profiler.profile(enabled=watched == "backward"):
        found = torch.autograd.grad(y, [inputs[i] for i in (0, 1, 3, 4)])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_rows_of_another_backend(inputs):
    """Filters whose rows are padded, or are not: a backward pass takes what either backend's forward pass kept."""
    x, gate, neuron, spatial, temporal = (t.detach() for t in inputs)
    grad = torch.randn(3, 13, *SIZE)
    _, kept = BACKEND.gated_conv3d_keeping(x, gate, neuron, spatial, temporal, [True] * 5)
    arguments = grad, x, gate, neuron, spatial, temporal, [True] * 4
    wanted = BACKEND.gated_conv3d_backward(*arguments, kept)
    dense = kept[-1][..., :13].contiguous()
    for filters in (dense, F.pad(dense, (0, 3))):
        found = BACKEND.gated_conv3d_backward(*arguments, [*kept[:-1], filters])
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    theirs = BACKENDS["eager"].gated_conv3d_backward(*arguments, kept)
    assert all(assert_close(mine, other, factor=2) is None for mine, other in zip(wanted, theirs, strict=True))


def test_read_is_what_was_kept(inputs):
    """Tensors to record and back."""
    x, gate, neuron, *weights = (t.detach() for t in inputs)
    groups = KERNELS.group_samples(neuron, 3)
    lists = KERNELS.list_channels(gate, groups, False, tile_channels(x.dtype))
    filters = KERNELS.pack_filters(weights, groups.neuron_of, x.dtype, True)
    kept = Kept(groups, lists, filters)
    again = Kept.read(kept.tensors([True] * 5))
    assert again.filters is filters and all(a is b for a, b in zip(again.groups, groups, strict=True))
    assert all(a is b for a, b in zip(again.lists[:2], lists[:2], strict=True))
    assert Kept.read(()) == Kept()
