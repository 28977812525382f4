//! A layer on a CUDA device, step by step as on the CPU (`delta_layer`, `attention_layer`, `moe_layer`): everything is queued
//! on one stream, and nothing waits.

use crate::cache::{Cache, Floats};
use crate::config::{Config, HeadMap};
use crate::error::Error;
use crate::offload::{Attention, Delta, DeviceFfn, Matrix, Output, Swiglu};
use crate::ubatch::Packed;
use qwen3next_kernels::activations::{Rows, Q8};
use qwen3next_kernels::device::{Buffer, Cuda, Device, DeviceView, Graph, Indices, Stream};
use qwen3next_kernels::gated_delta::{self, Gate, LogDecay};
use qwen3next_kernels::layer::{add, delta_gates, gather, kv_store, row_gate};
use qwen3next_kernels::moe::{self, Routing};
use qwen3next_kernels::{attention, causal_conv, matmul, norm, rope, DType};
use std::sync::Arc;

/// A stream and the working memory of forward passes on it, kept from one to the next.
#[derive(Debug)]
pub(crate) struct Work {
    pub stream: Arc<Stream>,
    /// Buffers that are free, by length and address: a step takes those that the like step before it took.
    floats: Vec<Buffer<f32>>,
    q8: Vec<Q8<Cuda>>,
    hidden: moe::Hidden<Cuda>,
    routing: Routing<Cuda>,
    /// Of the shared expert, and of a dense feed-forward.
    shared: Routing<Cuda>,
    dense: Routing<Cuda>,
    /// The lowest token with a NaN among its router logits.
    bad_token: Buffer<i64>,
    /// It says that there is none.
    none_bad: bool,
    pub batch: BatchIndices,
    pub graphs: Graphs,
}

/// Steps up to so many tokens are launched as graphs: their kernels are short.
const GRAPH_TOKENS: usize = 64;
/// Kinds of steps whose graphs are kept.
const GRAPHS: usize = 4;

/// Graphs of the latest kinds of steps.
#[derive(Debug)]
pub(crate) struct Graphs {
    pub on: bool,
    kept: Vec<(Kind, Graph)>,
    /// Steps that were launched as a whole.
    pub launches: u64,
}

/// What steps have in common whose kernels are likely the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Kind {
    tokens: usize,
    sequences: usize,
    wanted: usize,
    quantize: bool,
}

impl Kind {
    /// `None`: such steps are no graphs.
    pub fn of(packed: &Packed, wanted: usize) -> Option<Kind> {
        let (tokens, sequences) = (packed.tokens, packed.slots.len());
        let suits = tokens <= GRAPH_TOKENS && !packed.steps;
        suits.then_some(Kind { tokens, sequences, wanted, quantize: packed.quantize })
    }
}

impl Graphs {
    /// `Q3N_CUDA_GRAPHS=0` turns them off.
    fn new() -> Graphs {
        let on = std::env::var_os("Q3N_CUDA_GRAPHS").is_none_or(|value| value != "0");
        Graphs { on, kept: Vec::new(), launches: 0 }
    }

    /// That of such steps, or a new one.
    pub fn take(&mut self, kind: Kind) -> Graph {
        let known = self.kept.iter().position(|(other, _)| *other == kind);
        known.map(|i| self.kept.remove(i).1).unwrap_or_default()
    }

    /// Keeps it, in the place of the one that has not been used for longest.
    pub fn give(&mut self, kind: Kind, graph: Graph) {
        if self.kept.len() == GRAPHS {
            self.kept.remove(0);
        }
        self.kept.push((kind, graph));
    }
}

/// What the device knows of a ubatch, as [`Packed`] has it.
#[derive(Debug)]
pub(crate) struct BatchIndices {
    cu_seqlens: Indices,
    slots: Indices,
    positions: Indices,
    lengths: Indices,
    /// Rows that yield logits.
    wanted: Indices,
}

impl Work {
    pub fn new(device: &Device) -> Result<Work, Error> {
        let none = || device.indices(&[]);
        Ok(Work {
            stream: Arc::new(device.stream()?),
            floats: Vec::new(),
            q8: Vec::new(),
            hidden: moe::Hidden::on(device)?,
            routing: Routing::on(device)?,
            shared: Routing::on(device)?,
            dense: Routing::on(device)?,
            bad_token: device.upload(&[i64::MAX])?,
            none_bad: true,
            graphs: Graphs::new(),
            batch: BatchIndices {
                cu_seqlens: none()?,
                slots: none()?,
                positions: none()?,
                lengths: none()?,
                wanted: none()?,
            },
        })
    }

