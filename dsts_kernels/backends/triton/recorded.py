"""Calls of a backend's methods, recorded once for each kind of arguments and then done again without their Python.

What a method launches depends on what its tensors are (dtype, shape, strides, device, alignment), never on what they
hold, for nothing here waits for the device. So the first call of a kind is watched (:mod:`.recorder`): which memory it
makes, which kernels it launches, and on which places of which memory. Later calls of that kind make the memory,
all that nobody gets to see as one block, and launch (:class:`Recording`). :func:`kind_of` says all that a call depends
on. A call that does anything else to a tensor, as to copy features that lie otherwise, is never recorded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from triton.runtime.driver import driver

from ..gpu import features, switches
from . import launch, tuning
from .recorder import Box, Launched, Memory, Place, Recorder, packed

MOST = 1024  # recordings that are kept; sizes that change with every batch push out all others
PLAIN = (int, float, bool, str, torch.dtype)


class Result(NamedTuple):
    """A tensor that a call returns: number ``index`` of those it was given (``is_given``) or makes; perhaps a view."""

    index: int
    is_given: bool
    view: tuple[torch.Size, tuple[int, ...], int] | None


class Recording:
    """What a call did, to be done again on other tensors of the same kinds."""

    def __init__(self, recorder: Recorder, found: object) -> None:
        self.device = recorder.given[0].tensor.device
        self.counted = recorder.counted
        self.made: list[tuple[Callable, tuple, dict]] = []  # of tensors that are returned, or zero
        returned = self._returned(recorder, found)
        own = {id(m): i for i, m in enumerate(recorder.given)}
        for memory in recorder.made:
            views = returned.get(id(memory), [])
            if views or (memory.zeroed and memory.last >= 0):
                own[id(memory)] = len(recorder.given) + len(self.made)
                self._make(memory, views)
        self.scratch, offsets = packed([m for m in recorder.made if id(m) not in own and m.last >= 0])
        block, counters = len(recorder.given) + len(self.made), len(recorder.given) + len(self.made) + 1

        def point(place: Place) -> tuple[int, int]:
            if place.memory is recorder.counters:
                return counters, place.offset
            if id(place.memory) in offsets:
                return block, offsets[id(place.memory)] + place.offset
            return own[id(place.memory)], place.offset

        self.result = self._template(recorder, found, own, returned)
        self._arrange(recorder.launches, point)

    def _arrange(self, launches: Sequence[Launched], point: Callable[[Place], tuple[int, int]]) -> None:
        """All places that launches name, each once, so that a call works its address out once."""
        places: dict[tuple[int, int], int] = {}
        boxes: dict[tuple, int] = {}
        for one in launches:
            for argument in one.arguments:
                if type(argument) is Box:
                    boxes.setdefault((point(argument.place), *argument[1:]), len(boxes))
                elif argument is not None:
                    places.setdefault(point(argument), len(places))
        self.places, self.launches = tuple(places), []
        self.boxes = tuple((*where, *rest) for where, *rest in boxes)
        for one in launches:
            numbers = []
            for argument in one.arguments:
                if argument is None:
                    numbers.append(len(places) + len(boxes))
                elif type(argument) is Box:
                    numbers.append(len(places) + boxes[(point(argument.place), *argument[1:])])
                else:
                    numbers.append(places[point(argument)])
            _, run, function, metadata, rest = one.compiled
            # Of one number an itemgetter makes no tuple; every kernel has two tensors at least.
            grid = (*one.grid, 1, 1)[:3]
            self.launches.append((run, grid, function, metadata, operator.itemgetter(*numbers), rest))

    @staticmethod
    def _returned(recorder: Recorder, found: object) -> dict[int, list[Tensor]]:
        """Tensors that a call returns, by the memory that it made for them."""
        returned: dict[int, list[Tensor]] = {}
        for tensor in tensors_of(found):
            if any(tensor is memory.tensor for memory in recorder.given):
                continue
            memory = next((m for m in recorder.made if m.is_storage_of(tensor)), None)
            if memory is None:
                recorder.refuse("it returns memory that it was not given and did not make")
            else:
                returned.setdefault(id(memory), []).append(tensor)
        return returned

    def _make(self, memory: Memory, views: Sequence[Tensor]) -> None:
        """How a tensor is made: as the only view that is returned, where that is all of it."""
        tensor, options = memory.tensor, dict(dtype=memory.tensor.dtype, device=self.device)
        if memory.zeroed:
            self.made.append((torch.zeros, (tensor.shape,), options))
            return
        whole = views[0] if len(views) == 1 and is_all_of(views[0], tensor) else tensor
        self.made.append((torch.empty_strided, (whole.shape, whole.stride()), options))

    def _template(self, recorder: Recorder, found: object, own: dict[int, int], returned: dict) -> object:
        """``found`` with a :class:`Result` for every tensor."""
        if isinstance(found, (tuple, list)):
            parts = [self._template(recorder, one, own, returned) for one in found]
            return type(found)(*parts) if hasattr(found, "_fields") else type(found)(parts)
        if not isinstance(found, Tensor):
            return found
        for i, memory in enumerate(recorder.given):
            if found is memory.tensor:
                return Result(i, True, None)
        memory = next((m for m in recorder.made if m.is_storage_of(found)), None)
        if memory is None:
            return None  # refused before
        alone = len(returned[id(memory)]) == 1 and not memory.zeroed and is_all_of(found, memory.tensor)
        alone = alone or (found.shape == memory.tensor.shape and found.stride() == memory.tensor.stride())
        view = None if alone else (found.shape, found.stride(), found.storage_offset())
        return Result(own[id(memory)] - len(recorder.given), False, view)

    def __call__(self, tensors: Sequence[Tensor]) -> object:
        made = [make(*sizes, **options) for make, sizes, options in self.made]
        at = [t.data_ptr() for t in tensors]
        at += [t.data_ptr() for t in made]
        if self.scratch:
            block = torch.empty(self.scratch, dtype=torch.uint8, device=self.device)
            at.append(block.data_ptr())
        else:
            at.append(0)
        if self.counted:
            at.append(launch.zeroed(self.counted, self.device).data_ptr())
        values = [at[memory] + offset for memory, offset in self.places]
        for memory, offset, make, dtype, shape, block_shape in self.boxes:
            values.append(make(at[memory] + offset, dtype, shape, block_shape))
        values.append(None)
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        for run, (x, y, z), function, metadata, pick, rest in self.launches:
            run(x, y, z, stream, function, metadata, None, None, None, *pick(values), *rest)
        return filled(self.result, tensors, made)


def is_all_of(view: Tensor, tensor: Tensor) -> bool:
    """Whether a view is ``tensor`` with its sides in another order, cut or joined."""
    return view.dtype == tensor.dtype and view.numel() == tensor.numel() and view.storage_offset() == 0


def tensors_of(found: object) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [t for one in found for t in tensors_of(one)] if isinstance(found, (tuple, list)) else []


def filled(template: object, given: Sequence[Tensor], made: Sequence[Tensor]) -> object:
    """A template with tensors for its results."""
    if type(template) is Result:
        index, is_given, view = template
        tensor = given[index] if is_given else made[index]
        return tensor if view is None else tensor.as_strided(*view)
    if isinstance(template, tuple):
        parts = [filled(one, given, made) for one in template]
        return type(template)(*parts) if hasattr(template, "_fields") else tuple(parts)
    return [filled(one, given, made) for one in template] if isinstance(template, list) else template


def kind_of(args: Sequence[object], kinds: list, tensors: list[Tensor]) -> bool:
    """Appends to ``kinds`` all that launches depend on, and to ``tensors`` those of ``args``.

    False: there is something that nobody can tell the kind of, as a tensor of a class of its own.
    """
    for one in args:
        kind = type(one)
        if kind is Tensor or kind is Parameter:
            tensors.append(one)
            kinds.append((one.dtype, one.shape, one.stride(), one.data_ptr() & 15, one.device))
        elif one is None:
            kinds.append(None)
        elif kind in PLAIN:
            kinds.append((kind, one))  # 1, 1.0 and True are equal
        elif isinstance(one, (tuple, list)):
            kinds.append((kind, len(one)))
            if not kind_of(one, kinds, tensors):
                return False
        else:
            return False
    return True


def key_of(name: str, now: switches.Switches, precision: str, kinds: list) -> tuple:
    """What a recording is found by: the method, its arguments, and what else it asks."""
    return name, now, precision, *kinds


_recordings: dict[tuple, Recording | str] = {}  # or why there is none


def forget() -> None:
    """Recordings are made anew: for tests that change what they depend on and nothing else does."""
    _recordings.clear()


def call(name: str, method: Callable, backend: object, *args: object) -> object:
    """``method(backend, *args)``, by an earlier call where there was one of its kind.

    Args:
        name: of the method.
    """
    now, kinds, tensors = switches.current(), [], []
    if not now.record_calls or not now.remember_launches or tuning.any_forced() or launch.watched():
        return method(backend, *args)
    if not kind_of(args, kinds, tensors) or not tensors or launch.is_apart(tensors[0]):
        return method(backend, *args)
    key = key_of(name, now, torch.get_float32_matmul_precision(), kinds)
    known = _recordings.get(key)
    if type(known) is Recording:
        with features.on_device(tensors[0]):
            return known(tensors)
    if known is not None or launch.current.recorder is not None:
        return method(backend, *args)
    return record(key, tensors, lambda: method(backend, *args))


def record(key: tuple, tensors: Sequence[Tensor], run: Callable[[], object]) -> object:
    """A first call, watched."""
    recorder = Recorder(tensors)
    if recorder.share_memory():  # others of this kind need not
        return run()
    launch.current.recorder = recorder
    try:
        with recorder:
            found = run()
    finally:
        launch.current.recorder = None
    if not recorder.launches:
        recorder.refuse("it launches nothing")
    recording = Recording(recorder, found) if recorder.reason is None else None
    if len(_recordings) >= MOST:
        _recordings.clear()
    _recordings[key] = recorder.reason or recording  # a reason may come of what is returned, too
    return found


def why_not_recorded() -> dict[str, set[str]]:
    """Of the calls seen that are not recorded, the reasons by method."""
    reasons: dict[str, set[str]] = {}
    for key, known in list(_recordings.items()):
        if isinstance(known, str):
            reasons.setdefault(key[0], set()).add(known)
    return reasons
