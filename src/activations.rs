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

use crate::memory::{Addresses, Cpu, Memory};
use crate::operator::{operator, Exec};
use crate::{ffi, DType, Error, View, ViewMut, Weight};

operator!(
    "activations",
    q3n_activations_args,
    q3n_activations_check,
    q3n_activations_variant_count,
    q3n_activations_variant_at,
    q3n_activations_best,
    [
        "cuda",
        q3n_activations_cuda,
        q3n_activations_cuda_scratch_bytes,
        q3n_activations_cuda_host_items,
        q3n_activations_cuda_host,
        q3n_activations_cuda_host_scratch_bytes
    ]
);

/// Rows of 8-bit activations. Keeps its memory, so that a warm one does not allocate.
#[derive(Debug)]
pub struct Q8<M: Memory = Cpu> {
    words: M::Vec<u32>,
    dtype: DType,
    rows: usize,
    cols: usize,
}

impl Clone for Q8 {
    fn clone(&self) -> Self {
        Q8 { words: self.words.clone(), ..*self }
    }
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
        let words = words(dtype, x.shape())?;
        let [rows, cols] = x.shape();
        (self.dtype, self.rows, self.cols) = (dtype, 0, 0);
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
        let mut at = Addresses::new();
        at.read(&x);
        let raw = raw(dtype, at.write(&mut ViewMut::new(&mut self.words, [words])?), &x);
        // SAFETY: `words` holds the bytes of the rows and is 4-byte aligned, the view lies inside its slice.
        unsafe { exec.execute(&raw, &at, rows.saturating_mul(cols).saturating_mul(2)) }?;
        (self.rows, self.cols) = (rows, cols);
        Ok(())
    }

    /// The memory of the rows, packed blocks of [`dtype`](Self::dtype), perhaps with more behind them.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: any u32 is four bytes.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast::<u8>(), 4 * self.words.len()) }
    }
}

#[cfg(any(feature = "cuda", feature = "cuda-host"))]
impl Q8<crate::device::Cuda> {
    /// No rows.
    pub fn on(device: &crate::device::Device) -> Result<Self, Error> {
        Ok(Q8 { words: device.zeros(0)?, dtype: DType::Q8_X256, rows: 0, cols: 0 })
    }

    /// As `quantize` on the CPU: queues it. Allocates where these are more rows than ever before.
    pub fn queue(
        &mut self,
        dtype: DType,
        x: View<2, f32, crate::device::Cuda>,
        stream: &crate::device::Stream,
    ) -> Result<(), Error> {
        let words = words(dtype, x.shape())?;
        (self.dtype, self.rows, self.cols) = (dtype, 0, 0);
        self.words.reserve(words)?;
        let mut at = Addresses::new();
        at.read(&x);
        let y = at.write(&mut self.words.view_mut([words])?);
        // SAFETY: `words` holds the bytes of the rows and is 4-byte aligned, the view lies inside its buffer.
        unsafe { stream.queue::<Op>(raw(dtype, y, &x), &at, |_| ()) }?;
        [self.rows, self.cols] = x.shape();
        Ok(())
    }
}

/// The words that rows of activations take.
fn words(dtype: DType, [rows, cols]: [usize; 2]) -> Result<usize, Error> {
    if !matches!(dtype, DType::Q8_X32 | DType::Q8_X256) {
        return Err(Error::argument("dtype", format!("{dtype} is no type of activations")));
    }
    let bytes = rows.checked_mul(cols).filter(|_| cols % dtype.block() == 0).and_then(|n| dtype.bytes(n));
    bytes.map(|bytes| bytes / 4).ok_or_else(|| {
        let block = dtype.block();
        Error::argument("x", format!("{rows} rows of {cols} values, expected a multiple of the block of {block}"))
    })
}

fn raw<M: Memory>(dtype: DType, y: *mut u32, x: &View<2, f32, M>) -> ffi::q3n_activations_args {
    let [rows, cols] = x.shape();
    ffi::q3n_activations_args {
        struct_bytes: size_of::<ffi::q3n_activations_args>() as u64,
        y: y.cast(),
        x: x.as_ptr(),
        dtype: dtype.0,
        x_row: x.stride(0),
        rows: rows as i64,
        N: cols as i64,
    }
}

impl<M: Memory> Q8<M> {
    /// Rows and their length.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// [`DType::Q8_X32`] or [`DType::Q8_X256`].
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The rows as bytes of [`dtype`](Self::dtype).
    pub fn view(&self) -> Weight<'_, 2, M> {
        let (words, shape) = (M::whole(&self.words), [self.rows, self.cols]);
        let (at, bytes) = (words.as_ptr().cast(), 4 * words.shape()[0]);
        // SAFETY: any u32 is four bytes.
        let rows = unsafe { Weight::over(at, bytes, self.dtype, shape, crate::view::packed(shape), words.id()) };
        rows.expect("quantize made room for these rows")
    }
}

/// Activations that meet weights: f32, or quantised for them.
#[derive(Debug)]
pub enum Rows<'a, M: Memory = Cpu> {
    /// As they are.
    F32(View<'a, 2, f32, M>),
    /// In the type that [`DType::activations`] of the weights names; the bytes start at an address that 4 divides.
    Q8(Weight<'a, 2, M>),
}

impl<M: Memory> Clone for Rows<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: Memory> Copy for Rows<'_, M> {}

impl<'a, M: Memory> From<View<'a, 2, f32, M>> for Rows<'a, M> {
    fn from(x: View<'a, 2, f32, M>) -> Self {
        Rows::F32(x)
    }
}

impl<'a, M: Memory> From<&'a Q8<M>> for Rows<'a, M> {
    fn from(x: &'a Q8<M>) -> Self {
        Rows::Q8(x.view())
    }
}

impl<M: Memory> Rows<'_, M> {
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

    pub(crate) fn read(&self, at: &mut Addresses<M>) -> *const std::ffi::c_void {
        match self {
            Rows::F32(x) => at.read(x).cast(),
            Rows::Q8(x) => at.weight(x),
        }
    }

    /// Error naming `arg` unless the shape is `expected`.
    pub(crate) fn expect(&self, arg: &'static str, expected: [usize; 2]) -> Result<(), Error> {
        crate::view::expect(arg, self.shape(), expected)
    }
}
