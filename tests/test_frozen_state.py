"""A frozen module's state and file: they say what they are, load as a whole or not at all, and come back right."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from dsts_kernels import FrozenDSTS
from dsts_kernels.backends.packing import PACKINGS
from dsts_kernels.frozen_state import EXTRA
from dsts_kernels.testing import assert_close

from .support.frozen import (
    FILES,
    OPTIONS,
    SIZE,
    assert_same,
    described,
    features,
    in_a_model,
    live,
    one_gate,
    repacked,
    snapshot,
)
from .support.modules import pair

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "in-a-model"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_takes_other_gates(backend, options, nested, assign):
    """The state of other gates, with buffers of other sizes, by itself or with a model's."""
    dsts = live(**options, backend=backend)
    mine, theirs = live(**options, backend=backend).freeze(), dsts.freeze()
    sided = live(**options, side=True, backend=backend).freeze()
    x = features(mine)
    for other in (theirs, sided, theirs):
        source, target = (in_a_model(other), in_a_model(mine)) if nested else (other, mine)
        target.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(mine(x), other(x))
        assert_same(mine, other.state_dict())
    if mine.dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            assert_close(mine(x), dsts(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("theirs", PACKINGS)
@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1)], ids=str)
def test_takes_other_packings(backend, theirs, mixing_kernel, dtype):
    """The state of a module packed for another device is packed for this one: not a bit is another."""
    wanted = live(dtype, side=True, mixing_kernel=mixing_kernel, backend=backend).freeze()
    state = repacked(wanted, theirs).state_dict()
    x = features(wanted)
    for assign in (False, True):
        mine = live(dtype, mixing_kernel=mixing_kernel, backend=backend).freeze()
        mine.load_state_dict(state, assign=assign)
        assert torch.equal(mine(x), wanted(x))
        assert_same(mine, wanted.state_dict())


@pytest.mark.parametrize("wide, narrow", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)], ids=str)
def test_other_dtypes(backend, wide, narrow):
    """A state's dtype is converted to the module's, both ways, or taken with assign=True; so are scores and biases."""
    dsts = live(wide, num_layers=1, mixing_kernel=(1, 3, 3), backend=backend)
    one, other = dsts.freeze(), live(wide, num_layers=1, mixing_kernel=(1, 3, 3), backend=backend).freeze(dtype=narrow)
    x = torch.randn(SIZE).to(narrow)
    other.load_state_dict(one.state_dict())
    assert other.dtype == narrow and other.layers[0].filters.dtype == narrow
    assert_close(other(x), one(x.to(wide)))
    one.load_state_dict(other.state_dict())
    assert one.dtype == wide and one.layers[0].bias.dtype == wide
    assert_close(one(x.to(wide)).to(narrow), other(x))
    one.load_state_dict(other.state_dict(), assign=True)
    assert one.dtype == narrow and torch.equal(one(x), other(x))


def test_values_in_place():
    """A state of the same gates is copied to where the buffers lie, as CUDA graphs and shared memory want it."""
    dsts = live()
    fast, x = dsts.freeze(), torch.randn(SIZE)
    places = [b.data_ptr() for b in fast.buffers()]
    with torch.no_grad():
        for layer in dsts.layers:
            layer.spatial.mul_(2)
            layer.norm.bias.add_(1)
    other = dsts.freeze()
    fast.load_state_dict(other.state_dict())
    assert [b.data_ptr() for b in fast.buffers()] == places and torch.equal(fast(x), other(x))
    fast.load_state_dict(live().freeze().state_dict())
    state = fast.state_dict()
    fast.load_state_dict(state)  # its own
    assert all(torch.equal(a, b) for a, b in zip(state.values(), fast.state_dict().values(), strict=True))


def test_keeps_nothing_of_a_state():
    """What a state's tensors lie in may change later."""
    fast, state = live().freeze(), snapshot(live().freeze())
    fast.load_state_dict(state, assign=True)
    before, x = snapshot(fast), torch.randn(SIZE)
    y = fast(x)
    for value in state.values():
        value.zero_()
    assert_same(fast, before)
    assert torch.equal(fast(x), y)


