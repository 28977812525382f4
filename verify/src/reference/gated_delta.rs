//! The gated delta rule of one sequence and head in float64: the token loop, the dense form, and how far an f32 kernel
//! may be from them.

use crate::compare::{gamma, U32};
use ndarray::{s, Array1, Array2, Axis};
use std::ops::Range;

/// One sequence of one value head.
#[derive(Debug, Clone)]
pub struct Head {
    /// Queries, `[T][K]`.
    pub q: Array2<f64>,
    /// Keys, `[T][K]`.
    pub k: Array2<f64>,
    /// Values, `[T][V]`.
    pub v: Array2<f64>,
    /// Log-decay of every key channel, `[T][K]`: zeros without a gate.
    pub g: Array2<f64>,
    /// Write strength, `[T]`.
    pub beta: Array1<f64>,
    /// State before, `[V][K]`.
    pub state: Array2<f64>,
    /// Epsilon of the L2 norm of q and k, where they are normalised.
    pub l2norm: Option<f64>,
    /// Factor on q.
    pub scale: f64,
}

/// What the token loop gives.
#[derive(Debug, Clone)]
pub struct Trace {
    /// Outputs, `[T][V]`.
    pub o: Array2<f64>,
    /// States before the first and after every token, `[T + 1]` of `[V][K]`.
    pub states: Vec<Array2<f64>>,
    /// u of every token, `[T][V]`.
    pub u: Array2<f64>,
}

impl Head {
    fn tokens(&self) -> usize {
        self.k.nrows()
    }

    fn normalised(&self, x: &Array2<f64>) -> Array2<f64> {
        let mut y = x.clone();
        if let Some(eps) = self.l2norm {
            for mut row in y.axis_iter_mut(Axis(0)) {
                let sum: f64 = row.iter().map(|x| x * x).sum();
                row /= (sum + eps).sqrt();
            }
        }
        y
    }

    /// The formula, token by token.
    pub fn recurrent(&self) -> Trace {
        let (k, q) = (self.normalised(&self.k), self.normalised(&self.q) * self.scale);
        let (tokens, channels) = self.v.dim();
        let mut o = Array2::zeros((tokens, channels));
        let mut us = Array2::zeros((tokens, channels));
        let mut states = vec![self.state.clone()];
        for t in 0..tokens {
            let mut state = &states[t] * &self.g.row(t).mapv(f64::exp);
            let u = (&self.v.row(t) - &state.dot(&k.row(t))) * self.beta[t];
            for (mut row, &u) in state.axis_iter_mut(Axis(0)).zip(&u) {
                row.scaled_add(u, &k.row(t));
            }
            o.row_mut(t).assign(&state.dot(&q.row(t)));
            us.row_mut(t).assign(&u);
            states.push(state);
        }
        Trace { o, states, u: us }
    }

    /// The final state as S₀ Φ + Ψ, from Φ = ∏ diag(e^g) (I − β k kᵀ) and Ψ = Σ β v kᵀ (the later factors): no u, no
    /// feedback through S.
    pub fn dense(&self) -> Array2<f64> {
        let (k, n) = (self.normalised(&self.k), self.k.ncols());
        let mut phi = Array2::<f64>::eye(n);
        let mut psi = Array2::<f64>::zeros(self.state.dim());
        for t in 0..self.tokens() {
            let key = k.row(t).insert_axis(Axis(1));
            let value = self.v.row(t).insert_axis(Axis(1));
            let decay = Array2::from_diag(&self.g.row(t).mapv(f64::exp));
            let factor = decay.dot(&(Array2::eye(n) - key.dot(&key.t()) * self.beta[t]));
            phi = phi.dot(&factor);
            psi = psi.dot(&factor) + value.dot(&key.t()) * self.beta[t];
        }
        self.state.dot(&phi) + psi
    }

