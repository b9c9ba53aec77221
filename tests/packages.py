"""What a wheel or an sdist holds: ``python -m tests.packages FILE...``. Needs no torch.

A wheel: its name and what it says of itself agree, the native module is that of the Python in its name, stands alone
(no torch, no bundled library), has the instruction sets that its machine should have, and loads where this Python and
machine are those of the wheel. An sdist: a wheel is built from it, unpacked elsewhere, and looked at in the same way.

``--readme``: as a newcomer has it. A wheel is installed in a fresh environment, and README's Python runs there, from an
empty folder, where no compiler is found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README_BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ISAS = {"x86_64": ["portable", "avx2", "avx512"], "aarch64": ["portable"]}
STAY = ("py.typed", "_C.pyi", "backends/gpu/measured.json")  # beside the Python files


class PackageError(Exception):
    """A package is not as it should be; says how."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise PackageError(message)


def name_parts(wheel: Path) -> tuple[str, str, str, str]:
    """Version, Python tag, ABI tag and platform tags of a wheel's name."""
    found = re.fullmatch(r"dsts_kernels-([^-]+)-([^-]+)-([^-]+)-([^-]+)\.whl", wheel.name)
    require(found, f"{wheel.name}: wanted dsts_kernels-VERSION-PYTHON-ABI-PLATFORM.whl")
    return found.groups()


def check_metadata(version: str, text: str) -> None:
    """The metadata that an index shows."""
    fields = Parser().parsestr(text)
    require(fields["Version"] == version, f"metadata: version {fields['Version']}, wanted {version} of the name")
    require(fields["License-Expression"] == "Apache-2.0", f"metadata: licence {fields['License-Expression']}")
    listed = fields.get_all("Classifier", [])
    wanted = fields["Requires-Python"].removeprefix(">=")
    require(f"Programming Language :: Python :: {wanted}" in listed, f"metadata: no classifier of Python {wanted}")
    require(fields["Keywords"] and fields.get_all("Project-URL"), "metadata: no keywords or no addresses")
    require(any(line.startswith("torch") for line in fields.get_all("Requires-Dist", [])), "metadata: no torch")


