//! The embedded model against transformers on the same file: logits, and the likelihood of held-out text.

use qwen3next_model::forward::{Batch, Model, Options};
use qwen3next_model::perplexity::{negative_log_likelihood, windows, Scored, Sum};
use qwen3next_model::{embedded, State};
use safetensors::SafeTensors;
use std::path::Path;

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../verify/golden").join(name)).unwrap()
}

#[test]
fn the_embedded_model_gives_transformers_logits() {
    let bytes = golden("perplexity_logits.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let numbers = |name: &str| -> Vec<f32> {
        file.tensor(name).unwrap().data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let ids = file.tensor("tokens").unwrap();
    let tokens: Vec<u32> = ids.data().chunks(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect();

    let loaded = embedded::load().unwrap();
    let tokenizer = loaded.tokenizer.unwrap();
    let start = embedded::HELD_OUT.char_indices().nth(2000).unwrap().0;
    assert_eq!(tokenizer.encode(&embedded::HELD_OUT[..start], false).unwrap()[..512], tokens);

    let model = Model::new(loaded.config, loaded.weights);
    let vocab = model.config().vocab;
    let mut state = State::new(model.config(), 1, 64).unwrap();
    let batch = Batch::one(0, &tokens[..64]).logits_from(0);
    let logits = model.forward(&mut state, &batch, &Options::default()).unwrap();
    for (i, (got, want)) in logits.chunks(vocab).zip(numbers("logits").chunks(vocab)).enumerate() {
        let error: f64 = got.iter().zip(want).map(|(g, w)| f64::from(g - w).powi(2)).sum();
        let norm: f64 = want.iter().map(|w| f64::from(*w).powi(2)).sum();
        assert!((error / norm).sqrt() <= 2e-5, "token {i}: {:e}", (error / norm).sqrt());
    }
}

#[test]
fn windows_of_held_out_text_are_as_likely_as_transformers_finds_them() {
    const WINDOWS: usize = 8;
    let document: serde_json::Value = serde_json::from_slice(&golden("perplexity.json")).unwrap();
    let want = document["transformers_q8_0"]["second_half"]["window_nll"].as_array().unwrap();

    let loaded = embedded::load().unwrap();
    let tokens = loaded.tokenizer.unwrap().encode(embedded::HELD_OUT, false).unwrap();
    assert_eq!(tokens.len() as u64, document["tokens"].as_u64().unwrap());
    let model = Model::new(loaded.config, loaded.weights);
    let vocab = model.config().vocab;
    let mut seen = 0;
    windows(&model, &tokens[..WINDOWS * 512], 512, Scored::SecondHalf, &Options::default(), |window| {
        let mut sum = Sum::default();
        for (logits, &next) in window.logits.chunks(vocab).zip(window.next) {
            sum.add(negative_log_likelihood(logits, next)?);
        }
        assert_eq!(sum.count(), 255);
        let want = want[window.index].as_f64().unwrap();
        assert!((sum.mean() - want).abs() <= 1e-4 * want, "window {}: {} and {want}", window.index, sum.mean());
        seen += 1;
        Ok::<(), qwen3next_model::Error>(())
    })
    .unwrap();
    assert_eq!(seen, WINDOWS);
}
