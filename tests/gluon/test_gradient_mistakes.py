"""The stand-in notices mistakes in the gradients' sources, beside those of the ring in ``test_mistakes.py``."""

from __future__ import annotations

import pytest

from dsts_kernels.backends.triton.gluon.plan import HALF_K, WaveTile

from ..support.targets import require_triton

require_triton()
from . import data_gradients, weight_gradients  # noqa: E402
from .faults import Deadlock, Fault, Hazard, PhaseFault  # noqa: E402
from .mistakes import SEEDS, WRONG, Mistake, broken  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")

FIRST = "step, 9 * blocks, BM"
THEN = "acc, step = multiply(grad_ring, filter_ring, ready, free, step, 3 * blocks"
HOLE, RAGGED, WIDE = {"neurons": (-1, 0, 1)}, {"channels": 21}, {"channels": 40, "tile": WaveTile(16, 64, HALF_K, 3)}
FIVE = {"tile": WaveTile(16, 16, HALF_K, 5)}  # stages, of which no tile's steps are a multiple
DATA = {
    "rows the wrong way": Mistake("h0 + dh", "h0 - dh", WRONG),
    "columns the wrong way": Mistake("w0 + dw", "w0 - dw", WRONG),
    "frames the wrong way": Mistake("t0 + dt", "t0 - dt", WRONG),
    "taps of the forward pass": Mistake("(1, 3, 3), 3, -1)", "(1, 3, 3), 3, 1)", WRONG),
    "spatial filters for both": Mistake("tap, 9 + tap)", "tap, tap)", WRONG),
    "another slot's filters": Mistake('"filters") * 12', '"filters") * 11', WRONG),
    "another block of the gradient": Mistake("w0 + dw, block * BK]", "w0 + dw, (block + 1) * BK]", WRONG),
    "another block of filters": Mistake("c0, block * BK]", "c0, 0]", WRONG),
    "filters of the next channel": Mistake("9 + tap), c0,", "9 + tap), c0 + 1,", WRONG),
    "the sample next door": Mistake("corner = [b, ", "corner = [b + 1, ", WRONG),
    "too few bytes": Mistake("BOX.w + BN) * BK * 2", "BOX.w) * BK * 2", Fault),
    "too many bytes": Mistake("BOX.w + BN) * BK * 2", "BOX.w + BN) * BK * 2 + 16", Deadlock),
    "a producer that counts anew with each tile": Mistake("free, step, BYTES", "free, k, BYTES", Fault, FIVE),
    "a step the producer does not count": Mistake("STAGES)\n            step += 1", "STAGES)", Fault),
    "operators of equal length": Mistake(FIRST, "step, 3 * blocks, BM", Fault),
    "a step too few": Mistake(FIRST, "step, 9 * blocks - 1, BM", Fault),
    "the second operator's count anew": Mistake(THEN, THEN.replace("step, 3", "0, 3"), PhaseFault, FIVE),
    "the second operator not counted": Mistake(THEN, THEN.replace("acc, step", "acc, _"), PhaseFault, FIVE),
    "everybody parks in one place": Mistake("own = parked + gl.program_id(0) * (BM * BN)", "own = parked", Hazard),
    "nothing is parked": Mistake("    gl.store(place + (m * BN)[:, None] + n[None, :], acc)\n", "", WRONG),
    "parked after the second operator": Mistake(
        f"        park(acc, own, BM, BN)\n        {THEN}, BM, BN, BK, STAGES, WARPS)\n",
        f"        {THEN}, BM, BN, BK, STAGES, WARPS)\n        park(acc, own, BM, BN)\n",
        WRONG,
    ),
    "rows of what is parked": Mistake("parked + (m * BN)[:, None]", "parked + (m * PART)[:, None]", WRONG, WIDE),
    "another part of what is parked": Mistake("behind = own + (part + 1) * PART", "behind = own", WRONG, WIDE),
    "parts in another order": Mistake(
        "start, c0 + part * PART,", "start, c0 + (PARTS - 1 - part) * PART,", WRONG, WIDE
    ),
    "features of another part": Mistake("c = c0 + (part + 1) * PART", "c = c0 + part * PART", WRONG, WIDE),
    "the gate's share of both": Mistake("(1.0 - g) * temporal", "g * temporal", WRONG),
    "a closed operator's infinity": Mistake(
        "gl.where(g == 1.0, 0.0, (1.0 - g) * temporal)",
        "(1.0 - g) * temporal",
        WRONG,
        {"gates": ("spatial",), "infinite": True},
    ),
    "another sample's gate": Mistake("gate + b.to(gl.int64) * channels + c", "gate + c", WRONG),
    "the gate's gradient turned round": Mistake("(spatial - temporal)", "(temporal - spatial)", WRONG),
    "the gate's gradient of the first box": Mistake("(b * boxes + box)", "(b * boxes)", Exception),
    "what lies outside counted": Mistake(
        "inside[:, None] & (c0 + n < channels)[None, :], other=0.0",
        "inside[:, None] & (c0 + n < channels)[None, :]",
        WRONG,
    ),
    "features beyond the last channel": Mistake(" & (c0 + n < channels)[None, :]", "", Exception, RAGGED),
    "channels beyond the last": Mistake("inside[:, None] & known[None, :]", "inside[:, None]", Exception, RAGGED),
    "rows below the plane": Mistake(" & (h < size.h)", "", Exception),
    "no NaN of features without filters": Mistake(
        "g = gl.where(has_filters, g, ", "g = gl.where(b >= 0, g, ", WRONG, HOLE
    ),
    "no NaN of gates without filters": Mistake("gl.where(has_filters, gl.sum", "gl.where(b >= 0, gl.sum", WRONG, HOLE),
}

