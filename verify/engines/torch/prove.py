#!/usr/bin/env python3
"""Runs what README.md claims of the PyTorch operators and exits with 1 where one claim fails. run.sh builds and calls it.

    prove.py [--record FILE] [PART …]     FILE: the lines printed, as Markdown; PART: what to run, e.g. executor gpu; default all
"""

import argparse
import contextlib
import ctypes
import os
import pathlib
import platform
import socket
import statistics
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from safetensors import safe_open
from torch.library import opcheck
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as modeling

import qwen3next_torch as q3n
from qwen3next_torch import huggingface, native

MODELS = pathlib.Path(__file__).resolve().parents[2] / "golden" / "models"
DELTA_KERNELS = ("", "recurrent_cuda", "chunked64_cuda")
lines, failed, skipped = [], [], []


def say(claim, holds, text):
    lines.append(f"| {claim} | {text} | {'yes' if holds else '**NO**'} |")
    print(f"{'ok  ' if holds else 'FAIL'} {claim}: {text}", flush=True)
    if not holds:
        failed.append(claim)


def skip(claim, why):
    lines.append(f"| {claim} | SKIPPED: {why} | |")
    print(f"SKIPPED {claim}: {why}", flush=True)
    skipped.append(claim)


def inputs(b=2, t=70, hk=2, hv=4, k=32, v=48, seed=1, device="cpu"):
    """q, k, v, g, beta, state. q, k, v are cut from one tensor, as after a projection: views with gaps."""
    r = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=r).to(device)
    row = normal(b, t, 2 * hk * k + hv * v)
    q, kk, vv = row.split([hk * k, hk * k, hv * v], dim=-1)
    return (q.unflatten(-1, (hk, k)), kk.unflatten(-1, (hk, k)), vv.unflatten(-1, (hv, v)), -normal(b, t, hv).abs(),
            normal(b, t, hv).sigmoid(), normal(b, hv, v, k))  # fmt: skip


def l2(ours, theirs):
    """Worst relative L2 error of a row."""
    ours, theirs = ours.double().flatten(0, -2), theirs.double().flatten(0, -2)
    # A row of zeros has to be met exactly.
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-30)).max().item()


def registered():
    q, k, v, g, beta, state = inputs()
    cu = torch.tensor([0, 3, 3, 70])
    o, after = torch.empty(2, 70, 4, 48), torch.empty_like(state)
    x, w, z = torch.randn(2, 9, 40), torch.randn(40, 4), torch.randn(6, 5, 16)
    calls = [
        (q3n.gated_delta, (q, k, v, g, beta, state, 0.2, True)),
        (q3n.gated_delta, (q, k, v, None, beta, None, 0.2)),
        (q3n.gated_delta, (q[:1], k[:1], v[:1], g[:1], beta[:1], None, 0.2, True, 1e-6, cu)),
        (q3n.ops.gated_delta_out, (q, k, v, g, beta, state, o, after, 0.2)),
        (q3n.causal_conv, (x, w)),
        (q3n.causal_conv, (x, w, torch.randn(40), torch.randn(2, 40, 3), False)),
        (q3n.ops.causal_conv_out, (x, w, None, None, torch.empty_like(x), torch.empty(2, 40, 3))),
        (q3n.norm, (z, torch.randn(16), torch.randn(6, 5, 16), "rms_gated")),
    ]  # fmt: skip
    results = [r for op, args in calls for r in opcheck(op, args).values()]
    passed = sum(r == "SUCCESS" for r in results)
    say("torch.library.opcheck", passed == len(results), f"{passed} of {len(results)} checks of {len(calls)} calls")

    compiled = torch.compile(lambda *a: q3n.gated_delta(*a), backend="aot_eager", fullgraph=True)
    same = all(map(torch.equal, compiled(q, k, v, g, beta, state, 0.2), q3n.gated_delta(q, k, v, g, beta, state, 0.2)))
    say("traced by torch.compile", same, "fullgraph, aot_eager: the same bits")


