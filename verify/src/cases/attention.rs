//! Attention: every row against the formula with the bound its scores and weights give, and what must hold exactly.

use super::{normal, wide};
use crate::buffer::{FarPool, Input, Layout, Output};
use crate::compare::{bitwise, compare, gamma, Failure, Metrics, TINY32, U32};
use crate::guard::Guarded;
use crate::reference::attention as reference;
use crate::suite::{everywhere, rng, Check, Outcome, Suite};
use crate::{case, choice};
use half::{bf16, f16};
use ndarray::{ArrayView1, ArrayView2};
use proptest::prelude::*;
use qwen3next_kernels::attention::{self, merge, Kv};
use qwen3next_kernels::{Error, Exec, Variant, View, ViewMut};
use rand::seq::SliceRandom;
use rand::Rng as _;
use std::ops::Range;

choice! {
    /// Type of the cache.
    pub enum KvType {
        /// 32-bit floats.
        F32 = "f32",
        /// IEEE half.
        F16 = "f16",
        /// bfloat16.
        BF16 = "bf16",
        /// Blocks of int8; D is a multiple of 32.
        Q8_0 = "q8_0",
    }
}

choice! {
    /// The additive mask.
    pub enum Mask {
        /// None.
        None = "none",
        /// A third of the keys hidden at random, biases on the others.
        Random = "random",
        /// In turn over the queries: leading keys hidden, a middle stretch, all, none.
        Blocks = "blocks",
    }
}

choice! {
    /// Size of the scores.
    pub enum Regime {
        /// Standard normal.
        Normal = "normal",
        /// Up to ±60: few keys take all the weight.
        Sharp = "sharp",
        /// Up to ±60,000: in f32 a score is known to a few thousandths only.
        Large = "large",
    }
}

case! {
    /// One shape and form of call.
    pub struct Case {
        /// Sequences.
        pub batch: usize,
        /// Queries of a sequence (packed: on average).
        pub t: usize,
        /// Keys the cache holds a slot.
        pub s: usize,
        /// Query heads of a KV head.
        pub group: usize,
        /// KV heads.
        pub hkv: usize,
        /// Channels.
        pub d: usize,
        /// Type of the cache.
        pub kv: KvType,
        /// Causal.
        pub causal: bool,
        /// Additive mask.
        pub mask: Mask,
        /// With sinks.
        pub sinks: bool,
        /// With an output gate.
        pub gate: bool,
        /// Only a window of the keys.
        pub window: bool,
        /// Sequences of different lengths, some empty, in one row.
        pub packed: bool,
        /// Strides.
        pub layout: Layout,
        /// Size of the scores.
        pub regime: Regime,
    }
}

/// A typed cache in memory: `[slots][S][HKV][D]`.
enum Cache {
    F32(Guarded<f32>),
    F16(Guarded<f16>),
    BF16(Guarded<bf16>),
    Q8_0(Guarded<attention::Q8_0>),
}

/// The block of 32 values: scale |x|max / 127 in f16. A NaN makes the scale, so the block, NaN.
fn q8_0(x: &[f32]) -> attention::Q8_0 {
    let largest = x.iter().fold(0.0f32, |m, x| if x.is_nan() || m.is_nan() { f32::NAN } else { m.max(x.abs()) });
    let scale = f16::from_f32(largest / 127.0);
    let mut block = [0; 34];
    block[..2].copy_from_slice(&scale.to_le_bytes());
    for (q, x) in block[2..].iter_mut().zip(x) {
        *q = if scale.to_f32() > 0.0 { (x / scale.to_f32()).round() as i8 as u8 } else { 0 };
    }
    block
}

/// `x` as the type holds it.
fn rounded(kv: KvType, x: &[f32]) -> Vec<f32> {
    match kv {
        KvType::F32 => x.to_vec(),
        KvType::F16 => x.iter().map(|&x| f16::from_f32(x).to_f32()).collect(),
        KvType::BF16 => x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect(),
        KvType::Q8_0 => x
            .chunks(32)
            .flat_map(|x| {
                let block = q8_0(x);
                let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
                block[2..].iter().map(move |&q| scale * f32::from(q as i8)).collect::<Vec<f32>>()
            })
            .collect(),
    }
}

/// A cache laid out with its strides (in values or blocks); gaps hold NaN.
struct Stored {
    cache: Cache,
    shape: [usize; 4],
    strides: [usize; 4],
    offset: usize,
}

impl Stored {
    fn new(kv: KvType, values: &[f32], [slots, s, hkv, d]: [usize; 4], layout: Layout) -> Stored {
        let (gap, offset) = (if layout == Layout::Gaps { 3 } else { 0 }, layout.offset());
        let per_head = if kv == KvType::Q8_0 { d / 32 } else { d };
        let head = per_head + gap;
        let (key, slot) = (hkv * head + gap, s * (hkv * head + gap) + gap);
        fn lay<T: Copy>(
            length: usize,
            poison: T,
            rows: usize,
            at: impl Fn(usize) -> usize,
            row: impl Fn(usize) -> Vec<T>,
        ) -> Guarded<T> {
            let mut all = Guarded::filled(length, poison);
            for r in 0..rows {
                let row = row(r);
                all[at(r)..at(r) + row.len()].copy_from_slice(&row);
            }
            all
        }
        let rows = slots * s * hkv;
        let at = |r: usize| offset + r / (s * hkv) * slot + r / hkv % s * key + r % hkv * head;
        let of = |r: usize| &values[r * d..(r + 1) * d];
        let length = rows.checked_sub(1).map_or(offset, |last| at(last) + per_head);
        let cache = match kv {
            KvType::F32 => Cache::F32(lay(length, f32::NAN, rows, at, |r| of(r).to_vec())),
            KvType::F16 => {
                Cache::F16(lay(length, f16::NAN, rows, at, |r| of(r).iter().map(|&x| f16::from_f32(x)).collect()))
            }
            KvType::BF16 => {
                Cache::BF16(lay(length, bf16::NAN, rows, at, |r| of(r).iter().map(|&x| bf16::from_f32(x)).collect()))
            }
            KvType::Q8_0 => Cache::Q8_0(lay(length, [0xff; 34], rows, at, |r| of(r).chunks(32).map(q8_0).collect())),
        };
        Stored { cache, shape: [slots, s, hkv, per_head], strides: [slot, key, head, 1], offset }
    }

    fn view(&self) -> Kv<'_> {
        fn of<'a, T>(data: &'a [T], stored: &Stored) -> View<'a, 4, T> {
            View::strided(&data[stored.offset..], stored.shape, stored.strides).expect("laid out for this view")
        }
        match &self.cache {
            Cache::F32(x) => Kv::F32(of(x, self)),
            Cache::F16(x) => Kv::F16(of(x, self)),
            Cache::BF16(x) => Kv::BF16(of(x, self)),
            Cache::Q8_0(x) => Kv::Q8_0(of(x, self)),
        }
    }
}

