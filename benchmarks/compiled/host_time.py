"""What a call costs on the host, without a GPU: everything but the driver, whose calls return at once.

    python -m benchmarks.compiled.host_time                       # this tree
    python -m benchmarks.compiled.host_time train --base OTHER     # in turns with another checkout

The real module, ops and Triton backend run on CPU tensors; kernels are compiled for sm_90 and launched into a stand-in
for ``libcuda`` (``libcuda.c``, built by the C compiler). CPU time is taken, so that other processes count little.
torch's own kernels run on the CPU here, at sizes at which they are mostly their call. It is no time of a GPU's host.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

STEPS = ("frozen", "evaluation", "training")
CHANNELS, SIZE, BATCH, LAYERS, NEURONS = 16, (2, 4, 4), 8, 3, 10
CALLS, FIRST = 40, 20  # of a turn, and before the first
BUILD = Path(__file__).parents[2] / "build" / "host_time"


def build() -> Path:
    """The folder with the stand-in, built where it is not there yet."""
    BUILD.mkdir(parents=True, exist_ok=True)
    library = BUILD / "libcuda.so.1"
    if not library.exists():
        source = Path(__file__).with_name("libcuda.c")
        flags = ["-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", library, source], check=True)
    link = BUILD / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to(library.name)
    return BUILD


def stand_in() -> ctypes.CDLL:
    """Makes CPU tensors take the way of a GPU's, into the stand-in; for the whole process."""
    library = ctypes.CDLL(str(BUILD / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)  # before Triton looks for it
    import torch
    import triton.backends.nvidia.driver as nvidia
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from dsts_kernels import backends
    from dsts_kernels.backends.triton import TritonBackend, load

    torch.set_num_threads(1)

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_stream = lambda device: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    load("launch").chip = functools.cache(lambda device: ("sm_90", 132))
    TritonBackend.missing = lambda self: None
    TritonBackend.why_not = lambda self, op, device, dtype: None
    for name in ("cpu", "eager"):
        backends.BACKENDS.pop(name, None)
    return library


def step_of(name: str) -> Callable[[], object]:
    """A call of the module, in bfloat16, with draws given."""
    import torch

    from dsts_kernels import FusedDSTS
    from dsts_kernels.routing import sample_draws

    torch.manual_seed(0)
    module = FusedDSTS(CHANNELS, num_layers=LAYERS, num_neurons=NEURONS).bfloat16()
    x = torch.randn(BATCH, CHANNELS, *SIZE).bfloat16()
    if name == "training":
        draws, grad = sample_draws(BATCH, CHANNELS, NEURONS, LAYERS), torch.randn_like(x)
        x.requires_grad_()

        def train() -> None:
            module.zero_grad(set_to_none=True)
            x.grad = None
            module(x, draws=draws).backward(grad)

        return train
    module.eval()
    return torch.inference_mode()(functools.partial(module.freeze() if name == "frozen" else module, x))


def serve(name: str) -> None:
    """A turn for each line that comes: the 10th percentile of its calls' CPU time in us."""
    library, step = stand_in(), step_of(name)
    for _ in range(FIRST):
        step()
    library.stand_in_launches()
    step()
    print(library.stand_in_launches(), flush=True)
    for _ in sys.stdin:
        found = []
        for _ in range(CALLS):
            before = time.process_time_ns()
            step()
            found.append((time.process_time_ns() - before) / 1000)
        print(sorted(found)[CALLS // 10], flush=True)


def start(name: str, tree: Path) -> subprocess.Popen:
    """A process of ``tree``'s package."""
    folder = build()
    environment = {
        **os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"), "DSTS_BACKEND": "",
    }  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", __file__, name, "--serve"]
    return subprocess.Popen(
        command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def launches_of(process: subprocess.Popen) -> int:
    """What a process says when it is ready."""
    if not (line := process.stdout.readline()):
        raise SystemExit("host_time: a process ended before its first turn; what it said stands above")
    return int(line)


def turns(name: str, trees: Sequence[Path], rounds: int) -> tuple[list[int], list[list[float]]]:
    """Launches of a call, and us by turn, of each tree; who is first changes from round to round."""
    processes = [start(name, tree) for tree in trees]
    try:
        launches = [launches_of(process) for process in processes]
        found: list[list[float]] = [[] for _ in trees]
        for i in range(rounds):
            for at in sorted(range(len(trees)), reverse=bool(i % 2)):
                processes[at].stdin.write("\n")
                processes[at].stdin.flush()
                found[at].append(float(processes[at].stdout.readline()))
        return launches, found
    finally:
        for process in processes:
            process.kill()
            process.wait()


def report(name: str, launches: Sequence[int], found: Sequence[Sequence[float]]) -> str:
    now = f"{name}: {min(found[-1]):.0f} us, {launches[-1]} launches"
    if len(found) == 1:
        return now
    ratios = sorted(b / a for a, b in zip(*found, strict=True))
    return (
        f"{now}; before {min(found[0]):.0f} us, {launches[0]} launches; ratio {min(found[1]) / min(found[0]):.2f}, "
        f"by the turn {ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.host_time", description=__doc__.split("\n")[0])
    parser.add_argument("steps", nargs="*", help=f"of {', '.join(STEPS)}; all if none is named")
    parser.add_argument("--base", type=Path, help="another checkout, to take turns with")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if wrong := [name for name in given.steps if name not in STEPS]:
        parser.error(f"steps: got {wrong[0]!r}, wanted one of {', '.join(STEPS)}")
    if given.base is not None and not (given.base / "dsts_kernels").is_dir():
        parser.error(f"--base: got {str(given.base)!r}, wanted a checkout of the project")
    if given.serve:
        return serve(given.steps[0])
    trees = [*([] if given.base is None else [given.base.resolve()]), Path(__file__).parents[2]]
    print("host time by a stand-in for the driver: CPU time, no GPU")
    for name in given.steps or STEPS:
        print(report(name, *turns(name, trees, given.rounds)), flush=True)


if __name__ == "__main__":
    main()
