#!/usr/bin/env python3
"""layers.safetensors: single operators and blocks from transformers' modules, float32, with their weights and inputs.

Key `case.array`; the index of cases with their shapes and parameters is the file's metadata entry `cases`.

    python3 make_layers.py
"""
import json, os
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np, torch
import transformers.models.qwen3_next.modeling_qwen3_next as m
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
rng = np.random.default_rng(17)
randn = lambda *s, scale=1.0: torch.from_numpy((rng.standard_normal(s) * scale).astype(np.float32))
out, index = {}, {}


def case(name, arrays, **params):
    for k, x in arrays.items():
        assert torch.isfinite(x.detach()).all(), name
        out[f"{name}.{k}"] = x.detach().contiguous().clone()
    index[name] = params
    print(name, params)


def unwrap(f):
    while hasattr(f, "__wrapped__"): f = f.__wrapped__
    return f


def config(**kw):
    cfg = m.Qwen3NextConfig(**(dict(vocab_size=64, hidden_size=48, num_hidden_layers=4, max_position_embeddings=4096) | kw))
    cfg._attn_implementation = cfg._experts_implementation = "eager"
    return cfg


def fill(module, scale=1.0):
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(randn(*p.shape, scale=0.15 if "norm" in name else scale / p.shape[-1] ** 0.5))
    return module.eval()


def weights(module): return {k: v for k, v in module.named_parameters()}


def conv():
    """x, out: [B, C, T]; state_in, state_out: [B, C, K-1], oldest first, inputs before the convolution."""
    prefill, update = unwrap(m.causal_conv1d_fn), unwrap(m.causal_conv1d_update)
    for k, t, c in ((4, 1, 24), (4, 2, 24), (4, 3, 24), (4, 9, 40), (4, 64, 17), (3, 7, 24), (2, 5, 24)):
        x, w, state = randn(2, c, t, scale=2), randn(c, k, scale=0.5), randn(2, c, k - 1, scale=2)
        case(f"conv_k{k}_t{t}_fresh", dict(x=x, w=w, out=prefill(x, w, None, activation="silu")), K=k, T=t, C=c)
        after = state.clone()
        y = update(x, after, w, None, "silu")
        whole = prefill(torch.cat([state, x], -1), w, None, activation="silu")[..., k - 1:]
        assert (whole - y).abs().max() < 1e-5
        case(f"conv_k{k}_t{t}_state", dict(x=x, w=w, state_in=state, out=y, state_out=after), K=k, T=t, C=c)


def norms():
    for n in (16, 100, 128, 2048):
        x = randn(6, n) * torch.tensor([1.0, 1e-3, 1e3, 30.0, 1e-6, 0.0])[:, None]
        for eps in (1e-6, 1e-5):
            norm = m.Qwen3NextRMSNorm(n, eps=eps)
            with torch.no_grad(): norm.weight.copy_(randn(n, scale=0.3))
            case(f"rms_zero_centred_{n}_{eps:g}", dict(x=x, w=norm.weight, out=norm(x)), eps=eps)
        gated = m.Qwen3NextRMSNormGated(n, eps=1e-6)
        with torch.no_grad(): gated.weight.copy_(1 + randn(n, scale=0.3))
        z = randn(6, n, scale=3)
        case(f"rms_gated_{n}", dict(x=x, w=gated.weight, z=z, out=gated(x, z)), eps=1e-6)
        case(f"l2_{n}", dict(x=x, out=m.l2norm(x, dim=-1, eps=1e-6)), eps=1e-6)


def rope():
    for d, factor, theta in ((256, 0.25, 1e7), (64, 0.25, 1e4), (32, 0.5, 5e5), (16, 1.0, 1e4)):
        emb = m.Qwen3NextRotaryEmbedding(config(head_dim=d, partial_rotary_factor=factor, rope_theta=theta))
        pos = torch.tensor([[0, 1, 2, 7, 63, 64, 100, 1000, 4095]])
        q, k = randn(1, 3, 9, d), randn(1, 1, 9, d)
        cos, sin = emb(q, pos)
        qo, ko = m.apply_rotary_pos_emb(q, k, cos, sin)
        case(f"rope_{d}_{factor}", dict(q=q, k=k, positions=pos[0], q_out=qo, k_out=ko, cos=cos[0], sin=sin[0]),
             head_dim=d, rotary=int(d * factor), theta=theta)


