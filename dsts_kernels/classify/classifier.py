"""``Classifier``: a model with DSTS, and videos through it, window by window."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import freeze_dsts, load_state
from ..data.sampling import ClipSampling, Window
from ..data.video import VideoError, extent
from ..frozen import FrozenDSTS
from ..learning import load_checkpoint
from ..modules import FusedDSTS
from ..routing import Routing
from .config import CLASSIFIER, ClassifierConfig
from .results import Classification, LeftOut, Times, WindowResult

__all__ = ["Classifier"]

MADE_UP_CLASSES = 48  # of a model without weights: as many as Diving48 has
SHOWN_SIZE = 144  # pixels of the shorter side of frames that are kept, at least
NOT_OURS = (
    "; wanted a checkpoint of examples/train.py. A file of weights alone says neither backbone nor clips: "
    "examples/train.py --weights starts from one"
)


class Watched(nn.Module):
    """DSTS where it stood; notes routing and seconds of every call."""

    def __init__(self, dsts: FusedDSTS | FrozenDSTS) -> None:
        super().__init__()
        self.dsts = dsts
        self.routings: list[Routing] = []
        self.seconds = 0.0

    def forward(self, x: Tensor) -> Tensor:
        began = clock(x.device)
        y, routing = self.dsts(x, return_routing=True)
        self.seconds += clock(x.device) - began
        self.routings.append(routing)
        return y


def clock(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Classifier:
    """Videos to classes, by any model of clips with DSTS in it or without.

    >>> classifier = Classifier.load("runs/tpn/checkpoint.pt")  # doctest: +SKIP
    >>> found = classifier("bikes.mp4")  # doctest: +SKIP
    >>> found.top(1), found.neurons(), found.times  # doctest: +SKIP

    Args:
        model: ``(B, 3, T, H, W)`` clips to ``(B, classes)`` logits. It is taken over: put into evaluation, moved, and
            with ``freeze`` its DSTS is frozen, for good.
        sampling: of its clips.
        class_names: in the order of its logits.
        device: to run on.
        freeze: fold and pack DSTS for inference; without, :class:`FusedDSTS` runs as it is.
        trained: the weights are; said with every answer.

    Attributes:
        config: what a checkpoint said, or ``None`` for a model of your own.

    Raises:
        TypeError, ValueError: an argument that is no such thing; what :func:`freeze_dsts` refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: ClipSampling,
        class_names: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        freeze: bool = True,
        trained: bool = True,
    ) -> None:
        self.device = usable(device)
        self.sampling, self.class_names, self.trained = sampling, tuple(class_names), trained
        self.config: ClassifierConfig | None = None
        self.model = model.eval().to(self.device)
        if freeze and any(isinstance(part, FusedDSTS) for part in self.model.modules()):
            freeze_dsts(self.model)
        self._watched = [
            watch(parent, child)
            for parent in list(self.model.modules())
            for child, part in list(parent._modules.items())
            if isinstance(part, (FusedDSTS, FrozenDSTS))
        ]

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: torch.device | str = "cpu", freeze: bool = True) -> Classifier:
        """From a checkpoint of ``examples/train.py``; nothing in the file is executed.

        Raises:
            FileNotFoundError: no such file.
            ImportError: its backbone is torchvision's, which cannot be imported.
            ValueError: damaged, cut off, something else, of a newer version, or of another model than it says.
        """
        device = usable(device)
        content = load_checkpoint(path, hint=NOT_OURS)
        if CLASSIFIER not in content or not isinstance(content.get("model"), dict):
            lacking = CLASSIFIER if CLASSIFIER not in content else "model"
            raise ValueError(f"path: got {str(path)!r}, a checkpoint without {lacking!r}{NOT_OURS}")
        try:
            config = ClassifierConfig.from_dict(content[CLASSIFIER])
            model = config.build()
        except (TypeError, ValueError) as error:
            raise ValueError(f"path: got {str(path)!r}, whose classifier cannot be made: {error}") from error
        load_state(model, content["model"], source=str(path))
        return cls._of(config, model, device=device, freeze=freeze)

    @classmethod
    def untrained(
        cls,
        backbone: str,
        *,
        num_classes: int = MADE_UP_CLASSES,
        seed: int = 0,
        device: torch.device | str = "cpu",
        freeze: bool = True,
        **config: Any,
    ) -> Classifier:
        """A backbone with DSTS at random: what it costs, and that it runs.

        Args:
            backbone: a key of :data:`~dsts_kernels.backbones.BACKBONES`.
            num_classes: how many.
            seed: of the weights.
            config: of :class:`ClassifierConfig`: ``options``, ``where``, ``dsts``, ``sampling``.

        Raises:
            ImportError: the backbone is torchvision's, which cannot be imported.
            TypeError, ValueError: what :class:`ClassifierConfig` refuses.
        """
        device = usable(device)
        names = tuple(f"class {number}" for number in range(num_classes))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            known = ClassifierConfig.of(backbone, names, **config)
            model = known.build()
        return cls._of(known, model, device=device, freeze=freeze, trained=False)

    @classmethod
    def _of(cls, config: ClassifierConfig, model: nn.Module, **options: Any) -> Classifier:
        self = cls(model, config.sampling, config.class_names, **options)
        self.config = config
        return self

    def __call__(
        self,
        path: str | os.PathLike,
        *,
        length: float | None = None,
        hop: float | None = None,
        batch: int = 1,
        keep: int = 0,
        progress: Callable[[Sequence[Window]], Iterable[Window]] = iter,
    ) -> Classification:
        """Classifies a video.

        Args:
            path: the video, a file.
            length, hop: of its windows in seconds; see :meth:`ClipSampling.windows`.
            batch: windows at a time.
            keep: windows whose frames the answer has, evenly spaced; not timed.
            progress: goes through the windows, as ``tqdm.tqdm`` does.

        Returns:
            The answer; windows that cannot be decoded are in its ``left_out``.

        Raises:
            VideoError: the file is missing, corrupt or has no video, or no window of it can be decoded.
            ValueError: an argument is out of its range; logits that are not finite, or not one a class.
            ImportError: PyAV is not installed.
        """
        if batch < 1 or keep < 0:
            raise ValueError(f"batch, keep: got {batch} and {keep}, wanted at least 1 and 0")
        windows = self.sampling.windows(extent(path), length, hop)
        count = min(keep, len(windows))
        kept = {round(place * (len(windows) - 1) / max(1, count - 1)) for place in range(count)}
        left_out: list[LeftOut] = []
        read = self._read(path, windows, progress, left_out)
        results: list[WindowResult] = []
        times = Times()
        while group := list(islice(read, batch)):
            numbers, frames, clips, seconds = zip(*group, strict=True)
            probabilities, routings, backbone, dsts = self._run(torch.stack(clips), path)
            times = times.plus(decode=sum(seconds), backbone=backbone, dsts=dsts)
            for place, number in enumerate(numbers):
                neurons = tuple(int(neuron) for r in routings for neuron in r.neuron[:, place])
                spatial = tuple(float(gate.double().mean()) for r in routings for gate in r.gate[:, place])
                shown = self._shown(path, windows, number, frames[place]) if number in kept else None
                results.append(WindowResult(windows[number], probabilities[place], neurons, spatial, shown))
        if not results:
            raise VideoError(left_out[0].reason)
        return Classification(
            Path(path), self.class_names, tuple(results), tuple(left_out), times, trained=self.trained
        )

    def _read(
        self,
        path: str | os.PathLike,
        windows: list[Window],
        progress: Callable[[Sequence[Window]], Iterable[Window]],
        left_out: list[LeftOut],
    ) -> Iterator[tuple[int, Tensor, Tensor, float]]:
        """Of each window that decodes: its number, its frames, the clip for the model, the seconds both took."""
        for number, window in enumerate(progress(windows)):
            began = time.perf_counter()
            try:
                frames = self.sampling.decode(path, window if len(windows) > 1 else None)
            except VideoError as error:
                left_out.append(LeftOut(window, str(error)))
                continue
            clip = self.sampling.transform(frames)
            yield number, frames, clip, time.perf_counter() - began

    def _shown(self, path: str | os.PathLike, windows: list[Window], number: int, frames: Tensor) -> Tensor:
        """The frames of a window for people, who want more pixels than a small model."""
        if self.sampling.size >= SHOWN_SIZE:
            return frames
        return self.sampling.decode(path, windows[number] if len(windows) > 1 else None, size=SHOWN_SIZE)

    @torch.no_grad()
    def _run(self, clips: Tensor, path: str | os.PathLike) -> tuple[Tensor, list[Routing], float, float]:
        """Probabilities ``(B, classes)``, every DSTS module's routing, seconds of the backbone and of DSTS."""
        for part in self._watched:
            part.routings, part.seconds = [], 0.0
        clips = clips.to(self.device)
        began = clock(self.device)
        logits = self.model(clips)
        whole = clock(self.device) - began
        wanted = (len(clips), len(self.class_names))
        if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model: got logits {came}, wanted {wanted}")
        if not bool(logits.isfinite().all()):
            raise ValueError(f"model: got logits that are not finite for {str(path)!r}, wanted finite ones")
        routings = [Routing(*(t.cpu() for t in routing)) for part in self._watched for routing in part.routings]
        dsts = sum(part.seconds for part in self._watched)
        return logits.float().softmax(1).cpu(), routings, whole - dsts, dsts


def watch(parent: nn.Module, child: str) -> Watched:
    """Puts :class:`Watched` around a DSTS module."""
    watched = Watched(parent._modules[child])
    parent._modules[child] = watched.eval()
    return watched


def usable(device: torch.device | str) -> torch.device:
    """A device of this machine that holds values, or an error that says so."""
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise TypeError("it holds no values")
        if found.type == "cuda":  # asked without a tensor, which would take memory on the first GPU for every process
            if not torch.cuda.is_available():
                raise RuntimeError(
                    "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
                )
            if found.index is not None and found.index >= torch.cuda.device_count():
                raise RuntimeError(f"torch finds {torch.cuda.device_count()}")
            return found
        return torch.empty(0, device=found).device
    except (AssertionError, RuntimeError, TypeError) as error:  # torch without CUDA raises the first
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: got {str(device)!r}, wanted a device of this machine ({reason})") from error
