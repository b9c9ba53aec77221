"""A backbone's variants share weights, are checked where DSTS is, take turns, and become a table with verdicts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import bench_backbone
from benchmarks.backbones import memory
from benchmarks.backbones import turns as turns_file
from benchmarks.backbones.models import KINDS, VARIANTS, Case, dsts_in, variant_of
from benchmarks.backbones.turns import Turns
from benchmarks.backbones.workload import Workload
from benchmarks.conftest import read_settings
from benchmarks.report import backbones, tables
from dsts_kernels.backbones import BACKBONES, TPN, Backbone
from tests.backbones.models import CHANNELS, ChannelsLast

SMALL_TPN = dataclasses.replace(BACKBONES["tpn"], channels=32)  # of width 2
CHANNELS_LAST = dataclasses.replace(BACKBONES["swin3d_b"], channels=CHANNELS)
CPU = torch.device("cpu")


def small_tpn() -> nn.Module:
    return TPN(48, width=2, blocks=(1, 1, 1, 1), aux_logits=True)


@pytest.fixture(params=["BCTHW", "BTHWC"])
def workload(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Workload:
    """Two clips through a small TPN, or through a model whose channels lie last."""
    name, about, model = "tpn", SMALL_TPN, small_tpn
    if request.param == "BTHWC":
        name, about, model = "swin3d_b", CHANNELS_LAST, ChannelsLast
    monkeypatch.setattr(Case, "about", property(lambda case: about))
    return Workload(Case(name, batch=2, frames=8, size=64, neurons=3, layers=2), backbone=model())


def run(workload: Workload, mode: str, rounds: int = 2) -> tuple[dict[str, nn.Module], Turns, dict[str, float]]:
    models = workload.models(mode)

    def drop() -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)

    turns = Turns(workload.steps(mode, models), drop, workload.device, KINDS[mode])
    errors = workload.warm_up(mode, models, turns)
    for _ in range(rounds):
        turns.round()
    return models, turns, errors


@pytest.mark.parametrize("mode", VARIANTS)
def test_variants_are_checked_and_timed(workload: Workload, mode: str) -> None:
    models, turns, errors = run(workload, mode)
    with_dsts = set(VARIANTS[mode][1:])
    assert errors.keys() == with_dsts and max(errors.values()) <= 5e-3
    rows = bench_backbone.rows_of(workload.case, mode, turns, models, errors)
    assert [row["variant"] for row in rows] == list(VARIANTS[mode])
    assert {row["variant"] for row in rows if "overhead" in row} == with_dsts
    assert all(row["rounds"] == 2 and min(row["seconds"]) > 0 for row in rows)
    gflop = {row["variant"]: row["gflop"] for row in rows}
    assert gflop["literal"] > gflop["fused"] > gflop["backbone"] > 0
    assert not any(p.grad is not None for model in models.values() for p in model.parameters())


def test_flop_of_training_is_that_of_forward_and_backward(workload: Workload) -> None:
    _, evaluation, _ = run(workload, "evaluation", 0)
    _, training, _ = run(workload, "training", 0)
    for variant in ("backbone", "literal"):
        assert 2 < training.gflop[variant] / evaluation.gflop[variant] < 3.6


def test_variants_share_weights(workload: Workload) -> None:
    wanted = workload.backbone.state_dict(keep_vars=True)
    for model in workload.models("evaluation").values():
        own = model.state_dict(keep_vars=True)
        assert all(own[name] is tensor for name, tensor in wanted.items())
    literal, fused = (dsts_in(workload.models("training")[name], workload.case) for name in ("literal", "fused"))
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(literal.parameters(), fused.parameters(), strict=True))


def test_the_backbone_itself_is_left_alone(workload: Workload) -> None:
    before = [name for name, _ in workload.backbone.named_modules()]
    for name in VARIANTS["evaluation"]:
        variant_of(workload.backbone, name, "evaluation", workload.case, workload.reference)
    assert [name for name, _ in workload.backbone.named_modules()] == before


@pytest.mark.parametrize(("mode", "wrong"), [("evaluation", "fused"), ("evaluation", "frozen"), ("training", "fused")])
def test_a_wrong_variant_is_not_timed(workload: Workload, mode: str, wrong: str) -> None:
    models = workload.models(mode)
    dsts_in(models[wrong], workload.case).skip = False
    turns = Turns(workload.steps(mode, models), lambda: None, CPU)
    with pytest.raises(AssertionError, match=f"{wrong} in {workload.case.label}.*parity: "):
        workload.warm_up(mode, models, turns)


def test_nearly_tied_scores_are_rolled_apart(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rolled = workload.clips.clone(), workload.clips.clone()
    answers = iter((torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.ones(2, 2)))
    monkeypatch.setattr("benchmarks.backbones.workload.margins", lambda scores: next(answers))
    clips = workload.separated(rolled)
    assert torch.equal(clips[0], before[0]) and torch.equal(clips[1], before[1].roll(7, -1))


def test_turns_turn_round_and_pair() -> None:
    ran: list[str] = []
    turns = Turns({name: lambda name=name: ran.append(name) for name in "abc"}, lambda: ran.append("-"), CPU)
    for _ in range(2):
        turns.round()
    assert "".join(ran) == "-a-b-c--c-b-a-"
    turns.seconds = {"a": [1.0, 2.0, 4.0], "b": [1.1, 2.2, 4.4], "c": [2.0, 4.0, 4.0]}  # the machine got slower
    overhead = turns.overhead("b", "a")
    assert (overhead.low, overhead.median, overhead.high) == pytest.approx((0.1, 0.1, 0.1))
    assert turns.overhead("c", "a").median == pytest.approx(1.0)


def test_kinds_of_steps_count_alike() -> None:
    turns = Turns({"a": lambda: None, "b": lambda: None}, lambda: None, CPU, kinds=2)
    turns.seconds = {"a": [1.0, 1.0, 2.0, 2.0], "b": [1.0, 2.0, 2.0, 4.0]}
    assert turns.means("b") == [1.5, 3.0]
    overhead = turns.overhead("b", "a")
    assert (overhead.low, overhead.median, overhead.high) == (0.5, 0.5, 0.5)
    turns.once = {"a": 1.0, "b": 1.0}
    assert [turns.whole(rounds) for rounds in (1, 2, 3)] == [2, 2, 4] and turns.rounds_in(1) == 4


def test_training_steps_are_half_hard(workload: Workload) -> None:
    given: list[torch.Tensor] = []
    models = workload.models("training")
    turns = Turns(workload.steps("training", models), lambda: None, CPU, kinds=2)
    workload.warm_up("training", models, turns)
    hook = lambda module, args, kwargs: given.append(kwargs["draws"].hard)  # noqa: E731
    for name in ("literal", "fused"):
        dsts_in(models[name], workload.case).register_forward_pre_hook(hook, with_kwargs=True)
    for _ in range(2):
        turns.round()
    literal, fused, fused_again, literal_again = given  # the second round turns round
    assert torch.equal(literal, fused) and torch.equal(literal_again, fused_again)
    assert torch.equal(literal, ~literal_again) and 0 < literal.float().mean() < 1


class Time:
    """Both clocks, which go only when told: waiting for others takes no processor's time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.processor = 0.0
        monkeypatch.setattr(turns_file, "time", self)
        for name, clock in (("wall", self.perf_counter), ("processor", self.process_time)):
            monkeypatch.setitem(turns_file.CLOCKS, name, clock)

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.processor

    def spend(self, working: float, waiting: float = 0.0) -> None:
        self.processor += working
        self.wall += working + waiting


