"""Files of mmaction2 into TPN: what is read, passed over or refused; never half of one, and nothing is executed."""

from __future__ import annotations

import os
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsts_kernels.backbones import TPN, load_mmaction2, load_state, read_state

SMALL = {"width": 2, "blocks": (1, 1, 1, 1), "aux_logits": True}
Log = types.ModuleType("somebody.log")  # a package that a reader has not got


class History:
    """Such as mmengine's log: an object with arrays and a method of its class."""

    def __init__(self) -> None:
        self.values, self.last, self.mean = np.arange(3.0), np.float64(2.0), History.average

    def average(self) -> float:
        return self.values.mean()


History.__module__, Log.History = Log.__name__, History


@pytest.fixture
def model() -> TPN:
    return TPN(5, **SMALL)


@pytest.fixture
def theirs(model) -> dict[str, Tensor]:
    """Another state of the same names and shapes."""
    return {
        name: torch.rand_like(value) if value.is_floating_point() else torch.tensor(7)
        for name, value in model.state_dict().items()
    }


def save(path: Path, state: dict[str, Tensor], zipped: bool = True, **beside: object) -> Path:
    """As mmengine's runner writes a file."""
    content = {"meta": {"epoch": 3, "config": "model = dict()"}, "state_dict": OrderedDict(state), **beside}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_theirs(tmp_path, model, theirs, zipped):
    path = save(tmp_path / "tpn.pth", theirs, zipped, optimizer={"state": {}, "param_groups": []})
    assert load_mmaction2(model, path) == []
    assert same(model, theirs)


def test_a_state_of_ours(tmp_path, model, theirs):
    torch.save(theirs, tmp_path / "state.pt")
    load_mmaction2(model, str(tmp_path / "state.pt"))
    assert same(model, theirs)


def test_what_lies_beside_the_weights(tmp_path, model, theirs):
    """The classifier's copy that testing leaves behind, pixels' mean and deviation."""
    beside = {
        "cls_head.new_cls.weight": torch.zeros(5, 64, 1, 1, 1),
        "cls_head.new_cls.bias": torch.zeros(5),
        "data_preprocessor.mean": torch.zeros(3, 1, 1, 1),
        "data_preprocessor.std": torch.ones(3, 1, 1, 1),
    }
    load_mmaction2(model, save(tmp_path / "tpn.pth", {**theirs, **beside}))
    assert same(model, theirs)


def test_the_auxiliary_head_is_passed_over_where_there_is_none(tmp_path, model, theirs):
    plain = TPN(5, **{**SMALL, "aux_logits": False})
    load_mmaction2(plain, save(tmp_path / "tpn.pth", theirs))
    kept = {name: value for name, value in theirs.items() if not name.startswith("neck.aux_head.")}
    assert len(kept) == len(theirs) - 8
    assert same(plain, kept)
    with pytest.raises(ValueError, match=r"8 missing \(neck.aux_head.conv.conv.weight, .* and 4 more\)$"):
        load_mmaction2(model, save(tmp_path / "plain.pth", kept))


def with_log(path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, zipped: bool) -> Path:
    monkeypatch.setitem(sys.modules, Log.__name__, Log)
    monkeypatch.setitem(sys.modules, "somebody", types.ModuleType("somebody"))
    save(path, state, zipped, message_hub={"loss": History()})
    monkeypatch.undo()  # whoever reads it has no such package
    return path


def test_objects_beside_the_weights(tmp_path, model, theirs, monkeypatch):
    """mmengine's log comes with its classes, numpy's arrays and getattr, none of which weights_only lets pass."""
    path = with_log(tmp_path / "tpn.pth", theirs, monkeypatch, zipped=True)
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert {"builtins.getattr", "numpy.dtype", "somebody.log.History"} <= set(named)
    allowed = set(torch.serialization.get_safe_globals())  # a set within torch too: its order may change
    load_mmaction2(model, path)
    assert same(model, theirs)
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_objects_in_a_file_of_old(tmp_path, model, theirs, monkeypatch):
    path = with_log(tmp_path / "tpn.pth", theirs, monkeypatch, zipped=False)
    with pytest.raises(ValueError, match=r"cannot read \(UnpicklingError\); it is cut off, or of before torch 1.6"):
        load_mmaction2(model, path)


