//! Y = X Wᵀ in float64.

use ndarray::{Array2, ArrayView2};

/// `y[m][n] = Σ_k x[m][k] w[n][k]`.
pub fn matmul(x: ArrayView2<f64>, w: ArrayView2<f64>) -> Array2<f64> {
    Array2::from_shape_fn((x.nrows(), w.nrows()), |(m, n)| (0..x.ncols()).map(|k| x[[m, k]] * w[[n, k]]).sum())
}

/// `Σ_k |x[m][k]| |w[n][k]|`: the scale of the error bound.
pub fn abs_matmul(x: ArrayView2<f64>, w: ArrayView2<f64>) -> Array2<f64> {
    matmul(x.mapv(f64::abs).view(), w.mapv(f64::abs).view())
}
