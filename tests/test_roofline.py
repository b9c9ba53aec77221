"""The roofline: counts worked out by hand, bounds that no prediction beats, and the launchers that it imitates."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.compiled import ahead
from dsts_kernels.backends.base import FrozenOptions, FrozenWeights
from dsts_kernels.backends.gpu import grids, switches
from dsts_kernels.backends.gpu.grids import deal
from dsts_kernels.backends.packing import tile_channels
from dsts_kernels.backends.triton import load
from dsts_kernels.cli import main
from dsts_kernels.roofline import (
    CHIPS,
    SHAPES,
    STEPS,
    Case,
    Chip,
    folded_flop,
    frozen_step,
    literal_flop,
    predict,
    total,
)
from dsts_kernels.roofline.launches import conv_grid, gather, route_and_gather
from dsts_kernels.roofline.tables import run_on

from .support.targets import require_triton

TPN, SWIN = (Case(*SHAPES[name]) for name in ("tpn", "swin"))
CASES = {
    "tpn": TPN,
    "swin": SWIN,
    "ragged": Case(100, (3, 5, 9), batch=3, layers=2, neurons=4, share=0.37),
    "float32": TPN._replace(dtype=torch.float32, kind="ieee"),
    "tf32": SWIN._replace(dtype=torch.float32, kind="tf32"),
    "tiny": Case(1, (1, 1, 1), batch=1, layers=1, neurons=1, share=1.0),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_chip = pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
every_step = pytest.mark.parametrize("step", STEPS)


def test_flop_counts():
    """The figures of the design, section 2: 2.37 TFLOP literal and 0.62 folded, at TPN and batch 8."""
    assert literal_flop(TPN) / 1e12 == pytest.approx(2.37, abs=0.005)
    assert folded_flop(TPN) / 1e12 == pytest.approx(0.62, abs=0.005)
    assert sum(launch.flop for launch in frozen_step(TPN, CHIPS["h100"])) == folded_flop(TPN)


@every_step
@every_chip
@every_case
def test_no_launch_beats_a_bound(case, chip, step):
    """A prediction is at least useful FLOP at peak, bytes at the bandwidth of memory and of L2, cycles at the clock."""
    case = run_on(case, chip)
    for launch in STEPS[step](case, chip):
        us, bound, parts, worst = predict(launch, case.kind, chip)
        assert us >= launch.flop / (getattr(chip, case.kind) * 1e6), launch
        assert us >= launch.dram / (chip.bandwidth * 1e3) and us >= launch.l2 / (chip.l2_bandwidth * 1e3), launch
        assert us >= launch.cycles / chip.clock and worst >= max(us, launch.worst / chip.clock), launch
        assert us >= parts[bound] or bound == "latency"
        assert launch.busiest * chip.processors >= launch.flop * (1 - 1e-9), launch


@every_step
@every_chip
@pytest.mark.parametrize("case", [TPN, SWIN], ids=SHAPES)
def test_more_batch_takes_no_less(case, chip, step):
    """Half of a training batch is hard, so an even batch does all that the odd one before it does, or more."""
    times = []
    for batch in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        more = run_on(case._replace(batch=batch), chip)
        times.append(total(STEPS[step](more, chip), more.kind, chip))
    for before, after in itertools.pairwise(times):
        assert before.kernels < after.kernels and before.graph < after.graph and before.floor < after.floor


@every_chip
@every_case
def test_sums(case, chip):
    """Gaps come on top of kernels, a host that launches one by one on top of gaps; nothing beats its products."""
    case = run_on(case, chip)
    for step in STEPS.values():
        found = total(step(case, chip), case.kind, chip)
        assert found.launched > found.graph > found.kernels > found.floor and found.worst >= found.graph
        assert sum(found.shares.values()) == pytest.approx(1)


def test_frozen_order():
    """Two launches a layer and one before them."""
    names = [launch.kernel for launch in frozen_step(TPN._replace(layers=4), CHIPS["a100"])]
    assert names == ["tap_sums", *["route_and_gather", "conv packed"] * 4]


@pytest.mark.parametrize("steps", [[96] * 8, [96], [24, 192, 3, 96, 96], [1, 1], [5, 300]], ids=str)
@pytest.mark.parametrize("ctas", [132, 7, 1, 256])
def test_deal(steps, ctas):
    """All K blocks are dealt: the busiest CTA has the mean or more, and never much more where there is enough."""
    per_sample = 64
    found = deal(steps, per_sample, ctas)
    mean = sum(steps) * per_sample / ctas
    assert mean <= found.longest <= max(mean + max(steps) + 8, 16)
    assert found.parts == 0 if ctas == 1 else found.parts >= 2 * (found.parts_of_a_tile > 0)
    assert found.parts_of_a_tile <= ctas


def test_deal_by_hand():
    """Three tiles of 8 K blocks on two CTAs: no whole wave, so each takes 12 and the middle tile is cut."""
    assert deal([8, 8, 8], 1, 2) == (12, 2, 2, 2, 0)
    assert deal([8] * 4, 1, 2) == (16, 2, 0, 0, 0)
    assert deal([5], 1, 4) == (5, 1, 0, 0, 3), "a range of fewer than eight K blocks costs more than it saves"


def test_when_tiles_are_shared():
    """TPN, batch 8, on an H100, 512 tiles: 3.88 waves of equal tiles are dealt whole. Lists that differ decide anew."""
    assert deal([102] * 8, 64, 132) == (4 * 102, 4, 0, 0, 0)
    assert deal([102] * 8, 64, 132, grids.ALWAYS_SHARE).parts > 0
    assert deal([192, 96] * 4, 64, 132).parts > 0, "a full last wave leaves a program 38% above the mean"
    assert deal([192] * 4 + [96] * 4, 64, 132).parts == 0
    tiles = range(1, 200)
    shared = {deal([100], count, 100).parts > 0 for count in tiles if count % 100 and count % 100 < 85}
    whole = {deal([100], count, 100).parts > 0 for count in tiles if not 0 < count % 100 < 85}
    assert shared == {True} and whole == {False}
    with switches.switched(whole_waves=False):
        assert deal([102] * 8, 64, 132).parts > 0


def test_gather_bytes():
    """The gather's bytes are those of its tensors, where L2 holds the features, all neurons chosen, no column idle."""
    case = Case(256, (4, 8, 8), batch=4, neurons=4, share=0.4)  # lists of 102 and 154: 2 and 3 blocks of 64
    assert case.features < CHIPS["h100"].l2 * 1e6 / 4 and case.split == (102, 154)
    with launchers(CHIPS["h100"]) as (launch, recorded):
        run_frozen(launch, case)
        found = next(call for call in recorded if call.kernel == "route_and_gather")
    parts = found.tensors["sums"].shape[1]
    expected = sum(t.numel() * t.element_size() for t in found.tensors.values())
    assert found.tensors["panel"].shape[-1] == 5 * 64
    assert route_and_gather(case, CHIPS["h100"], parts).dram == expected

    lists = case.sample_lists()  # two hard samples in 2 and 3 blocks, two soft ones in 4 and 4
    launch = gather("gather_panel", case, CHIPS["h100"], lists, 4, 0.0)
    assert launch.dram == case.features + case.positions * case.element * 64 * (2 * 5 + 2 * 8)


