"""Switches of the GPU path: what they say, for whom, and until when."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from dsts_kernels.backends.gpu import switches
from dsts_kernels.backends.gpu.switches import Switches, current, switched


def test_a_block_ends():
    """Inside a block the switch is as asked for; blocks nest, and an exception ends one too."""
    before = current()
    other = not before.plain_where_faster
    with switched(plain_where_faster=other) as inside:
        assert current() is inside and current().plain_where_faster is other
        with pytest.raises(ZeroDivisionError), switched(plain_where_faster=not other):
            assert current().plain_where_faster is not other
            raise ZeroDivisionError
        assert current() is inside
    assert current() is before


def test_the_same_switches_are_the_same_object():
    """What is kept by switches is found again in a later block, and not made anew in each."""
    found = []
    for _ in range(2):
        with switched(plain_where_faster=False) as inside, switched(keep_lists=False) as within:
            found.append((inside, within))
    assert found[0][0] is found[1][0] and found[0][1] is found[1][1] and found[0][0] is not found[0][1]
    with switched() as inside:
        assert inside is current()


def test_other_threads_see_a_block():
    """Autograd's threads run the backward pass of whoever holds the block."""
    seen = []
    with switched(plain_where_faster=False):
        thread = threading.Thread(target=lambda: seen.append(current().plain_where_faster))
        thread.start()
        thread.join()
    assert seen == [False]


def test_a_wrong_name_or_value_is_refused():
    """By name, and nothing is switched."""
    before = current()
    with pytest.raises(TypeError, match=r"got 'plain', wanted one of .*plain_where_faster"), switched(plain=True):
        pass
    with (
        pytest.raises(TypeError, match="plain_where_faster: got 1, wanted True or False"),
        switched(plain_where_faster=1),
    ):
        pass
    assert current() is before


def test_every_switch_is_a_documented_bool():
    """A field without a default would have no old way, one without words no reader."""
    source = switches.__file__
    text = open(source, encoding="utf-8").read()
    for field in dataclasses.fields(Switches):
        assert field.type == "bool" and isinstance(field.default, bool)
        assert f'{field.name}: bool = {field.default}\n    """' in text, f"{field.name} has no docstring of its own"
