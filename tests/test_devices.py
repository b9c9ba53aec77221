"""Every allocation names its device: a default device (``torch.set_default_device``) moves nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import dsts_kernels
from dsts_kernels import FusedDSTS, reference
from dsts_kernels.routing import sample_draws
from dsts_kernels.testing import assert_close

# What makes a tensor on the default device where no device is named; likes and new_... take that of a tensor.
FACTORIES = frozenset(
    "arange asarray as_tensor empty empty_permuted empty_strided eye full linspace logspace ones rand randint randn "
    "randperm scalar_tensor tensor tril_indices triu_indices zeros".split()
)


def unplaced(path: Path) -> list[str]:
    """Calls ``torch.<factory>(...)`` that name no device."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        factory = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES
        if not factory or not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        placed = any(keyword.arg == "device" for keyword in node.keywords)
        if not placed:
            found.append(f"{path.name}:{node.lineno}: torch.{node.func.attr}")
    return found


def test_every_allocation_names_its_device():
    """Read off the source, so that one that no test reaches is found too."""
    root = Path(dsts_kernels.__file__).parent
    found = [line for path in sorted(root.rglob("*.py")) for line in unplaced(path)]
    assert not found, "\n".join(found)


@pytest.fixture
def elsewhere():
    """The default device is another one, on which no kernel of ours runs."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)  # and no mode is left, as one would be for "cpu"


OPTIONS = {
    "default": {},
    "kernels": dict(scoring_kernel=(1, 3, 3), mixing_kernel=(3, 1, 1)),
    "all": dict(routing_gradient="all"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_modules_stay_where_they_are(backend, dtype, options, elsewhere):
    """Training, gradients, evaluation and frozen layers of a CPU module, values included."""
    with torch.device("cpu"):
        fused = FusedDSTS(
            24, num_neurons=3, num_layers=2, backend=backend, dtype=dtype, score_reduction="mean", **options
        )
        literal = reference.DSTS(
            24, num_neurons=3, num_layers=2, dtype=torch.float64, score_reduction="mean", **options
        )
        literal.load_state_dict(fused.state_dict())
        x = torch.randn(5, 24, 4, 6, 5).to(dtype)
        draws = sample_draws(5, 24, 3, 2, device="cpu")
        wide = [draws.noise.double(), draws.hard, draws.gumbel.double()]
        expected = literal(x.double(), type(draws)(*wide))
    inputs = x.clone().requires_grad_()
    y, routing = fused(inputs, None, return_routing=True)  # sampled on the module's device
    assert y.device.type == "cpu" and all(field.device.type == "cpu" for field in routing)
    assert_close(fused(inputs, type(draws)(*(wide if dtype == torch.float64 else draws))), expected, factor=10)
    y.square().sum().backward()
    assert inputs.grad.device.type == "cpu" and all(p.grad.device.type == "cpu" for p in fused.parameters())
    with torch.no_grad():
        live, frozen = fused.eval()(x), fused.freeze()(x)
        literal.load_state_dict(fused.state_dict())
        literal.eval()
        assert_close(live, literal(x.double()), factor=10, name="evaluation")
        assert_close(frozen, literal(x.double()), factor=10, name="frozen")
