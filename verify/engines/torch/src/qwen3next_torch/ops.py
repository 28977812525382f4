"""The operators. Tensors are float32, all on the CPU or all on one GPU, and are read where they lie: any strides, as long as
the last axis is contiguous. Shapes use the axes B sequences, T tokens, HK key heads, HV value heads, K and V channels of a
head, C channels, W taps. Whatever is wrong raises RuntimeError with a sentence that names the argument.

On a GPU a call is queued on torch's current stream and returns. Index arrays (cu_seqlens, slots) are checked before that,
so the CPU must read them: they lie there and are copied to the GPU, or they lie on the GPU beside a copy that the caller has
on the CPU (cu_seqlens_host, slots_host), whose values are then taken on trust to be the same. Index arrays on the GPU alone
are fetched, which waits for all work queued before. While a graph is captured they need their copies: only then nothing is
waited for, and the graph reads, at every replay, what lies on the GPU then."""

import ctypes
from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.library import custom_op

from . import native
from .native import CausalConvArgs, GatedDeltaArgs, NormArgs, run

_KINDS = {"rms": 0, "rms_plus1": 1, "rms_gated": 2, "l2": 3}
_DEVICES = ("cpu", "cuda")
# Types of q, k, v and o in CUDA kernels, as csrc/base/dtype.h numbers them.
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}


def _require(condition, op, text):
    if not condition:
        raise RuntimeError(f"q3n {op}: {text}")


def _shape(op, name, tensor, *shape):
    _require(tuple(tensor.shape) == shape, op, f"{name}: shape {list(tensor.shape)}, expected {list(shape)}")


def _device(op, name, tensor):
    """Where the call runs: where its first tensor lies."""
    _require(
        tensor.device.type == "cpu" or native.HAS_CUDA, op,
        f"{name}: lies on {tensor.device}, and this package is built without CUDA kernels: Q3N_CUDA=1 pip install",
    )  # fmt: skip
    return tensor.device


def _set(op, args, device, axes, dtype=torch.float32, **arrays):
    """Addresses and strides of arrays with these axes. The last stride is not passed on: it must be 1."""
    for name, tensor in arrays.items():
        if tensor is None:
            continue
        _require(tensor.device == device, op, f"{name}: lies on {tensor.device}, expected {device}")
        _require(tensor.dtype == dtype, op, f"{name}: {tensor.dtype}, expected {dtype}")
        last = not hasattr(args, f"{name}_{axes[-1]}")
        plain = tensor.dim() == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
        _require(not last or plain, op, f"{name}: the last axis is not contiguous")
        setattr(args, name, tensor.data_ptr())
        for axis, stride in zip(axes, tensor.stride()):
            if hasattr(args, f"{name}_{axis}"):
                setattr(args, f"{name}_{axis}", stride)


def _indices(op, device, name, tensor, host):
    """An int64 index array as the check reads it, on the CPU, and as the kernels do, on the device."""
    if tensor.device != device and tensor.device.type == "cpu":
        _require(not native.capturing(device), op, f"{name}: lies on the CPU while a graph is captured, expected {device}")
        host, tensor = tensor, tensor.to(device, non_blocking=True)
    elif host is None:
        _require(not native.capturing(device), op, f"{name}_host: is needed while a graph is captured")
        host = tensor.cpu()
    for what, x, where in ((name, tensor, device), (f"{name}_host", host, torch.device("cpu"))):
        _require(x.device == where, op, f"{what}: lies on {x.device}, expected {where}")
        _require(x.dtype == torch.int64, op, f"{what}: {x.dtype}, expected torch.int64")
        _require(x.is_contiguous(), op, f"{what}: the last axis is not contiguous")
        _shape(op, what, x, *tensor.shape)
    return host, tensor


def _sequences(op, device, b, t, cu_seqlens, cu_seqlens_host, indices):
    """The number of sequences, of which cu_seqlens packs several into one row of tokens."""
    if cu_seqlens is None:
        return b
    _require(b == 1 and cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0, op, "cu_seqlens: expected [N + 1], and B = 1")
    host, _ = indices["cu_seqlens"] = _indices(op, device, "cu_seqlens", cu_seqlens, cu_seqlens_host)
    _require(int(host[-1]) == t, op, f"cu_seqlens: ends at {int(host[-1])}, expected T = {t}")
    return host.numel() - 1


def _pool(op, args, device, n, slots, slots_host, indices, axes, shape, state_in, state_out):
    """States of n sequences, or a pool with the entries that they start from and end in."""
    states = {name: state for name, state in (("state_in", state_in), ("state_out", state_out)) if state is not None}
    args.slots = n
    if slots is not None:
        _shape(op, "slots", slots, n)
        _require(states, op, "slots: given without a pool of states")
        indices["slot_in"] = indices["slot_out"] = _indices(op, device, "slots", slots, slots_host)
        args.slots = next(iter(states.values())).shape[0]
    for name, state in states.items():
        _shape(op, name, state, args.slots, *shape)
    _set(op, args, device, "x" * (1 + len(shape)), **states)
    if len(states) == 2:
        _require(state_in.stride() == state_out.stride(), op, "state_in: strides differ from those of state_out")
    for state in states.values():
        for axis, stride in zip(axes, state.stride()):
            setattr(args, f"state_{axis}", stride)


