//! Gated delta rule: the bound against the token loop on every shape, layout and regime, and what must hold bit for
//! bit.

use crate::buffer::{FarPool, Input, Layout, Output, Value};
use crate::compare::{bitwise, compare, Failure, Metrics, U32};
use crate::drift;
use crate::guard::{place, Guarded, Place};
pub use crate::reference::gated_delta::Dtype;
use crate::reference::gated_delta::{bounds, Bounds, Form, Head, Trace, EXP};
use crate::suite::{everywhere, rng, Check, Outcome, Rng, Suite};
use crate::{case, choice};
use half::{bf16, f16};
use ndarray::{Array1, Array2, Axis};
use proptest::prelude::*;
use qwen3next_kernels::gated_delta::{self, Gate, HeadMap, LogDecay, State};
use qwen3next_kernels::{ffi, Error, Exec, Operator, Variant, View, ViewMut};
use rand::seq::SliceRandom;
use rand::Rng as _;

choice! {
    /// Gate kind.
    pub enum GateKind {
        /// No gate.
        Absent = "none",
        /// One a head.
        Scalar = "scalar",
        /// One a key channel.
        Channel = "channel",
    }
}

choice! {
    /// Map of value heads to key heads.
    pub enum Heads {
        /// Neighbours share a key head.
        Grouped = "grouped",
        /// Value heads go round the key heads.
        Tiled = "tiled",
    }
}

choice! {
    /// Where states lie.
    pub enum StateKind {
        /// From zeros; final states are not wanted.
        Dropped = "dropped",
        /// From zeros to a pool.
        Zero = "zero",
        /// In place.
        InPlace = "inplace",
        /// From one pool to another.
        InOut = "inout",
    }
}

choice! {
    /// How sequences lie in the rows of tokens.
    pub enum Rows {
        /// One row a sequence, all of T tokens.
        Dense = "dense",
        /// cu_seqlens: lengths T, 0, T/2, T, ... in one row.
        Packed = "packed",
    }
}

choice! {
    /// How values are drawn.
    pub enum Regime {
        /// Decays in e^-0.5..1, β in 0..1: nothing underflows within 129 tokens.
        Mild = "mild",
        /// g from −316 to 0 with much mass near 0, v to 25, β of 0, 1, 2 and between, some keys nearly parallel.
        Harsh = "harsh",
        /// All keys nearly parallel, long memory, β up to 2, v to 25: the worst condition of the solve.
        Parallel = "parallel",
    }
}

case! {
    /// Shape, layout and fill.
    pub struct Case {
        /// Sequences.
        pub b: usize,
        /// Tokens of the longest sequence.
        pub t: usize,
        /// Key heads.
        pub hk: usize,
        /// Value heads.
        pub hv: usize,
        /// Key channels.
        pub k: usize,
        /// Value channels.
        pub v: usize,
        /// Gate kind.
        pub gate: GateKind,
        /// Head map.
        pub heads: Heads,
        /// In-kernel L2 norm of q and k.
        pub l2norm: bool,
        /// State kind.
        pub state: StateKind,
        /// Sequences use sparse slots of a larger pool.
        pub slots: bool,
        /// States after every token are asked for.
        pub snapshots: bool,
        /// Rows of tokens.
        pub rows: Rows,
        /// Strides.
        pub layout: Layout,
        /// Fill.
        pub regime: Regime,
        /// Type of q, k, v and o.
        pub dtype: Dtype,
    }
}

impl Case {
    /// Tokens of sequence `b`.
    pub fn len(&self, b: usize) -> usize {
        match (self.rows, b % 3) {
            (Rows::Dense, _) | (_, 0) => self.t,
            (_, 1) => 0,
            _ => self.t / 2,
        }
    }

    /// First token of sequence `b` among all tokens.
    pub fn start(&self, b: usize) -> usize {
        (0..b).map(|b| self.len(b)).sum()
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.start(self.b)
    }

    /// Elements of a state, all heads.
    pub fn state_len(&self) -> usize {
        self.hv * self.v * self.k
    }

    fn width(&self) -> usize {
        if self.gate == GateKind::Channel {
            self.k
        } else {
            1
        }
    }

    fn key_head(&self, h: usize) -> usize {
        match self.heads {
            Heads::Grouped => h / (self.hv / self.hk),
            Heads::Tiled => h % self.hk,
        }
    }

    /// Axes before the token's own: (rows, tokens of a row).
    fn row_shape(&self) -> (usize, usize) {
        match self.rows {
            Rows::Dense => (self.b, self.t),
            Rows::Packed => (1, self.tokens()),
        }
    }

    fn work(&self) -> usize {
        self.tokens() * self.state_len()
    }

    fn has_state_in(&self) -> bool {
        matches!(self.state, StateKind::InPlace | StateKind::InOut)
    }

    fn has_state_out(&self) -> bool {
        self.state != StateKind::Dropped
    }
}

/// Inputs, packed, tokens of all sequences one after the other. What a call is given of q, k and v is the nearest of its
/// type.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// `[tokens][HK][K]`.
    pub q: Vec<f32>,
    /// `[tokens][HK][K]`.
    pub k: Vec<f32>,
    /// `[tokens][HV][V]`.
    pub v: Vec<f32>,
    /// `[tokens][HV]` or `[tokens][HV][K]`; unused without a gate.
    pub g: Vec<f32>,
    /// `[tokens][HV]`.
    pub beta: Vec<f32>,
    /// State of each sequence before, `[B][HV][V][K]`.
    pub state: Vec<f32>,
    /// Pool entry each sequence starts from and ends in.
    pub slot_in: Vec<i64>,
    /// As `slot_in`; the same where the state is updated in place.
    pub slot_out: Vec<i64>,
    /// Entries of the pool.
    pub slots: usize,
    /// Factor on q.
    pub scale: f32,
}

fn unit_vector(rng: &mut Rng, n: usize) -> Vec<f64> {
    let x: Vec<f64> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
    let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
    x.into_iter().map(|x| if norm > 0.0 { x / norm } else { x }).collect()
}

fn draw_decay(rng: &mut Rng, regime: Regime) -> f32 {
    match regime {
        Regime::Mild => -rng.random_range(0.0f32..0.5),
        Regime::Parallel => -rng.random_range(0.0f32..0.01),
        Regime::Harsh => match rng.random_range(0..20) {
            0 => -316.0,
            1 => 0.0,
            2 => -rng.random_range(30.0f32..316.0),
            3..6 => -rng.random_range(2.0f32..30.0),
            6..12 => -rng.random_range(0.0f32..2.0),
            _ => -rng.random_range(0.0f32..1e-3),
        },
    }
}

fn draw_beta(rng: &mut Rng, regime: Regime) -> f32 {
    match (regime, rng.random_range(0..6)) {
        (Regime::Mild, _) => rng.random_range(0.0..1.0),
        (_, 0) => 0.0,
        (_, 1) => 1.0,
        (_, 2) => 2.0,
        _ => rng.random_range(0.0..2.0),
    }
}

impl Inputs {
    /// Inputs of `case` drawn from `seed`.
    pub fn generate(case: &Case, seed: u64) -> Inputs {
        let mut rng = rng(seed);
        let (tokens, regime) = (case.tokens(), case.regime);
        let base: Vec<f64> = unit_vector(&mut rng, case.k);
        let mut keys = |parallel: bool| {
            let mut all = Vec::with_capacity(tokens * case.hk * case.k);
            for _ in 0..tokens * case.hk {
                let mut x = unit_vector(&mut rng, case.k);
                if parallel && (regime == Regime::Parallel || regime == Regime::Harsh && rng.random_range(0..3) == 0) {
                    x.iter_mut().zip(&base).for_each(|(x, b)| *x = 0.02 * *x + b);
                    let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
                    x.iter_mut().for_each(|x| *x /= norm);
                }
                // Vectors that the kernel normalises may have any length.
                let length = if case.l2norm { rng.random_range(0.1..10.0) } else { 1.0 };
                all.extend(x.into_iter().map(|x| case.dtype.round((x * length) as f32)));
            }
            all
        };
        let (q, k) = (keys(false), keys(true));
        let largest = if regime == Regime::Mild { 4.0 } else { 25.0 };
        let mut value = |_| case.dtype.round(rng.random_range(-largest..largest));
        let v = (0..tokens * case.hv * case.v).map(&mut value).collect();
        let g = (0..tokens * case.hv * case.width()).map(|_| draw_decay(&mut rng, regime)).collect();
        let beta = (0..tokens * case.hv).map(|_| draw_beta(&mut rng, regime)).collect();
        let state = (0..case.b * case.state_len()).map(|_| rng.random_range(-2.0..2.0)).collect();
        let (slots, slot_in, slot_out) = if case.slots {
            // Three apart, from the last backwards: sparse and in another order than the sequences.
            let slots = 3 * case.b + 2;
            let slot = |b: usize, shift: usize| (slots - 1 - shift - 3 * b) as i64;
            let slot_in: Vec<i64> = (0..case.b).map(|b| slot(b, 0)).collect();
            let shift = usize::from(case.state != StateKind::InPlace);
            (slots, slot_in, (0..case.b).map(|b| slot(b, shift)).collect())
        } else {
            let same: Vec<i64> = (0..case.b as i64).collect();
            (case.b, same.clone(), same)
        };
        Inputs { q, k, v, g, beta, state, slot_in, slot_out, slots, scale: 1.0 / (case.k.max(1) as f32).sqrt() }
    }

    /// The float64 problem of sequence `b`, value head `h`.
    pub fn head(&self, case: &Case, b: usize, h: usize) -> Head {
        let (first, n, hk) = (case.start(b), case.len(b), case.key_head(h));
        let rows = |x: &[f32], heads: usize, head: usize, width: usize| {
            let at = |t: usize, c: usize| ((first + t) * heads + head) * width + c;
            Array2::from_shape_fn((n, width), |(t, c)| f64::from(case.dtype.round(x[at(t, c)])))
        };
        let width = case.width();
        let g = Array2::from_shape_fn((n, case.k), |(t, c)| match case.gate {
            GateKind::Absent => 0.0,
            _ => f64::from(self.g[((first + t) * case.hv + h) * width + c % width]),
        });
        let state = Array2::from_shape_fn((case.v, case.k), |(j, c)| match case.has_state_in() {
            true => f64::from(self.state[((b * case.hv + h) * case.v + j) * case.k + c]),
            false => 0.0,
        });
        Head {
            q: rows(&self.q, case.hk, hk, case.k),
            k: rows(&self.k, case.hk, hk, case.k),
            v: rows(&self.v, case.hv, h, case.v),
            g,
            beta: Array1::from_shape_fn(n, |t| f64::from(self.beta[(first + t) * case.hv + h])),
            state,
            l2norm: case.l2norm.then_some(f64::from(gated_delta::L2_NORM_EPS)),
            scale: f64::from(self.scale),
        }
    }
}

