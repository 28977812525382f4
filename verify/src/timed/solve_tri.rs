//! Triangular systems as the delta rule's chunks make them.

use super::{reference, Timed, Work, SEED};
use crate::buffer::Layout;
use crate::cases::solve_tri::{Case, Inputs, Regime, SolveTri as Suite};
use crate::compare::{Failure, Metrics};
use qwen3next_kernels::solve_tri::{self, Op};
use qwen3next_kernels::{Exec, Variant, View, ViewMut};

/// A batch of unit lower triangles.
pub struct SolveTri {
    case: Case,
    inputs: Inputs,
    x: Vec<f32>,
}

impl SolveTri {
    /// `batch` triangles of `n` rows with `m` right-hand sides; `None`: their inverses.
    pub fn new(batch: usize, n: usize, m: Option<usize>) -> SolveTri {
        let (inverse, m) = (m.is_none(), m.unwrap_or(n));
        let case = Case { batch, n, m, unit: true, inverse, layout: Layout::Packed, regime: Regime::Delta };
        SolveTri { x: vec![0.0; batch * n * m], inputs: Inputs::generate(&case, SEED), case }
    }
}

impl Timed for SolveTri {
    type Op = Op;

    fn judge(&self, variant: &Variant<Op>) -> Result<Metrics, Failure> {
        reference::<Suite>(variant, &Case { batch: self.case.batch.min(8), ..self.case.clone() })
    }

    fn run(&mut self, exec: &Exec<Op>) -> Result<(), Failure> {
        let Case { batch, n, m, inverse, .. } = self.case;
        let b = match inverse {
            true => None,
            false => Some(View::new(&self.inputs.b, [batch, n, m])?),
        };
        let args = solve_tri::Args {
            x: ViewMut::new(&mut self.x, [batch, n, m])?,
            l: View::new(&self.inputs.l, [batch, n, n])?,
            b,
            unit_diagonal: true,
        };
        Ok(solve_tri::run(args, exec)?)
    }

    /// A product and a sum for every element below the diagonal and right-hand side; a third of that for the inverse,
    /// which is a triangle itself.
    fn work(&self) -> Work {
        let Case { batch, n, m, inverse, .. } = self.case;
        let pairs = (n * n.saturating_sub(1) / 2) as f64;
        let columns = if inverse { (n + 1) as f64 / 3.0 } else { m as f64 };
        let right = if inverse { 0 } else { n * m };
        let elements = batch * (pairs as usize + right + n * m);
        Work { ops: 2.0 * batch as f64 * pairs * columns, bytes: 4.0 * elements as f64 }
    }

    fn output(&mut self) -> &mut [f32] {
        &mut self.x
    }
}
