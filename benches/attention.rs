//! Attention with 16 query heads over 2 KV heads of 256 channels, as the 80B model has them: prefill of 128 tokens and
//! decode, on inputs that just passed against the judge.

#![allow(missing_docs)] // criterion_group makes a public function

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use half::f16;
use qwen3next_kernels::attention::{self, Kv};
use qwen3next_kernels::{Exec, Operator, View, ViewMut};
use qwen3next_verify::buffer::Layout;
use qwen3next_verify::cases::attention::{Case, KvType, Mask, Problem, Regime};
use std::hint::black_box;

const GROUP: usize = 8;
const HKV: usize = 2;
const HQ: usize = GROUP * HKV;
const D: usize = 256;

fn case(t: usize, s: usize) -> Case {
    Case {
        batch: 1,
        t,
        s,
        group: GROUP,
        hkv: HKV,
        d: D,
        kv: KvType::F16,
        causal: true,
        mask: Mask::None,
        sinks: false,
        gate: true,
        window: false,
        packed: false,
        layout: Layout::Packed,
        regime: Regime::Normal,
    }
}

type Entry = fn(attention::Args, &Exec<attention::Op>) -> Result<(), qwen3next_kernels::Error>;

/// One group: every variant through `run` at T = `t` and each length of the cache.
fn measure(c: &mut Criterion, name: &str, t: usize, lengths: &[usize], run: Entry) {
    let mut group = c.benchmark_group(name);
    for &s in lengths {
        let problem = Problem::generate(&case(t, s), 1);
        let judged = problem.judge(s.div_ceil(512).max(2));
        let [slots, ..] = problem.cache;
        let half = |x: &[f32]| x.iter().map(|&x| f16::from_f32(x)).collect::<Vec<f16>>();
        let (k, v) = (half(&problem.k), half(&problem.v));
        let mut o = vec![0.0f32; t * HQ * D];
        // Multiplications and additions of the visible scores and values.
        let seen: usize = (0..t).map(|i| s - t + i + 1).sum();
        group.throughput(Throughput::Elements((4 * seen * HQ * D) as u64));
        for variant in attention::Op::variants().into_iter().filter(|v| v.isa().available()) {
            let exec = Exec::variant(variant);
            let got = problem.call_by(run, &exec).unwrap_or_else(|e| panic!("{}: {e}", variant.name()));
            judged.accept(&got, D).unwrap_or_else(|e| panic!("{} at S = {s}: {e}", variant.name()));
            let mut call = || {
                let args = attention::Args {
                    o: ViewMut::new(&mut o, [1, t, HQ, D])?,
                    lse: None,
                    q: View::new(&problem.q, [1, t, HQ, D])?,
                    k: Kv::F16(View::new(&k, [slots, s, HKV, D])?),
                    v: Kv::F16(View::new(&v, [slots, s, HKV, D])?),
                    gate: match &problem.gate {
                        Some(gate) => Some(View::new(gate, [1, t, HQ, D])?),
                        None => None,
                    },
                    mask: None,
                    sinks: None,
                    slot: Some(&problem.slot),
                    kv_len: Some(&problem.kv_len),
                    cu_seqlens: None,
                    causal: true,
                    scale: problem.scale,
                    window: None,
                };
                run(args, &exec)
            };
            group.bench_function(BenchmarkId::new(variant.name(), s), |b| {
                b.iter(|| black_box(call()).expect("verified above"));
            });
        }
    }
    group.finish();
}

fn benches(c: &mut Criterion) {
    measure(c, "attention prefill T=128", 128, &[128, 256, 512, 1024], attention::run);
    measure(c, "attention decode", 1, &[1024, 4096], attention::run);
    measure(c, "attention decode, split", 1, &[1024, 4096], attention::run_split);
}

criterion_group! {
    name = attention_benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(2));
    targets = benches
}
criterion_main!(attention_benches);
