//! The small steps of a layer: against float64, against the operators whose bits they promise, alone and cut anywhere.

use super::attention::KvType;
use super::quant::{Blocks, Type, NAN_BYTE};
use super::{normal, wide};
use crate::buffer::{zones, FarPool, Input, Layout, Output};
use crate::compare::{bitwise, bytewise, compare, gamma, Failure, Metrics, TINY32, U32};
use crate::guard::Guarded;
use crate::reference::{layer as reference, quant as formats};
use crate::suite::{everywhere, rng, Check, Outcome, Rng, Suite};
use crate::{case, choice};
use half::{bf16, f16};
use proptest::prelude::*;
use qwen3next_kernels::attention::Q8_0;
use qwen3next_kernels::layer::{add, delta_gates, gather, kv_store, row_gate};
use qwen3next_kernels::quant::{dequantize, to_bytes};
use qwen3next_kernels::{DType, Exec, Variant, View, ViewMut, Weight};
use rand::seq::SliceRandom;
use rand::Rng as _;

fn normals(n: usize, rng: &mut Rng) -> Vec<f32> {
    (0..n).map(|_| normal(rng)).collect()
}

/// Any bits: NaN with payloads, infinities, subnormals.
fn any_floats(n: usize, rng: &mut Rng) -> Vec<f32> {
    (0..n).map(|_| f32::from_bits(rng.random())).collect()
}

// gather

case! {
    /// A table and a choice of its rows.
    pub struct Gather {
        /// Type of the table.
        pub dtype: Type,
        /// Rows of the table.
        pub rows: usize,
        /// Blocks a row.
        pub blocks: usize,
        /// Rows chosen.
        pub t: usize,
        /// Strides.
        pub layout: Layout,
    }
}

impl Gather {
    fn n(&self) -> usize {
        self.blocks * self.dtype.dtype().block()
    }

    fn ids(&self, rng: &mut Rng) -> Vec<i64> {
        (0..self.t).map(|_| rng.random_range(0..self.rows as i64)).collect()
    }
}

fn gathered(exec: &Exec<gather::Op>, case: &Gather, table: &[u8], ids: &[i64]) -> Result<Vec<f32>, Failure> {
    let table = Blocks::new(table, case.dtype.dtype(), [case.rows, case.n()], case.layout);
    let mut y = Output::new([ids.len(), case.n()], case.layout);
    let ids = Guarded::of(ids);
    gather::run(gather::Args { y: y.view(), table: table.view(), ids: &ids }, exec)?;
    y.read("y")
}

/// Exact, but for one rounding in the types that subtract a minimum.
fn gather_reference(variant: &Variant<gather::Op>, case: &Gather, seed: u64) -> Outcome {
    let rng = &mut rng(seed);
    let table = case.dtype.random(case.rows * case.n(), 4.0, rng);
    let ids = case.ids(rng);
    let decoded = formats::dequantize(case.dtype.dtype(), &table);
    let want: Vec<f64> = ids.iter().flat_map(|&id| decoded[id as usize * case.n()..][..case.n()].to_vec()).collect();
    let bound: Vec<f64> = want.iter().map(|w| U32 * w.abs()).collect();
    compare("y", &gathered(&Exec::variant(*variant), case, &table, &ids)?, &want, &bound, case.n()).map(Some)
}

/// The bits that dequantize gives, whatever the table's bytes are.
fn gather_dequantize(variant: &Variant<gather::Op>, case: &Gather, seed: u64) -> Outcome {
    let rng = &mut rng(seed);
    let (dtype, n) = (case.dtype.dtype(), case.n());
    let table: Vec<u8> = (0..dtype.bytes(case.rows * n).expect("whole blocks")).map(|_| rng.random()).collect();
    let ids = case.ids(rng);
    let mut decoded = vec![0.0; case.rows * n];
    let args = dequantize::Args {
        y: ViewMut::new(&mut decoded, [case.rows, n])?,
        x: Weight::new(&table, dtype, [case.rows, n])?,
    };
    dequantize::run(args, &Exec::default())?;
    let want: Vec<f32> = ids.iter().flat_map(|&id| decoded[id as usize * n..][..n].to_vec()).collect();
    bitwise("y", &gathered(&Exec::variant(*variant), case, &table, &ids)?, &want)?;
    Ok(Some(Metrics::default()))
}

/// Rows that no id names are never looked at, and every row is what it is alone.
fn gather_isolation(variant: &Variant<gather::Op>, case: &Gather, seed: u64) -> Outcome {
    if case.t == 0 {
        return Ok(None);
    }
    let rng = &mut rng(seed);
    let mut table = case.dtype.random(case.rows * case.n(), 1.0, rng);
    let ids = case.ids(rng);
    let exec = Exec::variant(*variant);
    let y = gathered(&exec, case, &table, &ids)?;
    let row = table.len() / case.rows;
    for id in (0..case.rows).filter(|&id| !ids.contains(&(id as i64))) {
        table[id * row..][..row].fill(NAN_BYTE);
    }
    bitwise("y with other rows NaN", &gathered(&exec, case, &table, &ids)?, &y)?;
    let at = seed as usize % case.t;
    bitwise("a row alone", &gathered(&exec, case, &table, &ids[at..=at])?, &y[at * case.n()..][..case.n()])?;
    Ok(Some(Metrics::default()))
}

