//! A ubatch as the layers see it, and the steps that every layer shares.

use crate::error::Error;
use crate::weights::Tensor;
use qwen3next_kernels::{gated_delta, matmul, norm, Exec, View, ViewMut, Weight};

/// The tokens of all sequences of a ubatch, packed into one row.
pub(crate) struct Packed {
    /// Tokens.
    pub tokens: usize,
    /// `[B + 1]`: where each sequence's tokens start.
    pub cu_seqlens: Vec<i64>,
    /// `[B]`: state slot of each sequence.
    pub slots: Vec<i64>,
    /// `[T]`: position of each token in its sequence.
    pub positions: Vec<i64>,
    /// `[B]`: tokens in the sequence once these are read.
    pub lengths: Vec<i64>,
    /// Tokens a slot of the KV caches holds.
    pub capacity: usize,
    /// The states after every token are wanted, for a rollback.
    pub steps: bool,
    /// Variant of the delta rule, where not the one that dispatch picks.
    pub delta: Exec<gated_delta::Op>,
}

/// RMS norm of packed rows.
pub(crate) fn norm_rows(y: &mut [f32], x: &[f32], width: usize, w: &[f32], eps: f32) -> Result<(), Error> {
    let shape = [x.len() / width, 1, width];
    let args =
        norm::Args { y: ViewMut::new(y, shape)?, x: Some(View::new(x, shape)?), kind: norm::Kind::Rms(Some(w)), eps };
    Ok(norm::run(args, &Exec::default())?)
}

/// y = x Wᵀ for packed rows.
pub(crate) fn project(w: &Tensor, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
    let rows = x.len() / w.cols().max(1);
    let args = matmul::Args {
        y: ViewMut::new(y, [rows, w.rows()])?,
        x: View::new(x, [rows, w.cols()])?,
        w: Weight::new(w.bytes(), w.dtype(), [w.rows(), w.cols()])?,
    };
    Ok(matmul::run(args, &Exec::default())?)
}

/// x += y.
pub(crate) fn add_rows(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// 1 / (1 + e⁻ˣ).
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
