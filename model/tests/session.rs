//! Sessions: the same text on any number of threads, and from a file.

mod common;

use common::Folder;
use qwen3next_kernels::DType;
use qwen3next_model::forward::{Activations, Options};
use qwen3next_model::generate::{Sampler, Sampling};
use qwen3next_model::session::{Answer, End, Limits};
use qwen3next_model::stop::Stops;
use qwen3next_model::{embedded, prompt_cache, CacheTypes, Error, Model, Session, Tokenizer, Weights};
use std::path::Path;

fn embedded_model() -> (Model, Tokenizer) {
    let loaded = embedded::load().unwrap();
    (Model::new(loaded.config, loaded.weights), loaded.tokenizer.unwrap())
}

fn options() -> Options {
    Options { activations: Activations::Q8, ..Options::default() }
}

fn both(dtype: DType) -> CacheTypes {
    CacheTypes { k: dtype, v: dtype }
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|l| l.to_bits()).collect()
}

fn read(session: &mut Session, tokens: &[u32]) -> Vec<u32> {
    assert!(session.read(tokens, 64, &options(), &mut |_| true).unwrap());
    bits(session.logits())
}

fn limits(tokens: Option<usize>, stops: &[&str]) -> Limits {
    let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
    Limits { tokens, stops: Stops::new(&stops).unwrap() }
}

fn answer(session: &mut Session, tokenizer: &Tokenizer, seed: u64, limits: Limits) -> (Answer, Vec<String>) {
    let mut sampler = Sampler::new(Sampling { seed, temperature: 1.0, ..Sampling::default() }).unwrap();
    let mut pieces = Vec::new();
    let answer = session.answer(tokenizer, &mut sampler, limits, &options(), |text| {
        pieces.push(text.to_string());
        Ok::<_, Error>(true)
    });
    (answer.unwrap(), pieces)
}

#[test]
fn threads_change_no_bit_and_no_text() {
    let (model, tokenizer) = embedded_model();
    let prompt = tokenizer.encode(&embedded::HELD_OUT[..900], false).unwrap();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut session = Session::new(&model, 700, CacheTypes::default()).unwrap();
            let logits = read(&mut session, &prompt);
            (logits, answer(&mut session, &tokenizer, 3, limits(Some(40), &[])).0.text, bits(session.logits()))
        })
    };
    let one = run(1);
    for threads in [2, 3, 8] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

#[test]
fn stop_strings_and_limits_end_an_answer() {
    let (model, tokenizer) = embedded_model();
    let prompt = tokenizer.encode("In the beginning", false).unwrap();
    let start = |capacity| {
        let mut session = Session::new(&model, capacity, CacheTypes::default()).unwrap();
        read(&mut session, &prompt);
        session
    };
    let mut session = start(200);
    let (whole, pieces) = answer(&mut session, &tokenizer, 9, limits(Some(60), &[]));
    assert_eq!((whole.tokens, whole.end, whole.exact), (60, End::Length, true));
    assert_eq!(pieces.concat(), whole.text);
    assert_eq!(session.tokens().len(), prompt.len() + 60);
    // Every stop string that the text holds ends it there, over the borders of tokens too.
    for at in [5, 17, 40] {
        let stop: String = whole.text.chars().skip(at).take(9).collect();
        let expected = whole.text.find(&stop).unwrap();
        let (cut, pieces) = answer(&mut start(200), &tokenizer, 9, limits(Some(60), &["no such text", &stop]));
        assert_eq!((cut.text.as_str(), cut.end), (&whole.text[..expected], End::Stop), "{stop:?}");
        assert_eq!(pieces.concat(), cut.text);
        assert!(!cut.exact);
    }
    let (full, _) = answer(&mut start(prompt.len() + 7), &tokenizer, 9, limits(None, &[]));
    assert_eq!((full.tokens, full.end), (7, End::Full));
    assert!(whole.text.starts_with(&full.text));
    assert_eq!(answer(&mut start(200), &tokenizer, 9, limits(Some(0), &[])).0.text, "");
    // An interrupt keeps what was shown, and the session has read exactly that.
    let mut session = start(200);
    let (mut sampler, mut left) = (Sampler::new(Sampling::greedy()).unwrap(), 3);
    let stopped = session.answer(&tokenizer, &mut sampler, limits(None, &[]), &options(), |_| {
        left -= 1;
        Ok::<_, Error>(left > 0)
    });
    let stopped = stopped.unwrap();
    assert_eq!((stopped.tokens, stopped.end, stopped.exact), (3, End::Interrupted, true));
    assert_eq!(tokenizer.decode(&session.tokens()[prompt.len()..]).unwrap(), stopped.text);
}

