"""Routing in one step of autograd on the host: the bits of the single ops forward, their gradients backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dsts_kernels.ops import route
from dsts_kernels.ops.route import Fused
from dsts_kernels.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
FIELDS = ("neuron", "scores", "gate", "share")


def inputs(dtype: torch.dtype, kernel: tuple[int, ...], drawn: bool) -> dict[str, Tensor | None]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(
        x=torch.randn(5, 7, 2, 3, 4, dtype=dtype),
        scoring=(0.1 * torch.randn(4, 3, 7, *kernel)).to(dtype),
        logits=torch.randn(4, 7, dtype=dtype),
        noise=torch.randn(5, 7, dtype=wide) if drawn else None,
        hard=torch.tensor([True, False, True, False, False]) if drawn else None,
        gumbel=torch.randn(5, 4, dtype=wide) if drawn else None,
    )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(monkeypatch, dtype, kernel, drawn, reduction):
    """Whatever needs a gradient, and whichever results have one."""
    given, asked = inputs(dtype, kernel, drawn), []
    monkeypatch.setattr(Fused, "apply", lambda *args, real=Fused.apply: asked.append(1) or real(*args))
    for needs in itertools.product([True, False], repeat=3):
        if not any(needs):
            continue
        found = []
        for fused in (True, False):
            leaves = [
                given[n].clone().requires_grad_(need) for n, need in zip(("x", "scoring", "logits"), needs, strict=True)
            ]
            rest = {name: given[name] for name in ("noise", "hard", "gumbel")}
            results = route(*leaves, **rest, tau=0.7, reduction=reduction, share=True, fused=fused)
            found.append((leaves, results))
        (ours, results), (theirs, wanted) = found
        for name, a, b in zip(FIELDS, results, wanted, strict=True):
            assert (a is None) == (b is None), name
            assert a is None or (torch.equal(a, b) and a.dtype == b.dtype and a.requires_grad == b.requires_grad), name
        factors = [None if a is None else torch.randn_like(a) for a in results[1:]]
        for chosen in ((0,), (1,), (2,), (0, 1, 2)):
            gradients = [
                gradients_of(leaves, r[1:], factors, chosen) for leaves, r in ((ours, results), (theirs, wanted))
            ]
            for a, b in zip(*gradients, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert_close(a, b, factor=2)
    assert len(asked) == 7


def gradients_of(leaves, results, factors, chosen) -> list[Tensor | None]:
    """Of a sum over some of the results, where it has any."""
    total = [(results[i] * factors[i]).sum() for i in chosen if results[i] is not None and results[i].requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not total:
        return [None for _ in wanted]
    return list(torch.autograd.grad(sum(total), wanted, allow_unused=True, retain_graph=True))


def test_scores_stay_wide_under_autocast():
    """Values and gradients are those without it."""
    given = inputs(torch.float32, (1, 1, 1), drawn=True)
    found = []
    for enabled in (False, True):
        leaves = {n: given[n].clone().requires_grad_() for n in ("x", "scoring", "logits")}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            results = route(**given | leaves, share=True)
            (results.scores.sum() + results.share.sum()).backward()
        found.append((results.scores, leaves["x"].grad, leaves["scoring"].grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
