//! RMS norms, gated RMS norm, L2 norm (`csrc/norm/norm.h`).

use crate::memory::{Addresses, Cpu, Memory};
use crate::operator::{operator, Exec};
use crate::{ffi, Error, View, ViewMut};

operator!(
    "norm",
    q3n_norm_args,
    q3n_norm_check,
    q3n_norm_variant_count,
    q3n_norm_variant_at,
    q3n_norm_best,
    [
        "cuda",
        q3n_norm_cuda,
        q3n_norm_cuda_scratch_bytes,
        q3n_norm_cuda_host_items,
        q3n_norm_cuda_host,
        q3n_norm_cuda_host_scratch_bytes
    ]
);

/// Which norm, with what it needs beside x.
#[derive(Debug, Clone, Copy)]
pub enum Kind<'a, M: Memory = Cpu> {
    /// x / √(mean x² + eps) · w, w `[D]`; `None` is all ones.
    Rms(Option<View<'a, 1, f32, M>>),
    /// x / √(mean x² + eps) · (1 + w), w `[D]`: zero-centred weights.
    RmsPlus1(View<'a, 1, f32, M>),
    /// x / √(mean x² + eps) · w · silu(z): norm first, then the gate.
    RmsGated {
        /// `[D]`; `None` is all ones.
        w: Option<View<'a, 1, f32, M>>,
        /// `[T][H][D]`.
        z: View<'a, 3, f32, M>,
    },
    /// x / √(Σx² + eps).
    L2,
}

/// Arguments of [`run`].
pub struct Args<'a, M: Memory = Cpu> {
    /// Output, `[T][H][D]`; each row of D is normed on its own.
    pub y: ViewMut<'a, 3, f32, M>,
    /// Input, `[T][H][D]`; `None`: y holds it and is normed in place.
    pub x: Option<View<'a, 3, f32, M>>,
    /// The formula.
    pub kind: Kind<'a, M>,
    /// Added to the mean (L2: to the sum), ≥ 0.
    pub eps: f32,
}

/// Norms every row. Errors: shapes that do not fit together, eps below 0 or NaN, overlapping output strides.
pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
    let cost = args.y.shape().into_iter().fold(4, usize::saturating_mul);
    let (raw, at) = raw(&mut args)?;
    // SAFETY: every view lies inside its slice and has the shape that `raw` compared; w has D elements.
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
fn raw<M: Memory>(args: &mut Args<M>) -> Result<(ffi::q3n_norm_args, Addresses<M>), Error> {
    let shape @ [t, h, d] = args.y.shape();
    let (kind, w, z) = match args.kind {
        Kind::Rms(w) => (ffi::Q3N_NORM_RMS, w, None),
        Kind::RmsPlus1(w) => (ffi::Q3N_NORM_RMS_PLUS1, Some(w), None),
        Kind::RmsGated { w, z } => (ffi::Q3N_NORM_RMS_GATED, w, Some(z)),
        Kind::L2 => (ffi::Q3N_NORM_L2, None, None),
    };
    args.x.map_or(Ok(()), |x| x.expect("x", shape))?;
    w.map_or(Ok(()), |w| w.expect("w", [d]))?;
    z.map_or(Ok(()), |z| z.expect("z", shape))?;
    let mut at = Addresses::new();
    let y = at.write(&mut args.y);
    let raw = ffi::q3n_norm_args {
        struct_bytes: size_of::<ffi::q3n_norm_args>() as u64,
        y,
        x: args.x.map_or(y.cast_const(), |x| at.read(&x)),
        w: at.read_some(&w),
        z: at.read_some(&z),
        kind,
        eps: args.eps,
        y_t: args.y.stride(0),
        y_h: args.y.stride(1),
        x_t: args.x.map_or(args.y.stride(0), |x| x.stride(0)),
        x_h: args.x.map_or(args.y.stride(1), |x| x.stride(1)),
        z_t: z.map_or(0, |z| z.stride(0)),
        z_h: z.map_or(0, |z| z.stride(1)),
        T: t as i64,
        H: h as i64,
        D: d as i64,
    };
    Ok((raw, at))
}
