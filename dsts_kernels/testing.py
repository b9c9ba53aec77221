"""What tests and benchmarks share: tolerances by dtype, one way to compare, exact products, and poisoned memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["TOLERANCES", "assert_close", "exact_float32", "poisoned_memory", "relative_error"]

# Largest ||out - ref|| / ||ref|| accepted of a result computed in this dtype against a float64 reference.
TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def relative_error(out: Tensor, ref: Tensor) -> float:
    """``||out - ref|| / ||ref||`` in float64; the plain norm of ``out`` where ``ref`` is all zero."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    scale = ref.norm()
    return float((out - ref).norm() / (scale if scale > 0 else 1.0))


def assert_close(
    out: Tensor, ref: Tensor, *, dtype: torch.dtype | None = None, name: str = "result", factor: float = 1.0
) -> None:
    """Fail unless ``out`` has the shape of ``ref``, no NaN, and an error within ``TOLERANCES[dtype] * factor``."""
    assert out.shape == ref.shape, f"{name}: got shape {tuple(out.shape)}, wanted {tuple(ref.shape)}"
    assert not torch.isnan(out).any(), f"{name}: has {int(torch.isnan(out).sum())} NaN"
    allowed = TOLERANCES[dtype or out.dtype] * factor
    error = relative_error(out, ref)
    assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 products in float32 inside the block; torch's own settings come back after it."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` and its kin return with NaN, so that an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
