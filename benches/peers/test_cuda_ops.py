#!/usr/bin/env python3
"""Tests of cuda_ops.py on a CPU: torch's own peers, and stand-ins with the signatures of fla, flashinfer and
causal-conv1d, right and wrong ones.

    python3 test_cuda_ops.py
Needs: torch.
"""
import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import types
import unittest
from pathlib import Path

import torch
from torch.nn import functional as F

import cuda_ops

DELTA = {"op": "gated_delta", "shape": "2/4x16", "dtype": "f32", "tokens": 70}
CONV = {"op": "causal_conv", "shape": "16x4", "dtype": "f32", "tokens": 5}
ATTENTION = {"op": "attention", "shape": "20", "dtype": "f16", "tokens": 7, "heads": "4/2", "dim": 16}


def loop(q, k, v, g, beta, state, l2norm):
    o, s = cuda_ops.delta_loop(torch, q, k, v, g, beta, state, l2norm, torch.float32)
    return o.to(q.dtype), s


def fla(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel):
    o, s = loop(q, k, v, g, beta, initial_state.transpose(-1, -2), use_qk_l2norm_in_kernel)
    return o, s.transpose(-1, -2)


def flashinfer_prefill(q, k, v, g, beta, initial_state, output_final_state, cu_seqlens):
    parts = [[x[a:b].unsqueeze(0) for x in (q, k, v, g.log(), beta)] for a, b in zip(cu_seqlens, cu_seqlens[1:])]
    done = [loop(*part, s.unsqueeze(0), False) for part, s in zip(parts, initial_state)]
    return torch.cat([o[0] for o, _ in done]), torch.cat([s for _, s in done])


def flashinfer_decode(q, k, v, state, A_log, a, dt_bias, b, use_qk_l2norm):
    g = -A_log.exp() * F.softplus(a.float() + dt_bias)
    o, s = loop(q, k, v, g, b.float().sigmoid(), state, use_qk_l2norm)
    return o, state.copy_(s)


def conv_update(x, conv_state, weight, activation):
    whole = torch.cat([conv_state, x.unsqueeze(-1)], -1)
    conv_state.copy_(whole[..., 1:])
    return F.silu((whole * weight).sum(-1))


def conv(x, weight, initial_states, return_final_states, final_states_out, activation):
    whole = torch.cat([initial_states, x], -1)
    final_states_out.copy_(whole[..., -initial_states.shape[-1]:])
    return F.silu(F.conv1d(whole, weight.unsqueeze(1), groups=weight.shape[0])), final_states_out


def attend(q, k, v, causal=False, use_tensor_cores=None):
    q = q if q.dim() == 3 else q.unsqueeze(0)
    heads = [x.float().transpose(0, 1) for x in (q, k, v)]
    mask = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
    o = F.scaled_dot_product_attention(*heads, attn_mask=mask if causal else None, enable_gqa=True)
    return o.transpose(0, 1).to(q.dtype).squeeze(0) if use_tensor_cores is not None else o.transpose(0, 1).to(q.dtype)


STAND_INS = {
    "fla": {},
    "fla.ops": {},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": fla, "fused_recurrent_gated_delta_rule": fla},
    "flashinfer": {"single_prefill_with_kv_cache": attend, "single_decode_with_kv_cache": attend},
    "flashinfer.gdn_prefill": {"chunk_gated_delta_rule": flashinfer_prefill},
    "flashinfer.gdn_decode": {"gated_delta_rule_decode_pretranspose": flashinfer_decode},
    "flashinfer.norm": {"rmsnorm": lambda x, w, eps: F.rms_norm(x.float(), x.shape[-1:], w.float(), eps).to(x.dtype)},
    "causal_conv1d": {"causal_conv1d_fn": conv, "causal_conv1d_update": conv_update},
}


def ask(case, **others):
    """What is said about a case: {peer: (verdict, why)}. Modules are the stand-ins, or `others` in their place."""
    for name in STAND_INS:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(others.get(name.replace(".", "_"), STAND_INS[name]))
    args, said = argparse.Namespace(device="cpu", repetitions=2, warm=False, limit=600.0), []
    cuda_ops.tell(case, args, lambda line: said.extend(line.items()))
    for _, line in said:
        if "seconds" in line:
            assert line["seconds"] and line["bytes"] > 0 and line["row_l2"] <= line["limit"], line
    return {line["peer"]: (verdict, line.get("why")) for verdict, line in said}


