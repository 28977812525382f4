//! Triangular solve: residual bound on every shape, and what must hold bit for bit.

use crate::buffer::{Input, Layout, Output};
use crate::compare::{bitwise, compare, gamma, Failure, Metrics, TINY32};
use crate::reference::solve_tri as reference;
use crate::suite::{everywhere, rng, Check, Outcome, Suite};
use crate::{case, choice};
use ndarray::ArrayView2;
use proptest::prelude::*;
use qwen3next_kernels::{solve_tri, Exec, Variant};
use rand::Rng as _;

choice! {
    /// How the triangle is filled.
    pub enum Regime {
        /// Entries up to 1/sqrt(n), diagonal in 0.5..1.5.
        Mild = "mild",
        /// The delta rule's β K Kᵀ ∘ Γ with nearly parallel keys: ‖A‖∞ grows with n, past 37.
        Delta = "delta",
        /// Rows scaled by powers of two from 2⁻²⁰ to 2²⁰, diagonal included.
        Scaled = "scaled",
    }
}

case! {
    /// One shape and fill.
    pub struct Case {
        /// Batch entries.
        pub batch: usize,
        /// Rows.
        pub n: usize,
        /// Right-hand sides.
        pub m: usize,
        /// Unit diagonal.
        pub unit: bool,
        /// Explicit inverse: b = None, m = n.
        pub inverse: bool,
        /// Strides.
        pub layout: Layout,
        /// Fill.
        pub regime: Regime,
    }
}

/// Inputs, packed.
pub struct Inputs {
    /// `[batch][n][n]`, NaN above the diagonal (and on it with a unit diagonal).
    pub l: Vec<f32>,
    /// `[batch][n][m]`.
    pub b: Vec<f32>,
}

impl Inputs {
    /// Inputs of `case` drawn from `seed`. What the contract says is never read holds NaN.
    pub fn generate(case: &Case, seed: u64) -> Inputs {
        let mut rng = rng(seed);
        let (n, m) = (case.n, case.m);
        let mut l = vec![f32::NAN; case.batch * n * n];
        for entry in l.chunks_mut((n * n).max(1)) {
            // Delta: a long-memory decay and keys that share a direction, as a trained layer has them.
            let decay: f64 = rng.random_range(0.0..0.005);
            for i in 0..n {
                let row_scale = 2f32.powi(rng.random_range(-20..20));
                for j in 0..=i {
                    entry[i * n + j] = match (case.regime, i == j) {
                        (_, true) if case.unit => f32::NAN,
                        (Regime::Mild, false) => rng.random_range(-1.0..1.0) / (n as f32).sqrt(),
                        (Regime::Delta, false) => (rng.random_range(0.5..1.0) * (-decay * (i - j) as f64).exp()) as f32,
                        (Regime::Scaled, false) if case.unit => rng.random_range(-1.0f32..1.0) / n as f32,
                        (Regime::Scaled, false) => rng.random_range(-1.0f32..1.0) * row_scale / n as f32,
                        (Regime::Scaled, true) => row_scale,
                        (_, true) => rng.random_range(0.5..1.5) * if rng.random() { 1.0 } else { -1.0 },
                    };
                }
            }
        }
        let b = (0..case.batch * n * m).map(|_| rng.random_range(-25.0f32..25.0)).collect();
        Inputs { l, b }
    }
}

/// Runs the operator and returns x, packed.
pub fn solve(exec: &Exec<solve_tri::Op>, case: &Case, inputs: &Inputs) -> Result<Vec<f32>, Failure> {
    let (batch, n, m) = (case.batch, case.n, case.m);
    let l = Input::new(&inputs.l, [batch, n, n], case.layout);
    let b = Input::new(&inputs.b, [batch, n, m], case.layout);
    let mut x = Output::new([batch, n, m], case.layout);
    let args =
        solve_tri::Args { x: x.view(), l: l.view(), b: (!case.inverse).then(|| b.view()), unit_diagonal: case.unit };
    solve_tri::run(args, exec)?;
    x.read("x")
}