/// A call: what it takes, packed, and its shape.
#[derive(Clone)]
pub struct Problem {
    /// `[tokens][HQ][D]`.
    pub q: Vec<f32>,
    /// `[slots][S][HKV][D]`, as the type holds them. What no query may see is NaN.
    pub k: Vec<f32>,
    /// As k.
    pub v: Vec<f32>,
    /// `[tokens][HQ][D]`.
    pub gate: Option<Vec<f32>>,
    /// `[tokens][S]`.
    pub mask: Option<Vec<f32>>,
    /// `[HQ]`.
    pub sinks: Option<Vec<f32>>,
    /// `[B]`.
    pub slot: Vec<i64>,
    /// `[B]`.
    pub kv_len: Vec<i64>,
    /// First query of every sequence and the end of the last, `[B+1]`.
    pub cu: Vec<i64>,
    /// Keys seen at all.
    pub window: Range<usize>,
    /// `[slots, S, HKV, D]`.
    pub cache: [usize; 4],
    /// Query heads.
    pub hq: usize,
    /// Causal.
    pub causal: bool,
    /// Factor of the scores.
    pub scale: f32,
    /// Type of the cache.
    pub kv: KvType,
    /// One packed row.
    pub packed: bool,
    /// Strides.
    pub layout: Layout,
}

/// What a call gives, packed.
#[derive(Debug, Clone)]
pub struct Outputs {
    /// Shape of q.
    pub o: Vec<f32>,
    /// `[tokens][HQ]`.
    pub lse: Vec<f32>,
}

/// What the judge says, and the error every element may have.
pub struct Judged {
    /// Shape of q.
    pub o: Vec<f64>,
    /// Error of each.
    pub o_bound: Vec<f64>,
    /// `[tokens][HQ]`.
    pub lse: Vec<f64>,
    /// Error of each.
    pub lse_bound: Vec<f64>,
}

impl Judged {
    /// Compares with what a call gave, in rows of `d` channels.
    pub fn accept(&self, got: &Outputs, d: usize) -> Result<Metrics, Failure> {
        let lse = compare("lse", &got.lse, &self.lse, &self.lse_bound, 1)?;
        let o = compare("o", &got.o, &self.o, &self.o_bound, d)?;
        Ok(Metrics { bound_multiple: o.bound_multiple.max(lse.bound_multiple), ..o })
    }
}

impl Problem {
    /// The problem of `case` drawn from `seed`.
    pub fn generate(case: &Case, seed: u64) -> Problem {
        let rng = &mut rng(seed);
        let mut cu = vec![0];
        for b in 0..case.batch {
            let n = match case.packed {
                true if b % 3 == 1 => 0,
                true => rng.random_range(0..=2 * case.t),
                false => case.t,
            };
            cu.push(cu[b] + n as i64);
        }
        let tokens = cu[case.batch] as usize;
        let queries: Vec<i64> = cu.windows(2).map(|w| w[1] - w[0]).collect();
        let (s, slots) = (case.s.max(queries.iter().copied().max().unwrap_or(0) as usize), case.batch + 1);
        // The first sequence fills the cache, the others part of it.
        let kv_len: Vec<i64> =
            (0..case.batch).map(|b| if b == 0 { s as i64 } else { rng.random_range(queries[b]..=s as i64) }).collect();
        let window = if case.window {
            let (a, b) = (rng.random_range(0..=s), rng.random_range(0..=s));
            a.min(b)..a.max(b)
        } else {
            0..s
        };
        let mut slot: Vec<i64> = (0..slots as i64).collect();
        slot.shuffle(rng);
        slot.truncate(case.batch);

        let (hq, d) = (case.group * case.hkv, case.d);
        let q_scale = match case.regime {
            Regime::Normal => 1.0,
            Regime::Sharp => 15.0,
            Regime::Large => 15_000.0,
        };
        let fill = |n: usize, scale: f32, rng: &mut _| (0..n).map(|_| normal(rng) * scale).collect::<Vec<f32>>();
        let q = fill(tokens * hq * d, q_scale, rng);
        let mut k = rounded(case.kv, &fill(slots * s * case.hkv * d, 1.0, rng));
        let mut v = rounded(case.kv, &fill(slots * s * case.hkv * d, 8.0, rng));
        let mut seen = vec![false; slots * s];
        for (b, &slot) in slot.iter().enumerate() {
            let end = window.end.min(kv_len[b] as usize).max(window.start);
            seen[slot as usize * s..][window.start..end].fill(true);
        }
        let key = case.hkv * d;
        for j in (0..slots * s).filter(|&j| !seen[j]) {
            k[j * key..(j + 1) * key].fill(f32::NAN);
            v[j * key..(j + 1) * key].fill(f32::NAN);
        }
        let gate = case.gate.then(|| fill(tokens * hq * d, 4.0, rng));
        let sinks = case.sinks.then(|| fill(hq, 3.0, rng));
        let mask = (case.mask != Mask::None).then(|| {
            let mut mask = fill(tokens * s, 1.0, rng);
            for (t, row) in mask.chunks_mut(s.max(1)).enumerate() {
                let stretch = match (case.mask, t % 4) {
                    (Mask::Blocks, 0) => 0..rng.random_range(0..=s),
                    (Mask::Blocks, 1) => s / 4..s - s / 3,
                    (Mask::Blocks, 2) => 0..s,
                    _ => 0..0,
                };
                row[stretch].fill(f32::NEG_INFINITY);
                if case.mask == Mask::Random {
                    row.iter_mut().filter(|_| rng.random_ratio(1, 3)).for_each(|m| *m = f32::NEG_INFINITY);
                }
            }
            mask
        });
        Problem {
            q,
            k,
            v,
            gate,
            mask,
            sinks,
            slot,
            kv_len,
            cu,
            window,
            cache: [slots, s, case.hkv, d],
            hq,
            causal: case.causal,
            scale: 1.0 / (d as f32).sqrt(),
            kv: case.kv,
            packed: case.packed,
            layout: case.layout,
        }
    }

    fn tokens(&self) -> usize {
        self.cu[self.slot.len()] as usize
    }

    /// Sequence of a token, and the keys it may see before the mask.
    fn sees(&self, token: usize) -> (usize, Range<usize>) {
        let b = (0..self.slot.len()).find(|&b| token < self.cu[b + 1] as usize).expect("a token of the problem");
        let back = if self.causal { self.cu[b + 1] as usize - 1 - token } else { 0 };
        let end = self.window.end.min((self.kv_len[b] as usize).saturating_sub(back));
        (b, self.window.start..end.max(self.window.start))
    }

    fn hidden(&self, token: usize, key: usize) -> bool {
        self.mask.as_ref().is_some_and(|m| m[token * self.cache[1] + key] == f32::NEG_INFINITY)
    }

    /// First element of a key's heads in k and v.
    fn key(&self, b: usize, j: usize) -> Range<usize> {
        let [_, s, hkv, d] = self.cache;
        let at = (self.slot[b] as usize * s + j) * hkv * d;
        at..at + hkv * d
    }