def memory():
    q, k, v, g, beta, state = inputs()
    o, after = q3n.gated_delta(q, k, v, g, beta, state, 0.2, True)
    dense = q3n.gated_delta(*(x.contiguous() for x in (q, k, v, g, beta, state)), 0.2, True)
    place, kept = torch.empty_like(o), state.clone()
    q3n.ops.gated_delta_out(q, k, v, g, beta, kept, place, kept, 0.2, True)
    same = torch.equal(o, dense[0]) and torch.equal(after, dense[1]) and torch.equal(o, place) and torch.equal(after, kept)
    say("zero copy", same and not q.is_contiguous(), "views with gaps are read in place, a state is updated in place: the bits of dense copies")

    recurrent = modeling.torch_recurrent_gated_delta_rule.__wrapped__
    theirs = recurrent(q, k, v, g, beta, state.transpose(-1, -2), True, True)
    error = max(l2(q3n.gated_delta(q, k, v, g, beta, state, 32**-0.5, True)[i], x) for i, x in enumerate((theirs[0], theirs[1].transpose(-1, -2))))
    say("against transformers' token loop", error < 1e-5, f"worst row error {error:.1e}, output and state")


def threads():
    q, k, v, g, beta, state = inputs(t=200, hk=4, hv=8, k=64, v=64)
    torch.randn(1000, 1000) @ torch.randn(1000, 1000)
    before, set_to, results = len(os.listdir("/proc/self/task")), torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        torch.randn(1000, 1000) @ torch.randn(1000, 1000)
        torch.randn(10**6).add_(1)
        started = len(os.listdir("/proc/self/task"))
        results += [q3n.gated_delta(q, k, v, g, beta, state, 0.1, True)[0]]
        before = max(before, started)
    grown = len(os.listdir("/proc/self/task")) - before
    torch.set_num_threads(set_to)
    same = all(torch.equal(results[0], r) for r in results)
    say("torch's threads", same and grown <= 0 and native._PARALLEL is not None,
        f"OpenMP team of libtorch_cpu, no thread of ours ({grown} new); 1, 2, 3 threads: the same bits")  # fmt: skip


def misuse():
    q, k, v, g, beta, state = inputs()
    o = torch.empty(2, 70, 4, 48)
    base = torch.empty(2, 70, 4, 48)
    out = lambda **a: q3n.ops.gated_delta_out(**{**dict(q=q, k=k, v=v, g=g, beta=beta, state_in=None, o=o, state_out=None, scale=1.0), **a})

    def other_version():
        native.run("norm", native.NormArgs(struct_bytes=8), o.device, cost=0)

    def little_scratch():
        a = native.GatedDeltaArgs(struct_bytes=ctypes.sizeof(native.GatedDeltaArgs), T=1, B=1, slots=1, HK=1, HV=1, K=4, V=4, scale=1)
        x = torch.zeros(64)
        for name in "qkv":
            setattr(a, name, x.data_ptr())
        a.beta, a.o = x.data_ptr(), o.data_ptr()
        native.run("gated_delta", a, o.device, cost=0, variant="chunked64_scalar", scratch=torch.empty(64, dtype=torch.uint8))

    expanded = torch.empty(1, 70, 4, 48).expand(2, 70, 4, 48)
    wrong = [
        ("output over an input", lambda: out(v=base, o=base), "o: overlaps an argument it must not overlap"),
        ("output that overlaps itself", lambda: out(o=expanded), "o: stride is negative or lets elements of an output overlap"),
        ("struct of another version", other_version, "struct_bytes: not the struct size of this library version"),
        ("too little scratch", little_scratch, "scratch: scratch is NULL, too small or not 64-byte aligned"),
        ("heads that do not divide", lambda: out(q=q[:, :, :1].expand(2, 70, 3, 32), k=k[:, :, :1].expand(2, 70, 3, 32)), "HV:"),
        ("another shape", lambda: out(beta=beta[:, :5]), "beta: shape [2, 5, 4], expected [2, 70, 4]"),
        ("another type", lambda: out(k=k.double()), "k: torch.float64, expected torch.float32"),
        ("a type of GPUs", lambda: out(q=q.bfloat16()), "q: torch.bfloat16, expected torch.float32"),
        ("last axis with gaps", lambda: out(q=torch.zeros(2, 70, 2, 64)[..., ::2]), "q: the last axis is not contiguous"),
        ("another variant", lambda: q3n.gated_delta(q, k, v, g, beta, None, 1.0, variant="fast"), "no variant 'fast'"),
        ("packed lengths that fall", lambda: q3n.gated_delta(q[:1], k[:1], v[:1], g[:1], beta[:1], None, 1.0, cu_seqlens=torch.tensor([0, 9, 5, 70])), "cu_seqlens: value out of range"),
    ]  # fmt: skip
    refused("misuse is a RuntimeError with our text", wrong)


