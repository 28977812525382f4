//! Time of every variant at T = 1 and 512 with Qwen3-Next's shapes, on one thread: rows of 2,048 with weights 1 + w,
//! and gated rows of 128, 32 heads. Every variant is verified first.
#![allow(missing_docs)] // criterion_group! makes an undocumented function

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use qwen3next_kernels::norm::{self, Kind, Op};
use qwen3next_kernels::{Exec, Operator, View, ViewMut};
use qwen3next_verify::cases::norm::Norm;
use qwen3next_verify::suite::{assert_passed, run_on, Options};

fn bench(c: &mut Criterion) {
    for (name, h, d) in [("plus1", 1, 2048), ("gated", 32, 128)] {
        for t in [1, 512] {
            let fill = |m: usize| (0..t * h * d).map(|i| (i % m) as f32 / 16.0 - 2.0).collect::<Vec<f32>>();
            let (x, z) = (fill(67), fill(61));
            let w: Vec<f32> = (0..d).map(|i| (i % 13) as f32 / 13.0).collect();
            let mut y = vec![0.0f32; t * h * d];
            let arrays = if name == "gated" { 3 } else { 2 };
            let mut group = c.benchmark_group(format!("norm/{name}/T{t}"));
            group.sample_size(20).throughput(Throughput::Bytes(4 * arrays * (t * h * d) as u64));
            for variant in Op::variants().into_iter().filter(|v| v.isa().available()) {
                assert_passed(&run_on::<Norm>(&Options::default(), &[variant]).expect("known names"));
                let exec = Exec::variant(variant).parts(1);
                group.bench_function(BenchmarkId::from_parameter(variant.name()), |bench| {
                    bench.iter(|| {
                        let z = View::new(&z, [t, h, d]).expect("sized");
                        let kind = if name == "gated" { Kind::RmsGated { w: Some(&w), z } } else { Kind::RmsPlus1(&w) };
                        let args = norm::Args {
                            y: ViewMut::new(&mut y, [t, h, d]).expect("sized"),
                            x: Some(View::new(&x, [t, h, d]).expect("sized")),
                            kind,
                            eps: 1e-6,
                        };
                        norm::run(args, &exec).expect("accepted")
                    })
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
