//! What each kind of wrong file is told, and what unusual right files give.

mod common;

use common::{open, refused, same, small, Folder, Small, HIDDEN, VOCAB};
use qwen3next_kernels::DType;
use qwen3next_model::config::{LayerKind, Mlp};
use qwen3next_model::file::Options;
use qwen3next_model::gguf::{Gguf, Put, Value, Writer};
use qwen3next_model::load;
use qwen3next_model::weights::{Ffn, Mixer};

/// The error of the small model after a change.
fn changed(change: impl FnOnce(&mut Small)) -> String {
    let folder = Folder::new();
    let mut model = small(DType::F32);
    change(&mut model);
    model.write(&folder.file("m.gguf"));
    refused(&folder.file("m.gguf"))
}

fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

#[test]
fn missing_and_misshapen_parts_are_named() {
    for key in [
        "block_count",
        "embedding_length",
        "attention.head_count",
        "ssm.state_size",
        "ssm.group_count",
        "expert_used_count",
    ] {
        let key = format!("qwen3next.{key}");
        assert_says(
            &changed(|m| {
                m.unset(&key);
            }),
            &["m.gguf", &key, "is missing"],
        );
    }
    for tensor in ["token_embd.weight", "blk.0.ssm_a", "blk.1.attn_q.weight", "blk.1.ffn_down_exps.weight"] {
        assert_says(
            &changed(|m| {
                m.without(tensor);
            }),
            &["m.gguf", tensor, "is missing"],
        );
    }
    let shape = |name: &'static str, shape: &'static [usize]| {
        changed(|m| {
            m.without(name).with(name, DType::F32, shape);
        })
    };
    assert_says(&shape("blk.1.attn_k.weight", &[31, 32]), &["blk.1.attn_k.weight", "[31, 32]", "[1, 32, 32]"]);
    assert_says(&shape("output_norm.weight", &[16]), &["output_norm.weight", "[16]", "[32]"]);
    assert_says(&shape("blk.0.ssm_conv1d.weight", &[64, 3]), &["blk.0.ssm_conv1d.weight", "[64, 3]", "[64, 4]"]);
    assert_says(&shape("token_embd.weight", &[299, 32]), &["output.weight", "[300, 32]", "[1, 299, 32]"]);
    let text = changed(|m| {
        m.without("output_norm.weight").with("output_norm.weight", DType::Q8_0, &[32]);
    });
    assert_says(&text, &["output_norm.weight", "type Q8_0", "F32, F16 or BF16"]);
    // A bias that were ignored would give wrong answers.
    assert_says(
        &changed(|m| {
            m.with("blk.1.attn_q.bias", DType::F32, &[128]);
        }),
        &["blk.1.attn_q.bias", "is no tensor"],
    );
}

#[test]
fn senseless_values_are_named() {
    let set = |key: &str, value: Put| {
        changed(|m| {
            m.set(&format!("qwen3next.{key}"), value);
        })
    };
    assert_says(&set("block_count", Put::U32(0)), &["block_count", "is 0"]);
    assert_says(&set("block_count", Put::U32(u32::MAX)), &["block_count", "4294967295"]);
    assert_says(&set("block_count", Put::Str("two".into())), &["block_count", "\"two\"", "whole number"]);
    assert_says(&set("block_count", Put::I32(-1)), &["block_count", "-1"]);
    assert_says(&set("nextn_predict_layers", Put::U32(2)), &["block_count", "2 MTP blocks"]);
    assert_says(&set("attention.head_count", Put::U32(3)), &["attention.heads", "is 3", "multiple of kv_heads (2)"]);
    assert_says(&set("attention.value_length", Put::U32(8)), &["attention.value_length", "is 8", "(16)"]);
    assert_says(&set("ssm.inner_size", Put::U32(33)), &["ssm.inner_size", "is 33", "multiple"]);
    assert_says(&set("ssm.time_step_rank", Put::U32(0)), &["ssm.inner_size", "time_step_rank (0)"]);
    assert_says(&set("ssm.group_count", Put::U32(0)), &["delta.k_heads", "is 0"]);
    assert_says(&set("ssm.conv_kernel", Put::U32(100)), &["delta.conv_width", "is 100", "16"]);
    assert_says(&set("expert_used_count", Put::U32(5)), &["moe.top_k", "is 5", "1 to 4"]);
    assert_says(&set("rope.dimension_count", Put::U32(17)), &["attention.rotary", "is 17"]);
    assert_says(&set("rope.freq_base", Put::F32(f32::NAN)), &["attention.rope_base", "NaN"]);
    assert_says(&set("attention.layer_norm_rms_epsilon", Put::F32(f32::INFINITY)), &["norm_eps", "inf"]);
    assert_says(&set("full_attention_interval", Put::U32(0)), &["full_attention_interval", "is 0"]);
    assert_says(&set("attention.recurrent_layers", Put::Bools(vec![true])), &["recurrent_layers", "1 entries"]);
    assert_says(&set("rope.scaling.type", Put::Str("yarn".into())), &["rope.scaling.type", "yarn"]);
    assert_says(&set("expert_gating_func", Put::U32(2)), &["expert_gating_func", "is 2"]);
    assert_says(&set("vocab_size", Put::U32(7)), &["vocab_size", "is 7", "300 rows"]);
    assert_says(
        &changed(|m| m.keys[0] = ("general.architecture".into(), Put::Str("x".into()))),
        &["general.architecture", "twice"],
    );
}