/// What a call wrote, packed and widened.
#[derive(Debug, Clone, Default)]
pub struct Outputs {
    /// `[tokens][HV][V]`.
    pub o: Vec<f32>,
    /// Final state of each sequence, `[B][HV][V][K]`; empty where dropped.
    pub state: Vec<f32>,
    /// `[tokens][HV][V][K]`; empty where not asked for.
    pub snapshots: Vec<f32>,
}

/// What pool entries hold that no sequence uses: read, it would show as a huge number; written, it is gone.
const UNUSED: f32 = 1.0e30;

/// Runs the operator. Fails where it writes outside its outputs or into a pool entry that no sequence ends in.
pub fn call(exec: &Exec<gated_delta::Op>, case: &Case, inputs: &Inputs) -> Result<Outputs, Failure> {
    match case.dtype {
        Dtype::F32 => call_typed::<f32>(exec, case, inputs),
        Dtype::BF16 => call_typed::<bf16>(exec, case, inputs),
        Dtype::F16 => call_typed::<f16>(exec, case, inputs),
    }
}

/// The nearest of a type.
fn narrow<E: Value>(x: &[f32]) -> Vec<E> {
    x.iter().map(|&x| E::nearest(x)).collect()
}

fn call_typed<E: Value>(exec: &Exec<gated_delta::Op>, case: &Case, inputs: &Inputs) -> Result<Outputs, Failure> {
    let (rows, tokens) = case.row_shape();
    let (hk, hv, k, v, layout) = (case.hk, case.hv, case.k, case.v, case.layout);
    let q = Input::new(&narrow::<E>(&inputs.q), [rows, tokens, hk, k], layout);
    let keys = Input::new(&narrow::<E>(&inputs.k), [rows, tokens, hk, k], layout);
    let values = Input::new(&narrow::<E>(&inputs.v), [rows, tokens, hv, v], layout);
    let beta = Input::new(&inputs.beta, [rows, tokens, hv], layout);
    let lay_g = |shape: &[usize]| -> Vec<f32> {
        if inputs.g.len() == shape.iter().product::<usize>() {
            inputs.g.clone()
        } else {
            Vec::new()
        }
    };
    let scalar =
        (case.gate == GateKind::Scalar).then(|| Input::new(&lay_g(&[rows, tokens, hv]), [rows, tokens, hv], layout));
    let channel = (case.gate == GateKind::Channel)
        .then(|| Input::new(&lay_g(&[rows, tokens, hv, k]), [rows, tokens, hv, k], layout));
    let mut o = Output::poisoned([rows, tokens, hv, v], layout);
    let mut snapshots = case.snapshots.then(|| Output::new([rows, tokens, hv, v, k], layout));
    let cu = Guarded::of(&(0..=case.b).map(|b| case.start(b) as i64).collect::<Vec<_>>());

    let state_len = case.state_len();
    let pool_shape = [inputs.slots, hv, v, k];
    let mut before = vec![UNUSED; inputs.slots * state_len];
    for (b, &slot) in inputs.slot_in.iter().enumerate() {
        before[slot as usize * state_len..][..state_len].copy_from_slice(&inputs.state[b * state_len..][..state_len]);
    }
    let input = Input::new(&before, pool_shape, layout);
    let initial = if case.state == StateKind::InPlace { before } else { vec![UNUSED; inputs.slots * state_len] };
    let mut pool = Output::with(&initial, pool_shape, layout);

    let slots = (Guarded::of(&inputs.slot_in), Guarded::of(&inputs.slot_out));
    let (slot_in, slot_out) = (case.slots.then_some(&slots.0[..]), case.slots.then_some(&slots.1[..]));
    let args = gated_delta::Args {
        o: o.view(),
        snapshots: snapshots.as_mut().map(|s| s.view()),
        state: match case.state {
            StateKind::Dropped => State::Zero { out: None, slot_out: None },
            StateKind::Zero => State::Zero { out: Some(pool.view()), slot_out },
            StateKind::InPlace => State::InPlace { pool: pool.view(), slots: slot_in },
            StateKind::InOut => State::InOut { input: input.view(), slot_in, out: Some(pool.view()), slot_out },
        },
        q: q.view(),
        k: keys.view(),
        v: values.view(),
        gate: match (&scalar, &channel) {
            (Some(g), _) => Gate::Scalar(LogDecay::unchecked(g.view())),
            (_, Some(g)) => Gate::Channel(LogDecay::unchecked(g.view())),
            _ => Gate::None,
        },
        beta: beta.view(),
        cu_seqlens: (case.rows == Rows::Packed).then_some(&cu[..]),
        head_map: match case.heads {
            Heads::Grouped => HeadMap::Grouped,
            Heads::Tiled => HeadMap::Tiled,
        },
        qk_l2norm: case.l2norm.then_some(gated_delta::L2_NORM_EPS),
        scale: inputs.scale,
    };
    gated_delta::run(args, exec)?;

    let mut out = Outputs { o: o.read("o")?, ..Outputs::default() };
    if let Some(s) = snapshots {
        out.snapshots = s.read("snapshots")?;
    }
    let pool = pool.read("state_out")?;
    let used: &[i64] = if case.has_state_out() { &inputs.slot_out } else { &[] };
    for slot in (0..inputs.slots).filter(|s| !used.contains(&(*s as i64))) {
        let range = slot * state_len..(slot + 1) * state_len;
        bitwise("a pool entry that no sequence ends in", &pool[range.clone()], &initial[range])?;
    }
    for &slot in used {
        out.state.extend_from_slice(&pool[slot as usize * state_len..][..state_len]);
    }
    Ok(out)
}

/// Float64 results of all sequences and heads in the order of [`Outputs`], with their bounds.
#[derive(Debug, Clone)]
pub struct Judged {
    /// Outputs.
    pub o: Vec<f64>,
    /// Absolute error each may have.
    pub o_bound: Vec<f64>,
    /// Final states.
    pub state: Vec<f64>,
    /// Absolute error each may have.
    pub state_bound: Vec<f64>,
    /// States after every token.
    pub snapshots: Vec<f64>,
    /// Absolute error each may have.
    pub snapshots_bound: Vec<f64>,
}

/// The token loop in float64 over a whole case, with the bounds of a kernel of this form whose chunks start anew at
/// token `restart`.
pub fn judge(case: &Case, inputs: &Inputs, form: Form, restart: usize) -> Judged {
    let heads: Vec<(Trace, Bounds)> = (0..case.b * case.hv)
        .map(|i| {
            let head = inputs.head(case, i / case.hv, i % case.hv);
            let trace = head.recurrent();
            let bounds = bounds(&head, &trace, form, case.dtype, restart);
            (trace, bounds)
        })
        .collect();
    let mut x = Judged {
        o: vec![],
        o_bound: vec![],
        state: vec![],
        state_bound: vec![],
        snapshots: vec![],
        snapshots_bound: vec![],
    };
    for b in 0..case.b {
        for t in 0..case.len(b) {
            for (trace, bounds) in &heads[b * case.hv..][..case.hv] {
                x.o.extend(trace.o.row(t));
                x.o_bound.extend(bounds.o.row(t));
                if case.snapshots {
                    x.snapshots.extend(&trace.states[t + 1]);
                    x.snapshots_bound.extend(bounds.snapshots.row(t).iter().flat_map(|&b| vec![b; case.k]));
                }
            }
        }
        if case.has_state_out() {
            for (trace, bounds) in &heads[b * case.hv..][..case.hv] {
                x.state.extend(trace.states.last().expect("T + 1 states"));
                x.state_bound.extend(bounds.state.iter().flat_map(|&b| vec![b; case.k]));
            }
        }
    }
    x
}

impl Judged {
    /// `Ok` where a kernel's outputs are within the bounds. Rows are a head's outputs at one token, and its state.
    pub fn compare(&self, case: &Case, got: &Outputs) -> Result<Metrics, Failure> {
        let o = compare("o", &got.o, &self.o, &self.o_bound, case.v)?;
        let state = compare("state", &got.state, &self.state, &self.state_bound, case.v * case.k)?;
        let snapshots = compare("snapshots", &got.snapshots, &self.snapshots, &self.snapshots_bound, case.v * case.k)?;
        Ok(o.worst(state).worst(snapshots))
    }
}

fn exec(variant: &Variant<gated_delta::Op>) -> Exec<gated_delta::Op> {
    Exec::variant(*variant)
}

/// Whether a variant takes calls in a type: one of one token tells, where the variant can run.
fn takes(variant: &Variant<gated_delta::Op>, dtype: Dtype) -> bool {
    fn one_token<E: Value>(variant: &Variant<gated_delta::Op>) -> Result<(), Error> {
        let (x, mut o, beta) = ([E::nearest(1.0)], [E::nearest(0.0)], [1.0]);
        let args = gated_delta::Args {
            o: ViewMut::new(&mut o, [1; 4])?,
            snapshots: None,
            state: State::Zero { out: None, slot_out: None },
            q: View::new(&x, [1; 4])?,
            k: View::new(&x, [1; 4])?,
            v: View::new(&x, [1; 4])?,
            gate: Gate::None,
            beta: View::new(&beta, [1; 3])?,
            cu_seqlens: None,
            head_map: HeadMap::Grouped,
            qk_l2norm: None,
            scale: 1.0,
        };
        gated_delta::run(args, &exec(variant))
    }
    let tried = match dtype {
        Dtype::F32 => one_token::<f32>(variant),
        Dtype::BF16 => one_token::<bf16>(variant),
        Dtype::F16 => one_token::<f16>(variant),
    };
    variant.isa().available() && tried.err().and_then(|e| e.kind()) != Some(ffi::Q3N_DTYPE)
}

fn is_recurrent(variant: &Variant<gated_delta::Op>) -> bool {
    Form::of(variant.name()) == Form::Recurrent
}

/// Properties repeat calls; beyond this many state updates the reference check alone is worth its time.
const PROPERTY_WORK: usize = 1_200_000;

