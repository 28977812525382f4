//! The small steps of a layer in the shapes of the 80B-A3B model, for one token and a batch.
#![allow(missing_docs)] // criterion_group makes a public function

mod common;

use criterion::{criterion_group, criterion_main, Criterion};
use qwen3next_verify::cases::attention::KvType;
use qwen3next_verify::cases::quant::Type;
use qwen3next_verify::timed::layer::{Add, Gate, Gates, Gather, Store};

fn bench(c: &mut Criterion) {
    for t in [1, 512] {
        common::variants(c, &format!("layer/gather/q8_0/2048/t{t}"), Gather::new(t, 2048, Type::Q8));
        common::variants(c, &format!("layer/add/2048/t{t}"), Add::new(t, 2048));
        common::variants(c, &format!("layer/delta_gates/16x32/t{t}"), Gates::new(t, 16, 32));
        common::variants(c, &format!("layer/kv_store/f16/512/t{t}"), Store::new(t, 512, KvType::F16));
        common::variants(c, &format!("layer/row_gate/2048/t{t}"), Gate::new(t, 2048));
    }
}

criterion_group! {
    name = benches;
    config = common::config();
    targets = bench
}
criterion_main!(benches);
