//! Rotary embedding: against the formula, and what a rotation keeps.

use super::{normal, wide};
use crate::buffer::{Input, Layout, Output};
use crate::compare::{bitwise, compare, gamma, Failure, Metrics, TINY32};
use crate::guard::Guarded;
use crate::reference::rope as reference;
use crate::suite::{everywhere, rng, Check, Outcome, Suite};
use crate::{case, choice};
use ndarray::ArrayView1;
use proptest::prelude::*;
use qwen3next_kernels::{rope, Exec, Variant};
use rand::Rng as _;

choice! {
    /// Where the tokens stand.
    pub enum Positions {
        /// 0, 1, 2, ...
        Start = "start",
        /// Up to 4096, in no order.
        Short = "short",
        /// Up to 2²⁰.
        Long = "long",
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
        /// Pairs that are rotated: R/2.
        pub half: usize,
        /// Base of the frequencies.
        pub base: f64,
        /// y is x.
        pub in_place: bool,
        /// Strides.
        pub layout: Layout,
        /// Positions.
        pub positions: Positions,
    }
}

/// Inputs, packed.
#[derive(Clone)]
pub struct Inputs {
    /// `[T][H][D]`.
    pub x: Vec<f32>,
    /// `[T]`.
    pub pos: Vec<i64>,
}

impl Inputs {
    /// Inputs of `case` drawn from `seed`.
    pub fn generate(case: &Case, seed: u64) -> Inputs {
        let rng = &mut rng(seed);
        let x = (0..case.t * case.h * case.d).map(|_| normal(rng)).collect();
        let pos = |t: usize| match case.positions {
            Positions::Start => t as i64,
            Positions::Short => rng.random_range(0..4096),
            Positions::Long => rng.random_range(0..1 << 20),
        };
        Inputs { x, pos: (0..case.t).map(pos).collect() }
    }
}

/// Runs the operator and returns y, packed.
pub fn call(exec: &Exec<rope::Op>, case: &Case, inputs: &Inputs) -> Result<Vec<f32>, Failure> {
    let shape = [case.t, case.h, case.d];
    let x = Input::new(&inputs.x, shape, case.layout);
    let mut y =
        if case.in_place { Output::with(&inputs.x, shape, case.layout) } else { Output::new(shape, case.layout) };
    let pos = Guarded::of(&inputs.pos);
    let args = rope::Args {
        y: y.view(),
        x: (!case.in_place).then(|| x.view()),
        pos: &pos,
        base: case.base,
        rotary: 2 * case.half,
    };
    rope::run(args, exec)?;
    y.read("y")
}

/// The judge's y and the error every element may have: sine, cosine, two products and a sum take a rounding each, and
/// the angle, made in double, is off by a few units of its own size.
pub fn judge(case: &Case, inputs: &Inputs) -> (Vec<f64>, Vec<f64>) {
    let (mut want, mut bound) = (Vec::new(), Vec::new());
    for (row, x) in wide(&inputs.x).chunks(case.d.max(1)).enumerate() {
        let pos = inputs.pos[row / case.h];
        want.extend(reference::rope(ArrayView1::from(x), pos, case.base, 2 * case.half));
        for i in 0..case.d {
            if i >= 2 * case.half {
                bound.push(0.0);
                continue;
            }
            let (pair, half) = (i % case.half, case.half);
            let angle = reference::angle(pos, pair, case.base, 2 * half);
            let (sin, cos) = (angle.sin().abs(), angle.cos().abs());
            let (first, second) = (x[pair].abs(), x[pair + half].abs());
            let scale = if i < half { first * cos + second * sin } else { first * sin + second * cos };
            bound.push(gamma(3) * scale + angle * 8.0 * f64::EPSILON * (first + second) + TINY32);
        }
    }
    (want, bound)
}

fn against_reference(variant: &Variant<rope::Op>, case: &Case, seed: u64) -> Outcome {
    let inputs = Inputs::generate(case, seed);
    let y = call(&Exec::variant(*variant), case, &inputs)?;
    let (want, bound) = judge(case, &inputs);
    compare("y", &y, &want, &bound, case.d).map(Some)
}

/// Position 0 leaves (finite, non-zero) channels as they are, bit for bit.
fn origin(variant: &Variant<rope::Op>, case: &Case, seed: u64) -> Outcome {
    let mut inputs = Inputs::generate(case, seed);
    inputs.pos.fill(0);
    inputs.x.iter_mut().filter(|x| **x == 0.0).for_each(|x| *x = 1.0);
    bitwise("y at position 0", &call(&Exec::variant(*variant), case, &inputs)?, &inputs.x)?;
    Ok(Some(Metrics::default()))
}

