//! Flash attention with grouped heads, and the merge of its parts (`csrc/attention/attention.h`).

use crate::memory::{Addresses, Cpu, Memory};
use crate::operator::{operator, Exec, Operator};
use crate::{ffi, status, Error, View, ViewMut};
use half::{bf16, f16};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

operator!(
    "attention",
    q3n_attention_args,
    q3n_attention_check,
    q3n_attention_variant_count,
    q3n_attention_variant_at,
    q3n_attention_best,
    [
        "cuda",
        q3n_attention_cuda,
        q3n_attention_cuda_scratch_bytes,
        q3n_attention_cuda_host_items,
        q3n_attention_cuda_host,
        q3n_attention_cuda_host_scratch_bytes
    ],
    [
        "whole_cuda",
        q3n_attention_whole_cuda,
        q3n_attention_whole_cuda_scratch_bytes,
        q3n_attention_whole_cuda_host_items,
        q3n_attention_whole_cuda_host,
        q3n_attention_whole_cuda_host_scratch_bytes
    ]
);

/// A Q8_0 block as it lies in memory: an f16 scale and 32 int8.
pub type Q8_0 = [u8; 34];

/// Keys or values of all sequences, `[slots][S][HKV][D]`; Q8_0 in blocks, `[slots][S][HKV][D/32]`.
#[derive(Debug)]
pub enum Kv<'a, M: Memory = Cpu> {
    /// 32-bit floats.
    F32(View<'a, 4, f32, M>),
    /// IEEE half.
    F16(View<'a, 4, f16, M>),
    /// bfloat16.
    BF16(View<'a, 4, bf16, M>),
    /// 32 int8 with a scale.
    Q8_0(View<'a, 4, Q8_0, M>),
}

impl<M: Memory> Clone for Kv<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: Memory> Copy for Kv<'_, M> {}

/// What the C side takes of a cache; sizes and strides in elements.
struct RawKv {
    dtype: ffi::q3n_dtype,
    data: *const std::ffi::c_void,
    shape: [usize; 4],
    strides: [i64; 3],
}

impl<M: Memory> Kv<'_, M> {
    fn raw(&self, at: &mut Addresses<M>) -> RawKv {
        fn of<T, M: Memory>(dtype: ffi::q3n_dtype, view: &View<4, T, M>, block: usize, at: &mut Addresses<M>) -> RawKv {
            let [slots, s, hkv, d] = view.shape();
            RawKv {
                dtype,
                data: at.read(view).cast(),
                shape: [slots, s, hkv, d.saturating_mul(block)],
                strides: view.outer().map(|stride: i64| stride.saturating_mul(block as i64)),
            }
        }
        match self {
            Kv::F32(view) => of(ffi::Q3N_F32, view, 1, at),
            Kv::F16(view) => of(ffi::Q3N_F16, view, 1, at),
            Kv::BF16(view) => of(ffi::Q3N_BF16, view, 1, at),
            Kv::Q8_0(view) => of(ffi::Q3N_Q8_0, view, 32, at),
        }
    }

    /// `[slots, S, HKV, D]`, in elements also for block types.
    pub fn shape(&self) -> [usize; 4] {
        self.raw(&mut Addresses::new()).shape
    }
}

/// Arguments of [`run`].
pub struct Args<'a, M: Memory = Cpu> {
    /// Output, `[B][T][HQ][D]`; with `cu_seqlens` `[1][T][HQ][D]`.
    pub o: ViewMut<'a, 4, f32, M>,
    /// Output, log-sum-exp of the scores, `[B][T][HQ]` (`[1][T][HQ]`).
    pub lse: Option<ViewMut<'a, 3, f32, M>>,
    /// Queries, the shape of o; HQ is a multiple of HKV, D ≤ 512.
    pub q: View<'a, 4, f32, M>,
    /// Keys.
    pub k: Kv<'a, M>,
    /// Values, shape and type of the keys.
    pub v: Kv<'a, M>,
    /// The output is multiplied by its sigmoid; the shape of o.
    pub gate: Option<View<'a, 4, f32, M>>,
    /// Added to the scores, `[B][T][S]` (`[1][T][S]`); −∞ hides a key.
    pub mask: Option<View<'a, 3, f32, M>>,
    /// A score without a value for each head, `[HQ]`.
    pub sinks: Option<View<'a, 1, f32, M>>,
    /// Cache entry of each sequence, `[B]`; `None`: entry b.
    pub slot: Option<M::Indices<'a>>,
    /// Keys of each sequence, `[B]`, ≤ S; `None`: S.
    pub kv_len: Option<M::Indices<'a>>,
    /// `[B+1]`, from 0 to T: sequence b is the tokens `cu_seqlens[b]..cu_seqlens[b+1]` of one packed row.
    pub cu_seqlens: Option<M::Indices<'a>>,
    /// The last query of a sequence sees its last key, earlier ones see one less each.
    pub causal: bool,
    /// Factor of the scores, customarily 1/√D.
    pub scale: f32,
    /// Only these keys are seen; `None`: all.
    pub window: Option<Range<usize>>,
}

/// Attention of every query. Errors: shapes or types that do not fit together, D outside 1..=512, slots, lengths or
/// windows outside the cache, fewer keys than causal queries, overlapping output strides.
pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
    let (raw, at) = raw(&mut args)?;
    let [rows, t, hq, d] = args.q.shape();
    let seen = (raw.kv_end - raw.kv_begin).max(0) as usize;
    let cost = [rows, t, hq, d, seen, 4].into_iter().fold(1, usize::saturating_mul);
    // SAFETY: `raw` compared every shape and length; the C check validates what slot, kv_len and cu_seqlens hold.
    unsafe { exec.execute(&raw, &at, cost) }
}

