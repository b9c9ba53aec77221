"""Transforms: shapes, values, and that all frames of a clip are treated alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsts_kernels.data.transforms import EvalTransform, TrainTransform, resize


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int, width: int, frames: int = 1) -> Tensor:
    return torch.randint(256, (frames, height, width, 3), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("height", "width", "side", "wanted"),
    [
        (48, 64, 24, (24, 32)),
        (64, 48, 24, (32, 24)),
        (48, 64, 96, (96, 128)),
        (48, 64, 48, (48, 64)),
        (1, 9, 2, (2, 18)),
    ],
)
def test_resize_keeps_the_aspect(height: int, width: int, side: int, wanted: tuple[int, int]):
    scaled = resize(picture(height, width, 3), side)
    assert scaled.shape == (3, *wanted, 3) and scaled.dtype == torch.uint8


def test_resize_of_one_colour_is_that_colour():
    clip = torch.tensor([10, 120, 250], dtype=torch.uint8).expand(2, 40, 60, 3)
    assert torch.equal(resize(clip, 17)[:, 0, 0], clip[:, 0, 0])
    assert (resize(clip, 17) == clip[0, 0, 0]).all()


@pytest.mark.parametrize("transform", [EvalTransform(20), TrainTransform(20)], ids=["eval", "train"])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (20, 20), (7, 9), (1, 1), (10, 300)])
def test_shape_and_range(transform: EvalTransform | TrainTransform, height: int, width: int):
    clip = transform(picture(height, width, 4), generator(0))
    assert clip.shape == (3, 4, 20, 20) and clip.dtype == torch.float32 and clip.is_contiguous()
    assert -2 <= clip.min() and clip.max() <= 2


def test_eval_is_the_middle_normalised():
    clip = picture(30, 50, 2)
    wanted = (clip[:, :, 10:40].permute(3, 0, 1, 2).float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(EvalTransform(30)(clip), wanted)


@pytest.mark.parametrize("seed", range(5))
def test_all_frames_alike(seed: int):
    clip = picture(48, 64).expand(6, -1, -1, -1)
    changed = TrainTransform(24)(clip, generator(seed))
    assert torch.equal(changed, changed[:, :1].expand_as(changed))


def test_training_depends_on_the_generator_only():
    clip, transform = picture(48, 64, 2), TrainTransform(24)
    first = transform(clip, generator(1))
    torch.rand(3)
    assert torch.equal(first, transform(clip, generator(1)))
    assert not torch.equal(first, transform(clip, generator(2)))


def test_input_is_left_as_it_was():
    clip = picture(24, 24, 2)
    before = clip.clone()
    TrainTransform(24, scale=(1.0, 1.0))(clip, generator(0))
    EvalTransform(24)(clip)
    assert torch.equal(clip, before)


def test_flip_is_a_mirror_image():
    clip = picture(24, 24, 2)
    kept = TrainTransform(24, scale=(1.0, 1.0), flip=0.0, jitter=0.0)
    mirrored = TrainTransform(24, scale=(1.0, 1.0), flip=1.0, jitter=0.0)
    for seed in range(20):
        if torch.equal(kept(clip, generator(seed)), EvalTransform(24)(clip)):
            assert torch.equal(mirrored(clip, generator(seed)), EvalTransform(24)(clip).flip(3))
            return
    pytest.fail("no seed of twenty kept the whole picture")


def test_jitter_within_its_bounds():
    gray = torch.full((2, 24, 24, 3), 100, dtype=torch.uint8)
    level = [float(TrainTransform(8, jitter=0.2)(gray, generator(seed)).mean()) for seed in range(50)]
    bounds = [(100 / 255 * factor - 0.5) / 0.25 for factor in (0.8, 1.2)]
    assert bounds[0] - 1e-5 <= min(level) < max(level) <= bounds[1] + 1e-5
    assert max(level) - min(level) > 0.7 * (bounds[1] - bounds[0])


def test_crops_cover_the_stated_share():
    transform = TrainTransform(8, scale=(0.6, 1.0))
    for seed in range(50):
        top, left, height, width = transform._crop(100, 120, generator(seed))
        assert 0 <= top <= 100 - height and 0 <= left <= 120 - width
        assert 0.58 <= height * width / 12000 <= 1.0 and 0.73 <= width / height <= 1.36


@pytest.mark.parametrize(
    "clip",
    [torch.zeros(2, 8, 8, 3), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, 8, 8, 3, dtype=torch.uint8)],
    ids=["float", "channels first", "no frame"],
)
def test_not_a_clip(clip: Tensor):
    for transform in (EvalTransform(8), TrainTransform(8), lambda clip: resize(clip, 8)):
        with pytest.raises(ValueError, match=r"clip: wanted \(T, H, W, 3\) uint8, got"):
            transform(clip)


@pytest.mark.parametrize(
    ("argument", "value"), [("size", 0), ("scale", (0.0, 1.0)), ("scale", (0.8, 0.6)), ("flip", 1.5), ("jitter", 1.0)]
)
def test_bad_arguments(argument: str, value: object):
    with pytest.raises(ValueError, match=f"{argument}: wanted"):
        TrainTransform(**{"size": 8, argument: value})
