"""FrozenDSTS.save and load: a module from its file alone, and a clear refusal of every other file."""

from __future__ import annotations

import os
import re

import pytest
import torch

from dsts_kernels import FrozenDSTS
from dsts_kernels.backends import BACKENDS
from dsts_kernels.backends.packing import PACKINGS
from dsts_kernels.learning import load_checkpoint, save_checkpoint
from dsts_kernels.testing import assert_close

from .support.frozen import FILES, OPTIONS, SIZE, assert_same, described, features, live, repacked, snapshot

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_round_trip(backend, options, tmp_path):
    """The same module: class, options, bits of every buffer, bits of the answer."""
    dsts = live(**options, side=True, backend=backend)
    fast = dsts.freeze(algorithm="direct")
    fast.save(tmp_path / "new folder" / "dsts.pt")
    other = FrozenDSTS.load(str(tmp_path / "new folder" / "dsts.pt"))
    assert type(other) is FrozenDSTS and not other.training and other.describe() == fast.describe()
    assert (other.algorithm, other.backend, other.dtype) == ("direct", backend, fast.dtype)
    assert repr(other) == repr(fast)
    x = features(fast)
    assert torch.equal(other(x), fast(x))
    assert_same(other, fast.state_dict())
    if fast.dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            assert_close(other(x), dsts(x))


