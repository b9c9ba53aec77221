"""The stand-in notices mistakes: each of these is put into the convolution's source, and must show."""

from __future__ import annotations

import pytest
import torch

from ..support.targets import require_triton

require_triton()
from .faults import Deadlock, Fault, Hazard, PhaseFault  # noqa: E402
from .mistakes import SEEDS, WRONG, Mistake, broken  # noqa: E402
from .packed import Case, check, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")

READY = "mbarrier.wait(ready.index(stage), step // STAGES & 1)\n"
FREE = "mbarrier.wait(free.index(stage), step // STAGES & 1 ^ 1)\n"
WITHIN = "        if k > 0:"
LATE = "            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1)\n        step += 1"
END = "    if steps > 0:"
EXPECT = "mbarrier.expect(ready.index(stage), BYTES)"
COPY = "tma.async_copy_global_to_shared(right, right_corner, ready.index(stage), right_ring.index(stage))\n"
COUNT = "ready, free, step, BYTES, STAGES)\n            step += 1"
NEXT = "index((stage + 1) % STAGES)"
RUNNING = "running = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=1, deps=[running]))"
FILE = "conv.py"
RAGGED, HOLE = {"outputs": 21}, {"neurons": (-1, 0, 1)}

PHASES = {
    "the consumers' phase turned round": Mistake(READY, READY.replace("& 1", "& 1 ^ 1"), Fault),
    "the producer's phase turned round": Mistake(FREE, FREE.replace(" ^ 1", ""), Deadlock),
    "a phase that never turns": Mistake(READY, READY.replace("step // STAGES & 1", "0"), PhaseFault),
    "a phase by step": Mistake(READY, READY.replace("step // STAGES & 1", "step & 1"), Fault),
    "a phase that starts anew with each tile": Mistake(READY, READY.replace("step //", "k //"), PhaseFault),
    "a producer that counts anew with each tile": Mistake(COUNT, COUNT.replace("step", "k", 1), Fault),
    "two arrivals wanted": Mistake(
        "mbarrier.init(free.index(stage), count=1)", "mbarrier.init(free.index(stage), count=2)", Deadlock
    ),
    "an arrival of two": Mistake(LATE, LATE.replace("count=1", "count=2"), PhaseFault),
    "two arrivals on ready": Mistake(EXPECT, EXPECT + "\n    mbarrier.arrive(ready.index(stage))", PhaseFault),
    "too few bytes": Mistake("(BOX.t * BOX.h * BOX.w + BN) * BK * 2", "BOX.t * BOX.h * BOX.w * BK * 2", Fault),
    "too many bytes": Mistake("+ BN) * BK * 2", "+ BN) * BK * 2 + 16", Deadlock),
    "bytes of float32": Mistake("+ BN) * BK * 2", "+ BN) * BK * 4", Deadlock),
    "no bytes": Mistake(EXPECT, "mbarrier.arrive(ready.index(stage))", Fault),
    "one barrier too few": Mistake(
        "free = gl.allocate_shared_memory(gl.int64, [STAGES, 1]",
        "free = gl.allocate_shared_memory(gl.int64, [STAGES - 1, 1]",
        Fault,
    ),
    "a barrier of another ring": Mistake(READY, READY.replace("ready.index", "free.index"), Fault),
    "a barrier that is none": Mistake(READY, READY.replace("index(stage)", "index(stage + STAGES)"), Fault),
}
ORDER = {
    "a stage freed one step early": Mistake(LATE, LATE.replace("(step + STAGES - 1)", "step", 1), Fault),
    "a stage freed by a tile's first step": Mistake(WITHIN, "        if k >= 0:", Fault),
    "one more product in flight": Mistake("num_outstanding=1", "num_outstanding=2", Hazard),
    "no wait for products": Mistake(RUNNING, "running = running", Hazard),
    "the last product not waited for": Mistake("num_outstanding=0", "num_outstanding=1", Hazard),
    "no wait for copies": Mistake(READY, "pass\n", Hazard),
    "no wait for a free stage": Mistake(FREE, "pass\n", Fault),
    "no release within a tile": Mistake(WITHIN, "        if k < 0:", Fault),
    "no release at a tile's end": Mistake(END, "    if steps < 0:", Fault),
    "a release without a step": Mistake(END, "    if steps >= 0:", Fault, HOLE),
    "a copy told to another barrier": Mistake(COPY, COPY.replace("ready.index(stage)", f"ready.{NEXT}"), Fault),
    "a copy into another stage": Mistake(COPY, COPY.replace("right_ring.index(stage)", f"right_ring.{NEXT}"), Fault),
    "a step the producer does not count": Mistake(COUNT, COUNT.replace("step += 1", "pass"), Fault),
    "a step the consumers do not count": Mistake(LATE, LATE.replace("        step += 1", ""), Fault),
    "no fence behind the barriers": Mistake("    fence_async_shared()", "    pass", Hazard),
    "one stage": Mistake("gl.static_assert(STAGES >= 2", "gl.static_assert(STAGES >= 4", Fault),
    "no barrier before the atomic": Mistake("    barrier()\n    before", "    before", Hazard),
    "an atomic that releases nothing": Mistake('sem="acq_rel"', 'sem="relaxed"', Hazard),
}  # fmt: skip
SUMS = {
    "rows the wrong way": Mistake("h0 + dh", "h0 - dh", WRONG),
    "columns the wrong way": Mistake("w0 + dw", "w0 - dw", WRONG),
    "frames the wrong way": Mistake("t0 + dt", "t0 - dt", WRONG),
    "no shift in time": Mistake("t0 + dt", "t0", WRONG),
    "another block of the panel": Mistake("block * BK]", "(block + 1) * BK]", WRONG),
    "filters of the next output": Mistake("* outputs + o0, 0]", "* outputs + o0 + 1, 0]", WRONG),
    "filters of another neuron": Mistake("(first + k) * outputs", "k * outputs", WRONG),
    "the sample next door": Mistake("corner = [b, ", "corner = [b + 1, ", WRONG),
    "another neuron's bias": Mistake('row += plan_field(plan, b, "row") * outputs', "row += 0", WRONG),
    "no NaN without filters": Mistake('if plan_field(plan, b, "filters") < 0:', "if tile < 0:", WRONG, HOLE),
    "parts in another order": Mistake(
        "o0 + part * PART, row", "o0 + (PARTS - 1 - part) * PART, row", WRONG, {"outputs": 128, "tile": "wide"}
    ),
    "rows below the plane stored": Mistake(" & (h < size.h)", "", Exception),
    "outputs beyond the last stored": Mistake(
        "inside[:, None] & (o < outputs)[None, :]", "inside[:, None]", Exception, RAGGED
    ),
    "bias beyond its end": Mistake("bias + o, mask=o < outputs, other=0.0", "bias + o", Fault, RAGGED),
    "NaN lost in ReLU": Mistake("gl.where(v < 0, 0.0, v)", "gl.maximum(v, 0.0)", WRONG, HOLE),
    "no ReLU": Mistake("v = gl.where(v < 0, 0.0, v)", "v = v", WRONG),
    "sums of one box too few": Mistake("before == boxes - 1", "before == boxes - 2", WRONG),
    "sums of what was not stored": Mistake(
        "gl.where(inside[:, None], y.to(gl.float32), 0.0)", "y.to(gl.float32)", WRONG
    ),
    "sums before rounding": Mistake("y.to(gl.float32), 0.0)", "v, 0.0)", WRONG),
    "sums of the wrong edge": Mistake("(h != size.h - 1)", "(h != size.h - 2)", WRONG, {"taps": 9}),
    "a counter for all columns": Mistake(" + o0 // BN, 1", ", 1", WRONG),
}  # fmt: skip


