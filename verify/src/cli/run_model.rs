//! What `bench model` and `sweep` share: the settings a model runs with, flags of what is not there yet, and running it
//! on random tokens.

use super::model::{self, Loaded};
use anyhow::{bail, ensure, Context};
use qwen3next_kernels::DType;
use qwen3next_model::forward::{Activations, FusedDelta, Options};
use qwen3next_model::weights::{Ffn, Mixer, Swiglu, Tensor};
use qwen3next_model::{Batch, CacheTypes, Model, State};
use qwen3next_verify::peaks::{Peaks, Unit};
use qwen3next_verify::suite::{rng, Rng};
use rand::Rng as _;
use rayon::ThreadPool;
use std::path::PathBuf;
use std::time::Instant;

/// A flag and the values it may have so far.
pub struct Choice {
    flag: &'static str,
    /// The first is the default.
    values: &'static [&'static str],
    /// Why there are no others.
    why: &'static str,
}

/// Layers on a GPU.
pub const GPU_LAYERS: Choice = Choice { flag: "-ngl", values: &["0", "-1"], why: "built without the feature cuda" };
/// Layers whose experts stay on the CPU.
pub const CPU_MOE: Choice = Choice { flag: "--n-cpu-moe", values: &["0"], why: "built without the feature cuda" };
/// Flash attention.
pub const FLASH_ATTN: Choice =
    Choice { flag: "-fa", values: &["1", "on", "auto"], why: "attention is flash attention always" };
/// Weights in the file's memory map.
pub const MMAP: Choice =
    Choice { flag: "-mmp", values: &["1", "0"], why: "weights stay in the file's memory map or are read" };
/// Run-time repacking of weights.
pub const REPACK: Choice = Choice { flag: "-rtr", values: &["0", "1"], why: "rows are interleaved or not" };
/// What quantised weights meet.
pub const ACTIVATIONS: Choice =
    Choice { flag: "--activations", values: &["q8", "f32"], why: "activations are 8 bits a value or f32" };
const CACHES: &[&str] = &["f32", "f16", "bf16", "q8_0"];
/// Type of cached keys.
pub const TYPE_K: Choice = Choice { flag: "-ctk", values: CACHES, why: "keys are of one of four types" };
/// Type of cached values.
pub const TYPE_V: Choice = Choice { flag: "-ctv", values: CACHES, why: "values are of the type of the keys" };

/// Layers on a GPU, a list; only 0, or -1 for what there is, in builds without one.
pub fn gpu_layers(given: &[String], device: model::Device) -> anyhow::Result<Vec<String>> {
    numbers_or(&GPU_LAYERS, given, -1, device)
}

/// Layers whose experts stay on the CPU, a list.
pub fn cpu_moe(given: &[String], device: model::Device) -> anyhow::Result<Vec<String>> {
    numbers_or(&CPU_MOE, given, 0, device)
}

/// As [`Choice::parse`]; with a GPU backend any whole number from `low` on.
fn numbers_or(choice: &Choice, given: &[String], low: i64, device: model::Device) -> anyhow::Result<Vec<String>> {
    if !device.built() {
        return choice.parse(given);
    }
    let all: Vec<String> = given.iter().flat_map(|list| list.split(',')).map(str::to_string).collect();
    if let Some(value) = all.iter().find(|v| !v.parse().is_ok_and(|n: i64| n >= low)) {
        bail!("{} {value}: expected a whole number from {low} on", choice.flag);
    }
    Ok(if all.is_empty() { vec!["0".into()] } else { all })
}

impl Choice {
    /// The values of a matrix: lists separated by commas, the default where there is none.
    pub fn parse(&self, given: &[String]) -> anyhow::Result<Vec<String>> {
        let all: Vec<String> = given.iter().flat_map(|list| list.split(',')).map(str::to_string).collect();
        if let Some(value) = all.iter().find(|v| !self.values.contains(&v.as_str())) {
            bail!("{} {value}: {}, expected {}", self.flag, self.why, self.values.join(" or "));
        }
        Ok(if all.is_empty() { vec![self.values[0].to_string()] } else { all })
    }
}

