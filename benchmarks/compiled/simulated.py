"""The Triton backend on CPU tensors, with every launch compiled for a chip and its PTX run by :mod:`.ptx`.

    with simulated("sm_90") as chip:
        panel = chip.backend.kernels.gather_panel(...)  # as on a GPU, slowly
    chip.accesses                                       # by kernel and tensor, what each warp touched

It shows what the interpreter cannot: what the compiler made of a kernel, Gluon kernels, and bfloat16 everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dsts_kernels.backends.triton import TritonBackend

from . import ahead, ptx

Grid = tuple[int, ...]


class Touched(NamedTuple):
    """A warp's access, and whose memory it was: a parameter's name, or ``shared``."""

    kernel: str
    tensor: str
    access: ptx.Access


def every_cta(grid: Grid) -> list[tuple[int, int]]:
    return list(itertools.product(range(grid[0]), range(grid[1] if len(grid) > 1 else 1)))


@dataclass
class Chip:
    """A chip that is not here."""

    architecture: str
    ctas: Callable[[Grid], list[tuple[int, int]]] = every_cta
    accesses: list[Touched] = field(default_factory=list)
    edit: Callable[[str], str] = str  # of the PTX before it runs: for tests of tests
    built: list[object] = field(default_factory=list)  # what the compiler made, launch by launch
    backend: TritonBackend | None = None


compiled = functools.cache(ahead.build)
parsed = functools.lru_cache(maxsize=64)(ptx.parse)


class Simulated:
    """Stands in for a kernel."""

    def __init__(self, kernel: object, chip: Chip) -> None:
        self.kernel, self.chip = kernel, chip

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return functools.partial(self.run, grid)

    def run(self, grid: Grid, *args: object, **constants: object) -> None:
        found: list[ahead.Launch] = []
        ahead.Recorder(self.kernel, found, [""]).record(grid, *args, **constants)
        launch = found[0]
        built = compiled(launch, self.chip.architecture, self.kernel)
        program = parsed(self.chip.edit(built.asm["ptx"]))
        self.chip.built.append(built)
        compiled_in = {place for place, _ in launch.constants}
        memory, places, values = ptx.Memory(), {}, []
        for parameter, value in zip(self.kernel.params, args, strict=False):
            for place, leaf in leaves((parameter.name,), value):
                if place in compiled_in:
                    continue
                if isinstance(leaf, Tensor):
                    whole = storage_of(leaf)
                    if leaf.untyped_storage().data_ptr() not in places:
                        places[leaf.untyped_storage().data_ptr()] = (parameter.name, whole, memory.put(whole))
                    base = places[leaf.untyped_storage().data_ptr()][2]
                    leaf = base + leaf.storage_offset() * leaf.element_size()
                values.append(leaf)
        values += [0] * (len(program.parameters) - len(values))  # Triton's own scratch memory, of which there is none
        for cta in self.chip.ctas(grid):
            size = (grid[0], grid[1] if len(grid) > 1 else 1)
            accesses = ptx.run(program, memory, values, cta=cta, grid=size, shared=built.metadata.shared)
            self.chip.accesses += [Touched(launch.kernel, owner(one, places), one) for one in accesses]
        for _, whole, address in places.values():
            whole.copy_(memory.get(address, whole))


def leaves(path: tuple[str | int, ...], value: object) -> Iterator[tuple[tuple[str | int, ...], object]]:
    """An argument, or all that a tuple holds."""
    if isinstance(value, tuple):
        for i, one in enumerate(value):
            yield from leaves((*path, i), one)
    else:
        yield path, value


def storage_of(tensor: Tensor) -> Tensor:
    """All of its storage as bytes, by reference."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def owner(access: ptx.Access, places: dict[int, tuple[str, Tensor, int]]) -> str:
    if access.space == "shared":
        return "shared"
    return next(name for name, whole, at in places.values() if at <= access.address < at + len(whole))


@contextlib.contextmanager
def simulated(
    architecture: str,
    processors: int = 1,
    ctas: Callable[[Grid], list[tuple[int, int]]] = every_cta,
    edit: Callable[[str], str] = str,
) -> Iterator[Chip]:
    """Kernels compiled for ``architecture``, of ``processors`` multiprocessors; ``ctas`` says which CTAs are run."""
    chip = Chip(architecture, ctas, edit=edit)
    with ahead.on_chip(architecture, processors, lambda kernel: Simulated(kernel, chip)) as backend:
        chip.backend = backend
        yield chip
