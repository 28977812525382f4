//! Y = X Wᵀ with quantised W (`csrc/matmul/matmul.h`).

use crate::activations::Rows;
use crate::operator::{operator, Exec};
use crate::{ffi, Error, ViewMut, Weight};

operator!(
    "matmul",
    q3n_matmul_args,
    q3n_matmul_check,
    q3n_matmul_variant_count,
    q3n_matmul_variant_at,
    q3n_matmul_best
);

/// Arguments of [`run`].
pub struct Args<'a> {
    /// Output, `[M][N]`.
    pub y: ViewMut<'a, 2>,
    /// Activations, `[M][K]`, f32 or quantised for w.
    pub x: Rows<'a>,
    /// Weights, `[N][K]`.
    pub w: Weight<'a, 2>,
}

/// y\[m\]\[n\] = Σ x\[m\]\[k\] w\[n\]\[k\]; a batch gives the same bits as its rows one at a time. Errors: shapes
/// that do not fit together, activations of another type, interleaved weights whose rows are no multiple of 16,
/// overlapping output strides.
pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
    let ([m, n], [_, k]) = (args.y.shape(), args.x.shape());
    args.x.expect("x", [m, k])?;
    args.w.expect("w", [n, k])?;
    let raw = ffi::q3n_matmul_args {
        struct_bytes: size_of::<ffi::q3n_matmul_args>() as u64,
        y: args.y.as_mut_ptr(),
        x: args.x.as_ptr(),
        w: args.w.as_ptr(),
        dtype: args.w.dtype().0,
        x_dtype: args.x.dtype().0,
        y_m: args.y.stride(0),
        x_m: args.x.stride(),
        w_n: args.w.stride(0),
        M: m as i64,
        N: n as i64,
        K: k as i64,
    };
    // Dequantising a row costs about as much as two dots with it.
    let cost = n.saturating_mul(k).saturating_mul(2 * m + 4);
    // SAFETY: every view lies inside its slice and has the shape just compared.
    unsafe { exec.execute(&raw, cost) }
}