    /// Runs the operator.
    pub fn call(&self, exec: &Exec<attention::Op>) -> Result<Outputs, Failure> {
        self.call_by(attention::run, exec)
    }

    /// Runs the operator through this entry.
    pub fn call_by(
        &self,
        run: fn(attention::Args, &Exec<attention::Op>) -> Result<(), Error>,
        exec: &Exec<attention::Op>,
    ) -> Result<Outputs, Failure> {
        let [_, s, _, d] = self.cache;
        let (batch, hq, layout) = (self.slot.len(), self.hq, self.layout);
        let (rows, t) = if self.packed { (1, self.tokens()) } else { (batch, self.tokens() / batch.max(1)) };
        let q = Input::new(&self.q, [rows, t, hq, d], layout);
        let gate = self.gate.as_ref().map(|g| Input::new(g, [rows, t, hq, d], layout));
        let mask = self.mask.as_ref().map(|m| Input::new(m, [rows, t, s], layout));
        let k = Stored::new(self.kv, &self.k, self.cache, layout);
        let v = Stored::new(self.kv, &self.v, self.cache, layout);
        let sinks = self.sinks.as_deref().map(Guarded::of);
        let (slot, kv_len, cu) = (Guarded::of(&self.slot), Guarded::of(&self.kv_len), Guarded::of(&self.cu));
        let mut o = Output::new([rows, t, hq, d], layout);
        let mut lse = Output::new([rows, t, hq], layout);
        let args = attention::Args {
            o: o.view(),
            lse: Some(lse.view()),
            q: q.view(),
            k: k.view(),
            v: v.view(),
            gate: gate.as_ref().map(|g| g.view()),
            mask: mask.as_ref().map(|m| m.view()),
            sinks: sinks.as_deref().map(View::from),
            slot: Some(&slot),
            kv_len: Some(&kv_len),
            cu_seqlens: self.packed.then_some(&cu[..]),
            causal: self.causal,
            scale: self.scale,
            window: Some(self.window.clone()),
        };
        run(args, exec)?;
        Ok(Outputs { o: o.read("o")?, lse: lse.read("lse")? })
    }

    /// The judge, with the error each element may have. `parts` > 1: computed in that many parts and merged.
    ///
    /// A computed weight is p_j e^ε with |ε| ≤ g_j, where g_j collects the rounding of the score (a dot product in
    /// at least eight partial sums), of its distance from the running maximum, which is rounded again when the maximum
    /// moves, of the exponentials, and of sums in blocks of at most 64 keys and then over blocks of 32 or more. From
    /// there |ô − o| ≤ Σ p_j |v_j| (e^g_j − 1 + G) / (1 − G), with G = Σ p_j (e^g_j − 1); and never more than twice the
    /// largest |v_j|. A merge rounds the weights of the parts once more, and their log-sum-exp by a unit of its size.
    pub fn judge(&self, parts: usize) -> Judged {
        let [_, s, hkv, d] = self.cache;
        let group = self.hq / hkv.max(1);
        let (q, k, v) = (wide(&self.q), wide(&self.k), wide(&self.v));
        let mask = self.mask.as_ref().map(|m| wide(m));
        let mut judged = Judged { o: vec![], o_bound: vec![], lse: vec![], lse_bound: vec![] };
        for token in 0..self.tokens() {
            let (b, range) = self.sees(token);
            for h in 0..self.hq {
                let at = (self.slot[b] as usize * s * hkv + h / group) * d;
                let head = |x: &[f64]| -> Vec<f64> {
                    range.clone().flat_map(|j| x[at + j * hkv * d..][..d].to_vec()).collect()
                };
                let (k, v) = (head(&k), head(&v));
                let k = ArrayView2::from_shape((range.len(), d), &k).expect("n × D");
                let v = ArrayView2::from_shape((range.len(), d), &v).expect("n × D");
                let q = ArrayView1::from(&q[(token * self.hq + h) * d..][..d]);
                let mask = mask.as_ref().map(|m| ArrayView1::from(&m[token * s..][range.clone()]));
                let sink = self.sinks.as_ref().map(|s| f64::from(s[h]));
                let row = reference::row(q, k, v, mask, f64::from(self.scale), sink);

                let max = row.scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
                let sums = gamma(80 + 6 * (range.len() / 32 + 1));
                let weight_error = |j: usize| {
                    let terms: f64 = q.iter().zip(k.row(j)).map(|(q, k)| (q * k).abs()).sum();
                    let bias = mask.map_or(0.0, |m| m[j].abs());
                    let score = gamma(d / 8 + 6) * f64::from(self.scale).abs() * terms + 2.0 * U32 * bias;
                    let g = score + 2.0 * U32 * (max - row.scores[j]) + sums;
                    match parts {
                        1 => g,
                        _ => 2.0 * g + 4.0 * U32 * (1.0 + max.abs()) + gamma(3 * parts + 10),
                    }
                };
                let errors: Vec<f64> =
                    (0..range.len()).map(|j| if row.weights[j] == 0.0 { 0.0 } else { weight_error(j) }).collect();
                let sink_error = sink.map_or(0.0, |s| (s - row.lse).exp() * (2.0 * U32 * (max - s) + sums).exp_m1());
                let total: f64 = row.weights.iter().zip(&errors).map(|(p, g)| p * g.exp_m1()).sum::<f64>() + sink_error;
                let (mut sums, mut largest) = (vec![0.0; d], vec![0.0f64; d]);
                for j in (0..range.len()).filter(|&j| row.scores[j] != f64::NEG_INFINITY) {
                    let weight = row.weights[j] * (errors[j].exp_m1() + total);
                    for (i, v) in v.row(j).iter().enumerate() {
                        sums[i] += weight * v.abs();
                        largest[i] = largest[i].max(v.abs());
                    }
                }
                for i in 0..d {
                    // Weights below 2⁻¹²⁶ vanish.
                    let vanished = range.len() as f64 * TINY32 * largest[i];
                    let error = if total < 0.5 { sums[i] / (1.0 - total) + vanished } else { 2.0 * largest[i] };
                    let gate =
                        self.gate.as_ref().map_or(f64::INFINITY, |g| f64::from(g[(token * self.hq + h) * d + i]));
                    let sigmoid = 1.0 / (1.0 + (-gate).exp());
                    judged.o.push(row.o[i] * sigmoid);
                    judged
                        .o_bound
                        .push((error + gamma(8) * row.o[i].abs()) * sigmoid + TINY32 * (1.0 + row.o[i].abs()));
                }
                let largest = errors.iter().copied().fold(0.0, f64::max) + sink_error;
                let error = if total < 0.5 { -(1.0 - total).ln() } else { largest };
                judged.lse.push(row.lse);
                judged.lse_bound.push(if row.lse.is_infinite() {
                    0.0
                } else {
                    // max + log(sum): the logarithm of a sum of at most n + 1 exponentials, and the last addition.
                    error + 4.0 * U32 * (row.lse.abs() + 1.0 + (range.len() as f64 + 1.0).ln())
                });
            }
        }
        judged
    }

