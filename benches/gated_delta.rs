//! The delta rule at T = 1, 64 and 512 with Qwen3-Next's heads (HK 16, HV 32, d 128).
#![allow(missing_docs)] // criterion_group makes a public function

mod common;

use criterion::{criterion_group, criterion_main, Criterion};
use qwen3next_verify::timed::gated_delta::GatedDelta;

fn bench(c: &mut Criterion) {
    for t in [1, 64, 512] {
        common::variants(c, &format!("gated_delta/t{t}"), GatedDelta::new(t, 16, 32, 128));
    }
}

criterion_group! {
    name = benches;
    config = common::config();
    targets = bench
}
criterion_main!(benches);
