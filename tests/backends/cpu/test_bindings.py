"""What the native module says of itself, and what it refuses: by name, before anything is written."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from dsts_kernels.backends.base import DTYPE_CODES
from dsts_kernels.backends.build import build_record
from dsts_kernels.backends.passes import Epilogue, GradientPanel
from dsts_kernels.backends.winograd import SPATIAL_TILES, TEMPORAL_TILES

from .support import _C, check_threads, empty, filled, panel_of

pytestmark = pytest.mark.usefixtures("isa", "one_thread")


class Described:
    """A tensor that says something else of itself."""

    def __init__(self, tensor: torch.Tensor, **changed: object) -> None:
        self.tensor, self.changed = tensor, changed

    def __getattr__(self, name: str) -> object:
        value = getattr(self.tensor, name)
        return self.changed.get(name, value) if not callable(value) else lambda: self.changed.get(name, value())


def test_large_inputs_do_not_depend_on_threads():
    """Above the single-thread threshold, where threads really run, every reduction is the same."""
    shape = (2, 70, 8, 16, 16)
    z, x, gate = torch.randn(shape), filled(shape, torch.float32, "channels_last"), torch.rand(shape[:2])
    panel = panel_of(z)

    def run(threads: int) -> tuple[torch.Tensor, ...]:
        out, sums = empty(shape, torch.float32), torch.full((2, 70, 9), torch.nan)
        _C.epilogue(panel, None, Epilogue(out, relu=True, skip=x, sums=sums), threads)
        dx, dgate = empty(shape, torch.float32), torch.full((2, 70), torch.nan)
        _C.gate_merge(GradientPanel(panel, None), GradientPanel(panel, None), None, gate, x, dx, dgate, threads)
        found = [torch.full((2, 70, 9), torch.nan) for _ in range(2)]
        for source, sums_of in zip((x, z), found, strict=True):
            _C.tap_sums(source, sums_of, threads)
        return out, sums, dx, dgate, *found

    check_threads(run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"x": torch.zeros(2, 3, 1, 2, 2, dtype=torch.int8)},
            "tap_sums: x has dtype torch.int8; wanted one of float",
        ),
        ({"x": torch.zeros(2, 3, 1, 2, 2, dtype=torch.int64)}, "x has dtype int64; wanted one of float32"),
        ({"x": torch.zeros(2, 3, 2, 2)}, "x has 4 dimensions; wanted 5"),
        ({"x": torch.zeros(2, 4, 1, 2, 2)}, "out has C = 3; wanted 4"),
        ({"x": torch.zeros(2, 3, 1, 2, 2, dtype=torch.float64)}, "out has dtype float32; wanted float64"),
        ({"x": None}, "x is None; wanted a tensor"),
        ({"x": Described(torch.zeros(2, 3, 1, 2, 2), stride=(1, 1, 1, 1, -1))}, "x has a negative stride"),
        ({"x": Described(torch.zeros(2, 3, 1, 2, 2), data_ptr=0)}, "x has no memory"),
        ({"out": torch.full((2, 3, 3), 7.0)}, "taps is 3; wanted 1 or 9"),
        ({"out": torch.full((2, 3, 18), 7.0)[:, :, ::2]}, "out has gaps; wanted a contiguous tensor"),
        ({"threads": 0}, "threads is 0; wanted 1 or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_tensors(arguments, message):
    """Shapes, dtypes, strides and threads of one call, each named with what came and what was wanted."""
    good = {"x": torch.zeros(2, 3, 1, 2, 2), "out": torch.full((2, 3, 9), 7.0), "threads": 1}
    called = {**good, **arguments}
    with pytest.raises(ValueError, match=message):
        _C.tap_sums(**called)
    assert (called["out"] == 7).all()


def test_bad_lists_and_samples():
    """What a gather lists must fit its source and its panel."""
    x, out = torch.zeros(2, 3, 1, 2, 2), torch.full((2, 3, 1, 2, 2), 7.0)
    four, three = torch.zeros(4, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)

    def gather(src=x, samples=None, channels=None, scale=None, out=out) -> None:
        _C.gather_panel(src, samples, channels, scale, False, out, 1)

    for arguments, message in (
        ({"out": out.bfloat16()}, "out has dtype bfloat16; wanted that of src"),
        ({"channels": four}, "channels lists 4; wanted at most the 3 of out"),
        ({"channels": three}, "channels lists channel 3; wanted 0 <= channel < 3"),
        ({"channels": -three}, "channels lists channel -3; wanted 0 <= channel < 3"),
        ({"channels": four.long()}, "channels has dtype int64; wanted int32"),
        ({"samples": torch.tensor([0, 2])}, "samples holds 2; wanted 0 <= sample < 2"),
        ({"samples": torch.tensor([0])}, "out has B = 2; wanted 1"),
        ({"src": torch.zeros(2, 3, 1, 3, 2)}, "out has H = 2; wanted 3"),
        ({"scale": torch.zeros(2, 6)[:, ::2]}, "scale has gaps; wanted channels side by side"),
        ({"scale": torch.zeros(2, 3, dtype=torch.bool)}, "scale has dtype bool; wanted one of float32"),
        ({"scale": torch.zeros(1, 3)}, "scale has B = 1; wanted 2"),
        ({"scale": torch.zeros(2, 2)}, "scale has C = 2; wanted 3"),
    ):
        with pytest.raises(ValueError, match=message):
            gather(**arguments)
    assert (out == 7).all()


def test_bad_panels():
    """Panels must have the features' size, and the channels that they are said to have."""
    x, out = torch.zeros(2, 3, 1, 2, 2), torch.full((2, 3, 1, 2, 2), 7.0)
    panel, two_to_three = torch.zeros(2, 1, 2, 2, 2), torch.tensor([2, 3], dtype=torch.int32)

    def merge(panel: torch.Tensor, channels: torch.Tensor | None) -> None:
        gate = torch.zeros(2, 3)
        _C.gate_merge(GradientPanel(panel, channels), GradientPanel(None, None), None, gate, x, out, None, 1)

    with pytest.raises(ValueError, match="spatial has 2 channels and no list; wanted all channels"):
        merge(panel, None)
    with pytest.raises(ValueError, match="spatial lists channel 3; wanted 0 <= channel < 3"):
        merge(panel, two_to_three)
    with pytest.raises(ValueError, match="spatial has channels = 2; wanted 1"):
        merge(panel[..., :1].contiguous(), two_to_three)
    with pytest.raises(ValueError, match="spatial has O = 2; wanted 3"):
        _C.epilogue(panel, None, Epilogue(out), 1)
    with pytest.raises(ValueError, match="bias has O = 4; wanted 3"):
        _C.epilogue(None, None, Epilogue(out, bias=torch.zeros(4)), 1)
    assert (out == 7).all()


