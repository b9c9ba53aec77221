"""The CUDA kernels under sanitizers: nothing to report of them as they are, and a report where a barrier is left out.

AddressSanitizer and UndefinedBehaviorSanitizer see the kernels of sm_80 and the half products of sm_75, ThreadSanitizer
those of sm_70; with all tests, marked exhaustive, it is the other way round. Each takes a process of its own, started
with the library of the sanitizer.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.emulator import build

from ...support.targets import INTERPRETED
from . import barriers

SUITE = ["tests/ops", "tests/test_modules.py", "tests/test_frozen.py", "tests/backends/gpu"]
TILES = "tests/backends/cuda/test_tiles.py"
# Every kernel and every branch of it, once.
CHOSEN = (
    "(test_gates and mixed) or (test_layouts and strided) or test_group_samples or (test_list_channels and 1100 and "
    "mixed) or (test_filters_there_and_back and 70) or (test_mixing and 33) or (test_tap_sums and 70) or "
    "(test_training and default) or (test_frozen and (default or no-skip or mixing-3x1x1)) or "
    "(test_semhash and test_strided) or test_more_samples_than_ctas or test_ctas_without_work"
)
LARGE = "or (test_data_gradient and listed) or test_tf32"  # ThreadSanitizer takes long for these
pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(INTERPRETED or build.unavailable() is not None, reason=str(build.unavailable())),
]


def run(flavour: str, arch: int, *command: str, timeout: float) -> tuple[int, str]:
    """Exit status, 66 after a report, and what was said."""
    build.build(flavour, arch)
    variables = {**os.environ, **build.environment(flavour), "DSTS_EMULATED": f"{flavour}-{arch}"}
    if flavour == "thread":
        variables["TSAN_OPTIONS"] += ":die_after_fork=0"  # the sweep's children start threads
    done = subprocess.run(
        [sys.executable, *command], cwd=build.ROOT, env=variables, capture_output=True, text=True, timeout=timeout
    )
    return done.returncode, done.stdout + done.stderr


def passes(flavour: str, arch: int, suite: list[str], *options: str) -> None:
    code, said = run(flavour, arch, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suite, *options, timeout=1800)
    assert code == 0 and " passed" in said, said[-6000:]


@pytest.mark.parametrize("flavour, arch", [("address", 800), ("address", 750), ("thread", 700)])
def test_nothing_to_report(flavour, arch):
    wanted = CHOSEN if flavour == "thread" else f"{CHOSEN} {LARGE}"
    passes(flavour, arch, [*SUITE, TILES], "-m", "emulated", "-k", f"({wanted}) and float16" if arch == 750 else wanted)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("flavour, arch", [("address", 700), ("thread", 800)])
def test_nothing_to_report_in_all_tests(flavour, arch):
    passes(flavour, arch, SUITE, "-m", "emulated")  # those of many tiles take too long: the ones chosen must do


@pytest.mark.slow
def test_wmma_for_simulators():
    """The loop that simulators of sm_70 get is right too."""
    passes("wmma", 700, ["tests/ops"], "-m", "emulated")


def swept(arch: int, *sites: str) -> dict[str, str]:
    """Outcome by site of the sweep in :mod:`.barriers`, which passes where nothing is left out."""
    code, said = run("thread", arch, "-m", "tests.backends.cuda.barriers", *sites, timeout=1800)
    assert code == 0, said
    found = [line.split(" ", 1) for line in said.splitlines() if line.startswith("nothing ") or "-" in line.split()[0]]
    untouched = [outcome for name, outcome in found if name == "nothing"]
    assert len(untouched) > 10 and all(outcome.startswith("unnoticed") for outcome in untouched), said
    return {name: outcome.split()[0] for name, outcome in found if name != "nothing"}


@pytest.mark.parametrize(
    "arch, sites",
    [
        (750, ["turing.accumulate-1", "turing.accumulate-4", "turing.accumulate-5"]),
        (800, ["product.accumulate-2", "turing.accumulate-1", "turing.accumulate-2", "turing.accumulate-3"]),
    ],
    ids=["750", "800"],
)
def test_a_barrier_left_out_is_noticed(arch, sites):
    """Those that products of later chips have; with nothing left out there is nothing to report."""
    outcomes = swept(arch, *sites)
    assert set(outcomes) == set(sites)
    assert [name for name, outcome in outcomes.items() if outcome in ("unnoticed", "hung")] == []


@pytest.mark.slow
def test_every_barrier_left_out_is_noticed():
    """All that the kernels of sm_70 have, which most share with later chips.

    Swept anew where a source has changed since the sweep on record; else four sites must still have the outcomes there.
    """
    outcomes = barriers.recorded()
    if outcomes is None:
        outcomes = swept(700)
    else:
        few = sorted(outcomes)[:: max(1, len(outcomes) // 4)]
        again = swept(700, *few)
        assert set(again) == set(few) and set(again.values()).isdisjoint({"unnoticed", "hung"})
    assert len(outcomes) > 40
    assert [name for name, outcome in outcomes.items() if outcome in ("unnoticed", "hung")] == []
