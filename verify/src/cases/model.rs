//! The whole forward pass against transformers' float32 logits, and what must not change them: the container the weights
//! came from, the cut into ubatches, the company of other sequences, going back and coming again.

use crate::compare::{Failure, Metrics};
use crate::suite::{Options, Outcome, Row, Verdict};
use qwen3next_kernels::Isa;
use qwen3next_model::forward::{self, FusedDelta};
use qwen3next_model::{Batch, Config, Error, Model, State, Weights};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

/// Stands where an operator's name would.
pub const NAME: &str = "model";

/// The golden models; each is a variant in the reports.
const MODELS: &[&str] = &["dense_mix", "dk_ne_dv", "mtp", "pattern", "plain", "ratio3", "tied"];

/// Worst-row relative L2 distance that our logits may have from transformers'.
const GOLDEN: f64 = 2e-5;

/// The same between two of our own runs that sum in another order. Against a float64 run of transformers' code ours are
/// off by at most 8e-6 on these models (transformers' own float32 by 1.2e-5): two runs differ by no more than this.
const REORDERED: f64 = GOLDEN;

/// What is done to a model on its way to the checks: nothing, except in mutants.
#[derive(Clone, Copy)]
pub struct Change {
    /// After the load.
    pub load: fn(&mut Config, &mut Weights),
    /// In the place of [`State::rollback`].
    pub rollback: fn(&Config, &mut State, usize, usize) -> Result<(), Error>,
}

impl Default for Change {
    fn default() -> Self {
        Change { load: |_, _| (), rollback: |_, state, slot, tokens| state.rollback(slot, tokens) }
    }
}

type Check = fn(&Subject) -> Outcome;

const CHECKS: &[(&str, Check)] =
    &[("golden", golden), ("ubatches", ubatches), ("stepwise", stepwise), ("company", company), ("rollback", rollback)];

/// Names of the checks.
pub fn checks() -> Vec<&'static str> {
    CHECKS.iter().map(|(name, _)| *name).collect()
}

/// Where the golden models lie in the source tree: the one of the build, or the one that a copied command is run in.
fn folder() -> PathBuf {
    let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/models");
    let here = Path::new("verify/golden/models");
    if !built_in.is_dir() && here.is_dir() {
        return here.into();
    }
    built_in
}

/// Runs the chosen checks on the chosen golden models. `Err` is a bad option, named.
pub fn run(options: &Options) -> Result<Vec<Row>, String> {
    run_with(options, &Change::default())
}

/// As [`run`], with a change.
pub fn run_with(options: &Options, change: &Change) -> Result<Vec<Row>, String> {
    let known = |list: &[&str], wanted: &Option<String>, what: &str| match wanted {
        Some(w) if !list.contains(&w.as_str()) => {
            Err(format!("--{what} {w}: {NAME} has no such {what}, it has {}", list.join(", ")))
        }
        _ => Ok(()),
    };
    known(MODELS, &options.variant, "variant")?;
    known(&checks(), &options.check, "check")?;
    if let Some(case) = &options.case {
        return Err(format!("--case {case}: {NAME} has no cases"));
    }
    let mut rows = Vec::new();
    if options.isa.is_some_and(|isa| isa != Isa::SCALAR) {
        return Ok(rows);
    }
    let stride = if options.variant.is_some() { 1 } else { options.stride.max(1) };
    for (i, &model) in MODELS.iter().enumerate() {
        if options.variant.as_deref().map_or(i % stride != 0, |v| v != model) {
            continue;
        }
        for (name, check) in CHECKS.iter().filter(|(name, _)| options.check.as_deref().is_none_or(|c| c == *name)) {
            let subject = Subject {
                folder: folder().join(model),
                change,
                #[cfg(any(feature = "cuda", feature = "cuda-host"))]
                device: options.device,
            };
            let mut row = Row::new(NAME, model, Isa::SCALAR, name);
            if !subject.folder.is_dir() {
                row.verdict = Verdict::Skipped(format!("no golden model at {}", subject.folder.display()));
                rows.push(row);
                continue;
            }
            match check(&subject) {
                Ok(metrics) => row.pass(metrics.unwrap_or_default()),
                Err(failure) => {
                    let reproduce = format!("qwen3next verify --op {NAME} --variant {model} --check {name}");
                    row.verdict = Verdict::Failed { failure: failure.0, reproduce };
                }
            }
            rows.push(row);
        }
    }
    Ok(rows)
}

