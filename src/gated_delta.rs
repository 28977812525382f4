//! The gated delta rule (`csrc/gated_delta/gated_delta.h`).

use crate::memory::{Addresses, Cpu, Float, Memory};
use crate::operator::{operator, sequences, Exec};
use crate::{ffi, Error, View, ViewMut};

operator!(
    "gated_delta",
    q3n_gated_delta_args,
    q3n_gated_delta_check,
    q3n_gated_delta_variant_count,
    q3n_gated_delta_variant_at,
    q3n_gated_delta_best,
    [
        "cuda",
        q3n_gated_delta_cuda,
        q3n_gated_delta_cuda_scratch_bytes,
        q3n_gated_delta_cuda_host_items,
        q3n_gated_delta_cuda_host,
        q3n_gated_delta_cuda_host_scratch_bytes
    ],
    [
        "chunked64_cuda",
        q3n_gated_delta_chunked_cuda,
        q3n_gated_delta_chunked_cuda_scratch_bytes,
        q3n_gated_delta_chunked_cuda_host_items,
        q3n_gated_delta_chunked_cuda_host,
        q3n_gated_delta_chunked_cuda_host_scratch_bytes
    ],
    [
        "segmented64_cuda",
        q3n_gated_delta_segmented_cuda,
        q3n_gated_delta_segmented_cuda_scratch_bytes,
        q3n_gated_delta_segmented_cuda_host_items,
        q3n_gated_delta_segmented_cuda_host,
        q3n_gated_delta_segmented_cuda_host_scratch_bytes
    ],
    [
        "recurrent_cuda",
        q3n_gated_delta_recurrent_cuda,
        q3n_gated_delta_recurrent_cuda_scratch_bytes,
        q3n_gated_delta_recurrent_cuda_host_items,
        q3n_gated_delta_recurrent_cuda_host,
        q3n_gated_delta_recurrent_cuda_host_scratch_bytes
    ]
);

/// The epsilon that Qwen3-Next adds under the root when it normalises q and k.
pub const L2_NORM_EPS: f32 = 1e-6;

/// A decay in log space, g ≤ 0, so that the state is multiplied by exp(g). A type of its own, because a decay that is
/// already exponentiated would run and be wrong.
#[derive(Debug)]
pub struct LogDecay<'a, const R: usize, M: Memory = Cpu>(View<'a, R, f32, M>);

impl<const R: usize, M: Memory> Clone for LogDecay<'_, R, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<const R: usize, M: Memory> Copy for LogDecay<'_, R, M> {}

impl<'a, const R: usize> LogDecay<'a, R> {
    /// A packed view of the front of `data`. Errors: as [`LogDecay::strided`].
    pub fn new(data: &'a [f32], shape: [usize; R]) -> Result<Self, Error> {
        Self::strided(data, shape, crate::view::packed(shape))
    }

    /// A view with its own strides. Errors: a view that does not lie inside `data`; a value above 0, which no log-decay
    /// is but every decay in (0, 1] is. A NaN passes: it shows in the outputs.
    pub fn strided(data: &'a [f32], shape: [usize; R], strides: [usize; R]) -> Result<Self, Error> {
        let view = View::strided(data, shape, strides)?;
        if !shape.contains(&0) && any_positive(data, &shape, &strides) {
            return Err(Error::argument("g", "holds a value above 0: expected log-decays"));
        }
        Ok(LogDecay(view))
    }
}

impl<'a, const R: usize, M: Memory> LogDecay<'a, R, M> {
    /// Takes the view as log-decays without reading it. A positive g makes the state grow.
    pub fn unchecked(view: View<'a, R, f32, M>) -> Self {
        LogDecay(view)
    }
}

/// Whether a view (which lies inside `data` and is not empty) holds a value above 0.
fn any_positive(data: &[f32], shape: &[usize], strides: &[usize]) -> bool {
    match shape {
        [] => data[0] > 0.0,
        [n] => data[..*n].iter().any(|&g| g > 0.0),
        [n, inner @ ..] => (0..*n).any(|i| any_positive(&data[i * strides[0]..], inner, &strides[1..])),
    }
}

