#!/usr/bin/env python3
"""A Hugging Face Qwen3-Next folder as GGUF (arch `qwen3next`), written with numpy and gguf-py.

Independent of this project's own loaders: the transforms follow the public converter of llama.cpp
(norms + 1 except linear_attn.norm, -exp(A_log), conv squeezed, qkvz de-interleaved).

    python3 hf_to_gguf.py hf-folder out.gguf [--quant q8_0] [--layout legacy] [--experts merged] [--split N]
"""
import argparse, glob, json, os
import numpy as np
from gguf import GGMLQuantizationType as T, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import quantize
from safetensors.numpy import load_file

F32_ALWAYS = ("ffn_gate_inp.weight", "ssm_conv1d.weight")       # as the public converter keeps them


def load_hf(folder):
    """config dict, name -> float32 array (shards merged)"""
    cfg = json.load(open(f"{folder}/config.json"))
    sd = {}
    for f in sorted(glob.glob(f"{folder}/model*.safetensors")): sd.update(load_file(f))
    return cfg, {k: np.asarray(v, dtype=np.float32) for k, v in sd.items()}


def layer_types(cfg):
    if cfg.get("layer_types"): return cfg["layer_types"]
    n = cfg.get("full_attention_interval", 4)
    return ["full_attention" if (i + 1) % n == 0 else "linear_attention" for i in range(cfg["num_hidden_layers"])]


def gguf_tensors(cfg, sd, layout="split", experts="separate"):
    """GGUF name -> float32 array in numpy order (rows, columns)"""
    hk, hv = cfg["linear_num_key_heads"], cfg["linear_num_value_heads"]
    dk, dv, r = cfg["linear_key_head_dim"], cfg["linear_value_head_dim"], hv // hk
    n, out = cfg["num_hidden_layers"], {}
    out["token_embd.weight"] = sd["model.embed_tokens.weight"]
    out["output_norm.weight"] = 1 + sd["model.norm.weight"]
    if not cfg.get("tie_word_embeddings"): out["output.weight"] = sd["lm_head.weight"]

    def block(src, dst):
        w = lambda name: sd[f"{src}.{name}"]
        put = lambda name, x: out.__setitem__(f"{dst}.{name}", x)
        put("attn_norm.weight", 1 + w("input_layernorm.weight"))
        put("post_attention_norm.weight", 1 + w("post_attention_layernorm.weight"))
        if f"{src}.self_attn.q_proj.weight" in sd:
            for a, b in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v"), ("o_proj", "attn_output")):
                put(f"{b}.weight", w(f"self_attn.{a}.weight"))
            put("attn_q_norm.weight", 1 + w("self_attn.q_norm.weight"))
            put("attn_k_norm.weight", 1 + w("self_attn.k_norm.weight"))
        else:
            qkvz = w("linear_attn.in_proj_qkvz.weight")
            if layout == "legacy":
                put("ssm_in.weight", qkvz)
            else:                                                # per k-head [q | k | v*r | z*r] -> q|k|v and z
                x = qkvz.reshape(hk, 2 * dk + 2 * r * dv, -1)
                q, k, v, z = np.split(x, [dk, 2 * dk, 2 * dk + r * dv], axis=1)
                put("attn_qkv.weight", np.concatenate([y.reshape(-1, qkvz.shape[1]) for y in (q, k, v)]))
                put("attn_gate.weight", z.reshape(-1, qkvz.shape[1]))
            put("ssm_ba.weight", w("linear_attn.in_proj_ba.weight"))
            put("ssm_conv1d.weight", w("linear_attn.conv1d.weight")[:, 0])
            put("ssm_dt.bias", w("linear_attn.dt_bias"))
            put("ssm_a", -np.exp(w("linear_attn.A_log")))
            put("ssm_norm.weight", w("linear_attn.norm.weight"))
            put("ssm_out.weight", w("linear_attn.out_proj.weight"))
        if f"{src}.mlp.gate.weight" not in sd:                   # a dense layer
            for a in ("gate", "up", "down"): put(f"ffn_{a}.weight", w(f"mlp.{a}_proj.weight"))
            return
        put("ffn_gate_inp.weight", w("mlp.gate.weight"))
        if f"{src}.mlp.experts.gate_up_proj" in sd:
            gate, up = np.split(w("mlp.experts.gate_up_proj"), 2, axis=1)
            down = w("mlp.experts.down_proj")
        else:
            gate, up, down = (np.stack([w(f"mlp.experts.{e}.{a}_proj.weight") for e in range(cfg["num_experts"])])
                              for a in ("gate", "up", "down"))
        if experts == "merged":
            put("ffn_gate_up_exps.weight", np.concatenate([gate, up], axis=1))
        else:
            put("ffn_gate_exps.weight", gate); put("ffn_up_exps.weight", up)
        put("ffn_down_exps.weight", down)
        put("ffn_gate_inp_shexp.weight", w("mlp.shared_expert_gate.weight")[0])
        for a in ("gate", "up", "down"): put(f"ffn_{a}_shexp.weight", w(f"mlp.shared_expert.{a}_proj.weight"))

    for i in range(n): block(f"model.layers.{i}", f"blk.{i}")
    if "mtp.fc.weight" in sd:                                    # one multi-token-prediction block after the others
        block("mtp.layers.0", f"blk.{n}")
        out[f"blk.{n}.nextn.eh_proj.weight"] = sd["mtp.fc.weight"]
        out[f"blk.{n}.nextn.enorm.weight"] = 1 + sd["mtp.pre_fc_norm_embedding.weight"]
        out[f"blk.{n}.nextn.hnorm.weight"] = 1 + sd["mtp.pre_fc_norm_hidden.weight"]
        out[f"blk.{n}.nextn.shared_head_norm.weight"] = 1 + sd["mtp.norm.weight"]
    return out


