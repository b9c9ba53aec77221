"""What a trained DSTS depends on: change its routing or its gates in evaluation, and see what accuracy that costs.

:mod:`.changed` makes the layers of a model take another neuron or other gates; :mod:`.counterfactuals` measures what
each such change costs; :mod:`.report` puts it beside usage, gates and information, and :mod:`.command` is
``python -m dsts_kernels probe``. All of it is ours, not the paper's: the paper shows gates and routing, and not what
follows from them.
"""

from .changed import Change, Choice, changed
from .counterfactuals import CHANGES, Counterfactual, Measured, counterfactuals, paired_interval
from .report import Report, probe, report_text

__all__ = [
    "CHANGES",
    "Change",
    "Choice",
    "Counterfactual",
    "Measured",
    "Report",
    "changed",
    "counterfactuals",
    "paired_interval",
    "probe",
    "report_text",
]