/// How the state decays between tokens.
#[derive(Debug, Clone, Copy)]
pub enum Gate<'a, M: Memory = Cpu> {
    /// Not at all: DeltaNet.
    None,
    /// One log-decay a head, `[B][T][HV]`: Gated DeltaNet.
    Scalar(LogDecay<'a, 3, M>),
    /// One a key channel, `[B][T][HV][K]`: KDA.
    Channel(LogDecay<'a, 4, M>),
}

/// Which key head a value head h reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HeadMap {
    /// h / (HV / HK): Hugging Face and qwen3next GGUF files.
    Grouped,
    /// h % HK: qwen35 GGUF files.
    Tiled,
}

/// Where the states come from and go to. A pool is `[slots][HV][V][K]`; `slots` arrays have one entry a sequence, and
/// `None` stands for 0, 1, ...
pub enum State<'a, M: Memory = Cpu> {
    /// Start from zeros.
    Zero {
        /// Pool for the final states; `None` drops them.
        out: Option<ViewMut<'a, 4, f32, M>>,
        /// Pool entry of every sequence, all different.
        slot_out: Option<M::Indices<'a>>,
    },
    /// Update the states where they lie.
    InPlace {
        /// The pool.
        pool: ViewMut<'a, 4, f32, M>,
        /// Pool entry of every sequence, all different.
        slots: Option<M::Indices<'a>>,
    },
    /// Read from one pool and write to another one of the same shape and strides.
    InOut {
        /// Pool that is read.
        input: View<'a, 4, f32, M>,
        /// Pool entry that a sequence starts from; sequences may share one.
        slot_in: Option<M::Indices<'a>>,
        /// Pool for the final states; `None` drops them.
        out: Option<ViewMut<'a, 4, f32, M>>,
        /// Pool entry that a sequence ends in, all different.
        slot_out: Option<M::Indices<'a>>,
    },
}

/// Arguments of [`run`]. With `cu_seqlens`, B is 1 in the shapes of o, q, k, v, beta, g and snapshots.
///
/// q, k, v and o are of one type: f32, or for CUDA kernels `half::bf16` or `half::f16`. All else is f32, and so is the
/// arithmetic: of the outputs, o alone is rounded.
pub struct Args<'a, M: Memory = Cpu, E: Float = f32> {
    /// Output, `[B][T][HV][V]`.
    pub o: ViewMut<'a, 4, E, M>,
    /// Output: the state after every token, `[B][T][HV][V][K]`.
    pub snapshots: Option<ViewMut<'a, 5, f32, M>>,
    /// States before and after.
    pub state: State<'a, M>,
    /// Queries, `[B][T][HK][K]`.
    pub q: View<'a, 4, E, M>,
    /// Keys, `[B][T][HK][K]`.
    pub k: View<'a, 4, E, M>,
    /// Values, `[B][T][HV][V]`.
    pub v: View<'a, 4, E, M>,
    /// Decay.
    pub gate: Gate<'a, M>,
    /// Write strength after the sigmoid, `[B][T][HV]`.
    pub beta: View<'a, 3, f32, M>,
    /// Sequence b is tokens `cu_seqlens[b] .. cu_seqlens[b + 1]` of one row: from 0 to T, not decreasing.
    pub cu_seqlens: Option<M::Indices<'a>>,
    /// Which key head a value head reads.
    pub head_map: HeadMap,
    /// L2-normalise q and k first, with this epsilon inside the root: [`L2_NORM_EPS`] is customary.
    pub qk_l2norm: Option<f32>,
    /// Factor on q; 1 / √K is customary.
    pub scale: f32,
}