    /// Before a ubatch, of which the rows `wanted` yield logits.
    pub fn begin(&mut self, packed: &Packed, wanted: &[i64]) -> Result<(), Error> {
        let BatchIndices { cu_seqlens, slots, positions, lengths, wanted: rows } = &mut self.batch;
        Indices::replace_all(
            [cu_seqlens, slots, positions, lengths, rows],
            [&packed.cu_seqlens, &packed.slots, &packed.positions, &packed.lengths, wanted],
        )?;
        if !std::mem::take(&mut self.none_bad) {
            self.bad_token.write(&[i64::MAX])?;
        }
        Ok(())
    }

    /// After a ubatch: waits for it. The error of a NaN among router logits names the first such token.
    pub fn end(&mut self, tokens: usize) -> Result<(), Error> {
        let bad = self.bad_token.download()?[0];
        self.none_bad = bad == i64::MAX;
        match usize::try_from(bad) {
            Ok(token) if token < tokens => {
                Err(qwen3next_kernels::Error::Nan { operator: "moe_route", arg: "logits", token }.into())
            }
            _ => Ok(()),
        }
    }

    /// `n` floats with any contents, perhaps more.
    pub fn take(&mut self, n: usize) -> Result<Buffer<f32>, Error> {
        // The smallest that is large enough, else the largest.
        let fits = self.floats.partition_point(|buffer| buffer.len() < n);
        let best = if fits < self.floats.len() { Some(fits) } else { fits.checked_sub(1) };
        let mut buffer = match best {
            Some(i) => self.floats.remove(i),
            None => self.stream.device().zeros(n)?,
        };
        buffer.reserve(n)?;
        Ok(buffer)
    }

    /// Gives buffers back.
    pub fn give(&mut self, buffers: impl IntoIterator<Item = Buffer<f32>>) {
        for buffer in buffers {
            let order = |buffer: &Buffer<f32>| (buffer.len(), buffer.id());
            let i = self.floats.partition_point(|other| order(other) < order(&buffer));
            self.floats.insert(i, buffer);
        }
    }
}

/// Rows of f32 and the same quantised for those weights that want it, as `ubatch::Input`.
struct Input<'a> {
    floats: DeviceView<'a, 2>,
    quantized: Vec<Q8<Cuda>>,
}

impl<'a> Input<'a> {
    fn new<'w>(
        floats: DeviceView<'a, 2>,
        quantize: bool,
        weights: impl IntoIterator<Item = &'w Matrix>,
        work: &mut Work,
    ) -> Result<Self, Error> {
        let mut input = Input { floats, quantized: Vec::new() };
        for dtype in weights.into_iter().map(|w| w.dtype().activations()) {
            if quantize && dtype != DType::F32 && input.quantized.iter().all(|q| q.dtype() != dtype) {
                let mut q = match work.q8.pop() {
                    Some(q) => q,
                    None => Q8::on(work.stream.device())?,
                };
                q.queue(dtype, floats, &work.stream)?;
                input.quantized.push(q);
            }
        }
        Ok(input)
    }

    /// The rows as these weights take them: quantised where all of them share a type.
    fn rows(&self, weights: &[&Matrix]) -> Rows<'_, Cuda> {
        let suits = |q: &&Q8<Cuda>| weights.iter().all(|w| w.dtype().activations() == q.dtype());
        self.quantized.iter().find(suits).map_or(self.floats.into(), Rows::from)
    }

    fn give(self, work: &mut Work) {
        // In the order they were in.
        work.q8.extend(self.quantized.into_iter().rev());
    }
}

/// y = x Wᵀ for packed rows.
fn project(w: &Matrix, x: &Input, y: &mut Buffer<f32>, stream: &Stream) -> Result<(), Error> {
    let x = x.rows(&[w]);
    let [rows, _] = x.shape();
    Ok(matmul::queue(matmul::Args { y: y.view_mut([rows, w.rows()])?, x, w: w.view()? }, stream)?)
}

/// x += W y.
fn project_back(
    w: &Matrix,
    y: &Buffer<f32>,
    t: usize,
    quantize: bool,
    x: &mut Buffer<f32>,
    work: &mut Work,
) -> Result<(), Error> {
    let input = Input::new(y.view([t, w.cols()])?, quantize, [w], work)?;
    let mut out = work.take(t * w.rows())?;
    project(w, &input, &mut out, &work.stream)?;
    input.give(work);
    add_rows(x, &out, [t, w.rows()], &work.stream)?;
    work.give([out]);
    Ok(())
}

