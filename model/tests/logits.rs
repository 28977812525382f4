//! The whole forward pass against transformers' float32 logits, and what must not change them: the container the weights
//! came from, the cut into ubatches, the company of other sequences, going back and coming again.

use qwen3next_model::forward::{FusedDelta, Options};
use qwen3next_model::{Batch, Model, State, Weights};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

/// Worst-row relative L2 distance that our logits may have from transformers'.
const GOLDEN: f64 = 2e-5;

/// The same between two of our own runs that sum in another order. Against a float64 run of transformers' code ours are off
/// by at most 8e-6 on these models (transformers' own float32 by 1.2e-5): two runs differ by no more than this.
const REORDERED: f64 = GOLDEN;

struct Golden {
    tokens: Vec<u32>,
    logits: Vec<f32>,
}

fn models() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../verify/golden/models");
    let mut list: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    list.sort();
    assert!(list.len() >= 7, "golden models are missing");
    list
}

fn model(name: &str) -> Model {
    let path = models().into_iter().find(|p| p.ends_with(name)).expect("a golden model");
    open(&path)
}

fn open(path: &Path) -> Model {
    let loaded = Weights::load(path, &mut |_| ()).unwrap_or_else(|e| panic!("{e}"));
    Model::new(loaded.config, loaded.weights)
}

/// The Hugging Face folder itself and every GGUF file in it (one part stands for a split file).
fn containers(folder: &Path) -> Vec<PathBuf> {
    let mut list = vec![folder.to_path_buf()];
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.ends_with(".gguf") && (!name.contains("-split-") || name.contains("-00001-of-")) {
            list.push(path);
        }
    }
    list.sort();
    list
}

