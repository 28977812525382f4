//! Float64 references in formula order: the judges. No blocking, no tricks, no shared code with the kernels.

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
