"""The default tests with the oldest torch that the package takes and with the newest: ``python -m tests.versions``.

Each gets a fresh environment and a copy of the sources, installed as the README says but for the pinned set. A torch
of these brings CUDA, so a run takes gigabytes and a quarter of an hour: for every night, not for every change.
``--resolve`` only asks pip which versions it would install, for the pinned set too: seconds, and part of ``.ci/run``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OLDEST = next(re.search(r">=([0-9.]+)", line)[1] for line in PROJECT["dependencies"] if line.startswith("torch"))
OLDEST += ".0" * (2 - OLDEST.count("."))
PINNED = ["-c", "constraints.txt"]


def run(*command: str | Path, cwd: Path) -> int:
    """A command's exit code; what it prints is shown as it comes. A build is of the CPU's kernels unless said."""
    environment = {"DSTS_BUILD": "cpu", **os.environ}
    environment.pop("PYTHONPATH", None)  # it may hold another copy of the package
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment).returncode


def copy_sources(target: Path) -> None:
    """The tree without what git ignores: an install of its own leaves this one's native module alone."""
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
        if run(*command, f".[{extras}]", *more, cwd=ROOT) != 0:
            print(f"{name}: does not resolve", flush=True)
            return False
        metadata = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    found = {package["name"]: package["version"] for package in metadata}
    print(f"{name}: torch {found['torch']}, triton {found.get('triton', 'none')}, {len(found)} packages", flush=True)
    return True


def default_tests(python: str, version: str, pytest: list[str]) -> bool:
    """Install with this torch (``newest``: whichever pip takes) in a fresh environment, and run the default tests."""
    with tempfile.TemporaryDirectory(prefix="dsts-versions-") as directory:
        tree, own = Path(directory) / "tree", Path(directory) / "env/bin/python"
        copy_sources(tree)
        torch = [] if version == "newest" else [f"torch=={version}"]
        steps = (
            [python, "-m", "venv", own.parents[1]],
            [own, "-m", "pip", "install", "-q", "--upgrade", "pip"],
            [own, "-m", "pip", "install", "-q", "-e", ".[test]", *torch],
            [own, "-m", "dsts_kernels", "info"],
            [own, "-m", "pytest", "-q", "-rfE", *pytest],
        )
        return all(run(*step, cwd=tree if tree.exists() else ROOT) == 0 for step in steps)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__.splitlines()[0])
    parser.add_argument("torch", nargs="*", default=[OLDEST, "newest"], help=f"versions ({OLDEST} and newest)")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments (this one)")
    parser.add_argument("--resolve", action="store_true", help="ask pip for a set of versions, install nothing")
    parser.add_argument("--pytest", action="append", default=[], metavar="OPTION", help="for pytest; repeatable")
    given = parser.parse_args()
    if given.resolve:
        everything = ",".join(PROJECT["optional-dependencies"])
        passed = {"pinned": resolve(given.python, "pinned", everything, *PINNED)}
        for version in given.torch:
            torch = [] if version == "newest" else [f"torch=={version}"]
            passed[version] = resolve(given.python, version, "test", *torch)
    else:
        passed = {version: default_tests(given.python, version, given.pytest) for version in given.torch}
        print(*(f"torch {name}: {'passed' if good else 'FAILED'}" for name, good in passed.items()), sep="\n")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
