"""What README.md and docs/plug-in.md say of backbones: code runs as it stands, on real models made small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dsts_kernels import FrozenDSTS, FusedDSTS, insert_dsts, remove_dsts
from dsts_kernels.testing import assert_close

from .counting import copies

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/plug-in.md")
FENCE = r'^```python run-by="tests/backbones/test_plug_in.py"\n(.*?)^```'


def blocks() -> list[str]:
    """The code of both pages that plugs in, block by block."""
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    return [code for text in texts for code in re.findall(FENCE, text, re.MULTILINE | re.DOTALL)]


def block(name: str) -> str:
    found = [code for code in blocks() if name in code]
    assert len(found) == 1, f"{len(found)} blocks with {name!r}"
    return found[0]


def run(code: str) -> dict[str, object]:
    """What the code leaves; drawn anew, DSTS is small."""
    names: dict[str, object] = {}
    exec(compile(code, "a page", "exec"), names)
    return names


def test_length():
    """At most 50 lines of code for all four backbones."""
    assert len(blocks()) == 4 and sum(len(code.splitlines()) for code in blocks()) <= 50


def small_resnet(num_classes: int):
    """torchvision's 3-d ResNet-18 with an eighth of its channels behind the stem."""
    from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

    class Narrow(VideoResNet):
        def _make_layer(self, block, conv_builder, planes, blocks, stride=1):
            return super()._make_layer(block, conv_builder, planes // 8, 1, stride)

    model = Narrow(BasicBlock, [Conv3DSimple] * 4, [2, 2, 2, 2], BasicStem)
    model.fc = torch.nn.Linear(64, num_classes)
    return model


@pytest.mark.needs("torchvision")
def test_r3d_18(torchvision, monkeypatch):
    """Behind a stage, and frozen."""
    monkeypatch.setattr(torchvision.models.video, "r3d_18", small_resnet)
    left = run(block("r3d_18"))
    assert left["dsts"].layers[0].in_channels == 32 and left["logits"].shape == (2, 48)
    kinds = [type(m) for m in left["model"].modules() if isinstance(m, (FusedDSTS, FrozenDSTS))]
    assert kinds == [FrozenDSTS] and left["dsts"] not in list(left["model"].modules())
    assert torch.isfinite(left["model"](torch.randn(1, 3, 8, 32, 32))).all()


@pytest.mark.needs("torchvision")
def test_swin3d_b(torchvision, monkeypatch):
    """Behind the last norm, whose channels lie last."""
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    def small(num_classes: int) -> SwinTransformer3d:
        sizes = {"embed_dim": 4, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": [8, 7, 7]}
        return SwinTransformer3d([2, 4, 4], num_classes=num_classes, **sizes)

    monkeypatch.setattr(torchvision.models.video, "swin3d_b", small)
    left = run(block("swin3d_b"))
    assert left["dsts"].layers[0].in_channels == 32 and left["logits"].shape == (1, 48)
    hook = next(iter(left["model"].norm._forward_hooks.values()))
    assert str(hook.layout) == "(B, T, H, W, 32)"
    for training in (True, False):
        left["model"].train(training)
        assert copies(left["model"].norm, torch.randn(1, 16, 7, 7, 32), backward=training) == []
    assert copies(left["model"].norm, torch.randn(1, 32, 16, 7, 7).permute(0, 2, 3, 4, 1), backward=False) != []


@pytest.mark.needs("timm")
def test_timm(torchvision, monkeypatch):
    """A ResNet that sees frames, and DSTS that sees clips."""
    import timm

    make = timm.create_model
    sizes = {"channels": (8, 16, 16, 16), "layers": (1, 1, 1, 1)}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: make(name, **options, **sizes))
    left = run(block("timm"))
    assert left["dsts"].layers[0].in_channels == 64 and left["logits"].shape == (2, 48)


@pytest.mark.needs("transformers")
def test_videomae(torchvision, monkeypatch):
    """Tokens with a grid."""
    import transformers

    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 12}
    make = transformers.VideoMAEConfig
    monkeypatch.setattr(transformers, "VideoMAEConfig", lambda **options: make(**small, **options))
    left = run(block("VideoMAE"))
    assert left["dsts"].layers[0].in_channels == 16 and left["logits"].shape == (1, 48)


@pytest.mark.needs("transformers")
def test_model_output(torchvision):
    """Behind an encoder, which returns a ``ModelOutput``: the same as behind its last layer."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    config = VideoMAEConfig(image_size=32, patch_size=8, num_frames=4, num_labels=5, **sizes)
    model = VideoMAEForVideoClassification(config).eval()
    clip = torch.randn(2, 4, 3, 32, 32)
    known = {"grid": (2, 4, 4), "example": {"pixel_values": clip}}
    with pytest.raises(
        ValueError, match=r"output: got None, .*BaseModelOutput .*'last_hidden_state': a tensor of shape"
    ):
        insert_dsts(model, "videomae.encoder", **known)
    dsts = insert_dsts(model, "videomae.encoder", output="last_hidden_state", num_neurons=3, **known)
    for layer in dsts.layers:
        torch.nn.init.normal_(layer.gate)
    behind = model(clip).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(clip).logits, behind)
    remove_dsts(model)
    assert insert_dsts(model, "videomae.encoder.layer.1", dsts=dsts, **known) is dsts
    assert_close(model(clip).logits, behind)
