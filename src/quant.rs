//! Block formats to and from f32 (`csrc/quant/quant.h`).

use crate::{DType, Error, Exec, View, ViewMut, Weight};

/// Blocks to f32.
pub mod dequantize {
    use crate::memory::{Addresses, Cpu, Memory};
    use crate::operator::{operator, Exec};
    use crate::{ffi, Error, ViewMut, Weight};

    operator!(
        "dequantize",
        q3n_dequantize_args,
        q3n_dequantize_check,
        q3n_dequantize_variant_count,
        q3n_dequantize_variant_at,
        q3n_dequantize_best,
        [
            "cuda",
            q3n_dequantize_cuda,
            q3n_dequantize_cuda_scratch_bytes,
            q3n_dequantize_cuda_host_items,
            q3n_dequantize_cuda_host,
            q3n_dequantize_cuda_host_scratch_bytes
        ]
    );

    /// Arguments of [`run`].
    pub struct Args<'a, M: Memory = Cpu> {
        /// Output, `[rows][N]`.
        pub y: ViewMut<'a, 2, f32, M>,
        /// Blocks, `[rows][N]`.
        pub x: Weight<'a, 2, M>,
    }

    /// The values that gguf-py gives, bit for bit. Errors: shapes that differ, overlapping output strides.
    pub fn run(mut args: Args, exec: &Exec<Op>) -> Result<(), Error> {
        let cost = args.y.shape().into_iter().fold(2, usize::saturating_mul);
        let (raw, at) = raw(&mut args)?;
        // SAFETY: both views lie inside their slices and have the same shape.
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
    fn raw<M: Memory>(args: &mut Args<M>) -> Result<(ffi::q3n_dequantize_args, Addresses<M>), Error> {
        let [rows, n] = args.y.shape();
        args.x.expect("x", [rows, n])?;
        let mut at = Addresses::new();
        let raw = ffi::q3n_dequantize_args {
            struct_bytes: size_of::<ffi::q3n_dequantize_args>() as u64,
            y: at.write(&mut args.y),
            x: at.weight(&args.x),
            dtype: args.x.dtype().0,
            y_row: args.y.stride(0),
            x_row: args.x.stride(0),
            rows: rows as i64,
            N: n as i64,
        };
        Ok((raw, at))
    }
}

/// f32 to blocks.
pub mod quantize {
    use crate::memory::Addresses;
    use crate::operator::{operator, Exec};
    use crate::{ffi, DType, Error, View, Weight};

    operator!(
        "quantize",
        q3n_quantize_args,
        q3n_quantize_check,
        q3n_quantize_variant_count,
        q3n_quantize_variant_at,
        q3n_quantize_best
    );

    /// Arguments of [`run`].
    pub struct Args<'a> {
        /// Output, `[rows][N]` of `dtype`.
        pub y: &'a mut [u8],
        /// Type to make.
        pub dtype: DType,
        /// Distance of y's rows in elements; `None`: packed.
        pub y_row: Option<usize>,
        /// Values, `[rows][N]`, N a multiple of the block.
        pub x: View<'a, 2>,
    }

    /// Quantises every row. A block with a NaN, an infinity or values beyond its scale decodes to NaN or infinity.
    /// Errors: N no multiple of the block, y too short, overlapping output strides.
    pub fn run(args: Args, exec: &Exec<Op>) -> Result<(), Error> {
        let [rows, n] = args.x.shape();
        let y_row = args.y_row.unwrap_or(n);
        // The checks of bytes, blocks and strides are those of a weight to read.
        Weight::strided(args.y, args.dtype, [rows, n], [y_row, 1])?;
        let raw = ffi::q3n_quantize_args {
            struct_bytes: size_of::<ffi::q3n_quantize_args>() as u64,
            y: args.y.as_mut_ptr().cast(),
            x: args.x.as_ptr(),
            dtype: args.dtype.0,
            y_row: y_row as i64,
            x_row: args.x.stride(0),
            rows: rows as i64,
            N: n as i64,
        };
        // SAFETY: x lies inside its slice, y was checked to hold a weight of the same shape.
        unsafe { exec.execute(&raw, &Addresses::new(), rows.saturating_mul(n).saturating_mul(64)) }
    }
}

/// `x` as packed rows of `dtype`. Errors: a row length that is no multiple of the block.
pub fn to_bytes(dtype: DType, x: View<2>) -> Result<Vec<u8>, Error> {
    let [rows, n] = x.shape();
    let bytes = rows.checked_mul(n).and_then(|n| dtype.bytes(n));
    let mut y = vec![0; bytes.ok_or_else(|| Error::argument("N", format!("{rows} rows of {n} are no {dtype}")))?];
    quantize::run(quantize::Args { y: &mut y, dtype, y_row: None, x }, &Exec::default())?;
    Ok(y)
}

/// `x` as packed rows of f32.
pub fn to_floats(x: Weight<2>) -> Result<Vec<f32>, Error> {
    let [rows, n] = x.shape();
    let mut y = vec![0.0; rows.saturating_mul(n)];
    dequantize::run(dequantize::Args { y: ViewMut::new(&mut y, [rows, n])?, x }, &Exec::default())?;
    Ok(y)
}
