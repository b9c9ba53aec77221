"""Training with DSTS: Upstream-Downstream Learning (Algorithm 1), splits, schedules, checkpoints, routing's health."""

from .checkpoint import generator_states, load_checkpoint, restore_generators, save_checkpoint
from .distributed import average_centers
from .groups import upstream_groups
from .health import RoutingMonitor, RoutingStatistics, balance_loss
from .schedule import NoiseSchedule
from .split import EpochSplit, both_ways, split_train_val
from .upstream_downstream import StepResult, UpstreamDownstream, downstream_parameters, upstream_parameters

__all__ = [
    "EpochSplit",
    "NoiseSchedule",
    "RoutingMonitor",
    "RoutingStatistics",
    "StepResult",
    "UpstreamDownstream",
    "average_centers",
    "balance_loss",
    "both_ways",
    "downstream_parameters",
    "generator_states",
    "load_checkpoint",
    "restore_generators",
    "save_checkpoint",
    "split_train_val",
    "upstream_groups",
    "upstream_parameters",
]
