"""The centre of a layer's scores, **ours, not the paper's**: what each neuron scores on any sample whatever.

Features behind a ReLU point one way, so scores differ between neurons by an offset that is larger than what samples
add, and without noise one neuron takes them all. A layer with ``score_center`` follows that offset in a buffer and
subtracts it. Here the buffer takes in a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops

__all__ = ["follow", "run_again"]


def run_again() -> bool:
    """Whether this pass lies in a backward pass: activation checkpointing runs it once more, for its activations."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.no_grad()
def follow(center: Tensor, batches: Tensor, away: Tensor, how: str, momentum: float) -> None:
    """Bring ``center (N,)`` up to date with a training batch, in place, without a host synchronisation.

    Samples whose scores are not all finite count for nothing, and a batch of such alone changes nothing. In the forward
    pass of ``DistributedDataParallel`` the batch is that of all its processes.

    Args:
        center: ``(N,)`` float32 or float64.
        batches: int64 scalar, how many it has seen.
        away: ``(B, N)``, scores less the centre.
        how: ``"mean"``: the mean of all batches until they are ``1 / momentum``, from then on a running one.
            ``"balance"``: the mean of the first batch; then a step of ``momentum`` standard deviations of the scores
            (over the batch; of all neurons, in the root mean square) up for a neuron that evaluation would choose for
            more than its share of the batch, and down for one that it would choose for less.

    Source of ``"balance"``: Wang et al., *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts* (2024),
    whose bias has the other sign and a step of fixed size.
    """
    neurons = away.shape[1]
    away = away.detach().to(center.dtype)
    known = away.isfinite().all(1, keepdim=True)
    away = torch.where(known, away, 0.0)
    found = [away.sum(0), known.sum(0).to(away.dtype)]
    if how == "balance":
        taken = F.one_hot(away.argmax(1), neurons).to(away.dtype) * known
        found += [taken.sum(0), away.square().sum()[None]]
    total = ops.sum_over_processes(torch.cat(found))
    count = total[neurons]
    mean = total[:neurons] / count.clamp_min(1)
    batches.add_((count > 0).to(batches.dtype))
    if how == "mean":
        center.add_(mean * (1.0 / batches.clamp_min(1).to(mean.dtype)).clamp_min(momentum))
        return
    over = (total[neurons + 1 : -1] / count.clamp_min(1) - 1.0 / neurons).sign()
    spread = ((total[-1] / count.clamp_min(1) - mean.square().sum()) / neurons).clamp_min(0).sqrt()
    center.add_(torch.where(batches == 1, mean, over * (spread * momentum)))