    /// Query `token` alone.
    fn single(&self, token: usize) -> Problem {
        let (b, _) = self.sees(token);
        let back = if self.causal { self.cu[b + 1] - 1 - token as i64 } else { 0 };
        let row = self.hq * self.cache[3];
        Problem {
            q: self.q[token * row..(token + 1) * row].to_vec(),
            gate: self.gate.as_ref().map(|g| g[token * row..(token + 1) * row].to_vec()),
            mask: self.mask.as_ref().map(|m| m[token * self.cache[1]..(token + 1) * self.cache[1]].to_vec()),
            slot: vec![self.slot[b]],
            kv_len: vec![self.kv_len[b] - back],
            cu: vec![0, 1],
            packed: false,
            ..self.clone()
        }
    }
}

fn against_reference(variant: &Variant<attention::Op>, case: &Case, seed: u64) -> Outcome {
    let problem = Problem::generate(case, seed);
    problem.judge(1).accept(&problem.call(&Exec::variant(*variant))?, case.d).map(Some)
}

/// Without sink and gate, every channel of the output lies between the least and the largest value the row sees; where
/// these are one constant, it is that constant. Both to within the roundings of the sums.
fn hull(variant: &Variant<attention::Op>, case: &Case, seed: u64) -> Outcome {
    let case = Case { sinks: false, gate: false, ..case.clone() };
    let mut problem = Problem::generate(&case, seed);
    let exec = Exec::variant(*variant);
    for constant in [false, true] {
        if constant {
            let at = |i: usize| rounded(case.kv, &[0.3 + (i % case.d) as f32; 32])[0];
            problem.v.iter_mut().enumerate().for_each(|(i, v)| *v = at(i));
        }
        if constant && case.kv == KvType::Q8_0 {
            // Channels of a block share a scale: one constant for all of them.
            problem.v.fill(rounded(case.kv, &[0.3; 32])[0]);
        }
        let got = problem.call(&exec)?.o;
        let [_, _, hkv, d] = problem.cache;
        for (i, &o) in got.iter().enumerate() {
            let (token, h) = (i / d / problem.hq, i / d % problem.hq);
            let (b, range) = problem.sees(token);
            let sums = 2.0 * gamma(80 + 6 * (range.len() / 32 + 1));
            let seen = range.filter(|&j| !problem.hidden(token, j));
            let values = seen.map(|j| f64::from(problem.v[problem.key(b, j)][h / (problem.hq / hkv) * d + i % d]));
            let (low, high) = values.fold((f64::MAX, f64::MIN), |(a, b), v| (a.min(v), b.max(v)));
            let slack = sums * low.abs().max(high.abs()) + TINY32;
            let inside = f64::from(o) >= low - slack && f64::from(o) <= high + slack;
            if low <= high && !inside {
                return Err(Failure::new(format!(
                    "o[{i}] is {o:e}, but the values it averages are in {low:e}..={high:e}"
                )));
            }
        }
    }
    Ok(Some(Metrics::default()))
}

/// A constant added to all scores of a row leaves its output and moves its log-sum-exp.
fn shift(variant: &Variant<attention::Op>, case: &Case, seed: u64) -> Outcome {
    if case.regime == Regime::Large {
        return Ok(None);
    }
    let case = Case { sinks: false, ..case.clone() };
    let mut problem = Problem::generate(&case, seed);
    let plain = problem.judge(1);
    let s = problem.cache[1];
    let mut mask = problem.mask.take().unwrap_or_else(|| vec![0.0; problem.tokens() * s]);
    let constant = |token: usize| [7.5f32, -300.0, 1000.0][token % 3];
    mask.iter_mut().enumerate().for_each(|(i, m)| *m += constant(i / s));
    problem.mask = Some(mask);
    let bounds = problem.judge(1);
    // m + c was rounded when the mask was made: a score is off by a unit of it, and a weight by twice that.
    let finite = |x: &[f32]| x.iter().filter(|x| x.is_finite()).fold(0.0f64, |m, &x| m.max(f64::from(x).abs()));
    let rounding = U32 * finite(problem.mask.as_deref().unwrap_or(&[]));
    let moved = (2.0 * rounding).exp_m1() * finite(&problem.v);
    let want = Judged {
        lse: plain.lse.iter().enumerate().map(|(i, l)| l + f64::from(constant(i / problem.hq))).collect(),
        lse_bound: bounds.lse_bound.iter().map(|b| b + rounding).collect(),
        o: plain.o,
        o_bound: bounds.o_bound.iter().map(|b| b + moved).collect(),
    };
    want.accept(&problem.call(&Exec::variant(*variant))?, case.d).map(Some)
}

/// What a query may not see can hold anything: NaN in a key and its value changes no bit of the rows that it is hidden
/// from, by causality or by the mask, though other rows of the call see it.
fn hidden_keys(variant: &Variant<attention::Op>, case: &Case, seed: u64) -> Outcome {
    let clean = Problem::generate(case, seed);
    let exec = Exec::variant(*variant);
    let want = clean.call(&exec)?;
    let row = clean.hq * case.d;
    let mut applied = None;
    for b in (0..case.batch).filter(|&b| clean.cu[b] < clean.cu[b + 1] && clean.kv_len[b] > 0) {
        let mut problem = clean.clone();
        // The last key, which earlier causal queries do not see, or any.
        let len = problem.kv_len[b] as usize;
        let j = if case.causal { len - 1 } else { seed as usize % len };
        let at = problem.key(b, j);
        problem.k[at.clone()].fill(f32::NAN);
        problem.v[at].fill(f32::NAN);
        let got = problem.call(&exec)?;
        for token in 0..problem.tokens() {
            let (sequence, range) = problem.sees(token);
            if sequence == b && range.contains(&j) && !problem.hidden(token, j) {
                if !got.o[token * row..(token + 1) * row].iter().all(|o| o.is_nan()) {
                    return Err(Failure::new(format!(
                        "token {token} sees a NaN at key {j}, but its output is a number"
                    )));
                }
                continue;
            }
            bitwise(&format!("o of token {token}"), &got.o[token * row..][..row], &want.o[token * row..][..row])?;
            let lse = token * problem.hq..(token + 1) * problem.hq;
            bitwise(&format!("lse of token {token}"), &got.lse[lse.clone()], &want.lse[lse])?;
            applied = Some(Metrics::default());
        }
    }
    Ok(applied)
}

