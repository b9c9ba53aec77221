"""``python -m dsts_kernels bench``: how fast the module is here, beside the literal one and the best handwritten.

:mod:`.turns` makes every variant on the same weights, compares it with the literal module and times all in turns;
:mod:`.command` is the command line and the table; :mod:`.handwritten` is what we compare with. ``pytest benchmarks/``
in the sources times more: real features, memory, ``torch.compile``, single ops, whole backbones.
"""

from .handwritten import HandwrittenEval, HandwrittenTrain
from .turns import Problem, Row, measure

__all__ = ["HandwrittenEval", "HandwrittenTrain", "Problem", "Row", "measure"]
