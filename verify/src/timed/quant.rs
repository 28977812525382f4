//! Block formats to and from f32.

use super::{blocks, reference, Timed, Work, SEED};
use crate::buffer::Layout;
use crate::cases::normal;
use crate::cases::quant::{Case, Dequantize as DequantizeSuite, Quantize as QuantizeSuite, Type};
use crate::compare::{Failure, Metrics};
use crate::suite::rng;
use qwen3next_kernels::quant::{dequantize, quantize};
use qwen3next_kernels::{Exec, Variant, View, ViewMut, Weight};

fn case(dtype: Type, rows: usize, n: usize) -> Case {
    Case { dtype, rows: rows.min(64), blocks: blocks(n, dtype.dtype()), layout: Layout::Packed }
}

/// `rows` rows of `n` elements to f32.
pub struct Dequantize {
    dtype: Type,
    shape: [usize; 2],
    x: Vec<u8>,
    y: Vec<f32>,
}

impl Dequantize {
    /// Inputs; `n` is a multiple of the type's block.
    pub fn new(rows: usize, n: usize, dtype: Type) -> Dequantize {
        let x = dtype.random(rows * n, 1.0, &mut rng(SEED));
        Dequantize { dtype, shape: [rows, n], x, y: vec![0.0; rows * n] }
    }
}

impl Timed for Dequantize {
    type Op = dequantize::Op;

    fn judge(&self, variant: &Variant<dequantize::Op>) -> Result<Metrics, Failure> {
        let [rows, n] = self.shape;
        reference::<DequantizeSuite>(variant, &case(self.dtype, rows, n))
    }

    fn run(&mut self, exec: &Exec<dequantize::Op>) -> Result<(), Failure> {
        let x = Weight::new(&self.x, self.dtype.dtype(), self.shape)?;
        Ok(dequantize::run(dequantize::Args { y: ViewMut::new(&mut self.y, self.shape)?, x }, exec)?)
    }

    /// A product and a sum an element.
    fn work(&self) -> Work {
        Work { ops: 2.0 * self.y.len() as f64, bytes: (self.x.len() + 4 * self.y.len()) as f64 }
    }

    fn output(&mut self) -> &mut [f32] {
        &mut self.y
    }
}

/// `rows` rows of `n` floats to a type.
pub struct Quantize {
    dtype: Type,
    shape: [usize; 2],
    x: Vec<f32>,
    y: Vec<u8>,
}

impl Quantize {
    /// Inputs; `n` is a multiple of the type's block.
    pub fn new(rows: usize, n: usize, dtype: Type) -> Quantize {
        let mut rng = rng(SEED);
        let x: Vec<f32> = (0..rows * n).map(|_| normal(&mut rng)).collect();
        let bytes = rows * blocks(n, dtype.dtype()) * dtype.dtype().block_bytes();
        Quantize { dtype, shape: [rows, n], x, y: vec![0; bytes] }
    }
}

impl Timed for Quantize {
    type Op = quantize::Op;

    fn judge(&self, variant: &Variant<quantize::Op>) -> Result<Metrics, Failure> {
        let [rows, n] = self.shape;
        reference::<QuantizeSuite>(variant, &case(self.dtype, rows, n))
    }

    fn run(&mut self, exec: &Exec<quantize::Op>) -> Result<(), Failure> {
        let x = View::new(&self.x, self.shape)?;
        Ok(quantize::run(quantize::Args { y: &mut self.y, dtype: self.dtype.dtype(), y_row: None, x }, exec)?)
    }

    /// Largest value, product and rounding an element; the K types search, which is not counted.
    fn work(&self) -> Work {
        Work { ops: 3.0 * self.x.len() as f64, bytes: (4 * self.x.len() + self.y.len()) as f64 }
    }

    fn output(&mut self) -> &mut [f32] {
        &mut []
    }
}