/// Runs every sequence and head. Errors: shapes that do not fit together, HV no multiple of HK, K or V over 1024, slots
/// outside the pool or written twice, `cu_seqlens` that do not run from 0 to T, overlapping output strides, a negative
/// or NaN epsilon; bf16 or f16 where the variant is of the CPU.
pub fn run<E: Float>(mut args: Args<Cpu, E>, exec: &Exec<Op>) -> Result<(), Error> {
    let [rows, t, hv, v] = args.o.shape();
    let cost = [rows, t, hv, v, args.k.shape()[3], 8].into_iter().fold(1usize, usize::saturating_mul);
    let (raw, at) = raw(&mut args)?;
    // SAFETY: every view lies inside its slice and has the shape that `raw` compared; the slot arrays have B entries
    // and cu_seqlens B + 1, whose values the C check holds against the pool and T.
    unsafe { exec.execute(&raw, &at, cost) }.map_err(expected_f32)
}

/// Tells of a refused type what would have been taken.
fn expected_f32(error: Error) -> Error {
    match error {
        Error::Status { operator, code, .. } if error.kind() == Some(ffi::Q3N_DTYPE) => {
            let text = "dtype: q, k, v and o are bf16 or f16: expected f32, or a CUDA kernel";
            Error::Status { operator, code, text }
        }
        other => other,
    }
}

/// As [`run`], on a device: queues it.
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
pub fn queue<E: Float>(mut args: Args<crate::device::Cuda, E>, stream: &crate::device::Stream) -> Result<(), Error> {
    use crate::device::Indices;
    let (slot_in, slot_out) = match &args.state {
        State::Zero { slot_out, .. } => (None, *slot_out),
        State::InPlace { slots, .. } => (*slots, *slots),
        State::InOut { slot_in, slot_out, .. } => (*slot_in, *slot_out),
    };
    let cu_seqlens = args.cu_seqlens;
    let (raw, at) = raw(&mut args)?;
    // SAFETY: as in `run`, with buffers for slices.
    unsafe {
        stream.queue::<Op>(raw, &at, |raw| {
            (raw.slot_in, raw.slot_out) = (Indices::some(slot_in), Indices::some(slot_out));
            raw.cu_seqlens = Indices::some(cu_seqlens);
        })
    }
}

/// A pool as the C side takes it.
#[derive(Default)]
struct Pool {
    input: Option<*const f32>,
    output: Option<*mut f32>,
    slot_in: Option<*const i64>,
    slot_out: Option<*const i64>,
    slots: usize,
    strides: [i64; 3],
}

impl Pool {
    /// Resolves a state; the pointers live as long as what they were made from.
    fn new<M: Memory>(state: &mut State<M>, at: &mut Addresses<M>, b: usize, inner: [usize; 3]) -> Result<Pool, Error> {
        let shape = |slots: usize| [slots, inner[0], inner[1], inner[2]];
        let mut pool = Pool::default();
        let out = match state {
            State::Zero { out, slot_out } => {
                pool.slot_out = Some(at.indices("slot_out", slot_out, b)?);
                out.as_mut()
            }
            State::InPlace { pool: both, slots } => {
                pool.slot_in = Some(at.indices("slot_in", slots, b)?);
                pool.slot_out = pool.slot_in;
                pool.input = Some(both.as_mut_ptr().cast_const());
                Some(both)
            }
            State::InOut { input, slot_in, out, slot_out } => {
                pool.slot_in = Some(at.indices("slot_in", slot_in, b)?);
                pool.slot_out = Some(at.indices("slot_out", slot_out, b)?);
                pool.slots = input.shape()[0];
                input.expect("state_in", shape(pool.slots))?;
                pool.strides = input.outer();
                pool.input = Some(at.read(input));
                if let Some(out) = &out {
                    out.expect("state_out", input.shape())?;
                    if pool.strides != out.outer() {
                        return Err(Error::argument("state_out", "has other strides than state_in"));
                    }
                }
                out.as_mut()
            }
        };
        if let Some(out) = out {
            pool.slots = out.shape()[0];
            out.expect("state_out", shape(pool.slots))?;
            pool.strides = out.outer();
            pool.output = Some(at.write(out));
        }
        Ok(pool)
    }
}

