"""Figures of a trained DSTS: what neurons specialize in, who chooses them, and how both came about in training.

:mod:`.checkpoint` draws all that a checkpoint has data for; :mod:`.measures` turns gates and routing into numbers, on
torch alone; :mod:`.specialization`, :mod:`.training`, :mod:`.costs` and, for one video, :mod:`.clips` draw them, in the
palette of :mod:`.style`, with matplotlib, which is imported with the first figure. Layers and neurons are numbered from
0, as in ``FusedDSTS.layers`` and ``Routing.neuron``. From a shell: ``python -m dsts_kernels plot``, ``probe --figure``
and ``classify --figure``.
"""

from .checkpoint import draw, find_gates
from .clips import plot_classification
from .costs import plot_costs
from .measures import (
    activation,
    gate_band,
    gate_shares,
    information_table,
    information_text,
    learned_text,
    mutual_information,
    shuffled_information,
    sign_flips,
)
from .specialization import plot_activation, plot_examples, plot_gates
from .training import plot_saturation, plot_usage

__all__ = [
    "activation",
    "draw",
    "find_gates",
    "gate_band",
    "gate_shares",
    "information_table",
    "information_text",
    "learned_text",
    "mutual_information",
    "plot_activation",
    "plot_classification",
    "plot_costs",
    "plot_examples",
    "plot_gates",
    "plot_saturation",
    "plot_usage",
    "shuffled_information",
    "sign_flips",
]
