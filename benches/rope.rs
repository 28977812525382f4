//! Rotary embedding of 64 of 256 channels of 16 heads, for one token and a batch.
#![allow(missing_docs)] // criterion_group makes a public function

mod common;

use criterion::{criterion_group, criterion_main, Criterion};
use qwen3next_verify::timed::rope::Rope;

fn bench(c: &mut Criterion) {
    for t in [1, 512] {
        common::variants(c, &format!("rope/16x256x64/t{t}"), Rope::new(t, 16, 256, 64));
    }
}

criterion_group! {
    name = benches;
    config = common::config();
    targets = bench
}
criterion_main!(benches);
