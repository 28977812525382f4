//! Properties of the tokenizer over any text, and a vocabulary of the real size.

mod common;

use common::{byte_chars, Folder};
use proptest::prelude::*;
use qwen3next_model::gguf::{Gguf, Put, Writer};
use qwen3next_model::{Error, Tokenizer};
use std::sync::LazyLock;

fn tokenizer(tokens: Vec<String>, types: Vec<i32>, merges: Vec<String>, vocab: usize) -> Result<Tokenizer, Error> {
    let folder = Folder::new();
    let mut writer = Writer::new("qwen3next");
    writer.put("tokenizer.ggml.model", Put::Str("gpt2".into()));
    writer.put("tokenizer.ggml.pre", Put::Str("qwen2".into()));
    writer.put("tokenizer.ggml.tokens", Put::Strs(tokens));
    writer.put("tokenizer.ggml.token_type", Put::I32s(types));
    writer.put("tokenizer.ggml.merges", Put::Strs(merges));
    writer.write(&folder.file("t.gguf"), |_, _| Ok(())).unwrap();
    Tokenizer::from_gguf(&Gguf::open(&folder.file("t.gguf"), Default::default()).unwrap(), vocab)
}

/// Bytes, a few merges, a control token and one that a user defined.
static SMALL: LazyLock<Tokenizer> = LazyLock::new(|| {
    let mut tokens = byte_chars();
    tokens.extend(["ab", "abc", "Ġab", "<|x|>", "<|x|>y", "<u>", "ab"].map(String::from));
    let mut types = vec![1; tokens.len()];
    (types[259], types[260], types[261]) = (3, 3, 4);
    let merges = ["a b", "ab c", "Ġ ab", "a zz", "x y", "nospace", ""].map(String::from).to_vec();
    tokenizer(tokens, types, merges, 300).unwrap()
});

#[test]
fn odd_merges_and_tokens_are_told_and_left_out() {
    let warnings = SMALL.warnings().join("; ");
    assert!(warnings.contains("4 of 7 merges"), "{warnings}");
    assert!(warnings.contains("1 tokens have the text of an earlier one"), "{warnings}");
    assert_eq!(SMALL.encode("abc ab", true).unwrap(), [257, 258]);
}

#[test]
fn special_tokens_are_parsed_where_asked() {
    assert_eq!(SMALL.encode("ab<|x|>ab", true).unwrap(), [256, 259, 256]);
    assert_eq!(SMALL.encode("<|x|>y<|x|>", true).unwrap(), [260, 259]);
    assert!(!SMALL.encode("ab<|x|>ab", false).unwrap().contains(&259));
    assert_eq!(SMALL.encode("ab<u>ab", false).unwrap(), [256, 261, 256]);
    assert!(SMALL.is_control(259) && !SMALL.is_control(261) && !SMALL.is_control(0));
    assert_eq!(SMALL.special_id("<|x|>"), Some(259));
}

#[test]
fn ids_outside_the_vocabulary_are_errors() {
    assert!(matches!(SMALL.decode(&[0, 300]), Err(Error::Token { id: 300, vocab: 300 })));
    assert!(matches!(SMALL.stream().push(u32::MAX), Err(Error::Token { .. })));
    // A row of the embedding without a token has no text.
    assert_eq!(SMALL.decode(&[299]).unwrap(), "");
}

#[test]
fn a_missing_byte_is_an_error_where_the_text_needs_it() {
    let mut tokens = byte_chars();
    tokens[b'q' as usize] = "gone".into();
    let types = vec![1; 256];
    let tokenizer = tokenizer(tokens, types, Vec::new(), 256).unwrap();
    assert!(tokenizer.encode("abc", false).is_ok());
    assert!(tokenizer.encode("q", false).unwrap_err().to_string().contains("0x71"));
}