#[test]
fn another_architecture_is_named() {
    let folder = Folder::new();
    let file = folder.file("other.gguf");
    Writer::new("llama\n2").write(&file, |_, _| Ok(())).unwrap();
    assert_says(&refused(&file), &["other.gguf", "general.architecture", "\"llama\\n2\"", "\"qwen3next\""]);
    std::fs::write(folder.file("config.json"), r#"{"model_type": "qwen3_moe"}"#).unwrap();
    assert_says(&refused(&folder.0), &["config.json", "model_type", "qwen3_moe", "qwen3_next"]);
    assert_says(&refused(&folder.file("absent.gguf")), &["absent.gguf"]);
}

/// The small model's bytes, and where a tensor's type number and offset stand in them.
fn bytes_and_entry(tensor: &str) -> (Folder, Vec<u8>, usize) {
    let folder = Folder::new();
    small(DType::F32).write(&folder.file("m.gguf"));
    let bytes = std::fs::read(folder.file("m.gguf")).unwrap();
    let mut name = (tensor.len() as u64).to_le_bytes().to_vec();
    name.extend(tensor.as_bytes());
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap() + name.len();
    let axes = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    (folder, bytes, at + 4 + 8 * axes)
}

#[test]
fn broken_headers_are_named() {
    let tensor = "blk.1.attn_k.weight";
    let patched = |at: usize, patch: &[u8]| {
        let (folder, mut bytes, entry) = bytes_and_entry(tensor);
        let at = if at == usize::MAX { entry } else { at };
        bytes[at..at + patch.len()].copy_from_slice(patch);
        std::fs::write(folder.file("m.gguf"), bytes).unwrap();
        refused(&folder.file("m.gguf"))
    };
    let entry = usize::MAX;
    assert_says(&patched(0, b"GGML"), &["m.gguf", "is not a GGUF file"]);
    assert_says(&patched(4, &1u32.to_le_bytes()), &["version 1", "2 or 3"]);
    assert_says(&patched(4, &3u32.to_be_bytes()), &["big-endian"]);
    assert_says(&patched(8, &(1u64 << 60).to_le_bytes()), &["1152921504606846976 tensors"]);
    assert_says(&patched(16, &65_000u64.to_le_bytes()), &["65000 keys", "do not fit"]);
    // Q8_1 has the block of Q8_0's 32 columns; the type is known but not built.
    assert_says(
        &patched(entry, &9u32.to_le_bytes()),
        &["blk.1.attn_k.weight", "type Q8_1 is not supported; supported: F32, F16, BF16, Q8_0"],
    );
    assert_says(
        &patched(entry, &17u32.to_le_bytes()),
        &["blk.1.attn_k.weight", "32 columns of type IQ2_XS", "multiple of 256"],
    );
    assert_says(&patched(entry, &77u32.to_le_bytes()), &["blk.1.attn_k.weight", "type number 77"]);
    let offset = |value: u64| {
        let mut patch = 0u32.to_le_bytes().to_vec();
        patch.extend(value.to_le_bytes());
        patched(entry, &patch)
    };
    assert_says(&offset(16), &["blk.1.attn_k.weight", "multiple of 32"]);
    assert_says(&offset(0), &["overlaps"]);
    assert_says(&offset(1 << 40), &["blk.1.attn_k.weight", "past the file's end"]);
    assert_says(&offset(u64::MAX - 31), &["blk.1.attn_k.weight", "past the file's end"]);
    for alignment in [0u32, 33] {
        let text = changed(|m| {
            m.keys.insert(0, ("general.alignment".into(), Put::U32(alignment)));
        });
        assert_says(&text, &["general.alignment", "power of two"]);
    }
    let (folder, bytes, _) = bytes_and_entry(tensor);
    std::fs::write(folder.file("m.gguf"), &bytes[..bytes.len() - 1]).unwrap();
    assert_says(&refused(&folder.file("m.gguf")), &["past the file's end"]);
    std::fs::write(folder.file("m.gguf"), b"").unwrap();
    assert_says(&refused(&folder.file("m.gguf")), &["is not a GGUF file"]);
}

#[test]
fn deep_arrays_are_refused_without_recursion() {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(b"k");
    bytes.extend(9u32.to_le_bytes());
    for _ in 0..100_000 {
        bytes.extend(9u32.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
    }
    let folder = Folder::new();
    std::fs::write(folder.file("deep.gguf"), bytes).unwrap();
    assert_says(&refused(&folder.file("deep.gguf")), &["deep.gguf", "k", "nested"]);
}

#[test]
fn every_supported_type_loads_and_stays_mapped() {
    for dtype in DType::ALL.into_iter().filter(|t| t.block() <= HIDDEN) {
        let folder = Folder::new();
        small(dtype).write(&folder.file("m.gguf"));
        let loaded = open(&folder.file("m.gguf")).unwrap();
        let Mixer::Delta(delta) = &loaded.weights.layers[0].mixer else { panic!("layer 0 is a DeltaNet layer") };
        assert_eq!((delta.qkv.dtype(), delta.qkv.is_mapped()), (dtype, true));
        assert_eq!(loaded.config.layers, [LayerKind::Delta, LayerKind::Attention]);
        // The whole file in memory gives the same model.
        let read = load(&folder.file("m.gguf"), Options { mmap: false }, &mut |_| {}).unwrap();
        assert!(!read.weights.output.is_mapped() && same(&read.weights.output, &loaded.weights.output));
    }
}

#[test]
fn any_alignment_gives_the_same_weights() {
    let folder = Folder::new();
    let mut model = small(DType::F32);
    model.write(&folder.file("32.gguf"));
    let expected = open(&folder.file("32.gguf")).unwrap().weights;
    for alignment in [1, 2, 8, 4096] {
        let file = folder.file(&format!("{alignment}.gguf"));
        model.alignment = Some(alignment);
        // A name of odd length moves the data to an odd address.
        model.set("general.name", Put::Str("x".repeat(alignment % 7)));
        model.write(&file);
        let weights = open(&file).unwrap().weights;
        assert!(same(&weights.token_embd, &expected.token_embd) && same(&weights.output, &expected.output));
        assert_eq!(weights.token_embd.bytes().as_ptr().align_offset(4), 0);
        assert_eq!(weights.output_norm, expected.output_norm);
    }
}

#[test]
fn optional_parts_of_a_gguf_file() {
    let loads = |change: &dyn Fn(&mut Small)| {
        let folder = Folder::new();
        let mut model = small(DType::F32);
        change(&mut model);
        model.write(&folder.file("m.gguf"));
        open(&folder.file("m.gguf")).unwrap_or_else(|e| panic!("{e}"))
    };
    let tied = loads(&|m| {
        m.without("output.weight");
    });
    assert!(tied.config.tied && same(&tied.weights.output, &tied.weights.token_embd));
    let listed = loads(&|m| {
        m.unset("qwen3next.full_attention_interval");
        m.set("qwen3next.attention.recurrent_layers", Put::Bools(vec![true, false]));
    });
    assert_eq!(listed.config.layers, [LayerKind::Delta, LayerKind::Attention]);
    let per_layer = loads(&|m| {
        m.set("qwen3next.attention.head_count_kv", Put::I32s(vec![0, 2]));
    });
    assert_eq!(per_layer.config.attention.kv_heads, 2);
    assert!(
        !loads(&|m| {
            m.set("qwen3next.expert_weights_norm", Put::Bool(false));
        })
        .config
        .moe
        .normalize
    );

    let bare = loads(&|m| {
        for part in ["ffn_gate_inp_shexp", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"] {
            m.without(&format!("blk.0.{part}.weight")).without(&format!("blk.1.{part}.weight"));
        }
        m.unset("qwen3next.expert_shared_feed_forward_length");
    });
    assert_eq!(bare.config.moe.shared_ff, 0);
    assert!(bare.weights.layers.iter().all(|l| matches!(&l.ffn, Ffn::Moe(m) if m.shared.is_none())));

    let dense = loads(&|m| {
        m.tensors.retain(|(name, ..)| !name.starts_with("blk.1.ffn"));
        m.with("blk.1.ffn_gate.weight", DType::F32, &[64, 32]).with("blk.1.ffn_up.weight", DType::F32, &[64, 32]);
        m.with("blk.1.ffn_down.weight", DType::F32, &[32, 64]);
    });
    assert_eq!(dense.config.mlp, [Mlp::Moe, Mlp::Dense]);

    let fused = loads(&|m| {
        m.without("blk.1.attn_q.weight").without("blk.1.attn_k.weight").without("blk.1.attn_v.weight");
        m.with("blk.1.attn_qkv.weight", DType::F32, &[192, 32]);
    });
    let Mixer::Attention(a) = &fused.weights.layers[1].mixer else { panic!("layer 1 is an attention layer") };
    assert_eq!([a.q.rows(), a.k.rows(), a.v.rows()], [128, 32, 32]);
    assert!(a.v.is_mapped());

    for broken in [Put::Str("llama".into()), Put::Str("none".into())] {
        let silent = loads(&|m| {
            m.set("tokenizer.ggml.model", broken.clone());
        });
        assert_says(&silent.tokenizer.unwrap_err().to_string(), &["tokenizer.ggml.model", "gpt2"]);
    }
}

#[test]
fn merged_experts_are_views_into_one_tensor() {
    let folder = Folder::new();
    let mut model = small(DType::Q8_0);
    for i in 0..2 {
        model.without(&format!("blk.{i}.ffn_gate_exps.weight")).without(&format!("blk.{i}.ffn_up_exps.weight"));
        model.with(&format!("blk.{i}.ffn_gate_up_exps.weight"), DType::Q8_0, &[4, 64, HIDDEN]);
    }
    model.write(&folder.file("m.gguf"));
    let loaded = open(&folder.file("m.gguf")).unwrap();
    let Ffn::Moe(moe) = &loaded.weights.layers[0].ffn else { panic!("a sparse layer") };
    let half = 32 * HIDDEN / 32 * 34;
    assert!(moe.gate.is_mapped() && moe.up.is_mapped());
    assert_eq!((moe.gate.expert_stride(), moe.up.expert_stride()), (64 * HIDDEN, 64 * HIDDEN));
    assert_eq!(moe.up.bytes().as_ptr() as usize - moe.gate.bytes().as_ptr() as usize, half);
    assert_eq!(moe.gate.bytes().len(), 7 * half);
    assert_eq!(moe.gate.packed_bytes(), 4 * half);
    let (gate, up) = (moe.gate.expert(3).unwrap(), moe.up.expert(3).unwrap());
    assert_eq!(up.bytes().as_ptr() as usize - gate.bytes().as_ptr() as usize, half);
    assert!(moe.gate.expert(4).is_none() && moe.gate.row_range(1, 32).is_none());
}

#[test]
fn split_files_are_checked() {
    let folder = Folder::new();
    let model = small(DType::F32);
    let (first, second) = model.tensors.split_at(10);
    let part = |n: u16| folder.file(&format!("m-{:05}-of-00002.gguf", n + 1));
    let write = |n: u16, tensors: &[(String, DType, Vec<usize>)], number: u16, total: i32| {
        let mut keys = if n == 0 { model.keys.clone() } else { Vec::new() };
        keys.push(("split.no".into(), Put::U16(number)));
        keys.push(("split.count".into(), Put::U16(2)));
        keys.push(("split.tensors.count".into(), Put::I32(total)));
        Small { keys, tensors: tensors.to_vec(), alignment: None }.write(&part(n));
    };
    let total = model.tensors.len() as i32;
    write(0, first, 0, total);
    assert_says(&refused(&part(0)), &["m-00002-of-00002.gguf"]);
    write(1, second, 1, total);
    model.write(&folder.file("one.gguf"));
    let (one, two) = (open(&folder.file("one.gguf")).unwrap(), open(&part(1)).unwrap());
    assert_eq!((one.config, two.metadata.files.len()), (two.config, 2));
    assert!(same(&one.weights.output, &two.weights.output));

    write(1, second, 0, total);
    assert_says(&refused(&part(0)), &["m-00002-of-00002.gguf", "split.no", "is 0, expected 1"]);
    write(1, &model.tensors[9..], 1, total);
    assert_says(&refused(&part(0)), &[model.tensors[9].0.as_str(), "is in part 1 as well"]);
    write(1, &second[1..], 1, total);
    assert_says(&refused(&part(1)), &["split.tensors.count"]);
    write(1, second, 1, total);
    std::fs::rename(part(1), folder.file("renamed.gguf")).unwrap();
    assert_says(&refused(&folder.file("renamed.gguf")), &["split.count", "-of-00002.gguf"]);
}

#[test]
fn keys_read_back_as_they_were_written() {
    let folder = Folder::new();
    let mut writer = Writer::new("qwen3next");
    writer.put("u", Put::U64(u64::MAX)).put("i", Put::I32(-5)).put("f", Put::F32(0.5)).put("b", Put::Bool(true));
    writer.put("s", Put::Str("é\n".into())).put("l", Put::Strs(vec!["a".into(), String::new()]));
    writer.put("n", Put::I32s(vec![-1, 7])).put("t", Put::Bools(vec![true, false]));
    writer.write(&folder.file("k.gguf"), |_, _| Ok(())).unwrap();
    let file = Gguf::open(&folder.file("k.gguf"), Options::default()).unwrap();
    let value = |key: &str| file.value(key).unwrap();
    assert_eq!(value("u"), Value::Int(u64::MAX.into()));
    assert_eq!((value("i"), value("f"), value("b")), (Value::Int(-5), Value::Float(0.5), Value::Bool(true)));
    assert_eq!(value("s"), Value::Str("é\n"));
    let all = |key: &str| file.list(key).unwrap().unwrap().iter().collect::<Vec<_>>();
    assert_eq!(all("l"), [Value::Str("a"), Value::Str("")]);
    assert_eq!(all("n"), [Value::Int(-1), Value::Int(7)]);
    assert_eq!(all("t"), [Value::Bool(true), Value::Bool(false)]);
    assert_eq!(file.keys().count(), 9);
}

#[test]
fn a_failed_write_leaves_no_file() {
    let folder = Folder::new();
    let mut writer = Writer::new("qwen3next");
    writer.tensor("a", DType::F32, &[4]);
    let text = writer.write(&folder.file("w.gguf"), |_, _| Ok(())).unwrap_err().to_string();
    assert_says(&text, &["w.gguf", "a", "0 bytes were written, expected 16"]);
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 0);
    writer.tensor("b", DType::Q8_0, &[33]);
    assert_says(&writer.write(&folder.file("w.gguf"), |_, _| Ok(())).unwrap_err().to_string(), &["b", "[33]", "q8_0"]);
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 0);
}

#[test]
fn the_small_vocabulary_is_the_embedding() {
    let folder = Folder::new();
    small(DType::F16).write(&folder.file("m.gguf"));
    let loaded = open(&folder.file("m.gguf")).unwrap();
    assert_eq!((loaded.config.vocab, loaded.tokenizer.unwrap().vocab()), (VOCAB, VOCAB));
    // Without a usable tokenizer the model still runs on ids.
    let mut model = small(DType::F16);
    model.set("tokenizer.ggml.eos_token_id", Put::U32(VOCAB as u32)).write(&folder.file("eos.gguf"));
    let error = open(&folder.file("eos.gguf")).unwrap().tokenizer.unwrap_err().to_string();
    assert_says(&error, &["tokenizer.ggml.eos_token_id", "is 300", "300 tokens"]);
}
