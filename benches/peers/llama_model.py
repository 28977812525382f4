#!/usr/bin/env python3
"""llama-bench's job through the Python package of llama.cpp or ik_llama.cpp, where there is no llama-bench: a warm-up, then
each test repeated from an empty state; a prompt in batches of random tokens, a generation token by token.

    python3 llama_model.py --package llama_cpp -m MODEL -p 512 -n 128 -t 2
Writes the fields of llama-bench's JSON that are known here.
"""
import argparse
import importlib
import json
import os
import random
import statistics
import time


def numbers(text):
    return [int(n) for n in text.split(",") if int(n) > 0]


class Engine:
    def __init__(self, args):
        self.ik = args.package.startswith("ik")
        self.args = args
        self.lib = importlib.import_module(f"{args.package}.{'_ctypes_api' if self.ik else 'llama_cpp'}")
        lib = self.lib
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        # Weights in memory of their own: pages of a mapped file may be taken away between runs.
        if hasattr(params, "load_mode"):
            params.load_mode = 0
        else:
            params.use_mmap = False
        if self.ik:
            params.repack_tensors = bool(args.repack)
        self.model = lib.llama_model_load_from_file(os.fsencode(args.model), params)
        if not self.model:
            raise SystemExit(f"{args.package} does not load {args.model}")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def context(self, tokens):
        lib, args = self.lib, self.args
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = tokens, args.batch, args.ubatch
        params.n_threads = params.n_threads_batch = args.threads
        if self.ik:
            params.flash_attn = bool(args.flash_attn)
        else:
            params.flash_attn_type = args.flash_attn
        context = lib.llama_init_from_model(self.model, params)
        if not context:
            raise SystemExit(f"{args.package}: no context of {tokens} tokens")
        return context

    def clear(self, context):
        if self.ik:
            self.lib.llama_kv_cache_clear(context)
        else:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(context), True)

    def decode(self, context, batch, first, n):
        """n tokens at position `first`; logits of the last one."""
        batch.n_tokens = n
        for i in range(n):
            batch.token[i], batch.pos[i] = random.randrange(self.vocab), first + i
            batch.n_seq_id[i], batch.logits[i] = 1, i == n - 1
            batch.seq_id[i][0] = 0
        start = time.perf_counter()
        if self.lib.llama_decode(context, batch) != 0:
            raise SystemExit(f"{self.args.package}: llama_decode failed")
        # Reading logits waits for them.
        self.lib.llama_get_logits_ith(context, n - 1)
        return time.perf_counter() - start

    def test(self, prompt, gen):
        context = self.context(-(-(prompt + gen) // 256) * 256)
        batch = self.lib.llama_batch_init(max(self.args.batch, 1), 0, 1)
        self.decode(context, batch, 0, min(self.args.batch, prompt) if prompt else 1)
        samples = []
        for _ in range(self.args.repetitions):
            self.clear(context)
            step = self.args.batch if prompt else 1
            samples.append(sum(self.decode(context, batch, at, min(step, prompt + gen - at))
                               for at in range(0, prompt + gen, step)))
        self.lib.llama_batch_free(batch)
        self.lib.llama_free(context)
        speeds = [(prompt + gen) / s for s in samples]
        return {"model_filename": self.args.model, "n_prompt": prompt, "n_gen": gen, "n_depth": 0,
                "n_threads": self.args.threads, "n_batch": self.args.batch, "n_ubatch": self.args.ubatch,
                "flash_attn": self.args.flash_attn, "repack": bool(self.args.repack),
                "avg_ts": statistics.mean(speeds), "samples_ns": [int(1e9 * s) for s in samples], "samples_ts": speeds}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--package", choices=["llama_cpp", "ik_llama_cpp"], required=True)
    ap.add_argument("-m", "--model", required=True)
    ap.add_argument("-p", "--prompt", type=numbers, default=[512])
    ap.add_argument("-n", "--gen", type=numbers, default=[128])
    ap.add_argument("-b", "--batch", type=int, default=2048)
    ap.add_argument("-ub", "--ubatch", type=int, default=512)
    ap.add_argument("-t", "--threads", type=int, default=2)
    ap.add_argument("-r", "--repetitions", type=int, default=3)
    ap.add_argument("-fa", "--flash-attn", type=int, default=1)
    ap.add_argument("-rtr", "--repack", type=int, default=0)
    args = ap.parse_args()
    engine = Engine(args)
    tests = [(p, 0) for p in args.prompt] + [(0, n) for n in args.gen]
    print(json.dumps([engine.test(p, n) for p, n in tests], indent=1))


if __name__ == "__main__":
    main()
