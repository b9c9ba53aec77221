"""Options of the training recipe: our recipe's are the protocol's, and what does not fit is refused, in one line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from examples import train
from examples.options import dsts_options, parse
from examples.protocol.settings import ARMS, TASKS

pytestmark = pytest.mark.needs("torchmetrics")
TOY = ["--clips", "48", "--test-clips", "32", "--size", "16", "--frames", "4", "--width", "4", "--batch", "8"]
TOY += ["--neurons", "2", "--layers", "2", "--threads", "1", "--quiet"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """``--threads`` is the process's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_our_recipe_is_that_of_the_protocol():
    """Options of the command line, of which any may be given beside it, and the arm that the protocol tests."""
    options, arm, task = parse(["--recipe", "ours"]), ARMS["recipe"], TASKS["dives"]
    dsts = dsts_options(options)
    dsts["score_center"] = dsts["score_center"] == "mean"  # what True stands for
    assert {name: dsts[name] for name in arm.dsts} == dict(arm.dsts)
    assert (tuple(options.gumbel_scale), tuple(options.gate_noise)) == (arm.gumbel_scale, arm.noise_std)
    assert (options.learning, options.rate, options.upstream_rate) == (arm.learning, task.rate, task.upstream_rate)
    assert options.gate_rate == arm.gate_rate * options.upstream_rate
    options = parse(["--recipe", "ours", "--gate-offset", "1", "--learning", "upstream-downstream"])
    assert (options.gate_offset, options.learning, options.score_center) == (1.0, "upstream-downstream", "mean")
    assert not parse([]).gate_offset and parse([]).score_center is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--no-dsts", "--learning", "upstream-downstream"], "there is nothing upstream"),
        (["--no-dsts", "--balance", "1"], "--balance"),
        (["--no-dsts", "--recipe", "ours"], "--recipe: got ours with --no-dsts, wanted paper"),
        (["--learning", "joint", "--second-order"], "--second-order"),
        (["--epochs", "0"], "--epochs: got 0, wanted at least 1"),
        (["--scoring-kernel", "3"], "wanted a kernel such as 1x3x3"),
        (["--backbone", "r3d_18", "--width", "8"], "--width: got 8 with --backbone r3d_18, wanted none"),
        (["--aux-head"], "--aux-head: got it with --backbone tiny, wanted tpn"),
        (["--where", "stem", "--no-dsts"], "--where: got 'stem' with --no-dsts"),
        (["--stride", "2"], "--stride: got 2 with --data synthetic"),
        (["--data", "cells", "--stride", "2"], "--stride: got 2 with --data cells"),
        (["--backbone", "tnp"], "invalid choice: 'tnp'"),
        (["--size", "0"], "--size: got 0, wanted at least 1"),
        (["--no-dsts", "--score-center", "mean"], "--score-center: got it with --no-dsts"),
        (["--learning", "joint", "--both-ways"], "--both-ways: got it with --learning joint"),
        (["--learning", "joint", "--warm-up", "3"], "--warm-up: got it with --learning joint"),
        (["--warm-up", "-1"], "--warm-up: got -1, wanted at least 0"),
        (["--both-ways", "--fraction", "0.25"], "--fraction: got 0.25 with --both-ways, wanted 0.5"),
        (["--center-in-training"], "--center-in-training: got it without --score-center"),
        (["--data", "diving48", "--augment"], "--augment: got it with --data diving48"),
        (["--init", "a", "--weights", "b"], "--weights: got it with --init, wanted one of them"),
        (["--freeze-backbone", "--backbone-rate", "1"], "--backbone-rate: got it with --freeze-backbone"),
        (["--gumbel-scale", "1", "2", "3"], "--gumbel-scale: got 3 numbers, wanted 1 or 2"),
    ],
)
def test_options_that_do_not_fit(options, says, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(options)
    assert stop.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "diving48"], "--annotation: got nothing, wanted a path"),
        (["--scoring-kernel", "2x2x2"], "scoring_kernel: got (2, 2, 2)"),
        (["--batch", "4000"], "--batch: got 4000"),
        (["--where", "stage"], "where: got 'stage', wanted a submodule of TinyNet, such as 'stages'"),
        (["--std", "1", "0", "1"], "std: wanted numbers above 0"),
        (["--weights", "none.pth"], "'none.pth', wanted a file of weights; there is no such file"),
        (["--backbone", "tpn", "--size", "32", "--width", "3"], "width: got 3, wanted a multiple of 2"),
        (["--fraction", "2"], "fraction: got 2.0"),
        (["--learning", "joint", "--rate", "1e30"], "a lower --rate may help"),
        (["--init", "none.pt"], "there is no such file"),
        (["--gumbel-scale", "-1"], "gumbel_scale: got -1.0"),
        (["--gumbel-scale", "1", "--noise-wait", "1000"], "--noise-wait: got 1000, wanted fewer than the run's steps"),
        (["--score-center", "mean", "--center-momentum", "0"], "center_momentum: got 0.0"),
    ],
)
def test_values_that_are_refused(options, says, tmp_path, capsys):
    assert train.main([*TOY, "--out", str(tmp_path), *options]) == 2
    assert says in capsys.readouterr().err
