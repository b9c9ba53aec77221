"""What was made of a tensor and is good while nobody writes to it: filters reordered for the library's convolution.

It lies beside the tensor, not in it: copies, files and states never see it, and it goes when the tensor goes. A write
to the tensor, or other memory put in its place, makes it anew; one that torch does not count (through ``.data``) is
not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_beside: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor: (stamp, {key: what was made})


def kept(source: Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
    """What ``make()`` gives for ``key`` of ``source``, made once for the values that ``source`` has now."""
    if source.is_inference():  # nobody counts writes to it
        return make()
    stamp = (source._version, source.data_ptr())
    found = _beside.get(source)
    if found is None or found[0] != stamp:
        found = _beside[source] = (stamp, {})
    if key not in found[1]:
        found[1][key] = make()
    return found[1][key]
