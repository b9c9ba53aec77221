"""Shared by all tests: fresh seeds that can be repeated, where a test runs as a parameter, poisoned memory."""

from __future__ import annotations

import contextlib
import importlib.util
import random
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from dsts_kernels import backends
from dsts_kernels.backends.build import build_record
from dsts_kernels.testing import exact_float32, poisoned_memory

from .support import interpreter as triton_interpreter
from .support import torchvision_ops, units
from .support.emulation import build, compiled, run_in_any_order
from .support.targets import CUDA, INTERPRETED, KINDS, NO_GPU, Target, is_left_out, target_of

ABSENT = pytest.StashKey[set[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="repeat a run; by default inputs are fresh")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--seed") is None:
        config.option.seed = random.SystemRandom().randrange(2**31)


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"inputs: --seed {config.getoption('--seed')}; backends: {', '.join(backends.available())}"]
    if INTERPRETED:
        lines.append("TRITON_INTERPRET=1: only tests whose kernels run in Triton's interpreter")
    elif not torch.cuda.is_available():
        lines.append("no GPU: tests marked gpu are left out")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``target``, ``gpu_target`` and ``stand_in`` take turns, each with the marks it comes with."""
    for kind, targets in KINDS.items():
        if kind in metafunc.fixturenames:
            params = [pytest.param(target, id=target.name, marks=target.marks) for target in targets]
            metafunc.parametrize(kind, params, indirect=True)


def absent_packages(item: pytest.Item) -> set[str]:
    """Those that the test needs and that are not installed."""
    needed = {name for mark in item.iter_markers("needs") for name in mark.args}
    return {name for name in needed if importlib.util.find_spec(name) is None}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what a target has not, what is not interpreted where Triton interprets, GPU tests without a GPU, and
    what needs a package of another extra, ``pytest.mark.needs(module, ...)``; those are named at the end.

    Raises:
        pytest.UsageError: tests were asked for that all need a GPU, and there is none.
    """
    absent = {item: absent_packages(item) for item in items}
    config.stash[ABSENT] = set().union(*absent.values())
    kept = [item for item in items if not absent[item] and not is_left_out(item)]
    if INTERPRETED:
        kept = [item for item in kept if target_of(item) or "interpreter" in item.fixturenames]
    elif not torch.cuda.is_available():
        on_cpu = [item for item in kept if item.get_closest_marker("gpu") is None]
        if kept and not on_cpu and not config.option.collectonly:
            raise pytest.UsageError(f"{NO_GPU}, and all {len(kept)} tests asked for need one")
        kept = on_cpu or kept
    left = set(items) - set(kept)
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = kept


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Gives tests the names with their groups, by which pytest-xdist 3.8 sends a group to one process: it writes them
    to ``_nodeid``, which pytest 9.2 no longer reads."""
    for item in session.items:
        named = item.__dict__.get("_nodeid", item.nodeid)
        if named != item.nodeid:
            item._id = type(item.id).parse(named)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.config.getoption("--seed"))


@pytest.fixture(scope="module", autouse=True)
def memory_goes_back() -> Iterator[None]:
    """Files that run in processes of their own share one GPU."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision, whose models import beside any torch; what imports it (timm, transformers) comes after this."""
    return torchvision_ops.torchvision()


@pytest.fixture
def poison():
    """Uninitialised memory is NaN."""
    with poisoned_memory():
        yield


def require(backend: str) -> None:
    """Skips where the install says that the backend was not built; fails where it should be there."""
    reason = backends.BACKENDS[backend].missing()
    if reason is not None:
        assert build_record()[0] == "none", reason
        pytest.skip(reason)


# For what only the host does: counting products, finite differences, threads. All else takes a target.
@pytest.fixture(params=[name for name in backends.BACKENDS if name not in ("triton", "cuda")])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of CPU tensors in turn."""
    require(request.param)
    return request.param


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch, poison: None) -> Iterator[None]:
    """Triton's interpreter, quicker than it comes, with uninitialised memory of NaN."""
    with triton_interpreter.quick(monkeypatch):
        yield


def run_on(target: Target, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """Makes the target what it says for one test, or skips with its own reason."""
    if not target.stand_in and target.device != CUDA:
        require(target.backend)
    elif target.stand_in and INTERPRETED:
        from .support import stand_ins  # noqa: F401 - skips without a triton that serves

        request.getfixturevalue("interpreter")
    elif target.stand_in:
        from .support.stand_ins import BACKEND

        if (reason := build.unavailable()) is not None:
            pytest.skip(reason)
        request.getfixturevalue("poison")
        BACKEND.emulate(target.arch, monkeypatch)
    reason = target.why_not(request.node.callspec.params.get("dtype", target.dtype))
    if reason is not None:
        pytest.skip(f"{target.name}: {reason}")
    forced = contextlib.nullcontext()
    if target.units:
        units.pretend(monkeypatch)
        forced = backends.use_algorithm("direct")
    with exact_float32(), forced:
        yield target
    if target.arch:
        compiled(target.arch).emulator.reset()


@pytest.fixture
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """Every target in turn: see :mod:`tests.support.targets`."""
    yield from run_on(request.param, request, monkeypatch)


@pytest.fixture
def gpu_target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """Every target with GPU kernels in turn."""
    yield from run_on(request.param, request, monkeypatch)


@pytest.fixture
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """Everything that stands in for a GPU in turn: emulated kernels by architecture, or Triton's interpreter."""
    yield from run_on(request.param, request, monkeypatch)


@pytest.fixture
def in_any_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """``in_any_order()``: from now on the blocks of a stand-in's launch run in an order drawn at random."""
    target = target_of(request.node)
    if INTERPRETED:
        return lambda: triton_interpreter.shuffle(monkeypatch)
    if target is None or not target.arch:
        return lambda: None  # a GPU has no other order, and a CPU none
    return lambda: run_in_any_order(target.arch)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if absent := config.stash.get(ABSENT, set()):
        names = ", ".join(sorted(absent))
        terminalreporter.write_line(
            f"left out: tests that need {names} (extras train, bench, backbones, examples and deploy)"
        )
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"repeat these inputs with --seed {config.getoption('--seed')}")
