"""Mistakes that are put into a kernel's source."""

from __future__ import annotations

from dataclasses import dataclass, field

from .packed import FOLDER

WRONG = AssertionError
SEEDS = 20  # orders in which a mistake is looked for; most show in the first
SHARED = ("ring.py", "epilogue.py")


@dataclass(frozen=True)
class Mistake:
    """Text of the kernel and what stands in its place, how that shows, and in which problem."""

    right: str
    wrong: str
    shows: type[Exception]
    case: dict[str, object] = field(default_factory=dict)


def broken(mistake: Mistake, file: str) -> dict[str, str]:
    """The source that it is in, by file, with it: the kernel's ``file`` or one that kernels share."""
    texts = {name: (FOLDER / name).read_text() for name in (file, *SHARED)}
    found = [name for name, text in texts.items() for _ in range(text.count(mistake.right))]
    assert len(found) == 1, f"{mistake.right!r} is in {found}"
    return {found[0]: texts[found[0]].replace(mistake.right, mistake.wrong)}
