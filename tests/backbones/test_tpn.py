"""TPN: names and shapes of its state, its steps against a literal version, the features that the paper's DSTS reads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsts_kernels import FusedDSTS
from dsts_kernels.backbones import TPN, TPNOutput, classification_loss, tpn_slowonly_r50
from dsts_kernels.backbones.tpn import TemporalPyramid

from .literal import LiteralTPN

Names = Iterator[tuple[str, tuple[int, ...]]]
SMALL = {"width": 4, "blocks": (1, 2, 2, 1), "aux_logits": True}
PUBLISHED_PARAMETERS = 91_498_336  # as mmaction2 lists it for this model, with the auxiliary head


def convolution(name: str, outputs: int, inputs: int, *kernel: int, norm: bool = True) -> Names:
    yield f"{name}.conv.weight", (outputs, inputs, *kernel)
    if norm:
        for own in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.bn.{own}", (outputs,)
        yield f"{name}.bn.num_batches_tracked", ()


def linear(name: str, outputs: int, inputs: int) -> Names:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def backbone_names() -> Names:
    yield from convolution("conv1", 64, 3, 1, 7, 7)
    inputs = 64
    for stage, (blocks, width, frames) in enumerate(((3, 64, 1), (4, 128, 1), (6, 256, 3), (3, 512, 3)), 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            yield from convolution(f"{name}.conv1", width, inputs, frames, 1, 1)
            yield from convolution(f"{name}.conv2", width, width, 1, 3, 3)
            yield from convolution(f"{name}.conv3", 4 * width, width, 1, 1, 1)
            if block == 0:
                yield from convolution(f"{name}.downsample", 4 * width, inputs, 1, 1, 1)
            inputs = 4 * width


def fusion_names(name: str) -> Names:
    for level in range(2):
        yield from convolution(f"{name}.downsamples.{level}.conv", 1024, 32, 1, 1, 1)
    yield from convolution(f"{name}.fusion_conv", 2048, 2048, 1, 1, 1)


def neck_names() -> Names:
    for level in range(2):
        yield from convolution(f"temporal_modulation_ops.{level}.conv", 1024, 64, 3, 1, 1, norm=False)
    yield from convolution("downsample_ops.0.conv", 1024, 1024, 3, 1, 1, norm=False)
    yield from fusion_names("level_fusion_1")
    yield from convolution("spatial_modulation.spatial_modulation.0.0", 2048, 1024, 1, 3, 3)
    yield from fusion_names("level_fusion_2")
    yield from convolution("pyramid_fusion", 2048, 4096, 1, 1, 1)


def aux_names(num_classes: int) -> Names:
    yield from convolution("aux_head.conv", 2048, 1024, 1, 3, 3)
    yield from linear("aux_head.fc", num_classes, 2048)


@pytest.mark.parametrize("aux", [False, True])
def test_names_and_shapes_are_the_published_ones(aux):
    """318 tensors of the backbone, 51 of the neck and 8 of its auxiliary head, in mmaction2's order."""
    backbone, neck, head = list(backbone_names()), list(neck_names()), list(linear("cls_head.fc_cls", 400, 2048))
    assert (len(backbone), len(neck), len(list(aux_names(400)))) == (318, 51, 8)
    wanted = [(f"backbone.{name}", shape) for name, shape in backbone]
    wanted += [(f"neck.{name}", shape) for name, shape in (*neck, *(aux_names(400) if aux else ()))]
    with torch.device("meta"):
        model = tpn_slowonly_r50(400, aux_logits=aux)
    assert [(name, tuple(value.shape)) for name, value in model.state_dict().items()] == wanted + head
    if aux:
        assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS


def test_features_are_the_papers():
    """8 frames of 256x256: 1024 x 8 x 16 x 16 behind stage 3, where DSTS goes."""
    with torch.device("meta"):
        model = tpn_slowonly_r50(48).eval()
        middle, top = model.backbone(torch.empty(2, 3, 8, 256, 256))
        logits = model(torch.empty(2, 3, 8, 256, 256))
    assert middle.shape == (2, 1024, 8, 16, 16)
    assert top.shape == (2, 2048, 8, 8, 8)
    assert logits.shape == (2, 48)


def randomised(model: nn.Module) -> nn.Module:
    """In float64, with weights and statistics that hide no step: norms of 1 and 0 would."""
    with torch.no_grad():
        for name, value in model.double().state_dict().items():
            if name.endswith(("bn.weight", "running_var")):
                value.uniform_(0.5, 1.5)
            elif value.dim() > 1:
                value.normal_(std=(2 / value[0].numel()) ** 0.5)
            elif value.is_floating_point():
                value.normal_(std=0.2)
    return model


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("flow", ["cascade", "parallel"])
def test_against_the_literal_version(flow, training):
    """Logits of both heads and every gradient; odd sizes, and frames that fill one window of the neck and a part."""
    model = randomised(TPN(5, flow=flow, dropout=0.0, **SMALL)).train(training)
    clips = torch.randn(2, 3, 9, 37, 50, dtype=torch.float64)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    leaves = {name: state[name].requires_grad_() for name, _ in model.named_parameters()}
    logits, aux = LiteralTPN(state, training, flow)(clips)
    ours = model(clips)
    if not training:
        assert isinstance(ours, torch.Tensor)
        torch.testing.assert_close(ours, logits)
        return
    torch.testing.assert_close(ours.logits, logits)
    torch.testing.assert_close(ours.aux_logits, aux)
    labels = torch.tensor([3, 0])
    classification_loss(ours, labels).backward()
    (F.cross_entropy(logits, labels) + 0.5 * F.cross_entropy(aux, labels)).backward()
    for name, parameter in model.named_parameters():
        assert leaves[name].grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, leaves[name].grad, msg=lambda text, name=name: f"{name}: {text}")


