"""What processes run in ``test_sharded``: each brings its part of a batch, the whole of which one module gets too."""

from __future__ import annotations

import math
import re

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dsts_kernels import Draws, FusedDSTS, reference
from dsts_kernels.learning import (
    RoutingMonitor,
    UpstreamDownstream,
    downstream_parameters,
    generator_states,
    restore_generators,
    save_checkpoint,
    upstream_parameters,
)

CLASSES, CHANNELS, NEURONS, LAYERS = 4, 6, 3, 2


class Net(nn.Module):
    """A small backbone, a DSTS module of either kind with its draws given, a classifier."""

    def __init__(self, kind: type[nn.Module] = FusedDSTS, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, CHANNELS, (1, 3, 3), padding=(0, 1, 1)), nn.Tanh()).to(dtype)
        options = {"num_layers": LAYERS, "num_neurons": NEURONS, "score_reduction": "mean", "norm": None}
        self.dsts = kind(CHANNELS, dtype=dtype, **options)
        self.head = nn.Linear(CHANNELS, CLASSES, dtype=dtype)

    def forward(self, x: Tensor, *draws: Tensor) -> Tensor:
        given = Draws(*(field.transpose(0, 1) for field in draws)) if draws else None
        return self.head(self.dsts(self.stem(x), given).mean((2, 3, 4)))


def net(kind: type[nn.Module] = FusedDSTS, dtype: torch.dtype = torch.float64) -> Net:
    """The same in every process, whatever the kind."""
    torch.manual_seed(3)
    return Net(kind, dtype)


