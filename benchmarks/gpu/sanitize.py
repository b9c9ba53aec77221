"""What compute-sanitizer watches: every kernel once, on small ragged shapes.

``python -m benchmarks.gpu.sanitize --backend cuda`` runs a training step and a frozen evaluation of a module in each
dtype that the backend takes, with channels that are no multiple of a tile, planes that no tile divides, and every kind
of gate; without ``--backend`` it runs both. It only checks that results are finite: their values are the business of
``tests/ops``, ``tests/test_modules.py`` and ``tests/test_frozen.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks.gpu.timing import NOT_RUN, require_gpu
from benchmarks.gpu.workload import GPU_BACKENDS, gpu_backends
from dsts_kernels import Draws, FusedDSTS

CASES = (
    # channels, neurons, (B, T, H, W), dtype, options
    (40, 3, (3, 3, 7, 5), torch.bfloat16, {}),
    (33, 2, (2, 2, 5, 4), torch.float16, {"scoring_kernel": (1, 3, 3), "mixing_kernel": (1, 3, 3)}),
    (20, 2, (2, 3, 4, 4), torch.float32, {"mixing_kernel": (3, 1, 1)}),
)


def check(backend: str, device: torch.device, case: tuple) -> None:
    """Forward and backward with soft and hard samples, then frozen; raises on a result that is not finite."""
    channels, neurons, (batch, *grid), dtype, options = case
    torch.manual_seed(0)
    kinds = {"num_layers": 2, "num_neurons": neurons, "score_reduction": "mean"} | options
    module = FusedDSTS(channels, **kinds, device=device, dtype=dtype, backend=backend)
    x = torch.randn(batch, channels, *grid, device=device, dtype=dtype, requires_grad=True)
    draws = Draws(
        torch.randn(2, batch, channels, device=device),
        torch.arange(batch, device=device).expand(2, -1) % 2 == 0,
        torch.randn(2, batch, neurons, device=device),
    )
    module(x, draws).square().mean().backward()
    results = [x.grad, *(p.grad for p in module.parameters())]
    frozen = module.eval().freeze()
    results += [frozen(x.detach()), frozen(x.detach().contiguous(memory_format=torch.channels_last_3d))]
    if not all(bool(torch.isfinite(t).all()) for t in results):
        raise SystemExit(
            f"benchmarks.gpu.sanitize: {backend}: a result is not finite ({channels} channels, {dtype}, {options})"
        )


def run(device: torch.device, backends: Sequence[str]) -> int:
    """Every case on every backend that takes its dtype; how many ran."""
    count = 0
    for backend in backends:
        ran = []
        for case in CASES:
            dtype = case[3]
            reason = gpu_backends(device, dtype)[backend]
            if reason is None:
                check(backend, device, case)
                ran.append(str(dtype).removeprefix("torch."))
        count += len(ran)
        print(f"{backend}: finite in {', '.join(ran)}" if ran else f"{backend}: not run: {reason}", flush=True)
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.sanitize", description="Every GPU kernel once, for compute-sanitizer."
    )
    parser.add_argument("--backend", action="append", choices=GPU_BACKENDS, help="of these; without it every one")
    options = parser.parse_args(arguments)
    return 0 if run(require_gpu(), options.backend or GPU_BACKENDS) else NOT_RUN


if __name__ == "__main__":
    sys.exit(main())
