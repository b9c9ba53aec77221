"""``graphed``: forward and backward passes of a module as CUDA graphs, which cost the host a few calls a step.

A :class:`Graphed` is called like its module. It looks at what a graph depends on (:class:`Phase`), captures a pair of
graphs by ``torch.cuda.make_graphed_callables`` where it has none for that, copies the features into the memory that
they read, and replays. What a graph cannot follow (another shape, moved weights, a changed option, hooks) is an error
before any replay; passes in an order that would read another pass's activations are one before any gradient is wrong.
"""

from __future__ import annotations

import contextlib
import gc
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .backends import GpuBackend, choose
from .backends.base import accumulate_dtype
from .backends.gpu.features import on_device
from .ops import _checks
from .ops._library import autocast_on
from .ops.over_processes import alone
from .routing import Draws, Routing, check_draws

__all__ = ["Graphed", "Phase"]

PLAIN = (bool, int, float, str, tuple, list, type(None))  # of options, which a graph holds as they were
NO_OPTIONS = ("training", "prepared")  # a phase says the one; the other is what a backend made of frozen weights
SCALES = ("noise_std", "gumbel_scale")  # options that graphs which draw read from memory
DRAWN = (*SCALES, "hard_fraction")  # options that only draws depend on
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Phase(NamedTuple):
    """What a capture holds for; another phase gets a capture of its own, when it is first met."""

    training: tuple[bool, ...]  # of the module and all its parts
    trained: tuple[bool, ...]  # which parameters get a gradient; none where autograd is off
    features: bool  # whether the features get one
    autocast: torch.dtype | None
    precision: str  # of float32 products
    backend: str


