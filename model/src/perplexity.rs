//! Perplexity over windows of a text, and the divergence of two sets of logits.

use crate::error::Error;
use crate::forward::{Batch, Model, Options};
use crate::state::{CacheTypes, State};

/// Which positions of a window count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scored {
    /// The second half, as llama.cpp's perplexity: every prediction has at least half a window before it.
    SecondHalf,
    /// All that have a next token.
    All,
}

/// Mean negative log-likelihood with its standard error.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum {
    count: usize,
    sum: f64,
    squares: f64,
}

impl Sum {
    /// Adds one value.
    pub fn add(&mut self, value: f64) {
        self.count += 1;
        self.sum += value;
        self.squares += value * value;
    }

    /// Values added.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Their mean.
    pub fn mean(&self) -> f64 {
        self.sum / self.count as f64
    }

    /// Standard error of the mean.
    pub fn error(&self) -> f64 {
        let n = self.count as f64;
        ((self.squares / n - self.mean().powi(2)).max(0.0) / (n - 1.0)).sqrt()
    }

    /// exp of the mean of negative log-likelihoods.
    pub fn perplexity(&self) -> f64 {
        self.mean().exp()
    }

    /// Standard error of [`Sum::perplexity`], to first order.
    pub fn perplexity_error(&self) -> f64 {
        self.perplexity() * self.error()
    }
}

/// Logits of one window's scored positions, and the tokens that came next.
pub struct Window<'a> {
    /// Number of the window.
    pub index: usize,
    /// `[scored][vocab]`.
    pub logits: &'a [f32],
    /// `[scored]`.
    pub next: &'a [u32],
}

/// Rows of logits that [`windows`] hands over in all.
pub fn scored_rows(tokens: usize, ctx: usize, scored: Scored) -> usize {
    tokens / ctx.max(1) * (ctx - first(ctx, scored) - 1)
}

fn first(ctx: usize, scored: Scored) -> usize {
    match scored {
        Scored::SecondHalf => ctx / 2,
        Scored::All => 0,
    }
}

/// Runs the model over every whole window of `ctx` tokens, each from an empty state, and hands its logits to `each`.
/// Errors: fewer tokens than one window, ctx under 2, what the forward pass refuses, what `each` returns.
pub fn windows<E: From<Error>>(
    model: &Model,
    tokens: &[u32],
    ctx: usize,
    scored: Scored,
    options: &Options,
    each: impl FnMut(Window) -> Result<(), E>,
) -> Result<(), E> {
    windows_cached(model, tokens, ctx, scored, usize::MAX, options, CacheTypes::default(), each)
}

/// As [`windows`], handing the model at most `batch` tokens in one call, with KV caches of these types.
#[allow(clippy::too_many_arguments)]
pub fn windows_cached<E: From<Error>>(
    model: &Model,
    tokens: &[u32],
    ctx: usize,
    scored: Scored,
    batch: usize,
    options: &Options,
    cache: CacheTypes,
    mut each: impl FnMut(Window) -> Result<(), E>,
) -> Result<(), E> {
    if ctx < 2 {
        return Err(Error::argument("ctx", format!("is {ctx}, expected at least 2")).into());
    }
    if tokens.len() < ctx {
        return Err(Error::argument("ctx", format!("is {ctx}, the text has only {} tokens", tokens.len())).into());
    }
    let mut state = model.state(1, ctx, cache)?;
    let first = first(ctx, scored);
    for (index, window) in tokens.chunks_exact(ctx).enumerate() {
        let logits = window_logits(model, &mut state, window, first, batch, options)?;
        each(Window { index, logits: &logits, next: &window[first + 1..] })?;
    }
    Ok(())
}

/// Logits of the positions from `first` on that have a next token in this window, read from an empty state in calls of at
/// most `batch` tokens: 1 is decoding. Forgets what slot 0 had read.
pub fn window_logits(
    model: &Model,
    state: &mut State,
    window: &[u32],
    first: usize,
    batch: usize,
    options: &Options,
) -> Result<Vec<f32>, Error> {
    state.clear(0)?;
    // The last token of a window has no next one inside it: it need not be read.
    let read = &window[..window.len().saturating_sub(1)];
    let mut logits = Vec::with_capacity(read.len().saturating_sub(first) * model.config().vocab);
    let mut at = 0;
    for tokens in read.chunks(batch.max(1)) {
        let wanted = Batch::one(0, tokens).logits_from(first.saturating_sub(at));
        model.forward_each(state, &wanted, options, |rows| {
            logits.extend_from_slice(rows);
            Ok::<(), Error>(())
        })?;
        at += tokens.len();
    }
    Ok(logits)
}

/// −ln p(next) under these logits, in f64.
pub fn negative_log_likelihood(logits: &[f32], next: u32) -> Result<f64, Error> {
    let chosen = logits.get(next as usize).ok_or(Error::Token { id: next, vocab: logits.len() })?;
    Ok(log_sum_exp(logits) - f64::from(*chosen))
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let peak = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let peak = f64::from(peak);
    peak + logits.iter().map(|&l| (f64::from(l) - peak).exp()).sum::<f64>().ln()
}

/// KL(base ‖ other) of the two distributions, in nats.
pub fn divergence(base: &[f32], other: &[f32]) -> f64 {
    let (zb, zo) = (log_sum_exp(base), log_sum_exp(other));
    base.iter()
        .zip(other)
        .map(|(&b, &o)| {
            let log_p = f64::from(b) - zb;
            let p = log_p.exp();
            // p log p is 0 at p = 0.
            if p == 0.0 {
                0.0
            } else {
                p * (log_p - (f64::from(o) - zo))
            }
        })
        .sum()
}

/// Index of the largest logit; the lowest of equals.
pub fn top(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, l) in logits.iter().enumerate() {
        if *l > logits[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelihood_and_divergence_of_known_distributions() {
        let uniform = [3.0f32; 4];
        assert!((negative_log_likelihood(&uniform, 2).unwrap() - 4f64.ln()).abs() < 1e-12);
        assert!(negative_log_likelihood(&uniform, 4).is_err());
        let p = [0.5f32.ln(), 0.25f32.ln(), 0.25f32.ln(), f32::NEG_INFINITY];
        assert!((divergence(&p, &uniform) - (0.5 * 2f64.ln() + 0.0)).abs() < 1e-6);
        assert_eq!(divergence(&p, &p), 0.0);
        assert_eq!(top(&[1.0, 5.0, 5.0]), 1);
    }

    #[test]
    fn standard_error_of_the_mean() {
        let mut s = Sum::default();
        [1.0, 2.0, 3.0, 4.0].into_iter().for_each(|v| s.add(v));
        assert_eq!(s.mean(), 2.5);
        assert!((s.error() - (5.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-12);
    }
}
