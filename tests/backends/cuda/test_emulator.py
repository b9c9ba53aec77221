"""The emulator that runs the CUDA kernels on the CPU: what it computes, and that it reports what is wrong."""

import os
import platform
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.emulator import build as emulator

SOURCES = [emulator.HERE / "selftest.cu", emulator.HERE / "selftest_module.cpp"]

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="the emulator is for x86-64 Linux"
    ),
]


def line(mark: str) -> int:
    """Of a statement in selftest.cu."""
    lines = SOURCES[0].read_text().splitlines()
    return next(i for i, text in enumerate(lines, 1) if text.endswith(f"// here: {mark}"))


def test_collecting_compiles_nothing():
    """The default run deselects these tests, and must not wait for a compiler first."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/backends/gpu"],
        cwd=emulator.ROOT,
        env={**os.environ, "CXX": "/nonexistent/g++"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 5 and re.search(r"no tests collected \(\d\d\d deselected\)", done.stdout), done.stdout


def built(flavour: str, arch: int = 800) -> Path:
    try:
        emulator.run([*emulator.compiler(), "--version"])
    except (OSError, RuntimeError):
        pytest.skip("no C++ compiler")
    return emulator.build(flavour, arch, SOURCES)


@pytest.fixture(scope="module", params=[700, 750, 800])
def arch(request):
    return request.param


@pytest.fixture
def m(arch):
    module = emulator.load(built("plain", arch))
    yield module
    module.emulator.reset()


def run(flavour: str, script: str, arch: int = 800) -> tuple[int, str]:
    """Runs a script in its own process, where x is 1024 floats, out as many zeros and p() an array's address."""
    opening = f"""
        import sys
        import numpy as np
        from tests.emulator import build
        m = build.load(build.Path({str(built(flavour, arch))!r}))
        x = np.arange(1024, dtype=np.float32)
        out = np.zeros_like(x)
        def p(a): return a.ctypes.data
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(opening) + textwrap.dedent(script)],
        cwd=emulator.ROOT,
        env={**os.environ, **emulator.environment(flavour)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def aligned(a: torch.Tensor) -> torch.Tensor:
    """A contiguous copy at a multiple of 32 bytes."""
    a = a.contiguous()
    room = torch.empty(a.numel() + 32, dtype=a.dtype)
    first = -room.data_ptr() % 32 // a.element_size()
    return room[first : first + a.numel()].view(a.shape).copy_(a)


def test_arch(m, arch):
    assert m.emulator.arch() == arch


@pytest.mark.parametrize("threads", [64, 256, 1024])
def test_block_sum(m, threads):
    x = torch.randn(20, threads)
    for seed in range(3):
        m.emulator.seed(seed)
        out = torch.zeros(20)
        assert m.block_sum(x.data_ptr(), out.data_ptr(), 20, threads, 0, 0) == 0
        torch.testing.assert_close(out, x.sum(1), rtol=1e-5, atol=1e-4)


def test_skipped_barrier_changes_the_result(m):
    x, out = torch.ones(20, 256), torch.zeros(20)
    m.block_sum(x.data_ptr(), out.data_ptr(), 20, 256, 0, 0)
    site = next(s for s in m.emulator.barriers() if s[1] == line("step"))
    assert site[0].endswith("selftest.cu")
    m.emulator.skip_barrier("selftest.cu", site[1])
    m.block_sum(x.data_ptr(), out.data_ptr(), 20, 256, 0, 0)
    assert not torch.equal(out, torch.full((20,), 256.0))
    m.emulator.reset()
    m.block_sum(x.data_ptr(), out.data_ptr(), 20, 256, 0, 0)
    assert torch.equal(out, torch.full((20,), 256.0))


def test_warp_sum_and_ballot(m):
    x = torch.randn(40, 32)
    out, ballots = torch.zeros(40), torch.zeros(40, dtype=torch.int32)
    assert m.warp_sum(x.data_ptr(), out.data_ptr(), ballots.data_ptr(), 40) == 0
    torch.testing.assert_close(out, x.sum(1), rtol=1e-5, atol=1e-5)
    expected = ((x > 0).long() << torch.arange(32)).sum(1)
    assert torch.equal(ballots.long() & 0xFFFFFFFF, expected)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_last_block(m, workers):
    m.emulator.workers(workers)
    x = torch.randint(0, 9, (50, 64)).float()
    partial, out, counter = torch.zeros_like(x), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    for _ in range(3):
        assert m.last_block_sum(x.data_ptr(), partial.data_ptr(), counter.data_ptr(), out.data_ptr(), 50) == 0
        assert out.item() == x.sum().item()
        assert counter.item() == 0


def test_double_buffer(m):
    x = torch.randn(3, 5, 256)
    out = torch.zeros_like(x)
    assert m.double_buffer(x.data_ptr(), out.data_ptr(), 5, 1) == 0
    assert torch.equal(out, 2 * x)


@pytest.mark.parametrize("kind,dtype", list(enumerate([torch.float16, torch.bfloat16, torch.float32])))
def test_product(m, arch, kind, dtype):
    a, b, d = torch.randn(16, 48).to(dtype), torch.randn(48, 16).to(dtype), aligned(torch.zeros(16, 16))
    if kind > 0 and arch < 800:
        assert m.product(a.data_ptr(), b.data_ptr(), d.data_ptr(), kind, 48, 0, 0, 0, 1) == -1
        return
    expected = a.float() @ b.float() / 2
    for layout in range(8):
        a_by_column, b_by_column, d_by_column = layout & 1, layout >> 1 & 1, layout >> 2
        given_a, given_b = aligned(a.T if a_by_column else a), aligned(b.T if b_by_column else b)
        arguments = (kind, 48, a_by_column, b_by_column, d_by_column, 1)
        assert m.product(given_a.data_ptr(), given_b.data_ptr(), d.data_ptr(), *arguments) == 0
        got = d.T if d_by_column else d
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=3e-2 if kind == 2 else 1e-5)
        if kind == 2:
            assert not torch.allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("a_by_row", [True, False])
@pytest.mark.parametrize("b_by_column", [True, False])
def test_products_of_quad_pairs(m, a_by_row, b_by_column):
    """Lane by lane what the PTX ISA says of mma.m8n8k4 with .f16 operands and .f32 sums."""
    a, b, sums = torch.randn(4, 8, 4).half(), torch.randn(4, 4, 8).half(), torch.randn(4, 8, 8)
    given_a, given_b = torch.empty(32, 4).half(), torch.empty(32, 4).half()
    found, expected = torch.empty(32, 8), torch.empty(32, 8)
    product = sums + a.float() @ b.float()
    for lane in range(32):
        quad, half = lane % 16 // 4, 0 if lane < 16 else 4
        for i in range(4):
            given_a[lane, i] = a[quad, lane % 4 + half, i] if a_by_row else a[quad, i + half, lane % 4]
            given_b[lane, i] = b[quad, i, lane % 4 + half] if b_by_column else b[quad, lane % 4, i + half]
        for i in range(8):
            row, column = (lane & 1) + (i & 2) + half, (i & 4) + (lane & 2) + (i & 1)
            found[lane, i], expected[lane, i] = sums[quad, row, column], product[quad, row, column]
    assert m.quads(given_a.data_ptr(), given_b.data_ptr(), found.data_ptr(), a_by_row, b_by_column) == 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


LANE, FOUR = torch.arange(32)[:, None], torch.arange(4)
G, T = LANE // 4, LANE % 4  # as the PTX ISA numbers groups of lanes, and lanes of a group


def test_matrices_lane_by_lane(m, arch):
    """ldmatrix: word T of row G of each matrix; turned round, elements G of rows 2 T and 2 T + 1."""
    rows, out = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16), torch.zeros(32, 4, 2, dtype=torch.int16)
    for turned in (0, 1):
        code = m.matrices(rows.data_ptr(), out.data_ptr(), turned, 0, 32)
        if arch < 750:
            assert code == -1
            continue
        pair = torch.arange(2)
        first, second = 2 * T[..., None] + pair, G[..., None].expand(32, 1, 2)
        assert torch.equal(out, rows[FOUR[:, None], first, second] if turned else rows[FOUR[:, None], second, first])


def registers(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Each lane's elements, by the rows and columns that the PTX ISA names for them."""
    return matrix[rows, columns].contiguous()