class Tagged(torch.Tensor):
    """A user's class of tensor."""


def test_states_of_other_tensors():
    """Parameters, and tensors of a class that holds its values: what is kept is plain."""
    fast, other, x = live().freeze(), live().freeze(), torch.randn(SIZE)
    for kind in (lambda v: nn.Parameter(v, requires_grad=v.is_floating_point()), lambda v: v.as_subclass(Tagged)):
        for assign in (False, True):
            fast.load_state_dict(live().freeze().state_dict())
            fast.load_state_dict({key: kind(v) for key, v in other.state_dict().items()}, assign=assign)
            assert all(type(b) is torch.Tensor and not b.requires_grad for b in fast.buffers())
            assert torch.equal(fast(x), other(x))


def test_strided_states(backend):
    """Tensors of a state may lie as they like, with assign=True too."""
    fast, other = (live(mixing_kernel=(1, 3, 3), backend=backend).freeze() for _ in range(2))
    state = {key: v.repeat_interleave(2, -1)[..., ::2] for key, v in other.state_dict().items()}
    assert not any(v.is_contiguous() for v in state.values())
    for assign in (True, False):
        fast.load_state_dict(state, assign=assign)
        assert all(b.is_contiguous() for b in fast.buffers()) and torch.equal(fast(x := features(fast)), other(x))


DIFFERENCES = {
    "channels": (dict(channels=16), r"in_channels: got 16, wanted 20"),
    "layers": (dict(num_layers=2), r"num_layers: got 2, wanted 3"),
    "neurons": (dict(num_neurons=4), r"num_neurons: got 4, wanted 3"),
    "skip": (dict(skip=False), r"skip: got False, wanted True"),
    "scoring": (dict(scoring_kernel=(1, 3, 3)), r"layers.0.scoring_taps: got 9, wanted 1"),
    "reduction": (dict(score_reduction="mean"), r"layers.0.score_elements: got 20, wanted 0"),
    "mixing": (dict(mixing_kernel=(3, 1, 1)), r"layers.0.mixing_kernel: got \(3, 1, 1\), wanted \(1, 1, 1\)"),
    "activation": (dict(activation=None), r"layers.0.relu: got False, wanted True"),
}


@pytest.mark.parametrize("change, message", DIFFERENCES.values(), ids=DIFFERENCES)
def test_refuses_another_module(change, message):
    """Sizes and options that are not this module's, even where every tensor would fit; and nothing changes."""
    channels = change.get("channels", SIZE[1])
    other = pair(channels, torch.float32, **{k: v for k, v in change.items() if k != "channels"})[1].eval().freeze()
    fast = live().freeze()
    before = snapshot(fast)
    for source, target, where in ((other, fast, "state_dict."), (in_a_model(other)[1], in_a_model(fast)[1], "dsts.")):
        for options in ({}, dict(strict=False), dict(assign=True)):
            with pytest.raises(RuntimeError, match=rf"\t{where}.*{message}.*FrozenDSTS.load\(\) takes any"):
                target.load_state_dict(source.state_dict(), **options)
            assert_same(fast, before)


