//! Norms of the residual stream and of the heads of both layer kinds, for one token and a batch.
#![allow(missing_docs)] // criterion_group makes a public function

mod common;

use criterion::{criterion_group, criterion_main, Criterion};
use qwen3next_verify::cases::norm::Kind;
use qwen3next_verify::timed::norm::Norm;

fn bench(c: &mut Criterion) {
    for t in [1, 512] {
        for (kind, h, d) in [(Kind::Rms, 1, 2048), (Kind::Gated, 32, 128), (Kind::L2, 16, 128)] {
            common::variants(c, &format!("norm/{kind}/{h}x{d}/t{t}"), Norm::new(kind, t, h, d));
        }
    }
}

criterion_group! {
    name = benches;
    config = common::config();
    targets = bench
}
criterion_main!(benches);