/// Any cut over any number of threads, packed or strided: the same bits.
fn gather_cuts(variant: &Variant<gather::Op>, case: &Gather, seed: u64) -> Outcome {
    let rng = &mut rng(seed);
    let table = case.dtype.random(case.rows * case.n(), 1.0, rng);
    let ids = case.ids(rng);
    let y = gathered(&Exec::variant(*variant).parts(1), case, &table, &ids)?;
    everywhere(variant, |exec| bitwise("cut", &gathered(&exec, case, &table, &ids)?, &y))?;
    for &layout in Layout::ALL {
        let other = Gather { layout, ..case.clone() };
        bitwise("strides", &gathered(&Exec::variant(*variant), &other, &table, &ids)?, &y)?;
    }
    Ok(Some(Metrics::default()))
}

/// Rows of f32 more than 2³¹ elements apart.
fn gather_far(variant: &Variant<gather::Op>, case: &Gather, seed: u64) -> Outcome {
    if case.dtype != Type::F32 || case.n() == 0 {
        return Ok(None);
    }
    let n = case.n();
    let (first, last) = (normals(n, &mut rng(seed)), normals(n, &mut rng(seed + 1)));
    let mut pool = FarPool::new(&[(0, &first), (2, &last)])?;
    let table = View::strided(pool.elements(), [FarPool::SLOTS, n], [FarPool::STRIDE, 1])?;
    let mut y = vec![f32::NAN; 2 * n];
    let args = gather::Args { y: ViewMut::new(&mut y, [2, n])?, table: table.into(), ids: &[2, 0] };
    gather::run(args, &Exec::variant(*variant))?;
    bitwise("y of far rows", &y, &[last, first].concat())?;
    Ok(Some(Metrics::default()))
}

/// The suite of gather.
pub struct GatherSuite;

impl Suite for GatherSuite {
    type Op = gather::Op;
    type Case = Gather;

    fn grid() -> Vec<Gather> {
        let mut grid = Vec::new();
        for (i, &dtype) in Type::ALL.iter().enumerate() {
            let sizes = match dtype.dtype().block() {
                1 => [(5, 1, 3), (1, 7, 2), (9, 64, 4), (3, 130, 1)],
                _ => [(5, 1, 3), (1, 2, 2), (9, 3, 4), (0, 1, 0)],
            };
            for (j, (rows, blocks, t)) in sizes.into_iter().enumerate() {
                grid.push(Gather { dtype, rows, blocks, t, layout: Layout::ALL[(i + j) % 2] });
            }
        }
        grid.push(Gather { dtype: Type::F32, rows: 3, blocks: 0, t: 2, layout: Layout::Packed });
        grid
    }

    fn strategy() -> BoxedStrategy<Gather> {
        (prop::sample::select(Type::ALL), 1usize..8, 0usize..6, 0usize..6, prop::sample::select(Layout::ALL))
            .prop_map(|(dtype, rows, blocks, t, layout)| Gather { dtype, rows, blocks, t, layout })
            .boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: gather_reference },
            Check { name: "dequantize", run: gather_dequantize },
            Check { name: "isolation", run: gather_isolation },
            Check { name: "cuts", run: gather_cuts },
            Check { name: "far_rows", run: gather_far },
        ]
    }
}

// add

case! {
    /// Rows to add.
    pub struct Add {
        /// Rows.
        pub t: usize,
        /// Their length.
        pub n: usize,
        /// Strides.
        pub layout: Layout,
    }
}

fn sum(exec: &Exec<add::Op>, case: &Add, y: &[f32], x: &[f32]) -> Result<Vec<f32>, Failure> {
    let shape = [case.t, case.n];
    let x = Input::new(x, shape, case.layout);
    let mut y = Output::with(y, shape, case.layout);
    add::run(add::Args { y: y.view(), x: x.view() }, exec)?;
    y.read("y")
}

/// One rounding.
fn add_reference(variant: &Variant<add::Op>, case: &Add, seed: u64) -> Outcome {
    let rng = &mut rng(seed);
    let (y, x) = (normals(case.t * case.n, rng), normals(case.t * case.n, rng));
    let want: Vec<f64> = wide(&y).iter().zip(wide(&x)).map(|(y, x)| y + x).collect();
    let bound: Vec<f64> = want.iter().map(|w| U32 * w.abs()).collect();
    compare("y", &sum(&Exec::variant(*variant), case, &y, &x)?, &want, &bound, case.n).map(Some)
}

/// Any bits give what f32 gives.
fn add_any(variant: &Variant<add::Op>, case: &Add, seed: u64) -> Outcome {
    let rng = &mut rng(seed);
    let (y, x) = (any_floats(case.t * case.n, rng), any_floats(case.t * case.n, rng));
    let want: Vec<f32> = y.iter().zip(&x).map(|(y, x)| y + x).collect();
    bitwise("y", &sum(&Exec::variant(*variant), case, &y, &x)?, &want)?;
    Ok(Some(Metrics::default()))
}

