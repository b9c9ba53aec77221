"""A learner's state by names: for parameters in another order, of another wrapper, from before; refused for others."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from dsts_kernels.learning import UpstreamDownstream, downstream_parameters, upstream_parameters

from .support import Net, batch, everything, same


def learner(net: torch.nn.Module, turned: bool = False, groups: int = 1) -> UpstreamDownstream:
    """AdamW on both sides; ``turned`` gives it the parameters in the other order."""
    made = []
    for side in (upstream_parameters(net), downstream_parameters(net)):
        side = side[::-1] if turned else side
        made.append(torch.optim.AdamW([{"params": side[i::groups]} for i in range(groups)], 1e-2))
    return UpstreamDownstream(net, F.cross_entropy, upstream_optimizer=made[0], downstream_optimizer=made[1])


def stepped(net: torch.nn.Module) -> UpstreamDownstream:
    steps = learner(net)
    steps.step(batch(5), batch(4))
    return steps


@pytest.mark.parametrize("wrap", [lambda net: net, torch.compile])
@pytest.mark.parametrize("turned", [False, True])
def test_goes_on(wrap, turned):
    """The next step is that of the learner that was saved."""
    first = stepped(Net())
    net = copy.deepcopy(first.module)
    second = learner(net, turned)
    state = copy.deepcopy(first.state_dict())
    learner(wrap(net), turned).load_state_dict(state)
    second.load_state_dict(state)
    train, val = batch(5), batch(4)
    assert first.step(train, val) == second.step(train, val)
    for name, p in first.module.named_parameters():
        torch.testing.assert_close(p, dict(net.named_parameters())[name], rtol=0, atol=0)


def test_the_optimizers_own_states_load():
    """As 0.1 saved them: parameters are numbered."""
    first = stepped(Net())
    second = learner(copy.deepcopy(first.module))
    old = {"upstream_optimizer": first.upstream_optimizer, "downstream_optimizer": first.downstream_optimizer}
    state = {name: copy.deepcopy(optimizer.state_dict()) for name, optimizer in old.items()}
    second.load_state_dict(state | {"exact_second_order": True})
    train, val = batch(5), batch(4)
    assert first.step(train, val) == second.step(train, val)


def test_what_no_step_has_made():
    """Asked for before the first step: all is as before, and read back it is no state at all."""
    net = Net()
    steps = learner(net)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before, gradient = everything(net, steps.upstream_optimizer, steps.downstream_optimizer), net.head.weight.grad
    state = steps.state_dict()
    assert same(before, everything(net, steps.upstream_optimizer, steps.downstream_optimizer))
    assert net.head.weight.grad is gradient and net.stem.weight.grad is None
    found = state["downstream_optimizer"]
    assert (
        set(found["state"])
        == set(found["absent"])
        == {name for name, p in net.named_parameters() if any(p is q for q in downstream_parameters(net))}
    )
    assert found["state"]["head.weight"]["exp_avg"].shape == net.head.weight.shape
    other = learner(copy.deepcopy(net))
    other.load_state_dict(state)
    assert not other.downstream_optimizer.state
    train, val = batch(5), batch(4)
    assert steps.step(train, val) == other.step(train, val)


def test_refused():
    """Other parameters, or the same in other groups; neither optimizer has changed."""
    steps = stepped(Net())
    state = steps.state_dict()
    other = Net()
    other.head = torch.nn.Sequential(other.head)
    for target, says in (
        (
            learner(other),
            r"downstream_optimizer: got .* \(head.0.bias, head.0.weight, head.bias and 1 more\)",
        ),
        (learner(Net(), groups=2), r"upstream_optimizer: got the state of .*other groups of the same"),
    ):
        with pytest.raises(ValueError, match=says):
            target.load_state_dict(state)
        assert not target.upstream_optimizer.state and not target.downstream_optimizer.state
