"""Mixed precision in plain PyTorch: bfloat16 autocast on a CPU, float16 with a gradient scaler on a GPU.

    python examples/amp.py
    python examples/amp.py --device cuda --learning upstream-downstream

Weights stay float32. Inside autocast DSTS convolves in the half type; scores, routing and sums are float32 there too.
Joint training is the usual loop. Upstream-Downstream Learning takes dtype and scaler, as its step is three passes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsts_kernels.learning import UpstreamDownstream, downstream_parameters, upstream_parameters
from examples.small import parser, report, small_model, stripes


def train_jointly(options, dtype: torch.dtype, scaler: torch.amp.GradScaler) -> list[float]:
    model, losses = small_model().to(options.device), []
    optimizer = torch.optim.AdamW(model.parameters(), options.rate)
    for _ in range(options.steps):
        clips, labels = stripes(16, options.device)
        with torch.autocast(options.device.type, dtype):
            loss = F.cross_entropy(model(clips), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # leaves out a step whose gradients overflowed
        scaler.update()
        losses.append(loss.item())
    return losses


def train_by_sides(options, dtype: torch.dtype, scaler: torch.amp.GradScaler) -> list[float]:
    model = small_model().to(options.device)
    learner = UpstreamDownstream(
        model,
        F.cross_entropy,
        upstream_optimizer=torch.optim.AdamW(upstream_parameters(model), options.rate / 4, weight_decay=0.0),
        downstream_optimizer=torch.optim.AdamW(downstream_parameters(model), options.rate),
        autocast=dtype,
        scaler=scaler,
    )
    batches = ((stripes(16, options.device), stripes(8, options.device)) for _ in range(options.steps))
    return [learner.step(train, val).train_loss for train, val in batches]


def main(arguments: list[str] | None = None) -> list[float]:
    this = parser(__doc__, steps=60)
    this.add_argument("--learning", choices=("joint", "upstream-downstream"), default="joint")
    options = this.parse_args(arguments)
    torch.manual_seed(options.seed)
    half = torch.float16 if options.device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(options.device.type, enabled=half == torch.float16)  # bfloat16 needs none
    train = train_jointly if options.learning == "joint" else train_by_sides
    return report(train(options, half, scaler))


if __name__ == "__main__":
    main()