#[test]
fn a_session_from_a_file_goes_on_with_the_same_bits() {
    let (model, tokenizer) = embedded_model();
    let folder = Folder::new();
    let (file, again) = (folder.file("a.q3n"), folder.file("b.q3n"));
    let tokens = tokenizer.encode(embedded::HELD_OUT, false).unwrap();
    for dtype in CacheTypes::ALL {
        let mut session = Session::new(&model, 150, both(dtype)).unwrap();
        let logits = read(&mut session, &tokens[..100]);
        prompt_cache::save(&file, &session, "a note é").unwrap();
        let next = read(&mut session, &tokens[100..120]);
        let text = answer(&mut session, &tokenizer, 1, limits(Some(12), &[])).0.text;

        // Into a session of another length that holds something else.
        let mut other = Session::new(&model, 200, both(dtype)).unwrap();
        read(&mut other, &tokens[500..530]);
        assert_eq!(prompt_cache::load(&file, &mut other).unwrap(), "a note é");
        assert_eq!((other.tokens(), bits(other.logits())), (&tokens[..100], logits), "{dtype}");
        prompt_cache::save(&again, &other, "a note é").unwrap();
        assert!(std::fs::read(&file).unwrap() == std::fs::read(&again).unwrap(), "{dtype}: saved again");
        assert_eq!(read(&mut other, &tokens[100..120]), next, "{dtype}");
        assert_eq!(answer(&mut other, &tokenizer, 1, limits(Some(12), &[])).0.text, text, "{dtype}");

        let wrong = CacheTypes::ALL.into_iter().find(|t| *t != dtype).unwrap();
        let refused = prompt_cache::load(&file, &mut Session::new(&model, 200, both(wrong)).unwrap());
        assert!(refused.unwrap_err().to_string().contains("expected"), "{dtype}");
    }
    // Exactly what was read, or nothing: a recurrent state cannot be cut.
    let mut session = Session::new(&model, 200, CacheTypes::default()).unwrap();
    assert_eq!(session.reusable(&tokens[..5]), 0);
    read(&mut session, &tokens[..100]);
    assert_eq!(session.reusable(&tokens[..130]), 100);
    assert_eq!(session.reusable(&tokens[..100]), 100);
    assert_eq!(session.reusable(&tokens[..99]), 0);
    assert_eq!(session.reusable(&tokens[1..130]), 0);
    // Nothing at all is a session too.
    session.clear().unwrap();
    prompt_cache::save(&file, &session, "").unwrap();
    read(&mut session, &tokens[..3]);
    assert_eq!(prompt_cache::load(&file, &mut session).unwrap(), "");
    assert!(session.tokens().is_empty() && session.logits().is_empty());
}

