"""The protocol: statistics that are known by hand, arms that share what a seed fixes, runs that go on."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from dsts_kernels.learning import upstream_parameters
from examples.protocol import __main__ as command
from examples.protocol import branches, runs, settings
from examples.protocol.analysis import (
    compared,
    difference,
    holm,
    mean_interval,
    sign_flip_p,
    t_cdf,
    t_quantile,
    verdict,
)
from examples.protocol.branches import Seeded, build, measure, train, two_parts
from examples.protocol.report import markdown
from examples.protocol.settings import ARMS, CONTRASTS, FIRST_RECIPE, SEEDS, TASKS, TRIED, TUNING_SEEDS, Contrast
from examples.protocol.tasks import (
    backbone_of,
    batches,
    branch_clips,
    coloured,
    draw,
    draw_again,
    features_of,
    train_backbone,
)

TINY = {"backbone_clips": 32, "branch_clips": 64, "test_clips": 32, "backbone_epochs": 1, "epochs": 1, "batch": 16}


@pytest.fixture
def tiny(monkeypatch):
    """Both tasks at toy size."""
    small = {
        "dives": replace(TASKS["dives"], width=2, channels=8, layers=2, neurons=2, **TINY),
        "cells": replace(TASKS["cells"], neurons=2, **TINY),
    }
    for name, task in small.items():
        monkeypatch.setitem(settings.TASKS, name, task)
    return small


# Statistics


def test_students_distribution():
    """Against tables: 95% and 80% quantiles of 9 and 2 degrees of freedom."""
    for p, df, value in ((0.975, 9, 2.262157), (0.8, 9, 0.883404), (0.975, 2, 4.302653), (0.975, 1, 12.706205)):
        assert t_quantile(p, df) == pytest.approx(value, rel=1e-4)
        assert t_cdf(-value, df) == pytest.approx(1 - p, abs=1e-5)


def test_mean_interval():
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-4)
    assert found.low == pytest.approx(4 - found.high)
    assert found.resolution == pytest.approx((4.302653 + 1.060660) / math.sqrt(3), rel=1e-4)
    assert mean_interval([1.0])[1:3] == (-math.inf, math.inf)


def test_pairs_are_of_one_seed():
    each, found = difference({1: 0.5, 2: 0.7, 3: 0.9}, {2: 0.6, 3: 0.7, 4: 0.0})
    assert each == pytest.approx([0.1, 0.2]) and found.mean == pytest.approx(0.15)
    with pytest.raises(ValueError, match="no seed that both have"):
        difference({1: 0.5}, {2: 0.5})


def test_sign_flips():
    """By hand: of 8 flips of 1, 2, 3 only all and none are as far; with a 0 its sign counts twice."""
    assert sign_flip_p([1, 2, 3]) == 2 / 8
    assert sign_flip_p([1, 2, -3]) == 1.0 and sign_flip_p([0, 1]) == 1.0
    assert sign_flip_p([0.1] * 10) == 2 / 1024
    with pytest.raises(ValueError, match="wanted 14"):
        sign_flip_p([1.0] * 15)


def test_holm():
    """By hand: 0.01 * 4, 0.02 * 3, 0.03 * 2 raised to it, 0.5."""
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_verdict():
    """Reproduced: the interval excludes 0, after Holm too, and the counterfactual costs more than its own interval."""
    above, below, wide = (
        mean_interval(values) for values in ([0.1, 0.11, 0.12], [-0.1, -0.11, -0.12], [-1.0, 1.0, 0.5])
    )
    assert verdict(above, 0.01, {}) == "reproduced" == verdict(above, 0.01, {"a": above})
    assert verdict(above, 0.01, {"a": above, "b": wide}) == "in accuracy alone" == verdict(above, 0.01, {"a": below})
    assert verdict(below, 0.01, {"a": above}) == "the reverse"
    assert verdict(above, 0.06, {}) == verdict(wide, 0.01, {}) == "not shown"


def test_contrasts_count_those_that_are_missing():
    """Holm's correction is over what was named, so that a claim does not gain by others' not being run."""
    contrasts = [Contrast(claim=str(i), first="a", second="b" if i == 0 else "never") for i in range(4)]
    record = {"a": {s: {"accuracy": 0.8 + s / 1000} for s in range(10)}, "b": {s: {"accuracy": 0.7} for s in range(10)}}
    (found,) = compared(record, contrasts)
    assert found.p == 2 / 1024 and found.holm_p == 8 / 1024 and found.verdict == "reproduced"


def test_what_was_named():
    """Seeds on which settings are chosen are others; ten seeds can show something after Holm; arms exist."""
    assert len(SEEDS) == 10 and not set(SEEDS) & set(TUNING_SEEDS) and len(TUNING_SEEDS) == 3
    assert 2 / 2 ** len(SEEDS) * len(CONTRASTS) < 0.05
    assert all({c.first, c.second} <= set(ARMS) for c in CONTRASTS)
    assert all(arm.tasks for arm in ARMS.values())


# What a seed fixes


def test_order_and_split():
    """The seed alone draws them; an epoch goes through all clips once; both parts are apart within an epoch."""
    first, again, other = (torch.cat(list(batches(20, 4, 10, seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first) == 40 and sorted(first[:20].tolist()) == list(range(20)) == sorted(first[20:].tolist())
    pairs = list(two_parts(64, 4, 25, 3))
    assert len(pairs) == 25 and all(len(one) == len(two) == 4 for one, two in pairs)
    for epoch in (pairs[:12], pairs[12:24]):
        ones = {int(i) for one, _ in epoch for i in one}
        assert len(ones) == 48 and not ones & {int(i) for _, two in epoch for i in two}


def test_parts_are_apart(tiny):
    """Clips of backbone, branches and test differ, and so do those of other seeds, on which settings are chosen."""
    for task in tiny.values():
        drawn = [draw(task, seed, part).clips[:32] for seed in (1, 2) for part in ("backbone", "branch", "test")]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
        assert torch.equal(drawn[2], draw(task, 1, "test").clips)


def test_symmetries_of_an_epoch(tiny):
    """The same clips turned or mirrored: each is one of the eight symmetries of what it was."""
    drawn = draw(tiny["dives"], 0, "test")
    turned = draw_again(drawn, 5).clips
    kinds = set()
    for clip, own in zip(turned, drawn.clips, strict=True):
        eight = [torch.rot90(own, k, (-2, -1)) for k in range(4)]
        eight += [one.flip(-1) for one in eight]
        kinds |= {next(i for i, one in enumerate(eight) if torch.equal(one, clip))}
    assert len(kinds) > 3


def test_all_arms_see_clips_turned_alike(tiny):
    """From the second epoch on DSTS, too, gets features of the clips that the backbone's own arm gets."""
    task = replace(tiny["dives"], epochs=2)
    shared = Seeded(task, 4, backbone_of(task, 16).eval(), branch_clips(task, 4), draw(task, 4, "test"))
    again = draw_again(shared.train_clips, 9)
    wanted = features_of(shared.backbone, again).features
    torch.testing.assert_close(shared.features_again(9), wanted)
    assert not torch.allclose(wanted, shared.train.features)
    seeds = {"draw_again": [], "features_again": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branches, "draw_again", lambda own, seed: (seeds["draw_again"].append(seed), own)[1])
        patch.setattr(shared, "features_again", lambda seed: (seeds["features_again"].append(seed), wanted)[1])
        for name in ("backbone", "dsts"):
            train(shared, ARMS[name])
    assert seeds["draw_again"] == seeds["features_again"] == [4 + task.branch_clips // task.batch]


@pytest.fixture
def shared(tiny):
    task = tiny["cells"]
    net = train_backbone(task, 3)
    return Seeded(task, 3, net, branch_clips(task, 3), draw(task, 3, "test"))


def test_arms_start_alike(shared):
    """Arms whose DSTS has one shape start from the same weights behind the same last layer; frozen ones stay."""
    dsts, centred = build(shared, ARMS["dsts"]), build(shared, ARMS["centred"])
    for name, value in dsts.state_dict().items():
        assert torch.equal(value, centred.state_dict()[name]), name
    assert torch.equal(dsts.classifier.weight, shared.backbone.classifier.weight)
    for name, kept in (("gates still", "gate"), ("scores still", "scoring")):
        before = {k: v.clone() for k, v in build(shared, ARMS[name]).state_dict().items()}
        model, _ = train(shared, ARMS[name])
        moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
        assert not any(k.endswith(kept) for k in moved)
        assert any(k.endswith({"gate": "scoring", "scoring": "gate"}[kept]) for k in moved)


def test_steps_of_arms(shared):
    """Equal downstream steps, or a third of them, whose three passes cost as much."""
    steps = {name: train(shared, ARMS[name])[1]["steps"] for name in ("dsts", "ud steps", "ud compute", "head")}
    assert steps == {"dsts": 4, "ud steps": 4, "ud compute": 1, "head": 4}


def test_the_backbone_is_left_as_it_was(shared):
    before = {name: value.clone() for name, value in shared.backbone.state_dict().items()}
    for name in ("backbone", "head", "recipe"):
        train(shared, ARMS[name])
    assert all(torch.equal(value, before[name]) for name, value in shared.backbone.state_dict().items())
    assert torch.equal(features_of(shared.backbone, shared.train_clips).features, shared.train.features)


def test_features_are_the_backbones(tiny):
    """The last layer on their mean is the backbone's answer."""
    for name, task in tiny.items():
        drawn = draw(task, 0, "test")
        net = backbone_of(task, len(drawn.class_names)).eval()
        found = net.classifier(features_of(net, drawn).features.mean((2, 3, 4)))
        torch.testing.assert_close(found, net(coloured(drawn.clips)), msg=name)


def test_same_run_same_numbers(shared):
    first, second = (measure(shared, ARMS["ud compute"]) for _ in range(2))
    for record in (first, second):
        record.pop("train_seconds"), record.pop("measure_seconds")
    assert first == second


# The command


@pytest.mark.parametrize(
    ("task", "arms", "again"),
    [("cells", None, "ud compute"), ("dives", ["backbone", "dsts", "no skip", "end to end"], "end to end")],
)
def test_goes_on(tiny, tmp_path, capsys, task, arms, again):
    """A run that is missing is done again, to the same numbers, and others are not; a report says every verdict."""
    folder, plan = tmp_path / "protocol", list(runs.planned([task], [0], arms))
    assert runs.run_all(plan, folder, tmp_path, 0.0) == len(plan)  # no time
    assert runs.run_all(plan, folder, tmp_path, 60.0) == 0
    paths = [runs.path_of(folder, *run[:2], run[3]) for run in plan]
    assert len(set(paths)) == len(plan) and all(path.exists() for path in paths)
    path = next(path for path, run in zip(paths, plan, strict=True) if run[1] == again)
    times, record = {one: one.stat().st_mtime_ns for one in paths}, json.loads(path.read_text())
    path.unlink()
    capsys.readouterr()
    assert runs.run_all(plan, folder, tmp_path, 60.0) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1, "the backbone is kept, and one run is done"
    assert [one for one in paths if one.stat().st_mtime_ns != times[one]] == [path]
    second = json.loads(path.read_text())
    for key in ("accuracy", "train_loss", "counterfactuals"):
        assert second[key] == record[key]
    text = markdown(command.records_of(folder, plan), "the command").lower()
    for contrast in CONTRASTS:
        assert (contrast.claim.lower() in text) == ({contrast.first, contrast.second} <= {run[1] for run in plan})
    assert all(run[2].title.lower() in text for run in plan)
    assert all(part in text for part in ("resolution", "not shown", "beyond chance"))


def test_parts_share_the_work(tiny, tmp_path):
    """Two processes have seeds of their own and leave none out."""
    plan = list(runs.planned(["cells"], [0, 1, 2], ["head"]))
    for part in ((0, 2), (1, 2)):
        assert runs.run_all(plan, tmp_path, tmp_path, 60.0, part) == 0
        there = sorted(path.name for path in (tmp_path / "cells").glob("*.json"))
        assert there == [f"head-{seed}.json" for seed in ([0, 2] if part[0] == 0 else [0, 1, 2])]


def test_what_is_kept_of_a_seed(tiny, tmp_path):
    """Variants of other rates share clips and features; of other clips or another seed they do not."""
    task, seeds = tiny["cells"], runs.Seeds(tmp_path)
    first = seeds.of(task, 0)
    assert seeds.of(replace(task, rate=9.0), 0) is first and first.task.rate == 9.0
    assert seeds.of(replace(task, test_clips=16), 0) is not first and seeds.of(task, 1).seed == 1


def test_other_settings_are_run_anew(tiny, tmp_path):
    (run,) = runs.planned(["cells"], [0], ["head"])
    runs.run_all([run], tmp_path, tmp_path, 60.0)
    assert runs.load(tmp_path, run)["arm"] == "head"
    task, name, arm, seed = run
    assert runs.load(tmp_path, (replace(task, epochs=2), name, arm, seed)) is None
    assert runs.load(tmp_path, (task, name, replace(arm, kind="backbone"), seed)) is None


def test_variants_on_other_seeds(tiny):
    plan = list(runs.tried(["dives"], TUNING_SEEDS))
    assert len(plan) == 3 * len(TRIED)
    task, _, arm, _ = next(run for run in plan if run[1] == "balanced centre")
    assert arm.dsts == FIRST_RECIPE.dsts | {"score_center": "balance", "center_in_training": True}
    task, _, arm, _ = next(run for run in plan if run[1] == "rate x 2")
    assert task.rate == 2 * TASKS["dives"].rate and arm.dsts == FIRST_RECIPE.dsts


def test_frozen_sides_are_upstream(shared):
    """A frozen side has nothing to train, and the optimizer of the other side takes it all."""
    model = build(shared, ARMS["gates still"])
    frozen = [p for p in upstream_parameters(model) if not p.requires_grad]
    assert len(frozen) == 1 and frozen[0] is model.dsts.layers[0].gate


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--arms", "dst"], "--arms: got 'dst', wanted some of"),
        (["--seeds", "10", "2"], "--seeds: got 2, wanted some of 10, 11"),
        (["--tune", "--seeds", "10"], "--seeds: got 10, wanted some of 0, 1, 2"),
    ],
)
def test_refuses_what_is_unknown(capsys, given, says):
    with pytest.raises(SystemExit):
        command.main([*given, "--minutes", "0"])
    assert says in capsys.readouterr().err