@pytest.mark.parametrize("mixing_kernel", [(1, 1, 1), (1, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_file_of_another_device(packing, dtype, mixing_kernel, tmp_path):
    """Packed for a GPU or another backend, it is packed for this machine as it is loaded, bit for bit."""
    fast = live(dtype, mixing_kernel=mixing_kernel, side=True).freeze()
    repacked(fast, packing).save(tmp_path / "dsts.pt")
    assert torch.load(tmp_path / "dsts.pt", weights_only=True)["state"].keys() == fast.state_dict().keys()
    other, x = FrozenDSTS.load(tmp_path / "dsts.pt"), features(fast)
    assert_same(other, fast.state_dict())
    assert torch.equal(other(x), fast(x))


def test_a_file_for_another_device(monkeypatch, tmp_path):
    """And packed for the device it is put on: what `to` does there, load does."""
    fast = live(mixing_kernel=(1, 3, 3)).freeze(backend="eager")
    fast.save(tmp_path / "dsts.pt")
    monkeypatch.setattr(type(BACKENDS["eager"]), "packing", lambda *args: "tiled")
    other, x = FrozenDSTS.load(tmp_path / "dsts.pt", map_location="cpu"), torch.randn(SIZE)
    assert {layer.packing for layer in other.layers} == {"tiled"}
    assert_same(other, repacked(fast, "tiled").state_dict())
    assert_close(other(x), fast(x))


def test_a_backend_that_is_not_here(tmp_path):
    """A file keeps the backend it was frozen for; where that cannot run, the call says so, and another may be set."""
    fast, x = live().freeze(), torch.randn(SIZE)
    wanted, fast.backend = fast(x), "triton"
    fast.save(tmp_path / "dsts.pt")
    other = FrozenDSTS.load(tmp_path / "dsts.pt")
    assert other.backend == "triton"
    if BACKENDS["triton"].why_not("frozen_layer", x.device, x.dtype) is not None:
        with pytest.raises(RuntimeError, match="backend='triton' cannot run frozen_layer on cpu"):
            other(x)
    other.backend = None
    assert torch.equal(other(x), wanted)


def test_map_location(tmp_path):
    """A device, its name, none; what is no device of this machine is told."""
    fast = live().freeze()
    fast.save(tmp_path / "dsts.pt")
    for where in (None, "cpu", torch.device("cpu"), "meta"):
        other = FrozenDSTS.load(tmp_path / "dsts.pt", where)
        assert other.layers[0].filters.device.type == ("meta" if where == "meta" else "cpu")
    wrong = ["gpu", 7.5, "cpu:x"] + ([] if torch.cuda.is_available() else ["cuda"])
    for where in wrong:
        with pytest.raises(
            ValueError, match=re.escape(f"map_location: got {where!r}, wanted a device of this machine")
        ):
            FrozenDSTS.load(tmp_path / "dsts.pt", where)


def test_whatever_the_default_device(tmp_path):
    """freeze, save, load and states stay where the module is when torch's default device is another."""
    dsts, x = live(), torch.randn(SIZE)
    wanted = dsts.freeze()(x)
    with torch.device("meta"):
        fast = dsts.freeze()
        fast.save(tmp_path / "dsts.pt")
        other = FrozenDSTS.load(tmp_path / "dsts.pt")
        other.load_state_dict(fast.state_dict())
        other.double().float()
    assert all(b.device.type == "cpu" for b in (*fast.buffers(), *other.buffers()))
    assert torch.equal(fast(x), wanted) and torch.equal(other(x), wanted)


def test_a_failed_save_leaves_the_old_file(monkeypatch, tmp_path):
    """The writer of checkpoints writes these: a file that was there stays whole."""
    fast, path = live().freeze(), tmp_path / "dsts.pt"
    fast.save(path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        live().freeze().save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["dsts.pt"]


def small(path) -> FrozenDSTS:
    fast = live(num_layers=1, num_neurons=1).freeze(dtype=torch.float16)
    fast.save(path)
    return fast


def test_damaged_files(tmp_path):
    """One bit anywhere: refused, or it did not matter; cut off anywhere: refused. One error, which names the file."""
    path = tmp_path / "dsts.pt"
    fast = small(path)
    whole, state = path.read_bytes(), snapshot(fast)
    generator = torch.Generator().manual_seed(int(torch.initial_seed()))
    refused = 0
    for place in torch.randint(len(whole), (300,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            assert_same(FrozenDSTS.load(path), state)
        except ValueError as error:
            assert str(error).startswith(f"path: got {str(path)!r}, w")
            refused += 1
    assert refused > 150
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"which torch.load cannot read"):
            FrozenDSTS.load(path)
    path.write_bytes(whole)
    assert_same(FrozenDSTS.load(path), state)


def test_records_that_became_folders(tmp_path):
    """One bit of the table of contents, beside which all checksums hold; torch.load would leave memory as it was."""
    path = tmp_path / "dsts.pt"
    fast = small(path)
    whole, place, records = path.read_bytes(), -1, 0
    while (place := whole.find(b"PK\1\2", place + 1)) >= 0:
        damaged = bytearray(whole)
        damaged[place + 38] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"which torch.load cannot read \(BadZipFile: record .* is damaged\)"):
            FrozenDSTS.load(path)
        records += 1
    assert records > len(fast.state_dict())


def test_damaged_states_in_whole_files(tmp_path):
    """A file that was put together by hand is held to what its state says."""
    small(tmp_path / "dsts.pt")
    content = torch.load(tmp_path / "dsts.pt", weights_only=True)
    for change in (
        lambda s: s.pop("layers.0.bias"),
        lambda s: s.pop("_extra_state"),
        lambda s: s["layers.0.gate"].neg_().add_(1),
        lambda s: s.update({"layers.0.filters": s["layers.0.filters"][:-1]}),
        lambda s: described(s, lambda f: f.update(format=3)),
    ):
        state = {key: value.clone() for key, value in content["state"].items()}
        change(state)
        torch.save({**content, "state": state}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="whose content does not load: "):
            FrozenDSTS.load(tmp_path / "other.pt")
    for state in (None, [1], 3, {}):
        torch.save({**content, "state": state}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="whose content does not load: "):
            FrozenDSTS.load(tmp_path / "other.pt")


def test_other_files(tmp_path):
    """No file, a text, a checkpoint, a state, version 0.1's, a newer version's: each said as it is."""
    fast, path = small(tmp_path / "dsts.pt"), tmp_path / "other.pt"
    with pytest.raises(
        FileNotFoundError, match=r"none.pt', wanted a file of FrozenDSTS.save\(\); there is no such file"
    ):
        FrozenDSTS.load(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        FrozenDSTS.load(tmp_path)
    path.write_text("not a module")
    with pytest.raises(
        ValueError, match=r"which torch.load cannot read \(BadZipFile: .*FrozenDSTS.save\(\) writes them"
    ):
        FrozenDSTS.load(path)
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises(ValueError, match="whose format is 'dsts_kernels checkpoint 1', wanted 'dsts_kernels frozen 1'"):
        FrozenDSTS.load(path)
    with pytest.raises(ValueError, match="whose format is 'dsts_kernels frozen 1', wanted 'dsts_kernels checkpoint 1'"):
        load_checkpoint(tmp_path / "dsts.pt")
    torch.save(fast.state_dict(), path)
    with pytest.raises(ValueError, match=r"whose format is None, wanted .*FrozenDSTS.save\(\) writes them"):
        FrozenDSTS.load(path)
    for old, reason in (("module", "cannot read"), ("state", "format is None")):
        with pytest.raises(ValueError, match=rf"{reason}.*version 0.1 wrote .*weights_only=False\).save\(new_path\)"):
            FrozenDSTS.load(FILES / f"frozen_0_1_{old}.pt")
    torch.save({**torch.load(tmp_path / "dsts.pt", weights_only=True), "format": "dsts_kernels frozen 12"}, path)
    with pytest.raises(
        ValueError, match=r"'dsts_kernels frozen 12', wanted .*; a newer version of dsts_kernels wrote it"
    ):
        FrozenDSTS.load(path)


def test_old_pickles_are_brought_over(tmp_path):
    """What the error of a 0.1 file says to do works."""
    answer = torch.load(FILES / "frozen_0_1_answer.pt", weights_only=True)
    torch.load(FILES / "frozen_0_1_module.pt", weights_only=False).save(tmp_path / "dsts.pt")
    assert_close(FrozenDSTS.load(tmp_path / "dsts.pt")(answer["x"]), answer["y"])


def test_checksums_that_were_switched_off(tmp_path):
    """Files have checksums whatever torch.save was told, and it is told the same again afterwards."""
    torch.serialization.set_crc32_options(False)
    try:
        fast = small(tmp_path / "dsts.pt")
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(FrozenDSTS.load(tmp_path / "dsts.pt"), fast.state_dict())
