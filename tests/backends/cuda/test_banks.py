"""Shared memory's banks under the products of sm_75 and later: no load of a fragment and no store meets one twice.

A program compiled with the emulator's headers prints where the lanes of csrc/cuda/turing.h read and write; passes are
counted here from these addresses.
"""

from __future__ import annotations

import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsts_kernels.roofline.loops import LANES, ROW, passes
from tests.emulator import build as emulator

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable())),
]

# Words of the tile hold their own addresses, so what is read by words tells where it was.
PROGRAM = """
#include <stdio.h>
#include "cuda/product.h"

namespace emulator {
Thread thread;
__thread Thread* current = &thread;
alignas(128) unsigned char tile[16384];
unsigned row_read;
int lane() { return int(thread.thread_index.x % 32); }
void meet_at_rows(const char*, const unsigned char* row, bool, const unsigned char* (&from)[4][2], Place) {
  row_read = unsigned(row - tile);
  for (auto& rows : from) rows[0] = rows[1] = tile;
}
}  // namespace emulator

namespace dsts::cuda {
template <class T, bool BY_K, bool LEFT>
void reads(const char* name) {
  constexpr bool kWords = !BY_K && sizeof(T) == 4;
  for (int first = 0; first < 128; first += 64)
    for (int slab = 0; slab < kStepBytes / kSlabBytes; ++slab)
      for (int q = 0; q < 4; ++q)
        for (int lane = 0; lane < 32; ++lane) {
          emulator::thread.thread_index.x = unsigned(lane);
          unsigned to[4];
          Reader<T, BY_K, LEFT>(first).load(to, emulator::tile, q, slab);
          for (int i = 0; i < (kWords ? 4 : 1); ++i)
            printf("%s %d %d.%d.%d.%d %u\\n", name, kWords ? 4 : 16, first, slab, q, i,
                   kWords ? to[i] : emulator::row_read);
        }
}
template <class T, bool BY_K>
void writes(const char* name) {
  using Copy = GlobalToShared<SwizzledTile<T, BY_K>, T, 128>;
  for (int i = 0; i < Copy::kCount; ++i)
    for (int thread = 0; thread < 128; ++thread) {
      emulator::thread.thread_index.x = unsigned(thread);
      printf("%s 16 %d.%d %d\\n", name, i, thread / 32, Copy::place() + i * Copy::kApart);
    }
}
}  // namespace dsts::cuda

int main() {
  using namespace dsts::cuda;
  for (unsigned at = 0; at < sizeof emulator::tile; at += 4) memcpy(emulator::tile + at, &at, 4);
  reads<__half, true, true>("left-by-K"), reads<__half, true, false>("right-by-K");
  reads<__half, false, true>("left-by-column"), reads<__half, false, false>("right-by-column");
  writes<__half, true>("copies-by-K"), writes<__half, false>("copies-by-column");
#if __CUDA_ARCH__ >= 800
  reads<float, true, true>("tf32-left-by-K"), reads<float, true, false>("tf32-right-by-K");
  reads<float, false, true>("tf32-left-by-column"), reads<float, false, false>("tf32-right-by-column");
  writes<float, true>("tf32-copies-by-K"), writes<float, false>("tf32-copies-by-column");
#endif
}
"""


def instructions(arch: int, folder: Path) -> Iterator[tuple[str, int, list[int]]]:
    """Name, bytes a lane and the lanes' addresses of every load and store that a warp issues in a step."""
    source, program = folder / "banks.cu", folder / "banks"
    source.write_text(PROGRAM)
    options = emulator.flags(source, "plain", arch, "banks")
    emulator.run([*emulator.compiler(), *options, str(source), "-o", str(program)])
    found: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines():
        name, width, instruction, address = line.split()
        found[name, int(width), instruction].append(int(address))
    yield from ((name, width, addresses) for (name, width, _), addresses in found.items())


@pytest.mark.parametrize("arch", [750, 800])
def test_lanes_meet_in_no_bank(arch, tmp_path):
    """As many passes as the bytes need; together, each kind of access covers the whole tile once."""
    covered: dict[str, set[int]] = defaultdict(set)
    for name, width, addresses in instructions(arch, tmp_path):
        assert len(addresses) == len(LANES)
        assert passes(addresses, width) == len(addresses) * width // ROW, (name, addresses)
        before = len(covered[name])
        covered[name].update(addresses)
        assert len(covered[name]) == before + len(addresses), f"{name}: an address twice"
        assert all(address % width == 0 for address in addresses)
    step = 128 * (64 if arch >= 800 else 32)
    for name, addresses in covered.items():
        width = 4 if name.startswith("tf32") and name.endswith("t-by-column") else 16
        assert addresses == set(range(0, step, width)), name
    assert len(covered) == (12 if arch >= 800 else 6)
