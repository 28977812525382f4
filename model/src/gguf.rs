//! GGUF: a strict reader over the mapped file, and a writer.
//!
//! The reader checks every count, length, offset and name against the file before it allocates; strings and arrays
//! stay in the map. Versions 2 and 3, little-endian.

use crate::error::{shown, Error};
use crate::file::{self, Options};
use crate::weights::{Memory, Store};
use crate::whole::WholeFile;
use qwen3next_kernels::DType;
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8] = b"GGUF";
const DEFAULT_ALIGNMENT: usize = 32;
/// More than any real file has; they bound what a hostile one can make the reader allocate.
const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 16;
const MAX_NAME: usize = 1 << 16;
const MAX_DEPTH: usize = 4;
const MAX_PARTS: u64 = 4096;

/// ggml's type numbers with a name: (number, name, elements of a block, bytes of a block).
const TYPES: &[(u32, &str, u64, u64)] = &[
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
];

/// Name of a ggml type number.
pub fn type_name(number: u32) -> String {
    TYPES.iter().find(|t| t.0 == number).map_or_else(|| format!("number {number}"), |t| t.1.to_string())
}

/// Size of one metadata value type; `None` for strings, arrays and unknown types.
fn scalar_size(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Reads little-endian numbers and strings, never past the end.
#[derive(Clone, Copy)]
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.bytes.len());
        match end.and_then(|e| self.bytes.get(self.at..e)) {
            Some(bytes) => {
                self.at += n;
                Ok(bytes)
            }
            None => Err(format!("{n} bytes are expected at offset {}, the file ends at {}", self.at, self.bytes.len())),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn size(&mut self) -> Result<usize, String> {
        let n = self.u64()?;
        usize::try_from(n).map_err(|_| format!("length {n} at offset {} is too large", self.at - 8))
    }

    fn string(&mut self) -> Result<&'a str, String> {
        let n = self.size()?;
        let at = self.at;
        std::str::from_utf8(self.take(n)?).map_err(|_| format!("the string at offset {at} is not UTF-8"))
    }

    /// Steps over one value of a type, checking it.
    fn skip(&mut self, kind: u32, depth: usize) -> Result<(), String> {
        match kind {
            STRING => self.string().map(drop),
            ARRAY if depth >= MAX_DEPTH => Err(format!("arrays are nested deeper than {MAX_DEPTH}")),
            ARRAY => {
                let (element, count) = (self.u32()?, self.size()?);
                if let Some(size) = scalar_size(element) {
                    let bytes = count.checked_mul(size).ok_or_else(|| format!("array length {count} is too large"))?;
                    return self.take(bytes).map(drop);
                }
                // The shortest string takes 8 bytes, the shortest array 12: more can't follow.
                if count > (self.bytes.len() - self.at) / 8 {
                    return Err(format!("array length {count} at offset {} is past the file's end", self.at - 8));
                }
                (0..count).try_for_each(|_| self.skip(element, depth + 1))
            }
            kind => match scalar_size(kind) {
                Some(size) => self.take(size).map(drop),
                None => Err(format!("value type {kind} at offset {} is unknown", self.at)),
            },
        }
    }
}

/// Where a metadata value lies.
#[derive(Debug, Clone, Copy)]
struct Place {
    kind: u32,
    at: usize,
}

/// A metadata value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// Any integer type.
    Int(i128),
    /// Any float type.
    Float(f64),
    /// Truth value.
    Bool(bool),
    /// Text.
    Str(&'a str),
    /// An array.
    Array(Array<'a>),
}

/// An array of metadata values, read as it is walked.
#[derive(Clone, Copy)]
pub struct Array<'a> {
    cursor: Cursor<'a>,
    element: u32,
    count: usize,
}

impl std::fmt::Debug for Array<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Array({} of type {})", self.count, self.element)
    }
}

impl PartialEq for Array<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.count == other.count && self.element == other.element && self.iter().eq(other.iter())
    }
}

impl<'a> Array<'a> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.count
    }

    /// It has no elements.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The elements in order.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> {
        let (mut cursor, element) = (self.cursor, self.element);
        (0..self.count).map_while(move |_| read(&mut cursor, element).ok())
    }
}

