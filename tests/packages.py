"""What a wheel or an sdist holds: ``python -m tests.packages FILE...``. Needs no torch.

A wheel: its name and what it says of itself agree, the native module is that of the Python in its name, stands alone
(no torch, no bundled library), has the instruction sets that its machine should have, and loads where this Python and
machine are those of the wheel. An sdist: a wheel is built from it, unpacked elsewhere, and looked at in the same way.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.packages", description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument("--pip", action="append", default=[], metavar="OPTION", help="of the sdist's build; repeatable")
    given = parser.parse_args()
    failed = False
    for package in given.packages:
        try:
            print(check_wheel(package) if package.suffix == ".whl" else check_sdist(package, given.pip), flush=True)
        except PackageError as error:
            failed = True
            print(f"{package.name}: error: {error}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
