//! 8-bit activations: the scale, the values and their sums against float64, blocks for themselves.

use crate::buffer::{Input, Layout};
use crate::cases::quant::decode_q8;
use crate::compare::{bitwise, bytewise, Failure, Metrics, U32};
use crate::record;
use crate::suite::{everywhere, rng, Check, Outcome, Suite};
use crate::{case, choice};
use proptest::prelude::*;
use qwen3next_kernels::activations::{Op, Q8};
use qwen3next_kernels::{DType, Exec, Variant};
use rand::Rng as _;

choice! {
    /// The two layouts.
    pub enum Type {
        /// Blocks of 32.
        X32 = "q8_x32",
        /// Blocks of 256.
        X256 = "q8_x256",
    }
}

choice! {
    /// How a row is filled.
    pub enum Regime {
        /// Values up to 2.
        Mild = "mild",
        /// One value a block a thousand times the others.
        Outlier = "outlier",
        /// Halves between two levels, which round to even.
        Ties = "ties",
        /// From zeros and subnormals to the largest floats.
        Extreme = "extreme",
    }
}

case! {
    /// Rows of blocks.
    pub struct Case {
        /// Type to make.
        pub dtype: Type,
        /// Rows.
        pub rows: usize,
        /// Blocks a row.
        pub blocks: usize,
        /// Fill.
        pub regime: Regime,
        /// Strides of x.
        pub layout: Layout,
    }
}

impl Case {
    fn dtype(&self) -> DType {
        match self.dtype {
            Type::X32 => DType::Q8_X32,
            Type::X256 => DType::Q8_X256,
        }
    }

    fn n(&self) -> usize {
        self.blocks * self.dtype().block()
    }
}

fn inputs(case: &Case, seed: u64) -> Vec<f32> {
    let mut rng = rng(seed);
    let mut x: Vec<f32> = (0..case.rows * case.n()).map(|_| rng.random_range(-2.0f32..2.0)).collect();
    for block in x.chunks_mut(case.dtype().block()) {
        match case.regime {
            Regime::Mild => {}
            Regime::Outlier => block[rng.random_range(0..block.len())] *= 1000.0,
            Regime::Ties => {
                block.iter_mut().for_each(|x| *x = rng.random_range(-127i32..127) as f32 + 0.5);
                block[rng.random_range(0..block.len())] = 127.0;
            }
            Regime::Extreme => {
                let scale = [0.0, 1e-45, 1e-38, 1e-37, 1e30, 1.7e38][rng.random_range(0..6)];
                block.iter_mut().for_each(|x| *x *= scale);
            }
        }
    }
    x
}

fn encode(exec: &Exec<Op>, case: &Case, x: &[f32]) -> Result<Vec<u8>, Failure> {
    let mut q8 = Q8::default();
    let x = Input::new(x, [case.rows, case.n()], case.layout);
    if record::active() {
        // So that the memory is there, and known, before the call that is recorded.
        let scalar = Variant::by_name("scalar").ok_or_else(|| Failure::new("no scalar variant"))?;
        q8.quantize(case.dtype(), x.view(), &Exec::variant(scalar))?;
        record::lend(q8.bytes());
    }
    let done = q8.quantize(case.dtype(), x.view(), exec);
    record::gone(q8.bytes().as_ptr() as usize);
    done?;
    let bytes = case.dtype().bytes(case.rows * case.n()).expect("whole blocks");
    Ok(q8.bytes()[..bytes].to_vec())
}

/// The members of a block, by csrc/quant/q8_activations.h: d, q, and sums as (first value, values, sum).
fn members(dtype: DType, block: &[u8]) -> (f32, Vec<i8>, Vec<(usize, usize, i32)>) {
    let four = |at: usize| <[u8; 4]>::try_from(&block[at..at + 4]).expect("four bytes");
    let signed = |at: usize, n: usize| block[at..at + n].iter().map(|&b| b as i8).collect::<Vec<i8>>();
    if dtype == DType::Q8_X32 {
        return (f32::from_ne_bytes(four(0)), signed(8, 32), vec![(0, 32, i32::from_ne_bytes(four(4)))]);
    }
    let word = |at: usize| i32::from(i16::from_ne_bytes([block[at], block[at + 1]]));
    // Groups of four sums lie in the order 0 2 1 3.
    let place = |i: usize| i / 4 * 4 + [0, 2, 1, 3][i % 4];
    let sums = (0..8).map(|i| (32 * i, 32, word(256 + 2 * place(i))));
    let sums = sums.chain((0..16).map(|i| (16 * i, 16, word(272 + 2 * place(i))))).collect();
    (f32::from_ne_bytes(four(304)), signed(0, 256), sums)
}

