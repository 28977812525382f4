//! The forward pass: tokens in, logits out, for any cut of a batch into ubatches.

use crate::attention_layer;
use crate::cache::{Cache, Floats};
use crate::config::Config;
use crate::delta_layer;
#[cfg(feature = "device")]
use crate::device_layers::{self, Kind, Work};
use crate::error::Error;
use crate::moe_layer;
#[cfg(feature = "device")]
use crate::offload::{DeviceMixer, Offloaded, Placement};
use crate::state::{CacheTypes, LayerState, State};
use crate::ubatch::{norm_rows, project_rows, Buffers, Packed};
use crate::weights::{Mixer, Weights};
#[cfg(feature = "device")]
use qwen3next_kernels::device::{Buffer, Device};
use qwen3next_kernels::quant::dequantize;
use qwen3next_kernels::{gated_delta, Exec, Operator, Variant, ViewMut, Weight};
use std::sync::OnceLock;

/// Which implementation of the delta rule runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FusedDelta {
    /// 0: the graph of primitive operators with a triangular solve in it, the strict baseline.
    Never,
    /// 1: the fused kernels where a sequence has more than one token in the ubatch.
    Prefill,
    /// 2: the fused kernels.
    #[default]
    Always,
}

impl FusedDelta {
    /// From the number on the command line.
    pub fn from_number(number: u32) -> Option<FusedDelta> {
        [FusedDelta::Never, FusedDelta::Prefill, FusedDelta::Always].get(number as usize).copied()
    }
}

/// What quantised weights meet; f32, f16 and bf16 weights always meet f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activations {
    /// f32: no error but that of the sums.
    #[default]
    F32,
    /// 8 bits a value, with a scale a block: several times faster.
    Q8,
}

/// How a forward pass runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Tokens that go through the layers together, at least 1.
    pub ubatch: usize,
    /// Implementation of the delta rule.
    pub fused_delta: FusedDelta,
    /// What quantised weights meet.
    pub activations: Activations,
}

impl Default for Options {
    fn default() -> Self {
        Options { ubatch: 512, fused_delta: FusedDelta::default(), activations: Activations::default() }
    }
}

/// Tokens to read, by sequence, and which of them should yield logits.
#[derive(Debug, Clone, Default)]
pub struct Batch<'a> {
    spans: Vec<Span<'a>>,
}

#[derive(Debug, Clone, Copy)]
struct Span<'a> {
    slot: usize,
    tokens: &'a [u32],
    /// The first token whose logits are wanted.
    from: usize,
}

impl<'a> Batch<'a> {
    /// These tokens after what `slot` has read; logits of the last one.
    pub fn one(slot: usize, tokens: &'a [u32]) -> Self {
        Batch::default().and(slot, tokens)
    }

    /// Also these tokens in another slot; logits of the last one.
    pub fn and(mut self, slot: usize, tokens: &'a [u32]) -> Self {
        self.spans.push(Span { slot, tokens, from: tokens.len().saturating_sub(1) });
        self
    }

    /// Logits from this position (within the tokens given) on, in the sequence added last; 0 is all.
    pub fn logits_from(mut self, from: usize) -> Self {
        if let Some(span) = self.spans.last_mut() {
            span.from = from.min(span.tokens.len());
        }
        self
    }

    /// Rows of logits that this batch yields.
    pub fn rows(&self) -> usize {
        self.spans.iter().map(|s| s.tokens.len() - s.from).sum()
    }
}

/// Tokens of one ubatch that belong to one sequence.
#[derive(Debug, Clone, Copy)]
struct Piece<'a> {
    slot: usize,
    tokens: &'a [u32],
    from: usize,
}

/// A model ready to run.
pub struct Model {
    config: Config,
    weights: Weights,
    /// See [`Model::fingerprint`].
    fingerprint: OnceLock<u64>,
    /// The fused delta rule, where not the variant that dispatch picks.
    delta: Exec<gated_delta::Op>,
    /// Layers on a device.
    #[cfg(feature = "device")]
    offloaded: Option<Offloaded>,
}