fn identity_matrices(batch: usize, n: usize) -> Vec<f32> {
    (0..batch * n * n).map(|i| if i % (n * n) / n == i % n { 1.0 } else { 0.0 }).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Componentwise backward error: |b − L x̂| ≤ γₙ₊₁ |L| |x̂| (Higham, theorem 8.5; one more for the division), plus
/// what underflow can lose.
pub fn residual(variant: &Variant<solve_tri::Op>, case: &Case, seed: u64) -> Outcome {
    let mut inputs = Inputs::generate(case, seed);
    let x = solve(&Exec::variant(*variant), case, &inputs)?;
    let (n, m) = (case.n, case.m);
    if case.inverse {
        inputs.b = identity_matrices(case.batch, n);
    }
    let (l, b, xs) = (wide(&inputs.l), wide(&inputs.b), wide(&x));
    let mut worst = Metrics::default();
    for entry in 0..if n * m > 0 { case.batch } else { 0 } {
        let l = ArrayView2::from_shape((n, n), &l[entry * n * n..][..n * n]).expect("n × n");
        let b = ArrayView2::from_shape((n, m), &b[entry * n * m..][..n * m]).expect("n × m");
        let x = ArrayView2::from_shape((n, m), &xs[entry * n * m..][..n * m]).expect("n × m");
        let got: Vec<f32> = reference::product(l, x, case.unit).iter().map(|&p| p as f32).collect();
        let scale = reference::abs_product(l, x, case.unit);
        // The residual is formed in f64 and rounded once to f32 for the comparison: one more u.
        let bound: Vec<f64> = scale.iter().map(|&s| gamma(n + 2) * s + n as f64 * TINY32).collect();
        let residual = compare("L x", &got, b.as_slice().expect("packed"), &bound, m)?;
        // Relative to b a backward error says nothing: only the multiple of the bound is reported.
        worst = worst.worst(Metrics { bound_multiple: residual.bound_multiple, ..Metrics::default() });
    }
    Ok(Some(worst))
}

/// Against the float64 solution, bounded by |L⁻¹| γ |L| |x| (the residual bound carried through the solve).
fn against_reference(variant: &Variant<solve_tri::Op>, case: &Case, seed: u64) -> Outcome {
    if case.regime == Regime::Delta {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    let x = solve(&Exec::variant(*variant), case, &inputs)?;
    let (n, m) = (case.n, case.m);
    if case.inverse {
        inputs.b = identity_matrices(case.batch, n);
    }
    let (l, b) = (wide(&inputs.l), wide(&inputs.b));
    let mut worst = Metrics::default();
    for entry in 0..if n * m > 0 { case.batch } else { 0 } {
        let l = ArrayView2::from_shape((n, n), &l[entry * n * n..][..n * n]).expect("n × n");
        let b = ArrayView2::from_shape((n, m), &b[entry * n * m..][..n * m]).expect("n × m");
        let want = reference::solve_tri(l, b, case.unit);
        let identity = ndarray::Array2::eye(n);
        let inverse = reference::solve_tri(l, identity.view(), case.unit).mapv(f64::abs);
        let scale = reference::abs_product(l, want.view(), case.unit);
        let bound: Vec<f64> = inverse.dot(&scale).iter().map(|&s| 2.0 * gamma(n + 2) * s + n as f64 * TINY32).collect();
        let got = &x[entry * n * m..][..n * m];
        worst = worst.worst(compare("x", got, want.as_slice().expect("packed"), &bound, m)?);
    }
    Ok(Some(worst))
}

/// L = I returns b, bit for bit.
fn identity(variant: &Variant<solve_tri::Op>, case: &Case, seed: u64) -> Outcome {
    if case.inverse {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    for (i, l) in inputs.l.iter_mut().enumerate() {
        let (row, col) = (i / case.n % case.n, i % case.n);
        *l = if row > col {
            0.0
        } else if row == col && !case.unit {
            1.0
        } else {
            f32::NAN
        };
    }
    bitwise("x", &solve(&Exec::variant(*variant), case, &inputs)?, &inputs.b)?;
    Ok(Some(Metrics::default()))
}

/// Scaling b by a power of two scales x, bit for bit.
fn scaling(variant: &Variant<solve_tri::Op>, case: &Case, seed: u64) -> Outcome {
    if case.inverse || case.regime == Regime::Scaled {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    let exec = Exec::variant(*variant);
    let (b, x) = (inputs.b.clone(), solve(&exec, case, &inputs)?);
    let mut applied = None;
    for power in [-9, 4, 20] {
        let factor = 2f32.powi(power);
        inputs.b = b.iter().map(|b| b * factor).collect();
        let want: Vec<f32> = x.iter().map(|x| x * factor).collect();
        // Only results well inside the normal range scale exactly: terms of a sum are smaller than the sum.
        let least = f32::MIN_POSITIVE / f32::EPSILON;
        if want.iter().chain(&x).any(|w| !w.is_finite() || *w != 0.0 && w.abs() < least) {
            continue;
        }
        bitwise("x of a power of two times b", &solve(&exec, case, &inputs)?, &want)?;
        applied = Some(Metrics::default());
    }
    Ok(applied)
}

/// A column's result does not depend on the others: NaN in one stays in it, and alone it gives the same bits.
fn columns(variant: &Variant<solve_tri::Op>, case: &Case, seed: u64) -> Outcome {
    if case.inverse || case.m == 0 || case.n == 0 || case.batch == 0 {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    let exec = Exec::variant(*variant);
    let x = solve(&exec, case, &inputs)?;
    let column = seed as usize % case.m;
    let pick = |values: &[f32]| values.iter().skip(column).step_by(case.m).copied().collect::<Vec<f32>>();

    let single = Case { m: 1, ..case.clone() };
    let alone = Inputs { l: inputs.l.clone(), b: pick(&inputs.b) };
    bitwise("one column alone", &solve(&exec, &single, &alone)?, &pick(&x))?;

    inputs.b.iter_mut().enumerate().for_each(|(i, b)| {
        if i % case.m != column {
            *b = f32::NAN;
        }
    });
    bitwise("a column among NaN", &pick(&solve(&exec, case, &inputs)?), &pick(&x))?;
    Ok(Some(Metrics::default()))
}

/// Any cut over any number of parts and threads gives the same bits, and so do other strides.
fn cuts(variant: &Variant<solve_tri::Op>, case: &Case, seed: u64) -> Outcome {
    let inputs = Inputs::generate(case, seed);
    let x = solve(&Exec::variant(*variant).parts(1), case, &inputs)?;
    everywhere(variant, |exec| bitwise("cut", &solve(&exec, case, &inputs)?, &x))?;
    for &layout in Layout::ALL {
        bitwise("strides", &solve(&Exec::variant(*variant), &Case { layout, ..case.clone() }, &inputs)?, &x)?;
    }
    Ok(Some(Metrics::default()))
}

/// NaN and infinity in one batch entry stay there.
fn isolation(variant: &Variant<solve_tri::Op>, case: &Case, seed: u64) -> Outcome {
    if case.batch < 2 || case.n == 0 {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    let exec = Exec::variant(*variant);
    let x = solve(&exec, case, &inputs)?;
    inputs.l[..case.n * case.n].fill(f32::NAN);
    let poisoned = solve(&exec, case, &inputs)?;
    let entry = case.n * case.m;
    bitwise("the other entries", &poisoned[entry..], &x[entry..])?;
    Ok(Some(Metrics::default()))
}

/// The suite.
pub struct SolveTri;

impl Suite for SolveTri {
    type Op = solve_tri::Op;
    type Case = Case;

    fn grid() -> Vec<Case> {
        let mut grid = Vec::new();
        // Edges of every block a variant may solve by: 4, 8, 16, 32, 64, 128.
        let ns = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256];
        let ms = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65];
        for (i, n) in ns.into_iter().enumerate() {
            // Large triangles meet every third width, another third each.
            let step = if n > 33 { 3 } else { 1 };
            for (j, m) in ms.into_iter().enumerate().filter(|(j, _)| (i + j) % step == 0) {
                let k = i * 7 + j / step;
                grid.push(Case {
                    batch: [1, 2, 3, 0][if k % 17 == 0 { 3 } else { k % 3 }],
                    n,
                    m,
                    unit: k % 2 == 0,
                    inverse: false,
                    layout: Layout::ALL[k / 2 % 2],
                    regime: Regime::ALL[k % 3],
                });
            }
            for unit in [false, true] {
                let (layout, regime) = (Layout::ALL[i % 2], Regime::Mild);
                grid.push(Case { batch: 2, n, m: n, unit, inverse: true, layout, regime });
            }
        }
        grid
    }

    fn strategy() -> BoxedStrategy<Case> {
        let choose = (prop::sample::select(Layout::ALL), prop::sample::select(Regime::ALL));
        (0usize..4, 0usize..80, 0usize..40, any::<bool>(), any::<bool>(), choose)
            .prop_map(|(batch, n, m, unit, inverse, (layout, regime))| Case {
                batch,
                n,
                m: if inverse { n } else { m },
                unit,
                inverse,
                layout,
                regime,
            })
            .boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "residual", run: residual },
            Check { name: "reference", run: against_reference },
            Check { name: "identity", run: identity },
            Check { name: "scaling", run: scaling },
            Check { name: "columns", run: columns },
            Check { name: "cuts", run: cuts },
            Check { name: "isolation", run: isolation },
        ]
    }
}
