"""Which backend was measured faster, by size: what ``python -m benchmarks.gpu.sweep --rules`` wrote on such a chip.

``measured.json`` holds, by architecture (``sm_90``), the device and versions, and rules: for these ops, this kind of
dtype, these channels and numbers of positions another backend is faster than the first that can run, plain PyTorch or
the other GPU backend. Where nothing was measured, or no rule holds, the order of
:data:`dsts_kernels.backends.BACKENDS` decides.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .dtypes import DTYPES
from .switches import current

FILE = Path(__file__).with_name("measured.json")
# A frozen module is packed for a backend before it knows what it will be given, so only channels may decide.
BY_CHANNELS = ("frozen_layer",)
SWEEP = "python -m benchmarks.gpu.sweep"


class Rule(NamedTuple):
    """Where ``backend`` was faster; both ends of a range belong to it."""

    ops: tuple[str, ...]
    kind: str  # half or float
    backend: str
    channels: tuple[int, int]  # of the features
    positions: tuple[int, int] | None  # B*T*H*W of the features; None: any number

    def holds(self, size: Sequence[int]) -> bool:
        """For features of ``size (B, C, T, H, W)``."""
        if not self.channels[0] <= size[1] <= self.channels[1]:
            return False
        if self.positions is None:
            return True
        count = size[0]
        for side in size[2:]:
            count *= side
        return self.positions[0] <= count <= self.positions[1]

    def __str__(self) -> str:
        text = f"{self.backend!r} from {self.channels[0]} to {self.channels[1]} channels"
        return text if self.positions is None else f"{text}, {self.positions[0]} to {self.positions[1]} positions"


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def read(text: str) -> dict[str, tuple[Rule, ...]]:
    """Rules by architecture.

    Raises:
        ValueError: a rule about positions for an op that is chosen before they are known.
    """
    table = {}
    for architecture, record in json.loads(text).items():
        rules = []
        for rule in record["rules"]:
            positions = rule["positions"]
            ranges = tuple(rule["channels"]), None if positions is None else tuple(positions)
            rules.append(Rule(tuple(rule["ops"]), rule["kind"], rule["backend"], *ranges))
            if positions is not None and set(rule["ops"]) & set(BY_CHANNELS):
                raise ValueError(
                    f"{architecture}: got a rule about positions for {BY_CHANNELS[0]}, wanted null: {rule}"
                )
        table[architecture] = tuple(rules)
    return table


@functools.cache
def table() -> dict[str, tuple[Rule, ...]]:
    """The rules that ship."""
    return read(FILE.read_text(encoding="utf-8"))


@functools.cache  # every op asks
def rules(op: str, device: torch.device, dtype: torch.dtype) -> tuple[Rule, ...] | None:
    """Those of an op on a device like this; ``None`` where such a chip was not measured."""
    major, minor = capability(device)
    found = table().get(f"sm_{major}{minor}")
    return None if found is None else tuple(r for r in found if op in r.ops and r.kind == DTYPES[dtype].kind)


def winner(op: str, device: torch.device, dtype: torch.dtype, size: Sequence[int] | None) -> str | None:
    """The backend that was measured faster for ``op`` on features of ``size (B, C, T, H, W)``; ``None``: no other."""
    if device.type != "cuda" or size is None or not current().plain_where_faster:
        return None
    for rule in rules(op, device, dtype) or ():
        if rule.holds(size):
            return rule.backend
    return None


def describe(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What was measured of ``op`` on such a chip, in words; ``None`` for a device that is no GPU."""
    if device.type != "cuda":
        return None
    if not current().plain_where_faster:
        return "not asked: switched off"
    if not table():
        return f"no GPU was measured yet ({SWEEP}), so the first that can run does"
    if dtype not in DTYPES or not torch.cuda.is_available():
        return f"measured on {', '.join(table())}"
    found = rules(op, device, dtype)
    if found is None:
        return f"this chip was not measured ({SWEEP}), so the first that can run does"
    return "; ".join(map(str, found)) or "no other was measured faster, so the first that can run does"