/// RMS norm of `t` packed rows.
pub(crate) fn norm_rows(
    y: &mut Buffer<f32>,
    x: &Buffer<f32>,
    t: usize,
    w: &Buffer<f32>,
    eps: f32,
    stream: &Stream,
) -> Result<(), Error> {
    let shape = [t, 1, w.len()];
    let kind = norm::Kind::Rms(Some(w.view([w.len()])?));
    Ok(norm::queue(norm::Args { y: y.view_mut(shape)?, x: Some(x.view(shape)?), kind, eps }, stream)?)
}

/// x += y.
pub(crate) fn add_rows(x: &mut Buffer<f32>, y: &Buffer<f32>, shape: [usize; 2], stream: &Stream) -> Result<(), Error> {
    Ok(add::queue(add::Args { y: x.view_mut(shape)?, x: y.view(shape)? }, stream)?)
}

/// The logits of the `n` wanted rows of x, `[T][hidden]`.
pub(crate) fn logits(
    w: &Output,
    x: &Buffer<f32>,
    t: usize,
    n: usize,
    quantize: bool,
    eps: f32,
    work: &mut Work,
) -> Result<Buffer<f32>, Error> {
    let (width, vocab) = (w.matrix.cols(), w.matrix.rows());
    let (mut rows, mut normed, mut out) = (work.take(n * width)?, work.take(n * width)?, work.take(n * vocab)?);
    let ids = &work.batch.wanted;
    gather::queue(gather::Args { y: rows.view_mut([n, width])?, table: x.weight([t, width])?, ids }, &work.stream)?;
    norm_rows(&mut normed, &rows, n, &w.norm, eps, &work.stream)?;
    let input = Input::new(normed.view([n, width])?, quantize, [&w.matrix], work)?;
    project(&w.matrix, &input, &mut out, &work.stream)?;
    input.give(work);
    work.give([rows, normed]);
    Ok(out)
}

/// Where the memory of a layer must lie for this module.
fn misplaced() -> Error {
    Error::argument("state", "has a layer in other memory than the model")
}

