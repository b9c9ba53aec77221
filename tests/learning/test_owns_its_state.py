"""A learner beside copies of itself and others: what it keeps is its own, and nothing of a step stays on the model."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F

from dsts_kernels.learning import UpstreamDownstream, upstream_parameters

from .support import Net, batch, everything, learner, same, sgd


def hooks(model: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_no_hook_and_no_graph_stays():
    """The balance term's hooks are there while a step runs, also one that fails, and see no pass but its own."""
    net = Net()
    steps = learner(net, balance=0.5)
    assert hooks(net) == 0
    seen, step = [], steps.loss_fn

    def loss(output, target):
        seen.append(hooks(net))
        return step(output, target)

    steps.loss_fn = loss

    def graphs() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) and one.grad_fn is not None for one in gc.get_objects())

    before = graphs()
    steps.step(batch(5), batch(4))
    assert seen == [2, 2, 2] and hooks(net) == 0 and graphs() == before
    count = steps._balance.statistics().samples
    net(*batch(3)[0])
    assert torch.equal(count, steps._balance.statistics().samples)
    train = batch(4)
    train[0][0][1] = torch.inf
    with pytest.raises(FloatingPointError):
        steps.step(train, batch(4))
    assert hooks(net) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("options", [{}, {"balance": 0.5, "clip_norm": 0.1}, {"second_order": True}], ids=str)
def test_a_copy_steps_by_itself(copied, options):
    """After a step, so that there is something to share; original and copy take the same step, each its own."""
    net = Net()
    steps = learner(net, **options)
    steps.step(batch(5), batch(4))
    other = copied(steps)
    train, val = batch(5), batch(4)
    before = everything(net, steps.upstream_optimizer, steps.downstream_optimizer)
    generator = torch.get_rng_state()
    found = other.step(train, val)
    torch.set_rng_state(generator)
    assert same(before, everything(net, steps.upstream_optimizer, steps.downstream_optimizer))
    assert steps.step(train, val) == found
    for a, b in zip(net.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b


def test_two_learners_of_one_model():
    """In turns, one of them failing: flags, gradients and weights are as if the other had never been."""
    net = Net()
    alone = copy.deepcopy(net)
    first, second, expected = learner(net), learner(net, balance=0.1), learner(alone)
    train, val = batch(5), batch(4)
    broken = batch(5)
    broken[0][0][0] = torch.nan
    with pytest.raises(FloatingPointError):
        second.step(broken, val)
    assert first.step(train, val) == expected.step(train, val)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), alone.parameters(), strict=True))


def test_models_in_threads():
    """Two threads, a model each, take the steps that they take one after the other; draws are given."""
    nets = [Net(), Net()]
    expected = copy.deepcopy(nets)
    batches = [[(batch(5), batch(4)) for _ in range(3)] for _ in nets]
    for net, own in zip(expected, batches, strict=True):
        steps = learner(net, balance=0.1)
        for train, val in own:
            steps.step(train, val)

    def run(net, own) -> None:
        steps = learner(net, balance=0.1)
        for train, val in own:
            steps.step(train, val)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(nets, batches, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for net, other in zip(nets, expected, strict=True):
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options, old",
    [
        ({"balance": 0.5}, False),
        pytest.param({"balance": 0.5}, True, marks=pytest.mark.slow),
        pytest.param({"second_order": True}, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled(fresh_compiler, monkeypatch, options, old):
    """Compiled code is of one side frozen or the other, with hooks or without: steps are those of the module.

    Old compilers do not look at what is frozen, and nothing is there: as it is with a new one.
    """
    if old:
        monkeypatch.setattr("dsts_kernels.learning.upstream_downstream.OLD_COMPILER", True)
    net = Net(norm=None)
    plain = copy.deepcopy(net)
    module = torch.compile(net, backend="aot_eager")
    steps, expected = UpstreamDownstream(module, F.cross_entropy, **sgd(module), **options), learner(plain, **options)
    expected.exact_second_order = False
    for _ in range(2):
        train, val = batch(5), batch(4)
        found, wanted = steps.step(train, val), expected.step(train, val)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-6, atol=1e-9)
        module(*train[0]).sum().backward()
        assert all(p.grad is not None for p in upstream_parameters(net))
        module.zero_grad()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    if options.get("balance"):
        assert not steps._balance._routed
        del steps
        gc.collect()
        assert hooks(net) == 0, "they go with the learner"