impl Model {
    /// A model of loaded weights.
    pub fn new(config: Config, weights: Weights) -> Model {
        Model {
            config,
            weights,
            fingerprint: OnceLock::new(),
            delta: Exec::default(),
            #[cfg(feature = "device")]
            offloaded: None,
        }
    }

    /// Copies layers to a device, where they are computed from now on, as they are: before a [`Model::repack`]. `progress`
    /// gets bytes done and in all. Errors: not enough memory there, naming the part.
    #[cfg(feature = "device")]
    pub fn offload(
        &mut self,
        device: &Device,
        placement: Placement,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), Error> {
        self.offloaded = None;
        self.offloaded = Some(Offloaded::upload(&self.config, &self.weights, device, placement, progress)?);
        Ok(())
    }

    /// Empty memory for `slots` sequences of up to `capacity` tokens, where the layers lie.
    pub fn state(&self, slots: usize, capacity: usize, cache: CacheTypes) -> Result<State, Error> {
        #[allow(unused_mut)]
        let mut state = State::with_cache(&self.config, slots, capacity, cache)?;
        #[cfg(feature = "device")]
        if let Some(o) = &self.offloaded {
            state.offload(&o.device, o.first, cache)?;
        }
        Ok(state)
    }

    /// The first layer that lies on a device.
    fn first_on_device(&self) -> usize {
        #[cfg(feature = "device")]
        if let Some(o) = &self.offloaded {
            return o.first;
        }
        usize::MAX
    }

    /// Runs this variant wherever the delta rule is fused, in the place of the one that dispatch picks.
    pub fn set_delta(&mut self, variant: Variant<gated_delta::Op>) {
        self.delta = Exec::variant(variant);
    }

    /// [`Weights::repack`] of what the CPU computes with.
    pub fn repack(&mut self, progress: &mut dyn FnMut(u64, u64)) {
        // Of the bytes as the file has them: the answers are the same.
        self.fingerprint();
        #[cfg(feature = "device")]
        if let Some(o) = &self.offloaded {
            let on_cpu = |i: usize, ffn: bool| o.layer(i).is_none_or(|layer| ffn && layer.ffn.is_none());
            return self.weights.repack_those(on_cpu, o.output.is_none(), progress);
        }
        self.weights.repack(progress);
    }

    /// Its sizes.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// A number that tells this model from others: its sizes, vectors, and samples of its matrices.
    pub fn fingerprint(&self) -> u64 {
        *self.fingerprint.get_or_init(|| crate::fingerprint::of(&self.config, &self.weights))
    }

    /// Reads a batch and returns the wanted logits, `[rows][vocab]`, sequence by sequence.
    ///
    /// Errors: a token outside the vocabulary, a slot that does not exist, is full or comes twice, an empty sequence
    /// (nothing has been read then); a NaN among router logits (the slots of the batch must then be cleared or restored).
    pub fn forward(&self, state: &mut State, batch: &Batch, options: &Options) -> Result<Vec<f32>, Error> {
        let mut logits = Vec::new();
        self.forward_each(state, batch, options, |rows| {
            logits.extend_from_slice(rows);
            Ok::<(), Error>(())
        })?;
        Ok(logits)
    }

