//! Text to token ids and back: byte-level BPE with Qwen's split pattern, from GGUF metadata or tokenizer.json.
//!
//! Special tokens are cut out of the text here, the rest goes through the `tokenizers` crate. Qwen's released
//! tokenizer.json first brings text into Unicode's composed form (NFC); GGUF says nothing of it and its readers leave
//! text as it is. Both are followed here, so the two differ on decomposed text.

use crate::error::{shown, Error};
use crate::file::read_text;
use crate::gguf::{Array, Gguf, Put, Value as Item};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;
use tokenizers::models::bpe::{BpeBuilder, Vocab, BPE};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const MAX_JSON: u64 = 256 << 20;
/// Steps of a pre-tokenizer: real ones have two, and a hostile pattern may take a second and 10 MB to compile.
const MAX_STEPS: usize = 8;

/// GGUF's token types that matter here.
const NORMAL: i128 = 1;
const CONTROL: i128 = 3;
const USER_DEFINED: i128 = 4;
const UNUSED: i128 = 5;

/// A tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Bytes of all tokens, one after the other; token i ends at `ends[i]`.
    bytes: Vec<u8>,
    ends: Vec<usize>,
    special: Special,
    /// Rows of the model's embedding.
    vocab: usize,
    /// Bytes that no token holds alone.
    missing: Vec<u8>,
    bos: Option<u32>,
    add_bos: bool,
    eos: Vec<u32>,
    warnings: Vec<String>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Tokenizer({} tokens, eos {:?})", self.ends.len(), self.eos)
    }
}

/// Tokens that are matched in the text as they are.
#[derive(Default)]
struct Special {
    /// id, and whether it is a control token.
    ids: HashMap<Vec<u8>, (u32, bool)>,
    /// Lengths that occur, by first byte, longest first.
    lengths: HashMap<u8, Vec<usize>>,
}

impl Special {
    fn add(&mut self, content: &str, id: u32, control: bool) {
        let Some(&first) = content.as_bytes().first() else { return };
        self.ids.entry(content.as_bytes().to_vec()).or_insert((id, control));
        let lengths = self.lengths.entry(first).or_default();
        if let Err(at) = lengths.binary_search_by(|n| content.len().cmp(n)) {
            lengths.insert(at, content.len());
        }
    }

    /// The longest token that starts `text`.
    fn starts(&self, text: &[u8], control: bool) -> Option<(u32, usize)> {
        let lengths = self.lengths.get(text.first()?)?;
        lengths.iter().find_map(|&n| match self.ids.get(text.get(..n)?) {
            Some(&(id, is_control)) if control || !is_control => Some((id, n)),
            _ => None,
        })
    }

    /// Some control token starts `text`.
    fn starts_control(&self, text: &[u8]) -> bool {
        let lengths = text.first().and_then(|first| self.lengths.get(first));
        let control = |n: &usize| text.get(..*n).and_then(|t| self.ids.get(t)).is_some_and(|&(_, control)| control);
        lengths.is_some_and(|lengths| lengths.iter().any(control))
    }
}

/// The character that stands for a byte in byte-level vocabularies: printable bytes stand for themselves, the others
/// follow from U+0100 on.
pub(crate) fn byte_chars() -> [char; 256] {
    let mut next = 256;
    std::array::from_fn(|b| {
        let code = match b as u32 {
            b @ (33..=126 | 161..=172 | 174..=255) => b,
            _ => {
                next += 1;
                next - 1
            }
        };
        char::from_u32(code).unwrap_or('\u{fffd}')
    })
}

/// Tokens by id while a tokenizer is built.
struct Table {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    of_char: HashMap<char, u8>,
}

impl Table {
    fn new() -> Table {
        let of_char = byte_chars().into_iter().zip(0..=255).collect();
        Table { bytes: Vec::new(), ends: Vec::new(), of_char }
    }

