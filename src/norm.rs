//! RMS norms, gated RMS norm, L2 norm (`csrc/norm/norm.h`).

use crate::operator::{operator, Exec};
use crate::{ffi, Error, View, ViewMut};

operator!("norm", q3n_norm_args, q3n_norm_check, q3n_norm_variant_count, q3n_norm_variant_at, q3n_norm_best);

/// Which norm, with what it needs beside x.
#[derive(Debug, Clone, Copy)]
pub enum Kind<'a> {
    /// x / √(mean x² + eps) · w, w `[D]`; `None` is all ones.
    Rms(Option<&'a [f32]>),
    /// x / √(mean x² + eps) · (1 + w), w `[D]`: zero-centred weights.
    RmsPlus1(&'a [f32]),
    /// x / √(mean x² + eps) · w · silu(z): norm first, then the gate.
    RmsGated {
        /// `[D]`; `None` is all ones.
        w: Option<&'a [f32]>,
        /// `[T][H][D]`.
        z: View<'a, 3>,
    },
    /// x / √(Σx² + eps).
    L2,
}

/// Arguments of [`run`].
pub struct Args<'a> {
    /// Output, `[T][H][D]`; each row of D is normed on its own.
    pub y: ViewMut<'a, 3>,
    /// Input, `[T][H][D]`; `None`: y holds it and is normed in place.
    pub x: Option<View<'a, 3>>,
    /// The formula.
    pub kind: Kind<'a>,
    /// Added to the mean (L2: to the sum), ≥ 0.
    pub eps: f32,
}

/// Norms every row. Errors: shapes that do not fit together, eps below 0 or NaN, overlapping output strides.
pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
    let [t, h, d] = args.y.shape();
    if let Some(x) = &args.x {
        x.expect("x", [t, h, d])?;
    }
    let (kind, w, z) = match args.kind {
        Kind::Rms(w) => (ffi::Q3N_NORM_RMS, w, None),
        Kind::RmsPlus1(w) => (ffi::Q3N_NORM_RMS_PLUS1, Some(w), None),
        Kind::RmsGated { w, z } => (ffi::Q3N_NORM_RMS_GATED, w, Some(z)),
        Kind::L2 => (ffi::Q3N_NORM_L2, None, None),
    };
    if let Some(w) = w {
        View::new(w, [w.len()])?.expect("w", [d])?;
    }
    if let Some(z) = &z {
        z.expect("z", [t, h, d])?;
    }
    let y = args.y.as_mut_ptr();
    let raw = ffi::q3n_norm_args {
        struct_bytes: size_of::<ffi::q3n_norm_args>() as u64,
        y,
        x: args.x.map_or(y.cast_const(), |x| x.as_ptr()),
        w: w.map_or(std::ptr::null(), |w| w.as_ptr()),
        z: z.map_or(std::ptr::null(), |z| z.as_ptr()),
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
    // SAFETY: every view lies inside its slice and has the shape just compared; w has D elements.
    unsafe { exec.execute(&raw, t.saturating_mul(h).saturating_mul(d).saturating_mul(4)) }
}

/// On a device: [`run`](super::run) with everything in its memory.
#[cfg(feature = "cuda")]
pub mod cuda {
    use super::Op;
    use crate::device::{DeviceView, DeviceViewMut, Stream};
    use crate::{ffi, Error, Operator};

    /// As [`super::Kind`].
    #[derive(Debug, Clone, Copy)]
    pub enum Kind<'a> {
        /// w `[D]`; `None` is all ones.
        Rms(Option<DeviceView<'a, 1>>),
        /// w `[D]`, zero-centred.
        RmsPlus1(DeviceView<'a, 1>),
        /// Norm first, then the gate.
        RmsGated {
            /// `[D]`; `None` is all ones.
            w: Option<DeviceView<'a, 1>>,
            /// `[T][H][D]`.
            z: DeviceView<'a, 3>,
        },
        /// x / √(Σx² + eps).
        L2,
    }

    /// As [`super::Args`].
    pub struct Args<'a> {
        /// Output, `[T][H][D]`.
        pub y: DeviceViewMut<'a, 3>,
        /// Input, `[T][H][D]`; `None`: y is normed in place.
        pub x: Option<DeviceView<'a, 3>>,
        /// The formula.
        pub kind: Kind<'a>,
        /// Added to the mean (L2: to the sum), ≥ 0.
        pub eps: f32,
    }

    /// Queues the norm: the same checks as [`super::run`], and the same errors before anything runs.
    pub fn run(args: Args, stream: &Stream) -> Result<(), Error> {
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
        let y = args.y.at();
        let raw = ffi::q3n_norm_args {
            struct_bytes: size_of::<ffi::q3n_norm_args>() as u64,
            y,
            x: args.x.map_or(y, |x| x.at()),
            w: w.map_or(std::ptr::null(), |w| w.at().cast_const()),
            z: z.map_or(std::ptr::null(), |z| z.at().cast_const()),
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
        crate::status::check("norm", Op::check(&raw))?;
        let on = [
            args.y.device(),
            args.x.as_ref().and_then(DeviceView::device),
            w.as_ref().and_then(DeviceView::device),
            z.as_ref().and_then(DeviceView::device),
        ];
        // SAFETY: every view lies inside its buffer on the stream's device and has the shape just compared; `raw` passed
        // the operator's check; freeing a buffer waits for the work.
        stream.launch("norm", &on, |s| unsafe { ffi::q3n_norm_cuda(&raw, std::ptr::null_mut(), s) })
    }
}
