//! Time of every variant at T = 1 and 512 with Qwen3-Next's 16 query heads of 256, 64 of them rotated, in place as the
//! model runs it, on one thread. Every variant is verified first.
#![allow(missing_docs)] // criterion_group! makes an undocumented function

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use qwen3next_kernels::rope::{self, Op};
use qwen3next_kernels::{Exec, Operator, ViewMut};
use qwen3next_verify::cases::rope::Rope;
use qwen3next_verify::suite::{assert_passed, run_on, Options};

fn bench(c: &mut Criterion) {
    let (h, d, rotary) = (16, 256, 64);
    for t in [1, 512] {
        let pos: Vec<i64> = (0..t as i64).map(|i| 100_000 + i).collect();
        let mut y: Vec<f32> = (0..t * h * d).map(|i| (i % 67) as f32 / 16.0 - 2.0).collect();
        let mut group = c.benchmark_group(format!("rope/T{t}"));
        group.sample_size(20).throughput(Throughput::Bytes(8 * (t * h * rotary) as u64));
        for variant in Op::variants().into_iter().filter(|v| v.isa().available()) {
            assert_passed(&run_on::<Rope>(&Options::default(), &[variant]).expect("known names"));
            let exec = Exec::variant(variant).parts(1);
            group.bench_function(BenchmarkId::from_parameter(variant.name()), |bench| {
                bench.iter(|| {
                    let y = ViewMut::new(&mut y, [t, h, d]).expect("sized");
                    rope::run(rope::Args { y, x: None, pos: &pos, base: 1e7, rotary }, &exec).expect("accepted")
                })
            });
        }
        group.finish();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