/// − 0 changes nothing, not even the sign of a zero.
fn add_nothing(variant: &Variant<add::Op>, case: &Add, seed: u64) -> Outcome {
    let mut y = normals(case.t * case.n, &mut rng(seed));
    y.iter_mut().step_by(3).for_each(|y| *y = -0.0);
    let x = vec![-0.0; y.len()];
    bitwise("y", &sum(&Exec::variant(*variant), case, &y, &x)?, &y)?;
    Ok(Some(Metrics::default()))
}

/// Any cut over any number of threads, packed or strided: the same bits.
fn add_cuts(variant: &Variant<add::Op>, case: &Add, seed: u64) -> Outcome {
    let rng = &mut rng(seed);
    let (y, x) = (normals(case.t * case.n, rng), normals(case.t * case.n, rng));
    let whole = sum(&Exec::variant(*variant).parts(1), case, &y, &x)?;
    everywhere(variant, |exec| bitwise("cut", &sum(&exec, case, &y, &x)?, &whole))?;
    for &layout in Layout::ALL {
        bitwise("strides", &sum(&Exec::variant(*variant), &Add { layout, ..case.clone() }, &y, &x)?, &whole)?;
    }
    Ok(Some(Metrics::default()))
}

/// Rows more than 2³¹ elements apart, on both sides.
fn add_far(variant: &Variant<add::Op>, case: &Add, seed: u64) -> Outcome {
    if case.n == 0 {
        return Ok(None);
    }
    let (first, last) = (normals(case.n, &mut rng(seed)), normals(case.n, &mut rng(seed + 1)));
    let (mut y, mut x) = (FarPool::new(&[(0, &first), (2, &last)])?, FarPool::new(&[(0, &last), (2, &last)])?);
    let (shape, strides) = ([FarPool::SLOTS, case.n], [FarPool::STRIDE, 1]);
    let args = add::Args {
        y: ViewMut::strided(y.elements(), shape, strides)?,
        x: View::strided(x.elements(), shape, strides)?,
    };
    add::run(args, &Exec::variant(*variant))?;
    let both: Vec<f32> = first.iter().zip(&last).map(|(a, b)| a + b).collect();
    let twice: Vec<f32> = last.iter().map(|a| a + a).collect();
    bitwise("the first row", &y.elements()[..case.n], &both)?;
    bitwise("the last row", &y.elements()[2 * FarPool::STRIDE..][..case.n], &twice)?;
    Ok(Some(Metrics::default()))
}

/// The suite of add.
pub struct AddSuite;

impl Suite for AddSuite {
    type Op = add::Op;
    type Case = Add;

    fn grid() -> Vec<Add> {
        let sizes = [(1, 1), (3, 4), (2, 7), (5, 64), (1, 515), (0, 8), (4, 0), (17, 3), (2, 1024)];
        let both = |(t, n)| Layout::ALL.iter().map(move |&layout| Add { t, n, layout });
        sizes.into_iter().flat_map(both).collect()
    }

    fn strategy() -> BoxedStrategy<Add> {
        (0usize..9, 0usize..70, prop::sample::select(Layout::ALL))
            .prop_map(|(t, n, layout)| Add { t, n, layout })
            .boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: add_reference },
            Check { name: "any_bytes", run: add_any },
            Check { name: "identity", run: add_nothing },
            Check { name: "cuts", run: add_cuts },
            Check { name: "far_rows", run: add_far },
        ]
    }
}

// delta_gates

choice! {
    /// How large the logits are.
    pub enum Logits {
        /// Standard normal.
        Normal = "normal",
        /// Up to ±30: past where softplus is its argument, and to decays of nearly nothing.
        Wide = "wide",
        /// Up to ±200: exponentials overflow and underflow.
        Far = "far",
    }
}

case! {
    /// Tokens and heads.
    pub struct Gates {
        /// Tokens.
        pub t: usize,
        /// Key heads.
        pub hk: usize,
        /// Value heads of a key head.
        pub r: usize,
        /// Size of the logits.
        pub logits: Logits,
        /// Strides.
        pub layout: Layout,
    }
}

/// Inputs of the delta rule's gates, packed.
#[derive(Clone)]
pub struct GateInputs {
    /// `[T][2 HV]`.
    pub ba: Vec<f32>,
    /// `[HV]`.
    pub a: Vec<f32>,
    /// `[HV]`.
    pub dt_bias: Vec<f32>,
}

impl GateInputs {
    /// Inputs of `case` drawn from `seed`.
    pub fn generate(case: &Gates, seed: u64) -> GateInputs {
        let rng = &mut rng(seed);
        let hv = case.hk * case.r;
        let logit = |rng: &mut Rng| match case.logits {
            Logits::Normal => normal(rng),
            Logits::Wide => rng.random_range(-30.0..30.0),
            Logits::Far => rng.random_range(-200.0..200.0),
        };
        GateInputs {
            ba: (0..case.t * 2 * hv).map(|_| logit(rng)).collect(),
            a: (0..hv).map(|_| -rng.random_range(0.0f32..16.0)).collect(),
            dt_bias: normals(hv, rng),
        }
    }
}