def refused(claim, wrong):
    """wrong: what is wrong, the call, and text of its error."""
    named = 0
    for what, call, text in wrong:
        try:
            call()
            got = "no error"
        except RuntimeError as error:
            got = str(error)
        if text in got:
            named += 1
        else:
            print(f"     {what}: {got!r}, expected {text!r}")
    say(claim, named == len(wrong), f"{named} of {len(wrong)} wrong calls, each naming its argument")


def every_call(device, variants=("",), indices="both"):
    """Results by name of calls of every operator, on inputs that lie on the device. variants: of the delta rule. indices: on
    the device, on the CPU, or on both."""
    results = {}
    q, k, v, g, beta, state = inputs(device=device)
    tensor = lambda seed, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)
    cu_host, slots_host = torch.tensor([0, 3, 3, 70]), torch.tensor([4, 1])
    cu, slots = (cu_host, slots_host) if indices == "cpu" else (cu_host.to(device), slots_host.to(device))
    cu_host, slots_host = (cu_host, slots_host) if indices == "both" else (None, None)
    channel = -tensor(2, 2, 70, 4, 32).abs()
    packed = [x[:1] for x in (q, k, v, g, beta)]
    for variant in variants:
        results["gated_delta", variant] = q3n.gated_delta(q, k, v, g, beta, state, 0.2, True, variant=variant)
        results["a decay a channel", variant] = q3n.gated_delta(q, k, v, channel, beta, None, 0.2, True, variant=variant)
        results["packed", variant] = q3n.gated_delta(*packed, None, 0.2, True, cu_seqlens=cu, cu_seqlens_host=cu_host, variant=variant)
    results["no decay, one token", ""] = q3n.gated_delta(q[:, :1], k[:, :1], v[:, :1], None, beta[:, :1], state, 0.2, True)
    o, pool = torch.empty_like(tensor(3, 2, 70, 4, 48)), tensor(4, 6, 4, 48, 32)
    q3n.ops.gated_delta_out(q, k, v, g, beta, pool, o, pool, 0.2, True, slots=slots, slots_host=slots_host)
    results["states of a pool, in place", ""] = o, pool

    x, w, bias = tensor(5, 2, 90, 40), tensor(6, 40, 4), tensor(7, 40)
    results["causal_conv", ""] = q3n.causal_conv(x, w, bias, tensor(8, 2, 40, 3))
    results["causal_conv, packed", ""] = q3n.causal_conv(x[:1, :70], w, None, None, False, cu, cu_seqlens_host=cu_host)
    y, windows = torch.empty_like(x), tensor(9, 6, 40, 3)
    q3n.ops.causal_conv_out(x, w, bias, windows, y, windows, slots=slots, slots_host=slots_host)
    results["windows of a pool, in place", ""] = y, windows

    x, z, w = tensor(10, 6, 5, 30), tensor(11, 6, 5, 16), tensor(12, 16)
    for kind in ("rms", "rms_plus1", "rms_gated", "l2"):
        results[f"norm {kind}", ""] = (q3n.norm(x[..., 7:23], None if kind == "l2" else w, z if kind == "rms_gated" else None, kind),)
    return results


