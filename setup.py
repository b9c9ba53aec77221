"""Build of the package for one Python: the native module by ``native_build``, and a record of what came of it.

``DSTS_BUILD`` says what is built: ``auto`` (default) builds what this machine can, CPU and CUDA kernels on Linux, and
installs without those it cannot; ``none`` builds nothing; ``cpu`` or ``cuda`` must succeed or the install fails.
``DSTS_CUDA_ARCHS`` says for which GPUs, such as ``8.0;9.0``: a chip takes a minute of compiling or more on two cores.
Everything else (sources, flags, instruction sets) is described in ``CMakeLists.txt``.
"""

import json
import os
import platform
import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT))  # an isolated build does not have it

from native_build import BuildError, build_directory, build_module  # noqa: E402

CHOICES = ("auto", "none", "cpu", "cuda")
# One tree may be installed in several Pythons, each with its module and its record beside it.
RECORD = Path(f"_build{EXTENSION_SUFFIXES[0]}").with_suffix(".json").name


def chosen_build() -> str:
    value = os.environ.get("DSTS_BUILD") or "auto"
    if value not in CHOICES:
        raise SystemExit(f"error: DSTS_BUILD is {value!r}; wanted one of {', '.join(CHOICES)}")
    return value


def native(choice: str, base: Path) -> tuple[str, str, Path | None]:
    """What was built (``cuda``, ``cpu`` or ``none``), why nothing more, and the module."""
    reason = "DSTS_BUILD=none"
    if choice == "auto" and platform.system() != "Linux":  # never tried there, and one thread without OpenMP would lose
        return "none", f"there are no native kernels for {platform.system()}; DSTS_BUILD=cpu tries to build them", None
    # auto tries for both kinds of kernels, then for those of the CPU.
    for cuda in {"auto": ("AUTO", "OFF"), "cpu": ("OFF",), "cuda": ("ON",)}.get(choice, ()):
        try:
            module, no_cuda = build_module(cuda, base)
        except (BuildError, OSError) as error:
            if choice != "auto":
                raise CompileError(f"DSTS_BUILD={choice}: {error}") from error
            reason = str(error)
            continue
        reason = "DSTS_BUILD=cpu" if choice == "cpu" else no_cuda or (reason if cuda == "OFF" else "")
        return "cpu" if reason else "cuda", reason, module
    return "none", reason, None


class Build(build):
    """Begins with an empty directory: a module that left the sources would stay in every wheel."""

    def run(self) -> None:
        for left in (*(ROOT / "build").glob("lib*"), *(ROOT / "build").glob("bdist.*")):
            shutil.rmtree(left)
        super().run()


class BuildNative(build_ext):
    """Puts the native module and its record where this Python imports them."""

    placed: tuple[str, ...] = ()

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib)) / "dsts_kernels"
        package.mkdir(parents=True, exist_ok=True)
        built, reason, module = native(chosen_build(), Path(self.get_finalized_command("build").build_base).resolve())
        if built != "cuda":
            lacking = "native" if built == "none" else "CUDA"
            print(f"dsts_kernels: installing without {lacking} kernels: {reason}", file=sys.stderr, flush=True)
        # All that this Python would import, and only that; and the record as version 0.1.0 first wrote it.
        for stale in (*(f"_C{suffix}" for suffix in EXTENSION_SUFFIXES), RECORD, "_build.py"):
            if module is None or stale != module.name:
                (package / stale).unlink(missing_ok=True)
        self.placed = (RECORD,)
        if module is not None:
            # In one step, as a process may have the last one open.
            shutil.copy2(module, package / f"{module.name}.new")
            os.replace(package / f"{module.name}.new", package / module.name)
            self.placed = (RECORD, module.name)
        record = {"build": built, "reason": reason}
        (package / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def get_output_mapping(self) -> dict[str, str]:
        """Of an editable install: what would lie in a wheel, and where it lies in the sources."""
        place = Path(self.build_lib) / "dsts_kernels"
        inplace = {str(place / name): str(Path("dsts_kernels", name)) for name in self.placed}
        return inplace if self.inplace else {}

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, "dsts_kernels", name)) for name in self.placed]


chosen_build()
sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()] + [ROOT / "CMakeLists.txt"]
module = Extension("dsts_kernels._C", [], depends=sorted(str(path.relative_to(ROOT)) for path in sources))
with build_directory() as base:
    places = {} if ROOT in base.parents else {"build": {"build_base": str(base)}, "egg_info": {"egg_base": str(base)}}
    setup(ext_modules=[module], cmdclass={"build": Build, "build_ext": BuildNative}, options=places)