fn golden(folder: &Path) -> Vec<Golden> {
    let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut list = Vec::new();
    for suffix in ["", ".1", ".2", ".3"] {
        let Ok(tokens) = file.tensor(&format!("tokens{suffix}")) else { continue };
        let logits = file.tensor(&format!("logits{suffix}")).unwrap();
        list.push(Golden {
            tokens: tokens.data().chunks(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect(),
            logits: logits.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        });
    }
    assert!(!list.is_empty());
    list
}

/// Largest relative L2 distance of a row.
fn distance(got: &[f32], want: &[f32], vocab: usize) -> f64 {
    assert_eq!(got.len(), want.len());
    let row = |(g, w): (&[f32], &[f32])| {
        let d: f64 = g.iter().zip(w).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
        let n: f64 = w.iter().map(|b| f64::from(*b).powi(2)).sum();
        (d / n).sqrt()
    };
    got.chunks(vocab).zip(want.chunks(vocab)).map(row).fold(0.0, |worst, d| if d <= worst { worst } else { d })
}

fn all_logits(model: &Model, tokens: &[u32], options: &Options) -> Vec<f32> {
    let mut state = State::new(model.config(), 1, tokens.len()).unwrap();
    model.forward(&mut state, &Batch::one(0, tokens).logits_from(0), options).unwrap()
}

#[test]
fn every_container_of_every_golden_model_gives_transformers_logits() {
    for folder in models() {
        for container in containers(&folder) {
            let model = open(&container);
            for (i, golden) in golden(&folder).iter().enumerate() {
                let logits = all_logits(&model, &golden.tokens, &Options::default());
                let d = distance(&logits, &golden.logits, model.config().vocab);
                println!("{} sequence {i}: worst row {d:.2e}", container.display());
                assert!(d <= GOLDEN, "{} sequence {i}: {d:e}", container.display());
            }
        }
    }
}

#[test]
fn any_ubatch_and_any_mode_give_the_same_logits() {
    for folder in models() {
        let (model, golden) = (open(&folder), golden(&folder));
        let tokens = &golden[0].tokens;
        let vocab = model.config().vocab;
        let whole = all_logits(&model, tokens, &Options::default());
        for mode in 0..3 {
            let fused_delta = FusedDelta::from_number(mode).unwrap();
            for ubatch in [1, 2, 3, 7, 63, 64, 65, 127, 512] {
                let logits = all_logits(&model, tokens, &Options { ubatch, fused_delta });
                let d = distance(&logits, &whole, vocab);
                assert!(d <= REORDERED, "{} ubatch {ubatch} mode {mode}: {d:e}", folder.display());
            }
        }
    }
}

#[test]
fn prefill_equals_one_token_at_a_time() {
    let model = model("ratio3");
    let tokens: Vec<u32> = (0..150).map(|i| i * 37 % model.config().vocab as u32).collect();
    let vocab = model.config().vocab;
    let whole = all_logits(&model, &tokens, &Options::default());
    let mut state = State::new(model.config(), 1, tokens.len()).unwrap();
    let mut stepwise = Vec::new();
    for token in &tokens {
        stepwise.extend(model.forward(&mut state, &Batch::one(0, &[*token]), &Options::default()).unwrap());
    }
    let d = distance(&stepwise, &whole, vocab);
    assert!(d <= REORDERED, "{d:e}");
}

#[test]
fn sequences_in_one_batch_do_not_see_each_other() {
    let model = model("plain");
    let vocab = model.config().vocab as u32;
    let text = |seed: u32, n: u32| -> Vec<u32> { (0..n).map(|i| (i * i + seed * 17 + i * seed) % vocab).collect() };
    let (a, b, c) = (text(1, 40), text(2, 7), text(3, 90));
    let options = Options { ubatch: 33, ..Options::default() };
    let mut state = State::new(model.config(), 5, 100).unwrap();
    let batch = Batch::one(4, &a).logits_from(0).and(0, &b).logits_from(0).and(2, &c).logits_from(0);
    let together = model.forward(&mut state, &batch, &options).unwrap();
    assert_eq!(together.len(), (40 + 7 + 90) * vocab as usize);
    let mut alone = Vec::new();
    for tokens in [&a, &b, &c] {
        alone.extend(all_logits(&model, tokens, &options));
    }
    let d = distance(&together, &alone, vocab as usize);
    assert!(d <= REORDERED, "{d:e}");

    // Equal prompts in one batch: one answer, bit for bit.
    state.clear(0).unwrap();
    state.clear(2).unwrap();
    state.clear(4).unwrap();
    let batch = (0..5).fold(Batch::default(), |batch, slot| batch.and(slot, &a[..6]));
    let equal = model.forward(&mut state, &batch, &Options::default()).unwrap();
    let first: Vec<u32> = equal[..vocab as usize].iter().map(|l| l.to_bits()).collect();
    for row in equal.chunks(vocab as usize) {
        assert_eq!(row.iter().map(|l| l.to_bits()).collect::<Vec<_>>(), first);
    }
}

#[test]
fn restored_and_rolled_back_states_continue_with_the_same_bits() {
    let model = model("pattern");
    let vocab = model.config().vocab as u32;
    let tokens: Vec<u32> = (0..60).map(|i| i * 29 % vocab).collect();
    let options = Options { ubatch: 16, ..Options::default() };
    let mut state = State::new(model.config(), 3, 80).unwrap();
    state.keep_history(4);
    let forward = |state: &mut State, slot, tokens: &[u32]| {
        let logits = model.forward(state, &Batch::one(slot, tokens).logits_from(0), &options).unwrap();
        logits.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    forward(&mut state, 1, &tokens[..30]);
    let kept = state.snapshot(1).unwrap();
    let next = forward(&mut state, 1, &tokens[30..33]);

    state.restore(2, &kept).unwrap();
    assert_eq!(state.len(2).unwrap(), 30);
    assert_eq!(forward(&mut state, 2, &tokens[30..33]), next, "after restore");

    // Three tokens that turn out wrong, taken back; then one of them kept.
    for accepted in 0..3 {
        state.restore(1, &kept).unwrap();
        forward(&mut state, 1, &[5, 6, 7]);
        state.rollback(1, 3).unwrap();
        let first = forward(&mut state, 1, &tokens[30..33]);
        assert_eq!(first, next, "after rolling back 3");
        state.rollback(1, 3 - accepted).unwrap();
        assert_eq!(state.len(1).unwrap(), 30 + accepted);
        let again = forward(&mut state, 1, &tokens[30 + accepted..33]);
        assert_eq!(again, next[accepted * vocab as usize..], "after rolling back {}", 3 - accepted);
    }
    // Token by token, then back over several calls.
    state.restore(1, &kept).unwrap();
    for token in &tokens[30..36] {
        forward(&mut state, 1, &[*token]);
    }
    state.rollback(1, 4).unwrap();
    assert_eq!(state.len(1).unwrap(), 32);
    let last = forward(&mut state, 1, &tokens[32..33]);
    assert_eq!(last, next[2 * vocab as usize..]);
    let error = state.rollback(1, 5).unwrap_err().to_string();
    assert!(error.contains("slot 1 can be rolled back by"), "{error}");
}

#[test]
fn wrong_calls_are_named_and_leave_the_state_alone() {
    let model = model("plain");
    let vocab = model.config().vocab as u32;
    let options = Options::default();
    let mut state = State::new(model.config(), 2, 4).unwrap();
    let mut refused =
        |batch: Batch, options: &Options| model.forward(&mut state, &batch, options).unwrap_err().to_string();
    assert!(refused(Batch::one(0, &[1, vocab]), &options).contains("outside the vocabulary"));
    assert!(refused(Batch::one(2, &[1]), &options).contains("slot: is 2"));
    assert!(refused(Batch::one(0, &[1, 2, 3, 4, 5]), &options).contains("capacity of 4"));
    assert!(refused(Batch::one(0, &[]), &options).contains("empty"));
    assert!(refused(Batch::one(0, &[1]).and(0, &[2]), &options).contains("twice"));
    assert!(refused(Batch::one(0, &[1]), &Options { ubatch: 0, ..options }).contains("ubatch"));
    assert_eq!(state.len(0).unwrap(), 0);
    let mut other = State::new(open(&models()[1]).config(), 1, 4).unwrap();
    assert!(model.forward(&mut other, &Batch::one(0, &[1]), &options).is_err());
}