/// As [`run`], on a device: queues it. The kernel itself splits few queries over many keys.
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
pub fn queue(mut args: Args<crate::device::Cuda>, stream: &crate::device::Stream) -> Result<(), Error> {
    use crate::device::Indices;
    let (slot, kv_len, cu_seqlens) = (args.slot, args.kv_len, args.cu_seqlens);
    let (raw, at) = raw(&mut args)?;
    // SAFETY: as in `run`, with buffers for slices.
    unsafe {
        stream.queue::<Op>(raw, &at, |raw| {
            (raw.slot, raw.kv_len) = (Indices::some(slot), Indices::some(kv_len));
            raw.cu_seqlens = Indices::some(cu_seqlens);
        })
    }
}

/// Keys a part of [`run_split`] takes.
const SPLIT_KEYS: usize = 512;

/// Queries of a sequence up to which [`run_split`] splits it.
const SPLIT_QUERIES: usize = 8;

thread_local! {
    // Results of parts; grows to the largest call, so a warm one takes no fresh pages.
    static PARTS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// As [`run`], but a sequence of few queries over many keys is cut into parts of 512 keys that run side by side and are
/// then merged, so that decode has work for every thread. The cut depends on the sequence's own sizes alone: the bits
/// are the same for any number of threads and in any batch.
pub fn run_split(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
    status::check(Op::NAME, Op::check(&raw(&mut args)?.0))?;
    let sequences = sequences(&args);
    if sequences.iter().all(|s| s.parts() <= 1) {
        return run(args, exec);
    }
    let [_, _, hq, d] = args.o.shape();
    let rows = |s: &Sequence| if s.parts() > 1 { s.parts() * s.n * hq } else { 0 };
    let floats: usize = sequences.iter().map(|s| rows(s) * (d + 1)).sum();
    let mut buffer = PARTS.take();
    buffer.resize(floats.max(buffer.len()), 0.0);
    let mut partial: Vec<(&mut [f32], &mut [f32])> = Vec::with_capacity(sequences.len());
    let mut left = &mut buffer[..floats];
    for s in &sequences {
        let (o, rest) = left.split_at_mut(rows(s) * d);
        let (lse, rest) = rest.split_at_mut(rows(s));
        partial.push((o, lse));
        left = rest;
    }
    let tasks: Vec<(&Sequence, usize, &mut [f32], &mut [f32])> = sequences
        .iter()
        .zip(&mut partial)
        .flat_map(|(s, (o, lse))| {
            let parts = o.chunks_mut((s.n * hq * d).max(1)).zip(lse.chunks_mut((s.n * hq).max(1)));
            parts.enumerate().map(move |(part, (o, lse))| (s, part, o, lse))
        })
        .collect();
    let (q, k, v, mask, causal, scale) = (args.q, args.k, args.v, args.mask, args.causal, args.scale);
    let one = exec.clone().parts(1);
    let run_part = |(s, part, o, lse): (&Sequence, usize, &mut [f32], &mut [f32])| {
        let begin = s.keys.start + part * SPLIT_KEYS;
        let part = Args {
            o: ViewMut::new(o, [1, s.n, hq, d])?,
            lse: Some(ViewMut::new(lse, [1, s.n, hq])?),
            q: s.of(q)?,
            k,
            v,
            gate: None,
            mask: mask.map(|m| s.of_mask(m)).transpose()?,
            sinks: None,
            slot: Some(&[s.slot]),
            kv_len: Some(&[s.kv_len]),
            cu_seqlens: None,
            causal,
            scale,
            window: Some(begin..s.keys.end.min(begin + SPLIT_KEYS)),
        };
        run(part, &one)
    };
    if exec.stays() {
        tasks.into_iter().try_for_each(run_part)?;
    } else {
        tasks.into_par_iter().try_for_each(run_part)?;
    }

    for (s, (part_o, part_lse)) in sequences.iter().zip(&partial) {
        let gate = args.gate.map(|g| s.of(g)).transpose()?;
        if s.parts() > 1 {
            let lse = match &mut args.lse {
                Some(lse) => {
                    let strides = [lse.stride(1) as usize, 1];
                    Some(lse.part(s.offset(lse.stride(0), lse.stride(1)), [s.n, hq], strides)?)
                }
                None => None,
            };
            let strides = [args.o.stride(1) as usize, args.o.stride(2) as usize, 1];
            let merged = merge::Args {
                o: args.o.part(s.offset(args.o.stride(0), args.o.stride(1)), [s.n, hq, d], strides)?,
                lse,
                part_o: View::new(part_o, [s.parts(), s.n, hq, d])?,
                part_lse: View::new(part_lse, [s.parts(), s.n, hq])?,
                gate: match gate {
                    Some(g) => Some(g.part(0, [s.n, hq, d], [g.stride(1) as usize, g.stride(2) as usize, 1])?),
                    None => None,
                },
                sinks: args.sinks,
            };
            merge::run(merged, &if exec.stays() { Exec::default().parts(1) } else { Exec::default() })?;
        } else {
            let strides = [0, 1, 2, 3].map(|i| args.o.stride(i) as usize);
            let lse = match &mut args.lse {
                Some(lse) => {
                    let strides = [0, 1, 2].map(|i| lse.stride(i) as usize);
                    Some(lse.part(s.offset(lse.stride(0), lse.stride(1)), [1, s.n, hq], strides)?)
                }
                None => None,
            };
            let whole = Args {
                o: args.o.part(s.offset(args.o.stride(0), args.o.stride(1)), [1, s.n, hq, d], strides)?,
                lse,
                q: s.of(q)?,
                k,
                v,
                gate,
                mask: mask.map(|m| s.of_mask(m)).transpose()?,
                sinks: args.sinks,
                slot: Some(&[s.slot]),
                kv_len: Some(&[s.kv_len]),
                cu_seqlens: None,
                causal,
                scale,
                window: args.window.clone(),
            };
            run(whole, exec)?;
        }
    }
    PARTS.set(buffer);
    Ok(())
}

/// One sequence of a checked call.
struct Sequence {
    /// Index for the batch strides, and first token for the token strides.
    row: usize,
    first: usize,
    /// Queries.
    n: usize,
    slot: i64,
    kv_len: i64,
    /// Those of its keys that the window leaves.
    keys: Range<usize>,
}

fn sequences(args: &Args) -> Vec<Sequence> {
    let [rows, t, ..] = args.q.shape();
    let s = args.k.shape()[1];
    let window = args.window.clone().unwrap_or(0..s);
    let count = args.cu_seqlens.map_or(rows, |cu| cu.len() - 1);
    let sequence = |b: usize| {
        let (row, first, n) = match args.cu_seqlens {
            Some(cu) => (0, cu[b] as usize, (cu[b + 1] - cu[b]) as usize),
            None => (b, 0, t),
        };
        let kv_len = args.kv_len.map_or(s as i64, |l| l[b]);
        let keys = window.start..window.end.min(kv_len as usize).max(window.start);
        Sequence { row, first, n, slot: args.slot.map_or(b as i64, |slot| slot[b]), kv_len, keys }
    };
    (0..count).map(sequence).collect()
}

impl Sequence {
    fn parts(&self) -> usize {
        if self.n == 0 || self.n > SPLIT_QUERIES {
            return 1;
        }
        self.keys.len().div_ceil(SPLIT_KEYS)
    }

    fn offset(&self, batch_stride: i64, token_stride: i64) -> usize {
        self.row * batch_stride as usize + self.first * token_stride as usize
    }

    /// Its rows of an array shaped as q.
    fn of<'a>(&self, x: View<'a, 4>) -> Result<View<'a, 4>, Error> {
        let [_, _, h, d] = x.shape();
        let strides = [0, 1, 2, 3].map(|i| x.stride(i) as usize);
        x.part(self.offset(x.stride(0), x.stride(1)), [1, self.n, h, d], strides)
    }

    fn of_mask<'a>(&self, mask: View<'a, 3>) -> Result<View<'a, 3>, Error> {
        let [_, _, s] = mask.shape();
        let strides = [0, 1, 2].map(|i| mask.stride(i) as usize);
        mask.part(self.offset(mask.stride(0), mask.stride(1)), [1, self.n, s], strides)
    }
}

