//! Y = X Wᵀ.

use super::{blocks, reference, repeated, Timed, Work, SEED};
use crate::buffer::Layout;
use crate::cases::matmul::{Case, Matmul as Suite, Regime};
use crate::cases::quant::Type;
use crate::compare::{Failure, Metrics};
use crate::suite::rng;
use qwen3next_kernels::matmul::{self, Op};
use qwen3next_kernels::{Exec, Variant, View, ViewMut, Weight};
use rand::Rng as _;

/// `m` rows of x, `n` rows of w of `k` elements.
pub struct Matmul {
    dtype: Type,
    shape: [usize; 3],
    x: Vec<f32>,
    w: Vec<u8>,
    y: Vec<f32>,
}

impl Matmul {
    /// Inputs; `k` is a multiple of the type's block.
    pub fn new(m: usize, n: usize, k: usize, dtype: Type) -> Matmul {
        let mut rng = rng(SEED);
        let x = (0..m * k).map(|_| rng.random_range(-2.0f32..2.0)).collect();
        let w = repeated(n, 1024, |rows| dtype.random(rows * k, 1.0, &mut rng));
        Matmul { dtype, shape: [m, n, k], x, w, y: vec![0.0; m * n] }
    }
}

impl Timed for Matmul {
    type Op = Op;

    fn judge(&self, variant: &Variant<Op>) -> Result<Metrics, Failure> {
        let [m, n, k] = self.shape;
        let case = Case {
            dtype: self.dtype,
            m: m.min(67),
            n: n.min(83),
            blocks: blocks(k, self.dtype.dtype()),
            layout: Layout::Packed,
            regime: Regime::Mild,
        };
        reference::<Suite>(variant, &case)
    }

    fn run(&mut self, exec: &Exec<Op>) -> Result<(), Failure> {
        let [m, n, k] = self.shape;
        let args = matmul::Args {
            y: ViewMut::new(&mut self.y, [m, n])?,
            x: View::new(&self.x, [m, k])?.into(),
            w: Weight::new(&self.w, self.dtype.dtype(), [n, k])?,
        };
        Ok(matmul::run(args, exec)?)
    }

    fn work(&self) -> Work {
        let [m, n, k] = self.shape.map(|n| n as f64);
        Work { ops: 2.0 * m * n * k, bytes: self.w.len() as f64 + 4.0 * (m * k + m * n) }
    }

    fn output(&mut self) -> &mut [f32] {
        &mut self.y
    }
}
