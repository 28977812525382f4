#!/usr/bin/env python3
"""quant.safetensors, quant.json: blocks of every supported type and their float32 values from gguf-py.

Per type: 64 blocks of random bytes whose scale fields are made finite and ordinary, and, where gguf-py can quantise,
blocks that it made from Gaussian rows (with an all-zero block and a constant one among them).

    python3 make_quant.py
"""
import json, os
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
# byte offsets of the fp16 scale fields in a block
FP16 = {T.Q8_0: [0], T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208],
        T.Q2_K: [80, 82], T.Q3_K: [108], T.IQ4_NL: [0], T.IQ4_XS: [0], T.MXFP4: []}


def main():
    rng, out, index = np.random.default_rng(13), {}, {}
    for t in (T.F16, T.BF16, *FP16):
        block, size = GGML_QUANT_SIZES[t]
        n = 64 if block > 1 else 4096
        raw = rng.integers(0, 256, (n, size), dtype=np.uint8)
        if t in (T.F16, T.BF16):                                 # every finite bit pattern may occur, subnormals too
            exponent = 0x7C00 if t == T.F16 else 0x7F80
            bits = raw.view(np.uint16)
            bits[(bits & exponent) == exponent] ^= 0x4000
        for off in FP16.get(t, []):
            d = rng.choice([-1, 1], n) * np.exp(rng.uniform(np.log(1e-6), np.log(4), n))
            raw[:, off:off + 2] = d.astype(np.float16).view(np.uint8).reshape(-1, 2)
        if t == T.MXFP4: raw[:, 0] = rng.integers(90, 165, n)    # E8M0 exponents
        x = dequantize(raw.reshape(1, -1), t)
        assert x.dtype == np.float32 and np.isfinite(x).all() and x.size == n * block
        out |= {f"{t.name}.random.bytes": raw.reshape(-1), f"{t.name}.random.values": x.reshape(-1)}
        entry = dict(ggml_type=int(t), block=block, bytes=size, random_blocks=n)
        src = (rng.standard_normal((8, 1024)) * np.exp(rng.normal(0, 2, (8, 1)))).astype(np.float32)
        src[1, :block], src[2, :block] = 0.0, 0.375
        try:
            q = quantize(src, t)
            out |= {f"{t.name}.made.source": src.reshape(-1), f"{t.name}.made.bytes": q.view(np.uint8).reshape(-1),
                    f"{t.name}.made.values": dequantize(q, t).astype(np.float32).reshape(-1)}
            entry["made_rows"], entry["made_columns"] = src.shape
        except NotImplementedError: pass
        index[t.name] = entry
        print(t.name, entry)
    save_file(out, f"{HERE}/quant.safetensors")
    json.dump(index, open(f"{HERE}/quant.json", "w"), indent=1)


if __name__ == "__main__": main()
