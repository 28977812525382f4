//! Causal convolution: outputs against the formula, state and snapshots bit for bit.

use super::{normal, wide};
use crate::buffer::{FarPool, Input, Layout, Output};
use crate::compare::{bitwise, compare, gamma, Failure, Metrics, TINY32};
use crate::guard::Guarded;
use crate::reference::{causal_conv as reference, norm::silu};
use crate::suite::{everywhere, rng, Check, Outcome, Suite};
use crate::{case, choice};
use ndarray::{ArrayView1, ArrayView2};
use proptest::prelude::*;
use qwen3next_kernels::{causal_conv, Exec, Variant, View, ViewMut};
use rand::seq::SliceRandom;
use rand::Rng as _;

choice! {
    /// Which states a call takes and gives.
    pub enum States {
        /// None.
        Zeros = "zeros",
        /// In only.
        In = "in",
        /// Out only.
        Out = "out",
        /// From one pool into another.
        InOut = "inout",
        /// In place.
        InPlace = "inplace",
    }
}

case! {
    /// One shape and form of call.
    pub struct Case {
        /// Sequences.
        pub batch: usize,
        /// Tokens of a sequence (packed: on average).
        pub t: usize,
        /// Channels.
        pub c: usize,
        /// Taps.
        pub width: usize,
        /// With a bias.
        pub bias: bool,
        /// With SiLU.
        pub silu: bool,
        /// States.
        pub states: States,
        /// With snapshots.
        pub snapshots: bool,
        /// Sequences of different lengths, some empty, in one row.
        pub packed: bool,
        /// Strides.
        pub layout: Layout,
    }
}

/// Pool entries beyond one a sequence.
const SPARE: usize = 2;

/// A call: what it takes, packed, and its shape.
#[derive(Clone)]
pub struct Problem {
    /// `[B]` sequences of `[T][C]`, one after the other.
    pub x: Vec<f32>,
    /// `[C][W]`.
    pub w: Vec<f32>,
    /// `[C]`.
    pub bias: Option<Vec<f32>>,
    /// `[slots][C][W-1]`.
    pub pool: Vec<f32>,
    /// Entries of the pool.
    pub slots: usize,
    /// `[B]`.
    pub slot_in: Vec<i64>,
    /// `[B]`.
    pub slot_out: Vec<i64>,
    /// First token of every sequence and the end of the last, `[B+1]`.
    pub cu: Vec<i64>,
    /// Channels.
    pub c: usize,
    /// Taps.
    pub width: usize,
    /// The rest of the case.
    pub case: Case,
}

/// What a call gives, packed.
pub struct Outputs {
    /// Shape of x.
    pub y: Vec<f32>,
    /// The pool after the call; `None` where the call gives no state.
    pub pool: Option<Vec<f32>>,
    /// `[tokens][C][W-1]`.
    pub snapshots: Option<Vec<f32>>,
}

impl Problem {
    /// The problem of `case` drawn from `seed`.
    pub fn generate(case: &Case, seed: u64) -> Problem {
        let rng = &mut rng(seed);
        let mut cu = vec![0];
        for b in 0..case.batch {
            let n = match case.packed {
                true if b % 3 == 1 => 0,
                true => rng.random_range(0..=2 * case.t),
                false => case.t,
            };
            cu.push(cu[b] + n as i64);
        }
        let slots = case.batch + SPARE;
        let mut shuffled = || {
            let mut all: Vec<i64> = (0..slots as i64).collect();
            all.shuffle(rng);
            all.truncate(case.batch);
            all
        };
        let slot_out = shuffled();
        let slot_in = if case.states == States::InPlace { slot_out.clone() } else { shuffled() };
        let tokens = cu[case.batch] as usize;
        let mut fill = |n: usize, scale: f32| (0..n).map(|_| normal(rng) * scale).collect::<Vec<f32>>();
        Problem {
            x: fill(tokens * case.c, 3.0),
            w: fill(case.c * case.width, 0.5),
            bias: case.bias.then(|| fill(case.c, 1.0)),
            pool: fill(slots * case.c * (case.width - 1), 3.0),
            slots,
            slot_in,
            slot_out,
            cu,
            c: case.c,
            width: case.width,
            case: case.clone(),
        }
    }

