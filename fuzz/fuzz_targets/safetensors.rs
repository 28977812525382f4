//! A safetensors file, or the index of several.

#![no_main]

use qwen3next_model::safetensors::{parse_index, Safetensors};
use std::path::Path;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(file) = Safetensors::parse_bytes(Path::new("fuzz.safetensors"), bytes.to_vec()) {
        for entry in file.tensors().values() {
            assert!(entry.start + entry.bytes <= bytes.len());
        }
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        for shard in parse_index(Path::new("index.json"), text).into_iter().flat_map(|shards| shards.into_values()) {
            assert!(!shard.contains('/') && shard != "..");
        }
    }
});