#[test]
fn wrong_lists_are_refused() {
    let refuse = |tokens: usize, types: usize, merges: usize, vocab: usize| {
        let chars = byte_chars();
        let tokens = (0..tokens).map(|i| chars[i % 256].clone()).collect();
        tokenizer(tokens, vec![1; types], vec!["a b".into(); merges], vocab).unwrap_err().to_string()
    };
    assert!(refuse(257, 257, 0, 256).contains("tokenizer.ggml.tokens: has 257 entries, the embedding has 256 rows"));
    assert!(refuse(256, 255, 0, 256).contains("tokenizer.ggml.token_type: has 255 entries"));
    assert!(refuse(256, 256, 4097, 256).contains("tokenizer.ggml.merges: has 4097 entries"));
}

#[test]
fn broken_bytes_become_replacement_characters_in_the_stream() {
    let mut stream = SMALL.stream();
    let mut push = |byte: u32| stream.push(byte).unwrap();
    // € is e2 82 ac.
    assert_eq!((push(0xe2), push(0x82), push(0xac)), (String::new(), String::new(), "€".into()));
    assert_eq!((push(0xe2), push(b'a'.into())), (String::new(), "\u{fffd}a".into()));
    assert_eq!(push(0xff), "\u{fffd}");
    assert_eq!(push(0xf0), "");
    assert_eq!(stream.finish(), "\u{fffd}");
}

#[test]
fn the_real_vocabulary_is_built_quickly() {
    const V: usize = 151_936;
    let chars = byte_chars();
    let mut tokens = chars.clone();
    let mut merges = Vec::new();
    // Every pair of bytes, then pairs with a third, until the vocabulary is full.
    'all: for base in 0.. {
        let a = tokens[base].clone();
        for b in &chars[33..] {
            if tokens.len() == V {
                break 'all;
            }
            merges.push(format!("{a} {b}"));
            tokens.push(format!("{a}{b}"));
        }
    }
    let began = std::time::Instant::now();
    let tokenizer = tokenizer(tokens, vec![1; V], merges, V).unwrap();
    let took = began.elapsed().as_secs_f64();
    println!("{V} tokens: {took:.2} s with writing the file");
    // Under a second on an idle core; the limit leaves room for a busy machine.
    assert!(took < 5.0, "{took} s");
    let text = "The quick brown fox jumps over the lazy dog. ".repeat(100);
    assert_eq!(tokenizer.decode(&tokenizer.encode(&text, false).unwrap()).unwrap(), text);
}

#[test]
fn long_runs_of_one_character_are_split_in_time() {
    for c in [' ', '\n', 'a', '!', '1', '\u{301}', '漢'] {
        let text: String = std::iter::repeat_n(c, 200_000).chain("x".chars()).collect();
        let began = std::time::Instant::now();
        let ids = SMALL.encode(&text, true).unwrap();
        assert_eq!(SMALL.decode(&ids).unwrap(), text);
        assert!(began.elapsed().as_secs() < 10, "{c:?}: {:?}", began.elapsed());
    }
}

proptest! {
    #[test]
    fn any_text_comes_back(text in any::<String>(), special in any::<bool>()) {
        let ids = SMALL.encode(&text, special).unwrap();
        prop_assert_eq!(SMALL.decode(&ids).unwrap(), text);
    }

    #[test]
    fn text_with_special_parts_comes_back(parts in prop::collection::vec(
        prop_oneof![Just("<|x|>".to_string()), Just("<|x|>y".into()), Just("<u>".into()), Just("<|".into()), Just("ab".into()),
            Just("\u{0}".into()), "\\PC{0,4}", "\\s{0,4}"], 0..12), special in any::<bool>()) {
        let text = parts.concat();
        let ids = SMALL.encode(&text, special).unwrap();
        prop_assert_eq!(SMALL.decode(&ids).unwrap(), text);
    }

    #[test]
    fn the_stream_gives_what_decode_gives(ids in prop::collection::vec(0u32..300, 0..40)) {
        let mut stream = SMALL.stream();
        let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        text.push_str(&stream.finish());
        prop_assert_eq!(text, SMALL.decode(&ids).unwrap());
    }
}
