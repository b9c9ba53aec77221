"""What a checkpoint says of its classifier: enough to build the model again, and to make its clips of any video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from .. import reference
from ..backbones import BACKBONES, create, insert_dsts
from ..data.sampling import ClipSampling
from ..modules import FusedDSTS
from ..ops._checks import describe

__all__ = ["CLASSIFIER", "ClassifierConfig"]

CLASSIFIER = "classifier"  # its key in a checkpoint


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """A backbone, DSTS in it, its classes and its clips.

    Attributes:
        backbone: a key of :data:`~dsts_kernels.backbones.BACKBONES`.
        class_names: in the order of the logits.
        sampling: of its clips.
        options: of :func:`~dsts_kernels.backbones.create`.
        where: the submodule behind which DSTS stands; ``None`` is where the registry has it.
        dsts: options of :class:`FusedDSTS`; ``None`` is the backbone alone.

    Raises:
        TypeError, ValueError: a value that is no such thing; names it.
    """

    backbone: str
    class_names: tuple[str, ...]
    sampling: ClipSampling
    options: Mapping[str, Any] = field(default_factory=dict)
    where: str | None = None
    dsts: Mapping[str, Any] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone: got {self.backbone!r}, wanted one of {', '.join(BACKBONES)}")
        if not self.class_names or not all(isinstance(name, str) for name in self.class_names):
            raise ValueError(f"class_names: got {self.class_names!r}, wanted a name for each of at least one class")
        if not isinstance(self.sampling, ClipSampling):
            raise TypeError(f"sampling: got {describe(self.sampling)}, wanted ClipSampling")
        for name, value in (("options", self.options), ("dsts", self.dsts)):
            optional = name == "dsts" and value is None
            if not optional and (not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value)):
                raise TypeError(f"{name}: got {describe(value)}, wanted a mapping of names to values")
        if self.where is not None and not isinstance(self.where, str):
            raise TypeError(f"where: got {describe(self.where)}, wanted the name of a submodule")

    @classmethod
    def of(cls, backbone: str, class_names: tuple[str, ...], **others: Any) -> ClassifierConfig:
        """With the clips that the backbone's published weights are for."""
        known = BACKBONES.get(backbone)
        if known is None:
            raise ValueError(f"backbone: got {backbone!r}, wanted one of {', '.join(BACKBONES)}")
        sampling = ClipSampling(frames=known.frames, size=known.size, mean=known.mean, std=known.std)
        return cls(backbone=backbone, class_names=class_names, sampling=sampling, **others)

    def build(self, *, weights: str | None = None, literal: bool = False) -> nn.Module:
        """The model, at random or with a pretrained backbone; DSTS is at random.

        Args:
            weights: of :func:`~dsts_kernels.backbones.create`; the classifier's own layers stay at random.
            literal: DSTS is :class:`reference.DSTS`.

        Raises:
            ImportError: the backbone is torchvision's, which cannot be imported.
            FileNotFoundError: no such file of weights.
            TypeError, ValueError: options or weights that do not fit, or an unknown submodule; names it.
        """
        known = BACKBONES[self.backbone]
        channels = known.channels_of(self.options.get("width"))
        usual = self.where in (None, known.where)
        module = None
        # DSTS is drawn before its backbone, so that runs of the recipe give what docs/results.md has.
        if usual and self.dsts is not None and not literal:
            module = FusedDSTS(channels, **self.dsts)
        model = create(
            self.backbone, len(self.class_names), weights=weights, new_head=weights is not None, **self.options
        )
        if self.dsts is None:
            return model
        if usual:
            module = reference.DSTS(channels, **self.dsts) if module is None else module
            insert_dsts(model, known.where, layout=known.layout, channels=channels, dsts=module)
            return model
        clip = (1, 3, self.sampling.frames, self.sampling.size, self.sampling.size)
        found = insert_dsts(model, self.where, example=clip, **self.dsts)
        if literal:
            host = next(m for m in model.modules() if m._modules.get("dsts") is found)
            host.dsts = reference.DSTS(found.layers[0].in_channels, **self.dsts)
        return model

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint keeps them."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        dsts = None if self.dsts is None else dict(self.dsts)
        return own | {"sampling": self.sampling.to_dict(), "options": dict(self.options), "dsts": dsts}

    @classmethod
    def from_dict(cls, content: object) -> ClassifierConfig:
        """Of :meth:`to_dict`.

        Raises:
            TypeError, ValueError: a value is missing, unknown, or no such thing; names it.
        """
        own = _exactly(CLASSIFIER, content, {f.name for f in fields(cls)})
        names = {f.name for f in fields(ClipSampling) if f.init}
        sampling = ClipSampling(**_exactly("sampling", own["sampling"], names))
        if not isinstance(own["class_names"], (tuple, list)):
            raise TypeError(f"class_names: got {describe(own['class_names'])}, wanted a list of names")
        return cls(**{**own, "sampling": sampling, "class_names": tuple(own["class_names"])})


def _exactly(name: str, content: object, wanted: set[str]) -> dict[str, Any]:
    """A mapping with these keys and no others."""
    if not isinstance(content, Mapping):
        raise TypeError(f"{name}: got {describe(content)}, wanted a mapping")
    if set(content) != wanted:
        raise ValueError(f"{name}: got {', '.join(map(str, content))}, wanted {', '.join(sorted(wanted))}")
    return dict(content)