    fn window(&self) -> usize {
        self.c * (self.width - 1)
    }

    fn takes_state(&self) -> bool {
        !matches!(self.case.states, States::Zeros | States::Out)
    }

    fn gives_state(&self) -> bool {
        !matches!(self.case.states, States::Zeros | States::In)
    }

    fn tokens(&self, b: usize) -> std::ops::Range<usize> {
        self.cu[b] as usize..self.cu[b + 1] as usize
    }

    /// Runs the operator.
    pub fn call(&self, exec: &Exec<causal_conv::Op>) -> Result<Outputs, Failure> {
        let (batch, case, window) = (self.slot_in.len(), &self.case, self.width - 1);
        let (rows, t) = if case.packed { (1, self.cu[batch] as usize) } else { (batch, case.t) };
        let x = Input::new(&self.x, [rows, t, self.c], case.layout);
        let w = Input::new(&self.w, [self.c, self.width], case.layout);
        let pool_shape = [self.slots, self.c, window];
        let pool_in = Input::new(&self.pool, pool_shape, case.layout);
        let mut pool_out = Output::with(&self.pool, pool_shape, case.layout);
        let mut y = Output::new([rows, t, self.c], case.layout);
        let mut snapshots = Output::new([rows, t, self.c, window], case.layout);
        let bias = self.bias.as_deref().map(Guarded::of);
        let (slot_in, slot_out) = (Guarded::of(&self.slot_in), Guarded::of(&self.slot_out));
        let cu = Guarded::of(&self.cu);
        let args = causal_conv::Args {
            y: y.view(),
            x: x.view(),
            w: w.view(),
            bias: bias.as_deref().map(View::from),
            state: match case.states {
                States::Zeros => causal_conv::State::Zeros,
                States::In => causal_conv::State::In(pool_in.view()),
                States::Out => causal_conv::State::Out(pool_out.view()),
                States::InOut => causal_conv::State::InOut(pool_in.view(), pool_out.view()),
                States::InPlace => causal_conv::State::InPlace(pool_out.view()),
            },
            snapshots: case.snapshots.then(|| snapshots.view()),
            slot_in: Some(&slot_in),
            slot_out: Some(&slot_out),
            cu_seqlens: case.packed.then_some(&cu[..]),
            silu: case.silu,
        };
        causal_conv::run(args, exec)?;
        Ok(Outputs {
            y: y.read("y")?,
            pool: if self.gives_state() { Some(pool_out.read("state_out")?) } else { None },
            snapshots: if case.snapshots { Some(snapshots.read("snapshots")?) } else { None },
        })
    }

    /// The state of sequence b after its first n tokens, moved bit for bit.
    fn state_after(&self, b: usize, n: usize) -> Vec<f32> {
        let window = self.width - 1;
        let start = &self.pool[self.slot_in[b] as usize * self.window()..][..self.window()];
        let x = &self.x[self.cu[b] as usize * self.c..];
        let mut state = Vec::new();
        for c in 0..self.c {
            for i in n..n + window {
                state.push(match i.checked_sub(window) {
                    Some(t) => x[t * self.c + c],
                    None if self.takes_state() => start[c * window + i],
                    None => 0.0,
                });
            }
        }
        state
    }

