#!/usr/bin/env python3
"""What others offer for an operator on a GPU: torch, flash-linear-attention, flashinfer, causal-conv1d.

`qwen3next bench op OP --backend cuda --peers` runs this once for every call that it times. By hand:

    python3 cuda_ops.py --case '{"op": "gated_delta", "shape": "16/32x128", "dtype": "f32", "tokens": 64}' --device cpu

A case has the words of `bench op`; attention also has "heads", "16/2", and "dim". A peer computes once, on inputs drawn
from a seed, and is compared with the formula in float64 on the same inputs, rounded to the peer's type. Only one that
agrees is timed. Writes an object a line to stdout:

    {"timed": {"peer", "dtype", "seconds": [a launch's, ...], "graph_s": seconds or null, "bytes", "row_l2", "limit"}}
    {"failed": {"peer", "why"}}
    {"skipped": {"peer", "why"}}

"row_l2" is the error of the worst row over that row's norm, "bytes" every input and output once. Needs torch 2.5 or
later.
"""
import argparse
import importlib
import json
import os
import re
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from typing import Callable

# Largest relative error of a row: rounding of the type's products is well below, another formula well above.
LIMITS = {"f32": 1e-3, "f16": 1e-2, "bf16": 5e-2}
# Of chunks of the delta rule in bf16, which round one product after another: 2.4e-2 in the worst of 8,192 rows.
CHUNK_LIMIT = 0.1
EPS = 1e-6
FLUSH = 256 << 20
# Seconds that the launches of a peer may take in all, and those of its graph; as for our kernels.
MOST, MOST_IN_GRAPH = 2.0, 0.5
WARM_UPS = 5


@dataclass
class Peer:
    """`make()` gives the call, whose result is a tuple of tensors, the inputs, and the results it should have."""
    module: str
    name: str
    dtype: str
    make: Callable
    limit: float = 0.0

    def __post_init__(self):
        self.limit = self.limit or LIMITS[self.dtype]


class Draw:
    """Random tensors on the device, the same ones for the same seed."""

    def __init__(self, torch, device):
        self.torch, self.device = torch, device
        self.generator = torch.Generator(device).manual_seed(1)

    def normal(self, *shape, scale=1.0):
        return scale * self.torch.randn(shape, generator=self.generator, device=self.device)

    def uniform(self, low, high, *shape):
        return low + (high - low) * self.torch.rand(shape, generator=self.generator, device=self.device)


def numbers(text):
    return [int(n) for n in re.split("[x/:]", text)]


def delta_loop(torch, q, k, v, g, beta, state, l2norm, dtype):
    """The delta rule token by token; state [B, HV, V, K]."""
    group, scale = v.shape[2] // k.shape[2], k.shape[3] ** -0.5

    def row(x, t):
        x = x[:, t].to(dtype)
        if l2norm:
            x = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS)
        return x.repeat_interleave(group, 1).unsqueeze(-1)

    s, out = state.to(dtype, copy=True), []
    for t in range(q.shape[1]):
        query, key = row(q, t), row(k, t)
        s *= g[:, t].to(dtype).exp()[..., None, None]
        delta = beta[:, t].to(dtype).unsqueeze(-1) * (v[:, t].to(dtype) - (s @ key).squeeze(-1))
        s += delta.unsqueeze(-1) * key.transpose(-1, -2)
        out.append(scale * (s @ query).squeeze(-1))
    return torch.stack(out, 1), s