/// Later keys do not change a query: with NaN in all of them the queries up to some point keep their bits.
fn causality(variant: &Variant<attention::Op>, case: &Case, seed: u64) -> Outcome {
    if !case.causal {
        return Ok(None);
    }
    let clean = Problem::generate(case, seed);
    let exec = Exec::variant(*variant);
    let want = clean.call(&exec)?;
    let row = clean.hq * case.d;
    let mut applied = None;
    for b in 0..case.batch {
        let queries = clean.cu[b] as usize..clean.cu[b + 1] as usize;
        if queries.len() < 2 {
            continue;
        }
        let last = queries.start + (seed as usize + b) % (queries.len() - 1);
        let mut problem = clean.clone();
        let seen = clean.kv_len[b] as usize - (queries.end - 1 - last);
        for j in seen..clean.kv_len[b] as usize {
            let at = clean.key(b, j);
            problem.k[at.clone()].fill(f32::NAN);
            problem.v[at].fill(f32::NAN);
        }
        let got = problem.call(&exec)?;
        let (o, lse) = (queries.start * row..(last + 1) * row, queries.start * clean.hq..(last + 1) * clean.hq);
        bitwise("o before the later keys", &got.o[o.clone()], &want.o[o])?;
        bitwise("lse before the later keys", &got.lse[lse.clone()], &want.lse[lse])?;
        applied = Some(Metrics::default());
    }
    Ok(applied)
}

/// Rows that see no key give exactly 0 and a log-sum-exp of −∞, or of the sink.
fn empty_rows(variant: &Variant<attention::Op>, case: &Case, seed: u64) -> Outcome {
    let mut problem = Problem::generate(case, seed);
    let s = problem.cache[1];
    if problem.tokens() * case.d * problem.hq == 0 {
        return Ok(None);
    }
    let mask = problem.mask.get_or_insert_with(|| vec![0.0; *problem.cu.last().unwrap_or(&0) as usize * s]);
    mask.chunks_mut(s.max(1)).skip(seed as usize % 2).step_by(2).for_each(|row| row.fill(f32::NEG_INFINITY));
    let got = problem.call(&Exec::variant(*variant))?;
    let mut applied = None;
    for row in 0..problem.tokens() * problem.hq {
        let token = row / problem.hq;
        if !problem.sees(token).1.all(|j| problem.hidden(token, j)) {
            continue;
        }
        let lse = problem.sinks.as_ref().map_or(f32::NEG_INFINITY, |s| s[row % problem.hq]);
        bitwise("o of an empty row", &got.o[row * case.d..][..case.d], &vec![0.0; case.d])?;
        bitwise("lse of an empty row", &got.lse[row..=row], &[lse])?;
        applied = Some(Metrics::default());
    }
    Ok(applied)
}

/// An infinity in one channel of a value is that channel's output in the rows that see the key, and changes no other bit.
fn infinite_values(variant: &Variant<attention::Op>, case: &Case, seed: u64) -> Outcome {
    if case.regime != Regime::Normal || case.kv == KvType::Q8_0 {
        return Ok(None);
    }
    let clean = Problem::generate(case, seed);
    let exec = Exec::variant(*variant);
    let want = clean.call(&exec)?;
    let (hq, d, group) = (clean.hq, case.d, case.group);
    for b in (0..case.batch).filter(|&b| clean.cu[b] < clean.cu[b + 1] && clean.kv_len[b] > 0 && case.hkv > 0) {
        let mut problem = clean.clone();
        let (j, h, i) = (seed as usize % problem.kv_len[b] as usize, seed as usize % case.hkv, seed as usize / 2 % d);
        let at = problem.key(b, j).start + h * d + i;
        problem.v[at] = f32::INFINITY;
        let mut expected = want.o.clone();
        for token in 0..problem.tokens() {
            let (sequence, range) = problem.sees(token);
            if sequence == b && range.contains(&j) && !problem.hidden(token, j) {
                (h * group..(h + 1) * group).for_each(|h| expected[(token * hq + h) * d + i] = f32::INFINITY);
            }
        }
        let got = problem.call(&exec)?;
        bitwise("o beside an infinite value", &got.o, &expected)?;
        bitwise("lse beside an infinite value", &got.lse, &want.lse)?;
    }
    Ok(Some(Metrics::default()))
}

/// Scores of −∞, +∞ and NaN, from the mask or from the keys, do what the formula does, in their row alone.
fn infinities(variant: &Variant<attention::Op>, case: &Case, seed: u64) -> Outcome {
    let mut problem = Problem::generate(case, seed);
    let (s, tokens) = (problem.cache[1], problem.tokens());
    if case.regime == Regime::Large || tokens == 0 || s == 0 {
        return Ok(None);
    }
    let mask = problem.mask.get_or_insert_with(|| vec![0.0; tokens * s]);
    for (token, row) in mask.chunks_mut(s).enumerate() {
        let at = (seed as usize + 31 * token) % s;
        match token % 6 {
            0 => row[at] = f32::INFINITY,
            1 => row[at] = f32::NAN,
            2 => {
                // The one score that is not hidden is a NaN.
                row.fill(f32::NEG_INFINITY);
                row[at] = f32::NAN;
            }
            3 => row[at..].fill(f32::NEG_INFINITY),
            4 => row[..at].fill(f32::NEG_INFINITY),
            _ => {}
        }
    }
    problem.judge(1).accept(&problem.call(&Exec::variant(*variant))?, case.d).map(Some)
}

/// Parts over ranges of keys, merged, are the whole; so is the split of decode.
fn split(variant: &Variant<attention::Op>, case: &Case, seed: u64) -> Outcome {
    let problem = Problem::generate(case, seed);
    let exec = Exec::variant(*variant);
    let (tokens, hq, d) = (problem.tokens(), problem.hq, case.d);
    let rng = &mut rng(seed ^ 1);
    let mut cuts = vec![problem.window.start, problem.window.end];
    for _ in 0..seed % 4 {
        cuts.push(rng.random_range(problem.window.start..=problem.window.end));
    }
    cuts.sort_unstable();
    let (mut part_o, mut part_lse) = (Vec::new(), Vec::new());
    for cut in cuts.windows(2) {
        let part = Problem { window: cut[0]..cut[1], gate: None, sinks: None, ..problem.clone() };
        let part = part.call(&exec)?;
        part_o.extend(part.o);
        part_lse.extend(part.lse);
    }
    let parts = cuts.len() - 1;
    let merged = Merged {
        part_o,
        part_lse,
        gate: problem.gate.clone(),
        sinks: problem.sinks.clone(),
        shape: [parts, tokens, hq, d],
        layout: case.layout,
    };
    let parts_bound = problem.judge(parts.max(2));
    let merged = parts_bound.accept(&merged.call(&Exec::default())?, d)?;

    let split = problem.call_by(attention::run_split, &exec)?;
    let again = problem.call_by(attention::run_split, &exec.clone().parts(1))?;
    bitwise("o of the split over other threads", &again.o, &split.o)?;
    Ok(Some(merged.worst(problem.judge(problem.cache[1].div_ceil(512).max(2)).accept(&split, d)?)))
}

