"""What the install built for this Python: the native module, or why there is none, for reports and for a warning.

``setup.py`` leaves a record beside the module, named after the Python that it was built for as the module is.
"""

from __future__ import annotations

import functools
import importlib
import json
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING

import torch  # noqa: F401  the native module runs on the OpenMP threads of torch, which must have been loaded before

if TYPE_CHECKING:  # as _C.pyi says it
    from .. import _C

    _IMPORT_ERROR: str | None
else:
    try:  # beside this package, whatever that is called: a loader of kernels gives it a name of its own
        _C = importlib.import_module("._C", __package__.rpartition(".")[0])
        _IMPORT_ERROR = None
    except ImportError as error:
        _C, _IMPORT_ERROR = None, str(error)

RECORD = Path(__file__).parents[1] / Path(f"_build{EXTENSION_SUFFIXES[0]}").with_suffix(".json").name
UNIVERSAL = RECORD.with_name("_build.json")  # of files that are the same for every Python: hub_kernel.py writes it
NOT_WANTED = (  # as they are recorded: nothing failed, so nobody is warned
    "DSTS_BUILD=none",
    "the universal variant of a hub kernel has none",
    "there are no native kernels for ",
)


@functools.cache
def build_record() -> tuple[str, str]:
    """What the install built, and why nothing more: ``("cuda", "cpu" or "none", reason)``."""
    try:
        record = json.loads((RECORD if RECORD.exists() or not UNIVERSAL.exists() else UNIVERSAL).read_text("utf-8"))
        return record["build"], record["reason"]
    except FileNotFoundError:
        if _C is not None:
            return "cpu" if _C.build_info()["cuda"] is None else "cuda", "its install left no record"
        return "none", "the package was not installed by its setup.py for this Python, so nothing was built"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return "none", f"the record of the install, {RECORD}, cannot be read ({error}); install again"


def why_no_module() -> str | None:
    """Why there is no native module: not built, or built and not to be loaded; ``None`` where there is one."""
    if _C is not None:
        return None
    built, reason = build_record()
    if built == "none":
        return f"the native module is not built ({reason})"
    kernels = "CPU and CUDA" if built == "cuda" else "CPU"
    return f"the native module was built, with {kernels} kernels, but does not load ({_IMPORT_ERROR})"


def warn_if_missing() -> None:
    """One line on import where a native build was wanted and is not there: pip shows nothing of one that fails."""
    if (why := why_no_module()) is not None and not build_record()[1].startswith(NOT_WANTED):
        warnings.warn(
            f"dsts_kernels runs without its native kernels, through plain PyTorch: {why}. "
            "'python -m dsts_kernels info' says more; DSTS_BUILD=none at install silences this. pip keeps wheels that "
            "it built: install again with --no-cache-dir --force-reinstall --no-deps.",
            RuntimeWarning,
            stacklevel=2,
        )


def build_details() -> dict[str, str]:
    """The native build for a report: kind, compiler, instruction sets; or the reason why there is none."""
    built, reason = build_record()
    if _C is None:
        return {"native build": f"none: {why_no_module()}"}
    facts = _C.build_info()
    return {
        "native build": f"{built}, {facts['compiler']} {facts['version']}, OpenMP {'yes' if facts['openmp'] else 'no'}",
        "CUDA kernels": _cuda_details(facts["cuda"], reason),
        "instructions": f"{_C.get_isa()} in use, this machine supports {', '.join(_C.supported_isas())}",
    }


def _cuda_details(facts: dict | None, reason: str) -> str:
    if facts is None:
        return f"none: {reason}"
    return f"nvcc {facts['version']}, for compute capability {', '.join(f'{t / 10:.1f}' for t in facts['targets'])}"
