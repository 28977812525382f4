#!/usr/bin/env python3
"""How far quantised activations move the predictions: mean KL divergence of each engine's own quantised path from its own
f32 path, on the embedded model and the text it was not trained on.

The f32 path is the same model written as an F32 file, whose products no engine quantises activations for. Weights are equal
in both runs (Q8_0 is dequantised exactly), and so is everything but the large products.

    python3 kl.py --qwen3next BINARY
Needs: numpy, gguf, llama-cpp-python (run.py --kl installs them). Without llama-cpp-python its row is empty.
"""
import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

ASSETS = Path(__file__).resolve().parents[2] / "model" / "assets"


def to_f32(source, target):
    """The same model with every tensor as f32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(data, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ours(binary, model, text, ctx, work):
    """Logits of positions 0 .. ctx - 2 of every window, [positions, vocab]."""
    out = work / "ours.npy"
    subprocess.run([binary, "perplexity", "-m", model, "--activations", "q8", "-f", text, "-c", str(ctx), "--all-positions",
                    "--save-logits", out], check=True, stdout=subprocess.DEVNULL)
    return np.load(out)


def llama(model, text, ctx, threads):
    """The same rows from llama.cpp: windows from an empty state, its default cache types."""
    import llama_cpp as lib

    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    loaded = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
    if not loaded:
        raise RuntimeError(f"llama.cpp does not load {model}")
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = ctx
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(loaded, params)
    vocab = lib.llama_model_get_vocab(loaded)
    n_vocab = lib.llama_vocab_n_tokens(vocab)
    raw = Path(text).read_bytes()
    tokens = (lib.llama_token * len(raw))()
    n = lib.llama_tokenize(vocab, raw, len(raw), tokens, len(raw), False, False)
    batch = lib.llama_batch_init(ctx, 0, 1)
    rows = []
    for start in range(0, n - ctx + 1, ctx):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch.n_tokens = ctx
        for i in range(ctx):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = tokens[start + i], i, 1, 1
            batch.seq_id[i][0] = 0
        if lib.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        logits = lib.llama_get_logits(context)
        rows.append(np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)),
                                          (ctx, n_vocab))[: ctx - 1].copy())
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(loaded)
    lib.llama_log_set(ctypes.cast(None, lib.llama_log_callback), ctypes.c_void_p(0))
    return np.concatenate(rows)


def divergence(base, other):
    """KL(base || other) of every row, in float64."""
    def log_softmax(x):
        x = x.astype(np.float64)
        x -= x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    p, q = log_softmax(base), log_softmax(other)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    return {"kl_mean": kl.mean(), "kl_error": kl.std() / np.sqrt(len(kl)), "kl_p99_9": np.quantile(kl, 0.999),
            "top1_agreement": (base.argmax(1) == other.argmax(1)).mean(), "positions": len(kl)}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--qwen3next", metavar="BINARY", help="our command; without it its row is empty")
    ap.add_argument("-m", "--model", default=ASSETS / "qwen3next-kjv-q8_0.gguf")
    ap.add_argument("-f", "--file", default=ASSETS / "heldout.txt")
    ap.add_argument("-c", "--ctx", type=int, default=512)
    ap.add_argument("-t", "--threads", type=int, default=2)
    ap.add_argument("-o", "--output", choices=["md", "json"], default="md")
    args = ap.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        f32 = work / "f32.gguf"
        to_f32(args.model, f32)
        logits = {}
        engines = {"qwen3next": lambda m: ours(args.qwen3next, m, args.file, args.ctx, work),
                   "llama.cpp": lambda m: llama(m, args.file, args.ctx, args.threads)}
        if not args.qwen3next:
            del engines["qwen3next"]
        for name, run in engines.items():
            try:
                base, other = run(f32), run(args.model)
            except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            logits[name] = base
            rows.append({"what": f"{name}: quantised path against its f32 path", **divergence(base, other)})
        if len(logits) == 2:
            rows.append({"what": "qwen3next against llama.cpp, both f32 paths",
                         **divergence(logits["llama.cpp"], logits["qwen3next"])})
    if args.output == "json":
        print(json.dumps(rows, indent=1))
        return
    print("| | mean KL | p99.9 | top-1 agreement | positions |\n| --- | --- | --- | --- | --- |")
    for r in rows:
        print(f"| {r['what']} | {r['kl_mean']:.3e} ± {r['kl_error']:.1e} | {r['kl_p99_9']:.2e} "
              f"| {100 * r['top1_agreement']:.3f} % | {r['positions']} |")


if __name__ == "__main__":
    main()
