"""Backbones by name: each as stated, with weights or without, torchvision's by its own account."""

from __future__ import annotations

import sys
from functools import cache

import pytest
import torch
from torch import nn

from dsts_kernels.backbones import BACKBONES, Backbone, create, swin3d_b
from tests.support.torchvision_ops import torchvision

OF_TORCHVISION = [
    pytest.param(backbone, id=backbone.name, marks=pytest.mark.needs("torchvision"))
    for backbone in BACKBONES.values()
    if backbone.torchvision
]
OURS = [pytest.param(backbone, id=backbone.name) for backbone in BACKBONES.values() if not backbone.torchvision]
ALL = [*OURS, *OF_TORCHVISION]
SMALL = {"tpn": {"width": 2, "blocks": (1, 1, 1, 1)}, "tiny": {"width": 2}}


@cache
def on_meta(name: str, num_classes: int) -> nn.Module:
    """Without memory or time."""
    if BACKBONES[name].torchvision:
        torchvision()
    with torch.device("meta"):
        return create(name, num_classes).eval()


@pytest.mark.parametrize("backbone", ALL)
def test_features_and_logits(backbone: Backbone):
    """DSTS's place gives features of the channels and the layout that are stated, at the size that is stated."""
    model, seen = on_meta(backbone.name, 5), []
    handle = model.get_submodule(backbone.where).register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape)
    )
    clips = torch.empty(2, 3, backbone.frames, backbone.size, backbone.size, device="meta")
    assert model(clips).shape == (2, 5)
    handle.remove()
    (shape,) = seen
    assert len(shape) == 5 and shape[0] == 2
    assert shape[{"BCTHW": 1, "BTHWC": 4}[backbone.layout]] == backbone.channels


@pytest.mark.parametrize(
    "name, shape",
    [
        ("tpn", (1, 1024, 8, 16, 16)),
        pytest.param("swin3d_b", (1, 16, 7, 7, 1024), marks=pytest.mark.needs("torchvision")),
    ],
)
def test_the_papers_features(name, shape):
    model, seen = on_meta(name, 5), []
    handle = model.get_submodule(BACKBONES[name].where).register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    size = {"tpn": (8, 256, 256), "swin3d_b": (32, 224, 224)}[name]
    model(torch.empty(1, 3, *size, device="meta"))
    handle.remove()
    assert seen[0].shape == shape
    assert seen[0].is_contiguous()


@pytest.mark.parametrize("backbone", ALL)
def test_head_is_what_depends_on_the_classes(backbone: Backbone):
    five, six = (on_meta(backbone.name, classes).state_dict() for classes in (5, 6))
    assert five.keys() == six.keys()
    differing = [name for name in five if five[name].shape != six[name].shape]
    assert differing
    assert differing == [name for name in five if name.startswith(backbone.head)]


@pytest.mark.parametrize("backbone", OF_TORCHVISION)
def test_clips_are_those_of_the_published_weights(backbone: Backbone):
    published = torchvision().models.get_model_weights(backbone.name)["DEFAULT"]
    preset = published.transforms()
    assert (tuple(preset.mean), tuple(preset.std)) == (backbone.mean, backbone.std)
    assert preset.crop_size == [backbone.size] * 2
    assert f"`clip_len={backbone.frames}`" in published.meta["_docs"]


@pytest.mark.parametrize("backbone", OURS)
def test_width(backbone: Backbone):
    """The features follow it; by default it is what is stated."""
    options = dict(SMALL[backbone.name], width=2 * SMALL[backbone.name]["width"])
    model, seen = create(backbone.name, 3, **options).eval(), []
    model.get_submodule(backbone.where).register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(torch.randn(1, 3, 8, 32, 32))
    assert seen[0][1] == backbone.channels_of(options["width"]) != backbone.channels
    assert backbone.channels_of() == backbone.channels == backbone.channels_of(backbone.width)


@pytest.mark.parametrize("backbone", OURS)
def test_ours_with_weights(tmp_path, backbone: Backbone):
    name, options, path = backbone.name, SMALL[backbone.name], tmp_path / "weights.pth"
    head, channels = {"tpn": ("cls_head.fc_cls", 64), "tiny": ("classifier", 8)}[name]
    model = create(name, 5, **options, **({"aux_logits": True} if name == "tpn" else {}))
    torch.save({"state_dict": model.state_dict()}, path)
    wanted = model.state_dict()
    again = create(name, 5, weights=path, **options)
    assert all(torch.equal(value, wanted[key]) for key, value in again.state_dict().items())
    other = create(name, 6, weights=path, new_head=True, **options)
    assert other.get_submodule(head).out_features == 6
    body = [key for key in other.state_dict() if not key.startswith(backbone.head)]
    assert body and all(torch.equal(other.state_dict()[key], wanted[key]) for key in body)
    with pytest.raises(ValueError, match=rf"{head}.weight: got \(5, {channels}\), wanted \(6, {channels}\)"):
        create(name, 6, weights=path, **options)


@pytest.mark.needs("torchvision")
def test_published_weights_by_name(monkeypatch):
    """All but the head for other classes, and only where that was asked for."""
    models = torchvision().models
    theirs = models.get_model("mc3_18").state_dict()
    asked = []

    def downloaded(self, **options):
        asked.append((self.name, options))
        return theirs

    monkeypatch.setattr(models.get_model_weights("mc3_18"), "get_state_dict", downloaded)
    whole = create("mc3_18", 400, weights="DEFAULT").state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in whole.items())
    model = create("mc3_18", 5, weights="KINETICS400_V1", new_head=True)
    assert model.fc.out_features == 5
    assert torch.equal(model.layer4[0].conv1[0].weight, theirs["layer4.0.conv1.0.weight"])
    assert asked == 2 * [("KINETICS400_V1", {"progress": True, "check_hash": True})]
    with pytest.raises(ValueError, match=r"KINETICS400_V1: .* wanted \(5, 512\).*new_head=True"):
        create("mc3_18", 5, weights="KINETICS400_V1")


@pytest.mark.needs("torchvision")
def test_weights_of_torchvision_from_a_file(tmp_path):
    theirs = torchvision().models.get_model("mc3_18", num_classes=5).state_dict()
    torch.save(theirs, tmp_path / "state.pth")
    model = create("mc3_18", 5, weights=tmp_path / "state.pth")
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"state.pth: is no state of this model"):
        create("r3d_18", 5, weights=tmp_path / "state.pth")
    with pytest.raises(
        FileNotFoundError, match="weights: got 'BEST', wanted a file, or one of KINETICS400_V1, DEFAULT"
    ):
        create("mc3_18", 5, weights="BEST")


@pytest.mark.needs("torchvision")
def test_options_reach_torchvision():
    torchvision()
    with torch.device("meta"):
        model = swin3d_b(5, dropout=0.25)
    assert model.pos_drop.p == 0.25
    assert model.head.out_features == 5


def test_bad_arguments(monkeypatch):
    with pytest.raises(ValueError, match="name: got 'tnp', wanted one of tpn, swin3d_b"):
        create("tnp", 5)
    with pytest.raises(ValueError, match="num_classes: got 0"):
        create("r3d_18", 0)
    with pytest.raises(ValueError, match="new_head: got True without weights"):
        create("tpn", 5, new_head=True)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(
        ImportError, match=r"torchvision: cannot be imported \(.*pip install 'dsts_kernels\[backbones\]'"
    ):
        create("r3d_18", 5)
