"""The centre of scores: what it follows, what it is subtracted from, and that nobody who has none sees it."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsts_kernels import DSTSLayer, FrozenDSTS, FusedDSTS, reference
from dsts_kernels.deploy import standard
from dsts_kernels.frozen_state import EXTRA
from dsts_kernels.routing import sample_draws
from dsts_kernels.testing import assert_close

from .support.frozen import described
from .support.inputs import FORMATS
from .support.modules import (
    assert_same_gradients,
    assert_same_routing,
    assert_same_statistics,
    draws_for,
    features_for,
    pair,
    reference_output,
    reference_step,
    training_step,
)
from .support.targets import large

pytestmark = pytest.mark.usefixtures("poison")

KINDS = {
    "mean": dict(score_center=True),
    "mean-in-training": dict(score_center="mean", center_in_training=True),
    "balance": dict(score_center="balance", center_momentum=0.3),
    "balance-in-training": dict(score_center="balance", center_in_training=True),
    "wide-3x3-scoring": dict(score_center=True, center_in_training=True, scoring_kernel=(1, 3, 3), scoring_width=2),
    "summed-all-neurons": dict(
        score_center=True, center_in_training=True, score_reduction="sum", routing_gradient="all", num_layers=1
    ),
}
ON_STAND_INS = ("mean-in-training", "wide-3x3-scoring")  # what GPU kernels are given differs between these alone
every_kind = pytest.mark.parametrize(
    "options",
    [pytest.param(own, marks=() if name in ON_STAND_INS else large) for name, own in KINDS.items()],
    ids=KINDS,
)


def offset(*modules: torch.nn.Module) -> None:
    """Centres that change most choices: about as far apart as scores are."""
    with torch.no_grad():
        for layers in zip(*(module.layers for module in modules), strict=True):
            drawn = torch.randn(len(layers[0].gate), dtype=torch.float32)
            for layer in layers:
                layer.center.copy_(drawn)
                layer.center_batches.fill_(3)


def centered_pair(target, channels: int, dtype: torch.dtype, **options) -> tuple[reference.DSTS, FusedDSTS]:
    given = dict(num_neurons=4, num_layers=2, score_reduction="mean", activation=None) | options
    ref, fused = pair(channels, dtype, target.backend, target.device, **given)
    offset(ref, fused)
    return ref, fused


@every_kind
def test_training(target, options):
    """Steps of both: outputs, routing, gradients, and where the centre has gone."""
    size = (4, 12, *target.size)
    ref, fused = centered_pair(target, 12, target.dtype, **options)
    for _ in range(1 if target.stand_in else 2):
        x, grad = target.randn(*size), target.randn(*size)
        draws = draws_for(ref, x, target.dtype)
        before = fused.layers[0].center.clone()
        theirs, their_routing, wanted = reference_step(ref, x, draws, grad)
        ours, routing, gradients = training_step(fused, x, draws, grad)
        assert_close(ours, theirs, name="output", factor=2)
        assert_same_routing(routing, their_routing, target.dtype)
        assert_same_gradients(gradients, wanted, target.dtype, 10)
        assert_same_statistics(fused, ref, target.dtype, factor=10)
        assert not torch.equal(before, fused.layers[0].center)


@every_kind
@pytest.mark.parametrize("layout", ["channels-first", pytest.param("channels-last", marks=large)])
def test_evaluation_and_frozen(target, options, layout):
    """The module, its frozen copy and the reference agree, in every layer; the centre changes choices."""
    ref, fused = centered_pair(target, 12, target.dtype, **options)
    x = features_for(ref, target.randn(6, 12, *target.size)).contiguous(memory_format=FORMATS[layout])
    theirs, their_routing = reference_output(ref, x)
    fused.eval()
    for module in (fused, fused.freeze()):
        ours, routing = module(x, return_routing=True)
        assert_close(ours, theirs, factor=2)
        assert_same_routing(routing, their_routing, target.dtype)
        assert torch.equal(routing.neuron, routing.scores.argmax(2))
    with torch.no_grad():
        for layer in ref.layers:
            layer.center.zero_()
    with torch.no_grad():
        assert not torch.equal(ref(x.double(), return_routing=True)[1].neuron, their_routing.neuron)


@large
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_frozen_in_other_dtypes(target, dtype):
    """Scores less the centre are as wide as scores, whatever the features are."""
    ref, fused = centered_pair(target, 20, dtype, **KINDS["mean"])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = features_for(ref, target.randn(8, 20, *target.size, dtype=dtype))
    _, wanted = reference_output(ref, x)
    assert all(layer.center.dtype == wide for layer in fused.layers)
    _, routing = fused.eval().freeze()(x, return_routing=True)
    assert routing.scores.dtype == wide
    assert_same_routing(routing, wanted, dtype)


@pytest.mark.parametrize("in_training", [False, True])
def test_what_the_mean_is(in_training):
    """The mean of all batches until they are ten, a running one of a tenth from then on; of the scores as they are."""
    layer = DSTSLayer(5, num_neurons=3, score_center=True, center_in_training=in_training, dtype=torch.float64)
    seen, expected = [], None
    for step in range(14):
        x = torch.randn(4, 5, 2, 3, 3, dtype=torch.float64)
        raw = reference.DSTSLayer.scores(layer, x).mean(0).detach()
        seen.append(raw)
        expected = torch.stack(seen).mean(0) if step < 10 else 0.9 * expected + 0.1 * raw
        _, routing = layer(x, return_routing=True)
        assert_close(layer.center, expected)
    assert layer.center_batches == 14
    layer.eval()
    before, x = layer.center.clone(), torch.randn(4, 5, 2, 3, 3, dtype=torch.float64)
    _, routing = layer(x, return_routing=True)
    assert_close(routing.scores, reference.DSTSLayer.scores(layer, x).detach() - before)
    assert torch.equal(layer.center, before) and layer.center_batches == 14


def test_balance_brings_every_neuron_its_share():
    """Scores with an offset that dwarfs what samples add: evaluation uses every neuron alike after a while."""
    dsts = FusedDSTS(8, num_layers=1, num_neurons=4, score_center="balance", score_reduction="mean", norm=None)
    layer = dsts.layers[0]
    with torch.no_grad():
        layer.scoring.zero_()
        for i in range(4):  # mean of a channel of its own, and an offset by one that is always 1
            layer.scoring[i, :, i] = 1.0
            layer.scoring[i, :, 7] = 3.0 * i

    def clips() -> Tensor:
        x = torch.randn(64, 8, 1, 1, 1)
        x[:, 7] = 1
        return x

    def usage() -> Tensor:
        x = torch.cat([clips() for _ in range(16)])
        dsts.eval()
        return torch.bincount(dsts(x, return_routing=True)[1].neuron[0], minlength=4) / len(x)

    assert usage()[3] > 0.85  # the last neuron takes nearly all
    dsts.train()
    for _ in range(150):
        dsts(clips())
    shares = usage()
    assert shares.min() > 0.1 and shares.max() < 0.45, shares  # 0.16 to 0.36 in 60 tries: steps stay as large


@large
def test_samples_that_are_not_finite_count_for_nothing(target):
    """NaN in one sample reaches neither the centre nor, by it, another sample; a batch of such changes nothing."""
    options = dict(num_neurons=3, num_layers=1, norm=None, score_center=True, backend=target.backend)
    dsts = FusedDSTS(8, device=target.device, dtype=target.dtype, **options)
    alone = copy.deepcopy(dsts)
    x = target.randn(4, 8, *target.size)
    draws = sample_draws(4, 8, 3, 1, device=target.device, dtype=target.dtype)
    alone(x[:3], type(draws)(draws.noise[:, :3], draws.hard[:, :3], draws.gumbel[:, :3]))
    x[3, 2, 0, 1, 1] = float("nan")
    dsts(x, draws)
    assert_close(dsts.layers[0].center, alone.layers[0].center, dtype=torch.float32)
    before = dsts.layers[0].center.clone()
    dsts(torch.full_like(x, float("nan")), draws)
    dsts(x[:0])
    assert torch.equal(before, dsts.layers[0].center) and dsts.layers[0].center_batches == 1


def test_states_with_and_without():
    """A state of either kind loads into either kind of module."""
    plain, centered = FusedDSTS(6, num_neurons=2), FusedDSTS(6, num_neurons=2, score_center=True)
    assert set(centered.state_dict()) - set(plain.state_dict()) == {
        f"layers.{l}.{name}" for l in range(3) for name in ("center", "center_batches")
    }
    offset(centered)
    other = FusedDSTS(6, num_neurons=2, score_center=True)
    other.load_state_dict(centered.state_dict())
    assert torch.equal(other.layers[1].center, centered.layers[1].center) and other.layers[1].center_batches == 3
    other.load_state_dict(plain.state_dict())
    assert other.layers[1].center.count_nonzero() == 0 and other.layers[1].center_batches == 0
    for module in (plain, reference.DSTS(6, num_neurons=2)):
        with pytest.warns(UserWarning, match=r"^layers.\d.center: got a state with one, wanted none") as warned:
            module.load_state_dict(centered.state_dict())
        assert len(warned) == 3
    assert torch.equal(plain.layers[2].scoring, centered.layers[2].scoring)
    literal = reference.DSTS(6, num_neurons=2, score_center=True)
    literal.load_state_dict(centered.state_dict())
    assert torch.equal(literal.layers[0].center, centered.layers[0].center)
    literal.load_state_dict(other.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(literal.state_dict())
    incomplete = {key: value for key, value in centered.state_dict().items() if key != "layers.0.center_batches"}
    with pytest.raises(RuntimeError, match=r"Missing key.*layers.0.center_batches"):
        other.load_state_dict(incomplete)


@pytest.mark.parametrize("kind", [FusedDSTS, reference.DSTS])
def test_a_state_without_one_assigned(kind):
    """A module without memory of its own takes an older state's, and a centre beside it."""
    options = dict(num_neurons=2, num_layers=1)
    with torch.device("meta"):
        dsts = kind(6, score_center=True, **options)
    dsts.load_state_dict(kind(6, **options).state_dict(), assign=True)
    assert {b.device.type for b in dsts.buffers()} == {"cpu"} and dsts.layers[0].center.count_nonzero() == 0
    assert dsts.eval()(torch.randn(2, 6, 2, 3, 3)).isfinite().all()


