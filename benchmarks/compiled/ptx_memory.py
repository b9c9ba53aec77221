"""Device and shared memory for :mod:`.ptx`, and how warps go through them: sectors, lines, banks."""

from __future__ import annotations

import numpy as np
import torch

WARP, SECTOR, LINE, BANKS, WORD = 32, 32, 128, 32, 4


class Fault(Exception):
    """A mistake of the kernel."""


class Memory:
    """Device memory with tensors in it, each followed by bytes that belong to none."""

    START, GAP = 1 << 20, 4096

    def __init__(self) -> None:
        self.bytes, self.owned = np.zeros(0, np.uint8), np.zeros(0, bool)

    def put(self, tensor: torch.Tensor) -> int:
        """The address of a dense copy of ``tensor``, at a multiple of 256."""
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)
        address = self.START + len(self.bytes)
        space = -(-len(data) // 256) * 256 + self.GAP
        self.bytes = np.concatenate([self.bytes, data, np.zeros(space - len(data), np.uint8)])
        self.owned = np.concatenate([self.owned, np.arange(space) < len(data)])
        return address

    def get(self, address: int, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the shape and dtype of ``like``."""
        at, size = address - self.START, like.numel() * like.element_size()
        data = torch.from_numpy(self.bytes[at : at + size].copy())
        return data.view(like.dtype).view(like.shape)

    def places(self, addresses: np.ndarray, width: int, line: int) -> np.ndarray:
        """Indices ``(lanes, width)`` of bytes."""
        at = (addresses.astype(np.int64) - self.START)[:, None] + np.arange(width)
        if at.size and (at.min() < 0 or at.max() >= len(self.owned) or not self.owned[at].all()):
            raise Fault(f"line {line}: device memory outside of every tensor")
        if (addresses % width).any():
            raise Fault(f"line {line}: {width} bytes at an address that is no multiple of them")
        return at


class Shared:
    """Shared memory of a CTA, which knows who touched what since the last barrier."""

    NOBODY, SEVERAL = -1, -2

    def __init__(self, size: int) -> None:
        self.bytes, self.written = np.zeros(size, np.uint8), np.zeros(size, bool)
        self.writer, self.reader = np.full(size, self.NOBODY), np.full(size, self.NOBODY)

    def barrier(self) -> None:
        self.writer[:], self.reader[:] = self.NOBODY, self.NOBODY

    def places(self, addresses: np.ndarray, width: int, line: int) -> np.ndarray:
        at = addresses.astype(np.int64)[:, None] + np.arange(width)
        if at.size and at.max() >= len(self.bytes):
            raise Fault(f"line {line}: shared memory beyond its end")
        if (addresses % width).any():
            raise Fault(f"line {line}: {width} bytes at a shared address that is no multiple of them")
        return at

    def read(self, at: np.ndarray, warps: np.ndarray, line: int) -> np.ndarray:
        who = np.broadcast_to(warps[:, None], at.shape)
        if not self.written[at].all():
            raise Fault(f"line {line}: shared memory that nobody wrote, or that a copy may still be writing")
        if ((self.writer[at] != self.NOBODY) & (self.writer[at] != who)).any():
            raise Fault(f"line {line}: shared memory that another warp wrote, without a barrier since")
        before = self.reader[at]
        self.reader[at] = np.where((before == self.NOBODY) | (before == who), who, self.SEVERAL)
        crowd = at[self.reader[at] != who]
        self.reader[crowd] = self.SEVERAL
        return self.bytes[at]

    def write(self, at: np.ndarray, values: np.ndarray, warps: np.ndarray, line: int) -> None:
        self.claim(at, warps, line)
        self.bytes[at], self.written[at] = values, True

    def claim(self, at: np.ndarray, warps: np.ndarray, line: int) -> None:
        """Bytes that a warp writes, now or by a copy under way."""
        who = np.broadcast_to(warps[:, None], at.shape)
        for touched in (self.writer, self.reader):
            if ((touched[at] != self.NOBODY) & (touched[at] != who)).any():
                raise Fault(f"line {line}: shared memory that another warp touches, without a barrier between")
        self.writer[at] = who


def words_of(addresses: np.ndarray, width: int, unit: int) -> np.ndarray:
    """Units of ``unit`` bytes that lanes touch."""
    starts = np.arange(0, width, min(width, unit))
    return np.unique((addresses.astype(np.int64)[:, None] + starts) // unit)


def passes_of(addresses: np.ndarray, width: int) -> int:
    """Passes of shared memory: lanes go together as far as their bytes fill all banks."""
    together, count = max(1, BANKS * WORD // max(width, WORD)), 0
    for first in range(0, len(addresses), together):
        words = words_of(addresses[first : first + together], width, WORD)
        count += int(np.bincount(words % BANKS).max())
    return count
