"""What freezes and what does not: weights however they lie or are computed, norms that fold, clear errors else."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from dsts_kernels import FusedDSTS
from dsts_kernels.backends.packing import channel_lists
from dsts_kernels.learning import RoutingMonitor
from dsts_kernels.testing import assert_close

from .support.frozen import check_freezes, lively, one_process

pytestmark = pytest.mark.usefixtures("poison")

PARAMETERS = ("scoring", "gate", "spatial", "temporal", "mixing")


def transposed(value: torch.Tensor) -> torch.Tensor:
    """The same values, the first two dimensions the other way round in memory."""
    return value.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = {
    "transposed": transposed,
    "reversed": lambda v: v.permute(*reversed(range(v.dim()))).contiguous().permute(*reversed(range(v.dim()))),
    "sliced": lambda v: v.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda v: v[:1].expand(v.shape),
    "negative": lambda v: torch._neg_view(-v),
    "imaginary": lambda v: torch.complex(v, -v).conj().imag,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_weights_however_they_lie(backend, name, layout):
    """A weight with strides or with torch's lazy sign, put in place by load_state_dict(assign=True), is read right."""
    dsts = lively(backend=backend, mixing_kernel=(1, 3, 3))
    state = dsts.state_dict()
    for index in range(3):
        state[f"layers.{index}.{name}"] = LAYOUTS[layout](state[f"layers.{index}.{name}"])
    plain = lively(backend=backend, mixing_kernel=(1, 3, 3))
    plain.load_state_dict(state)
    x = torch.randn(4, 12, 3, 5, 4)
    with torch.no_grad():
        live = plain(x)
    dsts.load_state_dict(state, assign=True)
    fast = dsts.freeze()
    assert all(b.is_contiguous() and not b.is_neg() for b in fast.buffers())
    assert_close(fast(x), live)
    assert torch.equal(fast(x), plain.freeze()(x))


def test_channel_lists():
    """Spatial channels first, each part in order; dense, however the gates lie."""
    hard = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    for own in (hard, transposed(hard)):
        channels, starts = channel_lists(own)
        assert channels.tolist() == [[0, 2, 3, 1], [0, 1, 2, 3], [1, 0, 2, 3]] and starts.tolist() == [0, 3, 3, 4]
        assert channels.dtype == torch.int32 and channels.is_contiguous() and starts.is_contiguous()


def test_weights_that_were_swapped():
    """torch.utils.swap_tensors puts a tensor with strides where a dense one was."""
    dsts = lively()
    for name in PARAMETERS:
        weight = getattr(dsts.layers[1], name)
        torch.utils.swap_tensors(weight, nn.Parameter(transposed(weight.detach())))
        assert not getattr(dsts.layers[1], name).is_contiguous()
    check_freezes(dsts)


def test_norm_however_it_lies():
    """Statistics and weights of a norm with strides."""
    dsts = lively()
    for layer in dsts.layers:
        for name in ("running_mean", "running_var"):
            setattr(layer.norm, name, getattr(layer.norm, name).repeat_interleave(3)[::3])
        layer.norm.weight = nn.Parameter(layer.norm.weight.detach().repeat_interleave(2)[::2])
    check_freezes(dsts)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", PARAMETERS)
def test_parametrized(name):
    """A parametrization's value is what is frozen."""
    dsts = lively()
    for layer in dsts.layers:
        parametrize.register_parametrization(layer, name, Doubled())
    check_freezes(dsts)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_weights_set_by_hooks():
    """Pruning and the older weight and spectral norms compute a weight in a hook: frozen as the next call would."""
    dsts = lively()
    first, second, third = dsts.layers
    prune.random_unstructured(first, "spatial", amount=0.5)
    prune.l1_unstructured(first, "gate", amount=3)
    prune.random_unstructured(first.norm, "weight", amount=2)
    nn.utils.weight_norm(second, "temporal")
    nn.utils.spectral_norm(third, "mixing")
    with torch.no_grad():  # as an optimizer's step does: what hooks computed before is out of date
        first.spatial_orig.mul_(3)
        first.norm.weight_orig.mul_(2)
        second.temporal_g.mul_(2)
        third.mixing_orig.mul_(torch.randn(()))
    fast = dsts.freeze()
    x = torch.randn(4, 12, 3, 5, 4)
    with torch.no_grad():
        assert_close(fast(x), dsts(x))
    assert not fast.state_dict().keys() & {"layers.0.spatial_orig"}


def test_norms_that_are_parametrized():
    """torch's newer weight and spectral norms; a module in training is frozen as in evaluation, and stays in it."""
    dsts = lively()
    parametrizations.weight_norm(dsts.layers[0], "spatial")
    parametrizations.spectral_norm(dsts.layers[1], "mixing")
    dsts.train()
    dsts.layers[2].eval()
    modes = [m.training for m in dsts.modules()]
    vectors = [b.clone() for b in dsts.buffers()]
    fast, x = dsts.freeze(), torch.randn(4, 12, 3, 5, 4)
    assert [m.training for m in dsts.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(vectors, dsts.buffers(), strict=True))
    with torch.no_grad():
        assert_close(fast(x), dsts.eval()(x))


def set_norms(norm) -> FusedDSTS:
    dsts = lively()
    for layer in dsts.layers:
        layer.norm = norm()
    return dsts