/// g and β, packed.
fn gates(exec: &Exec<delta_gates::Op>, case: &Gates, inputs: &GateInputs) -> Result<[Vec<f32>; 2], Failure> {
    let hv = case.hk * case.r;
    let ba = Input::new(&inputs.ba, [case.t, 2 * hv], case.layout);
    let (a, dt_bias) = (Guarded::of(&inputs.a), Guarded::of(&inputs.dt_bias));
    let (mut g, mut beta) = (Output::new([case.t, hv], case.layout), Output::new([case.t, hv], case.layout));
    let args = delta_gates::Args {
        g: g.view(),
        beta: beta.view(),
        ba: ba.view(),
        a: View::new(&a, [hv])?,
        dt_bias: View::new(&dt_bias, [hv])?,
        k_heads: case.hk,
    };
    delta_gates::run(args, exec)?;
    Ok([g.read("g")?, beta.read("beta")?])
}

/// Exponential and logarithm within two units, sums, quotient and product within half a one.
fn gates_reference(variant: &Variant<delta_gates::Op>, case: &Gates, seed: u64) -> Outcome {
    let inputs = GateInputs::generate(case, seed);
    let (hv, a, dt_bias) = (case.hk * case.r, wide(&inputs.a), wide(&inputs.dt_bias));
    let [mut g, mut g_bound, mut beta, mut beta_bound] = [const { Vec::new() }; 4];
    for row in wide(&inputs.ba).chunks(2 * hv.max(1)) {
        for h in 0..hv {
            let (want_g, want_beta) = reference::delta_gates(row, h, case.r, a[h], dt_bias[h]);
            let x = row[h / case.r * 2 * case.r + case.r + h % case.r] + dt_bias[h];
            // The sum is off by a rounding, of which softplus passes on sigmoid(x).
            let error = U32 * x.abs() * reference::sigmoid(x) + gamma(10) * reference::softplus(x);
            g.push(want_g);
            g_bound.push(a[h].abs() * (error + TINY32) + TINY32);
            beta.push(want_beta);
            beta_bound.push(gamma(6) * want_beta + TINY32);
        }
    }
    let [got_g, got_beta] = gates(&Exec::variant(*variant), case, &inputs)?;
    let of_g = compare("g", &got_g, &g, &g_bound, hv)?;
    Ok(Some(of_g.worst(compare("beta", &got_beta, &beta, &beta_bound, hv)?)))
}

/// Infinite logits give the limits; NaN stays NaN and with its own head, token and gate.
fn gates_extremes(variant: &Variant<delta_gates::Op>, case: &Gates, seed: u64) -> Outcome {
    let hv = case.hk * case.r;
    if case.t * hv == 0 {
        return Ok(None);
    }
    let exec = Exec::variant(*variant);
    let mut inputs = GateInputs::generate(case, seed);
    inputs.a.fill(-1.0);
    let [g, beta] = gates(&exec, case, &inputs)?;
    let (t, h) = (seed as usize % case.t, seed as usize / 7 % hv);
    let at = t * 2 * hv + h / case.r * 2 * case.r + h % case.r;
    for (value, decay, one) in [
        (f32::INFINITY, f32::NEG_INFINITY, 1.0),
        (f32::NEG_INFINITY, -0.0, 0.0),
        (f32::MAX, -f32::MAX, 1.0),
        (-f32::MAX, -0.0, 0.0),
        (f32::NAN, f32::NAN, f32::NAN),
    ] {
        let (mut of_b, mut of_alpha) = (inputs.clone(), inputs.clone());
        of_b.ba[at] = value;
        of_alpha.ba[at + case.r] = value;
        let (mut want_g, mut want_beta) = (g.clone(), beta.clone());
        (want_g[t * hv + h], want_beta[t * hv + h]) = (decay, one);
        let [got_g, got_beta] = gates(&exec, case, &of_b)?;
        bitwise("g beside an extreme b", &got_g, &g)?;
        bitwise("beta of an extreme b", &got_beta, &want_beta)?;
        let [got_g, got_beta] = gates(&exec, case, &of_alpha)?;
        bitwise("g of an extreme alpha", &got_g, &want_g)?;
        bitwise("beta beside an extreme alpha", &got_beta, &beta)?;
    }
    Ok(Some(Metrics::default()))
}

/// Any cut over any number of threads, packed or strided, a token alone: the same bits.
fn gates_cuts(variant: &Variant<delta_gates::Op>, case: &Gates, seed: u64) -> Outcome {
    let inputs = GateInputs::generate(case, seed);
    let whole = gates(&Exec::variant(*variant).parts(1), case, &inputs)?;
    let same = |what: &str, got: [Vec<f32>; 2], want: [&[f32]; 2]| {
        (0..2).try_for_each(|i| bitwise(&format!("{what}, {}", ["g", "beta"][i]), &got[i], want[i]))
    };
    let all = [&whole[0][..], &whole[1]];
    everywhere(variant, |exec| same("cut", gates(&exec, case, &inputs)?, all))?;
    for &layout in Layout::ALL {
        same("strides", gates(&Exec::variant(*variant), &Gates { layout, ..case.clone() }, &inputs)?, all)?;
    }
    let hv = case.hk * case.r;
    for t in 0..case.t {
        let one = GateInputs { ba: inputs.ba[t * 2 * hv..][..2 * hv].to_vec(), ..inputs.clone() };
        let got = gates(&Exec::variant(*variant), &Gates { t: 1, ..case.clone() }, &one)?;
        same("a token alone", got, all.map(|x| &x[t * hv..][..hv]))?;
    }
    Ok(Some(Metrics::default()))
}