fn read<'a>(c: &mut Cursor<'a>, kind: u32) -> Result<Value<'a>, String> {
    Ok(match kind {
        0 => Value::Int(u8::from_le_bytes(c.array()?).into()),
        1 => Value::Int(i8::from_le_bytes(c.array()?).into()),
        2 => Value::Int(u16::from_le_bytes(c.array()?).into()),
        3 => Value::Int(i16::from_le_bytes(c.array()?).into()),
        4 => Value::Int(u32::from_le_bytes(c.array()?).into()),
        5 => Value::Int(i32::from_le_bytes(c.array()?).into()),
        6 => Value::Float(f32::from_le_bytes(c.array()?).into()),
        7 => Value::Bool(c.array::<1>()? != [0]),
        STRING => Value::Str(c.string()?),
        ARRAY => {
            let (element, count) = (c.u32()?, c.size()?);
            let array = Array { cursor: *c, element, count };
            let mut after = *c;
            match scalar_size(element) {
                Some(size) => after.take(count.checked_mul(size).ok_or("array is too large")?).map(drop)?,
                None => (0..count).try_for_each(|_| after.skip(element, 1))?,
            }
            *c = after;
            Value::Array(array)
        }
        10 => Value::Int(c.u64()?.into()),
        11 => Value::Int(i64::from_le_bytes(c.array()?).into()),
        12 => Value::Float(f64::from_le_bytes(c.array()?)),
        kind => return Err(format!("value type {kind} is unknown")),
    })
}

/// A tensor's entry in the file.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Name.
    pub name: String,
    /// Sizes, the fastest axis first, as the file has them.
    pub dims: Vec<usize>,
    /// ggml's type number.
    pub kind: u32,
    /// First byte in the file.
    pub start: usize,
    /// Bytes; 0 for a type of unknown block size.
    pub bytes: usize,
}

/// One GGUF file.
pub struct Gguf {
    path: PathBuf,
    store: Store,
    version: u32,
    keys: HashMap<String, Place>,
    /// Keys in the order of the file.
    order: Vec<String>,
    tensors: Vec<Entry>,
    by_name: HashMap<String, usize>,
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Gguf({}, {} keys, {} tensors)", self.path.display(), self.order.len(), self.tensors.len())
    }
}

impl Gguf {
    /// Reads and checks the header of one file.
    pub fn open(path: &Path, options: Options) -> Result<Gguf, Error> {
        Gguf::parse_store(path, file::open(path, options)?)
    }

    /// As [`Gguf::open`], of the bytes of a file; `path` names them in errors.
    pub fn parse_bytes(path: &Path, bytes: Vec<u8>) -> Result<Gguf, Error> {
        Gguf::parse_store(path, Store::Owned(Arc::new(Memory::of(bytes))))
    }

    /// As [`Gguf::parse_bytes`], of bytes that are there already.
    pub(crate) fn parse_store(path: &Path, store: Store) -> Result<Gguf, Error> {
        let mut gguf = Gguf {
            path: path.into(),
            store: store.clone(),
            version: 0,
            keys: HashMap::new(),
            order: Vec::new(),
            tensors: Vec::new(),
            by_name: HashMap::new(),
        };
        gguf.parse(store.bytes())?;
        Ok(gguf)
    }