def delta_chunks(torch, q, k, v, g, beta, state, chunk=64):
    """The same in chunks of tokens, in float32: a triangular system each."""
    b, t, hv, d = v.shape
    group, pad, scale = hv // k.shape[2], -t % chunk, k.shape[3] ** -0.5

    def split(x):
        x = torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 0, pad))
        return x.reshape(b, hv, -1, chunk, x.shape[-1])

    def heads(x):
        return split((x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS)).repeat_interleave(group, 2))

    q, k, v, beta = scale * heads(q), heads(k), split(v), split(beta.unsqueeze(-1))
    decay = split(g.unsqueeze(-1)).squeeze(-1).cumsum(-1)
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).tril().exp().tril()
    system = (beta * (k @ k.transpose(-1, -2)) * between).tril(-1)
    right = torch.cat([beta * v, beta * decay.exp().unsqueeze(-1) * k], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, keys = solved.split([d, k.shape[-1]], -1)
    scores = (q @ k.transpose(-1, -2)) * between
    s, out = state.transpose(-1, -2), []
    for i in range(v.shape[2]):
        new = values[:, :, i] - keys[:, :, i] @ s
        out.append((q[:, :, i] * decay[:, :, i].exp().unsqueeze(-1)) @ s + scores[:, :, i] @ new)
        last = decay[:, :, i, -1:]
        faded = k[:, :, i] * (last - decay[:, :, i]).exp().unsqueeze(-1)
        s = last.exp().unsqueeze(-1) * s + faded.transpose(-1, -2) @ new
    out = torch.stack(out, 2).reshape(b, hv, -1, d)[:, :, :t]
    return out.transpose(1, 2).contiguous(), s.transpose(-1, -2).contiguous()


def gated_delta(torch, case, draw):
    """Inputs as ours; the gates come from bf16 values that a fused kernel can start from."""
    b, (hk, hv, d), t = case.get("batch", 1), numbers(case["shape"].split(" of ")[-1]), case["tokens"]
    lengths = [draw.uniform(0.1, 10.0, b, t, hk, 1) for _ in range(2)]
    units = [torch.nn.functional.normalize(draw.normal(b, t, hk, d), dim=-1) for _ in range(2)]
    full = [x * n for x, n in zip(units, lengths)] + [draw.uniform(-4.0, 4.0, b, t, hv, d)]
    raw_g = draw.uniform(1e-3, 0.5, b, t, hv).expm1().log().bfloat16()
    raw_beta = draw.uniform(1e-3, 1.0 - 1e-3, b, t, hv).logit().bfloat16()
    g = -torch.nn.functional.softplus(raw_g.double()).float()
    beta = raw_beta.double().sigmoid().float()
    state = draw.uniform(-2.0, 2.0, b, hv, d, d)
    q, k, v = (x.bfloat16() for x in full)

    @cache
    def want(inputs=(q, k, v), l2norm=True):
        return delta_loop(torch, *inputs, g, beta, state, l2norm, torch.float64)

    def in_torch():
        call = delta_chunks if t > 1 else lambda *x: delta_loop(*x, True, torch.float32)
        return lambda: call(torch, *full, g, beta, state), [*full, g, beta, state], lambda: want(tuple(full))

    def fla(name):
        function = getattr(importlib.import_module("fla.ops.gated_delta_rule"), name)
        first = state.transpose(-1, -2).contiguous()

        def call():
            o, last = function(q=q, k=k, v=v, g=g, beta=beta, initial_state=first, output_final_state=True,
                               use_qk_l2norm_in_kernel=True)
            return o, last.transpose(-1, -2)
        return call, [q, k, v, g, beta, first], want

    def flashinfer_decode():
        function = importlib.import_module("flashinfer.gdn_decode").gated_delta_rule_decode_pretranspose
        own, zeros = state.clone(), torch.zeros(hv, device=state.device)

        def call():
            return function(q, k, v, own, zeros, raw_g, zeros, raw_beta, use_qk_l2norm=True)
        return call, [q, k, v, raw_g, raw_beta, own], want

    def flashinfer_prefill():
        function = importlib.import_module("flashinfer.gdn_prefill").chunk_gated_delta_rule
        unit_q, unit_k = (x.bfloat16() for x in units)
        flat = [x.flatten(0, 1).contiguous() for x in (unit_q, unit_k, v, g.exp(), beta)]
        ends = t * torch.arange(b + 1, device=state.device)

        def call():
            o, last = function(*flat, initial_state=state, output_final_state=True, cu_seqlens=ends)
            return o.unflatten(0, (b, t)), last
        return call, [*flat, state], lambda: want((unit_q, unit_k, v), False)

    peers = [Peer("torch", "torch chunks" if t > 1 else "torch step", "f32", in_torch),
             Peer("fla", "fla chunk", "bf16", lambda: fla("chunk_gated_delta_rule"), CHUNK_LIMIT),
             Peer("fla", "fla recurrent", "bf16", lambda: fla("fused_recurrent_gated_delta_rule"))]
    if t == 1:
        return peers + [Peer("flashinfer", "flashinfer decode+gates", "bf16", flashinfer_decode)]
    return peers + [Peer("flashinfer", "flashinfer prefill unnormed", "bf16", flashinfer_prefill, CHUNK_LIMIT)]


def causal_conv(torch, case, draw):
    (c, width), t = numbers(case["shape"]), case["tokens"]
    x, w = draw.normal(1, t, c, scale=3.0), draw.normal(c, width, scale=0.5)
    state = draw.normal(1, width - 1, c, scale=3.0)
    silu = torch.nn.functional.silu

    def want(x, w, state):
        whole = torch.cat([state, x], 1).double()
        y = sum(whole[:, i:i + t] * w[:, i].double() for i in range(width))
        return silu(y), whole[:, t:]

    def in_torch():
        def call():
            whole = torch.cat([state, x], 1)
            y = torch.nn.functional.conv1d(whole.transpose(1, 2), w.unsqueeze(1), groups=c)
            return silu(y).transpose(1, 2), whole[:, t:]
        return call, [x, w, state], lambda: want(x, w, state)

    def package(dtype):
        module = importlib.import_module("causal_conv1d")
        inputs = own_x, own_w, own_state = [i.to(dtype) for i in (x, w, state)]
        if t == 1:
            window, row = own_state.transpose(1, 2).contiguous(), own_x[:, 0]

            def call():
                y = module.causal_conv1d_update(row, window, own_w, activation="silu")
                return y.unsqueeze(1), window.transpose(1, 2)
        else:
            last = torch.empty_like(own_state).transpose(1, 2)

            def call():
                y, final = module.causal_conv1d_fn(
                    own_x.transpose(1, 2), own_w, initial_states=own_state.transpose(1, 2), return_final_states=True,
                    final_states_out=last, activation="silu")
                return y.transpose(1, 2), final.transpose(1, 2)
        return call, inputs, lambda: want(*inputs)

    return [Peer("torch", "torch conv1d", "f32", in_torch),
            Peer("causal_conv1d", "causal-conv1d", "f32", lambda: package(torch.float32)),
            Peer("causal_conv1d", "causal-conv1d", "bf16", lambda: package(torch.bfloat16))]


def attention(torch, case, draw):
    """Without the output gate that ours includes."""
    (hq, hkv), d, t = numbers(case.get("heads", "16/2")), case.get("dim", 256), case["tokens"]
    keys, dtype = max(numbers(case["shape"])[0], t), case["dtype"]
    if dtype not in LIMITS:
        return []
    of = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    q, k, v = draw.normal(t, hq, d).to(of), draw.normal(keys, hkv, d).to(of), draw.normal(keys, hkv, d).to(of)

    @cache
    def want():
        heads = [x.double().transpose(0, 1) for x in (k, v)]
        rows, out = max(1, (1 << 26) // (keys * hq)), []
        for first in range(0, t, rows):
            some = q[first:first + rows].double().unflatten(1, (hkv, -1)).permute(1, 2, 0, 3)
            scores = some @ heads[0].unsqueeze(1).transpose(-1, -2) * d ** -0.5
            seen = torch.ones(some.shape[2], keys, dtype=torch.bool, device=q.device).tril(keys - t + first)
            out.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ heads[1].unsqueeze(1)).permute(2, 0, 1, 3))
        return [torch.cat(out).flatten(1, 2)]

    def sdpa():
        from torch.nn.attention.bias import causal_lower_right
        function = torch.nn.functional.scaled_dot_product_attention
        mask = causal_lower_right(t, keys) if t > 1 else None
        one_q, one_k, one_v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))

        def call():
            o = function(one_q, one_k, one_v, attn_mask=mask, enable_gqa=hq != hkv)
            return [o.squeeze(0).transpose(0, 1)]
        return call, [q, k, v], want

    def flashinfer(tensor_cores):
        module = importlib.import_module("flashinfer")
        if t > 1:
            return lambda: [module.single_prefill_with_kv_cache(q, k, v, causal=True)], [q, k, v], want
        return (lambda: [module.single_decode_with_kv_cache(q[0], k, v, use_tensor_cores=tensor_cores).unsqueeze(0)],
                [q, k, v], want)

    peers = [Peer("torch", "torch sdpa ungated", dtype, sdpa)]
    if dtype == "f32":
        return peers
    names = {False: "decode", True: "tensor-core decode"} if t == 1 else {True: "prefill"}
    return peers + [Peer("flashinfer", f"flashinfer {name} ungated", dtype, lambda cores=cores: flashinfer(cores))
                    for cores, name in names.items()]