/// The C args, shapes and lengths compared, and where they lie.
fn raw<M: Memory>(args: &mut Args<M>) -> Result<(ffi::q3n_attention_args, Addresses<M>), Error> {
    let [rows, t, hq, d] = args.o.shape();
    let batch = crate::operator::sequences(rows, args.cu_seqlens.as_ref().map(M::indices))?;
    args.q.expect("q", [rows, t, hq, d])?;
    let mut at = Addresses::new();
    let (k, v) = (args.k.raw(&mut at), args.v.raw(&mut at));
    let [slots, s, hkv, _] = k.shape;
    for (name, kv) in [("k", &k), ("v", &v)] {
        crate::view::expect(name, kv.shape, [slots, s, hkv, d])?;
    }
    if k.dtype != v.dtype {
        return Err(Error::argument("v", "is not of the type of k"));
    }
    args.gate.map_or(Ok(()), |gate| gate.expect("gate", [rows, t, hq, d]))?;
    args.mask.map_or(Ok(()), |mask| mask.expect("mask", [rows, t, s]))?;
    args.lse.as_ref().map_or(Ok(()), |lse| lse.expect("lse", [rows, t, hq]))?;
    args.sinks.map_or(Ok(()), |sinks| sinks.expect("sinks", [hq]))?;
    let window = args.window.clone().unwrap_or(0..s);
    let [gate_b, gate_t, gate_h] = args.gate.map_or([0; 3], |g| g.outer());
    let [mask_b, mask_t] = args.mask.map_or([0; 2], |m| m.outer());
    let [lse_b, lse_t] = args.lse.as_ref().map_or([0; 2], |l| l.outer());
    let raw = ffi::q3n_attention_args {
        struct_bytes: size_of::<ffi::q3n_attention_args>() as u64,
        o: at.write(&mut args.o),
        lse: at.write_some(&mut args.lse),
        q: at.read(&args.q),
        k: k.data,
        v: v.data,
        gate: at.read_some(&args.gate),
        mask: at.read_some(&args.mask),
        sinks: at.read_some(&args.sinks),
        slot: at.indices("slot", &args.slot, batch)?,
        kv_len: at.indices("kv_len", &args.kv_len, batch)?,
        cu_seqlens: at.indices("cu_seqlens", &args.cu_seqlens, batch + 1)?,
        kv_dtype: k.dtype,
        causal: args.causal.into(),
        scale: args.scale,
        o_b: args.o.stride(0),
        o_t: args.o.stride(1),
        o_h: args.o.stride(2),
        lse_b,
        lse_t,
        q_b: args.q.stride(0),
        q_t: args.q.stride(1),
        q_h: args.q.stride(2),
        k_slot: k.strides[0],
        k_s: k.strides[1],
        k_h: k.strides[2],
        v_slot: v.strides[0],
        v_s: v.strides[1],
        v_h: v.strides[2],
        gate_b,
        gate_t,
        gate_h,
        mask_b,
        mask_t,
        kv_begin: i64::try_from(window.start).unwrap_or(i64::MAX),
        kv_end: i64::try_from(window.end).unwrap_or(i64::MAX),
        slots: slots as i64,
        B: batch as i64,
        T: t as i64,
        S: s as i64,
        HQ: hq as i64,
        HKV: hkv as i64,
        D: d as i64,
    };
    Ok((raw, at))
}

