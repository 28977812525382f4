#!/usr/bin/env python3
"""perplexity.json, perplexity_logits.safetensors: the embedded GGUF on heldout.txt, with the unmodified transformers class.

The weights are those of the file: gguf-py dequantises, the converter's transforms are undone (norms - 1, log(-ssm_a),
qkv|z interleaved again), and Qwen3NextForCausalLM runs them in float32 (eager attention and experts, CPU, no cache).

    python3 make_perplexity.py                                  # transformers on the weights in the GGUF
    python3 make_perplexity.py --hf work/hf                     # adds the figure of the float32 weights before Q8_0
    python3 make_perplexity.py --llama-cpp                      # adds llama.cpp's figures (pip install llama-cpp-python)
"""
import argparse, json, math, os
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ASSETS = f"{HERE}/../../model/assets"
GGUF = f"{ASSETS}/qwen3next-kjv-q8_0.gguf"
N_CTX = 512
PROTOCOL = dict(
    tokens="heldout.txt as one text, tokenised once, no BOS, no EOS appended",
    windows=f"non-overlapping windows of {N_CTX} tokens from the start, each with an empty state; an incomplete last one is dropped",
    second_half=f"llama.cpp's llama-perplexity: logits at positions {N_CTX // 2} .. {N_CTX - 2} of a window are scored against the "
                f"token that follows ({N_CTX - 1 - N_CTX // 2} a window)",
    full=f"logits at positions 0 .. {N_CTX - 2} are scored ({N_CTX - 1} a window)",
    value="ppl = exp(mean nll over all scored tokens); nll_se = standard deviation of the token nll / sqrt(count); ppl_se = ppl * nll_se")


def hf_from_gguf(path):
    """config and state dict of the unmodified class, from the GGUF alone"""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    r = GGUFReader(path)
    kv = lambda k: r.fields[f"qwen3next.{k}"].contents()
    t = {x.name: torch.from_numpy(np.array(dequantize(x.data, x.tensor_type), dtype=np.float32)) for x in r.tensors}
    d, hk, hv = kv("ssm.state_size"), kv("ssm.group_count"), kv("ssm.time_step_rank")
    dv = kv("ssm.inner_size") // hv
    recurrent = kv("attention.recurrent_layers")
    cfg = dict(
        vocab_size=t["token_embd.weight"].shape[0], hidden_size=kv("embedding_length"), intermediate_size=kv("feed_forward_length"),
        num_hidden_layers=kv("block_count"), num_attention_heads=kv("attention.head_count"),
        num_key_value_heads=kv("attention.head_count_kv"), head_dim=kv("attention.key_length"),
        partial_rotary_factor=kv("rope.dimension_count") / kv("attention.key_length"), rope_theta=kv("rope.freq_base"),
        linear_conv_kernel_dim=kv("ssm.conv_kernel"), linear_key_head_dim=d, linear_value_head_dim=dv, linear_num_key_heads=hk,
        linear_num_value_heads=hv, num_experts=kv("expert_count"), num_experts_per_tok=kv("expert_used_count"),
        moe_intermediate_size=kv("expert_feed_forward_length"), norm_topk_prob=True,
        shared_expert_intermediate_size=kv("expert_shared_feed_forward_length"),
        rms_norm_eps=float(np.float32(kv("attention.layer_norm_rms_epsilon"))), max_position_embeddings=kv("context_length"),
        layer_types=["linear_attention" if x else "full_attention" for x in recurrent])
    sd = {"model.embed_tokens.weight": t["token_embd.weight"], "model.norm.weight": t["output_norm.weight"] - 1,
          "lm_head.weight": t["output.weight"]}
    for i, linear in enumerate(recurrent):
        g, h = (lambda k: t[f"blk.{i}.{k}"]), f"model.layers.{i}."
        sd[h + "input_layernorm.weight"] = g("attn_norm.weight") - 1
        sd[h + "post_attention_layernorm.weight"] = g("post_attention_norm.weight") - 1
        if linear:
            q, k, v = g("attn_qkv.weight").split([hk * d, hk * d, hv * dv])
            parts = [x.reshape(hk, -1, x.shape[-1]) for x in (q, k, v, g("attn_gate.weight"))]
            sd[h + "linear_attn.in_proj_qkvz.weight"] = torch.cat(parts, 1).flatten(0, 1)
            sd[h + "linear_attn.in_proj_ba.weight"] = g("ssm_ba.weight")
            sd[h + "linear_attn.conv1d.weight"] = g("ssm_conv1d.weight")[:, None]
            sd[h + "linear_attn.dt_bias"] = g("ssm_dt.bias")
            sd[h + "linear_attn.A_log"] = (-g("ssm_a").double()).log().float()
            sd[h + "linear_attn.norm.weight"] = g("ssm_norm.weight")
            sd[h + "linear_attn.out_proj.weight"] = g("ssm_out.weight")
        else:
            for a, b in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v"), ("o_proj", "attn_output")):
                sd[h + f"self_attn.{a}.weight"] = g(f"{b}.weight")
            for a in "qk": sd[h + f"self_attn.{a}_norm.weight"] = g(f"attn_{a}_norm.weight") - 1
        sd[h + "mlp.gate.weight"] = g("ffn_gate_inp.weight")
        sd[h + "mlp.experts.gate_up_proj"] = torch.cat([g("ffn_gate_exps.weight"), g("ffn_up_exps.weight")], 1)
        sd[h + "mlp.experts.down_proj"] = g("ffn_down_exps.weight")
        sd[h + "mlp.shared_expert_gate.weight"] = g("ffn_gate_inp_shexp.weight")[None]
        for a in ("gate", "up", "down"): sd[h + f"mlp.shared_expert.{a}_proj.weight"] = g(f"ffn_{a}_shexp.weight")
    return cfg, sd


