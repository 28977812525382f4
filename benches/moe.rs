//! Router and feed-forward of 64 experts of Qwen3-Next's shape, top-10, for one token and a batch; each is verified on its
//! inputs first.
#![allow(missing_docs)] // criterion_group! makes an undocumented function

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use qwen3next_kernels::moe::{self, Execs, Routing};
use qwen3next_kernels::{View, ViewMut, Weight};
use qwen3next_verify::buffer::Layout;
use qwen3next_verify::cases::moe::{down_reference, up_reference, Case, Crowd, Inputs};
use qwen3next_verify::cases::quant::Type;

const SEED: u64 = 1;

fn bench(c: &mut Criterion) {
    let (e, top_k, d, f) = (64, 10, 2048, 512);
    for t in [1, 64] {
        let mut group = c.benchmark_group(format!("moe/{e}x{f}x{d}/top{top_k}/t{t}"));
        group.sample_size(10).throughput(Throughput::Elements((2 * 3 * t * top_k * d * f) as u64));
        for dtype in [Type::Q4K, Type::Q8] {
            let block = dtype.dtype().block();
            let case = Case {
                t,
                e,
                top_k,
                d_blocks: d / block,
                f_blocks: f / block,
                up_type: dtype,
                down_type: dtype,
                merged: false,
                layout: Layout::Packed,
                crowd: Crowd::Random,
            };
            for check in [up_reference, down_reference] {
                check(&Execs::default(), &case, SEED).unwrap_or_else(|e| panic!("{case}: {e}"));
            }
            let inputs = Inputs::generate(&case, SEED);
            let routing =
                Routing::from_ids(e, top_k, inputs.ids.clone(), inputs.weights.clone()).expect("ids in range");
            let (mut y, mut h) = (vec![0f32; t * d], moe::Hidden::default());
            group.bench_function(BenchmarkId::new("feed_forward", dtype), |b| {
                b.iter(|| {
                    let weight = |data, shape| Weight::new(data, dtype.dtype(), shape).expect("packed");
                    let args = moe::Args {
                        y: ViewMut::new(&mut y, [t, d]).expect("packed"),
                        x: View::new(&inputs.x, [t, d]).expect("packed").into(),
                        gate: weight(&inputs.gate, [e, f, d]),
                        up: weight(&inputs.up, [e, f, d]),
                        down: weight(&inputs.down, [e, d, f]),
                        routing: &routing,
                        accumulate: false,
                        h: &mut h,
                    };
                    moe::run(args, &Execs::default()).expect("just verified");
                })
            });
        }
        group.finish();

        let logits: Vec<f32> = (0..t * 512).map(|i| (i * 7919 % 1009) as f32 / 100.0).collect();
        c.bench_function(&format!("moe/route/512/top{top_k}/t{t}"), |b| {
            b.iter(|| {
                let logits = View::new(&logits, [t, 512]).expect("packed");
                Routing::route(logits, top_k, true, &Default::default()).expect("no NaN")
            })
        });
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