def load_alone(module: Path) -> dict[str, Any]:
    """What the native module says of itself in a process that has no torch."""
    code = (
        "import importlib.util, json, sys; sys.modules['torch'] = None\n"
        f"spec = importlib.util.spec_from_file_location('_C', {str(module)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(json.dumps({**module.build_info(), 'runs': module.supported_isas()}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    require(done.returncode == 0, f"{module.name} does not load alone: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def check_wheel(wheel: Path) -> str:
    """One line about a wheel.

    Raises:
        PackageError: it is not as it should be.
    """
    version, python, abi, systems = name_parts(wheel)
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as directory:
        names = archive.namelist()
        check_metadata(version, archive.read(f"dsts_kernels-{version}.dist-info/METADATA").decode())
        for name in STAY:
            require(f"dsts_kernels/{name}" in names, f"no {name}")
        outside = {name.split("/")[0] for name in names} - {"dsts_kernels", f"dsts_kernels-{version}.dist-info"}
        require(not outside, f"files outside the package: {', '.join(sorted(outside))}")
        (recorded,) = (name for name in names if re.fullmatch(r"dsts_kernels/_build\..*json", name))
        record = json.loads(archive.read(recorded))
        native = [name for name in names if name.endswith((".so", ".pyd"))]
        if record["build"] == "none":
            require(not native, f"a record of no build beside {native}")
            return f"{wheel.name}: without native kernels ({record['reason']})"
        tag = f"cpython-{abi.removeprefix('cp')}-"
        require(
            len(native) == 1 and native[0].startswith(f"dsts_kernels/_C.{tag}"),
            f"native files {native}, wanted one module of {abi} and no other library",
        )
        own = (python == f"cp{sys.version_info[0]}{sys.version_info[1]}") and platform.machine() in systems
        if not own:
            return f"{wheel.name}: as it should be; not loaded, for this is another Python or machine"
        info = load_alone(Path(archive.extract(native[0], directory)))
    require(info["isas"] == ISAS[platform.machine()], f"instruction sets {info['isas']}")
    require(info["openmp"], "built without OpenMP")
    require((info["cuda"] is not None) == (record["build"] == "cuda"), f"record {record}, module {info['cuda']}")
    size = wheel.stat().st_size / 2**20
    kernels = f"CUDA {info['cuda']['version']} for {info['cuda']['targets']}" if info["cuda"] else "CPU kernels"
    return f"{wheel.name}: {size:.1f} MiB, {info['compiler']} {info['version']}, {', '.join(info['isas'])}, {kernels}"


def check_sdist(sdist: Path, pip: list[str]) -> str:
    """Build a wheel from an sdist that lies elsewhere, and look at it."""
    with tempfile.TemporaryDirectory(prefix="dsts-sdist-") as directory:
        with tarfile.open(sdist) as archive:
            archive.extractall(directory, filter="data")
        (tree,) = Path(directory).iterdir()
        command = [sys.executable, "-m", "pip", "wheel", str(tree), "--no-deps", "-w", directory, *pip]
        done = subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        require(done.returncode == 0, f"{sdist.name}: no wheel came of it: {done.stdout[-1000:]}")
        (wheel,) = Path(directory).glob("*.whl")
        return f"{sdist.name}: builds {check_wheel(wheel)}"


def run_readme(wheel: Path, pip: list[str]) -> str:
    """README's blocks of Python, each in a process of its own, with a wheel that was installed where no compiler is.

    Raises:
        PackageError: it does not install, its kernels are not in use, or a block fails.
    """
    with tempfile.TemporaryDirectory(prefix="dsts-readme-") as directory:
        home = Path(directory) / "empty"
        home.mkdir()
        own = Path(directory) / "env" / "bin"
        subprocess.run([sys.executable, "-m", "venv", own.parent], check=True)
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "CC")}
        environment = {**kept, "PATH": str(own)}  # no compiler, nor any other program of the system
        require(shutil.which("c++", path=str(own)) is None, "found a compiler where none should be")

        def run(what: str, *command: str) -> str:
            done = subprocess.run(
                [own / "python", *command], cwd=home, env=environment, capture_output=True, text=True, errors="replace"
            )
            require(done.returncode == 0, f"{what}: {(done.stdout + done.stderr).strip()[-2000:]}")
            return done.stdout

        run("pip", "-m", "pip", "install", "-q", f"dsts_kernels[backbones] @ {wheel.resolve().as_uri()}", *pip)
        used = run("backends", "-c", "from dsts_kernels import backends; print(*backends.available())").split()
        require("cpu" in used or "-none-any" in wheel.name, f"backends {used}, wanted the wheel's CPU kernels")
        blocks = README_BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
        require(len(blocks) >= 3, f"README has {len(blocks)} blocks of Python")
        for number, block in enumerate(blocks, 1):
            run(f"README's block {number}", "-c", block)
        versions = run("versions", "-c", "import sys, torch; print(sys.version.split()[0], torch.__version__)").split()
    return f"{wheel.name}: {len(blocks)} blocks of README ran, Python {versions[0]}, torch {versions[1]}, no compiler"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.packages", description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument(
        "--pip", action="append", default=[], metavar="OPTION", help="of the sdist's build, or of --readme; repeatable"
    )
    parser.add_argument("--readme", action="store_true", help="install wheels where no compiler is, and run README")
    given = parser.parse_args()
    failed = False
    for package in given.packages:
        try:
            print(check_wheel(package) if package.suffix == ".whl" else check_sdist(package, given.pip), flush=True)
            if given.readme and package.suffix == ".whl":
                print(run_readme(package, given.pip), flush=True)
        except PackageError as error:
            failed = True
            print(f"{package.name}: error: {error}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
