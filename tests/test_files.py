"""Files: whole or not there (tests/learning/test_checkpoint.py), every bit checked, newer told from foreign."""

from __future__ import annotations

import pytest
import torch

from dsts_kernels import files
from dsts_kernels.learning import load_checkpoint, save_checkpoint


def test_a_damaged_bit_is_seen(tmp_path):
    """torch.load takes a weight with a bit turned; we do not."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"w": torch.full((1000,), 7.0)})
    whole = bytearray(path.read_bytes())
    place = whole.index(torch.full((100,), 7.0).numpy().tobytes()) + 50
    whole[place] ^= 4
    path.write_bytes(whole)
    assert not torch.equal(torch.load(path, weights_only=True)["w"], torch.full((1000,), 7.0))
    with pytest.raises(ValueError, match=r"cannot read \(BadZipFile: record .* is damaged\)"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "form, newer",
    [("kind 2", True), ("kind 11", True), ("kind 0", False), ("kind x", False), ("other 2", False), (2, False)],
)
def test_newer_formats(tmp_path, form, newer):
    """A larger number of the same kind is a newer version's; everything else is something else."""
    files.write(tmp_path / "file", {}, form)
    with pytest.raises(ValueError, match=rf"whose format is {form!r}, wanted 'kind 1'") as error:
        files.read(tmp_path / "file", "kind 1", "a file", hint="; a hint")
    assert ("a newer version of dsts_kernels" in str(error.value)) == newer
    assert str(error.value).endswith("; a hint") != newer