class Tests(unittest.TestCase):
    def test_all_are_verified_and_timed(self):
        for case, names in [
            (DELTA, ["torch chunks (f32)", "fla chunk (bf16)", "fla recurrent (bf16)",
                     "flashinfer prefill unnormed (bf16)"]),
            ({**DELTA, "shape": "3 of 2/4x16", "batch": 3, "tokens": 1},
             ["torch step (f32)", "fla chunk (bf16)", "fla recurrent (bf16)",
              "flashinfer decode+gates (bf16)"]),
            ({**DELTA, "shape": "2 of 1/1x16", "batch": 2, "tokens": 64},
             ["torch chunks (f32)", "fla chunk (bf16)", "fla recurrent (bf16)", "flashinfer prefill unnormed (bf16)"]),
            (CONV, ["torch conv1d (f32)", "causal-conv1d (f32)", "causal-conv1d (bf16)"]),
            ({**CONV, "tokens": 1}, ["torch conv1d (f32)", "causal-conv1d (f32)", "causal-conv1d (bf16)"]),
            (ATTENTION, ["torch sdpa ungated (f16)", "flashinfer prefill ungated (f16)"]),
            ({**ATTENTION, "tokens": 20, "dtype": "bf16"},
             ["torch sdpa ungated (bf16)", "flashinfer prefill ungated (bf16)"]),
            ({**ATTENTION, "tokens": 1}, ["torch sdpa ungated (f16)", "flashinfer decode ungated (f16)",
                                          "flashinfer tensor-core decode ungated (f16)"]),
            ({**ATTENTION, "dtype": "f32"}, ["torch sdpa ungated (f32)"]),
            ({"op": "norm", "shape": "rms:3x64", "dtype": "f32", "tokens": 5},
             ["torch rms_norm (f32)", "flashinfer rmsnorm (bf16)"]),
            ({"op": "norm", "shape": "plain:3x64", "dtype": "f32", "tokens": 5}, ["torch rms_norm (f32)"]),
            ({"op": "solve_tri", "shape": "64x32", "dtype": "f32", "tokens": 3}, ["torch solve_triangular (f32)"]),
            ({"op": "solve_tri", "shape": "inverse:64", "dtype": "f32", "tokens": 3}, ["torch solve_triangular (f32)"]),
            ({"op": "matmul", "shape": "30x64", "dtype": "bf16", "tokens": 3}, ["torch linear (bf16)"]),
            ({"op": "matmul", "shape": "30x64", "dtype": "f16", "tokens": 3}, ["torch linear (f16)"]),
            ({"op": "moe_route", "shape": "64/10", "dtype": "f32", "tokens": 3}, ["torch softmax+topk (f32)"]),
        ]:
            self.assertEqual(ask(case), {name: ("timed", None) for name in names}, case)

    def test_what_has_no_peer_says_so(self):
        for op, shape, dtype in [("rope", "16x256x64", "f32"), ("norm", "l2:1x16", "f32"), ("matmul", "8x256", "q4_k"),
                                 ("attention", "20", "q8_0")]:
            case = {"op": op, "shape": shape, "dtype": dtype, "tokens": 1}
            self.assertEqual(ask(case), {"peers": ("skipped", f"none compares with {op} {shape} {dtype}")})

    def test_a_wrong_peer_is_not_timed(self):
        def spoiled(**inputs):
            o, s = fla(**inputs)
            return o.index_fill(1, torch.tensor([69]), float("nan")), s

        def one_row(**inputs):
            o, s = fla(**inputs)
            return o.index_copy(1, torch.tensor([69]), o[:, 68:69]), s

        def narrow(**inputs):
            o, s = fla(**inputs)
            return o[..., :8], s

        def raises(**inputs):
            raise RuntimeError("no kernel\nfor this\n")

        off = "a row is off by "
        for why, wrong in [
            (off, lambda g, **rest: fla(g=0 * g, **rest)),
            (off, lambda v, **rest: fla(v=v.roll(1, 2), **rest)),
            (off, lambda q, **rest: fla(q=q, **{**rest, "use_qk_l2norm_in_kernel": False})),
            (off, lambda **inputs: (fla(**inputs)[0], inputs["initial_state"])),
            (off, one_row),
            ("a row is off by nan", spoiled),
            ("gave [1, 70, 4, 8], expected [1, 70, 4, 16]", narrow),
            ("RuntimeError: no kernel", raises),
        ]:
            names = {"chunk_gated_delta_rule": wrong, "fused_recurrent_gated_delta_rule": fla}
            said = ask(DELTA, fla_ops_gated_delta_rule=names)
            verdict, reason = said["fla chunk (bf16)"]
            self.assertEqual(verdict, "failed", why)
            self.assertTrue(reason.startswith(why), reason)
            self.assertEqual(said["fla recurrent (bf16)"], ("timed", None))
        said = ask(DELTA, fla_ops_gated_delta_rule={})
        self.assertEqual(said["fla chunk (bf16)"][0], "failed")

    def test_the_limit_is_between_rounding_and_a_mistake(self):
        want = torch.randn(50, 64, dtype=torch.float64)
        self.assertLess(cuda_ops.worst_row(torch, [want.bfloat16()], [want]), cuda_ops.LIMITS["bf16"] / 5)
        self.assertLess(cuda_ops.worst_row(torch, [want.half()], [want]), cuda_ops.LIMITS["f16"] / 5)
        self.assertGreater(cuda_ops.worst_row(torch, [want.roll(1, 0)], [want]), 1.0)
        with self.assertRaises(ValueError):
            cuda_ops.worst_row(torch, [want, want], [want])

    def test_a_gpu_is_kept_ahead_of_python(self):
        gpu, log = stub_of_a_gpu()
        args = argparse.Namespace(repetitions=3, warm=False)
        seconds, in_graph = cuda_ops.on_gpu(gpu, lambda: log.append("call"), args)
        self.assertEqual((seconds, in_graph), ([2e-3] * 3, None))
        sample = ["sleep", "flush", "event", "call", "event"]
        self.assertEqual(log, ["wait", "call", "wait"] * 2 + sample * 3 + ["wait"])

        gpu, log = stub_of_a_gpu()
        args = argparse.Namespace(repetitions=4, warm=True)
        seconds, in_graph = cuda_ops.on_gpu(gpu, lambda: log.append("call"), args)
        self.assertEqual((seconds, in_graph), ([2e-3] * 4, 2e-3 / 4))
        self.assertNotIn("flush", log)
        captured = ["capture", *["call"] * 4, "replay", "sleep", "event", "replay", "event", "wait"]
        self.assertEqual(log[log.index("capture"):], captured)

        gpu, log = stub_of_a_gpu()

        def fails():
            if "capture" in log:
                raise RuntimeError("not while a stream is captured")
        self.assertEqual(cuda_ops.on_gpu(gpu, fails, args), ([2e-3] * 4, None))

    def test_what_a_module_prints_is_no_line(self):
        said, stderr = command({"fla.py": "print('welcome')\nraise OSError('no driver')\n"})
        self.assertEqual(said["fla"], {"peer": "fla", "why": "OSError: no driver"})
        self.assertEqual(len(said["torch chunks (f32)"]["seconds"]), 1)
        self.assertIn("welcome", stderr)

    def test_a_peer_that_hangs_ends_the_process(self):
        slow = "import time\ndef chunk_gated_delta_rule(**_):\n    time.sleep(3600)\n"
        said, _ = command({"fla/ops/gated_delta_rule.py": slow}, "--limit", "10")
        self.assertEqual(list(said), ["torch chunks (f32)", "fla chunk (bf16)"])
        self.assertEqual(said["fla chunk (bf16)"]["why"], "not done after 10 s; peers after it were left out")


