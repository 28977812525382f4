//! Time of every variant at T = 1 and 512 with Qwen3-Next's 8,192 channels, four taps, SiLU, state in place, on one
//! thread. Every variant is verified first.
#![allow(missing_docs)] // criterion_group! makes an undocumented function

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use qwen3next_kernels::causal_conv::{self, Op, State};
use qwen3next_kernels::{Exec, Operator, View, ViewMut};
use qwen3next_verify::cases::causal_conv::CausalConv;
use qwen3next_verify::suite::{assert_passed, run_on, Options};

fn bench(c: &mut Criterion) {
    let (channels, width) = (8192, 4);
    for t in [1, 512] {
        let x: Vec<f32> = (0..t * channels).map(|i| (i % 97) as f32 / 48.0 - 1.0).collect();
        let w: Vec<f32> = (0..channels * width).map(|i| (i % 31) as f32 / 31.0 - 0.5).collect();
        let mut state = vec![0.5f32; channels * (width - 1)];
        let mut y = vec![0.0f32; t * channels];
        let mut group = c.benchmark_group(format!("causal_conv/T{t}"));
        group.sample_size(20).throughput(Throughput::Bytes(8 * (t * channels) as u64));
        for variant in Op::variants().into_iter().filter(|v| v.isa().available()) {
            assert_passed(&run_on::<CausalConv>(&Options::default(), &[variant]).expect("known names"));
            let exec = Exec::variant(variant).parts(1);
            group.bench_function(BenchmarkId::from_parameter(variant.name()), |bench| {
                bench.iter(|| {
                    let args = causal_conv::Args {
                        y: ViewMut::new(&mut y, [1, t, channels]).expect("sized"),
                        x: View::new(&x, [1, t, channels]).expect("sized"),
                        w: View::new(&w, [channels, width]).expect("sized"),
                        bias: None,
                        state: State::InPlace(ViewMut::new(&mut state, [1, channels, width - 1]).expect("sized")),
                        snapshots: None,
                        slot_in: None,
                        slot_out: None,
                        cu_seqlens: None,
                        silu: true,
                    };
                    causal_conv::run(args, &exec).expect("accepted")
                })
            });
        }
        group.finish();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