def test_temporal_pool():
    """Maxima over two frames, the last one by itself; 1 is none."""
    levels = torch.randn(1, 32, 5, 4, 4), torch.randn(1, 64, 5, 2, 2)
    for pool, frames in ((1, 5), (2, 3), (8, 1)):
        assert TemporalPyramid(32, temporal_pool=pool)(*levels).shape == (1, 64, frames, 2, 2)


def test_all_that_follows_reads_stage_3():
    """DSTS behind ``backbone.layer3`` acts on stage 4, the neck and the auxiliary head."""
    model = randomised(TPN(5, dropout=0.0, **SMALL)).train()
    dsts = FusedDSTS(64, num_layers=1, num_neurons=2, noise_std=0.0).double()
    clips = torch.randn(2, 3, 3, 40, 40, dtype=torch.float64)
    before = model(clips)
    model.backbone.layer3.register_forward_hook(lambda module, inputs, output: dsts(output))
    after = model(clips)
    for old, new in zip(before, after, strict=True):
        assert not torch.allclose(old, new)
    classification_loss(after, torch.tensor([1, 2])).backward()
    assert all(parameter.grad is not None for parameter in (*model.parameters(), *dsts.parameters()))
    model.backbone.layer3.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
    for logits in model(clips):
        torch.testing.assert_close(logits[0], logits[1])  # nothing of a clip comes another way


def test_auxiliary_logits_in_training_only():
    clips = torch.randn(2, 3, 2, 32, 32)
    model = TPN(5, **SMALL)
    output = model.train()(clips)
    assert isinstance(output, TPNOutput)
    assert output.logits.shape == output.aux_logits.shape == (2, 5)
    assert isinstance(model.eval()(clips), torch.Tensor)
    plain = TPN(5, **{**SMALL, "aux_logits": False}).train()
    plain(clips).sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())  # none is unused, as DDP wants it


def test_classification_loss():
    first, second, labels = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 3, 1])
    assert torch.equal(classification_loss(first, labels), F.cross_entropy(first, labels))
    both = classification_loss(TPNOutput(first, second), labels, aux_weight=0.25)
    torch.testing.assert_close(both, F.cross_entropy(first, labels) + 0.25 * F.cross_entropy(second, labels))
    with pytest.raises(TypeError, match="output: got tuple, wanted logits"):
        classification_loss((first, second), labels)


def test_starts_as_published():
    """A new block is its shortcut; convolutions of the neck are uniform, linear layers of 0.01."""
    model = TPN(300, **SMALL)
    assert not any(parameter.any() for name, parameter in model.named_parameters() if name.endswith("conv3.bn.weight"))
    spatial = model.neck.spatial_modulation.spatial_modulation[0][0].conv.weight  # (128, 64, 1, 3, 3)
    bound = (6 / ((64 + 128) * 9)) ** 0.5
    assert 0.98 * bound < spatial.abs().max() <= bound
    stem = model.backbone.conv1.conv.weight
    assert stem.std().item() == pytest.approx((2 / (4 * 49)) ** 0.5, rel=0.2)
    for linear in (model.cls_head.fc_cls, model.neck.aux_head.fc):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert not linear.bias.any()


def test_dropout():
    """Before both linear layers, in training alone."""
    model = TPN(5, dropout=0.5, **SMALL).train()
    clips = torch.randn(2, 3, 2, 32, 32)
    first, second = model(clips), model(clips)
    assert not torch.equal(first.logits, second.logits)
    assert not torch.equal(first.aux_logits, second.aux_logits)
    model.eval()
    assert torch.equal(model(clips), model(clips))


@pytest.mark.parametrize(
    "clips, error, message",
    [
        (torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8), TypeError, r"torch.uint8, wanted a floating tensor \(B, 3"),
        (torch.zeros(3, 2, 8, 8), ValueError, r"wanted shape \(B, 3, T, H, W\), no side 0; unsqueeze\(0\)"),
        (torch.zeros(1, 2, 3, 8, 8), ValueError, r"transpose\(1, 2\) makes them so"),
        (torch.zeros(1, 2, 8, 8, 3), ValueError, r"permute\(0, 4, 1, 2, 3\) makes them so"),
        (torch.zeros(1, 3, 0, 8, 8), ValueError, r"got a tensor of shape \(1, 3, 0, 8, 8\)"),
        ("clip.mp4", TypeError, r"clips: got str 'clip.mp4'"),
    ],
)
def test_bad_clips(clips, error, message):
    with pytest.raises(error, match=message):
        TPN(5, **SMALL)(clips)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_classes": 0}, "num_classes: got 0, wanted at least 1"),
        ({"width": 3}, "width: got 3, wanted a multiple of 2"),
        ({"blocks": (1, 1, 1)}, r"blocks: got \(1, 1, 1\), wanted at least 1 for each of 4"),
        ({"blocks": (1, 0, 1, 1)}, "blocks: got"),
        ({"flow": "up"}, "flow: got 'up', wanted one of 'cascade', 'parallel'"),
        ({"temporal_pool": 0}, "temporal_pool: got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TPN(**{"num_classes": 5, **SMALL, **options})


def test_bad_neck():
    with pytest.raises(ValueError, match="channels: got 48, wanted a multiple of 32"):
        TemporalPyramid(48)
