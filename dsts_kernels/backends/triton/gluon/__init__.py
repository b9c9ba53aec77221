"""Kernels in Gluon, Triton's language below Triton, where memory of a CTA, copies and barriers are the kernel's own.

:mod:`.plan` says where they run and with which tiles, and imports no triton; :mod:`.conv` is a frozen layer's packed
convolution on Hopper, :mod:`.data_gradient` and :mod:`.weight_gradient` are those of training. :mod:`.ring` is the way
of their operands, :mod:`.epilogue` how a convolution's tile ends. ``tests/gluon`` runs them on a CPU.
"""
