//! Batched triangular solve, X from L X = B (`csrc/solve_tri/solve_tri.h`).

use crate::memory::{Addresses, Cpu, Memory};
use crate::operator::{operator, Exec};
use crate::{ffi, Error, View, ViewMut};

operator!(
    "solve_tri",
    q3n_solve_tri_args,
    q3n_solve_tri_check,
    q3n_solve_tri_variant_count,
    q3n_solve_tri_variant_at,
    q3n_solve_tri_best,
    [
        "cuda",
        q3n_solve_tri_cuda,
        q3n_solve_tri_cuda_scratch_bytes,
        q3n_solve_tri_cuda_host_items,
        q3n_solve_tri_cuda_host,
        q3n_solve_tri_cuda_host_scratch_bytes
    ]
);

/// Arguments of [`run`].
pub struct Args<'a, M: Memory = Cpu> {
    /// Output, `[batch][n][m]`.
    pub x: ViewMut<'a, 3, f32, M>,
    /// Lower triangular, `[batch][n][n]`, n ≤ 256; elements above the diagonal are never read.
    pub l: View<'a, 3, f32, M>,
    /// Right-hand sides, `[batch][n][m]`; `None` is the identity (m = n), so that x is the inverse of l.
    pub b: Option<View<'a, 3, f32, M>>,
    /// The diagonal counts as 1 and is not read.
    pub unit_diagonal: bool,
}

/// Arguments of [`run_in_place`].
pub struct InPlace<'a, M: Memory = Cpu> {
    /// Right-hand sides in, solution out, `[batch][n][m]`.
    pub x: ViewMut<'a, 3, f32, M>,
    /// As in [`Args`].
    pub l: View<'a, 3, f32, M>,
    /// As in [`Args`].
    pub unit_diagonal: bool,
}

/// Solves every batch entry. Errors: shapes that do not fit together, n > 256, overlapping output strides.
pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
    let (raw, at) = raw(&mut args.x, args.l, args.b, args.unit_diagonal)?;
    // SAFETY: every view lies inside its slice and has the shape that `raw` compared.
    unsafe { exec.execute(&raw, &at, cost(&raw)) }
}

/// As [`run`], with the right-hand sides overwritten by the solution.
pub fn run_in_place(mut args: InPlace, exec: &Exec<Op>) -> Result<(), Error> {
    let (mut raw, at) = raw(&mut args.x, args.l, None, args.unit_diagonal)?;
    in_place(&mut raw);
    // SAFETY: as in `run`; the header allows b to be x with the same strides.
    unsafe { exec.execute(&raw, &at, cost(&raw)) }
}

/// As [`run`], on a device: queues it.
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
pub fn queue(mut args: Args<crate::device::Cuda>, stream: &crate::device::Stream) -> Result<(), Error> {
    let (raw, at) = raw(&mut args.x, args.l, args.b, args.unit_diagonal)?;
    // SAFETY: as in `run`, with buffers for slices.
    unsafe { stream.queue::<Op>(raw, &at, |_| ()) }
}

/// As [`run_in_place`], on a device: queues it.
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
pub fn queue_in_place(mut args: InPlace<crate::device::Cuda>, stream: &crate::device::Stream) -> Result<(), Error> {
    let (mut raw, at) = raw(&mut args.x, args.l, None, args.unit_diagonal)?;
    in_place(&mut raw);
    // SAFETY: as in `run_in_place`, with buffers for slices.
    unsafe { stream.queue::<Op>(raw, &at, |_| ()) }
}

fn in_place(raw: &mut ffi::q3n_solve_tri_args) {
    (raw.b, raw.b_batch, raw.b_row) = (raw.x, raw.x_batch, raw.x_row);
}

/// The C args, shapes compared, and where they lie.
fn raw<M: Memory>(
    x: &mut ViewMut<3, f32, M>,
    l: View<3, f32, M>,
    b: Option<View<3, f32, M>>,
    unit_diagonal: bool,
) -> Result<(ffi::q3n_solve_tri_args, Addresses<M>), Error> {
    let shape @ [batch, n, m] = x.shape();
    l.expect("l", [batch, n, n])?;
    b.map_or(Ok(()), |b| b.expect("b", shape))?;
    let [b_batch, b_row] = b.map_or([0; 2], |b| b.outer());
    let mut at = Addresses::new();
    let raw = ffi::q3n_solve_tri_args {
        struct_bytes: size_of::<ffi::q3n_solve_tri_args>() as u64,
        x: at.write(x),
        l: at.read(&l),
        b: at.read_some(&b),
        unit_diagonal: unit_diagonal.into(),
        x_batch: x.stride(0),
        x_row: x.stride(1),
        l_batch: l.stride(0),
        l_row: l.stride(1),
        b_batch,
        b_row,
        batch: batch as i64,
        n: n as i64,
        m: m as i64,
    };
    Ok((raw, at))
}

fn cost(raw: &ffi::q3n_solve_tri_args) -> usize {
    (raw.batch as usize).saturating_mul((raw.n * raw.n) as usize).saturating_mul(raw.m as usize)
}