def norm(torch, case, draw):
    kind, size = case["shape"].split(":") if ":" in case["shape"] else ("rms", case["shape"])
    (h, d), t = numbers(size), case["tokens"]
    if kind not in ("rms", "plain"):
        return []
    x, w = draw.normal(t, h, d), draw.normal(d) if kind == "rms" else None

    def want(x, w):
        x = x.double()
        y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)
        return [y if w is None else y * w.double()]

    def in_torch():
        held = [x] if w is None else [x, w]
        return lambda: [torch.nn.functional.rms_norm(x, (d,), w, EPS)], held, lambda: want(x, w)

    def flashinfer():
        module = importlib.import_module("flashinfer.norm")
        flat, weight = x.flatten(0, 1).bfloat16(), w.bfloat16()
        return lambda: [module.rmsnorm(flat, weight, EPS)], [flat, weight], lambda: want(flat, weight)

    peers = [Peer("torch", "torch rms_norm", "f32", in_torch)]
    return peers if w is None else peers + [Peer("flashinfer", "flashinfer rmsnorm", "bf16", flashinfer)]


def solve_tri(torch, case, draw):
    inverse, size = "inverse:" in case["shape"], numbers(case["shape"].split(":")[-1])
    n, m, batch = size[0], size[-1], case["tokens"]
    i = torch.arange(n, device=draw.device)
    decay = -draw.uniform(0.0, 0.005, batch, 1, 1) * (i.unsqueeze(1) - i)
    lower = (draw.uniform(0.5, 1.0, batch, n, n) * decay.exp()).tril(-1)
    eye = torch.eye(n, device=draw.device)
    right = eye if inverse else draw.uniform(-25.0, 25.0, batch, n, m)

    def solve():
        def want():
            return [torch.linalg.solve_triangular((lower + eye).double(), right.double(), upper=False)]

        def call():
            return [torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)]
        return call, [lower] if inverse else [lower, right], want
    return [Peer("torch", "torch solve_triangular", "f32", solve)]


