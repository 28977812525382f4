"""Writes the hand-made seeds of every target: python3 fuzz/make_seeds.py. Needs nothing but Python."""

import json
import struct
from pathlib import Path

ROOT = Path(__file__).parent
GOLDEN = ROOT.parent / "verify" / "golden" / "models"


def text(s):
    b = s.encode()
    return struct.pack("<Q", len(b)) + b


def value(kind, v):
    """A GGUF metadata value: its type number and bytes."""
    if kind == 8:
        return text(v)
    if kind == 9:
        element, items = v
        return struct.pack("<IQ", element, len(items)) + b"".join(value(element, i) for i in items)
    return struct.pack("<" + {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}[kind], v)


def gguf(keys, tensors, version=3, alignment=32):
    """`tensors`: (name, dims with the fastest first); all f16 and zero."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    for name, kind, v in keys:
        head += text(name) + struct.pack("<I", kind) + value(kind, v)
    offset = 0
    for name, dims in tensors:
        head += text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", 1, offset)
        size = 2
        for d in dims:
            size *= d
        offset += (size + alignment - 1) // alignment * alignment
    pad = -len(head) % alignment if tensors else 0
    return head + bytes(pad + offset)


def byte_chars():
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(len(hidden))]


VOCAB = byte_chars() + ["th", "Ġth", "Ġthe", "<|im_start|>", "<|im_end|>"]


def vocabulary(tokens):
    return [
        ("tokenizer.ggml.model", 8, "gpt2"),
        ("tokenizer.ggml.pre", 8, "qwen2"),
        ("tokenizer.ggml.tokens", 9, (8, tokens)),
        ("tokenizer.ggml.token_type", 9, (5, [3 if t.startswith("<|") else 1 for t in tokens])),
        ("tokenizer.ggml.merges", 9, (8, ["t h", "Ġ th", "Ġth e"])),
        ("tokenizer.ggml.eos_token_id", 4, len(tokens) - 1),
        ("tokenizer.ggml.add_bos_token", 7, False),
    ]


def model_keys():
    size = lambda name, n: (f"qwen3next.{name}", 4, n)
    return [
        ("general.architecture", 8, "qwen3next"),
        size("block_count", 2),
        size("context_length", 8),
        size("embedding_length", 2),
        size("feed_forward_length", 1),
        size("attention.head_count", 1),
        size("attention.head_count_kv", 1),
        size("attention.key_length", 2),
        size("attention.value_length", 2),
        ("qwen3next.attention.layer_norm_rms_epsilon", 6, 1e-6),
        ("qwen3next.rope.freq_base", 6, 10000.0),
        size("rope.dimension_count", 2),
        size("expert_count", 2),
        size("expert_used_count", 1),
        size("expert_feed_forward_length", 1),
        size("expert_shared_feed_forward_length", 1),
        size("ssm.conv_kernel", 2),
        size("ssm.state_size", 1),
        size("ssm.group_count", 1),
        size("ssm.time_step_rank", 1),
        size("ssm.inner_size", 1),
        size("full_attention_interval", 2),
    ]


def model_tensors(vocab):
    moe = [
        ("ffn_gate_inp.weight", (2, 2)),
        ("ffn_gate_exps.weight", (2, 1, 2)),
        ("ffn_up_exps.weight", (2, 1, 2)),
        ("ffn_down_exps.weight", (1, 2, 2)),
        ("ffn_gate_inp_shexp.weight", (2,)),
        ("ffn_gate_shexp.weight", (2, 1)),
        ("ffn_up_shexp.weight", (2, 1)),
        ("ffn_down_shexp.weight", (1, 2)),
    ]
    norms = [("attn_norm.weight", (2,)), ("post_attention_norm.weight", (2,))]
    delta = [
        ("attn_qkv.weight", (2, 3)),
        ("attn_gate.weight", (2, 1)),
        ("ssm_ba.weight", (2, 2)),
        ("ssm_conv1d.weight", (2, 3)),
        ("ssm_dt.bias", (1,)),
        ("ssm_a", (1,)),
        ("ssm_norm.weight", (1,)),
        ("ssm_out.weight", (1, 2)),
    ]
    attention = [
        ("attn_q.weight", (2, 4)),
        ("attn_k.weight", (2, 2)),
        ("attn_v.weight", (2, 2)),
        ("attn_output.weight", (2, 2)),
        ("attn_q_norm.weight", (2,)),
        ("attn_k_norm.weight", (2,)),
    ]
    layers = [f"blk.{i}." for i in range(2)]
    return (
        [("token_embd.weight", (2, vocab)), ("output_norm.weight", (2,)), ("output.weight", (2, vocab))]
        + [(layers[0] + name, dims) for name, dims in norms + delta + moe]
        + [(layers[1] + name, dims) for name, dims in norms + attention + moe]
    )


def safetensors(tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in tensors:
        size = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8}[dtype]
        for d in shape:
            size *= d
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(head)) + head + bytes(offset)


def write(target, name, data):
    path = ROOT / "corpus" / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def compact(path):
    return json.dumps(json.loads(path.read_text()), separators=(",", ":"), ensure_ascii=False).encode()


few = ["a", "b", "ab"]
every_kind = [(f"k{kind}", kind, 1) for kind in (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12)]
write("gguf", "model", gguf(model_keys() + vocabulary(few), model_tensors(len(few))))
write("gguf", "model_v2", gguf(model_keys(), model_tensors(4), version=2))
write("gguf", "keys", gguf(every_kind + [("nested", 9, (9, [(8, ["a", ""]), (4, [1, 2])]))], []))
write("gguf", "aligned", gguf([("general.alignment", 4, 64)], [("a", (3, 2)), ("b", (1, 1, 1, 1))], alignment=64))
write("tokenizer", "gguf", gguf(vocabulary(VOCAB), []))
write("tokenizer", "gguf_few", gguf(vocabulary(few), []))
write("tokenizer", "json", compact(GOLDEN / "plain" / "tokenizer.json"))
write("tokenizer", "json_few", json.dumps({
    "added_tokens": [{"id": 3, "content": "<|im_end|>", "special": True}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}).encode())
write("safetensors", "two", safetensors([("a", "F32", [2, 1]), ("b.weight", "BF16", [3])]))
write("safetensors", "empty", safetensors([]))
write("safetensors", "index", json.dumps({
    "metadata": {"total_size": 14},
    "weight_map": {"a": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"},
}).encode())
for name in ("plain", "dense_mix", "pattern"):
    write("config", name, compact(GOLDEN / name / "config.json"))
write("config", "defaults", b'{"model_type":"qwen3_next"}')
