//! What every bench does: each variant this CPU can run (but for those that only the host executor runs, which says nothing of their speed), verified on its inputs first, then timed on one thread.

use criterion::{BenchmarkId, Criterion, Throughput};
use qwen3next_kernels::{Exec, Isa, Operator};
use qwen3next_verify::timed::Timed;
use std::time::Duration;

/// One group: a call of so many operations by every variant.
pub fn variants<T: Timed>(c: &mut Criterion, name: &str, mut timed: T) {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Elements(timed.work().ops as u64));
    for variant in T::Op::variants().into_iter().filter(|v| v.isa().available() && v.isa() != Isa::CUDA_HOST) {
        timed.verify(&variant).unwrap_or_else(|e| panic!("{name} {}: {e}", variant.name()));
        let exec = Exec::variant(variant).parts(1);
        group.bench_function(BenchmarkId::from_parameter(variant.name()), |b| {
            b.iter(|| timed.run(&exec).expect("just verified"))
        });
    }
    group.finish();
}

/// Few samples: kernels vary little, and there are many.
pub fn config() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
}