/// Heads that share a KV head get the bits they get from copies of it.
fn grouped_heads(variant: &Variant<attention::Op>, case: &Case, seed: u64) -> Outcome {
    if case.group < 2 {
        return Ok(None);
    }
    let problem = Problem::generate(case, seed);
    let exec = Exec::variant(*variant);
    let copies = |x: &[f32]| -> Vec<f32> {
        x.chunks(case.d).flat_map(|head| std::iter::repeat_n(head, case.group).flatten().copied()).collect()
    };
    let [slots, s, _, d] = problem.cache;
    let replicated =
        Problem { k: copies(&problem.k), v: copies(&problem.v), cache: [slots, s, problem.hq, d], ..problem.clone() };
    let (got, want) = (problem.call(&exec)?, replicated.call(&exec)?);
    bitwise("o", &got.o, &want.o)?;
    bitwise("lse", &got.lse, &want.lse)?;
    Ok(Some(Metrics::default()))
}

/// Where one key outweighs all others by e³⁰⁰, the output is its value, bit for bit.
fn one_hot(variant: &Variant<attention::Op>, case: &Case, seed: u64) -> Outcome {
    let case =
        Case { sinks: false, gate: false, mask: Mask::None, regime: Regime::Normal, causal: false, ..case.clone() };
    let mut problem = Problem::generate(&case, seed);
    // All queries are one vector, so that one key can stand out for all heads.
    let q: Vec<f32> = (0..case.d).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
    problem.q.chunks_mut(case.d).for_each(|row| row.copy_from_slice(&q));
    let length = 300.0 / (problem.scale * case.d as f32);
    let mut target = vec![0; case.batch];
    for (b, target) in target.iter_mut().enumerate() {
        let range = problem.window.start..problem.window.end.min(problem.kv_len[b] as usize).max(problem.window.start);
        for j in range.clone() {
            let at = problem.key(b, j);
            problem.k[at].fill(0.0);
        }
        *target = range.start + seed as usize % range.len().max(1);
        if range.is_empty() {
            continue;
        }
        let at = problem.key(b, *target);
        problem.k[at].chunks_mut(case.d).for_each(|k| k.iter_mut().zip(&q).for_each(|(k, q)| *k = q * length));
    }
    let got = problem.call(&Exec::variant(*variant))?.o;
    let mut want = Vec::new();
    for token in 0..problem.tokens() {
        let (b, range) = problem.sees(token);
        for h in 0..problem.hq {
            let at = problem.key(b, target[b]).start + h / case.group * case.d;
            // Adding to a sum of zeros makes −0 a 0.
            want.extend((0..case.d).map(|i| if range.is_empty() { 0.0 } else { problem.v[at + i] + 0.0 }));
        }
    }
    bitwise("o", &got, &want)?;
    Ok(Some(Metrics::default()))
}

/// A query alone gives the bits it gives in a batch: prefill is decode.
fn stepwise(variant: &Variant<attention::Op>, case: &Case, seed: u64) -> Outcome {
    let problem = Problem::generate(case, seed);
    if problem.tokens() < 2 {
        return Ok(None);
    }
    let exec = Exec::variant(*variant);
    let want = problem.call(&exec)?;
    let row = problem.hq * case.d;
    for token in (0..problem.tokens()).step_by(1 + problem.tokens() / 8) {
        let got = problem.single(token).call(&exec)?;
        bitwise(&format!("o of token {token} alone"), &got.o, &want.o[token * row..][..row])?;
        let lse = &want.lse[token * problem.hq..][..problem.hq];
        bitwise(&format!("lse of token {token} alone"), &got.lse, lse)?;
    }
    Ok(Some(Metrics::default()))
}

/// NaN in one query head stays in its row.
fn isolation(variant: &Variant<attention::Op>, case: &Case, seed: u64) -> Outcome {
    let mut problem = Problem::generate(case, seed);
    let rows = problem.tokens() * problem.hq;
    if rows == 0 {
        return Ok(None);
    }
    let exec = Exec::variant(*variant);
    let mut want = problem.call(&exec)?;
    let row = seed as usize % rows;
    let token = row / problem.hq;
    problem.q[row * case.d + seed as usize % case.d] = f32::NAN;
    if !problem.sees(token).1.all(|j| problem.hidden(token, j)) {
        want.o[row * case.d..(row + 1) * case.d].fill(f32::NAN);
        want.lse[row] = f32::NAN;
    }
    let got = problem.call(&exec)?;
    bitwise("o beside a NaN", &got.o, &want.o)?;
    bitwise("lse beside a NaN", &got.lse, &want.lse)?;
    Ok(Some(Metrics::default()))
}

/// Any cut over any number of threads and any strides: the same bits.
fn cuts(variant: &Variant<attention::Op>, case: &Case, seed: u64) -> Outcome {
    let mut problem = Problem::generate(case, seed);
    let want = problem.call(&Exec::variant(*variant).parts(1))?;
    let same = |got: Outputs| {
        bitwise("o", &got.o, &want.o)?;
        bitwise("lse", &got.lse, &want.lse)
    };
    everywhere(variant, |exec| same(problem.call(&exec)?))?;
    for &layout in Layout::ALL {
        problem.layout = layout;
        same(problem.call(&Exec::variant(*variant))?)?;
    }
    Ok(Some(Metrics::default()))
}

/// Entries of the cache that lie 2³¹ elements apart are found all the same.
fn far_slots(variant: &Variant<attention::Op>, case: &Case, seed: u64) -> Outcome {
    if case.t != 1 || case.s != 31 {
        return Ok(None);
    }
    let case = Case {
        batch: 2,
        kv: KvType::F32,
        mask: Mask::None,
        sinks: false,
        gate: false,
        window: false,
        packed: false,
        ..case.clone()
    };
    let problem = Problem::generate(&case, seed);
    let want = problem.call(&Exec::variant(*variant))?;
    let [_, s, hkv, d] = problem.cache;
    let far = |x: &[f32]| {
        let entry = |b: usize| &x[problem.slot[b] as usize * s * hkv * d..][..s * hkv * d];
        FarPool::new(&[(2, entry(0)), (0, entry(1))])
    };
    let (mut k, mut v) = (far(&problem.k)?, far(&problem.v)?);
    let (shape, strides) = ([FarPool::SLOTS, s, hkv, d], [FarPool::STRIDE, hkv * d, d, 1]);
    let mut o = vec![f32::NAN; want.o.len()];
    let queries = [2, 1, problem.hq, d];
    let args = attention::Args {
        o: ViewMut::new(&mut o, queries)?,
        lse: None,
        q: View::new(&problem.q, queries)?,
        k: Kv::F32(View::strided(k.elements(), shape, strides)?),
        v: Kv::F32(View::strided(v.elements(), shape, strides)?),
        gate: None,
        mask: None,
        sinks: None,
        slot: Some(&[2, 0]),
        kv_len: Some(&problem.kv_len),
        cu_seqlens: None,
        causal: problem.causal,
        scale: problem.scale,
        window: None,
    };
    attention::run(args, &Exec::variant(*variant))?;
    bitwise("o from far slots", &o, &want.o)?;
    Ok(Some(Metrics::default()))
}

