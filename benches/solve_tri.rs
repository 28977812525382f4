//! The delta rule's systems: 64 unit lower triangles of 64 × 64 with 128 right-hand sides, and their inverses.
#![allow(missing_docs)] // criterion_group makes a public function

mod common;

use criterion::{criterion_group, criterion_main, Criterion};
use qwen3next_verify::timed::solve_tri::SolveTri;

fn bench(c: &mut Criterion) {
    common::variants(c, "solve_tri/solve", SolveTri::new(64, 64, Some(128)));
    common::variants(c, "solve_tri/inverse", SolveTri::new(64, 64, None));
}

criterion_group! {
    name = benches;
    config = common::config();
    targets = bench
}
criterion_main!(benches);