/// The suite of delta_gates.
pub struct GatesSuite;

impl Suite for GatesSuite {
    type Op = delta_gates::Op;
    type Case = Gates;

    fn grid() -> Vec<Gates> {
        let mut grid = Vec::new();
        let sizes = [(1, 16, 2), (5, 16, 2), (3, 1, 1), (2, 3, 5), (0, 2, 2), (4, 0, 2), (7, 5, 3), (9, 8, 4)];
        for (i, (t, hk, r)) in sizes.into_iter().enumerate() {
            for (j, &logits) in Logits::ALL.iter().enumerate() {
                grid.push(Gates { t, hk, r, logits, layout: Layout::ALL[(i + j) % 2] });
            }
        }
        grid
    }

    fn strategy() -> BoxedStrategy<Gates> {
        let choose = (prop::sample::select(Logits::ALL), prop::sample::select(Layout::ALL));
        (0usize..6, 0usize..6, 1usize..5, choose)
            .prop_map(|(t, hk, r, (logits, layout))| Gates { t, hk, r, logits, layout })
            .boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: gates_reference },
            Check { name: "extremes", run: gates_extremes },
            Check { name: "cuts", run: gates_cuts },
        ]
    }
}

// kv_store

case! {
    /// Rows into a cache.
    pub struct Store {
        /// Type of the cache.
        pub kv: KvType,
        /// Sequences.
        pub batch: usize,
        /// Tokens of a sequence on average.
        pub t: usize,
        /// Tokens that a slot holds.
        pub s: usize,
        /// Elements of a row; for q8_0 a multiple of 32.
        pub n: usize,
        /// Strides.
        pub layout: Layout,
    }
}

impl Store {
    fn dtype(&self) -> DType {
        DType::from_name(&self.kv.to_string()).expect("named as the library names it")
    }

    /// More than there are sequences.
    fn slots(&self) -> usize {
        self.batch + 2
    }

    fn row_bytes(&self) -> usize {
        self.dtype().bytes(self.n).expect("whole blocks")
    }
}

/// Rows and where they go.
#[derive(Clone)]
pub struct Rows {
    /// `[T][N]`.
    pub x: Vec<f32>,
    /// `[B]`.
    pub slot: Vec<i64>,
    /// `[T]`.
    pub pos: Vec<i64>,
    /// `[B+1]`.
    pub cu_seqlens: Vec<i64>,
}

impl Rows {
    /// Sequences of different lengths, some empty; positions that follow one another or leave some out. Values of
    /// different sizes, also past f16's ends, with zeros and ties.
    pub fn generate(case: &Store, seed: u64) -> Rows {
        let rng = &mut rng(seed);
        let mut slot: Vec<i64> = (0..case.slots() as i64).collect();
        slot.shuffle(rng);
        slot.truncate(case.batch);
        let (mut pos, mut cu_seqlens) = (Vec::new(), vec![0]);
        for _ in 0..case.batch {
            let length = rng.random_range(0..=(2 * case.t).min(case.s));
            let first = rng.random_range(0..=case.s - length);
            let mut all: Vec<i64> = (0..case.s as i64).collect();
            if rng.random() {
                all.rotate_left(first);
            } else {
                all.shuffle(rng);
            }
            all.truncate(length);
            all.sort_unstable();
            pos.extend(all);
            cu_seqlens.push(pos.len() as i64);
        }
        let mut x = Vec::with_capacity(pos.len() * case.n);
        let mut size = 1.0;
        for i in 0..pos.len() * case.n {
            if i % 32 == 0 {
                size = 2f32.powi([0, 3, -8, -20, 16, -130][rng.random_range(0..6)]);
            }
            x.push(match rng.random_range(0..8) {
                0 => 0.0,
                1 => f32::from_bits((normal(rng) * size).to_bits() & !0xfff),
                2 => -0.0,
                _ => normal(rng) * size,
            });
        }
        Rows { x, slot, pos, cu_seqlens }
    }

    /// (slot, position) of every token.
    fn places(&self) -> Vec<(usize, usize)> {
        let of = |b: usize| {
            let tokens = self.cu_seqlens[b] as usize..self.cu_seqlens[b + 1] as usize;
            self.pos[tokens].iter().map(move |&p| (self.slot[b] as usize, p as usize))
        };
        (0..self.slot.len()).flat_map(of).collect()
    }
}

