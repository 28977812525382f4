//! Matmul of one decode row and of a prefill batch with a projection of 2048 × 2048, every type of weights.
#![allow(missing_docs)] // criterion_group makes a public function

mod common;

use criterion::{criterion_group, criterion_main, Criterion};
use qwen3next_verify::cases::quant::Type;
use qwen3next_verify::timed::matmul::Matmul;

fn bench(c: &mut Criterion) {
    for m in [1, 64] {
        for &dtype in Type::ALL {
            common::variants(c, &format!("matmul/2048x2048/m{m}/{dtype}"), Matmul::new(m, 2048, 2048, dtype));
        }
    }
}

criterion_group! {
    name = benches;
    config = common::config();
    targets = bench
}
criterion_main!(benches);