    /// The judge's y and the error every element may have: γ of the sum's terms, carried through SiLU, whose slope is
    /// below 1.1 and whose own exponential, sum and quotient take five roundings. Below −88 SiLU is 0 in f32 instead of
    /// up to 88 · 2⁻¹²⁶.
    pub fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let (mut want, mut bound) = (Vec::new(), Vec::new());
        let w = wide(&self.w);
        let w = ArrayView2::from_shape((self.c, self.width), &w).expect("C × W");
        let bias = self.bias.as_ref().map(|b| wide(b));
        let abs_bias = bias.as_ref().map(|b| b.iter().map(|b| b.abs()).collect::<Vec<f64>>());
        for b in 0..self.slot_in.len() {
            let n = self.tokens(b).len();
            let x = wide(&self.x[self.cu[b] as usize * self.c..][..n * self.c]);
            let x = ArrayView2::from_shape((n, self.c), &x).expect("T × C");
            let state = wide(&self.state_after(b, 0));
            let state = ArrayView2::from_shape((self.c, self.width - 1), &state).expect("C × (W-1)");
            let history = reference::history(state, x);
            let sums = reference::causal_conv(history.view(), w, bias.as_deref().map(ArrayView1::from));
            let scale = reference::causal_conv(
                history.mapv(f64::abs).view(),
                w.mapv(f64::abs).view(),
                abs_bias.as_deref().map(ArrayView1::from),
            );
            for (&a, s) in sums.iter().zip(scale) {
                let error = gamma(self.width + 2) * s;
                want.push(if self.case.silu { silu(a) } else { a });
                bound.push(if self.case.silu { 1.1 * error + gamma(5) * silu(a).abs() + 88.0 * TINY32 } else { error });
            }
        }
        (want, bound)
    }

    /// y against the judge, state and snapshots bit for bit.
    pub fn judge(&self, got: &Outputs) -> Result<Metrics, Failure> {
        let (want, bound) = self.expected();
        let metrics = compare("y", &got.y, &want, &bound, self.c)?;

        if let Some(pool) = &got.pool {
            let mut want = self.pool.clone();
            for (b, &slot) in self.slot_out.iter().enumerate() {
                want[slot as usize * self.window()..][..self.window()]
                    .copy_from_slice(&self.state_after(b, self.tokens(b).len()));
            }
            bitwise("state_out", pool, &want)?;
        }
        if let Some(snapshots) = &got.snapshots {
            let mut want = Vec::new();
            for b in 0..self.slot_in.len() {
                (1..=self.tokens(b).len()).for_each(|n| want.extend(self.state_after(b, n)));
            }
            bitwise("snapshots", snapshots, &want)?;
        }
        Ok(metrics)
    }

    /// The first or the second part of every sequence, cut where `at` says, on the pool `pool`.
    fn piece(&self, at: impl Fn(usize) -> usize, second: bool, pool: Vec<f32>, slot_in: &[i64]) -> Problem {
        let (mut x, mut cu) = (Vec::new(), vec![0]);
        for b in 0..self.slot_in.len() {
            let all = self.tokens(b);
            let cut = all.start + at(all.len());
            let part = if second { cut..all.end } else { all.start..cut };
            cu.push(cu[b] + part.len() as i64);
            x.extend_from_slice(&self.x[part.start * self.c..part.end * self.c]);
        }
        let case = Case { packed: true, ..self.case.clone() };
        Problem { x, cu, pool, slot_in: slot_in.to_vec(), case, ..self.clone() }
    }
}

fn against_reference(variant: &Variant<causal_conv::Op>, case: &Case, seed: u64) -> Outcome {
    let problem = Problem::generate(case, seed);
    problem.judge(&problem.call(&Exec::variant(*variant))?).map(Some)
}

/// A one in channel c at token t comes out as the taps, last one first, bit for bit.
fn impulse(variant: &Variant<causal_conv::Op>, case: &Case, seed: u64) -> Outcome {
    if case.packed || case.t == 0 || case.c == 0 {
        return Ok(None);
    }
    let case = Case { bias: false, silu: false, states: States::Zeros, ..case.clone() };
    let mut problem = Problem::generate(&case, seed);
    let at = seed as usize % case.t;
    problem.x.fill(0.0);
    problem.x.chunks_mut(case.t * case.c).for_each(|x| x[at * case.c..(at + 1) * case.c].fill(1.0));
    let y = problem.call(&Exec::variant(*variant))?.y;
    let mut want = vec![0.0; y.len()];
    for (i, want) in want.iter_mut().enumerate() {
        let (t, c) = (i / case.c % case.t, i % case.c);
        if t >= at && t - at < case.width {
            *want = problem.w[c * case.width + case.width - 1 - (t - at)];
        }
    }
    // Sums of zeros may be either zero.
    let y: Vec<f32> = y.iter().map(|y| y + 0.0).collect();
    bitwise("impulse response", &y, &want)?;
    Ok(Some(Metrics::default()))
}

