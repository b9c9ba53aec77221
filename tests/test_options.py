"""The keywords that a layer and the module share: stated once, shown in both, checked before anything is built."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import typing

import pytest

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
    with pytest.raises(
        TypeError, match=rf"{cls.__name__}: got an argument 'neurons', wanted one of num_neurons, scoring"
    ):
        cls(8, neurons=3)


def test_subclasses_and_copies():
    """A subclass with arguments of its own shows those, and passes any option on; modules pickle as before."""

    class Small(FusedDSTS):
        def __init__(self, channels: int, **options) -> None:
            super().__init__(channels, num_layers=1, **options)

    assert list(inspect.signature(Small).parameters) == ["channels", "options"]
    assert Small(4, num_neurons=2).layers[0].num_neurons == 2
    again = pickle.loads(pickle.dumps(FusedDSTS(4, num_neurons=2)))
    assert again.layers[0].scoring.shape[0] == 2
