"""The picture of a video: its frames, a cell for every layer, classes, and all windows over time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsts_kernels import viz
from dsts_kernels.classify import Classification, Times, WindowResult
from dsts_kernels.data import Window
from dsts_kernels.viz.clips import DIMMED, picture_row
from dsts_kernels.viz.style import neuron_color

pytestmark = pytest.mark.needs("matplotlib")
NAMES = ("a dive with a very long name that goes on and on and on", "tuck", "split", "arch")


def made(windows: int, layers: int = 2, *, kept: int = 3, trained: bool = True, size: tuple[int, int] = (20, 30)):
    results = []
    for index in range(windows):
        frames = torch.full((7, *size, 3), 200, dtype=torch.uint8) if index < kept else None
        neurons = tuple((index + layer) % 12 for layer in range(layers))
        probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1]).roll(index)
        spatial = tuple(0.25 + 0.5 * layer for layer in range(layers))
        results.append(WindowResult(Window(2.0 * index, 2.0 * index + 2), probabilities, neurons, spatial, frames))
    return Classification(Path("dive.mp4"), NAMES, tuple(results), (), Times(1, 2, 3), trained)


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_rows():
    """A row a window that was kept: its seconds, frames, neurons, spatial channels and three classes."""
    fig = viz.plot_classification(made(5))
    rows, strip = fig.axes
    assert [tick.get_text() for tick in rows.get_yticklabels()] == [f"{2 * i}.0 to {2 * i + 2}.0 s" for i in range(3)]
    assert len(rows.images) == 3 and len(rows.patches) == 6
    found = texts(rows)
    assert found[:5] == [
        "0",
        "25% spatial",
        "1",
        "75% spatial",
        "40%  a dive with a very long name…\n30%  tuck\n20%  split",
    ]
    from matplotlib.colors import to_hex

    colors = [to_hex(patch.get_facecolor()).upper() for patch in rows.patches[:2]]
    assert colors == [neuron_color(0), neuron_color(1)]
    assert texts(strip) == ["0", "1", "2", "3", "4", "1", "2", "3", "4", "5"]
    assert strip.get_xlim() == (0, 10) and strip.get_xlabel() == "seconds; neurons of all 5 windows"
    assert "dive.mp4" in fig.get_suptitle()


def test_one_window_has_no_strip():
    assert len(viz.plot_classification(made(1)).axes) == 1


def test_without_dsts_and_at_random():
    """No cells and no classes where there is nothing to say."""
    (rows,) = viz.plot_classification(made(4, layers=0)).axes
    assert len(rows.patches) == 0 and len(texts(rows)) == 3
    fig = viz.plot_classification(made(4, trained=False))
    assert not any("tuck" in text for text in texts(fig.axes[0]))
    assert any("random weights" in text.get_text() for text in fig.texts)


def test_many_windows_are_numbered_beside_the_strip():
    strip = viz.plot_classification(made(200)).axes[1]
    assert texts(strip) == ["neurons", *map(str, range(12))]


def test_everything_is_within_the_picture():
    """Texts of every kind of picture end within it, also for high and wide frames."""
    for found in (made(1), made(200), made(9, 5, kept=9), made(2, size=(40, 9)), made(2, size=(9, 400)), made(3, 0)):
        fig = viz.plot_classification(found)
        fig.draw_without_rendering()
        width, height = fig.get_size_inches() * fig.dpi
        artists = [*fig.texts, fig._suptitle]
        artists += [
            text for axes in fig.axes for text in (*axes.texts, *axes.get_yticklabels(), *axes.get_xticklabels())
        ]
        for text in artists:
            box = text.get_window_extent()
            assert -1 <= box.x0 and box.x1 <= width + 1 and -1 <= box.y0 and box.y1 <= height + 1, text


def test_what_the_model_does_not_see_is_dark():
    frames = torch.full((2, 10, 16, 3), 200, dtype=torch.uint8)
    row = picture_row(frames)
    assert row.shape == (10, 16 + 1 + 16, 3)
    assert (row[:, 3:13] == 200).all() and (row[:, 16] == 255).all()
    assert (row[:, :3] == int(200 * DIMMED)).all() and (row[:, 13:16] == int(200 * DIMMED)).all()
    assert picture_row(torch.zeros(9, 4, 400, 3, dtype=torch.uint8)).shape == (4, 5 * 8 + 4, 3)


def test_no_frames():
    with pytest.raises(ValueError, match=r"found: got no frames, wanted some: classifier\(path, keep=12\)"):
        viz.plot_classification(made(2, kept=0))