TENSORS = {
    "cut": lambda v: v[..., :-1],
    "longer": lambda v: torch.cat([v, v[..., -1:]], -1),
    "flat": lambda v: v.flatten() if v.dim() > 1 else v[None],
    "other-dtype": lambda v: v.double() if v.dtype != torch.float64 else v.float(),
    "integer": lambda v: v.to(torch.int32),
    "meta": lambda v: v.to("meta"),
    "sparse": lambda v: v.to_sparse(),
    "list": lambda v: v.tolist(),
    "none": lambda v: None,
}
DAMAGE = {
    **{
        f"{name}-{kind}": lambda s, name=name, kind=kind: s.update(
            {f"layers.1.{name}": TENSORS[kind](s[f"layers.1.{name}"])}
        )
        for name in ("scoring", "gate", "filters", "bias", "mixing")
        for kind in TENSORS
    },
    **{
        f"{name}-missing": lambda s, name=name: s.pop(f"layers.2.{name}")
        for name in ("scoring", "gate", "filters", "bias", "mixing")
    },
    "extra-missing": lambda s: s.pop(EXTRA),
    "extra-cut": lambda s: s.update({EXTRA: s[EXTRA][:100]}),
    "extra-empty": lambda s: s.update({EXTRA: s[EXTRA][:0]}),
    "extra-dtype": lambda s: s.update({EXTRA: s[EXTRA].int()}),
    "extra-list": lambda s: s.update({EXTRA: s[EXTRA].tolist()}),
    "extra-meta": lambda s: s.update({EXTRA: s[EXTRA].to("meta")}),
    "extra-not-json": lambda s: s[EXTRA].random_(128, 255),
    "extra-a-number": lambda s: s.update({EXTRA: torch.tensor([ord("7")], dtype=torch.uint8)}),
    "packing": lambda s: described(s, lambda f: f["layers"][0].update(packing="tiled")),
    "unknown-packing": lambda s: described(s, lambda f: f["layers"][0].update(packing="folded")),
    "unknown-field": lambda s: described(s, lambda f: f.update(colour="blue")),
    "lost-field": lambda s: described(s, lambda f: f["layers"][1].pop("relu")),
    "no-layers": lambda s: described(s, lambda f: f.update(layers=[])),
    "negative": lambda s: described(s, lambda f: f["layers"][0].update(score_elements=-1)),
    "huge": lambda s: described(s, lambda f: f.update(in_channels=2**40)),
    "a-bool": lambda s: described(s, lambda f: f.update(num_neurons=True)),
    "a-text": lambda s: described(s, lambda f: f.update(skip="yes")),
    "dtype": lambda s: described(s, lambda f: f.update(dtype="bfloat16")),
    "algorithm": lambda s: described(s, lambda f: f.update(algorithm="fft")),
    "mixing-kernel": lambda s: described(s, lambda f: f["layers"][0].update(mixing_kernel=[3, 1, 1])),
    "folded": lambda s: described(s, lambda f: f["layers"][0].update(mixing_kernel=[1, 1, 1])),
    "gates-changed": lambda s: one_gate(s["layers.0.gate"]),
    "gates-halved": lambda s: s["layers.0.gate"].mul_(0.5),
    "gates-nan": lambda s: s["layers.0.gate"].fill_(torch.nan),
    "gates-inverted": lambda s: s["layers.0.gate"].neg_().add_(1),
    "gates-of-another": lambda s: s.update(gates_of_another()),
}


def gates_of_another() -> dict:
    return {key: v for key, v in live(mixing_kernel=(1, 3, 3)).freeze().state_dict().items() if "gate" in key}


@pytest.fixture(scope="module")
def two() -> tuple[FrozenDSTS, dict]:
    """A module, which every refusal leaves alone, and the state of another."""
    return live(mixing_kernel=(1, 3, 3)).freeze(), live(mixing_kernel=(1, 3, 3)).freeze().state_dict()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_refuses_a_damaged_state(two, damage):
    """Whatever was done to a state by hand, it is refused as a whole: the module keeps its weights and its answer."""
    fast, state = two[0], {key: value.clone() for key, value in two[1].items()}
    before, x = snapshot(fast), torch.randn(SIZE)
    y = fast(x)
    damage(state)
    nested = {f"dsts.{key}": value for key, value in state.items()}
    for target, given in ((fast, state), (nn.ModuleDict({"dsts": fast}), nested)):
        for options in ({}, dict(strict=False), dict(assign=True)):
            with pytest.raises(RuntimeError, match="nothing of this frozen module was loaded"):
                target.load_state_dict(given, **options)
            assert_same(fast, before)
    assert torch.equal(fast(x), y)


