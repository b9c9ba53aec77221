"""Algorithm 1: against itself written by hand, what stays of the virtual step, what is computed, what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsts_kernels.backends.cpu import CpuBackend
from dsts_kernels.learning import UpstreamDownstream, downstream_parameters, upstream_parameters

from .support import RATE, Net, batch, everything, learner, same, sgd


def gradients(net: nn.Module, pair: tuple, side: list) -> tuple:
    """Of one side, the other frozen: it rounds differently otherwise."""
    for p in net.parameters():
        p.requires_grad_(any(p is own for own in side))
    found = torch.autograd.grad(F.cross_entropy(net(*pair[0]), pair[1]), side)
    net.requires_grad_(True)
    return found


def by_hand(net: nn.Module, train: tuple, val: tuple) -> None:
    """Lines 4, 6 and 8 with plain gradient descent, buffers as line 8 leaves them."""
    u, d = upstream_parameters(net), downstream_parameters(net)
    buffers = [b.clone() for b in net.buffers()]

    def descend(parameters: list, found: tuple) -> None:
        with torch.no_grad():
            for p, g in zip(parameters, found, strict=True):
                p.sub_(g, alpha=RATE)

    def forget() -> None:
        for b, old in zip(net.buffers(), buffers, strict=True):
            b.copy_(old)

    start = [p.detach().clone() for p in d]
    descend(d, gradients(net, train, d))
    forget()
    upstream = gradients(net, val, u)
    forget()
    with torch.no_grad():
        for p, old in zip(d, start, strict=True):
            p.copy_(old)
    descend(u, upstream)
    descend(d, gradients(net, train, d))


@pytest.mark.parametrize("options", [{}, {"norm": None, "skip": False}, {"routing_gradient": "all"}], ids=str)
def test_step_is_algorithm_1(options):
    """Three steps equal the algorithm by hand, bit for bit in float64: order of updates, start of line 8 and all."""
    net = Net(**options)
    hand = copy.deepcopy(net)
    steps = learner(net)
    for _ in range(3):
        train, val = batch(5), batch(4)
        steps.step(train, val)
        by_hand(hand, train, val)
    for (name, mine), theirs in zip(net.state_dict().items(), hand.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_result():
    """Losses are those of lines 4 and 6, norms those of the gradients that lines 6 and 8 apply."""
    net = Net(norm=None)
    train, val = batch(5), batch(4)
    before = copy.deepcopy(net)
    result = learner(net).step(train, val)
    assert result.train_loss == F.cross_entropy(before(*train[0]), train[1]).item()
    moved = [b - p for p, b in zip(upstream_parameters(net), upstream_parameters(before), strict=True)]
    assert math.isclose(
        result.upstream_grad_norm, torch.cat([m.flatten() for m in moved]).norm().item() / RATE, rel_tol=1e-9
    )
    moved = [b - p for p, b in zip(downstream_parameters(net), downstream_parameters(before), strict=True)]
    assert math.isclose(
        result.downstream_grad_norm, torch.cat([m.flatten() for m in moved]).norm().item() / RATE, rel_tol=1e-9
    )


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_leaks_from_the_virtual_step(name):
    """Optimizer state, statistics and generators are those of a run that never took the virtual step.

    The upstream gradient of such a run comes from a copy of everything that does take it.
    """
    make = OPTIMIZERS[name]
    net, plain = (copy.deepcopy(Net()) for _ in range(2))
    plain.load_state_dict(net.state_dict())
    mine = {side: make(of(net)) for side, of in (("up", upstream_parameters), ("down", downstream_parameters))}
    theirs = {side: make(of(plain)) for side, of in (("up", upstream_parameters), ("down", downstream_parameters))}
    steps = UpstreamDownstream(net, F.cross_entropy, upstream_optimizer=mine["up"], downstream_optimizer=mine["down"])

    def apply(optimizer: torch.optim.Optimizer, side: list, found: tuple) -> None:
        for p, g in zip(side, found, strict=True):
            p.grad = g
        optimizer.step()
        optimizer.zero_grad()

    def descend(module: nn.Module, pair: tuple, optimizer: torch.optim.Optimizer, side: list) -> None:
        apply(optimizer, side, gradients(module, pair, side))

    for _ in range(3):
        train, val = (batch(5)[0][:1], batch(5)[1]), (batch(4)[0][:1], batch(4)[1])  # noise from torch's generator
        start = torch.get_rng_state()
        steps.step(train, val)
        after = torch.get_rng_state()

        torch.set_rng_state(start)
        ghost, ghost_optimizer = copy.deepcopy((plain, theirs["down"]))
        descend(ghost, train, ghost_optimizer, downstream_parameters(ghost))
        torch.set_rng_state(start)
        found = gradients(ghost, val, upstream_parameters(ghost))
        apply(theirs["up"], upstream_parameters(plain), found)
        descend(plain, train, theirs["down"], downstream_parameters(plain))
        assert torch.equal(after, torch.get_rng_state())
    assert same(everything(net, *mine.values()), everything(plain, *theirs.values()))


def test_gradients_of_the_frozen_side_are_never_computed(monkeypatch):
    """Operators' weight gradients: lines 4 and 8 only. Gates' and scores': line 6 only. Flags come back."""
    net = Net(norm=None)
    calls = []
    run = CpuBackend.gated_conv3d_backward
    hash_back = CpuBackend.semhash_gate_backward

    def spy(self, grad, x, gate, neuron, spatial, temporal, needs, kept=()):
        calls.append(("conv", tuple(needs)))
        return run(self, grad, x, gate, neuron, spatial, temporal, needs, kept)

    def spy_hash(self, *args):
        calls.append(("semhash", ()))
        return hash_back(self, *args)

    monkeypatch.setattr(CpuBackend, "gated_conv3d_backward", spy)
    monkeypatch.setattr(CpuBackend, "semhash_gate_backward", spy_hash)
    net.stem.bias.requires_grad_(False)
    up, down = upstream_parameters(net), [p for p in downstream_parameters(net) if p.requires_grad]
    optimizers = torch.optim.SGD(up, 0.1), torch.optim.SGD(down, 0.1)
    steps = UpstreamDownstream(
        net, F.cross_entropy, upstream_optimizer=optimizers[0], downstream_optimizer=optimizers[1]
    )
    steps.step(batch(5), batch(4))
    downstream = [("conv", (True, False, True, True))] * 2
    # The first layer's input needs no gradient in line 6: all before it is frozen.
    upstream = [
        ("conv", (True, True, False, False)),
        ("semhash", ()),
        ("conv", (False, True, False, False)),
        ("semhash", ()),
    ]
    assert calls == [*downstream, *upstream, *downstream]
    assert [p.requires_grad for p in net.parameters()] == [p is not net.stem.bias for p in net.parameters()]


