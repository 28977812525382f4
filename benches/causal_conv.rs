//! The convolution of a DeltaNet layer: 8192 channels, 4 taps, for one token and a batch.
#![allow(missing_docs)] // criterion_group makes a public function

mod common;

use criterion::{criterion_group, criterion_main, Criterion};
use qwen3next_verify::timed::causal_conv::CausalConv;

fn bench(c: &mut Criterion) {
    for t in [1, 512] {
        common::variants(c, &format!("causal_conv/8192x4/t{t}"), CausalConv::new(t, 8192, 4));
    }
}

criterion_group! {
    name = benches;
    config = common::config();
    targets = bench
}
criterion_main!(benches);
