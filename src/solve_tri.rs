//! Batched triangular solve, X from L X = B (`csrc/solve_tri/solve_tri.h`).

use crate::operator::{operator, Exec};
use crate::{ffi, Error, View, ViewMut};

operator!(
    "solve_tri",
    q3n_solve_tri_args,
    q3n_solve_tri_check,
    q3n_solve_tri_variant_count,
    q3n_solve_tri_variant_at,
    q3n_solve_tri_best
);

/// Arguments of [`run`].
pub struct Args<'a> {
    /// Output, `[batch][n][m]`.
    pub x: ViewMut<'a, 3>,
    /// Lower triangular, `[batch][n][n]`, n ≤ 256; elements above the diagonal are never read.
    pub l: View<'a, 3>,
    /// Right-hand sides, `[batch][n][m]`; `None` is the identity (m = n), so that x is the inverse of l.
    pub b: Option<View<'a, 3>>,
    /// The diagonal counts as 1 and is not read.
    pub unit_diagonal: bool,
}

/// Solves every batch entry. Errors: shapes that do not fit together, n > 256, overlapping output strides.
pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
    let [batch, n, m] = args.x.shape();
    args.l.expect("l", [batch, n, n])?;
    if let Some(b) = &args.b {
        b.expect("b", [batch, n, m])?;
    }
    let raw = ffi::q3n_solve_tri_args {
        struct_bytes: size_of::<ffi::q3n_solve_tri_args>() as u64,
        x: args.x.as_mut_ptr(),
        l: args.l.as_ptr(),
        b: args.b.map_or(std::ptr::null(), |b| b.as_ptr()),
        unit_diagonal: args.unit_diagonal.into(),
        x_batch: args.x.stride(0),
        x_row: args.x.stride(1),
        l_batch: args.l.stride(0),
        l_row: args.l.stride(1),
        b_batch: args.b.map_or(0, |b| b.stride(0)),
        b_row: args.b.map_or(0, |b| b.stride(1)),
        batch: batch as i64,
        n: n as i64,
        m: m as i64,
    };
    // SAFETY: every view lies inside its slice and has the shape just compared.
    unsafe { exec.execute(&raw, batch.saturating_mul(n * n).saturating_mul(m)) }
}
