#!/usr/bin/env python3
"""Errors of our quantiser and of llama.cpp's (no importance matrix), for csrc/quant/README.md. Writes nothing here.

Requantises a model with `qwen3next quantize`, reads it back with gguf-py, gives the same rows to llama.cpp's
ggml_quantize_chunk, and prints the relative RMS error of both over all matrices that the type holds. For Gaussian rows:
`qwen3next synth normal.gguf --tiny --quant f32`.

    pip install gguf llama-cpp-python; python3 compare_quant.py target/release/qwen3next normal.gguf model/assets/*.gguf
"""
import ctypes, glob, importlib.util, os, subprocess, sys, tempfile
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T, GGUFReader
from gguf.quants import dequantize

TYPES = (T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ4_NL, T.IQ4_XS, T.MXFP4)
home = os.path.dirname(importlib.util.find_spec("llama_cpp").origin)
ggml = ctypes.CDLL(sorted(glob.glob(f"{home}/lib/libggml-base*"))[0])
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + 3 * [ctypes.c_int64] + [ctypes.c_void_p]


def llama_cpp(x, t):
    rows, n = x.shape
    block, size = GGML_QUANT_SIZES[t]
    out = np.zeros((rows, n // block * size), np.uint8)
    assert ggml.ggml_quantize_chunk(int(t), x.ctypes.data, out.ctypes.data, 0, rows, n, None) == out.nbytes
    return out


def main():
    command, *models = sys.argv[1:]
    for model in models:
        source = {t.name: t for t in GGUFReader(model).tensors}
        print(f"{model}\ntype    ours     llama.cpp  ratio   values    same bytes")
        for t in TYPES:
            with tempfile.TemporaryDirectory() as folder:
                made = f"{folder}/made.gguf"
                subprocess.run([command, "quantize", model, made, "--type", t.name], check=True, capture_output=True)
                square, ours, theirs, values, same = 0.0, 0.0, 0.0, 0, True
                for tensor in GGUFReader(made).tensors:
                    own = source[tensor.name]
                    if tensor.tensor_type != t or own.tensor_type == t: continue
                    x = np.ascontiguousarray(dequantize(own.data, own.tensor_type), np.float32)
                    x = x.reshape(-1, x.shape[-1])
                    mine, other = tensor.data.reshape(x.shape[0], -1), llama_cpp(x, t)
                    error = lambda q: np.sum((dequantize(q, t).astype(np.float64) - x) ** 2)
                    ours, theirs, square = ours + error(mine), theirs + error(other), square + np.sum(x.astype(np.float64) ** 2)
                    values, same = values + x.size, same and np.array_equal(mine, other)
            if values:
                ours, theirs = np.sqrt(ours / square), np.sqrt(theirs / square)
                print(f"{t.name:7} {ours:.5f}  {theirs:.5f}    {ours / theirs:.4f}  {values:8}  {same}")


if __name__ == "__main__": main()