def worst_error(ours, theirs):
    """Over all calls; those of a variant beside the call that chose for itself."""
    pairs = [(a.cpu(), b) for (call, variant), x in ours.items() for a, b in zip(x, theirs[call, ""])]
    return max(l2(a, b) if torch.isfinite(a).all() else float("inf") for a, b in pairs)


def sixteen_bits(claim, device, kernels=contextlib.nullcontext):
    """q, k, v and o of bfloat16 and float16 beside a float32 call on the same numbers: o is rounded once, the state never."""
    q, k, v, *others = inputs(device=device)
    texts, holds = [], True
    for dtype, unit in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        narrow = [x.to(dtype) for x in (q, k, v)]
        expected = q3n.gated_delta(*(x.cpu().float() for x in narrow), *(x.cpu() for x in others), 0.2, True)
        with kernels():
            calls = [q3n.gated_delta(*narrow, *others, 0.2, True, variant=variant) for variant in DELTA_KERNELS]
        o, state = (max(l2(call[i].cpu(), expected[i]) for call in calls) for i in (0, 1))
        holds &= o < unit and state < 1e-4 and all(o.dtype == dtype and s.dtype == torch.float32 for o, s in calls)
        texts.append(f"{dtype}: worst row error of o {o:.1e}, of the state {state:.1e}")
    say(claim, holds, "; ".join(texts))


def other_indices(device):
    """Whether a call is checked on one array and computed with another: copies on the CPU are for the check alone."""
    q, k, v, g, beta, _ = (x[:1] for x in inputs(device=device))
    of = lambda middle: torch.tensor([0, middle, 70])
    expected = q3n.gated_delta(q, k, v, g, beta, None, 0.2, cu_seqlens=of(40).to(device))
    ours = q3n.gated_delta(q, k, v, g, beta, None, 0.2, cu_seqlens=of(40).to(device), cu_seqlens_host=of(3))
    return all(map(torch.equal, ours, expected))


