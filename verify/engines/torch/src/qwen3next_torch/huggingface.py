"""Qwen3-Next of Hugging Face transformers on these operators: with `huggingface.kernels():` the delta rule, the causal
convolution and the gated norm of every Qwen3NextForCausalLM are ours. Parameters and activations are float32 on the CPU."""

import contextlib

import torch
from transformers.models.qwen3_next import modeling_qwen3_next as modeling

from . import ops


def _delta(query, key, value, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
           cu_seqlens=None, **_):  # fmt: skip
    # Theirs is [N, HV, K, V]. Ours has K last; seen through a transposed view it costs no copy on the next token.
    state = None if initial_state is None else initial_state.transpose(-1, -2)
    o, state = ops.gated_delta(
        query, key, value, g, beta, state, query.shape[-1] ** -0.5, use_qk_l2norm_in_kernel, 1e-6,
        None if cu_seqlens is None else cu_seqlens.to(torch.int64),
    )  # fmt: skip
    return o, state.transpose(-1, -2) if output_final_state else None


def _conv(hidden_states, weight, bias=None, activation=None, **_):
    x = hidden_states.transpose(1, 2)
    if x.stride(-1) != 1:
        x = x.contiguous()
    return ops.causal_conv(x, weight, bias, None, activation is not None)[0].transpose(1, 2)


def _conv_update(hidden_states, conv_state, weight, bias=None, activation=None):
    # Their window has W columns, of which the convolution reads the last W - 1.
    conv_state[:, :, 0] = conv_state[:, :, 1]
    window = conv_state[:, :, 1:]
    x = hidden_states.transpose(1, 2)
    if x.stride(-1) != 1:
        x = x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    ops.causal_conv_out(x, weight, bias, window, y, window, activation is not None)
    return y.transpose(1, 2)


def _gated_norm(self, hidden_states, gate):
    shape = hidden_states.shape
    rows = hidden_states.reshape(-1, 1, shape[-1])
    return ops.norm(rows, self.weight, gate.reshape(rows.shape), "rms_gated", self.variance_epsilon).reshape(shape)


@contextlib.contextmanager
def kernels():
    """Replaces what transformers calls, and puts it back."""
    ours = [
        (modeling, "torch_chunk_gated_delta_rule", _delta),
        (modeling, "torch_recurrent_gated_delta_rule", _delta),
        (modeling, "causal_conv1d_fn", _conv),
        (modeling, "causal_conv1d_update", _conv_update),
        (modeling.Qwen3NextRMSNormGated, "forward", _gated_norm),
    ]
    theirs = [(where, name, getattr(where, name)) for where, name, _ in ours]
    try:
        for where, name, function in ours:
            setattr(where, name, function)
        yield
    finally:
        for where, name, function in theirs:
            setattr(where, name, function)
