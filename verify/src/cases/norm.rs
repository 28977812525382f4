//! Row norms: every element to within a few roundings, and the invariances.

use super::{normal, wide};
use crate::buffer::{Input, Layout, Output};
use crate::compare::{bitwise, compare, gamma, Failure, Metrics, TINY32};
use crate::guard::Guarded;
use crate::reference::norm as reference;
use crate::suite::{everywhere, rng, Check, Outcome, Suite};
use crate::{case, choice};
use ndarray::ArrayView1;
use proptest::prelude::*;
use qwen3next_kernels::{norm, Exec, Variant};
use rand::Rng as _;

choice! {
    /// The formula.
    pub enum Kind {
        /// RMS norm with weights.
        Rms = "rms",
        /// RMS norm with weights of one.
        Plain = "plain",
        /// Zero-centred weights.
        Plus1 = "plus1",
        /// Gate after the norm.
        Gated = "gated",
        /// L2 norm.
        L2 = "l2",
    }
}

choice! {
    /// How x is filled.
    pub enum Regime {
        /// Standard normal.
        Normal = "normal",
        /// Around 1e30: squares overflow f32.
        Huge = "huge",
        /// Subnormal: squares vanish in f32.
        Tiny = "tiny",
        /// One large channel, as residual streams have.
        Spiked = "spiked",
        /// Every other row is zero.
        Zeros = "zeros",
    }
}

case! {
    /// One shape and fill.
    pub struct Case {
        /// Tokens.
        pub t: usize,
        /// Heads.
        pub h: usize,
        /// Channels.
        pub d: usize,
        /// Formula.
        pub kind: Kind,
        /// Added to the mean or the sum.
        pub eps: f32,
        /// y is x.
        pub in_place: bool,
        /// Strides.
        pub layout: Layout,
        /// Fill.
        pub regime: Regime,
    }
}

/// Inputs, packed.
#[derive(Clone)]
pub struct Inputs {
    /// `[T][H][D]`.
    pub x: Vec<f32>,
    /// `[D]`.
    pub w: Vec<f32>,
    /// `[T][H][D]`.
    pub z: Vec<f32>,
}

impl Inputs {
    /// Inputs of `case` drawn from `seed`.
    pub fn generate(case: &Case, seed: u64) -> Inputs {
        let rng = &mut rng(seed);
        let n = case.t * case.h * case.d;
        let x = |i: usize, rng: &mut _| match case.regime {
            Regime::Normal => normal(rng),
            Regime::Huge => normal(rng) * 1e30,
            Regime::Tiny => normal(rng) * 1e-40,
            Regime::Spiked if i % case.d == case.d / 2 => 3000.0,
            Regime::Spiked => normal(rng) * 0.1,
            Regime::Zeros if i / case.d % 2 == 1 => 0.0,
            Regime::Zeros => normal(rng),
        };
        let x = (0..n).map(|i| x(i, rng)).collect();
        let w = (0..case.d).map(|_| normal(rng)).collect();
        // A gate far out on either side too: there silu is z, or vanishes.
        let z = (0..n).map(|_| normal(rng) * if rng.random_ratio(1, 8) { 40.0 } else { 2.0 }).collect();
        Inputs { x, w, z }
    }
}

/// Runs the operator and returns y, packed.
pub fn call(exec: &Exec<norm::Op>, case: &Case, inputs: &Inputs) -> Result<Vec<f32>, Failure> {
    let shape = [case.t, case.h, case.d];
    let (x, z) = (Input::new(&inputs.x, shape, case.layout), Input::new(&inputs.z, shape, case.layout));
    let mut y =
        if case.in_place { Output::with(&inputs.x, shape, case.layout) } else { Output::new(shape, case.layout) };
    let w = Guarded::of(&inputs.w);
    let kind = match case.kind {
        Kind::Rms => norm::Kind::Rms(Some((&w[..]).into())),
        Kind::Plain => norm::Kind::Rms(None),
        Kind::Plus1 => norm::Kind::RmsPlus1((&w[..]).into()),
        Kind::Gated => norm::Kind::RmsGated { w: Some((&w[..]).into()), z: z.view() },
        Kind::L2 => norm::Kind::L2,
    };
    let x = (!case.in_place).then(|| x.view());
    norm::run(norm::Args { y: y.view(), x, kind, eps: case.eps }, exec)?;
    y.read("y")
}

