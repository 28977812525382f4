//! Every golden model in every container it comes in: all give one model.

mod common;

use common::{open, same};
use qwen3next_kernels::DType;
use qwen3next_model::config::Mlp;
use qwen3next_model::quantize::{quantize, Types};
use qwen3next_model::weights::{Ffn, Mixer, Swiglu};
use qwen3next_model::Loaded;
use qwen3next_model::{Tensor, Tokenizer};
use std::path::{Path, PathBuf};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../verify/golden")
}

fn listed(folder: &Path) -> Vec<PathBuf> {
    let read = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<PathBuf> = read.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Asserts that two loaded models are one, bit for bit; -exp(A_log) was taken by another exp.
fn assert_one_model(a: &Loaded, b: &Loaded, what: &str) {
    assert_eq!(a.config, b.config, "{what}");
    let tensor = |x: &Tensor, y: &Tensor, name: &str| assert!(same(x, y), "{what}: {name}: {x:?} {y:?}");
    let floats = |x: &[f32], y: &[f32], name: &str| assert_eq!(bits(x), bits(y), "{what}: {name}");
    let swiglu = |x: &Swiglu, y: &Swiglu, name: &str| {
        tensor(&x.gate, &y.gate, name);
        tensor(&x.up, &y.up, name);
        tensor(&x.down, &y.down, name);
    };
    let (v, w) = (&a.weights, &b.weights);
    tensor(&v.token_embd, &w.token_embd, "token_embd");
    tensor(&v.output, &w.output, "output");
    floats(&v.output_norm, &w.output_norm, "output_norm");
    assert_eq!(v.layers.len(), w.layers.len(), "{what}");
    for (i, (x, y)) in v.layers.iter().zip(&w.layers).enumerate() {
        let name = |part: &str| format!("layer {i} {part}");
        floats(&x.attn_norm, &y.attn_norm, &name("attn_norm"));
        floats(&x.post_attention_norm, &y.post_attention_norm, &name("post_attention_norm"));
        match (&x.mixer, &y.mixer) {
            (Mixer::Delta(x), Mixer::Delta(y)) => {
                tensor(&x.qkv, &y.qkv, &name("qkv"));
                tensor(&x.z, &y.z, &name("z"));
                tensor(&x.ba, &y.ba, &name("ba"));
                tensor(&x.out, &y.out, &name("out"));
                floats(&x.conv, &y.conv, &name("conv"));
                floats(&x.dt_bias, &y.dt_bias, &name("dt_bias"));
                floats(&x.norm, &y.norm, &name("norm"));
                assert_eq!(x.a.len(), y.a.len());
                for (p, q) in x.a.iter().zip(&y.a) {
                    assert!(
                        *p < 0.0 && (p - q).abs() <= 2.0 * f32::EPSILON * q.abs(),
                        "{what}: {}: {p} {q}",
                        name("a")
                    );
                }
            }
            (Mixer::Attention(x), Mixer::Attention(y)) => {
                for (p, q) in [(&x.q, &y.q), (&x.k, &y.k), (&x.v, &y.v), (&x.o, &y.o)] {
                    tensor(p, q, &name("attention"));
                }
                floats(&x.q_norm, &y.q_norm, &name("q_norm"));
                floats(&x.k_norm, &y.k_norm, &name("k_norm"));
            }
            _ => panic!("{what}: {}", name("mixer")),
        }
        match (&x.ffn, &y.ffn) {
            (Ffn::Dense(x), Ffn::Dense(y)) => swiglu(x, y, &name("dense")),
            (Ffn::Moe(x), Ffn::Moe(y)) => {
                tensor(&x.router, &y.router, &name("router"));
                tensor(&x.gate, &y.gate, &name("gate"));
                tensor(&x.up, &y.up, &name("up"));
                tensor(&x.down, &y.down, &name("down"));
                let (x, y) = (x.shared.as_ref().unwrap(), y.shared.as_ref().unwrap());
                floats(&x.gate_vec, &y.gate_vec, &name("shared gate"));
                swiglu(&x.expert, &y.expert, &name("shared"));
            }
            _ => panic!("{what}: {}", name("ffn")),
        }
    }
}

#[test]
fn all_containers_of_a_golden_model_give_one_model() {
    let (mut models, mut files, mut splits) = (0, 0, 0);
    for folder in listed(&golden().join("models")).into_iter().filter(|p| p.is_dir()) {
        let hf = open(&folder).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(hf.weights.layers.len(), hf.config.layers.len());
        models += 1;
        for path in listed(&folder).into_iter().filter(|p| p.extension().is_some_and(|e| e == "gguf")) {
            let gguf = open(&path).unwrap_or_else(|e| panic!("{e}"));
            assert_one_model(&hf, &gguf, &path.display().to_string());
            assert!(gguf.metadata.parameters() > 0 && gguf.metadata.parameters() == hf.metadata.parameters());
            files += 1;
            // Any part of a split file opens all of them.
            splits += usize::from(gguf.metadata.files.len() > 1);
        }
    }
    assert!(models >= 7 && files >= 10 && splits >= 2, "{models} models, {files} files, {splits} parts");
}

/// Requantised to f32, which loses nothing, every container holds the model it held.
#[test]
fn quantize_keeps_the_model_of_every_container() {
    let out = common::Folder::new();
    let (mut folders, mut files) = (0, 0);
    for folder in listed(&golden().join("models")).into_iter().filter(|p| p.is_dir()) {
        let ggufs = listed(&folder).into_iter().filter(|p| p.extension().is_some_and(|e| e == "gguf"));
        for input in ggufs.chain([folder.clone()]) {
            let mut from = open(&input).unwrap();
            quantize(&input, &out.file("m.gguf"), Types::all(DType::F32), &mut |_| ()).unwrap();
            let made = open(&out.file("m.gguf")).unwrap();
            assert_eq!(made.metadata.files.len(), 1);
            if input.is_dir() {
                // The MTP block is no part of what is written.
                from.config.mtp_layers = 0;
                folders += 1;
            } else {
                let tensors = |m: &Loaded| m.metadata.tensors.iter().map(|t| t.name.clone()).collect::<Vec<_>>();
                assert_eq!(tensors(&made), tensors(&from), "MTP included");
                files += 1;
            }
            assert_one_model(&from, &made, &input.display().to_string());
            let text = "In the beginning <|endoftext|> 1234\r\n  x";
            match (from.tokenizer, made.tokenizer) {
                (Ok(a), Ok(b)) => {
                    assert_eq!(a.encode(text, true).unwrap(), b.encode(text, true).unwrap());
                    assert_eq!((a.eos(), a.bos()), (b.eos(), b.bos()));
                }
                (a, b) => assert!(a.is_err() && b.is_err(), "{}", input.display()),
            }
        }
    }
    assert!(folders >= 7 && files >= 10, "{folders} folders, {files} files");
}

/// The `plain` model again, its tensors dealt to `shards` files in turn.
fn dealt(folder: &common::Folder, shards: usize) {
    use safetensors::SafeTensors;
    let plain = golden().join("models/plain");
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(plain.join(name), folder.file(name)).unwrap();
    }
    let bytes = std::fs::read(plain.join("model.safetensors")).unwrap();
    let mut tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let name = |shard: usize| format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
    let map: serde_json::Map<String, serde_json::Value> =
        tensors.iter().enumerate().map(|(i, (tensor, _))| (tensor.clone(), name(i % shards).into())).collect();
    for shard in 0..shards {
        let part =
            tensors.iter().enumerate().filter(|(i, _)| i % shards == shard).map(|(_, (n, t))| (n.clone(), t.clone()));
        safetensors::serialize_to_file(part, None, &folder.file(&name(shard))).unwrap();
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    std::fs::write(folder.file("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn experts_are_viewed_where_they_lie_evenly_and_copied_where_not() {
    let expert = |loaded: &Loaded| match &loaded.weights.layers[0].ffn {
        Ffn::Moe(moe) => moe.gate.clone(),
        Ffn::Dense(_) => panic!("a sparse layer"),
    };
    let plain = open(&golden().join("models/plain")).unwrap();
    let folder = common::Folder::new();
    dealt(&folder, 5);
    let copied = open(&folder.0).unwrap();
    assert_one_model(&plain, &copied, "dealt to 5 files");
    assert!(expert(&plain).is_mapped() && !expert(&copied).is_mapped());
    assert!(expert(&plain).expert_stride() > expert(&copied).expert_stride());
    assert_eq!(copied.metadata.files.len(), 5);
}

#[test]
fn a_wrong_index_is_named() {
    let folder = common::Folder::new();
    dealt(&folder, 2);
    let index = folder.file("model.safetensors.index.json");
    let intact = std::fs::read_to_string(&index).unwrap();
    let refused = |from: &str, to: &str| {
        assert!(intact.contains(from));
        std::fs::write(&index, intact.replacen(from, to, 1)).unwrap();
        common::refused(&folder.0)
    };
    let first = "model-00001-of-00002.safetensors";
    let text = refused(first, "../model.safetensors");
    assert!(text.contains("index.json") && text.contains("expected a file of this folder"), "{text}");
    let text = refused(first, "absent.safetensors");
    assert!(text.contains("absent.safetensors"), "{text}");
    let text = refused("lm_head.weight", "lm_tail.weight");
    assert!(text.contains("lm_tail.weight: is not in model-0000"), "{text}");
    let text = refused("weight_map", "weights");
    assert!(text.contains("index.json") && text.contains("weight_map"), "{text}");
    std::fs::write(&index, &intact).unwrap();
    std::fs::remove_file(folder.file(first)).unwrap();
    assert!(common::refused(&folder.0).contains(first));
}

#[test]
fn what_is_special_in_the_golden_models_is_read() {
    let load = |name: &str| open(&golden().join("models").join(name)).unwrap_or_else(|e| panic!("{e}"));
    let dims = load("dk_ne_dv").config.delta;
    assert_eq!((dims.k_dim, dims.v_dim), (8, 24));
    assert!(load("tied").config.tied);
    let mixed = load("dense_mix").config;
    assert_eq!(mixed.mlp, [Mlp::Dense, Mlp::Dense, Mlp::Dense, Mlp::Moe, Mlp::Dense]);
    let pattern = load("pattern/model.gguf").config;
    assert!(!pattern.moe.normalize);
    assert_eq!((pattern.delta.conv_width, pattern.attention.rotary, pattern.attention.rope_base), (3, 16, 5e5));
    for form in ["mtp", "mtp/model.gguf"] {
        let mtp = load(form);
        assert_eq!((mtp.config.mtp_layers, mtp.config.layers.len()), (1, 2));
        assert!(mtp.metadata.warnings.iter().any(|w| w.contains("MTP")), "{:?}", mtp.metadata.warnings);
        assert!(mtp.metadata.tensors.iter().any(|t| !t.used));
    }
    assert_eq!(load("plain").metadata.warnings, Vec::<String>::new());
}

#[derive(serde::Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
}

#[derive(serde::Deserialize)]
struct Cases {
    cases: Vec<Case>,
    with_special_tokens_parsed: Vec<Case>,
}

/// The tokenizer of `json` as a GGUF file's keys.
fn as_gguf(json: &Path, out: &Path) -> usize {
    use qwen3next_model::gguf::{Put, Writer};
    let json: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    let added: Vec<(usize, String)> = json["added_tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| (t["id"].as_u64().unwrap() as usize, t["content"].as_str().unwrap().to_string()))
        .collect();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let mut tokens: Vec<(usize, String)> =
        vocab.iter().map(|(t, id)| (id.as_u64().unwrap() as usize, t.clone())).collect();
    tokens.extend(added.iter().cloned());
    tokens.sort();
    tokens.dedup();
    assert!(tokens.iter().enumerate().all(|(i, (id, _))| i == *id));
    let kind = |id: &usize| if added.iter().any(|(a, _)| a == id) { 3 } else { 1 };
    let merge = |m: &serde_json::Value| match m {
        serde_json::Value::String(s) => s.clone(),
        pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
    };
    let merges = json["model"]["merges"].as_array().unwrap().iter().map(merge).collect();
    let mut writer = Writer::new("qwen3next");
    writer.put("tokenizer.ggml.model", Put::Str("gpt2".into()));
    writer.put("tokenizer.ggml.pre", Put::Str("qwen2".into()));
    writer.put("tokenizer.ggml.token_type", Put::I32s(tokens.iter().map(|(id, _)| kind(id)).collect()));
    writer.put("tokenizer.ggml.merges", Put::Strs(merges));
    let count = tokens.len();
    writer.put("tokenizer.ggml.tokens", Put::Strs(tokens.into_iter().map(|(_, t)| t).collect()));
    writer.write(out, |_, _| Ok(())).unwrap();
    count
}

#[test]
fn golden_texts_give_golden_ids_and_back() {
    let folder = common::Folder::new();
    let json = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tokenizer.json");
    let gguf = folder.file("tokenizer.gguf");
    let vocab = as_gguf(&json, &gguf);
    let gguf = qwen3next_model::gguf::Gguf::open(&gguf, Default::default()).unwrap();
    let cases: Cases =
        serde_json::from_str(&std::fs::read_to_string(golden().join("tokenizer_cases.json")).unwrap()).unwrap();
    assert!(cases.cases.len() > 200);
    for tokenizer in [Tokenizer::from_json(&json, vocab).unwrap(), Tokenizer::from_gguf(&gguf, vocab).unwrap()] {
        assert_eq!(tokenizer.warnings(), Vec::<String>::new());
        for (case, special) in
            cases.cases.iter().map(|c| (c, false)).chain(cases.with_special_tokens_parsed.iter().map(|c| (c, true)))
        {
            let ids = tokenizer.encode(&case.text, special).unwrap();
            assert_eq!(ids, case.ids, "{:?}", case.text);
            assert_eq!(tokenizer.decode(&ids).unwrap(), case.text);
            let mut stream = tokenizer.stream();
            let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
            text.push_str(&stream.finish());
            assert_eq!(text, case.text);
        }
        // Unless asked for, a special token's text is plain text.
        for case in &cases.with_special_tokens_parsed {
            let ids = tokenizer.encode(&case.text, false).unwrap();
            assert_ne!(ids, case.ids);
            assert_eq!(tokenizer.decode(&ids).unwrap(), case.text);
        }
    }
}

#[test]
fn both_tokenizers_of_the_plain_model_agree() {
    let hf = open(&golden().join("models/plain")).unwrap().tokenizer.unwrap();
    let gguf = open(&golden().join("models/plain/model.gguf")).unwrap().tokenizer.unwrap();
    assert_eq!(hf.eos(), gguf.eos());
    for text in ["And it came to pass, that's 123 — ß\u{301}\n\n\t <|endoftext|>", "", "  a  ", "\u{0}\u{ffff}"] {
        for special in [false, true] {
            assert_eq!(hf.encode(text, special).unwrap(), gguf.encode(text, special).unwrap(), "{text:?}");
        }
    }
}