def test_switched_off():
    """Without ``score_center`` a layer that has a centre does nothing with it: by itself, frozen, or in a monitor."""
    dsts, _, x = frozen_pair()
    with torch.no_grad():
        before = dsts(x, return_routing=True)[1].scores
        centers = [layer.center.clone() for layer in dsts.layers]
        for layer in dsts.layers:
            layer.score_center = False
        found = [module(x, return_routing=True)[1] for module in (dsts, dsts.freeze())]
    assert_close(found[1].scores, found[0].scores)
    assert_close(found[0].scores[0] - before[0], centers[0].expand(len(x), -1))
    layer, scores = dsts.train().layers[0], before[0]
    layer(x)
    assert torch.equal(layer.center, centers[0]) and layer.evaluation_scores(scores) is scores


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", ["mean", "balance"])
def test_activation_checkpointing(how, reentrant):
    """A pass that is run once more counts once; one that would subtract another centre than it did is an error."""
    dsts = FusedDSTS(6, num_neurons=3, num_layers=2, norm=None, score_center=how)
    twin = copy.deepcopy(dsts)
    for step in range(2):
        x, draws, gradients = torch.randn(4, 6, 2, 3, 3), sample_draws(4, 6, 3, 2), []
        for module in (dsts, twin):
            module.zero_grad()
            given = (x.clone().requires_grad_(), draws)
            y = module(*given) if module is dsts else checkpoint(module, *given, use_reentrant=reentrant)
            y.square().sum().backward()
            gradients.append([p.grad for p in module.parameters()])
        assert all(map(torch.equal, *gradients)) and all(map(torch.equal, dsts.buffers(), twin.buffers()))
        assert twin.layers[1].center_batches == step + 1
    twin = FusedDSTS(6, num_neurons=3, score_center=how, center_in_training=True)
    y = checkpoint(twin, x.requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="center_in_training: got a pass that runs once more"):
        y.sum().backward()