    fn parse(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let path = self.path.clone();
        let bad = |why: String| Error::format(&path, why);
        let mut c = Cursor { bytes, at: 0 };
        if c.take(4).ok() != Some(MAGIC) {
            return Err(bad("is not a GGUF file: it does not start with the letters GGUF".into()));
        }
        let header = |e| bad(format!("header: {e}"));
        self.version = c.u32().map_err(header)?;
        match self.version {
            2 | 3 => {}
            v if v.swap_bytes() == 2 || v.swap_bytes() == 3 => {
                return Err(bad("is a big-endian GGUF file, expected little-endian".into()))
            }
            v => return Err(bad(format!("has GGUF version {v}, expected 2 or 3"))),
        }
        let (tensors, keys) = (c.u64().map_err(header)?, c.u64().map_err(header)?);
        if tensors > MAX_TENSORS || keys > MAX_KEYS {
            let why =
                format!("claims {tensors} tensors and {keys} keys, expected at most {MAX_TENSORS} and {MAX_KEYS}");
            return Err(bad(why));
        }
        // A key takes at least 13 bytes, a tensor 32: nothing is reserved for more than can follow.
        let least = keys * 13 + tensors * 32;
        if least > (bytes.len() - c.at) as u64 {
            return Err(bad(format!("claims {tensors} tensors and {keys} keys, which do not fit into the file")));
        }

        for i in 0..keys {
            let name = c.string().map_err(|e| bad(format!("key {i}: {e}")))?;
            if name.is_empty() || name.len() > MAX_NAME {
                return Err(bad(format!("key {i} has a name of {} bytes, expected 1 to {MAX_NAME}", name.len())));
            }
            let within = |e: String| Error::key(&path, shown(name), e);
            let kind = c.u32().map_err(within)?;
            let place = Place { kind, at: c.at };
            c.skip(kind, 0).map_err(within)?;
            if self.keys.insert(name.to_string(), place).is_some() {
                return Err(Error::key(&path, shown(name), "is there twice"));
            }
            self.order.push(name.to_string());
        }

        let mut offsets = Vec::new();
        for i in 0..tensors {
            let name = c.string().map_err(|e| bad(format!("tensor {i}: {e}")))?;
            if name.is_empty() || name.len() > MAX_NAME {
                return Err(bad(format!("tensor {i} has a name of {} bytes, expected 1 to {MAX_NAME}", name.len())));
            }
            let within = |e: String| Error::tensor(&path, name, e);
            let axes = c.u32().map_err(within)?;
            if !(1..=4).contains(&axes) {
                return Err(within(format!("has {axes} axes, expected 1 to 4")));
            }
            let mut dims = Vec::new();
            for _ in 0..axes {
                dims.push(c.size().map_err(within)?);
            }
            let (kind, offset) = (c.u32().map_err(within)?, c.size().map_err(within)?);
            let bytes = data_bytes(kind, &dims).map_err(within)?;
            let entry = Entry { name: name.to_string(), dims, kind, start: 0, bytes };
            if self.by_name.insert(entry.name.clone(), self.tensors.len()).is_some() {
                return Err(within("is there twice".into()));
            }
            self.tensors.push(entry);
            offsets.push(offset);
        }

        let alignment = match self.uint("general.alignment")? {
            None => DEFAULT_ALIGNMENT,
            Some(a) if a.is_power_of_two() && a <= 1 << 24 => a,
            Some(a) => {
                let why = format!("is {a}, expected a power of two up to {}", 1 << 24);
                return Err(Error::key(&path, "general.alignment", why));
            }
        };
        let data = c.at.next_multiple_of(alignment);
        let mut spans = Vec::new();
        for (entry, offset) in self.tensors.iter_mut().zip(offsets) {
            let within = |why: String| Error::tensor(&path, &entry.name, why);
            if offset % alignment != 0 {
                return Err(within(format!("lies at offset {offset}, expected a multiple of {alignment}")));
            }
            let start = data.checked_add(offset);
            let end = start.and_then(|s| s.checked_add(entry.bytes)).filter(|&e| e <= bytes.len());
            let (Some(start), Some(end)) = (start, end) else {
                let why = format!("{} bytes at data offset {offset} reach past the file's end", entry.bytes);
                return Err(within(format!("{why} ({} bytes)", bytes.len())));
            };
            entry.start = start;
            spans.push((start, end, entry.name.as_str()));
        }
        spans.sort_unstable();
        for pair in spans.windows(2) {
            if let [(_, end, first), (start, _, second)] = pair {
                if start < end {
                    return Err(Error::tensor(&path, second, format!("overlaps {}", shown(first))));
                }
            }
        }
        Ok(())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> usize {
        self.store.bytes().len()
    }

    /// Version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// All keys with their values, in the order of the file.
    pub fn keys(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        self.order.iter().filter_map(|k| Some((k.as_str(), self.value(k)?)))
    }

    /// All keys in the order of the file: name, type number and the bytes of the value.
    pub(crate) fn raw_keys(&self) -> impl Iterator<Item = (&str, u32, &[u8])> {
        let bytes = self.store.bytes();
        self.order.iter().filter_map(move |key| {
            let place = self.keys.get(key)?;
            let mut cursor = Cursor { bytes, at: place.at };
            cursor.skip(place.kind, 0).ok()?;
            Some((key.as_str(), place.kind, bytes.get(place.at..cursor.at)?))
        })
    }

    /// Tensors in the order of the file.
    pub fn tensors(&self) -> &[Entry] {
        &self.tensors
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&Entry> {
        self.tensors.get(*self.by_name.get(name)?)
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<Value<'_>> {
        let place = self.keys.get(key)?;
        read(&mut Cursor { bytes: self.store.bytes(), at: place.at }, place.kind).ok()
    }

    fn typed<T>(&self, key: &str, what: &str, get: impl Fn(Value) -> Option<T>) -> Result<Option<T>, Error> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match get(value) {
            Some(v) => Ok(Some(v)),
            None => {
                let found = match value {
                    Value::Str(s) => format!("\"{}\"", shown(s)),
                    value => shown(&format!("{value:?}")),
                };
                Err(Error::key(&self.path, key, format!("is {found}, expected {what}")))
            }
        }
    }

    /// A number ≥ 0 of any integer type.
    pub fn uint(&self, key: &str) -> Result<Option<usize>, Error> {
        self.typed(key, "a whole number", |v| match v {
            Value::Int(n) => usize::try_from(n).ok(),
            _ => None,
        })
    }

    /// A number ≥ 0, or an array of them with one a layer, where all that are not 0 must be equal.
    pub fn uint_or_same(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some(Value::Array(array)) = self.value(key) else { return self.uint(key) };
        let mut same = 0;
        for value in array.iter() {
            match value {
                Value::Int(n) if n == 0 || n == same || (n > 0 && same == 0) => same = same.max(n),
                _ => return Err(Error::key(&self.path, key, "differs between layers, expected one number for all")),
            }
        }
        usize::try_from(same).map(Some).map_err(|_| Error::key(&self.path, key, "holds a number that is too large"))
    }

    /// A number of any type.
    pub fn float(&self, key: &str) -> Result<Option<f64>, Error> {
        self.typed(key, "a number", |v| match v {
            Value::Float(x) => Some(x),
            Value::Int(n) => Some(n as f64),
            _ => None,
        })
    }

    /// A truth value.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "true or false", |v| match v {
            Value::Bool(b) => Some(b),
            _ => None,
        })
    }

    /// A text.
    pub fn string(&self, key: &str) -> Result<Option<String>, Error> {
        self.typed(key, "a text", |v| match v {
            Value::Str(s) => Some(s.to_string()),
            _ => None,
        })
    }

    /// An array.
    pub fn list(&self, key: &str) -> Result<Option<Array<'_>>, Error> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Array(a)) => Ok(Some(a)),
            Some(_) => Err(Error::key(&self.path, key, "is a single value, expected an array")),
        }
    }
}

