//! Partial rotary embedding (`csrc/rope/rope.h`).

use crate::operator::{operator, Exec};
use crate::{ffi, Error, View, ViewMut};

operator!("rope", q3n_rope_args, q3n_rope_check, q3n_rope_variant_count, q3n_rope_variant_at, q3n_rope_best);

/// Arguments of [`run`].
pub struct Args<'a> {
    /// Output, `[T][H][D]`.
    pub y: ViewMut<'a, 3>,
    /// Input, `[T][H][D]`; `None`: y holds it and is rotated in place.
    pub x: Option<View<'a, 3>>,
    /// Positions, `[T]`, ≥ 0.
    pub pos: &'a [i64],
    /// Base of the frequencies, > 0.
    pub base: f64,
    /// R, how many channels are rotated: even, ≤ D. The rest is copied.
    pub rotary: usize,
}

/// Rotates every head. Errors: shapes that do not fit together, an odd or too large R, a negative position, a base
/// that is not positive and finite, overlapping output strides.
pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
    let [t, h, d] = args.y.shape();
    if let Some(x) = &args.x {
        x.expect("x", [t, h, d])?;
    }
    View::new(args.pos, [args.pos.len()])?.expect("pos", [t])?;
    let y = args.y.as_mut_ptr();
    let raw = ffi::q3n_rope_args {
        struct_bytes: size_of::<ffi::q3n_rope_args>() as u64,
        y,
        x: args.x.map_or(y.cast_const(), |x| x.as_ptr()),
        pos: args.pos.as_ptr(),
        base: args.base,
        y_t: args.y.stride(0),
        y_h: args.y.stride(1),
        x_t: args.x.map_or(args.y.stride(0), |x| x.stride(0)),
        x_h: args.x.map_or(args.y.stride(1), |x| x.stride(1)),
        T: t as i64,
        H: h as i64,
        D: d as i64,
        R: i64::try_from(args.rotary).unwrap_or(i64::MAX),
    };
    let cost = t.saturating_mul(h.saturating_mul(d).saturating_add(args.rotary.saturating_mul(50)));
    // SAFETY: every view lies inside its slice and has the shape just compared; pos has T elements.
    unsafe { exec.execute(&raw, cost) }
}
