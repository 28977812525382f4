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

/// Arguments of [`run_in_place`].
pub struct InPlace<'a> {
    /// Right-hand sides in, solution out, `[batch][n][m]`.
    pub x: ViewMut<'a, 3>,
    /// As in [`Args`].
    pub l: View<'a, 3>,
    /// As in [`Args`].
    pub unit_diagonal: bool,
}

/// Solves every batch entry. Errors: shapes that do not fit together, n > 256, overlapping output strides.
pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
    if let Some(b) = &args.b {
        b.expect("b", args.x.shape())?;
    }
    let mut raw = raw(&mut args.x, args.l, args.unit_diagonal)?;
    if let Some(b) = args.b {
        (raw.b, raw.b_batch, raw.b_row) = (b.as_ptr(), b.stride(0), b.stride(1));
    }
    // SAFETY: every view lies inside its slice and has the shape just compared.
    unsafe { exec.execute(&raw, cost(&raw)) }
}

/// As [`run`], with the right-hand sides overwritten by the solution.
pub fn run_in_place(mut args: InPlace, exec: &Exec<Op>) -> Result<(), Error> {
    let mut raw = raw(&mut args.x, args.l, args.unit_diagonal)?;
    (raw.b, raw.b_batch, raw.b_row) = (raw.x, raw.x_batch, raw.x_row);
    // SAFETY: as in `run`; the header allows b to be x with the same strides.
    unsafe { exec.execute(&raw, cost(&raw)) }
}

/// Args with b = NULL, shapes of x and l compared.
fn raw(x: &mut ViewMut<3>, l: View<3>, unit_diagonal: bool) -> Result<ffi::q3n_solve_tri_args, Error> {
    let [batch, n, m] = x.shape();
    l.expect("l", [batch, n, n])?;
    Ok(ffi::q3n_solve_tri_args {
        struct_bytes: size_of::<ffi::q3n_solve_tri_args>() as u64,
        x: x.as_mut_ptr(),
        l: l.as_ptr(),
        b: std::ptr::null(),
        unit_diagonal: unit_diagonal.into(),
        x_batch: x.stride(0),
        x_row: x.stride(1),
        l_batch: l.stride(0),
        l_row: l.stride(1),
        b_batch: 0,
        b_row: 0,
        batch: batch as i64,
        n: n as i64,
        m: m as i64,
    })
}

fn cost(raw: &ffi::q3n_solve_tri_args) -> usize {
    (raw.batch as usize).saturating_mul((raw.n * raw.n) as usize).saturating_mul(raw.m as usize)
}
