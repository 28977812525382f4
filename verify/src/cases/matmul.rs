//! Matmul: the dot-product bound for every dtype, and the independence of rows bit for bit.

use crate::buffer::{Input, Layout, Output};
use crate::cases::quant::{decode_q8, magnitudes, Blocks, Form, Type, NAN_BYTE};
use crate::compare::{bitwise, compare, gamma, Failure, Metrics};
use crate::reference::{matmul as reference, quant};
use crate::suite::{everywhere, rng, Check, Outcome, Suite};
use crate::{case, choice};
use ndarray::ArrayView2;
use proptest::prelude::*;
use qwen3next_kernels::activations::Rows;
use qwen3next_kernels::{matmul, Exec, Variant, View, Weight};
use rand::Rng as _;

choice! {
    /// How x is filled.
    pub enum Regime {
        /// Values up to 2.
        Mild = "mild",
        /// Rows scaled by powers of two from 2⁻²⁰ to 2²⁰.
        Scaled = "scaled",
        /// One channel a thousand times the others, as trained activations have them.
        Outlier = "outlier",
        /// All of a row the same, and quants at the ends of their range: the largest sums.
        Largest = "largest",
    }
}

case! {
    /// One product.
    pub struct Case {
        /// Type of w.
        pub dtype: Type,
        /// Rows of x.
        pub m: usize,
        /// Rows of w.
        pub n: usize,
        /// Blocks of the contracted axis: K = blocks · block.
        pub blocks: usize,
        /// How x and w meet; plain types have one form.
        pub form: Form,
        /// Strides; interleaved weights are packed.
        pub layout: Layout,
        /// Fill.
        pub regime: Regime,
    }
}

impl Case {
    /// Length of the contracted axis.
    pub fn k(&self) -> usize {
        self.blocks * self.dtype.dtype().block()
    }

    /// The form that the weights allow.
    fn form(&self) -> Form {
        self.form.for_weights(self.dtype.dtype(), self.n)
    }
}

/// Inputs, packed.
pub struct Inputs {
    /// `[m][k]`.
    pub x: Vec<f32>,
    /// `[n][k]` of the case's dtype.
    pub w: Vec<u8>,
}

impl Inputs {
    /// Inputs of `case` drawn from `seed`.
    pub fn generate(case: &Case, seed: u64) -> Inputs {
        let mut rng = rng(seed);
        let k = case.k();
        let mut x: Vec<f32> = (0..case.m * k).map(|_| rng.random_range(-2.0f32..2.0)).collect();
        for row in x.chunks_mut(k.max(1)) {
            match case.regime {
                Regime::Mild => {}
                Regime::Scaled => {
                    let scale = 2f32.powi(rng.random_range(-20..20));
                    row.iter_mut().for_each(|x| *x *= scale);
                }
                Regime::Outlier => {
                    let at = rng.random_range(0..row.len());
                    row[at] *= 1000.0;
                }
                Regime::Largest => {
                    let first = row[0];
                    row.fill(first);
                }
            }
        }
        let mut w = case.dtype.random(case.n * k, 1.0, &mut rng);
        if case.regime == Regime::Largest {
            case.dtype.fill_with_ends(&mut w, &mut rng);
        }
        Inputs { x, w }
    }
}