def test_gradients_are_dropped_off_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    turns = Turns({"a": lambda: time.spend(1.0)}, lambda: time.spend(10.0), CPU)
    turns.round()
    assert turns.seconds["a"] == [1.0]


@pytest.mark.parametrize(("clock", "wanted"), [("wall", 4.0), ("processor", 1.0)])
def test_clocks(clock: str, wanted: float, monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    turns = Turns({"a": lambda: time.spend(1.0, waiting=3.0)}, lambda: time.spend(10.0), CPU, clock=clock)
    turns.warm_up("a")
    turns.round()
    assert turns.once["a"] == wanted and turns.seconds["a"] == [wanted] and turns.share == 0.25


def test_rounds_fit_the_time() -> None:
    turns = Turns({"a": lambda: None, "b": lambda: None}, lambda: None, CPU)
    turns.once = {"a": 2.0, "b": 3.0}
    assert [turns.rounds_in(seconds) for seconds in (1, 25, 1e6)] == [3, 5, 20]


def test_a_gpu_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    time, waited = Time(monkeypatch), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.wall

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    gpu = torch.device("cuda", 0)
    turns = Turns({"a": lambda: time.spend(0.03)}, lambda: time.spend(1.0), gpu)
    turns.warm_up("a")
    assert turns.calls == 3  # a tenth of a second of them
    turns.round()
    assert turns.seconds["a"] == [pytest.approx(0.03)] and set(waited) == {gpu} and turns.share is None


def test_a_gpu_evaluates_graphs_too(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def __init__(self, step: Any, x: torch.Tensor) -> None:
            self.replay = lambda: step(x)

    monkeypatch.setattr("benchmarks.gpu.timing.captured", lambda step, x: (Graph(step, x), None))
    models, here = workload.models("evaluation"), workload.device
    workload.device = torch.device("cuda")
    steps, training = workload.steps("evaluation", models), workload.steps("training", models)
    workload.device = here
    assert list(steps) == [*VARIANTS["evaluation"], "backbone graph", "frozen graph"] and list(training) == list(models)
    turns = Turns(steps, lambda: None, CPU)
    errors = workload.warm_up("evaluation", models, turns)
    turns.round()
    rows = {row["variant"]: row for row in bench_backbone.rows_of(workload.case, "evaluation", turns, models, errors)}
    alone, frozen = (turns.seconds[name][0] for name in ("backbone graph", "frozen graph"))
    assert (
        rows["frozen graph"]["overhead"] == pytest.approx(frozen / alone - 1)
        and "overhead" not in rows["backbone graph"]
    )
    assert (
        rows["frozen graph"]["gflop"] == rows["frozen"]["gflop"] and rows["frozen graph"]["error"] == errors["frozen"]
    )


@pytest.mark.parametrize("mode", VARIANTS)
def test_memory_measures_one_step(workload: Workload, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "make_backbone", lambda case: workload.backbone)
    for variant in VARIANTS[mode]:
        kept: list[torch.Tensor] = []
        monkeypatch.setattr(
            memory, "resident_peak_kib", lambda step, kept=kept: (kept.append(step()), (2048, "made up"))[1]
        )
        assert memory.measure_here(variant, mode, workload.case) == {"peak_mib": 2.0, "method": "made up"}
        assert kept[0].shape == ((2, workload.plain(workload.clips).shape[1]) if mode == "evaluation" else ())


def test_memory_refuses_what_there_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    request = {"variant": "frozen", "mode": "training", "case": str(Case("tpn", 1, 8, 64)), "threads": 1}
    monkeypatch.setattr("sys.argv", ["memory", json.dumps(request)])
    with pytest.raises(SystemExit):
        memory.main()
    assert "cannot measure 'frozen' in mode 'training'" in capsys.readouterr().err


class Config:
    """The part of pytest's configuration that options are read from."""

    def __init__(self, *args: str, **given: Any) -> None:
        self.args = args
        self.options = {
            "neurons": 10,
            "layers": 3,
            "channels": 1024,
            "dtype": "float32",
            "device": "cpu",
            "clock": "wall",
        }
        self.options |= given

    def getoption(self, name: str) -> Any:
        return self.options.get(name.removeprefix("--").replace("-", "_"))


def test_options() -> None:
    tpn, swin = read_settings(Config()).cases
    assert (tpn.label, swin.label) == ("tpn 1x3x8x256x256", "swin3d_b 1x3x32x224x224")
    assert read_settings(Config()).problems[0].batch == 1
    on_gpu = read_settings(Config(device="cuda", backbone=["r3d_18"], size=64)).cases
    assert [case.label for case in on_gpu] == ["r3d_18 8x3x16x64x64"] and on_gpu[0].memory_format == "channels_last_3d"
    assert Case.read(str(tpn)) == tpn
    assert read_settings(Config(batch=3, frames=4)).cases[0].clip_shape == (3, 3, 4, 256, 256)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backbone": ["tpm"]}, "--backbone: got 'tpm', wanted one of tpn, swin3d_b"),
        ({"frames": 0}, "frames: got 0, wanted at least 1"),
        ({"size": -1}, "size: got -1, wanted at least 1"),
        ({"rounds": 0}, "--rounds: got 0, wanted at least 1"),
        ({"clock": "processor", "device": "cuda"}, "--clock: got processor on cuda with [0-9]+ threads, wanted cpu"),
    ],
)
def test_bad_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(pytest.UsageError, match=message):
        read_settings(Config(**given))