def matmul(torch, case, draw):
    (n, k), m, dtype = numbers(case["shape"]), case["tokens"], case["dtype"]
    if dtype not in ("f16", "bf16"):
        return []
    of = torch.float16 if dtype == "f16" else torch.bfloat16

    def linear():
        x, w = draw.uniform(-2.0, 2.0, m, k).to(of), draw.uniform(-1.0, 1.0, n, k).to(of)
        return lambda: [torch.nn.functional.linear(x, w)], [x, w], lambda: [x.double() @ w.double().T]
    return [Peer("torch", "torch linear", dtype, linear)]


def moe_route(torch, case, draw):
    (e, top_k), t = numbers(case["shape"]), case["tokens"]

    def route():
        # Far enough apart that no rounding exchanges two.
        logits = draw.uniform(0.0, 1.0, t, e).argsort(-1) * (8.0 / e)

        def call():
            weights, ids = logits.softmax(-1).topk(top_k)
            return weights / weights.sum(-1, keepdim=True), ids

        def want():
            weights, ids = logits.double().softmax(-1).topk(top_k)
            return weights / weights.sum(-1, keepdim=True), ids.double()
        return call, [logits], want
    return [Peer("torch", "torch softmax+topk", "f32", route)]


OPERATORS = {f.__name__: f for f in (gated_delta, causal_conv, attention, norm, solve_tri, matmul, moe_route)}


def worst_row(torch, got, want):
    """The largest error of a row over its norm, which counts as a tenth of the rows' root mean square at least."""
    if len(got) != len(want):
        raise ValueError(f"gave {len(got)} results, expected {len(want)}")
    worst = []
    for have, should in zip(got, want):
        if have.shape != should.shape:
            raise ValueError(f"gave {list(have.shape)}, expected {list(should.shape)}")
        norms = should.double().norm(dim=-1)
        least = norms.square().mean().sqrt() / 10
        worst.append(((have.double() - should).norm(dim=-1) / norms.clamp(min=least)).max())
    # Of the tensor, which keeps a NaN.
    return torch.stack(worst).max().item()


def on_cpu(call, args):
    begin = time.perf_counter()
    call()
    samples, seconds = int(min(max(MOST / (time.perf_counter() - begin), 1), args.repetitions)), []
    for _ in range(samples):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds, None


def on_gpu(torch, call, args):
    """Between events of one stream. Before each launch the GPU is kept busy for longer than the CPU takes to queue it:
    a pair of events spans the kernels, not Python."""
    def event():
        return torch.cuda.Event(enable_timing=True)

    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        queued = time.perf_counter() - begin
        torch.cuda.synchronize()
        once = time.perf_counter() - begin
    samples = int(min(max(MOST / once, 1), args.repetitions))
    # At 2 GHz: slower clocks keep it busy for longer.
    cycles = int(2e9 * min(1.5 * queued + 2e-5, MOST))
    other = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    pairs = [(event(), event()) for _ in range(samples)]
    for _ in range(WARM_UPS if args.warm else 0):
        call()
    for before, after in pairs:
        torch.cuda._sleep(cycles)
        if not args.warm:
            other.zero_()
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    seconds = [before.elapsed_time(after) / 1e3 for before, after in pairs]
    launches = min(samples, max(int(MOST_IN_GRAPH / once), 1))
    return seconds, in_graph(torch, call, launches, cycles) if args.warm else None