/// Numbers of a matrix: `n`, `first-last`, `first-last+step` and `first-last*factor`, separated by commas.
pub fn numbers(flag: &str, given: &[String], default: &[usize], low: usize, high: usize) -> anyhow::Result<Vec<usize>> {
    let mut all = Vec::new();
    for text in given.iter().flat_map(|list| list.split(',')) {
        let refused = || format!("{flag} {text}: expected {low} to {high}, or a range such as 128-512+128 or 1-8*2");
        let number = |text: &str| text.parse::<usize>().ok().filter(|n| (low..=high).contains(n));
        let (first, rest) = text.split_once('-').map_or((text, None), |(first, rest)| (first, Some(rest)));
        let first = number(first).with_context(refused)?;
        let Some(rest) = rest else {
            all.push(first);
            continue;
        };
        let at = rest.find(['+', '*']);
        let (last, step) = at.map_or((rest, "+1"), |at| rest.split_at(at));
        let last = number(last).filter(|&last| first <= last).with_context(refused)?;
        let by: usize = step[1..].parse().ok().with_context(refused)?;
        let mut n = first;
        while n <= last {
            all.push(n);
            ensure!(all.len() <= 10_000, "{}", refused());
            let next = if step.starts_with('*') { n.saturating_mul(by) } else { n.saturating_add(by) };
            ensure!(next > n, "{}", refused());
            n = next;
        }
    }
    Ok(if all.is_empty() { default.to_vec() } else { all })
}

/// Modes of the delta rule of a matrix.
pub fn fused_deltas(given: &[String]) -> anyhow::Result<Vec<FusedDelta>> {
    if given.is_empty() {
        return Ok(vec![model::fused_delta(None)?]);
    }
    let modes = numbers("--fused-delta", given, &[], 0, 2)?;
    modes.into_iter().map(|mode| model::fused_delta(Some(mode as u32))).collect()
}

/// How a model is loaded and run.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// `None`: the embedded one.
    pub model: Option<PathBuf>,
    /// As on the command line.
    pub gpu_layers: String,
    /// As on the command line.
    pub cpu_moe: String,
    /// What the layers lie on.
    pub on: model::OnDevice,
    /// The file's layers, again and again up to so many.
    pub repeat_layers: Option<usize>,
    /// As on the command line.
    pub mmap: String,
    /// As on the command line.
    pub repack: String,
    /// As on the command line.
    pub activations: String,
    /// As on the command line.
    pub type_k: String,
    /// As on the command line.
    pub type_v: String,
    /// As on the command line.
    pub flash_attn: String,
    /// Tokens of a call.
    pub batch: usize,
    /// Tokens that go through the layers together.
    pub ubatch: usize,
    /// Threads.
    pub threads: usize,
    /// The delta rule.
    pub fused_delta: FusedDelta,
}

impl Setting {
    /// Loads the model.
    fn load(&self) -> anyhow::Result<Loaded> {
        // What is repacked is copied anyway: read whole, the file would be there twice.
        let mut loaded =
            model::load_with(self.model.as_deref(), self.mmap == "1" || self.repack == "1", self.repeat_layers)?;
        if self.on_gpu() {
            let (layers, experts) = (self.gpu_layers.parse()?, self.cpu_moe.parse()?);
            let offload = model::Offload { gpu_layers: layers, n_cpu_moe: experts, on: self.on.clone() };
            offload.apply(&mut loaded)?;
        }
        if self.repack == "1" {
            model::repack(&mut loaded);
        }
        Ok(loaded)
    }

    /// Memory of one sequence.
    fn state(&self, model: &Model, capacity: usize) -> anyhow::Result<State> {
        let of = |text: &str| model::cache_type(text).map_err(|e| anyhow::anyhow!("cache type {text:?}: {e}"));
        let cache = CacheTypes { k: of(&self.type_k)?, v: of(&self.type_v)? };
        Ok(model.state(1, capacity, cache)?)
    }

    /// How a forward pass runs.
    fn options(&self) -> Options {
        let activations = if self.activations == "f32" { Activations::F32 } else { Activations::Q8 };
        Options { ubatch: self.ubatch.min(self.batch), fused_delta: self.fused_delta, activations }
    }

    /// Layers lie on a GPU.
    pub fn on_gpu(&self) -> bool {
        self.on.device.built() && self.gpu_layers != "0"
    }

    /// Number of the delta rule's mode.
    pub fn fused_number(&self) -> usize {
        (0..3).find(|&n| FusedDelta::from_number(n) == Some(self.fused_delta)).unwrap_or(2) as usize
    }

    /// The same file, loaded in the same way.
    fn loads_as(&self, other: &Setting) -> bool {
        let key = |s: &Setting| {
            let placed = (s.gpu_layers.clone(), s.cpu_moe.clone(), s.on.clone());
            (s.model.clone(), s.mmap.clone(), s.repack.clone(), placed, s.repeat_layers)
        };
        key(self) == key(other)
    }
}

/// The model and the threads in use, kept from one setting to the next where they stay the same.
#[derive(Default)]
pub struct Bench {
    loaded: Option<(Setting, Loaded)>,
    pool: Option<(usize, ThreadPool)>,
    /// Roofs of this machine.
    pub peaks: Peaks,
}