/// Two calls with the state handed over give the bits of one call.
fn split(variant: &Variant<causal_conv::Op>, case: &Case, seed: u64) -> Outcome {
    if case.states == States::Zeros || case.states == States::In {
        return Ok(None);
    }
    let problem = Problem::generate(case, seed);
    let exec = Exec::variant(*variant);
    let whole = problem.call(&exec)?;
    let at = |n: usize| seed as usize % (n + 1);
    let first = problem.piece(at, false, problem.pool.clone(), &problem.slot_in);
    let one = first.call(&exec)?;
    let pool = one.pool.unwrap_or_default();
    let mut second = problem.piece(at, true, pool, &problem.slot_out);
    second.case.states = States::InPlace;
    let two = second.call(&exec)?;
    bitwise("state after two calls", &two.pool.unwrap_or_default(), &whole.pool.unwrap_or_default())?;
    let mut y = Vec::new();
    for b in 0..problem.slot_in.len() {
        y.extend_from_slice(&one.y[first.cu[b] as usize * problem.c..first.cu[b + 1] as usize * problem.c]);
        y.extend_from_slice(&two.y[second.cu[b] as usize * problem.c..second.cu[b + 1] as usize * problem.c]);
    }
    bitwise("y of two calls", &y, &whole.y)?;
    Ok(Some(Metrics::default()))
}

/// A sequence alone gives the same bits as among others, packed or not.
fn alone(variant: &Variant<causal_conv::Op>, case: &Case, seed: u64) -> Outcome {
    if case.batch == 0 {
        return Ok(None);
    }
    let problem = Problem::generate(case, seed);
    let exec = Exec::variant(*variant);
    let all = problem.call(&exec)?;
    let b = seed as usize % case.batch;
    let range = problem.tokens(b).start * case.c..problem.tokens(b).end * case.c;
    let mut one = Problem {
        x: problem.x[range.clone()].to_vec(),
        cu: vec![0, problem.tokens(b).len() as i64],
        slot_in: vec![problem.slot_in[b]],
        slot_out: vec![problem.slot_out[b]],
        ..problem.clone()
    };
    one.case.packed = true;
    let one = one.call(&exec)?;
    bitwise("y of a sequence alone", &one.y, &all.y[range])?;
    if let (Some(one), Some(all)) = (one.pool, all.pool) {
        let at = problem.slot_out[b] as usize * problem.window()..(problem.slot_out[b] as usize + 1) * problem.window();
        bitwise("state of a sequence alone", &one[at.clone()], &all[at])?;
    }
    Ok(Some(Metrics::default()))
}

/// NaN in one channel of one sequence stays there.
fn isolation(variant: &Variant<causal_conv::Op>, case: &Case, seed: u64) -> Outcome {
    let mut problem = Problem::generate(case, seed);
    let Some(b) = (0..case.batch).rev().find(|&b| !problem.tokens(b).is_empty()) else { return Ok(None) };
    if case.c == 0 {
        return Ok(None);
    }
    let exec = Exec::variant(*variant);
    let mut want = problem.call(&exec)?.y;
    let (channel, tokens) = (seed as usize % case.c, problem.tokens(b));
    let at = tokens.start + seed as usize % tokens.len();
    problem.x[at * case.c + channel] = f32::NAN;
    (at..tokens.end.min(at + case.width)).for_each(|t| want[t * case.c + channel] = f32::NAN);
    bitwise("y beside a NaN", &problem.call(&exec)?.y, &want)?;
    Ok(Some(Metrics::default()))
}

/// Any cut over any number of threads, any strides, one pool or two: the same bits.
fn cuts(variant: &Variant<causal_conv::Op>, case: &Case, seed: u64) -> Outcome {
    let mut problem = Problem::generate(case, seed);
    let want = problem.call(&Exec::variant(*variant).parts(1))?;
    let same = |got: Outputs| {
        bitwise("y", &got.y, &want.y)?;
        bitwise("state_out", &got.pool.unwrap_or_default(), want.pool.as_deref().unwrap_or(&[]))?;
        bitwise("snapshots", &got.snapshots.unwrap_or_default(), want.snapshots.as_deref().unwrap_or(&[]))
    };
    everywhere(variant, |exec| same(problem.call(&exec)?))?;
    for &layout in Layout::ALL {
        problem.case.layout = layout;
        same(problem.call(&Exec::variant(*variant))?)?;
    }
    if case.states == States::InPlace {
        problem.case.states = States::InOut;
        same(problem.call(&Exec::variant(*variant))?)?;
    }
    Ok(Some(Metrics::default()))
}

