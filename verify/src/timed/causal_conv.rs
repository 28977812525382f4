//! The convolution of a DeltaNet layer: one sequence, SiLU, the state updated in place.

use super::{reference, Timed, Work, SEED};
use crate::buffer::Layout;
use crate::cases::causal_conv::{Case, CausalConv as Suite, Problem, States};
use crate::compare::{Failure, Metrics};
use qwen3next_kernels::causal_conv::{self, Op};
use qwen3next_kernels::{Exec, Variant, View, ViewMut};

/// `t` tokens of `c` channels.
pub struct CausalConv {
    problem: Problem,
    pool: Vec<f32>,
    y: Vec<f32>,
}

impl CausalConv {
    /// Inputs; `width` is at least 2.
    pub fn new(t: usize, c: usize, width: usize) -> CausalConv {
        let case = Case {
            batch: 1,
            t,
            c,
            width,
            bias: false,
            silu: true,
            states: States::InPlace,
            snapshots: false,
            packed: false,
            layout: Layout::Packed,
        };
        let problem = Problem::generate(&case, SEED);
        CausalConv { pool: problem.pool.clone(), y: vec![0.0; t * c], problem }
    }
}

impl Timed for CausalConv {
    type Op = Op;

    fn judge(&self, variant: &Variant<Op>) -> Result<Metrics, Failure> {
        let case = &self.problem.case;
        reference::<Suite>(variant, &Case { t: case.t.min(33), c: case.c.min(1031), ..case.clone() })
    }

    fn run(&mut self, exec: &Exec<Op>) -> Result<(), Failure> {
        let p = &self.problem;
        let shape = [1, p.case.t, p.c];
        let args = causal_conv::Args {
            y: ViewMut::new(&mut self.y, shape)?,
            x: View::new(&p.x, shape)?,
            w: View::new(&p.w, [p.c, p.width])?,
            bias: None,
            state: causal_conv::State::InPlace(ViewMut::new(&mut self.pool, [p.slots, p.c, p.width - 1])?),
            snapshots: None,
            slot_in: Some(&p.slot_in),
            slot_out: Some(&p.slot_out),
            cu_seqlens: None,
            silu: true,
        };
        Ok(causal_conv::run(args, exec)?)
    }

    /// The taps, and 4 for SiLU; the window in and out.
    fn work(&self) -> Work {
        let p = &self.problem;
        let elements = 2 * self.y.len() + p.w.len() + 2 * p.c * (p.width - 1);
        Work { ops: (self.y.len() * (2 * p.width + 4)) as f64, bytes: 4.0 * elements as f64 }
    }

    fn output(&mut self) -> &mut [f32] {
        &mut self.y
    }
}
