"""Facts that Python and C++ both state: how convolutions are dealt out, and sizes of tiles, held to one another."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dsts_kernels.backends.cuda import launch
from dsts_kernels.backends.gpu import grids
from dsts_kernels.backends.packing import TILE_BYTES
from tests.emulator import build as emulator

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable())),
]
SOURCES = [emulator.HERE / "schedule.cu", emulator.HERE / "schedule_module.cpp"]


@pytest.fixture(scope="module")
def schedule() -> ModuleType:
    """``csrc/cuda/schedule.h`` alone, emulated."""
    return emulator.load(emulator.build("plain", 800, SOURCES))


@pytest.mark.parametrize("threads", [128, 256])
@pytest.mark.parametrize("num_ctas", [1, 3, 13, 160, 296, grids.MAX_CTAS])
def test_iterations_are_dealt_as_grids_say(schedule, num_ctas, threads):
    """On the device: waves, and every CTA's range, with and without whole waves, with samples that have nothing."""
    ways = set()
    cases = (1, 1, 5), (2, 3, 400), (7, 4, 60), (23, 2, 1), (5, 700, 30), (1, num_ctas, 9), (4, 3 * num_ctas, 99)
    for samples, per_sample, longest in cases:
        lengths = torch.randint(longest + 1, (samples,), dtype=torch.int32)
        lengths[-1] = longest
        if per_sample > 2 * num_ctas:
            lengths.fill_(longest)
        for idle in (grids.IDLE_PERCENT, grids.ALWAYS_SHARE):
            check_deal(schedule, lengths, per_sample, num_ctas, idle, threads)
            ways.add(grids.dealt_waves(lengths.tolist(), per_sample, num_ctas, idle) * num_ctas >= samples * per_sample)
    assert ways == {True, False}


def check_deal(
    schedule: ModuleType, lengths: torch.Tensor, per_sample: int, num_ctas: int, idle: int, threads: int
) -> None:
    """Waves and ranges of the device are those of ``grids``."""
    samples = len(lengths)
    waves, dealt = grids.whole_waves(samples * per_sample, num_ctas), torch.full((1,), -1, dtype=torch.int32)
    starts = torch.full((num_ctas + 1,), -1, dtype=torch.int32)
    failed = schedule.starts(
        lengths=lengths.data_ptr(),
        starts=starts.data_ptr(),
        dealt=dealt.data_ptr(),
        samples=samples,
        per_sample=per_sample,
        num_ctas=num_ctas,
        waves=waves,
        idle_percent=idle,
        threads=threads,
    )
    assert not failed
    given = lengths.tolist(), per_sample, num_ctas, idle
    assert dealt.item() == grids.dealt_waves(*given), (samples, per_sample)
    found = [*zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]
    assert found == grids.iteration_ranges(*given), (samples, per_sample)


def checked(folder: Path, *assertions: str) -> None:
    """The C++ compiler holds these of the headers that need no CUDA."""
    source = folder / "facts.cpp"
    lines = (f"static_assert({one});" for one in assertions)
    source.write_text('#include "cuda/grids.h"\nusing namespace dsts::cuda;\n' + "\n".join(lines) + "\n")
    emulator.run([*emulator.compiler(), "-std=c++17", f"-I{emulator.ROOT / 'csrc'}", "-fsyntax-only", str(source)])


def test_grid_of_programs_without_python(tmp_path):
    """``csrc/cuda/grids.h`` is ``persistent_grid``, on chips of which one and of which two CTAs fit."""
    facts = []
    for capability, smem_kib in grids.SMEM_KIB.items():
        resident = grids.resident_ctas(capability, exact=False)
        facts.append(f"resident_ctas({capability}, {smem_kib}) == {resident}")
        for batch, positions, outputs, k_blocks in (
            (1, 1, 1, 3),
            (8, 2048, 1024, 192),
            (3, 300, 131, 24),
            (90, 9, 8, 12),
        ):
            for processors in (1, 80, 800):
                tiles = grids.flat_tiles(positions, outputs)
                ours = grids.persistent_grid(batch, tiles, k_blocks, processors, resident, grids.MAX_CTAS)
                grid = f"persistent_grid({batch}, {positions}, {outputs}, {k_blocks}, {processors * resident})"
                facts += [f"{grid}.{name} == {value}" for name, value in ours._asdict().items()]
    checked(tmp_path, *facts)


def test_sizes(tmp_path):
    """Of tiles and shared memory, as the headers state them; test_bindings.py asks the module."""
    sizes = {
        "kTile": grids.TILE,
        "kKBlockBytes": TILE_BYTES,
        "kMinKBlocks": grids.MIN_K_BLOCKS,
        "kMaxCtas": grids.MAX_CTAS,
        "kIdlePercent": grids.IDLE_PERCENT,
        "kAlwaysShare": grids.ALWAYS_SHARE,
        "kMaxNeurons": launch.MAX_NEURONS,
        "kGatherPositions": grids.GATHER_POSITIONS,
        "kGatherBytes": grids.GATHER_BYTES,
    }
    facts = [f"{name} == {value}" for name, value in sizes.items()]
    facts += [f"product_smem_kib({since}) == {kib}" for since, kib in grids.PRODUCT_SMEM_KIB.items()]
    checked(tmp_path, *facts)
    with pytest.raises(RuntimeError, match="static assertion failed"):
        checked(tmp_path, f"kTile == {grids.TILE + 1}")


@pytest.mark.parametrize(
    "source, size, changed, compiles",
    [
        ("conv", "kTile = 128", "kTile = 64", False),
        ("conv", "kKBlockBytes = 128", "kKBlockBytes = 96", False),
        ("conv", "kMaxCtas = 1024", "kMaxCtas = 2048", False),
        ("conv", "< 80 ? 32 : 70", "< 80 ? 32 : 64", False),
        ("conv", "kConvSmemBytes = 192", "kConvSmemBytes = 184", False),
        ("gather_panel", "kGatherPositions = 64", "kGatherPositions = 60", False),
        ("gather_panel", "kGatherBytes = 16384", "kGatherBytes = 16000", False),
        ("gather_panel", "kGatherBytes = 16384", "kGatherBytes = 8192", True),
    ],
)
def test_a_size_that_does_not_fit_fails_to_compile(tmp_path, source, size, changed, compiles):
    """No size of ``csrc/cuda/tiles.h`` is taken in silence."""
    folder = tmp_path / "cuda"
    shutil.copytree(emulator.ROOT / "csrc/cuda", folder)
    text = (folder / "tiles.h").read_text()
    assert text.count(size) == 1
    (folder / "tiles.h").write_text(text.replace(size, changed))
    path = folder / f"{source}.cu"
    command = [*emulator.compiler(), f"-I{tmp_path}", *emulator.flags(path, "plain", 800, "sizes"), "-fsyntax-only"]
    with contextlib.nullcontext() if compiles else pytest.raises(RuntimeError, match="static assertion failed"):
        emulator.run([*command, str(path)])
