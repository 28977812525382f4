//! How far the delta rule's state strays from float64 over a long sequence, with the state in f32 and rounded to bf16
//! between calls.
//!
//! Two heads. "writing" writes over all directions of its state, which therefore forgets by overwriting: errors stop
//! growing once they are overwritten as fast as they arise. "holding" has keys in half of the channels and decays by
//! e^-1e-5 a token: the other half keeps the state it started with, and with it every rounding of its decay.

use crate::cases::normal;
use crate::compare::Failure;
use crate::reference::gated_delta::Head;
use crate::suite::{rng, Rng};
use half::bf16;
use ndarray::{Array1, Array2};
use qwen3next_kernels::gated_delta::{self, Gate, HeadMap, LogDecay, State};
use qwen3next_kernels::{Exec, Variant, View, ViewMut};
use rand::Rng as _;

/// Tokens of a call; also of a piece of the float64 loop.
pub const STEP: usize = 64;

/// Tokens of a first look.
pub const QUICK: usize = 4096;

/// The heads, in the order of the curves.
pub const HEADS: [&str; 2] = ["writing", "holding"];

/// What becomes of the state between calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// Kept in f32.
    F32,
    /// Rounded to bf16, as a cache of that type would.
    Bf16,
}

/// One way to run the sequence.
#[derive(Clone, Copy)]
pub struct Runner {
    /// Kernel.
    pub variant: Variant<gated_delta::Op>,
    /// State between calls.
    pub state: Store,
    /// Tokens of a call: a divisor of [`STEP`].
    pub step: usize,
    /// Stops after so many tokens.
    pub tokens: usize,
}

impl Runner {
    /// Variant and what is kept between calls.
    pub fn name(&self) -> String {
        match (self.state, self.step) {
            (Store::F32, _) => format!("{}, f32", self.variant.name()),
            (Store::Bf16, 1) => format!("{}, bf16 every token", self.variant.name()),
            (Store::Bf16, n) => format!("{}, bf16 every {n} tokens", self.variant.name()),
        }
    }
}

/// Errors after some tokens.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    /// Tokens so far.
    pub tokens: usize,
    /// Frobenius norm of the state's error over the state's.
    pub state: f64,
    /// L2 norm of the error of the last [`STEP`] outputs over theirs.
    pub output: f64,
    /// What the roundings of a token-by-token f32 kernel leave in the state, each at its worst but independent of the
    /// others, so that squares add: √Σδ² / ‖S‖ (a step does not expand, so nothing grows afterwards).
    pub bound: f64,
}

/// One head of one runner.
#[derive(Debug, Clone, Default)]
pub struct Curve {
    /// At [`STEP`] · 2ⁿ tokens, and at the last.
    pub points: Vec<Point>,
}

/// Inputs of [`STEP`] tokens, two heads.
struct Piece {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    g: Vec<f32>,
    beta: Vec<f32>,
}

impl Piece {
    fn draw(rng: &mut Rng, width: usize) -> Piece {
        let rows = STEP * HEADS.len();
        let mut fill = |n: usize| (0..n).map(|_| normal(rng)).collect::<Vec<f32>>();
        let (q, mut k, v) = (fill(rows * width), fill(rows * width), fill(rows * width));
        for key in k.chunks_mut(width).skip(1).step_by(HEADS.len()) {
            key[width.div_ceil(2)..].fill(0.0);
        }
        let slowest = [1e-3f32, 2e-5]; // log-decays are drawn from 0 to these: a range of inputs
        let g = (0..rows).map(|i| -rng.random_range(0.0..slowest[i % HEADS.len()])).collect();
        let beta = (0..rows).map(|_| rng.random_range(0.0..1.0)).collect();
        Piece { q, k, v, g, beta }
    }

    /// The float64 problem of head `h` from `state` on.
    fn head(&self, h: usize, state: &Array2<f64>) -> Head {
        let width = state.ncols();
        let at = |x: &[f32], t: usize, c: usize| f64::from(x[(t * HEADS.len() + h) * width + c]);
        let rows = |x: &[f32]| Array2::from_shape_fn((STEP, width), |(t, c)| at(x, t, c));
        let scalar = |x: &[f32], t: usize| f64::from(x[t * HEADS.len() + h]);
        Head {
            q: rows(&self.q),
            k: rows(&self.k),
            v: rows(&self.v),
            g: Array2::from_shape_fn((STEP, width), |(t, _)| scalar(&self.g, t)),
            beta: Array1::from_shape_fn(STEP, |t| scalar(&self.beta, t)),
            state: state.clone(),
            l2norm: Some(f64::from(gated_delta::L2_NORM_EPS)),
            scale: 1.0,
        }
    }

