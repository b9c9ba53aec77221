"""DSTS behind a submodule of any model: put in, frozen, taken out.

:func:`insert_dsts` learns from a dry run (:mod:`.dry_run`) how the submodule lays out its features (:mod:`.layouts`),
makes DSTS a child of the submodule and a forward hook the way through it. So no other module, parameter, buffer, key or
hook is touched; docs/decisions.md says what else was tried.
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..frozen import FrozenDSTS
from ..modules import FusedDSTS
from ..ops import _checks
from .dry_run import dry_run, made_up
from .layouts import FeatureLayout, Wanted

__all__ = ["freeze_dsts", "insert_dsts", "remove_dsts"]

CHILD = "dsts"  # the name of DSTS among the children of the module that holds it
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # their children are counted, indexed and called in turn


class DSTSHook:
    """The forward hook of a submodule with DSTS behind it. It finds DSTS through the module that it is called with, so
    copies of a model, on whatever device or process, run the DSTS of their own."""

    def __init__(self, where: str, path: tuple[str, ...], layout: FeatureLayout, output: int | str | None) -> None:
        self.where, self.path, self.layout, self.output = where, path, layout, output

    def __repr__(self) -> str:
        return f"DSTSHook({self.where!r}, {'.'.join(self.path)!r}, {self.layout})"

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        dsts = functools.reduce(getattr, self.path, module)
        argument = f"features behind {self.where!r}"
        x = self.layout.check(features_of(output, self.output, self.where), argument)
        return with_features(output, self.output, self.layout.apply(x, dsts))


def features_of(output: Any, key: int | str | None, where: str) -> Any:
    """The features in what a submodule returned.

    Raises:
        TypeError, ValueError: it returned a tensor and ``output`` says otherwise, or the other way round.
    """
    if isinstance(output, Tensor):
        if key is not None:
            raise ValueError(f"output: got {key!r}, wanted None: {where!r} returns a tensor")
        return output
    if isinstance(output, Mapping):
        if key in output:
            return output[key]
        parts = dict(output)
    elif isinstance(output, (tuple, list)):
        if type(key) is int and -len(output) <= key < len(output):
            return output[key]
        parts = dict(enumerate(output))
    else:
        raise TypeError(
            f"where: got {where!r}, which returns {type(output).__name__}, wanted one that returns a tensor, or a "
            "tuple, list or dict with one in it"
        )
    kinds = {k: _checks.describe(v) if isinstance(v, Tensor) else type(v).__name__ for k, v in parts.items()}
    held = ", ".join(f"{k!r}: {kind}" for k, kind in kinds.items())
    raise ValueError(
        f"output: got {key!r}, wanted the place of the features in the {type(output).__name__} that {where!r} returns: "
        f"{held}"
    )


def with_features(output: Any, key: int | str | None, y: Tensor) -> Any:
    """``output`` with ``y`` for its features; a new tuple, list or dict, for the old one may be kept by somebody."""
    if key is None:
        return y
    if isinstance(output, Mapping):
        return type(output)(**{**output, key: y})
    items = list(output)
    items[key] = y
    if hasattr(output, "_make"):  # a named tuple
        return output._make(items)
    return type(output)(items)


def insert_dsts(
    model: nn.Module,
    where: str,
    *,
    layout: str | None = None,
    channels: int | None = None,
    frames: int | None = None,
    grid: tuple[int, ...] | None = None,
    class_tokens: int = 0,
    output: int | str | None = None,
    example: object = None,
    dsts: nn.Module | None = None,
    **dsts_options: Any,
) -> FusedDSTS:
    """Puts a :class:`FusedDSTS` behind a submodule of a model, in place: what the submodule returns passes through it.

    No module, parameter, buffer, key of ``state_dict()`` or hook of the model changes. Keys of DSTS come on top, under
    ``<where>.dsts.``; behind a ``Sequential``, whose children are counted and called in turn, under
    ``<where>.<last child>.dsts.``. Forward hooks that the submodule has see what it returns, later ones what DSTS makes
    of it. ``deepcopy``, ``pickle``, casts, ``DistributedDataParallel``, ``torch.compile``, ``torch.export`` and
    ``torch.jit.trace`` take DSTS along. Insert first, then wrap or compile. What makes a new module of the submodule
    (``convert_sync_batchnorm`` of a norm) leaves hooks behind: choose the module around it.

    ``layout`` and ``channels``, where one is left out, are learned from a **dry run**: one pass in evaluation, without
    gradients, after which parameters, buffers, modes, hooks and random generators are as before. Hooks run in it. With
    both given there is none, so nothing shows whether the model calls the submodule; and that may run several times in
    a pass, each time through the same DSTS.

    Args:
        model: any module.
        where: the name of a submodule, as in ``model.named_modules()``; ``""`` is the model itself.
        layout: of the features: ``"BCTHW"``, ``"BTHWC"`` (Video Swin), ``"BNC"`` (tokens; needs ``grid``) or ``"TSN"``
            (``(B*T, C, H, W)``, frames as a batch; needs ``frames``). See :class:`FeatureLayout`.
        channels: ``C`` of the features.
        frames: ``T``, where the first dimension holds the frames of clips one after the other. A batch does not say.
        grid: ``(T, H, W)`` of tokens, with ``frames`` ``(H, W)``.
        class_tokens: tokens before those of the grid, which pass as they are.
        output: the place of the features (an index or a key) where the submodule returns a tuple, list or dict.
        example: for the dry run: a clip, the shape of one, a tuple of arguments or a dict of keyword arguments. Left
            out, zeros for the model's first convolution: 16 frames of 112x112, or ``frames`` of them for a 2-d one.
        dsts: a module to put in, instead of a new one: :class:`FusedDSTS`, :class:`FrozenDSTS` or
            :class:`reference.DSTS`, as it is.
        dsts_options: of :class:`FusedDSTS`; its dtype and device are those of the features, its mode that of ``where``.

    Returns:
        The module put in: ``model.get_submodule(where).dsts``, or that of the last child of a ``Sequential``.

    Raises:
        TypeError, ValueError: what came and what was wanted, with near names for an unknown ``where``, and with what
            would do where features fit several layouts or none. The model is as it was.

    Later calls of the model raise ``ValueError`` where features are of another rank, grid or number of channels.

    >>> model = torch.nn.Sequential(torch.nn.Conv3d(3, 16, 3), torch.nn.AdaptiveAvgPool3d(1))
    >>> dsts = insert_dsts(model, "0", num_neurons=4)
    >>> freeze_dsts(model.eval())(torch.randn(2, 3, 8, 16, 16)).shape
    torch.Size([2, 16, 1, 1, 1])
    """
    check_model(model)
    refuse_wrapped(model, "")
    target = submodule(model, where)
    refuse_wrapped(model, where)
    owner = dsts_around(model, where)
    if owner is not None:
        raise ValueError(
            f"where: got {where!r}, which is {owner!r} or in it, a DSTS module; wanted a submodule beside it"
        )
    if any(isinstance(hook, DSTSHook) for hook in target._forward_hooks.values()):
        raise ValueError(f"where: got {where!r}, which has DSTS behind it, wanted remove_dsts(model, {where!r}) first")
    if type(target).forward is nn.Module.forward:
        entries = [f"{where}.{name}".lstrip(".") for name, _ in target.named_children()]
        hint = f" such as {entries[-1]!r}" if entries else ""
        raise ValueError(f"where: got {where!r}, {type(target).__name__}, which never runs, wanted one that does{hint}")
    path = place(model, where, target)
    host = functools.reduce(getattr, path, target)
    wanted = Wanted.read(layout, channels, frames, grid, class_tokens)
    if dsts is not None:
        wanted = wanted._replace(channels=channels_of(dsts, channels, dsts_options))
    known, like = wanted.known(), None
    if known is None or example is not None:
        argument = f"features behind {where!r}"
        seen = dry_run(model, where, (host, CHILD), example, lambda: made_up(model, frames))
        like = features_of(seen.output, output, where)
        if known is None and seen.passes > 1:
            raise ValueError(
                f"where: got {where!r}, which runs {seen.passes} times in a pass, wanted one that runs once, or both "
                "layout and channels for one DSTS behind every run"
            )
        known = wanted.learn(like, seen.clip, argument)
    if dsts is None:
        like = like if like is not None else next((p for p in (*target.parameters(), *model.parameters())), None)
        own = {} if like is None else {"dtype": like.dtype, "device": like.device}
        dsts = FusedDSTS(known.channels, **(own | dsts_options)).train(target.training)
    host.add_module(CHILD, dsts)
    target.register_forward_hook(DSTSHook(where, (*path, CHILD), known, output))
    return dsts


def remove_dsts(model: nn.Module, where: str | None = None) -> nn.Module:
    """Takes out what :func:`insert_dsts` put in, in place.

    Args:
        where: behind which submodule; ``None``: everywhere.

    Returns:
        ``model``, as it was before.

    Raises:
        TypeError, ValueError: there is none, or not there, with the names of those that are; a model that is wrapped
            or compiled.
    """
    found = {name: (target, key, hook) for name, target, key, hook in insertions(model)}
    refuse_wrapped(model, "")
    if where is not None:
        submodule(model, where)
    if not found or (where is not None and where not in found):
        has = f"it behind {' and '.join(map(repr, found))}" if found else "none that insert_dsts() put in"
        came = f"model: got {type(model).__name__}" if where is None else f"where: got {where!r}"
        raise ValueError(f"{came}, wanted a submodule with DSTS behind it: the model has {has}")
    chosen = found if where is None else {where: found[where]}
    for name in chosen:
        refuse_wrapped(model, name)
    for target, key, hook in chosen.values():
        *path, child = hook.path
        delattr(functools.reduce(getattr, path, target), child)
        del target._forward_hooks[key]
    return model


def freeze_dsts(model: nn.Module, **options: Any) -> nn.Module:
    """Puts :class:`FrozenDSTS` in the place of every :class:`FusedDSTS` of a model, inserted or its own, in place.

    The model is for inference from then on: ``model.train()`` raises. To train on, freeze a copy:
    ``freeze_dsts(copy.deepcopy(model).eval())``.

    Args:
        options: of :meth:`FusedDSTS.freeze`: ``dtype``, ``algorithm``, ``backend``.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: there is none; a model in training mode, or one that is wrapped or compiled; DSTS with
            forward hooks, which its frozen form would not run; what :meth:`FusedDSTS.freeze` refuses. The model is as
            it was.
    """
    check_model(model)
    if isinstance(model, FusedDSTS):
        raise ValueError("model: got FusedDSTS, wanted a model that holds one; its own freeze() returns it frozen")
    places = [
        (name, module, child)
        for name, module in model.named_modules()
        for child, part in module._modules.items()
        if isinstance(part, FusedDSTS)
    ]
    if not places:
        frozen = any(isinstance(part, FrozenDSTS) for part in model.modules())
        why = ", whose DSTS is frozen already" if frozen else " without FusedDSTS"
        raise ValueError(f"model: got {type(model).__name__}{why}, wanted one with FusedDSTS in it")
    for name, module, child in places:
        refuse_wrapped(model, name)
        refuse_hooks(module._modules[child], f"{name}.{child}".lstrip("."))
    if model.training:
        raise ValueError(f"model: got {type(model).__name__} in training mode, wanted evaluation: model.eval()")
    made: dict[int, FrozenDSTS] = {}
    for _, module, child in places:
        part = module._modules[child]
        if id(part) not in made:
            made[id(part)] = part.freeze(**options)
    for _, module, child in places:
        module._modules[child] = made[id(module._modules[child])]
    return model


def insertions(model: nn.Module) -> Iterator[tuple[str, nn.Module, int, DSTSHook]]:
    """Every submodule with DSTS behind it: its name, itself, the key of its hook, the hook."""
    check_model(model)
    for name, target in model.named_modules():
        for key, hook in target._forward_hooks.items():
            if isinstance(hook, DSTSHook):
                yield name, target, key, hook


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {_checks.describe(model)}, wanted a torch.nn.Module")


def submodule(model: object, where: object) -> nn.Module:
    """The submodule of that name, or an error with near names."""
    check_model(model)
    if not isinstance(where, str):
        raise TypeError(f"where: got {_checks.describe(where)}, wanted the name of a submodule")
    modules = dict(model.named_modules(remove_duplicate=False))
    if where in modules:
        return modules[where]
    near = difflib.get_close_matches(where, modules, n=5, cutoff=0.5)
    top = [name for name, _ in model.named_children()]
    hint = f"such as {' or '.join(map(repr, near))}" if near else f"in {', '.join(map(repr, top)) or 'it: it has none'}"
    raise ValueError(f"where: got {where!r}, wanted a submodule of {type(model).__name__}, {hint}")


def place(model: nn.Module, where: str, target: nn.Module) -> tuple[str, ...]:
    """The way from ``target`` to the module that DSTS becomes a child of.

    That is ``target``, or the last part of a container that is none itself and that has one name only.
    """
    names: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        names[module] = names.get(module, 0) + 1

    def search(module: nn.Module, alone: bool) -> tuple[str, ...] | None:
        if not isinstance(module, CONTAINERS):
            return () if alone else None
        for child, part in reversed(module._modules.items()):
            found = None if part is None else search(part, names[part] == names[target])
            if found is not None:
                return (child, *found)
        return None

    path = search(target, True)
    if path is None:
        raise ValueError(
            f"where: got {where!r}, {type(target).__name__} without a child of its own to hold DSTS, wanted a "
            "submodule that is no container, or a container of such"
        )
    host = functools.reduce(getattr, path, target)
    if hasattr(host, CHILD):
        at = ".".join(filter(None, (where, *path)))
        raise ValueError(
            f"where: got {where!r}, whose {at!r} has an attribute {CHILD!r}, wanted one without: DSTS becomes it"
        )
    return path


def channels_of(dsts: object, channels: int | None, options: Mapping[str, object]) -> int:
    """``C`` of a module that is given."""
    if options:
        raise TypeError(f"{next(iter(options))}: got an option beside dsts, wanted either: dsts is put in as it is")
    if isinstance(dsts, FrozenDSTS):
        own = dsts.in_channels
    elif isinstance(dsts, (FusedDSTS, reference.DSTS)):
        own = dsts.layers[0].gate.shape[1]
    else:
        raise TypeError(f"dsts: got {_checks.describe(dsts)}, wanted FusedDSTS, FrozenDSTS or reference.DSTS")
    if channels not in (None, own):
        raise ValueError(f"dsts: got a module of {own} channels, wanted {channels}, which channels says")
    return own


def dsts_around(model: nn.Module, where: str) -> str | None:
    """The name of the DSTS module that ``where`` names or lies in; ``None`` where there is none."""
    parts = where.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts) + 1))
    kinds = (FusedDSTS, FrozenDSTS, reference.DSTS)
    return next((name for name in names if isinstance(model.get_submodule(name), kinds)), None)


def refuse_hooks(dsts: FusedDSTS, name: str) -> None:
    """Refuses hooks that may change what DSTS returns: its frozen form has none of them."""
    if dsts._forward_pre_hooks or dsts._forward_hooks:
        raise ValueError(f"model: got a forward hook on {name!r}, wanted none: its frozen form would not run it")


def refuse_wrapped(model: nn.Module, where: str) -> None:
    """Refuses what has taken down parameters or code of the model that stands at ``where``, and would not see DSTS.

    Raises:
        ValueError: names the wrapper.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    dynamo = sys.modules.get("torch._dynamo")
    wrappers = [nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule]
    if fsdp is not None:
        wrappers += [fsdp.FullyShardedDataParallel, fsdp.FSDPModule]
    if dynamo is not None:
        wrappers += [dynamo.OptimizedModule]
    module, name = model, ""
    for part in (None, *filter(None, where.split("."))):
        if part is not None:
            module, name = module._modules[part], f"{name}.{part}".lstrip(".")
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or isinstance(module, tuple(wrappers)):
            kind = "compiled code" if compiled else type(module).__name__
            raise ValueError(f"model: got {kind} at {name!r}, wanted the model before it is wrapped or compiled")
