"""A model with DSTS goes wherever a model goes: copies, files, casts, processes, compilers, exporters; and no copies
of features on the way in or out where channels lie last."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from dsts_kernels import FusedDSTS, freeze_dsts, insert_dsts, remove_dsts
from dsts_kernels.testing import assert_close

from ..learning.processes import Processes
from . import jobs
from .counting import copies
from .models import CHANNELS, CLIP, GRID, KINDS, OPTIONS, Tokens, inserted


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def torch_saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": torch_saved,
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind, how, frozen):
    """A copy gives the same, runs DSTS of its own, and gives it back or freezes it."""
    model, _, x = inserted(kind)
    model.eval()
    if frozen:
        freeze_dsts(model)
    with torch.no_grad():
        expected = model(x)
        other = how(model)
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.fill_(float("nan"))
        assert torch.equal(other(x), expected)
        if not frozen:
            assert_close(freeze_dsts(copy.deepcopy(other))(x), expected, factor=10)
        assert not torch.equal(remove_dsts(other)(x), expected)


def test_a_copy_of_a_part():
    """A stage takes its DSTS along, parameters and all."""
    model, dsts, _ = inserted("BCTHW")
    stage, features = copy.deepcopy(model.stage1).eval(), torch.randn(2, CHANNELS, 4, 5, 5)
    assert len(list(stage[1].dsts.parameters())) == len(list(dsts.parameters()))
    assert_close(stage(features), model.eval().stage1(features))


def test_replicas():
    """``nn.DataParallel`` makes replicas by shallow copies of modules: each must run its own DSTS."""
    model, dsts, x = inserted("BCTHW")
    model.eval()
    replica = replicate(model)
    with torch.no_grad():
        replica.stage1[1].dsts.layers[0].spatial = torch.zeros_like(dsts.layers[0].spatial)
        assert not torch.equal(replica(x), model(x))


def replicate(module: nn.Module) -> nn.Module:
    """As ``torch.nn.parallel.replicate`` does, which needs GPUs."""
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copied._modules[name] = replicate(child)
    for name, p in module._parameters.items():
        setattr(copied, name, p.detach().clone())
    return copied


@pytest.mark.parametrize("kind", KINDS)
def test_states(kind):
    """A state goes into another model with DSTS, strictly; one from before goes in too, and DSTS is what is missing."""
    model, _, x = inserted(kind)
    other, _, _ = inserted(kind)
    other.load_state_dict(model.state_dict())
    assert_close(other.eval()(x), model.eval()(x))
    plain = KINDS[kind][0]()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == [] and all(".dsts." in key for key in missing)
    assert torch.equal(model.head.weight, plain.head.weight)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_casts(kind, dtype, frozen):
    """``model.half()`` and its like take DSTS along, live or frozen."""
    model, _, x = inserted(kind)
    model.eval()
    if frozen:
        freeze_dsts(model)
    with torch.no_grad():
        expected, y = model(x), model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    if dtype == torch.float64:
        assert_close(y.float(), expected, factor=10)


@pytest.mark.parametrize("frozen", [False, True])
def test_memory_format(frozen):
    """``model.to(memory_format=...)`` leaves DSTS right; features then lie channels-last."""
    model, _, x = inserted("BCTHW")
    model.eval()
    if frozen:
        freeze_dsts(model)
    with torch.no_grad():
        expected = model(x)
        model.to(memory_format=torch.channels_last_3d)
        assert_close(model(x.to(memory_format=torch.channels_last_3d)), expected, factor=10)


def test_sync_batchnorm():
    """Norms are made anew, the last child of a stage that holds DSTS among them; DSTS stays in the way."""
    model = nn.Sequential(nn.Sequential(nn.Conv3d(3, CHANNELS, 1), nn.BatchNorm3d(CHANNELS)))
    insert_dsts(model, "0", example=CLIP, **OPTIONS)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    dsts = model[0][1].dsts
    assert isinstance(dsts, FusedDSTS) and isinstance(dsts.layers[0].norm, nn.SyncBatchNorm)
    runs = []
    dsts.register_forward_hook(lambda m, args, out: runs.append(1))
    model.eval()(torch.randn(CLIP))
    assert runs == [1]


def test_functional_call():
    """Other parameters by name, those of DSTS too."""
    model, dsts, x = inserted("BTHWC")
    state = {name: p.detach().clone() for name, p in model.eval().named_parameters()}
    expected = model(x)
    with torch.no_grad():
        for p in dsts.parameters():
            p.zero_()
    assert_close(torch.func.functional_call(model, state, (x,)), expected)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind, frozen):
    """One graph, live and frozen."""
    model, _, x = inserted(kind)
    model.eval()
    if frozen:
        freeze_dsts(model)
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x), factor=10)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)], ids=["aot_eager", "inductor"]
)
def test_compile_trains(backend):
    """Every gradient of the compiled model, DSTS without draws that matter, is that of the model."""
    model, dsts, x = inserted("TSN", num_neurons=1, noise_std=0.0, hard_fraction=1.0)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        run(x).square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() and len(results[0]) == len(list(model.parameters()))
    for name, grad in results[0].items():
        assert_close(1 + results[1][name], 1 + grad, name=name, factor=10)  # some are zero but for rounding
    assert dsts.layers[0].spatial.grad.norm() > 0


@pytest.mark.parametrize(
    "kind, frozen, strict",
    [*((kind, False, False) for kind in KINDS), ("TSN", True, False), ("BTHWC", True, False), ("BTHWC", False, True)],
)
def test_export(kind, frozen, strict):
    """``torch.export``, of batches of any size: the program gives what the model gives, by ops of ours."""
    model, _, x = inserted(kind)
    model.eval()
    if frozen:
        freeze_dsts(model)
    clips = torch.export.Dim("clips", max=64)
    size = 4 * clips if kind == "TSN" else clips
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: size},), strict=strict)
        more = torch.cat((x, torch.randn_like(x), x))
        assert_close(program.module()(more), model(more), factor=10)
    assert any(str(node.target).startswith("dsts_kernels.") for node in program.graph.nodes)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("kind", ["BCTHW", "BNC"])
def test_trace(kind):
    """``torch.jit.trace`` sees the hook."""
    model, _, x = inserted(kind)
    model.eval()
    with torch.no_grad():
        assert_close(torch.jit.trace(model, x)(x), model(x), factor=10)


@pytest.mark.parametrize(
    "made, key", [(lambda x: (x, 1), 0), (lambda x: {"x": x, "more": 1}, "x")], ids=["tuple", "dict"]
)
def test_compile_with_several_outputs(made, key):
    """A tuple and a dict are made anew in the graph."""
    model = Tokens(made).eval()
    insert_dsts(model, "layer", output=key, grid=GRID, class_tokens=1, example=CLIP, **OPTIONS)
    x = torch.randn(CLIP)
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x), factor=10)
        assert_close(torch.export.export(model, (x,)).module()(x), model(x), factor=10)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no process groups")
def test_processes():
    """``DistributedDataParallel`` over gloo: both processes end with the same gradients, the mean of their own."""
    processes = Processes(2)
    try:
        first, second = processes.run(jobs.data_parallel)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        if hasattr(torch.cpu.current_stream(), "record_event"):  # fully_shard of torch 2.6 has no CPU
            processes.run(jobs.sharded)
    finally:
        processes.stop()


@pytest.mark.parametrize("step", ["training", "evaluation", "frozen"])
def test_channels_that_lie_last_are_not_copied(step):
    """Features of Swin, ``(B, T, H, W, C)``, tokens, and frames whose channels lie last go to kernels and back as
    views. Of ``(B, C, T, H, W)`` one is made, from layers that work channels-last, which shows that copies count."""
    found = {}
    for kind, (make, where, known, shape) in KINDS.items():
        known = known | ({"class_tokens": 0} if kind == "BNC" else {})
        model = PlainTokens() if kind == "BNC" else make()
        insert_dsts(model, where, example=shape, **known, **OPTIONS)
        features = []
        model.get_submodule(where).register_forward_hook(lambda m, args, out: features.append(out))
        if step != "training":
            model.eval()
        if step == "frozen":
            freeze_dsts(model)
        if kind == "TSN":
            model.to(memory_format=torch.channels_last)
        with torch.no_grad():
            model(torch.randn(shape))
        found[kind] = copies(model.get_submodule(where), features[0], backward=step == "training")
    assert found["BTHWC"] == found["BNC"] == found["TSN"] == []
    assert (step == "frozen") == (found["BCTHW"] == [])


class PlainTokens(Tokens):
    """Tokens without a class token."""

    def forward(self, x):
        return self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def test_features_reach_dsts_as_they_lie():
    """DSTS is given the memory of the submodule's output, channels-last, and its own memory passes on."""
    model, dsts, x = inserted("BTHWC")
    given = {}
    dsts.register_forward_hook(lambda m, args, out: given.update(x=args[0], y=out))
    model.norm.register_forward_hook(lambda m, args, out: given.update(out=out))
    hooks = model.norm._forward_hooks
    first = model.norm.register_forward_hook(lambda m, args, out: given.update(norm=out))
    hooks.move_to_end(first.id, last=False)
    model.eval()(x)
    assert given["x"].data_ptr() == given["norm"].data_ptr() and given["y"].data_ptr() == given["out"].data_ptr()
    assert given["x"].is_contiguous(memory_format=torch.channels_last_3d) and given["out"].is_contiguous()
