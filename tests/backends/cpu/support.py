"""What the tests of native kernels share: layouts, shapes, dtypes, and checks of values and of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from dsts_kernels.backends.base import DTYPE_CODES
from dsts_kernels.backends.build import _C, build_details, build_record

if _C is None:
    assert build_record()[0] == "none", build_details()  # a build that does not import fails, it is not skipped
    pytest.skip("built without native kernels", allow_module_level=True)

TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}
LAYOUTS = ("contiguous", "channels_last", "frames_first", "strided", "expanded")
SHAPES = [
    (2, 33, 3, 5, 7),
    (3, 17, 1, 1, 6),
    (1, 7, 4, 6, 1),
    (2, 1, 2, 1, 1),
    (0, 7, 2, 3, 3),
    (2, 70, 8, 16, 16),
]
LARGE = (1, 530, 2, 9, 16)  # over one tile of channels, one row piece, one chunk of positions
PAIRS = [(d, d) for d in DTYPE_CODES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]

dtypes = pytest.mark.parametrize("dtype", DTYPE_CODES, ids=lambda d: str(d).removeprefix("torch."))
layouts = pytest.mark.parametrize("layout", LAYOUTS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "-".join(str(d).removeprefix("torch.") for d in p))


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty(shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """A tensor of NaN in the given memory layout; "strided" leaves gaps that must stay NaN."""
    B, C, T, H, W = shape
    if layout == "channels_last":
        return torch.full((B, T, H, W, C), torch.nan, dtype=dtype).permute(0, 4, 1, 2, 3)
    if layout == "frames_first":
        return torch.full((B, T, C, H, W), torch.nan, dtype=dtype).transpose(1, 2)
    if layout == "strided":
        return torch.full((B, C + 1, T, W + 2, H * 2), torch.nan, dtype=dtype)[:, 1:, :, 1:-1, ::2].transpose(3, 4)
    return torch.full(shape, torch.nan, dtype=dtype)


def filled(shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    if layout == "expanded":
        return torch.randn(shape[0], shape[1], 1, shape[3], 1, dtype=dtype).expand(shape)
    return empty(shape, dtype, layout).copy_(torch.randn(shape, dtype=torch.float64))


def panel_of(t: Tensor | None) -> Tensor | None:
    """(B, C, T, H, W) as a dense channels-last panel (B, T, H, W, C); None stays None."""
    return None if t is None else t.permute(0, 2, 3, 4, 1).contiguous()


def shapes_of(pair: tuple[torch.dtype, torch.dtype]) -> list[tuple[int, ...]]:
    """Small shapes for every dtype pair; tiling is the same for all, so the large one for float32 only."""
    return SHAPES[:5] + [LARGE] * (pair == (torch.float32, torch.float32))


def some_channels(C: int, n: int) -> Tensor:
    """n distinct channels: ascending as a gate gives them, or in any order for the even widths."""
    channels = torch.randperm(C)[:n].int()
    return channels if C % 2 == 0 and C != LARGE[1] else channels.sort().values


def layout_pairs(sources: Sequence[str | None]) -> list[tuple[str | None, str]]:
    """Every source layout with two output layouts, and every output layout at least twice."""
    return [(s, LAYOUTS[(i + k) % 4]) for i, s in enumerate(sources) for k in (0, 1)]


def check(out: Tensor, ref: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """||out - ref|| / ||ref|| within the dtype's tolerance; a NaN or Inf anywhere fails."""
    assert out.isfinite().all()
    error = (out.double() - ref).norm() / ref.norm().clamp_min(1e-30)
    assert not ref.numel() or error <= factor * TOLERANCES[dtype], f"relative error {error:.2e}"


def bits(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1).view(torch.uint8)


def check_threads(run: Callable[[int], Sequence[Tensor]]) -> Sequence[Tensor]:
    """run(threads) gives tensors: equal bit for bit for 1, 2 and 3 threads. Returns the first."""
    first = run(1)
    for threads in (2, 3):
        for a, b in zip(first, run(threads), strict=True):
            assert torch.equal(bits(a), bits(b))
    return first


def tap_sums_ref(x: Tensor, taps: int) -> Tensor:
    x = x.double()
    if taps == 1:
        return x.sum((2, 3, 4))[..., None]
    H, W = x.shape[3:]
    rows = [slice(0, H - 1), slice(0, H), slice(1, H)]
    columns = [slice(0, W - 1), slice(0, W), slice(1, W)]
    return torch.stack([x[..., i, j].sum((2, 3, 4)) for i in rows for j in columns], -1)