class OnGpu(torch.Tensor):
    """Says that it lies on a GPU, and has no memory: for what is refused before memory is looked at."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, like.stride(), dtype=like.dtype, device="cuda:0")

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        # As the dispatcher would, were there memory.
        return getattr(q3n.ops, op.name().split("::")[1])._init_fn(*args, **(kwargs or {}))


def cuda_misuse(device):
    q, k, v, g, beta, state = inputs(device=device)
    o = torch.empty(2, 70, 4, 48, device=device)
    out = lambda **a: q3n.ops.gated_delta_out(**{**dict(q=q, k=k, v=v, g=g, beta=beta, state_in=None, o=o, state_out=None, scale=1.0), **a})
    at = lambda *values: torch.tensor(values, device=device)
    pack = lambda **a: q3n.gated_delta(q[:1], k[:1], v[:1], g[:1], beta[:1], None, 1.0, **a)
    pool = torch.zeros(6, 4, 48, 32, device=device)
    return [
        ("last axis with gaps", lambda: out(q=torch.zeros(2, 70, 2, 64, device=device)[..., ::2]), "q: the last axis is not contiguous"),
        ("another type", lambda: out(k=k.half()), "k: torch.float16, expected torch.float32"),
        ("types that differ", lambda: out(q=q.half(), k=k.half(), v=v.bfloat16()), "v: torch.bfloat16, expected torch.float16"),
        ("an output of another type", lambda: out(q=q.half(), k=k.half(), v=v.half()), "o: torch.float32, expected torch.float16"),
        ("a type nobody takes", lambda: out(q=q.double()), "q: torch.float64, expected torch.float32 or torch.float16 or torch.bfloat16"),
        ("another shape", lambda: out(beta=beta[:, :5]), "beta: shape [2, 5, 4], expected [2, 70, 4]"),
        ("output over an input", lambda: out(v=o), "o: overlaps an argument it must not overlap"),
        ("a variant of the CPU", lambda: out(variant="recurrent_scalar"), "no variant 'recurrent_scalar'; there are cuda, "),
        ("packed lengths that fall", lambda: pack(cu_seqlens=at(0, 9, 5, 70), cu_seqlens_host=torch.tensor([0, 9, 5, 70])), "cu_seqlens: value out of range"),
        ("the same, without a copy", lambda: pack(cu_seqlens=at(0, 9, 5, 70)), "cu_seqlens: value out of range"),
        ("a copy of another length", lambda: pack(cu_seqlens=at(0, 9, 70), cu_seqlens_host=torch.tensor([0, 70])), "cu_seqlens_host: shape [2], expected [3]"),
        ("indices of another type", lambda: pack(cu_seqlens=at(0, 70).int()), "cu_seqlens: torch.int32, expected torch.int64"),
        ("a slot outside the pool", lambda: out(state_in=pool, state_out=pool, slots=at(0, 6)), "slot_in: value out of range"),
        ("a slot twice", lambda: out(state_in=pool, state_out=pool, slots=at(2, 2)), "slot_out: value out of range"),
        ("slots without a pool", lambda: out(slots=at(0, 1)), "slots: given without a pool of states"),
    ]  # fmt: skip


def executor():
    """The way of CUDA tensors without a GPU."""
    if not native.HAS_EXECUTOR:
        return skip("CUDA kernels on the host executor", "the package is built without it (Q3N_CUDA_HOST=1)")
    cpu = torch.device("cpu")
    expected = every_call(cpu)
    with native.executor():
        ours = [every_call(cpu, DELTA_KERNELS, indices) for indices in ("both", "device")]
        swapped = other_indices(cpu)
    error = max(worst_error(x, expected) for x in ours)
    say("CUDA kernels on the host executor", error < 1e-5, f"{sum(map(len, ours))} calls of the three operators, the way of CUDA tensors but for the "
        f"stream: worst row error {error:.1e} against the CPU operators")  # fmt: skip
    sixteen_bits("bfloat16 and float16 on the host executor", cpu, native.executor)
    say("index arrays of CUDA calls", swapped, "the check reads the copy on the CPU, the kernels the array on the device")

    q, k, v, g, beta, _ = inputs()
    gpu = [OnGpu(x) for x in (q, k, v, g, beta)]
    mixed = [
        ("key on a GPU", lambda: q3n.gated_delta(q, gpu[1], v, g, beta, None, 1.0), "k: lies on cuda:0, expected cpu"),
        ("weights on a GPU", lambda: q3n.norm(q[0], OnGpu(torch.ones(32))), "w: lies on cuda:0, expected cpu"),
    ]
    if not native.HAS_CUDA:
        text = "lies on cuda:0, and this package is built without CUDA kernels: Q3N_CUDA=1 pip install"
        mixed += [
            ("no CUDA in the build", lambda: q3n.ops.gated_delta_out(*gpu, None, gpu[2], None, 1.0), f"q: {text}"),
            ("no CUDA in the build", lambda: q3n.norm(OnGpu(q[0]), None), f"x: {text}"),
        ]
    def captured(cu):
        kept, native.capturing = native.capturing, lambda device: True
        try:
            q3n.gated_delta(q[:1], k[:1], v[:1], g[:1], beta[:1], None, 1.0, cu_seqlens=cu)
        finally:
            native.capturing = kept

    mixed += [("no copy of indices while a graph is captured", lambda: captured(torch.tensor([0, 70])), "cu_seqlens_host: is needed while a graph is captured")]
    with native.executor():
        refused("misuse of CUDA calls", cuda_misuse(cpu) + mixed)


def gpu():
    """CUDA tensors."""
    claims = ("CUDA tensors", "another stream", "torch.cuda.graph", "misuse of CUDA tensors", "bfloat16 and float16")
    missing = None if native.HAS_CUDA else "the package is built without CUDA kernels (Q3N_CUDA=1)"
    if not missing and not torch.cuda.is_available():
        missing = "torch finds no GPU"
    if missing:
        for claim in claims:
            skip(claim, missing)
        return
    device = torch.device("cuda", torch.cuda.current_device())
    expected = every_call(torch.device("cpu"))
    worst = max(worst_error(every_call(device, DELTA_KERNELS, where), expected) for where in ("both", "device", "cpu"))
    say(claims[0], worst < 1e-5 and other_indices(device), f"on {torch.cuda.get_device_name()}: worst row error {worst:.1e} against the CPU operators")

    sixteen_bits(claims[4], device)
    q, k, v, g, beta, state = inputs(device=device)
    stream = torch.cuda.Stream()
    eager = q3n.gated_delta(q, k, v, g, beta, state, 0.2, True)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        v2 = v * 2
        other = q3n.gated_delta(q, k, v2, g, beta, state * 2, 0.2, True)
    stream.synchronize()
    same = all(torch.equal(a * 2, b) for a, b in zip(eager, other))
    say(claims[1], same, "behind a torch kernel of its own stream: twice the values, the bits twice")

    cu, cu_host, x = torch.tensor([0, 3, 70], device=device), torch.tensor([0, 3, 70]), torch.randn(6, 5, 16, device=device)
    row = torch.randn(1, 70, 40, device=device)
    w = torch.randn(40, 4, device=device)
    kept = state[:2].clone()

    def step():
        o = torch.empty(1, 70, 4, 48, device=device)
        packed = [y[:1] for y in (q, k, v, g, beta)]
        q3n.ops.gated_delta_out(*packed, kept, o, kept, 0.2, True, cu_seqlens=cu, cu_seqlens_host=cu_host)
        return o, kept, q3n.norm(x, None), q3n.causal_conv(row, w, None, None, True, cu, cu_seqlens_host=cu_host)[0]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for y in (q, x, row):
        y.mul_(0.5)
    kept.copy_(state[:2])
    eager = [y.clone() for y in step()]
    kept.copy_(state[:2])
    graph.replay()
    torch.cuda.synchronize()
    say(claims[2], all(map(torch.equal, captured, eager)), "three operators captured, replayed on other values: the bits of a fresh call")

    cpu_q, *_ = inputs()
    wrong = cuda_misuse(device) + [
        ("key on the CPU", lambda: q3n.gated_delta(q, k.cpu(), v, g, beta, None, 1.0), f"k: lies on cpu, expected {device}"),
        ("query on the CPU", lambda: q3n.gated_delta(cpu_q, k, v, g, beta, None, 1.0), f"k: lies on {device}, expected cpu"),
    ]
    refused(claims[3], wrong)
    results = [r for r in opcheck(q3n.gated_delta, (q, k, v, g, beta, state, 0.2, True)).values()]
    say("torch.library.opcheck on CUDA", all(r == "SUCCESS" for r in results), f"{len(results)} checks")


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def stepwise(model, tokens, prompt):
    """Logits of a prompt, then one token at a time over the cache."""
    with torch.no_grad():
        out = model(tokens[None, :prompt], use_cache=True)
        rows = [out.logits[0]]
        for t in tokens[prompt:]:
            out = model(t[None, None], past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0])
    return torch.cat(rows)


def golden_models():
    worst, worst_step, worst_own, count = 0.0, 0.0, 0.0, 0
    for folder in sorted(p for p in MODELS.iterdir() if (p / "golden.safetensors").exists()):
        model = Qwen3NextForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with safe_open(folder / "golden.safetensors", "pt") as f:
            names = [n for n in f.keys() if n.split(".")[0] == "tokens"]
            cases = [(f.get_tensor(n), f.get_tensor(n.replace("tokens", "logits"))) for n in names]
        for tokens, expected in cases:
            prompt = max(1, len(tokens) - 5)
            with huggingface.kernels():
                worst = max(worst, l2(logits(model, tokens), expected))
                worst_step = max(worst_step, l2(stepwise(model, tokens, prompt), expected))
            # Their own spread: the same model through the other of its two forms of the delta rule.
            chunked = modeling.torch_chunk_gated_delta_rule
            modeling.torch_chunk_gated_delta_rule = modeling.torch_recurrent_gated_delta_rule
            worst_own = max(worst_own, l2(logits(model, tokens), expected))
            modeling.torch_chunk_gated_delta_rule = chunked
            count += 1
    prompt = dict(input_ids=cases[0][0][None], attention_mask=torch.ones_like(cases[0][0])[None], max_new_tokens=16, do_sample=False)
    theirs = model.generate(**prompt)
    with huggingface.kernels():
        ours = model.generate(**prompt)
    say("model.generate", torch.equal(ours, theirs), f"greedy, {ours.shape[1] - cases[0][0].numel()} tokens: the same")
    bound = 8 * worst_own
    say("Qwen3NextForCausalLM, golden logits", worst <= bound,
        f"{count} prompts: worst row error {worst:.1e}; transformers' own two forms differ by {worst_own:.1e}, bound 8 times that")  # fmt: skip
    say("the same with a cache", worst_step <= bound, f"prompt, then 5 tokens one by one: {worst_step:.1e}")


def real_shapes(layers):
    torch.manual_seed(3)
    return Qwen3NextForCausalLM(Qwen3NextConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=16,
        linear_num_value_heads=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128,
        shared_expert_intermediate_size=128)).eval()  # fmt: skip


def speed():
    model, tokens = real_shapes(layers=4), torch.randint(1000, (512,), generator=torch.Generator().manual_seed(5))
    times = {}

    def timed(key, run):
        start = time.perf_counter()
        result = run()
        times.setdefault(key, []).append(time.perf_counter() - start)
        return result

    def decode():
        # 12 tokens after a prompt of 4; the prompt is timed too, in both.
        return stepwise(model, tokens[:16], 4)

    for round in range(4):
        theirs = timed(("prompt", "theirs"), lambda: logits(model, tokens)), timed(("decode", "theirs"), decode)
        with huggingface.kernels():
            ours = timed(("prompt", "ours"), lambda: logits(model, tokens)), timed(("decode", "ours"), decode)
        if round == 0:
            errors = [l2(a, b) for a, b in zip(ours, theirs)]
            times.clear()
    median = {key: statistics.median(values) for key, values in times.items()}
    for phase, what, error in zip(("prompt", "decode"), ("512 tokens at once", "4 tokens, then 12 one by one"), errors):
        a, b = median[phase, "theirs"], median[phase, "ours"]
        say(f"speed, {phase}", error < 1e-4, f"{what}: {a / b:.1f} times as fast as transformers' own code ({a * 1e3:.0f} ms, {b * 1e3:.0f} ms); "
            f"logits {error:.1e} apart")  # fmt: skip

    q, k, v, g, beta, state = inputs(b=1, t=512, hk=16, hv=32, k=128, v=128)
    chunk = modeling.torch_chunk_gated_delta_rule.__wrapped__
    alone = {"theirs": [], "ours": []}
    for _ in range(5):
        for who, call in (("theirs", lambda: chunk(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)),
                          ("ours", lambda: q3n.gated_delta(q, k, v, g, beta, None, 128**-0.5, True))):  # fmt: skip
            start = time.perf_counter()
            call()
            alone[who].append(time.perf_counter() - start)
    a, b = (statistics.median(alone[who][1:]) for who in ("theirs", "ours"))
    say("speed, delta rule alone", True, f"512 tokens, 16/32 heads of 128: {a / b:.1f} times torch_chunk_gated_delta_rule ({a * 1e3:.1f} ms, {b * 1e3:.1f} ms)")


def half_layer(layer, config, rank, ranks):
    """A rank's part of a DeltaNet layer: its key heads with their value heads, as tensor parallelism cuts them."""
    part = type(config)(**{**config.to_dict(), "linear_num_key_heads": layer.num_k_heads // ranks, "linear_num_value_heads": layer.num_v_heads // ranks})
    mine = modeling.Qwen3NextGatedDeltaNet(part, layer.layer_idx).eval()
    cut = lambda x, dim=0: x.chunk(ranks, dim)[rank]
    with torch.no_grad():
        mine.in_proj_qkvz.weight.copy_(cut(layer.in_proj_qkvz.weight))
        mine.in_proj_ba.weight.copy_(cut(layer.in_proj_ba.weight))
        split = layer.conv1d.weight.split([layer.key_dim, layer.key_dim, layer.value_dim])
        mine.conv1d.weight.copy_(torch.cat([cut(x) for x in split]))
        mine.A_log.copy_(cut(layer.A_log))
        mine.dt_bias.copy_(cut(layer.dt_bias))
        mine.norm.weight.copy_(layer.norm.weight)
        mine.out_proj.weight.copy_(cut(layer.out_proj.weight, 1))
    return mine


def rank_main(rank, ranks, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    # The operators: this rank's value heads, gathered, are the bits of one process.
    q, k, v, g, beta, state = inputs(hk=4, hv=8)
    one = q3n.gated_delta(q, k, v, g, beta, state, 0.2, True)
    cut = lambda x, dim: x.chunk(ranks, dim)[rank]
    o, after = q3n.gated_delta(*(cut(x, 2) for x in (q, k, v, g, beta)), cut(state, 1), 0.2, True)
    gathered = [[torch.empty_like(x) for _ in range(ranks)] for x in (o, after)]
    for mine, all_ranks in zip((o, after), gathered):
        dist.all_gather(all_ranks, mine)
    bits = torch.equal(torch.cat(gathered[0], 2), one[0]) and torch.equal(torch.cat(gathered[1], 1), one[1])
    # A layer: column-parallel projections, row-parallel output, one all-reduce.
    model = real_shapes(layers=1)
    layer = model.model.layers[0].linear_attn
    x = torch.randn(2, 40, 512, generator=torch.Generator().manual_seed(9))
    with huggingface.kernels(), torch.no_grad():
        whole, y = layer(x), half_layer(layer, model.config, rank, ranks)(x)
    dist.all_reduce(y)
    if rank == 0:
        results.put((bits, l2(y, whole)))
    dist.barrier()
    dist.destroy_process_group()


def distributed():
    context = mp.get_context("spawn")
    results = context.Queue()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [context.Process(target=rank_main, args=(r, 2, port, results)) for r in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(300)
    if any(p.exitcode for p in processes):
        return say("torch.distributed", False, "a rank failed")
    bits, error = results.get()
    say("torch.distributed, gloo, 2 ranks", bits, "value heads split over the ranks, gathered: the bits of one process")
    say("a layer over 2 ranks", error < 1e-5, f"projections cut by columns, output by rows, one all-reduce: {error:.1e} from one process")


def main():
    parts = {p.__name__: p for p in (registered, memory, threads, misuse, executor, gpu, golden_models, distributed, speed)}
    parser = argparse.ArgumentParser()
    parser.add_argument("--record")
    parser.add_argument("part", nargs="*")
    arguments = parser.parse_args()
    if unknown := set(arguments.part) - set(parts):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    record = arguments.record
    for name in arguments.part or parts:
        parts[name]()
    if record:
        cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor())
        head = f"""# The PyTorch operators, proven

`verify/engines/torch/run.sh --record verify/results/{pathlib.Path(record).name}` on {cpu}, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}.
Speeds are medians of three rounds in turns; ratios, not times, compare between machines.

| claim | result | holds |
| --- | --- | --- |
"""
        pathlib.Path(record).write_text(head + "\n".join(lines) + "\n")
    print(f"{len(lines) - len(failed) - len(skipped)} claims hold, {len(failed)} fail, {len(skipped)} skipped")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
