"""What every kernel launch should take on a GPU: a roofline of FLOP, bytes, tiles and waves. Never measurements.

:mod:`.chips` holds what vendors publish and what we estimate, and turns one launch into microseconds; :mod:`.cases`
says what has to be computed; :mod:`.launches` counts what a launch of each kernel of the Triton backend does, with the
boxes and tiles that it would choose, :mod:`.cuda` that of the CUDA backend, with :mod:`.loops` for the inside of a
multiprocessor; :mod:`.steps` puts launches in order for a frozen evaluation and a training step; :mod:`.tables` prints
them for ``python -m dsts_kernels roofline``.
"""

from .cases import SHAPES, Case, folded_flop, literal_flop
from .chips import BACKENDS, CHIPS, Chip, Launch, Prediction, predict
from .steps import STEPS, frozen_step, training_step
from .tables import Total, report, summary, total

__all__ = [
    "BACKENDS",
    "CHIPS",
    "SHAPES",
    "STEPS",
    "Case",
    "Chip",
    "Launch",
    "Prediction",
    "Total",
    "folded_flop",
    "frozen_step",
    "literal_flop",
    "predict",
    "report",
    "summary",
    "total",
    "training_step",
]