def stub_of_a_gpu():
    """What `on_gpu` uses of torch, every span 2 ms, and the log of what was queued."""
    log = []

    @contextlib.contextmanager
    def capture(_):
        log.append("capture")
        yield

    event = types.SimpleNamespace(record=lambda: log.append("event"), elapsed_time=lambda _: 2.0)
    cuda = types.SimpleNamespace(
        Event=lambda enable_timing: event, synchronize=lambda: log.append("wait"), _sleep=lambda _: log.append("sleep"),
        CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: log.append("replay")), graph=capture)
    other = types.SimpleNamespace(zero_=lambda: log.append("flush"))
    return types.SimpleNamespace(cuda=cuda, uint8=None, empty=lambda *_, **__: other), log


def command(modules, *flags):
    """What the command says in a process of its own, by peer, and its stderr, with these modules there to import."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in modules.items():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_text(text)
        environment = {**os.environ, "PYTHONPATH": folder}
        done = subprocess.run([sys.executable, cuda_ops.__file__, "--device", "cpu", "-r", "1", *flags,
                               "--case", json.dumps({**DELTA, "tokens": 2})],
                              capture_output=True, text=True, env=environment, check=True)
    lines = [line for text in done.stdout.splitlines() for line in json.loads(text).values()]
    return {line["peer"]: line for line in lines}, done.stderr


if __name__ == "__main__":
    unittest.main()