def test_a_report_is_of_all_that_is_there(tiny, tmp_path):
    """Whichever seeds were asked for: else a command that goes on with one of them would write the others away."""
    for run in runs.planned(["cells"], SEEDS[:2], ["head"]):
        task, name, arm, seed = run
        record = {"accuracy": 0.5, "train_loss": 1.0, "seconds": 1, "machine": {"device": "one", "torch": "2"}}
        path = runs.path_of(tmp_path / "protocol", task, name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record | {"settings": runs.settings_of(task, arm)}))
    for seeds in ([], ["--seeds", str(SEEDS[0])]):
        assert command.main(["--minutes", "0", "--out", str(tmp_path), *seeds]) == 0
        assert json.loads((tmp_path / "results.json").read_text())["cells"]["arms"]["head"]["seeds"] == 2


def test_the_report_is_printed_and_drawn(tiny, tmp_path, capsys, monkeypatch):
    """Every number that a page may quote begins a line; pictures of the claims, costs, usage and one run."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(command, "SEEDS", (0, 1))
    monkeypatch.setattr("examples.protocol.figures.SEEDS", (0, 1))
    arms, folder, cache = ["backbone", "dsts", "recipe"], tmp_path / "protocol", tmp_path / "cache"
    assert runs.run_all(list(runs.planned(list(TASKS), (0, 1), arms)), folder, cache, 60.0) == 0
    capsys.readouterr()
    where = ["--out", str(tmp_path), "--cache", str(cache)]
    assert command.main(["--print", *where]) == 0
    said = capsys.readouterr().out
    accuracy = [json.loads((folder / f"cells/recipe-{seed}.json").read_text())["accuracy"] for seed in (0, 1)]
    assert f"\n{100 * sum(accuracy) / 2:.1f}: cells, recipe, top-1" in said and "## Dives" in said
    assert command.main(["--figures", *where]) == 0
    drawn = {path.name for path in folder.glob("*.png")}
    assert drawn == {f"{name}.png" for name in ("claims", "costs", "usage", "gates-cells", "activation-cells")}
