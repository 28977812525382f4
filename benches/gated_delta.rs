//! Time of every variant at T = 1, 64 and 512 with Qwen3-Next's heads (HK 16, HV 32, d 128), on one thread. Every variant
//! is verified first.

// criterion_group makes a public function.
#![allow(missing_docs)]

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use qwen3next_kernels::gated_delta::Op;
use qwen3next_kernels::{Exec, Operator};
use qwen3next_verify::cases::gated_delta::Timed;

fn bench(c: &mut Criterion) {
    for t in [1, 64, 512] {
        let mut timed = Timed::new(t, 16, 32, 128);
        let mut group = c.benchmark_group(format!("gated_delta/T{t}"));
        group.sample_size(10).throughput(Throughput::Elements(t as u64));
        for variant in Op::variants().into_iter().filter(|v| v.isa().available()) {
            timed.verify(&variant).unwrap_or_else(|e| panic!("{}: {e}", variant.name()));
            let exec = Exec::variant(variant).parts(1);
            group.bench_function(BenchmarkId::from_parameter(variant.name()), |bench| {
                bench.iter(|| timed.run(&exec).expect("accepted"))
            });
        }
        group.finish();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