    /// How far the dense form and the token loop may be apart, in the 2-norm of every state row. A factor's norm is at
    /// most 1 (or its growth), that of its absolute values at most √K, so a product in float64 adds γ_{2K+16} √K of
    /// what the row can hold: its start and everything written to it. The loop's own roundings are fewer.
    pub fn dense_error(&self) -> Array1<f64> {
        let (tokens, keys) = self.k.dim();
        let k = self.normalised(&self.k);
        let mut growth = 1.0;
        let mut written = Array1::<f64>::zeros(self.v.ncols());
        for t in 0..tokens {
            let k2: f64 = k.row(t).iter().map(|k| k * k).sum();
            growth *= (1.0f64).max((1.0 - self.beta[t] * k2).abs());
            written.scaled_add(self.beta[t].abs() * k2.sqrt(), &self.v.row(t).mapv(f64::abs));
        }
        let unit = ((2 * keys + 16) * (tokens + 1)) as f64 * (f64::EPSILON / 2.0) * (keys as f64).sqrt().max(1.0);
        let start = Array1::from_iter(self.state.rows().into_iter().map(norm));
        (start + written) * growth * unit
    }

    /// What the roundings of a token-by-token f32 kernel add to each token's state, in the Frobenius norm: the δ of
    /// [`bounds`].
    pub fn rounding(&self, trace: &Trace) -> Array1<f64> {
        let common = Common::new(self);
        Array1::from_shape_fn(self.tokens(), |t| {
            let rows = (0..self.v.ncols()).map(|j| row_rounding(self, trace, &common, t, j));
            rows.map(|e| e * e).sum::<f64>().sqrt()
        })
    }
}

crate::choice! {
    /// Type of q, k, v and o.
    pub enum Dtype {
        /// 32-bit floats.
        F32 = "f32",
        /// bfloat16.
        BF16 = "bf16",
        /// IEEE half.
        F16 = "f16",
    }
}

impl Dtype {
    /// The nearest value of the type.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Dtype::F32 => x,
            Dtype::BF16 => half::bf16::from_f32(x).to_f32(),
            Dtype::F16 => half::f16::from_f32(x).to_f32(),
        }
    }

    /// How far an f32 is from the nearest value of the type: as a part of it (half a unit in the last of 8 or 11 places),
    /// and half of the smallest number.
    fn rounding(self) -> (f64, f64) {
        match self {
            Dtype::F32 => (0.0, 0.0),
            Dtype::BF16 => (2f64.powi(-8), 2f64.powi(-134)),
            Dtype::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        }
    }
}

/// How a kernel computes, as far as its rounding errors depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Token by token.
    Recurrent,
    /// Chunks of so many tokens, (I + A) solved for u itself.
    Chunked(usize),
    /// The same on CUDA tensor cores: of bf16 inputs every product is one of bf16, f32 factors in two parts.
    TensorCores(usize),
    /// As on tensor cores, in 2 to 16 segments of whole chunks: a state passes over inner ones as S M + L.
    Segmented(usize),
    /// Any of these and token by token, as a launcher chooses by the sizes of a call.
    Any(usize),
    /// Chunks of so many tokens, (I + A) solved for U and W.
    Split(usize),
}

impl Form {
    /// The form of a variant, from its name.
    pub fn of(variant: &str) -> Form {
        let digits: String =
            variant.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
        match variant.split(|c: char| !c.is_ascii_alphabetic()).next() {
            Some("chunked") if variant.contains("cuda") => Form::TensorCores(digits.parse().unwrap_or(64)),
            Some("segmented") => Form::Segmented(digits.parse().unwrap_or(64)),
            Some("chunked") => Form::Chunked(digits.parse().unwrap_or(64)),
            Some("unfused") => Form::Split(64),
            Some("cuda") => Form::Any(64),
            _ => Form::Recurrent,
        }
    }

    /// Tokens from one edge of a chunk to the next: calls may be cut there without a change of bits.
    pub fn chunk(self) -> usize {
        match self {
            Form::Recurrent => 1,
            Form::Chunked(n) | Form::TensorCores(n) | Form::Split(n) | Form::Segmented(n) | Form::Any(n) => n,
        }
    }

