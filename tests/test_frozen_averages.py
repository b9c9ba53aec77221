"""A frozen module where others hold or write its buffers: averages, swaps, distributed checkpoints, old pickles."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from dsts_kernels import FrozenDSTS
from dsts_kernels.testing import assert_close

from .support.frozen import (
    FILES,
    SIZE,
    in_a_model,
    live,
    one_gate,
    one_process,
)
from .support.modules import pair

pytestmark = pytest.mark.usefixtures("poison")


AVERAGES = {
    "swa": dict(),
    "swa-buffers": dict(use_buffers=True),
    **{
        f"{kind}-{decay}": {key: make(decay), "use_buffers": True}
        for decay in (0.9, 0.999, 0.9999)
        for kind, key, make in (("ema", "avg_fn", get_ema_avg_fn), ("multi", "multi_avg_fn", get_ema_multi_avg_fn))
    },
}


@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES)
def test_averaged(options):
    """Averages over all buffers of a model that holds a frozen module leave it right, in calls and in states."""
    fast, x = live(side=True).freeze(), torch.randn(SIZE)
    model = in_a_model(fast)
    averaged = AveragedModel(model, **options)
    for _ in range(20):
        averaged.update_parameters(model)
    theirs = averaged.module[1]["dsts"]
    state = copy.deepcopy(averaged.state_dict())
    assert_close(theirs(x), fast(x))
    for layer, own in zip(theirs.layers, fast.layers, strict=True):
        assert torch.equal(layer.channels, own.channels) and torch.equal(layer.gate, own.gate)
    again = AveragedModel(in_a_model(live().freeze()))
    again.load_state_dict(state)
    assert_close(again.module[1]["dsts"](x), fast(x))


def test_averaged_through_states():
    """Tools that average what state_dict() gives, in place, all of it."""
    fast, x = live(side=True).freeze(), torch.randn(SIZE)
    mine = copy.deepcopy(fast)
    for _ in range(20):
        for average, value in zip(mine.state_dict().values(), fast.state_dict().values(), strict=True):
            average.copy_(average * 0.9999 + value * (1 - 0.9999))
    assert_close(mine(x), fast(x))
    other = live().freeze()
    other.load_state_dict(mine.state_dict())
    assert_close(other(x), fast(x))


def test_averaged_with_another():
    """An average with a module of other gates is an error, and so is its state; a copy of all buffers is not."""
    fast, x = live(num_layers=1, num_neurons=1).freeze(), torch.randn(SIZE)
    other = copy.deepcopy(fast)
    one_gate(other.layers[0].gate)
    other.layers[0].filters.mul_(2)
    wanted = other(x)
    for use in (lambda module: None, lambda module: module.load_state_dict(other.state_dict())):
        mine = copy.deepcopy(fast)
        for now, new in zip(mine.buffers(), other.buffers(), strict=True):
            now.copy_(new)
        use(mine)
        assert torch.equal(mine(x), wanted)
    mine.layers[0].gate.mul_(0.7)
    for use in (lambda: mine(x), mine.state_dict, lambda: mine.save("nowhere.pt")):
        with pytest.raises(RuntimeError, match=r"averaged with one of other gates; load_state_dict\(\) the state"):
            use()
    mine.load_state_dict(fast.state_dict())
    assert torch.equal(mine(x), fast(x))


def test_called_with_the_buffers_of_another():
    """torch.func.functional_call with a module's buffers gives that module's answer, and leaves this one's."""
    fast, other, x = live().freeze(), live().freeze(), torch.randn(SIZE)
    mine, theirs = fast(x), other(x)
    for _ in range(2):
        assert torch.equal(torch.func.functional_call(fast, dict(other.named_buffers()), x), theirs)
        assert torch.equal(fast(x), mine)


def test_swapped_with_the_buffers_of_another():
    """torch.utils.swap_tensors gives one module the buffers of another: then it is the other."""
    fast, other, x = live().freeze(), live().freeze(), torch.randn(SIZE)
    mine, theirs = fast(x), other(x)
    for one, two in zip(fast.buffers(), other.buffers(), strict=True):
        torch.utils.swap_tensors(one, two)
    assert torch.equal(fast(x), theirs) and torch.equal(other(x), mine)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
@pytest.mark.filterwarnings("ignore")
def test_distributed_checkpoint(tmp_path):
    """torch.distributed.checkpoint, flattened and by module, through DistributedDataParallel, and into fresh memory."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    dsts = live(mixing_kernel=(1, 3, 3))
    fast, x = dsts.freeze(), torch.randn(SIZE)
    dcp.save({"model": {"net": in_a_model(fast).state_dict()}}, checkpoint_id=tmp_path / "plain")
    with torch.no_grad():
        dsts.layers[0].spatial.zero_()
    other = in_a_model(dsts.freeze())
    assert not torch.equal(other[1]["dsts"](x), fast(x))
    state = {"model": {"net": other.state_dict()}}
    dcp.load(state, checkpoint_id=tmp_path / "plain")
    other.load_state_dict(state["model"]["net"])
    assert torch.equal(other[1]["dsts"](x), fast(x))
    empty = in_a_model(dsts.freeze()).to("meta").to_empty(device="cpu")
    state = {"model": {"net": empty.state_dict()}}
    dcp.load(state, checkpoint_id=tmp_path / "plain")
    empty.load_state_dict(state["model"]["net"])
    assert torch.equal(empty[1]["dsts"](x), fast(x))
    with one_process():
        wrapped = nn.parallel.DistributedDataParallel(in_a_model(dsts.freeze()))
        set_model_state_dict(wrapped, get_model_state_dict(in_a_model(fast)))
        assert torch.equal(wrapped.module[1]["dsts"](x), fast(x))
        assert get_model_state_dict(wrapped).keys() == in_a_model(fast).state_dict().keys()


def test_pickles_of_version_0_1():
    """A module that 0.1 pickled comes back right, where 0.1 itself took gates with strides for others."""
    answer = torch.load(FILES / "frozen_0_1_answer.pt", weights_only=True)
    fast = torch.load(FILES / "frozen_0_1_module.pt", weights_only=False)
    assert isinstance(fast, FrozenDSTS) and all(b.is_contiguous() for b in fast.buffers())
    assert_close(fast(answer["x"]), answer["y"])
    other = pair(6, torch.float32, num_layers=2, num_neurons=2, scoring_kernel=(1, 3, 3))[1].eval().freeze()
    other.load_state_dict(fast.state_dict())
    assert_close(other(answer["x"]), answer["y"])


def test_strided_buffers():
    """Gates that somebody replaced by strided ones list the same channels; a copy or a pickle has dense buffers."""
    fast, x, file = live().freeze(), torch.randn(SIZE), io.BytesIO()
    y = fast(x)
    for layer in fast.layers:
        layer.gate = layer.gate.t().contiguous().t()
    assert torch.equal(fast(x), y) and all(layer.channels.is_contiguous() for layer in fast.layers)
    for layer in fast.layers:
        layer.bias = layer.bias.t().contiguous().t()
    torch.save(fast, file)
    file.seek(0)
    for other in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert all(b.is_contiguous() for b in other.buffers()) and torch.equal(other(x), y)
