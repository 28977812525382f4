//! Router, grouping and expert feed-forward in float64.

use ndarray::{Array1, ArrayView1, ArrayView2};

/// One token's choices: experts by descending logit, ties to the lower index, with weight and the relative error
/// that f32 arithmetic may leave in it.
pub struct Routed {
    /// Chosen experts.
    pub ids: Vec<usize>,
    /// Their weights.
    pub weights: Vec<f64>,
    /// Error each weight may have.
    pub bounds: Vec<f64>,
}

/// softmax over all logits; the `top_k` largest; with `normalize` divided by their sum. Logits equal to an infinite
/// maximum share the mass.
pub fn route(logits: &[f32], top_k: usize, normalize: bool) -> Routed {
    use crate::compare::U32;
    let logits: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let distance = |l: f64| if l == max { 0.0 } else { l - max };
    let e: Vec<f64> = logits.iter().map(|&l| distance(l).exp()).collect();
    // l - max rounds once, which exp turns into |l - max| roundings; exp itself may be off by an ulp, two roundings.
    let off: Vec<f64> =
        logits.iter().zip(&e).map(|(&l, &e)| if e == 0.0 { 0.0 } else { (distance(l).abs() + 2.0) * U32 }).collect();
    let total: f64 = e.iter().sum();
    let off_total = e.iter().zip(&off).map(|(e, o)| e * o).sum::<f64>() / total + logits.len() as f64 * U32 * U32;

    let mut ids: Vec<usize> = (0..logits.len()).collect();
    ids.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).expect("no NaN").then(a.cmp(&b)));
    ids.truncate(top_k);
    let mut weights: Vec<f64> = ids.iter().map(|&i| e[i] / total).collect();
    let mut offs: Vec<f64> = ids.iter().map(|&i| off[i] + off_total + U32).collect();
    if normalize {
        let sum: f64 = weights.iter().sum();
        let off_sum = weights.iter().zip(&offs).map(|(w, o)| w * o).sum::<f64>() / sum;
        weights.iter_mut().for_each(|w| *w /= sum);
        offs.iter_mut().for_each(|o| *o += off_sum + U32);
    }
    // A weight under the normal range is off by a subnormal step or two, before and after it is normalised.
    let bounds = weights.iter().zip(&offs).map(|(w, o)| 1.01 * w * o + logits.len() as f64 * 2f64.powi(-148)).collect();
    Routed { ids, weights, bounds }
}

/// Pairs `t * top_k + choice` sorted by expert, stably, and where each expert's pairs start.
pub fn group(ids: &[i32], experts: usize) -> (Vec<i64>, Vec<i64>) {
    let mut order: Vec<i64> = (0..ids.len() as i64).collect();
    order.sort_by_key(|&p| ids[p as usize]);
    let offsets = (0..=experts).map(|e| ids.iter().filter(|&&i| (i as usize) < e).count() as i64).collect();
    (order, offsets)
}

/// x / (1 + e^-x).
pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// silu(Wgate x) · Wup x for one token and expert.
pub fn up(gate: ArrayView2<f64>, up: ArrayView2<f64>, x: ArrayView1<f64>) -> Array1<f64> {
    gate.dot(&x).mapv(silu) * up.dot(&x)
}

/// `Σ_c weights[c] Wdown_c h_c` for one token.
pub fn down(experts: &[ArrayView2<f64>], h: &[ArrayView1<f64>], weights: &[f64], d: usize) -> Array1<f64> {
    let mut y = Array1::zeros(d);
    for ((down, h), &weight) in experts.iter().zip(h).zip(weights) {
        y += &(down.dot(h) * weight);
    }
    y
}
