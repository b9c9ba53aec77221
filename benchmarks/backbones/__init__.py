"""Whole backbones with DSTS and without: made, timed in turn, their memory."""