    /// Whether a call that is cut at the edge of a chunk gives the same bits: not where its length decides more.
    pub fn may_be_cut(self) -> bool {
        !matches!(self, Form::Segmented(_) | Form::Any(_))
    }

    /// Whether a sequence gives the same bits whatever is packed beside it.
    pub fn may_be_packed(self) -> bool {
        !matches!(self, Form::Any(_))
    }
}

/// Absolute error bounds.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Of every output, `[T][V]`.
    pub o: Array2<f64>,
    /// Of the 2-norm of every state row after each token, `[T][V]`.
    pub snapshots: Array2<f64>,
    /// The same for the final state, `[V]`.
    pub state: Array1<f64>,
}

/// Relative error of exp(g) in a kernel: two ulp.
pub const EXP: f64 = 4.0 * U32;

/// What two bf16, the nearest to a number x and the nearest to the rest, leave out of it. For x in 1 .. 2 the rest is 2⁻⁸
/// at most, so the second one's last place is 2⁻¹⁶ at most, and half of it 2⁻¹⁷.
const SPLIT: f64 = 1.0 / (1u64 << 17) as f64;

/// What a product of two such pairs leaves out, in units of [`SPLIT`]: one for each pair, and the product of the rests,
/// 2⁻⁸ by 2⁻⁸, which is not formed.
const BOTH: f64 = 4.0;

/// Tokens of a diagonal block of A, whose inverse is a factor on tensor cores.
const BLOCK: usize = 16;

/// Segments of a sequence.
const SEGMENTS: std::ops::RangeInclusive<usize> = 2..=16;

/// What a product S M leaves out: S is a factor whole, M in two parts of 11 digits, with the product of their rests.
const CROSSING: f64 = 1.0 / (1u64 << 20) as f64;

/// What an f32 kernel of this form may be off, to first order. With E the error of a state row before a token, x its
/// decayed value and δ the errors of single operations, the error after the token is
///
///   E' ≤ ‖diag(e^g)(I − β k kᵀ)‖ E + δx + |u| δk + δu ‖k‖        ‖I − β k kᵀ‖ = max(1, |1 − β ‖k‖²|)
///
/// so with ‖k‖ ≤ 1, 0 ≤ β ≤ 2, g ≤ 0 errors add and never grow. Rows are independent. A chunk adds, with everything
/// taken from the float64 matrices, δu ≤ |(I + A)⁻¹| (δr + (δA + γ|A|)|u|) for its solve; the split into U and W puts
/// |U| + |W||S| in the place of |u|, which is larger where U and W S cancel. Decays are products of rounded exp(g), so
/// a decay over d tokens is off by d (EXP + u). Chunks start anew at `restart`, where a call was split.
///
/// On tensor cores with inputs of bf16, keys and queries are factors as they are, but S, u, A and P are two bf16: σ
/// (`SPLIT`) of |S||k| and |S||q|, 4 σ of |A||u| and |P||u| (`BOTH`) are left out, and 2 σ of |u||k| on the way into the
/// state: u is two parts, and its product with a decay is two again. In a diagonal block D of A u is found as
/// w + ((I + D)⁻¹ − I) w, w = (I + D) u: 4 σ of that product's terms, an error e of the block's u itself, which later
/// tokens see as they see u, through (I + A)⁻¹ (I + D) e.
///
/// In segments, the first one and the one that outputs are asked of go chunk by chunk. Over those in between the error E of
/// a row becomes ‖M‖ E + Σ |S_k| δM_k + δL + the product's rounding, δL and δM_k what a segment adds that starts from zero or
/// from row k of the identity and is written nothing. How many segments there are is the kernel's: the worst counts.
///
/// Last, o is rounded to `dtype`.
pub fn bounds(head: &Head, trace: &Trace, form: Form, dtype: Dtype, restart: usize) -> Bounds {
    let (tokens, channels) = head.v.dim();
    match form {
        Form::Segmented(n) => return segmented_bounds(head, trace, n, dtype, restart),
        Form::Any(n) => {
            // Errors of the one carried into the other only add.
            let [a, b] = [Form::Recurrent, Form::Segmented(n)].map(|form| bounds(head, trace, form, dtype, restart));
            return Bounds { o: a.o + b.o, snapshots: a.snapshots + b.snapshots, state: a.state + b.state };
        }
        _ => {}
    }
    let size = form.chunk();
    let split = split_of(form, dtype);
    let mut b = Bounds::zeros(tokens, channels);
    let common = Common::new(head);
    let mut t = 0;
    while t < tokens {
        let end = if t < restart { (t + size).min(restart) } else { t + size }.min(tokens);
        match form {
            Form::Recurrent => token_bounds(head, trace, &common, t, &mut b),
            _ => chunk_bounds(head, trace, &common, (form, split), t..end, &mut b),
        }
        t = end;
    }
    b.finished(trace, dtype)
}