/// The suite.
pub struct Attention;

impl Suite for Attention {
    type Op = attention::Op;
    type Case = Case;

    fn grid() -> Vec<Case> {
        let mut grid = Vec::new();
        // (batch, t, s, group, hkv, d): edges of the query block (16), of the key block (32) and of the lanes.
        let shapes = [
            (1, 1, 1, 1, 1, 1),
            (2, 1, 31, 2, 1, 64),
            (1, 2, 32, 1, 2, 32),
            (3, 3, 33, 3, 2, 64),
            (1, 15, 64, 2, 1, 128),
            (2, 16, 65, 1, 2, 64),
            (1, 17, 17, 2, 2, 96),
            (1, 33, 100, 4, 1, 32),
            (2, 5, 129, 8, 1, 64),
            (1, 1, 300, 8, 2, 256),
            (1, 2, 1100, 2, 1, 64),
            (3, 1, 1030, 1, 2, 32),
            (1, 3, 40, 1, 1, 512),
            (1, 4, 70, 2, 1, 33),
            (2, 3, 50, 1, 2, 7),
            (0, 3, 8, 2, 1, 64),
            (2, 0, 8, 2, 1, 64),
        ];
        for (i, (batch, t, s, group, hkv, d)) in shapes.into_iter().enumerate() {
            for j in 0..4 {
                let k = i + 5 * j;
                let kv = match KvType::ALL[(i + j) % 4] {
                    KvType::Q8_0 if d % 32 != 0 => KvType::F16,
                    kv => kv,
                };
                grid.push(Case {
                    batch,
                    t,
                    s,
                    group,
                    hkv,
                    d,
                    kv,
                    causal: j != 1,
                    mask: Mask::ALL[k % 3],
                    sinks: k % 2 == 0,
                    gate: k / 2 % 2 == 0,
                    window: k % 5 == 0,
                    packed: k % 4 == 3,
                    layout: Layout::ALL[k / 2 % 2],
                    regime: Regime::ALL[(i + 2 * j) % 3],
                });
            }
        }
        // Kernels that meet a length of 0.
        let none =
            Case { s: 0, t: 2, causal: false, mask: Mask::None, window: false, packed: false, ..grid[4].clone() };
        grid.push(Case { hkv: 0, ..grid[9].clone() });
        grid.push(none);
        grid
    }

    fn strategy() -> BoxedStrategy<Case> {
        let choose = (
            prop::sample::select(KvType::ALL),
            prop::sample::select(Mask::ALL),
            prop::sample::select(Layout::ALL),
            prop::sample::select(Regime::ALL),
            prop::sample::select(&[32usize, 64, 96, 8, 20][..]),
        );
        let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
        (0usize..4, 0usize..20, 0usize..140, 1usize..5, 1usize..4, choose, flags)
            .prop_map(
                |(batch, t, s, group, hkv, (kv, mask, layout, regime, d), (causal, sinks, gate, window, packed))| {
                    Case {
                        batch,
                        t,
                        s,
                        group,
                        hkv,
                        d,
                        kv: if d % 32 == 0 { kv } else { KvType::F32 },
                        causal,
                        mask,
                        sinks,
                        gate,
                        window,
                        packed,
                        layout,
                        regime,
                    }
                },
            )
            .boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: against_reference },
            Check { name: "hull", run: hull },
            Check { name: "shift", run: shift },
            Check { name: "hidden_keys", run: hidden_keys },
            Check { name: "causality", run: causality },
            Check { name: "empty_rows", run: empty_rows },
            Check { name: "infinities", run: infinities },
            Check { name: "infinite_values", run: infinite_values },
            Check { name: "split", run: split },
            Check { name: "grouped_heads", run: grouped_heads },
            Check { name: "one_hot", run: one_hot },
            Check { name: "stepwise", run: stepwise },
            Check { name: "isolation", run: isolation },
            Check { name: "cuts", run: cuts },
            Check { name: "far_slots", run: far_slots },
        ]
    }
}

case! {
    /// One shape of a merge.
    pub struct MergeCase {
        /// Parts.
        pub parts: usize,
        /// Queries.
        pub t: usize,
        /// Heads.
        pub hq: usize,
        /// Channels.
        pub d: usize,
        /// With sinks.
        pub sinks: bool,
        /// With an output gate.
        pub gate: bool,
        /// Strides.
        pub layout: Layout,
    }
}

/// A merge: what it takes, packed.
#[derive(Clone)]
struct Merged {
    part_o: Vec<f32>,
    part_lse: Vec<f32>,
    gate: Option<Vec<f32>>,
    sinks: Option<Vec<f32>>,
    shape: [usize; 4],
    layout: Layout,
}

impl Merged {
    /// A third of the parts are empty; in every fourth row all are.
    fn generate(case: &MergeCase, seed: u64) -> Merged {
        let rng = &mut rng(seed);
        let shape @ [parts, t, hq, d] = [case.parts, case.t, case.hq, case.d];
        let rows = t * hq;
        let mut part_lse: Vec<f32> = (0..parts * rows).map(|_| normal(rng) * 20.0).collect();
        let mut part_o: Vec<f32> = (0..parts * rows * d).map(|_| normal(rng) * 8.0).collect();
        for (i, lse) in part_lse.iter_mut().enumerate() {
            if i % rows % 4 == 3 || rng.random_ratio(1, 3) {
                *lse = f32::NEG_INFINITY;
                part_o[i * d..(i + 1) * d].fill(0.0);
            }
        }
        let gate = case.gate.then(|| (0..rows * d).map(|_| normal(rng) * 4.0).collect());
        let sinks = case.sinks.then(|| (0..hq).map(|_| normal(rng) * 20.0).collect());
        Merged { part_o, part_lse, gate, sinks, shape, layout: case.layout }
    }

    fn call(&self, exec: &Exec<merge::Op>) -> Result<Outputs, Failure> {
        let [parts, t, hq, d] = self.shape;
        let gate = self.gate.as_ref().map(|g| Input::new(g, [t, hq, d], self.layout));
        let (part_o, part_lse) = (Guarded::of(&self.part_o), Guarded::of(&self.part_lse));
        let sinks = self.sinks.as_deref().map(Guarded::of);
        let mut o = Output::new([t, hq, d], self.layout);
        let mut lse = Output::new([t, hq], self.layout);
        let args = merge::Args {
            o: o.view(),
            lse: Some(lse.view()),
            part_o: View::new(&part_o, [parts, t, hq, d])?,
            part_lse: View::new(&part_lse, [parts, t, hq])?,
            gate: gate.as_ref().map(|g| g.view()),
            sinks: sinks.as_deref().map(View::from),
        };
        merge::run(args, exec)?;
        Ok(Outputs { o: o.read("o")?, lse: lse.read("lse")? })
    }