class Call(NamedTuple):
    """One recorded launch."""

    kernel: str
    ctas: int
    tensors: dict[str, torch.Tensor]
    constants: dict[str, object]


class Recorder:
    """Stands in for a kernel and writes its launches down."""

    def __init__(self, kernel, recorded: list[Call]) -> None:
        self.kernel, self.recorded = kernel, recorded

    def __getitem__(self, grid: tuple[int, ...]):
        return functools.partial(self.record, math.prod(grid))

    def record(self, ctas: int, *arguments, **constants) -> None:
        named = zip(self.kernel.arg_names, arguments, strict=False)
        bases = {name: getattr(value, "base", value) for name, value in named}  # of tensor descriptors
        tensors = {name: value for name, value in bases.items() if isinstance(value, torch.Tensor)}
        name = self.kernel.fn.__name__.removesuffix("_kernel")
        form = constants.get("FORM")
        self.recorded.append(Call(f"{name} {form}" if form else name, ctas, tensors, constants))


@contextlib.contextmanager
def launchers(chip: Chip) -> Iterator[tuple]:
    """The launchers on a chip that is not here, and the list of their launches, none of which runs."""
    require_triton()
    recorded: list[Call] = []
    stand_in = functools.partial(Recorder, recorded=recorded)
    with (
        switches.switched(**ahead.WITHOUT_GLUON),
        ahead.on_chip(chip.architecture, chip.processors, stand_in) as backend,
    ):
        yield backend, recorded


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def features_of(case: Case) -> torch.Tensor:
    return meta(case.batch, *case.size, case.channels, dtype=case.dtype).permute(0, 4, 1, 2, 3)