/// Bytes of a tensor; 0 for a type of unknown block size.
fn data_bytes(kind: u32, dims: &[usize]) -> Result<usize, String> {
    if dims.contains(&0) {
        return Err(format!("has shape {dims:?}, expected no axis of 0"));
    }
    let elements = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64)).filter(|&n| n < 1 << 60);
    let elements = elements.ok_or_else(|| format!("has shape {dims:?}, which is too large"))?;
    let Some(&(_, name, block, block_bytes)) = TYPES.iter().find(|t| t.0 == kind) else { return Ok(0) };
    let columns = dims.first().map_or(0, |&d| d as u64);
    if columns % block != 0 {
        return Err(format!("has {columns} columns of type {name}, expected a multiple of {block}"));
    }
    let bytes = (elements / block).checked_mul(block_bytes).and_then(|b| usize::try_from(b).ok());
    bytes.ok_or_else(|| format!("has shape {dims:?}, which is too large"))
}

/// `prefix-00002-of-00005.gguf` as (prefix, 2, 5).
fn split_name(path: &Path) -> Option<(String, u64, u64)> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    let digits = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    if !digits(count) || !digits(number) {
        return None;
    }
    Some((prefix.to_string(), number.parse().ok()?, count.parse().ok()?))
}

/// Opens a file and, where it is a part of a split one, all its parts in order. The first holds the metadata.
pub fn open_all(path: &Path, options: Options) -> Result<Vec<Gguf>, Error> {
    let given = Gguf::open(path, options)?;
    let count = given.uint("split.count")?.unwrap_or(0) as u64;
    if count <= 1 {
        return Ok(vec![given]);
    }
    if count > MAX_PARTS {
        return Err(Error::key(path, "split.count", format!("is {count}, expected at most {MAX_PARTS}")));
    }
    let prefix = match split_name(path) {
        Some((prefix, _, named)) if named == count => prefix,
        _ => {
            let why = format!("is {count}, expected a file name that ends in -00001-of-{count:05}.gguf");
            return Err(Error::key(path, "split.count", why));
        }
    };
    let mut parts = Vec::new();
    let mut names = HashMap::new();
    for i in 0..count {
        let part_path = path.with_file_name(format!("{prefix}-{:05}-of-{count:05}.gguf", i + 1));
        let part = Gguf::open(&part_path, options)?;
        for (key, expected) in [("split.no", i), ("split.count", count)] {
            let found = part.uint(key)?;
            if found != usize::try_from(expected).ok() {
                let found = found.map_or("missing".to_string(), |n| n.to_string());
                return Err(Error::key(&part_path, key, format!("is {found}, expected {expected}")));
            }
        }
        for entry in part.tensors() {
            if let Some(first) = names.insert(entry.name.clone(), i + 1) {
                return Err(Error::tensor(&part_path, &entry.name, format!("is in part {first} as well")));
            }
        }
        parts.push(part);
    }
    let first = parts.first().map(|p| p.uint("split.tensors.count")).transpose()?.flatten();
    if first.is_some_and(|n| n != names.len()) {
        let why = format!("is {}, the parts hold {}", first.unwrap_or(0), names.len());
        return Err(Error::key(path, "split.tensors.count", why));
    }
    Ok(parts)
}

