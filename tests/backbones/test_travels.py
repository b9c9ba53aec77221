"""A model with DSTS goes wherever a model goes: copies, files, casts, processes, compilers, exporters; and no copies
of features on the way in or out where channels lie last."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsts_kernels import FusedDSTS, freeze_dsts, insert_dsts, remove_dsts
from dsts_kernels.testing import assert_close

from ..learning.processes import Processes
from . import jobs
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
        copied._parameters[name] = None
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
    """One graph, training with gradients and frozen."""
    model, _, x = inserted(kind, noise_std=0.0, hard_fraction=1.0, norm=None)
    if frozen:
        freeze_dsts(model.eval())
        with torch.no_grad():
            assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x), factor=10)
        return
    compiled, results = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    for run in (model, compiled):
        model.zero_grad()
        torch.manual_seed(5)
        run(x).square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    routed = [name for name in results[0] if "scoring" not in name]  # Gumbel draws are compiled code's own
    assert any("dsts" in name and results[1][name].norm() > 0 for name in routed)
    model.eval()
    with torch.no_grad():
        assert_close(compiled(x), model(x), factor=10)


def test_compile_by_inductor():
    """The default compiler, where features pass through views."""
    model, _, x = inserted("BTHWC")
    model.eval()
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True)(x), model(x), factor=10)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_export(kind, frozen, strict):
    """``torch.export``, of batches of any size: the program gives what the model gives, and holds DSTS as one op each."""
    model, _, x = inserted(kind)
    model.eval()
    if frozen:
        freeze_dsts(model)
    clips = torch.export.Dim("clips", max=64)
    size = 4 * clips if kind == "TSN" else clips
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: size},), strict=strict)
        assert_close(program.module()(x), model(x), factor=10)
        more = torch.cat((x, torch.randn_like(x), x))
        assert_close(program.module()(more), model(more), factor=10)
    ops = {str(node.target) for node in program.graph.nodes}
    assert any(op.startswith("dsts_kernels.") for op in ops)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
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
@pytest.mark.parametrize("world", [1, 2])
def test_processes(world):
    """``DistributedDataParallel`` over gloo: every process ends with the same gradients, the mean of their own."""
    processes = Processes(world)
    try:
        first, *others = processes.run(jobs.data_parallel)
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        if world == 2 and hasattr(torch.cpu.current_stream(), "record_event"):
            processes.run(jobs.sharded)
    finally:
        processes.stop()


class Copies(TorchDispatchMode):
    """Counts copies of so many elements."""

    COPYING = ("clone", "contiguous", "copy_", "_to_copy", "cat", "index_put_", "slice_scatter")

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.counted = elements, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.COPYING and isinstance(out, torch.Tensor) and out.numel() == self.elements:
            self.counted.append(name)
        return out


def copies(model: nn.Module, where: str, x: torch.Tensor, *, backward: bool) -> list[str]:
    """Copies of features between what the submodule returns and what passes on, and on the way back."""
    submodule, features = model.get_submodule(where), []
    handle = submodule.register_forward_hook(lambda m, args, out: features.append(out))
    model(x)
    handle.remove()
    shape = features[0].shape
    leaf = torch.randn(shape).requires_grad_(backward)
    grad = torch.randn(shape)
    identity = nn.Identity()
    hook = next(iter(submodule._forward_hooks.values()))
    with Copies(leaf.numel()) as mode:
        y = hook(submodule, (), identity(leaf))
        if backward:
            y.backward(grad)
    return mode.counted


@pytest.mark.parametrize("step", ["training", "evaluation", "frozen"])
def test_channels_that_lie_last_are_not_copied(step):
    """Features of Swin, ``(B, T, H, W, C)``, and tokens go to the kernels and back as views; of ``(B, C, T, H, W)`` one
    copy is made, on the way back to it, which shows that copies are counted."""
    found = {}
    for kind, (make, where, known, shape) in KINDS.items():
        known = known | ({"class_tokens": 0} if kind == "BNC" else {})
        model = Plain() if kind == "BNC" else make()
        insert_dsts(model, where, example=shape, **known, **OPTIONS)
        if step != "training":
            model.eval()
        if step == "frozen":
            freeze_dsts(model)
        with torch.set_grad_enabled(step == "training"):
            found[kind] = copies(model, where, torch.randn(shape), backward=step == "training")
    assert found["BTHWC"] == [] and found["BNC"] == []
    if step != "frozen":
        assert len(found["BCTHW"]) >= 1


class Plain(Tokens):
    """Tokens without a class token."""

    def forward(self, x):
        return self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def test_features_reach_dsts_as_they_lie():
    """What DSTS is given is memory of the submodule's output, channels-last, and what passes on is memory of its own."""
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
