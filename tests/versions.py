"""The default tests with other versions: ``python -m tests.versions``, one fresh environment for each combination.

Without options: the oldest torch that the package takes and the newest. A torch of these brings CUDA, so a run takes
gigabytes and a quarter of an hour: for every night, not for every change. ``--python``, ``--compiler`` and versions of
torch multiply; ``--wheel`` tests a wheel instead of the sources; ``--system`` takes the torch that an interpreter has,
a distribution's or a virtual environment's, and downloads nothing. ``--save`` adds each result to a file, and
``--table`` prints that file as the table of docs/versions.md.

``--resolve`` only asks pip which versions it would install, for the pinned set too: seconds, and part of ``.ci/run``.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OLDEST = next(re.search(r">=([0-9.]+)", line)[1] for line in PROJECT["dependencies"] if line.startswith("torch"))
OLDEST += ".0" * (2 - OLDEST.count("."))
PINNED = ["-c", "constraints.txt"]
RESULTS = ROOT / "docs/versions.json"
PAGE = ROOT / "docs/versions.md"
BEGIN, END = "<!-- table: python -m tests.versions --table -->", "<!-- end of table -->"
COLUMNS = ("python", "torch", "triton", "machine", "system", "kernels", "tests", "date")

ASK = """
import importlib.util, json, platform
import torch
from dsts_kernels.backends.build import _C, build_record
release = platform.freedesktop_os_release() if platform.system() == "Linux" else {}
triton = __import__("triton").__version__ if importlib.util.find_spec("triton") else "none"
info = _C.build_info() if _C else None
kernels = f"{info['compiler']} {info['version']}, {_C.get_isa()}" if info else f"none ({build_record()[1]})"
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "triton": triton, "machine": platform.machine(),
    "system": release.get("PRETTY_NAME", platform.system()), "kernels": kernels}))
"""

# Of an interpreter in a virtual environment: lets another one see its packages, where --system-site-packages would not.
LEND = """
import pathlib, site, sys
if sys.prefix != sys.base_prefix:
    for packages in pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages"):
        (packages / "lent.pth").write_text("\\n".join(site.getsitepackages()))
"""


class Combination(NamedTuple):
    """What one environment is made of."""

    python: str  # an interpreter
    torch: str  # a version, "newest", or "system": the interpreter's own
    compiler: str | None  # for CXX; None: the default
    wheel: Path | None  # None: the sources

    def __str__(self) -> str:
        parts = (f"{self.python}, torch {self.torch}", self.compiler, self.wheel and self.wheel.name)
        return ", ".join(filter(None, parts))


def environment(**more: str) -> dict[str, str]:
    """A build is of the CPU's kernels unless said."""
    found = {"DSTS_BUILD": "cpu", **os.environ, **more}
    found.pop("PYTHONPATH", None)  # it may hold another copy of the package
    return found


