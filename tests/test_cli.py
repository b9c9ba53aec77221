"""The command line: it reports versions, the build and reasons, and refuses what it does not know."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels.cli import main


def test_info(capsys):
    """Versions, the native build and a line for every backend."""
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for part in ("dsts_kernels", torch.__version__, "native build", "cpu", "eager", "gated_conv3d on"):
        assert part in text


def test_unknown_command(capsys):
    """An unknown command ends with a usage error that lists what there is."""
    with pytest.raises(SystemExit) as stop:
        main(["fly"])
    assert stop.value.code == 2 and "info" in capsys.readouterr().err
