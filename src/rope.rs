//! Partial rotary embedding (`csrc/rope/rope.h`).

use crate::memory::{Addresses, Cpu, Memory};
use crate::operator::{operator, Exec};
use crate::{ffi, Error, View, ViewMut};

operator!(
    "rope",
    q3n_rope_args,
    q3n_rope_check,
    q3n_rope_variant_count,
    q3n_rope_variant_at,
    q3n_rope_best,
    [
        "cuda",
        q3n_rope_cuda,
        q3n_rope_cuda_scratch_bytes,
        q3n_rope_cuda_host_items,
        q3n_rope_cuda_host,
        q3n_rope_cuda_host_scratch_bytes
    ]
);

/// Arguments of [`run`].
pub struct Args<'a, M: Memory = Cpu> {
    /// Output, `[T][H][D]`.
    pub y: ViewMut<'a, 3, f32, M>,
    /// Input, `[T][H][D]`; `None`: y holds it and is rotated in place.
    pub x: Option<View<'a, 3, f32, M>>,
    /// Positions, `[T]`, ≥ 0.
    pub pos: M::Indices<'a>,
    /// Base of the frequencies, > 0.
    pub base: f64,
    /// R, how many channels are rotated: even, ≤ D. The rest is copied.
    pub rotary: usize,
}

/// Rotates every head. Errors: shapes that do not fit together, an odd or too large R, a negative position, a base
/// that is not positive and finite, overlapping output strides.
pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
    let [t, h, d] = args.y.shape();
    let cost = t.saturating_mul(h.saturating_mul(d).saturating_add(args.rotary.saturating_mul(50)));
    let (raw, at) = raw(&mut args)?;
    // SAFETY: every view lies inside its slice and has the shape that `raw` compared; pos has T elements.
    unsafe { exec.execute(&raw, &at, cost) }
}

/// As [`run`], on a device: queues it.
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
pub fn queue(mut args: Args<crate::device::Cuda>, stream: &crate::device::Stream) -> Result<(), Error> {
    let pos = args.pos;
    let (raw, at) = raw(&mut args)?;
    // SAFETY: as in `run`, with buffers for slices.
    unsafe { stream.queue::<Op>(raw, &at, |raw| raw.pos = pos.at()) }
}

/// The C args, shapes compared, and where they lie.
fn raw<M: Memory>(args: &mut Args<M>) -> Result<(ffi::q3n_rope_args, Addresses<M>), Error> {
    let shape @ [t, h, d] = args.y.shape();
    args.x.map_or(Ok(()), |x| x.expect("x", shape))?;
    let mut at = Addresses::new();
    let y = at.write(&mut args.y);
    let raw = ffi::q3n_rope_args {
        struct_bytes: size_of::<ffi::q3n_rope_args>() as u64,
        y,
        x: args.x.map_or(y.cast_const(), |x| at.read(&x)),
        pos: at.indices("pos", &Some(args.pos), t)?,
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
    Ok((raw, at))
}
