//! Metrics and bounds. A bound is an absolute error an element may have, derived from the rounding unit and the shape;
//! the test is `!(error <= bound)`, so a NaN fails.

use crate::record;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Unit roundoff of f32, 2⁻²⁴.
pub const U32: f64 = 1.0 / (1u64 << 24) as f64;

/// Smallest positive normal f32: below it, errors are absolute.
pub const TINY32: f64 = f32::MIN_POSITIVE as f64;

/// γₙ = n u / (1 − n u): the relative error of n chained f32 roundings (Higham, Accuracy and Stability, lemma 3.1).
pub fn gamma(n: usize) -> f64 {
    let nu = n as f64 * U32;
    assert!(nu < 1.0, "gamma of {n}");
    nu / (1.0 - nu)
}

/// How far a result is from its reference.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Relative L2 error of the worst row.
    pub row_l2: f64,
    /// Largest error over its row's root mean square.
    pub max_over_rms: f64,
    /// Largest error over its element's bound: at most 1 in a pass.
    pub bound_multiple: f64,
    /// Pooled normalised mean squared error, for comparison with test-backend-ops.
    pub nmse: f64,
    /// Rows compared.
    pub rows: usize,
    /// Rows left out of the relative metrics because their reference norm is under the bound.
    pub tiny_rows: usize,
}

impl Metrics {
    /// The worse of two, field by field; rows add.
    pub fn worst(self, other: Metrics) -> Metrics {
        Metrics {
            row_l2: self.row_l2.max(other.row_l2),
            max_over_rms: self.max_over_rms.max(other.max_over_rms),
            bound_multiple: self.bound_multiple.max(other.bound_multiple),
            nmse: self.nmse.max(other.nmse),
            rows: self.rows + other.rows,
            tiny_rows: self.tiny_rows + other.tiny_rows,
        }
    }
}

/// Counts of a positive quantity by its size: a quarter of a decade a bin, so the size of the whole is bounded.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// Values that were exactly 0.
    pub zero: usize,
    /// Bin i counts the values from 10^(i/4) up to 10^((i+1)/4).
    pub bins: BTreeMap<i32, usize>,
}

impl Histogram {
    /// Bins a decade.
    pub const BINS: i32 = 4;

    /// Counts a value; what lies outside 1e-40 .. 1e20 is counted at the ends.
    pub fn add(&mut self, value: f64) {
        if value == 0.0 {
            self.zero += 1;
            return;
        }
        let bin = (value.log10() * f64::from(Self::BINS)).floor();
        let bin = if bin.is_nan() { f64::INFINITY } else { bin };
        *self.bins.entry(bin.clamp(-160.0, 80.0) as i32).or_default() += 1;
    }

    /// Adds the counts of another one.
    pub fn merge(&mut self, other: &Histogram) {
        self.zero += other.zero;
        other.bins.iter().for_each(|(bin, n)| *self.bins.entry(*bin).or_default() += n);
    }

    /// Values counted.
    pub fn count(&self) -> usize {
        self.zero + self.bins.values().sum::<usize>()
    }
}

/// Why a check failed: one line that says where and by how much.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure(pub String);

