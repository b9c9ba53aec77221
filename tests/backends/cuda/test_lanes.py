"""Kernels that only move elements: what lanes touch together, worked out by the kernels' own functions of addresses.

The C++ compiler evaluates them for every lane, in static assertions; the slow test reads in the compiled kernels that
loads are 16 bytes wide and on their way together.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from benchmarks.compiled import cubin, cuda_compilers
from tests.emulator import build as emulator

COUNTING = """
namespace dsts::cuda {

// Of eight lanes that move 16 bytes each: whether their addresses, in vectors, meet in no bank.
template <class Place>
constexpr bool apart(Place place) {
  for (int a = 0; a < 8; ++a)
    for (int b = 0; b < a; ++b)
      if (place(a) % 8 == place(b) % 8) return false;
  return true;
}

// Lines of 128 bytes, and sectors of 32, that eight lanes touch with 16 bytes each, from a line's start on.
template <class From, class Element>
constexpr bool one_line(Element element) {
  bool found[8] = {};
  for (int lane = 0; lane < 8; ++lane) {
    const int bytes = element(lane) * static_cast<int>(sizeof(From));
    if (bytes % 16) return false;
    found[bytes / 16 % 8] = true;
  }
  for (int lane = 0; lane < 8; ++lane)
    if (!found[lane] || element(lane) * sizeof(From) / 128 != element(0) * sizeof(From) / 128) return false;
  return true;
}

template <class From, class To>
constexpr bool squares() {
  bool good = true;
  for (int e = 0; e < Side<To>::kVector; ++e)
    for (int i = 0; i < 8; ++i)
      good = good && apart([=](int j) {
               const int row = element_of<From>(j, e);
               return row * kAcross + place_in_row<From>(row, i);
             });
  for (int row = 0; row < Side<To>::kLine; ++row)
    good = good && apart([=](int j) { return row * kAcross + place_in_row<From>(row, j); });
  for (int e = 0; e < Side<To>::kVector; e += Side<From>::kVector)
    good = good && one_line<From>([=](int lane) { return element_of<From>(lane, e); });
  return good;
}

// Passes of a warp to read element e of four lines of taps that follow one another, from `first` on.
template <class T>
constexpr int passes(int taps, int first, int e) {
  int most = 0;
  for (int bank = 0; bank < 32; ++bank) {
    int words[32] = {}, count = 0;
    for (int lane = 0; lane < 32; ++lane) {
      const int q = first + lane / 8;
      const int word = cell_by_output<T>(taps, q / taps, q % taps, lane % 8, e) * static_cast<int>(sizeof(T)) / 4;
      bool known = word % 32 != bank;
      for (int i = 0; i < count; ++i) known = known || words[i] == word;
      if (!known) words[count++] = word;
    }
    most = count > most ? count : most;
  }
  return most;
}

template <class T>
constexpr int most_passes(int taps) {
  int most = 0;
  for (int first = 0; first < 4 * taps; first += 4)
    for (int e = 0; e < Side<T>::kVector; ++e) {
      const int found = passes<T>(taps, first, e);
      most = found > most ? found : most;
    }
  return most;
}

"""
HELD = """
static_assert(squares<__half, __half>() && squares<float, float>() && squares<float, __half>());
static_assert(most_passes<__half>(9) <= 2 && most_passes<__half>(3) <= 2 && most_passes<float>(3) <= 2);
static_assert(kFilterTiles * Side<__half>::kTileBytes == 32768 && kFilterTiles * Side<float>::kTileBytes == 16384);
static_assert(128 * rows_by_output(9) * 9 <= 16384 && 128 * rows_by_output(1) == 16384);
}
"""


def compiles(folder: Path, text: str) -> bool:
    source = folder / "lanes.cu"
    source.write_text('#include "cuda/filters.cu"\n' + text)
    command = [*emulator.compiler(), *emulator.flags(source, "plain", 800, "lanes"), "-fsyntax-only"]
    try:
        emulator.run([*command, "-fconstexpr-ops-limit=1000000000", "-fconstexpr-loop-limit=1000000", str(source)])
    except RuntimeError as error:
        assert "static assertion failed" in str(error), error
        return False
    return True


@pytest.mark.emulated
@pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable()))
def test_filters_touch_lines_and_no_bank_twice(tmp_path):
    """Whole lines of memory; in shared memory squares meet nowhere, and taps are told apart in two passes at most."""
    assert compiles(tmp_path, COUNTING + HELD)
    swizzled = "place_in_row<From>(row, i)"
    assert not compiles(tmp_path, COUNTING.replace(swizzled, "i") + HELD), "squares in order would meet"


@pytest.mark.slow
@pytest.mark.parametrize("arch", [70, 75, 80, 90])
def test_filters_move_sixteen_bytes(arch):
    """A thread's loads of a square, and of lines by output, are wide, and as many as it has on their way together."""
    if reason := cuda_compilers.missing(arch):
        pytest.skip(reason)
    source = next(path for path in cuda_compilers.SOURCES if path.stem == "filters")
    kernels = cubin.kernels(cuda_compilers.compile_source(source, arch).cubin, arch)
    found = {str(cubin.readable(kernel.symbol)): kernel for kernel in kernels}
    wide = {name: kernel.vectors["LDG"] for name, kernel in found.items()}
    square, lines = {"half": 8, "float": 4}, 4
    assert wide["pack_filters<half, half>"] == wide["unpack_filters<half>"] == square["half"] + lines
    assert wide["pack_filters<float, float>"] == wide["unpack_filters<float>"] == square["float"] + lines
    assert wide["pack_filters<float, half>"] == 2 * (square["half"] + lines)
    for name, kernel in found.items():
        assert kernel.vectors["STG"] >= square["float" if name.endswith("float>") else "half"], name
        assert not kernel.counts["LDL"] + kernel.counts["STL"], name


SQUARES = {"half": 8, "float": 4}  # elements of a side


@pytest.mark.slow
@pytest.mark.parametrize("arch", [70, 75, 80, 90])
def test_gathers_move_sixteen_bytes(arch):
    """Four vectors of whole positions on their way, before the first round and in each; one of the panel at a time. Of
    positions side by side all vectors of a square, in and out."""
    if reason := cuda_compilers.missing(arch):
        pytest.skip(reason)
    sources = [path for path in cuda_compilers.SOURCES if path.stem in ("gather_panel", "route")]
    built = [cuda_compilers.compile_source(source, arch).cubin for source in sources]
    kernels = [kernel for path in built for kernel in cubin.kernels(path, arch)]
    found = {str(cubin.readable(kernel.symbol)): kernel for kernel in kernels}
    for name in (
        "gather_panel_whole<half>",
        "gather_panel_whole<float>",
        "route_and_gather_whole<half>",
        "route_and_gather_whole<float>",
    ):
        kernel = found[name]
        assert kernel.vectors["LDG"] == 2 * 4 and kernel.vectors["STG"] == 1, (name, kernel)
        assert kernel.vectors["STS"] >= 4 and not kernel.counts["LDL"] + kernel.counts["STL"], (name, kernel)
    for name, (square, rows) in itertools.product(("gather_panel_turned", "route_and_gather_turned"), SQUARES.items()):
        kernel = found[f"{name}<{square}>"]
        assert kernel.vectors["LDG"] == kernel.vectors["STG"] == kernel.vectors["STS"] == rows, (name, kernel)
        assert kernel.vectors["LDS"] >= rows and not kernel.counts["LDL"] + kernel.counts["STL"], (name, kernel)
