"""One op a file: its schema, checks, fake, autograd and public function. Ops call backends; nothing else does.

Every file here is imported with the package, so that its op is in ``torch.ops``; named below is what others use.
"""

import importlib
import pkgutil

from .frozen_layer import frozen_layer, frozen_layers
from .gated_conv import gated_conv3d
from .layout import to_memory_format
from .live_layer import live_layer
from .mixing_conv import mixing_conv3d
from .over_processes import sum_over_processes
from .relevance import collapse_scoring, relevance_scores
from .route import Routed, route
from .routing_weight import all_neurons_weight, selected_weight
from .semhash import saturating_sigmoid, semhash_gate
from .tap_sums import tap_sums
from .training_layer import training_layer

__all__ = [
    "Routed",
    "all_neurons_weight",
    "collapse_scoring",
    "frozen_layer",
    "frozen_layers",
    "gated_conv3d",
    "live_layer",
    "mixing_conv3d",
    "relevance_scores",
    "route",
    "saturating_sigmoid",
    "selected_weight",
    "semhash_gate",
    "sum_over_processes",
    "tap_sums",
    "to_memory_format",
    "training_layer",
]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