/// `delta_layer::add` on the device.
#[allow(clippy::too_many_arguments)]
pub(crate) fn delta(
    config: &Config,
    w: &Delta,
    (windows, states): (&mut Floats, &mut Floats),
    packed: &Packed,
    normed: &Buffer<f32>,
    work: &mut Work,
    x: &mut Buffer<f32>,
    steps: &mut [Vec<f32>],
) -> Result<(), Error> {
    let (Floats::Cuda(windows), Floats::Cuda(states)) = (windows, states) else { return Err(misplaced()) };
    let d = &config.delta;
    let (t, hk, hv, kd, vd) = (packed.tokens, d.k_heads, d.v_heads, d.k_dim, d.v_dim);
    let (channels, values, window) = (d.conv_channels(), d.value_channels(), d.conv_width - 1);

    let input = Input::new(normed.view([t, config.hidden])?, packed.quantize, [&w.qkv, &w.z, &w.ba], work)?;
    let (mut qkv, mut z, mut ba) = (work.take(t * channels)?, work.take(t * values)?, work.take(t * 2 * hv)?);
    project(&w.qkv, &input, &mut qkv, &work.stream)?;
    project(&w.z, &input, &mut z, &work.stream)?;
    project(&w.ba, &input, &mut ba, &work.stream)?;
    input.give(work);

    let (mut mixed, mut window_steps) = (work.take(t * channels)?, work.take(steps.len() * channels * window)?);
    let slots = windows.len() / (channels * window).max(1);
    let conv = causal_conv::Args {
        y: mixed.view_mut([1, t, channels])?,
        x: qkv.view([1, t, channels])?,
        w: w.conv.view([channels, d.conv_width])?,
        bias: None,
        state: match window {
            0 => causal_conv::State::Zeros,
            _ => causal_conv::State::InPlace(windows.view_mut([slots, channels, window])?),
        },
        snapshots: match steps.is_empty() || window == 0 {
            true => None,
            false => Some(window_steps.view_mut([1, t, channels, window])?),
        },
        slot_in: (window > 0).then_some(&work.batch.slots),
        slot_out: (window > 0).then_some(&work.batch.slots),
        cu_seqlens: Some(&work.batch.cu_seqlens),
        silu: true,
    };
    causal_conv::queue(conv, &work.stream)?;

    let (mut g, mut beta, mut o) = (work.take(t * hv)?, work.take(t * hv)?, work.take(t * values)?);
    let gates = delta_gates::Args {
        g: g.view_mut([t, hv])?,
        beta: beta.view_mut([t, hv])?,
        ba: ba.view([t, 2 * hv])?,
        a: w.a.view([hv])?,
        dt_bias: w.dt_bias.view([hv])?,
        k_heads: hk,
    };
    delta_gates::queue(gates, &work.stream)?;

    let mut state_steps = work.take(steps.len() * hv * vd * kd)?;
    let keys = hk * kd;
    let slots = states.len() / (hv * vd * kd);
    let heads = |from: usize, h: usize, width: usize| {
        mixed.view_from(from, [1, t, h, width], [t * channels, channels, width, 1])
    };
    let rule = gated_delta::Args {
        o: o.view_mut([1, t, hv, vd])?,
        snapshots: match steps.is_empty() {
            true => None,
            false => Some(state_steps.view_mut([1, t, hv, vd, kd])?),
        },
        state: gated_delta::State::InPlace {
            pool: states.view_mut([slots, hv, vd, kd])?,
            slots: Some(&work.batch.slots),
        },
        q: heads(0, hk, kd)?,
        k: heads(keys, hk, kd)?,
        v: heads(2 * keys, hv, vd)?,
        gate: Gate::Scalar(LogDecay::unchecked(g.view([1, t, hv])?)),
        beta: beta.view([1, t, hv])?,
        cu_seqlens: Some(&work.batch.cu_seqlens),
        head_map: match d.head_map {
            HeadMap::Grouped => gated_delta::HeadMap::Grouped,
            HeadMap::Tiled => gated_delta::HeadMap::Tiled,
        },
        qk_l2norm: Some(gated_delta::L2_NORM_EPS),
        scale: (1.0 / (kd as f64).sqrt()) as f32,
    };
    gated_delta::queue(rule, &work.stream)?;

    let kind = norm::Kind::RmsGated { w: Some(w.norm.view([vd])?), z: z.view([t, hv, vd])? };
    let args = norm::Args { y: o.view_mut([t, hv, vd])?, x: None, kind, eps: config.norm_eps };
    norm::queue(args, &work.stream)?;
    project_back(&w.out, &o, t, packed.quantize, x, work)?;

    if !steps.is_empty() {
        let windows = window_steps.download_at(0, t * channels * window)?;
        let states = state_steps.download_at(0, t * hv * vd * kd)?;
        for (i, step) in steps.iter_mut().enumerate() {
            step.extend_from_slice(&windows[i * channels * window..(i + 1) * channels * window]);
            step.extend_from_slice(&states[i * hv * vd * kd..(i + 1) * hv * vd * kd]);
        }
    }
    work.give([qkv, z, ba, mixed, window_steps, g, beta, o, state_steps]);
    Ok(())
}

/// `attention_layer::add` on the device.
#[allow(clippy::too_many_arguments)]
pub(crate) fn attention(
    config: &Config,
    w: &Attention,
    (keys, values): (&mut Cache, &mut Cache),
    packed: &Packed,
    normed: &Buffer<f32>,
    work: &mut Work,
    x: &mut Buffer<f32>,
) -> Result<(), Error> {
    let (Cache::Cuda(keys), Cache::Cuda(values)) = (keys, values) else { return Err(misplaced()) };
    let a = &config.attention;
    let (t, hq, hkv, d) = (packed.tokens, a.heads, a.kv_heads, a.head_dim);
    let slots = keys.len() / (packed.capacity * hkv * d).max(1);

    // Per head the D channels of q, then the D channels of the gate.
    let input = Input::new(normed.view([t, config.hidden])?, packed.quantize, [&w.q, &w.k, &w.v], work)?;
    let (mut qg, mut k, mut v) = (work.take(t * hq * 2 * d)?, work.take(t * hkv * d)?, work.take(t * hkv * d)?);
    project(&w.q, &input, &mut qg, &work.stream)?;
    project(&w.k, &input, &mut k, &work.stream)?;
    project(&w.v, &input, &mut v, &work.stream)?;
    input.give(work);

    prepare(config, &mut qg, [t, hq, d], 2 * d, &w.q_norm, work)?;
    prepare(config, &mut k, [t, hkv, d], d, &w.k_norm, work)?;

    let pool = [slots, packed.capacity, hkv * d];
    for (cache, rows) in [(&mut *keys, &k), (&mut *values, &v)] {
        let args = kv_store::Args {
            cache: cache.store(pool)?,
            x: rows.view([t, hkv * d])?,
            slot: &work.batch.slots,
            pos: &work.batch.positions,
            cu_seqlens: &work.batch.cu_seqlens,
        };
        kv_store::queue(args, &work.stream)?;
    }

    let mut o = work.take(t * hq * d)?;
    let cache = [slots, packed.capacity, hkv, d];
    let strides = [t * hq * 2 * d, hq * 2 * d, 2 * d, 1];
    let args = attention::Args {
        o: o.view_mut([1, t, hq, d])?,
        lse: None,
        q: qg.view_strided([1, t, hq, d], strides)?,
        k: keys.view(cache)?,
        v: values.view(cache)?,
        gate: Some(qg.view_from(d, [1, t, hq, d], strides)?),
        mask: None,
        sinks: None,
        slot: Some(&work.batch.slots),
        kv_len: Some(&work.batch.lengths),
        cu_seqlens: Some(&work.batch.cu_seqlens),
        causal: true,
        scale: (1.0 / (d as f64).sqrt()) as f32,
        window: None,
    };
    attention::queue(args, &work.stream)?;
    project_back(&w.o, &o, t, packed.quantize, x, work)?;
    work.give([qg, k, v, o]);
    Ok(())
}

