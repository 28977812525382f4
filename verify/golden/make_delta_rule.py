#!/usr/bin/env python3
"""delta_rule.safetensors: the gated delta rule from transformers' two reference functions, and once more in float64.

The module's functions cast to float32 inside; here they run twice: as they are, and in float64 with that cast widened
(torch.float32 -> torch.float64 in the functions' own namespace), the formula untouched.

    python3 make_delta_rule.py
"""
import json, os, types
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np, torch
import transformers.models.qwen3_next.modeling_qwen3_next as m
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
# name: (B, T, H_k, H_v, d_k, d_v, initial state)
CASES = {
    "t1": (2, 1, 2, 2, 16, 16, False), "t1_s": (2, 1, 2, 4, 16, 16, True),
    "t5": (1, 5, 2, 6, 16, 16, False), "t5_s": (2, 5, 2, 2, 32, 32, True),
    "t64": (1, 64, 2, 4, 16, 16, False), "t64_s": (1, 64, 2, 2, 32, 16, True),
    "t70": (2, 70, 2, 2, 16, 32, False), "t70_s": (1, 70, 2, 6, 16, 16, True),
    "t129": (1, 129, 2, 2, 32, 32, False), "t129_s": (1, 129, 2, 4, 16, 16, True),
    "d128_s": (1, 70, 1, 2, 128, 128, True),
    "strong_decay": (1, 70, 2, 2, 16, 16, True), "parallel_keys": (1, 70, 2, 2, 16, 16, True),
}


class Wide:
    """torch, with float32 standing for float64"""
    float32 = torch.float64
    def __getattr__(self, name): return getattr(torch, name)


def unwrap(f):
    while hasattr(f, "__wrapped__"): f = f.__wrapped__
    return f


def widened(f):
    f, env = unwrap(f), dict(m.__dict__, torch=Wide())
    g = types.FunctionType(f.__code__, env, f.__name__, f.__defaults__, f.__closure__)
    g.__kwdefaults__ = f.__kwdefaults__
    return g


def inputs(name, b, t, hk, hv, dk, dv, rng):
    q, k = rng.standard_normal((b, t, hk, dk)), rng.standard_normal((b, t, hk, dk))
    if name == "parallel_keys": k = rng.standard_normal((b, 1, hk, dk)) + 0.02 * k
    v = rng.standard_normal((b, t, hv, dv)) * np.exp(rng.normal(0, 1, (b, t, hv, 1)))
    a = np.exp(rng.uniform(-3, 2, hv))                           # per head, from long memory to short
    g = -a * np.logaddexp(0, rng.normal(-2, 1.5, (b, t, hv)))
    if name == "strong_decay": g = np.where(rng.random(g.shape) < 0.2, rng.uniform(-316, -20, g.shape), g)
    beta = 1 / (1 + np.exp(-rng.normal(0, 2, (b, t, hv))))
    beta[:, ::11] = 0.0
    beta[:, 3::17] = 1.0
    return [torch.from_numpy(x.astype(np.float32)) for x in (q, k, v, g, beta)]


def main():
    torch.set_num_threads(1)
    rng, out, index = np.random.default_rng(7), {}, {}
    for name, (b, t, hk, hv, dk, dv, has_state) in CASES.items():
        q, k, v, g, beta = inputs(name, b, t, hk, hv, dk, dv, rng)
        s0 = torch.from_numpy(rng.standard_normal((b, hv, dk, dv)).astype(np.float32)) if has_state else None
        arrays = dict(q=q, k=k, v=v, g=g, beta=beta) | (dict(state0=s0) if has_state else {})
        for kind, f in (("recurrent", m.torch_recurrent_gated_delta_rule), ("chunk", m.torch_chunk_gated_delta_rule)):
            for suffix, fn, dtype in (("", unwrap(f), torch.float32), ("64", widened(f), torch.float64)):
                o, s = fn(*(x.to(dtype) for x in (q, k, v)), g=g.to(dtype), beta=beta.to(dtype),
                          initial_state=None if s0 is None else s0.to(dtype), output_final_state=True,
                          use_qk_l2norm_in_kernel=True)
                assert o.dtype == s.dtype == dtype
                if (kind, suffix) == ("recurrent", ""): continue
                if (kind, suffix) == ("chunk", "64"):            # not stored: only to see that both references agree
                    err = max((o - arrays["out_recurrent64"]).abs().max(), (s - arrays["state_recurrent64"]).abs().max())
                    assert err < 1e-10, (name, err)
                else:
                    arrays[f"out_{kind}{suffix}"], arrays[f"state_{kind}{suffix}"] = o, s
        for key, x in arrays.items(): out[f"{name}.{key}"] = x.contiguous()
        index[name] = dict(B=b, T=t, H_k=hk, H_v=hv, d_k=dk, d_v=dv, initial_state=has_state)
        d = (arrays["out_chunk"].double() - arrays["out_recurrent64"]).abs().max()
        print(f"{name}: f64 references agree to {err:.1e}; chunk f32 is off by {d:.1e}")
    save_file(out, f"{HERE}/delta_rule.safetensors", metadata=dict(cases=json.dumps(index)))


if __name__ == "__main__": main()
