//! The small steps of a layer in float64.

/// 1 / (1 + e⁻ˣ).
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// ln(1 + eˣ), also where eˣ is beyond counting.
pub fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// (g, β) of one token and value head `h`: a · softplus(α + dt_bias) and sigmoid(b), out of a row of ba with `r` value
/// heads a key head.
pub fn delta_gates(ba: &[f64], h: usize, r: usize, a: f64, dt_bias: f64) -> (f64, f64) {
    let of_key_head = &ba[h / r * 2 * r..][..2 * r];
    let (b, alpha) = of_key_head.split_at(r);
    (a * softplus(alpha[h % r] + dt_bias), sigmoid(b[h % r]))
}

/// x · w.
pub fn dot(x: &[f64], w: &[f64]) -> f64 {
    x.iter().zip(w).map(|(x, w)| x * w).sum()
}