def case_of(mistake: Mistake) -> Case:
    from dsts_kernels.backends.triton.gluon.plan import HALF_K, WaveTile

    fields = {"neurons": (0, 1, 2), "size": (2, 5, 3)} | mistake.case
    if fields.get("tile") == "wide":
        fields["tile"] = WaveTile(16, 128, HALF_K, 3)
    return Case(**fields)


def noticed(mistake: Mistake, monkeypatch: pytest.MonkeyPatch, seeds: int) -> Exception | None:
    """What it shows as, in the first of ``seeds`` orders in which it does."""
    for seed in range(seeds):
        try:
            out, sums, given, _ = run(monkeypatch, case_of(mistake), seed, broken(mistake, FILE))
            check(out, sums, given)
        except Exception as shown:
            return shown
    return None


EVERY = PHASES | ORDER | SUMS


@pytest.mark.parametrize("name", EVERY)
def test_mistake_shows(name, monkeypatch):
    shown = noticed(EVERY[name], monkeypatch, 1 if EVERY[name].shows is WRONG else SEEDS)
    assert isinstance(shown, EVERY[name].shows), repr(shown)


def test_right_source_shows_nothing(monkeypatch):
    """The problems of the mistakes are solved by the kernel as it is."""
    for fields in ({}, RAGGED, HOLE, {"taps": 9}, {"outputs": 128, "tile": "wide"}):
        mistake = Mistake(END, END, Fault, fields)
        assert noticed(mistake, monkeypatch, 2) is None


def test_deadlock_names_barrier_line_and_phase(monkeypatch):
    with pytest.raises(Deadlock) as told:
        run(monkeypatch, case_of(EVERY["too many bytes"]), 0, broken(EVERY["too many bytes"], FILE))
    text = str(told.value)
    assert "consume: ring.py:" in text and "mbarrier.wait(ready.index(stage)" in text, text
    assert "(parity 0, phase 0)" in text, text
    assert "ready[0]: 0 phases complete, 0 arrivals and 16 bytes pending" in text, text


def test_wrong_phase_names_barrier_line_and_phase(monkeypatch):
    with pytest.raises(PhaseFault) as told:
        run(monkeypatch, case_of(EVERY["a phase that never turns"]), 0, broken(EVERY["a phase that never turns"], FILE))
    assert "ring.py:" in str(told.value) and "parity 0, but phase 1 is due of ready[0]" in str(told.value)


def test_orders_differ(monkeypatch):
    turns = set()
    for seed in range(2):
        torch.manual_seed(0)
        *_, spy = run(monkeypatch, Case(neurons=(0,)), seed)
        turns.add(spy.machine.turns)
    assert len(turns) > 1