/// What an element of a cache may hold.
trait Cell: Copy {
    fn random(rng: &mut Rng) -> Self;
    fn bytes(self) -> Vec<u8>;
    fn cache(view: ViewMut<'_, 3, Self>) -> kv_store::Cache<'_>;
}

impl Cell for f32 {
    fn random(rng: &mut Rng) -> Self {
        f32::from_bits(rng.random())
    }
    fn bytes(self) -> Vec<u8> {
        self.to_le_bytes().to_vec()
    }
    fn cache(view: ViewMut<'_, 3, Self>) -> kv_store::Cache<'_> {
        kv_store::Cache::F32(view)
    }
}

impl Cell for f16 {
    fn random(rng: &mut Rng) -> Self {
        f16::from_bits(rng.random())
    }
    fn bytes(self) -> Vec<u8> {
        self.to_le_bytes().to_vec()
    }
    fn cache(view: ViewMut<'_, 3, Self>) -> kv_store::Cache<'_> {
        kv_store::Cache::F16(view)
    }
}

impl Cell for bf16 {
    fn random(rng: &mut Rng) -> Self {
        bf16::from_bits(rng.random())
    }
    fn bytes(self) -> Vec<u8> {
        self.to_le_bytes().to_vec()
    }
    fn cache(view: ViewMut<'_, 3, Self>) -> kv_store::Cache<'_> {
        kv_store::Cache::BF16(view)
    }
}

impl Cell for Q8_0 {
    fn random(rng: &mut Rng) -> Self {
        std::array::from_fn(|_| rng.random())
    }
    fn bytes(self) -> Vec<u8> {
        self.to_vec()
    }
    fn cache(view: ViewMut<'_, 3, Self>) -> kv_store::Cache<'_> {
        kv_store::Cache::Q8_0(view)
    }
}

/// Stores into a cache of random cells and returns the rows stored, packed. Fails where anything else changed.
fn stored(exec: &Exec<kv_store::Op>, case: &Store, rows: &Rows) -> Result<Vec<u8>, Failure> {
    fn of<T: Cell>(exec: &Exec<kv_store::Op>, case: &Store, rows: &Rows, cells: usize) -> Result<Vec<u8>, Failure> {
        let gap = if case.layout == Layout::Gaps { 3 } else { 0 };
        let (row, slots) = (cells + gap, case.slots());
        let slot = case.s * row + gap;
        let (before, after) = zones(64);
        let start = before + case.layout.offset();
        let length = if case.s * cells == 0 { 0 } else { (slots - 1) * slot + (case.s - 1) * row + cells };
        let mut buffer = Guarded::filled(start + length + after, T::random(&mut rng(0)));
        let random = &mut rng(1);
        buffer.iter_mut().for_each(|cell| *cell = T::random(random));
        let old: Vec<T> = buffer.to_vec();

        let x = Input::new(&rows.x, [rows.pos.len(), case.n], case.layout);
        let (of_slot, pos, cu) = (Guarded::of(&rows.slot), Guarded::of(&rows.pos), Guarded::of(&rows.cu_seqlens));
        let view = &mut buffer[start..start + length];
        let cache = T::cache(ViewMut::strided(view, [slots, case.s, cells], [slot, row, 1])?);
        kv_store::run(kv_store::Args { cache, x: x.view(), slot: &of_slot, pos: &pos, cu_seqlens: &cu }, exec)?;

        let (mut packed, mut inside) = (Vec::new(), vec![false; buffer.len()]);
        for (entry, position) in rows.places().into_iter().filter(|_| cells > 0) {
            let at = start + entry * slot + position * row;
            inside[at..at + cells].fill(true);
            buffer[at..at + cells].iter().for_each(|cell| packed.extend(cell.bytes()));
        }
        match (0..buffer.len()).find(|&i| !inside[i] && buffer[i].bytes() != old[i].bytes()) {
            Some(i) => Err(Failure::new(format!("wrote outside the rows, at element {}", i as i64 - start as i64))),
            None => Ok(packed),
        }
    }
    match case.kv {
        KvType::F32 => of::<f32>(exec, case, rows, case.n),
        KvType::F16 => of::<f16>(exec, case, rows, case.n),
        KvType::BF16 => of::<bf16>(exec, case, rows, case.n),
        KvType::Q8_0 => of::<Q8_0>(exec, case, rows, case.n / 32),
    }
}

/// What is stored stays within half a step of the type of every element.
fn store_reference(variant: &Variant<kv_store::Op>, case: &Store, seed: u64) -> Outcome {
    let mut rows = Rows::generate(case, seed);
    rows.x.iter_mut().for_each(|x| *x = x.clamp(-60_000.0, 60_000.0));
    let got = formats::dequantize(case.dtype(), &stored(&Exec::variant(*variant), case, &rows)?);
    let got: Vec<f32> = got.iter().map(|&y| y as f32).collect();
    let mut bound = Vec::new();
    for block in rows.x.chunks(if case.kv == KvType::Q8_0 { 32 } else { 1 }) {
        let largest = block.iter().fold(0.0f64, |m, &x| m.max(f64::from(x).abs()));
        let step = match case.kv {
            KvType::F32 => 0.0,
            KvType::F16 => largest * 2f64.powi(-11) + 2f64.powi(-25),
            KvType::BF16 => largest * 2f64.powi(-8) + TINY32,
            // The scale is rounded to f16: 2⁻¹¹ of itself, or half of f16's least number, 127 times over.
            KvType::Q8_0 => largest / 127.0 * (0.5 + 127.0 * (2f64.powi(-11) + 4.0 * U32)) + 127.0 * 2f64.powi(-25),
        };
        bound.extend(std::iter::repeat_n(step, block.len()));
    }
    compare("decoded", &got, &wide(&rows.x), &bound, case.n).map(Some)
}

/// The bytes that quantize gives, of finite values and of any bits.
fn store_quantize(variant: &Variant<kv_store::Op>, case: &Store, seed: u64) -> Outcome {
    let mut rows = Rows::generate(case, seed);
    let shape = [rows.pos.len(), case.n];
    let exec = Exec::variant(*variant);
    bytewise("rows", &stored(&exec, case, &rows)?, &to_bytes(case.dtype(), View::new(&rows.x, shape)?)?)?;
    let random = &mut rng(seed);
    // Some blocks stay finite.
    for block in rows.x.chunks_mut(32) {
        let some = random.random_range(0..2) * 32;
        block.iter_mut().take(some).for_each(|x| *x = f32::from_bits(random.random()));
    }
    bytewise("rows of any bits", &stored(&exec, case, &rows)?, &to_bytes(case.dtype(), View::new(&rows.x, shape)?)?)?;
    Ok(Some(Metrics::default()))
}

/// Any cut over any number of threads, packed or strided, one token after the other: the same bytes.
fn store_cuts(variant: &Variant<kv_store::Op>, case: &Store, seed: u64) -> Outcome {
    let rows = Rows::generate(case, seed);
    let whole = stored(&Exec::variant(*variant).parts(1), case, &rows)?;
    everywhere(variant, |exec| bytewise("cut", &stored(&exec, case, &rows)?, &whole).map(drop))?;
    for &layout in Layout::ALL {
        let other = Store { layout, ..case.clone() };
        bytewise("strides", &stored(&Exec::variant(*variant), &other, &rows)?, &whole)?;
    }
    for (t, (slot, pos)) in rows.places().into_iter().enumerate().take(4) {
        let one = Rows {
            x: rows.x[t * case.n..][..case.n].to_vec(),
            slot: vec![slot as i64],
            pos: vec![pos as i64],
            cu_seqlens: vec![0, 1],
        };
        let alone = stored(&Exec::variant(*variant), case, &one)?;
        bytewise("a row alone", &alone, &whole[t * case.row_bytes()..][..case.row_bytes()])?;
    }
    Ok(Some(Metrics::default()))
}

/// Slots of f32 more than 2³¹ elements apart.
fn store_far(variant: &Variant<kv_store::Op>, case: &Store, seed: u64) -> Outcome {
    if case.kv != KvType::F32 || case.n == 0 || case.s == 0 {
        return Ok(None);
    }
    let (n, s) = (case.n, case.s);
    let x = normals(2 * n, &mut rng(seed));
    let mut pool = FarPool::new(&[])?;
    let view = ViewMut::strided(pool.elements(), [FarPool::SLOTS, s, n], [FarPool::STRIDE, n, 1])?;
    let args = kv_store::Args {
        cache: kv_store::Cache::F32(view),
        x: View::new(&x, [2, n])?,
        slot: &[2, 0],
        pos: &[s as i64 - 1, 0],
        cu_seqlens: &[0, 1, 2],
    };
    kv_store::run(args, &Exec::variant(*variant))?;
    bitwise("slot 2", &pool.elements()[2 * FarPool::STRIDE + (s - 1) * n..][..n], &x[..n])?;
    bitwise("slot 0", &pool.elements()[..n], &x[n..])?;
    Ok(Some(Metrics::default()))
}

/// The suite of kv_store.
pub struct StoreSuite;

impl Suite for StoreSuite {
    type Op = kv_store::Op;
    type Case = Store;