def test_whole_backbones_run_when_asked() -> None:
    assert not bench_backbone.asked(Config("benchmarks/"))
    assert bench_backbone.asked(Config("benchmarks/", backbone=["tpn"]))
    assert bench_backbone.asked(Config("benchmarks/bench_backbone.py"))


def row(case: str, mode: str, variant: str, ms: float, overhead: float | None = None, **other: Any) -> dict[str, Any]:
    made = {"case": case, "mode": mode, "variant": variant, "ms": ms, "rounds": 3, "gflop": 131.0}
    made |= {"parameters_m": 90.0, "weights_mib": 344.0, "peak_mib": 500.0, "dtype": "float32", "note": ""}
    made |= {"memory_format": "contiguous", "clock": "wall", "share": 1.0}
    if overhead is not None:
        made |= {"overhead": overhead, "low": overhead - 0.01, "high": overhead + 0.01}
    return made | other


def results(rows: list[dict[str, Any]], device: str = "A CPU", isa: str = "AVX9") -> dict[str, Any]:
    machine = {"device": device, "isa": isa, "threads": 2, "torch": "9", "cuda": "13", "cudnn": "9"}
    machine |= {"commit": "abc", "date": "today"}
    rate = {"torch.mm": 200.0, "best": "torch.mm"}
    own = {"machine": machine, "dtype": "float32", "features": "none", "rate": rate, "rows": [], "scaling": []}
    return own | {"backbones": rows, "clips": "bikes.mp4"}


