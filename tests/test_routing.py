"""Sampled draws: the shares, scales and shapes that the paper's training step asks for."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.routing import sample_draws


@pytest.mark.parametrize("fraction, batch, counts", [(0.5, 8, {4}), (0.5, 7, {3, 4}), (1.0, 5, {5}), (0.0, 5, {0})])
def test_hard_share_is_exact(fraction, batch, counts):
    """An exact share of every layer's batch is hard; what is left over goes by a coin, so both occur."""
    hard = sample_draws(batch, 2, 2, 60, hard_fraction=fraction).hard
    assert hard.dtype == torch.bool and set(hard.sum(1).tolist()) == counts


def test_every_sample_can_be_hard():
    """The half is a random half, not the first one."""
    share = sample_draws(10, 1, 1, 400).hard.float().mean(0)
    assert ((share > 0.3) & (share < 0.7)).all()


def test_scales():
    """Normal noise of the deviation asked for; standard Gumbel (mean 0.577, variance pi^2/6)."""
    draws = sample_draws(50, 40, 40, 10, noise_std=0.3)
    assert abs(float(draws.noise.std()) - 0.3) < 0.02 and abs(float(draws.noise.mean())) < 0.02
    assert abs(float(draws.gumbel.mean()) - 0.5772) < 0.05 and abs(float(draws.gumbel.var()) - 1.645) < 0.15
    assert draws.noise.shape == (10, 50, 40) and draws.gumbel.shape == (10, 50, 40)


def test_dtypes():
    """Float32 for half modules, float64 for float64 ones."""
    assert sample_draws(1, 1, 1, 1, dtype=torch.bfloat16).gumbel.dtype == torch.float32
    assert sample_draws(1, 1, 1, 1, dtype=torch.float64).noise.dtype == torch.float64
