"""Recorded calls: whatever comes, memory holds what it would hold without recording. No GPU, nothing is compiled.

:mod:`.machine` stands in for kernels by functions of bytes.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dsts_kernels.backends.gpu.switches import switched
from dsts_kernels.backends.triton import RECORDED, load, tuning

from ...support.inputs import LAYOUTS, gated_inputs
from .compiling import CASES, launch, shifted
from .machine import BACKEND, Call, Machine, calls, contents, one_kernel, other_values, plain, recorded, recorder


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(monkeypatch)
    recorded.forget()


# Of every kind of size, dtype and layout some; a frozen layer's outputs are its channels.
SOME = [*CASES[::5], *((16, 16, *case[2:]) for case in CASES[1 : len(CASES) // 3 : 3])]


def cases(some: list = SOME) -> Iterator[Call]:
    for channels, outputs, size, batch, dtype, layout in some:
        change = shifted if layout == "shifted" else LAYOUTS[layout]
        only_features = change if change is shifted else lambda t, change=change: change(t) if t.dim() == 5 else t
        yield from calls(channels, outputs, size, batch, dtype, only_features)


def run(call: Call) -> list[tuple]:
    return contents(getattr(BACKEND, call[0])(*call[1]))


def test_same_bytes(machine):
    """Recorded, done again, and done again on other tensors, of every method."""
    again = 0
    for name, args in cases():
        wanted, other = plain((name, args)), (name, other_values(args))
        assert run((name, args)) == wanted, name
        before = machine.replayed
        assert run((name, args)) == wanted, name
        assert run(other) == plain(other), name
        again += machine.replayed > before
    assert again > 200
    done = {key[0] for key, known in recorded._recordings.items() if type(known) is recorded.Recording}
    assert done == set(RECORDED)


def gated(dtype=torch.bfloat16, batch: int = 3, change: Callable = lambda t: t) -> tuple:
    """Arguments of a gated convolution; batches of several sizes have the same strides."""
    x, gate, neuron, spatial, temporal = gated_inputs(4, 16, 16, (2, 4, 4), dtype)
    return change(x[:batch]), gate[:batch], neuron[:batch], spatial, temporal, (True,) * 5


def routed(divisor: int = 1, tau: float = 1.0, keep: bool = True) -> tuple:
    x, scoring, logits = torch.randn(3, 16, 2, 4, 4), torch.randn(3, 16, 1), torch.randn(3, 16)
    return x, scoring, logits, None, None, None, divisor, tau, keep


def without(index: int) -> Callable:
    """A key whose tensors are known by all but one thing."""
    return lambda name, now, precision, kinds: (
        name, now, precision, *(k[:index] + k[index + 1 :] if k and len(k) == 5 else k for k in kinds),
    )  # fmt: skip


def without_numbers(name: str, now: object, precision: str, kinds: list) -> tuple:
    return name, now, precision, *(k if k is None or len(k) == 5 else k[0] for k in kinds)


LAST = LAYOUTS["channels-last"]
# What a key must not leave out: a key without it, and two calls that differ in nothing else.
MUTATIONS = {
    "dtype": (without(0), "gated_conv3d_keeping", lambda: gated(), lambda: gated(torch.float16)),
    "shape": (without(1), "gated_conv3d_keeping", lambda: gated(), lambda: gated(batch=2)),
    "strides": (without(2), "gated_conv3d_keeping", lambda: gated(), lambda: gated(change=LAST)),
    "alignment": (without(3), "gated_conv3d_keeping", lambda: gated(), lambda: gated(change=shifted)),
    "divisor": (without_numbers, "route", lambda: routed(), lambda: routed(divisor=2)),
    "tau": (without_numbers, "route", lambda: routed(), lambda: routed(tau=0.5)),
    "keep": (without_numbers, "route", lambda: routed(), lambda: routed(keep=False)),
    "switches": (lambda name, now, precision, kinds: (name, *kinds), "gated_conv3d_keeping", lambda: gated(), None),
    "precision": (
        lambda name, now, precision, kinds: (name, now, *kinds), "gated_conv3d_keeping",
        lambda: gated(torch.float32), None,
    ),
}  # fmt: skip


@contextlib.contextmanager
def otherwise(part: str) -> Iterator[None]:
    """What a call asks besides its arguments, changed."""
    before = torch.get_float32_matmul_precision()
    with switched(flat_gather=False) if part == "switches" else contextlib.nullcontext():
        if part == "precision":
            torch.set_float32_matmul_precision("high" if before == "highest" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("part", MUTATIONS)
def test_no_part_of_the_key_can_be_left_out(part, machine, monkeypatch):
    """Two calls in turns: right by the whole key; without one part of it the second is done as the first."""
    mutation, name, first, second = MUTATIONS[part]

    def in_turns() -> bool:
        """Whether both come out right every time; a result that cannot be had is not right."""
        one, other = (name, first()), (name, (second or first)())
        right = True
        for _ in range(3):
            right &= run(one) == plain(one)
            with otherwise(part):
                try:
                    right &= run(other) == plain_as_it_is(other)
                except (AssertionError, RuntimeError, TypeError, ValueError):
                    right = False
        return right

    assert in_turns()
    assert recordings() == 2
    recorded.forget()
    monkeypatch.setattr(recorded, "key_of", mutation)
    assert not in_turns()


def plain_as_it_is(call: Call) -> list[tuple]:
    """Without recording, and with the switches as they are."""
    return contents(getattr(type(BACKEND), call[0]).__wrapped__(BACKEND, *call[1]))


def test_device_is_of_the_key():
    """Tensors that differ in their device alone."""
    kinds = [[], []]
    for device, found in zip(("cpu", "meta"), kinds, strict=True):
        assert recorded.kind_of([torch.empty(2, 3, device=device)], found, [])
    here, there = (found[0] for found in kinds)
    assert here != there and here[:3] == there[:3] and here[4] != there[4]


def test_kind_of_number_is_of_the_key():
    """1, 1.0 and True are equal, and mean other kernels."""
    kinds = [[], [], []]
    for value, found in zip((1, 1.0, True), kinds, strict=True):
        assert recorded.kind_of([value], found, [])
    assert len(set(map(tuple, kinds))) == 3


def test_what_nobody_knows_the_kind_of():
    """A tensor of a class of its own, an object."""
    for one in (torch.nn.Buffer(torch.zeros(2)), object(), torch.device("cpu")):
        known = recorded.kind_of([[torch.zeros(2), one]], [], [])
        assert known == (type(one) in (Tensor, torch.nn.Parameter))


def recordings(name: str | None = None) -> int:
    """Those that there are, of the method ``name`` or of all."""
    known = [key[0] for key, known in recorded._recordings.items() if type(known) is recorded.Recording]
    return len(known) if name is None else known.count(name)


def test_results_are_memory_of_their_own(machine):
    """A later call leaves what an earlier one returned."""
    args = gated()
    plain(("gated_conv3d_keeping", args))
    found = [BACKEND.gated_conv3d_keeping(*args) for _ in range(3)]
    assert recordings() == 1 and machine.replayed
    starts = {t.data_ptr() for out, kept in found for t in (out, *kept)}
    assert len(starts) == sum(1 + len(kept) for _, kept in found)
    assert contents(found[1]) == contents(found[2]) == contents(found[0])


def test_arguments_that_share_memory_are_not_recorded(machine):
    """Nobody could tell which of them a kernel was given; others of their kind are."""
    z, neuron, mixing = (
        torch.randn(2, 2, 4, 4, 16).permute(0, 4, 1, 2, 3),
        torch.tensor([0, 1]),
        torch.randn(3, 16, 16, 1, 1, 1),
    )
    same = "mixing_conv3d_backward", (z, z, neuron, mixing, [True, True])
    for _ in range(2):
        assert run(same) == plain(same)
    assert not recordings(same[0])
    apart = "mixing_conv3d_backward", (z, z.clone(), neuron, mixing, [True, True])
    for call in (apart, apart, same, apart):
        assert run(call) == plain(call)
    assert recordings(same[0]) == 1


def test_what_else_a_call_does_is_refused(machine, monkeypatch):
    """Operators of torch's, launches past launch.start and memory from elsewhere: run as ever, each time."""
    x, elsewhere = torch.randn(3, 16, 2, 4, 4), torch.zeros(64)
    kernels, one = load("tap_sums"), launch.Launch((1,), (3,), BLOCK=4)
    methods = {
        "it calls aten.mul.Tensor": lambda self, x: (kernels.partial_tap_sums(x, 1), x * 2)[1],
        "it launches on memory that it was not given and did not make": lambda self, x: launch.start(
            one_kernel, one, (elsewhere,)
        ),
        "it launches past launch.start": lambda self, x: (
            kernels.partial_tap_sums(x, 1), launch.knobs.runtime.launch_enter_hook(None),
        )[0],
        "it launches nothing": lambda self, x: x.new_empty(3),
        "it returns memory that it was not given and did not make": lambda self, x: (
            kernels.partial_tap_sums(x, 1), elsewhere,
        )[1],
    }  # fmt: skip
    for reason, method in methods.items():
        for _ in range(2):
            recorded.call(reason, method, BACKEND, x)
        assert recorded.why_not_recorded()[reason] == {reason}
    assert not recordings() and launch.current.recorder is None


