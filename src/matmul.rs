//! Y = X Wᵀ with quantised W (`csrc/matmul/matmul.h`).

use crate::activations::Rows;
use crate::memory::{Addresses, Cpu, Memory};
use crate::operator::{operator, Exec};
use crate::{ffi, Error, ViewMut, Weight};

operator!(
    "matmul",
    q3n_matmul_args,
    q3n_matmul_check,
    q3n_matmul_variant_count,
    q3n_matmul_variant_at,
    q3n_matmul_best,
    [
        "cuda",
        q3n_matmul_cuda,
        q3n_matmul_cuda_scratch_bytes,
        q3n_matmul_cuda_host_items,
        q3n_matmul_cuda_host,
        q3n_matmul_cuda_host_scratch_bytes
    ]
);

/// Arguments of [`run`].
pub struct Args<'a, M: Memory = Cpu> {
    /// Output, `[M][N]`.
    pub y: ViewMut<'a, 2, f32, M>,
    /// Activations, `[M][K]`, f32 or quantised for w.
    pub x: Rows<'a, M>,
    /// Weights, `[N][K]`.
    pub w: Weight<'a, 2, M>,
}

/// y\[m\]\[n\] = Σ x\[m\]\[k\] w\[n\]\[k\]; a batch gives the same bits as its rows one at a time. Errors: shapes
/// that do not fit together, activations of another type, interleaved weights whose rows are no multiple of 16,
/// overlapping output strides.
pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
    let ([m, _], [n, k]) = (args.y.shape(), args.w.shape());
    // Dequantising a row costs about as much as two dots with it.
    let cost = n.saturating_mul(k).saturating_mul(2 * m + 4);
    let (raw, at) = raw(&mut args)?;
    // SAFETY: every view lies inside its slice and has the shape that `raw` compared.
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
fn raw<M: Memory>(args: &mut Args<M>) -> Result<(ffi::q3n_matmul_args, Addresses<M>), Error> {
    let ([m, n], [_, k]) = (args.y.shape(), args.x.shape());
    args.x.expect("x", [m, k])?;
    args.w.expect("w", [n, k])?;
    let mut at = Addresses::new();
    let raw = ffi::q3n_matmul_args {
        struct_bytes: size_of::<ffi::q3n_matmul_args>() as u64,
        y: at.write(&mut args.y),
        x: args.x.read(&mut at),
        w: at.weight(&args.w),
        dtype: args.w.dtype().0,
        x_dtype: args.x.dtype().0,
        y_m: args.y.stride(0),
        x_m: args.x.stride(),
        w_n: args.w.stride(0),
        M: m as i64,
        N: n as i64,
        K: k as i64,
    };
    Ok((raw, at))
}