/// Runs the operator and returns y, packed.
pub fn multiply(exec: &Exec<matmul::Op>, case: &Case, inputs: &Inputs) -> Result<Vec<f32>, Failure> {
    let x = Input::new(&inputs.x, [case.m, case.k()], case.layout);
    let (form, dtype) = (case.form(), case.dtype.dtype());
    let (bytes, w_dtype) = form.weights(&inputs.w, dtype, case.k());
    let w_layout = if form.is_interleaved() { Layout::Packed } else { case.layout };
    let w = Blocks::new(&bytes, w_dtype, [case.n, case.k()], w_layout);
    let q8 = form.activations(x.view(), dtype)?;
    let rows = match &q8 {
        Some(bytes) => Rows::Q8(Weight::new(bytes, dtype.activations(), [case.m, case.k()])?),
        None => x.view().into(),
    };
    let mut y = Output::new([case.m, case.n], case.layout);
    matmul::run(matmul::Args { y: y.view(), x: rows, w: w.view() }, exec)?;
    y.read("y")
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// |ŷ − y| ≤ γ_{K+1} Σ|x||w| (one rounding more for the decoded weight), plus an underflow a product. 8-bit activations
/// are judged by the values they stand for; a block of integers rounds less than K times, but keeps the minima apart,
/// and its scales' product may underflow under a sum of 2^30.
pub fn against_reference(variant: &Variant<matmul::Op>, case: &Case, seed: u64) -> Outcome {
    let inputs = Inputs::generate(case, seed);
    let got = multiply(&Exec::variant(*variant), case, &inputs)?;
    let (k, dtype) = (case.k(), case.dtype.dtype());
    let q8 = case.form().activations(View::new(&inputs.x, [case.m, k])?, dtype)?;
    let x = q8.as_ref().map_or_else(|| wide(&inputs.x), |bytes| wide(&decode_q8(dtype.activations(), bytes)));
    let w = quant::dequantize(dtype, &inputs.w);
    let sizes = if q8.is_some() { magnitudes(case.dtype, &inputs.w) } else { w.clone() };
    let x = ArrayView2::from_shape((case.m, case.k()), &x).expect("m × k");
    let w = ArrayView2::from_shape((case.n, case.k()), &w).expect("n × k");
    let sizes = ArrayView2::from_shape((case.n, case.k()), &sizes).expect("n × k");
    let underflow = 2f64.powi(if q8.is_some() { -119 } else { -149 });
    let bound: Vec<f64> =
        reference::abs_matmul(x, sizes).iter().map(|s| gamma(k + 1) * s + k as f64 * underflow).collect();
    compare("y", &got, reference::matmul(x, w).as_slice().expect("packed"), &bound, case.n).map(Some)
}

/// A unit vector picks the decoded weights out, exactly.
fn unit_vectors(variant: &Variant<matmul::Op>, case: &Case, seed: u64) -> Outcome {
    let mut inputs = Inputs::generate(case, seed);
    let k = case.k();
    if k == 0 || case.form().is_q8() {
        return Ok(None);
    }
    let pick = |m: usize| (seed as usize + m * 37) % k;
    inputs.x.iter_mut().enumerate().for_each(|(i, x)| *x = f32::from(u8::from(i % k == pick(i / k))));
    let w = Blocks::new(&inputs.w, case.dtype.dtype(), [case.n, k], Layout::Packed);
    let w = qwen3next_kernels::quant::to_floats(w.view())?;
    // 0 + -0 is 0: the sum cannot keep the sign of a zero.
    let want: Vec<f32> = (0..case.m * case.n).map(|i| w[i % case.n * k + pick(i / case.n)] + 0.0).collect();
    bitwise("y", &multiply(&Exec::variant(*variant), case, &inputs)?, &want)?;
    Ok(Some(Metrics::default()))
}

/// Every row of x alone, and every row of w alone, give the bits they give in the batch.
fn rows_alone(variant: &Variant<matmul::Op>, case: &Case, seed: u64) -> Outcome {
    let inputs = Inputs::generate(case, seed);
    let exec = Exec::variant(*variant);
    let whole = multiply(&exec, case, &inputs)?;
    let (k, n) = (case.k(), case.n);
    let one_x = Case { m: 1, ..case.clone() };
    for m in 0..case.m {
        let alone = Inputs { x: inputs.x[m * k..][..k].to_vec(), w: inputs.w.clone() };
        bitwise("a row of x alone", &multiply(&exec, &one_x, &alone)?, &whole[m * n..][..n])?;
    }
    if case.form().is_interleaved() {
        return Ok(Some(Metrics::default()));
    }
    let one_w = Case { n: 1, ..case.clone() };
    let bytes = inputs.w.len() / n.max(1);
    for row in 0..n {
        let alone = Inputs { x: inputs.x.clone(), w: inputs.w[row * bytes..][..bytes].to_vec() };
        let want: Vec<f32> = whole.iter().skip(row).step_by(n).copied().collect();
        bitwise("a row of w alone", &multiply(&exec, &one_w, &alone)?, &want)?;
    }
    Ok(Some(Metrics::default()))
}

/// Any cut over any number of parts and threads gives the same bits.
fn cuts(variant: &Variant<matmul::Op>, case: &Case, seed: u64) -> Outcome {
    let inputs = Inputs::generate(case, seed);
    let whole = multiply(&Exec::variant(*variant).parts(1), case, &inputs)?;
    everywhere(variant, |exec| bitwise("cut", &multiply(&exec, case, &inputs)?, &whole))?;
    Ok(Some(Metrics::default()))
}

/// Scaling x by a power of two scales y, bit for bit.
fn scaling(variant: &Variant<matmul::Op>, case: &Case, seed: u64) -> Outcome {
    let mut inputs = Inputs::generate(case, seed);
    let exec = Exec::variant(*variant);
    let want: Vec<f32> = multiply(&exec, case, &inputs)?.iter().map(|y| y * 64.0).collect();
    inputs.x.iter_mut().for_each(|x| *x *= 64.0);
    bitwise("y of 64 x", &multiply(&exec, case, &inputs)?, &want)?;
    Ok(Some(Metrics::default()))
}

/// NaN in one row of x or of w stays in its row or column of y, and fills it.
fn isolation(variant: &Variant<matmul::Op>, case: &Case, seed: u64) -> Outcome {
    let (m, n, k) = (case.m, case.n, case.k());
    if m * n * k == 0 {
        return Ok(None);
    }
    let inputs = Inputs::generate(case, seed);
    let exec = Exec::variant(*variant);
    let whole = multiply(&exec, case, &inputs)?;
    let (bad_m, bad_n) = (seed as usize % m, (seed / 3) as usize % n);

    let mut poisoned = Inputs { x: inputs.x.clone(), w: inputs.w.clone() };
    poisoned.x[bad_m * k + seed as usize % k] = f32::NAN;
    let mut want = whole.clone();
    want[bad_m * n..][..n].fill(f32::NAN);
    bitwise("y with NaN in a row of x", &multiply(&exec, case, &poisoned)?, &want)?;

    let mut poisoned = inputs;
    let bytes = poisoned.w.len() / n;
    poisoned.w[bad_n * bytes..][..case.dtype.dtype().block_bytes()].fill(NAN_BYTE);
    let mut want = whole;
    let mut got = multiply(&exec, case, &poisoned)?;
    for (want, got) in want.iter_mut().zip(&mut got).skip(bad_n).step_by(n) {
        *want = f32::NAN;
        // MXFP4 has no NaN, and the largest finite scale may leave any number.
        if !case.dtype.nan_block().is_nan() {
            *got = f32::NAN;
        }
    }
    bitwise("y with NaN in a row of w", &got, &want)?;
    Ok(Some(Metrics::default()))
}

/// The suite.
pub struct Matmul;

impl Suite for Matmul {
    type Op = matmul::Op;
    type Case = Case;

    fn grid() -> Vec<Case> {
        let mut grid = Vec::new();
        for (i, &dtype) in Type::ALL.iter().enumerate() {
            let block = dtype.dtype().block();
            let edges = [1, 2, 15, 16, 17, 31, 33, 67, 257];
            for (j, (m, n)) in [(1, 1), (1, 8), (2, 7), (3, 9), (8, 16), (9, 17), (64, 3), (1, 65), (0, 5), (5, 0)]
                .into_iter()
                .enumerate()
            {
                let c = i + j;
                let blocks = if block == 1 { edges[j % edges.len()] } else { [1, 2, 3, 5][c % 4].min(768 / block) };
                let (layout, regime) = (Layout::ALL[c % 2], Regime::ALL[c % 3]);
                grid.push(Case { dtype, m, n, blocks, form: Form::F32, layout, regime });
            }
            let plain =
                Case { dtype, m: 2, n: 3, blocks: 0, form: Form::F32, layout: Layout::Packed, regime: Regime::Mild };
            grid.push(plain.clone());
            let long = Case { m: 1, n: 24, blocks: 2048 / block, regime: Regime::Outlier, ..plain.clone() };
            grid.push(long.clone());
            if block == 1 {
                continue;
            }
            // Every tile of tokens, one and two groups of rows, groups cut short.
            for (j, &form) in Form::ALL.iter().enumerate().skip(1) {
                for (c, (m, n)) in
                    [(1, 16), (2, 32), (3, 48), (4, 17), (5, 16), (7, 33), (8, 15), (10, 64), (29, 31), (0, 16)]
                        .into_iter()
                        .enumerate()
                {
                    let n = if form.is_interleaved() { usize::div_ceil(n, 16) * 16 } else { n };
                    let (layout, regime) = (Layout::ALL[c % 2], Regime::ALL[(i + c) % 3]);
                    let blocks = [1, 2, 3, 5][(i + j + c) % 4].min(768 / block);
                    grid.push(Case { dtype, m, n, blocks, form, layout, regime });
                }
                for m in [3, 31] {
                    let regime = Regime::Largest;
                    grid.push(Case { form, m, n: 48, blocks: 2, regime, ..plain.clone() });
                }
                grid.push(Case { form, n: 16, ..plain.clone() });
                grid.push(Case { form, n: 48, ..long.clone() });
            }
        }
        grid
    }

    fn strategy() -> BoxedStrategy<Case> {
        let choose = (prop::sample::select(Layout::ALL), prop::sample::select(Regime::ALL));
        let types = (prop::sample::select(Type::ALL), prop::sample::select(Form::ALL));
        (types, 0usize..24, 0usize..40, 0usize..300, choose)
            .prop_map(|((dtype, form), m, n, k, (layout, regime))| {
                let block = dtype.dtype().block();
                Case { dtype, m, n, blocks: k.div_ceil(block), form, layout, regime }
            })
            .boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: against_reference },
            Check { name: "unit_vectors", run: unit_vectors },
            Check { name: "rows_alone", run: rows_alone },
            Check { name: "cuts", run: cuts },
            Check { name: "scaling", run: scaling },
            Check { name: "isolation", run: isolation },
        ]
    }
}
