"""insert_dsts puts DSTS behind a submodule and changes nothing else; remove_dsts and freeze_dsts."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, namedtuple

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dsts_kernels
from dsts_kernels import FrozenDSTS, FusedDSTS, backbones, freeze_dsts, insert_dsts, reference, remove_dsts
from dsts_kernels.learning import RoutingMonitor, UpstreamDownstream, downstream_parameters, upstream_parameters
from dsts_kernels.testing import assert_close

from .models import CHANNELS, CLIP, GRID, KINDS, OPTIONS, ChannelsLast, Clips, Frames, Tokens, enliven, inserted


def naive(kind: str, x: torch.Tensor, dsts: nn.Module) -> torch.Tensor:
    """DSTS on features of KINDS, by indices and copies."""
    if kind == "BCTHW":
        return dsts(x)
    if kind == "TSN":
        clips = torch.stack([torch.stack(list(x[b * 4 : b * 4 + 4]), 1) for b in range(len(x) // 4)])
        return torch.cat([torch.stack([y[:, t] for t in range(4)]) for y in dsts(clips)])
    if kind == "BTHWC":
        return dsts(x.movedim(-1, 1).contiguous()).movedim(1, -1).contiguous()
    class_token, tokens = x[:, :1], x[:, 1:]
    y = dsts(tokens.transpose(1, 2).reshape(len(x), CHANNELS, *GRID)).flatten(2).transpose(1, 2)
    return torch.cat((class_token, y), 1)


def test_names():
    """One function, found in the package and among the backbones."""
    for name in ("insert_dsts", "remove_dsts", "freeze_dsts"):
        assert getattr(dsts_kernels, name) is getattr(backbones, name) and name in dsts_kernels.__all__


@pytest.mark.parametrize("kind", KINDS)
def test_passes_through(kind):
    """What the submodule returns passes through DSTS, in its own layout, forward and backward; returned is the DSTS."""
    model, dsts, x = inserted(kind)
    _, where, _, _ = KINDS[kind]
    assert isinstance(dsts, FusedDSTS) and dsts in list(model.modules()) and dsts.layers[0].in_channels == CHANNELS
    model.eval()
    plain = remove_dsts(copy.deepcopy(model))
    seen = []
    plain.get_submodule(where).register_forward_hook(lambda m, args, out: seen.append(out) or naive(kind, out, dsts))
    y, expected = model(x), plain(x)
    assert_close(y, expected)
    assert not torch.allclose(y, remove_dsts(copy.deepcopy(model))(x))
    y.square().sum().backward()
    ours = {name: p.grad for name, p in dsts.named_parameters() if p.grad is not None}
    dsts.zero_grad()
    expected.square().sum().backward()
    theirs = {name: p.grad for name, p in dsts.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() and len(ours) > 4
    for name in ours:
        assert_close(ours[name], theirs[name], name=name, factor=100)


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_the_model_as_it_was(kind):
    """Keys, parameters, buffers, modules, hooks and their order; and all of it again after remove_dsts."""
    make, where, known, shape = KINDS[kind]
    model = make()
    counted = [model.get_submodule(where).register_forward_hook(lambda m, a, o: None)]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    hooks = dict(model.get_submodule(where)._forward_hooks)
    insert_dsts(model, where, example=shape, **known, **OPTIONS)
    new = [key for key in model.state_dict() if key not in state]
    prefix = f"{where}.1.dsts." if kind == "BCTHW" else f"{where}.0.dsts." if kind == "TSN" else f"{where}.dsts."
    assert new and all(key.startswith(prefix) for key in new)
    assert [key for key in model.state_dict() if key in state] == list(state)
    for back in (False, True):
        if back:
            assert remove_dsts(model) is model
            assert list(dict(model.named_modules())) == list(modules)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        assert all(model.get_parameter(name) is p for name, p in parameters.items())
        assert all(model.get_submodule(name) is m for name, m in modules.items())
    assert dict(model.get_submodule(where)._forward_hooks) == hooks and counted
    assert list(model.state_dict()) == list(state)


def test_a_sequential_stays_one():
    """Length, indices, order and slices of a stage are what they were, whoever walks through it."""
    model, _, x = inserted("BCTHW")
    stage = model.stage1
    assert len(stage) == 2 and stage[-1] is stage[1] and [type(m).__name__ for m in stage] == ["Block", "Block"]
    assert list(dict(stage.named_children())) == ["0", "1"] and len(stage[:1]) == 1
    trunk = nn.Sequential(*list(model.children())[:-1]).eval()  # how people cut a head off
    assert len(list(model.children())) == 4 and upstream_parameters(trunk)
    assert_close(model.eval().head(trunk(x).mean((2, 3, 4))), model(x))


def test_hooks_see_what_they_saw():
    """A hook from before gets what the submodule returns, and may change it; a later one gets what DSTS made of it."""
    model, shape = ChannelsLast().eval(), CLIP
    before, after = [], []
    model.norm.register_forward_hook(lambda m, args, out: before.append(out) or 2 * out)
    dsts = insert_dsts(model, "norm", example=shape, **OPTIONS)
    enliven(dsts)
    before.clear()
    model.norm.register_forward_hook(lambda m, args, out: after.append(out))
    model(torch.randn(shape))
    assert_close(after[0], dsts((2 * before[0]).movedim(-1, 1)).movedim(1, -1))


class Restless(nn.Module):
    """A backbone that changes all it can with every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.Dropout(0.5)
        self.register_buffer("passes", torch.zeros(()))
        self.seen, self.kept = 0, {}

    def forward(self, x):
        self.passes += 1
        self.passes = self.passes * 2
        self.seen += 1
        self.kept["x"] = x
        random.random(), numpy.random.rand(), torch.rand(1)
        self.norm.train()
        return self.drop(self.norm(self.conv(x)))