@pytest.mark.parametrize("where", ["train_batch", "val_batch", "line 8"])
def test_a_loss_that_is_not_finite_changes_nothing(where):
    """Weights, buffers, both optimizers' states and the generator are bit for bit those before the step."""
    net = Net()
    optimizers = [OPTIMIZERS["adamw"](of(net)) for of in (upstream_parameters, downstream_parameters)]
    seen = []

    def loss(output, target):
        seen.append(None)
        return F.cross_entropy(output, target) * (math.nan if where == "line 8" and len(seen) == 6 else 1.0)

    steps = UpstreamDownstream(net, loss, upstream_optimizer=optimizers[0], downstream_optimizer=optimizers[1])
    train, val = batch(4), batch(4)
    steps.step(train, val)
    if where != "line 8":
        {"train_batch": train, "val_batch": val}[where][0][0][1] = math.inf
    before = everything(net, *optimizers)
    with pytest.raises(FloatingPointError, match="val_batch" if where == "val_batch" else "train_batch"):
        steps.step(train, val)
    assert same(before, everything(net, *optimizers))
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_accumulation_is_one_large_batch():
    """Micro-batches of one size give the step of their concatenation."""
    net = Net(norm=None)
    whole = copy.deepcopy(net)
    parts = {side: [batch(3), batch(3)] for side in ("train", "val")}

    def joined(pairs: list) -> tuple:
        return tuple(map(torch.cat, zip(*(p[0] for p in pairs), strict=True))), torch.cat([p[1] for p in pairs])

    mine = learner(net, accumulate=2).step(parts["train"], parts["val"])
    theirs = learner(whole).step(joined(parts["train"]), joined(parts["val"]))
    for a, b in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(mine, theirs, strict=True))


def test_clipping():
    """Each side moves by at most rate times the limit; the norms reported are those before."""
    net = Net(norm=None)
    before = copy.deepcopy(net)
    result = learner(net, clip_norm=1e-3).step(batch(5), batch(4))
    for of, norm in (
        (upstream_parameters, result.upstream_grad_norm),
        (downstream_parameters, result.downstream_grad_norm),
    ):
        moved = torch.cat([(a - b).flatten() for a, b in zip(of(net), of(before), strict=True)]).norm().item()
        assert norm > 1e-3 and math.isclose(moved, RATE * 1e-3, rel_tol=1e-2)


