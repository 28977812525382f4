//! Router, grouping and the expert feed-forward: each against its reference, and what must hold bit for bit.

use crate::buffer::{zones, Input, Layout, Output, POISON};
use crate::cases::quant::{decode_q8, magnitudes, Blocks, Form, Type, NAN_BYTE};
use crate::compare::{bitwise, compare, gamma, Failure, Metrics, TINY32, U32};
use crate::guard::Guarded;
use crate::record;
use crate::reference::{moe as reference, quant};
use crate::suite::{everywhere, rng, Check, Outcome, Rng, Suite};
use crate::{case, choice};
use ndarray::{ArrayView1, ArrayView2};
use proptest::prelude::*;
use qwen3next_kernels::activations::{Rows, Q8};
use qwen3next_kernels::moe::{self, down, group, route, up, Execs, Routing};
use qwen3next_kernels::{matmul, DType, Error, Exec, Operator, Variant, View, ViewMut, Weight};
use rand::seq::SliceRandom;
use rand::Rng as _;

const PASSED: Outcome =
    Ok(Some(Metrics { row_l2: 0.0, max_over_rms: 0.0, bound_multiple: 0.0, nmse: 0.0, rows: 0, tiny_rows: 0 }));

choice! {
    /// How router logits are filled.
    pub enum Logits {
        /// Within ±4.
        Mild = "mild",
        /// Within ±6e4: most weights underflow, none may overflow.
        Huge = "huge",
        /// Few distinct values, so that the choice is by index.
        Ties = "ties",
        /// Infinities of both signs among mild ones; some tokens all -inf.
        Infinite = "infinite",
    }
}

case! {
    /// One routing.
    pub struct RouteCase {
        /// Tokens.
        pub t: usize,
        /// Experts.
        pub e: usize,
        /// Choices a token.
        pub top_k: usize,
        /// Divide by the sum of the chosen.
        pub normalize: bool,
        /// Strides.
        pub layout: Layout,
        /// Fill.
        pub logits: Logits,
    }
}

fn logits(case: &RouteCase, seed: u64) -> Vec<f32> {
    let mut rng = rng(seed);
    let mut draw = |token: usize| match case.logits {
        Logits::Mild => rng.random_range(-4.0..4.0),
        Logits::Huge => rng.random_range(-6e4..6e4),
        Logits::Ties => rng.random_range(-1i8..=1) as f32,
        Logits::Infinite if token % 5 == 4 => f32::NEG_INFINITY,
        Logits::Infinite => {
            [f32::INFINITY, f32::NEG_INFINITY, 0.5, rng.random_range(-4.0..4.0)][rng.random_range(token % 2..4)]
        }
    };
    (0..case.t * case.e).map(|i| draw(i / case.e)).collect()
}

fn routed(exec: &Exec<route::Op>, case: &RouteCase, logits: &[f32]) -> Result<(Vec<i32>, Vec<f32>), Error> {
    let input = Input::new(logits, [case.t, case.e], case.layout);
    let pairs = case.t * case.top_k;
    let (mut ids, mut weights) = (Guarded::filled(pairs, i32::MIN), Guarded::filled(pairs, f32::from_bits(POISON)));
    let (top_k, normalize) = (case.top_k, case.normalize);
    route::run(route::Args { ids: &mut ids, weights: &mut weights, logits: input.view(), top_k, normalize }, exec)?;
    Ok((ids.to_vec(), weights.to_vec()))
}

fn same_ids(what: &str, got: &[i32], want: &[i32]) -> Result<(), Failure> {
    match got.iter().zip(want).position(|(g, w)| g != w) {
        None if got.len() == want.len() => Ok(()),
        at => Err(Failure::new(format!("{what}: got {got:?}, expected {want:?}, first difference at {at:?}"))),
    }
}

/// The same choices as the reference, weights within their bound; normalised weights sum to 1.
fn routed_reference(variant: &Variant<route::Op>, case: &RouteCase, seed: u64) -> Outcome {
    let logits = logits(case, seed);
    let (ids, weights) = routed(&Exec::variant(*variant), case, &logits)?;
    let (mut want_ids, mut want, mut bounds) = (Vec::new(), Vec::new(), Vec::new());
    for token in logits.chunks(case.e) {
        let r = reference::route(token, case.top_k, case.normalize);
        want_ids.extend(r.ids.iter().map(|&i| i as i32));
        want.extend(r.weights);
        bounds.extend(r.bounds);
    }
    same_ids("ids", &ids, &want_ids)?;
    if case.normalize {
        for (t, token) in weights.chunks(case.top_k).enumerate() {
            // Each of the weights, together 1, was rounded once.
            let sum: f64 = token.iter().map(|&w| f64::from(w)).sum();
            let near = (sum - 1.0).abs() <= 2.0 * U32 + case.top_k as f64 * 2f64.powi(-149);
            if !near {
                return Err(Failure::new(format!("token {t}: weights sum to {sum}")));
            }
        }
    }
    compare("weights", &weights, &want, &bounds, case.top_k).map(Some)
}

