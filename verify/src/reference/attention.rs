//! Softmax attention of one query in float64.

use ndarray::{Array1, ArrayView1, ArrayView2};

/// What one query of one head gets.
pub struct Row {
    /// Σ p_j v_j.
    pub o: Array1<f64>,
    /// log Σ exp s_j, with the sink.
    pub lse: f64,
    /// Scores of the visible keys.
    pub scores: Vec<f64>,
    /// Their softmax; with a sink it sums to less than 1.
    pub weights: Vec<f64>,
}

/// Query `q` `[D]` over the visible keys `k` and values `v`, `[n][D]`; `mask` is added to the scores. A key whose mask
/// or score is −∞ is hidden: nothing of it enters. Where all are, o is 0 and lse −∞ (or the sink).
pub fn row(
    q: ArrayView1<f64>,
    k: ArrayView2<f64>,
    v: ArrayView2<f64>,
    mask: Option<ArrayView1<f64>>,
    scale: f64,
    sink: Option<f64>,
) -> Row {
    let hidden = f64::NEG_INFINITY;
    let scores: Vec<f64> = (0..k.nrows())
        .map(|j| match mask {
            Some(mask) if mask[j] == hidden => hidden,
            _ => scale * q.dot(&k.row(j)) + mask.map_or(0.0, |m| m[j]),
        })
        .collect();
    let all = || scores.iter().copied().chain(sink).filter(|&s| s != hidden);
    let max = all().fold(hidden, f64::max);
    let sum: f64 = all().map(|s| (s - max).exp()).sum();
    let weights: Vec<f64> = scores.iter().map(|&s| if s == hidden { 0.0 } else { (s - max).exp() / sum }).collect();
    let mut o = Array1::zeros(v.ncols());
    for (j, &p) in weights.iter().enumerate().filter(|&(j, _)| scores[j] != hidden) {
        o.scaled_add(p, &v.row(j));
    }
    Row { o, lse: if all().next().is_none() { hidden } else { max + sum.ln() }, scores, weights }
}
