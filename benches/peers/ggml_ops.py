#!/usr/bin/env python3
"""Times operators of a ggml build through its C API: llama.cpp's libraries or ik_llama.cpp's.

Reads cases as JSON from stdin, [{"op", "shape", "dtype", "tokens"}], in the words of `qwen3next bench op`; writes the same
objects to stdout with median_s and min_s, or with "error" where this build has no such operator. Every case runs in a
process of its own: ggml ends the process where something does not suit it.

    echo '[{"op": "gated_delta", "shape": "16/32x128", "dtype": "f32", "tokens": 512}]' | \\
        python3 ggml_ops.py --libs DIR --flavour llama -t 2
"""
import argparse
import ctypes as c
import json
import random
import re
import statistics
import subprocess
import sys
import time
from array import array
from pathlib import Path

F32, F16, I32 = 0, 1, 26
# Type number, block length and bytes, and the fp16 fields at the start or end of a block that must be small numbers.
TYPES = {"f32": (F32, 1, 4, []), "f16": (F16, 1, 2, []), "q8_0": (8, 32, 34, [0]), "q4_0": (2, 32, 18, [0]),
         "q4_k": (12, 256, 144, [0, 2]), "q5_k": (13, 256, 176, [0, 2]), "q6_k": (14, 256, 210, [208]),
         # ik_llama.cpp's run-time repacking: blocks of four rows.
         "q4_k_r4": (212, 256, 144, list(range(0, 16, 2))), "q6_k_r4": (214, 256, 210, list(range(0, 8, 2)))}
UNARY_SILU = 10


class InitParams(c.Structure):
    _fields_ = [("mem_size", c.c_size_t), ("mem_buffer", c.c_void_p), ("no_alloc", c.c_bool)]