/// The exact merge of attention over disjoint ranges of keys.
pub mod merge {
    use crate::memory::{Addresses, Cpu, Memory};
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error, View, ViewMut};

    operator!(
        "attention_merge",
        q3n_attention_merge_args,
        q3n_attention_merge_check,
        q3n_attention_merge_variant_count,
        q3n_attention_merge_variant_at,
        q3n_attention_merge_best,
        [
            "cuda",
            q3n_attention_merge_cuda,
            q3n_attention_merge_cuda_scratch_bytes,
            q3n_attention_merge_cuda_host_items,
            q3n_attention_merge_cuda_host,
            q3n_attention_merge_cuda_host_scratch_bytes
        ]
    );

    /// Arguments of [`run`].
    pub struct Args<'a, M: Memory = Cpu> {
        /// Output, `[T][HQ][D]`.
        pub o: ViewMut<'a, 3, f32, M>,
        /// Output, `[T][HQ]`.
        pub lse: Option<ViewMut<'a, 2, f32, M>>,
        /// Outputs of the parts, made without sinks and gate, `[parts][T][HQ][D]`, packed.
        pub part_o: View<'a, 4, f32, M>,
        /// Log-sum-exp of the parts, `[parts][T][HQ]`, packed.
        pub part_lse: View<'a, 3, f32, M>,
        /// As in [`super::Args`], `[T][HQ][D]`.
        pub gate: Option<View<'a, 3, f32, M>>,
        /// As in [`super::Args`], `[HQ]`.
        pub sinks: Option<View<'a, 1, f32, M>>,
    }

    /// Merges every row. Errors: shapes that do not fit together, parts with gaps, overlapping output strides.
    pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
        let cost = args.part_o.shape().into_iter().fold(2, usize::saturating_mul);
        let (raw, at) = raw(&mut args)?;
        // SAFETY: every view lies inside its slice and has the shape that `raw` compared; the parts are packed.
        unsafe { exec.execute(&raw, &at, cost) }
    }

    /// As [`run`], on a device: queues it.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub fn queue(mut args: Args<crate::device::Cuda>, stream: &crate::device::Stream) -> Result<(), Error> {
        let (raw, at) = raw(&mut args)?;
        // SAFETY: as in `run`, with buffers for slices.
        unsafe { stream.queue::<Op>(raw, &at, |_| ()) }
    }

    /// The C args, shapes compared, and where they lie.
    fn raw<M: Memory>(args: &mut Args<M>) -> Result<(ffi::q3n_attention_merge_args, Addresses<M>), Error> {
        let [t, hq, d] = args.o.shape();
        let [parts, ..] = args.part_o.shape();
        args.part_o.expect("part_o", [parts, t, hq, d])?;
        args.part_lse.expect("part_lse", [parts, t, hq])?;
        if !args.part_o.packed() {
            return Err(Error::argument("part_o", "has gaps, expected packed parts"));
        }
        if !args.part_lse.packed() {
            return Err(Error::argument("part_lse", "has gaps, expected packed parts"));
        }
        args.lse.as_ref().map_or(Ok(()), |lse| lse.expect("lse", [t, hq]))?;
        args.gate.map_or(Ok(()), |gate| gate.expect("gate", [t, hq, d]))?;
        args.sinks.map_or(Ok(()), |sinks| sinks.expect("sinks", [hq]))?;
        let mut at = Addresses::new();
        let raw = ffi::q3n_attention_merge_args {
            struct_bytes: size_of::<ffi::q3n_attention_merge_args>() as u64,
            o: at.write(&mut args.o),
            lse: at.write_some(&mut args.lse),
            part_o: at.read(&args.part_o),
            part_lse: at.read(&args.part_lse),
            gate: at.read_some(&args.gate),
            sinks: at.read_some(&args.sinks),
            o_t: args.o.stride(0),
            o_h: args.o.stride(1),
            lse_t: args.lse.as_ref().map_or(0, |l| l.stride(0)),
            gate_t: args.gate.map_or(0, |g| g.stride(0)),
            gate_h: args.gate.map_or(0, |g| g.stride(1)),
            parts: parts as i64,
            T: t as i64,
            HQ: hq as i64,
            D: d as i64,
        };
        Ok((raw, at))
    }
}
