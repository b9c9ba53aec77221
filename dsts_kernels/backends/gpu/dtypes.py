"""The dtypes that GPU kernels multiply: add one here, then in the kernels' own tables of types."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Products(NamedTuple):
    """How a dtype is multiplied."""

    kind: str  # half or float: what measured files call it, and what tiles depend on
    capability: int  # compute capability times ten since which kernels multiply it


DTYPES = {
    torch.float32: Products("float", 70),
    torch.bfloat16: Products("half", 80),
    torch.float16: Products("half", 70),
}


def why_not(dtype: torch.dtype, capability: int = 80) -> str | None:
    """Why kernels do not multiply ``dtype`` on a GPU of ``capability`` (times ten); ``None`` when they do."""
    if dtype not in DTYPES:
        return f"{dtype} is not one of {', '.join(map(str, DTYPES))}"
    since = DTYPES[dtype].capability
    if capability >= since:
        return None
    name = str(dtype).removeprefix("torch.")
    others = [str(other).removeprefix("torch.") for other, products in DTYPES.items() if products.capability < since]
    return f"{name} needs compute capability {since / 10:.1f}; {' and '.join(others)} run"