def score(logits_of, ids):
    """logits_of(window) -> [N_CTX, vocab]; returns the figures of both conventions"""
    n = len(ids) // N_CTX
    nll = np.empty((n, N_CTX - 1))
    for w in range(n):
        x = ids[w * N_CTX:(w + 1) * N_CTX]
        z = np.asarray(logits_of(x), dtype=np.float64)[:-1]
        top = z.max(1, keepdims=True)
        nll[w] = (top[:, 0] + np.log(np.exp(z - top).sum(1))) - z[np.arange(N_CTX - 1), x[1:]]
    out = dict(windows=n)
    for name, part in (("second_half", nll[:, N_CTX // 2:]), ("full", nll)):
        mean, se = part.mean(), part.std(ddof=1) / math.sqrt(part.size)
        out[name] = dict(ppl=math.exp(mean), ppl_se=math.exp(mean) * se, nll=mean, nll_se=se, count=part.size,
                         window_nll=[round(float(x), 6) for x in part.mean(1)])
    return out


def transformers_model(cfg, sd):
    import torch
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
    torch.set_num_threads(1)
    model = Qwen3NextForCausalLM._from_config(Qwen3NextConfig(**cfg), attn_implementation="eager", experts_implementation="eager")
    model.load_state_dict(sd, strict=True)
    return model.float().eval()


def logits_fn(model):
    import torch
    def f(x):
        with torch.no_grad(): return model(input_ids=torch.from_numpy(np.asarray(x, dtype=np.int64))[None], use_cache=False).logits[0]
    return f


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--hf"); ap.add_argument("--llama-cpp", action="store_true"); ap.add_argument("--windows", type=int)
    a = ap.parse_args()
    from tokenizers import Tokenizer
    ids = np.array(Tokenizer.from_file(f"{ASSETS}/tokenizer.json").encode(open(f"{ASSETS}/heldout.txt").read()).ids)
    total = len(ids)
    if a.windows: ids = ids[:a.windows * N_CTX]
    path = f"{HERE}/perplexity.json"
    result = json.load(open(path)) if (a.hf or a.llama_cpp) else dict(model=os.path.basename(GGUF), n_ctx=N_CTX, tokens=total, protocol=PROTOCOL)
    if a.hf:
        import torch
        from transformers import Qwen3NextForCausalLM
        torch.set_num_threads(1)
        model = Qwen3NextForCausalLM.from_pretrained(a.hf, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
        result["transformers_before_q8_0"] = dict(weights="float32, as trained") | score(logits_fn(model.eval()), ids)
    elif a.llama_cpp:
        import llama_cpp
        logits = load_logits()
        for kv, key in ((0, "llama_cpp_kv_f32"), (1, "llama_cpp_kv_f16")):       # GGML_TYPE_F32, GGML_TYPE_F16 (its default)
            llm = llama_cpp.Llama(GGUF, n_ctx=N_CTX, n_batch=N_CTX, n_ubatch=N_CTX, logits_all=True, n_threads=1, n_threads_batch=1,
                                  type_k=kv, type_v=kv, verbose=False)
            own = llm.tokenize(open(f"{ASSETS}/heldout.txt", "rb").read(), add_bos=True, special=False)   # the file says: no BOS
            def f(x):
                llm._ctx.kv_cache_clear(); llm.reset(); llm.eval([int(i) for i in x])
                return llm.scores[:len(x)].copy()
            d = f(ids[:64]) - logits
            result[key] = dict(
                package=f"llama-cpp-python {llama_cpp.__version__}", weights="Q8_0, activations quantised to Q8_0 in its matrix products",
                same_tokens=[int(i) for i in own[:len(ids)]] == ids.tolist(),
                first_64_logits=dict(max_abs_diff=float(np.abs(d).max()), rms_diff=float(np.sqrt((d ** 2).mean())),
                                     top1_agree=int(((d + logits).argmax(1) == logits.argmax(1)).sum()))) | score(f, ids)
    else:
        import torch, transformers
        from safetensors.numpy import save_file
        f = logits_fn(transformers_model(*hf_from_gguf(GGUF)))
        result["transformers_q8_0"] = dict(weights="dequantised from the GGUF, computed in float32",
                                           versions=dict(transformers=transformers.__version__, torch=torch.__version__.split("+")[0])) | score(f, ids)
        whole, probe = f(ids[:N_CTX]).numpy(), np.array([64, 127, 128, 191, 255, 256, 383, 510, 511])
        save_file(dict(tokens=ids[:N_CTX].astype(np.int64), logits=np.ascontiguousarray(f(ids[:64]).numpy()), probe_positions=probe.astype(np.int64),
                       probe_logits=np.ascontiguousarray(whole[probe])), f"{HERE}/perplexity_logits.safetensors")
    json.dump(result, open(path, "w"), indent=1)
    for k, v in result.items():
        if isinstance(v, dict) and isinstance(v.get("full"), dict): print(k, {c: f"{result[k][c]['ppl']:.4f} +- {result[k][c]['ppl_se']:.4f}" for c in ("second_half", "full")})


def load_logits():
    from safetensors.numpy import load_file
    return load_file(f"{HERE}/perplexity_logits.safetensors")["logits"]


if __name__ == "__main__": main()
