"""Deployed classifiers where nothing of this process is: other Python processes, and a C++ program without Python."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsts_kernels import deploy, ops
from dsts_kernels.backends.build import _C, build_record
from dsts_kernels.ops.frozen_layer import frozen_layer_op
from dsts_kernels.testing import assert_close

from .support.classifiers import frozen_classifier
from .support.modules import pair

ROOT = Path(__file__).resolve().parents[1]
OPEN = torch.export.Dim.DYNAMIC
FRESH = "# In a fresh process"
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = ("portable", "avx2") if X86 else ("portable",)  # of the program: all of them take a minute to build
SIZES = ((2, 3, 4, 8, 8), (1, 3, 4, 8, 8), (5, 3, 6, 12, 10))

needs_kernels = pytest.mark.skipif(build_record()[0] == "none", reason="the install says that nothing was built")
needs_compiler = pytest.mark.skipif(
    not all(map(shutil.which, ("g++", "cmake"))), reason="AOTInductor and the C++ example want g++ and cmake"
)


def exported(model: torch.nn.Module, *, every_size: bool = True) -> torch.export.ExportedProgram:
    """With an open batch, and also open frames, height and width."""
    sizes = {0: OPEN, 2: OPEN, 3: OPEN, 4: OPEN} if every_size else {0: torch.export.Dim("batch", min=1, max=64)}
    with torch.no_grad():
        return torch.export.export(model, (torch.randn(SIZES[0]),), dynamic_shapes=(sizes,))


def run_python(script: str, folder: Path, *arguments: str) -> str:
    """What a process of its own says, whose module path is the repository."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


LOADED = """
import sys, torch
clips = torch.load("clips.pt")
program = torch.export.load("standard.pt2").module()
torch.save([program(x) for x in clips], "standard.pt")
assert "dsts_kernels" not in sys.modules
try:
    torch.export.load("frozen.pt2")
except Exception as error:
    print(error)  # torch's own words, or a warning of it, name the op
else:
    raise AssertionError("loaded an op that nobody registered")
import dsts_kernels
program = torch.export.load("frozen.pt2").module()
torch.save([program(x) for x in clips], "frozen.pt")
"""


def test_export_in_another_process(tmp_path):
    """Any batch, frames, height and width; ours needs one import, standard operators need none."""
    model, clips = frozen_classifier(num_layers=2), [torch.randn(size) for size in SIZES]
    torch.export.save(exported(model), tmp_path / "frozen.pt2")
    torch.export.save(exported(deploy.standard(model)), tmp_path / "standard.pt2")
    torch.save(clips, tmp_path / "clips.pt")
    assert "dsts_kernels.frozen_layer" in run_python(LOADED, tmp_path)
    for name in ("frozen", "standard"):
        for y, x in zip(torch.load(tmp_path / f"{name}.pt"), clips, strict=True):
            assert_close(y, model(x), name=name, factor=2)


def packages(folder: Path, *names: str, **options: object) -> tuple[torch.nn.Module, torch.Tensor]:
    """Packages of AOTInductor of one classifier: ``frozen.pt2`` with our op, ``standard.pt2`` without; and clips."""
    model, clips = frozen_classifier(**options), torch.randn(5, *SIZES[0][1:])
    for name in names:
        program = exported(model if name == "frozen" else deploy.standard(model), every_size=False)
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / f"{name}.pt2"))
    torch.save(clips, folder / "clips.pt")
    return model, clips


PACKAGED = """
import sys, torch
clips = torch.load("clips.pt")
torch.save(torch._inductor.aoti_load_package("standard.pt2")(clips), "standard.pt")
assert "dsts_kernels" not in sys.modules
import dsts_kernels
torch.save(torch._inductor.aoti_load_package("frozen.pt2")(clips), "frozen.pt")
"""


