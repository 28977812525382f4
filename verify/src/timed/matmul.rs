//! Y = X Wᵀ.

use super::{blocks, reference, repeated, unit, Timed, Work, SEED};
use crate::buffer::Layout;
use crate::cases::matmul::{Case, Matmul as Suite, Regime};
use crate::cases::quant::{Form, Type};
use crate::compare::{Failure, Metrics};
use crate::guard::Guarded;
use crate::peaks::Unit;
use crate::suite::rng;
use qwen3next_kernels::activations::Rows;
use qwen3next_kernels::matmul::{self, Op};
use qwen3next_kernels::{DType, Exec, Variant, View, ViewMut, Weight};
use rand::Rng as _;

/// `m` rows of x, `n` rows of w of `k` elements.
pub struct Matmul {
    dtype: Type,
    form: Form,
    shape: [usize; 3],
    x: Vec<f32>,
    q8: Option<Guarded<u8>>,
    w: Vec<u8>,
    w_dtype: DType,
    y: Vec<f32>,
}

impl Matmul {
    /// Inputs; `k` is a multiple of the type's block. `form` as far as the type allows it.
    pub fn new(m: usize, n: usize, k: usize, dtype: Type, form: Form) -> Result<Matmul, Failure> {
        let mut rng = rng(SEED);
        let form = form.for_weights(dtype.dtype(), n);
        let x: Vec<f32> = (0..m * k).map(|_| rng.random_range(-2.0f32..2.0)).collect();
        let w = repeated(n, 1024, |rows| dtype.random(rows * k, 1.0, &mut rng));
        let (w, w_dtype) = form.weights(&w, dtype.dtype(), k);
        let q8 = form.activations(View::new(&x, [m, k])?, dtype.dtype())?;
        Ok(Matmul { dtype, form, shape: [m, n, k], x, q8, w, w_dtype, y: vec![0.0; m * n] })
    }
}

impl Timed for Matmul {
    type Op = Op;

    fn judge(&self, variant: &Variant<Op>) -> Result<Metrics, Failure> {
        let [m, n, k] = self.shape;
        let case = Case {
            dtype: self.dtype,
            m: m.min(67),
            n: if self.form.is_interleaved() { n.min(80) } else { n.min(83) },
            blocks: blocks(k, self.dtype.dtype()),
            form: self.form,
            layout: Layout::Packed,
            regime: Regime::Mild,
        };
        reference::<Suite>(variant, &case)
    }

    fn run(&mut self, exec: &Exec<Op>) -> Result<(), Failure> {
        let [m, n, k] = self.shape;
        let args = matmul::Args {
            y: ViewMut::new(&mut self.y, [m, n])?,
            x: match &self.q8 {
                Some(bytes) => Rows::Q8(Weight::new(bytes, self.dtype.dtype().activations(), [m, k])?),
                None => View::new(&self.x, [m, k])?.into(),
            },
            w: Weight::new(&self.w, self.w_dtype, [n, k])?,
        };
        Ok(matmul::run(args, exec)?)
    }

    fn work(&self) -> Work {
        let [m, n, k] = self.shape.map(|n| n as f64);
        Work { ops: 2.0 * m * n * k, bytes: self.w.len() as f64 + 4.0 * (m * k + m * n) }
    }

    fn unit(&self, variant: &Variant<Op>) -> Unit {
        unit(self.form, variant.isa())
    }

    fn output(&mut self) -> &mut [f32] {
        &mut self.y
    }
}
