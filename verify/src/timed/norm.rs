//! Row norms.

use super::{reference, Timed, Work, SEED};
use crate::buffer::Layout;
use crate::cases::norm::{Case, Inputs, Kind, Norm as Suite, Regime};
use crate::compare::{Failure, Metrics};
use qwen3next_kernels::norm::{self, Op};
use qwen3next_kernels::{Exec, Variant, View, ViewMut};

/// `t` tokens of `h` heads of `d` channels.
pub struct Norm {
    case: Case,
    inputs: Inputs,
    y: Vec<f32>,
}

impl Norm {
    /// Inputs.
    pub fn new(kind: Kind, t: usize, h: usize, d: usize) -> Norm {
        let case = Case { t, h, d, kind, eps: 1e-6, in_place: false, layout: Layout::Packed, regime: Regime::Normal };
        Norm { y: vec![0.0; t * h * d], inputs: Inputs::generate(&case, SEED), case }
    }
}

impl Timed for Norm {
    type Op = Op;

    fn judge(&self, variant: &Variant<Op>) -> Result<Metrics, Failure> {
        reference::<Suite>(variant, &Case { t: self.case.t.min(64), ..self.case.clone() })
    }

    fn run(&mut self, exec: &Exec<Op>) -> Result<(), Failure> {
        let (c, i) = (&self.case, &self.inputs);
        let shape = [c.t, c.h, c.d];
        let kind = match c.kind {
            Kind::Rms => norm::Kind::Rms(Some(View::from(&i.w[..]))),
            Kind::Plain => norm::Kind::Rms(None),
            Kind::Plus1 => norm::Kind::RmsPlus1(View::from(&i.w[..])),
            Kind::Gated => norm::Kind::RmsGated { w: Some(View::from(&i.w[..])), z: View::new(&i.z, shape)? },
            Kind::L2 => norm::Kind::L2,
        };
        let args =
            norm::Args { y: ViewMut::new(&mut self.y, shape)?, x: Some(View::new(&i.x, shape)?), kind, eps: c.eps };
        Ok(norm::run(args, exec)?)
    }

    /// Square, sum, scale and weight; 5 more for a gate.
    fn work(&self) -> Work {
        let gated = self.case.kind == Kind::Gated;
        let n = self.y.len() as f64;
        Work { ops: n * if gated { 9.0 } else { 4.0 }, bytes: 4.0 * n * if gated { 3.0 } else { 2.0 } }
    }

    fn output(&mut self) -> &mut [f32] {
        &mut self.y
    }
}