/// Any cut over any number of parts and threads, and a token alone, give the same bits.
fn routed_cuts(variant: &Variant<route::Op>, case: &RouteCase, seed: u64) -> Outcome {
    let logits = logits(case, seed);
    let (ids, weights) = routed(&Exec::variant(*variant).parts(1), case, &logits)?;
    everywhere(variant, |exec| {
        let (i, w) = routed(&exec, case, &logits)?;
        same_ids("cut: ids", &i, &ids)?;
        bitwise("cut: weights", &w, &weights)
    })?;
    let one = RouteCase { t: 1, ..case.clone() };
    for (t, token) in logits.chunks(case.e).enumerate() {
        let (i, w) = routed(&Exec::variant(*variant), &one, token)?;
        same_ids("a token alone: ids", &i, &ids[t * case.top_k..][..case.top_k])?;
        bitwise("a token alone: weights", &w, &weights[t * case.top_k..][..case.top_k])?;
    }
    PASSED
}

/// Experts in another order: the same experts with the same bits (where no tie lets the order decide).
fn routed_permuted(variant: &Variant<route::Op>, case: &RouteCase, seed: u64) -> Outcome {
    if matches!(case.logits, Logits::Ties | Logits::Infinite) {
        return Ok(None);
    }
    let logits = logits(case, seed);
    let distinct = logits.chunks(case.e).all(|token| {
        let mut sorted = token.to_vec();
        sorted.sort_by(f32::total_cmp);
        sorted.windows(2).all(|w| w[0] < w[1])
    });
    if !distinct {
        return Ok(None);
    }
    let mut place: Vec<usize> = (0..case.e).collect();
    place.shuffle(&mut rng(seed ^ 1));
    let mut moved = logits.clone();
    logits.iter().enumerate().for_each(|(i, &l)| moved[i / case.e * case.e + place[i % case.e]] = l);
    let (ids, weights) = routed(&Exec::variant(*variant), case, &logits)?;
    let (moved_ids, moved_weights) = routed(&Exec::variant(*variant), case, &moved)?;
    let want: Vec<i32> = ids.iter().map(|&i| place[i as usize] as i32).collect();
    same_ids("permuted ids", &moved_ids, &want)?;
    bitwise("permuted weights", &moved_weights, &weights)?;
    PASSED
}

/// A NaN logit is an error that names the lowest token that has one, however the tokens are cut.
fn routed_nan(variant: &Variant<route::Op>, case: &RouteCase, seed: u64) -> Outcome {
    if case.t == 0 {
        return Ok(None);
    }
    let mut logits = logits(case, seed);
    let mut rng = rng(seed ^ 2);
    let bad: Vec<usize> = (0..3).map(|_| rng.random_range(0..case.t)).collect();
    bad.iter().for_each(|t| logits[t * case.e + rng.random_range(0..case.e)] = f32::NAN);
    let lowest = *bad.iter().min().expect("three of them");
    for parts in [1, 2, 3, 16] {
        match routed(&Exec::variant(*variant).parts(parts), case, &logits) {
            Err(Error::Nan { token, .. }) if token == lowest => {}
            other => {
                let text = format!("NaN in tokens {bad:?}, {parts} parts: {other:?}, expected token {lowest}");
                return Err(Failure::new(text));
            }
        }
    }
    PASSED
}

/// The suite of moe_route.
pub struct MoeRoute;

impl Suite for MoeRoute {
    type Op = route::Op;
    type Case = RouteCase;

    fn grid() -> Vec<RouteCase> {
        let mut grid = Vec::new();
        let shapes =
            [(1, 1, 1), (2, 2, 1), (7, 8, 8), (8, 16, 4), (9, 60, 3), (64, 64, 10), (513, 32, 2), (3, 512, 10)];
        for (i, (t, e, top_k)) in shapes.into_iter().chain([(2, 512, 512), (0, 8, 2)]).enumerate() {
            for (j, &logits) in Logits::ALL.iter().enumerate() {
                let layout = Layout::ALL[(i + j) % 2];
                grid.push(RouteCase { t, e, top_k, normalize: (i + j / 2) % 2 == 0, layout, logits });
            }
        }
        grid
    }

    fn strategy() -> BoxedStrategy<RouteCase> {
        let choose = (prop::sample::select(Layout::ALL), prop::sample::select(Logits::ALL));
        (0usize..12, 1usize..70, 1usize..70, any::<bool>(), choose)
            .prop_map(|(t, e, k, normalize, (layout, logits))| RouteCase {
                t,
                e,
                top_k: k.min(e),
                normalize,
                layout,
                logits,
            })
            .boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: routed_reference },
            Check { name: "cuts", run: routed_cuts },
            Check { name: "expert_permutation", run: routed_permuted },
            Check { name: "nan", run: routed_nan },
        ]
    }
}

choice! {
    /// Who goes where.
    pub enum Crowd {
        /// Distinct experts at random.
        Random = "random",
        /// Every choice of every token the same expert: it takes all, the others are empty.
        One = "one",
        /// Any experts, the same one several times in a token.
        Duplicates = "duplicates",
        /// Distinct experts, a few of which take most tokens.
        Skewed = "skewed",
    }
}

fn crowd_ids(crowd: Crowd, t: usize, e: usize, top_k: usize, rng: &mut Rng) -> Vec<i32> {
    let one = rng.random_range(0..e.max(1)) as i32;
    let mut experts: Vec<i32> = (0..e as i32).collect();
    let mut ids = Vec::with_capacity(t * top_k);
    for _ in 0..t {
        if crowd == Crowd::Skewed {
            // In turn, each place goes to the first expert left with odds of a half, else to the next one likewise.
            experts.sort_unstable();
            for c in 0..top_k.min(e) {
                let skip = rng.random::<u32>().trailing_zeros() as usize;
                experts[c..].rotate_left(skip.min(e - c - 1));
            }
        } else {
            experts.shuffle(rng);
        }
        // Distinct as far as there are experts.
        ids.extend((0..top_k).map(|c| match crowd {
            Crowd::Random | Crowd::Skewed => experts[c % e],
            Crowd::One => one,
            Crowd::Duplicates => experts[c / 2 % e],
        }));
    }
    ids
}

