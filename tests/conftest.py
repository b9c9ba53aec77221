"""Shared by all tests: fresh seeds that can be repeated, backends as a parameter, poisoned memory."""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch

from dsts_kernels import backends
from dsts_kernels.backends.build import build_record
from dsts_kernels.backends.triton import unusable
from dsts_kernels.testing import poisoned_memory

ABSENT = pytest.StashKey[set[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="repeat a run; by default inputs are fresh")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--seed") is None:
        config.option.seed = random.SystemRandom().randrange(2**31)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what needs a package of another extra, ``pytest.mark.needs(module, ...)``, and says so at the end."""
    kept, left_out = [], []
    for item in items:
        modules = {name for mark in item.iter_markers("needs") for name in mark.args}
        absent = {name for name in modules if importlib.util.find_spec(name) is None}
        (left_out if absent else kept).append(item)
        config.stash.setdefault(ABSENT, set()).update(absent)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_report_header(config: pytest.Config) -> str:
    return f"inputs: --seed {config.getoption('--seed')}; backends: {', '.join(backends.available())}"


def require_triton() -> None:
    """Skips where there is no triton that serves: an old torch names an old one."""
    if (reason := unusable()) is not None:
        pytest.skip(reason, allow_module_level=True)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.config.getoption("--seed"))


@pytest.fixture
def poison():
    """Uninitialised memory is NaN."""
    with poisoned_memory():
        yield


# Tests that take turns run on CPU tensors; Triton's are in backends/triton, backends/gpu and gpu.
@pytest.fixture(params=[name for name in backends.BACKENDS if name not in ("triton", "cuda")])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; one that cannot run is skipped only where the install says it was not built."""
    reason = backends.BACKENDS[request.param].missing()
    if reason is not None:
        assert build_record()[0] == "none", reason
        pytest.skip(reason)
    return request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if absent := config.stash.get(ABSENT, set()):
        terminalreporter.write_line(f"left out: tests that need {', '.join(sorted(absent))} (extras train and bench)")
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"repeat these inputs with --seed {config.getoption('--seed')}")