SHIFTED = "[b, t0 + dt, h0 + dh, w0 + dw, column]"
MANY, MIX, ABSENT = {"channels": 200}, {"mixing": (1, 3, 3)}, {"neurons": (1, 1, -1)}
WEIGHT = {
    "rows the wrong way": Mistake(SHIFTED, SHIFTED.replace("h0 + dh", "h0 - dh"), WRONG),
    "columns the wrong way": Mistake(SHIFTED, SHIFTED.replace("w0 + dw", "w0 - dw"), WRONG),
    "frames the wrong way": Mistake(SHIFTED, SHIFTED.replace("t0 + dt", "t0 - dt"), WRONG),
    "the other operand shifted as well": Mistake(
        "place = [b, t0, h0, w0, o0]", "place = [b, t0, h0 + dh, w0, o0]", WRONG
    ),
    "mixing shifted as the operators": Mistake("tap_shift(tap, KERNEL, SIGN)", "tap_shift(tap, KERNEL, 1)", WRONG, MIX),
    "the temporal operator shifted in space": Mistake("dh = gl.where(is_spatial, dh, 0)", "dh = dh + 0", WRONG),
    "temporal taps off by one": Mistake("tap - SPATIAL_TAPS - 1", "tap - SPATIAL_TAPS", WRONG),
    "the first channels for all": Mistake("column = row * BM", "column = row * 0", WRONG, MANY),
    "the spatial list for both": Mistake('plan_field(plan, slot, "spatial_blocks") * PANEL_BK', "0", WRONG),
    "the order's start for both": Mistake("k_channels + list_start", "k_channels", WRONG),
    "another slot's order": Mistake(
        "listed += slot.to(gl.int64) * k_channels + list_start", "listed += list_start", WRONG
    ),
    "other members": Mistake("members + start + i", "members + i", WRONG, {"neurons": (0, 1, 2)}),
    "a sample too few": Mistake(
        "steps = gl.load(groups + slot * 2 + 1) *", "steps = (gl.load(groups + slot * 2 + 1) - 1) *", Exception
    ),
    "the first slot's samples": Mistake(
        "range(0, gl.load(groups + slot * 2 + 1))", "range(0, gl.load(groups + 1))", Exception
    ),
    "a tap of the first operator": Mistake(
        "gl.where(is_spatial, 0, SPATIAL_TAPS)\n", "gl.where(is_spatial, 0, 0)\n", WRONG
    ),
    "tiles of a slot without a neuron": Mistake(
        "gl.where(gl.load(neuron_of + s) < 0, 0, count)", "count", Exception, ABSENT
    ),
    "tiles of one slot": Mistake("range(0, slots)", "range(0, 1)", WRONG),
    "a tile's number in all slots": Mistake("return slot, tile - first", "return slot, tile", Exception),
    "a tile too few": Mistake("tile - first, until", "tile - first, until - 1", WRONG),
    "rows of one block": Mistake("of_operator // across % rows", "of_operator // across % 1", WRONG, MANY),
    "too few bytes": Mistake("(BM + BN) * BOX.t", "BM * BOX.t", Fault),
    "too many bytes": Mistake("BOX.w * 2  # of", "BOX.w * 2 + 16  # of", Deadlock),
    "a producer that counts anew with each tile": Mistake(
        "SIGN)\n        column", "SIGN)\n        step = 0\n        column", Fault, MIX
    ),
    "a frame too few": Mistake("range(0, size.t, BOX.t)", "range(BOX.t, size.t, BOX.t)", Deadlock),
    "positions for channels": Mistake("reshape([BK, BM]).permute((1, 0))", "reshape([BM, BK])", WRONG),
    "rows beyond the list": Mistake("(j < count)[:, None] & (o", "(j >= 0)[:, None] & (o", Exception),
    "outputs beyond the last": Mistake("(o < right_width)[None, :]", "(o >= 0)[None, :]", Exception),
    "the order beyond its end": Mistake(
        "order + j, mask=j < count, other=0", "order + j", Fault, {"neurons": (0, 1, 2)}
    ),
    "slots for neurons": Mistake(
        "index = gl.load(neuron_of + slot)", "index = slot", WRONG, {"mixing": (1, 1, 1), "neurons": (2, 1, 2)}
    ),
}
PROBLEMS = {
    "data": (DATA, data_gradients, {"neurons": (0, 1, 2), "size": (2, 5, 3)}),
    "weight": (WEIGHT, weight_gradients, {"neurons": (0, 1, 0), "size": (2, 5, 3)}),
}


def noticed(kind: str, mistake: Mistake, monkeypatch: pytest.MonkeyPatch, seeds: int) -> Exception | None:
    """What it shows as, in the first of ``seeds`` orders in which it does."""
    _, problems, fields = PROBLEMS[kind]
    for seed in range(seeds):
        try:
            case, changed = problems.Case(**fields | mistake.case), broken(mistake, problems.FILE)
            *results, _ = problems.run(monkeypatch, case, seed, changed)
            problems.check(*results)
        except Exception as shown:
            return shown
    return None


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, (every, _, _) in PROBLEMS.items() for name in every])
def test_mistake_shows(kind, name, monkeypatch):
    mistake = PROBLEMS[kind][0][name]
    shown = noticed(kind, mistake, monkeypatch, 1 if mistake.shows is WRONG else SEEDS)
    assert isinstance(shown, mistake.shows), repr(shown)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_right_source_shows_nothing(kind, monkeypatch):
    """The problems of the mistakes are solved by the kernels as they are."""
    every = PROBLEMS[kind][0].values()
    for fields in {str(one.case): one.case for one in every}.values():
        assert noticed(kind, Mistake("return acc, step", "return acc, step", Fault, fields), monkeypatch, 2) is None
