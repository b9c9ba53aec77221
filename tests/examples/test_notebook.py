"""The notebook as a reader runs it: every cell, in a kernel of its own, in its folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("nbclient", "nbformat", "ipykernel", "matplotlib")
NOTEBOOK = Path(__file__).parents[2] / "examples/notebook.ipynb"


def test_notebook(monkeypatch):
    """It learns its task, draws two figures, and its modules agree; outputs are not kept in the file."""
    import nbclient
    import nbformat

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert float(re.search(r"accuracy on new clips: ([\d.]+)%, chance: 12\.5%", text)[1]) > 75, text
    assert len(re.findall(r"relative error \S+, the same neuron for", text)) == 2, text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
