//! Attention of one sequence at the end of its cache: causal, with an output gate. And the merge of its parts.

use super::{reference, Timed, Work, SEED};
use crate::buffer::Layout;
use crate::cases::attention::{Attention as Suite, Case, KvType, Mask, Merge as MergeSuite, MergeCase, Regime};
use crate::cases::normal;
use crate::compare::{Failure, Metrics};
use crate::suite::{rng, Rng};
use half::{bf16, f16};
use qwen3next_kernels::attention::{self, merge, Kv, Op, Q8_0};
use qwen3next_kernels::{quant, DType, Error, Exec, Variant, View, ViewMut};

/// Sizes of a call.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Queries, the last of the sequence.
    pub t: usize,
    /// Keys, at least as many.
    pub s: usize,
    /// Query heads.
    pub hq: usize,
    /// KV heads.
    pub hkv: usize,
    /// Channels.
    pub d: usize,
}

/// A cache, `[1][S][HKV][D]`.
enum Cache {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Q8(Vec<Q8_0>),
}

impl Cache {
    fn new(kv: KvType, x: &[f32], d: usize) -> Result<Cache, Error> {
        Ok(match kv {
            KvType::F32 => Cache::F32(x.to_vec()),
            KvType::F16 => Cache::F16(x.iter().map(|&x| f16::from_f32(x)).collect()),
            KvType::BF16 => Cache::Bf16(x.iter().map(|&x| bf16::from_f32(x)).collect()),
            KvType::Q8_0 => {
                let bytes = quant::to_bytes(DType::Q8_0, View::new(x, [x.len() / d.max(1), d])?)?;
                Cache::Q8(bytes.chunks_exact(size_of::<Q8_0>()).filter_map(|block| block.try_into().ok()).collect())
            }
        })
    }

    fn view(&self, [s, hkv, d]: [usize; 3]) -> Result<Kv<'_>, Error> {
        Ok(match self {
            Cache::F32(x) => Kv::F32(View::new(x, [1, s, hkv, d])?),
            Cache::F16(x) => Kv::F16(View::new(x, [1, s, hkv, d])?),
            Cache::Bf16(x) => Kv::BF16(View::new(x, [1, s, hkv, d])?),
            Cache::Q8(x) => Kv::Q8_0(View::new(x, [1, s, hkv, d / 32])?),
        })
    }

    fn bytes(&self) -> usize {
        match self {
            Cache::F32(x) => size_of_val(&x[..]),
            Cache::F16(x) => size_of_val(&x[..]),
            Cache::Bf16(x) => size_of_val(&x[..]),
            Cache::Q8(x) => size_of_val(&x[..]),
        }
    }
}

fn normals(n: usize, rng: &mut Rng) -> Vec<f32> {
    (0..n).map(|_| normal(rng)).collect()
}

/// A call, as the model makes it: few queries over many keys run in parts that are merged.
pub struct Attention {
    sizes: Sizes,
    kv: KvType,
    q: Vec<f32>,
    gate: Vec<f32>,
    k: Cache,
    v: Cache,
    o: Vec<f32>,
}

impl Attention {
    /// Inputs. Errors: a type whose block does not divide D.
    pub fn new(sizes: Sizes, kv: KvType) -> Result<Attention, Error> {
        let rng = &mut rng(SEED);
        let Sizes { t, s, hq, hkv, d } = sizes;
        Ok(Attention {
            q: normals(t * hq * d, rng),
            gate: normals(t * hq * d, rng),
            k: Cache::new(kv, &normals(s * hkv * d, rng), d)?,
            v: Cache::new(kv, &normals(s * hkv * d, rng), d)?,
            o: vec![0.0; t * hq * d],
            sizes,
            kv,
        })
    }
}

impl Timed for Attention {
    type Op = Op;