/// What the parts of an f32 factor leave out of it.
fn split_of(form: Form, dtype: Dtype) -> f64 {
    match (form, dtype) {
        (Form::TensorCores(_), Dtype::BF16) => SPLIT,
        _ => 0.0,
    }
}

impl Bounds {
    fn zeros(tokens: usize, channels: usize) -> Bounds {
        Bounds {
            o: Array2::zeros((tokens, channels)),
            snapshots: Array2::zeros((tokens, channels)),
            state: Array1::zeros(channels),
        }
    }

    fn finished(mut self, trace: &Trace, dtype: Dtype) -> Bounds {
        // Products of two errors are left out before; they are smaller by a factor of some hundred u.
        self.o *= 1.001;
        self.snapshots *= 1.001;
        self.state *= 1.001;
        let (unit, smallest) = dtype.rounding();
        self.o.zip_mut_with(&trace.o, |bound, o| *bound += unit * (o.abs() + *bound) + smallest);
        self
    }

    fn at_least(&mut self, other: &Bounds) {
        self.o.zip_mut_with(&other.o, |a, b| *a = a.max(*b));
        self.snapshots.zip_mut_with(&other.snapshots, |a, b| *a = a.max(*b));
        self.state.zip_mut_with(&other.state, |a, b| *a = a.max(*b));
    }
}

/// The worst of all cuts into segments, of each of the two calls that `restart` makes.
fn segmented_bounds(head: &Head, trace: &Trace, n: usize, dtype: Dtype, restart: usize) -> Bounds {
    let (tokens, channels) = head.v.dim();
    let (form, common) = (Form::TensorCores(n), Common::new(head));
    let split = split_of(form, dtype);
    let mut worst = Bounds::zeros(tokens, channels);
    let mut seen = std::collections::BTreeSet::new();
    for segments in SEGMENTS {
        let length = |tokens: usize| tokens.div_ceil(n).div_ceil(segments) * n;
        let calls = [(restart, length(restart)), (tokens, length(tokens - restart))];
        if !seen.insert(calls) {
            continue;
        }
        let mut b = Bounds::zeros(tokens, channels);
        let mut t = 0;
        for (call_end, length) in calls {
            let (first, mut start) = (t, b.state.clone());
            while t < call_end {
                let end = (t + length).min(call_end);
                b.state.assign(&start);
                for chunk in (t..end).step_by(n) {
                    chunk_bounds(head, trace, &common, (form, split), chunk..(chunk + n).min(end), &mut b);
                }
                start = match t == first || end == call_end {
                    true => b.state.clone(),
                    false => crossed(head, trace, &common, (form, dtype), t..end, &start),
                };
                t = end;
            }
        }
        worst.at_least(&b);
    }
    worst.finished(trace, dtype)
}

