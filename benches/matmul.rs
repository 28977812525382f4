//! Matmul of one decode row and of a prefill batch, every dtype and variant; each is verified on its inputs first.
#![allow(missing_docs)] // criterion_group! makes an undocumented function

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use qwen3next_kernels::matmul::{self, Op};
use qwen3next_kernels::{Exec, Operator, View, ViewMut, Weight};
use qwen3next_verify::buffer::Layout;
use qwen3next_verify::cases::matmul::{against_reference, Case, Inputs, Regime};
use qwen3next_verify::cases::quant::Type;

const SEED: u64 = 1;

fn bench(c: &mut Criterion) {
    for m in [1, 64] {
        let mut group = c.benchmark_group(format!("matmul/2048x2048/m{m}"));
        group.sample_size(10).throughput(Throughput::Elements((2 * m * 2048 * 2048) as u64));
        for &dtype in Type::ALL {
            let blocks = 2048 / dtype.dtype().block();
            let case = Case { dtype, m, n: 2048, blocks, layout: Layout::Packed, regime: Regime::Mild };
            let inputs = Inputs::generate(&case, SEED);
            for variant in Op::variants().into_iter().filter(|v| v.isa().available()) {
                against_reference(&variant, &case, SEED).unwrap_or_else(|e| panic!("{} {case}: {e}", variant.name()));
                let exec = Exec::variant(variant);
                let mut y = vec![0f32; m * 2048];
                group.bench_function(BenchmarkId::new(variant.name(), dtype), |b| {
                    b.iter(|| {
                        let args = matmul::Args {
                            y: ViewMut::new(&mut y, [m, 2048]).expect("packed"),
                            x: View::new(&inputs.x, [m, 2048]).expect("packed").into(),
                            w: Weight::new(&inputs.w, dtype.dtype(), [2048, 2048]).expect("packed"),
                        };
                        matmul::run(args, &exec).expect("just verified");
                    })
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