def build_program(folder: Path, *options: str) -> Path:
    """The C++ example, built against the libraries in torch's wheel."""
    command = ["cmake", "-S", str(ROOT / "examples/deploy_cpp"), "-B", str(folder)]
    command += [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", *options]
    for step in (command, ["cmake", "--build", str(folder)]):
        done = subprocess.run(step, capture_output=True, text=True, timeout=3600)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def run_program(program: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Without Python's environment, so that nothing of it can be found."""
    return subprocess.run(list(map(str, (program, *arguments))), env={}, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@needs_kernels
@needs_compiler
def test_aoti_and_program_without_python(tmp_path):
    """Both packages in another Python process and in the C++ program, which has our op with ``DSTS_OPS``."""
    model, clips = packages(tmp_path, "frozen", "standard")
    run_python(PACKAGED, tmp_path)
    program = build_program(tmp_path / "build", "-DDSTS_OPS=ON", f"-DDSTS_ISAS={';'.join(ISAS)}")
    for name in ("frozen", "standard"):
        assert_close(torch.load(tmp_path / f"{name}.pt"), model(clips), name=name, factor=2)
        done = run_program(program, tmp_path / f"{name}.pt2", tmp_path / "clips.pt", tmp_path / "out.pt", 2)
        assert done.returncode == 0 and float(done.stdout) > 0, done.stderr
        assert_close(torch.load(tmp_path / "out.pt"), model(clips), name=f"{name} in C++", factor=2)
    mixing = dict(mixing_kernel=(3, 1, 1), scoring_kernel=(1, 3, 3), score_reduction="mean", skip=False)
    model, clips = packages(tmp_path, "frozen", **mixing)
    done = run_program(program, tmp_path / "frozen.pt2", tmp_path / "clips.pt", tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    assert_close(torch.load(tmp_path / "out.pt"), model(clips), name="mixing in C++", factor=2)
    refusals(program, tmp_path)
    library_computes_what_the_package_does(next((tmp_path / "build").glob("libdsts_ops.*")), tmp_path)


CALLED = """
import sys, torch
torch.ops.load_library(sys.argv[1])
op = torch.ops.dsts_kernels.frozen_layer
torch.save([op(*arguments) for arguments in torch.load("calls.pt")], "results.pt")
for arguments in torch.load("refused.pt"):
    try:
        op(*arguments)
    except Exception as error:
        print(type(error).__name__, error)
    else:
        raise AssertionError(arguments)
assert "dsts_kernels" not in sys.modules
"""
LAYERS = {
    "default": {},
    "mean-3x3-scores": dict(scoring_kernel=(1, 3, 3), scoring_width=2, score_reduction="mean"),
    "mixing-1x3x3": dict(mixing_kernel=(1, 3, 3)),
    "mixing-3x1x1": dict(mixing_kernel=(3, 1, 1), activation=None),
    "one-neuron": dict(num_neurons=1),
    "centred": dict(score_center=True),
    "centred-3x3-scores": dict(score_center=True, scoring_kernel=(1, 3, 3)),
}


@contextlib.contextmanager
def instructions_of_the_program() -> Iterator[None]:
    """Ours with the instruction set that the program takes: scores are sums, whose order is that of the vectors."""
    _C.set_isa([isa for isa in _C.supported_isas() if isa in ISAS][-1])
    try:
        yield
    finally:
        _C.set_isa("auto")


def library_computes_what_the_package_does(library: Path, folder: Path) -> None:
    """The op in a process without the package: bit for bit ours for options, dtypes and grids, sums and skips too."""
    calls, refused = [], []
    for options in LAYERS.values():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for size in ((7, 20, 3, 6, 9), (1, 20, 1, 1, 4), (3, 20, 9, 40, 40), (0, 20, 2, 3, 3)):
                algorithm = "winograd" if dtype == torch.float16 else "auto"  # packed alike, and named otherwise
                layer = pair(20, dtype, num_layers=1, **options)[1].eval().freeze(algorithm=algorithm).layers[0]
                x = torch.randn(size).to(dtype)
                sums = ops.tap_sums(x, layer.taps) if len(calls) % 2 else None
                skip = None if len(calls) % 3 else x.to(memory_format=torch.channels_last_3d)
                calls.append((x, sums, skip, *layer.weights(), *layer.options((0, 1, 9)[len(calls) % 3]), None))
    for dtype, algorithm in ((torch.float64, "auto"), (torch.float32, "direct")):
        layer = pair(20, dtype, num_layers=1)[1].eval().freeze(algorithm=algorithm).layers[0]
        refused.append((torch.randn(1, 20, 2, 3, 3).to(dtype), None, None, *layer.weights(), *layer.options(0), None))
    refused += [(x[:, :19], *rest) for x, *rest in calls[:1]] + [(x.half(), *rest) for x, *rest in calls[:1]]
    refused += [(*call[:3], call[3].repeat(1, 1, 3), *call[4:]) for call in calls[:1]]
    torch.save(calls, folder / "calls.pt")
    torch.save(refused, folder / "refused.pt")
    said = run_python(CALLED, folder, str(library)).splitlines()
    for call, results in zip(calls, torch.load(folder / "results.pt"), strict=True):
        with instructions_of_the_program():
            here = frozen_layer_op(*call)
        for ours, theirs in zip(here, results, strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
    wanted = (
        "blocked, as freeze()",
        "blocked, as freeze()",
        "x has shape [7, 19, 3, 6, 9]; wanted (B, 20",
        "wanted Float",
        "scoring has 3 taps; wanted 1 or 9, or 2 or 10 with a centre",
    )
    assert len(said) == len(wanted) and all(text in line for text, line in zip(wanted, said, strict=True)), said


def refusals(program: Path, folder: Path) -> None:
    """The program's own errors: too few arguments, a file that is not there, a file that is no tensor."""
    done = run_program(program, folder / "standard.pt2")
    assert done.returncode == 2 and "usage: run MODEL.pt2 INPUT.pt OUTPUT.pt" in done.stderr
    done = run_program(program, folder / "standard.pt2", folder / "none.pt", folder / "new.pt")
    assert done.returncode == 1 and "none.pt, which cannot be read" in done.stderr
    torch.save([torch.ones(1)], folder / "list.pt")
    done = run_program(program, folder / "standard.pt2", folder / "list.pt", folder / "new.pt")
    assert done.returncode == 1 and "wanted one tensor" in done.stderr
    assert not (folder / "new.pt").exists()


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of a page's code blocks."""
    return re.findall(r"^```(python|bash)[^\n]*\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_page_has_its_blocks():
    """What :func:`test_page` runs is there."""
    found = blocks((ROOT / "docs/deploy.md").read_text())
    assert [kind for kind, _ in found].count("bash") == 1 and len(found) >= 6
    for kind, text in found:
        if kind == "python":
            compile(text, "docs/deploy.md", "exec")


@pytest.mark.slow
@needs_kernels
@needs_compiler
@pytest.mark.needs("onnxruntime", "onnxscript")
def test_page(tmp_path):
    """The commands of docs/deploy.md as they stand: what makes the files first, then fresh processes and bash."""
    for name in ("examples", "csrc"):
        (tmp_path / name).symlink_to(ROOT / name)
    found = blocks((ROOT / "docs/deploy.md").read_text())
    made = [text for kind, text in found if kind == "python" and not text.startswith(FRESH)]
    run_python("".join(made), tmp_path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for kind, text in found:
        if text.startswith(FRESH):
            run_python(text, tmp_path)
        elif kind == "bash":
            command = ["bash", "-euo", "pipefail", "-c", text]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3600)
            assert done.returncode == 0, done.stdout + done.stderr
