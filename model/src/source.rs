//! What both containers share: what a loaded model is, and a container of tensors that remembers which were asked for.

use crate::config::{Config, DeltaConfig};
use crate::error::{shown, Error};
use crate::tokenizer::Tokenizer;
use crate::weights::{Store, Tensor, Weights};
use qwen3next_kernels::DType;
use std::cell::RefCell;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// How far loading is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Layers done.
    pub done: usize,
    /// Layers there are.
    pub total: usize,
}

/// A loaded model.
#[derive(Debug)]
pub struct Loaded {
    /// Sizes.
    pub config: Config,
    /// Weights.
    pub weights: Weights,
    /// The tokenizer, or why there is none: a model without one still runs on token ids.
    pub tokenizer: Result<Tokenizer, Error>,
    /// What else the files say.
    pub metadata: Metadata,
}

/// What a file says beside sizes and weights.
#[derive(Debug, Clone, Default)]
pub struct Metadata {
    /// `GGUF v3` or `safetensors`.
    pub container: String,
    /// The model's name, where the file has one.
    pub name: Option<String>,
    /// All files that were opened.
    pub files: Vec<PathBuf>,
    /// Their bytes.
    pub file_bytes: u64,
    /// Every tensor in the files, MTP included.
    pub tensors: Vec<TensorInfo>,
    /// The chat template (Jinja), where there is one.
    pub chat_template: Option<String>,
    /// The token that begins a text, as templates write it.
    pub bos_token: Option<String>,
    /// The token that ends a text, as templates write it.
    pub eos_token: Option<String>,
    /// What was unusual but no reason to refuse.
    pub warnings: Vec<String>,
}

impl Metadata {
    /// Numbers in all tensors that the model uses.
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().filter(|t| t.used).map(|t| t.shape.iter().map(|&d| d as u64).product::<u64>()).sum()
    }
}

/// A tensor as the file has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Name of the type.
    pub dtype: String,
    /// Sizes, columns last.
    pub shape: Vec<usize>,
    /// Bytes in the file.
    pub bytes: u64,
    /// It is part of the loaded model.
    pub used: bool,
}

/// A tensor found in a container.
pub(crate) struct Found<'a> {
    pub path: &'a Path,
    pub store: &'a Store,
    pub start: usize,
    pub dtype: Result<DType, String>,
    /// Columns last.
    pub shape: Vec<usize>,
}

/// A container of tensors that remembers which were asked for.
pub(crate) struct Source<'a> {
    /// Named where a tensor is missing.
    path: &'a Path,
    find: &'a dyn Fn(&str) -> Option<Found<'a>>,
    used: RefCell<HashSet<String>>,
}

impl<'a> Source<'a> {
    pub fn new(path: &'a Path, find: &'a dyn Fn(&str) -> Option<Found<'a>>) -> Self {
        Source { path, find, used: RefCell::default() }
    }

    pub fn path(&self) -> &'a Path {
        self.path
    }

    pub fn has(&self, name: &str) -> bool {
        (self.find)(name).is_some()
    }

    /// Shape of a tensor, columns last.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        (self.find)(name).map(|found| found.shape)
    }

    /// The tensor is known but not needed.
    pub fn ignore(&self, name: &str) {
        self.used.borrow_mut().insert(name.into());
    }

    pub fn is_used(&self, name: &str) -> bool {
        self.used.borrow().contains(name)
    }

    /// The entry of a tensor of this shape; axes of 1 do not matter.
    pub fn found(&self, name: &str, shape: &[usize]) -> Result<(Found<'a>, DType), Error> {
        let Some(found) = (self.find)(name) else {
            return Err(Error::tensor(self.path, name, format!("is missing, expected shape {shape:?}")));
        };
        let squeezed = |s: &[usize]| s.iter().copied().filter(|&d| d != 1).collect::<Vec<_>>();
        if squeezed(&found.shape) != squeezed(shape) {
            let why = format!("has shape {:?}, expected {shape:?} (columns last)", found.shape);
            return Err(Error::tensor(found.path, name, why));
        }
        self.used.borrow_mut().insert(name.into());
        match &found.dtype {
            Ok(dtype) => {
                let dtype = *dtype;
                Ok((found, dtype))
            }
            Err(why) => Err(Error::tensor(found.path, name, why.clone())),
        }
    }

    /// A weight `[experts][rows][cols]`.
    pub fn experts(&self, name: &str, shape: [usize; 3]) -> Result<Tensor, Error> {
        let (found, dtype) = self.found(name, &shape)?;
        let [_, rows, cols] = shape;
        let tensor = Tensor::new(found.store.clone(), found.start, dtype, shape, rows * cols);
        tensor.ok_or_else(|| Error::tensor(found.path, name, format!("shape {shape:?} does not fit type {dtype}")))
    }

    /// A weight `[rows][cols]`.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Tensor, Error> {
        self.experts(name, [1, rows, cols])
    }

    /// The numbers of a small tensor.
    pub fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let (found, dtype) = self.found(name, shape)?;
        let count = shape.iter().product();
        let tensor = Tensor::new(found.store.clone(), found.start, dtype, [1, 1, count], count);
        tensor.and_then(|t| t.to_f32()).ok_or_else(|| {
            let why = format!("has type {}, expected F32, F16 or BF16", dtype.name().to_uppercase());
            Error::tensor(found.path, name, why)
        })
    }

    /// Refuses a tensor that no part of the model asked for: leaving a weight out would give wrong answers.
    pub fn refuse_unused<'n>(&self, names: impl Iterator<Item = &'n str>) -> Result<(), Error> {
        for name in names {
            if !self.is_used(name) {
                let path = (self.find)(name).map_or(self.path, |f| f.path);
                return Err(Error::tensor(path, name, "is no tensor that a Qwen3-Next model of this config has"));
            }
        }
        Ok(())
    }
}

/// Rows of q|k|v and of z in a projection whose rows are interleaved by key head as [q K | k K | v r·V | z r·V].
pub(crate) fn interleaved_rows(d: &DeltaConfig) -> (Vec<usize>, Vec<usize>) {
    let values = d.group() * d.v_dim;
    let head = 2 * d.k_dim + 2 * values;
    let rows =
        |first: usize, count: usize| (0..d.k_heads).flat_map(move |h| (0..count).map(move |i| h * head + first + i));
    let qkv = rows(0, d.k_dim).chain(rows(d.k_dim, d.k_dim)).chain(rows(2 * d.k_dim, values)).collect();
    (qkv, rows(2 * d.k_dim + values, values).collect())
}

/// Splits an interleaved projection into q|k|v and z.
pub(crate) fn deinterleave(tensor: &Tensor, d: &DeltaConfig) -> Option<(Tensor, Tensor)> {
    let (qkv, z) = interleaved_rows(d);
    Some((tensor.gather_rows(qkv.into_iter())?, tensor.gather_rows(z.into_iter())?))
}

/// [`Config::validate`], naming the file.
pub(crate) fn validated(config: Config, path: &Path) -> Result<Config, Error> {
    match config.validate() {
        Ok(()) => Ok(config),
        Err(Error::Config { field, why }) => Err(Error::key(path, field, why)),
        Err(other) => Err(other),
    }
}

/// At most a few names, for a warning.
pub(crate) fn some_names(names: &[String]) -> String {
    let mut text = names.iter().take(3).map(|n| shown(n)).collect::<Vec<_>>().join(", ");
    if names.len() > 3 {
        text.push_str(&format!(" and {} more", names.len() - 3));
    }
    text
}
