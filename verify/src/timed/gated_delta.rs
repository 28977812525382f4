//! The delta rule of one layer: in-kernel norm, the state updated in place.

use super::{Timed, Work};
use crate::cases::gated_delta::{self as cases, Dtype};
use crate::compare::{Failure, Metrics};
use qwen3next_kernels::gated_delta::Op;
use qwen3next_kernels::{Exec, Variant};

/// Sequences of `t` tokens, `hk` key and `hv` value heads of `d` channels.
pub struct GatedDelta(cases::Timed);

impl GatedDelta {
    /// Inputs of one sequence.
    pub fn new(t: usize, hk: usize, hv: usize, d: usize) -> GatedDelta {
        GatedDelta::batch(1, t, hk, hv, d, Dtype::F32)
    }

    /// Inputs of `b` sequences, q, k, v and o of a type.
    pub fn batch(b: usize, t: usize, hk: usize, hv: usize, d: usize, dtype: Dtype) -> GatedDelta {
        GatedDelta(cases::Timed::new(b, t, hk, hv, d, dtype))
    }
}

impl Timed for GatedDelta {
    type Op = Op;

    fn judge(&self, variant: &Variant<Op>) -> Result<Metrics, Failure> {
        self.0.verify(variant)
    }

    fn run(&mut self, exec: &Exec<Op>) -> Result<(), Failure> {
        self.0.run(exec)
    }

    /// 7 K V a token and value head; the state in and out.
    fn work(&self) -> Work {
        Work { ops: self.0.flops(), bytes: self.0.bytes() }
    }

    fn output(&mut self) -> &mut [f32] {
        self.0.output()
    }

    fn verify(&mut self, variant: &Variant<Op>) -> Result<Metrics, Failure> {
        let metrics = self.judge(variant)?;
        self.0.wipe();
        self.run(&Exec::variant(*variant))?;
        match self.0.not_finite() {
            Some(i) => Err(Failure::new(format!("element {i} of the output was left unwritten or is not finite"))),
            None => Ok(metrics),
        }
    }
}
