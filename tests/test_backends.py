"""The choice of a backend: what can run, why not, how to override, and that the chosen one really ran."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch

from dsts_kernels import FusedDSTS, backends
from dsts_kernels.backends import BACKENDS, OPS, available, build, choose, explain, use_backend
from dsts_kernels.backends.base import ONE_LAUNCH, Backend
from dsts_kernels.backends.cuda import refusal
from dsts_kernels.backends.gpu import Kernels, measured
from dsts_kernels.backends.gpu.switches import switched
from dsts_kernels.backends.triton import unusable

CPU = torch.device("cpu")


def test_eager_is_always_there():
    """Plain PyTorch runs every op in every dtype."""
    assert "eager" in available()
    for op in OPS:
        for dtype in backends.base.FLOATS:
            assert BACKENDS["eager"].why_not(op, CPU, dtype) is None


def test_native_is_preferred():
    """Where the native module was built, it is what runs."""
    if "cpu" not in available():
        pytest.skip(BACKENDS["cpu"].missing())
    assert choose("gated_conv3d", CPU, torch.float32).name == "cpu"


def test_override_nests_and_ends():
    """use_backend holds for its block, inside another, and is undone after an exception."""
    before = choose("tap_sums", CPU, torch.float32).name
    with use_backend("eager"):
        assert choose("tap_sums", CPU, torch.float32).name == "eager"
        with pytest.raises(ZeroDivisionError), use_backend(None):
            assert choose("tap_sums", CPU, torch.float32).name == before
            raise ZeroDivisionError
        assert choose("tap_sums", CPU, torch.float32).name == "eager"
    assert choose("tap_sums", CPU, torch.float32).name == before


def test_the_chosen_backend_really_runs(backend, monkeypatch):
    """A spy on the backend sees every op of a training step; the argument wins over the override."""
    called = set()
    for op in ("semhash_gate", "tap_sums", "gated_conv3d", "gated_conv3d_backward", "mixing_conv3d"):
        original = getattr(BACKENDS[backend], op)
        monkeypatch.setitem(
            vars(BACKENDS[backend]), op, lambda *a, op=op, original=original: called.add(op) or original(*a)
        )
    with use_backend("eager"):
        FusedDSTS(4, num_layers=1, num_neurons=2, backend=backend)(torch.randn(2, 4, 2, 3, 3)).sum().backward()
    assert called == {"semhash_gate", "tap_sums", "gated_conv3d", "gated_conv3d_backward", "mixing_conv3d"}


def test_a_named_backend_that_cannot_run_is_an_error():
    """No silent fallback: asking for the CPU backend on another device says why it cannot."""
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run tap_sums on meta .*CPU tensors"):
        choose("tap_sums", torch.device("meta"), torch.float32, "cpu")
    with pytest.raises(
        ValueError, match="use_backend\\(name\\): got 'none-such', wanted one of 'cpu', 'triton', 'cuda', 'eager'"
    ):
        use_backend("none-such")


def test_missing_native_module(monkeypatch):
    """Without the native module the reason of the install is given and plain PyTorch takes over."""
    monkeypatch.setattr(build, "_C", None)
    monkeypatch.setattr(build, "build_record", lambda: ("none", "no compiler was found"))
    assert "cpu" not in available() and available()[-1] == "eager"
    assert choose("gated_conv3d", CPU, torch.float32).name == "eager"
    assert "no compiler was found" in explain("gated_conv3d", "cpu", torch.float32)
    with pytest.raises(RuntimeError, match="no compiler was found"):
        use_backend("cpu")


def test_a_failed_build_is_announced(monkeypatch):
    """A build that was wanted and failed warns on import; one that was not wanted, or worked, does not."""
    monkeypatch.setattr(build, "_C", None)
    monkeypatch.setattr(build, "build_record", lambda: ("none", "no compiler was found"))
    with pytest.warns(RuntimeWarning, match="without its native kernels.*no compiler was found.*--no-cache-dir"):
        build.warn_if_missing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(build, "build_record", lambda: ("none", "DSTS_BUILD=none"))
        build.warn_if_missing()
        monkeypatch.undo()
        build.warn_if_missing()


def test_a_module_that_does_not_load(monkeypatch):
    """Built with CUDA kernels and not to be loaded is what every report says, not that it was built without them."""
    monkeypatch.setattr(build, "_C", None)
    monkeypatch.setattr(build, "_IMPORT_ERROR", "libgomp.so.1: cannot open shared object file")
    monkeypatch.setattr(build, "build_record", lambda: ("cuda", ""))
    says = r"was built, with CPU and CUDA kernels, but does not load \(libgomp.so.1: cannot open shared object file\)"
    with pytest.warns(RuntimeWarning, match=says):
        build.warn_if_missing()
    for text in (*(BACKENDS[name].missing() for name in ("cpu", "cuda")), build.build_details()["native build"]):
        assert re.search(says, text) and "without CUDA" not in text and "not built" not in text


def test_triton_says_why_not(monkeypatch):
    """It is for CUDA tensors, or CPU tensors in the interpreter, never for float64; CPU tensors stay with others."""
    backend, cuda = BACKENDS["triton"], torch.device("cuda")
    monkeypatch.setitem(vars(backend), "missing", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend.why_not("tap_sums", CPU, torch.float32) == "it runs on CUDA tensors, not on cpu"
    monkeypatch.setitem(vars(BACKENDS["cuda"]), "missing", lambda: "not built")
    monkeypatch.setattr("dsts_kernels.backends.gpu.measured.capability", lambda device: (9, 0))
    monkeypatch.setattr("dsts_kernels.backends.triton.capability", lambda device: (7, 0))
    assert "compute capability 8.0, this GPU has 7.0" in backend.why_not("tap_sums", cuda, torch.float32)
    monkeypatch.setattr("dsts_kernels.backends.triton.capability", lambda device: (9, 0))
    assert backend.why_not("tap_sums", cuda, torch.bfloat16) is None
    assert choose("tap_sums", cuda, torch.bfloat16) is backend
    assert "float64" in backend.why_not("tap_sums", cuda, torch.float64)
    assert choose("tap_sums", cuda, torch.float64).name == "eager"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.why_not("tap_sums", CPU, torch.float16) is None
    assert "not on cuda" in backend.why_not("tap_sums", cuda, torch.float16)


def test_triton_without_triton(monkeypatch):
    """An install without triton says so, and imports nothing of it."""
    from dsts_kernels.backends.triton import unusable

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert unusable.__wrapped__() == "triton is not installed (pip install triton)"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.4.0+git1")
    assert unusable.__wrapped__() == "triton 3.4.0+git1 is installed, 3.6 or later is needed"
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.10.1")
    assert unusable.__wrapped__() is None
    code = "import sys, dsts_kernels; assert 'triton' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


IN_TORCH = ("sm_75", "sm_80", "sm_90", "sm_120")


class Forgets(dict):
    """Keeps nothing: GPUs change within a test, as they never do elsewhere."""

    def __setitem__(self, key: object, value: object) -> None:
        pass


@pytest.fixture
def a_gpu(monkeypatch):
    """``a_gpu(9, 0, targets=...)``: as on a machine with such a GPU, and a native module built for ``targets``."""
    rules = measured.rules

    def be(major, minor, targets=(75, 80, 90, 100, 110, 120), version="13.0", built_in_torch=IN_TORCH):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(backends, "_chosen", Forgets())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built_in_torch))
        monkeypatch.setattr("dsts_kernels.backends.triton.unusable", lambda: None)
        monkeypatch.setattr("dsts_kernels.backends.cuda.native_targets", lambda: targets and (version, list(targets)))
        for module in ("triton", "cuda", "gpu.measured"):
            monkeypatch.setattr(f"dsts_kernels.backends.{module}.capability", lambda device: (major, minor))
        refusal.cache_clear()
        rules.cache_clear()

    yield be
    refusal.cache_clear()
    rules.cache_clear()


CUDA = torch.device("cuda")


@pytest.mark.parametrize("major, minor, runs", [(7, 5, "cuda"), (8, 6, "triton"), (9, 0, "triton"), (12, 1, "triton")])
def test_which_gpu_backend_runs(a_gpu, monkeypatch, major, minor, runs):
    """Triton from 8.0 on, CUDA C++ before and wherever triton is missing; Triton where no CUDA kernels were built."""
    a_gpu(major, minor)
    assert all(choose(op, CUDA, torch.float16).name == runs for op in OPS)
    assert choose("tap_sums", CUDA, torch.float16, "cuda").name == "cuda"
    assert choose("tap_sums", CUDA, torch.float64).name == "eager"
    monkeypatch.setattr("dsts_kernels.backends.triton.unusable", lambda: "triton is not installed")
    assert choose("gated_conv3d", CUDA, torch.float16).name == "cuda"
    a_gpu(major, minor, targets=None)
    assert choose("gated_conv3d", CUDA, torch.float16).name == ("triton" if major >= 8 else "eager")


SMALL, LARGE = (2, 64, 4, 5, 5), (2, 64, 8, 16, 16)
TABLE = """{"sm_90": {"rules": [
 {"ops": ["tap_sums", "gated_conv3d"], "kind": "half", "backend": "eager", "channels": [16, 64], "positions": [1, 200]},
 {"ops": ["tap_sums"], "kind": "half", "backend": "cuda", "channels": [16, 64], "positions": [201, 9999]},
 {"ops": ["mixing_conv3d"], "kind": "float", "backend": "none-such", "channels": [1, 999], "positions": null},
 {"ops": ["frozen_layer"], "kind": "float", "backend": "eager", "channels": [1, 64], "positions": null}]}}"""


def test_the_faster_backend_runs_by_size(a_gpu, monkeypatch):
    """What was measured faster on such a chip wins, by op, kind and size, where it can run and is not switched off."""
    a_gpu(9, 0)
    monkeypatch.setattr(measured, "table", lambda: measured.read(TABLE))
    assert choose("tap_sums", CUDA, torch.bfloat16, None, SMALL).name == "eager"
    assert choose("gated_conv3d", CUDA, torch.float16, None, SMALL).name == "eager"
    assert choose("tap_sums", CUDA, torch.bfloat16, None, LARGE).name == "cuda"
    assert choose("gated_conv3d", CUDA, torch.bfloat16, None, LARGE).name == "triton", "no rule for so many positions"
    assert choose("tap_sums", CUDA, torch.bfloat16, None, (2, 65, 4, 5, 5)).name == "triton", "nor for so many channels"
    assert choose("tap_sums", CUDA, torch.bfloat16, None, (8, 64, 1, 5, 5)).name == "eager", "200 positions"
    assert choose("tap_sums", CUDA, torch.bfloat16, None, (3, 64, 67, 1, 1)).name == "cuda", "201"
    assert choose("tap_sums", CUDA, torch.float32, None, SMALL).name == "triton", "another kind"
    assert choose("mixing_conv3d", CUDA, torch.float32, None, SMALL).name == "triton", "no such backend"
    assert choose("tap_sums", CUDA, torch.bfloat16).name == "triton", "no size"
    assert choose("tap_sums", CUDA, torch.bfloat16, "triton", SMALL).name == "triton", "asked for by name"
    with switched(plain_where_faster=False):
        assert choose("tap_sums", CUDA, torch.bfloat16, None, SMALL).name == "triton"
    a_gpu(9, 0, targets=None)
    assert choose("tap_sums", CUDA, torch.bfloat16, None, LARGE).name == "triton", "the faster one cannot run"
    a_gpu(8, 0)
    assert choose("tap_sums", CUDA, torch.bfloat16, None, SMALL).name == "triton", "another chip's table"


def test_a_frozen_module_is_packed_for_the_faster_backend(monkeypatch):
    """By channels, at freeze and when it is called: what is packed for plain PyTorch runs there."""
    asked = []

    def winner(op, device, dtype, size):
        asked.append((op, size[1]))
        return "eager"

    backend = BACKENDS["triton"]
    monkeypatch.setitem(vars(backend), "why_not", lambda *_: None)
    monkeypatch.setitem(vars(BACKENDS["cpu"]), "why_not", lambda *_: "not in this test")
    monkeypatch.setattr(backends, "_faster", lambda first, *args: BACKENDS[winner(*args)])
    fused = FusedDSTS(6, num_layers=2, num_neurons=2).eval()
    x = torch.randn(2, 6, 2, 3, 3)
    frozen = fused.freeze()
    assert [layer.packing for layer in frozen.layers] == ["plain", "plain"] and asked == [("frozen_layer", 6)]
    with use_backend("eager"):
        wanted = fused(x)
    torch.testing.assert_close(frozen(x), wanted)
    assert asked[1:] == [("frozen_layer", 6)] * 2


def test_explain_says_what_was_measured(a_gpu, monkeypatch):
    """Nothing yet, nothing of this chip, the rules of an op, that it was never slower, or that nobody asks."""
    a_gpu(9, 0)
    monkeypatch.setattr(measured, "table", dict)
    says = "no GPU was measured yet (python -m benchmarks.gpu.sweep)"
    assert f"  faster by size: {says}" in explain("tap_sums", CUDA, torch.float16).splitlines()[-1]
    assert "faster by size" not in explain("tap_sums", CPU)
    monkeypatch.setattr(measured, "table", lambda: measured.read(TABLE))
    measured.rules.cache_clear()
    text = explain("tap_sums", CUDA, torch.float16, SMALL)
    assert text.startswith("tap_sums on cuda in torch.float16 runs on 'eager'")
    assert "'eager' from 16 to 64 channels, 1 to 200 positions; 'cuda' from 16 to 64 channels" in text
    assert "'eager' from 1 to 64 channels" in explain("frozen_layer", CUDA, torch.float32).splitlines()[-1]
    assert "no other was measured faster" in explain("mixing_conv3d", CUDA, torch.float16)
    assert "measured on sm_90" in explain("tap_sums", CUDA, torch.float64)
    a_gpu(8, 9)
    assert "this chip was not measured" in explain("tap_sums", CUDA, torch.float16)
    with switched(plain_where_faster=False):
        assert "switched off" in explain("tap_sums", CUDA, torch.float16)


def test_rules_that_ship():
    """They are in the wheel, name ops and backends that exist, in ranges that are none backwards; a frozen layer's ask
    channels alone."""
    root = Path(__file__).parents[1]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["dsts_kernels"]
    assert measured.FILE.relative_to(Path(backends.__file__).parents[1]).as_posix() in data
    for rules in measured.read(measured.FILE.read_text(encoding="utf-8")).values():
        for rule in rules:
            assert set(rule.ops) <= set(OPS) and rule.backend in BACKENDS and rule.kind in ("half", "float"), rule
            assert rule.channels[0] <= rule.channels[1], rule
            assert rule.positions is None or rule.positions[0] <= rule.positions[1], rule
    with pytest.raises(ValueError, match="sm_90: got a rule about positions for frozen_layer, wanted null"):
        measured.read(TABLE.replace('[1, 64], "positions": null', '[1, 64], "positions": [1, 2]'))


def test_a_v100_is_told_what_to_install(a_gpu):
    """Toolkit and torch, by version, where either left compute capability 7.0; nothing once both serve it."""
    why_not = BACKENDS["cuda"].why_not
    a_gpu(7, 0)
    text = explain("gated_conv3d", CUDA, torch.float16)
    for part in ("built by nvcc 13.0 for 7.5, 8.0", "this GPU has 7.0", "CUDA 12 toolkit", "12.9", "+cu126"):
        assert part in text
    a_gpu(7, 0, targets=(70, 75, 80, 90), version="12.9")
    reason = why_not("gated_conv3d", CUDA, torch.float16)
    assert "was built for 7.5, 8.0, 9.0, 12.0, this GPU has 7.0" in reason and "+cu126" in reason
    a_gpu(7, 0, targets=(70, 75, 80, 90), version="12.9", built_in_torch=("sm_50", "sm_70", "sm_90"))
    assert why_not("gated_conv3d", CUDA, torch.float16) is None
    assert choose("gated_conv3d", CUDA, torch.float16).name == "cuda"
    assert "bfloat16 needs compute capability 8.0" in why_not("gated_conv3d", CUDA, torch.bfloat16)
    a_gpu(6, 1)
    assert "it needs compute capability 7.0" in why_not("tap_sums", CUDA, torch.float16)
    a_gpu(8, 0, targets=(75, 90))
    assert "this GPU has 8.0" in why_not("tap_sums", CUDA, torch.float16)
    a_gpu(13, 0)
    assert why_not("tap_sums", CUDA, torch.float16) is None, "PTX of the last target serves what comes"


def test_without_cuda_kernels(monkeypatch):
    """An install without nvcc says so, and how to have them."""
    monkeypatch.setattr("dsts_kernels.backends.cuda.native_targets", lambda: None)
    monkeypatch.setattr("dsts_kernels.backends.cuda.build_record", lambda: ("cpu", "nvcc was not found"))
    reason = BACKENDS["cuda"].missing()
    assert "without CUDA kernels" in reason and "nvcc was not found" in reason and "DSTS_BUILD=cuda" in reason


def test_explain():
    """A line for every backend, headed by what runs."""
    text = explain("gated_conv3d", "cpu", torch.float32)
    assert text.startswith("gated_conv3d on cpu in torch.float32 runs on")
    assert all(f"  {name}: " in text for name in BACKENDS)
    assert "cpu: no, it runs on CPU tensors" in explain("gated_conv3d", "cuda", torch.float32)
    assert explain("relevance_scores", "cpu").startswith("tap_sums on cpu")
    with pytest.raises(ValueError, match="op: got 'softmax', wanted one of"):
        explain("softmax", "cpu")


@pytest.mark.parametrize("value, code", [("eager", 0), ("none-such", 1)])
def test_environment_variable(value, code):
    """DSTS_BACKEND chooses for a whole process, and a wrong name is an error when an op runs."""
    program = "import torch, dsts_kernels as d; d.functional.saturating_sigmoid(torch.zeros(1))"
    done = subprocess.run(
        [sys.executable, "-c", program], env={"DSTS_BACKEND": value, "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert code == 0 or "DSTS_BACKEND: got 'none-such', wanted one of" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime():
    """The native module runs on torch's own OpenMP threads: two runtimes would fight over the cores."""
    maps = Path("/proc/self/maps").read_text()
    runtimes = {line.split()[-1] for line in maps.splitlines() if re.search(r"lib(gomp|omp|iomp5)\b[^/]*$", line)}
    assert len(runtimes) == 1, runtimes


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_launchers_take_what_is_stated(name):
    """Every launcher of a GPU backend has the parameters that ``gpu.kernels`` and ``base`` state, in their order."""
    if name == "triton" and (reason := unusable()):
        pytest.skip(reason)
    kernels = importlib.import_module(f"dsts_kernels.backends.{name}.kernels")
    stated = {method: getattr(Kernels, method) for method in vars(Kernels) if not method.startswith("_")}
    stated |= {method: getattr(Backend, method) for method in ONE_LAUNCH}
    assert len(stated) > 10
    for method, wanted in stated.items():
        _, *parameters = inspect.signature(wanted).parameters
        assert list(inspect.signature(getattr(kernels, method)).parameters) == parameters, method
