"""A backbone's clips, its variants ready to run, and their parity with the literal module at the place of DSTS."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from benchmarks.backbones.models import (
    CLASSES,
    GRAPH,
    VARIANTS,
    Case,
    dsts_in,
    evaluation,
    features_of,
    give_draws,
    make_backbone,
    other_half,
    training,
    variant_of,
)
from benchmarks.backbones.turns import Turns
from benchmarks.features import make_clips
from benchmarks.margins import ATTEMPTS, MARGIN, margins, rolled, separate_draws
from benchmarks.parity import (
    TOLERANCES,
    assert_parity,
    evaluation_oracle,
    relative_error,
    training_errors,
    training_oracle,
    widened,
)
from benchmarks.variants import SEED, build, make_draws, make_reference
from dsts_kernels.reference import DSTS, Draws

__all__ = ["Workload"]


class Workload:
    """One case, its weights made once for evaluation and training.

    Args:
        case: what is run.
        clip: a video file, or ``None`` for the default one.
        backbone: to run instead of the case's own: what tests give, as it is small.
    """

    def __init__(self, case: Case, clip: str | None = None, backbone: nn.Module | None = None) -> None:
        self.case, self.dtype = case, getattr(torch, case.dtype)
        self.device = torch.device(case.device)
        self.backbone = make_backbone(case) if backbone is None else backbone
        self.reference: DSTS = make_reference(case.problem(), self.dtype, self.device)
        clips, self.source = make_clips(case.clip_shape, clip)
        self.clips = self.separated(case.placed(clips))
        self.targets = torch.arange(case.batch, device=self.device) % CLASSES

    @cached_property
    def plain(self) -> nn.Module:
        """The backbone alone, in evaluation."""
        return variant_of(self.backbone, "backbone", "evaluation", self.case, None)

    def separated(self, clips: Tensor) -> Tensor:
        """Clips, rolled along their width until no layer's two best scores are nearly tied: see ``margins``."""
        widest = widened(self.reference).eval()
        for _ in range(ATTEMPTS):
            x = features_of(self.plain, self.case, lambda: evaluation(self.plain, clips))
            with torch.no_grad():
                routing = widest(x.to(widest.layers[0].gate.dtype), return_routing=True)[1]
            narrow = (margins(routing.scores) < MARGIN).any(0)
            if not narrow.any():
                return clips
            clips[narrow] = rolled(clips[narrow], -1)
        raise RuntimeError(f"clips: scores within {MARGIN} of each other after {ATTEMPTS} corrections")

    def models(self, mode: str) -> dict[str, nn.Module]:
        """Every variant of a mode, by name."""
        return {name: variant_of(self.backbone, name, mode, self.case, self.reference) for name in VARIANTS[mode]}

    def warm_up(self, mode: str, models: dict[str, nn.Module], turns: Turns) -> dict[str, float]:
        """Every step for the first time, and the largest error of each variant with DSTS.

        What leaves the place of DSTS in those steps is compared with the literal module's output for what arrives
        there. In training the fused module's gradients are too, and steps get their draws.

        Raises:
            AssertionError: an error is beyond tolerance.
        """

        def leaves(name: str) -> Tensor:
            return features_of(models[name], self.case, lambda: turns.warm_up(name))

        x = leaves("backbone")
        found: dict[str, float] = {}
        if mode == "evaluation":
            wanted = evaluation_oracle(self.reference, x).output
        else:
            found["fused"], wanted = self.training_parity(models, x)
        for name in VARIANTS[mode][1:]:
            error = self.checked(name, {"output": relative_error(leaves(name), wanted)})
            found[name] = max(error, found.get(name, 0.0))
        for name in turns.steps.keys() - set(VARIANTS[mode]):
            turns.warm_up(name)
        return found

    def training_parity(self, models: dict[str, nn.Module], x: Tensor) -> tuple[float, Tensor]:
        """Gives all steps draws that leave no scores nearly tied on features ``x``; the largest error of the fused
        module's output and gradients, and the literal output."""
        problem = self.case.problem()
        wide = widened(build("literal", "training", problem, self.reference))
        rows = x.to(wide.layers[0].gate.dtype)

        @torch.no_grad()
        def separated(draws: Draws) -> Draws:
            return separate_draws(lambda draws: wide(rows, draws=draws, return_routing=True)[1], draws)

        draws = separated(make_draws(problem, self.device, self.dtype))
        literal = build("literal", "training", problem, self.reference)  # statistics of before
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED)).to(x)
        oracle = training_oracle(literal, x, draws, grad)
        fused = dsts_in(models["fused"], self.case)
        error = self.checked("fused", training_errors(fused, x, draws, grad, oracle))
        both = [draws, separated(other_half(draws))]
        for name in VARIANTS["training"][1:]:
            give_draws(dsts_in(models[name], self.case), both)
        return error, oracle.output

    def checked(self, name: str, errors: dict[str, float]) -> float:
        try:
            return assert_parity(errors, self.dtype)
        except AssertionError as error:
            raise AssertionError(f"{name} in {self.case.label}, tolerances {TOLERANCES[self.dtype]}: {error}") from None

    def steps(self, mode: str, models: dict[str, nn.Module]) -> dict[str, Callable[[], object]]:
        """One call each; on a GPU evaluation of the backbone and of the frozen one also as CUDA graphs."""
        step, rest = (evaluation, ()) if mode == "evaluation" else (training, (self.targets,))
        found = {name: partial(step, model, self.clips, *rest) for name, model in models.items()}
        if mode == "evaluation" and self.device.type == "cuda":
            from benchmarks.gpu.timing import captured

            for name in ("backbone", "frozen"):
                graph, _ = captured(partial(evaluation, models[name]), self.clips)
                found[name + GRAPH] = graph.replay
        return found