def run_frozen(launch, case: Case) -> None:
    c, n, x, sums = case.channels, case.neurons, features_of(case), None
    filters = meta(n * 12 * c * tile_channels(case.dtype), dtype=case.dtype)
    integers = meta(n, c, dtype=torch.int32), meta(n + 1, dtype=torch.int64)
    weights = FrozenWeights(meta(n, c, 1), *integers, filters, meta(n, c), None)
    h = x
    for layer in range(case.layers):
        last = layer == case.layers - 1
        options = FrozenOptions(0, [1, 1, 1], True, "tiled", 0 if last else 1)
        h, sums, _, _ = launch.frozen_layer(h, sums, x if last else None, weights, options)


def run_training_layer(launch, case: Case) -> None:
    """Forward and backward of one layer, in the order in which autograd calls them."""
    b, c, n, x = case.batch, case.channels, case.neurons, features_of(case)
    half = functools.partial(meta, dtype=case.dtype)
    neuron, hard = meta(b, dtype=torch.int64), meta(b, dtype=torch.bool)
    logits, noise, gate = half(n, c), half(b, c), half(b, c)
    spatial, temporal, mixing = half(n, c, c, 1, 3, 3), half(n, c, c, 3, 1, 1), half(n, c, c, 1, 1, 1)
    gumbel, scoring, wide = meta(b, n), meta(n, c, 1), (meta(b, n), meta(b, c))
    fused = hasattr(launch.kernels, "route")
    if fused:
        launch.kernels.route(x, scoring, logits, noise, hard, gumbel, 1, 1.0, True)
    else:
        launch.tap_sums(x, 1)
        launch.semhash_gate(logits, neuron, noise, hard)
    _, kept = launch.gated_conv3d_keeping(x, gate, neuron, spatial, temporal, [True] * 5)
    launch.mixing_conv3d(x, neuron, mixing)
    launch.mixing_conv3d_backward(x, x, neuron, mixing, [True, True])
    launch.gated_conv3d_backward(x, x, gate, neuron, spatial, temporal, [True] * 4, kept)
    if not fused:
        launch.semhash_gate_backward(gate, logits, neuron, noise)
        return
    gradients = meta(b, n), gate, meta(b)
    launch.kernels.route_backward(
        gradients, wide[0], gumbel, neuron, wide[1], scoring, logits, noise, 1, 1.0, (True, True, True)
    )


@pytest.mark.parametrize("case", [TPN, SWIN, TPN._replace(batch=1), CASES["ragged"], CASES["float32"]], ids=str)
@pytest.mark.parametrize("name", ["a100", "h100"])
@pytest.mark.parametrize("step", STEPS)
def test_launches_are_those_of_the_launchers(case, name, step):
    """Kernels in their order, CTAs of each, tiles of the large ones."""
    chip, before = CHIPS[name], torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with launchers(chip) as (launch, recorded):
            (run_frozen if step == "frozen" else run_training_layer)(launch, case)
    finally:
        torch.set_float32_matmul_precision(before)
    case = case if step == "frozen" else case._replace(layers=1)
    ours = [one for one in STEPS[step](case, chip) if one.num_ctas]
    assert [re.sub(" (mixing|union)$", "", one.kernel) for one in ours] == [call.kernel for call in recorded]
    assert [one.num_ctas for one in ours] == [call.ctas for call in recorded]
    for one, call in zip(ours, recorded, strict=True):
        if one.tile is not None:
            rows = math.prod(call.constants["BOX"])
            gradient = call.kernel == "weight_gradient"
            assert rows == (one.tile.k if gradient else one.tile.m) and call.constants["BN"] == one.tile.n
            assert (call.constants["num_warps"], call.constants["num_stages"]) == one.tile[3:5]


@pytest.mark.parametrize("batch", [1, 2, 8, 32])
@pytest.mark.parametrize("name", ["a100", "h100"])
@pytest.mark.parametrize("case", [TPN, SWIN, CASES["ragged"]], ids=["tpn", "swin", "ragged"])
def test_conv_grid_is_the_launchers(case, name, batch):
    """Tile, box, CTAs and whole waves of the persistent convolution."""
    case, chip = case._replace(batch=batch), CHIPS[name]
    with launchers(chip):
        theirs = load("conv").conv_grid(features_of(case), case.channels, case.channels + 64, 9, 1)
    assert conv_grid(case, chip, case.channels + 64, 9) == theirs


