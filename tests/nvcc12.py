"""Stands in for an nvcc of CUDA 12 that compiles for sm_70 alone: ``python -m tests.nvcc12 ARGUMENTS``.

No package index has a whole one: NVIDIA's package of CUDA 12 holds ptxas without nvcc. This one takes the host's side
from an nvcc of CUDA 13, told of sm_75, and puts kernels of our sources, as NVRTC and ptxas of CUDA 12.9 compile them
for sm_70, in the place of those of sm_75. So CMakeLists.txt meets a compiler whose list has sm_70, and the module that
comes of it has code for it. Its CUDA runtime is that of CUDA 13: it is for tests of the build, and for no V100.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.compiled import cuda_compilers

ASSIGNED = re.compile(r"#\$ (\w+)=(.*)")


def own_source(arguments: list[str]) -> Path | None:
    """The source of ours that is compiled, and not only preprocessed; one elsewhere with the same text is the same."""
    named = [Path(argument) for argument in arguments if argument.endswith(".cu")]
    if "-c" not in arguments or len(named) != 1:
        return None
    same = [source for source in cuda_compilers.SOURCES if source.name == named[0].name]
    return same[0] if same and same[0].read_bytes() == named[0].read_bytes() else None


def with_cubin(script: list[str], cubin: Path) -> str:
    """What nvcc would run, as a shell script whose fat binary holds ``cubin``; ptxas has nothing to do."""
    lines = ["set -e"]
    for line in script:
        assigned = ASSIGNED.fullmatch(line)
        if assigned:
            quoted = assigned[2].replace("'", "'\\''")
            lines.append(f"export {assigned[1]}='{quoted}'")
            continue
        command = line.removeprefix("#$ ")
        program = command.split()[0].strip('"')
        if Path(program).name in ("ptxas", "rm", "--"):
            continue
        if program == "fatbinary":
            command = re.sub(r'"--image3=kind=ptx,[^"]*"', "", command)
            command = re.sub(r'"--image3=kind=elf,[^"]*"', f'"--image3=kind=elf,sm=70,file={cubin}"', command)
        lines.append(command)
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if "--list-gpu-code" in arguments:
        print("sm_70")
        return 0
    real = cuda_compilers.nvcc()
    assert real is not None
    told = [argument.replace("compute_70", "compute_75").replace("sm_70", "sm_75") for argument in arguments]
    source = own_source(arguments)
    if source is None:
        return subprocess.run([real, *told]).returncode
    if "-MF" in told:  # a build that is thrown away needs no dependencies
        Path(told[told.index("-MF") + 1]).write_text("")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TMPDIR": folder}
        # The device's code of sm_75 is thrown away, and so not optimised.
        dry = [real, "--dryrun", "-Xcicc", "-O0", *told]
        done = subprocess.run(dry, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.stderr.write(done.stderr)
            return done.returncode
        script = with_cubin(done.stderr.splitlines(), cuda_compilers.compile_source(source, 70).cubin)
        return subprocess.run(["bash", "-c", script], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