def test_an_error_ends_the_watching(machine):
    """The call that raises is not recorded, and the next one is watched."""

    def method(self: object, x: Tensor) -> None:
        raise ValueError("no such size")

    for _ in range(2):
        with pytest.raises(ValueError, match="no such size"):
            recorded.call("method", method, BACKEND, torch.randn(3))
    assert launch.current.recorder is None and not recorded._recordings
    assert not launch.knobs.runtime.launch_enter_hook.calls


@pytest.mark.parametrize("when", ["a profiler listens", "a tile is forced", "switched off", "remembering is off"])
def test_when_nothing_is_recorded(when, machine):
    """Whoever asks for something else gets it, also where a recording is there."""
    call = "mixing_conv3d", (gated(change=LAST)[0], torch.tensor([0, 1, 2]), torch.randn(3, 16, 16, 1, 1, 1).bfloat16())
    wanted = plain(call)
    assert run(call) == run(call) == wanted and recordings() == 1
    before, seen = machine.replayed, []
    with contextlib.ExitStack() as stack:
        if when == "a profiler listens":
            launch.knobs.runtime.launch_enter_hook.add(seen.append)
            stack.callback(launch.knobs.runtime.launch_enter_hook.remove, seen.append)
        elif when == "a tile is forced":
            stack.enter_context(tuning.forced(conv=tuning.candidates("conv", "sm_90", "half")[0]))
        else:
            off = "record_calls" if when == "switched off" else "remember_launches"
            stack.enter_context(switched(**{off: False}))
        found = run(call)
    assert machine.replayed == before and recordings() == 1
    assert (found == wanted) == (when != "a tile is forced")


