"""The GPU command without a GPU: what it plans, how it keeps to its time, and what it makes of results."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import faster, gpu, gpu_bench, gpu_goals, report, v100
from benchmarks.baselines import HandwrittenEval
from benchmarks.gpu import Outcome, Step, allowance, chosen_steps, parse_parts, run_step, run_steps
from benchmarks.gpu_baselines import PLANS, padded, training_plan
from benchmarks.gpu_timing import NOT_RUN, rotation_count, short_name, slug
from benchmarks.gpu_workload import Workload, gpu_backends, half_precision
from benchmarks.margins import MARGIN, margins, separate_draws, separate_features
from benchmarks.parity import relative_error, training_errors, training_oracle
from benchmarks.shapes import NAMED_SHAPES, Problem
from benchmarks.variants import build, make_draws, make_reference
from dsts_kernels.backends import OPS
from dsts_kernels.backends.gpu import measured
from dsts_kernels.reference import DSTS, Draws
from dsts_kernels.roofline import CHIPS, SHAPES, Case, frozen_step, total
from dsts_kernels.roofline.tables import run_on

CPU = torch.device("cpu")
BOTH = ("triton", "cuda")
SMALL = Problem("small", (3, 5, 4), batch=5, channels=12, layers=3, neurons=4)


def step(name: str, least: float = 10, most: float = 100, command: list[str] | None = None, **more: Any) -> Step:
    return Step("tests", name, command or ["true"], least, most, **more)


def test_time_is_shared() -> None:
    """A step gets what the later ones do not need at the least, and no more than its own most."""
    steps = [step("first"), step("second", least=30), step("third", least=20)]
    assert allowance(steps, 0, left=500) == 100
    assert allowance(steps, 0, left=90) == 40, "90 less what the others need"
    assert allowance(steps, 2, left=90) == 90
    assert allowance(steps, 1, left=35) == 30, "too little for all: the earlier step goes first"
    assert allowance(steps, 1, left=29) == 0, "too little for itself"


def test_steps_that_do_not_fit_are_reported() -> None:
    """Late steps are not run and say so; a step that cannot run says why; neither counts as a failure."""
    ran = []

    def run(one: Step, seconds: float) -> Outcome:
        ran.append((one.name, seconds))
        return Outcome(one, True, seconds, "")

    missing = Step("sanitize", "memcheck", None, 30, 80, note="no such tool")
    outcomes = run_steps([step("first"), missing, step("long", least=1000)], time.monotonic() + 60, run)
    assert [o.ok for o in outcomes] == [True, None, None]
    assert [o.note for o in outcomes[1:]] == ["not run: no such tool", gpu.LATE]
    assert [name for name, _ in ran] == ["first"] and 10 <= ran[0][1] <= 60
    lines = gpu.table(outcomes)
    assert lines[0].split()[:3] == ["tests", "first", "ok"] and "no such tool" in lines[1]


def test_everything_fits_into_its_minutes(tmp_path: Path) -> None:
    """What the default parts need at the least is well under their time, build first and default tests last."""
    steps = chosen_steps(gpu.all_steps(tmp_path, 9, None, 4), gpu.DEFAULT_PARTS)
    assert sum(one.least for one in steps) < 0.75 * 60 * gpu.MINUTES
    assert [steps[0].part, steps[-1].name] == ["build", "pytest (default tests)"]
    assert {one.part for one in steps} == set(gpu.DEFAULT_PARTS)


def test_the_benchmark_fits_into_its_step(tmp_path: Path) -> None:
    """Every row of both backends, at its most; what one backend needs is less."""
    (bench,) = chosen_steps(gpu.all_steps(tmp_path, 9, None, 4), ["bench"])
    assert gpu_bench.needed_seconds(1) < gpu_bench.needed_seconds(2) <= bench.most - gpu.OWN_MARGIN_S
    assert bench.most + gpu.CLOSING_S < 60 * gpu.MINUTES, "alone it fits into the command's time"


def test_sanitizers_watch_either_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tool on each backend, a step of its own; without the tool they say what is missing."""
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "/tools/compute-sanitizer")
    steps = gpu.sanitize_steps()
    assert [one.name for one in steps[1:]] == [f"{tool}, {b}" for tool in ("memcheck", "racecheck") for b in BOTH]
    for one in steps[1:]:
        assert one.command[-2:] == ["--backend", one.name.split(", ")[1]]
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    assert all(one.command is None and "not found" in one.note for one in gpu.sanitize_steps())


