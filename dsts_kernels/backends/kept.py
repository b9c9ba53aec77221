"""What was made of a tensor's values and is good while they stay: filters reordered for the library's convolution.

It lies beside the tensor's memory, not in the tensor: copies, files and states never see it, and it goes when the
memory goes. Values count as changed where torch counted a write, where other memory was put in place, or where one of a
thousand samples of them differs: some optimizers and averages write through ``.data``, which torch does not count. An
uncounted write to fewer values than one in a thousand may go unseen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

SAMPLES = 1024
GOLDEN = (5**0.5 - 1) / 2
MOST = 16  # filters of a live operator, whose lists may never come again: at most so many take memory
# storage: {key: (stamp, what was made, or NOT_YET)}. Not by tensor: torch swaps none that a weak reference knows.
_beside: WeakIdKeyDictionary = WeakIdKeyDictionary()
NOT_YET = object()


def kept(values: Tensor, key: Hashable, make: Callable[[], Any], *, again: bool = False) -> Any:
    """What ``make()`` gives for ``key`` of these values, made once for what they are now.

    Args:
        values: dense and outside inference mode, or nothing is kept.
        again: make it only where the same was asked before, and give ``None`` the first time: values that train are
            others at the next call.
    """
    if values.is_inference() or not values.is_contiguous():  # nobody counts its writes; it would take a copy to look
        return None if again else make()
    storage = values.untyped_storage()
    beside = _beside.get(storage)
    if beside is None:
        beside = _beside[storage] = {}
    key = (values.storage_offset(), values.shape, values.dtype, key)
    stamp = (values._version, values.data_ptr(), _sampled(values))
    found, made = beside.get(key, (None, NOT_YET))
    if found == stamp and made is not NOT_YET and not again:
        return made
    if found != stamp or made is NOT_YET:
        made = NOT_YET if again and found != stamp else make()
    if again:  # the one that was asked for last goes last, and the first one out
        beside.pop(key, None)
        for oldest in list(beside)[: max(0, len(beside) + 1 - MOST)]:  # other threads may have the same in hand
            beside.pop(oldest, None)
    beside[key] = stamp, made
    return None if made is NOT_YET else made


def _sampled(values: Tensor) -> bytes:
    """So many of the values, evenly spread, bit for bit."""
    flat = values.detach().view(-1)
    return flat.index_select(0, _places(flat.numel())).view(torch.uint8).numpy().tobytes()


@functools.lru_cache(maxsize=256)
def _places(count: int) -> Tensor:
    """Where the samples of ``count`` values lie: one in each of so many equal parts, by the golden ratio from part to
    part. At equal distances they would meet one tap of a filter, and a few of its channels."""
    part = torch.arange(min(count, SAMPLES), dtype=torch.float64, device="cpu")
    return ((part + (part * GOLDEN).frac()) * (count / max(1, len(part)))).long()