@custom_op("q3n::gated_delta_out", mutates_args=("o", "state_out"), device_types=_DEVICES)
def gated_delta_out(
    q: Tensor, k: Tensor, v: Tensor, g: Optional[Tensor], beta: Tensor, state_in: Optional[Tensor], o: Tensor,
    state_out: Optional[Tensor], scale: float, qk_l2norm: bool = False, qk_l2norm_eps: float = 1e-6,
    cu_seqlens: Optional[Tensor] = None, variant: str = "", cu_seqlens_host: Optional[Tensor] = None,
    slots: Optional[Tensor] = None, slots_host: Optional[Tensor] = None,
) -> None:  # fmt: skip
    """gated_delta into o [B, T, HV, V] and state_out [N, HV, V, K], or None; state_out may be state_in itself. With slots,
    int64 [N], both are pools [slots, HV, V, K], and sequence n starts from and ends in entry slots[n], all different."""
    op, indices = "gated_delta", {}
    device = _device(op, "q", q)
    _require(q.dim() == 4 and v.dim() == 4, op, "q, v: expected [B, T, heads, channels]")
    (b, t, hk, kk), (hv, vv) = q.shape, v.shape[2:]
    args = GatedDeltaArgs(struct_bytes=ctypes.sizeof(GatedDeltaArgs), qk_l2norm=qk_l2norm, qk_l2norm_eps=qk_l2norm_eps,
                          scale=scale, T=t, HK=hk, HV=hv, K=kk, V=vv)  # fmt: skip
    args.B = _sequences(op, device, b, t, cu_seqlens, cu_seqlens_host, indices)
    _shape(op, "k", k, b, t, hk, kk)
    _shape(op, "v", v, b, t, hv, vv)
    _shape(op, "beta", beta, b, t, hv)
    _shape(op, "o", o, b, t, hv, vv)
    kernels = device.type == "cuda" or native.executing()
    taken = tuple(_DTYPES) if kernels else (torch.float32,)
    _require(q.dtype in taken, op, f"q: {q.dtype}, expected {' or '.join(map(str, taken))}")
    args.dtype = _DTYPES[q.dtype]
    _set(op, args, device, "bthx", q.dtype, q=q, k=k, v=v, o=o)
    _set(op, args, device, "bth", beta=beta)
    if g is not None:
        args.gate = 2 if g.dim() == 4 else 1
        _shape(op, "g", g, b, t, hv, *([kk] if g.dim() == 4 else []))
        _set(op, args, device, "bthx" if g.dim() == 4 else "bth", g=g)
    _pool(op, args, device, args.B, slots, slots_host, indices, ("slot", "h", "v"), (hv, vv, kk), state_in, state_out)
    run(op, args, device, cost=8 * b * t * hv * kk * vv, indices=indices, variant=variant)


@custom_op("q3n::gated_delta", mutates_args=(), device_types=_DEVICES)
def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Optional[Tensor], beta: Tensor, state: Optional[Tensor], scale: float,
    qk_l2norm: bool = False, qk_l2norm_eps: float = 1e-6, cu_seqlens: Optional[Tensor] = None, variant: str = "",
    cu_seqlens_host: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:  # fmt: skip
    """The gated delta rule: o [B, T, HV, V] and the state [N, HV, V, K] after the last token. On a GPU q, k and v, all
    three, may be bfloat16 or float16, and o is of their type; all else is float32.

    q, k [B, T, HK, K]; v [B, T, HV, V]; g log-decay [B, T, HV], [B, T, HV, K] or None; beta [B, T, HV] after the sigmoid;
    state [N, HV, V, K] or None for zeros. cu_seqlens int64 [N + 1] packs N sequences into one row (B = 1). Value head h
    reads key head h / (HV / HK). variant: a name of native.variants("gated_delta"), or "" for the best."""
    o, state_out = _gated_delta_like(q, v, state, cu_seqlens)
    if state is not None and state.stride() != state_out.stride():
        state = state.contiguous()
    gated_delta_out(
        q, k, v, g, beta, state, o, state_out, scale, qk_l2norm, qk_l2norm_eps, cu_seqlens, variant, cu_seqlens_host
    )
    return o, state_out


def _gated_delta_like(q, v, state, cu_seqlens):
    _require(q.dim() == 4 and v.dim() == 4, "gated_delta", "q, v: expected [B, T, heads, channels]")
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(v.shape), q.new_empty((n, v.shape[2], v.shape[3], q.shape[3]), dtype=torch.float32)