def test_parts() -> None:
    """Chosen by name; one that does not exist is refused with the list of those that do."""
    assert parse_parts("bench, tests") == ("bench", "tests")
    assert gpu.read_options(["--parts", "tune"]).parts == ("tune",)
    for text in ("bench,fly", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="wanted some of build, tests"):
            parse_parts(text)


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_a_step_is_followed_and_ended() -> None:
    """Its last line is the note, its exit code the verdict; one that takes too long is stopped with its children."""
    log = io.StringIO()
    good = run_step(step("good", command=python("print('one'); print('two')")), 60, log)
    assert (good.ok, good.note) == (True, "two") and "one\ntwo" in log.getvalue()
    bad = run_step(step("bad", command=python("import sys; sys.exit('broken')")), 60, log)
    assert (bad.ok, bad.note) == (False, "broken")
    program = f"import sys; print('not run: no such chip'); sys.exit({NOT_RUN})"
    skipped = run_step(step("skipped", command=python(program)), 60, log)
    assert (skipped.ok, skipped.note) == (None, "not run: no such chip")
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.monotonic()
    late = run_step(step("late", command=python(sleeper)), gpu.GRACE_S + 1, log)
    assert late.ok is False and late.note.startswith("stopped after") and time.monotonic() - began < 30


def test_a_step_learns_its_own_limit() -> None:
    """The benchmark stops by itself before it is stopped."""
    program = "import sys; print(sys.argv[1:])"
    found = run_step(step("timed", command=python(program), takes_seconds="--seconds"), 100, io.StringIO())
    assert found.note == f"['--seconds', '{int(100 - gpu.OWN_MARGIN_S)}']"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "module", ["benchmarks.gpu", "benchmarks.gpu_bench", "benchmarks.gpu_sanitize", "benchmarks.tune"]
)
def test_without_a_gpu(module: str) -> None:
    """One line that says so and an exit code, not a traceback."""
    root = Path(gpu.__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", module], cwd=root, capture_output=True, text=True)
    assert done.returncode == (2 if module.endswith("tune") else 1)
    assert ("no CUDA GPU here" in done.stderr or "torch finds none" in done.stderr) and "Traceback" not in done.stderr


def test_inputs_exceed_the_cache() -> None:
    """Enough copies for twice the cache, and never fewer than two."""
    megabyte = 2**20
    for size in (1, 4, 33, 50, 134, 1000):
        copies = rotation_count(size * megabyte, 50 * megabyte)
        assert copies >= 2 and copies * size > 2 * 50
        assert copies == 2 or (copies - 1) * size <= 2 * 50, "not one more than needed"


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA L4", "nvidia-l4"),
    ],
)
def test_file_names(name: str, wanted: str) -> None:
    assert slug(name) == wanted


def test_kernel_names_are_short() -> None:
    assert short_name("void at::native::(anonymous namespace)::sum<float, 4>(int, float*)") == "at::native::sum"
    assert short_name("route_and_pack_kernel") == "route_and_pack_kernel"
    assert short_name("Memcpy DtoD (Device -> Device)").startswith("Memcpy DtoD")


def made_up(ms: dict[tuple[str, str, str, int], float | None], device: str = "Made up 1") -> dict[str, Any]:
    """Results with these milliseconds by mode, variant, shape and batch, and a matrix rate of 800 TFLOP/s."""
    rows = []
    for (mode, variant, shape, batch), value in ms.items():
        problem = Problem(shape, NAMED_SHAPES[shape], batch=batch)
        counted = {"literal_gflop": 2 * problem.literal_macs(mode) / 1e9, "peak_mib": None, "note": ""}
        rows.append({"mode": mode, "variant": variant, "shape": problem.label, "ms": value} | counted)
    machine = dict.fromkeys(("isa", "cuda", "cudnn"), "") | {"device": device, "threads": 1, "torch": "9"}
    return {
        "machine": machine | {"commit": "abc", "date": "today", "driver": "1.2", "triton": "3", "nvcc": "12.9"},
        "dtype": "bfloat16",
        "features": "none",
        "rate": {"torch.mm": 800e3, "best": "torch.mm"},
        "copy_gb_s": 3000.0,
        "rows": rows,
        "ops": [],
        "kernels": {},
        "goals": [],
        "scaling": [],
    }