class Capture:
    """The graphs of one phase, and the passes through them."""

    def __init__(self, replay: Callable[..., tuple[Tensor, ...]], trained: list[nn.Parameter], given: int) -> None:
        self.replay, self.trained, self.given = replay, trained, given
        self.passes = 0
        self.went_back = 0  # the last pass that did
        self.gradients: list[int | None] = []  # addresses of the graph's gradients of `trained`

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs in memory of the graph; ``inputs`` are features and draws."""
        self.passes += 1
        self._move_gradients()
        outputs = self.replay(*inputs, *self.trained)
        node = next((output.grad_fn for output in outputs if output.grad_fn is not None), None)
        if node is not None:
            x, mine = inputs[0], self.passes
            keeps = x.requires_grad and (x.is_leaf or x.retains_grad)
            node.register_prehook(lambda gradients: self._before(mine))
            node.register_hook(lambda gradients, _: self._after(gradients, keeps))
        return outputs

    def _move_gradients(self) -> None:
        """Out of memory that a replay is about to write, forward or backward: the two graphs share theirs.

        Autograd takes the first gradient of a parameter over as it is, where the graph left it.
        """
        for p, address in zip(self.trained, self.gradients, strict=False):
            if p.grad is not None and p.grad.data_ptr() == address:
                p.grad = p.grad.clone()

    def _before(self, mine: int) -> None:
        """Before a backward graph is replayed: its activations are still there, and nobody's gradient is in its way.

        A replay gives the memory of activations away as it goes on.
        """
        if mine != self.passes:
            raise RuntimeError(
                f"backward: got the graph's pass {mine} after its pass {self.passes} went forward, wanted each pass "
                "backward before the next goes forward: a graph keeps the activations of one pass"
            )
        if mine == self.went_back:
            raise RuntimeError(
                f"backward: got the graph's pass {mine} a second time, wanted each pass backward once, without "
                "retain_graph: the first time used its activations up"
            )
        self.went_back = mine
        self._move_gradients()

    def _after(self, gradients: tuple[Tensor | None, ...], keeps: bool) -> tuple[Tensor | None, ...] | None:
        self.gradients = [None if g is None else g.data_ptr() for g in gradients[self.given :]]
        if not keeps or gradients[0] is None:
            return None
        return (gradients[0].clone(), *gradients[1:])  # x.grad outlives the pass


class Graphed:
    """A module's passes as CUDA graphs: made by :meth:`FusedDSTS.graphed` and :meth:`FrozenDSTS.graphed`.

    Called like the module, with features of the sample's shape and dtype, in training and in evaluation, with
    gradients or without; results are the module's, in the memory format of the sample. Each phase (training or
    evaluation, which parameters get a gradient, autograd on or off, autocast, backend) has a capture of its own, made
    when the phase is first met, which keeps the memory of its activations and gradients.

    **Randomness** is drawn in the graph, anew in each replay, from torch's generator, with the ``noise_std`` and
    ``gumbel_scale`` of that moment; a capture with ``draws`` takes them as inputs instead, and draws before the graph
    where none are given. A centre of scores (``score_center``) is that of this process alone, as no graph asks others:
    :func:`dsts_kernels.learning.average_centers` once a step. Capturing leaves generators, BatchNorm's
    statistics and ``.grad`` as they were.

    **In a model**, ``net.dsts.forward = net.dsts.graphed(sample)`` puts it in place of the module's own pass, and ``del
    net.dsts.forward`` takes it out again. ``state_dict``, optimizers, gradient accumulation, ``GradScaler`` and
    :class:`~dsts_kernels.learning.UpstreamDownstream` (one capture for each side that is frozen) go on as before.
    ``DistributedDataParallel`` wraps the model afterwards: its all-reduces stay outside the graphs, and run when the
    backward graph has ended.

    **Order**: each pass goes backward once, before the next of its phase goes forward. Gradients lie in memory of the
    graph until its next pass: ``clone()`` what is kept of ``torch.autograd.grad``; ``.grad`` is safe.

    Raises:
        RuntimeError: a module that is not on a CUDA device, or whose ops do not all run on a GPU backend; one with
            hooks; weights that were moved or put in place of others, or an option that was changed, since the capture;
            a pass backward after another went forward, or a second time; ``torch.compile``, which makes graphs of its
            own.
        TypeError, ValueError: a sample or features of another kind, shape, dtype or device; routing or draws that
            were not captured. All before any replay.
    """

    def __init__(
        self,
        module: nn.Module,
        sample: Tensor,
        draws: Draws | None,
        return_routing: bool,
        static_output: bool,
        weights: Callable[[], list[Tensor | None]],
        sample_draws: Callable[..., Draws | None],
        op: str = "gated_conv3d",
    ) -> None:
        """``weights`` are the tensors that graphs read in place; ``sample_draws`` makes what a phase draws of features,
        and of tensors for :data:`SCALES` where a graph draws; ``op`` is the one whose backend is the module's."""
        refuse(module, sample, op)
        if draws is not None:
            one = module.layers[0]
            draws = check_draws(draws, (len(module.layers), sample.shape[0]), one.in_channels, one.num_neurons, sample)
        self.module, self.return_routing, self.static_output, self.op = module, return_routing, static_output, op
        self._weights, self._sample_draws = weights, sample_draws
        self._sample = sample.detach().clone()
        self._draws = None if draws is None else Draws(*(field.detach().clone() for field in draws))
        self._parts = list(module.modules())
        self._parameters = list(module.parameters())
        self._options = [options_of(part, SCALES if draws is None else DRAWN) for part in self._parts]
        self._scales = self._scales_now = None
        if draws is None and hasattr(module.layers[0], SCALES[0]):  # nothing is drawn for a frozen module
            wide = accumulate_dtype(sample.dtype)
            self._scales = tuple(torch.ones((), dtype=wide, device=sample.device) for _ in SCALES)
            self._set_scales()
        self._held = self._now()
        self._captures: dict[Phase, Capture] = {}
        phase = self._phase(sample)
        self._captures[phase] = self._capture(phase)

    def __reduce__(self) -> tuple:
        raise TypeError("graphed: got a copy or a pickle of CUDA graphs, wanted the module: del module.forward first")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What was captured."""
        return tuple(self._captures)

    def __call__(
        self, x: Tensor, draws: Draws | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """As the module's ``forward``."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "torch.compile: got a graphed module, wanted the module itself: mode='reduce-overhead' makes CUDA "
                "graphs of its own"
            )
        self._check(x, draws, return_routing)
        phase = self._phase(x)
        capture = self._captures.get(phase)
        if capture is None:
            capture = self._captures[phase] = self._capture(phase)
        inputs = (x,)
        if self._scales is not None:
            self._set_scales()
        elif self._draws is not None:
            inputs = (x, *((self._sample_draws(x) or self._draws) if draws is None else self._checked(draws)))
        y, *routing = capture(inputs)
        if not self.static_output:
            y = y.clone()
        if not return_routing:
            return y
        return y, Routing(*(field.clone() for field in routing))

    def _set_scales(self) -> None:
        """Scales of noise as they are now, where graphs that draw read them."""
        first = self.module.layers[0]
        now = tuple(getattr(first, name) for name in SCALES)
        if now != self._scales_now:
            for tensor, value in zip(self._scales, now, strict=True):
                tensor.fill_(value)
            self._scales_now = now

    def _check(self, x: Tensor, draws: Draws | None, return_routing: bool) -> None:
        """Refuse what no graph of this module was captured for."""
        sample = self._sample
        if not isinstance(x, Tensor) or x.shape != sample.shape or x.dtype != sample.dtype:
            raise ValueError(
                f"x: got {_checks.describe(x)}, wanted the sample's shape {tuple(sample.shape)}, {sample.dtype}: "
                "graphed(sample) again for another one, or the module itself"
            )
        if x.device != sample.device:
            raise ValueError(f"x: got a tensor on {x.device}, wanted {sample.device}, where the graphs are")
        if return_routing and not self.return_routing:
            raise ValueError(
                "return_routing: got True, wanted False for graphs without it: graphed(sample, return_routing=True)"
            )
        if draws is not None and self._draws is None:
            raise ValueError(
                "draws: got some for graphs that draw by themselves, wanted None: graphed(sample, draws=draws)"
            )
        held = self._now()
        if held != self._held:
            raise RuntimeError(self._changed(held))

    def _checked(self, draws: Draws) -> Draws:
        """Given draws in the dtypes of those that were captured."""
        like, (layers, batch, channels) = self._draws, self._draws.noise.shape
        draws = check_draws(draws, (layers, batch), channels, like.gumbel.shape[2], self._sample)
        return Draws(*(field.to(own.dtype) for field, own in zip(draws, like, strict=True)))

    def _phase(self, x: Tensor) -> Phase:
        tracked = torch.is_grad_enabled() and bool(self._parameters)  # a frozen module has none
        autocast = torch.get_autocast_dtype(x.device.type) if autocast_on(x) else None
        dtype = x.dtype if autocast is None or x.dtype == torch.float64 else autocast
        asked = getattr(self.module.layers[0], "backend", getattr(self.module, "backend", None))
        return Phase(
            tuple(part.training for part in self._parts),
            tuple(p.requires_grad for p in self._parameters) if tracked else (),
            tracked and x.requires_grad,
            autocast,
            torch.get_float32_matmul_precision(),
            choose(self.op, x.device, dtype, asked, x.shape).name,
        )

    def _now(self) -> tuple:
        """Addresses and options that graphs hold; they are in use as long as these are the same."""
        addresses = tuple(0 if t is None else t.data_ptr() for t in self._weights())
        return addresses, tuple(values(own) for _, own, values in self._options)

    def _changed(self, held: tuple) -> str:
        """What is not as it was at the capture."""
        (_, before), (_, after) = self._held, held
        for (names, _, _), old, new in zip(self._options, before, after, strict=True):
            for name, was, now in zip(names, old, new, strict=True):
                if was != now:
                    return (
                        f"{name}: got {now!r}, wanted {was!r}, which the graphs hold: graphed(sample) again, or give "
                        "draws of your own where noise changes from step to step"
                    )
        return "module: its weights were moved or put in place of others since the capture; graphed(sample) again"

    def _capture(self, phase: Phase) -> Capture:
        """Capture a phase on copies of the sample, which are the memory that its graphs read."""
        refuse(self.module, self._sample, self.op)
        if phase.autocast is not None:
            around = lambda: torch.autocast(self._sample.device.type, phase.autocast, cache_enabled=False)  # noqa: E731
        else:
            around = contextlib.nullcontext
        forward, given = type(self.module).forward, 1 if self._draws is None else 1 + len(Draws._fields)

        def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            draws = Draws(*rest[: given - 1]) if given > 1 else None
            if self._scales is not None:
                draws = self._sample_draws(x, self._scales)
            with around():
                found = forward(self.module, x, draws, self.return_routing)
            y, routing = found if self.return_routing else (found, ())
            if self.static_output and not self.module.skip:
                y = y.clone()  # autograd keeps what the last layer returned, and a user may change what he got
            return (y, *routing)

        trained = [p for p, needs in zip(self._parameters, phase.trained, strict=False) if needs]
        with undisturbed(self.module, self._sample), torch.set_grad_enabled(bool(phase.trained) or phase.features):
            x = self._sample.clone().requires_grad_(phase.features)
            draws = () if self._draws is None else tuple(field.clone() for field in self._draws)
            with capturing(x.device):
                replay = torch.cuda.make_graphed_callables(run, (x, *draws, *trained), allow_unused_input=True)
        return Capture(replay, trained, given)