    /// Appends the next id's token.
    fn push(&mut self, token: &str, literal: bool) {
        for c in token.chars() {
            match self.of_char.get(&c) {
                Some(&byte) if !literal => self.bytes.push(byte),
                _ => self.bytes.extend(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        self.ends.push(self.bytes.len());
    }
}

/// tokenizer.json, as far as it is needed.
#[derive(serde::Deserialize)]
struct Json {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: JsonModel,
}

#[derive(serde::Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
}

#[derive(serde::Deserialize)]
struct JsonModel {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    dropout: Value,
    #[serde(default)]
    unk_token: Value,
    #[serde(default)]
    continuing_subword_prefix: Value,
    #[serde(default)]
    end_of_word_suffix: Value,
}

#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Joined(String),
}

/// The two parts of `a b`; a part may itself be a space, which then comes first.
fn cut(merge: &str) -> Option<(&str, &str)> {
    let first = merge.chars().next()?.len_utf8();
    let at = first + merge.get(first..)?.find(' ')?;
    Some((merge.get(..at)?, merge.get(at + 1..)?))
}

fn splitter(pattern: &str) -> Result<PreTokenizerWrapper, Error> {
    let split = Split::new(SplitPattern::Regex(pattern.into()), SplitDelimiterBehavior::Isolated, false);
    Ok(split.map_err(failed)?.into())
}

/// The crate's tokenizer, the bytes that no token holds alone, and warnings. Merges that join to no token are left out.
fn assemble(
    builder: BpeBuilder,
    vocab: Vocab,
    pairs: impl Iterator<Item = Option<(String, String)>>,
    steps: Vec<PreTokenizerWrapper>,
) -> Result<(tokenizers::Tokenizer, Vec<u8>, Vec<String>), Error> {
    let (mut merges, mut joined, mut listed) = (Vec::new(), String::new(), 0);
    for pair in pairs {
        listed += 1;
        let Some((a, b)) = pair else { continue };
        joined.clear();
        joined.push_str(&a);
        joined.push_str(&b);
        if vocab.contains_key(&a) && vocab.contains_key(&b) && vocab.contains_key(&joined) {
            merges.push((a, b));
        }
    }
    let mut warnings = Vec::new();
    let dropped = listed - merges.len();
    if dropped > 0 {
        warnings.push(format!("{dropped} of {listed} merges join to no token and are ignored"));
    }
    let chars = byte_chars().into_iter().zip(0..=255);
    let missing =
        chars.filter(|(c, _)| !vocab.contains_key(c.encode_utf8(&mut [0; 4]) as &str)).map(|(_, b)| b).collect();
    let bpe = builder.vocab_and_merges(vocab, merges).build().map_err(failed)?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    inner.with_pre_tokenizer(Some(Sequence::new(steps)));
    Ok((inner, missing, warnings))
}

fn failed(e: impl std::fmt::Display) -> Error {
    Error::Tokenizer(shown(&e.to_string()))
}

impl Tokenizer {
    /// From the keys `tokenizer.ggml.*`; `vocab` is the number of embedding rows.
    pub fn from_gguf(file: &Gguf, vocab: usize) -> Result<Tokenizer, Error> {
        let bad = |key: &str, why: String| Error::key(file.path(), format!("tokenizer.ggml.{key}"), why);
        let text = |key: &str| file.string(&format!("tokenizer.ggml.{key}"));
        match text("model")?.as_deref() {
            Some("gpt2") => {}
            Some(other) => return Err(bad("model", format!("is \"{}\", expected \"gpt2\"", shown(other)))),
            None => return Err(bad("model", "is missing: the file has no tokenizer".into())),
        }
        match text("pre")?.as_deref() {
            Some("qwen2" | "deepseek-r1-qwen") | None => {}
            Some(other) => return Err(bad("pre", format!("is \"{}\", expected \"qwen2\"", shown(other)))),
        }
        let list = |key: &str| file.list(&format!("tokenizer.ggml.{key}"));
        let tokens = list("tokens")?.ok_or_else(|| bad("tokens", "is missing".into()))?;
        if tokens.len() > vocab {
            return Err(bad("tokens", format!("has {} entries, the embedding has {vocab} rows", tokens.len())));
        }
        let types = list("token_type")?;
        if let Some(n) = types.map(|t| t.len()).filter(|&n| n != tokens.len()) {
            return Err(bad("token_type", format!("has {n} entries, expected one a token ({})", tokens.len())));
        }

        let (mut table, mut special, mut map, mut warnings) =
            (Table::new(), Special::default(), Vocab::new(), Vec::new());
        let kinds = types.iter().flat_map(Array::iter).map(Some).chain(std::iter::repeat(None));
        let mut twice = 0;
        for (id, (token, kind)) in tokens.iter().zip(kinds).enumerate() {
            let Item::Str(token) = token else { return Err(bad("tokens", "is no array of texts".into())) };
            let kind = match kind {
                Some(Item::Int(kind)) => kind,
                Some(_) => return Err(bad("token_type", "is no array of numbers".into())),
                None => NORMAL,
            };
            let literal = kind == CONTROL || kind == USER_DEFINED;
            table.push(token, literal);
            let id = id as u32;
            if literal {
                special.add(token, id, kind == CONTROL);
            }
            match map.entry(token.to_string()) {
                std::collections::hash_map::Entry::Vacant(entry) => {
                    entry.insert(id);
                }
                std::collections::hash_map::Entry::Occupied(_) => twice += 1,
            }
        }
        if twice > 0 {
            warnings.push(format!("{twice} tokens have the text of an earlier one and are never produced"));
        }

        let listed = list("merges")?.ok_or_else(|| bad("merges", "is missing".into()))?;
        if listed.len() > 16 * vocab {
            return Err(bad("merges", format!("has {} entries, expected at most 16 a token", listed.len())));
        }
        let pairs = listed.iter().map(|merge| match merge {
            Item::Str(merge) => cut(merge).map(|(a, b)| (a.to_string(), b.to_string())),
            _ => None,
        });
        let steps = vec![splitter(QWEN2_SPLIT)?, ByteLevel::new(false, false, false).into()];
        let (inner, missing, more) = assemble(BPE::builder(), map, pairs, steps)?;
        warnings.extend(more);

        let id = |key: &str| -> Result<Option<u32>, Error> {
            match file.uint(&format!("tokenizer.ggml.{key}"))? {
                Some(id) if id >= vocab => Err(bad(key, format!("is {id}, the vocabulary has {vocab} tokens"))),
                id => Ok(id.map(|id| id as u32)),
            }
        };
        let mut eos: Vec<u32> = [id("eos_token_id")?, id("eot_token_id")?].into_iter().flatten().collect();
        eos.extend(
            ["<|im_end|>", "<|endoftext|>"].iter().filter_map(|t| special.ids.get(t.as_bytes())).map(|&(id, _)| id),
        );
        let mut tokenizer = Tokenizer {
            inner,
            bytes: table.bytes,
            ends: table.ends,
            special,
            vocab,
            missing,
            bos: None,
            add_bos: file.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(false),
            eos: Vec::new(),
            warnings,
        };
        tokenizer.set_special(id("bos_token_id")?, &eos)?;
        Ok(tokenizer)
    }

