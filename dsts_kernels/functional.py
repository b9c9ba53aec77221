"""The ops as functions: gates, relevance scores and gated convolution, differentiable, on every backend."""

from .ops import gated_conv3d, relevance_scores, saturating_sigmoid, semhash_gate

__all__ = ["gated_conv3d", "relevance_scores", "saturating_sigmoid", "semhash_gate"]