def write_gguf(path, folder, name, quant=None, layout="split", experts="separate", split=0, interval_only=False):
    """interval_only: leave out attention.recurrent_layers, as older files do."""
    cfg, sd = load_hf(folder)
    types, rope = layer_types(cfg), cfg.get("rope_parameters") or cfg
    mtp = int("mtp.fc.weight" in sd)
    g = GGUFWriter(path, "qwen3next", split_max_tensors=split)
    g.add_name(name)
    g.add_block_count(cfg["num_hidden_layers"] + mtp)
    g.add_context_length(cfg["max_position_embeddings"])
    g.add_embedding_length(cfg["hidden_size"])
    g.add_feed_forward_length(cfg["intermediate_size"])
    g.add_head_count(cfg["num_attention_heads"]); g.add_head_count_kv(cfg["num_key_value_heads"])
    g.add_key_length(cfg["head_dim"]); g.add_value_length(cfg["head_dim"])
    g.add_layer_norm_rms_eps(cfg["rms_norm_eps"])
    g.add_rope_freq_base(float(rope["rope_theta"]))
    g.add_rope_dimension_count(int(cfg["head_dim"] * rope.get("partial_rotary_factor", 0.25)))
    g.add_expert_count(cfg["num_experts"]); g.add_expert_used_count(cfg["num_experts_per_tok"])
    g.add_expert_feed_forward_length(cfg["moe_intermediate_size"])
    g.add_expert_shared_feed_forward_length(cfg["shared_expert_intermediate_size"])
    if not cfg["norm_topk_prob"]: g.add_expert_weights_norm(False)
    g.add_ssm_conv_kernel(cfg["linear_conv_kernel_dim"])
    g.add_ssm_state_size(cfg["linear_key_head_dim"])
    g.add_ssm_group_count(cfg["linear_num_key_heads"])
    g.add_ssm_time_step_rank(cfg["linear_num_value_heads"])
    g.add_ssm_inner_size(cfg["linear_value_head_dim"] * cfg["linear_num_value_heads"])
    if not interval_only:
        g.add_array("qwen3next.attention.recurrent_layers", [t == "linear_attention" for t in types] + [False] * mtp)
    full = [i + 1 for i, t in enumerate(types) if t == "full_attention"]
    if full and types == layer_types(dict(num_hidden_layers=len(types), full_attention_interval=full[0])):
        g.add_full_attention_interval(full[0])
    if mtp: g.add_uint32("qwen3next.nextn_predict_layers", mtp)
    g.add_file_type(LlamaFileType.MOSTLY_Q8_0 if quant else LlamaFileType.ALL_F32)
    if os.path.exists(f"{folder}/tokenizer.json"):
        tok = json.load(open(f"{folder}/tokenizer.json"))
        tokens = {i: t for t, i in tok["model"]["vocab"].items()}
        special = {t["id"]: t["content"] for t in tok["added_tokens"]}
        n = cfg["vocab_size"]
        g.add_tokenizer_model("gpt2"); g.add_tokenizer_pre("qwen2")
        g.add_token_list([special.get(i) or tokens[i] for i in range(n)])
        g.add_token_types([TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(n)])
        g.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tok["model"]["merges"]])
        g.add_eos_token_id(cfg["eos_token_id"]); g.add_add_bos_token(False)
    else:
        g.add_tokenizer_model("none"); g.add_vocab_size(cfg["vocab_size"])
    for key, x in gguf_tensors(cfg, sd, layout, experts).items():
        x = np.ascontiguousarray(x, dtype=np.float32)
        if quant == "q8_0" and x.ndim > 1 and x.shape[-1] % 32 == 0 and not key.endswith(F32_ALWAYS):
            g.add_tensor(key, quantize(x, T.Q8_0), raw_dtype=T.Q8_0)
        else:
            g.add_tensor(key, x)
    g.write_header_to_file(); g.write_kv_data_to_file(); g.write_tensors_to_file(); g.close()


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder"); ap.add_argument("out")
    ap.add_argument("--quant", choices=["q8_0"]); ap.add_argument("--layout", default="split", choices=["split", "legacy"])
    ap.add_argument("--experts", default="separate", choices=["separate", "merged"]); ap.add_argument("--split", type=int, default=0)
    a = ap.parse_args()
    write_gguf(a.out, a.folder, os.path.basename(os.path.abspath(a.folder)), a.quant, a.layout, a.experts, a.split)