TPN_CLIPS, SWIN_CLIPS = "tpn 1x3x8x256x256", "swin3d_b 1x3x32x224x224"


def test_table() -> None:
    rows = [
        row(SWIN_CLIPS, "evaluation", "backbone", 4000.0),
        row(TPN_CLIPS, "training", "fused", 3900.0, 0.3),
        row(TPN_CLIPS, "evaluation", "frozen", 1140.0, 0.14, peak_mib=None),
        row(TPN_CLIPS, "evaluation", "backbone", 1000.0),
        {"case": "s3d 1x3x128x224x224", "note": "not timed: torchvision: cannot be imported"},
    ]
    for text in ("\n".join(tables.plain(results(rows))), tables.markdown(results(rows))):
        assert "741 ms without DSTS and 870 with it (its Table 5" in text and "9 h and 12 h (its Table 4" in text
        assert "not timed: torchvision: cannot be imported" in text
        assert "matrix rate" not in text, "that table has no rows"
    lines = backbones.table(results(rows))
    assert [line[1] for line in lines] == ["s3d 1x3x128x224x224", SWIN_CLIPS, TPN_CLIPS, TPN_CLIPS, TPN_CLIPS]
    assert lines[2][2:] == ["alone", "1000.0", "-", "-", "-", "131.0", "131", "90.0", "344", "500"]
    assert lines[3][2:7] == ["FrozenDSTS", "1140.0", "+14.0%", "+13.0% to +15.0%", "+17.4%"]
    assert lines[3][-1] == "-" and lines[4][6] == "+33.3%"
    assert "| **FrozenDSTS** | **1140.0** | **+14.0%** |" in tables.markdown(results(rows))


def test_the_paper_stands_beside_its_own_backbones() -> None:
    rows = [row("r3d_18 1x3x16x112x112", "training", "fused", 1.0, 0.3), row(SWIN_CLIPS, "training", "fused", 1.0, 0.3)]
    assert [line[6] for line in backbones.table(results(rows))] == ["-", "+33.3%"]


def test_goals_are_of_full_sizes_on_the_machine_they_were_set_for() -> None:
    rows = [
        row(TPN_CLIPS, "evaluation", "frozen", 1.0, 0.19),
        row(TPN_CLIPS, "evaluation", "literal", 1.0, 1.6),
        row(SWIN_CLIPS, "evaluation", "frozen", 1.0, 0.04),
        row("tpn 1x3x8x64x64", "evaluation", "frozen", 1.0, 0.5),
        row(TPN_CLIPS, "training", "fused", 1.0, 0.3, dtype="bfloat16"),
    ]
    assert [(goal["goal"], goal["met"]) for goal in backbones.goals(results(rows))] == [
        (f"FrozenDSTS, evaluation, {TPN_CLIPS}", False),
        (f"FrozenDSTS, evaluation, {SWIN_CLIPS}", True),
    ]
    on_h100 = [dict(own, dtype="bfloat16", share=None) for own in rows[:3]]
    found = backbones.goals(results(on_h100, "NVIDIA H100 80GB HBM3", ""))
    assert [goal["met"] for goal in found] == [True, True] and found[0]["wanted"] == "at most +25.0%"
    assert backbones.goals(results(on_h100, "NVIDIA A100", "")) == []


@pytest.mark.parametrize(
    ("overhead", "other", "met"),
    [
        (0.16, {}, True),
        (0.17, {}, None),  # the limit, 0.174, lies within the interval
        (0.19, {}, False),
        (-0.4, {"share": 0.4}, None),  # a busy machine
        (0.16, {"share": 0.4, "clock": "processor"}, True),
    ],
)
def test_verdicts(overhead: float, other: dict[str, Any], met: bool | None) -> None:
    found = results([row(TPN_CLIPS, "evaluation", "frozen", 1.0, overhead, **other)])
    assert [goal["met"] for goal in backbones.goals(found)] == [met]
    assert ("others used the machine" in tables.markdown(found)) == (other == {"share": 0.4})


def test_there_is_no_figure_of_backbones(tmp_path: Any) -> None:
    with pytest.raises(SystemExit, match="--figure: got results of backbones alone"):
        tables.figure(results([row(TPN_CLIPS, "evaluation", "backbone", 1.0)]), tmp_path / "none.png")


def test_every_backbone_can_be_a_case() -> None:
    for about in BACKBONES.values():
        assert isinstance(Case(about.name, 1, about.frames, about.size).about, Backbone)