case! {
    /// One grouping.
    pub struct GroupCase {
        /// Tokens.
        pub t: usize,
        /// Experts.
        pub e: usize,
        /// Choices a token.
        pub top_k: usize,
        /// Who goes where.
        pub crowd: Crowd,
    }
}

/// Order and offsets, beside what the call returned.
fn grouped(exec: Exec<group::Op>, case: &GroupCase, ids: &[i32]) -> (Result<(), Error>, Vec<i64>, Vec<i64>) {
    let (mut order, mut offsets) = (Guarded::filled(ids.len(), i64::MIN), Guarded::filled(case.e + 1, i64::MIN));
    let args = group::Args { order: &mut order, offsets: &mut offsets, ids: &Guarded::of(ids), top_k: case.top_k };
    let result = group::run(args, &exec);
    (result, order.to_vec(), offsets.to_vec())
}

/// The stable sort by expert.
fn grouped_reference(variant: &Variant<group::Op>, case: &GroupCase, seed: u64) -> Outcome {
    let ids = crowd_ids(case.crowd, case.t, case.e, case.top_k, &mut rng(seed));
    let (result, order, offsets) = grouped(Exec::variant(*variant), case, &ids);
    result?;
    let (got, want) = ((order, offsets), reference::group(&ids, case.e));
    if got != want {
        return Err(Failure::new(format!("ids {ids:?}: got {got:?}, expected {want:?}")));
    }
    PASSED
}

/// Any number of parts and threads, and any run, gives the same grouping.
fn grouped_cuts(variant: &Variant<group::Op>, case: &GroupCase, seed: u64) -> Outcome {
    let ids = crowd_ids(case.crowd, case.t, case.e, case.top_k, &mut rng(seed));
    let (result, order, offsets) = grouped(Exec::variant(*variant), case, &ids);
    result?;
    everywhere(variant, |exec| {
        let (result, o, f) = grouped(exec, case, &ids);
        result?;
        if o == order && f == offsets {
            Ok(())
        } else {
            Err(Failure::new(format!("ids {ids:?}: got {o:?} and {f:?}, before {order:?} and {offsets:?}")))
        }
    })?;
    PASSED
}

/// An id out of range is refused, and nothing was written.
fn grouped_bad_id(variant: &Variant<group::Op>, case: &GroupCase, seed: u64) -> Outcome {
    let mut ids = crowd_ids(case.crowd, case.t, case.e, case.top_k, &mut rng(seed));
    if ids.is_empty() {
        return Ok(None);
    }
    let at = seed as usize % ids.len();
    for bad in [-1, case.e as i32, i32::MIN, i32::MAX] {
        ids[at] = bad;
        match grouped(Exec::variant(*variant), case, &ids) {
            (Err(e), order, offsets)
                if e.to_string().contains("ids: value") && order.iter().chain(&offsets).all(|&o| o == i64::MIN) => {}
            other => return Err(Failure::new(format!("id {bad}: {other:?}"))),
        }
    }
    PASSED
}

/// The suite of moe_group.
pub struct MoeGroup;

impl Suite for MoeGroup {
    type Op = group::Op;
    type Case = GroupCase;

    fn grid() -> Vec<GroupCase> {
        let shapes = [(0, 4, 2), (1, 1, 1), (1, 512, 10), (7, 8, 3), (64, 60, 4), (513, 16, 2)];
        let of = |(t, e, top_k)| Crowd::ALL.iter().map(move |&crowd| GroupCase { t, e, top_k, crowd });
        shapes.into_iter().flat_map(of).collect()
    }

    fn strategy() -> BoxedStrategy<GroupCase> {
        (0usize..20, 1usize..40, 1usize..8, prop::sample::select(Crowd::ALL))
            .prop_map(|(t, e, top_k, crowd)| GroupCase { t, e, top_k, crowd })
            .boxed()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: grouped_reference },
            Check { name: "cuts", run: grouped_cuts },
            Check { name: "bad_id", run: grouped_bad_id },
        ]
    }
}

case! {
    /// One feed-forward.
    pub struct Case {
        /// Tokens.
        pub t: usize,
        /// Experts.
        pub e: usize,
        /// Choices a token.
        pub top_k: usize,
        /// Model width in blocks of the type of gate and up.
        pub d_blocks: usize,
        /// Expert width in blocks of the type of down.
        pub f_blocks: usize,
        /// Type of gate and up.
        pub up_type: Type,
        /// Type of down.
        pub down_type: Type,
        /// Gate and up in one merged tensor.
        pub merged: bool,
        /// How activations and weights meet, as far as the types allow it.
        pub form: Form,
        /// Strides; interleaved weights are packed.
        pub layout: Layout,
        /// Who goes where.
        pub crowd: Crowd,
    }
}

impl Case {
    /// Model width.
    pub fn d(&self) -> usize {
        self.d_blocks * self.up_type.dtype().block()
    }

    /// Expert width.
    pub fn f(&self) -> usize {
        self.f_blocks * self.down_type.dtype().block()
    }
}

