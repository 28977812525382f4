//! Rotary embedding.

use super::{reference, Timed, Work, SEED};
use crate::buffer::Layout;
use crate::cases::rope::{Case, Inputs, Positions, Rope as Suite};
use crate::compare::{Failure, Metrics};
use qwen3next_kernels::rope::{self, Op};
use qwen3next_kernels::{Exec, Variant, View, ViewMut};

/// `t` tokens of `h` heads of `d` channels.
pub struct Rope {
    case: Case,
    inputs: Inputs,
    y: Vec<f32>,
}

impl Rope {
    /// Inputs; the first `rotary` channels are rotated, an even number.
    pub fn new(t: usize, h: usize, d: usize, rotary: usize) -> Rope {
        let (layout, positions) = (Layout::Packed, Positions::Start);
        let case = Case { t, h, d, half: rotary / 2, base: 1e7, in_place: false, layout, positions };
        Rope { y: vec![0.0; t * h * d], inputs: Inputs::generate(&case, SEED), case }
    }
}

impl Timed for Rope {
    type Op = Op;

    fn judge(&self, variant: &Variant<Op>) -> Result<Metrics, Failure> {
        reference::<Suite>(variant, &Case { t: self.case.t.min(64), ..self.case.clone() })
    }

    fn run(&mut self, exec: &Exec<Op>) -> Result<(), Failure> {
        let c = &self.case;
        let shape = [c.t, c.h, c.d];
        let args = rope::Args {
            y: ViewMut::new(&mut self.y, shape)?,
            x: Some(View::new(&self.inputs.x, shape)?),
            pos: &self.inputs.pos,
            base: c.base,
            rotary: 2 * c.half,
        };
        Ok(rope::run(args, exec)?)
    }

    /// 6 a pair and head, sine and cosine once a token.
    fn work(&self) -> Work {
        let c = &self.case;
        let ops = (c.t * c.half * (6 * c.h + 2)) as f64;
        Work { ops, bytes: (8 * self.y.len() + 8 * c.t) as f64 }
    }

    fn output(&mut self) -> &mut [f32] {
        &mut self.y
    }
}