    /// Runs the piece on `pool` in calls of `runner.step` tokens; returns the outputs.
    fn run(&self, runner: &Runner, pool: &mut [f32], width: usize) -> Result<Vec<f32>, Failure> {
        let heads = HEADS.len();
        let mut o = vec![f32::NAN; self.v.len()];
        let exec = Exec::variant(runner.variant).parts(1);
        for from in (0..STEP).step_by(runner.step) {
            let (row, n) = (from * heads, runner.step);
            let args = gated_delta::Args {
                o: ViewMut::new(&mut o[row * width..], [1, n, heads, width])?,
                snapshots: None,
                state: State::InPlace { pool: ViewMut::new(pool, [1, heads, width, width])?, slots: None },
                q: View::new(&self.q[row * width..], [1, n, heads, width])?,
                k: View::new(&self.k[row * width..], [1, n, heads, width])?,
                v: View::new(&self.v[row * width..], [1, n, heads, width])?,
                gate: Gate::Scalar(LogDecay::new(&self.g[row..], [1, n, heads])?),
                beta: View::new(&self.beta[row..], [1, n, heads])?,
                cu_seqlens: None,
                head_map: HeadMap::Grouped,
                qk_l2norm: Some(gated_delta::L2_NORM_EPS),
                scale: 1.0,
            };
            gated_delta::run(args, &exec)?;
            if runner.state == Store::Bf16 {
                pool.iter_mut().for_each(|s| *s = bf16::from_f32(*s).to_f32());
            }
        }
        Ok(o)
    }
}

fn relative(got: impl Iterator<Item = f32>, want: &Array2<f64>) -> f64 {
    let norm2: f64 = want.iter().map(|w| w * w).sum();
    let error2: f64 = got.zip(want).map(|(g, w)| (f64::from(g) - w).powi(2)).sum();
    (error2 / norm2).sqrt()
}

/// Runs `tokens` (a multiple of [`STEP`]) with states of `width` × `width`: the curves of the first runner, one a head,
/// then those of the next.
pub fn run(tokens: usize, width: usize, seed: u64, runners: &[Runner]) -> Result<Vec<Curve>, Failure> {
    let heads = HEADS.len();
    let rng = &mut rng(seed);
    // A start that bf16 holds exactly: what follows is drift and no first rounding.
    let start: Vec<f32> = (0..heads * width * width).map(|_| bf16::from_f32(normal(rng)).to_f32()).collect();
    let mut pools = vec![start.clone(); runners.len()];
    let mut exact: Vec<Array2<f64>> = (0..heads)
        .map(|h| Array2::from_shape_fn((width, width), |(j, c)| f64::from(start[(h * width + j) * width + c])))
        .collect();
    let mut rounding2 = vec![0.0; heads];
    let mut curves = vec![Curve::default(); runners.len() * heads];
    let mut done = 0;
    while done < tokens {
        let piece = Piece::draw(rng, width);
        let mut outputs = vec![];
        for (h, state) in exact.iter_mut().enumerate() {
            let head = piece.head(h, state);
            let trace = head.recurrent();
            rounding2[h] += head.rounding(&trace).iter().map(|e| e * e).sum::<f64>();
            state.clone_from(trace.states.last().expect("T + 1 states"));
            outputs.push(trace.o);
        }
        let before = done;
        done += STEP;
        let record = (done / STEP).is_power_of_two() || done >= tokens;
        for (r, (runner, pool)) in runners.iter().zip(&mut pools).enumerate().filter(|(_, (r, _))| before < r.tokens) {
            let o = piece.run(runner, pool, width)?;
            for h in (0..heads).filter(|_| record) {
                let norm = exact[h].iter().map(|s| s * s).sum::<f64>().sqrt();
                let of_head = o.chunks(width).skip(h).step_by(heads).flatten().copied();
                curves[r * heads + h].points.push(Point {
                    tokens: done,
                    state: relative(pool[h * width * width..][..width * width].iter().copied(), &exact[h]),
                    output: relative(of_head, &outputs[h]),
                    bound: rounding2[h].sqrt() / norm,
                });
            }
        }
    }
    Ok(curves)
}