def test_threads_watch_their_own_calls(machine):
    """A recording in one thread is not made of another thread's launches."""
    inner = []

    def method(self: object, x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: inner.append(load("tap_sums").partial_tap_sums(x, 9)))
        thread.start()
        thread.join()
        return load("tap_sums").partial_tap_sums(x, 1)

    x = torch.randn(3, 16, 2, 4, 4)
    machine_once = recorded.call("method", method, BACKEND, x)
    assert inner and recordings() == 1
    (recording,) = (known for known in recorded._recordings.values())
    assert len(recording.launches) == 1 and machine_once.shape[-1] == 1


def test_scratch_memory_is_shared_in_time_only():
    """Blocks of one memory that are in use together never overlap, and those that are not do share it."""
    generator = random.Random(7)
    for _ in range(50):
        memories = []
        for _ in range(12):
            memory = recorder.Memory(torch.empty(0))
            memory.stop = memory.start + generator.randrange(1, 5000)
            first = generator.randrange(10)
            memory.used(first)
            memory.used(first + generator.randrange(4))
            memories.append(memory)
        total, offsets = recorder.packed(memories)
        for i, a in enumerate(memories):
            assert offsets[id(a)] % recorder.ALIGNMENT == 0 and offsets[id(a)] + a.size <= total
            for b in memories[:i]:
                if a.first <= b.last and b.first <= a.last:
                    assert offsets[id(a)] + a.size <= offsets[id(b)] or offsets[id(b)] + b.size <= offsets[id(a)]
        assert total < sum(-(-m.size // recorder.ALIGNMENT) * recorder.ALIGNMENT for m in memories)


def test_few_are_kept(machine, monkeypatch):
    """Sizes that change with every batch do not fill memory."""
    monkeypatch.setattr(recorded, "MOST", 5)
    for rows in range(3, 15):
        call = "mixing_conv3d", (torch.randn(2, 16, 1, rows, 4), torch.tensor([0, 1]), torch.randn(3, 16, 16, 1, 1, 1))
        BACKEND.mixing_conv3d(*call[1])
        assert len(recorded._recordings) <= 5