/// The C args, shapes compared, and where they lie.
fn raw<M: Memory, E: Float>(args: &mut Args<M, E>) -> Result<(ffi::q3n_gated_delta_args, Addresses<M>), Error> {
    let [rows, t, hv, v] = args.o.shape();
    let [_, _, hk, k] = args.k.shape();
    args.q.expect("q", [rows, t, hk, k])?;
    args.k.expect("k", [rows, t, hk, k])?;
    args.v.expect("v", [rows, t, hv, v])?;
    args.beta.expect("beta", [rows, t, hv])?;
    let mut at = Addresses::new();
    let (gate, g, [g_b, g_t, g_h]) = match &args.gate {
        Gate::None => (ffi::Q3N_GATE_NONE, std::ptr::null(), [0; 3]),
        Gate::Scalar(LogDecay(g)) => {
            g.expect("g", [rows, t, hv])?;
            (ffi::Q3N_GATE_SCALAR, at.read(g), g.outer())
        }
        Gate::Channel(LogDecay(g)) => {
            g.expect("g", [rows, t, hv, k])?;
            (ffi::Q3N_GATE_CHANNEL, at.read(g), g.outer())
        }
    };
    let b = sequences(rows, args.cu_seqlens.as_ref().map(M::indices))?;
    let [snap_b, snap_t, snap_h, snap_v] = match &args.snapshots {
        None => [0; 4],
        Some(s) => {
            s.expect("snapshots", [rows, t, hv, v, k])?;
            s.outer()
        }
    };
    let pool = Pool::new(&mut args.state, &mut at, b, [hv, v, k])?;
    let raw = ffi::q3n_gated_delta_args {
        struct_bytes: size_of::<ffi::q3n_gated_delta_args>() as u64,
        o: at.write(&mut args.o).cast(),
        state_out: pool.output.unwrap_or(std::ptr::null_mut()),
        snapshots: at.write_some(&mut args.snapshots),
        q: at.read(&args.q).cast(),
        k: at.read(&args.k).cast(),
        v: at.read(&args.v).cast(),
        g,
        beta: at.read(&args.beta),
        state_in: pool.input.unwrap_or(std::ptr::null()),
        slot_in: pool.slot_in.unwrap_or(std::ptr::null()),
        slot_out: pool.slot_out.unwrap_or(std::ptr::null()),
        cu_seqlens: at.indices("cu_seqlens", &args.cu_seqlens, b + 1)?,
        dtype: E::DTYPE.ggml(),
        gate,
        head_map: match args.head_map {
            HeadMap::Grouped => ffi::Q3N_HEADS_GROUPED,
            HeadMap::Tiled => ffi::Q3N_HEADS_TILED,
        },
        qk_l2norm: args.qk_l2norm.is_some().into(),
        qk_l2norm_eps: args.qk_l2norm.unwrap_or(0.0),
        scale: args.scale,
        o_b: args.o.stride(0),
        o_t: args.o.stride(1),
        o_h: args.o.stride(2),
        q_b: args.q.stride(0),
        q_t: args.q.stride(1),
        q_h: args.q.stride(2),
        k_b: args.k.stride(0),
        k_t: args.k.stride(1),
        k_h: args.k.stride(2),
        v_b: args.v.stride(0),
        v_t: args.v.stride(1),
        v_h: args.v.stride(2),
        g_b,
        g_t,
        g_h,
        beta_b: args.beta.stride(0),
        beta_t: args.beta.stride(1),
        beta_h: args.beta.stride(2),
        state_slot: pool.strides[0],
        state_h: pool.strides[1],
        state_v: pool.strides[2],
        snap_b,
        snap_t,
        snap_h,
        snap_v,
        slots: pool.slots as i64,
        B: b as i64,
        T: t as i64,
        HK: hk as i64,
        HV: hv as i64,
        K: k as i64,
        V: v as i64,
    };
    Ok((raw, at))
}