    /// As [`Model::forward`], handing over the logits ubatch by ubatch.
    pub fn forward_each<E: From<Error>>(
        &self,
        state: &mut State,
        batch: &Batch,
        options: &Options,
        mut each: impl FnMut(&[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.check(state, batch, options)?;
        batch.spans.iter().try_for_each(|span| state.begin(span.slot))?;
        for pieces in cut(batch, options.ubatch, state.depth()) {
            let logits = match self.ubatch(state, &pieces, options) {
                Ok(logits) => logits,
                Err(e) => {
                    pieces.iter().for_each(|piece| state.spoil(piece.slot));
                    return Err(e.into());
                }
            };
            let done = if logits.is_empty() { Ok(()) } else { each(&logits) };
            state.buffers.give(logits);
            done?;
        }
        Ok(())
    }

    fn check(&self, state: &State, batch: &Batch, options: &Options) -> Result<(), Error> {
        if options.ubatch == 0 {
            return Err(Error::argument("ubatch", "is 0, expected at least 1"));
        }
        state.expect_model(&self.config, self.first_on_device())?;
        if self.first_on_device() < self.config.layers.len() && options.fused_delta != FusedDelta::Always {
            let why = "is not 2: the unfused graph runs on the CPU, and layers of the model lie on a device";
            return Err(Error::argument("fused_delta", why));
        }
        for (i, span) in batch.spans.iter().enumerate() {
            state.expect_room(span.slot, span.tokens.len())?;
            if span.tokens.is_empty() {
                return Err(Error::argument("tokens", format!("of slot {} are empty", span.slot)));
            }
            if batch.spans[..i].iter().any(|other| other.slot == span.slot) {
                return Err(Error::argument("slot", format!("{} comes twice in the batch", span.slot)));
            }
            if let Some(&id) = span.tokens.iter().find(|&&t| t as usize >= self.config.vocab) {
                return Err(Error::Token { id, vocab: self.config.vocab });
            }
        }
        Ok(())
    }

    fn ubatch(&self, state: &mut State, pieces: &[Piece], options: &Options) -> Result<Vec<f32>, Error> {
        let packed = pack(state, pieces, options, &self.delta)?;
        let (n, width) = (packed.tokens, self.config.hidden);
        let mut buffers = std::mem::take(&mut state.buffers);
        let mut x = buffers.take(n * width);
        self.embed(pieces, &mut x)?;
        let mut normed = buffers.take(n * width);
        let mut steps: Vec<Vec<f32>> = vec![Vec::new(); if packed.steps { n } else { 0 }];
        let on_cpu = self.weights.layers.len().min(self.first_on_device());
        for (layer, memory) in self.weights.layers.iter().zip(&mut state.layers).take(on_cpu) {
            norm_rows(&mut normed, &x, width, &layer.attn_norm, self.config.norm_eps)?;
            match (&layer.mixer, memory) {
                (Mixer::Delta(w), LayerState::Delta { conv: Floats::Cpu(conv), delta: Floats::Cpu(delta) }) => {
                    delta_layer::add(&self.config, w, conv, delta, &packed, &normed, &mut buffers, &mut x, &mut steps)?;
                }
                (Mixer::Attention(w), LayerState::Attention { k: Cache::Cpu(k), v: Cache::Cpu(v) }) => {
                    attention_layer::add(&self.config, w, k, v, &packed, &normed, &mut buffers, &mut x)?;
                }
                _ => return Err(Error::argument("state", "is of a model with other layer kinds")),
            }
            norm_rows(&mut normed, &x, width, &layer.post_attention_norm, self.config.norm_eps)?;
            moe_layer::add(&self.config, &layer.ffn, packed.quantize, &normed, &mut buffers, &mut x)?;
        }
        #[cfg(feature = "device")]
        let logits = match &self.offloaded {
            Some(o) => self.through_device(o, state, pieces, &packed, &mut buffers, &mut x, &mut steps)?,
            None => None,
        };
        #[cfg(not(feature = "device"))]
        let logits = None;
        for (b, piece) in pieces.iter().enumerate() {
            let (begin, end) = (packed.cu_seqlens[b] as usize, packed.cu_seqlens[b + 1] as usize);
            let own =
                if packed.steps { steps[begin..end].iter_mut().map(std::mem::take).collect() } else { Vec::new() };
            state.advance(piece.slot, piece.tokens.len(), own);
        }
        let logits = match logits {
            Some(logits) => logits,
            None => self.logits(pieces, &x, packed.quantize, &mut buffers)?,
        };
        buffers.give(x);
        buffers.give(normed);
        state.buffers = buffers;
        Ok(logits)
    }

    /// The layers on the device: x goes there, and comes back unless the output matrix is there too, which makes the
    /// logits.
    #[cfg(feature = "device")]
    #[allow(clippy::too_many_arguments)]
    fn through_device(
        &self,
        o: &Offloaded,
        state: &mut State,
        pieces: &[Piece],
        packed: &Packed,
        buffers: &mut Buffers,
        x: &mut [f32],
        steps: &mut [Vec<f32>],
    ) -> Result<Option<Vec<f32>>, Error> {
        let (t, work) = (packed.tokens, device_work(state)?);
        let mut wanted = Vec::new();
        for (b, piece) in pieces.iter().enumerate() {
            let first = packed.cu_seqlens[b];
            wanted.extend((piece.from..piece.tokens.len()).map(|i| first + i as i64));
        }
        work.begin(packed, &wanted)?;
        let mut there = work.take(x.len())?;
        there.write_at(0, x)?;
        let whole = work.graphs.on && o.layers.iter().all(|layer| layer.ffn.is_some());
        let (there, out) = match Kind::of(packed, wanted.len()).filter(|_| whole) {
            None => self.on_device(o, state, packed, wanted.len(), buffers, there, steps)?,
            Some(kind) => {
                let (stream, mut graph) = (work.stream.clone(), work.graphs.take(kind));
                let before = graph.launches();
                let queue = || self.on_device(o, state, packed, wanted.len(), buffers, there, steps);
                let queued = stream.repeat(&mut graph, queue)?;
                let graphs = &mut device_work(state)?.graphs;
                graphs.launches += graph.launches() - before;
                graphs.give(kind, graph);
                queued
            }
        };
        let work = device_work(state)?;
        let logits = match (&o.output, out) {
            (None, _) => {
                x.copy_from_slice(&there.download_at(0, x.len())?);
                None
            }
            (Some(_), None) => Some(Vec::new()),
            (Some(_), Some(out)) => {
                let logits = out.download_at(0, wanted.len() * self.config.vocab)?;
                work.give([out]);
                Some(logits)
            }
        };
        work.give([there]);
        work.end(t)?;
        Ok(logits)
    }

    /// Queues the layers, which x goes through, and the logits of the `wanted` rows if there are any and the output matrix
    /// is there.
    #[cfg(feature = "device")]
    #[allow(clippy::too_many_arguments)]
    fn on_device(
        &self,
        o: &Offloaded,
        state: &mut State,
        packed: &Packed,
        wanted: usize,
        buffers: &mut Buffers,
        mut there: Buffer<f32>,
        steps: &mut [Vec<f32>],
    ) -> Result<(Buffer<f32>, Option<Buffer<f32>>), Error> {
        let (t, width, eps) = (packed.tokens, self.config.hidden, self.config.norm_eps);
        let Some(work) = &mut state.work else { return Err(no_work()) };
        let mut normed = work.take(t * width)?;
        for (i, memory) in state.layers.iter_mut().enumerate().skip(o.first) {
            let Some(layer) = o.layer(i) else { break };
            device_layers::norm_rows(&mut normed, &there, t, &layer.attn_norm, eps, &work.stream)?;
            match (&layer.mixer, memory) {
                (DeviceMixer::Delta(w), LayerState::Delta { conv, delta }) => {
                    let memory = (conv, delta);
                    device_layers::delta(&self.config, w, memory, packed, &normed, work, &mut there, steps)?;
                }
                (DeviceMixer::Attention(w), LayerState::Attention { k, v }) => {
                    device_layers::attention(&self.config, w, (k, v), packed, &normed, work, &mut there)?;
                }
                _ => return Err(Error::argument("state", "is of a model with other layer kinds")),
            }
            device_layers::norm_rows(&mut normed, &there, t, &layer.post_attention_norm, eps, &work.stream)?;
            match &layer.ffn {
                Some(ffn) => device_layers::ffn(&self.config, ffn, packed, &normed, work, &mut there)?,
                None => {
                    // The experts are the CPU's: their input goes there, their sum comes back.
                    let input = normed.download_at(0, t * width)?;
                    let mut sum = buffers.take(t * width);
                    sum.fill(0.0);
                    moe_layer::add(
                        &self.config,
                        &self.weights.layers[i].ffn,
                        packed.quantize,
                        &input,
                        buffers,
                        &mut sum,
                    )?;
                    normed.write_at(0, &sum)?;
                    buffers.give(sum);
                    device_layers::add_rows(&mut there, &normed, [t, width], &work.stream)?;
                }
            }
        }
        let out = match &o.output {
            Some(output) if wanted > 0 => {
                Some(device_layers::logits(output, &there, t, wanted, packed.quantize, eps, work)?)
            }
            _ => None,
        };
        work.give([normed]);
        Ok((there, out))
    }

    fn embed(&self, pieces: &[Piece], x: &mut [f32]) -> Result<(), Error> {
        let width = self.config.hidden;
        let table = &self.weights.token_embd;
        let ids = pieces.iter().flat_map(|p| p.tokens);
        for (row, &id) in x.chunks_exact_mut(width).zip(ids) {
            let bytes = table.bytes().get(id as usize * table.row_bytes()..).unwrap_or(&[]);
            let one = Weight::new(bytes, table.dtype(), [1, width])?;
            dequantize::run(dequantize::Args { y: ViewMut::new(row, [1, width])?, x: one }, &Exec::default())?;
        }
        Ok(())
    }

    fn logits(&self, pieces: &[Piece], x: &[f32], quantize: bool, buffers: &mut Buffers) -> Result<Vec<f32>, Error> {
        let (width, vocab) = (self.config.hidden, self.config.vocab);
        let mut rows = buffers.take(0);
        let mut at = 0;
        for piece in pieces {
            rows.extend_from_slice(&x[(at + piece.from) * width..(at + piece.tokens.len()) * width]);
            at += piece.tokens.len();
        }
        let n = rows.len() / width;
        if n == 0 {
            buffers.give(rows);
            return Ok(Vec::new());
        }
        let mut normed = buffers.take(n * width);
        norm_rows(&mut normed, &rows, width, &self.weights.output_norm, self.config.norm_eps)?;
        let mut logits = buffers.take(n * vocab);
        project_rows(&self.weights.output, &normed, &mut logits, quantize, buffers)?;
        buffers.give(rows);
        buffers.give(normed);
        Ok(logits)
    }
}

/// Cuts a batch into ubatches of at most `size` tokens. Where states are kept for a rollback by `depth` tokens, a
/// sequence's last `depth` tokens stand apart, so that only those ubatches store a state a token.
fn cut<'a>(batch: &Batch<'a>, size: usize, depth: usize) -> Vec<Vec<Piece<'a>>> {
    let mut ubatches: Vec<Vec<Piece>> = Vec::new();
    let mut room = 0;
    let mut add = |slot, tokens: &'a [u32], from: usize, fresh: bool| {
        let mut at = 0;
        while at < tokens.len() {
            if room == 0 || (fresh && at == 0) {
                ubatches.push(Vec::new());
                room = size;
            }
            let take = room.min(tokens.len() - at);
            let piece = Piece { slot, tokens: &tokens[at..at + take], from: from.clamp(at, at + take) - at };
            if let Some(last) = ubatches.last_mut() {
                last.push(piece);
            }
            at += take;
            room -= take;
        }
    };
    if depth == 0 {
        batch.spans.iter().for_each(|s| add(s.slot, s.tokens, s.from, false));
        return ubatches;
    }
    let split = |s: &Span| s.tokens.len().saturating_sub(depth);
    for (i, s) in batch.spans.iter().enumerate() {
        add(s.slot, &s.tokens[..split(s)], s.from.min(split(s)), i == 0);
    }
    for (i, s) in batch.spans.iter().enumerate() {
        add(s.slot, &s.tokens[split(s)..], s.from.saturating_sub(split(s)), i == 0);
    }
    ubatches
}