class Shifted(nn.BatchNorm3d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class Named(nn.BatchNorm3d):
    """Another name, the same norm."""


NORMS = {
    "group": lambda: nn.GroupNorm(3, 12),
    "identity": nn.Identity,
    "instance": lambda: nn.InstanceNorm3d(12),
    "instance-tracking": lambda: nn.InstanceNorm3d(12, affine=True, track_running_stats=True),
    "batch-2d": lambda: nn.BatchNorm2d(12),
    "lazy": nn.LazyBatchNorm3d,
    "own-forward": lambda: Shifted(12),
    "quantized": lambda: torch.ao.nn.quantized.BatchNorm3d(12),
    "sequential": lambda: nn.Sequential(nn.BatchNorm3d(12)),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_refuses_other_norms(norm):
    """What is no BatchNorm is named, with what would do."""
    dsts = set_norms(norm)
    kind = type(dsts.layers[0].norm).__name__
    with pytest.raises(TypeError, match=rf"layers.0.norm: got {kind}, wanted BatchNorm3d, SyncBatchNorm or None"):
        dsts.freeze()


STATISTICS = {
    "untracked": (lambda: nn.BatchNorm3d(12, track_running_stats=False), "got a BatchNorm without running statistics"),
    "size": (lambda: nn.BatchNorm3d(7), r"running_mean: got a tensor of shape \(7,\), .*, wanted shape \(12,\)"),
    "meta": (lambda: nn.BatchNorm3d(12, device="meta"), "running_mean: got a tensor on the meta device"),
}


@pytest.mark.parametrize("norm, message", STATISTICS.values(), ids=STATISTICS)
def test_refuses_norms_without_statistics(norm, message):
    """A BatchNorm that has nothing to fold, or of another size."""
    with pytest.raises(ValueError, match=rf"layers.0.norm.*{message}"):
        set_norms(norm).freeze()


BATCH_NORMS = {
    "not-affine": lambda: nn.BatchNorm3d(12, affine=False),
    "cumulative": lambda: nn.BatchNorm3d(12, momentum=None),
    "eps": lambda: nn.BatchNorm3d(12, eps=0.5),
    "sync": lambda: nn.SyncBatchNorm(12),
    "subclass": lambda: Named(12),
    "none": lambda: None,
}


@pytest.mark.parametrize("norm", BATCH_NORMS.values(), ids=BATCH_NORMS)
def test_batch_norms(norm):
    """Every BatchNorm folds; so does none."""
    dsts = set_norms(norm)
    for layer in dsts.layers:
        if layer.norm is not None:
            layer.norm.running_mean.normal_()
            layer.norm.running_var.uniform_(0.5, 2)
    check_freezes(dsts)


def test_converted_to_sync_batch_norm():
    """convert_sync_batchnorm replaces the norms inside; a norm of a wider dtype than its layer folds too."""
    check_freezes(nn.SyncBatchNorm.convert_sync_batchnorm(lively()))
    dsts = lively()
    wanted = dsts.freeze(dtype=torch.bfloat16)
    dsts.bfloat16()
    for layer in dsts.layers:
        layer.norm.float()
    x = torch.randn(4, 12, 3, 5, 4).bfloat16()
    assert_close(dsts.freeze()(x), wanted(x), factor=2)


@pytest.mark.parametrize("where", ["layers.0", "layers.1.norm"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_refuses_hooks(where, kind):
    """A hook inside would be lost, and with it what it may change."""
    dsts = lively()
    handle = getattr(dsts.get_submodule(where), kind)(lambda *args: None)
    with pytest.raises(ValueError, match=rf"{where}: got a forward hook \(.*<lambda>\), wanted none"):
        dsts.freeze()
    handle.remove()
    check_freezes(dsts)


def test_monitors_do_not_matter():
    """Our own monitors, and hooks on the module as a whole, only watch the live module."""
    dsts = lively()
    monitor = RoutingMonitor(dsts)
    dsts.register_forward_hook(lambda *args: None)
    check_freezes(dsts)
    assert monitor.statistics().samples.tolist() == [4, 4, 4]


def test_refuses_meta():
    """A module without values, whole or in part."""
    with pytest.raises(ValueError, match=r"layers.0.gate: got a tensor on the meta device, which has no values"):
        FusedDSTS(8, device="meta").freeze()
    for name in PARAMETERS:
        dsts = lively()
        setattr(dsts.layers[2], name, nn.Parameter(getattr(dsts.layers[2], name).to("meta")))
        with pytest.raises(ValueError, match=rf"layers.2.{name}: got a tensor on the meta device"):
            dsts.freeze()


class Wrapped(torch.Tensor):
    """Stands for DTensor, quantized tensors and the like, whose values are elsewhere."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


class Tagged(torch.Tensor):
    """A user's class of tensor that holds its values."""


def test_refuses_tensors_that_hold_no_values():
    """Tensors of a class that computes elsewhere are refused by name; a class that only names them is taken off."""
    dsts = lively()
    wrapped = torch.Tensor._make_wrapper_subclass(Wrapped, dsts.layers[1].spatial.shape)
    del dsts.layers[1].spatial
    dsts.layers[1].spatial = wrapped
    with pytest.raises(TypeError, match=r"layers.1.spatial: got a Wrapped, wanted a plain tensor"):
        dsts.freeze()
    dsts = lively()
    dsts.layers[1].spatial = nn.Parameter(dsts.layers[1].spatial.detach().as_subclass(Tagged))
    check_freezes(dsts)
    assert all(type(b) is torch.Tensor for b in dsts.freeze().buffers())


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_sharded():
    """Sharded by FSDP it is refused with what to do, and freezes when its weights are gathered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dsts, plain = lively(), lively()
    dsts.load_state_dict(plain.state_dict())
    x = torch.randn(4, 12, 3, 5, 4)
    with one_process():
        fully_shard(dsts, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"layers.0.gate: got a DTensor, .* call unshard\(\) first"):
            dsts.freeze()
        if hasattr(torch.cpu.Stream, "record_event"):  # FSDP of torch 2.6 calls it on a CPU, which has none there
            dsts.unshard()
            assert torch.equal(dsts.freeze()(x), plain.freeze()(x))
