"""The stand-in by itself: integers, memory, boxes, rounding, barriers, and what may be seen when."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from .faults import Deadlock, Fault, Hazard, PhaseFault
from .hopper import Descriptor
from .language import launch, load
from .machine import Machine
from .values import DTYPES, Memory

numbers = itertools.count()


def small(tmp_path: Path, body: str, *arguments: object, programs: int = 1, seed: int = 0) -> Machine:
    """Runs a kernel of a few lines on its arguments ``a``, ``b`` and so on."""
    names = ", ".join("abcdefgh"[: len(arguments)])
    path = tmp_path / f"small_{next(numbers)}.py"
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    path.write_text(f"@gluon.jit\ndef kernel({names}):\n{lines}")
    return launch(load(path)["kernel"], programs, *arguments, seed=seed)


def zeros(*shape: int, dtype: str = "int32") -> Memory:
    return Memory(np.zeros(shape), dtype)


def test_integers_are_those_of_the_machine(tmp_path):
    """Division truncates, in scalars and tensors; 32 bits overflow, and 64 do not."""
    out = zeros(4)
    body = "gl.store(a, b // 3)\ngl.store(a + 1, b % 3)\ngl.store(a + 2 + gl.arange(0, 2), (gl.arange(0, 2) - 7) // 2)"
    small(tmp_path, body, out, -7)
    assert out.data.tolist() == [-2, -1, -3, -3]
    for body in ("gl.store(a, b * 65536)", "gl.store(a + gl.arange(0, 2), (gl.arange(0, 2) + b) * 65536)"):
        with pytest.raises(Fault, match="int32 overflows"):
            small(tmp_path, body, out, 40000)
    small(tmp_path, "gl.store(a, (b.to(gl.int64) * 65536 // 65536).to(gl.int32))", out, 40000)
    assert out.data[0] == 40000


def test_ranks_must_be_alike(tmp_path):
    with pytest.raises(Fault, match="ranks 2 and 1"):
        small(tmp_path, "gl.arange(0, 4)[:, None] + gl.arange(0, 4)")
    with pytest.raises(Fault, match="powers of two"):
        small(tmp_path, "gl.arange(0, 3)")


def test_memory_has_an_end(tmp_path):
    """An access outside is a fault, masked elements without a value are NaN, and stores are counted."""
    x, out = Memory(np.arange(3.0), "float32"), zeros(4, dtype="float32")
    with pytest.raises(Fault, match="outside of a memory of 3 elements"):
        small(tmp_path, "gl.store(b + gl.arange(0, 4), gl.load(a + gl.arange(0, 4)))", x, out)
    out = zeros(4, dtype="float32")
    small(tmp_path, "gl.store(b + gl.arange(0, 4), gl.load(a + gl.arange(0, 4), mask=gl.arange(0, 4) < 3))", x, out)
    assert out.data[:3].tolist() == [0, 1, 2] and np.isnan(out.data[3])
    assert out.stores.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_types_round_as_torch_does(name):
    values = torch.randn(1000) * 10
    values[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    wanted = values.to(getattr(torch, name)).float().numpy()
    np.testing.assert_array_equal(DTYPES[name].cast(values.numpy()), wanted)


def test_boxes_are_zero_outside():
    """On either side of every dimension, also where a box lies outside as a whole."""
    values = np.arange(1, 3 * 4 * 8 + 1, dtype=np.float32).reshape(3, 4, 8)
    descriptor, padded = Descriptor(Memory(values, "float32"), [2, 4, 8]), np.pad(values, 9)
    for corner in itertools.product((-3, -1, 0, 2, 3), (-4, 1, 4), (-8, 0, 3)):
        there = tuple(slice(9 + c, 9 + c + n) for c, n in zip(corner, (2, 4, 8), strict=True))
        np.testing.assert_array_equal(descriptor.box(corner), padded[there])


@pytest.mark.parametrize("shape, block", [((4, 300), [512, 8]), ((4, 6), [2, 2]), ((8, 64), [2, 48])], ids=str)
def test_what_no_descriptor_describes(shape, block):
    """Boxes of more than 256 a side, rows of no whole 16 bytes, swizzled rows of no whole 128 bytes."""
    with pytest.raises(Fault):
        Descriptor(zeros(*shape, dtype="float32"), block)


RING = """ring = gl.allocate_shared_memory(gl.float32, [2, 4, 8], None)
bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
mbarrier.init(bars.index(0), count=1)
fence_async_shared()
"""
COPY = "tma.async_copy_global_to_shared(a, [0, 0], bars.index(0), ring.index(0))"


@pytest.mark.parametrize(
    "body, fault, says",
    [
        ("mbarrier.init(bars.index(0), count=1)", Fault, "initialised twice"),
        ("mbarrier.arrive(bars.index(1))", Fault, "was not initialised"),
        ("bars.index(2)", Fault, "bars has no stage 2"),
        ("mbarrier.wait(bars.index(0), 0)", Deadlock, r"parity 0, phase 0\)\n    bars\[0\]: 0 phases complete, 1 arr"),
        ("mbarrier.arrive(bars.index(0), count=2)", PhaseFault, "more than 1 arrivals"),
        ("mbarrier.wait(bars.index(0), 2)", PhaseFault, "parity 2"),
        ("mbarrier.wait(bars.index(0), 1)\nmbarrier.wait(bars.index(0), 1)", PhaseFault, "phase 0 is due"),
        ("mbarrier.arrive(bars.index(0))\nmbarrier.arrive(bars.index(0))\nmbarrier.wait(bars.index(0), 0)",
         PhaseFault, "phase 1 went by before the wait for phase 0"),
        (f"{COPY}\nmbarrier.wait(bars.index(0), 1)\nmbarrier.wait(bars.index(0), 0)", PhaseFault,
         "bytes land that phase 0 does not expect"),
        (f"mbarrier.expect(bars.index(0), 128)\n{COPY}\n{COPY}", Fault, "on its way|does not expect|nobody waited"),
        (f"mbarrier.expect(bars.index(0), 128)\n{COPY}", Hazard, "nobody waited for phase 0"),
        ("mbarrier.init(bars.index(1), count=1)\n"
         "tma.async_copy_global_to_shared(a, [0, 0], bars.index(1), ring.index(0))", Hazard, "without a fence"),
        ("tma.async_copy_global_to_shared(a, [0], bars.index(0), ring.index(0))", Fault, "takes no box"),
        ("warpgroup_mma(ring.index(0), ring.index(1).permute((1, 0)), gl.zeros([4, 4], gl.float32))", Hazard,
         r"ring\[0\] is read, but its data is absent"),
        ("warpgroup_mma(gl.zeros([4, 8], gl.float32), ring.index(1), None)", Fault, "wanted in shared memory"),
        ("ring.index(0).permute((1, 0)).reshape([4, 8])", Fault, "cannot be seen as"),
        ("gl.static_assert(1 > 2, 'never')", Fault, "never"),
    ],
)  # fmt: skip
def test_faults_are_told(tmp_path, body, fault, says):
    """With the kernel's file and line."""
    with pytest.raises(fault, match=says):
        small(tmp_path, RING + body, Descriptor(zeros(8, 8, dtype="float32"), [4, 8]))


