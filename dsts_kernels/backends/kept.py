"""What was made of a tensor's values and is good while they stay: filters reordered for the library's convolution.

It lies beside the tensor, not in it: copies, files and states never see it, and it goes when the tensor goes. Values
count as changed where torch counted a write, where other memory was put in place, or where one of a thousand samples
of them differs: some optimizers and averages write through ``.data``, which torch does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

SAMPLES = 1024
MOST = 16  # filters of a live operator, whose lists may never come again: at most so many take memory
_beside: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor: {key: (stamp, what was made, or NOT_YET)}
NOT_YET = object()


def kept(values: Tensor, key: Hashable, make: Callable[[], Any], *, again: bool = False) -> Any:
    """What ``make()`` gives for ``key`` of these values, made once for what they are now.

    Args:
        values: dense, or ``None`` comes back; a view is kept beside the tensor that it is a view of.
        again: make it only where the same was asked before, and give ``None`` the first time: values that train are
            others at the next call.
    """
    source = values if values._base is None else values._base
    if source.is_inference() or not values.is_contiguous():  # nobody counts its writes; it would take a copy to look
        return None if again else make()
    beside = _beside.get(source)
    if beside is None:
        beside = _beside[source] = {}
    key = (values.storage_offset(), values.shape, key)
    stamp = (source._version, values.data_ptr(), _sampled(values))
    found, made = beside.get(key, (None, NOT_YET))
    if found == stamp and made is not NOT_YET and not again:
        return made
    if found != stamp or made is NOT_YET:
        made = NOT_YET if again and found != stamp else make()
    if again:  # the one that was asked for last goes last, and the first one out
        beside.pop(key, None)
        if len(beside) >= MOST:
            beside.pop(next(iter(beside)), None)
    beside[key] = stamp, made
    return None if made is NOT_YET else made


def _sampled(values: Tensor) -> bytes:
    """So many of the values, evenly spread, bit for bit."""
    flat = values.detach().view(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)].contiguous().view(torch.uint8).numpy().tobytes()
