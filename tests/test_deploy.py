"""Frozen modules in standard operators: the same results, the same moves, nothing of ours, clear refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from dsts_kernels import FusedDSTS, deploy
from dsts_kernels.testing import assert_close

from .support.classifiers import Classifier, frozen_classifier
from .support.inputs import LAYOUTS
from .support.modules import assert_same_routing, features_for, pair, reference_output

pytestmark = pytest.mark.usefixtures("poison")
OPTIONS = {
    "default": {},
    "wide-3x3-scoring": dict(scoring_kernel=(1, 3, 3), scoring_width=2),
    "mean-scores": dict(score_reduction="mean"),
    "mixing-1x3x3": dict(mixing_kernel=(1, 3, 3)),
    "mixing-3x1x1": dict(mixing_kernel=(3, 1, 1), scoring_kernel=(1, 3, 3), score_reduction="mean"),
    "bare": dict(norm=None, activation=None, skip=False, mixing_kernel=(1, 3, 3)),
    "no-activation": dict(activation=None),
    "one-neuron": dict(num_neurons=1, num_layers=1),
}
CENTRED = {
    "centred": dict(score_center=True),
    "centred-3x3-scores": dict(score_center=True, scoring_kernel=(1, 3, 3), score_reduction="mean"),
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [*OPTIONS.values(), *CENTRED.values()], ids=[*OPTIONS, *CENTRED])
def test_matches_reference(options, dtype):
    """Output and routing of the literal module in evaluation, in every dtype."""
    ref, fused = pair(12, dtype, **options)
    x = features_for(ref, torch.randn(6, 12, 3, 4, 6).to(dtype))
    theirs, their_routing = reference_output(ref, x)
    y, routing = deploy.standard(fused.eval().freeze())(x, return_routing=True)
    assert y.dtype == dtype and y.is_contiguous()
    assert_close(y, theirs, factor=2)
    assert_same_routing(routing, their_routing, dtype)


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_reads_every_packing(algorithm, backend):
    """It does not matter for which kernels the module was packed."""
    ref, fused = pair(20, torch.float32, mixing_kernel=(3, 1, 1))
    if algorithm == "winograd" and backend == "eager":
        algorithm = "auto"
    x = features_for(ref, torch.randn(3, 20, 3, 4, 5))
    frozen = fused.eval().freeze(algorithm=algorithm, backend=backend)
    assert_close(deploy.standard(frozen)(x), reference_output(ref, x)[0], factor=2)


@pytest.mark.parametrize("gates", [(-1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)], ids=["temporal", "spatial", "both"])
def test_one_sided(gates):
    """Layers without a spatial or a temporal channel, and neurons at opposite ends, whose lists are padded most."""
    ref, fused = pair(6, torch.float32, num_neurons=2, num_layers=2)
    with torch.no_grad():
        for module in (ref, fused):
            for layer in module.layers:
                layer.gate.copy_(torch.tensor(gates)[:, None])
    x = torch.randn(4, 6, 3, 4, 5)
    x = features_for(ref, torch.cat([x, -x]))  # whose scores in the first layer are opposite
    y, routing = deploy.standard(fused.eval().freeze())(x, return_routing=True)
    assert len(routing.neuron.unique()) == 2
    assert_close(y, reference_output(ref, x)[0], factor=2)


@pytest.mark.parametrize("size", [(2, 7, 1, 1, 1), (1, 7, 3, 1, 4), (2, 7, 1, 5, 1), (0, 7, 2, 3, 3)], ids=str)
@pytest.mark.parametrize("scoring_kernel", [(1, 1, 1), (1, 3, 3)], ids=str)
def test_sizes(size, scoring_kernel):
    """Sides of one, and an empty batch."""
    ref, fused = pair(7, torch.float32, scoring_kernel=scoring_kernel, score_reduction="mean")
    x = torch.randn(size)
    x = features_for(ref, x) if size[0] else x
    assert_close(deploy.standard(fused.eval().freeze())(x), reference_output(ref, x)[0], factor=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Any stride order in, contiguous out."""
    fast = pair(12, torch.float32)[1].eval().freeze()
    x = LAYOUTS[layout](torch.randn(3, 12, 3, 4, 6))
    y = deploy.standard(fast)(x)
    assert y.is_contiguous()
    assert_close(y, fast(x), factor=2)