def causal_mask(t): return torch.full((t, t), float("-inf")).triu(1)[None, None]


def attention():
    """The softmax kernel alone (q, k, v: [B, H, T, d]; o: [B, T, H, d]) and the whole block with norm, rotation and gate."""
    for hq, hk, t, past, d in ((4, 2, 9, 0, 64), (3, 1, 1, 33, 32), (8, 2, 20, 45, 16), (4, 4, 70, 0, 16), (4, 1, 5, 3, 128)):
        q, k, v = randn(1, hq, t, d, scale=2), randn(1, hk, t + past, d), randn(1, hk, t + past, d)
        mod = torch.nn.Module(); mod.num_key_value_groups = hq // hk
        mask = causal_mask(t + past)[:, :, past:]
        o, p = m.eager_attention_forward(mod, q, k, v, mask, scaling=d ** -0.5)
        case(f"attn_q{hq}_kv{hk}_t{t}_past{past}_d{d}", dict(q=q, k=k, v=v, o=o), scale=d ** -0.5, causal=True, past=past)
    for heads, kv, d, t in ((4, 2, 16, 12), (3, 1, 32, 70)):
        cfg = config(num_attention_heads=heads, num_key_value_heads=kv, head_dim=d, rope_theta=1e4)
        blk = fill(m.Qwen3NextAttention(cfg, 3))
        x = randn(1, t, cfg.hidden_size)
        cs = m.Qwen3NextRotaryEmbedding(cfg)(x, torch.arange(t)[None])
        y, _ = blk(x, cs, causal_mask(t))
        case(f"attention_block_{heads}_{kv}_{d}", weights(blk) | dict(x=x, out=y), heads=heads, kv_heads=kv, head_dim=d,
             rotary=d // 4, theta=1e4, eps=cfg.rms_norm_eps)


def delta_block():
    for hk, hv, dk, dv, t in ((2, 4, 16, 16, 12), (2, 6, 8, 16, 70)):
        cfg = config(linear_num_key_heads=hk, linear_num_value_heads=hv, linear_key_head_dim=dk, linear_value_head_dim=dv)
        blk = fill(m.Qwen3NextGatedDeltaNet(cfg, 0))
        with torch.no_grad():
            blk.A_log.copy_(torch.from_numpy(np.log(rng.uniform(0.05, 8, hv)).astype(np.float32)))
            blk.dt_bias.copy_(torch.from_numpy(rng.uniform(-5, 0.5, hv).astype(np.float32)))
            blk.norm.weight.add_(1.0)
        x = randn(2, t, cfg.hidden_size)
        case(f"delta_block_{hk}_{hv}_{dk}_{dv}", weights(blk) | dict(x=x, out=blk(x)), H_k=hk, H_v=hv, d_k=dk, d_v=dv,
             conv=4, eps=cfg.rms_norm_eps)


def moe():
    """expert_out: routed experts alone; out: with the gated shared expert."""
    for e, k, renorm, t in ((8, 2, True, 20), (16, 5, True, 33), (8, 3, False, 9), (4, 4, True, 1)):
        cfg = config(num_experts=e, num_experts_per_tok=k, norm_topk_prob=renorm, moe_intermediate_size=24,
                     shared_expert_intermediate_size=40)
        blk = fill(m.Qwen3NextSparseMoeBlock(cfg), 1.5)
        x = randn(1, t, cfg.hidden_size)
        logits, w, ids = blk.gate(x[0])
        case(f"moe_e{e}_k{k}_{'renorm' if renorm else 'raw'}", weights(blk) | dict(
            x=x[0], router_logits=logits, topk_ids=ids, topk_weights=w, expert_out=blk.experts(x[0], ids, w), out=blk(x)[0]),
            experts=e, top_k=k, norm_topk_prob=renorm)
    cfg = config(intermediate_size=40)
    mlp, x = fill(m.Qwen3NextMLP(cfg)), randn(7, cfg.hidden_size)
    case("mlp", weights(mlp) | dict(x=x, out=mlp(x)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        for f in (conv, norms, rope, attention, delta_block, moe): f()
    save_file(out, f"{HERE}/layers.safetensors", metadata=dict(cases=json.dumps(index)))
