"""Kernels compiled ahead of time, for chips that are not here, and what compilers made of them."""