    fn judge(&self, variant: &Variant<Op>) -> Result<Metrics, Failure> {
        let Sizes { t, s, hq, hkv, d } = self.sizes;
        let t = t.min(37);
        let case = Case {
            batch: 1,
            t,
            s: s.min(20_000 / t.max(1)),
            group: hq / hkv,
            hkv: 1,
            d,
            kv: self.kv,
            causal: true,
            mask: Mask::None,
            sinks: false,
            gate: true,
            window: false,
            packed: false,
            layout: Layout::Packed,
            regime: Regime::Normal,
        };
        reference::<Suite>(variant, &case)
    }

    fn run(&mut self, exec: &Exec<Op>) -> Result<(), Failure> {
        let Sizes { t, s, hq, hkv, d } = self.sizes;
        let args = attention::Args {
            o: ViewMut::new(&mut self.o, [1, t, hq, d])?,
            lse: None,
            q: View::new(&self.q, [1, t, hq, d])?,
            k: self.k.view([s, hkv, d])?,
            v: self.v.view([s, hkv, d])?,
            gate: Some(View::new(&self.gate, [1, t, hq, d])?),
            mask: None,
            sinks: None,
            slot: None,
            kv_len: None,
            cu_seqlens: None,
            causal: true,
            scale: 1.0 / (d as f32).sqrt(),
            window: None,
        };
        Ok(attention::run_split(args, exec)?)
    }

    /// Products of the visible scores and values.
    fn work(&self) -> Work {
        let Sizes { t, s, hq, d, .. } = self.sizes;
        let seen: usize = (0..t).map(|i| s - t + i + 1).sum();
        let bytes = self.k.bytes() + self.v.bytes() + 4 * 3 * self.o.len();
        Work { ops: 4.0 * seen as f64 * (hq * d) as f64, bytes: bytes as f64 }
    }

    fn output(&mut self) -> &mut [f32] {
        &mut self.o
    }
}

/// The merge of `parts` parts of `t` queries of `hq` heads of `d` channels.
pub struct Merge {
    shape: [usize; 4],
    part_o: Vec<f32>,
    part_lse: Vec<f32>,
    gate: Vec<f32>,
    o: Vec<f32>,
}

impl Merge {
    /// Inputs.
    pub fn new(parts: usize, t: usize, hq: usize, d: usize) -> Merge {
        let rng = &mut rng(SEED);
        Merge {
            shape: [parts, t, hq, d],
            part_o: normals(parts * t * hq * d, rng),
            part_lse: normals(parts * t * hq, rng),
            gate: normals(t * hq * d, rng),
            o: vec![0.0; t * hq * d],
        }
    }
}

impl Timed for Merge {
    type Op = merge::Op;

    fn judge(&self, variant: &Variant<merge::Op>) -> Result<Metrics, Failure> {
        let [parts, t, hq, d] = self.shape;
        let case = MergeCase { parts, t: t.min(64), hq, d, sinks: false, gate: true, layout: Layout::Packed };
        reference::<MergeSuite>(variant, &case)
    }

    fn run(&mut self, exec: &Exec<merge::Op>) -> Result<(), Failure> {
        let [parts, t, hq, d] = self.shape;
        let args = merge::Args {
            o: ViewMut::new(&mut self.o, [t, hq, d])?,
            lse: None,
            part_o: View::new(&self.part_o, [parts, t, hq, d])?,
            part_lse: View::new(&self.part_lse, [parts, t, hq])?,
            gate: Some(View::new(&self.gate, [t, hq, d])?),
            sinks: None,
        };
        Ok(merge::run(args, exec)?)
    }

    /// A product and a sum an element of the parts, 4 for the gate.
    fn work(&self) -> Work {
        let inputs = self.part_o.len() + self.part_lse.len() + self.gate.len();
        let ops = 2 * self.part_o.len() + 4 * self.o.len();
        Work { ops: ops as f64, bytes: 4.0 * (inputs + self.o.len()) as f64 }
    }

    fn output(&mut self) -> &mut [f32] {
        &mut self.o
    }
}
