//! safetensors: one file, or a folder's shards through their index.

use crate::error::{shown, Error};
use crate::file::{self, Options};
use crate::weights::{Memory, Store};
use qwen3next_kernels::DType;
use safetensors::tensor::{Dtype, Metadata};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Headers of real files are far below this.
const MAX_HEADER: u64 = 32 << 20;
const MAX_INDEX: u64 = 64 << 20;
const MAX_AXES: usize = 8;

/// A tensor's entry in a file.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Element type.
    pub dtype: Dtype,
    /// Sizes, columns last.
    pub shape: Vec<usize>,
    /// First byte in the file.
    pub start: usize,
    /// Bytes.
    pub bytes: usize,
}

/// One safetensors file.
pub struct Safetensors {
    path: PathBuf,
    store: Store,
    tensors: BTreeMap<String, Entry>,
}

impl std::fmt::Debug for Safetensors {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Safetensors({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

/// No list of numbers in the header is longer than a tensor can have axes: parsed, it would take many times its bytes.
fn lists_are_short(header: &[u8]) -> bool {
    let mut entries = None;
    header.iter().all(|b| {
        match b {
            b'[' => entries = Some(1),
            b']' | b'{' | b'}' | b'"' => entries = None,
            b',' => entries = entries.map(|n| n + 1),
            _ => {}
        }
        entries.is_none_or(|n| n <= MAX_AXES)
    })
}

impl Safetensors {
    /// Reads and checks the header of one file.
    pub fn open(path: &Path, options: Options) -> Result<Safetensors, Error> {
        Safetensors::parse_store(path, file::open(path, options)?)
    }

    /// As [`Safetensors::open`], of the bytes of a file; `path` names them in errors.
    pub fn parse_bytes(path: &Path, bytes: Vec<u8>) -> Result<Safetensors, Error> {
        Safetensors::parse_store(path, Store::Owned(Arc::new(Memory::of(bytes))))
    }

    fn parse_store(path: &Path, store: Store) -> Result<Safetensors, Error> {
        let bytes = store.bytes();
        let bad = |why: String| Error::format(path, why);
        let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
            return Err(bad(format!("has {} bytes, expected a safetensors file", bytes.len())));
        };
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER || length > rest.len() as u64 {
            let most = MAX_HEADER.min(rest.len() as u64);
            return Err(bad(format!("claims a header of {length} bytes, expected at most {most}")));
        }
        let (header, data) = rest.split_at(length as usize);
        if !lists_are_short(header) {
            return Err(bad(format!("a list in the header is longer than {MAX_AXES} entries")));
        }
        let parsed: Metadata =
            serde_json::from_slice(header).map_err(|e| bad(format!("header: {}", shown(&e.to_string()))))?;
        let (first, mut end, mut tensors) = (8 + header.len(), 0, BTreeMap::new());
        for (name, info) in parsed.tensors() {
            let within = |why: String| Error::tensor(path, &name, why);
            let (from, to) = info.data_offsets;
            let Some(bytes) = to.checked_sub(from).filter(|_| to <= data.len()) else {
                return Err(within(format!("lies at bytes {from} to {to} of {} bytes of data", data.len())));
            };
            let elements = info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
            let expected = elements.and_then(|n| n.checked_mul(info.dtype.bitsize())).map(|bits| bits / 8);
            if expected != Some(bytes) {
                return Err(within(format!("has {bytes} bytes, shape {:?} of {:?}", info.shape, info.dtype)));
            }
            end = end.max(to);
            let entry = Entry { dtype: info.dtype, shape: info.shape.clone(), start: first + from, bytes };
            tensors.insert(name, entry);
        }
        if end != data.len() {
            return Err(bad(format!("has {} bytes of data, its tensors end at {end}", data.len())));
        }
        Ok(Safetensors { path: path.into(), store, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> usize {
        self.store.bytes().len()
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, Entry> {
        &self.tensors
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }
}

/// The shard of every tensor by the text of a `model.safetensors.index.json`; `path` names it in errors. A shard is a
/// plain file name.
pub fn parse_index(path: &Path, text: &str) -> Result<BTreeMap<String, String>, Error> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let parsed: Index = serde_json::from_str(text).map_err(|e| Error::format(path, shown(&e.to_string())))?;
    for (name, shard) in &parsed.weight_map {
        if Path::new(shard).file_name().is_none_or(|f| f != shard.as_str()) {
            let why = format!("lies in \"{}\", expected a file of this folder", shown(shard));
            return Err(Error::tensor(path, name, why));
        }
    }
    Ok(parsed.weight_map)
}

/// The shards of a folder, and which of them holds each tensor.
#[derive(Debug)]
pub struct Folder {
    /// The folder.
    pub path: PathBuf,
    /// Its files.
    pub files: Vec<Safetensors>,
    /// Index into `files` by name.
    pub home: BTreeMap<String, usize>,
}

impl Folder {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
    pub fn open(path: &Path, options: Options) -> Result<Folder, Error> {
        let index = path.join("model.safetensors.index.json");
        if !index.exists() {
            let one = Safetensors::open(&path.join("model.safetensors"), options)?;
            let home = one.tensors.keys().map(|name| (name.clone(), 0)).collect();
            return Ok(Folder { path: path.into(), files: vec![one], home });
        }
        let shards = parse_index(&index, &file::read_text(&index, MAX_INDEX)?)?;
        let (mut files, mut numbers, mut home) = (Vec::new(), HashMap::new(), BTreeMap::new());
        for (name, shard) in shards {
            let number = match numbers.get(&shard) {
                Some(&number) => number,
                None => {
                    files.push(Safetensors::open(&path.join(&shard), options)?);
                    numbers.insert(shard.clone(), files.len() - 1);
                    files.len() - 1
                }
            };
            if files.get(number).is_none_or(|f| !f.tensors.contains_key(&name)) {
                return Err(Error::tensor(&index, &name, format!("is not in {}", shown(&shard))));
            }
            home.insert(name, number);
        }
        Ok(Folder { path: path.into(), files, home })
    }

    /// The file and entry of a tensor.
    pub fn tensor(&self, name: &str) -> Option<(&Safetensors, &Entry)> {
        let file = self.files.get(*self.home.get(name)?)?;
        Some((file, file.tensors.get(name)?))
    }
}

/// The dtype of an entry, or a sentence that names its type and the supported ones.
pub(crate) fn supported(entry: &Entry) -> Result<DType, String> {
    match entry.dtype {
        Dtype::F32 => Ok(DType::F32),
        Dtype::F16 => Ok(DType::F16),
        Dtype::BF16 => Ok(DType::BF16),
        other => Err(format!("type {other:?} is not supported; supported: F32, F16, BF16")),
    }
}