def test_casts_copies_and_starts():
    """The centre stays wide and unrounded; copies and pickles have it; ``reset_parameters`` sets it back."""
    dsts = FusedDSTS(6, num_neurons=3, num_layers=1, score_center=True)
    offset(dsts)
    layer, before = dsts.layers[0], dsts.layers[0].center.clone()
    for cast, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64), (torch.float32, torch.float32)):
        dsts.to(cast)
        assert layer.gate.dtype == cast and layer.center.dtype == wide
        assert torch.equal(layer.center.float(), before) and layer.center_batches.dtype == torch.int64
    for again in (copy.deepcopy(dsts), pickle.loads(pickle.dumps(dsts))):
        assert torch.equal(again.layers[0].center, before)
    layer.reset_parameters()
    assert layer.center.count_nonzero() == 0 and layer.center_batches == 0
    dsts.to("meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.center.count_nonzero() == 0


def test_pickles_of_before():
    """What an older version pickled has neither the buffers nor the options."""
    layer = DSTSLayer(4, num_neurons=2)
    state = layer.__getstate__() if hasattr(layer, "__getstate__") else dict(layer.__dict__)
    state = {
        name: value
        for name, value in state.items()
        if not name.startswith(("center", "score_center", "gumbel_scale", "gate_offset", "_noise"))
    }
    state["_buffers"] = {}
    old = DSTSLayer.__new__(DSTSLayer)
    old.__setstate__(state)
    x = torch.randn(2, 4, 2, 3, 3)
    assert torch.equal(old.eval()(x), layer.eval()(x))
    assert old.train()(x).shape == x.shape and old.state_dict().keys() == layer.state_dict().keys()


def frozen_pair(**options) -> tuple[FusedDSTS, FrozenDSTS, Tensor]:
    ref, dsts = pair(12, torch.float32, num_neurons=4, num_layers=2, score_center=True, **options)
    offset(ref, dsts)
    return dsts.eval(), dsts.freeze(), features_for(ref, torch.randn(6, 12, 2, 4, 3))


@pytest.mark.parametrize("options", [{}, dict(scoring_kernel=(1, 3, 3), score_reduction="mean")], ids=str)
def test_files_states_and_moves_of_frozen_modules(tmp_path, options):
    """The centre is in the file and the state; modules without one are refused, with and without as they were."""
    dsts, fast, x = frozen_pair(**options)
    with torch.no_grad():
        wanted = dsts(x)
    fast.save(tmp_path / "fast.pt")
    read = FrozenDSTS.load(tmp_path / "fast.pt")
    again = copy.deepcopy(fast)
    again.load_state_dict(fast.state_dict())
    for module in (fast, read, again, copy.deepcopy(fast).double().float()):
        assert_close(module(x), wanted)
        assert module.layers[0].taps == (9 if options else 1)
    plain = FusedDSTS(12, num_neurons=4, num_layers=2, **options).eval().freeze()
    with pytest.raises(RuntimeError, match=r"layers.0.centered: got True, wanted False"):
        plain.load_state_dict(fast.state_dict())
    with pytest.raises(RuntimeError, match=r"layers.0.centered: got False, wanted True"):
        fast.load_state_dict(plain.state_dict())


def test_descriptions_of_frozen_states():
    """Without a centre a state says what version 0.2 said; with one, older versions are told that it is newer."""
    import json

    _, fast, _ = frozen_pair()
    fields = json.loads(bytes(fast.state_dict()[EXTRA].tolist()))
    assert fields["format"] == 2 and all(layer["centered"] is True for layer in fields["layers"])
    plain = FusedDSTS(12, num_neurons=4).eval().freeze()
    fields = json.loads(bytes(plain.state_dict()[EXTRA].tolist()))
    assert fields["format"] == 1 and all("centered" not in layer for layer in fields["layers"])
    state = fast.state_dict()
    described(state, lambda fields: fields["layers"][0].update(centered=False))
    with pytest.raises(RuntimeError, match=r"layers.0.scoring: got .*, wanted a dense tensor of shape \(4, 12, 1\)"):
        fast.load_state_dict(state)
    described(state, lambda fields: fields["layers"][0].update(centered=1))
    with pytest.raises(RuntimeError, match="damaged"):
        fast.load_state_dict(state)


@pytest.mark.parametrize("options", [{}, dict(scoring_kernel=(1, 3, 3))], ids=str)
def test_in_standard_operators(options):
    """What is deployed subtracts it too, after casts as well."""
    dsts, fast, x = frozen_pair(**options)
    deployed = standard(fast)
    with torch.no_grad():
        wanted, routing = dsts(x, return_routing=True)
    ours, theirs = deployed(x, return_routing=True)
    assert_close(ours, wanted)
    assert torch.equal(theirs.neuron, routing.neuron)
    assert_close(theirs.scores, routing.scores)
    deployed.half()
    assert deployed.layers[0].center.dtype == torch.float32
    assert torch.equal(deployed.layers[0].center, -fast.layers[0].scoring[:, 0, -1])


@pytest.mark.parametrize("make", [lambda dsts: dsts, lambda dsts: dsts.freeze(), lambda dsts: standard(dsts.freeze())])
def test_exports(make):
    """Live, frozen and in standard operators: the exported program chooses as the module."""
    dsts, _, x = frozen_pair()
    module = make(dsts)
    program = torch.export.export(module, (x,)).module()
    with torch.no_grad():
        assert_close(program(x), dsts(x))


@pytest.mark.parametrize("how", ["mean", "balance"])
def test_compiles_in_one_graph(how):
    """Training moves the buffers as the module itself does; evaluation and the frozen module are one graph too."""
    options = dict(num_layers=2, num_neurons=3, score_reduction="mean", score_center=how, center_in_training=True)
    dsts = FusedDSTS(6, **options)
    twin = copy.deepcopy(dsts)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x, draws = torch.randn(3, 6, 2, 4, 5), sample_draws(3, 6, 3, 2)
        outputs = []
        for run, module in ((dsts, dsts), (compiled, twin)):
            module.zero_grad()
            y = run(x, draws)
            y.square().sum().backward()
            outputs.append([y, *(p.grad for p in module.parameters()), *module.buffers()])
        for mine, theirs in zip(*outputs, strict=True):
            assert_close(mine.double(), theirs.double(), dtype=torch.float32, factor=10)
    assert dsts.layers[0].center_batches == 3
    x = torch.randn(3, 6, 2, 4, 5)
    dsts.eval(), twin.eval()
    with torch.no_grad():
        assert_close(compiled(x), dsts(x), factor=10)
        assert_close(torch.compile(dsts.freeze(), fullgraph=True, backend="aot_eager")(x), dsts(x))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(score_center="max"), "score_center: got 'max', wanted False or True or 'mean' or 'balance'"),
        (dict(score_center=None), "score_center: got None"),
        (dict(center_in_training=True), "center_in_training: got True with score_center=False"),
        (dict(score_center=True, center_in_training="yes"), "center_in_training: got 'yes', wanted False or True"),
        (dict(score_center=True, center_momentum=0.0), "center_momentum: got 0.0, wanted a finite number above 0"),
        (dict(score_center=True, center_momentum=1.5), "center_momentum: got 1.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        FusedDSTS(4, **options)
