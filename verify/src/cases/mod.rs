//! Cases and checks, one module an operator: shapes, adversarial fills, properties. Tests, benches and the command
//! share them.

pub mod activations;
pub mod attention;
pub mod causal_conv;
pub mod gated_delta;
pub mod layer;
pub mod matmul;
pub mod model;
pub mod moe;
pub mod norm;
pub mod quant;
pub mod repack;
pub mod rope;
pub mod solve_tri;

use crate::suite::{Entry, Rng};
use rand::Rng as _;

/// Every suite, in the order of reports.
pub fn all() -> Vec<Entry> {
    vec![
        Entry::of::<gated_delta::GatedDelta>(),
        Entry::of::<solve_tri::SolveTri>(),
        Entry::of::<causal_conv::CausalConv>(),
        Entry::of::<norm::Norm>(),
        Entry::of::<rope::Rope>(),
        Entry::of::<attention::Attention>(),
        Entry::of::<attention::Merge>(),
        Entry::of::<quant::Dequantize>(),
        Entry::of::<quant::Quantize>(),
        Entry::of::<activations::Activations>(),
        Entry::of::<repack::Repack>(),
        Entry::of::<matmul::Matmul>(),
        Entry::of::<moe::MoeRoute>(),
        Entry::of::<moe::MoeGroup>(),
        Entry::of::<moe::MoeUp>(),
        Entry::of::<moe::MoeDown>(),
        Entry::of::<layer::GatherSuite>(),
        Entry::of::<layer::AddSuite>(),
        Entry::of::<layer::GatesSuite>(),
        Entry::of::<layer::StoreSuite>(),
        Entry::of::<layer::GateSuite>(),
        Entry::new(model::NAME, model::run),
    ]
}

/// A standard normal number.
pub(crate) fn normal(rng: &mut Rng) -> f32 {
    let (u, angle): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random::<f64>() * std::f64::consts::TAU);
    ((-2.0 * u.ln()).sqrt() * angle.cos()) as f32
}

/// The same numbers in f64.
pub(crate) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}