/// Inputs of a feed-forward, packed.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// `[t][d]`.
    pub x: Vec<f32>,
    /// `[e][f][d]`.
    pub gate: Vec<u8>,
    /// `[e][f][d]`.
    pub up: Vec<u8>,
    /// `[e][d][f]`.
    pub down: Vec<u8>,
    /// `[t][top_k]`.
    pub ids: Vec<i32>,
    /// `[t][top_k]`; `None`: all 1.
    pub weights: Option<Vec<f32>>,
    /// What y holds before an accumulating call, `[t][d]`.
    pub start: Option<Vec<f32>>,
}

impl Inputs {
    /// Inputs of `case` drawn from `seed`.
    pub fn generate(case: &Case, seed: u64) -> Inputs {
        let mut rng = rng(seed);
        let (d, f) = (case.d(), case.f());
        let scale = |n: usize| 4.0 / (n.max(1) as f32).sqrt();
        let x = (0..case.t * d).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        let gate = case.up_type.random(case.e * f * d, scale(d), &mut rng);
        let up = case.up_type.random(case.e * f * d, scale(d), &mut rng);
        let down = case.down_type.random(case.e * d * f, scale(f), &mut rng);
        let ids = crowd_ids(case.crowd, case.t, case.e, case.top_k, &mut rng);
        let weights = (0..ids.len()).map(|_| rng.random_range(0.0f32..1.0)).collect();
        Inputs { x, gate, up, down, ids, weights: Some(weights), start: None }
    }

    /// The tokens of `pick` only, in that order.
    fn tokens(&self, case: &Case, pick: &[usize]) -> (Case, Inputs) {
        fn take<T: Copy>(v: &[T], n: usize, pick: &[usize]) -> Vec<T> {
            pick.iter().flat_map(|&t| v[t * n..][..n].to_vec()).collect()
        }
        let inputs = Inputs {
            x: take(&self.x, case.d(), pick),
            ids: take(&self.ids, case.top_k, pick),
            weights: self.weights.as_ref().map(|w| take(w, case.top_k, pick)),
            start: self.start.as_ref().map(|y| take(y, case.d(), pick)),
            ..self.clone()
        };
        (Case { t: pick.len(), ..case.clone() }, inputs)
    }

    /// Expert `e` of a packed weight tensor.
    fn expert<'a>(case: &Case, tensor: &'a [u8], e: usize) -> &'a [u8] {
        let bytes = tensor.len() / case.e;
        &tensor[e * bytes..][..bytes]
    }
}

