//! Time of every variant on the delta rule's systems: 64 unit lower triangles of 64 × 64 with 128 right-hand sides, and
//! their inverses, on one thread. Every variant is verified on the same inputs first.
#![allow(missing_docs)] // criterion_group! makes an undocumented function

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion};
use qwen3next_kernels::solve_tri::{self, Op};
use qwen3next_kernels::{Exec, Operator, View, ViewMut};
use qwen3next_verify::buffer::Layout;
use qwen3next_verify::cases::solve_tri::{residual, Case, Inputs, Regime};

fn bench(c: &mut Criterion) {
    for inverse in [false, true] {
        let (batch, n) = (64, 64);
        let m = if inverse { n } else { 128 };
        let case = Case { batch, n, m, unit: true, inverse, layout: Layout::Packed, regime: Regime::Delta };
        let inputs = Inputs::generate(&case, 1);
        let mut x = vec![0.0f32; batch * n * m];
        let mut group = c.benchmark_group(if inverse { "solve_tri/inverse" } else { "solve_tri/solve" });
        group.sample_size(20);
        for variant in Op::variants().into_iter().filter(|v| v.isa().available()) {
            residual(&variant, &case, 1).unwrap_or_else(|e| panic!("{}: {e}", variant.name()));
            let exec = Exec::variant(variant).parts(1);
            group.bench_function(BenchmarkId::from_parameter(variant.name()), |bench| {
                bench.iter(|| {
                    let args = solve_tri::Args {
                        x: ViewMut::new(&mut x, [batch, n, m]).expect("sized"),
                        l: View::new(&inputs.l, [batch, n, n]).expect("sized"),
                        b: (!inverse).then(|| View::new(&inputs.b, [batch, n, m]).expect("sized")),
                        unit_diagonal: true,
                    };
                    solve_tri::run(args, &exec).expect("accepted")
                })
            });
        }
        group.finish();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