ALL = {
    ("evaluation", "frozen triton", "tpn", 8): 1.0,
    ("evaluation", "literal", "tpn", 8): 12.0,
    ("evaluation", "handwritten", "tpn", 8): 2.4,
    ("evaluation", "graph triton", "tpn", 8): 0.9,
    ("evaluation", "graph triton", "tpn", 1): 0.18,
    ("training", "literal", "tpn", 8): 40.0,
    ("training", "fused triton", "tpn", 8): 10.0,
    ("evaluation", "frozen triton", "swin", 8): None,
    ("evaluation", "frozen cuda", "tpn", 8): 2.0,
}


def test_goals() -> None:
    """Met, missed and not measured, each with its figure."""
    results = made_up(ALL)
    results["ops"] = [
        {"op": "sums", "backend": "triton", "shape": "s", "us": 20.0, "bytes": 48_000_000},
        {"op": "pack", "backend": "triton", "shape": "s", "us": 20.0, "bytes": 30_000_000},
        {"op": "gate", "backend": "cuda", "shape": "s", "us": 9.0, "bytes": 10},
        {"op": "late", "backend": "cuda", "shape": "s", "us": None, "bytes": 10},
    ]
    found = {g["goal"]: g for g in gpu_goals.evaluate(results)}
    share = found["Triton: frozen, TPN: share of the matrix-product rate"]
    assert share["met"] is True and share["measured"] == "77.3% (1.000 ms)", "0.62 TFLOP in 1 ms of 800 TFLOP/s"
    assert [
        found[name]["met"]
        for name in (
            "Triton: literal eager / frozen, TPN",
            "Triton: best handwritten PyTorch / frozen, TPN",
            "Triton: literal eager / FusedDSTS training step, TPN",
            "Triton: frozen in a CUDA graph, batch 1 / batch 8, TPN",
        )
    ] == [True, False, True, True]
    assert found["Triton: best handwritten PyTorch / frozen, TPN"]["measured"] == "2.40"
    swin = [g for name, g in found.items() if "Swin-B" in name]
    assert len(swin) == 6 and all(g["met"] is None and g["measured"] == "not measured" for g in swin)
    ops = ("Triton: sums", "Triton: pack", "CUDA: gate", "CUDA: late")
    assert [found[f"{op}, s"]["met"] for op in ops] == [True, False, True, None]
    lines = gpu_goals.lines(list(found.values()))
    assert any(line.endswith("MISSED") for line in lines) and len(lines) == len(found)


@pytest.mark.parametrize(
    "device, dtype, ms, hopper, volta",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 2.0, True, None),  # 0.62 TFLOP in 2 ms of 800 TFLOP/s: 39%
        ("NVIDIA H200", "bfloat16", 2.5, False, None),
        ("Tesla V100-SXM2-16GB", "float16", 9.9, None, True),
        ("Tesla V100-SXM2-16GB", "float16", 10.1, None, False),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 1.0, None, None),
    ],
)
def test_cuda_goals(device: str, dtype: str, ms: float, hopper: bool | None, volta: bool | None) -> None:
    """Goals of a chip count on that chip alone; Triton's rows are not the CUDA backend's."""
    timed = {("evaluation", "frozen cuda", "tpn", 8): ms, ("evaluation", "frozen triton", "tpn", 8): 0.1}
    found = {g["goal"]: g["met"] for g in gpu_goals.evaluate(made_up(timed, device) | {"dtype": dtype})}
    assert found["CUDA: frozen, TPN: share of the matrix-product rate on an H100"] is hopper
    assert found["CUDA: frozen, Swin-B: share of the matrix-product rate on an H100"] is None
    assert found["CUDA: frozen, TPN, batch 8 in float16 on a V100"] is volta


