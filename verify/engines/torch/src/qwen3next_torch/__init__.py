"""Qwen3-Next's operators as PyTorch operators: torch.ops.q3n.gated_delta, .causal_conv, .norm, and their out forms."""

from . import native, ops
from .ops import causal_conv, gated_delta, norm

__all__ = ["causal_conv", "gated_delta", "native", "norm", "ops"]
