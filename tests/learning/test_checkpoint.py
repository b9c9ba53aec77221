"""Checkpoints: whole or not there, refused when they are something else."""

from __future__ import annotations

import os
import stat
import threading

import pytest
import torch

from dsts_kernels.learning import generator_states, load_checkpoint, restore_generators, save_checkpoint


def test_round_trip(tmp_path):
    path = tmp_path / "new folder" / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 3, "model": {"w": torch.arange(3)}, "history": [{"loss": 0.5}]})
    state = load_checkpoint(path)
    assert state["epoch"] == 3 and state["history"] == [{"loss": 0.5}]
    assert torch.equal(state["model"]["w"], torch.arange(3))
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("when", ["write", "sync", "rename"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, when):
    """Interrupted while it is written, synced or renamed: the old checkpoint is whole and nothing else lies there."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1})

    def fail(*args, **kwargs):
        if when == "write":
            args[1].write(b"half of one")
        raise KeyboardInterrupt

    owner, name = {"write": (torch, "save"), "sync": (os, "fsync"), "rename": (os, "replace")}[when]
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"epoch": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_threads_save_side_by_side(tmp_path, monkeypatch):
    """Whole files with checksums, whatever the process's switch, with the mask of the process left alone."""
    mask = os.umask(0)
    os.umask(mask)
    monkeypatch.setattr(os, "umask", lambda value: pytest.fail("the mask is every thread's"))
    switch = getattr(torch.serialization, "set_crc32_options", lambda value: None)
    state = {"w": torch.arange(20_000)}
    paths = [tmp_path / f"{index}.pt" for index in range(8)]

    def save(path) -> None:
        for _ in range(5):
            save_checkpoint(path, state)

    switch(False)
    try:
        threads = [threading.Thread(target=save, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not getattr(torch.serialization, "get_crc32_options", lambda: False)()
    finally:
        switch(True)
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in paths)
    for path in paths:
        assert torch.equal(load_checkpoint(path)["w"], state["w"])
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_what_a_killed_save_left_goes(tmp_path):
    (tmp_path / ".checkpoint.pt.x1.part").write_bytes(b"half of one")
    save_checkpoint(tmp_path / "checkpoint.pt", {"format": "of somebody else"})
    assert os.listdir(tmp_path) == ["checkpoint.pt"] and load_checkpoint(tmp_path / "checkpoint.pt")


def test_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_checkpoint(tmp_path / "none.pt")
    text = tmp_path / "text.pt"
    text.write_text("not a checkpoint")
    with pytest.raises(ValueError, match="cannot read"):
        load_checkpoint(text)
    other = tmp_path / "other.pt"
    torch.save({"format": "something else"}, other)
    with pytest.raises(ValueError, match="'something else'"):
        load_checkpoint(other)
    torch.save([1, 2], other)
    with pytest.raises(ValueError, match="'list'"):
        load_checkpoint(other)
    whole = tmp_path / "whole.pt"
    save_checkpoint(whole, {"w": torch.zeros(1000)})
    whole.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot read"):
        load_checkpoint(whole)


def test_generators():
    states = generator_states()
    first = torch.rand(3)
    restore_generators(states)
    assert torch.equal(first, torch.rand(3))