def test_report_of_a_gpu(tmp_path: Path) -> None:
    """The README's table is drawn from the file: graph rows, small times, driver, goals and kernels."""
    results = made_up({key: ms for key, ms in ALL.items() if ms})
    results["goals"] = gpu_goals.evaluate(results)
    results["backends"] = {"triton": None, "cuda": None, "other": "no such chip"}
    results["kernels"] = {"frozen tpn": [{"name": "conv_kernel", "calls": 3.0, "us": 200.0}]}
    path = tmp_path / "made-up.json"
    path.write_text(json.dumps(results))
    done = subprocess.run([sys.executable, report.__file__, str(path)], capture_output=True, text=True, check=True)
    for part in (
        "triton 3, nvcc 12.9, driver 1.2",
        "**FrozenDSTS, CUDA graph, Triton** | **0.180** |",
        "**FrozenDSTS, CUDA C++** | **2.000** | 6.00x | 1.20x |",
        "other: not run, no such chip.",
        "copy rate 3000 GB/s",
        "Triton: literal eager / frozen, TPN: 12.00, wanted at least 10 (met)",
        "kernels of frozen tpn, 600 us: conv_kernel 3 x 200.0 us",
    ):
        assert part in done.stdout
    assert gpu.goal_lines(path, since=0) and not gpu.goal_lines(path, since=time.time() + 60)
    assert gpu.goal_lines(tmp_path / "none.json", since=0) == []


def test_margins() -> None:
    """The lead of the best over the second, by the size of scores."""
    assert margins(torch.tensor([[3.0, 1.0, -3.0]])).item() == pytest.approx(2 / (19 / 3) ** 0.5)
    assert margins(torch.ones(2, 3, 1)).tolist() == [[float("inf")] * 3] * 2


def test_draws_are_separated() -> None:
    """Scores nearly tied in any layer are not after it, and the chosen neurons stay the same where they can."""
    reference = make_reference(SMALL, torch.float64, CPU)
    x = torch.rand(SMALL.feature_shape, dtype=torch.float64)
    draws = make_draws(SMALL, CPU, torch.float64)

    def route(draws: Draws):
        with torch.no_grad():
            return reference.train()(x, draws=draws, return_routing=True)[1]

    first = route(draws)
    tie = first.scores[0, 0].max() - first.scores[0, 0]
    draws = draws._replace(gumbel=draws.gumbel.index_put((torch.tensor(0), torch.tensor(0)), tie))
    assert margins(route(draws).scores + draws.gumbel).min() < MARGIN
    after = separate_draws(route, draws)
    assert margins(route(after).scores + after.gumbel).min() >= MARGIN
    assert torch.equal(after.noise, draws.noise) and torch.equal(after.hard, draws.hard)


def test_features_are_separated() -> None:
    """A sample on which two neurons tie is changed, the others are not."""
    layer_scores = torch.nn.Linear(12, 4, bias=False, dtype=torch.float64)

    class Route:
        def __init__(self, x: torch.Tensor) -> None:
            self.scores = layer_scores(x.mean((2, 3, 4)))[None].detach()

    x = torch.rand(6, 12, 2, 3, 3, dtype=torch.float64)
    x[2] = 0
    x[2, 0] = 1.0
    with torch.no_grad():
        layer_scores.weight[:, 0] = 1.0  # what only sample 2 consists of
    after = separate_features(Route, x, margin=1e-9)
    assert not torch.equal(after[2], x[2]) and torch.equal(after[[0, 1, 3, 4, 5]], x[[0, 1, 3, 4, 5]])
    assert margins(Route(after).scores).min() >= 1e-9


def test_padded_lists_change_nothing() -> None:
    """Channels of weight zero: the same output, every list a whole number of blocks."""
    reference = make_reference(SMALL, torch.float64, CPU).eval()
    x = torch.rand(SMALL.feature_shape, dtype=torch.float64)
    plain = HandwrittenEval(reference)(x)
    module = padded(HandwrittenEval(reference))
    assert all(neuron.spatial_channels.numel() % 64 == 0 for layer in module.folded for neuron in layer.neurons)
    assert relative_error(module(x), plain) < 1e-12


@pytest.mark.parametrize("plan", PLANS)
def test_training_plans_agree(plan: str) -> None:
    """Both ways to group samples are the reference's training step."""
    reference = make_reference(SMALL, torch.float64, CPU)
    x = torch.rand(SMALL.feature_shape, dtype=torch.float64)
    draws, grad = make_draws(SMALL, CPU, torch.float64), torch.randn_like(x)
    oracle = training_oracle(build("literal", "training", SMALL, reference), x, draws, grad)
    with training_plan(plan):
        errors = training_errors(build("handwritten", "training", SMALL, reference), x, draws, grad, oracle)
    assert max(errors.values()) < 1e-9


