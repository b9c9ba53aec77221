"""Runs Gluon kernels for Hopper on a CPU, from their own source, to see what a GPU would not say.

    kernels = load(path)                                   # a file's jitted functions, and those that it imports
    out = Memory(array, "bfloat16")                        # device memory
    launch(kernels["conv_gluon_kernel"], 3, out, seed=1)   # three programs, in an order that the seed draws

Every partition of ``warp_specialize`` of every program is a thread; one runs at a time. Whenever one reaches a barrier,
a copy, a product or an atomic, who goes on is drawn, at speeds that the seed chooses. What the hardware does by itself
is drawn among them: a copy lands at any time after its issue, and a product reads its operands at any time up to the
wait that covers it. Where a GPU would hang, race or go astray there is a :class:`.faults.Fault` that names the barrier,
the line of the kernel and the phase.

:mod:`.values`   scalars, tensors in registers, device memory: integers may not overflow, division truncates, half types
                 are float32 rounded to them, accesses stay within their memory
:mod:`.machine`  threads, who goes on, deadlocks; what is stored, others see after a barrier and an atomic
:mod:`.hopper`   barriers with phases, arrivals and bytes; TMA boxes; shared memory that is there or not; ``wgmma``
:mod:`.language` the names that kernels use, and how a file is read
:mod:`.packed`   problems for the packed convolution, and what must come out, in float64

Not seen: layouts, single warps and lanes (a partition is one thread), the fences between a thread's accesses and a
copy's, clusters, TMA stores. ``tests/backends/triton/test_ahead_gluon.py`` looks at those in compiled code, in part.
"""