def test_copies_and_products(tmp_path):
    """A box through shared memory into a product, late or early."""
    a, b = torch.randn(4, 8).numpy(), torch.randn(4, 8).numpy()
    body = """mbarrier.expect(bars.index(0), 256)
tma.async_copy_global_to_shared(a, [0, 0], bars.index(0), ring.index(0))
tma.async_copy_global_to_shared(b, [0, 0], bars.index(0), ring.index(1))
mbarrier.wait(bars.index(0), 0)
acc = warpgroup_mma(ring.index(0), ring.index(1).permute((1, 0)), gl.zeros([4, 4], gl.float32), is_async=True)
acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
gl.store(c + gl.arange(0, 4)[:, None] * 4 + gl.arange(0, 4)[None, :], acc)"""
    for seed in range(5):
        out = zeros(4, 4, dtype="float32")
        operands = [Descriptor(Memory(side, "float32"), [4, 8]) for side in (a, b)]
        machine = small(tmp_path, RING + body, *operands, out, seed=seed)
        np.testing.assert_allclose(out.data, a @ b.T, rtol=1e-5, atol=1e-5)
        assert (machine.landed, machine.multiplied) == (2, 1)


def test_atomics_show_what_a_barrier_gathered(tmp_path):
    body = """gl.store(a + gl.program_id(0), 7)
{}
before = gl.atomic_add(b, 1)
if before == 2:
    gl.store(c, gl.load(a) + gl.load(a + 1) + gl.load(a + 2))"""
    for seed in range(10):
        out = zeros(1)
        small(tmp_path, body.format("barrier()"), zeros(3), zeros(1), out, programs=3, seed=seed)
        assert out.data[0] == 21
        with pytest.raises(Hazard, match="without a barrier and an atomic between"):
            small(tmp_path, body.format("pass"), zeros(3), zeros(1), zeros(1), programs=3, seed=seed)