/// The dtype of an entry, or a sentence that names its type and the supported ones.
pub(crate) fn supported(entry: &Entry) -> Result<DType, String> {
    DType::from_ggml(entry.kind).ok_or_else(|| {
        let names: Vec<String> = DType::ALL.iter().map(|t| t.name().to_uppercase()).collect();
        format!("type {} is not supported; supported: {}", type_name(entry.kind), names.join(", "))
    })
}

/// A metadata value to write.
#[derive(Debug, Clone, PartialEq)]
pub enum Put {
    /// u32.
    U32(u32),
    /// u64.
    U64(u64),
    /// u16.
    U16(u16),
    /// i32.
    I32(i32),
    /// f32.
    F32(f32),
    /// Truth value.
    Bool(bool),
    /// Text.
    Str(String),
    /// Array of texts.
    Strs(Vec<String>),
    /// Array of i32.
    I32s(Vec<i32>),
    /// Array of truth values.
    Bools(Vec<bool>),
    /// Any value as a file has it: type number and bytes.
    Raw(u32, Vec<u8>),
}

/// Builds a GGUF file: keys and tensor shapes first, then the data, tensor by tensor.
#[derive(Debug, Clone)]
pub struct Writer {
    keys: Vec<(String, Put)>,
    tensors: Vec<(String, DType, Vec<usize>)>,
    alignment: usize,
}

impl Default for Writer {
    fn default() -> Self {
        Writer { keys: Vec::new(), tensors: Vec::new(), alignment: DEFAULT_ALIGNMENT }
    }
}

impl Writer {
    /// An empty file of an architecture.
    pub fn new(architecture: &str) -> Writer {
        let mut writer = Writer::default();
        writer.put("general.architecture", Put::Str(architecture.into()));
        writer
    }

    /// Adds a key.
    pub fn put(&mut self, key: impl Into<String>, value: Put) -> &mut Self {
        self.keys.push((key.into(), value));
        self
    }

    /// Aligns tensor data to a power of two other than 32.
    pub fn align(&mut self, alignment: usize) -> &mut Self {
        self.alignment = alignment.max(1);
        self.put("general.alignment", Put::U32(alignment as u32))
    }