def test_states_of_other_kinds():
    """A live module's state, version 0.1's, a newer one, a single layer's: each refused with what to do."""
    fast = live().freeze()
    before = snapshot(fast)

    def refused(state, message: str, module: nn.Module = fast) -> None:
        with pytest.raises(RuntimeError, match=message):
            module.load_state_dict(state, strict=False)
        assert_same(fast, before)

    refused(live().state_dict(), r"got one of a FusedDSTS, wanted one of a frozen module: .* then freeze\(\)")
    refused(
        torch.load(FILES / "frozen_0_1_state.pt"), r"dsts_kernels 0.1 wrote such states: .*freeze\(\), or .*torch.load"
    )
    state = snapshot(fast)
    described(state, lambda f: f.update(format=3, more=1))
    refused(state, "got format 3, wanted 2: a newer version of dsts_kernels wrote this state; install")
    refused(fast.layers[0].state_dict(), "got the state of one frozen layer, wanted a FrozenDSTS's", fast.layers[0])
    refused(fast.layers.state_dict(), "got the state of one frozen layer, wanted a FrozenDSTS's", fast.layers)


def test_a_frozen_state_in_a_live_module():
    """Refused with what to do, without sizes and missing keys; the module stays as it was."""
    dsts, state = live(), live().freeze().state_dict()
    before = snapshot(dsts)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"layers.0: got the state of a frozen layer, .*by freeze\(\)") as error:
            dsts.load_state_dict(state, strict=strict)
        assert "size mismatch" not in str(error.value) and "Missing" not in str(error.value)
        assert_same(dsts, before)


def test_a_state_without_it():
    """A checkpoint that has no frozen module leaves it alone; strict, it is missing; what is too much is told."""
    fast = live().freeze()
    before, model = snapshot(fast), in_a_model(fast)
    found = model.load_state_dict(
        {"0.bias": torch.ones(SIZE[1]), "1.dsts.layers.0.colour": torch.ones(1)}, strict=False
    )
    assert torch.equal(model[0].bias, torch.ones(SIZE[1])) and "1.dsts._extra_state" in found.missing_keys
    assert {key for key in found.missing_keys if key.startswith("1.")} == {f"1.dsts.{key}" for key in before}
    assert "1.dsts.layers.0.colour" in found.unexpected_keys
    assert_same(fast, before)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        model.load_state_dict({"0.bias": torch.ones(SIZE[1])})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"colour\""):
        fast.load_state_dict({**fast.state_dict(), "colour": torch.ones(1)})


def test_hooks_of_loading():
    """Hooks that rename keys run, as of every module."""
    fast, other = live().freeze(), live().freeze()

    def rename(state, prefix, *rest):
        for key in [key for key in state if key.startswith(f"{prefix}old.")]:
            state[prefix + key.removeprefix(f"{prefix}old.")] = state.pop(key)

    fast._register_load_state_dict_pre_hook(rename)
    fast.load_state_dict({f"old.{key}": value for key, value in other.state_dict().items()})
    assert_same(fast, other.state_dict())


def test_extra_state_alone():
    """What a state says of itself may be set again, and no other."""
    fast, other = live().freeze(), live(skip=False).freeze()
    fast.set_extra_state(fast.get_extra_state())
    for wrong, error in ((other.get_extra_state(), ValueError), (None, TypeError), (torch.zeros(3), TypeError)):
        with pytest.raises(error, match="wanted"):
            fast.set_extra_state(wrong)
    others = (fast, other, repacked(fast, "tiled"), live().freeze(backend="eager", dtype=torch.bfloat16))
    assert len({len(module.get_extra_state()) for module in others}) == 1  # a tool may load it in place


def test_a_state_is_tensors():
    """Dense, each in memory of its own, on torch's safe list: any tool can carry it."""
    fast = live(mixing_kernel=(1, 3, 3)).freeze()
    state = fast.state_dict()
    assert all(type(v) is torch.Tensor and v.is_contiguous() for v in state.values())
    assert len({v.untyped_storage().data_ptr() for v in state.values()}) == len(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = live(mixing_kernel=(1, 3, 3)).freeze()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(other, state)