/// A model with its threads and an empty sequence.
pub struct Run<'a> {
    /// The model.
    pub loaded: &'a Loaded,
    pool: &'a ThreadPool,
    state: State,
    setting: &'a Setting,
    tokens: Rng,
}

impl Bench {
    /// Readies a setting for sequences of so many tokens.
    pub fn run<'a>(&'a mut self, setting: &'a Setting, capacity: usize) -> anyhow::Result<(Run<'a>, &'a Peaks)> {
        if !self.loaded.as_ref().is_some_and(|(of, _)| of.loads_as(setting)) {
            // The old one goes first: there may be no room for two.
            self.loaded = None;
            self.loaded = Some((setting.clone(), setting.load()?));
        }
        if self.pool.as_ref().is_none_or(|(threads, _)| *threads != setting.threads) {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(setting.threads).build().context("--threads")?;
            self.pool = Some((setting.threads, pool));
        }
        let ((_, loaded), (_, pool)) =
            self.loaded.as_ref().zip(self.pool.as_ref()).context("a model and its threads were just made")?;
        let state = setting.state(&loaded.model, capacity)?;
        Ok((Run { loaded, pool, state, setting, tokens: rng(1) }, &self.peaks))
    }
}

impl Run<'_> {
    /// Forgets the sequence.
    pub fn clear(&mut self) -> anyhow::Result<()> {
        Ok(self.state.clear(0)?)
    }

    /// Reads so many random tokens, batch by batch; returns nanoseconds.
    pub fn prompt(&mut self, n: usize) -> anyhow::Result<u64> {
        let tokens = self.random(n);
        self.timed(tokens.chunks(self.setting.batch))
    }

    /// Reads so many random tokens one by one, each with its logits; returns nanoseconds.
    pub fn generate(&mut self, n: usize) -> anyhow::Result<u64> {
        let tokens = self.random(n);
        self.timed(tokens.chunks(1))
    }

    fn random(&mut self, n: usize) -> Vec<u32> {
        let vocab = self.loaded.model.config().vocab as u32;
        (0..n).map(|_| self.tokens.random_range(0..vocab)).collect()
    }

    fn timed<'t>(&mut self, calls: impl Iterator<Item = &'t [u32]> + Send) -> anyhow::Result<u64> {
        let (model, options, state) = (&self.loaded.model, self.setting.options(), &mut self.state);
        let begin = Instant::now();
        self.pool.install(|| {
            for tokens in calls {
                std::hint::black_box(model.forward(state, &Batch::one(0, tokens), &options)?);
            }
            Ok::<(), anyhow::Error>(())
        })?;
        Ok(begin.elapsed().as_nanos().max(1) as u64)
    }

    /// Leaves the sequence after `depth` tokens, read once and then put back.
    pub fn depth(&mut self, depth: usize, kept: &mut Option<qwen3next_model::state::Snapshot>) -> anyhow::Result<()> {
        self.clear()?;
        match kept {
            _ if depth == 0 => {}
            Some(snapshot) => self.state.restore(0, snapshot)?,
            None => {
                self.prompt(depth)?;
                *kept = Some(self.state.snapshot(0)?);
            }
        }
        Ok(())
    }
}

/// What one token takes from a model's weights.
#[derive(Debug, Clone, Copy, Default)]
pub struct Work {
    /// Bytes of weights that a token reads: of experts those it chooses, the output projection, recurrent states.
    pub bytes: f64,
    /// Bytes of the caches, for every token before it.
    pub cache_bytes: f64,
    /// Operations of products with weights, without the output projection: a product and a sum are two.
    pub ops: f64,
    /// Operations of the output projection.
    pub head_ops: f64,
    /// Operations with weights in blocks, in bf16, in f16 or f32.
    by_unit: [f64; 3],
}

impl Work {
    /// Of this model.
    pub fn of(model: &Model) -> Work {
        let (weights, config) = (model.weights(), model.config());
        let mut work = Work::default();
        for layer in &weights.layers {
            match &layer.mixer {
                Mixer::Delta(w) => [&w.qkv, &w.z, &w.ba, &w.out].into_iter().for_each(|t| work.add(t, 1.0)),
                Mixer::Attention(w) => [&w.q, &w.k, &w.v, &w.o].into_iter().for_each(|t| work.add(t, 1.0)),
            }
            match &layer.ffn {
                Ffn::Dense(w) => work.add_swiglu(w),
                Ffn::Moe(w) => {
                    work.add(&w.router, 1.0);
                    let chosen = config.moe.top_k as f64 / config.moe.experts as f64;
                    [&w.gate, &w.up, &w.down].into_iter().for_each(|t| work.add(t, chosen));
                    if let Some(shared) = &w.shared {
                        work.add_swiglu(&shared.expert);
                    }
                }
            }
        }
        work.head_ops = 2.0 * (weights.output.rows() * weights.output.cols()) as f64;
        work.bytes += (weights.output.packed_bytes() + weights.token_embd.row_bytes() + config.state_bytes()) as f64;
        work.cache_bytes = (config.kv_elements() * size_of::<f32>()) as f64;
        work
    }