    /// From a tokenizer.json; `vocab` is the number of embedding rows.
    pub fn from_json(path: &Path, vocab: usize) -> Result<Tokenizer, Error> {
        Self::parse_json(path, read_text(path, MAX_JSON)?, vocab)
    }

    /// The keys `tokenizer.ggml.*` (without that prefix) of a tokenizer that was read from the tokenizer.json at `path`.
    /// Refused where its pre-tokenizer is not Qwen2's, which GGUF can only name.
    pub(crate) fn gguf_keys(&self, path: &Path) -> Result<Vec<(&'static str, Put)>, Error> {
        let bad = |why: String| Error::format(path, why);
        let file: Json = serde_json::from_str(&read_text(path, MAX_JSON)?).map_err(|e| bad(shown(&e.to_string())))?;
        let steps =
            file.pre_tokenizer.get("pretokenizers").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let is_qwen2 = match steps {
            [split, level] => {
                let flag = |key: &str| level.get(key).and_then(Value::as_bool);
                split.get("pattern").and_then(|p| p.get("Regex")).and_then(Value::as_str) == Some(QWEN2_SPLIT)
                    && level.get("type").and_then(Value::as_str) == Some("ByteLevel")
                    && (flag("add_prefix_space"), flag("use_regex")) == (Some(false), Some(false))
            }
            _ => false,
        };
        if !is_qwen2 {
            return Err(bad("pre_tokenizer: is not Qwen2's".into()));
        }
        // Rows of the embedding without a token have a name that no text makes.
        let mut tokens: Vec<String> = (0..self.vocab).map(|id| format!("[PAD{id}]")).collect();
        let mut types = vec![UNUSED as i32; self.vocab];
        let normal = file.model.vocab.iter().map(|(token, &id)| (id, token, NORMAL));
        let added =
            file.added_tokens.iter().map(|t| (t.id, &t.content, if t.special { CONTROL } else { USER_DEFINED }));
        for (id, token, kind) in normal.chain(added) {
            if let (Some(to), Some(of)) = (tokens.get_mut(id as usize), types.get_mut(id as usize)) {
                (*to, *of) = (token.clone(), kind as i32);
            }
        }
        let merges = file.model.merges.into_iter().map(|merge| match merge {
            Merge::Pair(a, b) => format!("{a} {b}"),
            Merge::Joined(text) => text,
        });
        let mut keys = vec![
            ("model", Put::Str("gpt2".into())),
            ("pre", Put::Str("qwen2".into())),
            ("tokens", Put::Strs(tokens)),
            ("token_type", Put::I32s(types)),
            ("merges", Put::Strs(merges.collect())),
            ("add_bos_token", Put::Bool(self.add_bos)),
        ];
        keys.extend(self.bos.map(|id| ("bos_token_id", Put::U32(id))));
        keys.extend(self.eos.first().map(|&id| ("eos_token_id", Put::U32(id))));
        Ok(keys)
    }