def weights_of(module: nn.Module) -> Callable[[], list[Tensor | None]]:
    """What gives all parameters and buffers of ``module`` as they are when it is asked, without walking through it."""
    parts = [own for part in module.modules() for own in (part._parameters, part._buffers)]
    places = [(own, name) for own in parts for name in own]
    return lambda: [own.get(name) for own, name in places]


def options_of(part: nn.Module, left_out: tuple[str, ...]) -> tuple[tuple[str, ...], dict, Callable[[dict], tuple]]:
    """Names of a part's options, its attributes, and what reads the ones from the other."""
    own = vars(part)
    names = tuple(
        name for name, value in own.items()
        if type(value) in PLAIN and not name.startswith("_") and name not in (*NO_OPTIONS, *left_out)
    )  # fmt: skip
    if len(names) < 2:
        return names, own, lambda attributes: tuple(attributes[name] for name in names)
    return names, own, operator.itemgetter(*names)


def refuse(module: nn.Module, sample: Tensor, op: str) -> None:
    """Refuse a module or a sample that graphs cannot be captured of; ``op`` says by which backend it runs.

    Raises:
        RuntimeError, TypeError, ValueError: as :class:`Graphed` says.
    """
    sample = _checks.features("sample", sample, getattr(module, "in_channels", module.layers[0].gate.shape[1]))
    tensor = next(iter([*module.parameters(), *module.buffers()]))
    if reason := no_graphs(tensor.device):
        raise RuntimeError(f"graphed(sample): got a module on {tensor.device}, {reason}")
    if sample.device != tensor.device:
        raise ValueError(f"sample: got a tensor on {sample.device}, wanted {tensor.device}, where the module is")
    dtype = getattr(module, "dtype", tensor.dtype)
    if sample.dtype != dtype and not autocast_on(sample):
        raise TypeError(f"sample: got {_checks.describe(sample)}, wanted {dtype}, the module's dtype")
    if sample.shape[0] == 0:
        raise ValueError(f"sample: got {_checks.describe(sample)}, wanted a batch of at least 1")
    computed = torch.get_autocast_dtype(sample.device.type) if autocast_on(sample) else sample.dtype
    for name, part in module.named_modules():
        if part is not module and any(getattr(part, hooks) for hooks in HOOKS):  # its own belong to its __call__
            raise RuntimeError(
                f"graphed(sample): got hooks on {name!r}, which graphs would not call, wanted "
                "none: graphed(sample, return_routing=True) returns what a monitor counts"
            )
        if part.training and isinstance(part, nn.modules.batchnorm._BatchNorm) and part.momentum is None:
            raise RuntimeError(
                f"graphed(sample): got {name} with momentum None, whose share of a batch the host works out, wanted a "
                "number"
            )
        if not hasattr(part, "backend"):
            continue
        chosen = choose(op, sample.device, computed, part.backend, sample.shape)
        if reason := waits(chosen):
            raise RuntimeError(f"graphed(sample): got the backend {chosen.name!r}, {reason}")


