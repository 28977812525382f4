//! Depthwise causal convolution with state (`csrc/causal_conv/causal_conv.h`).

use crate::operator::{operator, Exec};
use crate::{ffi, Error, View, ViewMut};

operator!(
    "causal_conv",
    q3n_causal_conv_args,
    q3n_causal_conv_check,
    q3n_causal_conv_variant_count,
    q3n_causal_conv_variant_at,
    q3n_causal_conv_best
);

/// The inputs before the first token and after the last one: pools `[slots][C][W-1]`, oldest first.
#[derive(Debug)]
pub enum State<'a> {
    /// Zeros before the first token; the last window is not kept.
    Zeros,
    /// Read only.
    In(View<'a, 3>),
    /// Zeros before the first token; the last window is stored.
    Out(ViewMut<'a, 3>),
    /// From one pool into another of the same shape and strides.
    InOut(View<'a, 3>, ViewMut<'a, 3>),
    /// Updated in place; then `slot_in` and `slot_out` must be equal.
    InPlace(ViewMut<'a, 3>),
}

/// Arguments of [`run`].
pub struct Args<'a> {
    /// Output, `[B][T][C]`; with `cu_seqlens` `[1][T][C]`.
    pub y: ViewMut<'a, 3>,
    /// Input, the shape of y.
    pub x: View<'a, 3>,
    /// Taps, `[C][W]`, 1 ≤ W ≤ 16; the last one meets the current token.
    pub w: View<'a, 2>,
    /// `[C]`.
    pub bias: Option<&'a [f32]>,
    /// State before and after.
    pub state: State<'a>,
    /// The state after every token, `[B][T][C][W-1]`; with `cu_seqlens` `[1][T][C][W-1]`.
    pub snapshots: Option<ViewMut<'a, 4>>,
    /// Pool entry each sequence starts from, `[B]`; `None`: entry b.
    pub slot_in: Option<&'a [i64]>,
    /// Pool entry each sequence ends in, `[B]`, all different; `None`: entry b.
    pub slot_out: Option<&'a [i64]>,
    /// `[B+1]`, from 0 to T: sequence b is the tokens `cu_seqlens[b]..cu_seqlens[b+1]` of one packed row.
    pub cu_seqlens: Option<&'a [i64]>,
    /// SiLU after the convolution.
    pub silu: bool,
}

/// Convolves every sequence. Errors: shapes that do not fit together, slots outside the pool or used twice, sequences
/// that do not cover T, overlapping output strides.
pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
    let [rows, t, c] = args.y.shape();
    let [_, width] = args.w.shape();
    let batch = sequences(rows, args.cu_seqlens)?;
    args.x.expect("x", [rows, t, c])?;
    args.w.expect("w", [c, width])?;
    let window = width.saturating_sub(1);
    if let Some(bias) = args.bias {
        View::new(bias, [bias.len()])?.expect("bias", [c])?;
    }
    for (name, slots) in [("slot_in", args.slot_in), ("slot_out", args.slot_out)] {
        if let Some(slots) = slots {
            View::new(slots, [slots.len()])?.expect(name, [batch])?;
        }
    }
    if let Some(s) = &args.snapshots {
        s.expect("snapshots", [rows, t, c, window])?;
    }
    let (state_in, state_out, [slots, ..], [state_slot, state_c]) = match &mut args.state {
        State::Zeros => (std::ptr::null(), std::ptr::null_mut(), [batch, c, window], [0, 0]),
        State::In(s) => (s.as_ptr(), std::ptr::null_mut(), s.shape(), [s.stride(0), s.stride(1)]),
        State::Out(s) => (std::ptr::null(), s.as_mut_ptr(), s.shape(), [s.stride(0), s.stride(1)]),
        State::InPlace(s) => {
            let at = s.as_mut_ptr();
            (at.cast_const(), at, s.shape(), [s.stride(0), s.stride(1)])
        }
        State::InOut(from, to) => {
            from.expect("state_in", to.shape())?;
            let strides = [to.stride(0), to.stride(1)];
            if [from.stride(0), from.stride(1)] != strides {
                return Err(Error::argument("state_in", "strides differ from those of state_out"));
            }
            (from.as_ptr(), to.as_mut_ptr(), to.shape(), strides)
        }
    };
    match &args.state {
        State::Zeros => {}
        State::In(s) => s.expect("state_in", [slots, c, window])?,
        State::Out(s) | State::InPlace(s) | State::InOut(_, s) => s.expect("state_out", [slots, c, window])?,
    }
    let snap = args.snapshots.as_mut().map(|s| (s.as_mut_ptr(), [s.stride(0), s.stride(1), s.stride(2)]));
    let (snapshots, [snap_b, snap_t, snap_c]) = snap.unwrap_or((std::ptr::null_mut(), [0; 3]));
    let raw = ffi::q3n_causal_conv_args {
        struct_bytes: size_of::<ffi::q3n_causal_conv_args>() as u64,
        y: args.y.as_mut_ptr(),
        state_out,
        snapshots,
        x: args.x.as_ptr(),
        w: args.w.as_ptr(),
        bias: args.bias.map_or(std::ptr::null(), |b| b.as_ptr()),
        state_in,
        slot_in: args.slot_in.map_or(std::ptr::null(), |s| s.as_ptr()),
        slot_out: args.slot_out.map_or(std::ptr::null(), |s| s.as_ptr()),
        cu_seqlens: args.cu_seqlens.map_or(std::ptr::null(), |s| s.as_ptr()),
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
    let cost = rows.saturating_mul(t).saturating_mul(c).saturating_mul(width.saturating_mul(2).saturating_add(20));
    // SAFETY: every view lies inside its slice and has the shape just compared; bias, slots and cu_seqlens have the
    // lengths compared, and the C check validates what the latter hold.
    unsafe { exec.execute(&raw, cost) }
}

/// How many sequences: the rows, or what `cu_seqlens` says of the one packed row.
fn sequences(rows: usize, cu_seqlens: Option<&[i64]>) -> Result<usize, Error> {
    match cu_seqlens {
        None => Ok(rows),
        Some([]) => Err(Error::argument("cu_seqlens", "is empty, expected B + 1 elements")),
        Some(_) if rows != 1 => Err(Error::argument("cu_seqlens", format!("packs one row, but B is {rows}"))),
        Some(cu) => Ok(cu.len() - 1),
    }
}
