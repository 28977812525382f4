//! Cases and checks, one module an operator: shapes, adversarial fills, properties. Tests, benches and the command
//! share them.

pub mod attention;
pub mod causal_conv;
pub mod gated_delta;
pub mod matmul;
pub mod moe;
pub mod norm;
pub mod quant;
pub mod rope;
pub mod solve_tri;

use crate::suite::Entry;

/// Every suite, in the order of reports.
pub fn all() -> Vec<Entry> {
    vec![
        Entry::of::<matmul::Matmul>(),
        Entry::of::<moe::MoeRoute>(),
        Entry::of::<moe::MoeGroup>(),
        Entry::of::<moe::MoeUp>(),
        Entry::of::<moe::MoeDown>(),
        Entry::of::<quant::Dequantize>(),
        Entry::of::<quant::Quantize>(),
        Entry::of::<solve_tri::SolveTri>(),
    ]
}
