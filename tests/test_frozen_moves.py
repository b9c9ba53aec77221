"""A frozen module that is cast, moved, emptied or shared, by itself or with the model that holds it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dsts_kernels import FrozenDSTS, FusedDSTS
from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.packing import PACKINGS
from dsts_kernels.testing import assert_close

from .support.modules import pair

pytestmark = pytest.mark.usefixtures("poison")

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)
CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "to-bfloat16": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to-device-and-half": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "double": (lambda m: m.double(), torch.float64),
    "float": (lambda m: m.float(), torch.float32),
    "type": (lambda m: m.type(torch.bfloat16), torch.bfloat16),
}
OPTIONS = {
    "default": {},
    "mixing-1x3x3": dict(mixing_kernel=(1, 3, 3)),
    "mixing-3x1x1": dict(mixing_kernel=(3, 1, 1)),
    "scoring-1x3x3": dict(scoring_kernel=(1, 3, 3), score_reduction="mean"),
    "no-skip-no-norm": dict(skip=False, norm=None),
}


def live(dtype: torch.dtype = torch.float32, *, channels: int = 20, **options) -> FusedDSTS:
    """One layer, as features that are rounded may route otherwise in a second; some neurons' gates on one side."""
    dsts = pair(channels, dtype, num_layers=1, **options)[1].eval()
    with torch.no_grad():
        dsts.layers[0].gate[0], dsts.layers[0].gate[1] = 1, -1
    return dsts


class Model(nn.Module):
    """A backbone before and a head behind a frozen module."""

    def __init__(self, frozen: FrozenDSTS) -> None:
        super().__init__()
        self.before = nn.BatchNorm3d(frozen.in_channels)
        self.frozen = frozen
        self.behind = nn.Conv3d(frozen.in_channels, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.behind(self.frozen(self.before(x)))


def exact(frozen: FrozenDSTS) -> list[torch.Tensor]:
    return [getattr(layer, name).clone() for layer in frozen.layers for name in ("scoring", "bias", "gate")]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cast, dtype", CASTS.values(), ids=CASTS)
def test_follows_a_cast(backend, cast, dtype, options):
    """Cast with its model, it takes and gives that dtype; scores and biases stay as exact as they were."""
    dsts = live(backend=backend, **options)
    model = Model(dsts.freeze()).eval()
    before = exact(model.frozen)
    cast(model)
    assert model.frozen.dtype == dtype
    floats = {t.dtype for m in (model.before, model.behind) for t in m.state_dict().values() if t.is_floating_point()}
    assert floats == {dtype}
    for was, now in zip(before, exact(model.frozen), strict=True):
        assert now.dtype in (torch.float32, dtype if dtype == torch.float64 else torch.float32)
        assert torch.equal(now.to(was.dtype), was)
    x = torch.randn(4, 20, 3, 5, 4).to(dtype)
    y, routing = model.frozen(x, return_routing=True)
    assert y.dtype == dtype and routing.gate.dtype == dtype
    with torch.no_grad():
        wanted = dsts.to(torch.float64)(x.double())
    assert_close(y, wanted, factor=1 if dtype != torch.float64 else 1e6)  # weights were rounded to float32
    assert model(x).dtype == dtype


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("wide, narrow", [(torch.float32, HALF[0]), (torch.float64, torch.float32), HALF], ids=str)
@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (1, 3, 3)], ids=str)
def test_casts_of_every_packing(monkeypatch, packing, wide, narrow, mixing_kernel):
    """A packing whose tiles depend on the dtype is laid out anew: the very filters that freezing to the dtype packs."""
    dsts = live(torch.float64, channels=33, mixing_kernel=mixing_kernel, backend="eager")
    monkeypatch.setattr(type(BACKENDS["eager"]), "packing", lambda *args: packing)
    fast, wanted = dsts.freeze(dtype=wide), dsts.freeze(dtype=narrow)
    assert fast.layers[0].packing == packing
    fast.to(narrow)
    for name in ("filters", "mixing"):
        mine, theirs = getattr(fast.layers[0], name), getattr(wanted.layers[0], name)
        if theirs is not None:
            assert mine.shape == theirs.shape
            assert_close(mine, theirs)
    x = torch.randn(4, 33, 3, 5, 4).to(narrow)
    assert_close(fast(x), wanted(x))
    there = copy.deepcopy(fast).to(torch.float64).to(narrow)  # what was rounded once stays
    assert all(torch.equal(a, b) for a, b in zip(there.state_dict().values(), fast.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.complex64, "float8_e4m3fn"], ids=str)
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_a_dtype_that_is_none_of_ours(dtype):
    """A cast to a dtype that nothing runs in leaves the frozen module as it is, and its model in one piece."""
    fast = live().freeze()
    x, dtype = torch.randn(2, 20, 2, 4, 4), getattr(torch, dtype) if isinstance(dtype, str) else dtype
    wanted, model = fast(x), Model(fast)
    model.to(dtype)
    assert model.before.weight.dtype == model.behind.weight.dtype == dtype
    fast.to(dtype)
    fast.type(torch.int8)
    assert fast.dtype == torch.float32 and torch.equal(fast(x), wanted)


