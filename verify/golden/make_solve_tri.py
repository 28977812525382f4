#!/usr/bin/env python3
"""solve_tri.safetensors: X with L X = B from scipy.linalg.solve_triangular, float64, on inputs that are float32 values.

`l` holds random numbers in the upper triangle (and, for unit cases, on the diagonal): neither may be read.
Conditioning: below the diagonal N(0, 1) scaled so that each row's absolute sum is at most 0.9 (unit: ||inv|| <= 10);
diagonals of the non-unit cases are +-U(1, 2). `norm37_*`: like the (I + A) of a chunk with nearly parallel keys, rows of
beta * k_i.k_j with every entry in [0.5, 0.9], so ||A||_inf is n/2 or more (> 37), yet the inverse stays moderate.

    python3 make_solve_tri.py
"""
import json, os
import numpy as np
from safetensors.numpy import save_file
from scipy.linalg import solve_triangular

HERE = os.path.dirname(os.path.abspath(__file__))


def main():
    rng, out, index = np.random.default_rng(11), {}, {}
    cases = [(n, m, unit) for n, m in ((1, 1), (1, 5), (2, 3), (15, 1), (15, 17), (16, 16), (17, 1), (17, 8), (64, 1),
                                       (64, 33), (100, 7), (256, 5)) for unit in (False, True)]
    cases += [(64, 32, "norm37"), (128, 9, "norm37")]
    for n, m, kind in cases:
        norm37, unit = kind == "norm37", kind is not False
        name = f"n{n}_m{m}_{'unit' if unit else 'nonunit'}" if not norm37 else f"norm37_n{n}_m{m}"
        if norm37: low = np.tril(rng.uniform(0.5, 0.9, (n, n)), -1)
        else:
            low = np.tril(rng.standard_normal((n, n)), -1)
            low *= 0.9 / np.maximum(np.abs(low).sum(1, keepdims=True), 0.9)
        diag = np.diag(rng.uniform(1, 2, n) * rng.choice([-1, 1], n))
        junk = np.triu(rng.standard_normal((n, n)) * 100, 1)
        l = (low + diag + junk).astype(np.float32)
        b = rng.standard_normal((n, m)).astype(np.float32)
        x = solve_triangular(l.astype(np.float64), b.astype(np.float64), lower=True, unit_diagonal=unit)
        a = np.tril(l.astype(np.float64), -1)
        full = a + (np.eye(n) if unit else np.diag(np.diag(l)))
        assert np.abs(full @ x - b).max() <= 1e-11 * max(1, np.abs(x).max())
        # scipy answers in column order, which safetensors would write as it lies.
        out |= {f"{name}.l": l, f"{name}.b": b, f"{name}.x": np.ascontiguousarray(x)}
        index[name] = dict(n=n, m=m, unit=bool(unit), norm_inf_a=float(np.abs(a).sum(1).max()),
                           norm_inf_inverse=float(np.abs(np.linalg.inv(full)).sum(1).max()))
        print(name, {k: round(v, 2) for k, v in index[name].items() if k.startswith("norm")})
    save_file(out, f"{HERE}/solve_tri.safetensors", metadata=dict(cases=json.dumps(index)))


if __name__ == "__main__": main()
