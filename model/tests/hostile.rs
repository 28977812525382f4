//! Broken files: never a panic, never a large allocation, always one line that says what is wrong.
//!
//! One test alone in its binary, because the allocator below counts for the whole process.

mod common;

use common::{small, Folder};
use qwen3next_kernels::DType;
use qwen3next_model::forward::Options;
use qwen3next_model::gguf::Gguf;
use qwen3next_model::{prompt_cache, CacheTypes, Model, Session, Tokenizer};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::RefCell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

struct Counting;
static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes allocated at most at one time by `f`, beyond what was allocated before.
fn peak<R>(f: impl FnOnce() -> R) -> (R, usize) {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = f();
    (result, PEAK.load(Relaxed) - before)
}

/// One damage, within the first `reach` bytes but for truncation.
fn damage(bytes: &mut Vec<u8>, reach: usize, rng: &mut ChaCha8Rng) {
    let reach = reach.min(bytes.len()).max(9);
    let number = |rng: &mut ChaCha8Rng| {
        let odd = [0, 1, 3, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 60, u64::MAX / 8, u64::MAX - 7, u64::MAX];
        odd[rng.random_range(0..odd.len())]
    };
    match rng.random_range(0..7) {
        0 => {
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..reach);
                bytes[at] ^= 1 << rng.random_range(0..8);
            }
        }
        1 => bytes.truncate(rng.random_range(0..bytes.len())),
        2 => {
            let at = rng.random_range(0..reach - 8);
            let value = number(rng);
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        3 => {
            // Numbers of the header: magic 4, version 4, then two counts.
            let at = [4, 8, 16][rng.random_range(0..3)].min(bytes.len() - 8);
            let value = number(rng);
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        4 => {
            let (a, b) = (rng.random_range(0..reach - 8), rng.random_range(0..reach - 8));
            for i in 0..8 {
                bytes.swap(a + i, b + i);
            }
        }
        5 => {
            let (at, n) = (rng.random_range(0..reach), rng.random_range(1..64));
            let end = (at + n).min(bytes.len());
            bytes.drain(at..end);
        }
        _ => {
            let (at, n) = (rng.random_range(0..reach), rng.random_range(1..64));
            let end = (at + n).min(bytes.len());
            let copy = bytes[at..end].to_vec();
            bytes.splice(at..at, copy);
        }
    }
}

fn one_line(text: &str) {
    assert!(!text.is_empty() && !text.contains('\n') && text.len() < 1000, "{text:?}");
}

/// Writes `rounds` damaged forms of `file` and hands each to `read`, which returns the error's text.
fn batter(file: &Path, reach: usize, rounds: u64, constant: usize, read: &dyn Fn() -> Result<(), String>) -> u64 {
    let intact = std::fs::read(file).unwrap();
    read().unwrap();
    let mut refused = 0;
    for seed in 0..rounds {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut bytes = intact.clone();
        damage(&mut bytes, reach, &mut rng);
        std::fs::write(file, &bytes).unwrap();
        let size = bytes.len();
        drop(bytes);
        let (result, peak) = peak(|| catch_unwind(AssertUnwindSafe(read)));
        match result {
            Ok(Ok(())) => {}
            Ok(Err(text)) => {
                one_line(&text);
                refused += 1;
            }
            Err(_) => panic!("{} seed {seed}: the reader panicked", file.display()),
        }
        assert!(peak <= 2 * size + constant, "{} seed {seed}: {peak} bytes for a file of {size}", file.display());
    }
    std::fs::write(file, &intact).unwrap();
    refused
}

fn load(path: &Path) -> Result<(), String> {
    let loaded = common::open(path).map_err(|e| e.to_string())?;
    loaded.metadata.warnings.iter().for_each(|w| one_line(w));
    if let Ok(tokenizer) = &loaded.tokenizer {
        tokenizer.warnings().iter().for_each(|w| one_line(w));
        let ids = tokenizer.encode("abc <|im_end|> 12é\n", true).map_err(|e| e.to_string())?;
        tokenizer.decode(&ids).map_err(|e| e.to_string())?;
    }
    loaded.tokenizer.map(drop).map_err(|e| e.to_string())
}

