#!/usr/bin/env python3
"""models/<name>/: tiny random Qwen3-Next models, their logits from transformers, and the same weights as GGUF.

    python3 make_models.py
"""
import json, os, shutil
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np, torch, transformers
from safetensors.torch import load_file, save_file
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from hf_to_gguf import write_gguf

HERE = os.path.dirname(os.path.abspath(__file__))
BASE = dict(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, partial_rotary_factor=0.25, rope_theta=10000.0, linear_conv_kernel_dim=4, linear_key_head_dim=16,
    linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=12, shared_expert_intermediate_size=20, norm_topk_prob=True, rms_norm_eps=1e-6,
    max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=99, bos_token_id=None)
L, A = "linear_attention", "full_attention"
# name: (config changes, sequence lengths, expert naming in safetensors, shards, GGUF variants, notes)
MODELS = {
    "plain": (dict(vocab_size=280, eos_token_id=279), [40, 17, 5], "separate", 1, [],
              "the plain shape, ratio 2; has a tokenizer; GGUF without recurrent_layers (interval only)"),
    "ratio3": (dict(linear_num_value_heads=6), [70, 64, 1], "fused", 1, ["legacy"],
               "H_k 2, H_v 6; 70 tokens end in a partial chunk; config.json in the released checkpoints' style "
               "(rope_theta, partial_rotary_factor and full_attention_interval at the top level, no layer_types)"),
    "dk_ne_dv": (dict(linear_key_head_dim=8, linear_value_head_dim=24), [67, 3], "separate", 2, [],
                 "d_k 8, d_v 24; sharded safetensors. llama.cpp's loader takes d_v = ssm.state_size and refuses it"),
    "tied": (dict(tie_word_embeddings=True, num_experts=7, num_experts_per_tok=3), [130], "fused", 1, ["merged"],
             "tied embeddings, no output.weight; two full chunks and 2 tokens"),
    "dense_mix": (dict(num_hidden_layers=5, mlp_only_layers=[1], decoder_sparse_step=2), [66, 2], "separate", 1, ["split"],
                  "MoE in layer 3 only (0-based): 1 is in mlp_only_layers, 0 2 4 fall to decoder_sparse_step. "
                  "llama.cpp's loader wants MoE in every layer and refuses it"),
    "pattern": (dict(num_hidden_layers=5, layer_types=[A, L, L, A, L], linear_conv_kernel_dim=3, head_dim=32,
                     partial_rotary_factor=0.5, rope_theta=500000.0, norm_topk_prob=False, num_attention_heads=3,
                     num_key_value_heads=1, rms_norm_eps=1e-5, linear_num_key_heads=4, linear_num_value_heads=4, num_experts=5,
                     linear_key_head_dim=8, linear_value_head_dim=8),
                [65, 4], "fused", 2, [],
                "non-periodic layers, conv 3, rotary 16 of 32, other theta and eps, ratio 1, norm_topk_prob false "
                "(expert_weights_norm false in the GGUF; llama.cpp ignores that key for qwen3next and always renormalises)"),
    "mtp": (dict(num_hidden_layers=2, layer_types=[L, A]), [33], "separate", 1, [],
            "carries a multi-token-prediction block (mtp.*, nextn.*), which transformers ignores; logits are the trunk's"),
}


def randomise(model, rng):
    """Activations of order 1; gates, decays, norms and routing that vary."""
    normal = lambda p, s, m=0.0: p.copy_(torch.from_numpy(rng.standard_normal(p.shape) * s + m))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("linear_attn.norm.weight"): normal(p, 0.2, 1.0)
            elif name.endswith("norm.weight"): normal(p, 0.15)
            elif name.endswith("A_log"): p.copy_(torch.from_numpy(np.log(rng.uniform(0.05, 8, p.shape))))
            elif name.endswith("dt_bias"): p.copy_(torch.from_numpy(rng.uniform(-5, 0.5, p.shape)))
            elif name.endswith("conv1d.weight"): normal(p, 0.5)
            elif name.endswith("embed_tokens.weight"): normal(p, 1.0)
            elif name.endswith("mlp.gate.weight"): normal(p, 2.0 / p.shape[-1] ** 0.5)
            elif name.endswith("lm_head.weight"): normal(p, 2.0 / p.shape[-1] ** 0.5)
            else: normal(p, 1.2 / p.shape[-1] ** 0.5)


def mtp_tensors(sd, cfg, rng):
    """An MTP block: a full-attention block under mtp.layers.0, shapes taken from the last trunk layer."""
    last, h, out = f"model.layers.{cfg['num_hidden_layers'] - 1}.", cfg["hidden_size"], {}
    for k, v in sd.items():
        if k.startswith(last): out["mtp.layers.0." + k[len(last):]] = torch.from_numpy(rng.standard_normal(v.shape)).float() * 0.1
    for k, shape in (("fc", (h, 2 * h)), ("norm", (h,)), ("pre_fc_norm_embedding", (h,)), ("pre_fc_norm_hidden", (h,))):
        out[f"mtp.{k}.weight"] = torch.from_numpy(rng.standard_normal(shape)).float() * 0.1
    return out


