"""What tests of the Triton backend alone share: modules that need triton, and spies in place of its kernels.

Importing this skips a test module where kernels cannot run in the interpreter, see :mod:`tests.support.targets`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest

from dsts_kernels.backends.triton import LAUNCHERS, load

from ...support.targets import INTERPRETED, require_triton

if not INTERPRETED:
    pytest.skip("runs kernels in Triton's interpreter: set TRITON_INTERPRET=1", allow_module_level=True)
require_triton()
tl, triton = map(importlib.import_module, ("triton.language", "triton"))
MODULES = {name: load(name) for name in (*LAUNCHERS, "launch", "schedule")}
launch = MODULES["launch"]
interpreted = pytest.mark.usefixtures("interpreter")


class Spy:
    """Stands in for a kernel: launches it, with constants of ours, and keeps what it was given."""

    def __init__(self, kernel: object, **constants: object) -> None:
        self.kernel, self.constants, self.launches = kernel, constants, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: object, **constants: object) -> None:
            self.launches.append((grid, constants))
            self.kernel[grid](*args, **constants | self.constants)

        return run


def spy_on(monkeypatch: pytest.MonkeyPatch, name: str, **constants: object) -> Spy:
    """A :class:`Spy` in place of the kernel ``name`` wherever it is launched from."""
    places = [module for module in MODULES.values() if hasattr(module, name)]
    spy = Spy(getattr(places[0], name), **constants)
    for module in places:
        monkeypatch.setattr(module, name, spy)
    return spy


NAMES = sorted({name for module in MODULES.values() for name in vars(module) if name.endswith("_kernel")})