/// Runs up and down; returns h and y, packed. Interleaved weights are packed.
fn feed(execs: &Execs, case: &Case, inputs: &Inputs) -> Result<(Vec<f32>, Vec<f32>), Failure> {
    let (t, e, d, f) = (case.t, case.e, case.d(), case.f());
    let routing = Routing::from_ids(e, case.top_k, inputs.ids.clone(), inputs.weights.clone())?;
    record::lend(routing.order());
    record::lend(routing.offsets());
    record::lend(routing.weights().unwrap_or_default());
    let (up_dtype, down_dtype) = (case.up_type.dtype(), case.down_type.dtype());
    let (up_form, down_form) = (case.form.for_weights(up_dtype, f), case.form.for_weights(down_dtype, d));
    let layout = |form: Form| if form.is_interleaved() { Layout::Packed } else { case.layout };
    let x = Input::new(&inputs.x, [t, d], case.layout);
    let x_q8 = up_form.activations(x.view(), up_dtype)?;
    let rows = match &x_q8 {
        Some(bytes) => Rows::Q8(Weight::new(bytes, up_dtype.activations(), [t, d])?),
        None => x.view().into(),
    };
    let (down, down_type) = down_form.weights(&inputs.down, down_dtype, f);
    let down = Blocks::new(&down, down_type, [e, d, f], layout(down_form));
    let ((gate_bytes, up_type), (up_bytes, _)) =
        (up_form.weights(&inputs.gate, up_dtype, d), up_form.weights(&inputs.up, up_dtype, d));
    let mut y = match &inputs.start {
        Some(start) => Output::with(start, [t, d], case.layout),
        None => Output::new([t, d], case.layout),
    };
    let (merged, gate, up);
    let (gate, up) = if case.merged {
        let experts =
            (0..e).flat_map(|i| [Inputs::expert(case, &gate_bytes, i), Inputs::expert(case, &up_bytes, i)].concat());
        merged = Guarded::of(&experts.collect::<Vec<u8>>());
        Weight::split_gate_up(&merged, up_type, [e, f, d])?
    } else {
        gate = Blocks::new(&gate_bytes, up_type, [e, f, d], layout(up_form));
        up = Blocks::new(&up_bytes, up_type, [e, f, d], layout(up_form));
        (gate.view(), up.view())
    };
    let (guard, after) = zones(64);
    let len = inputs.ids.len() * f;
    let mut h = Guarded::filled(guard + len + after, f32::from_bits(POISON));
    let hidden = ViewMut::new(&mut h[guard..guard + len], [inputs.ids.len(), f])?;
    let args = up::Args { h: hidden, x: rows, gate, up, routing: &routing };
    up::run(args, &execs.up)?;
    if let Some(i) = h[guard..guard + len].iter().position(|v| v.to_bits() == POISON) {
        return Err(Failure::new(format!("h: element {i} was left unwritten")));
    }
    if h[..guard].iter().chain(&h[guard + len..]).any(|v| v.to_bits() != POISON) {
        return Err(Failure::new("h: wrote outside the array"));
    }
    let h = Guarded::of(&h[guard..guard + len]);
    let accumulate = inputs.start.is_some();
    let hidden = View::new(&h, [inputs.ids.len(), f])?;
    let h_q8 = down_form.activations(hidden, down_dtype)?;
    let hidden = match &h_q8 {
        Some(bytes) => Rows::Q8(Weight::new(bytes, down_dtype.activations(), [inputs.ids.len(), f])?),
        None => hidden.into(),
    };
    let args = down::Args { y: y.view(), h: hidden, down: down.view(), routing: &routing, accumulate };
    down::run(args, &execs.down)?;
    Ok((h.to_vec(), y.read("y")?))
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// h against float64. A dot is off by γ_{D+1} Σ|w||x|, silu's slope is at most 1.1, and exp, sum, division and product
/// round six times; where exp overflows, less than 128 smallest normals are lost.
pub fn up_reference(execs: &Execs, case: &Case, seed: u64) -> Outcome {
    let inputs = Inputs::generate(case, seed);
    let (h, _) = feed(execs, case, &inputs)?;
    let (d, f) = (case.d(), case.f());
    let q8 = case
        .form
        .for_weights(case.up_type.dtype(), f)
        .activations(View::new(&inputs.x, [case.t, d])?, case.up_type.dtype())?;
    let x = q8.as_ref().map_or_else(|| wide(&inputs.x), |q| wide(&decode_q8(case.up_type.dtype().activations(), q)));
    let decode = |bytes: &[u8]| quant::dequantize(case.up_type.dtype(), bytes);
    let (gate, up) = (decode(&inputs.gate), decode(&inputs.up));
    let size = |bytes: &[u8], w: &[f64]| if q8.is_some() { magnitudes(case.up_type, bytes) } else { w.to_vec() };
    let (gate_size, up_size) = (size(&inputs.gate, &gate), size(&inputs.up, &up));
    let (mut want, mut bound) = (Vec::new(), Vec::new());
    for (pair, &e) in inputs.ids.iter().enumerate() {
        let e = e as usize;
        let expert = |w| {
            let w: &[f64] = w;
            ArrayView2::from_shape((f, d), &w[e * f * d..][..f * d]).expect("f × d")
        };
        let (gate, up) = (expert(&gate), expert(&up));
        let x = ArrayView1::from(&x[pair / case.top_k * d..][..d]);
        let slack = |w: ArrayView2<f64>| w.mapv(f64::abs).dot(&x.mapv(f64::abs)) * gamma(d + 1);
        let (g, u, off_g, off_u) = (gate.dot(&x), up.dot(&x), slack(expert(&gate_size)), slack(expert(&up_size)));
        for i in 0..f {
            let s = reference::silu(g[i]);
            bound.push(
                1.1 * off_g[i] * (u[i].abs() + off_u[i])
                    + s.abs() * off_u[i]
                    + (s * u[i]).abs() * gamma(8)
                    + 128.0 * TINY32 * (u[i].abs() + off_u[i] + 1.0),
            );
        }
        want.extend(reference::up(gate, up, x));
    }
    compare("h", &h, &want, &bound, f).map(Some)
}

/// y against float64 from the h that was computed: γ over all roundings of the dots, the weights and the sums.
pub fn down_reference(execs: &Execs, case: &Case, seed: u64) -> Outcome {
    let inputs = Inputs::generate(case, seed);
    let (h, y) = feed(execs, case, &inputs)?;
    let (d, f, k) = (case.d(), case.f(), case.top_k);
    let dtype = case.down_type.dtype();
    let q8 = case.form.for_weights(dtype, d).activations(View::new(&h, [inputs.ids.len(), f])?, dtype)?;
    let h = q8.as_ref().map_or_else(|| wide(&h), |q| wide(&decode_q8(dtype.activations(), q)));
    let weights = wide(inputs.weights.as_deref().expect("generated"));
    let down = quant::dequantize(case.down_type.dtype(), &inputs.down);
    let (abs_h, abs_down): (Vec<f64>, Vec<f64>) = (
        h.iter().map(|v| v.abs()).collect(),
        match q8 {
            Some(_) => magnitudes(case.down_type, &inputs.down),
            None => down.iter().map(|v| v.abs()).collect(),
        },
    );
    let (mut want, mut bound) = (Vec::new(), Vec::new());
    for t in 0..case.t {
        let combine = |down: &[f64], h: &[f64]| {
            let experts: Vec<_> = inputs.ids[t * k..][..k]
                .iter()
                .map(|&e| ArrayView2::from_shape((d, f), &down[e as usize * d * f..][..d * f]).expect("d × f"))
                .collect();
            let h: Vec<_> = (t * k..(t + 1) * k).map(|p| ArrayView1::from(&h[p * f..][..f])).collect();
            reference::down(&experts, &h, &weights[t * k..][..k], d)
        };
        want.extend(combine(&down, &h));
        bound.extend(combine(&abs_down, &abs_h).iter().map(|s| gamma(f + k + 2) * s + (f + k) as f64 * TINY32 * U32));
    }
    compare("y", &y, &want, &bound, d).map(Some)
}

/// Every token alone gives the bits it gives in the batch, and so does a batch in another order.
fn tokens_alone(execs: &Execs, case: &Case, seed: u64) -> Outcome {
    let inputs = Inputs::generate(case, seed);
    let (_, y) = feed(execs, case, &inputs)?;
    let d = case.d();
    for t in (0..case.t).step_by(1 + case.t / 16) {
        let (one, alone) = inputs.tokens(case, &[t]);
        bitwise("a token alone", &feed(execs, &one, &alone)?.1, &y[t * d..][..d])?;
    }
    let mut order: Vec<usize> = (0..case.t).collect();
    order.shuffle(&mut rng(seed ^ 1));
    let (same, moved) = inputs.tokens(case, &order);
    let want: Vec<f32> = order.iter().flat_map(|&t| y[t * d..][..d].to_vec()).collect();
    bitwise("tokens permuted", &feed(execs, &same, &moved)?.1, &want)?;
    PASSED
}

/// Experts in another order, with their ids: the same bits.
fn experts_permuted(execs: &Execs, case: &Case, seed: u64) -> Outcome {
    let inputs = Inputs::generate(case, seed);
    let (_, y) = feed(execs, case, &inputs)?;
    let mut from: Vec<usize> = (0..case.e).collect();
    from.shuffle(&mut rng(seed ^ 2));
    let gather = |tensor: &[u8]| from.iter().flat_map(|&e| Inputs::expert(case, tensor, e).to_vec()).collect();
    let place = |id: i32| from.iter().position(|&e| e == id as usize).expect("a permutation") as i32;
    let moved = Inputs {
        gate: gather(&inputs.gate),
        up: gather(&inputs.up),
        down: gather(&inputs.down),
        ids: inputs.ids.iter().map(|&id| place(id)).collect(),
        ..inputs.clone()
    };
    bitwise("experts permuted", &feed(execs, case, &moved)?.1, &y)?;
    PASSED
}

/// All experts the same, weights that sum to 1 exactly: the dense feed-forward, bit for bit.
fn identical_experts(execs: &Execs, case: &Case, seed: u64) -> Outcome {
    let mut inputs = Inputs::generate(case, seed);
    if case.top_k == 0 || !case.top_k.is_power_of_two() {
        return Ok(None);
    }
    let first = |tensor: &[u8]| Inputs::expert(case, tensor, 0).to_vec();
    let (gate, up, down) = (first(&inputs.gate), first(&inputs.up), first(&inputs.down));
    inputs.gate = gate.repeat(case.e);
    inputs.up = up.repeat(case.e);
    inputs.down = down.repeat(case.e);
    inputs.weights = Some(vec![1.0 / case.top_k as f32; inputs.ids.len()]);
    let (_, y) = feed(execs, case, &inputs)?;

    let dense = Case { e: 1, top_k: 1, ..case.clone() };
    let alone = Inputs { gate, up, down, ids: vec![0; case.t], weights: None, ..inputs };
    bitwise("identical experts", &y, &feed(execs, &dense, &alone)?.1)?;
    PASSED
}

/// A merged gate_up tensor gives the same bits as two tensors, and the call that runs both steps as the steps.
fn merged(execs: &Execs, case: &Case, seed: u64) -> Outcome {
    let inputs = Inputs::generate(case, seed);
    let (_, split) = feed(execs, &Case { merged: false, ..case.clone() }, &inputs)?;
    let (_, merged) = feed(execs, &Case { merged: true, ..case.clone() }, &inputs)?;
    bitwise("merged gate_up", &merged, &split)?;

    let (t, e, d, f) = (case.t, case.e, case.d(), case.f());
    let routing = Routing::from_ids(e, case.top_k, inputs.ids.clone(), inputs.weights.clone())?;
    if case.form.is_interleaved() {
        return PASSED;
    }
    let x = Input::new(&inputs.x, [t, d], case.layout);
    let q8 = case.form.is_q8() && case.up_type.dtype().activations() != DType::F32;
    let mut quantized = Q8::default();
    if q8 {
        quantized.quantize(case.up_type.dtype().activations(), x.view(), &Exec::default())?;
    } else if case.form.is_q8() {
        return PASSED; // f32 activations would leave the hidden ones in f32
    }
    let mut y = Output::new([t, d], case.layout);
    let args = moe::Args {
        y: y.view(),
        x: if q8 { (&quantized).into() } else { x.view().into() },
        gate: Weight::new(&inputs.gate, case.up_type.dtype(), [e, f, d])?,
        up: Weight::new(&inputs.up, case.up_type.dtype(), [e, f, d])?,
        down: Weight::new(&inputs.down, case.down_type.dtype(), [e, d, f])?,
        routing: &routing,
        accumulate: false,
        h: &mut moe::Hidden::default(),
    };
    moe::run(args, execs)?;
    bitwise("both steps in one call", &y.read("y")?, &split)?;
    PASSED
}

/// Experts that no token chose hold NaN: the same bits.
fn unselected_poisoned(execs: &Execs, case: &Case, seed: u64) -> Outcome {
    let mut inputs = Inputs::generate(case, seed);
    let (_, y) = feed(execs, case, &inputs)?;
    let idle: Vec<usize> = (0..case.e).filter(|&e| !inputs.ids.contains(&(e as i32))).collect();
    if idle.is_empty() {
        return Ok(None);
    }
    for tensor in [&mut inputs.gate, &mut inputs.up, &mut inputs.down] {
        let bytes = tensor.len() / case.e;
        idle.iter().for_each(|e| tensor[e * bytes..][..bytes].fill(NAN_BYTE));
    }
    bitwise("idle experts poisoned", &feed(execs, case, &inputs)?.1, &y)?;
    PASSED
}

/// Accumulating adds the result to what was there, rounding once; no weights are weights of 1; the same expert twice
/// with halves is the expert once.
fn combining(execs: &Execs, case: &Case, seed: u64) -> Outcome {
    let inputs = Inputs::generate(case, seed);
    let (_, y) = feed(execs, case, &inputs)?;
    let mut rng = rng(seed ^ 3);
    let start: Vec<f32> = y.iter().map(|_| rng.random_range(-1.0..1.0)).collect();
    let want: Vec<f32> = start.iter().zip(&y).map(|(a, b)| a + b).collect();
    let added = Inputs { start: Some(start), ..inputs.clone() };
    bitwise("accumulated", &feed(execs, case, &added)?.1, &want)?;

    let ones = Inputs { weights: Some(vec![1.0; inputs.ids.len()]), ..inputs.clone() };
    let none = Inputs { weights: None, ..inputs.clone() };
    bitwise("no weights", &feed(execs, case, &none)?.1, &feed(execs, case, &ones)?.1)?;

    let ids: Vec<i32> = inputs.ids.iter().step_by(case.top_k).copied().collect();
    let once = Inputs { ids: ids.clone(), weights: None, ..inputs.clone() };
    let twice = Inputs {
        ids: ids.iter().flat_map(|&id| [id, id]).collect(),
        weights: Some(vec![0.5; 2 * ids.len()]),
        ..inputs
    };
    let (one, two) = (Case { top_k: 1, ..case.clone() }, Case { top_k: 2, ..case.clone() });
    bitwise("an expert twice", &feed(execs, &two, &twice)?.1, &feed(execs, &one, &once)?.1)?;
    PASSED
}

/// NaN in one token's x fills its row of y and no other.
fn isolation(execs: &Execs, case: &Case, seed: u64) -> Outcome {
    let (d, f) = (case.d(), case.f());
    if case.t * d * f == 0 {
        return Ok(None);
    }
    let mut inputs = Inputs::generate(case, seed);
    let (_, mut want) = feed(execs, case, &inputs)?;
    let bad = seed as usize % case.t;
    inputs.x[bad * d + seed as usize % d] = f32::NAN;
    want[bad * d..][..d].fill(f32::NAN);
    bitwise("y with a NaN token", &feed(execs, case, &inputs)?.1, &want)?;
    PASSED
}

/// Any cut of one step over any number of parts and threads gives the same bits.
fn cuts<O: Operator>(variant: &Variant<O>, execs: fn(Exec<O>) -> Execs, case: &Case, seed: u64) -> Outcome {
    let inputs = Inputs::generate(case, seed);
    let (h, y) = feed(&execs(Exec::variant(*variant).parts(1)), case, &inputs)?;
    everywhere(variant, |exec| {
        let (hp, yp) = feed(&execs(exec), case, &inputs)?;
        bitwise("cut: h", &hp, &h)?;
        bitwise("cut: y", &yp, &y)
    })?;
    PASSED
}

/// The whole sparse feed-forward from the router's weights on: experts in another order, together with the router's
/// rows, give the same bits.
fn router_rows_permuted(execs: &Execs, case: &Case, seed: u64) -> Outcome {
    let (t, e, d, f) = (case.t, case.e, case.d(), case.f());
    // Without channels all logits are equal, and the order decides.
    if d == 0 || case.top_k > e {
        return Ok(None);
    }
    let inputs = Inputs::generate(case, seed);
    let router = Type::F32.random(e * d, 1.0, &mut rng(seed ^ 4));
    let mut from: Vec<usize> = (0..e).collect();
    from.shuffle(&mut rng(seed ^ 5));
    let feed_forward = |from: &[usize]| -> Result<Vec<f32>, Failure> {
        let gather = |tensor: &[u8]| -> Vec<u8> {
            from.iter().flat_map(|&e| Inputs::expert(case, tensor, e).to_vec()).collect()
        };
        let (router, gate, up, down) =
            (gather(&router), gather(&inputs.gate), gather(&inputs.up), gather(&inputs.down));
        let x = Input::new(&inputs.x, [t, d], case.layout);
        let mut logits = vec![f32::NAN; t * e];
        let w = Weight::new(&router, DType::F32, [e, d])?;
        matmul::run(matmul::Args { y: ViewMut::new(&mut logits, [t, e])?, x: x.view().into(), w }, &Exec::default())?;
        let routing = Routing::route(View::new(&logits, [t, e])?, case.top_k, true, &Exec::default())?;
        let mut y = Output::new([t, d], case.layout);
        let args = moe::Args {
            y: y.view(),
            x: x.view().into(),
            gate: Weight::new(&gate, case.up_type.dtype(), [e, f, d])?,
            up: Weight::new(&up, case.up_type.dtype(), [e, f, d])?,
            down: Weight::new(&down, case.down_type.dtype(), [e, d, f])?,
            routing: &routing,
            accumulate: false,
            h: &mut moe::Hidden::default(),
        };
        moe::run(args, execs)?;
        y.read("y")
    };
    let plain = feed_forward(&(0..e).collect::<Vec<_>>())?;
    bitwise("experts and router rows permuted", &feed_forward(&from)?, &plain)?;
    PASSED
}

fn grid() -> Vec<Case> {
    let mut grid = Vec::new();
    let shapes = [
        (1, 1, 1, 1, 1),
        (2, 4, 2, 2, 1),
        (7, 8, 3, 1, 2),
        (8, 5, 4, 1, 1),
        (9, 6, 2, 2, 2),
        (64, 8, 2, 1, 1),
        (513, 4, 2, 1, 1),
        (1, 32, 10, 1, 1),
        (0, 4, 2, 1, 1),
    ];
    for (i, &up_type) in Type::ALL.iter().enumerate() {
        for (j, (t, e, top_k, d, f)) in shapes.into_iter().enumerate() {
            let down_type = Type::ALL[(i + j) % Type::ALL.len()];
            let big = up_type.dtype().block() * down_type.dtype().block();
            // 513 tokens and odd widths with small blocks; a K type is wide by itself.
            if t * big > 1 << 19 {
                continue;
            }
            let widen =
                |n: usize, ty: Type| if ty.dtype().block() == 1 { [3, 7, 16, 33, 40][(n + i + j) % 5] } else { n };
            grid.push(Case {
                t,
                e: if big > 60000 { e.min(4) } else { e },
                top_k,
                d_blocks: widen(d, up_type),
                f_blocks: widen(f, down_type),
                up_type,
                down_type,
                merged: j % 3 == 1,
                form: Form::F32,
                layout: Layout::ALL[(i + j) % 2],
                crowd: Crowd::ALL[(i + j) % 4],
            });
        }
    }
    // Integer sums and interleaved rows, for blocks of either size, over every tile of tokens.
    let typed = Type::ALL.iter().copied().filter(|t| t.dtype().block() > 1);
    for (i, up_type) in typed.enumerate() {
        let block = up_type.dtype().block();
        for (j, &form) in Form::ALL.iter().enumerate().skip(1) {
            let down_type =
                if block == 32 { [Type::Q8, Type::Q4][j % 2] } else { [Type::Q4K, Type::Q6K, Type::Q5K][j % 3] };
            grid.push(Case {
                t: [1, 9, 23, 40][(i + j) % 4],
                e: 3,
                top_k: 2,
                d_blocks: if block == 32 { 3 } else { 1 },
                f_blocks: if block == 32 { 2 } else { 1 },
                up_type,
                down_type,
                merged: (i + j) % 2 == 1,
                form,
                layout: Layout::ALL[(i + j) % 2],
                crowd: Crowd::ALL[(i + j) % 4],
            });
        }
    }
    let plain = |t, d_blocks, f_blocks| Case {
        t,
        e: 3,
        top_k: 2,
        d_blocks,
        f_blocks,
        up_type: Type::F32,
        down_type: Type::F32,
        merged: false,
        form: Form::F32,
        layout: Layout::Packed,
        crowd: Crowd::Random,
    };
    grid.extend([plain(2, 0, 4), plain(2, 4, 0), plain(513, 17, 9)]);
    grid
}

fn strategy() -> BoxedStrategy<Case> {
    // Super-blocks are wide by themselves; the grid has them.
    let narrow: Vec<Type> = Type::ALL.iter().copied().filter(|t| t.dtype().block() <= 32).collect();
    let types = (prop::sample::select(narrow.clone()), prop::sample::select(narrow));
    let choose = (
        any::<bool>(),
        prop::sample::select(Form::ALL),
        prop::sample::select(Layout::ALL),
        prop::sample::select(Crowd::ALL),
    );
    (0usize..12, 1usize..9, 1usize..5, 0usize..70, 0usize..70, types, choose)
        .prop_map(|(t, e, top_k, d, f, (up_type, down_type), (merged, form, layout, crowd))| Case {
            t,
            e,
            top_k,
            d_blocks: d.div_ceil(up_type.dtype().block()),
            f_blocks: f.div_ceil(down_type.dtype().block()),
            up_type,
            down_type,
            merged,
            form,
            layout,
            crowd,
        })
        .boxed()
}

/// A check of the whole feed-forward, run with one step's variant; the other step is dispatch's.
macro_rules! with_step {
    ($step:ident, $check:ident) => {
        Check {
            name: stringify!($check),
            run: |variant, case, seed| {
                $check(&Execs { $step: Exec::variant(*variant), ..Execs::default() }, case, seed)
            },
        }
    };
}

macro_rules! feed_forward_suite {
    ($(#[$meta:meta])* $suite:ident, $step:ident, $reference:ident) => {
        $(#[$meta])*
        pub struct $suite;

        impl Suite for $suite {
            type Op = $step::Op;
            type Case = Case;

            fn grid() -> Vec<Case> {
                grid()
            }

            fn strategy() -> BoxedStrategy<Case> {
                strategy()
            }

            fn checks() -> Vec<Check<Self>> {
                vec![
                    Check { name: "reference", ..with_step!($step, $reference) },
                    with_step!($step, tokens_alone),
                    with_step!($step, experts_permuted),
                    with_step!($step, identical_experts),
                    with_step!($step, merged),
                    with_step!($step, unselected_poisoned),
                    with_step!($step, combining),
                    with_step!($step, isolation),
                    with_step!($step, router_rows_permuted),
                    Check {
                        name: "cuts",
                        run: |variant, case, seed| {
                            cuts(variant, |$step| Execs { $step, ..Execs::default() }, case, seed)
                        },
                    },
                ]
            }
        }
    };
}

feed_forward_suite!(
    /// The suite of moe_up.
    MoeUp,
    up,
    up_reference
);
feed_forward_suite!(
    /// The suite of moe_down.
    MoeDown,
    down,
    down_reference
);
