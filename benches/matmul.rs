//! Matmul of one decode row and of a prefill batch with a projection of 2048 × 2048, every type of weights.
#![allow(missing_docs)] // criterion_group makes a public function

mod common;

use criterion::{criterion_group, criterion_main, Criterion};
use qwen3next_verify::cases::quant::{Form, Type};
use qwen3next_verify::timed::matmul::Matmul;

fn bench(c: &mut Criterion) {
    for m in [1, 64] {
        for &dtype in Type::ALL {
            for &form in Form::ALL.iter().filter(|&&f| f.for_weights(dtype.dtype(), 2048) == f) {
                let timed = Matmul::new(m, 2048, 2048, dtype, form).expect("whole blocks");
                common::variants(c, &format!("matmul/2048x2048/m{m}/{dtype}/{form}"), timed);
            }
        }
    }
}

criterion_group! {
    name = benches;
    config = common::config();
    targets = bench
}
criterion_main!(benches);