/// The error of state rows after a segment that they passed over, given that before it.
fn crossed(
    head: &Head,
    trace: &Trace,
    c: &Common,
    (form, dtype): (Form, Dtype),
    tokens: Range<usize>,
    before: &Array1<f64>,
) -> Array1<f64> {
    let (keys, channels) = (head.k.ncols(), head.v.ncols());
    let rows = |x: &Array2<f64>| x.slice(s![tokens.clone(), ..]).to_owned();
    let run = |state: Array2<f64>, v: Array2<f64>| {
        let (q, k, g) = (rows(&head.q), rows(&head.k), rows(&head.g));
        let beta = head.beta.slice(s![tokens.clone()]).to_owned();
        let part = Head { q, k, v, g, beta, state, ..*head };
        let trace = part.recurrent();
        let error = bounds(&part, &trace, form, dtype, 0).state;
        (trace.states.into_iter().next_back().expect("T + 1 states"), error)
    };
    let (local, local_error) = run(Array2::zeros((channels, keys)), rows(&head.v));
    let (transfer, transfer_error) = run(Array2::eye(keys), Array2::zeros((tokens.len(), keys)));
    let growth: f64 = tokens.clone().map(|t| growth(head, c, t)).product();
    let state = trace.states[tokens.start].mapv(f64::abs);
    let reach = transfer.rows().into_iter().map(norm).collect::<Array1<f64>>();
    let product = state.dot(&(&transfer_error + &(reach * (gamma(4 * keys + 4) + CROSSING))));
    Array1::from_shape_fn(channels, |j| {
        let sum = norm(local.row(j)) + norm(trace.states[tokens.end].row(j));
        growth * before[j] + product[j] + local_error[j] + U32 * sum + c.tiny * (1.0 + sum)
    })
}

struct Common {
    k: Array2<f64>,
    q: Array2<f64>,
    decay: Array2<f64>,
    key: f64,
    query: f64,
    tiny: f64,
}

impl Common {
    fn new(head: &Head) -> Common {
        let keys = head.k.ncols();
        Common {
            k: head.normalised(&head.k),
            q: head.normalised(&head.q) * head.scale,
            decay: head.g.mapv(f64::exp),
            // A sum of squares, its root, a division and a product; all of a vector's elements share the factor.
            key: if head.l2norm.is_some() { gamma(keys / 2 + 6) } else { 0.0 },
            query: U32 + if head.l2norm.is_some() { gamma(keys / 2 + 6) } else { 0.0 },
            // A product or a decay under the normal range loses less than half of 2⁻¹⁴⁹.
            tiny: (keys + 8) as f64 * 2f64.powi(-149),
        }
    }
}

