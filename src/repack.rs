//! Run-time repack of weights into groups of 16 interleaved rows (`csrc/quant/repack.h`).

use crate::memory::Addresses;
use crate::operator::{operator, Exec};
use crate::{ffi, Error, Weight};

operator!(
    "repack",
    q3n_repack_args,
    q3n_repack_check,
    q3n_repack_variant_count,
    q3n_repack_variant_at,
    q3n_repack_best
);

/// Rows of a group.
pub const GROUP: usize = ffi::Q3N_GROUP_ROWS as usize;

/// Arguments of [`run`].
pub struct Args<'a> {
    /// Output: as many bytes as x's elements take.
    pub y: &'a mut [u8],
    /// `[rows][N]` of a block type.
    pub x: Weight<'a, 2>,
}

/// Interleaves the rows of x: y is then a packed weight of x's shape and of type [`crate::DType::interleaved`]. Errors:
/// a plain or interleaved type, rows that are no multiple of 16, y of another length.
pub fn run(args: Args, exec: &Exec<Op>) -> Result<(), Error> {
    let ([rows, n], dtype) = (args.x.shape(), args.x.dtype());
    let bytes = rows.checked_mul(n).and_then(|n| dtype.bytes(n));
    if bytes != Some(args.y.len()) {
        return Err(Error::Shape { arg: "y", got: vec![args.y.len()], expected: vec![bytes.unwrap_or(usize::MAX)] });
    }
    let raw = ffi::q3n_repack_args {
        struct_bytes: size_of::<ffi::q3n_repack_args>() as u64,
        y: args.y.as_mut_ptr().cast(),
        x: args.x.as_ptr(),
        dtype: dtype.0,
        x_row: args.x.stride(0),
        rows: rows as i64,
        N: n as i64,
    };
    // SAFETY: y has the bytes of x's elements, x lies inside its slice.
    unsafe { exec.execute(&raw, &Addresses::new(), args.y.len()) }
}