def run(*command: str | Path, cwd: Path, **more: str) -> tuple[int, str]:
    """A command's exit code and its last line; what it prints is shown as it comes."""
    last, pipes = "", {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    with subprocess.Popen([str(part) for part in command], cwd=cwd, env=environment(**more), **pipes) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode, last


def copy_sources(target: Path) -> None:
    """The tree without what git ignores: an install of its own leaves this one's native module alone."""
    if not (ROOT / ".git").exists():  # an unpacked sdist
        shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns("build", "_C.*.so", "_build.*", "__pycache__"))
        return
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in names:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def resolve(python: str, name: str, extras: str, *more: str) -> bool:
    """Whether pip finds a set of versions for ``.[extras]``; says which torch and triton are in it."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [python, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--report", report]
        if run(*command, f".[{extras}]", *more, cwd=ROOT)[0] != 0:
            print(f"{name}: does not resolve", flush=True)
            return False
        metadata = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    found = {package["name"]: package["version"] for package in metadata}
    print(f"{name}: torch {found['torch']}, triton {found.get('triton', 'none')}, {len(found)} packages", flush=True)
    return True


def steps_of(chosen: Combination, own: Path) -> list[list[str | Path]]:
    """Commands that make the environment of ``own``, its interpreter."""
    system = chosen.torch == "system"
    pip = [own, "-m", "pip", "install", "-q"]
    # A distribution's packages do, and pip would look for others.
    build = [*pip, "--no-deps", *(["--no-index"] if chosen.wheel else ["--no-build-isolation", "-e"])]
    torch = [] if chosen.torch in ("newest", "system") else [f"torch=={chosen.torch}"]
    make = [chosen.python, "-m", "venv", *(["--system-site-packages"] if system else []), own.parents[1]]
    if system:
        return [make, [chosen.python, "-c", LEND, own.parents[1]], [*build, chosen.wheel or "."]]
    if chosen.wheel is not None:
        return [make, [*pip, "--upgrade", "pip"], [*pip, f"dsts_kernels[test] @ {chosen.wheel.as_uri()}", *torch]]
    return [make, [*pip, "--upgrade", "pip"], [*pip, "-e", ".[test]", *torch]]


def tried(chosen: Combination, pytest: list[str]) -> dict[str, Any] | None:
    """Install in a fresh environment and run the default tests: versions and how they ended; ``None``: no install.

    A wheel is tested from a folder that holds the tests and no package.
    """
    with tempfile.TemporaryDirectory(prefix="dsts-versions-") as directory:
        tree, own = Path(directory) / "tree", Path(directory) / "env/bin/python"
        copy_sources(tree)
        if chosen.wheel is not None:
            shutil.rmtree(tree / "dsts_kernels")
        more = {"CXX": chosen.compiler} if chosen.compiler else {}
        for step in steps_of(chosen, own):
            if run(*step, cwd=tree, **more)[0] != 0:
                return None
        run(own, "-m", "dsts_kernels", "info", cwd=tree)
        asked = subprocess.run([own, "-c", ASK], cwd=directory, env=environment(), capture_output=True, text=True)
        if asked.returncode != 0:
            print(asked.stderr)
            return None
        code, last = run(own, "-m", "pytest", "-q", "-rfE", *pytest, cwd=tree)
    options = " ".join(pytest)
    ended = re.sub(r" in [0-9.]+s.*| *=+ *", "", last)
    facts = json.loads(asked.stdout.splitlines()[-1])
    of = " of a wheel" if chosen.wheel else ""
    return facts | {
        "tests": f"{ended}{of}" + (f" (`{options}`)" if options else ""),
        "passed": code == 0,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Results in Markdown, the newest Python first."""

    def key(row: dict[str, Any]) -> list[int]:
        return [-int(part) for part in row["python"].split(".")]

    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    for row in sorted(rows, key=key):
        cells = {**row, "tests": row["tests"] if row["passed"] else f"**failed**: {row['tests']}"}
        lines.append("| " + " | ".join(cells[column] for column in COLUMNS) + " |")
    return "\n".join(lines)


def page(text: str, rows: list[dict[str, Any]]) -> str:
    """The page with the table of these results."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n\n" + table(rows) + "\n\n" + END + rest.split(END)[1]


def save(path: Path, row: dict[str, Any]) -> None:
    """Add a result, to the page too; it takes the place of one with the same versions, machine, system and kernels."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    same = ("python", "torch", "machine", "system", "kernels")
    rows = [old for old in rows if any(old[name] != row[name] for name in same)]
    path.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")
    if path == RESULTS:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), [*rows, row]), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("torch", nargs="*", help=f"versions ({OLDEST} and newest)")
    add("--python", action="append", help="interpreter of the environments; repeatable (this one)")
    add("--compiler", action="append", help="C++ compiler, such as clang++; repeatable (the system's)")
    add("--wheel", type=lambda text: Path(text).resolve(strict=True), help="install this instead of the sources")
    add("--system", action="store_true", help="with the torch and the build tools that the interpreter has")
    add("--resolve", action="store_true", help="ask pip for a set of versions, install nothing")
    add("--pytest", action="append", default=[], metavar="OPTION", help="for pytest; repeatable")
    add(
        "--save", type=Path, nargs="?", const=RESULTS, metavar="FILE", help=f"add results ({RESULTS.relative_to(ROOT)})"
    )
    add("--table", action="store_true", help=f"print {RESULTS.relative_to(ROOT)} as Markdown, run nothing")
    given = parser.parse_args()
    if given.system and given.torch:
        parser.error(f"--system: got it with torch {given.torch[0]}, wanted no version: it is the interpreter's own")
    given.torch = ["system"] if given.system else given.torch or [OLDEST, "newest"]
    return given


def main() -> int:
    given = parse()
    if given.table:
        print(table(json.loads(RESULTS.read_text(encoding="utf-8"))))
        return 0
    pythons = given.python or [sys.executable]
    passed = {}
    if given.resolve:
        everything = ",".join(PROJECT["optional-dependencies"])
        passed["pinned"] = resolve(pythons[0], "pinned", everything, *PINNED)
        for version in given.torch:
            torch = [] if version == "newest" else [f"torch=={version}"]
            passed[version] = resolve(pythons[0], version, "test", *torch)
        return 0 if all(passed.values()) else 1
    for parts in itertools.product(pythons, given.torch, given.compiler or [None]):
        chosen = Combination(*parts, given.wheel)
        found = tried(chosen, given.pytest)
        passed[str(chosen)] = found is not None and found["passed"]
        if found is not None and given.save:
            save(given.save, found)
    print(*(f"{name}: {'passed' if good else 'FAILED'}" for name, good in passed.items()), sep="\n")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