/// Norms and rotates every head in place; heads lie `stride` apart.
fn prepare(
    config: &Config,
    heads: &mut Buffer<f32>,
    shape: [usize; 3],
    stride: usize,
    w: &Buffer<f32>,
    work: &Work,
) -> Result<(), Error> {
    let (a, strides) = (&config.attention, [shape[1] * stride, stride, 1]);
    let kind = norm::Kind::Rms(Some(w.view([w.len()])?));
    let y = heads.view_mut_strided(shape, strides)?;
    norm::queue(norm::Args { y, x: None, kind, eps: config.norm_eps }, &work.stream)?;
    let y = heads.view_mut_strided(shape, strides)?;
    let args = rope::Args { y, x: None, pos: &work.batch.positions, base: a.rope_base, rotary: a.rotary };
    Ok(rope::queue(args, &work.stream)?)
}

/// `moe_layer::add` on the device.
pub(crate) fn ffn(
    config: &Config,
    w: &DeviceFfn,
    packed: &Packed,
    normed: &Buffer<f32>,
    work: &mut Work,
    x: &mut Buffer<f32>,
) -> Result<(), Error> {
    let (t, width) = (packed.tokens, config.hidden);
    let rows = normed.view([t, width])?;
    let own = [&w.experts.gate, &w.experts.up].into_iter().chain(&w.router);
    let weights = own.chain(w.shared.iter().flat_map(|(s, _)| [&s.gate, &s.up]));
    let input = Input::new(rows, packed.quantize, weights, work)?;
    let device = work.stream.device().clone();
    match &w.router {
        None => {
            if work.dense.tokens() != t {
                work.dense = Routing::upload(&device, &Routing::dense(t, None)?)?;
            }
            feed(&w.experts, &work.dense, &input, &mut work.hidden, x, &work.stream)?;
        }
        Some(router) => {
            let experts = config.moe.experts;
            let mut logits = work.take(t * experts)?;
            project(router, &input, &mut logits, &work.stream)?;
            let (rows_of, bad) = (logits.view([t, experts])?, work.bad_token.view_mut([1])?);
            work.routing.queue_route(rows_of, config.moe.top_k, config.moe.normalize, bad, &work.stream)?;
            work.give([logits]);
            feed(&w.experts, &work.routing, &input, &mut work.hidden, x, &work.stream)?;
            if let Some((expert, gate)) = &w.shared {
                let y = work.shared.dense_on(t, &device)?;
                row_gate::queue(row_gate::Args { y, x: rows, w: gate.view([width])? }, &work.stream)?;
                feed(expert, &work.shared, &input, &mut work.hidden, x, &work.stream)?;
            }
        }
    }
    input.give(work);
    Ok(())
}

/// x += experts(input).
fn feed(
    w: &Swiglu,
    routing: &Routing<Cuda>,
    input: &Input,
    hidden: &mut moe::Hidden<Cuda>,
    x: &mut Buffer<f32>,
    stream: &Stream,
) -> Result<(), Error> {
    let args = moe::Args {
        y: x.view_mut([routing.tokens(), w.gate.cols()])?,
        x: input.rows(&[&w.gate, &w.up]),
        gate: w.gate.experts()?,
        up: w.up.experts()?,
        down: w.down.experts()?,
        routing,
        accumulate: true,
        h: hidden,
    };
    Ok(moe::queue(args, stream)?)
}