def batch(size: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple:
    """``((clips, noise, hard, gumbel), targets)``; no rounding can change which neuron a sample chooses."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, LAYERS, CHANNELS, dtype=dtype, generator=random)
    hard = torch.rand(size, LAYERS, generator=random) < 0.5
    gumbel = torch.rand(size, LAYERS, NEURONS, generator=random).argsort(-1).to(dtype) * 2
    clips = torch.randn(size, 3, 2, 4, 4, dtype=dtype, generator=random)
    return (clips, noise, hard, gumbel), torch.arange(size) % CLASSES


def part(pair: tuple) -> tuple:
    """This process's share of a batch."""
    inputs, targets = pair
    rank, world = dist.get_rank(), dist.get_world_size()
    own = slice(rank * len(targets) // world, (rank + 1) * len(targets) // world)
    return tuple(field[own] for field in inputs), targets[own]


def shard(module: Net, groups: str, mixed: bool = False, **options: object) -> Net:
    """``module`` after ``fully_shard``: each layer a group, one of the rest, or some of these."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if "replicate" in groups:
        mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard"))
    if mixed:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if "layers" in groups:
        for layer in module.dsts.layers:
            fully_shard(layer, mesh=mesh, **options)
    if "dsts" in groups:
        fully_shard(module.dsts, mesh=mesh, **options)
    if "root" in groups:
        fully_shard(module, mesh=mesh, **options)
    return module


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p).clone() for name, p in module.named_parameters()}


def compare(found: nn.Module, expected: nn.Module, start: dict[str, Tensor], tolerance: float) -> None:
    """The way that each parameter has gone; and that all have moved."""
    mine, theirs = weights(found), weights(expected)
    assert mine.keys() == theirs.keys()
    for name in mine:
        way = theirs[name] - start[name]
        assert way.norm() > 0, name
        error = ((mine[name] - theirs[name]).norm() / way.norm()).item()
        assert error < tolerance, f"{name}: {error}"


def descend(module: nn.Module, steps: int, mine: bool, freeze: bool, dtype: torch.dtype) -> None:
    """Plain steps of SGD; with ``freeze`` neither side, then one, then the other is frozen.

    Not one from the start: FSDP2 asks each group once, at its first pass, which dtype its gradients have.
    """
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    sides = upstream_parameters(module), downstream_parameters(module)
    for step in range(steps):
        if freeze:
            for index, side in enumerate(sides):
                for p in side:
                    p.requires_grad_(step % 3 != index + 1)
        inputs, targets = part(batch(8, step, dtype)) if mine else batch(8, step, dtype)
        F.cross_entropy(module(*inputs).float() if dtype != torch.float64 else module(*inputs), targets).backward()
        if not mine:
            pass
        elif not any(isinstance(p, DTensor) for p in module.parameters()):
            raise AssertionError("nothing is sharded")
        else:
            for p in module.parameters():
                if p.grad is not None and not isinstance(p, DTensor):  # outside of every group: the caller's to average
                    dist.all_reduce(p.grad)
                    p.grad /= dist.get_world_size()
        if freeze:
            assert all((p.grad is not None) == p.requires_grad for p in module.parameters())
        optimizer.step()
        optimizer.zero_grad()


def as_the_literal(groups: str, mixed: bool, freeze: bool, reshard: bool) -> None:
    """Parameters after some steps: fused against literal under one wrapping, and against one process."""
    dtype = torch.float32 if mixed else torch.float64
    start = weights(net(dtype=dtype))
    found = []
    for kind in (FusedDSTS, reference.DSTS):
        module = shard(net(kind, dtype), groups, mixed, reshard_after_forward=reshard)
        descend(module, 4, True, freeze, dtype)
        found.append(module)
    alone = net(reference.DSTS, dtype)
    descend(alone, 4, False, freeze, dtype)
    for module in found:  # bfloat16 may round a gate to the other side of its threshold
        compare(module, alone, start, 0.15 if mixed else 1e-9)


def optimizers(module: nn.Module, name: str) -> dict[str, torch.optim.Optimizer]:
    make = {
        "sgd": lambda side: torch.optim.SGD(side, 0.1),
        "momentum": lambda side: torch.optim.SGD(side, 0.1, momentum=0.9, weight_decay=0.01),
        "adamw": lambda side: torch.optim.AdamW(side, 0.01, weight_decay=0.1, amsgrad=True),
    }[name]
    upstream, downstream = upstream_parameters(module), downstream_parameters(module)
    return {"upstream_optimizer": make(upstream), "downstream_optimizer": make(downstream)}


def learner(module: nn.Module, optimizer: str = "sgd", **options: object) -> UpstreamDownstream:
    made = UpstreamDownstream(module, cross_entropy, **optimizers(module, optimizer), **options)
    made.exact_second_order = False  # across processes it is a central difference
    return made


def cross_entropy(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output if output.dtype == torch.float64 else output.float(), targets)


def given(step: int, mine: bool, accumulate: int = 1, dtype: torch.dtype = torch.float64) -> tuple:
    """Training and validation batch of a step; in micro-batches each process has its part of each."""
    found = []
    for size, seed in ((8, 2 * step), (4, 2 * step + 1)):
        pairs = [batch(size, 100 * seed + i, dtype) for i in range(accumulate)]
        pairs = [part(pair) if mine else pair for pair in pairs]
        found.append(pairs if accumulate > 1 else pairs[0])
    return tuple(found)


def algorithm_1(groups: str, optimizer: str, mixed: bool, reshard: bool, options: dict) -> None:
    """Steps, losses and norms of a sharded learner, and those of one process with all of each batch."""
    dtype = torch.float32 if mixed else torch.float64
    start, accumulate = weights(net(dtype=dtype)), options.get("accumulate", 1)
    module = shard(net(dtype=dtype), groups, mixed, reshard_after_forward=reshard)
    alone = net(dtype=dtype)
    mine, theirs = learner(module, optimizer, **options), learner(alone, optimizer, **options)
    tolerance = 0.3 if mixed else 1e-7 if options.get("second_order") else 1e-9
    for step in range(3):
        if step == 1:  # as an evaluation between epochs, which leaves the root's parameters gathered
            with torch.no_grad():
                module(*part(batch(8, 77, dtype))[0])
        found = mine.step(*given(step, True, accumulate, dtype))
        expected = theirs.step(*given(step, False, accumulate, dtype))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=1e-9)
        assert all(p.requires_grad and p.grad is None for p in module.parameters())
    compare(module, alone, start, tolerance)


def scaled() -> None:
    """Under a gradient scaler: nothing changes where all is finite, and only the scale where something is not."""
    module, alone = shard(net(dtype=torch.float32), "layers root"), net(dtype=torch.float32)
    start = weights(alone)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    mine, theirs = learner(module, scaler=scaler, clip_norm=0.1), learner(alone, clip_norm=0.1)
    found = mine.step(*given(0, True, dtype=torch.float32))
    expected = theirs.step(*given(0, False, dtype=torch.float32))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    compare(module, alone, start, 1e-4)
    before = weights(module)
    if dist.get_rank() == 0:  # what overflows here must be known there
        mine.loss_fn = lambda output, targets: 1e37 * cross_entropy(output, targets)
    found = mine.step(*given(1, True, dtype=torch.float32))
    assert math.isinf(found.upstream_grad_norm) and scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(module).values(), strict=True))


def balanced() -> None:
    """With the balance term, which is of each process's samples, and BatchNorm, whose statistics are too."""
    module = net(dtype=torch.float32)
    module.dsts = FusedDSTS(CHANNELS, num_layers=LAYERS, num_neurons=NEURONS, score_reduction="mean")
    shard(module, "layers root")
    mine = learner(module, "adamw", balance=0.5)
    before = weights(module)
    for step in range(2):
        found = mine.step(*given(step, True, dtype=torch.float32))
        assert all(map(math.isfinite, found))
    assert not mine._balance._routed
    after = weights(module)
    assert all(after[name].isfinite().all() and not torch.equal(after[name], before[name]) for name in before)


def not_finite(where: str) -> None:
    """In one process only: every process refuses, nothing has changed, the next step is as if nothing had been."""
    module, alone = shard(net(), "layers root"), net()
    mine, theirs = learner(module, "adamw"), learner(alone, "adamw")
    mine.step(*given(0, True)), theirs.step(*given(0, False))
    before = weights(module)
    train, val = given(5, True)
    if dist.get_rank() == 1:
        {"train_batch": train, "val_batch": val}[where][0][0][0] = torch.inf
    for _ in range(2):
        try:
            mine.step(train, val)
        except FloatingPointError as error:
            assert where in str(error)
        else:
            raise AssertionError("no error")
        assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(module).values(), strict=True))
    start = before
    mine.step(*given(1, True)), theirs.step(*given(1, False))
    compare(module, alone, start, 1e-7)


