"""Runs as a test's process starts, where its ``PYTHONPATH`` leads here: see ``torchvision_ops.for_processes``."""

from tests.support.torchvision_ops import torchvision

torchvision()
