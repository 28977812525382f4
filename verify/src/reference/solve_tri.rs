//! Forward substitution in float64.

use ndarray::{Array2, ArrayView2};

/// X from L X = B; elements of `l` above the diagonal are not read, with `unit` neither is the diagonal.
pub fn solve_tri(l: ArrayView2<f64>, b: ArrayView2<f64>, unit: bool) -> Array2<f64> {
    let (n, m) = b.dim();
    let mut x = Array2::zeros((n, m));
    for i in 0..n {
        for c in 0..m {
            let mut sum = b[[i, c]];
            for j in 0..i {
                sum -= l[[i, j]] * x[[j, c]];
            }
            x[[i, c]] = if unit { sum } else { sum / l[[i, i]] };
        }
    }
    x
}

/// |L| |x| with the diagonal of L as the solve takes it: the scale of the componentwise residual bound.
pub fn abs_product(l: ArrayView2<f64>, x: ArrayView2<f64>, unit: bool) -> Array2<f64> {
    let (n, m) = x.dim();
    Array2::from_shape_fn((n, m), |(i, c)| {
        let diagonal = if unit { 1.0 } else { l[[i, i]].abs() };
        (0..i).map(|j| l[[i, j]].abs() * x[[j, c]].abs()).sum::<f64>() + diagonal * x[[i, c]].abs()
    })
}

/// L x, likewise.
pub fn product(l: ArrayView2<f64>, x: ArrayView2<f64>, unit: bool) -> Array2<f64> {
    let (n, m) = x.dim();
    Array2::from_shape_fn((n, m), |(i, c)| {
        let diagonal = if unit { 1.0 } else { l[[i, i]] };
        (0..i).map(|j| l[[i, j]] * x[[j, c]]).sum::<f64>() + diagonal * x[[i, c]]
    })
}
