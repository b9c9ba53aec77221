"""The CPU backend: thin launchers over the native module ``dsts_kernels._C``.

Each launcher hands plain pointers, sizes and strides to one kernel, on torch's own thread count, and allocates
what it returns. Convolutions are fast ones where :mod:`.winograd` has them, else the library's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import FLOATS, accumulate_dtype
from .build import _C, warn_if_missing, why_no_module
from .plan import check_neurons
from .winograd import Operator, WinogradBackend, tile_sizes

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
NO_STRIDES = (0, 0, 0, 0, 0)
NO_OPERATOR = (0,) * 12


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return NO_STRIDES if tensor is None else tensor.stride()


class CpuBackend(WinogradBackend):
    """Native kernels on CPU tensors; the library's convolutions where there is no fast one."""

    name = "cpu"
    stage_seconds: Tensor | None = None  # (4,) float64: fast convolution adds the time of its stages, where set
    remark = "native kernels: fast convolution in float32, half types computed so; float64 around oneDNN"

    def missing(self) -> str | None:
        why = why_no_module()
        return None if why is None else f"{why}; plain PyTorch runs instead, with more passes over memory"

    def why_not(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it runs on CPU tensors, not on {device.type}"
        if dtype not in DTYPE_CODES:
            return f"{dtype} is not one of {', '.join(map(str, FLOATS))}"
        return self.missing()

    def why_not_fast(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return "float64 is convolved directly" if dtype == torch.float64 else None

    def semhash_gate(self, logits: Tensor, neuron: Tensor | None, noise: Tensor | None, hard: Tensor | None) -> Tensor:
        if neuron is not None:
            check_neurons(neuron, logits.shape[0])
        logits, neuron, noise, hard = map(_dense, (logits, neuron, noise, hard))
        (n, c), b = logits.shape, (logits if neuron is None else neuron).shape[0]
        gate = logits.new_empty(b, c)
        _C.semhash_forward(
            logits.data_ptr(),
            _address(neuron),
            _address(noise),
            _address(hard),
            gate.data_ptr(),
            b,
            n,
            c,
            DTYPE_CODES[logits.dtype],
            torch.get_num_threads(),
        )
        return gate

    def semhash_gate_backward(
        self, grad: Tensor, logits: Tensor, neuron: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        grad, logits, neuron, noise = map(_dense, (grad, logits, neuron, noise))
        (n, c), b = logits.shape, grad.shape[0]
        dlogits = torch.empty_like(logits)
        _C.semhash_backward(
            grad.data_ptr(),
            logits.data_ptr(),
            _address(neuron),
            _address(noise),
            dlogits.data_ptr(),
            b,
            n,
            c,
            DTYPE_CODES[logits.dtype],
            torch.get_num_threads(),
        )
        return dlogits

    def tap_sums(self, x: Tensor, taps: int) -> Tensor:
        b, c, t, h, w = x.shape
        out = torch.empty((b, c, taps), dtype=accumulate_dtype(x.dtype), device=x.device)
        _C.tap_sums(
            x.data_ptr(),
            x.stride(),
            out.data_ptr(),
            b,
            c,
            t,
            h,
            w,
            taps,
            DTYPE_CODES[x.dtype],
            torch.get_num_threads(),
        )
        return out

    def gather_panel(
        self,
        src: Tensor,
        samples: Tensor | None = None,
        channels: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        complement: bool = False,
        first: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        b, c, t, h, w = src.shape
        nb = b if samples is None else samples.numel()
        nc = c if channels is None else channels.numel()
        dtype = dtype or src.dtype
        scale = _dense(scale)
        panel = torch.empty((nb, nc, t, h, w) if first else (nb, t, h, w, nc), dtype=dtype, device=src.device)
        out = panel if first else panel.permute(0, 4, 1, 2, 3)
        _C.gather_panel(
            src.data_ptr(),
            src.stride(),
            _address(samples),
            nb,
            _address(channels),
            nc,
            _address(scale),
            0 if scale is None else scale.stride(0),
            int(complement),
            out.data_ptr(),
            out.stride(),
            nc,
            t,
            h,
            w,
            DTYPE_CODES[src.dtype],
            DTYPE_CODES[dtype],
            torch.get_num_threads(),
        )
        return panel

    def epilogue(
        self,
        zs: Tensor | None,
        zt: Tensor | None,
        out: Tensor,
        *,
        samples: Tensor | None = None,
        bias: Tensor | None = None,
        relu: bool = False,
        skip: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        b, o, t, h, w = out.shape
        panel = zs if zs is not None else zt
        found = None if sums is None else torch.empty_like(sums, memory_format=torch.contiguous_format)
        _C.epilogue(
            _address(zs),
            _address(zt),
            _address(bias),
            0,
            int(relu),
            _address(skip),
            _strides(skip),
            out.data_ptr(),
            out.stride(),
            _address(samples),
            b if samples is None else samples.numel(),
            _address(found),
            1 if sums is None else sums.shape[2],
            o,
            t,
            h,
            w,
            DTYPE_CODES[panel.dtype],
            DTYPE_CODES[out.dtype],
            torch.get_num_threads(),
        )
        if sums is not None:  # the kernel writes whole rows; `sums` may be a block of them
            where = slice(None) if samples is None else samples
            sums[where] = found[where]

    def winograd(
        self,
        x: Tensor,
        spatial: Operator | None,
        temporal: Operator | None,
        out: Tensor,
        *,
        x_samples: Tensor | None = None,
        samples: Tensor | None = None,
        bias: Tensor | None = None,
        relu: bool = False,
        skip: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        outputs, *sizes = out.shape[1:]
        batch = x.shape[0] if x_samples is None else x_samples.numel()
        _C.winograd(
            x.data_ptr(),
            x.stride(),
            _address(x_samples),
            _operator(spatial),
            _operator(temporal),
            tile_sizes(batch, *sizes),
            _address(bias),
            int(relu),
            _address(skip),
            _strides(skip),
            out.data_ptr(),
            out.stride(),
            _address(samples),
            batch,
            _address(sums),
            1 if sums is None else sums.shape[2],
            outputs,
            sizes,
            DTYPE_CODES[x.dtype],
            DTYPE_CODES[(temporal if spatial is None else spatial).weight.dtype],
            DTYPE_CODES[out.dtype],
            torch.get_num_threads(),
            _address(self.stage_seconds),
        )

    def winograd_gradient(
        self,
        x: Tensor,
        grad: Tensor,
        spatial: Operator | None,
        temporal: Operator | None,
        *,
        samples: Tensor | None = None,
        add: bool = False,
    ) -> None:
        outputs, *sizes = grad.shape[1:]
        batch = x.shape[0] if samples is None else samples.numel()
        _C.winograd_gradient(
            x.data_ptr(),
            x.stride(),
            _address(samples),
            _operator(spatial),
            _operator(temporal),
            tile_sizes(batch, *sizes),
            grad.data_ptr(),
            grad.stride(),
            batch,
            outputs,
            sizes,
            DTYPE_CODES[x.dtype],
            DTYPE_CODES[(temporal if spatial is None else spatial).weight.dtype],
            DTYPE_CODES[grad.dtype],
            int(add),
            torch.get_num_threads(),
            _address(self.stage_seconds),
        )

    def gate_merge(
        self,
        dxs: Tensor | None,
        dxt: Tensor | None,
        lists: tuple[Tensor | None, Tensor | None],
        samples: Tensor | None,
        gate: Tensor,
        x: Tensor,
        dx: Tensor | None,
        dgate: Tensor | None,
    ) -> None:
        b, c, t, h, w = x.shape
        panel = dxs if dxs is not None else dxt
        gate = gate.to(x.dtype)
        gate = gate if gate.stride(1) == 1 else gate.contiguous()
        found = None if dgate is None else torch.empty((b, c), dtype=x.dtype, device=x.device)
        columns = [_columns(channels, c) for channels in lists]
        _C.gate_merge(
            _address(dxs),
            _address(columns[0]),
            0 if dxs is None else dxs.shape[-1],
            _address(dxt),
            _address(columns[1]),
            0 if dxt is None else dxt.shape[-1],
            gate.data_ptr(),
            gate.stride(0),
            x.data_ptr(),
            x.stride(),
            _address(dx),
            _strides(dx),
            _address(found),
            _address(samples),
            b if samples is None else samples.numel(),
            c,
            t,
            h,
            w,
            DTYPE_CODES[panel.dtype],
            DTYPE_CODES[x.dtype],
            torch.get_num_threads(),
        )
        if dgate is not None:
            where = slice(None) if samples is None else samples
            dgate[where] = found[where].to(dgate.dtype)


def _operator(operator: Operator | None) -> tuple[int, ...]:
    if operator is None:
        return NO_OPERATOR
    weight, scale = operator.weight, operator.scale
    return (
        _address(operator.channels) + 4 * operator.first,
        operator.count,
        _address(scale),
        0 if scale is None else scale.stride(0),
        int(operator.complement),
        weight.data_ptr() + operator.start * weight.element_size(),
        _address(operator.rows),
        _address(operator.columns),
        *operator.strides,
        int(operator.blocked),
    )


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _columns(channels: Tensor | None, count: int) -> Tensor | None:
    """The panel column of every channel, -1 where it is not listed; ``None`` for all in order."""
    if channels is None:
        return None
    columns = torch.full((count,), -1, dtype=torch.int32, device="cpu")
    columns[channels.long()] = torch.arange(channels.numel(), dtype=torch.int32, device="cpu")
    return columns


warn_if_missing()
