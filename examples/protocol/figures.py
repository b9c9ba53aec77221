"""What the runs came to, as pictures: claims, costs, usage; gates and activation of one run of the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dsts_kernels import files
from dsts_kernels.probe import probe
from dsts_kernels.viz import gate_shares, plot_activation, plot_costs, plot_gates
from dsts_kernels.viz.style import LAYERS, SPATIAL, figure, paper

from .analysis import Difference, compared, costs_of, mean_interval
from .branches import train
from .report import CHANGES, Records
from .runs import Seeds
from .settings import ARMS, CONTRASTS, SEEDS, TASKS, arms_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

NO, YES, OTHER = "#9A9A9A", SPATIAL, "#D55E00"  # not shown; above 0; the reverse
INK = LAYERS[0][0]
NOTHING = Difference(*[float("nan")] * 3, 0, float("nan"))  # of what was not run: nothing is drawn
ONE_RUN = "cells"  # the task of the pictures of one run: there neurons are what accuracy depends on


def intervals(axes: Axes, found: Sequence[Difference], colors: Sequence[str], scale: float, shift: float = 0.0) -> None:
    """A dot and its 95% interval a row, from the top."""
    for place, (one, color) in enumerate(zip(found, colors, strict=True)):
        out = [[scale * (one.mean - one.low)], [scale * (one.high - one.mean)]]
        axes.errorbar(
            [scale * one.mean],
            [place + shift],
            xerr=out,
            fmt="o",
            color=color,
            markersize=4,
            elinewidth=1.4,
            capsize=2.5,
        )


def rows(axes: Axes, names: Sequence[str], said: str) -> None:
    axes.set_yticks(range(len(names)), labels=names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(said, fontsize=8)
    paper(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)


def claims(records: Mapping[str, Records]) -> Figure:
    """Every contrast on every task: its difference with a 95% interval."""
    tested = {task: compared(own, CONTRASTS) for task, own in records.items()}
    names = [contrast.claim + (" (ours)" if contrast.extension else "") for contrast in CONTRASTS]
    fig = figure(5.6 + 2.6 * len(tested), 1.3 + 0.29 * len(names))
    panels = fig.subplots(1, len(tested), sharey=True, squeeze=False)[0]
    for axes, (task, own) in zip(panels, tested.items(), strict=True):
        by_claim = {one.contrast.claim: one for one in own}
        found = [by_claim.get(contrast.claim) for contrast in CONTRASTS]
        verdicts = {"not shown": NO, "the reverse": OTHER}
        colors = [NO if one is None else verdicts.get(one.verdict, YES) for one in found]
        axes.axvline(0.0, color=INK, linewidth=0.8)
        intervals(axes, [NOTHING if one is None else one.found for one in found], colors, 100.0)
        for row, one in enumerate(found):
            if one is None:
                axes.annotate("not run", (0.0, row), (4, 0), textcoords="offset points", va="center", fontsize=7)
        axes.set_title(task, fontsize=10)
        rows(axes, names, "points of top-1")
    fig.supxlabel(
        "95% intervals over seeds. Dark: above 0, also after Holm's correction. Orange: below 0. Grey: neither.",
        fontsize=8,
        color="#555555",
    )
    fig.suptitle("Claims: the difference between two arms", fontsize=12)
    return fig


def costs(records: Mapping[str, Records]) -> Figure:
    """What each counterfactual costs, of the paper's DSTS and of the recipe."""
    shown = {}
    for name, title in (("dsts", "as the paper"), ("recipe", "our recipe")):
        for task, own in records.items():
            if name in own:
                found = {change: costs_of(own[name], change) for change in CHANGES}
                shown[f"{task}, {title}"] = [
                    {"name": change, "cost": one.mean, "low": one.low, "high": one.high}
                    for change, one in found.items()
                ]
    return plot_costs(shown, "95% intervals over seeds")


def usage(records: Mapping[str, Records]) -> Figure:
    """Bits of the choices, as evaluation makes them and with the noise of training: mean of a run's layers."""
    with_dsts = [n for n, arm in ARMS.items() if arm.kind in ("dsts", "end to end")]
    arms = [n for n in with_dsts if all(n in own or n not in arms_of(task) for task, own in records.items())]
    fig = figure(4.2 + 2.2 * len(records), 1.5 + 0.27 * len(arms))
    panels = fig.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for axes, (task, own) in zip(panels, records.items(), strict=True):
        for key, color, shift, label in (
            ("test_entropy", YES, -0.14, "in evaluation"),
            ("entropy", NO, 0.14, "in training, with its noise"),
        ):
            found = [
                mean_interval([sum(r[key]) / len(r[key]) for r in own[n].values()]) if n in own else NOTHING
                for n in arms
            ]
            intervals(axes, found, [color] * len(arms), 1.0, shift)
            axes.plot([], [], "o", color=color, markersize=4, label=label)
        axes.set_xlim(-0.1, 2.1)
        axes.set_title(task, fontsize=10)
        rows(axes, [ARMS[n].title for n in arms], "bits; 0: one neuron takes all, 2: four share evenly")
    handles, labels = panels[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    fig.suptitle("How evenly neurons are used, with 95% intervals over seeds", fontsize=12)
    return fig


def of_one_run(task: str, cache: Path) -> dict[str, Figure]:
    """The recipe of the first seed, trained anew: gates, and the neurons that each class activates in evaluation."""
    shared = Seeds(cache).of(TASKS[task], SEEDS[0])
    model, told = train(shared, ARMS["recipe"])
    clips, layers = shared.test_clips, list(model.dsts.layers)
    batches = list(zip(shared.test.features.split(128), clips.labels.split(128), strict=True))
    measured = probe(model, batches, draws=1).measured
    routing = {"neuron": measured.neuron, "label": measured.label, "class_names": clips.class_names}
    routing |= {"attributes": clips.attributes, "attribute_names": clips.attribute_names}
    gates = [layer.gate.detach() for layer in layers]
    start = gate_shares(list(told["start"].values()))
    return {
        f"gates-{task}": plot_gates(gate_shares(gates), [gate.shape[1] for gate in gates], start),
        f"activation-{task}": plot_activation(routing, TASKS[task].neurons),
    }


def draw(records: Mapping[str, Records], folder: Path, cache: Path) -> list[Path]:
    """All pictures of the runs that are there, and of one run, which is trained for them in half a minute."""
    torch.set_num_threads(1)  # as the runs were
    found: dict[str, Any] = {"claims": claims(records), "costs": costs(records), "usage": usage(records)}
    if ONE_RUN in records:
        found |= of_one_run(ONE_RUN, cache)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, one in found.items():
        paths.append(folder / f"{name}.png")
        with files.replacing(paths[-1]) as beside:
            one.savefig(beside, dpi=130, format="png")
    return paths