def tiny_tokenizer(path):
    """The first merges of the trained model's tokenizer, and the end token: 280 tokens."""
    tok = json.load(open(f"{HERE}/../../model/assets/tokenizer.json"))
    merges = tok["model"]["merges"][:23]
    base = sorted((i, t) for t, i in tok["model"]["vocab"].items() if i < 256)
    tok["model"]["vocab"] = {t: i for i, t in base} | {"".join(m): 256 + i for i, m in enumerate(merges)}
    tok["model"]["merges"], tok["added_tokens"][0]["id"] = merges, 279
    tok["model"]["vocab"].pop("<|endoftext|>", None)
    json.dump(tok, open(path, "w"), ensure_ascii=False, indent=1)


def released_style(path):
    c = json.load(open(path))
    rope = c.pop("rope_parameters")
    del c["layer_types"]
    c |= dict(rope_theta=rope["rope_theta"], partial_rotary_factor=rope["partial_rotary_factor"], rope_scaling=None,
              full_attention_interval=4)
    json.dump(c, open(path, "w"), indent=2, sort_keys=True)


def save(folder, sd, naming, shards):
    """`fused`: one tensor for all experts, gate rows above up rows. `separate`: the naming of the released checkpoints."""
    out = {}
    for k, v in sd.items():
        stem = k.rsplit(".", 1)[0]
        if k.endswith("experts.gate_up_proj") and naming == "separate":
            for e, x in enumerate(v):
                gate, up = x.chunk(2)
                out[f"{stem}.{e}.gate_proj.weight"], out[f"{stem}.{e}.up_proj.weight"] = gate, up
        elif k.endswith("experts.down_proj") and naming == "separate":
            for e, x in enumerate(v): out[f"{stem}.{e}.down_proj.weight"] = x
        else: out[k] = v
    out = {k: v.contiguous().clone() for k, v in out.items()}
    if shards == 1: return save_file(out, f"{folder}/model.safetensors", metadata={"format": "pt"})
    keys, where = sorted(out), {}
    for s in range(shards):
        f = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        part = keys[s::shards]
        save_file({k: out[k] for k in part}, f"{folder}/{f}", metadata={"format": "pt"})
        where.update({k: f for k in part})
    size = sum(v.numel() * v.element_size() for v in out.values())
    json.dump(dict(metadata=dict(total_size=size), weight_map=dict(sorted(where.items()))),
              open(f"{folder}/model.safetensors.index.json", "w"), indent=1)


def main():
    torch.set_num_threads(1)
    shutil.rmtree(f"{HERE}/models", ignore_errors=True)
    for number, (name, (changes, lengths, naming, shards, variants, note)) in enumerate(MODELS.items()):
        rng = np.random.default_rng(1000 + number)
        folder = f"{HERE}/models/{name}"
        os.makedirs(folder)
        cfg = Qwen3NextConfig(**(BASE | changes))
        cfg.dtype = torch.float32
        cfg.architectures = ["Qwen3NextForCausalLM"]
        model = Qwen3NextForCausalLM._from_config(cfg, attn_implementation="eager", experts_implementation="eager").eval()
        randomise(model, rng)
        sd = {k: v for k, v in model.state_dict().items() if not (cfg.tie_word_embeddings and k == "lm_head.weight")}
        if name == "mtp": sd |= mtp_tensors(sd, cfg.to_dict(), rng)
        cfg.save_pretrained(folder)
        if name == "ratio3": released_style(f"{folder}/config.json")
        save(folder, sd, naming, shards)
        if cfg.vocab_size == 280: tiny_tokenizer(f"{folder}/tokenizer.json")

        # the golden figures come from the saved files, read back by the unmodified class
        model = Qwen3NextForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()
        out, layers = {}, []
        for layer in model.model.layers: layer.register_forward_hook(lambda m, i, o: layers.append(o))
        for s, n in enumerate(lengths):
            suffix = "" if s == 0 else f".{s}"
            tokens = torch.from_numpy(rng.integers(0, cfg.vocab_size, n))
            layers.clear()
            with torch.no_grad(): logits = model(input_ids=tokens[None], use_cache=False).logits[0]
            out["tokens" + suffix], out["logits" + suffix] = tokens, logits.contiguous()
            if s == 0:
                for i, x in enumerate(layers): out[f"layer_out.{i}"] = x[0].contiguous()
        assert all(torch.isfinite(v).all() for v in out.values())
        versions = dict(transformers=transformers.__version__, torch=torch.__version__.split("+")[0])
        save_file(out, f"{folder}/golden.safetensors", metadata=dict(about=json.dumps(dict(note=note) | versions)))   # one entry: their order is random
        interval_only = name == "plain"
        write_gguf(f"{folder}/model.gguf", folder, name, interval_only=interval_only)
        if "legacy" in variants: write_gguf(f"{folder}/model-legacy.gguf", folder, name, layout="legacy", interval_only=interval_only)
        if "merged" in variants: write_gguf(f"{folder}/model-merged.gguf", folder, name, experts="merged")
        if "split" in variants: write_gguf(f"{folder}/model-split.gguf", folder, name, split=30)
        std = [float(x.std()) for x in layers]
        print(f"{name}: logits std {out['logits'].std():.2f}, layer_out std of the last sequence {[f'{x:.2f}' for x in std]}")


if __name__ == "__main__": main()