fn pack(state: &State, pieces: &[Piece], options: &Options, delta: &Exec<gated_delta::Op>) -> Result<Packed, Error> {
    let mut packed = Packed {
        tokens: 0,
        cu_seqlens: vec![0],
        slots: Vec::new(),
        positions: Vec::new(),
        lengths: Vec::new(),
        capacity: state.capacity(),
        steps: state.depth() > 0 && pieces.iter().all(|p| p.tokens.len() <= state.depth()),
        quantize: options.activations == Activations::Q8,
        delta: delta.clone(),
    };
    let mut longest = 0;
    for piece in pieces {
        let before = state.len(piece.slot)?;
        packed.tokens += piece.tokens.len();
        longest = longest.max(piece.tokens.len());
        packed.cu_seqlens.push(packed.tokens as i64);
        packed.slots.push(piece.slot as i64);
        packed.positions.extend((before..before + piece.tokens.len()).map(|p| p as i64));
        packed.lengths.push((before + piece.tokens.len()) as i64);
    }
    let fused = match options.fused_delta {
        FusedDelta::Never => false,
        FusedDelta::Prefill => longest > 1,
        FusedDelta::Always => true,
    };
    if !fused {
        packed.delta = Exec::variant(unfused()?);
    }
    Ok(packed)
}