def test_a_cast_to_its_own_dtype(backend):
    """Nothing changes, nothing moves in memory, whichever way of converting modules torch is told to take."""
    fast = live(backend=backend).freeze(dtype=torch.bfloat16)
    x = torch.randn(2, 20, 2, 4, 4).bfloat16()
    y, places = fast(x), [b.data_ptr() for b in fast.buffers()]
    for flag in (False, True):
        torch.__future__.set_swap_module_params_on_conversion(flag)
        try:
            nn.Sequential(fast).bfloat16().to("cpu")
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert [b.data_ptr() for b in fast.buffers()] == places and torch.equal(fast(x), y)


def test_swapped_on_conversion():
    """A cast where torch swaps tensors instead of setting their data."""
    dsts = live()
    model, x = Model(dsts.freeze()).eval(), torch.randn(2, 20, 2, 4, 4).bfloat16()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.bfloat16()
        model.load_state_dict(model.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_close(model.frozen(x), dsts(x.float()))


def test_a_backend_that_cannot_follow(monkeypatch):
    """A model is cast and moved whole; what cannot run then says so at its next call, and runs again when cast back."""
    fast = live().freeze(backend="eager")
    kind, why_not = type(BACKENDS["eager"]), type(BACKENDS["eager"]).why_not
    monkeypatch.setattr(
        kind, "why_not", lambda self, op, device, dtype: "no" if dtype in HALF else why_not(self, op, device, dtype)
    )
    x, model = torch.randn(2, 20, 2, 4, 4), Model(fast).eval()
    wanted = fast(x)
    model.half()
    assert model.before.weight.dtype == model.behind.weight.dtype == fast.dtype == torch.float16
    with pytest.raises(RuntimeError, match=r"backend='eager' cannot run frozen_layer on cpu in torch.float16: no"):
        fast(x.half())
    assert_close(model.float().frozen(x), wanted, dtype=torch.float16)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_memory_formats(packing, memory_format):
    """A memory format is for features: packed weights stay dense."""
    fast = live(mixing_kernel=(1, 3, 3)).freeze()
    x = torch.randn(2, 20, 2, 4, 4)
    wanted = fast(x)
    fast.layers[0].repack(packing)
    before = [b.clone() for b in fast.buffers()]
    fast.backend = "eager"  # which takes every packing
    fast.to(memory_format=memory_format)
    assert all(b.is_contiguous() for b in fast.buffers())
    fast.layers[0].repack(packing)
    assert all(torch.equal(a, b) for a, b in zip(before, fast.buffers(), strict=True))
    assert_close(fast(x), wanted, factor=2)


def test_to_empty():
    """Memory without values: gates keep theirs, so nothing out of range is read; a state brings the rest back."""
    fast = live().freeze()
    state, x = copy.deepcopy(fast.state_dict()), torch.randn(2, 20, 2, 4, 4)
    wanted = fast(x)
    model = Model(fast).to_empty(device="cpu").eval()
    y, routing = fast(x, return_routing=True)
    assert y.shape == x.shape and ((routing.gate == 0) | (routing.gate == 1)).all()
    model.frozen.load_state_dict(state)
    assert torch.equal(fast(x), wanted)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cast", [False, True], ids=["as-it-is", "cast-there"])
def test_meta_and_back(backend, options, cast):
    """On the meta device it gives shapes; from there it says that it has no weights, until it loads a state."""
    fast = live(backend=backend, **options).freeze()
    state, x = copy.deepcopy(fast.state_dict()), torch.randn(2, 20, 2, 4, 4)
    wanted = fast(x)
    fast.to("meta")
    if cast:
        fast.half().float()
    y, routing = fast(x.to("meta"), return_routing=True)
    assert y.is_meta and y.shape == x.shape and routing.neuron.shape == (1, 2)
    with pytest.raises(NotImplementedError, match="meta"):
        fast.to("cpu")
    assert fast.layers[0].filters.is_meta
    with pytest.raises(RuntimeError, match=r"save\(path\): got a module without weights"):
        fast.save("nowhere.pt")
    with pytest.raises(RuntimeError, match="got False for a module on the meta device, wanted True"):
        fast.load_state_dict(state)
    other = copy.deepcopy(fast)
    other.load_state_dict(state, assign=True)
    assert torch.equal(other(x), wanted)
    fast.to_empty(device="cpu")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the frozen module has no weights yet.*load_state_dict"):
            fast(x)
    with pytest.raises(RuntimeError, match="wanted 0 and 1 alone"):  # nor is its own state one
        other.load_state_dict(fast.state_dict())
    fast.double().float()
    fast.load_state_dict(state)
    assert torch.equal(fast(x), wanted) and torch.equal(other(x), wanted)


def test_share_memory():
    """Shared memory for other processes, as every module has it."""
    fast = live().freeze()
    x = torch.randn(2, 20, 2, 4, 4)
    y = fast(x)
    model = Model(fast)
    assert model.share_memory() is model and all(b.is_shared() for b in fast.buffers())
    assert torch.equal(fast(x), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_inference_mode(backend, dtype):
    """Frozen, cast, saved and loaded in inference mode it is a module as any other, and may be written to outside."""
    dsts, x = live(dtype, backend=backend), torch.randn(2, 20, 2, 4, 4).to(dtype)
    with torch.inference_mode():
        fast = dsts.freeze()
        y = fast(x)
        fast.to(torch.float64).to(dtype)
        assert_close(fast(x), y)
        fast.load_state_dict(copy.deepcopy(fast.state_dict()), assign=True)
    assert not any(b.is_inference() for b in fast.buffers())
    fast.load_state_dict(dsts.freeze().state_dict())
    assert torch.equal(fast(x), y)


def test_one_layer_alone():
    """Cast by itself a layer keeps the module's dtype, and so does its list of layers; moved it moves."""
    fast, x = live().freeze(), torch.randn(2, 20, 2, 4, 4)
    y = fast(x)
    fast.layers[0].half()
    fast.layers.bfloat16().cpu()
    assert fast.layers[0].filters.dtype == torch.float32 and torch.equal(fast(x), y)


CHANGES = {
    "cast": lambda b: b.half(),
    "data-cast": lambda b: setattr(b, "data", b.data.half()) or b,
    "cut": lambda b: b[:-1],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["filters", "scoring", "bias", "mixing"])
def test_buffers_changed_one_by_one(name, change):
    """Buffers that a tool casts or cuts past the module never reach a kernel."""
    fast = live(mixing_kernel=(3, 1, 1) if name == "mixing" else (1, 1, 1)).freeze()
    setattr(fast.layers[0], name, change(getattr(fast.layers[0], name)))
    with pytest.raises(RuntimeError, match=r": got a tensor of shape .* wanted shape .* were written to or cast"):
        fast(torch.randn(2, 20, 2, 4, 4).to(fast.layers[0].filters.dtype))
