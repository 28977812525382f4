//! A ubatch as the layers see it, and the steps that every layer shares.

use crate::error::Error;
use crate::weights::Tensor;
use qwen3next_kernels::activations::{Rows, Q8};
use qwen3next_kernels::{gated_delta, matmul, moe, norm, DType, Exec, View, ViewMut, Weight};
use rayon::prelude::*;

/// Working memory of a forward pass, kept from one to the next: a warm pass does not allocate for its activations.
#[derive(Debug, Clone, Default)]
pub(crate) struct Buffers {
    floats: Vec<Vec<f32>>,
    q8: Vec<Q8>,
    /// Of the feed-forward.
    pub hidden: moe::Hidden,
    /// Of the routed experts, and of the shared one or a dense feed-forward.
    pub routing: moe::Routing,
    pub dense: moe::Routing,
}

impl Buffers {
    /// `n` floats with any contents.
    pub fn take(&mut self, n: usize) -> Vec<f32> {
        // The smallest that is large enough, else the largest.
        let fits = (0..self.floats.len())
            .filter(|&i| self.floats[i].capacity() >= n)
            .min_by_key(|&i| self.floats[i].capacity());
        let best = fits.or_else(|| (0..self.floats.len()).max_by_key(|&i| self.floats[i].capacity()));
        let mut buffer = best.map(|i| self.floats.swap_remove(i)).unwrap_or_default();
        buffer.resize(n, 0.0);
        buffer
    }

    /// Gives a buffer back.
    pub fn give(&mut self, buffer: Vec<f32>) {
        self.floats.push(buffer);
    }
}

/// What the projections of a layer read: rows of f32, and the same quantised for those weights that want it.
pub(crate) struct Input<'a> {
    floats: &'a [f32],
    width: usize,
    quantized: Vec<Q8>,
}

impl<'a> Input<'a> {
    /// `floats` are packed rows of `width`. With `quantize` they are quantised once for each type that `weights` ask
    /// for.
    pub fn new<'w>(
        floats: &'a [f32],
        width: usize,
        quantize: bool,
        weights: impl IntoIterator<Item = &'w Tensor>,
        buffers: &mut Buffers,
    ) -> Result<Self, Error> {
        let mut input = Input { floats, width, quantized: Vec::new() };
        for dtype in weights.into_iter().map(|w| w.dtype().activations()) {
            if quantize && dtype != DType::F32 && input.quantized.iter().all(|q| q.dtype() != dtype) {
                let mut q = buffers.q8.pop().unwrap_or_default();
                q.quantize(dtype, View::new(floats, [floats.len() / width.max(1), width])?, &Exec::default())?;
                input.quantized.push(q);
            }
        }
        Ok(input)
    }

    /// The rows as these weights take them: quantised where all of them share a type.
    pub fn rows(&self, weights: &[&Tensor]) -> Result<Rows<'_>, Error> {
        let suits = |q: &&Q8| weights.iter().all(|w| w.dtype().activations() == q.dtype());
        Ok(match self.quantized.iter().find(suits) {
            Some(q) => q.into(),
            None => View::new(self.floats, [self.floats.len() / self.width.max(1), self.width])?.into(),
        })
    }

    /// The rows in f32.
    pub fn floats(&self) -> &'a [f32] {
        self.floats
    }

    /// Gives the quantised rows back.
    pub fn give(self, buffers: &mut Buffers) {
        buffers.q8.extend(self.quantized);
    }
}

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
    /// Quantise activations for quantised weights.
    pub quantize: bool,
    /// Variant of the delta rule, where not the one that dispatch picks.
    pub delta: Exec<gated_delta::Op>,
}

/// RMS norm of packed rows.
pub(crate) fn norm_rows(y: &mut [f32], x: &[f32], width: usize, w: &[f32], eps: f32) -> Result<(), Error> {
    let shape = [x.len() / width, 1, width];
    let args = norm::Args {
        y: ViewMut::new(y, shape)?,
        x: Some(View::new(x, shape)?),
        kind: norm::Kind::Rms(Some(w.into())),
        eps,
    };
    Ok(norm::run(args, &Exec::default())?)
}

/// y = x Wᵀ for packed rows.
pub(crate) fn project(w: &Tensor, x: &Input, y: &mut [f32]) -> Result<(), Error> {
    let x = x.rows(&[w])?;
    let [rows, _] = x.shape();
    let args = matmul::Args {
        y: ViewMut::new(y, [rows, w.rows()])?,
        x,
        w: Weight::new(w.bytes(), w.dtype(), [w.rows(), w.cols()])?,
    };
    Ok(matmul::run(args, &Exec::default())?)
}

/// As [`project`], for rows that only this weight reads.
pub(crate) fn project_rows(
    w: &Tensor,
    x: &[f32],
    y: &mut [f32],
    quantize: bool,
    buffers: &mut Buffers,
) -> Result<(), Error> {
    let input = Input::new(x, w.cols(), quantize, [w], buffers)?;
    project(w, &input, y)?;
    input.give(buffers);
    Ok(())
}

/// Values that one thread handles at least: fewer are not worth a fork.
const GRAIN: usize = 16384;

/// x += y.
pub(crate) fn add_rows(x: &mut [f32], y: &[f32]) {
    if x.len() < 2 * GRAIN {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    } else {
        x.par_chunks_mut(GRAIN).zip(y.par_chunks(GRAIN)).for_each(|(x, y)| {
            x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        });
    }
}

/// 1 / (1 + e⁻ˣ).
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
