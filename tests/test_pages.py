"""README and the pages of ``docs``: their code runs as it stands, and what they quote and draw is up to date.

A fenced block names its language. One of ``python`` or ``bash`` runs here, all blocks of a page in order and in one
namespace, unless its info string says otherwise: ``run-by="FILE"`` names the test that reads it from the page, and
``not-run="REASON"`` says what it needs that is not here.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import dsts_kernels

pytestmark = pytest.mark.pages
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(dsts_kernels.__file__).parent  # of a wheel it lies elsewhere
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INFO = re.compile(r'\s+(run-by|not-run)="([^"]+)"\s*')
SHELL = re.compile(r"(\w+=\S+ )*(pip|python3?|pytest|make|cmake|bash|git|torchrun|conda|docker|import|from) ")
# What blocks find where they run.
LINKED = ("benchmarks", "constraints.txt", "csrc", "examples", "tests")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    how: str  # "run", "run-by" or "not-run"
    why: str  # the file that runs it, or the reason
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page. An info string of another form is an error."""
    text, found = (ROOT / page).read_text(encoding="utf-8"), []
    for fence in FENCE.finditer(text):
        language, info, body = fence.groups()
        line = text[: fence.start()].count("\n") + 1
        said = INFO.fullmatch(info) if info.strip() else None
        assert said or not info.strip(), f'{page}:{line}: {info!r}; wanted run-by="FILE" or not-run="REASON"'
        found.append(Block(page, line, language, said[1] if said else "run", said[2] if said else "", body))
    return found


ALL = {page: blocks(page) for page in PAGES}
RUN = [page for page, found in ALL.items() if any(b.how == "run" and b.language in ("python", "bash") for b in found)]


def test_there_are_blocks():
    """As many run as when this was written, or more: no info string takes them out unnoticed."""
    run = [b for found in ALL.values() for b in found if b.how == "run" and b.language == "python"]
    assert len(RUN) >= 5 and len(run) >= 12


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page):
    """A language; a test that reads the page, or a reason; no code that passes for text."""
    assert (ROOT / page).read_text(encoding="utf-8").count("\n```") == 2 * len(ALL[page]), f"{page}: an odd fence"
    for block in ALL[page]:
        where = f"{page}:{block.line}"
        assert block.language in ("python", "bash", "text"), f"{where}: language {block.language!r}"
        if block.language == "text":
            assert not any(SHELL.match(line) for line in block.text.splitlines()), f"{where}: code as text"
        elif block.how == "run-by":
            reader = (ROOT / block.why).read_text(encoding="utf-8")
            assert Path(page).name in reader, f"{where}: not read by {block.why}"
        elif block.how == "not-run":
            assert len(block.why.split()) >= 4, f"{where}: no reason"
        if block.language == "python":
            compile(block.text, where, "exec")


@pytest.mark.parametrize("page", RUN)
def test_page_runs(page, tmp_path, monkeypatch):
    """Python in this process, as one module; bash in one of its own, from a folder with the sources in it."""
    for name in LINKED:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PATH": found}
    names: dict[str, object] = {"__name__": "__main__"}
    for block in ALL[page]:
        if block.how != "run" or block.language == "text":
            continue
        if block.language == "python":
            padded = "\n" * block.line + block.text  # a traceback shows the page's own line
            exec(compile(padded, str(ROOT / page), "exec"), names)
        else:
            command = ["bash", "-euo", "pipefail", "-c", block.text]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
            assert done.returncode == 0, f"{page}:{block.line}: {done.stdout}{done.stderr}"


def source_text() -> str:
    """The package's Python with adjacent string literals joined and each value of an f-string as ``...``."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    text = re.sub(r'"\s*\n\s*f?"', "", text)
    return re.sub(r"\{[^{}\n]*\}", "...", text)


def test_errors_are_those_of_the_package():
    """What troubleshooting.md quotes in its tables of errors stands in the sources, values left out."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| error \| cause \| cure \|\n\| --- .*?\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = [row.split(" | ")[0] for table in tables for row in table.splitlines()]
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(tables) == 5 and len(messages) >= 36
    source = source_text()
    said_nowhere = []
    for message in messages:
        words = re.sub(r"^[\w.()]+: ", "", message)  # the argument's name is often a variable
        pieces = [piece for piece in words.split("...") if len(piece.strip(" ',:")) > 3]
        assert pieces, f"{message!r} has no words of its own"
        said_nowhere += [(message, piece) for piece in pieces if piece not in source]
    assert not said_nowhere


def test_diagrams_are_up_to_date(tmp_path):
    """``python docs/site/diagrams.py`` writes what lies in ``docs/diagrams``."""
    runpy.run_path(str(ROOT / "docs/site/diagrams.py"))["main"](tmp_path)
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs/diagrams").iterdir()}
    assert drawn == kept and len(kept) == 3


def test_api_pages_name_everything_public():
    """Every name of ``__all__`` of the package and of its parts stands on a page under ``docs/api``."""
    import importlib

    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    shown = {line.split(".")[-1] for line in text.splitlines() if line.startswith("::: ")}
    parts = ("", ".backbones", ".backends", ".classify", ".data", ".deploy", ".functional", ".learning", ".reference")
    for part in (*parts, ".probe", ".testing", ".viz"):
        module = importlib.import_module(f"dsts_kernels{part}")
        modules = {"backends", "functional", "reference"} if not part else {"BACKENDS", "Backend", "CHANGES", "OPS"}
        assert set(module.__all__) - modules <= shown, f"dsts_kernels{part}: {set(module.__all__) - modules - shown}"


def test_readme_is_short_and_keeps_its_commands():
    """Under 160 lines, with the commands that others read out of it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 160
    test = "pip install -e '.[test]' -c constraints.txt && pytest"
    for command in ("pip install -e .", test, "pytest benchmarks/ --benchmark-only", "FusedDSTS(1024)"):
        assert command in text, command
    if (ROOT / ".ci").exists():  # not in an sdist
        assert test in (ROOT / ".ci/run").read_text(encoding="utf-8").replace(" -q", "")
