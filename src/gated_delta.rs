//! The gated delta rule (`csrc/gated_delta/gated_delta.h`).

use crate::operator::{operator, Exec};
use crate::view::Array;
use crate::{ffi, Error, View, ViewMut};

operator!(
    "gated_delta",
    q3n_gated_delta_args,
    q3n_gated_delta_check,
    q3n_gated_delta_variant_count,
    q3n_gated_delta_variant_at,
    q3n_gated_delta_best
);

/// The epsilon that Qwen3-Next adds under the root when it normalises q and k.
pub const L2_NORM_EPS: f32 = 1e-6;

/// A decay in log space, g ≤ 0, so that the state is multiplied by exp(g). A type of its own, because a decay that is
/// already exponentiated would run and be wrong.
#[derive(Debug, Clone, Copy)]
pub struct LogDecay<'a, const R: usize>(View<'a, R>);

impl<'a, const R: usize> LogDecay<'a, R> {
    /// A packed view of the front of `data`. Errors: as [`LogDecay::strided`].
    pub fn new(data: &'a [f32], shape: [usize; R]) -> Result<Self, Error> {
        let mut strides = [1usize; R];
        for i in (0..R.saturating_sub(1)).rev() {
            strides[i] = strides[i + 1].saturating_mul(shape[i + 1].max(1));
        }
        Self::strided(data, shape, strides)
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

    /// Takes the view as log-decays without reading it. A positive g makes the state grow.
    pub fn unchecked(view: View<'a, R>) -> Self {
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
pub enum Gate<'a> {
    /// Not at all: DeltaNet.
    None,
    /// One log-decay a head, `[B][T][HV]`: Gated DeltaNet.
    Scalar(LogDecay<'a, 3>),
    /// One a key channel, `[B][T][HV][K]`: KDA.
    Channel(LogDecay<'a, 4>),
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
pub enum State<'a> {
    /// Start from zeros.
    Zero {
        /// Pool for the final states; `None` drops them.
        out: Option<ViewMut<'a, 4>>,
        /// Pool entry of every sequence, all different.
        slot_out: Option<&'a [i64]>,
    },
    /// Update the states where they lie.
    InPlace {
        /// The pool.
        pool: ViewMut<'a, 4>,
        /// Pool entry of every sequence, all different.
        slots: Option<&'a [i64]>,
    },
    /// Read from one pool and write to another one of the same shape and strides.
    InOut {
        /// Pool that is read.
        input: View<'a, 4>,
        /// Pool entry that a sequence starts from; sequences may share one.
        slot_in: Option<&'a [i64]>,
        /// Pool for the final states; `None` drops them.
        out: Option<ViewMut<'a, 4>>,
        /// Pool entry that a sequence ends in, all different.
        slot_out: Option<&'a [i64]>,
    },
}

/// Arguments of [`run`]. With `cu_seqlens`, B is 1 in the shapes of o, q, k, v, beta, g and snapshots.
pub struct Args<'a> {
    /// Output, `[B][T][HV][V]`.
    pub o: ViewMut<'a, 4>,
    /// Output: the state after every token, `[B][T][HV][V][K]`.
    pub snapshots: Option<ViewMut<'a, 5>>,
    /// States before and after.
    pub state: State<'a>,
    /// Queries, `[B][T][HK][K]`.
    pub q: View<'a, 4>,
    /// Keys, `[B][T][HK][K]`.
    pub k: View<'a, 4>,
    /// Values, `[B][T][HV][V]`.
    pub v: View<'a, 4>,
    /// Decay.
    pub gate: Gate<'a>,
    /// Write strength after the sigmoid, `[B][T][HV]`.
    pub beta: View<'a, 3>,
    /// Sequence b is tokens `cu_seqlens[b] .. cu_seqlens[b + 1]` of one row: from 0 to T, not decreasing.
    pub cu_seqlens: Option<&'a [i64]>,
    /// Which key head a value head reads.
    pub head_map: HeadMap,
    /// L2-normalise q and k first, with this epsilon inside the root: [`L2_NORM_EPS`] is customary.
    pub qk_l2norm: Option<f32>,
    /// Factor on q; 1 / √K is customary.
    pub scale: f32,
}

/// [`State`] with arrays and slots of any memory.
enum Pools<S> {
    Zero { out: Option<Array<4>>, slot_out: Option<S> },
    InPlace { pool: Array<4>, slots: Option<S> },
    InOut { input: Array<4>, slot_in: Option<S>, out: Option<Array<4>>, slot_out: Option<S> },
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
    fn new(state: Pools<&[i64]>, b: usize, inner: [usize; 3]) -> Result<Pool, Error> {
        let shape = |slots: usize| [slots, inner[0], inner[1], inner[2]];
        let slots_of = |arg: &'static str, slots: Option<&[i64]>| match slots {
            Some(s) if s.len() != b => Err(Error::argument(arg, format!("has {} entries, expected {b}", s.len()))),
            s => Ok(s.map(|s| s.as_ptr())),
        };
        let mut pool = Pool::default();
        let out = match state {
            Pools::Zero { out, slot_out } => {
                pool.slot_out = slots_of("slot_out", slot_out)?;
                out
            }
            Pools::InPlace { pool: both, slots } => {
                pool.slot_in = slots_of("slot_in", slots)?;
                pool.slot_out = pool.slot_in;
                pool.input = Some(both.at.cast_const());
                Some(both)
            }
            Pools::InOut { input, slot_in, out, slot_out } => {
                pool.slot_in = slots_of("slot_in", slot_in)?;
                pool.slot_out = slots_of("slot_out", slot_out)?;
                pool.slots = input.shape[0];
                input.expect("state_in", shape(pool.slots))?;
                pool.strides = [input.strides[0], input.strides[1], input.strides[2]];
                pool.input = Some(input.at.cast_const());
                if let Some(out) = &out {
                    out.expect("state_out", input.shape)?;
                    if pool.strides != out.strides[..3] {
                        return Err(Error::argument("state_out", "has other strides than state_in"));
                    }
                }
                out
            }
        };
        if let Some(out) = out {
            pool.slots = out.shape[0];
            out.expect("state_out", shape(pool.slots))?;
            pool.strides = [out.strides[0], out.strides[1], out.strides[2]];
            pool.output = Some(out.at);
        }
        Ok(pool)
    }
}

/// [`Gate`] with arrays of any memory.
enum Decay {
    None,
    Scalar(Array<3>),
    Channel(Array<4>),
}

/// [`Args`] with arrays of any memory; the index arrays are the CPU's.
struct Parts<'a> {
    o: Array<4>,
    snapshots: Option<Array<5>>,
    state: Pools<&'a [i64]>,
    q: Array<4>,
    k: Array<4>,
    v: Array<4>,
    gate: Decay,
    beta: Array<3>,
    cu_seqlens: Option<&'a [i64]>,
    head_map: HeadMap,
    qk_l2norm: Option<f32>,
    scale: f32,
}

/// Compares the shapes and makes the C struct.
fn assemble(args: Parts) -> Result<ffi::q3n_gated_delta_args, Error> {
    let [rows, t, hv, v] = args.o.shape;
    let [_, _, hk, k] = args.k.shape;
    args.q.expect("q", [rows, t, hk, k])?;
    args.k.expect("k", [rows, t, hk, k])?;
    args.v.expect("v", [rows, t, hv, v])?;
    args.beta.expect("beta", [rows, t, hv])?;
    let (gate, g, g_strides) = match &args.gate {
        Decay::None => (ffi::Q3N_GATE_NONE, std::ptr::null_mut(), [0; 3]),
        Decay::Scalar(g) => {
            g.expect("g", [rows, t, hv])?;
            (ffi::Q3N_GATE_SCALAR, g.at, g.strides)
        }
        Decay::Channel(g) => {
            g.expect("g", [rows, t, hv, k])?;
            (ffi::Q3N_GATE_CHANNEL, g.at, [g.strides[0], g.strides[1], g.strides[2]])
        }
    };
    let b = match args.cu_seqlens {
        None => rows,
        Some([]) => return Err(Error::argument("cu_seqlens", "is empty, expected B + 1 entries")),
        Some(_) if rows != 1 => {
            return Err(Error::argument("cu_seqlens", format!("needs shapes with one row of tokens, not {rows}")))
        }
        Some(ends) => ends.len() - 1,
    };
    let snap_strides = match &args.snapshots {
        None => [0; 5],
        Some(s) => {
            s.expect("snapshots", [rows, t, hv, v, k])?;
            s.strides
        }
    };
    let pool = Pool::new(args.state, b, [hv, v, k])?;
    Ok(ffi::q3n_gated_delta_args {
        struct_bytes: size_of::<ffi::q3n_gated_delta_args>() as u64,
        o: args.o.at,
        state_out: pool.output.unwrap_or(std::ptr::null_mut()),
        snapshots: args.snapshots.map_or(std::ptr::null_mut(), |s| s.at),
        q: args.q.at,
        k: args.k.at,
        v: args.v.at,
        g,
        beta: args.beta.at,
        state_in: pool.input.unwrap_or(std::ptr::null()),
        slot_in: pool.slot_in.unwrap_or(std::ptr::null()),
        slot_out: pool.slot_out.unwrap_or(std::ptr::null()),
        cu_seqlens: args.cu_seqlens.map_or(std::ptr::null(), |c| c.as_ptr()),
        gate,
        head_map: match args.head_map {
            HeadMap::Grouped => ffi::Q3N_HEADS_GROUPED,
            HeadMap::Tiled => ffi::Q3N_HEADS_TILED,
        },
        qk_l2norm: args.qk_l2norm.is_some().into(),
        qk_l2norm_eps: args.qk_l2norm.unwrap_or(0.0),
        scale: args.scale,
        o_b: args.o.strides[0],
        o_t: args.o.strides[1],
        o_h: args.o.strides[2],
        q_b: args.q.strides[0],
        q_t: args.q.strides[1],
        q_h: args.q.strides[2],
        k_b: args.k.strides[0],
        k_t: args.k.strides[1],
        k_h: args.k.strides[2],
        v_b: args.v.strides[0],
        v_t: args.v.strides[1],
        v_h: args.v.strides[2],
        g_b: g_strides[0],
        g_t: g_strides[1],
        g_h: g_strides[2],
        beta_b: args.beta.strides[0],
        beta_t: args.beta.strides[1],
        beta_h: args.beta.strides[2],
        state_slot: pool.strides[0],
        state_h: pool.strides[1],
        state_v: pool.strides[2],
        snap_b: snap_strides[0],
        snap_t: snap_strides[1],
        snap_h: snap_strides[2],
        snap_v: snap_strides[3],
        slots: pool.slots as i64,
        B: b as i64,
        T: t as i64,
        HK: hk as i64,
        HV: hv as i64,
        K: k as i64,
        V: v as i64,
    })
}

/// Runs every sequence and head. Errors: shapes that do not fit together, HV no multiple of HK, K or V over 1024, slots
/// outside the pool or written twice, `cu_seqlens` that do not run from 0 to T, overlapping output strides, a negative
/// or NaN epsilon.
pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
    let [rows, t, hv, v] = args.o.shape();
    let cost = [rows, t, hv, v, args.k.shape()[3], 8].into_iter().fold(1usize, usize::saturating_mul);
    let raw = assemble(Parts {
        o: (&mut args.o).into(),
        snapshots: args.snapshots.as_mut().map(Array::from),
        state: match &mut args.state {
            State::Zero { out, slot_out } => Pools::Zero { out: out.as_mut().map(Array::from), slot_out: *slot_out },
            State::InPlace { pool, slots } => Pools::InPlace { pool: pool.into(), slots: *slots },
            State::InOut { input, slot_in, out, slot_out } => Pools::InOut {
                input: (&*input).into(),
                slot_in: *slot_in,
                out: out.as_mut().map(Array::from),
                slot_out: *slot_out,
            },
        },
        q: (&args.q).into(),
        k: (&args.k).into(),
        v: (&args.v).into(),
        gate: match &args.gate {
            Gate::None => Decay::None,
            Gate::Scalar(LogDecay(g)) => Decay::Scalar(g.into()),
            Gate::Channel(LogDecay(g)) => Decay::Channel(g.into()),
        },
        beta: (&args.beta).into(),
        cu_seqlens: args.cu_seqlens,
        head_map: args.head_map,
        qk_l2norm: args.qk_l2norm,
        scale: args.scale,
    })?;
    // SAFETY: every view lies inside its slice and has the shape compared in `assemble`; the slot arrays have B entries
    // and cu_seqlens B + 1, whose values the C check holds against the pool and T.
    unsafe { exec.execute(&raw, cost) }
}

