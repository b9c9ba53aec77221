"""How many calls lie between the module and a native kernel: few, so that one reads straight down."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from dsts_kernels import FusedDSTS
from dsts_kernels.backends import cpu
from dsts_kernels.routing import sample_draws

from .support import _C

MOST = 14  # frames from FusedDSTS.forward to the launcher, both counted: docs/design.md
KERNELS = (
    "semhash_forward",
    "semhash_backward",
    "tap_sums",
    "gather_panel",
    "epilogue",
    "gate_merge",
    "winograd",
    "winograd_weight_gradient",
    "frozen_layers",
)

BACKWARD = {  # of a layer in one step of autograd, and of its ops alone
    "in one step": {
        "semhash_backward": 3, "gate_merge": 4, "winograd": 4, "winograd_weight_gradient": 4, "epilogue": 5
    },
    "op by op": {"semhash_backward": 3, "gate_merge": 7, "winograd": 7, "winograd_weight_gradient": 7, "epilogue": 8},
}  # fmt: skip


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """By kernel: the functions on the stack when it was last called, the outermost first."""
    stacks: dict[str, list[str]] = {}

    def spy(name: str) -> Callable[..., None]:
        def run(*args) -> None:
            stacks[name] = [f"{f.filename}:{f.name}" for f in traceback.extract_stack()[:-1]]
            getattr(_C, name)(*args)

        return run

    spies = {name: spy(name) for name in KERNELS}
    monkeypatch.setattr(cpu, "_C", SimpleNamespace(**spies, FrozenLayer=_C.FrozenLayer))
    return stacks


def frames(stack: list[str], first: str) -> list[str]:
    """The walk from the outermost function of that name on."""
    return stack[next(i for i, name in enumerate(stack) if name.endswith(first)) :]


@pytest.mark.parametrize(
    ("dtype", "kernel"), [(torch.float32, "winograd"), (torch.float64, "gather_panel")], ids=["fast", "direct"]
)
def test_from_the_module_to_a_kernel(walks, dtype, kernel):
    """In training and in evaluation, and of a frozen module; by fast convolution and by the library's."""
    x, dsts = torch.randn(3, 16, 4, 7, 7, dtype=dtype), FusedDSTS(16, num_neurons=2, dtype=dtype)
    for call, first in (
        (dsts, "modules.py:forward"),
        (dsts.eval(), "modules.py:forward"),
        (dsts.freeze(), "frozen.py:forward"),
    ):
        walks.clear()
        call(x)
        in_one = first.startswith("frozen") and kernel == "winograd"
        assert set(walks) == {"frozen_layers"} if in_one else {kernel, "tap_sums"} <= set(walks)
        for name, stack in walks.items():
            walk = frames(stack, first)
            launcher = {"semhash_forward": "semhash_gate", "frozen_layers": "_run_frozen"}.get(name, name)
            assert walk[-1].endswith(f"cpu.py:{launcher}")
            assert len(walk) <= MOST, walk


@pytest.mark.parametrize("way", BACKWARD)
def test_from_autograd_to_a_kernel(walks, way):
    """The way back: from the derivative to each kernel of its backward pass; samples of both neurons."""
    options = {} if way == "in one step" else {"norm": None, "activation": None}
    draws = sample_draws(3, 16, 2, 3)
    draws = draws._replace(gumbel=1e6 * torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).expand(3, 3, 2))
    x = torch.randn(3, 16, 4, 7, 7).requires_grad_()
    FusedDSTS(16, num_neurons=2, **options)(x, draws=draws).sum().backward()
    first = {} if way == "in one step" else {"semhash_backward": "route.py:backward"}
    stacks = {name: frames(walks[name], first.get(name, ":_gradients")) for name in BACKWARD[way]}
    assert {name: len(stack) for name, stack in stacks.items()} == BACKWARD[way], walks
