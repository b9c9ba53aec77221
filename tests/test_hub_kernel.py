"""The package as a kernel of the hub: loaded under other names, twice and beside the installed one, with right results.

The loader here does what that of Hugging Face's ``kernels`` does, for an environment without it; with it, its own
``get_local_kernel`` loads the folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "hub_kernel.py").exists(), reason="needs the source tree")

ALIKE = """
import importlib.util, json, sys, warnings
from pathlib import Path
import torch

warnings.simplefilter("error")

def own_loader(folder):
    variant = Path(folder) / "build/torch-universal"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def check(package):
    # In float64, where no activation is so near to zero that rounding decides.
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.float64)
    dsts = package.FusedDSTS(16, num_layers=2, num_neurons=3)
    literal = package.reference.DSTS(16, num_layers=2, num_neurons=3)
    literal.load_state_dict(dsts.state_dict())
    x = torch.randn(4, 16, 3, 5, 6, requires_grad=True)
    draws = package.Draws(torch.randn(2, 4, 16), torch.rand(2, 4) < 0.5, torch.randn(2, 4, 3))
    loose = package.reference.Draws(*draws)
    grad = torch.randn_like(x)
    for found, wanted in ((dsts(x, draws=draws), literal(x, draws=loose)), (dsts.eval()(x), literal.eval()(x))):
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(y, [x], grad)[0] for y in (found, wanted)))
    compiled = torch.compile(dsts.freeze(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x.detach()), literal(x).detach())
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two repositories: the package as it is, and one whose content differs."""
    found = []
    for name in ("one", "two"):
        folder = tmp_path_factory.mktemp(name)
        sources = shutil.copytree(ROOT / "dsts_kernels", folder / "sources/dsts_kernels", ignore=lambda *_: {"build"})
        shutil.copy2(ROOT / "hub_kernel.py", folder / "sources")
        if name == "two":
            (sources / "files.py").write_text((sources / "files.py").read_text() + "\n# another version\n")
        command = [sys.executable, "hub_kernel.py", str(folder), "--number", "3"]
        done = subprocess.run(command, cwd=folder / "sources", capture_output=True, text=True)
        assert done.returncode == 0 and "torch-universal: dsts_kernels " in done.stdout, done.stderr
        found.append(folder)
    return found


def run(code: str, seed: int, *arguments: Path) -> None:
    command = [sys.executable, "-c", ALIKE.replace("SEED", str(seed)) + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_layout(folders):
    """One variant for all; no native module, no program, and a name for each content."""
    variant = folders[0] / "build/torch-universal"
    names = {path.relative_to(variant).as_posix() for path in variant.rglob("*") if path.is_file()}
    assert {"__init__.py", "metadata.json", "_build.json", "backends/triton/conv.py", "py.typed"} <= names
    assert not any(name.endswith((".so", ".pyi")) or "__pycache__" in name or name == "cli.py" for name in names)
    about = [json.loads((folder / "build/torch-universal/metadata.json").read_text()) for folder in folders]
    assert about[0]["id"] != about[1]["id"] and about[0]["version"] == 3 and about[0]["name"] == "dsts-kernels"
    assert [path.name for path in (folders[0] / "build").iterdir()] == ["torch-universal"]


def test_versions_side_by_side(folders, request):
    """Two versions and the installed package in one process, each right, with ops and backends of its own."""
    code = """
import dsts_kernels
packages = [dsts_kernels, *map(own_loader, sys.argv[1:])]
assert len({package.FusedDSTS for package in packages}) == 3
for package in packages:
    check(package)
for hub in packages[1:]:
    assert hub.backends.available()[-1] == "eager" and "cpu" not in hub.backends.available()
    assert "the universal variant of a hub kernel has none" in hub.backends.BACKENDS["cpu"].missing()
    assert not any(name.startswith(hub.__name__ + ".") and "dsts_kernels." in name for name in sys.modules)
"""
    run(code, request.config.getoption("--seed"), *folders)


@pytest.mark.needs("kernels")
def test_the_loader_of_kernels(folders, request):
    """Hugging Face's own, from a local folder: what it resolves, validates and imports."""
    code = """
from kernels import get_local_kernel
from kernels.importer import get_loaded_kernels
packages = [get_local_kernel(Path(folder), backend="cpu") for folder in sys.argv[1:]]
for package in packages:
    check(package)
assert "dsts_kernels" not in sys.modules
loaded = [(str(one.metadata.name), one.metadata.version) for one in get_loaded_kernels()]
assert loaded == [("dsts-kernels", 3)] * 2, loaded
"""
    run(code, request.config.getoption("--seed"), *folders)