def an_error_in(where: str) -> None:
    """An error in every process, in line 6: all is as before, and the next step is as if nothing had been."""
    module, alone = shard(net(), "layers root"), net()
    mine, theirs = learner(module, "adamw"), learner(alone, "adamw")
    before, calls = weights(module), []

    def fail(*arguments: object) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise ZeroDivisionError

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        if where == "loss":
            fail()
        elif where == "backward":
            output.register_hook(fail)
        return cross_entropy(output, targets)

    mine.loss_fn = loss
    handle = module.dsts.layers[1].register_forward_pre_hook(fail) if where == "forward" else None
    try:
        mine.step(*given(0, True))
    except ZeroDivisionError:
        pass
    assert len(calls) == 2
    if handle is not None:
        handle.remove()
    mine.loss_fn = cross_entropy
    if where != "loss" and not hasattr(FSDPModule, "reset_iter_state"):  # older versions of torch have no way back
        try:
            mine.step(*given(1, True))
        except RuntimeError:
            return
        raise AssertionError("no error")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(module).values(), strict=True))
    mine.step(*given(1, True)), theirs.step(*given(1, False))
    compare(module, alone, before, 1e-7)


def refused() -> None:
    """One clear error before anything changes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    module = net()
    module.head._fsdp_wrapped_module = nn.Identity()  # what marks FullyShardedDataParallel, which needs a GPU
    expect("got FullyShardedDataParallel, wanted .*fully_shard", module)
    module = net()
    module.head.weight = nn.Parameter(distribute_tensor(module.head.weight.detach(), mesh, [Shard(0)]))
    expect("got head.weight on .* wanted every sharded parameter of fully_shard", module)
    module = shard(net(), "layers root")
    other = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("a", "b"))
    module.head = nn.Linear(CHANNELS, CLASSES, dtype=torch.float64)
    fully_shard(module.head, mesh=other)
    expect("got head.weight on .* over one mesh", module)
    expect("got DistributedDataParallel inside Sequential", nn.Sequential(DistributedDataParallel(net())))
    expect("scaler: got one with .* others in none", shard(net(), "dsts"), scaler=torch.amp.GradScaler("cpu"))


def expect(message: str, module: nn.Module, **options: object) -> None:
    try:
        learner(module, **options)
    except ValueError as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError("no error")


def sides_within(wrap: str) -> None:
    """The same names upstream, whatever is around the model."""
    plain = net()
    names = {name for name, p in plain.named_parameters() if any(p is q for q in plain.dsts.upstream_parameters())}
    module = DistributedDataParallel(plain) if wrap == "ddp" else shard(plain, "layers root")
    upstream, downstream = upstream_parameters(module), downstream_parameters(module)
    found = {name.removeprefix("module.") for name, p in module.named_parameters() if any(p is q for q in upstream)}
    assert found == names and len(names) == 2 * LAYERS
    assert {*map(id, upstream), *map(id, downstream)} == set(map(id, module.parameters()))
    assert list(map(id, plain.dsts.upstream_parameters())) == list(map(id, upstream))
    groups = learner(module).state_dict()["upstream_optimizer"]["param_groups"]
    assert set(groups[0]["params"]) == names


def monitored() -> None:
    """Counts are of this process's samples; gates are gathered for their statistics."""
    module, alone = shard(net(), "layers root"), net()
    monitor, expected = RoutingMonitor(module), RoutingMonitor(alone)
    inputs, _ = batch(8, 0)
    alone(*inputs)
    module(*part(batch(8, 0))[0])
    found, wanted = monitor.statistics(), expected.statistics()
    counts = found.usage * found.samples[:, None]
    dist.all_reduce(counts)
    assert torch.equal(counts / 8, wanted.usage)
    assert torch.equal(found.saturated, wanted.saturated) and torch.equal(found.spatial, wanted.spatial)
    assert torch.equal(found.flipped, wanted.flipped) and not found.flipped.any()
    with torch.no_grad():
        for one in (module, alone):
            for name, p in one.named_parameters():
                if name.endswith("gate"):
                    p.neg_()
    assert monitor.statistics().flipped.eq(1).all() and expected.statistics().flipped.eq(1).all()


