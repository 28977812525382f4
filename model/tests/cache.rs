//! Every type of the KV cache: answers that do not depend on how a text is read, and are close to those of f32.

use qwen3next_kernels::DType;
use qwen3next_model::forward::Options;
use qwen3next_model::perplexity::{divergence, negative_log_likelihood, windows_cached, Scored, Sum};
use qwen3next_model::{embedded, Batch, CacheTypes, Model, State, Weights};
use std::path::Path;

fn embedded_model() -> (Model, Vec<u32>) {
    let loaded = embedded::load().unwrap();
    let tokens = loaded.tokenizer.unwrap().encode(embedded::HELD_OUT, false).unwrap();
    (Model::new(loaded.config, loaded.weights), tokens)
}

fn both(dtype: DType) -> CacheTypes {
    CacheTypes { k: dtype, v: dtype }
}

fn read(model: &Model, state: &mut State, slot: usize, tokens: &[u32]) -> Vec<u32> {
    let logits = model.forward(state, &Batch::one(slot, tokens), &Options::default()).unwrap();
    logits.into_iter().map(f32::to_bits).collect()
}

/// Of two rows of logits, given as bits: L2 norm of the difference over that of the second.
fn distance(got: &[u32], want: &[u32]) -> f64 {
    let squares = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
    let value = |bits: &u32| f64::from(f32::from_bits(*bits));
    let difference = squares(&mut got.iter().zip(want).map(|(g, w)| value(g) - value(w)));
    (difference / squares(&mut want.iter().map(value))).sqrt()
}

/// A model whose heads q8_0 cannot hold.
fn narrow() -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../verify/golden/models/plain");
    let loaded = Weights::load(&path, &mut |_| ()).unwrap();
    Model::new(loaded.config, loaded.weights)
}

#[test]
fn caches_of_every_type_keep_what_was_read() {
    let (model, tokens) = embedded_model();
    let text = &tokens[..70];
    for dtype in CacheTypes::ALL {
        let state = |slots| State::with_cache(model.config(), slots, 80, both(dtype)).unwrap();
        let whole = {
            let mut state = state(1);
            read(&model, &mut state, 0, text)
        };

        let mut stepwise = state(2);
        for token in &text[..69] {
            read(&model, &mut stepwise, 1, std::slice::from_ref(token));
        }
        let kept = stepwise.snapshot(1).unwrap();
        stepwise.keep_history(4);
        let last = read(&model, &mut stepwise, 1, &text[69..]);
        // The delta rule takes several tokens in another order than one: a cached value may round the other way.
        let most = if dtype == DType::F32 { 1e-5 } else { 1e-3 };
        let off = distance(&last, &whole);
        println!("{dtype}: token by token {off:.1e}");
        assert!(off <= most, "{dtype}: token by token, off by {off:e}");

        read(&model, &mut stepwise, 1, &tokens[100..102]);
        stepwise.rollback(1, 3).unwrap();
        assert_eq!(read(&model, &mut stepwise, 1, &text[69..]), last, "{dtype}: rolled back");
        stepwise.restore(0, &kept).unwrap();
        assert_eq!(stepwise.snapshot(0).unwrap(), kept, "{dtype}");
        assert_eq!(read(&model, &mut stepwise, 0, &text[69..]), last, "{dtype}: restored into another slot");

        let other = CacheTypes::ALL.into_iter().find(|t| *t != dtype).unwrap();
        let mut other = State::with_cache(model.config(), 1, 80, both(other)).unwrap();
        let refused = other.restore(0, &kept).unwrap_err().to_string();
        assert!(refused.contains("another type"), "{refused}");
    }
}

/// What a type may cost on 4 windows of held-out text: mean divergence from f32, and relative change of the perplexity.
/// Measured: f16 7e-9 and 1e-6, bf16 6e-7 and 8e-5, q8_0 2e-6 and 4e-5.
#[test]
fn caches_of_every_type_read_held_out_text_alike() {
    const CTX: usize = 256;
    let (model, tokens) = embedded_model();
    let vocab = model.config().vocab;
    let score = |dtype: DType| {
        let (mut nll, mut all) = (Sum::default(), Vec::new());
        let (tokens, options) = (&tokens[..4 * CTX], Options::default());
        windows_cached(&model, tokens, CTX, Scored::SecondHalf, CTX, &options, both(dtype), |window| {
            for (logits, &next) in window.logits.chunks(vocab).zip(window.next) {
                nll.add(negative_log_likelihood(logits, next)?);
            }
            all.extend_from_slice(window.logits);
            Ok::<_, qwen3next_model::Error>(())
        })
        .unwrap();
        (nll.perplexity(), all)
    };
    let (exact, base) = score(DType::F32);
    for (dtype, most_kl, most_ppl) in [(DType::F16, 1e-6, 1e-4), (DType::BF16, 2e-5, 1e-3), (DType::Q8_0, 1e-4, 2e-3)] {
        let (ppl, logits) = score(dtype);
        let rows = base.chunks(vocab).zip(logits.chunks(vocab));
        let kl = rows.map(|(b, l)| divergence(b, l)).sum::<f64>() / (base.len() / vocab) as f64;
        println!("{dtype}: KL {kl:.2e}, PPL ratio - 1 {:.2e}", ppl / exact - 1.0);
        assert!(kl <= most_kl, "{dtype}: divergence {kl:e}");
        assert!((ppl / exact - 1.0).abs() <= most_ppl, "{dtype}: perplexity {ppl}, of f32 {exact}");
        assert!(logits != base, "{dtype} caches were not used");
    }
}

#[test]
fn types_that_do_not_fit_are_refused() {
    let model = narrow();
    let refused = |k, v| State::with_cache(model.config(), 1, 8, CacheTypes { k, v }).unwrap_err().to_string();
    assert!(refused(DType::F16, DType::BF16).contains("one type for both"));
    assert!(refused(DType::Q4_K, DType::Q4_K).contains("expected f32, f16, bf16 or q8_0"));
    let d = model.config().attention.head_dim;
    assert!(d % 32 != 0);
    assert!(refused(DType::Q8_0, DType::Q8_0).contains(&format!("the model's heads have {d}")));
    assert_eq!(both(DType::Q8_0).bytes_per_token(model.config()), None);
    assert_eq!(both(DType::F16).bytes_per_token(model.config()), Some(2 * model.config().kv_elements()));
}