def test_workload() -> None:
    """Inputs of every batch size out of one pool, in the benchmark's precision, with an oracle of the same values."""
    work = Workload(CPU, l2_bytes=20_000, channels=12, grids={"tiny": (2, 3, 4)})
    assert isinstance(work.half, DSTS) and work.half.layers[0].gate.dtype == torch.bfloat16
    assert torch.equal(work.single.layers[0].gate, work.half.layers[0].gate.float())
    for batch in (1, 8, 32):
        inputs = work.inputs("tiny", batch)
        assert len(inputs) == work.rotation("tiny", batch) and all(x.shape[0] == batch for x in inputs)
        assert sum(x.numel() * x.element_size() for x in inputs) > 2 * 20_000
        assert inputs[0].is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(work.inputs("tiny", 8)[0][:1], work.inputs("tiny", 1)[0])
    assert margins(work.routing(work.inputs("tiny", 32)[0]).scores).min() >= MARGIN
    frozen = build("frozen", "evaluation", work.problem("tiny", 8), work.half)
    x, wanted = work.inputs("tiny", 8)[0], work.evaluation_output("tiny", 8)
    assert relative_error(frozen(x), wanted) < 5e-2
    noise = work.draws("tiny").noise
    assert torch.equal(noise, noise.bfloat16().float()), "a module in bfloat16 sees the oracle's noise"


def test_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 on a GPU that has no bfloat16; a workload takes what it is given."""
    for capability, wanted in (((7, 0), torch.float16), ((7, 5), torch.float16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert half_precision(torch.device("cuda")) == wanted
    assert half_precision(CPU) == torch.bfloat16
    work = Workload(CPU, l2_bytes=1000, channels=8, grids={"tiny": (1, 2, 2)}, dtype=torch.float16)
    assert work.half.layers[0].gate.dtype == work.inputs("tiny", 1)[0].dtype == torch.float16


def test_gpu_backends_say_why_not() -> None:
    """Both, with a reason on a CPU tensor unless kernels are interpreted there."""
    found = gpu_backends(CPU, torch.float32)
    assert tuple(found) == BOTH and found["cuda"]


def test_winners() -> None:
    """Every shape alike, by the geometric mean: twice as fast outweighs a slower half by less."""
    times = [("tap_sums", "half", 1.0, 2.0), ("tap_sums", "half", 1.0, 0.4), ("gated_conv3d", "float", 3.0, 3.0)]
    log = [{"op": op, "kind": kind, "shape": "", "ms": {"triton": t, "cuda": c}} for op, kind, t, c in times]
    assert faster.winners(log) == {"tap_sums half": "cuda", "gated_conv3d float": "triton"}
    assert faster.winners([]) == {}


def test_winners_are_what_backends_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that is written is the one looked up, by op, kind and chip."""
    log = [
        {"op": op, "kind": kind, "shape": "", "ms": {"triton": 2.0, "cuda": 1.0 if op == "tap_sums" else 3.0}}
        for op in OPS
        for kind in faster.KINDS
    ]
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3"))
    monkeypatch.setattr(faster, "compare", lambda *_: log)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(faster.machine, "describe", lambda device: {"device": "Made up", "torch": "9", "commit": "abc"})
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    monkeypatch.setattr(measured, "capability", lambda device: (9, 0))
    monkeypatch.setattr(measured, "faster", measured.faster.__wrapped__)
    path = faster.write(tmp_path, torch.device("cuda"))
    assert path.name == "sm_90.json"
    record = json.loads(path.read_text())
    assert [record[key] for key in ("device", "torch", "triton", "commit")] == ["Made up", "9", "3", "abc"]
    for op in OPS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            wanted = "cuda" if op == "tap_sums" else "triton"
            assert measured.winner(op, torch.device("cuda"), dtype) == wanted


def test_the_papers_row_without_a_gpu(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what it needs; the roofline's figure is marked as a prediction; the command fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert v100.PAPER_MS == 129 and v100.main([]) == 1
    first, _, paper, mark, _, predicted = capsys.readouterr().out.splitlines()
    assert "no CUDA GPU" in first and "nothing was measured" in first and "docs/gpu.md" in first
    assert paper.endswith("129 ms a batch of 8") and mark.startswith("PREDICTION, NOT A MEASUREMENT")
    case = run_on(Case(*SHAPES["tpn"], batch=8), CHIPS["v100"])
    expected = total(frozen_step(case, CHIPS["v100"]), case.kind, CHIPS["v100"])
    assert "V100" in predicted and f"{expected.graph:.3f}" in predicted.split()