/// A small model as a Hugging Face folder, with its numbers from `common::data`'s formula.
fn hugging_face(folder: &Folder) {
    use safetensors::tensor::{Dtype, TensorView};
    let config = serde_json::json!({
        "model_type": "qwen3_next", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "num_experts": 3,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "full_attention_interval": 2, "tie_word_embeddings": true, "eos_token_id": [1, 2],
        "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "rope_type": "default"}
    });
    std::fs::write(folder.file("config.json"), serde_json::to_string_pretty(&config).unwrap()).unwrap();
    let mut shapes: Vec<(String, Vec<usize>)> =
        vec![("model.embed_tokens.weight".into(), vec![64, 32]), ("model.norm.weight".into(), vec![32])];
    for i in 0..2 {
        let mut add = |name: &str, shape: &[usize]| shapes.push((format!("model.layers.{i}.{name}"), shape.to_vec()));
        add("input_layernorm.weight", &[32]);
        add("post_attention_layernorm.weight", &[32]);
        if i == 0 {
            add("linear_attn.in_proj_qkvz.weight", &[96, 32]);
            add("linear_attn.in_proj_ba.weight", &[8, 32]);
            add("linear_attn.conv1d.weight", &[64, 1, 4]);
            add("linear_attn.A_log", &[4]);
            add("linear_attn.dt_bias", &[4]);
            add("linear_attn.norm.weight", &[8]);
            add("linear_attn.out_proj.weight", &[32, 32]);
            add("mlp.experts.gate_up_proj", &[3, 32, 32]);
            add("mlp.experts.down_proj", &[3, 32, 16]);
        } else {
            add("self_attn.q_proj.weight", &[128, 32]);
            add("self_attn.k_proj.weight", &[32, 32]);
            add("self_attn.v_proj.weight", &[32, 32]);
            add("self_attn.o_proj.weight", &[32, 64]);
            add("self_attn.q_norm.weight", &[16]);
            add("self_attn.k_norm.weight", &[16]);
            for e in 0..3 {
                add(&format!("mlp.experts.{e}.gate_proj.weight"), &[16, 32]);
                add(&format!("mlp.experts.{e}.up_proj.weight"), &[16, 32]);
                add(&format!("mlp.experts.{e}.down_proj.weight"), &[32, 16]);
            }
        }
        add("mlp.gate.weight", &[3, 32]);
        add("mlp.shared_expert_gate.weight", &[1, 32]);
        add("mlp.shared_expert.gate_proj.weight", &[16, 32]);
        add("mlp.shared_expert.up_proj.weight", &[16, 32]);
        add("mlp.shared_expert.down_proj.weight", &[32, 16]);
    }
    let zeros = vec![0u8; 2 * 128 * 32];
    let views = shapes.iter().map(|(name, shape)| {
        let bytes = 2 * shape.iter().product::<usize>();
        (name.clone(), TensorView::new(Dtype::BF16, shape.clone(), &zeros[..bytes]).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.file("model.safetensors")).unwrap();

    let chars = common::byte_chars();
    let mut vocab: serde_json::Map<String, serde_json::Value> =
        chars.iter().take(61).enumerate().map(|(i, c)| (c.clone(), i.into())).collect();
    vocab.insert(format!("{}{}", chars[40], chars[41]), 61.into());
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": {"type": "NFC"}, "post_processor": null,
        "added_tokens": [{"id": 62, "content": "<|im_end|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [[chars[40], chars[41]]]}
    });
    std::fs::write(folder.file("tokenizer.json"), serde_json::to_string(&tokenizer).unwrap()).unwrap();
}

/// A prompt cache of a small model; in every second round the checksum is that of the damaged file.
fn prompt_cache(folder: &Folder) {
    let loaded = common::open(&folder.file("bf16.gguf")).unwrap();
    let model = Model::new(loaded.config, loaded.weights);
    let mut session = Session::new(&model, 40, CacheTypes::default()).unwrap();
    session.read(&[1, 2, 3, 4, 5], 4, &Options::default(), &mut |_| true).unwrap();
    let file = folder.file("cache.q3n");
    prompt_cache::save(&file, &session, "a note").unwrap();
    let session = RefCell::new(session);
    for seal in [false, true] {
        let read = || {
            if seal {
                let mut bytes = std::fs::read(&file).unwrap();
                if let Some(at) = bytes.len().checked_sub(8) {
                    let sum = twox_hash::XxHash3_64::oneshot(&bytes[..at]);
                    bytes[at..].copy_from_slice(&sum.to_le_bytes());
                    std::fs::write(&file, bytes).unwrap();
                }
            }
            prompt_cache::load(&file, &mut session.borrow_mut()).map(drop).map_err(|e| e.to_string())
        };
        let refused = batter(&file, 160, 400, 512 << 10, &read);
        assert!(if seal { refused > 200 } else { refused >= 399 }, "{refused}");
    }
}

/// What a tokenizer costs however small it is: the word cache of the `tokenizers` crate and its regex.
const TOKENIZER: usize = 6 << 20;

#[test]
fn damaged_files_are_refused_in_one_line_and_little_memory() {
    let folder = Folder::new();
    // The first regex and tokenizer of a process fill tables that stay.
    let warm = folder.file("warm.gguf");
    small(DType::Q8_0).write(&warm);
    load(&warm).unwrap();

    for (quant, name) in [(DType::Q8_0, "q8_0.gguf"), (DType::BF16, "bf16.gguf")] {
        let file = folder.file(name);
        small(quant).write(&file);
        let header = 12_000;
        let open = || Gguf::open(&file, Default::default()).map(drop).map_err(|e| e.to_string());
        let refused = batter(&file, header, 400, 64 << 10, &open);
        assert!(refused > 150, "{refused}");
        let refused = batter(&file, header, 250, TOKENIZER, &|| load(&file));
        assert!(refused > 120, "{refused}");
    }

    let hf = Folder::new();
    hugging_face(&hf);
    let read = || match load(&hf.0) {
        // The little vocabulary does not hold every byte; that is an answer too.
        Err(text) if text.contains("no token holds the byte") => Ok(()),
        other => other,
    };
    for (name, reach, rounds, most) in [
        ("model.safetensors", 5_000, 400, 64),
        ("config.json", usize::MAX, 300, 8),
        ("tokenizer.json", usize::MAX, 400, 8),
    ] {
        let file = hf.file(name);
        // Reading the other files of the folder costs the same every time.
        let refused = batter(&file, reach, rounds, TOKENIZER, &read);
        assert!(refused > most, "{name}: {refused}");
    }
    let tokenizer = hf.file("tokenizer.json");
    let alone = || Tokenizer::from_json(&tokenizer, 64).map(drop).map_err(|e| e.to_string());
    batter(&tokenizer, usize::MAX, 200, TOKENIZER, &alone);

    prompt_cache(&folder);

    // Claims that are far larger than the file.
    let claims: &[(&[u8], &str)] = &[
        (b"", "model.safetensors"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff{}", "header of 18446744073709551615 bytes"),
        (b"\x02\0\0\0\0\0\0\0{}", "is missing"),
    ];
    for (bytes, expected) in claims {
        std::fs::write(hf.file("model.safetensors"), bytes).unwrap();
        let (result, peak) = peak(|| load(&hf.0));
        let text = result.unwrap_err();
        one_line(&text);
        assert!(text.contains(expected), "{text}");
        assert!(peak < 1 << 20, "{peak}");
    }
    let mut list = br#"{"a":{"dtype":"F32","shape":["#.to_vec();
    list.extend(b"0,".repeat(2 << 20));
    list.extend(br#"0],"data_offsets":[0,0]}}"#);
    let mut bytes = (list.len() as u64).to_le_bytes().to_vec();
    bytes.extend(list);
    std::fs::write(hf.file("model.safetensors"), &bytes).unwrap();
    let (result, peak) = peak(|| load(&hf.0));
    assert!(result.unwrap_err().contains("longer than"));
    assert!(peak < 1 << 20, "{peak}");
}
