//! Rows of 2048 elements of every type, to f32 and back.
#![allow(missing_docs)] // criterion_group makes a public function

mod common;

use criterion::{criterion_group, criterion_main, Criterion};
use qwen3next_verify::cases::quant::Type;
use qwen3next_verify::timed::quant::{Dequantize, Quantize};

fn bench(c: &mut Criterion) {
    for &dtype in Type::ALL {
        common::variants(c, &format!("dequantize/256x2048/{dtype}"), Dequantize::new(256, 2048, dtype));
        common::variants(c, &format!("quantize/16x2048/{dtype}"), Quantize::new(16, 2048, dtype));
    }
}

criterion_group! {
    name = benches;
    config = common::config();
    targets = bench
}
criterion_main!(benches);
