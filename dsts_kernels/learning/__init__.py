"""Training with DSTS: Upstream-Downstream Learning (Algorithm 1), its split, checkpoints, the routing's health."""

from .checkpoint import generator_states, load_checkpoint, restore_generators, save_checkpoint
from .health import RoutingMonitor, RoutingStatistics, balance_loss
from .split import EpochSplit, split_train_val
from .upstream_downstream import StepResult, UpstreamDownstream, downstream_parameters, upstream_parameters

__all__ = [
    "EpochSplit",
    "RoutingMonitor",
    "RoutingStatistics",
    "StepResult",
    "UpstreamDownstream",
    "balance_loss",
    "downstream_parameters",
    "generator_states",
    "load_checkpoint",
    "restore_generators",
    "save_checkpoint",
    "split_train_val",
    "upstream_parameters",
]