@pytest.mark.parametrize(
    "kind, dtype, depth",
    [(0, torch.float16, 8), (0, torch.float16, 16), (1, torch.bfloat16, 16), (2, torch.float32, 8)],
)
def test_fragment_products_lane_by_lane(m, arch, kind, dtype, depth):
    """mma.sync.m16n8k8 and m16n8k16; float32 stands for TF32."""
    a, b, c = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype), torch.randn(16, 8)
    if kind == 2:
        a, b = ((x.view(torch.int32) & -0x2000).view(torch.float32) for x in (a, b))
        i, j = torch.arange(4), torch.arange(2)
        of_a = registers(a, G + 8 * (i % 2), T + 4 * (i // 2))
        of_b = registers(b, T + 4 * j, G.expand(32, 2))
    else:
        i, j = torch.arange(depth // 2), torch.arange(depth // 4)
        of_a = registers(a, G + 8 * (i // 2 % 2), 2 * T + i % 2 + 8 * (i // 4))
        of_b = registers(b, 2 * T + j % 2 + 8 * (j // 2), G.expand(32, len(j)))
    of_c, out = registers(c, G + 8 * (FOUR // 2), 2 * T + FOUR % 2), torch.zeros(32, 4)
    bytes_ = depth * a.element_size()
    if arch < 800 and (kind or bytes_ > 16):
        return  # an abort, below, or not there at all
    code = m.fragment_product(of_a.data_ptr(), of_b.data_ptr(), of_c.data_ptr(), out.data_ptr(), kind, bytes_)
    if arch < 750:
        assert code == -1
        return
    expected = registers(a.double() @ b.double() + c.double(), G + 8 * (FOUR // 2), 2 * T + FOUR % 2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_conversions_round_as_torch_does(m):
    edges = torch.tensor([0.0, -0.0, 65504, 65519.9, 65520, 6e-8, 2.9e-8, 1e-5, float("inf"), -float("inf"), 3.4e38])
    ties = torch.arange(4096).float() / 2 + 2048
    bits = torch.randint(-(2**31), 2**31 - 1, (20000,), dtype=torch.int32).view(torch.float32)
    x = torch.cat([edges, ties, torch.randn(1000), bits])
    halves, bfloats = torch.empty_like(x), torch.empty_like(x)
    assert m.round_trip(x.data_ptr(), halves.data_ptr(), bfloats.data_ptr(), x.numel()) == 0
    torch.testing.assert_close(halves, x.half().float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bfloats, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_launch_limits(m, arch):
    limit = {700: 96, 750: 64, 800: 163}[arch] * 1024
    assert m.bare(1, 1024, 48 * 1024, 0) == 0
    assert m.bare(1, 1025, 0, 0) != 0
    assert m.bare(0, 32, 0, 0) != 0
    assert m.bare(1, 32, 48 * 1024 + 1, 0) != 0
    assert m.bare(1, 32, limit, limit) == 0
    assert m.bare(1, 32, 0, limit + 1) != 0


def test_exited_threads_do_not_hold_others_up(m):
    out = np.zeros(32, np.float32)
    assert m.divergent(2, out.ctypes.data) == 0
    assert out.sum() == 31


@pytest.mark.parametrize(
    "call,message",
    [
        ("m.divergent(0, p(out))", "while other threads of the block wait at the one in"),
        ("m.divergent(1, p(out))", "16 threads wait at __shfl_xor_sync"),
        ("m.double_buffer(p(x), p(out), 1, 5)", "never waited for"),
        ("m.misaligned_product(p(x) + 31 & -32, 8, 16)", "not 32-byte aligned"),
        ("m.misaligned_product(p(x) + 31 & -32, 0, 20)", "leading dimension 20"),
        ("m.matrices(p(x), p(out), 0, 8, 32)", "not 16-byte aligned"),
        ("m.matrices(p(x), p(out), 0, 16, 32)", "a row is outside shared memory"),
        ("m.matrices(p(x), p(out), 0, 0, 31)", "ldmatrix needs all 32 lanes"),
    ],
)
def test_aborts_with_a_message(call, message):
    code, said = run("plain", call)
    assert code < 0
    assert message in said and "selftest.cu:" in said


def test_products_before_sm_80():
    code, said = run("plain", "m.fragment_product(p(x), p(x), p(x), p(out), 0, 32)", 750)
    assert code < 0 and "before sm_80 there are only halves" in said and "selftest.cu:" in said


CORRECT = """
    m.block_sum(p(x), p(out), 16, 64, 0, 0)
    m.warp_sum(p(x), p(out), p(np.zeros(32, np.uint32)), 32)
    counter, total = np.zeros(1, np.int32), np.zeros(1, np.float32)
    for _ in range(2):
        m.last_block_sum(p(x), p(out), p(counter), p(total), 16)
        assert total[0] == x.sum() and counter[0] == 0
    x = np.ones(3 * 4 * 256, np.float32)
    out = np.zeros_like(x)
    m.double_buffer(p(x), p(out), 4, 1)
    assert (out == 2 * x).all()
    m.matrices(p(x), p(out), 0, 0, 32)
    m.matrices(p(x), p(out), 1, 0, 32)
    m.fragment_product(p(x), p(x), p(x), p(out), 2, 32)
    a = np.zeros(16 * 32 * 3, np.float32)
    m.product(p(a) + 31 & -32, p(a) + 31 & -32, (p(a) + 31 & -32) + 2048, 2, 16, 0, 0, 0, 1)
"""


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_sanitizers_accept_what_is_right(flavour):
    extra = "m.emulator.fresh_threads(True)\nm.last_block_sum(p(x), p(out), p(counter), p(total), 3)\n"
    code, said = run(flavour, "import torch\ntorch.randn(99, 99).sum()\n" + textwrap.dedent(CORRECT) + extra)
    assert code == 0, said


@pytest.mark.parametrize("mark", ["step", "filled", "emptied", "rows"])
def test_missing_barrier_is_a_race(mark):
    code, said = run("thread", f"m.emulator.skip_barrier('selftest.cu', {line(mark)})\n" + textwrap.dedent(CORRECT))
    assert code == 66, said
    kernel = {"step": "block_sum_kernel", "rows": "matrices_kernel"}.get(mark, "double_buffer_kernel")
    assert "data race" in said and kernel in said and "selftest.cu:" in said


@pytest.mark.parametrize("mark", ["before", "after"])
def test_missing_fence_is_a_race(mark):
    code, said = run("thread", f"m.emulator.skip_fence('selftest.cu', {line(mark)})\n" + textwrap.dedent(CORRECT))
    assert code == 66, said
    assert "data race" in said and "last_block_kernel" in said


@pytest.mark.parametrize(
    "arguments,mark", [("16, 64, 1, 0", "beyond"), ("16, 64, 0, 1", "beyond_input")], ids=["shared", "global"]
)
def test_access_out_of_bounds(arguments, mark):
    # An array that ends where the kernel should stop.
    code, said = run("address", f"m.block_sum(p(x), p(np.zeros(16, np.float32)), {arguments})")
    assert code == 66, said
    assert "heap-buffer-overflow" in said and f"selftest.cu:{line(mark)}" in said