/// Working memory on the device.
#[cfg(feature = "device")]
fn device_work(state: &mut State) -> Result<&mut Work, Error> {
    state.work.as_mut().ok_or_else(no_work)
}

#[cfg(feature = "device")]
fn no_work() -> Error {
    Error::argument("state", "is not on the model's device: make it by Model::state")
}

/// The variant of the delta rule that is composed of primitive operators.
fn unfused() -> Result<Variant<gated_delta::Op>, Error> {
    gated_delta::Op::variants()
        .into_iter()
        .find(|v| v.name().starts_with("unfused") && v.isa().available())
        .ok_or_else(|| Error::argument("fused_delta", "0 and 1 need the variant `unfused`, which is not built in"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ubatches_hold_every_token_once_and_in_order() {
        let (a, b, c): (Vec<u32>, Vec<u32>, Vec<u32>) = ((0..7).collect(), (10..11).collect(), (20..33).collect());
        for size in [1, 2, 3, 5, 100] {
            for depth in [0, 1, 4, 50] {
                let batch = Batch::one(2, &a).logits_from(3).and(0, &b).and(1, &c).logits_from(0);
                let ubatches = cut(&batch, size, depth);
                for (slot, want, from) in [(2, &a, 3), (0, &b, 0), (1, &c, 0)] {
                    let pieces: Vec<&Piece> = ubatches.iter().flatten().filter(|p| p.slot == slot).collect();
                    let got: Vec<u32> = pieces.iter().flat_map(|p| p.tokens).copied().collect();
                    assert_eq!(&got, want);
                    let logits: Vec<u32> = pieces.iter().flat_map(|p| &p.tokens[p.from..]).copied().collect();
                    assert_eq!(logits, want[from..]);
                }
                for u in &ubatches {
                    assert!(u.iter().map(|p| p.tokens.len()).sum::<usize>() <= size);
                    assert!(u.iter().all(|p| !p.tokens.is_empty()));
                    assert!((0..3).all(|slot| u.iter().filter(|p| p.slot == slot).count() <= 1));
                }
            }
        }
    }
}