    fn add(&mut self, t: &Tensor, share: f64) {
        let ops = 2.0 * share * (t.experts() * t.rows() * t.cols()) as f64;
        self.bytes += share * t.packed_bytes() as f64;
        self.ops += ops;
        self.by_unit[match t.dtype() {
            DType::F32 | DType::F16 => 2,
            DType::BF16 => 1,
            _ => 0,
        }] += ops;
    }

    fn add_swiglu(&mut self, w: &Swiglu) {
        [&w.gate, &w.up, &w.down].into_iter().for_each(|t| self.add(t, 1.0));
    }

    /// The instructions that bound most of the products.
    pub fn unit(&self) -> Unit {
        let [blocks, bf16, floats] = self.by_unit;
        if blocks >= bf16.max(floats) {
            Unit::Int8
        } else if bf16 > floats {
            Unit::Bf16
        } else {
            Unit::F32
        }
    }

    /// Operations of a prompt's tokens, on average.
    pub fn prompt_ops(&self, tokens: usize, batch: usize) -> f64 {
        self.ops + self.head_ops * tokens.div_ceil(batch.max(1)) as f64 / tokens.max(1) as f64
    }

    /// Bytes that one of `n` tokens after `depth` others reads, on average.
    pub fn token_bytes(&self, depth: usize, n: usize) -> f64 {
        self.bytes + self.cache_bytes * (depth as f64 + (n as f64 + 1.0) / 2.0)
    }
}

/// The types of the model's weights by their share of its bytes, the largest: `Q4_K`.
pub fn main_type(loaded: &Loaded) -> String {
    let mut by_type: Vec<(&str, u64)> = Vec::new();
    for t in loaded.metadata.tensors.iter().filter(|t| t.used) {
        match by_type.iter_mut().find(|(name, _)| *name == t.dtype) {
            Some((_, bytes)) => *bytes += t.bytes,
            None => by_type.push((&t.dtype, t.bytes)),
        }
    }
    by_type.iter().max_by_key(|(_, bytes)| *bytes).map_or(String::new(), |(name, _)| name.to_uppercase())
}

/// Bytes of all tensors that the model uses.
pub fn model_size(loaded: &Loaded) -> u64 {
    loaded.metadata.tensors.iter().filter(|t| t.used).map(|t| t.bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| s.to_string()).collect()
    }

    #[test]
    fn lists_and_ranges_are_llama_benchs() {
        let parse = |list: &[&str]| numbers("-p", &texts(list), &[7], 0, 4096);
        assert_eq!(parse(&[]).unwrap(), [7]);
        assert_eq!(parse(&["1,2", "0"]).unwrap(), [1, 2, 0]);
        assert_eq!(parse(&["1-3,128-512+128", "1-8*2"]).unwrap(), [1, 2, 3, 128, 256, 384, 512, 1, 2, 4, 8]);
        for bad in ["", "x", "-1", "1-", "1-2+0", "2-4*1", "0-4*2", "4097", "3-2", "1--2", "1-2-3"] {
            assert!(parse(&[bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_not_there_is_refused_by_name() {
        const CUDA: model::Device = model::Device::Cuda;
        assert_eq!(TYPE_K.parse(&[]).unwrap(), ["f32"]);
        assert_eq!(FLASH_ATTN.parse(&texts(&["on,auto"])).unwrap(), ["on", "auto"]);
        let why = GPU_LAYERS.parse(&texts(&["0,99"])).unwrap_err().to_string();
        assert!(why.starts_with("-ngl 99: ") && why.ends_with("expected 0 or -1"), "{why}");
        assert_eq!(gpu_layers(&texts(&["0,99"]), CUDA).is_ok(), cfg!(feature = "cuda"));
        assert!(gpu_layers(&texts(&["x"]), CUDA).is_err() && cpu_moe(&texts(&["-1"]), CUDA).is_err());
    }

    #[test]
    fn work_of_the_embedded_model_is_less_than_its_size() {
        let loaded = model::load(None).unwrap();
        let work = Work::of(&loaded.model);
        assert!(
            work.bytes > 0.0 && work.bytes < model_size(&loaded) as f64 + loaded.model.config().state_bytes() as f64
        );
        assert!(work.ops < 2.0 * loaded.metadata.parameters() as f64);
        assert_eq!(work.unit(), Unit::Int8);
        assert!(work.token_bytes(100, 1) > work.token_bytes(0, 1));
        assert_eq!(main_type(&loaded), "Q8_0");
    }
}