/// A golden model's folder, and what is done to it.
struct Subject<'a> {
    folder: PathBuf,
    change: &'a Change,
    /// Where all of it runs, if not on the CPU.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    device: Option<&'static qwen3next_kernels::device::Device>,
}

/// Tokens and transformers' logits of all of them.
struct Golden {
    tokens: Vec<u32>,
    logits: Vec<f32>,
}

fn failed(what: impl std::fmt::Display) -> impl FnOnce(Error) -> Failure {
    move |e| Failure::new(format!("{what}: {e}"))
}

impl Subject<'_> {
    fn open(&self, path: &Path) -> Result<Model, Failure> {
        let mut loaded = Weights::load(path, &mut |_| ()).map_err(failed(path.display()))?;
        (self.change.load)(&mut loaded.config, &mut loaded.weights);
        #[allow(unused_mut)]
        let mut model = Model::new(loaded.config, loaded.weights);
        #[cfg(any(feature = "cuda", feature = "cuda-host"))]
        if let Some(device) = self.device {
            let all = qwen3next_model::offload::Placement::ALL;
            model.offload(device, all, &mut |_, _| ()).map_err(failed("offload"))?;
        }
        Ok(model)
    }

    /// Modes of the delta rule: the unfused ones are the CPU's.
    fn modes(&self) -> std::ops::Range<u32> {
        #[cfg(any(feature = "cuda", feature = "cuda-host"))]
        if self.device.is_some() {
            return 2..3;
        }
        0..3
    }

    fn model(&self) -> Result<Model, Failure> {
        self.open(&self.folder)
    }

    /// The Hugging Face folder itself and every GGUF file in it (one part stands for a split file).
    fn containers(&self) -> Result<Vec<PathBuf>, Failure> {
        let unreadable = |e: std::io::Error| Failure::new(format!("{}: {e}", self.folder.display()));
        let mut list = vec![self.folder.clone()];
        for entry in std::fs::read_dir(&self.folder).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.ends_with(".gguf") && (!name.contains("-split-") || name.contains("-00001-of-")) {
                list.push(path);
            }
        }
        list.sort();
        Ok(list)
    }

    fn golden(&self) -> Result<Vec<Golden>, Failure> {
        let path = self.folder.join("golden.safetensors");
        let bad = |e: &dyn std::fmt::Display| Failure::new(format!("{}: {e}", path.display()));
        let bytes = std::fs::read(&path).map_err(|e| bad(&e))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(&e))?;
        let mut list = Vec::new();
        for suffix in ["", ".1", ".2", ".3"] {
            let Ok(tokens) = file.tensor(&format!("tokens{suffix}")) else { continue };
            let logits = file.tensor(&format!("logits{suffix}")).map_err(|e| bad(&e))?;
            let token = |b: &[u8]| i64::from_le_bytes(b.try_into().expect("eight bytes")) as u32;
            let logit = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("four bytes"));
            list.push(Golden {
                tokens: tokens.data().chunks_exact(8).map(token).collect(),
                logits: logits.data().chunks_exact(4).map(logit).collect(),
            });
        }
        if list.is_empty() {
            return Err(bad(&"holds no sequence"));
        }
        Ok(list)
    }
}