/// The judge's y and the error every element may have: the factor, its product with x, the weight and 1 + w take a
/// rounding each; silu an exponential (two units), a sum and a quotient, and its product one more. A gate below −88
/// overflows the exponential: silu is then 0 instead of up to 88 · 2⁻¹²⁶.
pub fn judge(case: &Case, inputs: &Inputs) -> (Vec<f64>, Vec<f64>) {
    let (mut want, mut bound) = (Vec::new(), Vec::new());
    let (x, w, z) = (wide(&inputs.x), wide(&inputs.w), wide(&inputs.z));
    for (row, x) in x.chunks(case.d.max(1)).enumerate() {
        let x = ArrayView1::from(x);
        let eps = f64::from(case.eps);
        let y = if case.kind == Kind::L2 { reference::l2(x, eps) } else { reference::rms(x, eps) };
        for (i, y) in y.into_iter().enumerate() {
            let z = z[row * case.d + i];
            let (y, tiny) = match case.kind {
                Kind::Plain | Kind::L2 => (y, TINY32),
                Kind::Rms => (y * w[i], TINY32),
                Kind::Plus1 => (y * (1.0 + w[i]), TINY32),
                Kind::Gated => (y * w[i] * reference::silu(z), (1.0 + (y * w[i]).abs()) * 88.0 * TINY32),
            };
            bound.push(gamma(if case.kind == Kind::Gated { 9 } else { 4 }) * y.abs() + tiny);
            want.push(y);
        }
    }
    (want, bound)
}

fn against_reference(variant: &Variant<norm::Op>, case: &Case, seed: u64) -> Outcome {
    let inputs = Inputs::generate(case, seed);
    let y = call(&Exec::variant(*variant), case, &inputs)?;
    let (want, bound) = judge(case, &inputs);
    compare("y", &y, &want, &bound, case.d).map(Some)
}