def test_records_are_read_by_name():
    """Fields may come in another order; one that is missing, unknown or of another type is refused."""

    class Turned(NamedTuple):
        sums: object
        skip: object
        relu: bool
        bias: object
        samples: object
        out: torch.Tensor

    class Longer(NamedTuple):
        out: torch.Tensor
        extra: int

    class Misspelt(NamedTuple):
        sums: object
        out: torch.Tensor
        samples: object
        bias: object
        relu: bool
        skipped: object

    z, out = torch.randn(2, 1, 2, 2, 3), torch.zeros(2, 3, 1, 2, 2)
    _C.epilogue(z, None, Turned(None, None, True, None, None, out), 1)
    assert torch.equal(out, z.permute(0, 4, 1, 2, 3).relu())
    with pytest.raises(ValueError, match=r"epilogue has fields \('out', 'extra'\); wanted out, samples, bias, relu"):
        _C.epilogue(z, None, Longer(out, 1), 1)
    with pytest.raises(ValueError, match=r"epilogue has fields \('sums', .* 'skipped'\); wanted out, samples"):
        _C.epilogue(z, None, Misspelt(None, out, None, None, True, None), 1)
    _C.epilogue(z, None, Turned(None, None, True, None, None, out.fill_(7)), 1)
    assert torch.equal(out, z.permute(0, 4, 1, 2, 3).relu()), "what was refused changed nothing"
    with pytest.raises(TypeError, match="epilogue is a tuple; wanted a NamedTuple of out, samples"):
        _C.epilogue(z, None, (out,), 1)
    with pytest.raises(TypeError, match="relu is a int; wanted a bool"):
        _C.epilogue(z, None, Epilogue(out, relu=1), 1)
    with pytest.raises(TypeError, match="out is a str; wanted a tensor"):
        _C.epilogue(z, None, Epilogue("memory"), 1)


def test_tables():
    """Dtypes and tiles are the same in Python and in the module."""
    assert {getattr(torch, name): code for name, code in _C.dtypes.items()} == DTYPE_CODES
    assert SPATIAL_TILES.items() <= TEMPORAL_TILES.items()
    assert all(points == (1 if tile == 1 else tile + 2) for tile, points in TEMPORAL_TILES.items())


def test_isa_choice(isa):
    """The chosen instruction set is the one in use, and an unknown one is refused with what there is."""
    assert _C.get_isa() == isa
    with pytest.raises(ValueError, match="set_isa: name is 'sse9'; this build on this machine supports auto, portable"):
        _C.set_isa("sse9")
    _C.set_isa("auto")
    assert _C.get_isa() == _C.supported_isas()[-1]


def test_build_info():
    """build_info names compiler, flags and instruction sets, covers what the machine can run, and tells of CUDA."""
    info = _C.build_info()
    assert set(info) == {"compiler", "version", "isas", "openmp", "cuda", "flags"}
    assert set(_C.supported_isas()) <= set(info["isas"])
    built = build_record()[0] == "cuda"
    assert (info["cuda"] is not None) == built == hasattr(_C, "cuda")
    assert info["cuda"] is None or (info["cuda"]["version"] and min(info["cuda"]["targets"]) >= 70)
