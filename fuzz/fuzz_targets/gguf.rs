//! A GGUF file: its header and every value in it, then config, weights and tokenizer.

#![no_main]

use qwen3next_model::gguf::{Gguf, Value};
use std::path::Path;

/// Walks a value to its end.
fn walk(value: Value) -> usize {
    match value {
        Value::Array(array) => array.iter().map(walk).sum(),
        Value::Str(text) => text.len(),
        _ => 1,
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = Gguf::parse_bytes(Path::new("fuzz.gguf"), bytes.to_vec()) else { return };
    file.keys().map(|(_, value)| walk(value)).sum::<usize>();
    for tensor in file.tensors() {
        assert!(tensor.start + tensor.bytes <= bytes.len());
    }
    let _ = qwen3next_model::load::load_parsed(file);
});