def made(groups: str, optimizer: str, spare: bool = True) -> UpstreamDownstream:
    """A learner whose model is sharded in these groups, or not at all, with a layer that is never used."""
    module = net()
    if spare:
        module.spare = nn.Linear(2, 2, dtype=torch.float64)
    return learner(shard(module, groups) if groups else module, optimizer)


def states(steps: UpstreamDownstream, how: str) -> dict:
    """What is written and read: of the learner as it is, or through torch's helpers for both optimizers at once.

    Torch's know no parameter that was not stepped yet, and no two optimizers without any state.
    """
    if how == "learner":
        return {"model": get_model_state_dict(steps.module), "learner": steps}
    both = [steps.upstream_optimizer, steps.downstream_optimizer]
    model, optimizer = get_state_dict(steps.module, both)
    return {"model": model, "optimizer": optimizer}


def save(directory: str, groups: str, optimizer: str, how: str, count: int) -> None:
    steps = made(groups, optimizer, how == "learner")
    for step in range(count):
        steps.step(*given(step, True))
    dcp.save(states(steps, how), checkpoint_id=directory)


def resume(directory: str, groups: str, optimizer: str, how: str, count: int) -> None:
    """Read by a new learner, and two steps more: the parameters of one process that was never interrupted."""
    steps, alone = made(groups, optimizer, how == "learner"), made("", optimizer, how == "learner")
    start = weights(alone.module)
    with torch.no_grad():
        for p in steps.module.parameters():
            p.zero_()
    state = states(steps, how)
    dcp.load(state, checkpoint_id=directory)
    set_model_state_dict(steps.module, state["model"])
    if how != "learner":
        both = [steps.upstream_optimizer, steps.downstream_optimizer]
        set_state_dict(steps.module, both, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for step in range(count + 2):
        alone.step(*given(step, False))
    for step in range(count, count + 2):
        steps.step(*given(step, True))
    spare = [name for name in start if name.startswith("spare")]
    found = weights(steps.module)
    assert all(torch.equal(found[name], start[name]) for name in spare)
    for name in spare:
        del start[name]
    for name, old in start.items():
        error = (found[name] - weights(alone.module)[name]).norm() / (found[name] - old).norm()
        assert error < 1e-7, f"{name}: {error}"


def resume_with_own_draws(directory: str) -> None:
    """Gate and Gumbel noise of each process's generator: kept beside the learner, the run goes on bit for bit."""
    key = f"generators {dist.get_rank()}"
    first, second = made("layers root", "adamw"), made("layers root", "adamw")
    torch.manual_seed(dist.get_rank())
    for step in range(2):
        first.step(*((inputs[:1], targets) for inputs, targets in given(step, True)))
    dcp.save({**states(first, "learner"), key: generator_states()}, checkpoint_id=directory)
    state = {**states(second, "learner"), key: generator_states()}
    later = given(2, True)
    first.step(*((inputs[:1], targets) for inputs, targets in later))
    torch.manual_seed(99)
    dcp.load(state, checkpoint_id=directory)
    set_model_state_dict(second.module, state["model"])
    restore_generators(state[key])
    second.step(*((inputs[:1], targets) for inputs, targets in later))
    for name, expected in weights(first.module).items():
        assert torch.equal(expected, weights(second.module)[name]), name


def whole_states_are_refused() -> None:
    """The state of one process's optimizer, read past ``torch.distributed.checkpoint``."""
    alone, steps = made("", "adamw"), made("layers root", "adamw")
    alone.step(*given(0, False))
    try:
        steps.load_state_dict(alone.state_dict())
    except ValueError as error:
        assert re.search("upstream_optimizer: got all of it of .*exp_avg, wanted a shard", str(error)), error
    else:
        raise AssertionError("no error")
    assert not steps.upstream_optimizer.state
    try:
        save_checkpoint(f"never {dist.get_rank()}.pt", {"model": [steps.module.state_dict()]})
    except ValueError as error:
        assert re.search(r"state\['model'\]\[0\]\['.*'\]: got a shard of a tensor, wanted all of it", str(error)), error
    else:
        raise AssertionError("no error")
