"""Another commit beside this tree, for ``python -m benchmarks.op --base REV``: its files, its native module, a process.

The commit is checked out in a temporary folder as a worktree of git. Where it has the same native sources it gets this
tree's module, else its own is built, once: ``build/base`` keeps it by the digest of those sources. The benchmarks of
this tree are laid over the commit's, so both sides are measured by the same code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import ROOT
from dsts_kernels.backends.build import build_record

if TYPE_CHECKING:
    from benchmarks.op import Case

__all__ = ["Refused", "Worker", "base_tree"]

NATIVE = ("csrc", "CMakeLists.txt", "native_build.py", "setup.py")  # what the native module is made of, and how
MODULE = ("_C.*", "_build.*")  # the native module and its record, in the package
LAST_LINES = 8


class Refused(Exception):
    """There is no comparison; the message says why."""


def git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise Refused("--base: it needs git, which is not installed") from None
    except subprocess.CalledProcessError as error:
        raise Refused(f"--base: git {arguments[0]}: {error.stderr.strip() or 'failed'}") from None
    return done.stdout.strip()


def commit_of(rev: str, root: Path) -> str:
    """The full name of a commit; raises :class:`Refused` for one that git does not know."""
    git(root, "rev-parse", "--git-dir")
    try:
        return git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}")
    except Refused:
        raise Refused(f"--base: got {rev!r}, wanted a commit that git knows here: a branch, a tag or a hash") from None


def same_sources(commit: str, root: Path) -> bool:
    """Whether the native module of a commit would be that of the files here."""
    changed = git(root, "diff", "--name-only", commit, "--", *NATIVE)
    return not changed and not git(root, "ls-files", "--others", "--exclude-standard", "--", *NATIVE)


def copy_module(package: Path, target: Path) -> bool:
    """Whether there was a native module to copy, with its record."""
    target.mkdir(parents=True, exist_ok=True)
    files = [path for pattern in MODULE for path in package.glob(pattern)]
    for path in files:
        shutil.copy2(path, target)
    return bool(files)


def build(tree: Path, kind: str) -> None:
    """The native module of a tree, in place, as its own ``setup.py`` does it."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"DSTS_BUILD": kind}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-LAST_LINES:])
        raise Refused(f"--base: the native module of that commit does not build with DSTS_BUILD={kind}:\n{said}")


def add_module(tree: Path, commit: str, device: str, root: Path) -> str:
    """Gives a tree its native module; says where that came from."""
    package, kind = tree / "dsts_kernels", build_record()[0]
    if kind == "none" or same_sources(commit, root):
        copy_module(root / "dsts_kernels", package)
        return "without native module, as this tree" if kind == "none" else "same native sources: this tree's module"
    kind = "cpu" if device == "cpu" else kind
    trees = "\n".join(git(root, "ls-tree", commit, "--", *NATIVE).splitlines())
    key = f"{trees}\n{kind}\n{sys.executable}\n{sysconfig.get_config_var('EXT_SUFFIX')}"
    kept = root / "build" / "base" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if kept.is_dir():
        copy_module(kept, package)
        return f"native module built before: {kept.relative_to(root)}"
    began = time.monotonic()
    build(tree, kind)
    aside = kept.with_name(f"{kept.name}.{os.getpid()}")
    copy_module(package, aside)
    with contextlib.suppress(OSError):  # another run was first
        aside.rename(kept)
    return f"native module ({kind}) built in {time.monotonic() - began:.0f} s"


@contextlib.contextmanager
def base_tree(rev: str, device: str, root: Path = ROOT) -> Iterator[Path]:
    """A folder with the package of another commit, ready to run, and this tree's benchmarks."""
    commit = commit_of(rev, root)
    with tempfile.TemporaryDirectory(prefix="dsts_base_") as folder:
        tree = Path(folder).resolve() / "tree"
        git(root, "worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            print(f"{rev} is {commit[:12]}; {add_module(tree, commit, device, root)}", file=sys.stderr, flush=True)
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            shutil.copytree(root / "benchmarks", tree / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
            yield tree
        finally:
            git(root, "worktree", "remove", "--force", str(tree))


class Worker:
    """A process that times an op with the package of a tree, a round whenever it is asked."""

    def __init__(self, tree: Path, case: Case) -> None:
        self.tree = tree
        path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
        code = "import sys; from benchmarks.op import Case, serve; serve(Case.read(sys.argv[1]), sys.stdin, sys.stdout)"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(case)],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Worker:
        try:
            self.facts = json.loads(self.answer())
            if self.facts["package"] != str(self.tree / "dsts_kernels"):
                raise Refused(f"--base: got the package of {self.facts['package']}, wanted that of {self.tree}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.communicate()

    def answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise Refused(f"--base: the process of {self.tree} ended with exit code {self.process.wait()}; see above")
        return line

    def seconds(self, calls: int) -> float:
        with contextlib.suppress(BrokenPipeError):  # it ended, as the missing answer will say
            self.process.stdin.write(f"{calls}\n")
            self.process.stdin.flush()
        return float(self.answer())