/// With eps = 0, x · 2ⁿ gives the same bits.
fn scaling(variant: &Variant<norm::Op>, case: &Case, seed: u64) -> Outcome {
    if case.eps > 0.0 || !matches!(case.regime, Regime::Normal | Regime::Spiked) {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    let exec = Exec::variant(*variant);
    let y = call(&exec, case, &inputs)?;
    for power in [-40, 17] {
        let mut scaled = inputs.clone();
        scaled.x.iter_mut().for_each(|x| *x *= 2f32.powi(power));
        bitwise("y of a power of two times x", &call(&exec, case, &scaled)?, &y)?;
    }
    inputs.x.iter_mut().for_each(|x| *x = -*x);
    let negated: Vec<f32> = y.iter().map(|y| -y).collect();
    bitwise("y of -x", &call(&exec, case, &inputs)?, &negated)?;
    Ok(Some(Metrics::default()))
}

/// A row of zeros stays zero where eps > 0, and is 0/0 where it is not.
fn zeros(variant: &Variant<norm::Op>, case: &Case, seed: u64) -> Outcome {
    if case.regime != Regime::Zeros {
        return Ok(None);
    }
    let y = call(&Exec::variant(*variant), case, &Inputs::generate(case, seed))?;
    for (row, y) in y.chunks(case.d.max(1)).enumerate().filter(|(row, _)| row % 2 == 1) {
        if !y.iter().all(|y| if case.eps > 0.0 { *y == 0.0 } else { y.is_nan() }) {
            return Err(Failure::new(format!(
                "row {row} is {:e}, expected {}",
                y[0],
                if case.eps > 0.0 { "0" } else { "NaN" }
            )));
        }
    }
    Ok(Some(Metrics::default()))
}

/// Zero-centred weights of 0 are weights of 1, are no weights, bit for bit.
fn neutral_weights(variant: &Variant<norm::Op>, case: &Case, seed: u64) -> Outcome {
    if case.kind != Kind::Plus1 {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    let exec = Exec::variant(*variant);
    let plain = call(&exec, &Case { kind: Kind::Plain, ..case.clone() }, &inputs)?;
    inputs.w.fill(0.0);
    bitwise("1 + 0", &call(&exec, case, &inputs)?, &plain)?;
    inputs.w.fill(1.0);
    bitwise("w = 1", &call(&exec, &Case { kind: Kind::Rms, ..case.clone() }, &inputs)?, &plain)?;
    Ok(Some(Metrics::default()))
}

/// Gated is the norm, then silu(z): the gate does not enter the mean.
fn norm_before_gate(variant: &Variant<norm::Op>, case: &Case, seed: u64) -> Outcome {
    if case.kind != Kind::Gated {
        return Ok(None);
    }
    let inputs = Inputs::generate(case, seed);
    let exec = Exec::variant(*variant);
    let normed = wide(&call(&exec, &Case { kind: Kind::Rms, ..case.clone() }, &inputs)?);
    let want: Vec<f64> = normed.iter().zip(wide(&inputs.z)).map(|(y, z)| y * reference::silu(z)).collect();
    let bound: Vec<f64> =
        want.iter().zip(&normed).map(|(w, y)| gamma(9) * w.abs() + (1.0 + y.abs()) * 88.0 * TINY32).collect();
    compare("norm, then silu", &call(&exec, case, &inputs)?, &want, &bound, case.d).map(Some)
}

/// NaN and infinity stay in their row, and a row alone gives the same bits.
fn isolation(variant: &Variant<norm::Op>, case: &Case, seed: u64) -> Outcome {
    let rows = case.t * case.h;
    if rows == 0 || case.d == 0 {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    let exec = Exec::variant(*variant);
    let mut want = call(&exec, case, &inputs)?;
    let row = seed as usize % rows;
    let at = row * case.d..(row + 1) * case.d;
    let alone = Inputs { x: inputs.x[at.clone()].to_vec(), w: inputs.w.clone(), z: inputs.z[at.clone()].to_vec() };
    bitwise("a row alone", &call(&exec, &Case { t: 1, h: 1, ..case.clone() }, &alone)?, &want[at.clone()])?;

    inputs.x[at.start + seed as usize % case.d] = f32::NAN;
    want[at].fill(f32::NAN);
    bitwise("rows beside a NaN", &call(&exec, case, &inputs)?, &want)?;
    Ok(Some(Metrics::default()))
}

/// More rows than a dimension of a CUDA grid has blocks (65,535), with up to four rows a block.
fn many_rows(variant: &Variant<norm::Op>, case: &Case, seed: u64) -> Outcome {
    if case.d != 1 || case.kind != Kind::L2 || case.eps > 0.0 {
        return Ok(None);
    }
    against_reference(variant, &Case { t: 4 * 65_536, h: 1, regime: Regime::Normal, ..case.clone() }, seed)
}

/// Any cut over any number of threads, packed or strided, in place or not: the same bits.
fn cuts(variant: &Variant<norm::Op>, case: &Case, seed: u64) -> Outcome {
    let inputs = Inputs::generate(case, seed);
    let y = call(&Exec::variant(*variant).parts(1), case, &inputs)?;
    everywhere(variant, |exec| bitwise("cut", &call(&exec, case, &inputs)?, &y))?;
    let other = Case { in_place: !case.in_place, ..case.clone() };
    bitwise("in place", &call(&Exec::variant(*variant), &other, &inputs)?, &y)?;
    for &layout in Layout::ALL {
        bitwise("strides", &call(&Exec::variant(*variant), &Case { layout, ..case.clone() }, &inputs)?, &y)?;
    }
    Ok(Some(Metrics::default()))
}

/// The suite.
pub struct Norm;

impl Suite for Norm {
    type Op = norm::Op;
    type Case = Case;

    fn grid() -> Vec<Case> {
        let mut grid = Vec::new();
        for (i, d) in [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 64, 100, 128, 129, 256, 2048, 0].into_iter().enumerate() {
            for (j, &kind) in Kind::ALL.iter().enumerate() {
                for eps in [0.0, 1e-6] {
                    let k = i + j + usize::from(eps > 0.0);
                    grid.push(Case {
                        t: [3, 1, 2, 0][if k % 13 == 12 { 3 } else { k % 3 }],
                        h: [1, 2, 5][k % 3],
                        d,
                        kind,
                        eps,
                        in_place: k % 2 == 0,
                        layout: Layout::ALL[k / 2 % 2],
                        regime: Regime::ALL[(i + 2 * j) % 5],
                    });
                }
            }
        }
        grid
    }

    fn strategy() -> BoxedStrategy<Case> {
        let choose =
            (prop::sample::select(Kind::ALL), prop::sample::select(Layout::ALL), prop::sample::select(Regime::ALL));
        (0usize..5, 0usize..5, 0usize..300, prop::sample::select(&[0.0f32, 1e-6, 1e-5][..]), any::<bool>(), choose)
            .prop_map(|(t, h, d, eps, in_place, (kind, layout, regime))| Case {
                t,
                h,
                d,
                kind,
                eps,
                in_place,
                layout,
                regime,
            })
            .boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: against_reference },
            Check { name: "scaling", run: scaling },
            Check { name: "zeros", run: zeros },
            Check { name: "neutral_weights", run: neutral_weights },
            Check { name: "norm_before_gate", run: norm_before_gate },
            Check { name: "isolation", run: isolation },
            Check { name: "cuts", run: cuts },
            Check { name: "many_rows", run: many_rows },
        ]
    }
}