    /// As [`Tokenizer::from_json`], of the text of a file; `path` names it in errors.
    pub fn parse_json(path: &Path, text: String, vocab: usize) -> Result<Tokenizer, Error> {
        let bad = |why: String| Error::format(path, why);
        // The crate's own reader panics on some broken files, so the parts are read here.
        let file: Json = serde_json::from_str(&text).map_err(|e| bad(shown(&e.to_string())))?;
        drop(text);
        let kind = |part: &Value| part.get("type").and_then(Value::as_str).map_or("none".to_string(), shown);
        if kind(&file.decoder) != "ByteLevel" || file.model.kind.as_deref().unwrap_or("BPE") != "BPE" {
            return Err(bad("is no byte-level BPE tokenizer".into()));
        }
        let odd = [
            &file.model.dropout,
            &file.model.unk_token,
            &file.model.continuing_subword_prefix,
            &file.model.end_of_word_suffix,
        ];
        if odd.iter().any(|v| !matches!(v, Value::Null) && v.as_str() != Some("")) || file.model.byte_fallback {
            return Err(
                bad("model: dropout, unk_token, prefixes, suffixes and byte_fallback are not supported".into()),
            );
        }
        let nfc = match kind(&file.normalizer).as_str() {
            "none" => false,
            "NFC" => true,
            other => return Err(bad(format!("normalizer: {other} is not supported; supported: NFC"))),
        };
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        let sequence = file.pre_tokenizer.get("pretokenizers").and_then(Value::as_array);
        let listed = sequence.map_or(std::slice::from_ref(&file.pre_tokenizer), Vec::as_slice);
        if listed.len() > MAX_STEPS {
            return Err(bad(format!("pre_tokenizer: has {} steps, expected at most {MAX_STEPS}", listed.len())));
        }
        for step in listed {
            let flag = |key: &str| step.get(key).and_then(Value::as_bool);
            let pattern = step.get("pattern").and_then(|p| p.get("Regex")).and_then(Value::as_str);
            match (kind(step).as_str(), pattern) {
                ("Split", Some(pattern)) if step.get("behavior").and_then(Value::as_str) == Some("Isolated") => {
                    steps.push(splitter(pattern).map_err(|e| bad(e.to_string()))?);
                }
                ("ByteLevel", _) => {
                    let (prefix, regex) = (flag("add_prefix_space").unwrap_or(true), flag("use_regex").unwrap_or(true));
                    steps.push(ByteLevel::new(prefix, false, regex).into());
                }
                (other, _) => return Err(bad(format!("pre_tokenizer: {other} is not supported in this form"))),
            }
        }
        if !matches!(steps.last(), Some(PreTokenizerWrapper::ByteLevel(_))) {
            return Err(bad("pre_tokenizer: does not end in ByteLevel".into()));
        }

        let (mut table, mut special) = (Table::new(), Special::default());
        let mut by_id: Vec<(u32, &str, Option<&Added>)> =
            file.model.vocab.iter().map(|(token, &id)| (id, token.as_str(), None)).collect();
        by_id.extend(file.added_tokens.iter().map(|token| (token.id, token.content.as_str(), Some(token))));
        by_id.sort_unstable_by_key(|&(id, token, added)| (id, token, added.is_none()));
        // A token may be listed as added and in the vocabulary; the added form comes first and stays.
        by_id.dedup_by_key(|&mut (id, token, _)| (id, token));
        for (id, token, added) in by_id {
            let at = id as usize;
            if at >= vocab {
                return Err(bad(format!("token \"{}\" has id {id}, the embedding has {vocab} rows", shown(token))));
            }
            if table.ends.len() > at {
                return Err(bad(format!("id {id} is given to two tokens")));
            }
            while table.ends.len() < at {
                table.push("", true);
            }
            table.push(token, added.is_some());
            if let Some(added) = added {
                if added.lstrip || added.rstrip || added.single_word {
                    let why = "matches more or less than its text, which is not supported";
                    return Err(bad(format!("token \"{}\" {why}", shown(token))));
                }
                special.add(token, id, added.special);
            }
        }
        let pairs = file.model.merges.into_iter().map(|merge| match merge {
            Merge::Pair(a, b) => Some((a, b)),
            Merge::Joined(text) => cut(&text).map(|(a, b)| (a.to_string(), b.to_string())),
        });
        let bpe = BPE::builder().ignore_merges(file.model.ignore_merges);
        let (mut inner, missing, warnings) = assemble(bpe, file.model.vocab.into_iter().collect(), pairs, steps)?;
        if nfc {
            inner.with_normalizer(Some(NFC));
        }
        let (bytes, ends) = (table.bytes, table.ends);
        Ok(Tokenizer {
            inner,
            bytes,
            ends,
            special,
            vocab,
            missing,
            bos: None,
            add_bos: false,
            eos: Vec::new(),
            warnings,
        })
    }

