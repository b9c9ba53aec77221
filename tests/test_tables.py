"""Figures in tables of README and docs are those of their sources: ``python -m benchmarks.report.pages``."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.report import gpu, memory, overheads, pages, performance, wide
from benchmarks.report.pages import ROOT
from dsts_kernels import FusedDSTS

COMMAND = "python -m benchmarks.report.gpu benchmarks/results/h100.json"
HEAD = "| step | shape | Triton | CUDA C++ |\n| --- | --- | ---: | ---: |\n"
ROW = "| FrozenDSTS | tpn 8x1024x8x16x16 | **1.43 ms** | 2.87 ms |\n"
GRAPH = "| FrozenDSTS in a CUDA graph | tpn 8x1024x8x16x16 | **1.43 ms** | 2.85 ms |\n"


def page_of(tmp_path, monkeypatch, text: str):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def marked(rows: str, marker: str = COMMAND) -> str:
    return f"# Page\n\n<!-- table: {marker} -->\n\nAn H100.\n\n{HEAD}{rows}"


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: page.name)
def test_tables_are_as_their_commands_print_them(page):
    found = "\n".join(pages.problems(page))
    assert not found, f"{found}\npython -m benchmarks.report.pages --write"


def test_most_tables_of_the_readme_and_the_results_are_made_by_commands():
    """The check is of something: README's measured tables, all of results.md, the version table, the roofline."""
    texts = {page.name: page.read_text(encoding="utf-8") for page in pages.pages()}
    commands = [
        pages.named_in_log(table.marker)[0]
        for text in texts.values()
        for table in pages.tables(text)
        if table.marker and pages.kind(table.marker) == "command"
    ]
    for part in (
        "report benchmarks/results/cpu",
        "report.gpu",
        "examples.protocol",
        "versions",
        "overheads",
        "predictions",
    ):
        assert any(part in command for command in commands), part
    assert sum(command.startswith("python -m examples.protocol --print") for command in commands) >= 9


def test_a_table_may_show_less(tmp_path, monkeypatch):
    """Of rows and of columns; and text may stand between the comment and the table."""
    monkeypatch.setattr(pages, "printed", lambda command: gpu.markdown(json.loads(H100.read_text())))
    path = page_of(tmp_path, monkeypatch, marked(ROW + GRAPH))
    assert list(pages.problems(path)) == []


H100 = ROOT / "benchmarks/results/h100.json"


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (ROW.replace("2.87", "2.78"), "got | FrozenDSTS | tpn 8x1024x8x16x16 | **1.43 ms** | 2.78 ms |, wanted"),
        (ROW.replace("**", ""), "wanted | FrozenDSTS | tpn 8x1024x8x16x16 | **1.43 ms** | 2.87 ms |"),
        (ROW.replace("FrozenDSTS", "Frozen"), "prints no row 'Frozen | tpn 8x1024x8x16x16'"),
        (GRAPH + ROW, "not in this order"),
    ],
    ids=["another figure", "not in bold", "unknown row", "order"],
)
def test_what_is_wrong_is_said(tmp_path, monkeypatch, rows, complaint):
    monkeypatch.setattr(pages, "printed", lambda command: gpu.markdown(json.loads(H100.read_text())))
    (found,) = pages.problems(page_of(tmp_path, monkeypatch, marked(rows)))
    assert found.startswith("page.md:7: ") and complaint in found


def test_rows_and_columns_of_the_log_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "printed", lambda command: gpu.markdown(json.loads(H100.read_text())))
    rows = ROW + "| by hand | tpn | 9 ms | 8 ms |\n"
    path = page_of(tmp_path, monkeypatch, marked(rows, f"{COMMAND}; log: by hand"))
    assert list(pages.problems(path)) == []
    path.write_text(marked(ROW.replace("2.87", "1.11"), f"{COMMAND}; log: CUDA C++"), encoding="utf-8")
    assert list(pages.problems(path)) == []
    path.write_text(marked(rows), encoding="utf-8")
    assert "no row 'by hand | tpn'" in next(iter(pages.problems(path)))


def test_figures_need_a_source(tmp_path, monkeypatch):
    """Numbers in words or in code are no figures; a comment of another section, in code or of no known kind does not
    count; a log says when."""
    plain = "| option | |\n| --- | --- |\n| `a` | `1.5` |\n| b | over 3 |\n"
    path = page_of(tmp_path, monkeypatch, plain)
    assert list(pages.problems(path)) == []
    timed = plain.replace("over 3", "in 5.6 to 6.6 ms")
    for text in (f"{HEAD}{ROW}", timed, f"<!-- table: words -->\n\n## Next\n\n{HEAD}{ROW}"):
        path.write_text(text, encoding="utf-8")
        (found,) = pages.problems(path)
        assert "no <!-- table: ... --> that says where they come from" in found
    path.write_text(f"```\n{HEAD}{ROW}```\n", encoding="utf-8")
    assert list(pages.problems(path)) == []
    for marker in ("somebody said so", "log, measured once", "log, 2026-11-26", "held by memory"):
        path.write_text(marked(ROW, marker), encoding="utf-8")
        assert f"got {marker!r}, wanted" in next(iter(pages.problems(path)))
    path.write_text(marked(ROW, "log, measured by `x`, 2026-11-26"), encoding="utf-8")
    assert list(pages.problems(path)) == []
    path.write_text(marked(ROW, "held by tests/test_nothing.py"), encoding="utf-8")
    assert "which is not there" in next(iter(pages.problems(path)))