def test_gradient_scaling():
    """A scaler changes nothing but its own scale where nothing overflows; where it does, only the scale changes."""
    net = Net(dtype=torch.float32)
    plain = copy.deepcopy(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    steps = learner(net, scaler=scaler)
    train, val = (batch(5, dtype=torch.float32) for _ in range(2))
    mine, theirs = steps.step(train, val), learner(plain).step(train, val)
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(mine, theirs, strict=True))
    assert scaler.get_scale() == 2.0**10
    steps.step(train, val)  # four updates by now: lines 6 and 8 of two steps; virtual steps count for nothing
    assert scaler.get_scale() == 2.0**11

    before = everything(net)
    scaler.load_state_dict(scaler.state_dict() | {"scale": 1e38})
    steps.loss_fn = lambda output, target: 1e3 * F.cross_entropy(output, target)
    result = steps.step(train, val)
    assert math.isinf(result.upstream_grad_norm) and math.isfinite(result.train_loss)
    assert math.isclose(scaler.get_scale(), 0.5e38, rel_tol=1e-6)
    assert same(before, everything(net))


def test_a_scaler_goes_on_after_an_error(monkeypatch):
    """An exception between unscaling and the step: scale and weights are back, and the next step runs."""
    net = Net(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    steps = learner(net, scaler=scaler)
    train, val = (batch(5, dtype=torch.float32) for _ in range(2))
    before = everything(net)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(steps.downstream_optimizer, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        steps.step(train, val)
    monkeypatch.undo()
    assert same(before, everything(net)) and scaler.get_scale() == 2.0**10
    assert all(map(math.isfinite, steps.step(train, val)))


def test_tensors_of_an_optimizer_stay_the_same_objects():
    """A learning rate that its owner changes, and states that a captured graph knows."""
    net = Net()
    rate = torch.tensor(0.1, dtype=torch.float64)
    up, down = upstream_parameters(net), downstream_parameters(net)
    optimizer = torch.optim.Adam(down, lr=rate, foreach=False, capturable=False)
    steps = UpstreamDownstream(
        net, F.cross_entropy, upstream_optimizer=torch.optim.SGD(up, 0.1), downstream_optimizer=optimizer
    )
    steps.step(batch(4), batch(4))
    average = optimizer.state[down[0]]["exp_avg"]
    steps.step(batch(4), batch(4))
    assert optimizer.param_groups[0]["lr"] is rate and rate == 0.1
    assert optimizer.state[down[0]]["exp_avg"] is average


def test_the_callers_autocast_holds():
    net = Net(dtype=torch.float32)
    seen = []

    def loss(output, target):
        seen.append(output.dtype)
        return F.cross_entropy(output.float(), target)

    steps = UpstreamDownstream(net, loss, **sgd(net))
    with torch.autocast("cpu", torch.bfloat16):
        steps.step(*(batch(4, dtype=torch.float32) for _ in range(2)))
    assert seen == [torch.bfloat16] * 3


def test_autocast_and_balance():
    """Passes run under autocast; the balance term moves scores only."""
    net = Net(dtype=torch.float32, norm=None)
    with_term = copy.deepcopy(net)
    train, val = (batch(5, dtype=torch.float32) for _ in range(2))
    result = learner(net, autocast=torch.bfloat16).step(train, val)
    assert all(map(math.isfinite, result))
    more = learner(with_term, autocast=torch.bfloat16, balance=0.5).step(train, val)
    assert more.train_loss == result.train_loss and more.val_loss > result.val_loss
    changed = {
        n for (n, a), b in zip(net.named_parameters(), with_term.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert any("scoring" in name for name in changed)


def test_several_modules_and_inputs():
    """All DSTS modules of a model are upstream; inputs may be a tensor, a tuple or named."""
    net = nn.ModuleDict({"a": Net(), "b": Net()})
    assert len(upstream_parameters(net)) == 8
    assert {id(p) for p in upstream_parameters(net)}.isdisjoint({id(p) for p in downstream_parameters(net)})
    single = Net()
    x, y = batch(4)[0][0], batch(4)[1]
    steps = learner(single)
    for inputs in (x, (x,), {"x": x}):
        steps.step((inputs, y), [inputs, y])


def test_bad_input():
    """Each mistake is named before anything moves."""
    net = Net()
    u, d = upstream_parameters(net), downstream_parameters(net)

    def build(up: list, down: list, module: nn.Module = net, **options: object) -> UpstreamDownstream:
        return UpstreamDownstream(
            module,
            F.cross_entropy,
            upstream_optimizer=torch.optim.SGD(up, 0.1),
            downstream_optimizer=torch.optim.SGD(down, 0.1),
            **options,
        )

    with pytest.raises(ValueError, match="module: got Linear without a FusedDSTS"):
        build(u, d, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"upstream_optimizer: owns .*head"):
        build([*u, net.head.weight], d)
    with pytest.raises(ValueError, match=r"upstream_optimizer: lacks dsts.layers.0.scoring"):
        build(u[1:], d)
    with pytest.raises(ValueError, match=r"downstream_optimizer: owns dsts.layers.0.gate"):
        build(u, [*d, u[1]])
    with pytest.raises(ValueError, match=r"downstream_optimizer: lacks stem.bias, stem.weight; wanted"):
        build(u, d[2:])
    with pytest.raises(ValueError, match="another module"):
        build([*u, nn.Parameter(torch.zeros(1))], d)
    with pytest.raises(TypeError, match="closure"):
        UpstreamDownstream(
            net,
            F.cross_entropy,
            upstream_optimizer=torch.optim.LBFGS(u),
            downstream_optimizer=torch.optim.SGD(d, 0.1),
        )
    with pytest.raises(TypeError, match="upstream_optimizer"):
        UpstreamDownstream(net, F.cross_entropy, upstream_optimizer=u, downstream_optimizer=torch.optim.SGD(d, 0.1))
    for options, name in (
        ({"accumulate": 0}, "accumulate"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"balance": -1}, "balance"),
    ):
        with pytest.raises(ValueError, match=name):
            build(u, d, **options)

    steps = learner(net)
    train, empty = batch(3), batch(0)
    before = everything(net)
    with pytest.raises(ValueError, match=r"val_batch: got inputs of shape \(0, 3"):
        steps.step(train, empty)
    with pytest.raises(ValueError, match="train_batch: got inputs of shape"):
        steps.step(empty, train)
    with pytest.raises(ValueError, match="val_batch: got NoneType None, wanted a pair"):
        steps.step(train, None)
    with pytest.raises(ValueError, match="evaluation mode"):
        net.eval()
        steps.step(train, train)
    with pytest.raises(ValueError, match="evaluation mode"):
        net.train().dsts.eval()
        steps.step(train, train)
    net.train()
    with pytest.raises(ValueError, match="loss_fn: returned a tensor of shape"):
        UpstreamDownstream(net, lambda y, t: y, **sgd(net)).step(train, train)
    assert same(before, everything(net))


def test_warm_up():
    """Steps of line 8 alone, which are steps of the downstream optimizer; Algorithm 1 afterwards, also when resumed."""
    net = Net()
    alone = copy.deepcopy(net)
    steps, plain = learner(net, warm_up=2), torch.optim.SGD(downstream_parameters(alone), RATE)
    batches = [(batch(8), batch(8)) for _ in range(4)]
    for train, val in batches[:2]:
        result = steps.step(train, val)
        plain.zero_grad()
        loss = F.cross_entropy(alone(*train[0]), train[1])
        loss.backward()
        plain.step()
        assert result.train_loss == pytest.approx(loss.item()) and math.isnan(result.val_loss)
        assert math.isnan(result.upstream_grad_norm) and result.downstream_grad_norm > 0
        for p, q in zip(upstream_parameters(net), upstream_parameters(alone), strict=True):
            assert torch.equal(p, q) and p.grad is None
        for p, q in zip(net.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(p, q)
    resumed, state = copy.deepcopy(net), steps.state_dict()
    others = learner(resumed, warm_up=2)
    others.load_state_dict(state)
    found = steps.step(*batches[2])
    assert not math.isnan(found.val_loss) and others.step(*batches[2]) == found
    assert not all(map(torch.equal, upstream_parameters(net), upstream_parameters(alone)))
    assert same(everything(net), everything(resumed)) and "steps" not in learner(Net()).state_dict()


def test_a_step_that_fails_does_not_count():
    """Of the warm-up, as of all else."""
    net = Net()
    steps = learner(net, warm_up=1)
    bad, val = batch(8), batch(8)
    bad[0][0].fill_(math.nan)
    before = everything(net)
    with pytest.raises(FloatingPointError, match="train_batch"):
        steps.step(bad, val)
    assert same(before, everything(net)) and steps.steps == 0
    assert math.isnan(steps.step(batch(8), val).val_loss)


def test_balance_by_evaluation():
    """The term of line 6 counts other choices, so scores go another way; with noise that decides nothing, the same."""
    way = {}
    for on in ("training", "evaluation"):
        for scale in (0.0, 100.0):
            torch.manual_seed(4)
            net = Net(score_reduction="mean", gumbel_scale=scale, noise_std=0.0, hard_fraction=1.0)
            steps = learner(net, balance=10.0, balance_on=on)
            torch.manual_seed(5)
            (clips, *_), targets = batch(8)
            steps.step((clips, targets), (clips, targets))
            way[on, scale] = net.dsts.layers[0].scoring.detach().clone()
    assert torch.equal(way["training", 0.0], way["evaluation", 0.0])
    assert not torch.allclose(way["training", 100.0], way["evaluation", 100.0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"balance_on": "both"}, "balance_on: got 'both', wanted 'training' or 'evaluation'"),
        ({"warm_up": -1}, "warm_up: got -1, wanted an int of at least 0"),
        ({"warm_up": 1.5}, r"warm_up: got 1\.5"),
    ],
)
def test_bad_options_of_ours(options, message):
    with pytest.raises(ValueError, match=message):
        learner(Net(), **options)