/// Largest relative L2 distance of a row, which must be within the limit.
fn within(what: &str, got: &[f32], want: &[f32], vocab: usize, limit: f64) -> Result<Metrics, Failure> {
    if got.len() != want.len() {
        return Err(Failure::new(format!("{what}: {} logits, {} expected", got.len(), want.len())));
    }
    let mut worst = 0.0f64;
    for (row, (got, want)) in got.chunks(vocab).zip(want.chunks(vocab)).enumerate() {
        let error: f64 = got.iter().zip(want).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
        let norm: f64 = want.iter().map(|b| f64::from(*b).powi(2)).sum();
        let distance = (error / norm).sqrt();
        let near = distance <= limit;
        if !near {
            return Err(Failure::new(format!(
                "{what}, token {row}: relative L2 distance {distance:.2e}, limit {limit:.0e}"
            )));
        }
        worst = worst.max(distance);
    }
    Ok(Metrics { row_l2: worst, bound_multiple: worst / limit, rows: got.len() / vocab, ..Metrics::default() })
}

fn logits(model: &Model, state: &mut State, batch: &Batch, options: &forward::Options) -> Result<Vec<f32>, Failure> {
    model.forward(state, batch, options).map_err(failed("forward"))
}

fn state(model: &Model, slots: usize, capacity: usize) -> Result<State, Failure> {
    model.state(slots, capacity, Default::default()).map_err(failed("state"))
}

fn all_logits(model: &Model, tokens: &[u32], options: &forward::Options) -> Result<Vec<f32>, Failure> {
    logits(model, &mut state(model, 1, tokens.len())?, &Batch::one(0, tokens).logits_from(0), options)
}

/// Every container gives transformers' logits.
fn golden(subject: &Subject) -> Outcome {
    let mut worst = Metrics::default();
    for container in subject.containers()? {
        let model = subject.open(&container)?;
        for (i, golden) in subject.golden()?.iter().enumerate() {
            let got = all_logits(&model, &golden.tokens, &forward::Options::default())?;
            let what = format!("{} sequence {i}", container.file_name().unwrap_or_default().to_string_lossy());
            worst = worst.worst(within(&what, &got, &golden.logits, model.config().vocab, GOLDEN)?);
        }
    }
    Ok(Some(worst))
}

/// Any ubatch and any mode of the delta rule give the same logits.
fn ubatches(subject: &Subject) -> Outcome {
    let (model, golden) = (subject.model()?, subject.golden()?);
    let tokens = &golden[0].tokens;
    let whole = all_logits(&model, tokens, &forward::Options::default())?;
    let mut worst = Metrics::default();
    for mode in subject.modes() {
        let fused_delta = FusedDelta::from_number(mode).expect("three modes");
        for ubatch in [1, 2, 3, 7, 63, 64, 65, 127, 512] {
            let got =
                all_logits(&model, tokens, &forward::Options { ubatch, fused_delta, ..forward::Options::default() })?;
            let what = format!("ubatch {ubatch}, mode {mode}");
            worst = worst.worst(within(&what, &got, &whole, model.config().vocab, REORDERED)?);
        }
    }
    Ok(Some(worst))
}

/// A prompt at once is the prompt token by token, in calls of their own.
fn stepwise(subject: &Subject) -> Outcome {
    let model = subject.model()?;
    let options = forward::Options::default();
    let mut worst = Metrics::default();
    for (i, golden) in subject.golden()?.iter().enumerate() {
        let whole = all_logits(&model, &golden.tokens, &options)?;
        let mut state = state(&model, 1, golden.tokens.len())?;
        let mut got = Vec::new();
        for token in &golden.tokens {
            got.extend(logits(&model, &mut state, &Batch::one(0, &[*token]), &options)?);
        }
        let what = format!("sequence {i} token by token");
        worst = worst.worst(within(&what, &got, &whole, model.config().vocab, REORDERED)?);
    }
    Ok(Some(worst))
}

fn same_bits(what: &str, got: &[f32], want: &[f32]) -> Result<(), Failure> {
    crate::compare::bitwise(what, got, want)
}