HEADLINE = (
    "python -m benchmarks.report.headline benchmarks/results/cpu-avx512-2-cores.json benchmarks/results/h100.json"
)


def test_figures_of_a_paragraph(tmp_path, monkeypatch):
    """Each number has to be one that the command prints; names and versions with digits are no numbers."""
    pages.printed(HEADLINE)  # from here
    text = (
        f"# Page\n\n<!-- figures: {HEADLINE} -->\n\n- **13 times** on a CPU, 27%\n- 5.6 on an H100, v2.1\n\n99 more\n"
    )
    path = page_of(tmp_path, monkeypatch, text)
    assert list(pages.problems(path)) == []
    path.write_text(text.replace("13 times", "14 times").replace("5.6", "5.60"), encoding="utf-8")
    assert [line.partition(", wanted")[0] for line in pages.problems(path)] == [
        "page.md:3: got 14",
        "page.md:3: got 5.60",
    ]


def test_write(tmp_path, monkeypatch, capsys):
    """Only cells that differ change, and the line of a row that does not stays as it is laid out."""
    monkeypatch.setattr(pages, "printed", lambda command: gpu.markdown(json.loads(H100.read_text())))
    text = marked(ROW.replace("2.87", "2.78") + GRAPH.replace(" | ", "  | ")) + "\nThe end.\n"
    path = page_of(tmp_path, monkeypatch, text)
    monkeypatch.setattr(sys, "argv", ["pages", "--write", str(path)])
    assert pages.main() == 0 and "every table is as its command prints it" in capsys.readouterr().out
    assert path.read_text() == text.replace("2.78", "2.87")
    monkeypatch.setattr(sys, "argv", ["pages", str(path)])
    path.write_text(text, encoding="utf-8")
    assert pages.main() == 1 and "1 problems" in capsys.readouterr().out


def test_commands_are_ours_and_succeed():
    assert "| FrozenDSTS |" in pages.printed(COMMAND)
    for command in ("rm -r x", "python", "python -m benchmarks.report.gpu nowhere.json"):
        with pytest.raises((ValueError, OSError)):
            pages.printed(command)


def test_a_run_with_more_rounds_counts():
    """Of two runs of a step; memory comes from the one that has it."""
    row = {
        "case": "tpn 1x3x8x256x256", "mode": "evaluation", "variant": "backbone", "clock": "wall", "rounds": 4,
        "ms": 100.0, "gflop": 1.0, "parameters_m": 2.0, "weights_mib": 3.0, "peak_mib": 77.0,
    }  # fmt: skip
    longer = row | {"rounds": 9, "ms": 90.0, "peak_mib": None}
    for runs in ([row, longer], [longer, row]):
        text = overheads.markdown([{"backbones": [one]} for one in runs])
        assert text.splitlines()[2:] == ["| TPN, evaluation, 9 rounds | alone | 90 | - | - | | 1.0 | 2.0 | 3 | 77 |"]


def test_missed_goals_are_in_bold():
    results = json.loads((ROOT / "benchmarks/results/cpu-avx512-2-cores.json").read_text())
    assert "| **1.16**, 1.10 |" in performance.goals(results)
    for row in results["rows"]:
        if row["variant"] == "frozen":
            row["ms"] *= 2
    assert "| 9 and 7 | **6.61** | **5.24** |" in performance.goals(results)


def test_wide_table_of_a_run():
    """A column for each variant that was timed, the fastest in bold; a training step has no frozen module."""
    rows = [
        {"mode": mode, "shape": "tpn 1x2x3x4x5", "variant": variant, "ms": ms}
        for mode, variant, ms in (
            ("training", "literal", 30.0), ("evaluation", "literal", 20.0), ("evaluation", "frozen", 2.5),
            ("evaluation", "compiled", None), ("training", "fused", 10.04),
        )
    ]  # fmt: skip
    assert wide.markdown({"rows": rows, "dtype": "float32"}).splitlines() == [
        "| step | shape | literal PyTorch | FusedDSTS | FrozenDSTS |",
        "| --- | --- | ---: | ---: | ---: |",
        "| evaluation, float32 | TPN | 20.0 | | **2.50** |",
        "| training step, float32 | TPN | 30.0 | **10.0** | |",
    ]
    half = {
        "rows": [{"mode": "evaluation", "shape": "swin 1x2x3x4x5", "variant": "fused", "ms": 7.0}],
        "dtype": "bfloat16",
    }
    assert wide.markdown({"rows": rows, "dtype": "float32"}, half).splitlines()[2:] == [
        "| evaluation, float32 | TPN | 20.0 | | **2.50** |",
        "| evaluation, bfloat16 | Swin-B | | **7.00** | |",
        "| training step, float32 | TPN | 30.0 | **10.0** | |",
    ]


def test_memory_is_that_of_the_parameters():
    held = sum(p.numel() * p.element_size() for p in FusedDSTS(64).parameters())
    assert f"| `FusedDSTS(64)` | 1.7 | {held / 2**20:.0f} | {4 * held / 2**20:.0f} |" in memory.markdown((64,))
