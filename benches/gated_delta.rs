//! Time of every variant at T = 1, 64 and 512 with Qwen3-Next's heads (HK 16, HV 32, d 128), on one thread. Inputs are
//! verified by the reference check first.

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use qwen3next_kernels::gated_delta::{self, Gate, HeadMap, LogDecay, Op, State};
use qwen3next_kernels::{Exec, Operator, View, ViewMut};
use qwen3next_verify::buffer::Layout;
use qwen3next_verify::cases::gated_delta::{call, judge, Case, GateKind, Heads, Inputs, Regime, Rows, StateKind};
use qwen3next_verify::reference::gated_delta::Form;

fn case(t: usize) -> Case {
    Case {
        b: 1,
        t,
        hk: 16,
        hv: 32,
        k: 128,
        v: 128,
        gate: GateKind::Scalar,
        heads: Heads::Grouped,
        l2norm: true,
        state: StateKind::InPlace,
        slots: false,
        snapshots: false,
        rows: Rows::Dense,
        layout: Layout::Packed,
        regime: Regime::Mild,
    }
}

fn bench(c: &mut Criterion) {
    for t in [1, 64, 512] {
        let case = case(t);
        let inputs = Inputs::generate(&case, 1);
        // The float64 loop takes its time: of long inputs the heads are verified on the first tokens.
        let checked = Case { t: t.min(64), hk: 2, hv: 4, ..case.clone() };
        let checked_inputs = Inputs::generate(&checked, 1);
        let mut group = c.benchmark_group(format!("gated_delta/T{t}"));
        group.sample_size(10).throughput(Throughput::Elements(t as u64));
        for variant in Op::variants().into_iter().filter(|v| v.isa().available()) {
            let got = call(&Exec::variant(variant), &checked, &checked_inputs).expect("accepted");
            judge(&checked, &checked_inputs, Form::of(variant.name()), 0)
                .compare(&checked, &got)
                .unwrap_or_else(|e| panic!("{}: {e}", variant.name()));
            let exec = Exec::variant(variant).parts(1);
            let (mut o, mut pool) = (vec![0.0f32; t * 32 * 128], inputs.state.clone());
            group.bench_function(BenchmarkId::from_parameter(variant.name()), |bench| {
                bench.iter(|| {
                    let args = gated_delta::Args {
                        o: ViewMut::new(&mut o, [1, t, 32, 128]).expect("sized"),
                        snapshots: None,
                        state: State::InPlace {
                            pool: ViewMut::new(&mut pool, [1, 32, 128, 128]).expect("sized"),
                            slots: None,
                        },
                        q: View::new(&inputs.q, [1, t, 16, 128]).expect("sized"),
                        k: View::new(&inputs.k, [1, t, 16, 128]).expect("sized"),
                        v: View::new(&inputs.v, [1, t, 32, 128]).expect("sized"),
                        gate: Gate::Scalar(LogDecay::unchecked(View::new(&inputs.g, [1, t, 32]).expect("sized"))),
                        beta: View::new(&inputs.beta, [1, t, 32]).expect("sized"),
                        cu_seqlens: None,
                        head_map: HeadMap::Grouped,
                        qk_l2norm: Some(gated_delta::L2_NORM_EPS),
                        scale: inputs.scale,
                    };
                    gated_delta::run(args, &exec).expect("accepted")
                })
            });
        }
        group.finish();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