class Ggml:
    """The functions of a build, and one context for each of weights and the rest."""

    def __init__(self, libs, flavour, threads, repack):
        self.flavour, self.repack = flavour, repack
        self.libs = []
        for name in ("libggml-base", "libggml-cpu", "libggml"):
            found = [p for p in sorted(Path(libs).rglob(f"{name}.so*")) + sorted(Path(libs).rglob(f"{name}.dylib"))]
            if found:
                self.libs.append(c.CDLL(str(found[0]), mode=c.RTLD_GLOBAL))
        if not self.libs:
            raise SystemExit(f"{libs}: no libggml in there")
        self.backend = self("ggml_backend_cpu_init", c.c_void_p)()
        self("ggml_backend_cpu_set_n_threads")(c.c_void_p(self.backend), threads)
        self.keep = []
        init = self("ggml_init", c.c_void_p, [InitParams])
        self.ctx = init(InitParams(1 << 22, None, True))
        self.weights = init(InitParams(1 << 20, None, True))

    def __call__(self, name, result=None, args=None):
        for lib in self.libs:
            if hasattr(lib, name):
                function = lib[name]
                function.restype, function.argtypes = result, args
                return function
        raise NotImplementedError(f"this build has no {name}")

    def has(self, name):
        return any(hasattr(lib, name) for lib in self.libs)

    def tensor(self, dtype, *ne, weight=False):
        """A tensor to be filled once all are there."""
        ne = list(ne) + [1] * (4 - len(ne))
        new = self("ggml_new_tensor_4d", c.c_void_p, [c.c_void_p, c.c_int] + 4 * [c.c_int64])
        t = new(self.weights if weight else self.ctx, TYPES[dtype][0] if isinstance(dtype, str) else dtype, *ne)
        self.keep.append((t, dtype, ne))
        return t

    def op(self, name, *args, floats=()):
        """An operator's node; ints are int64 where their position says so."""
        types = [c.c_void_p] + [c.c_float if isinstance(a, float) else c.c_bool if isinstance(a, bool)
                                else c.c_int64 if isinstance(a, Int64) else c.c_int if isinstance(a, int) and a < 256
                                else c.c_void_p for a in args]
        return self(name, c.c_void_p, types)(self.ctx, *args)

    def weight_buffer(self):
        """The buffer type that repacks weights where the build has one."""
        if not self.repack or not self.has("ggml_backend_get_device"):
            return None
        device = self("ggml_backend_get_device", c.c_void_p, [c.c_void_p])(self.backend)
        registry = self("ggml_backend_dev_backend_reg", c.c_void_p, [c.c_void_p])(device)
        address = self("ggml_backend_reg_get_proc_address", c.c_void_p, [c.c_void_p, c.c_char_p])(
            registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        types = c.CFUNCTYPE(c.POINTER(c.c_void_p), c.c_void_p)(address)(device)
        name = self("ggml_backend_buft_name", c.c_char_p, [c.c_void_p])
        i = 0
        while types and types[i]:
            if b"REPACK" in name(types[i]):
                return types[i]
            i += 1
        return None

    def fill(self, special):
        """Allocates and fills: small random numbers, quantised blocks with sane scales, what `special` gives."""
        allocate = self("ggml_backend_alloc_ctx_tensors", c.c_void_p, [c.c_void_p, c.c_void_p])
        repack = self.weight_buffer()
        if repack:
            self("ggml_backend_alloc_ctx_tensors_from_buft", c.c_void_p, [c.c_void_p, c.c_void_p])(self.weights, repack)
        else:
            allocate(self.weights, self.backend)
        allocate(self.ctx, self.backend)
        put = self("ggml_backend_tensor_set", None, [c.c_void_p, c.c_void_p, c.c_size_t, c.c_size_t])
        rng = random.Random(1)
        for t, dtype, ne in self.keep:
            n = ne[0] * ne[1] * ne[2] * ne[3]
            if t in special:
                data = special[t]
            elif dtype == "f32":
                some = array("f", (rng.uniform(-0.1, 0.1) for _ in range(min(n, 1 << 14))))
                data = (some * (n // len(some) + 1))[:n].tobytes()
            elif dtype == "f16":
                some = b"".join(rng.choice((b"\x00\x2c", b"\x00\xa8", b"\x11\x2a")) for _ in range(min(n, 1 << 14)))
                data = (some * (2 * n // len(some) + 1))[:2 * n]
            else:
                _, block, size, scales = TYPES[dtype]
                step = 4 if dtype.endswith("_r4") else 1
                one = bytearray(rng.randbytes(size * step))
                for at in scales:
                    one[at:at + 2] = b"\x00\x04"
                data = bytes(one) * (n // block // step)
            put(t, data, 0, len(data))

    def measure(self, node, repetitions, special):
        graph = self("ggml_new_graph", c.c_void_p, [c.c_void_p])(self.ctx)
        self("ggml_build_forward_expand", None, [c.c_void_p, c.c_void_p])(graph, node)
        self.fill(special)
        compute = self("ggml_backend_graph_compute", c.c_int, [c.c_void_p, c.c_void_p])
        run = lambda: compute(self.backend, graph)
        if run() != 0:
            raise NotImplementedError("ggml_backend_graph_compute failed")
        start = time.perf_counter()
        run()
        calls = max(1, int(4e-3 / max(time.perf_counter() - start, 1e-7)))
        samples = []
        for _ in range(repetitions):
            start = time.perf_counter()
            for _ in range(calls):
                run()
            samples.append((time.perf_counter() - start) / calls)
        return samples


class Int64(int):
    pass


def build(g, op, shape, dtype, t):
    """The node of a case and the tensors with contents of their own."""
    n = [int(x) for x in re.findall(r"\d+", shape)]
    ik = g.flavour == "ik"
    if op == "gated_delta":
        hk, hv, d = n
        if ik:
            args = [g.tensor("f32", d, t, hk), g.tensor("f32", d, t, hk), g.tensor("f32", d, t, hv),
                    g.tensor("f32", t, 1, hv), g.tensor("f32", 1, t, hv), g.tensor("f32", d, d * hv)]
            return g.op("ggml_delta_net", *args, None), {}
        args = [g.tensor("f32", d, hk, t), g.tensor("f32", d, hk, t), g.tensor("f32", d, hv, t),
                g.tensor("f32", 1, hv, t), g.tensor("f32", 1, hv, t), g.tensor("f32", d, d, hv)]
        return g.op("ggml_gated_delta_net", *args, Int64(1)), {}
    if op == "solve_tri":
        rows, columns = n
        a, b = g.tensor("f32", rows, rows, t), g.tensor("f32", columns, rows, t)
        row = lambda i: [1.0 if j == i else 0.05 / (1 + i - j) if j < i else 0.0 for j in range(rows)]
        one = array("f", (x for i in range(rows) for x in row(i)))
        return g.op("ggml_solve_tri", a, b, True, True, False), {a: (one * t).tobytes()}
    if op == "causal_conv":
        channels, width = n
        kernel = g.tensor("f32", width, channels)
        if ik:
            first = g.tensor(I32, 1, t)
            y = g.op("ggml_ssm_conv", g.tensor("f32", width - 1, channels, 1), g.tensor("f32", channels, t), kernel,
                     first, None)
            view = g("ggml_view_2d", c.c_void_p, [c.c_void_p] * 2 + [c.c_int64] * 2 + [c.c_size_t] * 2)
            y = view(g.ctx, y, channels, t, channels * 4, 0)
            return g.op("ggml_silu", y), {first: bytes(4 * t)}
        y = g.op("ggml_ssm_conv", g.tensor("f32", t + width - 1, channels, 1), kernel)
        return g.op("ggml_silu", y), {}
    if op == "matmul":
        rows, columns = n
        return g.op("ggml_mul_mat", g.tensor(dtype, columns, rows, weight=True), g.tensor("f32", columns, t)), {}
    if op in ("moe_up", "moe_down"):
        experts, chosen, f, d = n
        rng = random.Random(2)
        ids = g.tensor(I32, chosen, t)
        special = {ids: array("i", (e for _ in range(t) for e in rng.sample(range(experts), chosen))).tobytes()}
        if op == "moe_up":
            up, gate = (g.tensor(dtype, d, f, experts, weight=True) for _ in range(2))
            x = g.tensor("f32", d, 1, t)
            if ik:
                return g.op("ggml_moe_up_gate", up, gate, x, ids, UNARY_SILU), special
            up, gate = g.op("ggml_mul_mat_id", up, x, ids), g.op("ggml_mul_mat_id", gate, x, ids)
            return g.op("ggml_swiglu_split", gate, up), special
        down = g.op("ggml_mul_mat_id", g.tensor(dtype, f, d, experts, weight=True), g.tensor("f32", f, chosen, t), ids)
        down = g.op("ggml_mul", down, g.tensor("f32", 1, chosen, t))
        view = g("ggml_view_2d", c.c_void_p, [c.c_void_p] * 2 + [c.c_int64] * 2 + [c.c_size_t] * 2)
        part = lambda i: view(g.ctx, down, d, t, 4 * d * chosen, 4 * d * i)
        sum_ = part(0)
        for i in range(1, chosen):
            sum_ = g.op("ggml_add", sum_, part(i))
        return sum_, special
    if op == "attention":
        keys, heads, kv_heads, d = n
        mask = g.tensor("f16", keys, -(-t // 64) * 64)
        seen = lambda i: keys - t + i + 1
        rows = b"".join(b"\x00\x00" * seen(i) + b"\x00\xfc" * (keys - seen(i)) for i in range(t))
        rows = rows.ljust(2 * keys * (-(-t // 64) * 64), b"\x00")
        y = g.op("ggml_flash_attn_ext", g.tensor("f32", d, t, heads), g.tensor(dtype, d, keys, kv_heads),
                 g.tensor(dtype, d, keys, kv_heads), mask, float(d) ** -0.5, 0.0, 0.0)
        return y, {mask: rows}
    raise NotImplementedError("no such operator there")


def one(args, case):
    """A case in this process."""
    g = Ggml(args.libs, args.flavour, args.threads, case["variant"] == "repacked")
    shape = case["shape"] if case["op"] != "attention" else f"{case['shape']}/{case['heads']}x{case['dim']}"
    dtype = case["dtype"] + ("_r4" if args.flavour == "ik" and g.repack else "")
    node, special = build(g, case["op"], shape, dtype, case["tokens"])
    samples = g.measure(node, args.repetitions, special)
    return {**case, "threads": args.threads, "median_s": statistics.median(samples), "min_s": min(samples)}


def best(args, case):
    """The faster of plain and repacked weights, each in a process of its own."""
    weights = case["op"] in ("matmul", "moe_up", "moe_down")
    results, error = [], None
    for variant in ["plain", "repacked"] if weights else [case["dtype"]]:
        again = [sys.executable, __file__, "--libs", args.libs, "--flavour", args.flavour, "-t", str(args.threads),
                 "-r", str(args.repetitions), "--case", json.dumps({**case, "variant": variant})]
        done = subprocess.run(again, capture_output=True, text=True)
        try:
            result = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            last = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
            result = {**case, "error": last}
        if "error" in result:
            error = error or result
        else:
            results.append(result)
    return min(results, key=lambda r: r["median_s"]) if results else error


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--libs", required=True, metavar="DIR", help="where libggml*.so lie")
    ap.add_argument("--flavour", choices=["llama", "ik"], required=True)
    ap.add_argument("-t", "--threads", type=int, default=1)
    ap.add_argument("-r", "--repetitions", type=int, default=7)
    ap.add_argument("--case", help="one case, in this process")
    args = ap.parse_args()
    if not args.case:
        print(json.dumps([best(args, case) for case in json.load(sys.stdin)], indent=1))
        return
    case = json.loads(args.case)
    try:
        print(json.dumps(one(args, case)))
    except (NotImplementedError, KeyError) as error:
        print(json.dumps({**case, "error": str(error)}))


if __name__ == "__main__":
    main()