def in_graph(torch, call, launches, cycles):
    """Seconds a launch of many in one graph; None where the peer can't be captured."""
    graph, before, after = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        with torch.cuda.graph(graph):
            for _ in range(launches):
                call()
    except Exception as error:
        print(f"not captured: {reason(error)}", file=sys.stderr)
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda._sleep(cycles)
    before.record()
    graph.replay()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3 / launches


def reason(error):
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text[:240] if isinstance(error, (ImportError, ValueError)) else f"{type(error).__name__}: {text}"[:240]


def measure(torch, peer, args):
    """The line about a peer that is there."""
    name = f"{peer.name} ({peer.dtype})"
    try:
        call, inputs, want = peer.make()
        size = sum(x.nbytes for x in inputs)
        got = [x.clone() for x in call()]
        row_l2, limit = worst_row(torch, got, want()), peer.limit
        size += sum(x.nbytes for x in got)
        del got
        if not row_l2 <= limit:
            why = f"a row is off by {row_l2:.1e} of its norm, expected up to {limit}"
            return {"failed": {"peer": name, "why": why}}
        seconds, graph_s = on_cpu(call, args) if args.device == "cpu" else on_gpu(torch, call, args)
    except Exception as error:
        return {"failed": {"peer": name, "why": reason(error)}}
    return {"timed": {"peer": name, "dtype": peer.dtype, "seconds": seconds, "graph_s": graph_s, "bytes": size,
                      "row_l2": row_l2, "limit": limit}}


def tell(case, args, say):
    """Says a line about every peer of a case, or about every module that is not there."""
    def skipped(peer, why):
        say({"skipped": {"peer": peer, "why": why}})

    nothing = f"none compares with {case['op']} {case['shape']} {case['dtype']}"
    if case["op"] not in OPERATORS:
        return skipped("peers", nothing)
    try:
        import torch
    except ImportError as error:
        return skipped("torch", reason(error))
    if args.device == "cuda" and not torch.cuda.is_available():
        return skipped("torch", "knows no GPU")
    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    peers = OPERATORS[case["op"]](torch, case, Draw(torch, args.device))
    if not peers:
        return skipped("peers", nothing)
    there = {}
    for peer in peers:
        if peer.module not in there:
            try:
                there[peer.module] = importlib.import_module(peer.module)
            except Exception as error:
                there[peer.module] = None
                skipped(peer.module, reason(error))
        if there[peer.module]:
            watch = threading.Timer(args.limit, give_up, [peer, args.limit, say])
            watch.daemon = True
            watch.start()
            line = measure(torch, peer, args)
            watch.cancel()
            say(line)


def give_up(peer, limit, say):
    """Ends the process: what hangs in a kernel or a compiler can't be stopped otherwise."""
    why = f"not done after {limit:g} s; peers after it were left out"
    say({"failed": {"peer": f"{peer.name} ({peer.dtype})", "why": why}})
    os._exit(0)


def a_case(text):
    expected = {"op": str, "shape": str, "dtype": str, "tokens": int}
    try:
        case = json.loads(text)
        if all(isinstance(case[key], kind) for key, kind in expected.items()):
            return case
    except (KeyError, TypeError, ValueError):
        pass
    raise argparse.ArgumentTypeError(f"expected a JSON object with {', '.join(expected)}")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--case", required=True, type=a_case, metavar="JSON", help="what to compute")
    ap.add_argument("--device", choices=["cuda", "cpu"], default="cuda",
                    help="cpu: torch's own peers alone can run there, timed by the clock")
    ap.add_argument("-r", "--repetitions", type=int, default=100, help="samples, of slow peers fewer; default 100")
    ap.add_argument("--warm", action="store_true",
                    help="leave L2 as the launch before left it; also time a graph of launches")
    ap.add_argument("--limit", type=float, default=120.0, metavar="S",
                    help="seconds that a peer may take in all, compiling itself included; default 120")
    args = ap.parse_args()
    # What a package prints when it is loaded is no result.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tell(args.case, args, lambda line: print(json.dumps(line), file=out, flush=True))


if __name__ == "__main__":
    main()