/// Sequences in one batch do not see each other; equal prompts get one answer, bit for bit.
fn company(subject: &Subject) -> Outcome {
    let model = subject.model()?;
    let vocab = model.config().vocab as u32;
    let text = |seed: u32, n: u32| -> Vec<u32> { (0..n).map(|i| (i * i + seed * 17 + i * seed) % vocab).collect() };
    let (a, b, c) = (text(1, 40), text(2, 7), text(3, 90));
    let options = forward::Options { ubatch: 33, ..forward::Options::default() };
    let mut memory = state(&model, 5, 100)?;
    let batch = Batch::one(4, &a).logits_from(0).and(0, &b).logits_from(0).and(2, &c).logits_from(0);
    let together = logits(&model, &mut memory, &batch, &options)?;
    let mut alone = Vec::new();
    for tokens in [&a, &b, &c] {
        alone.extend(all_logits(&model, tokens, &options)?);
    }
    let metrics = within("three sequences", &together, &alone, vocab as usize, REORDERED)?;

    for slot in [0, 2, 4] {
        memory.clear(slot).map_err(failed("clear"))?;
    }
    let batch = (0..5).fold(Batch::default(), |batch, slot| batch.and(slot, &a[..6]));
    let equal = logits(&model, &mut memory, &batch, &forward::Options::default())?;
    let (first, others) = equal.split_at(vocab as usize);
    others.chunks(vocab as usize).try_for_each(|row| same_bits("equal prompts", row, first))?;
    Ok(Some(metrics))
}

/// Restored and rolled back states go on with the same bits.
fn rollback(subject: &Subject) -> Outcome {
    let model = subject.model()?;
    let vocab = model.config().vocab;
    let tokens: Vec<u32> = (0..60).map(|i| i * 29 % vocab as u32).collect();
    let options = forward::Options { ubatch: 16, ..forward::Options::default() };
    let mut state = state(&model, 3, 80)?;
    state.keep_history(4);
    let read = |state: &mut State, slot, tokens: &[u32]| {
        logits(&model, state, &Batch::one(slot, tokens).logits_from(0), &options)
    };
    let back = |state: &mut State, tokens| {
        (subject.change.rollback)(model.config(), state, 1, tokens).map_err(failed("rollback"))
    };
    let restore = |state: &mut State, slot, kept: &_| state.restore(slot, kept).map_err(failed("restore"));
    let stands_at = |state: &State, want: usize| match state.len(1) {
        Ok(len) if len == want => Ok(()),
        len => Err(Failure::new(format!("the slot has read {len:?} tokens, expected {want}"))),
    };

    read(&mut state, 1, &tokens[..30])?;
    let kept = state.snapshot(1).map_err(failed("snapshot"))?;
    let next = read(&mut state, 1, &tokens[30..33])?;
    restore(&mut state, 2, &kept)?;
    same_bits("after a restore", &read(&mut state, 2, &tokens[30..33])?, &next)?;

    // Three tokens that turn out wrong, taken back; then some of them kept.
    for accepted in 0..3 {
        restore(&mut state, 1, &kept)?;
        read(&mut state, 1, &[5, 6, 7])?;
        back(&mut state, 3)?;
        same_bits("after going back by 3", &read(&mut state, 1, &tokens[30..33])?, &next)?;
        back(&mut state, 3 - accepted)?;
        stands_at(&state, 30 + accepted)?;
        let again = read(&mut state, 1, &tokens[30 + accepted..33])?;
        same_bits(&format!("after going back by {}", 3 - accepted), &again, &next[accepted * vocab..])?;
    }
    // Token by token, then back over several calls.
    restore(&mut state, 1, &kept)?;
    for token in &tokens[30..36] {
        read(&mut state, 1, &[*token])?;
    }
    back(&mut state, 4)?;
    stands_at(&state, 32)?;
    same_bits("after several calls", &read(&mut state, 1, &tokens[32..33])?, &next[2 * vocab..])?;
    match state.rollback(1, 5) {
        Err(e) if e.to_string().contains("slot 1 can be rolled back by") => Ok(Some(Metrics::default())),
        other => Err(Failure::new(format!("going back beyond the history gave {other:?}"))),
    }
}