    /// Sets the token that begins a text and those that end one.
    pub(crate) fn set_special(&mut self, bos: Option<u32>, eos: &[u32]) -> Result<(), Error> {
        for &id in bos.iter().chain(eos) {
            self.known(id)?;
        }
        self.bos = bos;
        self.eos = eos.to_vec();
        self.eos.sort_unstable();
        self.eos.dedup();
        Ok(())
    }

    fn known(&self, id: u32) -> Result<(), Error> {
        if (id as usize) < self.vocab {
            return Ok(());
        }
        Err(Error::Token { id, vocab: self.vocab })
    }

    /// Ids below this are valid: rows of the model's embedding.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Tokens that end a text.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The model expects [`Tokenizer::bos`] before a prompt.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// What was unusual in the tokenizer's data.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The id of a token by its text, for special tokens such as `<|im_start|>`.
    pub fn special_id(&self, text: &str) -> Option<u32> {
        self.special.ids.get(text.as_bytes()).map(|&(id, _)| id)
    }

    /// The token is a control token: no text of the answer.
    pub fn is_control(&self, id: u32) -> bool {
        self.token(id).and_then(|bytes| self.special.ids.get(bytes)).is_some_and(|&(of, control)| of == id && control)
    }

    /// Ids of a text, without bos. With `parse_special`, the text of a control token becomes that token; without, it is
    /// plain text. Tokens that users define are always recognised.
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>, Error> {
        self.encode_where(text, |_| parse_special)
    }

    /// As [`Tokenizer::encode`] with control tokens, but for those that begin at one of these bytes (ascending).
    pub fn encode_shielded(&self, text: &str, shielded: &[usize]) -> Result<Vec<u32>, Error> {
        self.encode_where(text, |at| shielded.binary_search(&at).is_err())
    }