class Attack:
    def __init__(self, call, *arguments) -> None:
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("call", [os.mkdir, eval], ids=["os", "eval"])
def test_nothing_is_executed(tmp_path, model, theirs, call):
    made = tmp_path / "made"
    arguments = {os.mkdir: (str(made),), eval: (f"__import__('os').mkdir({str(made)!r})",), getattr: (os, "mkdir")}[
        call
    ]
    path = save(tmp_path / "tpn.pth", theirs, log=Attack(call, *arguments))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        load_mmaction2(model, path)
    except ValueError as error:  # of the modules that torch refuses by name
        assert "cannot read (UnpicklingError)" in str(error)
        assert same(model, before)
    assert not made.exists()


def changed(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    state = dict(state)
    if how == "missing":
        del state["backbone.conv1.bn.bias"]
    elif how == "unexpected":
        state["backbone.conv1_lateral.conv.weight"] = torch.zeros(3)
    elif how == "shape":
        state["neck.pyramid_fusion.bn.weight"] = torch.zeros(3)
    elif how == "classes":
        state["cls_head.fc_cls.bias"] = torch.zeros(400)
    return state


@pytest.mark.parametrize(
    "how, message",
    [
        ("missing", r"of whose \d+ names: 1 missing \(backbone.conv1.bn.bias\)$"),
        ("unexpected", r"names: 1 unexpected \(backbone.conv1_lateral.conv.weight\)$"),
        ("shape", r"names: 1 of another shape \(neck.pyramid_fusion.bn.weight: got \(3,\), wanted \(64,\)\)$"),
        (
            "classes",
            r"\(cls_head.fc_cls.bias: got \(400,\), wanted \(5,\)\); it was trained for other .* new_head=True",
        ),
    ],
)
def test_a_file_of_another_model(tmp_path, model, theirs, how, message):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_mmaction2(model, save(tmp_path / "tpn.pth", changed(theirs, how)))
    assert str(tmp_path / "tpn.pth") in str(error.value)
    assert same(model, before)


def test_new_head(tmp_path, theirs):
    """All but the two last linear layers."""
    model = TPN(7, **SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    left = load_mmaction2(model, save(tmp_path / "tpn.pth", theirs), new_head=True)
    assert left == [
        *(f"neck.aux_head.fc.{name}" for name in ("weight", "bias")),
        *(f"cls_head.fc_cls.{name}" for name in ("weight", "bias")),
    ]
    assert same(model, {name: before[name] if name in left else theirs[name] for name in before})
    with pytest.raises(ValueError, match="1 missing"):  # for the head alone
        load_mmaction2(model, save(tmp_path / "other.pth", changed(theirs, "missing")), new_head=True)


def test_weights_in_another_dtype(model, theirs):
    half = {name: value.half() if value.is_floating_point() else value for name, value in theirs.items()}
    load_state(model, half, source="half")
    assert same(model, {name: value.to(theirs[name].dtype) for name, value in half.items()})


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "holds no state_dict"),
        ({}, "holds no state_dict"),
        ({"state_dict": {}}, "holds no state_dict"),
        ({3: torch.zeros(2)}, "holds no state_dict"),
        ({"state_dict": {"a": 3}}, r"a: got int 3 in '.*', wanted a tensor"),
        ({"model": torch.zeros(2), "epoch": 3}, r"epoch: got int 3"),
    ],
)
def test_no_state(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=message):
        read_state(tmp_path / "file.pt")


def test_damaged(tmp_path, model):
    with pytest.raises(FileNotFoundError, match=r"path: got '.*', wanted a file of weights"):
        load_mmaction2(model, tmp_path / "none.pth")
    path = save(tmp_path / "tpn.pth", {"w": torch.full((1000,), 7.0)})
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"which torch\.load cannot read"):
        read_state(path)
    whole[whole.index(torch.full((100,), 7.0).numpy().tobytes()) + 50] ^= 4
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"cannot read \(BadZipFile: record .* is damaged\)"):
        read_state(path)


def test_another_module(tmp_path):
    with pytest.raises(TypeError, match="model: got Linear, wanted TPN"):
        load_mmaction2(nn.Linear(2, 2), tmp_path / "tpn.pth")
