"""The package as the `kernels` library of Hugging Face loads it: ``python hub_kernel.py FOLDER``.

It writes ``FOLDER/build/torch-universal``: the Python files, Triton kernels among them, and ``metadata.json``. The
variant is for every torch, device and Python, and has no native module: CUDA tensors run through Triton (compute
capability 8.0 and later), all else through plain PyTorch. ``kernels.get_local_kernel(Path(FOLDER))`` loads it; the
folder as it is can be uploaded as a repository of kernels.

The loader imports ``__init__.py`` under a name of its own, so that several versions can live in one process: nothing
here imports the package by name, and the ops are registered under the name that it was given.
"""

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "dsts_kernels"
VARIANT = "torch-universal"
LEFT_OUT = ("__pycache__", "*.so", "*.pyd", "_build.*", "_C.pyi", "__main__.py", "cli.py")
REASON = "the universal variant of a hub kernel has none"  # as dsts_kernels.backends.build knows it
PAPER = "https://arxiv.org/abs/2209.01425"
CARD = f"""---
library_name: kernels
license: apache-2.0
tags: [kernels, video, action-recognition]
---

# dsts-kernels

Fused kernels for the DSTS module of [Dynamic Spatio-Temporal Specialization Learning]({PAPER}) (ECCV 2022). This
variant runs Triton on CUDA GPUs of compute capability 8.0 and later, and plain PyTorch elsewhere; the package on PyPI
has native kernels for CPUs and older GPUs, too.

```python
import torch
from kernels import get_kernel

dsts_kernels = get_kernel("OWNER/dsts-kernels", version={{version}})
dsts = dsts_kernels.FusedDSTS(in_channels=64, num_layers=1, num_neurons=4)
features = torch.randn(2, 64, 8, 14, 14)
y = dsts(features)
```
"""


def version() -> str:
    """The package's, read from its text."""
    return re.search(r'^__version__ = "([^"]+)"', (PACKAGE / "__init__.py").read_text(encoding="utf-8"), re.M)[1]


def write(folder: Path, number: int = 1) -> Path:
    """Write the variant; its folder.

    Args:
        folder: of the repository; a variant that is there is replaced.
        number: the version of the kernel, which the hub counts in whole numbers: a new one for each break.
    """
    target = folder / "build" / VARIANT
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (target / "_build.json").write_text(json.dumps({"build": "none", "reason": REASON}) + "\n", encoding="utf-8")
    content = hashlib.sha256()
    for path in sorted(target.rglob("*.py")):
        content.update(path.relative_to(target).as_posix().encode() + b"\0" + path.read_bytes())
    metadata = {
        "id": f"_dsts_kernels_{content.hexdigest()[:12]}",  # one name for each content
        "name": "dsts-kernels",
        "version": number,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (target / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(CARD.replace("{version}", str(number)), encoding="utf-8")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(prog="python hub_kernel.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--number", type=int, default=1, help="version of the kernel, a whole number (1)")
    given = parser.parse_args()
    print(f"{write(given.folder, given.number)}: dsts_kernels {version()}")


if __name__ == "__main__":
    main()
