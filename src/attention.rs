//! Flash attention with grouped heads, and the merge of its parts (`csrc/attention/attention.h`).

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
    q3n_attention_best
);

/// A Q8_0 block as it lies in memory: an f16 scale and 32 int8.
pub type Q8_0 = [u8; 34];

/// Keys or values of all sequences, `[slots][S][HKV][D]`; Q8_0 in blocks, `[slots][S][HKV][D/32]`.
#[derive(Debug, Clone, Copy)]
pub enum Kv<'a> {
    /// 32-bit floats.
    F32(View<'a, 4>),
    /// IEEE half.
    F16(View<'a, 4, f16>),
    /// bfloat16.
    BF16(View<'a, 4, bf16>),
    /// 32 int8 with a scale.
    Q8_0(View<'a, 4, Q8_0>),
}

/// What the C side takes of a cache; sizes and strides in elements.
struct RawKv {
    dtype: ffi::q3n_dtype,
    data: *const std::ffi::c_void,
    shape: [usize; 4],
    strides: [i64; 3],
}

impl Kv<'_> {
    fn raw(&self) -> RawKv {
        fn of<T>(dtype: ffi::q3n_dtype, view: &View<4, T>, block: usize) -> RawKv {
            let [slots, s, hkv, d] = view.shape();
            RawKv {
                dtype,
                data: view.as_ptr().cast(),
                shape: [slots, s, hkv, d.saturating_mul(block)],
                strides: [0, 1, 2].map(|i| view.stride(i).saturating_mul(block as i64)),
            }
        }
        match self {
            Kv::F32(view) => of(ffi::Q3N_F32, view, 1),
            Kv::F16(view) => of(ffi::Q3N_F16, view, 1),
            Kv::BF16(view) => of(ffi::Q3N_BF16, view, 1),
            Kv::Q8_0(view) => of(ffi::Q3N_Q8_0, view, 32),
        }
    }

    /// `[slots, S, HKV, D]`, in elements also for block types.
    pub fn shape(&self) -> [usize; 4] {
        self.raw().shape
    }
}

/// Arguments of [`run`].
pub struct Args<'a> {
    /// Output, `[B][T][HQ][D]`; with `cu_seqlens` `[1][T][HQ][D]`.
    pub o: ViewMut<'a, 4>,
    /// Output, log-sum-exp of the scores, `[B][T][HQ]` (`[1][T][HQ]`).
    pub lse: Option<ViewMut<'a, 3>>,
    /// Queries, the shape of o; HQ is a multiple of HKV, D ≤ 512.
    pub q: View<'a, 4>,
    /// Keys.
    pub k: Kv<'a>,
    /// Values, shape and type of the keys.
    pub v: Kv<'a>,
    /// The output is multiplied by its sigmoid; the shape of o.
    pub gate: Option<View<'a, 4>>,
    /// Added to the scores, `[B][T][S]` (`[1][T][S]`); −∞ hides a key.
    pub mask: Option<View<'a, 3>>,
    /// A score without a value for each head, `[HQ]`.
    pub sinks: Option<&'a [f32]>,
    /// Cache entry of each sequence, `[B]`; `None`: entry b.
    pub slot: Option<&'a [i64]>,
    /// Keys of each sequence, `[B]`, ≤ S; `None`: S.
    pub kv_len: Option<&'a [i64]>,
    /// `[B+1]`, from 0 to T: sequence b is the tokens `cu_seqlens[b]..cu_seqlens[b+1]` of one packed row.
    pub cu_seqlens: Option<&'a [i64]>,
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
    let raw = raw(&mut args)?;
    let [rows, t, hq, d] = args.q.shape();
    let seen = (raw.kv_end - raw.kv_begin).max(0) as usize;
    let cost = [rows, t, hq, d, seen, 4].into_iter().fold(1, usize::saturating_mul);
    // SAFETY: `raw` compared every shape and length; the C check validates what slot, kv_len and cu_seqlens hold.
    unsafe { exec.execute(&raw, cost) }
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
    status::check(Op::NAME, Op::check(&raw(&mut args)?))?;
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

/// The C args, shapes and lengths compared.
fn raw(args: &mut Args) -> Result<ffi::q3n_attention_args, Error> {
    let [rows, t, hq, d] = args.o.shape();
    let batch = match args.cu_seqlens {
        None => rows,
        Some([]) => return Err(Error::argument("cu_seqlens", "is empty, expected B + 1 elements")),
        Some(_) if rows != 1 => return Err(Error::argument("cu_seqlens", format!("packs one row, but B is {rows}"))),
        Some(cu) => cu.len() - 1,
    };
    args.q.expect("q", [rows, t, hq, d])?;
    let (k, v) = (args.k.raw(), args.v.raw());
    let [slots, s, hkv, _] = k.shape;
    for (name, kv) in [("k", &k), ("v", &v)] {
        if kv.shape != [slots, s, hkv, d] {
            return Err(Error::Shape { arg: name, got: kv.shape.to_vec(), expected: vec![slots, s, hkv, d] });
        }
    }
    if k.dtype != v.dtype {
        return Err(Error::argument("v", "is not of the type of k"));
    }
    if let Some(gate) = &args.gate {
        gate.expect("gate", [rows, t, hq, d])?;
    }
    if let Some(mask) = &args.mask {
        mask.expect("mask", [rows, t, s])?;
    }
    if let Some(lse) = &args.lse {
        lse.expect("lse", [rows, t, hq])?;
    }
    if let Some(sinks) = args.sinks {
        View::new(sinks, [sinks.len()])?.expect("sinks", [hq])?;
    }
    for (name, list) in [("slot", args.slot), ("kv_len", args.kv_len)] {
        if let Some(list) = list {
            View::new(list, [list.len()])?.expect(name, [batch])?;
        }
    }
    let window = args.window.clone().unwrap_or(0..s);
    let [gate_b, gate_t, gate_h] = args.gate.map_or([0; 3], |g| [0, 1, 2].map(|i| g.stride(i)));
    let [mask_b, mask_t] = args.mask.map_or([0; 2], |m| [m.stride(0), m.stride(1)]);
    let [lse_b, lse_t] = args.lse.as_ref().map_or([0; 2], |l| [l.stride(0), l.stride(1)]);
    Ok(ffi::q3n_attention_args {
        struct_bytes: size_of::<ffi::q3n_attention_args>() as u64,
        o: args.o.as_mut_ptr(),
        lse: args.lse.as_mut().map_or(std::ptr::null_mut(), |l| l.as_mut_ptr()),
        q: args.q.as_ptr(),
        k: k.data,
        v: v.data,
        gate: args.gate.map_or(std::ptr::null(), |g| g.as_ptr()),
        mask: args.mask.map_or(std::ptr::null(), |m| m.as_ptr()),
        sinks: args.sinks.map_or(std::ptr::null(), |s| s.as_ptr()),
        slot: args.slot.map_or(std::ptr::null(), |s| s.as_ptr()),
        kv_len: args.kv_len.map_or(std::ptr::null(), |l| l.as_ptr()),
        cu_seqlens: args.cu_seqlens.map_or(std::ptr::null(), |c| c.as_ptr()),
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
    })
}

/// The exact merge of attention over disjoint ranges of keys.
pub mod merge {
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error, View, ViewMut};

    operator!(
        "attention_merge",
        q3n_attention_merge_args,
        q3n_attention_merge_check,
        q3n_attention_merge_variant_count,
        q3n_attention_merge_variant_at,
        q3n_attention_merge_best
    );

    /// Arguments of [`run`].
    pub struct Args<'a> {
        /// Output, `[T][HQ][D]`.
        pub o: ViewMut<'a, 3>,
        /// Output, `[T][HQ]`.
        pub lse: Option<ViewMut<'a, 2>>,
        /// Outputs of the parts, made without sinks and gate, `[parts][T][HQ][D]`, packed.
        pub part_o: View<'a, 4>,
        /// Log-sum-exp of the parts, `[parts][T][HQ]`, packed.
        pub part_lse: View<'a, 3>,
        /// As in [`super::Args`], `[T][HQ][D]`.
        pub gate: Option<View<'a, 3>>,
        /// As in [`super::Args`], `[HQ]`.
        pub sinks: Option<&'a [f32]>,
    }

    /// Merges every row. Errors: shapes that do not fit together, parts with gaps, overlapping output strides.
    pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
        let [t, hq, d] = args.o.shape();
        let [parts, ..] = args.part_o.shape();
        args.part_o.expect("part_o", [parts, t, hq, d])?;
        args.part_lse.expect("part_lse", [parts, t, hq])?;
        if !packed(&args.part_o) {
            return Err(Error::argument("part_o", "has gaps, expected packed parts"));
        }
        if !packed(&args.part_lse) {
            return Err(Error::argument("part_lse", "has gaps, expected packed parts"));
        }
        if let Some(lse) = &args.lse {
            lse.expect("lse", [t, hq])?;
        }
        if let Some(gate) = &args.gate {
            gate.expect("gate", [t, hq, d])?;
        }
        if let Some(sinks) = args.sinks {
            View::new(sinks, [sinks.len()])?.expect("sinks", [hq])?;
        }
        let raw = ffi::q3n_attention_merge_args {
            struct_bytes: size_of::<ffi::q3n_attention_merge_args>() as u64,
            o: args.o.as_mut_ptr(),
            lse: args.lse.as_mut().map_or(std::ptr::null_mut(), |l| l.as_mut_ptr()),
            part_o: args.part_o.as_ptr(),
            part_lse: args.part_lse.as_ptr(),
            gate: args.gate.map_or(std::ptr::null(), |g| g.as_ptr()),
            sinks: args.sinks.map_or(std::ptr::null(), |s| s.as_ptr()),
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
        let cost = [parts, t, hq, d, 2].into_iter().fold(1, usize::saturating_mul);
        // SAFETY: every view lies inside its slice and has the shape just compared; the parts are packed.
        unsafe { exec.execute(&raw, cost) }
    }

    /// Whether the elements of a view lie one after the other.
    fn packed<const R: usize>(view: &View<R>) -> bool {
        let mut expected = 1usize;
        view.shape().contains(&0)
            || (0..R).rev().all(|i| {
                let ok = view.shape()[i] <= 1 || view.stride(i) as usize == expected;
                expected = expected.saturating_mul(view.shape()[i]);
                ok
            })
    }
}