/// Entries of the pool that lie 2³¹ elements apart are found all the same.
fn far_slots(variant: &Variant<causal_conv::Op>, case: &Case, seed: u64) -> Outcome {
    if case.t != 3 || case.width < 2 || case.c == 0 {
        return Ok(None);
    }
    let case = Case {
        batch: 2,
        states: States::InPlace,
        snapshots: false,
        packed: false,
        layout: Layout::Packed,
        ..case.clone()
    };
    let problem = Problem::generate(&case, seed);
    let want = problem.call(&Exec::variant(*variant))?;
    let entry =
        |pool: &[f32], b: usize| pool[problem.slot_in[b] as usize * problem.window()..][..problem.window()].to_vec();
    let mut pool = FarPool::new(&[(2, &entry(&problem.pool, 0)), (0, &entry(&problem.pool, 1))])?;
    let mut y = vec![f32::NAN; want.y.len()];
    let args = causal_conv::Args {
        y: ViewMut::new(&mut y, [2, case.t, case.c])?,
        x: View::new(&problem.x, [2, case.t, case.c])?,
        w: View::new(&problem.w, [case.c, case.width])?,
        bias: problem.bias.as_deref().map(View::from),
        state: causal_conv::State::InPlace(ViewMut::strided(
            pool.elements(),
            [FarPool::SLOTS, case.c, case.width - 1],
            [FarPool::STRIDE, case.width - 1, 1],
        )?),
        snapshots: None,
        slot_in: Some(&[2, 0]),
        slot_out: Some(&[2, 0]),
        cu_seqlens: None,
        silu: case.silu,
    };
    causal_conv::run(args, &Exec::variant(*variant))?;
    bitwise("y", &y, &want.y)?;
    let states = want.pool.unwrap_or_default();
    for (b, slot) in [2, 0].into_iter().enumerate() {
        let got = &pool.elements()[slot * FarPool::STRIDE..][..problem.window()];
        bitwise("a far state", got, &entry(&states, b))?;
    }
    Ok(Some(Metrics::default()))
}

/// The suite.
pub struct CausalConv;

impl Suite for CausalConv {
    type Op = causal_conv::Op;
    type Case = Case;

    fn grid() -> Vec<Case> {
        let mut grid = Vec::new();
        for (i, t) in [0, 1, 2, 3, 4, 5, 17, 64].into_iter().enumerate() {
            for (j, c) in [1, 3, 63, 64, 65, 130, 0].into_iter().enumerate() {
                for packed in [false, true] {
                    let k = i * 7 + j;
                    grid.push(Case {
                        batch: [2, 1, 4, 0][if k % 23 == 22 { 3 } else { k % 3 }],
                        t,
                        c,
                        width: [4, 4, 2, 3, 1, 16][(k + usize::from(packed)) % 6],
                        bias: k % 2 == 0,
                        silu: k % 4 != 1,
                        states: States::ALL[(i + j) % 5],
                        snapshots: k % 3 == 0,
                        packed,
                        layout: Layout::ALL[k / 2 % 2],
                    });
                }
            }
        }
        grid
    }

    fn strategy() -> BoxedStrategy<Case> {
        let choose = (prop::sample::select(Layout::ALL), prop::sample::select(States::ALL));
        let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
        (0usize..5, 0usize..20, 0usize..150, 1usize..=16, flags, choose)
            .prop_map(|(batch, t, c, width, (bias, silu, snapshots, packed), (layout, states))| Case {
                batch,
                t,
                c,
                width,
                bias,
                silu,
                states,
                snapshots,
                packed,
                layout,
            })
            .boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: against_reference },
            Check { name: "impulse", run: impulse },
            Check { name: "split", run: split },
            Check { name: "alone", run: alone },
            Check { name: "isolation", run: isolation },
            Check { name: "cuts", run: cuts },
            Check { name: "far_slots", run: far_slots },
        ]
    }
}