    fn grid() -> Vec<Store> {
        let mut grid = Vec::new();
        for (i, &kv) in KvType::ALL.iter().enumerate() {
            let rows = if kv == KvType::Q8_0 { [32, 64, 96, 512, 0, 32, 160] } else { [1, 8, 37, 512, 0, 3, 160] };
            let sizes = [(1, 1, 4), (2, 3, 8), (3, 2, 5), (1, 1, 2), (2, 1, 3), (0, 1, 2), (4, 5, 16)];
            for (j, (n, (batch, t, s))) in rows.into_iter().zip(sizes).enumerate() {
                grid.push(Store { kv, batch, t, s, n, layout: Layout::ALL[(i + j) % 2] });
            }
        }
        grid
    }

    fn strategy() -> BoxedStrategy<Store> {
        let choose = (prop::sample::select(KvType::ALL), prop::sample::select(Layout::ALL));
        (0usize..5, 0usize..5, 0usize..12, 0usize..80, choose)
            .prop_map(|(batch, t, s, n, (kv, layout))| {
                let n = if kv == KvType::Q8_0 { n / 32 * 32 } else { n };
                Store { kv, batch, t, s, n, layout }
            })
            .boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: store_reference },
            Check { name: "quantize", run: store_quantize },
            Check { name: "cuts", run: store_cuts },
            Check { name: "far_slots", run: store_far },
        ]
    }
}

// row_gate

case! {
    /// Rows that meet one vector.
    pub struct Gate {
        /// Rows.
        pub t: usize,
        /// Their length.
        pub d: usize,
        /// Factor of w.
        pub size: f32,
        /// Strides.
        pub layout: Layout,
    }
}

/// Rows and the vector, packed.
#[derive(Clone)]
pub struct Vectors {
    /// `[T][D]`.
    pub x: Vec<f32>,
    /// `[D]`.
    pub w: Vec<f32>,
}

impl Vectors {
    /// Inputs of `case` drawn from `seed`.
    pub fn generate(case: &Gate, seed: u64) -> Vectors {
        let rng = &mut rng(seed);
        let factor = case.size / (case.d.max(1) as f32).sqrt();
        Vectors { x: normals(case.t * case.d, rng), w: normals(case.d, rng).into_iter().map(|w| w * factor).collect() }
    }
}

fn row_gates(exec: &Exec<row_gate::Op>, case: &Gate, v: &Vectors) -> Result<Vec<f32>, Failure> {
    let (x, w) = (Input::new(&v.x, [case.t, case.d], case.layout), Input::new(&v.w, [case.d], case.layout));
    let mut y = Output::new([case.t], case.layout);
    row_gate::run(row_gate::Args { y: y.view(), x: x.view(), w: w.view() }, exec)?;
    y.read("y")
}

/// The dot product in double, rounded once; exponential, sum and quotient as in delta_gates.
fn gate_reference(variant: &Variant<row_gate::Op>, case: &Gate, seed: u64) -> Outcome {
    let v = Vectors::generate(case, seed);
    let w = wide(&v.w);
    let (mut want, mut bound) = (Vec::new(), Vec::new());
    for t in 0..case.t {
        let x = wide(&v.x[t * case.d..][..case.d]);
        let (dot, y) = (reference::dot(&x, &w), reference::sigmoid(reference::dot(&x, &w)));
        let sizes: f64 = x.iter().zip(&w).map(|(x, w)| (x * w).abs()).sum();
        let error = U32 * dot.abs() + 2.0 * case.d as f64 * f64::EPSILON * sizes;
        want.push(y);
        bound.push(1.1 * error * y * (1.0 - y) + gamma(6) * y + TINY32);
    }
    compare("y", &row_gates(&Exec::variant(*variant), case, &v)?, &want, &bound, 1).map(Some)
}

/// NaN and infinities reach their row and no other; the limits of the sigmoid are exact.
fn gate_extremes(variant: &Variant<row_gate::Op>, case: &Gate, seed: u64) -> Outcome {
    if case.t * case.d == 0 {
        return Ok(None);
    }
    let exec = Exec::variant(*variant);
    let mut v = Vectors::generate(case, seed);
    let (t, d) = (seed as usize % case.t, seed as usize / 7 % case.d);
    v.w[d] = 1.0;
    let y = row_gates(&exec, case, &v)?;
    for (value, limit) in
        [(f32::NAN, f32::NAN), (f32::INFINITY, 1.0), (f32::NEG_INFINITY, 0.0), (1e30, 1.0), (-1e30, 0.0)]
    {
        let mut other = v.clone();
        other.x[t * case.d + d] = value;
        let mut want = y.clone();
        want[t] = limit;
        bitwise("y", &row_gates(&exec, case, &other)?, &want)?;
    }
    Ok(Some(Metrics::default()))
}

/// Any cut over any number of threads, packed or strided, a row alone: the same bits.
fn gate_cuts(variant: &Variant<row_gate::Op>, case: &Gate, seed: u64) -> Outcome {
    let v = Vectors::generate(case, seed);
    let whole = row_gates(&Exec::variant(*variant).parts(1), case, &v)?;
    everywhere(variant, |exec| bitwise("cut", &row_gates(&exec, case, &v)?, &whole))?;
    for &layout in Layout::ALL {
        bitwise("strides", &row_gates(&Exec::variant(*variant), &Gate { layout, ..case.clone() }, &v)?, &whole)?;
    }
    for t in 0..case.t {
        let one = Vectors { x: v.x[t * case.d..][..case.d].to_vec(), ..v.clone() };
        let alone = row_gates(&Exec::variant(*variant), &Gate { t: 1, ..case.clone() }, &one)?;
        bitwise("a row alone", &alone, &whole[t..=t])?;
    }
    Ok(Some(Metrics::default()))
}

/// The suite of row_gate.
pub struct GateSuite;

impl Suite for GateSuite {
    type Op = row_gate::Op;
    type Case = Gate;

    fn grid() -> Vec<Gate> {
        let mut grid = Vec::new();
        let sizes = [(1, 2048), (3, 64), (2, 7), (5, 1), (4, 0), (0, 8), (2, 515), (7, 130)];
        for (i, (t, d)) in sizes.into_iter().enumerate() {
            for (j, size) in [1.0, 10.0, 200.0].into_iter().enumerate() {
                grid.push(Gate { t, d, size, layout: Layout::ALL[(i + j) % 2] });
            }
        }
        grid
    }

    fn strategy() -> BoxedStrategy<Gate> {
        let choose = (prop::sample::select(&[0.1f32, 1.0, 30.0][..]), prop::sample::select(Layout::ALL));
        (0usize..7, 0usize..300, choose).prop_map(|(t, d, (size, layout))| Gate { t, d, size, layout }).boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: gate_reference },
            Check { name: "extremes", run: gate_extremes },
            Check { name: "cuts", run: gate_cuts },
        ]
    }
}