/// On a device: [`run`](super::run) with everything in its memory.
#[cfg(feature = "cuda")]
pub mod cuda {
    use super::{assemble, Decay, HeadMap, Op, Parts, Pools};
    use crate::device::{Device, DeviceView, DeviceViewMut, Indices, Stream};
    use crate::view::Array;
    use crate::{ffi, Error, Operator};

    /// A log-decay on a device, which nobody reads before the kernel does: that it is one is for the caller to know.
    #[derive(Debug, Clone, Copy)]
    pub struct LogDecay<'a, const R: usize>(pub DeviceView<'a, R>);

    /// As [`super::Gate`].
    #[derive(Debug, Clone, Copy)]
    pub enum Gate<'a> {
        /// Not at all.
        None,
        /// `[B][T][HV]`.
        Scalar(LogDecay<'a, 3>),
        /// `[B][T][HV][K]`.
        Channel(LogDecay<'a, 4>),
    }

    /// As [`super::State`].
    pub enum State<'a> {
        /// Start from zeros.
        Zero {
            /// Pool for the final states.
            out: Option<DeviceViewMut<'a, 4>>,
            /// Pool entry of every sequence, all different.
            slot_out: Option<&'a Indices>,
        },
        /// Update the states where they lie.
        InPlace {
            /// The pool.
            pool: DeviceViewMut<'a, 4>,
            /// Pool entry of every sequence, all different.
            slots: Option<&'a Indices>,
        },
        /// Read from one pool and write to another one of the same shape and strides.
        InOut {
            /// Pool that is read.
            input: DeviceView<'a, 4>,
            /// Pool entry that a sequence starts from.
            slot_in: Option<&'a Indices>,
            /// Pool for the final states.
            out: Option<DeviceViewMut<'a, 4>>,
            /// Pool entry that a sequence ends in, all different.
            slot_out: Option<&'a Indices>,
        },
    }

    /// As [`super::Args`].
    pub struct Args<'a> {
        /// Output, `[B][T][HV][V]`.
        pub o: DeviceViewMut<'a, 4>,
        /// Output: the state after every token, `[B][T][HV][V][K]`.
        pub snapshots: Option<DeviceViewMut<'a, 5>>,
        /// States before and after.
        pub state: State<'a>,
        /// Queries, `[B][T][HK][K]`.
        pub q: DeviceView<'a, 4>,
        /// Keys, `[B][T][HK][K]`.
        pub k: DeviceView<'a, 4>,
        /// Values, `[B][T][HV][V]`.
        pub v: DeviceView<'a, 4>,
        /// Decay.
        pub gate: Gate<'a>,
        /// Write strength after the sigmoid, `[B][T][HV]`.
        pub beta: DeviceView<'a, 3>,
        /// Starts of packed sequences, and T.
        pub cu_seqlens: Option<&'a Indices>,
        /// Which key head a value head reads.
        pub head_map: HeadMap,
        /// L2-normalise q and k first.
        pub qk_l2norm: Option<f32>,
        /// Factor on q.
        pub scale: f32,
    }

    /// Queues the recurrence: the same checks as [`super::run`], and the same errors before anything runs.
    pub fn run(args: Args, stream: &Stream) -> Result<(), Error> {
        let mut on: Vec<Option<&Device>> = vec![args.o.device(), args.q.device(), args.k.device(), args.v.device()];
        on.extend([args.beta.device(), args.snapshots.as_ref().and_then(|s| s.device())]);
        let (gate, g) = match &args.gate {
            Gate::None => (Decay::None, None),
            Gate::Scalar(LogDecay(g)) => (Decay::Scalar(g.into()), g.device()),
            Gate::Channel(LogDecay(g)) => (Decay::Channel(g.into()), g.device()),
        };
        on.push(g);
        let (pools, slot_in, slot_out) = match &args.state {
            State::Zero { out, slot_out } => {
                on.push(out.as_ref().and_then(|o| o.device()));
                (Pools::Zero { out: out.as_ref().map(Array::from), slot_out: *slot_out }, None, *slot_out)
            }
            State::InPlace { pool, slots } => {
                on.push(pool.device());
                (Pools::InPlace { pool: pool.into(), slots: *slots }, *slots, *slots)
            }
            State::InOut { input, slot_in, out, slot_out } => {
                on.extend([input.device(), out.as_ref().and_then(|o| o.device())]);
                let out = out.as_ref().map(Array::from);
                let pools = Pools::InOut { input: input.into(), slot_in: *slot_in, out, slot_out: *slot_out };
                (pools, *slot_in, *slot_out)
            }
        };
        on.extend([slot_in, slot_out, args.cu_seqlens].map(|i| i.map(Indices::device)));
        let state = match pools {
            Pools::Zero { out, slot_out } => Pools::Zero { out, slot_out: slot_out.map(Indices::host) },
            Pools::InPlace { pool, slots } => Pools::InPlace { pool, slots: slots.map(Indices::host) },
            Pools::InOut { input, slot_in, out, slot_out } => {
                Pools::InOut { input, slot_in: slot_in.map(Indices::host), out, slot_out: slot_out.map(Indices::host) }
            }
        };
        let mut raw = assemble(Parts {
            o: (&args.o).into(),
            snapshots: args.snapshots.as_ref().map(Array::from),
            state,
            q: (&args.q).into(),
            k: (&args.k).into(),
            v: (&args.v).into(),
            gate,
            beta: (&args.beta).into(),
            cu_seqlens: args.cu_seqlens.map(Indices::host),
            head_map: args.head_map,
            qk_l2norm: args.qk_l2norm,
            scale: args.scale,
        })?;
        crate::status::check("gated_delta", Op::check(&raw))?;
        let at = |indices: Option<&Indices>| indices.map_or(std::ptr::null(), Indices::at);
        (raw.slot_in, raw.slot_out, raw.cu_seqlens) = (at(slot_in), at(slot_out), at(args.cu_seqlens));
        // SAFETY: every view lies inside its buffer on the stream's device and has the shape compared in `assemble`; the
        // operator's check has seen the values that the device's index arrays hold; freeing a buffer waits for the work.
        stream.launch("gated_delta", &on, |s| unsafe {
            ffi::q3n_gated_delta_recurrent_cuda(&raw, std::ptr::null_mut(), s)
        })
    }
}
