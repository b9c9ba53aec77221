"""Triton's interpreter, three times as fast as it comes, and with programs in any order.

As it comes it replaces the language's functions anew at every call of a device function, where once a launch is
enough, works out overflow checks that it reports only in debug mode, and copies tensors to where they already are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator

import pytest
import torch


@contextlib.contextmanager
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Patched, on one thread, inside the block; ``monkeypatch`` undoes the rest when the test ends."""
    from triton.runtime import interpreter as module

    patched: set[int] = set()

    def call(self, *args, **kwargs):
        language = id(self.fn.__globals__.get("core"))  # that of Triton's own functions, or none
        if language not in patched:
            module._patch_lang(self.fn)
            patched.add(language)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise module.InterpreterError(repr(error)) from error

    builder, threads = module.interpreter_builder, torch.get_num_threads()
    monkeypatch.setattr(module.InterpretedFunction, "__call__", call)
    monkeypatch.setattr(module.GridExecutor, "_restore_args_dev", lambda *args: None)
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shuffle(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the programs of a launch run in an order drawn at random."""
    from triton.runtime.interpreter import interpreter_builder

    place = type(interpreter_builder).set_grid_idx
    orders: dict[tuple, list[tuple]] = {}

    def set_grid_idx(x: int, y: int, z: int) -> None:
        grid = tuple(interpreter_builder.grid_dim)
        if (x, y, z) == (0, 0, 0):
            orders[grid] = [(i, j, k) for i in range(grid[0]) for j in range(grid[1]) for k in range(grid[2])]
            random.Random(int(torch.randint(2**31, ()))).shuffle(orders[grid])
        place(interpreter_builder, *orders[grid][(x * grid[1] + y) * grid[2] + z])

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)
