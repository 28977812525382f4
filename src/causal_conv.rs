//! Depthwise causal convolution with state (`csrc/causal_conv/causal_conv.h`).

use crate::memory::{Addresses, Cpu, Memory};
use crate::operator::{operator, Exec};
use crate::{ffi, Error, View, ViewMut};

operator!(
    "causal_conv",
    q3n_causal_conv_args,
    q3n_causal_conv_check,
    q3n_causal_conv_variant_count,
    q3n_causal_conv_variant_at,
    q3n_causal_conv_best,
    [
        "cuda",
        q3n_causal_conv_cuda,
        q3n_causal_conv_cuda_scratch_bytes,
        q3n_causal_conv_cuda_host_items,
        q3n_causal_conv_cuda_host,
        q3n_causal_conv_cuda_host_scratch_bytes
    ]
);

/// The inputs before the first token and after the last one: pools `[slots][C][W-1]`, oldest first.
#[derive(Debug)]
pub enum State<'a, M: Memory = Cpu> {
    /// Zeros before the first token; the last window is not kept.
    Zeros,
    /// Read only.
    In(View<'a, 3, f32, M>),
    /// Zeros before the first token; the last window is stored.
    Out(ViewMut<'a, 3, f32, M>),
    /// From one pool into another of the same shape and strides.
    InOut(View<'a, 3, f32, M>, ViewMut<'a, 3, f32, M>),
    /// Updated in place; then `slot_in` and `slot_out` must be equal.
    InPlace(ViewMut<'a, 3, f32, M>),
}

/// Arguments of [`run`].
pub struct Args<'a, M: Memory = Cpu> {
    /// Output, `[B][T][C]`; with `cu_seqlens` `[1][T][C]`.
    pub y: ViewMut<'a, 3, f32, M>,
    /// Input, the shape of y.
    pub x: View<'a, 3, f32, M>,
    /// Taps, `[C][W]`, 1 ≤ W ≤ 16; the last one meets the current token.
    pub w: View<'a, 2, f32, M>,
    /// `[C]`.
    pub bias: Option<View<'a, 1, f32, M>>,
    /// State before and after.
    pub state: State<'a, M>,
    /// The state after every token, `[B][T][C][W-1]`; with `cu_seqlens` `[1][T][C][W-1]`.
    pub snapshots: Option<ViewMut<'a, 4, f32, M>>,
    /// Pool entry each sequence starts from, `[B]`; `None`: entry b.
    pub slot_in: Option<M::Indices<'a>>,
    /// Pool entry each sequence ends in, `[B]`, all different; `None`: entry b.
    pub slot_out: Option<M::Indices<'a>>,
    /// `[B+1]`, from 0 to T: sequence b is the tokens `cu_seqlens[b]..cu_seqlens[b+1]` of one packed row.
    pub cu_seqlens: Option<M::Indices<'a>>,
    /// SiLU after the convolution.
    pub silu: bool,
}

/// Convolves every sequence. Errors: shapes that do not fit together, slots outside the pool or used twice, sequences
/// that do not cover T, overlapping output strides.
pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
    let ([rows, t, c], [_, width]) = (args.y.shape(), args.w.shape());
    let cost = rows.saturating_mul(t).saturating_mul(c).saturating_mul(width.saturating_mul(2).saturating_add(20));
    let (raw, at) = raw(&mut args)?;
    // SAFETY: every view lies inside its slice and has the shape that `raw` compared; bias, slots and cu_seqlens have
    // the lengths compared there, and the C check validates what the latter hold.
    unsafe { exec.execute(&raw, &at, cost) }
}

/// As [`run`], on a device: queues it.
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
pub fn queue(mut args: Args<crate::device::Cuda>, stream: &crate::device::Stream) -> Result<(), Error> {
    use crate::device::Indices;
    let (slot_in, slot_out, cu_seqlens) = (args.slot_in, args.slot_out, args.cu_seqlens);
    let (raw, at) = raw(&mut args)?;
    // SAFETY: as in `run`, with buffers for slices.
    unsafe {
        stream.queue::<Op>(raw, &at, |raw| {
            (raw.slot_in, raw.slot_out) = (Indices::some(slot_in), Indices::some(slot_out));
            raw.cu_seqlens = Indices::some(cu_seqlens);
        })
    }
}

/// The C args, shapes compared, and where they lie.
fn raw<M: Memory>(args: &mut Args<M>) -> Result<(ffi::q3n_causal_conv_args, Addresses<M>), Error> {
    let [rows, t, c] = args.y.shape();
    let [_, width] = args.w.shape();
    let batch = crate::operator::sequences(rows, args.cu_seqlens.as_ref().map(M::indices))?;
    args.x.expect("x", [rows, t, c])?;
    args.w.expect("w", [c, width])?;
    let window = width.saturating_sub(1);
    args.bias.map_or(Ok(()), |b| b.expect("bias", [c]))?;
    if let Some(s) = &args.snapshots {
        s.expect("snapshots", [rows, t, c, window])?;
    }
    let mut at = Addresses::new();
    let null = std::ptr::null_mut::<f32>();
    let (state_in, state_out, shape, [state_slot, state_c]) = match &mut args.state {
        State::Zeros => (null.cast_const(), null, [batch, c, window], [0, 0]),
        State::In(s) => (at.read(s), null, s.shape(), s.outer()),
        State::Out(s) => (null.cast_const(), at.write(s), s.shape(), s.outer()),
        State::InPlace(s) => {
            let both = at.write(s);
            (both.cast_const(), both, s.shape(), s.outer())
        }
        State::InOut(from, to) => {
            from.expect("state_in", to.shape())?;
            let strides: [i64; 2] = to.outer();
            if from.outer() != strides {
                return Err(Error::argument("state_in", "strides differ from those of state_out"));
            }
            (at.read(from), at.write(to), to.shape(), strides)
        }
    };
    let slots = shape[0];
    let arg = if matches!(args.state, State::In(_)) { "state_in" } else { "state_out" };
    crate::view::expect(arg, shape, [slots, c, window])?;
    let [snap_b, snap_t, snap_c] = args.snapshots.as_ref().map_or([0; 3], |s| s.outer());
    let raw = ffi::q3n_causal_conv_args {
        struct_bytes: size_of::<ffi::q3n_causal_conv_args>() as u64,
        y: at.write(&mut args.y),
        state_out,
        snapshots: at.write_some(&mut args.snapshots),
        x: at.read(&args.x),
        w: at.read(&args.w),
        bias: at.read_some(&args.bias),
        state_in,
        slot_in: at.indices("slot_in", &args.slot_in, batch)?,
        slot_out: at.indices("slot_out", &args.slot_out, batch)?,
        cu_seqlens: at.indices("cu_seqlens", &args.cu_seqlens, batch + 1)?,
        silu: args.silu.into(),
        y_b: args.y.stride(0),
        y_t: args.y.stride(1),
        x_b: args.x.stride(0),
        x_t: args.x.stride(1),
        w_c: args.w.stride(0),
        state_slot,
        state_c,
        snap_b,
        snap_t,
        snap_c,
        slots: slots as i64,
        B: batch as i64,
        T: t as i64,
        C: c as i64,
        width: width as i64,
    };
    Ok((raw, at))
}
