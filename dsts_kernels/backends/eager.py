"""The eager backend, plain PyTorch: every pass as tensor expressions, on any device, with nothing to build.

It takes the same algebra as the native backends and differs only in that each pass over memory is several. It
is what runs when the native module was not built, and what the native kernels are compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import FLOATS, accumulate_dtype
from .gated import GatedConvolution
from .grouped import GroupedBackend
from .groups import check_neurons
from .passes import Epilogue, GradientPanel


def valid_positions(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``(3, size)`` of 0 and 1: which inputs each tap of a zero-padded kernel of 3 meets."""
    valid = torch.ones(3, size, device=device, dtype=dtype)
    valid[0, size - 1] = 0
    valid[2, 0] = 0
    return valid


class EagerBackend(GroupedBackend):
    """Runs everywhere torch does."""

    name = "eager"
    remark = "plain PyTorch: several passes over memory for each fused one, and on a GPU a host synchronisation"

    def missing(self) -> str | None:
        return None

    def why_not(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype in FLOATS else f"{dtype} is not one of {', '.join(map(str, FLOATS))}"

    def convolution(self, x: Tensor, outputs: int, step: str = "forward") -> GatedConvolution:
        return self.direct

    def semhash_gate(self, logits: Tensor, neuron: Tensor | None, noise: Tensor | None, hard: Tensor | None) -> Tensor:
        q = self._logits_with_noise(logits, neuron, noise)
        b = (q > 0).to(q.dtype)
        if hard is None:
            return b.to(logits.dtype)
        r = (1.2 * torch.sigmoid(q) - 0.1).clamp(0, 1)
        return torch.where(hard[:, None], b, r).to(logits.dtype)

    def semhash_gate_backward(
        self, grad: Tensor, logits: Tensor, neuron: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        s = torch.sigmoid(self._logits_with_noise(logits, neuron, noise))
        r = 1.2 * s - 0.1
        dq = torch.where((r > 0) & (r < 1), grad.to(s.dtype) * (1.2 * s * (1 - s)), 0.0)
        if neuron is None:
            return dq.to(logits.dtype)
        return torch.zeros_like(logits, dtype=s.dtype).index_add_(0, neuron, dq).to(logits.dtype)

    @staticmethod
    def _logits_with_noise(logits: Tensor, neuron: Tensor | None, noise: Tensor | None) -> Tensor:
        wide = accumulate_dtype(logits.dtype)
        if neuron is not None:
            check_neurons(neuron, logits.shape[0])
        q = (logits if neuron is None else logits[neuron]).to(wide)
        return q if noise is None else q + noise.to(wide)

    def tap_sums(self, x: Tensor, taps: int) -> Tensor:
        wide = accumulate_dtype(x.dtype)
        if taps == 1:
            return x.sum((2, 3, 4), dtype=wide)[:, :, None]
        planes = x.sum(2, dtype=wide)  # (B, C, H, W)
        h, w = planes.shape[2:]
        if h == 0 or w == 0:
            return planes.new_zeros(*planes.shape[:2], 9)
        by_column = planes @ valid_positions(w, x.device, wide).t()  # (B, C, H, 3)
        return (valid_positions(h, x.device, wide) @ by_column).flatten(2)

    def gather_panel(
        self,
        src: Tensor,
        samples: Tensor | None = None,
        channels: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        complement: bool = False,
        channels_first: bool = False,
        dtype: torch.dtype | None = None,
        width: int | None = None,
    ) -> Tensor:
        def pick(t: Tensor) -> Tensor:
            t = t if samples is None else t.index_select(0, samples.to(t.device))
            return t if channels is None else t.index_select(1, channels.to(t.device))

        panel = pick(src)
        if scale is not None:
            s = pick(scale)[:, :, None, None, None]
            panel = panel * (1 - s if complement else s)
        panel = panel.to(dtype or src.dtype)
        if width is not None and width > panel.shape[1]:
            panel = torch.cat([panel, panel.new_zeros(panel.shape[0], width - panel.shape[1], *panel.shape[2:])], 1)
        return (panel if channels_first else panel.permute(0, 2, 3, 4, 1)).contiguous()

    def epilogue(self, spatial: Tensor | None, temporal: Tensor | None, epilogue: Epilogue) -> None:
        out, samples, bias, relu, skip, sums = epilogue
        v = spatial if temporal is None else temporal if spatial is None else spatial + temporal
        v = v if bias is None else v + bias.to(v.dtype)
        v = (v.relu() if relu else v).permute(0, 4, 1, 2, 3)
        where = slice(None) if samples is None else samples.to(out.device)
        v = v if skip is None else v + skip[where]
        out[where] = v.to(out.dtype)
        if sums is not None:
            sums[where] = self.tap_sums(out[where], sums.shape[2])

    def gate_merge(
        self,
        spatial: GradientPanel,
        temporal: GradientPanel,
        samples: Tensor | None,
        gate: Tensor,
        x: Tensor,
        dx: Tensor | None,
        dgate: Tensor | None,
    ) -> None:
        where = slice(None) if samples is None else samples.to(x.device)
        through_spatial, through_temporal = (
            self._all_channels(gradient, x.shape[1]) for gradient in (spatial, temporal)
        )
        if dx is not None:
            g = gate[where].to(x.dtype)[:, :, None, None, None]
            spatial_part = torch.where(g == 0, 0, g * through_spatial)
            temporal_part = torch.where(g == 1, 0, (1 - g) * through_temporal)
            dx[where] = (spatial_part + temporal_part).to(dx.dtype)
        if dgate is not None:
            wide = accumulate_dtype(x.dtype)
            product = x[where].to(wide) * (through_spatial - through_temporal)
            dgate[where] = product.sum((2, 3, 4)).to(dgate.dtype)

    @staticmethod
    def _all_channels(gradient: GradientPanel, count: int) -> Tensor | float:
        """A panel as ``(b, C, T, H, W)`` with zeros in the channels it does not list."""
        panel, channels = gradient
        if panel is None:
            return 0.0
        features = panel.permute(0, 4, 1, 2, 3)
        if channels is None:
            return features
        full = features.new_zeros(features.shape[0], count, *features.shape[2:])
        return full.index_copy_(1, channels.long().to(full.device), features)
