//! Row norms in float64.

use ndarray::{Array1, ArrayView1};

/// a / (1 + e⁻ᵃ).
pub fn silu(a: f64) -> f64 {
    a / (1.0 + (-a).exp())
}

/// x / √(mean x² + eps).
pub fn rms(x: ArrayView1<f64>, eps: f64) -> Array1<f64> {
    let mean = x.mapv(|x| x * x).sum() / x.len() as f64;
    x.mapv(|x| x / (mean + eps).sqrt())
}

/// x / √(Σx² + eps).
pub fn l2(x: ArrayView1<f64>, eps: f64) -> Array1<f64> {
    let sum = x.mapv(|x| x * x).sum();
    x.mapv(|x| x / (sum + eps).sqrt())
}