/// A number below `n` (0 where there is none), another one for every seed and n.
fn pick(seed: u64, n: usize) -> usize {
    (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as usize % n.max(1)
}

fn passed() -> Outcome {
    Ok(Some(Metrics::default()))
}

fn all_bitwise(what: &str, got: &Outputs, want: &Outputs) -> Result<(), Failure> {
    bitwise(&format!("{what}: o"), &got.o, &want.o)?;
    bitwise(&format!("{what}: state"), &got.state, &want.state)?;
    bitwise(&format!("{what}: snapshots"), &got.snapshots, &want.snapshots)
}

/// `Ok` where both hold the same numbers; zeros of either sign are the same.
fn same_values(what: &str, got: &[f32], want: &[f32]) -> Result<(), Failure> {
    let unsigned = |x: &[f32]| x.iter().map(|&x| if x == 0.0 { 0.0 } else { x }).collect::<Vec<f32>>();
    bitwise(what, &unsigned(got), &unsigned(want))
}

/// Every output within the derived bound of the token loop in float64.
fn reference(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    let inputs = Inputs::generate(case, seed);
    let got = call(&exec(variant), case, &inputs)?;
    judge(case, &inputs, Form::of(variant.name()), 0).compare(case, &got).map(Some)
}

/// Any cut over any number of parts and threads, and any run, gives the same bits.
fn cuts(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    let inputs = Inputs::generate(case, seed);
    let want = call(&exec(variant).parts(1), case, &inputs)?;
    everywhere(variant, |exec| all_bitwise("cut", &call(&exec, case, &inputs)?, &want))?;
    passed()
}

/// Strides, misalignment, slots and the place of the state do not change a bit.
fn placement(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    let want = call(&exec(variant), case, &Inputs::generate(case, seed))?;
    for &layout in Layout::ALL {
        for slots in [false, true] {
            for &state in StateKind::ALL {
                // From zeros is another problem than from a state.
                if matches!(state, StateKind::Dropped | StateKind::Zero) == case.has_state_in() {
                    continue;
                }
                let other = Case { layout, slots, state, ..case.clone() };
                let mut got = call(&exec(variant), &other, &Inputs::generate(&other, seed))?;
                if !case.has_state_out() || !other.has_state_out() {
                    got.state.clone_from(&want.state);
                }
                all_bitwise(&format!("{other}"), &got, &want)?;
            }
        }
    }
    passed()
}

/// Scaling (v, S₀) by 2ⁿ scales (o, S); scaling q scales o. Not in f16, whose exponents end too soon.
fn scaling(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.regime != Regime::Mild || case.dtype == Dtype::F16 || case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    let inputs = Inputs::generate(case, seed);
    let base = call(&exec(variant), case, &inputs)?;
    let times = |x: &[f32], f: f32| x.iter().map(|x| x * f).collect::<Vec<f32>>();
    for factor in [0.25, 64.0, 2f32.powi(24)] {
        let scaled = Inputs { v: times(&inputs.v, factor), state: times(&inputs.state, factor), ..inputs.clone() };
        let want = Outputs {
            o: times(&base.o, factor),
            state: times(&base.state, factor),
            snapshots: times(&base.snapshots, factor),
        };
        all_bitwise("(v, S) 2^n", &call(&exec(variant), case, &scaled)?, &want)?;
        if !case.l2norm {
            let scaled = Inputs { q: times(&inputs.q, factor), ..inputs.clone() };
            let want = Outputs { o: times(&base.o, factor), ..base.clone() };
            all_bitwise("q 2^n", &call(&exec(variant), case, &scaled)?, &want)?;
        }
    }
    passed()
}

/// (k, q, S₀) → − leaves o and negates S.
fn signs(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    let inputs = Inputs::generate(case, seed);
    let base = call(&exec(variant), case, &inputs)?;
    let minus = |x: &[f32]| x.iter().map(|x| -x).collect::<Vec<f32>>();
    let flipped = Inputs { q: minus(&inputs.q), k: minus(&inputs.k), state: minus(&inputs.state), ..inputs.clone() };
    let got = call(&exec(variant), case, &flipped)?;
    same_values("o of −k, −q, −S", &got.o, &base.o)?;
    same_values("S of −k, −q, −S", &got.state, &minus(&base.state))?;
    same_values("snapshots of −k, −q, −S", &got.snapshots, &minus(&base.snapshots))?;
    passed()
}

/// β = 0 and g = 0 leave the state alone, and so do zero tokens.
fn idle(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if !case.has_state_in() || case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    inputs.beta.fill(0.0);
    inputs.g.fill(0.0);
    same_values("state after β = 0, g = 0", &call(&exec(variant), case, &inputs)?.state, &inputs.state)?;
    let none = Case { t: 0, ..case.clone() };
    let inputs = Inputs::generate(&none, seed);
    bitwise("state after no tokens", &call(&exec(variant), &none, &inputs)?.state, &inputs.state)?;
    passed()
}

/// The tokens from `from` to `to` of every sequence of a dense case.
fn slice(case: &Case, inputs: &Inputs, from: usize, to: usize) -> (Case, Inputs) {
    let part = Case { t: to - from, ..case.clone() };
    let cut = |x: &[f32], width: usize| {
        let rows: Vec<&[f32]> =
            (0..case.b).map(|b| &x[(b * case.t + from) * width..(b * case.t + to) * width]).collect();
        rows.concat()
    };
    let cut_inputs = Inputs {
        q: cut(&inputs.q, case.hk * case.k),
        k: cut(&inputs.k, case.hk * case.k),
        v: cut(&inputs.v, case.hv * case.v),
        g: cut(&inputs.g, case.hv * case.width()),
        beta: cut(&inputs.beta, case.hv),
        ..inputs.clone()
    };
    (part, cut_inputs)
}

/// Outputs of two calls over the parts of every sequence of a dense case, joined.
fn join(case: &Case, at: usize, first: &Outputs, second: Outputs) -> Outputs {
    let weave = |x: &[f32], y: &[f32], width: usize| {
        let (a, b) = (at * width, (case.t - at) * width);
        (0..case.b).flat_map(|i| [&x[i * a..][..a], &y[i * b..][..b]]).collect::<Vec<_>>().concat()
    };
    let snapshot = if case.snapshots { case.state_len() } else { 0 };
    Outputs {
        o: weave(&first.o, &second.o, case.hv * case.v),
        snapshots: weave(&first.snapshots, &second.snapshots, snapshot),
        state: second.state,
    }
}

/// A call split in two at any token is the whole call: bit for bit token by token and at the edge of a chunk, within
/// the bound of chunks that start anew there otherwise.
fn split(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.rows != Rows::Dense || case.state == StateKind::Dropped || case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    let inputs = Inputs::generate(case, seed);
    let in_two = |at: usize| -> Result<Outputs, Failure> {
        let (head, head_inputs) = slice(case, &inputs, 0, at);
        let (tail, mut tail_inputs) = slice(case, &inputs, at, case.t);
        let first = call(&exec(variant), &head, &head_inputs)?;
        tail_inputs.state.clone_from(&first.state);
        // From here the state is an input, whatever it was.
        let tail = Case { state: if tail.has_state_in() { tail.state } else { StateKind::InOut }, ..tail };
        let second = call(&exec(variant), &tail, &tail_inputs)?;
        Ok(join(case, at, &first, second))
    };
    let whole = call(&exec(variant), case, &inputs)?;
    let at = pick(seed, case.t + 1);
    let form = Form::of(variant.name());
    let edge = at / form.chunk() * form.chunk();
    if form.may_be_cut() {
        all_bitwise(&format!("split at {edge}"), &in_two(edge)?, &whole)?;
        if edge == at {
            return passed();
        }
    }
    judge(case, &inputs, form, at).compare(case, &in_two(at)?).map(Some)
}

/// Asking for snapshots changes nothing else; the last one is the state, and a call that starts from one gives what the
/// whole call gave from there on (bit for bit token by token).
fn snapshots(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.rows != Rows::Dense || case.t == 0 || case.work() > PROPERTY_WORK / 2 {
        return Ok(None);
    }
    let case = Case { snapshots: true, state: StateKind::InOut, ..case.clone() };
    let inputs = Inputs::generate(&case, seed);
    let all = call(&exec(variant), &case, &inputs)?;
    let without = call(&exec(variant), &Case { snapshots: false, ..case.clone() }, &inputs)?;
    bitwise("o without snapshots", &without.o, &all.o)?;
    bitwise("state without snapshots", &without.state, &all.state)?;

    let at = pick(seed, case.t) + 1;
    let (tail, mut tail_inputs) = slice(&case, &inputs, at, case.t);
    let n = case.state_len();
    let snapshot = |b: usize, t: usize| &all.snapshots[(b * case.t + t) * n..][..n];
    tail_inputs.state = (0..case.b).flat_map(|b| snapshot(b, at - 1)).copied().collect();
    let replayed = call(&exec(variant), &tail, &tail_inputs)?;
    if !is_recurrent(variant) {
        let (head, head_inputs) = slice(&case, &inputs, 0, at);
        let first = call(&exec(variant), &head, &head_inputs)?;
        return judge(&case, &inputs, Form::of(variant.name()), at)
            .compare(&case, &join(&case, at, &first, replayed))
            .map(Some);
    }
    let last: Vec<f32> = (0..case.b).flat_map(|b| snapshot(b, case.t - 1)).copied().collect();
    bitwise("last snapshot", &last, &all.state)?;
    bitwise("state replayed from a snapshot", &replayed.state, &all.state)?;
    let tokens = (case.t - at) * case.hv * case.v;
    for b in 0..case.b {
        let whole = &all.o[(b * case.t + at) * case.hv * case.v..][..tokens];
        bitwise("o replayed from a snapshot", &replayed.o[b * tokens..][..tokens], whole)?;
    }
    passed()
}

/// Value channels are independent: turned round they give turned results, and one alone gives its own bits.
fn channels(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.v == 0 || case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    let inputs = Inputs::generate(case, seed);
    let base = call(&exec(variant), case, &inputs)?;
    let take = |x: &[f32], width: usize, order: &[usize]| -> Vec<f32> {
        x.chunks((case.v * width).max(1))
            .flat_map(|row| order.iter().flat_map(move |&j| &row[j * width..(j + 1) * width]))
            .copied()
            .collect()
    };
    let turned: Vec<usize> = (0..case.v).map(|j| (j + 1 + pick(seed, case.v)) % case.v).collect();
    for order in [turned, vec![pick(seed, case.v)]] {
        let other = Case { v: order.len(), ..case.clone() };
        let picked =
            Inputs { v: take(&inputs.v, 1, &order), state: take(&inputs.state, case.k, &order), ..inputs.clone() };
        let want = Outputs {
            o: take(&base.o, 1, &order),
            state: take(&base.state, case.k, &order),
            snapshots: take(&base.snapshots, case.k, &order),
        };
        all_bitwise("some value channels", &call(&exec(variant), &other, &picked)?, &want)?;
    }
    passed()
}

/// Sequences and heads in reverse give the reverse.
fn order(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.rows != Rows::Dense || case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    let inputs = Inputs::generate(case, seed);
    let base = call(&exec(variant), case, &inputs)?;
    // Axes [B][inner][heads][width], of which B and heads turn round.
    let turn = |x: &[f32], inner: usize, heads: usize, width: usize| -> Vec<f32> {
        let mut y = Vec::with_capacity(x.len());
        for b in (0..case.b).rev() {
            for i in 0..inner {
                for h in (0..heads).rev() {
                    y.extend_from_slice(&x[((b * inner + i) * heads + h) * width..][..width]);
                }
            }
        }
        y
    };
    let (t, hk, hv) = (case.t, case.hk, case.hv);
    let gate_width = case.width();
    let turned = Inputs {
        q: turn(&inputs.q, t, hk, case.k),
        k: turn(&inputs.k, t, hk, case.k),
        v: turn(&inputs.v, t, hv, case.v),
        g: turn(&inputs.g, t, hv, gate_width),
        beta: turn(&inputs.beta, t, hv, 1),
        state: turn(&inputs.state, 1, hv, case.v * case.k),
        ..inputs.clone()
    };
    let want = Outputs {
        o: turn(&base.o, t, hv, case.v),
        state: if case.has_state_out() { turn(&base.state, 1, hv, case.v * case.k) } else { vec![] },
        snapshots: if case.snapshots { turn(&base.snapshots, t, hv, case.v * case.k) } else { vec![] },
    };
    all_bitwise("sequences and heads in reverse", &call(&exec(variant), case, &turned)?, &want)?;
    passed()
}

/// NaN in one sequence or one value head stays there; the rest keeps its bits.
fn isolation(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.b * case.hv < 2 || case.k == 0 || case.t == 0 || case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    let inputs = Inputs::generate(case, seed);
    let base = call(&exec(variant), case, &inputs)?;
    let sequence = pick(seed, case.b);
    let head = pick(seed + 1, case.hv);
    for whole_sequence in [true, false] {
        let mut bad = inputs.clone();
        let poisoned = |b: usize, h: usize| b == sequence && (whole_sequence || h == head);
        let poison = |x: &mut [f32], width: usize| {
            for b in 0..case.b {
                for i in 0..case.len(b) * case.hv {
                    if poisoned(b, i % case.hv) {
                        x[(case.start(b) * case.hv + i) * width..][..width].fill(f32::NAN);
                    }
                }
            }
        };
        poison(&mut bad.v, case.v);
        poison(&mut bad.g, case.width());
        poison(&mut bad.beta, 1);
        if whole_sequence {
            let width = case.hk * case.k;
            let range = case.start(sequence) * width..(case.start(sequence) + case.len(sequence)) * width;
            bad.q[range.clone()].fill(f32::NAN);
            bad.k[range].fill(f32::NAN);
        }
        for h in (0..case.hv).filter(|&h| poisoned(sequence, h)) {
            let n = case.v * case.k;
            bad.state[(sequence * case.hv + h) * n..][..n].fill(f32::NAN);
        }
        let got = call(&exec(variant), case, &bad)?;
        // Where poisoned: NaN, all of it. Elsewhere: the bits of the clean run.
        let check = |what: &str, got: &[f32], base: &[f32], at: &dyn Fn(usize) -> (usize, usize), nan: bool| {
            for (i, (&g, &w)) in got.iter().zip(base).enumerate() {
                let (b, h) = at(i);
                let right = if poisoned(b, h) { !nan || g.is_nan() } else { g.to_bits() == w.to_bits() };
                if !right {
                    return Err(Failure::new(format!("{what}[{i}] of sequence {b}, head {h}: got {g:e}, clean {w:e}")));
                }
            }
            Ok(())
        };
        let sequence_of = |token: usize| (0..case.b).rfind(|&b| case.start(b) <= token && case.len(b) > 0).unwrap_or(0);
        let of_token = |i: usize, width: usize| (sequence_of(i / (case.hv * width)), i / width % case.hv);
        let n = case.v * case.k;
        check("o", &got.o, &base.o, &|i| of_token(i, case.v), true)?;
        check("snapshots", &got.snapshots, &base.snapshots, &|i| of_token(i, n), true)?;
        check("state", &got.state, &base.state, &|i| (i / (n * case.hv), i / n % case.hv), case.len(sequence) > 0)?;
    }
    passed()
}

/// One NaN or infinity in any input: what is not finite afterwards is exactly what is not finite in float64, and all
/// outputs of earlier tokens keep their bits.
fn non_finite(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.work() == 0 || case.work() > PROPERTY_WORK / 4 {
        return Ok(None);
    }
    let inputs = Inputs::generate(case, seed);
    let base = call(&exec(variant), case, &inputs)?;
    let at = pick(seed, case.t);
    let put = |x: &mut Vec<f32>, width: usize, value: f32| {
        if !x.is_empty() {
            let i = (at * width + pick(seed + 1, width)) % x.len();
            x[i] = value;
        }
    };
    for value in [f32::NAN, f32::INFINITY] {
        for which in 0..6 {
            let mut bad = inputs.clone();
            match which {
                0 => put(&mut bad.q, case.hk * case.k, value),
                1 => put(&mut bad.k, case.hk * case.k, value),
                2 => put(&mut bad.v, case.hv * case.v, value),
                3 => put(&mut bad.beta, case.hv, value),
                // A gate of +inf is no log-decay; −inf forgets, and is an ordinary value.
                4 => put(&mut bad.g, case.hv * case.width(), if value.is_nan() { value } else { f32::NEG_INFINITY }),
                _ => put(&mut bad.state, 1, value),
            }
            let got = call(&exec(variant), case, &bad)?;
            let earlier = if which == 5 { 0 } else { at * case.hv * case.v };
            bitwise("o of earlier tokens", &got.o[..earlier], &base.o[..earlier])?;
            let mut want: Vec<f64> = vec![];
            let traces: Vec<Trace> =
                (0..case.b * case.hv).map(|i| bad.head(case, i / case.hv, i % case.hv).recurrent()).collect();
            for b in 0..case.b {
                for t in 0..case.len(b) {
                    (0..case.hv).for_each(|h| want.extend(traces[b * case.hv + h].o.row(t)));
                }
            }
            let name = ["q", "k", "v", "beta", "g", "state"][which];
            if let Some(i) = (0..want.len()).find(|&i| want[i].is_finite() != got.o[i].is_finite()) {
                return Err(Failure::new(format!(
                    "{value} in {name}: o[{i}] is {:e}, the reference has {:e}",
                    got.o[i], want[i]
                )));
            }
            let states = traces.iter().flat_map(|t| t.states.last().expect("T + 1 states"));
            if let Some((i, (g, w))) =
                got.state.iter().zip(states).enumerate().find(|(_, (g, w))| g.is_finite() != w.is_finite())
            {
                return Err(Failure::new(format!("{value} in {name}: state[{i}] is {g:e}, the reference has {w:e}")));
            }
        }
    }
    passed()
}

/// Later tokens do not change earlier outputs.
fn causality(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.rows != Rows::Dense || case.t == 0 || case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    let inputs = Inputs::generate(case, seed);
    let base = call(&exec(variant), case, &inputs)?;
    let at = pick(seed, case.t);
    let mut changed = inputs.clone();
    let spoil = |x: &mut [f32], width: usize| {
        for b in 0..case.b {
            x[(b * case.t + at) * width..(b + 1) * case.t * width].fill(f32::NAN);
        }
    };
    spoil(&mut changed.q, case.hk * case.k);
    spoil(&mut changed.k, case.hk * case.k);
    spoil(&mut changed.v, case.hv * case.v);
    spoil(&mut changed.beta, case.hv);
    let got = call(&exec(variant), case, &changed)?;
    for b in 0..case.b {
        let range = b * case.t * case.hv * case.v..(b * case.t + at) * case.hv * case.v;
        bitwise("o before the change", &got.o[range.clone()], &base.o[range])?;
    }
    passed()
}

/// No gate is a gate of 0, and a scalar gate is a channel gate of equal values.
fn gates(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.gate == GateKind::Channel || case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    if case.gate == GateKind::Absent {
        inputs.g.fill(0.0);
        let zero = Case { gate: GateKind::Scalar, ..case.clone() };
        all_bitwise("g = 0", &call(&exec(variant), &zero, &inputs)?, &call(&exec(variant), case, &inputs)?)?;
    }
    let channel = Case { gate: GateKind::Channel, ..case.clone() };
    let repeated = Inputs { g: inputs.g.iter().flat_map(|&g| vec![g; case.k]).collect(), ..inputs.clone() };
    let got = call(&exec(variant), &channel, &repeated)?;
    if is_recurrent(variant) {
        all_bitwise("equal channel gates", &got, &call(&exec(variant), case, &inputs)?)?;
        return passed();
    }
    judge(&channel, &repeated, Form::of(variant.name()), 0).compare(case, &got).map(Some)
}

/// g = −316 at a token: nothing before it matters any more.
fn forgetting(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.gate == GateKind::Absent
        || case.rows != Rows::Dense
        || case.t == 0
        || !case.has_state_in()
        || case.work() > PROPERTY_WORK
    {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    let at = pick(seed, case.t);
    let width = case.hv * case.width();
    for b in 0..case.b {
        inputs.g[(b * case.t + at) * width..][..width].fill(-316.0);
    }
    let mut other = inputs.clone();
    other.state.iter_mut().for_each(|s| *s = 3.0 - *s);
    let width = case.hv * case.v;
    for b in 0..case.b {
        other.v[b * case.t * width..(b * case.t + at) * width].iter_mut().for_each(|v| *v = 1.0 - *v);
    }
    let (x, y) = (call(&exec(variant), case, &inputs)?, call(&exec(variant), case, &other)?);
    same_values("state after forgetting", &y.state, &x.state)?;
    for b in 0..case.b {
        let range = (b * case.t + at) * width..(b + 1) * case.t * width;
        same_values("o after forgetting", &y.o[range.clone()], &x.o[range])?;
    }
    passed()
}

/// g = 0, β = 1 and one-hot keys: what was written is read back, bit for bit; a key written again holds the last value.
fn recall(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.t == 0 || case.k == 0 || case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    let t = case.t.min(case.k);
    let case =
        Case { t, rows: Rows::Dense, gate: GateKind::Absent, l2norm: false, state: StateKind::Zero, ..case.clone() };
    let mut inputs = Inputs { scale: 1.0, ..Inputs::generate(&case, seed) };
    inputs.beta.fill(1.0);
    for x in [&mut inputs.k, &mut inputs.q] {
        x.iter_mut().enumerate().for_each(|(i, x)| {
            let (token, c) = (i / (case.hk * case.k) % t, i % case.k);
            *x = if c == token { 1.0 } else { 0.0 };
        });
    }
    let got = call(&exec(variant), &case, &inputs)?;
    bitwise("o", &got.o, &inputs.v)?;
    for (i, &s) in got.state.iter().enumerate() {
        let (b, h, j, c) = (i / case.state_len(), i / (case.v * case.k) % case.hv, i / case.k % case.v, i % case.k);
        let want = if c < t { inputs.v[((b * t + c) * case.hv + h) * case.v + j] } else { 0.0 };
        same_values("a value read back", &[s], &[want])?;
    }

    // Every token writes to the first key: integers of a few bits, so that v − S k and S + u k are exact.
    inputs.k.iter_mut().enumerate().for_each(|(i, x)| *x = if i % case.k == 0 { 1.0 } else { 0.0 });
    inputs.v.iter_mut().for_each(|v| *v = v.round());
    let got = call(&exec(variant), &case, &inputs)?;
    for (i, &s) in got.state.iter().enumerate() {
        let (b, h, j, c) = (i / case.state_len(), i / (case.v * case.k) % case.hv, i / case.k % case.v, i % case.k);
        let want = if c == 0 { inputs.v[((b * t + t - 1) * case.hv + h) * case.v + j] } else { 0.0 };
        same_values("the last value written", &[s], &[want])?;
    }
    passed()
}

/// Norms of state rows: β = 2, v = 0, no gate and unit keys reflect and keep them; otherwise
/// ‖S_t‖ ≤ max e^g ‖S_{t−1}‖ + β ‖v‖ row by row.
fn norms(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.l2norm || case.t == 0 || case.work() > PROPERTY_WORK / 4 {
        return Ok(None);
    }
    let case = Case { rows: Rows::Dense, state: StateKind::InOut, snapshots: true, ..case.clone() };
    let inputs = Inputs::generate(&case, seed);
    let mut reflect = inputs.clone();
    reflect.v.fill(0.0);
    reflect.beta.fill(2.0);
    let still = Case { gate: GateKind::Absent, ..case.clone() };
    for (case, inputs, exact) in [(&still, &reflect, true), (&case, &inputs, false)] {
        let got = call(&exec(variant), case, inputs)?;
        let judged = judge(case, inputs, Form::of(variant.name()), 0);
        let row_norm = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        for b in 0..case.b {
            for h in 0..case.hv {
                let head = inputs.head(case, b, h);
                for j in 0..case.v {
                    let mut before = row_norm(&inputs.state[((b * case.hv + h) * case.v + j) * case.k..][..case.k]);
                    let mut error_before = 0.0;
                    for t in 0..case.t {
                        let at = (((b * case.t + t) * case.hv + h) * case.v + j) * case.k;
                        let now = row_norm(&got.snapshots[at..][..case.k]);
                        let error = judged.snapshots_bound.get(at).copied().unwrap_or(0.0);
                        // Keys are of unit norm up to their rounding to f32.
                        let k2: f64 = head.k.row(t).iter().map(|k| k * k).sum();
                        let slack = before * 2.0 * head.beta[t] * (k2 - 1.0).abs() + error + error_before;
                        let decay = head.g.row(t).iter().fold(0.0f64, |m, g| m.max(g.exp()));
                        let limit = decay * before + head.beta[t] * head.v[[t, j]].abs() * k2.sqrt();
                        let within = now <= limit + slack && (!exact || now >= before - slack || case.k == 0);
                        if !within {
                            return Err(Failure::new(format!(
                                "row {j} of head {h}, sequence {b}, token {t}: norm {before:e} became {now:e}"
                            )));
                        }
                        (before, error_before) = (now, error);
                    }
                }
            }
        }
    }
    passed()
}

/// β = 0: the state only decays, whatever the keys and values are.
fn decay(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if !case.has_state_in() || case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    inputs.beta.fill(0.0);
    let got = call(&exec(variant), case, &inputs)?;
    let mut other = inputs.clone();
    other.v.iter_mut().for_each(|v| *v = 3.0 - *v);
    other.k.reverse();
    let again = call(&exec(variant), case, &other)?;
    same_values("o with other keys and values", &again.o, &got.o)?;
    same_values("state with other keys and values", &again.state, &got.state)?;

    let (mut want, mut bound) = (vec![], vec![]);
    for i in 0..case.b * case.hv {
        let head = inputs.head(case, i / case.hv, i % case.hv);
        let (tokens, total) = (case.len(i / case.hv) as f64, head.g.sum_axis(Axis(0)).mapv(f64::exp));
        let state = &head.state * &total;
        // A rounded exponential and a product a token; under the normal range half of 2⁻¹⁴⁹ each.
        bound.extend(
            state
                .iter()
                .zip(&head.state)
                .map(|(w, s)| 1.001 * tokens * ((EXP + U32) * w.abs() + 2f64.powi(-149) * (1.0 + s.abs()))),
        );
        want.extend(state);
    }
    only_bound(compare("state", &got.state, &want, &bound, case.v * case.k))
}

/// Of a comparison between two kernels only the multiple of the bound is worth a report.
fn only_bound(metrics: Result<Metrics, Failure>) -> Outcome {
    metrics.map(|m| Some(Metrics { bound_multiple: m.bound_multiple, ..Metrics::default() }))
}

/// `n` orthonormal vectors of `k` ≥ n channels, rounded.
fn orthonormal_vectors(rng: &mut Rng, n: usize, k: usize, dtype: Dtype) -> Vec<Vec<f32>> {
    let mut basis: Vec<Vec<f64>> = vec![];
    while basis.len() < n {
        let mut x = unit_vector(rng, k);
        // Twice is enough (Kahan), unless little was left: then another one.
        for _ in 0..2 {
            for b in &basis {
                let dot: f64 = x.iter().zip(b).map(|(x, b)| x * b).sum();
                x.iter_mut().zip(b).for_each(|(x, b)| *x -= dot * b);
            }
            let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
            x.iter_mut().for_each(|x| *x /= norm);
        }
        let left = basis.iter().all(|b| {
            let dot: f64 = x.iter().zip(b).map(|(x, b)| x * b).sum();
            dot.abs() <= k as f64 * f64::EPSILON
        });
        if left && x.iter().all(|x| x.is_finite()) {
            basis.push(x);
        }
    }
    basis.into_iter().map(|x| x.into_iter().map(|x| dtype.round(x as f32)).collect()).collect()
}

/// No gate, β = 1, unit keys: orthonormal keys each read back what was written with them, after all were written; one
/// key written again and again reads the last value. Up to the bound, and to how far rounded keys are from orthonormal:
/// the value read with k_j is off by Σ_{i≥j} u_i (k_i·k_j − δ_ij).
fn orthonormal(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    let n = case.t.min(case.k);
    if n == 0 || case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    let case = Case {
        t: 2 * n,
        rows: Rows::Dense,
        gate: GateKind::Absent,
        l2norm: false,
        state: StateKind::Zero,
        snapshots: false,
        ..case.clone()
    };
    let mut inputs = Inputs { scale: 1.0, ..Inputs::generate(&case, seed) };
    // The first n tokens write, the others only read.
    inputs.beta.iter_mut().enumerate().for_each(|(i, b)| *b = f32::from(u8::from(i / case.hv % case.t < n)));
    let basis = orthonormal_vectors(&mut rng(seed ^ 1), n, case.k, case.dtype);
    let mut worst = Metrics::default();
    for repeated in [false, true] {
        let key = |t: usize| if repeated { &basis[0] } else { &basis[t % n] };
        // The token whose value is read at token t.
        let read = |t: usize| if repeated { t.min(n - 1) } else { t % n };
        for x in [&mut inputs.k, &mut inputs.q] {
            for (i, x) in x.chunks_mut(case.k).enumerate() {
                x.copy_from_slice(key(i / case.hk % case.t));
            }
        }
        let overlap = |i: usize, j: usize| {
            let dot: f64 = key(i).iter().zip(key(j)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            (dot - f64::from(u8::from(i == j))).abs()
        };
        let got = call(&exec(variant), &case, &inputs)?;
        let judged = judge(&case, &inputs, Form::of(variant.name()), 0);
        let us: Vec<Array2<f64>> =
            (0..case.b * case.hv).map(|i| inputs.head(&case, i / case.hv, i % case.hv).recurrent().u).collect();
        let (mut want, mut bound) = (vec![], vec![]);
        for (i, judged) in judged.o_bound.iter().enumerate() {
            let (b, t, h, j) =
                (i / (case.t * case.hv * case.v), i / (case.hv * case.v) % case.t, i / case.v % case.hv, i % case.v);
            let from = read(t);
            want.push(f64::from(inputs.v[((b * case.t + from) * case.hv + h) * case.v + j]));
            let u = &us[b * case.hv + h];
            bound.push(judged + (from..=t.min(n - 1)).map(|i| u[[i, j]].abs() * overlap(i, from)).sum::<f64>());
        }
        worst = worst.worst(compare("value read", &got.o, &want, &bound, case.v)?);
    }
    only_bound(Ok(worst))
}

/// `got` against the combination `want` of other outputs, within the sum of all their bounds.
fn combined(
    case: &Case,
    got: &Outputs,
    want: impl Fn(fn(&Outputs) -> &Vec<f32>) -> Vec<f64>,
    bounds: &[Judged],
) -> Result<Metrics, Failure> {
    let sum = |of: fn(&Judged) -> &Vec<f64>| -> Vec<f64> {
        (0..of(&bounds[0]).len()).map(|i| bounds.iter().map(|b| of(b)[i]).sum()).collect()
    };
    let state = case.v * case.k;
    let o = compare("o", &got.o, &want(|x| &x.o), &sum(|j| &j.o_bound), case.v)?;
    let s = compare("state", &got.state, &want(|x| &x.state), &sum(|j| &j.state_bound), state)?;
    let p = compare("snapshots", &got.snapshots, &want(|x| &x.snapshots), &sum(|j| &j.snapshots_bound), state)?;
    Ok(o.worst(s).worst(p))
}

/// Linear in (v, S₀) jointly: the sum of two problems, exact in their types, gives the sum of their results.
fn linearity(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.work() > PROPERTY_WORK / 4 {
        return Ok(None);
    }
    // Multiples of 2⁻¹⁰ below 64, in 8 and 11 bits of 2⁻² and 2⁻⁵: sums are exact.
    let coarse = |x: &[f32], parts: f32| x.iter().map(|x| (x * parts).round() / parts).collect::<Vec<f32>>();
    let parts = match case.dtype {
        Dtype::F32 => 1024.0,
        Dtype::BF16 => 4.0,
        Dtype::F16 => 32.0,
    };
    let first = Inputs::generate(case, seed);
    let other = Inputs::generate(case, seed ^ 1);
    let x = Inputs { v: coarse(&first.v, parts), state: coarse(&first.state, 1024.0), ..first.clone() };
    let y = Inputs { v: coarse(&other.v, parts), state: coarse(&other.state, 1024.0), ..first };
    let add = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x + y).collect::<Vec<f32>>();
    let z = Inputs { v: add(&x.v, &y.v), state: add(&x.state, &y.state), ..x.clone() };
    let form = Form::of(variant.name());
    let bounds = [&x, &y, &z].map(|inputs| judge(case, inputs, form, 0));
    let [x, y, z] = [call(&exec(variant), case, &x)?, call(&exec(variant), case, &y)?, call(&exec(variant), case, &z)?];
    let sum =
        |of: fn(&Outputs) -> &Vec<f32>| of(&x).iter().zip(of(&y)).map(|(x, y)| f64::from(*x) + f64::from(*y)).collect();
    only_bound(combined(case, &z, sum, &bounds))
}

/// Fours of channels in every row of `k` channels through half of a Hadamard matrix: orthogonal, its own inverse, and
/// exact on values of few bits.
fn rotated(x: &[f32], k: usize) -> Vec<f32> {
    let mut y = x.to_vec();
    for row in y.chunks_mut(k.max(1)) {
        for c in row.chunks_exact_mut(4) {
            let [p, q, r, s] = [c[0] + c[1], c[0] - c[1], c[2] + c[3], c[2] - c[3]];
            c.copy_from_slice(&[(p + r) / 2.0, (q + s) / 2.0, (p - r) / 2.0, (q - s) / 2.0]);
        }
    }
    y
}

/// (q, k, S₀) turned by an orthogonal map of the key channels: o stays and S turns. A change of the signs of some
/// channels does so bit for bit, a rotation within the bounds of both calls: of f32 alone, as it takes bits.
fn rotation(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.k == 0 || case.work() > PROPERTY_WORK / 2 {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    let base = call(&exec(variant), case, &inputs)?;
    let mut draw = rng(seed ^ 1);
    let signs: Vec<f32> = (0..case.k).map(|_| if draw.random() { -1.0 } else { 1.0 }).collect();
    let flip = |x: &[f32]| x.iter().enumerate().map(|(i, x)| x * signs[i % case.k]).collect::<Vec<f32>>();
    let turned = Inputs { q: flip(&inputs.q), k: flip(&inputs.k), state: flip(&inputs.state), ..inputs.clone() };
    let got = call(&exec(variant), case, &turned)?;
    same_values("o with signs of channels changed", &got.o, &base.o)?;
    same_values("S with signs of channels changed", &got.state, &flip(&base.state))?;
    same_values("snapshots with signs of channels changed", &got.snapshots, &flip(&base.snapshots))?;
    if case.dtype != Dtype::F32 {
        return passed();
    }

    // Multiples of 2⁻¹⁴ below 16, and one decay for the four channels that mix.
    let coarse = |x: &mut Vec<f32>| x.iter_mut().for_each(|x| *x = (*x * 16384.0).round() / 16384.0);
    [&mut inputs.q, &mut inputs.k, &mut inputs.state].into_iter().for_each(coarse);
    if case.gate == GateKind::Channel {
        for row in inputs.g.chunks_mut(case.k) {
            row.chunks_exact_mut(4).for_each(|g| g.fill(g[0]));
        }
    }
    let turn = |x: &[f32]| rotated(x, case.k);
    let turned = Inputs { q: turn(&inputs.q), k: turn(&inputs.k), state: turn(&inputs.state), ..inputs.clone() };
    let form = Form::of(variant.name());
    let bounds = [judge(case, &inputs, form, 0), judge(case, &turned, form, 0)];
    let (base, got) = (call(&exec(variant), case, &inputs)?, call(&exec(variant), case, &turned)?);
    // Turning the computed state rounds it: one addition, two at most, of numbers up to twice its size.
    let mut back = Outputs { o: got.o, state: turn(&got.state), snapshots: turn(&got.snapshots) };
    let mut bounds = bounds.to_vec();
    let largest = |x: &[f32]| x.iter().fold(0.0f64, |m, &x| m.max(f64::from(x).abs()));
    let rounding = 4.0 * U32 * largest(&back.state).max(largest(&back.snapshots)) * 2.0;
    bounds[0].state_bound.iter_mut().for_each(|b| *b += rounding);
    bounds[0].snapshots_bound.iter_mut().for_each(|b| *b += rounding);
    if !case.has_state_out() {
        back.state.clear();
    }
    let want = |of: fn(&Outputs) -> &Vec<f32>| of(&base).iter().map(|&x| f64::from(x)).collect();
    only_bound(combined(case, &back, want, &bounds))
}

/// The forms of the rule (token by token, chunks of any size, U and W) agree: this variant and the next one of the list
/// are within both bounds of each other, that one in f32 where it takes nothing else.
fn agree(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.work() > PROPERTY_WORK / 2 {
        return Ok(None);
    }
    let all: Vec<_> = gated_delta::Op::variants().into_iter().filter(|v| v.isa().available()).collect();
    let at = all.iter().position(|v| v.name() == variant.name()).map_or(0, |i| (i + 1) % all.len());
    let inputs = Inputs::generate(case, seed);
    let of_other = GatedDelta::refusal(&all[at], case).map_or(case.clone(), |(_, without)| without);
    let bounds = [(variant, case), (&all[at], &of_other)].map(|(v, case)| judge(case, &inputs, Form::of(v.name()), 0));
    let (got, other) = (call(&exec(variant), case, &inputs)?, call(&exec(&all[at]), &of_other, &inputs)?);
    let want = |of: fn(&Outputs) -> &Vec<f32>| of(&other).iter().map(|&x| f64::from(x)).collect();
    only_bound(combined(case, &got, want, &bounds))
}

/// Which entries of a pool of which size the sequences use changes no bit, nor does it that all start from one entry.
fn slot_ids(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.b == 0 || case.state == StateKind::Dropped || case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    let case = Case { slots: true, ..case.clone() };
    let mut inputs = Inputs::generate(&case, seed);
    let want = call(&exec(variant), &case, &inputs)?;
    let mut draw = rng(seed ^ 1);
    inputs.slots = case.b + draw.random_range(0..40);
    let mut entries = || {
        let mut all: Vec<i64> = (0..inputs.slots as i64).collect();
        all.shuffle(&mut draw);
        all.truncate(case.b);
        all
    };
    inputs.slot_out = entries();
    inputs.slot_in = if case.state == StateKind::InPlace { inputs.slot_out.clone() } else { entries() };
    all_bitwise("other slots", &call(&exec(variant), &case, &inputs)?, &want)?;

    if case.state == StateKind::InOut {
        let first = inputs.state[..case.state_len()].to_vec();
        inputs.state = first.repeat(case.b);
        let apart = call(&exec(variant), &case, &inputs)?;
        inputs.slot_in = vec![inputs.slot_in[0]; case.b];
        all_bitwise("one slot to start from", &call(&exec(variant), &case, &inputs)?, &apart)?;
    }
    passed()
}

/// A sequence alone gives the bits it gives in a batch or among packed sequences.
fn alone(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    let packed = case.rows == Rows::Packed;
    if case.b < 2 && !packed || packed && !Form::of(variant.name()).may_be_packed() || case.work() > PROPERTY_WORK {
        return Ok(None);
    }
    sequences_alone(&exec(variant), case, seed)?;
    passed()
}

/// Every sequence of the case by itself gives the bits that it gives among the others.
pub fn sequences_alone(exec: &Exec<gated_delta::Op>, case: &Case, seed: u64) -> Result<(), Failure> {
    let inputs = Inputs::generate(case, seed);
    let all = call(exec, case, &inputs)?;
    for b in 0..case.b {
        let (from, n) = (case.start(b), case.len(b));
        let cut = |x: &[f32], width: usize| x[from * width..(from + n) * width].to_vec();
        let one = Case { b: 1, t: n, rows: Rows::Dense, slots: false, ..case.clone() };
        let state = b * case.state_len()..(b + 1) * case.state_len();
        let alone = Inputs {
            q: cut(&inputs.q, case.hk * case.k),
            k: cut(&inputs.k, case.hk * case.k),
            v: cut(&inputs.v, case.hv * case.v),
            g: cut(&inputs.g, case.hv * case.width()),
            beta: cut(&inputs.beta, case.hv),
            state: inputs.state[state.clone()].to_vec(),
            slot_in: vec![0],
            slot_out: vec![0],
            slots: 1,
            scale: inputs.scale,
        };
        let want = Outputs {
            o: cut(&all.o, case.hv * case.v),
            state: if case.has_state_out() { all.state[state].to_vec() } else { vec![] },
            snapshots: if case.snapshots { cut(&all.snapshots, case.state_len()) } else { vec![] },
        };
        all_bitwise("a sequence alone", &call(exec, &one, &alone)?, &want)?;
    }
    Ok(())
}

/// Speculation: drafted tokens that are thrown away leave no trace. The state goes back to a snapshot and the right
/// tokens follow: what they give is what they would have given at once (bit for bit token by token).
fn rollback(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.rows != Rows::Dense || case.t < 2 || case.b == 0 || case.work() > PROPERTY_WORK / 2 {
        return Ok(None);
    }
    let case = Case { snapshots: true, state: StateKind::InPlace, ..case.clone() };
    let inputs = Inputs::generate(&case, seed);
    let at = 1 + pick(seed, case.t - 1);
    let mut draft = inputs.clone();
    let spoil = |x: &mut [f32], width: usize| {
        for b in 0..case.b {
            x[(b * case.t + at) * width..(b + 1) * case.t * width].iter_mut().for_each(|x| *x = 1.0 - *x / 2.0);
        }
    };
    spoil(&mut draft.v, case.hv * case.v);
    spoil(&mut draft.q, case.hk * case.k);
    spoil(&mut draft.beta, case.hv);
    let drafted = call(&exec(variant), &case, &draft)?;

    let n = case.state_len();
    let (tail, mut tail_inputs) = slice(&case, &inputs, at, case.t);
    tail_inputs.state =
        (0..case.b).flat_map(|b| &drafted.snapshots[(b * case.t + at - 1) * n..][..n]).copied().collect();
    let replayed = call(&exec(variant), &tail, &tail_inputs)?;
    let (head, head_inputs) = slice(&case, &inputs, 0, at);
    let first = call(&exec(variant), &head, &head_inputs)?;
    let got = join(&case, at, &first, replayed);
    if is_recurrent(variant) {
        all_bitwise("after a rollback", &got, &call(&exec(variant), &case, &inputs)?)?;
        return passed();
    }
    judge(&case, &inputs, Form::of(variant.name()), at).compare(&case, &got).map(Some)
}

/// Matrix products in the dense form grow with K³ a token: up to this much.
const DENSE_WORK: usize = 40_000_000;

/// The final state against the second oracle S₀ Φ + Ψ, which knows no u; both oracles against each other.
fn dense(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if !case.has_state_out() || case.tokens() * case.hv * case.k.pow(3) > DENSE_WORK {
        return Ok(None);
    }
    let inputs = Inputs::generate(case, seed);
    let got = call(&exec(variant), case, &inputs)?;
    let mut judged = judge(case, &inputs, Form::of(variant.name()), 0);
    let mut at = 0;
    for i in 0..case.b * case.hv {
        let head = inputs.head(case, i / case.hv, i % case.hv);
        let (dense, error) = (head.dense(), head.dense_error());
        for (row, &error) in dense.rows().into_iter().zip(&error) {
            for &x in row {
                let within = (judged.state[at] - x).abs() <= error;
                if !within {
                    return Err(Failure::new(format!(
                        "state[{at}]: the token loop has {:e}, the dense form {x:e}, bound {error:e}",
                        judged.state[at]
                    )));
                }
                judged.state[at] = x;
                judged.state_bound[at] += error;
                at += 1;
            }
        }
    }
    compare("state", &got.state, &judged.state, &judged.state_bound, case.v * case.k).map(Some)
}

/// 4,096 tokens in calls of 64: the state stays within what independent roundings leave of float64.
fn drift(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    // Its arrays are its own: where the suite's lie makes no difference.
    if case.t < drift::QUICK || case.dtype != Dtype::F32 || place() == Place::Start {
        return Ok(None);
    }
    let runner = drift::Runner { variant: *variant, state: drift::Store::F32, step: drift::STEP, tokens: drift::QUICK };
    let mut bound_multiple = 0.0f64;
    for (head, curve) in drift::run(drift::QUICK, case.k, seed, &[runner])?.iter().enumerate() {
        for p in &curve.points {
            let within = p.state <= p.bound;
            if !within {
                return Err(Failure::new(format!(
                    "{} after {} tokens: the state is off by {:.2e} of its norm, bound {:.2e}",
                    drift::HEADS[head],
                    p.tokens,
                    p.state,
                    p.bound
                )));
            }
            bound_multiple = bound_multiple.max(p.state / p.bound);
        }
    }
    Ok(Some(Metrics { bound_multiple, ..Metrics::default() }))
}

/// Rows of q and k that are one row, by strides of 0, are as good as copies of it: also in sequences of other lengths,
/// which then start at the same address.
fn repeated(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    match case.dtype {
        Dtype::F32 => repeated_typed::<f32>(variant, case, seed),
        Dtype::BF16 => repeated_typed::<bf16>(variant, case, seed),
        Dtype::F16 => repeated_typed::<f16>(variant, case, seed),
    }
}

fn repeated_typed<E: Value>(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    let lengths = [case.t, 0, case.t / 2 + 1, 35];
    let t: usize = lengths.iter().sum();
    let (hk, hv, kd, vd) = (case.hk, case.hv, case.k, case.v);
    if hv == 0 || kd == 0 || vd == 0 || t * hv * kd * vd > PROPERTY_WORK {
        return Ok(None);
    }
    let mut cu_seqlens = vec![0i64];
    cu_seqlens.extend(lengths.iter().scan(0, |end, &n| {
        *end += n as i64;
        Some(*end)
    }));
    let rng = &mut rng(seed);
    let unit: [Vec<E>; 2] = [0, 1].map(|_| unit_vector(rng, kd).into_iter().map(|x| E::nearest(x as f32)).collect());
    let [q, k] = unit;
    let mut draw =
        |n: usize, low: f32, high: f32| -> Vec<f32> { (0..n).map(|_| rng.random_range(low..high)).collect() };
    let (v, g, beta) = (narrow::<E>(&draw(t * hv * vd, -1.0, 1.0)), draw(t * hv, -0.5, 0.0), draw(t * hv, 0.0, 1.0));
    let state = draw(lengths.len() * hv * vd * kd, -1.0, 1.0);
    let run = |q: &[E], k: &[E], strides: [usize; 4]| -> Result<(Vec<f32>, Vec<f32>), Failure> {
        let (mut o, mut state) = (vec![E::POISON; t * hv * vd], state.clone());
        let args = gated_delta::Args {
            o: ViewMut::new(&mut o, [1, t, hv, vd])?,
            snapshots: None,
            state: State::InPlace { pool: ViewMut::new(&mut state, [lengths.len(), hv, vd, kd])?, slots: None },
            q: View::strided(q, [1, t, hk, kd], strides)?,
            k: View::strided(k, [1, t, hk, kd], strides)?,
            v: View::new(&v, [1, t, hv, vd])?,
            gate: Gate::Scalar(LogDecay::unchecked(View::new(&g, [1, t, hv])?)),
            beta: View::new(&beta, [1, t, hv])?,
            cu_seqlens: Some(&cu_seqlens),
            head_map: match case.heads {
                Heads::Grouped => HeadMap::Grouped,
                Heads::Tiled => HeadMap::Tiled,
            },
            qk_l2norm: case.l2norm.then_some(gated_delta::L2_NORM_EPS),
            scale: 0.5,
        };
        gated_delta::run(args, &exec(variant))?;
        Ok((o.into_iter().map(Value::wide).collect(), state))
    };
    let (want_o, want_state) = run(&q.repeat(t * hk), &k.repeat(t * hk), [t * hk * kd, hk * kd, kd, 1])?;
    let (o, state) = run(&q, &k, [0, 0, 0, 1])?;
    bitwise("o", &o, &want_o)?;
    bitwise("state", &state, &want_state)?;
    passed()
}

/// Entries of the pool that lie 2³¹ elements apart are found all the same.
fn far_slots(variant: &Variant<gated_delta::Op>, case: &Case, seed: u64) -> Outcome {
    if case.t != 3 || case.state_len() == 0 {
        return Ok(None);
    }
    let case = Case {
        b: 2,
        gate: GateKind::Scalar,
        state: StateKind::InPlace,
        slots: false,
        snapshots: false,
        rows: Rows::Dense,
        layout: Layout::Packed,
        dtype: Dtype::F32,
        ..case.clone()
    };
    let inputs = Inputs::generate(&case, seed);
    let want = call(&exec(variant), &case, &inputs)?;
    let (n, tokens, slots) = (case.state_len(), [case.b, case.t], [2, 0]);
    let (first, second) = inputs.state.split_at(n);
    let mut pool = FarPool::new(&[(2, first), (0, second)])?;
    let mut o = vec![f32::NAN; want.o.len()];
    let shape = |heads: usize, width: usize| [tokens[0], tokens[1], heads, width];
    let args = gated_delta::Args {
        o: ViewMut::new(&mut o, shape(case.hv, case.v))?,
        snapshots: None,
        state: State::InPlace {
            pool: ViewMut::strided(
                pool.elements(),
                [FarPool::SLOTS, case.hv, case.v, case.k],
                [FarPool::STRIDE, case.v * case.k, case.k, 1],
            )?,
            slots: Some(&slots),
        },
        q: View::new(&inputs.q, shape(case.hk, case.k))?,
        k: View::new(&inputs.k, shape(case.hk, case.k))?,
        v: View::new(&inputs.v, shape(case.hv, case.v))?,
        gate: Gate::Scalar(LogDecay::unchecked(View::new(&inputs.g, [tokens[0], tokens[1], case.hv])?)),
        beta: View::new(&inputs.beta, [tokens[0], tokens[1], case.hv])?,
        cu_seqlens: None,
        head_map: match case.heads {
            Heads::Grouped => HeadMap::Grouped,
            Heads::Tiled => HeadMap::Tiled,
        },
        qk_l2norm: case.l2norm.then_some(gated_delta::L2_NORM_EPS),
        scale: inputs.scale,
    };
    gated_delta::run(args, &exec(variant))?;
    bitwise("o", &o, &want.o)?;
    for (b, slot) in [2, 0].into_iter().enumerate() {
        bitwise("a far state", &pool.elements()[slot * FarPool::STRIDE..][..n], &want.state[b * n..][..n])?;
    }
    passed()
}

/// The suite.
pub struct GatedDelta;

impl Suite for GatedDelta {
    type Op = gated_delta::Op;
    type Case = Case;

    fn grid() -> Vec<Case> {
        let dims = [(1, 1), (4, 16), (16, 4), (32, 32), (64, 32), (16, 64), (1, 32), (32, 1), (128, 16)];
        let dtypes = [0, 1, 0, 2, 0, 1, 0, 2, 1, 0, 1].map(|i| Dtype::ALL[i]);
        let mut grid = Vec::new();
        for (i, t) in [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129].into_iter().enumerate() {
            for j in 0..4 {
                let n = i * 4 + j;
                let (k, v) = dims[n % dims.len()];
                grid.push(Case {
                    b: [1, 2, 4][n % 3],
                    t,
                    hk: 2,
                    hv: if n % 5 == 4 { 2 } else { 6 },
                    k,
                    v,
                    gate: GateKind::ALL[(i + j) % 3],
                    heads: Heads::ALL[n / 2 % 2],
                    l2norm: n % 4 == 1 || n % 4 == 2,
                    state: StateKind::ALL[(n + n / 4) % 4],
                    slots: n % 3 != 0,
                    snapshots: n % 4 == 3,
                    rows: Rows::ALL[n / 3 % 2],
                    layout: Layout::ALL[n / 5 % 2],
                    regime: Regime::ALL[n % 7 % 3],
                    dtype: dtypes[n % dtypes.len()],
                });
            }
        }
        let base = Case {
            b: 1,
            t: 129,
            hk: 1,
            hv: 2,
            k: 128,
            v: 128,
            gate: GateKind::Scalar,
            heads: Heads::Grouped,
            l2norm: true,
            state: StateKind::InPlace,
            slots: false,
            snapshots: false,
            rows: Rows::Dense,
            layout: Layout::Packed,
            regime: Regime::Harsh,
            dtype: Dtype::F32,
        };
        // The model's head size; long memory; a drift of 4,096 tokens; sizes of 0.
        grid.push(base.clone());
        grid.push(Case { dtype: Dtype::BF16, regime: Regime::Mild, ..base.clone() });
        grid.push(Case { t: 65, gate: GateKind::Channel, regime: Regime::Parallel, l2norm: false, ..base.clone() });
        // Chunks enough for segments between others, in heads that forget little.
        grid.push(Case { t: 330, k: 32, v: 32, b: 3, rows: Rows::Packed, regime: Regime::Parallel, ..base.clone() });
        let open = Case { gate: GateKind::Absent, regime: Regime::Mild, dtype: Dtype::BF16, ..base.clone() };
        grid.push(Case { t: 330, k: 64, v: 16, hv: 1, ..open });
        grid.push(Case { t: 4096, k: 32, v: 16, hv: 1, regime: Regime::Parallel, ..base.clone() });
        grid.push(Case { t: 4096, hk: 2, hv: 6, k: 16, v: 8, ..base.clone() });
        grid.push(Case { t: 5, k: 0, ..base.clone() });
        grid.push(Case { t: 5, v: 0, ..base.clone() });
        grid.push(Case { t: 5, hk: 0, hv: 0, ..base.clone() });
        grid.push(Case { b: 0, t: 5, ..base });
        grid
    }

    fn strategy() -> BoxedStrategy<Case> {
        let shape = (0usize..4, 0usize..70, 1usize..3, 1usize..4, 0usize..40, 0usize..40);
        let kinds = (
            prop::sample::select(GateKind::ALL),
            prop::sample::select(Heads::ALL),
            prop::sample::select(StateKind::ALL),
            prop::sample::select(Rows::ALL),
            prop::sample::select(Layout::ALL),
            prop::sample::select(Regime::ALL),
            // As dear as each other: f32 as often as both others.
            prop::sample::select(&[Dtype::F32, Dtype::F32, Dtype::BF16, Dtype::F16][..]),
        );
        (shape, kinds, any::<bool>(), any::<bool>(), any::<bool>())
            .prop_map(|((b, t, hk, r, k, v), kinds, l2norm, slots, snapshots)| {
                let ((gate, heads, state, rows, layout, regime, dtype), hv) = (kinds, hk * r);
                Case { b, t, hk, hv, k, v, gate, heads, l2norm, state, slots, snapshots, rows, layout, regime, dtype }
            })
            .boxed()
    }

    /// Types of 16 bits, which CUDA kernels alone must take.
    fn refusal(variant: &Variant<gated_delta::Op>, case: &Case) -> Option<(&'static str, Case)> {
        let what = match case.dtype {
            Dtype::F32 => return None,
            Dtype::BF16 => "dtype bf16",
            Dtype::F16 => "dtype f16",
        };
        let refused = !variant.name().contains("cuda") && !takes(variant, case.dtype);
        refused.then(|| (what, Case { dtype: Dtype::F32, ..case.clone() }))
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: reference },
            Check { name: "cuts", run: cuts },
            Check { name: "placement", run: placement },
            Check { name: "scaling", run: scaling },
            Check { name: "signs", run: signs },
            Check { name: "idle", run: idle },
            Check { name: "split", run: split },
            Check { name: "snapshots", run: snapshots },
            Check { name: "channels", run: channels },
            Check { name: "order", run: order },
            Check { name: "isolation", run: isolation },
            Check { name: "non-finite", run: non_finite },
            Check { name: "causality", run: causality },
            Check { name: "gates", run: gates },
            Check { name: "forgetting", run: forgetting },
            Check { name: "recall", run: recall },
            Check { name: "orthonormal", run: orthonormal },
            Check { name: "norms", run: norms },
            Check { name: "decay", run: decay },
            Check { name: "linearity", run: linearity },
            Check { name: "rotation", run: rotation },
            Check { name: "agree", run: agree },
            Check { name: "slot_ids", run: slot_ids },
            Check { name: "alone", run: alone },
            Check { name: "rollback", run: rollback },
            Check { name: "dense", run: dense },
            Check { name: "drift", run: drift },
            Check { name: "repeated", run: repeated },
            Check { name: "far_slots", run: far_slots },
        ]
    }
}

/// A DeltaNet layer's call of `t` tokens with in-kernel norm and the state updated in place, to be timed.
pub struct Timed {
    case: Case,
    inputs: Inputs,
    tokens: Tokens,
    pool: Vec<f32>,
}

/// q, k, v and o of a type.
struct Typed<E> {
    q: Vec<E>,
    k: Vec<E>,
    v: Vec<E>,
    o: Vec<E>,
}

/// The same of any type.
enum Tokens {
    F32(Typed<f32>),
    BF16(Typed<bf16>),
    F16(Typed<f16>),
}

impl<E: Value> Typed<E> {
    fn new(inputs: &Inputs) -> Typed<E> {
        let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(|x| narrow(x));
        Typed { o: vec![E::POISON; v.len()], q, k, v }
    }

    fn run(&mut self, c: &Case, x: &Inputs, pool: &mut [f32], exec: &Exec<gated_delta::Op>) -> Result<(), Failure> {
        let args = gated_delta::Args {
            o: ViewMut::new(&mut self.o, [c.b, c.t, c.hv, c.v])?,
            snapshots: None,
            state: State::InPlace { pool: ViewMut::new(pool, [c.b, c.hv, c.v, c.k])?, slots: None },
            q: View::new(&self.q, [c.b, c.t, c.hk, c.k])?,
            k: View::new(&self.k, [c.b, c.t, c.hk, c.k])?,
            v: View::new(&self.v, [c.b, c.t, c.hv, c.v])?,
            gate: Gate::Scalar(LogDecay::unchecked(View::new(&x.g, [c.b, c.t, c.hv])?)),
            beta: View::new(&x.beta, [c.b, c.t, c.hv])?,
            cu_seqlens: None,
            head_map: HeadMap::Grouped,
            qk_l2norm: Some(gated_delta::L2_NORM_EPS),
            scale: x.scale,
        };
        Ok(gated_delta::run(args, exec)?)
    }

    fn bytes(&self) -> usize {
        size_of::<E>() * (self.q.len() + self.k.len() + self.v.len() + self.o.len())
    }
}

impl Timed {
    /// Inputs of `b` sequences: `t` tokens, `hk` key and `hv` value heads of `d` channels.
    pub fn new(b: usize, t: usize, hk: usize, hv: usize, d: usize, dtype: Dtype) -> Timed {
        let case = Case {
            b,
            t,
            hk,
            hv,
            k: d,
            v: d,
            gate: GateKind::Scalar,
            heads: Heads::Grouped,
            l2norm: true,
            state: StateKind::InPlace,
            slots: false,
            snapshots: false,
            rows: Rows::Dense,
            layout: Layout::Packed,
            regime: Regime::Mild,
            dtype,
        };
        let inputs = Inputs::generate(&case, 1);
        let tokens = match dtype {
            Dtype::F32 => Tokens::F32(Typed::new(&inputs)),
            Dtype::BF16 => Tokens::BF16(Typed::new(&inputs)),
            Dtype::F16 => Tokens::F16(Typed::new(&inputs)),
        };
        // From here on they are in `tokens`.
        let inputs = Inputs { q: vec![], k: vec![], v: vec![], ..inputs };
        Timed { pool: inputs.state.clone(), case, inputs, tokens }
    }

    /// Judges a variant on inputs of these shapes: the float64 loop takes its time, so of many heads and tokens it sees
    /// the first ones.
    pub fn verify(&self, variant: &Variant<gated_delta::Op>) -> Result<Metrics, Failure> {
        let group = self.case.hv / self.case.hk;
        let hk = self.case.hk.min(2);
        let case = Case { b: self.case.b.min(2), t: self.case.t.min(130), hk, hv: hk * group, ..self.case.clone() };
        let inputs = Inputs::generate(&case, 1);
        let got = call(&Exec::variant(*variant), &case, &inputs)?;
        judge(&case, &inputs, Form::of(variant.name()), 0).compare(&case, &got)
    }

    /// One call.
    pub fn run(&mut self, exec: &Exec<gated_delta::Op>) -> Result<(), Failure> {
        let (case, inputs, pool) = (&self.case, &self.inputs, &mut self.pool);
        match &mut self.tokens {
            Tokens::F32(x) => x.run(case, inputs, pool, exec),
            Tokens::BF16(x) => x.run(case, inputs, pool, exec),
            Tokens::F16(x) => x.run(case, inputs, pool, exec),
        }
    }

    /// What a call writes, beside the state, where it is f32.
    pub fn output(&mut self) -> &mut [f32] {
        match &mut self.tokens {
            Tokens::F32(x) => &mut x.o,
            _ => &mut [],
        }
    }

    /// The first element of the output, of any type, that is not finite.
    pub fn not_finite(&self) -> Option<usize> {
        fn first<E: Value>(x: &Typed<E>) -> Option<usize> {
            x.o.iter().position(|o| !o.wide().is_finite())
        }
        match &self.tokens {
            Tokens::F32(x) => first(x),
            Tokens::BF16(x) => first(x),
            Tokens::F16(x) => first(x),
        }
    }

    /// Forgets the output.
    pub fn wipe(&mut self) {
        match &mut self.tokens {
            Tokens::F32(x) => x.o.fill(Value::POISON),
            Tokens::BF16(x) => x.o.fill(Value::POISON),
            Tokens::F16(x) => x.o.fill(Value::POISON),
        }
    }

    /// Operations of the recurrence: 7 K V a token and value head, whatever the variant does instead.
    pub fn flops(&self) -> f64 {
        (7 * self.case.tokens() * self.case.state_len()) as f64
    }

    /// Bytes that must move: every input and output once, the state in and out.
    pub fn bytes(&self) -> f64 {
        let tokens = match &self.tokens {
            Tokens::F32(x) => x.bytes(),
            Tokens::BF16(x) => x.bytes(),
            Tokens::F16(x) => x.bytes(),
        };
        (tokens + 4 * (self.inputs.g.len() + self.inputs.beta.len() + 2 * self.pool.len())) as f64
    }
}