@pytest.mark.parametrize("name", SHAPES)
def test_command(name, capsys):
    """Every launch and every chip, headed as predictions."""
    assert main(["roofline", "--shape", name, "--all"]) == 0
    text = capsys.readouterr().out
    sizes = "x".join(map(str, (8, SHAPES[name][0], *SHAPES[name][1])))
    assert text.startswith("PREDICTIONS, NOT MEASUREMENTS") and "SASS" in text
    wanted = (
        "route_and_gather",
        "conv packed",
        "conv listed",
        "data_gradient",
        "weight_gradient",
        "in a CUDA graph",
        sizes,
    )
    for part in (*wanted, *(chip.title for chip in CHIPS.values())):
        assert part in text, part
    assert max(map(len, text.splitlines())) < 180


def test_summary(capsys):
    """A dozen lines: a row for each chip with the sums that ``--all`` has, and what was measured, as its file says."""
    assert main(["roofline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 15 and max(map(len, lines)) < 180 and lines[0].startswith("PREDICTIONS, NOT MEASUREMENTS")
    assert main(["roofline", "--all"]) == 0
    sums = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sum: ")]
    steps = len(SHAPES) * len(STEPS)
    for place, chip in enumerate(CHIPS.values()):
        (row,) = (line for line in lines if line.startswith(f"{chip.title} "))
        assert all(
            line.split(" of kernels, ")[1].split(" in a CUDA graph")[0] in row for line in sums[place :: len(CHIPS)]
        )
        assert len(sums[place :: len(CHIPS)]) == steps


def test_summary_says_what_was_measured(capsys):
    """Milliseconds of the results that the repository keeps."""
    path = Path(__file__).resolve().parents[1] / "benchmarks/results/h200.json"
    assert main(["roofline"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    rows = {(r["mode"], r["shape"], r["variant"]): r["ms"] for r in json.loads(path.read_text())["rows"]}
    tpn, swin = "tpn 8x1024x8x16x16", "swin 8x1024x16x7x7"
    frozen = [rows["evaluation", shape, "graph triton"] for shape in (tpn, swin)]
    step = [rows["training", shape, "captured triton"] for shape in (tpn, swin)]
    assert f"a frozen module {frozen[0]:.2f} ms (tpn) and {frozen[1]:.2f} ms (swin)" in text
    assert f"a training step {step[0]:.1f} and {step[1]:.1f} ms" in text


def test_command_options(capsys):
    """Options reach the tables, one step and one chip are enough, and equal ones count once."""
    options = "--shape 96x4x14x14 --chip A100 --chip a100 --step frozen --batch 3 --layers 2 --neurons 7"
    assert main(["roofline", "--all", *options.split(), "--dtype", "tf32", "--spatial-share", "0.25"]) == 0
    text = capsys.readouterr().out
    assert (
        "frozen  3x96x4x14x14 tf32 on A100 SXM4, triton: 2 layers, 7 neurons, 25% of channels spatial (predicted)"
        in text
    )
    assert text.count(" on ") == 1 and "V100" not in text and "training" not in text


def test_command_backend(capsys):
    """Of a chip that runs both backends either can be had; an old one has no choice."""
    for wanted, found in (("cuda", "cuda"), ("triton", "triton")):
        options = f"--shape swin --chip h100 --chip t4 --step frozen --backend {wanted}"
        assert main(["roofline", "--all", *options.split()]) == 0
        text = capsys.readouterr().out
        assert f"on H100 SXM5, {found}: 3 layers" in text and "on T4, cuda: 3 layers" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chip", "b200"], "--chip: got 'b200', wanted v100 or t4 or a100 or h100 or h200"),
        (["--shape", "1024x8x16"], "--shape: got '1024x8x16', wanted tpn or swin or CxTxHxW"),
        (["--shape", "16x0x4x4"], "--shape: got '16x0x4x4', wanted"),
        (
            ["--shape", "65536x256x256x256"],
            "--shape: got 65536x256x256x256 with --batch 8, wanted at most 2^31 elements",
        ),
        (["--batch", "0"], "--batch: got '0', wanted a whole number from 1 to 65536"),
        (["--layers", "two"], "--layers: got 'two', wanted a whole number"),
        (["--spatial-share", "1.5"], "--spatial-share: got '1.5', wanted a number from 0 to 1"),
        (["--spatial-share", "nan"], "--spatial-share: got 'nan', wanted a number from 0 to 1"),
        (["--dtype", "int8"], "--dtype: got 'int8', wanted bfloat16 or float16 or float32 or tf32"),
        (["--backend", "cpu"], "--backend: got 'cpu', wanted triton or cuda"),
        (["--step", "backward"], "--step: got 'backward', wanted frozen or training or all"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["roofline", *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err
