"""Where the Gluon convolution runs: its switch, the chip, the dtype, and how full its waves are."""

from __future__ import annotations

import functools
import sys

import pytest
import torch

from benchmarks.gpu import first_run
from dsts_kernels.backends import BACKENDS, explain
from dsts_kernels.backends.gpu import measured
from dsts_kernels.backends.gpu.switches import current, switched
from dsts_kernels.backends.triton.gluon import plan
from dsts_kernels.backends.triton.gluon.plan import wave_grid

from ..support.targets import INTERPRETED, require_triton

require_triton()
from dsts_kernels.backends.triton import load, tuning  # noqa: E402

TPN, SWIN, H100 = (8, 16, 16), (16, 7, 7), 132


@pytest.mark.parametrize(
    "batch, size, outputs, columns, waves",
    [
        (8, TPN, 1024, 256, 4),  # 512 tiles: the last wave is 88% full
        (32, TPN, 1024, 256, 16),
        (8, SWIN, 1024, 256, 2),  # 224 tiles in room for 264
        (1, TPN, 1024, 128, 1),  # 64 tiles would leave half of the chip idle, 128 do not
        (1, SWIN, 1024, None, None),  # 56 tiles: the older kernel shares them out
        (8, TPN, 64, None, None),  # narrower than a tile
        (64, (1, 4, 4), 1024, None, None),  # fewer positions than a tile has
        (8, (1, 8, 16), 4160, 128, 2),  # 136 tiles of 256 fill half of two waves, 264 of 128 all of them
    ],
)
def test_waves(batch, size, outputs, columns, waves):
    grid = wave_grid(H100, batch, size, outputs, 17 * 9)
    if columns is None:
        assert grid is None
        return
    assert (grid.tile.n, grid.waves) == (columns, waves)
    tiles = batch * grid.tiles.per_sample
    assert grid.ctas == min(H100, tiles) and tiles >= plan.LEAST_FILL * waves * H100
    assert grid.arrival_counters == batch * -(-outputs // columns)
    assert grid.box.t * grid.box.h * grid.box.w == grid.tile.m


@pytest.mark.parametrize(
    "capability, dtype, says",
    [
        ((8, 0), torch.bfloat16, "it needs compute capability 9.0, this GPU has 8.0"),
        ((10, 0), torch.bfloat16, "it needs compute capability 9.0, this GPU has 10.0"),
        ((9, 0), torch.float32, "it multiplies half types, not torch.float32"),
        ((9, 0), torch.float16, None),
        ((9, 0), torch.bfloat16, None),
    ],
)
def test_why_not(capability, dtype, says):
    assert plan.unfit(capability, dtype) == says
    assert plan.why_not(capability, dtype) == says
    with switched(gluon_conv=False):
        assert plan.why_not(capability, dtype) == (says or "its switch gluon_conv is off")


def test_a_triton_without_gluon(monkeypatch):
    monkeypatch.setattr(plan, "has_gluon", lambda: False)
    assert plan.unfit((9, 0), torch.bfloat16) == "this triton has no triton.experimental.gluon"


def test_the_switches_are_on_by_default():
    """They ran on an H200 and were faster; the gather was not."""
    assert current().gluon_conv and current().gluon_data_gradient and current().gluon_weight_gradient
    assert not current().gluon_gather
    with pytest.raises(TypeError, match="gluon_convolution"), switched(gluon_convolution=True):
        pass


@pytest.fixture
def fresh_capability():
    """What is kept of devices is for this test alone."""
    measured.capability.cache_clear()
    yield
    measured.capability.cache_clear()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_explain(capability, monkeypatch, fresh_capability):
    """Of a frozen layer it is said which kernel runs, and why not this one; of another op nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(type(BACKENDS["triton"]), "why_not", lambda *arguments: None)
    assert "Gluon" not in explain("tap_sums", "cuda", torch.bfloat16)
    parts = {
        "gluon_conv": ("convolution", ("frozen_layer",)),
        "gluon_data_gradient": ("gradients of features and gates", ("gated_conv3d",)),
        "gluon_weight_gradient": ("gradients of filters", ("gated_conv3d", "mixing_conv3d")),
    }
    for switch, (what, ops) in parts.items():
        for on in (True, False):
            with switched(**{switch: on}):
                texts = [explain(op, "cuda", torch.bfloat16) for op in ops]
                reason = plan.why_not(capability, torch.bfloat16, switch)
            assert (reason is None) == (on and capability == (9, 0))
            says = f"its {what} in Gluon" if reason is None else f"its {what} not in Gluon: {reason}"
            assert all(says in text for text in texts), texts


@pytest.fixture
def on_hopper(monkeypatch):
    launch = load("launch")
    monkeypatch.setattr(launch, "chip", lambda device: ("sm_90", H100))
    launch.gluon_runs.cache_clear()
    yield functools.partial(load("conv").conv_grid, torch.empty(8, 1024, *TPN, dtype=torch.bfloat16), 1024, 1088, 9, 1)
    launch.gluon_runs.cache_clear()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has tiles of its own")
def test_which_grid_a_convolution_has(on_hopper):
    """Gluon's where the switch is on and filters are packed; a tile that is asked for by name runs as it is."""
    with switched(gluon_conv=False):
        assert isinstance(on_hopper(packed=True), tuning.ConvGrid)
    assert isinstance(on_hopper(packed=True), plan.WaveGrid)
    assert isinstance(on_hopper(), tuning.ConvGrid)
    with tuning.forced(conv=tuning.CANDIDATES["half"]["sm_90"]["conv"][0]):
        assert isinstance(on_hopper(packed=True), tuning.ConvGrid)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has tiles of its own")
def test_where_gradients_run(on_hopper):
    """Where the switch is on, rows are whole 16 bytes and a tile fits; gates that are frozen take the older kernel."""
    data, weight = load("data_gradient"), load("weight_gradient")
    x = torch.empty(8, *TPN, 1024, dtype=torch.bfloat16, device="meta").permute(0, 4, 1, 2, 3)
    grad, filters = x.permute(0, 2, 3, 4, 1), torch.empty(96, 1024, 1024, dtype=torch.bfloat16, device="meta")
    with switched(gluon_data_gradient=False, gluon_weight_gradient=False):
        assert data.wave_grid(x, grad, filters) is None and weight.gluon_tile(grad, grad, 1024) is None
    grid = data.wave_grid(x, grad, filters)
    assert (grid.tile.n, grid.waves) == (256, 4)
    assert weight.gluon_tile(grad, grad, 1024) == plan.WEIGHT_TILES[0]
    assert weight.gluon_tile(grad, grad[..., :128], 1024) == plan.WEIGHT_TILES[1]
    assert weight.gluon_tile(grad, grad[..., :64], 1024) is None, "narrower than a tile"
    assert weight.gluon_tile(grad[:, :1, :1], grad[:, :1, :1], 1024) is None, "fewer positions than a step"
    assert weight.gluon_tile(grad[..., :1020], grad, 1020) is None, "rows of no whole 16 bytes"
    assert data.wave_grid(x.float(), grad, filters) is None
    tiles = tuning.CANDIDATES["half"]["sm_90"]
    with tuning.forced(**{name: tiles[name][0] for name in ("data_gradient", "weight_gradient")}):
        assert data.wave_grid(x, grad, filters) is None and weight.gluon_tile(grad, grad, 1024) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_first_run_without_a_gpu():
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        first_run.main([])


def test_a_child_that_hangs_is_killed(monkeypatch):
    """The parent does not wait for longer than it was told, and says what the child said last."""
    hang = "import sys, time; print('launching', flush=True); time.sleep(60)"
    monkeypatch.setattr(first_run, "command", lambda name: [sys.executable, "-c", hang])
    ok, text = first_run.watched("small", 2.0)
    assert not ok and "launching" in text and "killed after 2 s" in text
    monkeypatch.setattr(first_run, "command", lambda name: [sys.executable, "-c", "print('right')"])
    assert first_run.watched("small", 20.0) == (True, "right")
