"""A timm backbone that sees frames, with DSTS behind one of its modules that sees clips; trained, then frozen.

    python examples/timm_frames.py
    python examples/timm_frames.py --model resnet50 --where layer3 --size 224 --device cuda

Frames go through the backbone as a batch, ``(B*T, 3, H, W)``. ``insert_dsts(..., frames=T)`` says how many make a clip,
so that DSTS sees ``(B, C, T, H, W)``; the logits of a clip are the mean of its frames'. Weights are random.

Needs timm: ``pip install -e '.[examples]' -c constraints.txt``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsts_kernels import freeze_dsts, insert_dsts
from examples.small import CLASSES, FRAMES, SIZE, SMALL, at_least_1, parser, report, stripes


def batch(count: int, options) -> tuple[Tensor, Tensor]:
    """Frames ``(B*T, 3, size, size)`` and the labels of their clips ``(B,)``."""
    clips, labels = stripes(count, options.device)  # (B, 3, T, H, W)
    frames = clips.transpose(1, 2).flatten(0, 1)
    return F.interpolate(frames, (options.size, options.size), mode="bilinear"), labels


def classify(model: nn.Module, frames: Tensor) -> Tensor:
    return model(frames).unflatten(0, (-1, FRAMES)).mean(1)


def main(arguments: list[str] | None = None) -> list[float]:
    this = parser(__doc__, steps=120)
    this.add_argument("--model", default="test_resnet", help="any that timm.list_models() names")
    this.add_argument("--where", default="act1", help="the submodule that DSTS goes behind")
    this.add_argument("--size", type=at_least_1, default=SIZE, help="side of a frame")
    options = this.parse_args(arguments)
    torch.manual_seed(options.seed)
    if not timm.is_model(options.model):
        this.error(f"--model: got {options.model!r}, wanted one of timm.list_models()")
    model = timm.create_model(options.model, num_classes=CLASSES)
    example = (FRAMES, 3, options.size, options.size)
    try:
        insert_dsts(model, options.where, frames=FRAMES, example=example, **SMALL)
    except ValueError as error:  # no such stage, or one that does not return features
        this.error(str(error))
    model.to(options.device)
    optimizer, losses = torch.optim.AdamW(model.parameters(), options.rate), []
    for _ in range(options.steps):
        frames, labels = batch(16, options)
        loss = F.cross_entropy(classify(model, frames), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    freeze_dsts(model.eval())  # folded and packed, for inference
    frames, labels = batch(64, options)
    with torch.no_grad():
        top1 = (classify(model, frames).argmax(1) == labels).float().mean()
    print(f"top-1 of the frozen model: {top1:.1%}")
    return report(losses)


if __name__ == "__main__":
    main()
