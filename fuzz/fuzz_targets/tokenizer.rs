//! A tokenizer.json, or a GGUF file's vocabulary; the tokenizer then encodes and decodes a text.

#![no_main]

use qwen3next_model::gguf::Gguf;
use qwen3next_model::Tokenizer;
use std::path::Path;

const VOCAB: usize = 512;
const TEXT: &str = "In the beginning<|im_start|>  was\r\n3 words, it's \u{e9}\u{4e16}!<|im_end|>";

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let path = Path::new("fuzz");
    let tokenizer = if bytes.starts_with(b"GGUF") {
        Gguf::parse_bytes(path, bytes.to_vec()).and_then(|file| Tokenizer::from_gguf(&file, VOCAB))
    } else {
        let Ok(text) = String::from_utf8(bytes.to_vec()) else { return };
        Tokenizer::parse_json(path, text, VOCAB)
    };
    let Ok(tokenizer) = tokenizer else { return };
    for special in [false, true] {
        let Ok(ids) = tokenizer.encode(TEXT, special) else { continue };
        tokenizer.decode(&ids).expect("its own ids are known");
        let mut stream = tokenizer.stream();
        for id in ids {
            stream.push(id).expect("its own ids are known");
        }
        stream.finish();
    }
    for id in 0..VOCAB as u32 {
        tokenizer.token(id);
        tokenizer.is_control(id);
    }
});
