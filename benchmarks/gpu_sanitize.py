"""What compute-sanitizer watches: every kernel once, on small ragged shapes.

``python -m benchmarks.gpu_sanitize`` runs a training step and a frozen evaluation of a module in each dtype, with
channels that are no multiple of a tile, planes that no tile divides, and every kind of gate. It only checks that
results are finite: their values are the business of ``tests/gpu``.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.gpu_timing import require_gpu
from dsts_kernels import Draws, FusedDSTS

CASES = (
    # channels, neurons, (B, T, H, W), dtype, options
    (40, 3, (3, 3, 7, 5), torch.bfloat16, {}),
    (33, 2, (2, 2, 5, 4), torch.float16, {"scoring_kernel": (1, 3, 3), "mixing_kernel": (1, 3, 3)}),
    (20, 2, (2, 3, 4, 4), torch.float32, {"mixing_kernel": (3, 1, 1)}),
)


def run(device: torch.device) -> None:
    """Forward and backward with soft and hard samples, then frozen; raises on a result that is not finite."""
    for channels, neurons, (batch, *grid), dtype, options in CASES:
        torch.manual_seed(0)
        kinds = {"num_layers": 2, "num_neurons": neurons, "score_reduction": "mean"} | options
        module = FusedDSTS(channels, **kinds, device=device, dtype=dtype)
        x = torch.randn(batch, channels, *grid, device=device, dtype=dtype, requires_grad=True)
        draws = Draws(
            torch.randn(2, batch, channels, device=device),
            torch.arange(batch, device=device).expand(2, -1) % 2 == 0,
            torch.randn(2, batch, neurons, device=device),
        )
        module(x, draws).square().mean().backward()
        found = [x.grad, *(p.grad for p in module.parameters())]
        frozen = module.eval().freeze()
        found += [frozen(x.detach()), frozen(x.detach().contiguous(memory_format=torch.channels_last_3d))]
        torch.cuda.synchronize(device)
        if not all(bool(torch.isfinite(t).all()) for t in found):
            raise SystemExit(f"gpu_sanitize: a result is not finite ({channels} channels, {dtype}, {options})")
        print(f"{channels} channels, {dtype}, {options or 'default'}: finite", flush=True)


def main() -> None:
    argparse.ArgumentParser(description="Every GPU kernel once, for compute-sanitizer.").parse_args()
    run(require_gpu())


if __name__ == "__main__":
    main()