@pytest.mark.parametrize("fails", [False, True])
def test_the_dry_run_leaves_no_trace(fails):
    """Statistics, buffers, attributes, modes, gradients, hooks and generators are as before, also after an error."""
    model = Restless()
    model.norm.eval()
    model.conv(torch.randn(1, 3, 1, 1, 1)).sum().backward()
    buffers = dict(model.named_buffers())
    values = {name: buffer.clone() for name, buffer in buffers.items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    random.seed(1), numpy.random.seed(1)
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    if fails:
        with pytest.raises(ValueError, match=r"layout: got 'BTHWC' and channels|channels: got 5, wanted 8 .*'BTHWC'"):
            insert_dsts(model, "drop", layout="BTHWC", channels=5, example=(1, 3, 4, 8, 8), dsts=None)
        assert not any(isinstance(m, FusedDSTS) for m in model.modules()) and not model.drop._forward_hooks
    else:
        insert_dsts(model, "drop", example=(1, 3, 4, 8, 8), num_neurons=2)
        remove_dsts(model)
        state = torch.get_rng_state()  # parameters of DSTS are drawn, as those of any new module
        assert not torch.equal(state, generators[0])
        torch.set_rng_state(generators[0])
        FusedDSTS(4, num_neurons=2)
        assert torch.equal(torch.get_rng_state(), state)
    assert all(dict(model.named_buffers())[name] is buffer for name, buffer in buffers.items())
    assert all(torch.equal(buffers[name], value) for name, value in values.items())
    assert model.seen == 0 and model.kept == {} and model.training and not model.norm.training and model.drop.training
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == found.keys() and all(torch.equal(grads[name], grad) for name, grad in found.items())
    assert random.getstate() == generators[1] and (numpy.random.get_state()[1] == generators[2]).all()
    if fails:
        assert torch.equal(torch.get_rng_state(), generators[0])


def test_no_dry_run_where_all_is_known():
    """Layout and channels given: the model does not run, and is checked when it does."""
    model = Restless()
    model.forward = None
    dsts = insert_dsts(model, "drop", layout="BCTHW", channels=4, num_neurons=2)
    assert dsts.layers[0].in_channels == 4


def test_the_dry_run_is_in_evaluation():
    """Every module, and without gradients."""
    model, seen = Clips(), []
    for module in model.modules():
        module.register_forward_hook(lambda m, args, out: seen.append(m.training or out.requires_grad))
    insert_dsts(model, "stage1", example=CLIP, **OPTIONS)
    assert seen and not any(seen) and all(module.training for module in model.modules())


@pytest.mark.parametrize("make, frames", [(Clips, None), (Frames, 4)])
def test_a_clip_is_made_up(make, frames):
    """Without an example a clip for the first convolution does."""
    model = make()
    shapes = []
    model.register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    dsts = insert_dsts(model, "stem", frames=frames, **OPTIONS)
    assert shapes == [(1, 3, 16, 112, 112) if frames is None else (4, 3, 112, 112)]
    assert dsts.layers[0].in_channels == CHANNELS


@pytest.mark.parametrize("example", ["clip", "shape", "arguments", "keywords"])
def test_examples(example):
    """A clip, its shape, a tuple of arguments, a dict of keyword arguments."""
    clip = torch.randn(CLIP)
    given = {"clip": clip, "shape": clip.shape, "arguments": (clip,), "keywords": {"x": clip}}[example]
    assert insert_dsts(Clips(), "stage2", example=given, **OPTIONS).layers[0].in_channels == CHANNELS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_mode_of_the_features(dtype):
    """DSTS takes them from the features and the submodule, autocast or not; options go before."""
    model = Clips().to(dtype)
    model.stage1.eval()
    with torch.autocast("cpu", torch.bfloat16):
        dsts = insert_dsts(model, "stage1", example=CLIP, **OPTIONS)
    assert {p.dtype for p in dsts.parameters()} == {dtype} and not dsts.training
    other = insert_dsts(model, "stage2", layout="BCTHW", channels=CHANNELS, dtype=torch.float32, **OPTIONS)
    assert other.layers[0].gate.dtype == torch.float32 and other.training
    third = insert_dsts(Clips().to(dtype), "stage2", layout="BCTHW", channels=CHANNELS, **OPTIONS)
    assert third.layers[0].gate.dtype == dtype


Pair = namedtuple("Pair", "x more")
RETURNS = {
    "tuple": (lambda x: (x, 1), 0),
    "from the end": (lambda x: (x,), -1),
    "named": (lambda x: Pair(x, 1), 0),
    "list": (lambda x: [x, 1], 0),
    "dict": (lambda x: {"more": 1, "x": x}, "x"),
    "ordered": (lambda x: OrderedDict(x=x), "x"),
}


@pytest.mark.parametrize("made, key", RETURNS.values(), ids=RETURNS)
def test_submodules_that_return_several_things(made, key):
    """``output`` says where the features are; the rest passes, the kind stays. Without it an error lists the places."""
    model = Tokens(made).eval()
    known = {"grid": GRID, "class_tokens": 1, "example": CLIP} | OPTIONS
    with pytest.raises(
        ValueError, match=r"output: got None, wanted the place of the features in the .*a tensor of shape"
    ):
        insert_dsts(model, "layer", **known)
    before = model.layer(torch.zeros(2, 33, CHANNELS))
    dsts = insert_dsts(model, "layer", output=key, **known)
    enliven(dsts)
    after = model.layer(torch.zeros(2, 33, CHANNELS))
    assert type(after) is type(before) and len(after) == len(before)
    x, y = Tokens().layer.features(before), Tokens().layer.features(after)
    assert_close(y, naive("BNC", x, dsts))
    assert model(torch.randn(CLIP)).shape == (2, 3)


def test_several_insertions():
    """Each is its own; one is taken out, or all."""
    model = Clips()
    found = {
        where: insert_dsts(model, where, example=CLIP, **OPTIONS) for where in ("stem", "stage1", "stage1.0", "stage2")
    }
    assert len({id(dsts) for dsts in found.values()}) == 4 and model(torch.randn(CLIP)).shape == (2, 3)
    remove_dsts(model, "stage1")
    assert found["stage1"] not in list(model.modules()) and found["stage1.0"] in list(model.modules())
    remove_dsts(model)
    assert not any(isinstance(m, FusedDSTS) for m in model.modules())
    assert list(model.state_dict()) == list(Clips().state_dict())


def test_the_model_itself():
    """The name of the whole model is empty, as in ``named_modules``."""
    model = nn.Conv3d(3, CHANNELS, 1)
    dsts = insert_dsts(model, "", example=CLIP, **OPTIONS)
    assert model.dsts is dsts and all(key.startswith("dsts.") for key in set(model.state_dict()) - {"weight", "bias"})


@pytest.mark.parametrize("kind", ["fused", "literal", "frozen"])
def test_a_module_of_ones_own(kind):
    """``dsts`` goes in as it is: a trained one, the literal one, a frozen one from a file."""
    fused, literal = FusedDSTS(CHANNELS, **OPTIONS), reference.DSTS(CHANNELS, **OPTIONS)
    enliven(fused)
    literal.load_state_dict(fused.state_dict())
    given = {"fused": fused, "literal": literal, "frozen": fused.eval().freeze()}[kind].eval()
    model = Clips().eval()
    assert insert_dsts(model, "stage1", example=CLIP, dsts=given) is given and model.stage1[1].dsts is given
    x = torch.randn(CLIP)
    with torch.no_grad():
        mine = model(x)
        remove_dsts(model)
        model.stage1.register_forward_hook(lambda m, args, out: fused.eval()(out))
        assert_close(mine, model(x), factor=10)


@pytest.mark.parametrize("kind", KINDS)
def test_freezing(kind):
    """Every FusedDSTS by its frozen form, same place, same results; a copy can be trained on."""
    model, _, x = inserted(kind)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        fast = freeze_dsts(copy.deepcopy(model))
        assert_close(fast(x), expected, factor=10)
    found = [m for m in fast.modules() if isinstance(m, FrozenDSTS)]
    assert len(found) == 1 and not any(isinstance(m, FusedDSTS) for m in fast.modules())
    assert fast.eval() is fast and any(isinstance(m, FusedDSTS) for m in model.train().modules())
    with pytest.raises(RuntimeError, match="a frozen module only infers"):
        fast.train()
    remove_dsts(fast)
    assert list(fast.state_dict()) == list(KINDS[kind][0]().state_dict())


def test_freezing_what_a_model_has_of_its_own():
    """A FusedDSTS that the model's author put there, in two places, is frozen once; options are those of freeze()."""
    shared = FusedDSTS(CHANNELS, **OPTIONS)
    model = nn.Sequential(shared, nn.ReLU(), shared).eval()
    assert freeze_dsts(model, dtype=torch.float64, algorithm="direct") is model
    assert model[0] is model[2] and isinstance(model[0], FrozenDSTS)
    assert model[0].dtype == torch.float64 and model[0].algorithm == "direct"


def test_freezing_all_or_nothing():
    """One that does not freeze leaves the others live."""
    model = Clips().eval()
    dsts = [insert_dsts(model, where, example=CLIP, **OPTIONS) for where in ("stage1", "stage2")]
    dsts[1].layers[0].norm = nn.InstanceNorm3d(CHANNELS)
    with pytest.raises(TypeError, match=r"layers.0.norm: got InstanceNorm3d"):
        freeze_dsts(model)
    assert [m for m in model.modules() if isinstance(m, FusedDSTS)] == dsts


@pytest.mark.parametrize("kind", KINDS)
def test_learning(kind):
    """Both sides are found through the model, a step trains both and the backbone, the monitor counts clips."""
    model, dsts, x = inserted(kind)
    upstream = upstream_parameters(model)
    assert [id(p) for p in upstream] == [id(p) for p in dsts.upstream_parameters()]
    assert len(upstream) + len(downstream_parameters(model)) == len(list(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    sides = {"upstream_optimizer": upstream, "downstream_optimizer": downstream_parameters(model)}
    optimizers = {name: torch.optim.SGD(side, 0.1) for name, side in sides.items()}
    learner = UpstreamDownstream(model, F.cross_entropy, **optimizers)
    monitor = RoutingMonitor(model)
    labels = torch.arange(len(x)) % 3
    learner.step((x, labels), (torch.randn_like(x), labels))
    # What follows a class token alone, and a bias before a norm, may stay.
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    names = [name for name, _ in model.named_parameters()]
    assert all(m for name, m in zip(names, moved, strict=True) if "gate" in name or "spatial" in name or "head" in name)
    assert moved[names.index("stem.weight" if "stem.weight" in names else "patches.weight")]
    statistics = monitor.statistics()
    assert statistics.samples.tolist() == [2 * 3] * 2  # two clips, three passes, whatever dimension 0 holds