fn norm<'a>(x: impl IntoIterator<Item = &'a f64>) -> f64 {
    x.into_iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// ‖diag(e^g)(I − β k kᵀ)‖.
fn growth(head: &Head, c: &Common, t: usize) -> f64 {
    let k2: f64 = c.k.row(t).iter().map(|k| k * k).sum();
    let decay = c.decay.row(t).iter().fold(0.0f64, |m, &e| m.max(e));
    decay * (1.0f64).max((1.0 - head.beta[t] * k2).abs())
}

/// Error of e ∘ x + u k for one row, given the error of u.
fn update_error(c: &Common, x: f64, u: f64, k: f64, u_error: f64) -> f64 {
    (EXP + 3.0 * U32) * x + (c.key + 3.0 * U32) * u.abs() * k + u_error * k + c.tiny * (1.0 + x + u.abs())
}

/// What token t's own roundings add to the error of state row j.
fn row_rounding(head: &Head, trace: &Trace, c: &Common, t: usize, j: usize) -> f64 {
    let (k, beta) = (c.k.row(t), head.beta[t].abs());
    let x = &trace.states[t].row(j) * &c.decay.row(t);
    let sums: f64 = x.iter().zip(k).map(|(x, k)| (x * k).abs()).sum();
    let u_error = beta * (gamma(head.k.ncols() + 5) + EXP + c.key) * sums
        + 3.0 * U32 * beta * head.v[[t, j]].abs()
        + c.tiny * (1.0 + beta);
    update_error(c, norm(&x), trace.u[[t, j]], norm(k), u_error)
}

fn token_bounds(head: &Head, trace: &Trace, c: &Common, t: usize, b: &mut Bounds) {
    let keys = head.k.ncols();
    let (q, growth) = (c.q.row(t), growth(head, c, t));
    let q_norm = norm(q);
    for j in 0..head.v.ncols() {
        b.state[j] = growth * b.state[j] + row_rounding(head, trace, c, t, j);
        let after = trace.states[t + 1].row(j);
        let sums: f64 = after.iter().zip(q).map(|(s, q)| (s * q).abs()).sum();
        b.o[[t, j]] = q_norm * b.state[j] + (gamma(keys + 1) + c.query) * sums + c.tiny;
        b.snapshots[[t, j]] = b.state[j];
    }
}

/// The inverse of I + A, A strictly lower triangular.
fn inverse(a: &Array2<f64>) -> Array2<f64> {
    let n = a.nrows();
    let mut x = Array2::<f64>::eye(n);
    for i in 0..n {
        for j in 0..i {
            let row = x.row(j).to_owned();
            x.row_mut(i).scaled_add(-a[[i, j]], &row);
        }
    }
    x
}

/// With its diagonal blocks alone.
fn diagonal_blocks(a: &Array2<f64>) -> Array2<f64> {
    Array2::from_shape_fn(a.dim(), |(i, j)| if i / BLOCK == j / BLOCK { a[[i, j]] } else { 0.0 })
}

/// `split`: what the parts of an f32 factor leave out of it.
fn chunk_bounds(
    head: &Head,
    trace: &Trace,
    c: &Common,
    (form, split): (Form, f64),
    Range { start: t0, end: t1 }: Range<usize>,
    b: &mut Bounds,
) {
    let (n, channels) = (t1 - t0, head.v.ncols());
    let keys = head.k.ncols();
    let step = EXP + U32;
    let state = &trace.states[t0];
    let abs_state = state.mapv(f64::abs);
    let beta = head.beta.slice(s![t0..t1]).mapv(f64::abs);
    let (k, q) = (c.k.slice(s![t0..t1, ..]), c.q.slice(s![t0..t1, ..]));
    let u = trace.u.slice(s![t0..t1, ..]).mapv(f64::abs);
    let v = head.v.slice(s![t0..t1, ..]).mapv(f64::abs);

    // A, P and the sums of absolute values behind them, with their errors; the keys decayed to the end.
    let (mut a, mut a_abs, mut a_error) = (Array2::zeros((n, n)), Array2::zeros((n, n)), Array2::zeros((n, n)));
    let (mut p, mut p_abs, mut p_error) = (Array2::zeros((n, n)), Array2::zeros((n, n)), Array2::zeros((n, n)));
    let mut decayed = k.to_owned();
    for i in 0..n {
        for j in 0..=i {
            if j < i {
                let mut key = decayed.row_mut(j);
                key *= &c.decay.row(t0 + i);
            }
            let (mut kk, mut kk_abs, mut qk, mut qk_abs) = (0.0, 0.0, 0.0, 0.0);
            for l in 0..keys {
                let key = decayed[[j, l]];
                kk += k[[i, l]] * key;
                kk_abs += (k[[i, l]] * key).abs();
                qk += q[[i, l]] * key;
                qk_abs += (q[[i, l]] * key).abs();
            }
            let off = gamma(keys + 4) + (i - j) as f64 * step;
            if j < i {
                a[[i, j]] = head.beta[t0 + i] * kk;
                a_abs[[i, j]] = beta[i] * kk_abs;
                a_error[[i, j]] = beta[i] * ((off + 2.0 * c.key) * kk_abs + c.tiny);
            }
            p[[i, j]] = qk;
            p_abs[[i, j]] = qk_abs;
            p_error[[i, j]] = (off + c.key + c.query) * qk_abs + c.tiny;
        }
    }
    let inv = inverse(&a);
    let inv_abs = inv.mapv(f64::abs);

    // γ ∘ k and γ ∘ q against the state before the chunk.
    let (mut from_start, mut gamma_i) = (Array2::zeros((n, keys)), Array1::ones(keys));
    let mut q_start = Array2::zeros((n, keys));
    for i in 0..n {
        gamma_i *= &c.decay.row(t0 + i);
        from_start.row_mut(i).assign(&(&k.row(i) * &gamma_i));
        q_start.row_mut(i).assign(&(&q.row(i) * &gamma_i).mapv(f64::abs));
    }
    let k_state = from_start.mapv(f64::abs).dot(&abs_state.t());
    let q_state = q_start.dot(&abs_state.t());

    // The solve.
    let mut right = Array2::zeros((n, channels));
    for i in 0..n {
        let off = gamma(keys + n + 8) + c.key + (i + 1) as f64 * step;
        for j in 0..channels {
            right[[i, j]] = beta[i] * (off * (v[[i, j]] + k_state[[i, j]]) + split * k_state[[i, j]] + c.tiny);
        }
    }
    let mut system_error = &a_error + &(&a_abs * gamma(n + 4));
    let u_error = match form {
        Form::Split(_) => {
            let beta = head.beta.slice(s![t0..t1]).insert_axis(Axis(1));
            let big_u = inv.dot(&(&head.v.slice(s![t0..t1, ..]) * &beta)).mapv(f64::abs);
            let big_w = inv.dot(&(&from_start * &beta)).mapv(f64::abs).dot(&abs_state.t());
            let parts = big_u + big_w;
            inv_abs.dot(&(right + system_error.dot(&parts))) + parts * gamma(keys + 4)
        }
        Form::TensorCores(_) if split > 0.0 => {
            let inside = diagonal_blocks(&a);
            system_error += &((&a - &inside).mapv(f64::abs) * (BOTH * split));
            let inside = inside + Array2::<f64>::eye(n);
            let w = inside.dot(&trace.u.slice(s![t0..t1, ..])).mapv(f64::abs);
            let block_inverse = (diagonal_blocks(&inv) - Array2::<f64>::eye(n)).mapv(f64::abs);
            let own = block_inverse.dot(&w) * (BOTH * split);
            inv_abs.dot(&(right + system_error.dot(&u))) + inv.dot(&inside).mapv(f64::abs).dot(&own)
        }
        _ => inv_abs.dot(&(right + system_error.dot(&u))),
    };

    // The outputs.
    p_error += &(&p_abs * gamma(keys + n + 8) + p.mapv(f64::abs) * (BOTH * split));
    let p_u = p_error.dot(&u) + p_abs.dot(&u_error);
    let (mut carried, mut replayed) = (b.state.clone(), Array1::<f64>::zeros(channels));
    for i in 0..n {
        let (t, k_norm, q_norm) = (t0 + i, norm(k.row(i)), norm(q.row(i)));
        carried *= growth(head, c, t);
        let decay = c.decay.row(t).iter().fold(0.0f64, |m, &e| m.max(e));
        let off = gamma(keys + n + 8) + c.query + (i + 1) as f64 * step + split;
        for j in 0..channels {
            b.o[[t, j]] = q_norm * carried[j] + off * q_state[[i, j]] + p_u[[i, j]] + c.tiny * (1.0 + u[[i, j]]);
            let x = norm(&(&trace.states[t].row(j) * &c.decay.row(t)));
            let u_error = u_error[[i, j]] + split * u[[i, j]];
            replayed[j] = decay * replayed[j] + update_error(c, x, u[[i, j]], k_norm, u_error);
            b.snapshots[[t, j]] = carried[j] + replayed[j];
        }
    }

    // The state after: γ_n ∘ S + Σ u (k decayed to the end).
    for j in 0..channels {
        let kept = norm(&(&state.row(j) * &gamma_i));
        let mut error = carried[j] + (n as f64 * step + gamma(n + 2)) * kept + c.tiny * (1.0 + kept);
        for i in 0..n {
            let key = norm(decayed.row(i));
            let off = gamma(n + 4) + c.key + (n - 1 - i) as f64 * step + 2.0 * split;
            error += key * (off * u[[i, j]] + u_error[[i, j]]) + c.tiny * u[[i, j]];
        }
        b.state[j] = error;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::rng;
    use ndarray::Array;
    use rand::Rng as _;

    #[test]
    fn the_dense_form_agrees_with_the_token_loop() {
        let mut rng = rng(3);
        for (tokens, keys, channels, l2norm) in
            [(0, 3, 2, None), (1, 1, 1, Some(1e-6)), (9, 8, 5, None), (40, 16, 24, Some(1e-6))]
        {
            let mut draw = |r: usize, c: usize| Array::from_shape_simple_fn((r, c), || rng.random_range(-1.0..1.0));
            let head = Head {
                q: draw(tokens, keys),
                k: draw(tokens, keys) / (keys as f64).sqrt(),
                v: draw(tokens, channels) * 25.0,
                g: draw(tokens, keys).mapv(|x: f64| -x.abs()),
                beta: draw(tokens, 1).column(0).mapv(|x: f64| 1.0 + x),
                state: draw(channels, keys),
                l2norm,
                scale: 1.0,
            };
            let trace = head.recurrent();
            let (loop_state, dense) = (trace.states.last().expect("T + 1 states"), head.dense());
            for (j, &bound) in head.dense_error().iter().enumerate() {
                let off = norm(&(&loop_state.row(j) - &dense.row(j)));
                assert!(off <= bound, "T={tokens}, row {j}: off by {off:e}, bound {bound:e}");
            }
        }
    }

    #[test]
    fn forms_come_from_variant_names() {
        assert_eq!(Form::of("recurrent_avx512"), Form::Recurrent);
        assert_eq!(Form::of("chunked128_scalar"), Form::Chunked(128));
        assert_eq!(Form::of("chunked64_cuda_host"), Form::TensorCores(64));
        assert_eq!(Form::of("unfused_scalar"), Form::Split(64));
        assert_eq!(Form::of("recurrent_cuda"), Form::Recurrent);
        assert_eq!(Form::of("segmented64_cuda"), Form::Segmented(64));
        assert_eq!(Form::of("cuda"), Form::Any(64));
    }

    #[test]
    fn types_and_their_parts_round_as_the_bounds_say() {
        let mut rng = rng(5);
        let numbers: Vec<f32> =
            (0..40_000).map(|_| rng.random_range(1.0f32..2.0)).chain([1.0 + 1.0 / 256.0, 1.0019531]).collect();
        for dtype in Dtype::ALL {
            let (unit, smallest) = dtype.rounding();
            let off = |x: f32| f64::from((x - dtype.round(x)).abs()) / f64::from(x);
            let worst = numbers.iter().map(|&x| off(x)).fold(0.0, f64::max);
            assert!(worst <= unit && worst >= 0.99 * unit, "{dtype}: {worst:e}, unit {unit:e}");
            // Halfway to the smallest number, and a little more.
            assert!(unit == 0.0 || dtype.round(smallest as f32) == 0.0 && dtype.round(1.01 * smallest as f32) > 0.0);
        }
        let parts = |x: f32| [Dtype::BF16.round(x), Dtype::BF16.round(x - Dtype::BF16.round(x))].map(f64::from);
        let left_out = |x: f32| (f64::from(x) - parts(x).iter().sum::<f64>()).abs() / f64::from(x);
        let worst = numbers.iter().map(|&x| left_out(x)).fold(0.0, f64::max);
        assert!(worst <= SPLIT && worst > 0.9 * SPLIT, "{worst:e}");
        let halfway = 1.0 + 1.0 / 256.0;
        let pairs = numbers.iter().zip(numbers.iter().rev()).chain([(&halfway, &halfway)]);
        let worst = pairs.map(|(&x, &y)| {
            let ([a, b], [c, d]) = (parts(x), parts(y));
            (f64::from(x) * f64::from(y) - (a * c + a * d + b * c)).abs() / f64::from(x * y)
        });
        let worst = worst.fold(0.0, f64::max);
        assert!(worst <= BOTH * SPLIT && worst > 0.4 * BOTH * SPLIT, "{worst:e}");
    }
}