/// d is the largest size over 127, rounded; q is within half a level and three roundings of x / d; sums are exact.
fn against_reference(variant: &Variant<Op>, case: &Case, seed: u64) -> Outcome {
    let x = inputs(case, seed);
    let bytes = encode(&Exec::variant(*variant), case, &x)?;
    let (block, size) = (case.dtype().block(), case.dtype().block_bytes());
    let mut metrics = Metrics::default();
    for (i, (x, bytes)) in x.chunks(block).zip(bytes.chunks(size)).enumerate() {
        let (d, q, sums) = members(case.dtype(), bytes);
        let most = x.iter().fold(0.0f64, |m, &x| m.max(f64::from(x).abs())) / 127.0;
        let small = most < 2f64.powi(-126) * (1.0 + 2.0 * U32);
        let right = (f64::from(d) - most).abs() <= U32 * most;
        if !(right || small && d == 0.0) {
            return Err(Failure::new(format!("block {i}: d is {d:e}, expected {most:e}")));
        }
        for (j, (&x, &q)) in x.iter().zip(&q).enumerate() {
            let level = if d == 0.0 { 0.0 } else { f64::from(x) / f64::from(d) };
            let off = (level - f64::from(q)).abs() / (0.5 + 127.0 * 3.0 * U32);
            if off.is_nan() || off > 1.0 {
                return Err(Failure::new(format!("block {i}: value {j} is level {q}, expected {level}")));
            }
            metrics.bound_multiple = metrics.bound_multiple.max(off);
        }
        for (first, n, sum) in sums {
            let want: i32 = q[first..first + n].iter().map(|&q| i32::from(q)).sum();
            if sum != want {
                return Err(Failure::new(format!(
                    "block {i}: the sum of {n} values from {first} is {sum}, not {want}"
                )));
            }
        }
        metrics.rows += 1;
    }
    Ok(Some(metrics))
}

/// Every variant makes the bytes that the scalar one makes.
fn same_bytes(variant: &Variant<Op>, case: &Case, seed: u64) -> Outcome {
    let x = inputs(case, seed);
    let scalar = Variant::by_name("scalar").ok_or_else(|| Failure::new("no scalar variant"))?;
    let (want, got) = (encode(&Exec::variant(scalar), case, &x)?, encode(&Exec::variant(*variant), case, &x)?);
    bytewise("y", &got, &want).map(Some)
}

/// A NaN or an infinity makes its block NaN and no other.
fn isolation(variant: &Variant<Op>, case: &Case, seed: u64) -> Outcome {
    let (mut x, block) = (inputs(case, seed), case.dtype().block());
    if x.is_empty() {
        return Ok(None);
    }
    let exec = Exec::variant(*variant);
    let mut want = decode_q8(case.dtype(), &encode(&exec, case, &x)?);
    let at = seed as usize % x.len();
    x[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][seed as usize % 3];
    want[at / block * block..][..block].fill(f32::NAN);
    bitwise("x", &decode_q8(case.dtype(), &encode(&exec, case, &x)?), &want)?;
    Ok(Some(Metrics::default()))
}

/// Any cut over any number of parts and threads gives the same bytes.
fn cuts(variant: &Variant<Op>, case: &Case, seed: u64) -> Outcome {
    let x = inputs(case, seed);
    let whole = encode(&Exec::variant(*variant).parts(1), case, &x)?;
    everywhere(variant, |exec| match encode(&exec, case, &x)? == whole {
        true => Ok(()),
        false => Err(Failure::new("a cut makes other bytes")),
    })?;
    Ok(Some(Metrics::default()))
}

/// The suite.
pub struct Activations;

impl Suite for Activations {
    type Op = Op;
    type Case = Case;

    fn grid() -> Vec<Case> {
        let mut grid = Vec::new();
        for (i, &dtype) in Type::ALL.iter().enumerate() {
            for (j, &regime) in Regime::ALL.iter().enumerate() {
                for (c, (rows, blocks)) in [(0, 1), (1, 0), (1, 1), (3, 2), (7, 5), (64, 3)].into_iter().enumerate() {
                    grid.push(Case { dtype, rows, blocks, regime, layout: Layout::ALL[(i + j + c) % 2] });
                }
            }
        }
        grid
    }

    fn strategy() -> BoxedStrategy<Case> {
        let choose = (prop::sample::select(Regime::ALL), prop::sample::select(Layout::ALL));
        (prop::sample::select(Type::ALL), 0usize..9, 0usize..6, choose)
            .prop_map(|(dtype, rows, blocks, (regime, layout))| Case { dtype, rows, blocks, regime, layout })
            .boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: against_reference },
            Check { name: "same_bytes", run: same_bytes },
            Check { name: "isolation", run: isolation },
            Check { name: "cuts", run: cuts },
        ]
    }
}
