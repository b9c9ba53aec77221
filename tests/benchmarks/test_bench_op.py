"""One op is timed after parity, beside its floor and beside another commit; what cannot be compared is refused."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import ROOT, op, registry, revision
from benchmarks.op import Case, Timed
from benchmarks.shapes import Problem
from dsts_kernels.backends import OPS as BACKEND_OPS

PROBLEM = Problem("small", (2, 3, 3), batch=3, channels=8, neurons=2)
SMALL = ["--shape", "2x3x3", "--channels", "8", "--neurons", "2", "--batch", "3", "--rounds", "4"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "rates", lambda device, dtype: (100.0, 10.0))
    monkeypatch.setattr(op, "ROUND_SECONDS", 1e-3)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package and benchmarks in two commits, tagged; the second has other native sources. Its module is text."""
    root = tmp_path / "repository"
    for name, text in (("csrc/kernel.cpp", "one"), ("dsts_kernels/__init__.py", ""), ("benchmarks/op.py", "old")):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(text)
    (root / ".gitignore").write_text("_C.*\n_build.*\nbuild/\n")
    run = ["git", "-C", str(root), "-c", "user.name=one", "-c", "user.email=one@example.com"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"], ["tag", "first"]):
        subprocess.run([*run, *command], check=True)
    (root / "csrc/kernel.cpp").write_text("two")
    (root / "benchmarks/op.py").write_text("new")
    subprocess.run([*run, "commit", "-qam", "second"], check=True)
    (root / "dsts_kernels/_C.so").write_text("ours")
    (root / "dsts_kernels/_build.json").write_text("ours")
    monkeypatch.setattr(revision, "build_record", lambda: ("cuda", ""))
    return root


def test_every_op_is_timed() -> None:
    """What backends run, and the backward passes that are ops of their own."""
    assert {name.removesuffix("_backward") for name in registry.OPS} == set(BACKEND_OPS)
    schemas = {name.removesuffix("_backward") for name in registry.OPS if hasattr(torch.ops.dsts_kernels, name)}
    assert schemas == set(BACKEND_OPS)


@pytest.mark.parametrize("name", registry.OPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parity_and_work(name: str, dtype: str) -> None:
    """Every op runs, agrees with the eager backend, and counts its operations and bytes."""
    timed = Timed(Case(name, PROBLEM, dtype, "cpu"))
    assert timed.seconds(2) > 0
    facts = timed.facts
    assert (facts["flop"] > 0) == ("conv3d" in name or name == "frozen_layer")
    assert facts["bytes"] >= 3 * 8 * getattr(torch, dtype).itemsize and facts["error"] < 5e-2


def test_floor_of_a_gated_convolution() -> None:
    """One hard sample lists every channel once: operations, and bytes of features, gates and listed filters."""
    problem = Problem("small", (2, 3, 3), channels=8, neurons=2)
    timed = Timed(Case("gated_conv3d", problem, "float32", "cpu"))
    spatial = int(registry.Inputs(problem, torch.float32, torch.device("cpu")).gate.sum())
    taps = 9 * spatial + 3 * (8 - spatial)
    assert timed.facts["flop"] == 2 * taps * 8 * 18
    assert timed.facts["bytes"] == 4 * (2 * 8 * 18 + 8 + taps * 8)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the op; NaN is wrong too."""
    right = registry.OPS["tap_sums"]
    for factor in (1.01, float("nan")):

        def run(inputs: registry.Inputs, x: torch.Tensor, backend: str, factor: float = factor) -> list[torch.Tensor]:
            return [y * (1 if backend == "eager" else factor) for y in right.run(inputs, x, backend)]

        monkeypatch.setitem(op.OPS, "tap_sums", right._replace(run=run))
        with pytest.raises(SystemExit, match=r"tap_sums: result 0 is off the eager backend's by .*; not timed"):
            op.main(["tap_sums", *SMALL, "--device", "cpu"])


def test_one_op(capsys: pytest.CaptureFixture) -> None:
    assert op.main(["gated_conv3d", *SMALL, "--device", "cpu"]) == 0
    head, machine, floor, line = capsys.readouterr().out.splitlines()
    assert head == "gated_conv3d, 3x8x2x3x3, float32" and f"torch {torch.__version__}" in machine
    assert re.fullmatch(r"floor: \S+ GFLOP at 100 GFLOP/s: [\d.]+ us; \S+ MB at 10 GB/s: [\d.]+ us", floor)
    assert re.match(
        r"time: [\d.]+ \wm?s \(least [\d.]+ \w+, [\d.e+]+ times the floor\), backend \w+, relative error ", line
    )


def test_against_another_commit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Two processes of this tree take turns: both times, and their ratio with an interval around it."""

    @contextlib.contextmanager
    def this_tree(rev: str, device: str) -> Iterator[Path]:
        yield ROOT

    monkeypatch.setattr(revision, "base_tree", this_tree)
    assert op.main(["semhash_gate", *SMALL, "--device", "cpu", "--threads", "1", "--base", "main"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[-3:]] == ["this tree", "main", "this tree / main"]
    median, low, high = map(float, re.search(r": ([\d.]+) \(95%: ([\d.]+) to ([\d.]+), 4 rounds\)", lines[-1]).groups())
    assert 0 < low <= median <= high


def test_a_process_that_ends_is_told_of() -> None:
    case = Case("tap_sums", PROBLEM, "float32", "cpu", backend="cuda")
    with pytest.raises(revision.Refused, match="ended with exit code 1"), revision.Worker(ROOT, case):
        pass


def test_a_process_of_another_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree without the package would import one from elsewhere."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    case = Case("semhash_gate", PROBLEM, "float32", "cpu")
    with pytest.raises(revision.Refused, match="got the package of"), revision.Worker(tmp_path, case):
        pass


class Steady:
    """Takes as long as it says."""

    def __init__(self, *seconds: float) -> None:
        self.facts, self.left, self.calls = {}, list(seconds), []

    def seconds(self, calls: int) -> float:
        self.calls.append(calls)
        return self.left.pop(0)


def test_turns() -> None:
    """As many calls on either side, by the slower one, and each begins every second round."""
    order: list[str] = []

    class Noted(Steady):
        def seconds(self, calls: int) -> float:
            order.append("one" if self is one else "other")
            return super().seconds(calls)

    one, other = Noted(1e-4, 1.0, 2.0), Noted(2e-4, 3.0, 4.0)
    assert op.take_turns([one, other], 2) == [[1.0, 2.0], [3.0, 4.0]]
    assert one.calls == other.calls == [1, 5, 5]
    assert order[2:] == ["one", "other", "other", "one"]


@pytest.mark.parametrize("values", [[1.0] * 9, [0.9, 1.0, 1.1] * 5, [0.8, 0.81, 0.82, 0.83] * 3 + [1.5]])
def test_interval(values: Sequence[float]) -> None:
    """Holds the median, and an outlier does not move it."""
    low, high = op.interval(values)
    assert min(values) <= low <= sorted(values)[len(values) // 2] <= high <= sorted(values)[-2]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["gated"], "op: got 'gated', wanted one of semhash_gate, "),
        (["tap_sums", "--shape", "4x7"], "shape: got '4x7', wanted one of"),
        (["tap_sums", "--channels", "0"], "--channels: got 0, wanted at least 1"),
        (["tap_sums", "--device", "nowhere"], "nowhere"),
        (["tap_sums", "--device", "cpu", "--backend", "cuda"], "--backend: cuda cannot run tap_sums: "),
    ],
)
def test_bad_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        op.main(arguments)
    assert said in capsys.readouterr().err


def test_unknown_commit(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(revision.Refused, match="got 'nonsense', wanted a commit that git knows"):
        revision.commit_of("nonsense", repository)
    (tmp_path / "no_repository").mkdir()
    with pytest.raises(revision.Refused, match="git rev-parse"):
        revision.commit_of("first", tmp_path / "no_repository")


def test_module_of_the_same_sources(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is built; the benchmarks are this tree's; the folder is gone in the end."""
    monkeypatch.setattr(revision, "build", lambda tree, kind: pytest.fail("built"))
    with revision.base_tree("HEAD", "cpu", repository) as tree:
        assert (tree / "csrc/kernel.cpp").read_text() == "two"
        assert (tree / "dsts_kernels/_C.so").read_text() == "ours"
    assert not tree.exists()
    worktrees = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True)
    assert len(worktrees.stdout.splitlines()) == 1


def test_module_of_other_sources(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built once, for the device that is timed, and then taken from where it was kept."""
    built: list[tuple[str, str]] = []

    def build(tree: Path, kind: str) -> None:
        built.append(((tree / "csrc/kernel.cpp").read_text(), kind))
        (tree / "dsts_kernels/_C.so").write_text("theirs")

    monkeypatch.setattr(revision, "build", build)
    for device in ("cpu", "cpu", "cuda:0"):
        with revision.base_tree("first", device, repository) as tree:
            assert (tree / "dsts_kernels/_C.so").read_text() == "theirs"
            assert (tree / "benchmarks/op.py").read_text() == "new"
    assert built == [("one", "cpu"), ("one", "cuda")]
    (repository / "csrc/new.cpp").write_text("not committed")
    assert not revision.same_sources("HEAD", repository)


def test_a_failed_build_says_why(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text("raise SystemExit('error: no compiler')")
    with pytest.raises(revision.Refused, match="does not build with DSTS_BUILD=cpu:\nerror: no compiler"):
        revision.build(tmp_path, "cpu")


def test_a_case_travels() -> None:
    case = Case("tap_sums", PROBLEM, "float16", "cuda:1", "triton", 3)
    assert Case.read(str(case)) == case and json.loads(str(case))["problem"]["channels"] == 8
