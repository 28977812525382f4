//! Activations quantised to 8 bits, once a row, for all the weights they meet (`csrc/quant/activations.h`).
//!
//! ```
//! use qwen3next_kernels::{activations::Q8, matmul, DType, View, ViewMut, Weight};
//! let (x, w) = ([0.5f32; 64], [0u8; 4 * 34]); // w: two rows of 64 in Q8_0, all zero
//! let (mut q, mut y) = (Q8::default(), [1.0f32; 2]);
//! q.quantize(DType::Q8_0.activations(), View::new(&x, [1, 64])?, &Default::default())?;
//! let w = Weight::new(&w, DType::Q8_0, [2, 64])?;
//! matmul::run(matmul::Args { y: ViewMut::new(&mut y, [1, 2])?, x: (&q).into(), w }, &Default::default())?;
//! assert_eq!(y, [0.0, 0.0]);
//! # Ok::<(), qwen3next_kernels::Error>(())
//! ```

use crate::operator::{operator, Exec};
use crate::{ffi, DType, Error, View, Weight};

operator!(
    "activations",
    q3n_activations_args,
    q3n_activations_check,
    q3n_activations_variant_count,
    q3n_activations_variant_at,
    q3n_activations_best
);

/// Rows of 8-bit activations. Keeps its memory, so that a warm one does not allocate.
#[derive(Debug, Clone)]
pub struct Q8 {
    words: Vec<u32>,
    dtype: DType,
    rows: usize,
    cols: usize,
}

impl Default for Q8 {
    /// No rows.
    fn default() -> Self {
        Q8 { words: Vec::new(), dtype: DType::Q8_X256, rows: 0, cols: 0 }
    }
}

impl Q8 {
    /// Replaces the contents by the rows of `x` in `dtype`, [`DType::Q8_X32`] or [`DType::Q8_X256`]. Errors: another
    /// type, a row length that is no multiple of its block.
    pub fn quantize(&mut self, dtype: DType, x: View<2>, exec: &Exec<Op>) -> Result<(), Error> {
        let [rows, cols] = x.shape();
        if !matches!(dtype, DType::Q8_X32 | DType::Q8_X256) {
            return Err(Error::argument("dtype", format!("{dtype} is no type of activations")));
        }
        let bytes = rows.checked_mul(cols).filter(|_| cols % dtype.block() == 0).and_then(|n| dtype.bytes(n));
        let bytes = bytes.ok_or_else(|| {
            let block = dtype.block();
            Error::argument("x", format!("{rows} rows of {cols} values, expected a multiple of the block of {block}"))
        })?;
        (self.dtype, self.rows, self.cols) = (dtype, 0, 0);
        if self.words.len() < bytes / 4 {
            self.words.resize(bytes / 4, 0);
        }
        let raw = ffi::q3n_activations_args {
            struct_bytes: size_of::<ffi::q3n_activations_args>() as u64,
            y: self.words.as_mut_ptr().cast(),
            x: x.as_ptr(),
            dtype: dtype.0,
            x_row: x.stride(0),
            rows: rows as i64,
            N: cols as i64,
        };
        // SAFETY: `words` holds the bytes of the rows and is 4-byte aligned, the view lies inside its slice.
        unsafe { exec.execute(&raw, rows.saturating_mul(cols).saturating_mul(2)) }?;
        (self.rows, self.cols) = (rows, cols);
        Ok(())
    }

    /// Rows and their length.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// [`DType::Q8_X32`] or [`DType::Q8_X256`].
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The memory of the rows, packed blocks of [`dtype`](Self::dtype), perhaps with more behind them.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: any u32 is four bytes.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast::<u8>(), 4 * self.words.len()) }
    }

    /// The rows as bytes of [`dtype`](Self::dtype).
    pub fn view(&self) -> Weight<'_, 2> {
        Weight::new(self.bytes(), self.dtype, [self.rows, self.cols]).expect("quantize made room for these rows")
    }
}

/// Activations that meet weights: f32, or quantised for them.
#[derive(Debug, Clone, Copy)]
pub enum Rows<'a> {
    /// As they are.
    F32(View<'a, 2>),
    /// In the type that [`DType::activations`] of the weights names; the bytes start at an address that 4 divides.
    Q8(Weight<'a, 2>),
}

impl<'a> From<View<'a, 2>> for Rows<'a> {
    fn from(x: View<'a, 2>) -> Self {
        Rows::F32(x)
    }
}

impl<'a> From<&'a Q8> for Rows<'a> {
    fn from(x: &'a Q8) -> Self {
        Rows::Q8(x.view())
    }
}

impl Rows<'_> {
    /// Rows and their length.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Rows::F32(x) => x.shape(),
            Rows::Q8(x) => x.shape(),
        }
    }

    /// F32, or the type of quantised activations.
    pub fn dtype(&self) -> DType {
        match self {
            Rows::F32(_) => DType::F32,
            Rows::Q8(x) => x.dtype(),
        }
    }

    pub(crate) fn stride(&self) -> i64 {
        match self {
            Rows::F32(x) => x.stride(0),
            Rows::Q8(x) => x.stride(0),
        }
    }

    pub(crate) fn as_ptr(&self) -> *const std::ffi::c_void {
        match self {
            Rows::F32(x) => x.as_ptr().cast(),
            Rows::Q8(x) => x.as_ptr(),
        }
    }

    /// Error naming `arg` unless the shape is `expected`.
    pub(crate) fn expect(&self, arg: &'static str, expected: [usize; 2]) -> Result<(), Error> {
        if self.shape() == expected {
            return Ok(());
        }
        Err(Error::Shape { arg, got: self.shape().to_vec(), expected: expected.to_vec() })
    }
}
