//! Depthwise causal convolution in float64.

use ndarray::{Array2, ArrayView1, ArrayView2};

/// What came before, then the inputs of one sequence: `[W-1+T][C]`. State is `[C][W-1]`, oldest first.
pub fn history(state: ArrayView2<f64>, x: ArrayView2<f64>) -> Array2<f64> {
    let (c, window) = state.dim();
    Array2::from_shape_fn((window + x.nrows(), c), |(i, c)| if i < window { state[[c, i]] } else { x[[i - window, c]] })
}

/// y before the activation, `[T][C]`, from `history` and w `[C][W]`.
pub fn causal_conv(history: ArrayView2<f64>, w: ArrayView2<f64>, bias: Option<ArrayView1<f64>>) -> Array2<f64> {
    let width = w.ncols();
    Array2::from_shape_fn((history.nrows() + 1 - width, w.nrows()), |(t, c)| {
        bias.map_or(0.0, |b| b[c]) + (0..width).map(|j| w[[c, j]] * history[[t + j, c]]).sum::<f64>()
    })
}