/// The channels from R on are copied, whatever they hold: NaN with its payload too.
fn tail(variant: &Variant<rope::Op>, case: &Case, seed: u64) -> Outcome {
    let rotary = 2 * case.half;
    if rotary == case.d || case.t * case.h == 0 {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    let rng = &mut rng(seed);
    for row in inputs.x.chunks_mut(case.d) {
        row[rotary..].iter_mut().for_each(|x| *x = f32::from_bits(rng.random()));
        row[rotary] = f32::from_bits(0x7f80_1234);
    }
    let y = call(&Exec::variant(*variant), case, &inputs)?;
    for (row, (y, x)) in y.chunks(case.d).zip(inputs.x.chunks(case.d)).enumerate() {
        if let Some(i) = (rotary..case.d).find(|&i| y[i].to_bits() != x[i].to_bits()) {
            return Err(Failure::new(format!(
                "row {row}, channel {i}: {:#x} became {:#x}",
                x[i].to_bits(),
                y[i].to_bits()
            )));
        }
    }
    Ok(Some(Metrics::default()))
}

/// The dot product of two rotated heads depends on the distance of their positions alone.
fn relative_position(variant: &Variant<rope::Op>, case: &Case, seed: u64) -> Outcome {
    if case.h < 2 || case.t == 0 || case.d == 0 {
        return Ok(None);
    }
    let exec = Exec::variant(*variant);
    let inputs = Inputs::generate(case, seed);
    // Heads 0 and 1 of token 0 as query and key, at (p + distance, p) for several p: one token each.
    let distance = 1 + seed as i64 % 50;
    let (q, k) = (&inputs.x[..case.d], &inputs.x[case.d..2 * case.d]);
    let rotate = |x: &[f32], pos: i64| {
        let one = Case { t: 1, h: 1, ..case.clone() };
        call(&exec, &one, &Inputs { x: x.to_vec(), pos: vec![pos] }).map(|y| wide(&y))
    };
    let dot = |p: i64| -> Result<f64, Failure> {
        Ok(rotate(q, p + distance)?.iter().zip(rotate(k, p)?).map(|(a, b)| a * b).sum())
    };
    let base = dot(0)?;
    // Each rotated channel is off by γ₃ of the length of its pair, and double angles by a few of their units.
    let length = |x: &[f32], i: usize| {
        let i = i % case.half;
        f64::from(x[i]).hypot(f64::from(x[i + case.half]))
    };
    let scale: f64 = (0..2 * case.half).map(|i| length(q, i) * length(k, i)).sum();
    for p in [1, 63, 1000, 100_000] {
        let bound = (4.0 * gamma(3) + p as f64 * 32.0 * f64::EPSILON) * scale + TINY32;
        let difference = (dot(p)? - base).abs();
        let within = difference <= bound;
        if !within {
            return Err(Failure::new(format!(
                "q·k at {} and {p} differs by {difference:e} from that at {distance} and 0, bound {bound:e}",
                p + distance
            )));
        }
    }
    Ok(Some(Metrics::default()))
}

/// NaN in a channel reaches its pair and nothing else; a head alone gives the same bits.
fn isolation(variant: &Variant<rope::Op>, case: &Case, seed: u64) -> Outcome {
    if case.t * case.h * case.d == 0 {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    let exec = Exec::variant(*variant);
    let mut want = call(&exec, case, &inputs)?;
    let row = seed as usize % (case.t * case.h);
    let at = row * case.d..(row + 1) * case.d;
    let alone = Inputs { x: inputs.x[at.clone()].to_vec(), pos: vec![inputs.pos[row / case.h]] };
    bitwise("a head alone", &call(&exec, &Case { t: 1, h: 1, ..case.clone() }, &alone)?, &want[at.clone()])?;

    let channel = seed as usize / 7 % case.d;
    inputs.x[at.start + channel] = f32::NAN;
    if channel < 2 * case.half {
        want[at.start + channel % case.half] = f32::NAN;
        want[at.start + channel % case.half + case.half] = f32::NAN;
    } else {
        want[at.start + channel] = f32::NAN;
    }
    bitwise("y beside a NaN", &call(&exec, case, &inputs)?, &want)?;
    Ok(Some(Metrics::default()))
}

/// Any cut over any number of threads, packed or strided, in place or not: the same bits.
fn cuts(variant: &Variant<rope::Op>, case: &Case, seed: u64) -> Outcome {
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
pub struct Rope;

impl Suite for Rope {
    type Op = rope::Op;
    type Case = Case;

    fn grid() -> Vec<Case> {
        let mut grid = Vec::new();
        let shapes = [
            (256, 32),
            (64, 32),
            (64, 8),
            (1, 0),
            (2, 1),
            (3, 1),
            (16, 0),
            (33, 16),
            (34, 17),
            (128, 31),
            (100, 25),
            (0, 0),
            (512, 256),
        ];
        for (i, (d, half)) in shapes.into_iter().enumerate() {
            for (j, &positions) in Positions::ALL.iter().enumerate() {
                let k = i + j;
                grid.push(Case {
                    t: [4, 1, 3, 0][if k % 7 == 6 { 3 } else { k % 3 }],
                    h: [1, 2, 5][k / 2 % 3],
                    d,
                    half,
                    base: [1e7, 1e4, 2.0][k % 3],
                    in_place: k % 2 == 0,
                    layout: Layout::ALL[k / 2 % 2],
                    positions,
                });
            }
        }
        grid
    }

    fn strategy() -> BoxedStrategy<Case> {
        let choose = (
            prop::sample::select(Layout::ALL),
            prop::sample::select(Positions::ALL),
            prop::sample::select(&[1e7, 1e4, 0.5][..]),
        );
        (0usize..6, 0usize..5, 0usize..80, 0usize..80, any::<bool>(), choose)
            .prop_map(|(t, h, half, tail, in_place, (layout, positions, base))| Case {
                t,
                h,
                d: 2 * half + tail,
                half,
                base,
                in_place,
                layout,
                positions,
            })
            .boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: against_reference },
            Check { name: "origin", run: origin },
            Check { name: "tail", run: tail },
            Check { name: "relative_position", run: relative_position },
            Check { name: "isolation", run: isolation },
            Check { name: "cuts", run: cuts },
        ]
    }
}