    /// Adds a tensor; its index is what `fill` is called with. Shape in numpy order, columns last.
    pub fn tensor(&mut self, name: impl Into<String>, dtype: DType, shape: &[usize]) -> usize {
        self.tensors.push((name.into(), dtype, shape.to_vec()));
        self.tensors.len() - 1
    }

    /// Names, types and shapes of the tensors so far.
    pub fn tensors(&self) -> &[(String, DType, Vec<usize>)] {
        &self.tensors
    }

    /// Bytes of a tensor's data.
    pub fn tensor_bytes(&self, index: usize) -> Option<usize> {
        let (_, dtype, shape) = self.tensors.get(index)?;
        if shape.last()? % dtype.block() != 0 {
            return None;
        }
        dtype.bytes(shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?)
    }

    fn header(&self, path: &Path) -> Result<Vec<u8>, Error> {
        fn string(out: &mut Vec<u8>, s: &str) {
            out.extend((s.len() as u64).to_le_bytes());
            out.extend(s.as_bytes());
        }
        fn array(out: &mut Vec<u8>, element: u32, count: usize) {
            out.extend(ARRAY.to_le_bytes());
            out.extend(element.to_le_bytes());
            out.extend((count as u64).to_le_bytes());
        }
        let mut out = MAGIC.to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            string(&mut out, key);
            let mut plain = |kind: u32, bytes: &[u8]| {
                out.extend(kind.to_le_bytes());
                out.extend(bytes);
            };
            match value {
                Put::U32(v) => plain(4, &v.to_le_bytes()),
                Put::U64(v) => plain(10, &v.to_le_bytes()),
                Put::U16(v) => plain(2, &v.to_le_bytes()),
                Put::I32(v) => plain(5, &v.to_le_bytes()),
                Put::F32(v) => plain(6, &v.to_le_bytes()),
                Put::Bool(v) => plain(7, &[u8::from(*v)]),
                Put::Raw(kind, bytes) => plain(*kind, bytes),
                Put::Str(v) => {
                    plain(STRING, &[]);
                    string(&mut out, v);
                }
                Put::Strs(v) => {
                    array(&mut out, STRING, v.len());
                    v.iter().for_each(|s| string(&mut out, s));
                }
                Put::I32s(v) => {
                    array(&mut out, 5, v.len());
                    v.iter().for_each(|n| out.extend(n.to_le_bytes()));
                }
                Put::Bools(v) => {
                    array(&mut out, 7, v.len());
                    out.extend(v.iter().map(|&b| u8::from(b)));
                }
            }
        }
        let mut offset = 0usize;
        for (i, (name, dtype, shape)) in self.tensors.iter().enumerate() {
            let bytes = self.tensor_bytes(i);
            let bytes = bytes.ok_or_else(|| Error::tensor(path, name, format!("shape {shape:?} is no {dtype}")))?;
            string(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|&d| out.extend((d as u64).to_le_bytes()));
            out.extend(dtype.ggml().to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset += bytes.next_multiple_of(self.alignment);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        Ok(out)
    }

    /// Writes the file under a temporary name and renames it when it is complete. `fill(i, out)` writes exactly the bytes
    /// of tensor i.
    pub fn write(
        &self,
        path: &Path,
        mut fill: impl FnMut(usize, &mut dyn Write) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let io = |source| Error::io(path, source);
        let file = WholeFile::create(path).map_err(io)?;
        let mut out = Counted { inner: std::io::BufWriter::with_capacity(1 << 20, file), bytes: 0 };
        out.write_all(&self.header(path)?).map_err(io)?;
        for (i, (name, ..)) in self.tensors.iter().enumerate() {
            let (begin, expected) = (out.bytes, self.tensor_bytes(i).unwrap_or(0) as u64);
            fill(i, &mut out)?;
            let written = out.bytes - begin;
            if written != expected {
                return Err(Error::tensor(path, name, format!("{written} bytes were written, expected {expected}")));
            }
            let padding = expected.next_multiple_of(self.alignment as u64) - expected;
            std::io::copy(&mut std::io::Read::take(std::io::repeat(0), padding), &mut out).map_err(io)?;
        }
        out.inner.into_inner().map_err(|e| io(e.into_error()))?.finish().map_err(io)
    }
}

/// Counts what is written.
struct Counted<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        let n = self.inner.write(buffer)?;
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}