def no_graphs(device: torch.device) -> str | None:
    """Why there are no CUDA graphs on ``device``; ``None`` where there are."""
    return None if device.type == "cuda" else "wanted one on a CUDA device: only there are CUDA graphs"


def waits(backend: object) -> str | None:
    """Why a graph cannot hold what ``backend`` does; ``None`` where it can."""
    return None if isinstance(backend, GpuBackend) else "which waits for the device; wanted backend='triton' or 'cuda'"


@contextlib.contextmanager
def capturing(device: torch.device) -> Iterator[None]:
    """A block that captures CUDA graphs on ``device``: no graph that nobody holds any more is destroyed inside it, for
    that ends a capture with an error, and one that fails leaves generator and stream as they were."""
    collects = gc.isenabled()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    gc.collect()
    gc.disable()
    try:
        yield
    except BaseException:
        if stream is not None:
            torch.cuda.set_stream(stream)
            # The generator would take every draw for one of a capture until one has ended well.
            with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.zeros((), device=device)
        raise
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def undisturbed(module: nn.Module, sample: Tensor) -> Iterator[None]:
    """A block whose passes leave buffers, generators and other processes as they were; its tensors are of no mode."""
    device = sample.device
    with torch.inference_mode(False), torch.no_grad(), on_device(sample), alone():
        written = [b for part in module.modules() if part.training for b in part._buffers.values() if b is not None]
        before = [buffer.clone() for buffer in written]
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                with torch.autocast(device.type, enabled=False):
                    yield
        finally:  # a capture may run out of memory
            for buffer, old in zip(written, before, strict=True):
                buffer.copy_(old)
