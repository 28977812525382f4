//! Calls to be timed, one module an operator, in the shapes of the 80B-A3B model by default: `bench op` and the criterion
//! benches share them. A variant is judged against the float64 reference before it is timed.

pub mod attention;
pub mod causal_conv;
pub mod gated_delta;
pub mod layer;
pub mod matmul;
pub mod moe;
pub mod norm;
pub mod quant;
pub mod rope;
pub mod solve_tri;

use crate::cases::quant::Form;
use crate::compare::{Failure, Metrics};
use crate::peaks::Unit;
use crate::suite::Suite;
use qwen3next_kernels::{DType, Exec, Isa, Operator, Variant};

/// Seed of all inputs that are timed.
pub const SEED: u64 = 1;

/// What a call has to do at least, whatever a variant does instead.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// Operations; a product and a sum are two, an exponential is one.
    pub ops: f64,
    /// Bytes: every input and output once.
    pub bytes: f64,
}

/// A call of one operator that can be repeated.
pub trait Timed {
    /// The operator.
    type Op: Operator;

    /// Judges a variant by the suite's comparison with float64, on inputs made the same way: the same ones where float64
    /// is quick enough for them, else fewer tokens, rows or heads.
    fn judge(&self, variant: &Variant<Self::Op>) -> Result<Metrics, Failure>;

    /// One call.
    fn run(&mut self, exec: &Exec<Self::Op>) -> Result<(), Failure>;

    /// What the call has to do.
    fn work(&self) -> Work;

    /// The instructions that bound a variant's arithmetic: products of f32, or of bf16 in variants for it; of 8-bit
    /// integers in calls that allow them.
    fn unit(&self, variant: &Variant<Self::Op>) -> Unit {
        if variant.isa().name() == "avx512bf16" {
            Unit::Bf16
        } else {
            Unit::F32
        }
    }

    /// What the call writes; empty where it is no floats.
    fn output(&mut self) -> &mut [f32];

    /// [`Timed::judge`], and that a call on the inputs to be timed writes every element with a finite number.
    fn verify(&mut self, variant: &Variant<Self::Op>) -> Result<Metrics, Failure> {
        let metrics = self.judge(variant)?;
        self.output().fill(f32::NAN);
        self.run(&Exec::variant(*variant))?;
        match self.output().iter().position(|y| !y.is_finite()) {
            Some(i) => Err(Failure::new(format!("element {i} of the output was left unwritten or is not finite"))),
            None => Ok(metrics),
        }
    }
}

/// The first check of a suite, which is its comparison with the reference.
fn reference<S: Suite>(variant: &Variant<S::Op>, case: &S::Case) -> Result<Metrics, Failure> {
    let check = S::checks().into_iter().next().ok_or_else(|| Failure::new("the suite has no check"))?;
    let metrics = (check.run)(variant, case, SEED)?;
    metrics.ok_or_else(|| Failure::new(format!("{} says nothing about {case}", check.name)))
}

/// Bytes of `rows` rows, of which `made` are drawn and then repeated.
fn repeated(rows: usize, made: usize, draw: impl FnOnce(usize) -> Vec<u8>) -> Vec<u8> {
    let made = made.clamp(1, rows.max(1));
    let some = draw(made);
    let size = some.len() / made;
    (0..rows).step_by(made).flat_map(|at| &some[..size * made.min(rows - at)]).copied().collect()
}

/// The instructions for weights and activations of this form.
fn unit(form: Form, isa: Isa) -> Unit {
    if form.is_q8() && isa != Isa::SCALAR {
        Unit::Int8
    } else {
        Unit::F32
    }
}

/// Blocks that `n` elements of a type are, at least one.
fn blocks(n: usize, dtype: DType) -> usize {
    n.div_ceil(dtype.block()).max(1)
}
