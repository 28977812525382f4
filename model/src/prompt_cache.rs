//! A [`Session`] as a file: what a model remembers of a prompt, so that it need not be read again.
//!
//! All numbers are little endian.
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | `Q3NCACHE` |
//! | 4 | version, 2 |
//! | 4 | type of the KV caches: 0 f32, 1 f16, 2 bf16, 3 q8_0 |
//! | 8 | [`Model::fingerprint`](crate::Model::fingerprint) |
//! | 8 | bytes of the file |
//! | 8 | T, tokens |
//! | 8 | N, bytes of the note |
//! | 8 | L, logits: the vocabulary, or 0 where T is 0 |
//! | N | the note, UTF-8: what a program wants to remember, such as the messages of a chat |
//! | 4 T | the tokens |
//! | 4 L | f32 logits after the last token |
//! | | layer by layer: f32 convolution windows `[channels][W-1]` then f32 states `[HV][V][K]`; or keys then values, `[T][HKV][D]` each, in the cache's type (q8_0: an f16 scale and 32 bytes a block) |
//! | 8 | XXH3-64 of everything before |
//!
//! The sizes follow from the model, T, N and L, and must add up to the bytes of the file before anything is allocated. A
//! file of another model, version or cache type is refused, and so is a truncated or damaged one. A model is its sizes and
//! its numbers: a Hugging Face folder and a GGUF file that `quantize` made from it without loss are the same one. A quantised
//! file is another, and so may be one of another converter, which rounds −exp(A_log) its own way. How the tokens were read (threads, ubatch, delta rule, activations) is not in it: a session that goes on under
//! the same options, with the same file of the model, gives the bits of one that was never saved.
//!
//! A recurrent state cannot go back to a token in its past. A session from a file is therefore of use to prompts that begin
//! with all of its tokens ([`Session::reusable`]), unlike a plain KV cache, which can be cut to any common prefix.

use crate::cache::{load_f32, save_f32};
use crate::error::Error;
use crate::file::expect_regular;
use crate::session::Session;
use crate::whole::WholeFile;
use qwen3next_kernels::DType;
use std::fs::File;
use std::hash::Hasher;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;
use twox_hash::XxHash3_64;

const MAGIC: &[u8; 8] = b"Q3NCACHE";
const VERSION: u32 = 2;
const HEADER: usize = 56;
/// A note of a chat holds its text, twice; a context of 256k tokens is some MB.
const MOST_NOTE: u64 = 64 << 20;

fn cache_number(dtype: DType) -> u32 {
    match dtype {
        DType::F16 => 1,
        DType::BF16 => 2,
        DType::Q8_0 => 3,
        _ => 0,
    }
}

/// Bytes of the file.
fn file_bytes(session: &Session, note: u64, tokens: u64, logits: u64) -> Option<u64> {
    let state = session.state.saved_bytes(usize::try_from(tokens).ok()?)?;
    let listed = tokens.checked_add(logits)?.checked_mul(4)?;
    (HEADER as u64 + 8).checked_add(note)?.checked_add(listed)?.checked_add(state)
}

/// Writes the session to a file, which appears under its name when it is whole.
pub fn save(path: &Path, session: &Session, note: &str) -> Result<(), Error> {
    let io = |e| Error::io(path, e);
    let (t, n, l) = (session.tokens.len() as u64, note.len() as u64, session.logits.len() as u64);
    if n > MOST_NOTE {
        return Err(Error::argument("note", format!("has {n} bytes, expected at most {MOST_NOTE}")));
    }
    let bytes = file_bytes(session, n, t, l).ok_or_else(|| Error::argument("session", "is too large for a file"))?;
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend(cache_number(session.cache().k).to_le_bytes());
    [session.model().fingerprint(), bytes, t, n, l].into_iter().for_each(|x| header.extend(x.to_le_bytes()));

    let mut file = BufWriter::with_capacity(1 << 20, WholeFile::create(path).map_err(io)?);
    let mut sum = XxHash3_64::new();
    let mut put = |part: &[u8]| {
        sum.write(part);
        file.write_all(part).map_err(io)
    };
    put(&header)?;
    put(note.as_bytes())?;
    session.tokens.iter().try_for_each(|t| put(&t.to_le_bytes()))?;
    save_f32(&session.logits, &mut put)?;
    session.state.save(0, &mut put)?;
    let sum = sum.finish();
    file.write_all(&sum.to_le_bytes()).map_err(io)?;
    file.into_inner().map_err(|e| io(e.into_error()))?.finish().map_err(io)
}

