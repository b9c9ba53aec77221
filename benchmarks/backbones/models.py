"""A backbone alone, and with each implementation of DSTS in it, on the same weights.

A :class:`Case` says what is run. :func:`make_backbone` makes the backbone once; :func:`variant_of` gives a copy that
shares its parameters and buffers, with DSTS put in by ``insert_dsts``, so that no more weights are alive than one
backbone's and one module's (and the packed ones of the frozen one).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.shapes import Problem
from benchmarks.variants import SEED, build
from dsts_kernels.backbones import BACKBONES, Backbone, classification_loss, create, freeze_dsts, insert_dsts
from dsts_kernels.reference import DSTS, Draws

__all__ = [
    "CLASSES",
    "DEFAULT",
    "GRAPH",
    "KINDS",
    "VARIANTS",
    "Case",
    "dsts_in",
    "evaluation",
    "features_of",
    "give_draws",
    "make_backbone",
    "other_half",
    "training",
    "variant_of",
]

DEFAULT = ("tpn", "swin3d_b")  # the paper's two
CLASSES = 48  # of Diving48
VARIANTS = {
    "evaluation": ("backbone", "literal", "fused", "frozen"),
    "training": ("backbone", "literal", "fused"),
}
KINDS = {"evaluation": 1, "training": 2}  # of steps, by their draws: see other_half
GRAPH = " graph"  # ends the name of a variant that is replayed as a CUDA graph
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}


@dataclasses.dataclass(frozen=True)
class Case:
    """A backbone, its clips, and the DSTS that goes into it; another process is given it as JSON."""

    backbone: str
    batch: int
    frames: int
    size: int
    neurons: int = 10
    layers: int = 3
    dtype: str = "float32"
    device: str = "cpu"
    memory_format: str = "contiguous"

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone: got {self.backbone!r}, wanted one of {', '.join(BACKBONES)}")
        for name in ("batch", "frames", "size", "neurons", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")

    @classmethod
    def read(cls, text: str) -> Case:
        return cls(**json.loads(text))

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @property
    def about(self) -> Backbone:
        return BACKBONES[self.backbone]

    @property
    def clip_shape(self) -> tuple[int, int, int, int, int]:
        return (self.batch, 3, self.frames, self.size, self.size)

    @property
    def label(self) -> str:
        """Name and clips: ``tpn 1x3x8x256x256``."""
        return f"{self.backbone} {'x'.join(map(str, self.clip_shape))}"

    def problem(self, grid: tuple[int, int, int] = (1, 1, 1)) -> Problem:
        """What DSTS is given there; without its grid it says the module's sizes only."""
        return Problem(self.backbone, grid, self.batch, self.about.channels, self.layers, self.neurons)

    def placed(self, clips: Tensor) -> Tensor:
        """Clips in the case's dtype and memory format, on its device."""
        memory_format = MEMORY_FORMATS[self.memory_format]
        return clips.to(self.device, getattr(torch, self.dtype)).contiguous(memory_format=memory_format)


def import_torchvision() -> None:
    """torchvision as it is; where its native library is of another torch, what the tests put in its place.

    Its video models are plain PyTorch and call none of that library's operators, but importing them asks for schemas.
    Beside a torch for the CPU alone the library often does not load. The package never does this.
    """
    from tests.support.torchvision_ops import torchvision

    torchvision()


def make_backbone(case: Case) -> nn.Module:
    """The backbone with seeded random weights, TPN with its auxiliary head, which runs in training alone.

    Raises:
        ImportError: it is torchvision's, and torchvision is not there.
    """
    if case.about.torchvision:
        import_torchvision()
    torch.manual_seed(SEED)
    options = {"aux_logits": True} if case.backbone == "tpn" else {}
    model = create(case.backbone, CLASSES, **options)
    return model.to(case.device, getattr(torch, case.dtype), memory_format=MEMORY_FORMATS[case.memory_format])


def variant_of(model: nn.Module, variant: str, mode: str, case: Case, reference: DSTS | None) -> nn.Module:
    """A copy of a backbone for ``mode`` that shares its parameters and buffers, with DSTS in it or without.

    Args:
        model: the backbone alone.
        variant: see :data:`VARIANTS`.
        reference: the literal module whose parameters DSTS gets; not read for ``"backbone"``.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared).train(mode == "training")
    if variant == "backbone":
        return twin
    kind = "fused" if variant == "frozen" else variant
    dsts = build(kind, mode, case.problem(), reference)
    about = case.about
    insert_dsts(twin, about.where, layout=about.layout, channels=about.channels, dsts=dsts)
    return freeze_dsts(twin) if variant == "frozen" else twin


def dsts_in(model: nn.Module, case: Case) -> nn.Module:
    """The DSTS of a variant."""
    return next(part for name, part in model.get_submodule(case.about.where).named_modules() if name.endswith("dsts"))


def give_draws(dsts: nn.Module, draws: Sequence[Draws]) -> None:
    """These draws in turn, one a step, so that all variants do the same work."""
    following = itertools.cycle(draws)

    def give(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"draws": next(following)}

    dsts.register_forward_pre_hook(give, with_kwargs=True)


def other_half(draws: Draws) -> Draws:
    """The same noise, and hard samples where they were soft: over both just half are hard, as the paper has it."""
    return draws._replace(hard=~draws.hard)


def features_of(model: nn.Module, case: Case, run: Callable[[], object]) -> Tensor:
    """What leaves the place of DSTS in a run of the model, DSTS included: ``(B, C, T, H, W)``."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen.append(output.detach().clone())  # the next layer may write into it

    handle = model.get_submodule(case.about.where).register_forward_hook(keep)
    try:
        run()
    finally:
        handle.remove()
    return seen[0].permute(0, 4, 1, 2, 3) if case.about.layout == "BTHWC" else seen[0]


@torch.inference_mode()
def evaluation(model: nn.Module, clips: Tensor) -> Tensor:
    """One evaluation: logits."""
    return model(clips)


def training(model: nn.Module, clips: Tensor, targets: Tensor) -> Tensor:
    """Forward, loss and backward for every parameter; stochastic depth and dropout fall the same way every time."""
    torch.manual_seed(SEED)
    loss = classification_loss(model(clips), targets)
    loss.backward()
    return loss.detach()