    /// A part is a key whose score is its log-sum-exp. Its weight is off by the rounding of lse − max, an exponential
    /// and the sums over the parts, once more where the maximum moves.
    fn judge(&self) -> Judged {
        let [parts, t, hq, d] = self.shape;
        let rows = t * hq;
        let mut judged = Judged { o: vec![], o_bound: vec![], lse: vec![], lse_bound: vec![] };
        for r in 0..rows {
            let scores: Vec<f64> = (0..parts).map(|p| f64::from(self.part_lse[p * rows + r])).collect();
            let v: Vec<f64> = (0..parts).flat_map(|p| wide(&self.part_o[(p * rows + r) * d..][..d])).collect();
            let v = ArrayView2::from_shape((parts, d), &v).expect("parts × D");
            let k = ArrayView2::from_shape((parts, 1), &scores).expect("parts × 1");
            let sink = self.sinks.as_ref().map(|s| f64::from(s[r % hq]));
            let row = reference::row(ArrayView1::from(&[1.0]), k, v, None, 1.0, sink);
            let known = scores.iter().copied().chain(sink).filter(|s| s.is_finite());
            let spread = known.clone().fold(0.0, f64::max) - known.fold(0.0, f64::min);
            let g = 2.0 * (2.0 * U32 * spread + gamma(6 * parts + 10)).exp_m1();
            for i in 0..d {
                let gate = self.gate.as_ref().map_or(f64::INFINITY, |g| f64::from(g[r * d + i]));
                let sigmoid = 1.0 / (1.0 + (-gate).exp());
                let sum: f64 = (0..parts).map(|p| row.weights[p] * v[[p, i]].abs()).sum();
                judged.o.push(row.o[i] * sigmoid);
                // Weights below 2⁻¹²⁶ vanish.
                let vanished = (0..parts).map(|p| v[[p, i]].abs() + 1.0).sum::<f64>() * TINY32;
                judged.o_bound.push((2.0 * g * sum + gamma(8) * row.o[i].abs()) * sigmoid + vanished + TINY32);
            }
            judged.lse.push(row.lse);
            let last = 4.0 * U32 * (row.lse.abs() + 1.0 + (parts as f64 + 1.0).ln());
            judged.lse_bound.push(if row.lse.is_infinite() { 0.0 } else { g + last });
        }
        judged
    }
}

fn merge_reference(variant: &Variant<merge::Op>, case: &MergeCase, seed: u64) -> Outcome {
    let merged = Merged::generate(case, seed);
    merged.judge().accept(&merged.call(&Exec::variant(*variant))?, case.d).map(Some)
}

/// One part without sink and gate comes back, bit for bit, also among empty parts.
fn merge_one(variant: &Variant<merge::Op>, case: &MergeCase, seed: u64) -> Outcome {
    if case.parts == 0 {
        return Ok(None);
    }
    let mut merged = Merged::generate(&MergeCase { sinks: false, gate: false, ..case.clone() }, seed);
    let rows = case.t * case.hq;
    let kept = |row: usize| (seed as usize + row) % case.parts;
    let (mut o, mut lse) = (Vec::new(), Vec::new());
    for i in 0..case.parts * rows {
        if i / rows != kept(i % rows) {
            merged.part_lse[i] = f32::NEG_INFINITY;
            merged.part_o[i * case.d..(i + 1) * case.d].fill(0.0);
        }
    }
    for row in 0..rows {
        let at = kept(row) * rows + row;
        lse.push(merged.part_lse[at]);
        o.extend_from_slice(&merged.part_o[at * case.d..(at + 1) * case.d]);
    }
    let got = merged.call(&Exec::variant(*variant))?;
    bitwise("o", &got.o, &o)?;
    bitwise("lse", &got.lse, &lse)?;
    Ok(Some(Metrics::default()))
}

/// A row of which all parts are empty is exactly 0, its log-sum-exp −∞ or the sink.
fn merge_empty(variant: &Variant<merge::Op>, case: &MergeCase, seed: u64) -> Outcome {
    let mut merged = Merged::generate(case, seed);
    merged.part_lse.fill(f32::NEG_INFINITY);
    merged.part_o.fill(0.0);
    let got = merged.call(&Exec::variant(*variant))?;
    let rows = case.t * case.hq;
    let lse: Vec<f32> =
        (0..rows).map(|r| merged.sinks.as_ref().map_or(f32::NEG_INFINITY, |s| s[r % case.hq])).collect();
    bitwise("o", &got.o, &vec![0.0; rows * case.d])?;
    bitwise("lse", &got.lse, if case.d == 0 { &got.lse } else { &lse })?;
    Ok(Some(Metrics::default()))
}

/// Any cut over any number of threads gives the same bits, and a NaN stays in its row.
fn merge_isolation(variant: &Variant<merge::Op>, case: &MergeCase, seed: u64) -> Outcome {
    let mut merged = Merged::generate(case, seed);
    let mut want = merged.call(&Exec::variant(*variant).parts(1))?;
    everywhere(variant, |exec| {
        let got = merged.call(&exec)?;
        bitwise("o", &got.o, &want.o)?;
        bitwise("lse", &got.lse, &want.lse)
    })?;
    let rows = case.t * case.hq;
    if rows * case.parts > 0 {
        let at = seed as usize % (rows * case.parts);
        merged.part_lse[at] = f32::NAN;
        want.o[at % rows * case.d..(at % rows + 1) * case.d].fill(f32::NAN);
        want.lse[at % rows] = f32::NAN;
        let got = merged.call(&Exec::variant(*variant))?;
        bitwise("o beside a NaN", &got.o, &want.o)?;
        bitwise("lse beside a NaN", &got.lse, &want.lse)?;
    }
    Ok(Some(Metrics::default()))
}

/// The suite of the merge.
pub struct Merge;

impl Suite for Merge {
    type Op = merge::Op;
    type Case = MergeCase;

    fn grid() -> Vec<MergeCase> {
        let mut grid = Vec::new();
        for (i, parts) in [0, 1, 2, 3, 8, 40].into_iter().enumerate() {
            for (j, (t, hq, d)) in [(1, 1, 1), (3, 2, 64), (2, 5, 17), (0, 2, 8), (1, 16, 256)].into_iter().enumerate()
            {
                let k = i + j;
                let (sinks, gate, layout) = (k % 2 == 0, k % 3 == 0, Layout::ALL[k / 2 % 2]);
                grid.push(MergeCase { parts, t, hq, d, sinks, gate, layout });
            }
        }
        grid
    }

    fn strategy() -> BoxedStrategy<MergeCase> {
        let choose = (any::<bool>(), any::<bool>(), prop::sample::select(Layout::ALL));
        (0usize..12, 0usize..5, 0usize..5, 1usize..80, choose)
            .prop_map(|(parts, t, hq, d, (sinks, gate, layout))| MergeCase { parts, t, hq, d, sinks, gate, layout })
            .boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: merge_reference },
            Check { name: "one", run: merge_one },
            Check { name: "empty", run: merge_empty },
            Check { name: "isolation", run: merge_isolation },
        ]
    }
}