/// Reads a session of the same model, and the note. After an error the session is empty.
pub fn load(path: &Path, session: &mut Session) -> Result<String, Error> {
    session.clear()?;
    let loaded = read(path, session);
    if loaded.is_err() {
        session.clear()?;
    }
    loaded
}

fn read(path: &Path, session: &mut Session) -> Result<String, Error> {
    let bad = |why: String| Error::format(path, why);
    let io = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => bad("ends too early".into()),
        _ => Error::io(path, e),
    };
    let size = expect_regular(path)?;
    let mut file = BufReader::with_capacity(1 << 16, File::open(path).map_err(io)?);
    let mut sum = XxHash3_64::new();
    let mut get = |part: &mut [u8]| {
        file.read_exact(part).map_err(io)?;
        sum.write(part);
        Ok::<_, Error>(())
    };

    let mut header = [0; HEADER];
    if size < HEADER as u64 {
        return Err(bad(format!("has {size} bytes: no prompt cache")));
    }
    get(&mut header)?;
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    if &header[..8] != MAGIC {
        return Err(bad("is no prompt cache".into()));
    }
    if word(8) != VERSION {
        return Err(bad(format!("is a prompt cache of version {}, expected {VERSION}", word(8))));
    }
    let (fingerprint, bytes, t, n, l) = (long(16), long(24), long(32), long(40), long(48));
    if fingerprint != session.model().fingerprint() {
        return Err(bad(
            "was saved with another model, or with a file of it that holds other numbers (types, roundings)".into(),
        ));
    }
    if word(12) != cache_number(session.cache().k) {
        let name = ["f32", "f16", "bf16", "q8_0"].get(word(12) as usize).unwrap_or(&"an unknown type");
        return Err(bad(format!("has caches of {name}, expected {} (-ctk)", session.cache().k)));
    }
    let vocab = session.model().config().vocab as u64;
    if n > MOST_NOTE || l != if t == 0 { 0 } else { vocab } {
        return Err(bad("has impossible sizes".into()));
    }
    if bytes != size || file_bytes(session, n, t, l) != Some(size) {
        return Err(bad(format!("has {size} bytes, which are not those of {t} tokens: truncated or damaged")));
    }
    if t > session.capacity() as u64 {
        return Err(bad(format!("holds {t} tokens, the context has room for {}", session.capacity())));
    }

    // From here on sizes are those of the file, so nothing larger than it is allocated.
    let mut note = vec![0; n as usize];
    get(&mut note)?;
    let note = String::from_utf8(note).map_err(|_| bad("has a note that is not UTF-8".into()))?;
    let mut ids = vec![0; 4 * t as usize];
    get(&mut ids)?;
    let tokens: Vec<u32> = ids.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    if let Some(id) = tokens.iter().find(|&&id| u64::from(id) >= vocab) {
        return Err(bad(format!("holds token {id}, the vocabulary has {vocab}")));
    }
    let mut logits = vec![0.0; l as usize];
    load_f32(&mut logits, &mut get)?;
    session.state.load(0, tokens.len(), &mut get)?;
    let expected = sum.finish();
    let mut stored = [0; 8];
    file.read_exact(&mut stored).map_err(io)?;
    if u64::from_le_bytes(stored) != expected {
        return Err(bad("is damaged: its checksum differs".into()));
    }
    session.tokens = tokens;
    session.logits = logits;
    Ok(note)
}