    fn encode_where(&self, text: &str, control: impl Fn(usize) -> bool) -> Result<Vec<u32>, Error> {
        let (mut ids, mut plain, mut at) = (Vec::new(), 0, 0);
        while at < text.len() {
            let Some((id, length)) = text.as_bytes().get(at..).and_then(|t| self.special.starts(t, control(at))) else {
                at += 1;
                continue;
            };
            self.encode_plain(text.get(plain..at).unwrap_or_default(), &mut ids)?;
            ids.push(id);
            at += length;
            plain = at;
        }
        self.encode_plain(text.get(plain..).unwrap_or_default(), &mut ids)?;
        Ok(ids)
    }

    /// Where the text of a control token begins, overlapping ones included: ascending byte offsets.
    pub fn control_texts<'a>(&'a self, text: &'a str) -> impl Iterator<Item = usize> + 'a {
        (0..text.len()).filter(|&at| text.as_bytes().get(at..).is_some_and(|rest| self.special.starts_control(rest)))
    }

    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        if text.is_empty() {
            return Ok(());
        }
        if let Some(byte) = text.bytes().find(|b| self.missing.contains(b)) {
            return Err(Error::Tokenizer(format!("no token holds the byte 0x{byte:02x} of the text")));
        }
        ids.extend(self.inner.encode_fast(text, false).map_err(failed)?.get_ids());
        Ok(())
    }

    /// Bytes of a token; `None` where the id is a padding row of the embedding.
    pub fn token(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let start = if id == 0 { 0 } else { *self.ends.get(id - 1)? };
        self.bytes.get(start..*self.ends.get(id)?)
    }

    /// The text of ids, control tokens as their names; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        let mut bytes = Vec::new();
        for &id in ids {
            self.known(id)?;
            bytes.extend(self.token(id).unwrap_or_default());
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A decoder for ids that come one at a time.
    pub fn stream(&self) -> Stream<'_> {
        Stream { tokenizer: self, held: Vec::new() }
    }
}

/// Decodes ids one at a time, holding back the bytes of a character until it is complete.
#[derive(Debug)]
pub struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    held: Vec<u8>,
}

impl Stream<'_> {
    /// The text that this id completes; often empty within a character of several tokens.
    pub fn push(&mut self, id: u32) -> Result<String, Error> {
        self.tokenizer.known(id)?;
        self.held.extend(self.tokenizer.token(id).unwrap_or_default());
        let mut text = String::new();
        let mut complete = 0;
        for chunk in self.held.utf8_chunks() {
            text.push_str(chunk.valid());
            complete += chunk.valid().len();
            let invalid = chunk.invalid();
            // A character cut short at the very end may go on; anything else is broken for good.
            if complete + invalid.len() == self.held.len() && may_go_on(invalid) {
                break;
            }
            if !invalid.is_empty() {
                text.push('\u{fffd}');
                complete += invalid.len();
            }
        }
        self.held.drain(..complete);
        Ok(text)
    }

    /// What is left at the end: the replacement character for an incomplete one.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.held).into_owned()
    }
}

/// The bytes begin a character that more bytes could complete.
fn may_go_on(bytes: &[u8]) -> bool {
    !bytes.is_empty() && std::str::from_utf8(bytes).is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_distinct_characters() {
        let all: std::collections::HashSet<char> = byte_chars().into_iter().collect();
        assert_eq!(all.len(), 256);
        assert_eq!((byte_chars()[b' ' as usize], byte_chars()[b'A' as usize]), ('\u{120}', 'A'));
    }

    #[test]
    fn incomplete_and_broken_characters_differ() {
        assert!(may_go_on(&[0xe2, 0x82]));
        assert!(!may_go_on(&[0xff]));
        assert!(!may_go_on(&[0xe2, 0x28]));
        assert!(!may_go_on(&[]));
    }

    #[test]
    fn longest_special_token_wins() {
        let mut special = Special::default();
        special.add("<a>", 1, true);
        special.add("<a><b>", 2, true);
        special.add("<u>", 3, false);
        assert_eq!(special.starts(b"<a><b>", true), Some((2, 6)));
        assert_eq!(special.starts(b"<a>x", true), Some((1, 3)));
        assert_eq!(special.starts(b"<a>x", false), None);
        assert_eq!(special.starts(b"<u>", false), Some((3, 3)));
    }
}
