"""Upstream-Downstream Learning: gates and scores learn on one split, operators and the rest on another.

Upstream parameters ``u`` are the scoring kernels and gates of every DSTS layer, downstream parameters ``d`` all others.
One :meth:`UpstreamDownstream.step` is one pass of Algorithm 1 of the paper:

    line 4   d^ = d - a grad_d loss(u, d;  X, Y)         a virtual step, taken back
    line 6   u' = u - a grad_u loss(u, d^; X_v, Y_v)
    line 8   d' = d - a grad_d loss(u', d; X, Y)         from d, not from d^

with the optimizers' steps in place of ``- a grad``. The side that is not trained is frozen meanwhile, so its gradients
cost nothing. Nothing of the virtual step stays: weights, optimizer state, gradient scale, buffers (BatchNorm's running
statistics; those of line 6 go too, as they are of ``d^``) and torch's generators, so line 6 draws what line 4 drew.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..ops._checks import describe
from ..sides import LAYERS, downstream_parameters, upstream_parameters
from . import second_order as through
from .batches import call, micro_batches
from .checks import OLD_COMPILER, combination, is_compiled, trained
from .distributed import average, average_centers, average_gradients, clip, process_groups, recover, reshard
from .health import RoutingMonitor
from .named import numbered, optimizer_state
from .sharded import is_sharded
from .state import Frozen, Generators, OptimizerState, Tensors

__all__ = ["StepResult", "UpstreamDownstream", "downstream_parameters", "upstream_parameters"]


class StepResult(NamedTuple):
    """Losses of lines 4 and 6, and gradient norms of lines 6 and 8 before clipping; over all processes.

    In the warm-up the loss is that of line 8, and nothing is known of line 6: NaN. Norms are ``inf`` where the gradient
    scaler had the step skipped.
    """

    train_loss: float
    val_loss: float
    upstream_grad_norm: float
    downstream_grad_norm: float


class _Overflow(Exception):
    """Scaled gradients are not finite."""


class UpstreamDownstream:
    """Algorithm 1, a step at a time, with any torch optimizer whose ``step`` needs no closure.

    Args:
        module: a model with one FusedDSTS at least, or ``DistributedDataParallel`` of one, or one whose parameters
            ``torch.distributed.fsdp.fully_shard`` has sharded, all or some.
        loss_fn: ``loss_fn(module(inputs), targets)`` is a scalar, the mean over the batch.
        upstream_optimizer: of exactly the upstream parameters that are trained (``requires_grad``).
        downstream_optimizer: of exactly the other parameters that are trained.
        second_order: differentiate line 6 through the step of line 4: :mod:`dsts_kernels.learning.second_order`.
        clip_norm: largest gradient norm of a side, as ``torch.nn.utils.clip_grad_norm_``.
        scaler: a ``torch.amp.GradScaler``; where gradients overflow the whole step is skipped and the scale lowered.
        autocast: dtype of the forward passes' autocast.
        accumulate: micro-batches a batch: where above 1, a batch is a sequence of so many ``(inputs, targets)``.
        balance: weight of :func:`~dsts_kernels.learning.balance_loss` in line 6. **Ours, not the paper's.**
        balance_on: choices that it counts: ``"training"``, those made with noise, or ``"evaluation"``, those that
            evaluation would make of the same samples.
        warm_up: steps at the start that are line 8 alone, so that operators have learned something before gates and
            scores follow them. **Ours, not the paper's**, which has 0.

    Under ``DistributedDataParallel`` every process brings a part of each batch, all of one size. Passes run in
    ``no_sync``, as DDP expects the gradient of every parameter; the trained side's gradients are averaged here. DDP
    then never broadcasts buffers: BatchNorm's running statistics are each process's own, as its batch statistics are
    (``SyncBatchNorm`` shares both).

    With ``fully_shard`` the same holds: it averages the gradients that it shards, those outside its groups are averaged
    here, and losses, norms and clipping are those of all processes. The learner is what
    ``torch.distributed.checkpoint`` calls stateful: ``save`` and ``load`` of ``{"model": get_model_state_dict(model),
    "learner": learner}`` move a run to any number of processes. Generators are each process's own and not in it.

    A step draws from torch's generators of the process and sets them back for line 6. Other threads that draw from them
    meanwhile get what the step draws: give them generators of their own. Under ``torch.compile`` before torch 2.13 both
    sides' gradients are computed, as compiled code does not see there what is frozen.

    A ``scaler`` counts lines 6 and 8 towards its growth interval. What ``loss_fn`` keeps in itself sees all passes, and
    hooks of the downstream optimizer both of its steps.

    Raises:
        ValueError: a module without DSTS, or in a wrapper that is not supported; optimizers that own other parameters
            than these; an argument out of range.
        TypeError: an argument that is no module, callable or optimizer.

    Source: Algorithm 1 of the paper. **Assumption**: lines 6 and 8 draw gate and Gumbel noise of their own streams.

    >>> learner = UpstreamDownstream(model, F.cross_entropy, upstream_optimizer=gates, downstream_optimizer=rest)
    >>> for train_batch, val_batch in zip(train_loader, val_loader):
    ...     result = learner.step(train_batch, val_batch)
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        upstream_optimizer: torch.optim.Optimizer,
        downstream_optimizer: torch.optim.Optimizer,
        second_order: bool = False,
        clip_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        autocast: torch.dtype | None = None,
        accumulate: int = 1,
        balance: float = 0.0,
        balance_on: str = "training",
        warm_up: int = 0,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: got {describe(module)}, wanted a torch.nn.Module")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn: got {describe(loss_fn)}, wanted a callable of (output, targets)")
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate: got {accumulate!r}, wanted an int of at least 1")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm: got {clip_norm!r}, wanted a number above 0, or None")
        if not 0 <= balance < math.inf:
            raise ValueError(f"balance: got {balance!r}, wanted a number of at least 0")
        if balance_on not in ("training", "evaluation"):
            raise ValueError(f"balance_on: got {balance_on!r}, wanted 'training' or 'evaluation'")
        if isinstance(warm_up, bool) or not isinstance(warm_up, int) or warm_up < 0:
            raise ValueError(f"warm_up: got {warm_up!r}, wanted an int of at least 0")
        if second_order and scaler is not None and scaler.is_enabled():
            raise ValueError("second_order: got True with a scaler, wanted one of them: its product is not scaled")
        self.module, self.loss_fn = module, loss_fn
        self.upstream_optimizer, self.downstream_optimizer = upstream_optimizer, downstream_optimizer
        self.second_order, self.clip_norm, self.autocast = bool(second_order), clip_norm, autocast
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.accumulate, self.balance, self.balance_on = accumulate, balance, balance_on
        self.warm_up, self.steps = warm_up, 0
        reshard(module)
        self._groups, self._shards = process_groups(module), sum(map(is_sharded, module.parameters()))
        if not upstream_parameters(module):
            raise ValueError(f"module: got {type(module).__name__} without a FusedDSTS, wanted one at least")
        self.upstream = trained(module, upstream_parameters(module), upstream_optimizer, "upstream_optimizer")
        self.downstream = trained(module, downstream_parameters(module), downstream_optimizer, "downstream_optimizer")
        self._compiled = is_compiled(module)
        combination((self.upstream, self.downstream), compiled=self._compiled, scaled=self.scaler is not None)
        self._layers = [part for part in module.modules() if isinstance(part, LAYERS)]
        self._weights, self._buffers = (Tensors(), Tensors()), Tensors()
        self._balance = None
        if balance:
            self._balance = RoutingMonitor(module, keep=True)
            self._balance.enabled = False
            if self._compiled:  # whose hooks are traced once
                weakref.finalize(self, self._balance.remove).atexit = False
            else:
                self._balance.remove()
        self.exact_second_order = True  # until an op says that it has no second derivative

    @property
    def device(self) -> torch.device:
        """Where passes run."""
        first = self.upstream[0]
        if is_sharded(first) and first.device_mesh.device_type == "cuda":  # shards may lie on the CPU
            return torch.device("cuda", torch.cuda.current_device())
        return first.device

    def step(self, train_batch: Any, val_batch: Any) -> StepResult:
        """One pass of Algorithm 1.

        Args:
            train_batch: ``(inputs, targets)``: inputs are a tensor, or a tuple, list or dict of the model's arguments;
                with ``accumulate`` above 1 a sequence of so many pairs.
            val_batch: the same, of the validation part.

        Raises:
            ValueError: a batch that is no such pair or has no samples; a module in evaluation mode.
            FloatingPointError: a loss or, without a scaler, a gradient that is not finite. Weights, both optimizers,
                buffers and generators are as before the step.
        """
        train = micro_batches("train_batch", train_batch, self.accumulate)
        val = micro_batches("val_batch", val_batch, self.accumulate)
        if not (self.module.training and all(layer.training for layer in self._layers)):
            raise ValueError("module: DSTS is in evaluation mode, where scores get no gradient; wanted module.train()")
        states = OptimizerState(self.upstream_optimizer), OptimizerState(self.downstream_optimizer)
        start, scale = Generators(self.device), self.scaler.state_dict() if self.scaler else None
        for saved, tensors in zip(self._weights, (self.upstream, self.downstream), strict=True):
            saved.save(tensors)
        self._buffers.save(self.module.buffers())
        self._clear_gradients()
        losses = [math.nan, math.nan]
        try:
            with self._watched():
                if self.steps < self.warm_up:
                    norms = self._line_8_alone(train, losses)
                else:
                    norms = self._lines(train, val, states[1], start, scale, losses)
        except BaseException as error:
            recover(self.module)
            for saved in (*self._weights, self._buffers, *states, start):
                saved.restore()
            if isinstance(error, _Overflow):  # the lowered scale stays
                self.steps += 1
                return StepResult(*losses, math.inf, math.inf)
            if scale is not None:
                with contextlib.suppress(AssertionError):  # that nothing was unscaled yet
                    self.scaler.update()
                self.scaler.load_state_dict(scale)
            raise
        finally:
            self._clear_gradients()
        if self._shards:  # DistributedDataParallel's passes have done so
            average_centers(self.module)
        self.steps += 1
        return StepResult(*losses, *norms)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """A block in which the routing is seen, where the balance term needs it; no graph outlives it."""
        if self._balance is None:
            yield
            return
        self._balance.enabled = True
        try:
            with contextlib.nullcontext() if self._compiled else self._balance:
                yield
        finally:
            self._balance.enabled = False
            self._balance.forget()

    def _frozen(self, side: Iterable[nn.Parameter]) -> Frozen:
        """A block in which passes give ``side`` no gradient; see :data:`.checks.OLD_COMPILER`."""
        return Frozen(() if self._compiled and OLD_COMPILER else side)

    def _lines(
        self, train: list, val: list, state: OptimizerState, start: Generators, scale: dict | None, losses: list[float]
    ) -> tuple[float, float]:
        """Lines 4, 6 and 8; ``losses`` is filled, and the gradient norms of 6 and 8 are returned."""
        with self._frozen(self.upstream):  # line 4
            losses[0] = self._backward("train_batch", train, self.downstream)
            self._update(self.downstream_optimizer, self.downstream)
        self._clear_gradients()
        self._buffers.restore()
        start.restore()
        if scale is not None:
            self.scaler.load_state_dict(scale)

        with self._frozen(() if self.second_order else self.downstream):  # line 6
            sides = (*self.upstream, *self.downstream) if self.second_order else self.upstream
            losses[1] = self._backward("val_batch", val, sides, self.balance)
        self._weights[1].restore()
        self._buffers.restore()
        state.restore()
        if self.second_order:
            self._differentiate_line_4(train, start)
        upstream_norm = self._update(self.upstream_optimizer, self.upstream)
        self._clear_gradients()

        with self._frozen(self.upstream):  # line 8
            self._backward("train_batch", train, self.downstream)
            return upstream_norm, self._update(self.downstream_optimizer, self.downstream)

    def _line_8_alone(self, train: list, losses: list[float]) -> tuple[float, float]:
        """A step of the warm-up; as :meth:`_lines`."""
        with self._frozen(self.upstream):
            losses[0] = self._backward("train_batch", train, self.downstream)
            return math.nan, self._update(self.downstream_optimizer, self.downstream)

    def _loss(self, batch: tuple[Any, Any], balance: float = 0.0) -> Tensor:
        """A micro-batch's share of the loss."""
        inputs, targets = batch
        outer = contextlib.nullcontext()  # the caller's autocast, if any
        with outer if self.autocast is None else torch.autocast(self.device.type, self.autocast):
            loss = self.loss_fn(call(self.module, inputs), targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"loss_fn: returned {describe(loss)}, wanted a scalar tensor")
        if balance:
            loss = loss + balance * self._balance.balance(self.balance_on == "evaluation")
        return loss / self.accumulate

    def _backward(
        self, name: str, batches: list[tuple[Any, Any]], parameters: tuple | list, balance: float = 0.0
    ) -> float:
        """Gradients of ``parameters``, over all micro-batches and processes; the loss."""
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        inputs = list(parameters) if self._compiled and OLD_COMPILER else None
        reshard(self.module)
        if self._shards != sum(map(is_sharded, self.module.parameters())):
            raise RuntimeError(
                "module: its parameters lie gathered since an error in a pass, which this version of fully_shard "
                "cannot undo; wanted a new module from a checkpoint, or a newer torch"
            )
        outermost = getattr(self.module, "_orig_mod", self.module)  # torch.compile's wrapper
        is_ddp = isinstance(outermost, DistributedDataParallel)
        with outermost.no_sync() if is_ddp else contextlib.nullcontext():
            for batch in batches:
                loss = self._loss(batch, balance)
                total += loss.detach().reshape(())
                (self.scaler.scale(loss) if self.scaler else loss).backward(inputs=inputs)
        if self._groups:
            average(total, self._groups)
            average_gradients(parameters, self._groups)
        value = total.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"{name}: its loss is {value}; everything is as before the step")
        return value

    def _update(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> float:
        """Clip and step; the gradient norm."""
        if self.scaler:
            self.scaler.unscale_(optimizer)
        limit = math.inf if self.clip_norm is None else self.clip_norm
        norm = clip(parameters, limit)
        if not math.isfinite(norm) and not self.scaler:
            raise FloatingPointError(f"gradients: their norm is {norm}; everything is as before the step")
        if self.scaler:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()
        if not math.isfinite(norm):
            raise _Overflow
        return norm

    def _differentiate_line_4(self, train: list, start: Generators) -> None:
        """Subtracts the second-order term from the upstream gradients; see :mod:`.second_order`."""
        now = Generators(self.device)
        rates = through.learning_rates(self.downstream_optimizer, self.downstream)
        direction = [
            torch.zeros_like(p) if p.grad is None else p.grad * rate
            for p, rate in zip(self.downstream, rates, strict=True)
        ]
        kept = [p.grad for p in self.upstream]

        def gradient() -> list[Tensor]:
            self._clear_gradients()
            start.restore()
            with self._frozen(self.downstream):
                self._backward("train_batch", train, self.upstream)
            self._buffers.restore()
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.upstream]

        exact = self.exact_second_order and not self._groups and not self._compiled
        term = self._exact_term(train, start, direction) if exact else None
        if term is None:
            self.exact_second_order = False
            term = through.central_difference(gradient, self.downstream, direction)
        for p, own, more in zip(self.upstream, kept, term, strict=True):
            p.grad = -more if own is None else own - more
        now.restore()

    def _exact_term(self, train: list, start: Generators, direction: list[Tensor]) -> list[Tensor] | None:
        start.restore()
        loss = sum(self._loss(batch) for batch in train)
        term = through.exact_product(loss, self.upstream, self.downstream, direction)
        self._buffers.restore()
        return term

    def _clear_gradients(self) -> None:
        for p in (*self.upstream, *self.downstream):
            p.grad = None

    def _optimizers(self) -> list[tuple[str, torch.optim.Optimizer]]:
        return [
            ("upstream_optimizer", self.upstream_optimizer),
            ("downstream_optimizer", self.downstream_optimizer),
        ]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model: both optimizers, the scaler, how line 6 is differentiated, how far
        a warm-up is.

        States go by the names of parameters: see :mod:`.named`. Sharded ones stay so.
        """
        state = {name: optimizer_state(self.module, optimizer) for name, optimizer in self._optimizers()}
        if self.scaler:
            state["scaler"] = self.scaler.state_dict()
        if self.warm_up:
            state["steps"] = self.steps
        return {**state, "exact_second_order": self.exact_second_order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: the states of other parameters, or whole ones where this learner's are sharded; nothing has
                changed.
        """
        loaded = [(part, numbered(self.module, part, name, state[name])) for name, part in self._optimizers()]
        for optimizer, own in loaded:
            optimizer.load_state_dict(own)
        self.exact_second_order = state["exact_second_order"]
        self.steps = state.get("steps", self.warm_up)  # one without a warm-up is beyond it
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