#[test]
fn files_of_other_models_and_lengths_are_refused() {
    let (model, tokenizer) = embedded_model();
    let folder = Folder::new();
    let file = folder.file("a.q3n");
    let tokens = tokenizer.encode("And God said, Let there be light", false).unwrap();
    let mut session = Session::new(&model, 64, CacheTypes::default()).unwrap();
    read(&mut session, &tokens);
    prompt_cache::save(&file, &session, "").unwrap();
    let refused = |session: &mut Session| {
        let text = prompt_cache::load(&file, session).unwrap_err().to_string();
        assert!(!text.contains('\n') && text.contains("a.q3n"), "{text}");
        assert!(session.tokens().is_empty());
        text
    };
    let mut short = Session::new(&model, tokens.len() - 1, CacheTypes::default()).unwrap();
    assert!(refused(&mut short).contains("room for"));

    // One weight is another: a number of a vector, or a byte of a matrix.
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../verify/golden/models");
    let open = |name: &str| {
        let loaded = Weights::load(&golden.join(name), &mut |_| ()).unwrap();
        Model::new(loaded.config, loaded.weights)
    };
    let plain = open("plain");
    assert!(refused(&mut Session::new(&plain, 64, CacheTypes::default()).unwrap()).contains("another model"));
    assert_eq!(plain.fingerprint(), open("plain").fingerprint());
    let loaded = Weights::load(&golden.join("plain"), &mut |_| ()).unwrap();
    let mut weights = loaded.weights.clone();
    weights.layers[1].post_attention_norm[3] += 1e-3;
    assert_ne!(Model::new(loaded.config.clone(), weights).fingerprint(), plain.fingerprint());
    let mut weights = loaded.weights.clone();
    weights.output = weights.token_embd.clone();
    assert_ne!(Model::new(loaded.config, weights).fingerprint(), plain.fingerprint());

    // Interleaved rows are the same model.
    let (mut repacked, _) = embedded_model();
    repacked.repack(&mut |_, _| ());
    let mut session = Session::new(&repacked, 64, CacheTypes::default()).unwrap();
    prompt_cache::load(&file, &mut session).unwrap();
    assert_eq!(session.tokens(), tokens);

    std::fs::write(&file, b"Q3NCACHE").unwrap();
    assert!(refused(&mut session).contains("no prompt cache"));
    std::fs::write(&file, [b'x'; 100]).unwrap();
    assert!(refused(&mut session).contains("no prompt cache"));
    assert!(prompt_cache::load(&folder.0, &mut session).is_err());
    assert!(prompt_cache::save(&folder.0, &session, "").is_err());
}

/// Folder and file hold the same numbers, in places in other types: one model, and a cache of the one serves the other.
#[test]
fn a_cache_serves_every_file_with_the_same_numbers() {
    use qwen3next_model::quantize::{quantize, Types};
    let folder = Folder::new();
    let open = |path: &Path| {
        let loaded = Weights::load(path, &mut |_| ()).unwrap();
        Model::new(loaded.config, loaded.weights)
    };
    let written = |name: &str, from: &Path, dtype| {
        let to = folder.file(name);
        quantize(from, &to, Types::all(dtype), &mut |_| ()).unwrap();
        to
    };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../verify/golden/models");
    for name in ["dense_mix", "dk_ne_dv", "mtp", "pattern", "plain", "ratio3", "tied"] {
        let path = golden.join(name);
        let (f32, bf16) = (written("f32.gguf", &path, DType::F32), written("bf16.gguf", &path, DType::BF16));
        let own = open(&path).fingerprint();
        assert_eq!(open(&f32).fingerprint(), own, "{name}");
        let rounded = open(&bf16).fingerprint();
        assert_ne!(rounded, own, "{name}");
        assert_eq!(open(&written("wide.gguf", &bf16, DType::F32)).fingerprint(), rounded, "{name}");
    }

    let (path, cache) = (golden.join("ratio3"), folder.file("a.q3n"));
    let gguf = written("f32.gguf", &path, DType::F32);
    let (from, to, other) = (open(&path), open(&gguf), open(&written("q8.gguf", &path, DType::Q8_0)));
    let session = |model| Session::new(model, 64, CacheTypes::default()).unwrap();
    let (mut saved, mut loaded) = (session(&from), session(&to));
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 50).collect();
    read(&mut saved, &tokens[..30]);
    prompt_cache::save(&cache, &saved, "").unwrap();
    prompt_cache::load(&cache, &mut loaded).unwrap();
    read(&mut saved, &tokens[30..]);
    read(&mut loaded, &tokens[30..]);
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * a.abs().max(1.0);
    assert!(saved.logits().iter().zip(loaded.logits()).all(near));
    let why = prompt_cache::load(&cache, &mut session(&other)).unwrap_err().to_string();
    assert!(why.contains("another model, or with a file of it that holds other numbers"), "{why}");
}