@gated_delta.register_fake
def _(q, k, v, g, beta, state, scale, qk_l2norm=False, qk_l2norm_eps=1e-6, cu_seqlens=None, variant="", cu_seqlens_host=None):
    return _gated_delta_like(q, v, state, cu_seqlens)


@custom_op("q3n::causal_conv_out", mutates_args=("y", "state_out"), device_types=_DEVICES)
def causal_conv_out(
    x: Tensor, w: Tensor, bias: Optional[Tensor], state_in: Optional[Tensor], y: Tensor, state_out: Optional[Tensor],
    silu: bool = True, cu_seqlens: Optional[Tensor] = None, variant: str = "", cu_seqlens_host: Optional[Tensor] = None,
    slots: Optional[Tensor] = None, slots_host: Optional[Tensor] = None,
) -> None:  # fmt: skip
    """causal_conv into y [B, T, C] and state_out [N, C, W - 1], or None; state_out may be state_in itself. slots as in
    gated_delta_out: pools [slots, C, W - 1]."""
    op, indices = "causal_conv", {}
    device = _device(op, "x", x)
    _require(x.dim() == 3 and w.dim() == 2, op, "x, w: expected [B, T, C] and [C, W]")
    (b, t, c), width = x.shape, w.shape[1]
    args = CausalConvArgs(struct_bytes=ctypes.sizeof(CausalConvArgs), silu=silu, T=t, C=c, width=width)
    args.B = _sequences(op, device, b, t, cu_seqlens, cu_seqlens_host, indices)
    _shape(op, "w", w, c, width)
    _shape(op, "y", y, b, t, c)
    if bias is not None:
        _shape(op, "bias", bias, c)
    _set(op, args, device, "btx", x=x, y=y)
    _set(op, args, device, "cx", w=w)
    _set(op, args, device, "x", bias=bias)
    _pool(op, args, device, args.B, slots, slots_host, indices, ("slot", "c"), (c, width - 1), state_in, state_out)
    run(op, args, device, cost=2 * b * t * c * width, indices=indices, variant=variant)


@custom_op("q3n::causal_conv", mutates_args=(), device_types=_DEVICES)
def causal_conv(
    x: Tensor, w: Tensor, bias: Optional[Tensor] = None, state: Optional[Tensor] = None, silu: bool = True,
    cu_seqlens: Optional[Tensor] = None, variant: str = "", cu_seqlens_host: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:  # fmt: skip
    """Depthwise causal convolution, then SiLU where asked for: y [B, T, C] and the window [N, C, W - 1] after the last
    token. x [B, T, C], w [C, W], bias [C]; state: the window before the first token, None for zeros."""
    y, state_out = _causal_conv_like(x, w, cu_seqlens)
    if state is not None and state.stride() != state_out.stride():
        state = state.contiguous()
    causal_conv_out(x, w, bias, state, y, state_out, silu, cu_seqlens, variant, cu_seqlens_host)
    return y, state_out


def _causal_conv_like(x, w, cu_seqlens):
    _require(x.dim() == 3 and w.dim() == 2, "causal_conv", "x, w: expected [B, T, C] and [C, W]")
    n = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty((n, x.shape[2], w.shape[1] - 1))


@causal_conv.register_fake
def _(x, w, bias=None, state=None, silu=True, cu_seqlens=None, variant="", cu_seqlens_host=None):
    return _causal_conv_like(x, w, cu_seqlens)


@custom_op("q3n::norm", mutates_args=(), device_types=_DEVICES)
def norm(
    x: Tensor, w: Optional[Tensor], z: Optional[Tensor] = None, kind: str = "rms", eps: float = 1e-6, variant: str = ""
) -> Tensor:
    """Norm of the rows of x [T, H, D]. kind: rms, rms_plus1 (weights around zero), rms_gated (z [T, H, D] gates after the
    norm, by SiLU), l2 (no weights). w [D] or None."""
    op = "norm"
    device = _device(op, "x", x)
    _require(x.dim() == 3, op, "x: expected [T, H, D]")
    _require(kind in _KINDS, op, f"kind: {kind!r}, expected one of {', '.join(_KINDS)}")
    t, h, d = x.shape
    y = x.new_empty(x.shape)
    args = NormArgs(struct_bytes=ctypes.sizeof(NormArgs), kind=_KINDS[kind], eps=eps, T=t, H=h, D=d)
    if w is not None:
        _shape(op, "w", w, d)
    if z is not None:
        _shape(op, "z", z, t, h, d)
    _set(op, args, device, "thx", x=x, y=y, z=z)
    _set(op, args, device, "x", w=w)
    run(op, args, device, cost=8 * t * h * d, variant=variant)
    return y


@norm.register_fake
def _(x, w, z=None, kind="rms", eps=1e-6, variant=""):
    return x.new_empty(x.shape)
