"""The keywords that a layer and the module share: stated once, shown in both, checked before anything is built."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pickle
import typing

import pytest
import torch

from dsts_kernels import DSTSLayer, FusedDSTS, reference
from dsts_kernels.options import LayerOptions, OptionKeywords

FIELDS = {field.name: field for field in dataclasses.fields(LayerOptions)}


@pytest.mark.parametrize("cls", [DSTSLayer, FusedDSTS])
def test_signature_and_help(cls):
    """Every option stands in the signature, with its default, and is explained in the docstring."""
    shown = inspect.signature(cls).parameters
    for name, field in FIELDS.items():
        assert shown[name].default == field.default and shown[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert f"    {name}: " in cls.__doc__
    assert "options" not in shown and "{options}" not in cls.__doc__
    for name in shown:
        assert f"    {name}" in cls.__doc__ or f", {name}: " in cls.__doc__, name


def test_the_reference_takes_the_same():
    """It shares no code with ours, so its own list is held to be the same; only backends are ours alone."""

    def defaults(cls: type) -> dict[str, object]:
        return {name: p.default for name, p in inspect.signature(cls).parameters.items() if name != "backend"}

    assert defaults(FusedDSTS) == {k: v for k, v in defaults(reference.DSTS).items() if k != "backend"}
    literal = defaults(reference.DSTSLayer)
    assert literal.items() <= defaults(DSTSLayer).items() and len(literal) > 10


def test_type_checkers_see_the_same():
    """The keywords for type checkers are the fields, with their types."""
    assert typing.get_type_hints(OptionKeywords) == typing.get_type_hints(LayerOptions)


@pytest.mark.parametrize("cls", [DSTSLayer, FusedDSTS])
def test_an_unknown_keyword_is_named(cls):
    """Beside all that the class takes, near names first."""
    with pytest.raises(
        TypeError, match=rf"^{cls.__name__}: got an argument 'neurons', wanted one of num_neurons, "
    ) as e:
        cls(8, neurons=3)
    listed = str(e.value).partition("wanted one of ")[2].split(", ")
    assert sorted(listed) == sorted(inspect.signature(cls).parameters)


def test_layers_for_num_layers():
    with pytest.raises(TypeError, match=r"got an argument 'layers', wanted one of num_layers, in_channels"):
        FusedDSTS(8, layers=2)


@pytest.mark.parametrize("kind", [FusedDSTS, reference.DSTS])
@pytest.mark.parametrize(
    "offset, neurons, expected",
    [
        (0.0, 3, [0.0, 0.0, 0.0]),
        (3.0, 4, [-3.0, -1.0, 1.0, 3.0]),
        (-2.0, 2, [2.0, -2.0]),
        (3.0, 1, [0.0]),
        ((0.5, -4.0), 2, [0.5, -4.0]),
    ],
)
def test_where_gates_start(kind, offset, neurons, expected):
    """Around the neuron's offset, with the same spread; weights of other kinds are drawn as without."""
    torch.manual_seed(1)
    dsts = kind(200, num_layers=1, num_neurons=neurons, scoring_width=1, gate_offset=offset, norm=None)
    torch.manual_seed(1)
    plain = kind(200, num_layers=1, num_neurons=neurons, norm=None)
    (layer,), (other,) = dsts.layers, plain.layers
    assert torch.allclose(layer.gate - other.gate, torch.tensor(expected)[:, None].expand(-1, 200), atol=1e-6)
    assert torch.equal(layer.scoring, other.scoring) and torch.equal(layer.spatial, other.spatial)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(gate_offset=(1.0, 2.0)), ValueError, "gate_offset: got 2 numbers, wanted 1 or num_neurons of them, 3"),
        (dict(gate_offset=(1.0, 2.0, math.inf)), ValueError, r"gate_offset\[2\]: got inf"),
        (dict(gate_offset="1"), TypeError, "gate_offset: got str"),
        (dict(gumbel_scale=-0.5), ValueError, r"gumbel_scale: got -0\.5, wanted a finite number at least 0"),
        (dict(gumbel_scale=None), TypeError, "gumbel_scale: got None"),
    ],
)
def test_bad_values(options, error, message):
    with pytest.raises(error, match=message):
        FusedDSTS(4, num_neurons=3, **options)


def test_subclasses_and_copies():
    """A subclass with arguments of its own shows those, and passes any option on; modules pickle as before."""

    class Small(FusedDSTS):
        def __init__(self, channels: int, **options) -> None:
            super().__init__(channels, num_layers=1, **options)

    assert list(inspect.signature(Small).parameters) == ["channels", "options"]
    assert Small(4, num_neurons=2).layers[0].num_neurons == 2
    again = pickle.loads(pickle.dumps(FusedDSTS(4, num_neurons=2)))
    assert again.layers[0].scoring.shape[0] == 2