impl Failure {
    /// A failure with this text.
    pub fn new(text: impl Into<String>) -> Self {
        Failure(text.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<qwen3next_kernels::Error> for Failure {
    fn from(e: qwen3next_kernels::Error) -> Self {
        Failure(format!("the call was refused: {e}"))
    }
}

/// Compares bytes.
pub fn bytewise(what: &str, got: &[u8], want: &[u8]) -> Result<Metrics, Failure> {
    if let Some(recorded) = record::bytes(what, got, want) {
        return recorded;
    }
    if got.len() != want.len() {
        return Err(Failure(format!("{what}: {} bytes, {} expected", got.len(), want.len())));
    }
    match want.iter().zip(got).position(|(w, g)| w != g) {
        Some(at) => Err(Failure(format!("{what}: byte {at} is {}, expected {}", got[at], want[at]))),
        None => Ok(Metrics::default()),
    }
}

/// Compares `got` with `want`, both packed in rows of `row` elements, against one bound per element.
/// Non-finite values must stand at the same places: NaN for NaN, an infinity for the same infinity.
pub fn compare(what: &str, got: &[f32], want: &[f64], bound: &[f64], row: usize) -> Result<Metrics, Failure> {
    if got.len() != want.len() || bound.len() != want.len() {
        return Err(Failure(format!("{what}: {} values, {} expected, {} bounds", got.len(), want.len(), bound.len())));
    }
    if let Some(recorded) = record::within(what, got, want, bound) {
        return recorded;
    }
    let mut metrics = Metrics::default();
    let (mut error_sum, mut want_sum) = (0.0, 0.0);
    for (r, ((got, want), bound)) in
        got.chunks(row.max(1)).zip(want.chunks(row.max(1))).zip(bound.chunks(row.max(1))).enumerate()
    {
        let (mut error2, mut norm2, mut bound2, mut largest) = (0.0, 0.0, 0.0, 0.0f64);
        for (i, ((&g, &w), &b)) in got.iter().zip(want).zip(bound).enumerate() {
            let g = f64::from(g);
            if !w.is_finite() || !g.is_finite() {
                // f32 rounds to infinity what f64 still holds: the reference decides by its f32 value.
                let w32 = f64::from(w as f32);
                if (w32.is_nan() && g.is_nan()) || w32 == g {
                    continue;
                }
                return Err(Failure(format!("{what}[{r}][{i}]: got {g:e}, expected {w:e}")));
            }
            let error = (g - w).abs();
            let within = error <= b;
            if !within {
                return Err(Failure(format!(
                    "{what}[{r}][{i}]: got {g:e}, expected {w:e}, error {error:.3e} is {:.2} times the bound {b:.3e}",
                    error / b
                )));
            }
            if b > 0.0 {
                metrics.bound_multiple = metrics.bound_multiple.max(error / b);
            }
            error2 += error * error;
            norm2 += w * w;
            bound2 += b * b;
            largest = largest.max(error);
        }
        metrics.rows += 1;
        error_sum += error2;
        want_sum += norm2;
        if norm2 <= bound2 {
            metrics.tiny_rows += 1;
        } else {
            metrics.row_l2 = metrics.row_l2.max((error2 / norm2).sqrt());
            metrics.max_over_rms = metrics.max_over_rms.max(largest / (norm2 / want.len() as f64).sqrt());
        }
    }
    metrics.nmse = if want_sum > 0.0 { error_sum / want_sum } else { 0.0 };
    Ok(metrics)
}

/// `Ok` where both hold the same bits (any NaN equals any NaN).
pub fn bitwise(what: &str, got: &[f32], want: &[f32]) -> Result<(), Failure> {
    if got.len() != want.len() {
        return Err(Failure(format!("{what}: {} values, {} expected", got.len(), want.len())));
    }
    if let Some(recorded) = record::bits(what, got, want) {
        return recorded.map(drop);
    }
    match got.iter().zip(want).position(|(g, w)| g.to_bits() != w.to_bits() && !(g.is_nan() && w.is_nan())) {
        None => Ok(()),
        Some(i) => Err(Failure(format!("{what}[{i}]: got {:e}, expected the same bits as {:e}", got[i], want[i]))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_and_infinity_fail_unless_expected() {
        let nan = f64::NAN;
        assert!(compare("y", &[f32::NAN], &[1.0], &[f64::INFINITY], 1).is_err());
        assert!(compare("y", &[1.0], &[nan], &[1.0], 1).is_err());
        assert!(compare("y", &[f32::NAN], &[nan], &[0.0], 1).is_ok());
        assert!(compare("y", &[f32::INFINITY], &[f64::NEG_INFINITY], &[0.0], 1).is_err());
        assert!(compare("y", &[1.0], &[1.0], &[nan], 1).is_err());
        assert!(compare("y", &[1.0, 2.0], &[1.0], &[1.0], 1).is_err());
    }

    #[test]
    fn a_histogram_counts_every_value_once() {
        let (mut a, mut b) = (Histogram::default(), Histogram::default());
        [0.0, 1.0, 1.5, 2.0, 1e-300, f64::NAN].into_iter().for_each(|x| a.add(x));
        [0.0, 0.99].into_iter().for_each(|x| b.add(x));
        a.merge(&b);
        assert_eq!((a.zero, a.count()), (2, 8));
        assert_eq!(a.bins, BTreeMap::from([(-160, 1), (-1, 1), (0, 2), (1, 1), (80, 1)]));
    }

    #[test]
    fn the_worst_row_is_not_diluted() {
        let want: Vec<f64> = (0..100).map(|i| if i < 10 { 1e-3 } else { 1e3 }).collect();
        let mut got: Vec<f32> = want.iter().map(|&w| w as f32).collect();
        got[3] *= 1.5;
        let m = compare("y", &got, &want, &[6e-4; 100], 10).unwrap();
        assert!(m.row_l2 > 0.1 && m.nmse < 1e-10, "{m:?}");
    }
}