def test_samples_stay_apart():
    """NaN and Inf in a sample leave the others as they are, bit for bit, and every neuron valid."""
    module = deploy.standard(pair(12, torch.float32, skip=False)[1].eval().freeze())
    x = torch.randn(4, 12, 3, 4, 6)
    clean = module(x)
    x[1], x[3, 0, 0, 0, 0] = torch.nan, torch.inf
    y, routing = module(x, return_routing=True)
    assert torch.equal(y[[0, 2]], clean[[0, 2]]) and y[1].isnan().all()
    assert ((routing.neuron >= 0) & (routing.neuron < 3)).all()


def test_classifier():
    """A copy of a model: every frozen module of it is replaced, a shared one by one; the model itself stays."""
    model = frozen_classifier()
    model.again = model.dsts
    clips, keys = torch.randn(4, 3, 3, 8, 8), list(model.state_dict())
    copied = deploy.standard(model)
    assert type(copied) is Classifier and type(copied.dsts) is deploy.StandardDSTS and copied.again is copied.dsts
    assert list(model.state_dict()) == keys and copied.stem[0].weight is not model.stem[0].weight
    assert_close(copied(clips), model(clips), factor=2)
    with torch.no_grad():
        wanted = copied(clips)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(copied(clips), wanted)
    for again in (copy.deepcopy(copied), pickle.loads(pickle.dumps(copied))):
        assert torch.equal(again(clips), wanted)


def test_model_may_be_compiled():
    """The model that torch.compile wraps, without compiling it."""
    model = frozen_classifier()
    assert type(deploy.standard(torch.compile(model))) is Classifier


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casts(dtype):
    """A cast rounds weights alone: scores and biases stay wide, as in the frozen module."""
    frozen = pair(12, torch.float32)[1].eval().freeze()
    module = deploy.standard(frozen)
    before = [layer.scoring.clone() for layer in module.layers]
    holder = nn.Sequential(module).to(dtype)
    for layer, scoring in zip(module.layers, before, strict=True):
        assert layer.filters.dtype == dtype and layer.gate.dtype == torch.float32
        assert torch.equal(layer.scoring, scoring.to(layer.scoring.dtype)) and layer.bias.dtype == layer.scoring.dtype
    x = torch.randn(2, 12, 3, 4, 6).to(dtype)
    assert_close(holder(x), frozen.to(dtype)(x), factor=2)
    holder.float()
    assert all(layer.scoring.dtype == layer.filters.dtype == torch.float32 for layer in module.layers)
    assert nn.Sequential(module).to("meta")[0].layers[0].filters.is_meta


def in_training() -> nn.Module:
    model = frozen_classifier()
    model.stem[1].train()
    return model


def hooked() -> nn.Module:
    model = frozen_classifier()
    model.dsts.register_forward_hook(lambda *_: None)
    return model


REFUSED = {
    "no-module": (lambda: torch.relu, TypeError, "model: got .*relu.*, wanted a torch.nn.Module"),
    "nothing-frozen": (lambda: nn.Linear(2, 2).eval(), ValueError, "got Linear without a FrozenDSTS, wanted one"),
    "not-frozen": (
        lambda: Classifier().eval(),
        ValueError,
        r"model\.dsts\.layers\.0: got a DSTSLayer, whose weights train",
    ),
    "bare-not-frozen": (
        lambda: FusedDSTS(4).eval(),
        ValueError,
        r"model\.layers\.0: .* wanted a FrozenDSTS: freeze\(\) makes it",
    ),
    "training": (in_training, ValueError, r"model\.stem\.1: got BatchNorm3d in training mode.*model\.eval\(\)"),
    "hooks": (hooked, ValueError, r"model\.dsts: got forward hooks, wanted none"),
    "meta": (lambda: frozen_classifier().to("meta"), ValueError, r"model\.dsts: got a frozen module without weights"),
}


@pytest.mark.parametrize("make, kind, match", REFUSED.values(), ids=REFUSED)
def test_refuses(make, kind, match):
    """What cannot be deployed is named: where it is, what came, what was wanted."""
    with pytest.raises(kind, match=match):
        deploy.standard(make())


def test_refuses_training_and_input():
    """As a frozen module does."""
    module = deploy.standard(FusedDSTS(4, num_neurons=2).eval().freeze())
    with pytest.raises(RuntimeError, match=r"train\(mode\): got True, wanted False"):
        module.train()
    assert module.eval() is module
    with pytest.raises(ValueError, match="x: got a tensor of shape"):
        module(torch.randn(1, 5, 2, 3, 3))
    with pytest.raises(TypeError, match=r"wanted torch\.float32, the module's dtype"):
        module(torch.randn(1, 4, 2, 3, 3).half())
