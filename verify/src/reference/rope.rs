//! Rotary embedding in float64.

use ndarray::{Array1, ArrayView1};

/// The angle of pair `i` at `pos`: pos · base^(−2i/R).
pub fn angle(pos: i64, i: usize, base: f64, rotary: usize) -> f64 {
    pos as f64 * base.powf(-2.0 * i as f64 / rotary as f64)
}

/// One head: channels i and i + R/2 are rotated by the angle of pair i, those from R on are copied.
pub fn rope(x: ArrayView1<f64>, pos: i64, base: f64, rotary: usize) -> Array1<f64> {
    let half = rotary / 2;
    let mut y = x.to_owned();
    for i in 0..half {
        let (sin, cos) = angle(pos, i, base, rotary).sin_cos();
        y[i] = x[i] * cos - x[i + half] * sin;
        y[i + half] = x[i] * sin + x[i + half] * cos;
    }
    y
}
