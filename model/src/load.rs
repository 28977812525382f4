//! From a path to a model: which container it is.

use crate::error::Error;
use crate::file::Options;
use crate::gguf::Gguf;
use crate::source::{Loaded, Progress};
use crate::weights::Weights;
use crate::{load_gguf, load_hf};
use std::path::Path;

/// Loads a GGUF file of architecture `qwen3next` (any part of a split one), or a Hugging Face folder.
pub fn load(path: &Path, options: Options, progress: &mut dyn FnMut(Progress)) -> Result<Loaded, Error> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if meta.is_dir() {
        load_hf::load(path, options, progress)
    } else {
        load_gguf::load(path, options, progress)
    }
}

/// A model of one GGUF file that is parsed already.
pub fn load_parsed(file: Gguf) -> Result<Loaded, Error> {
    let path = file.path().to_path_buf();
    load_gguf::load_parts(&path, &[file], &mut |_| ())
}

impl Weights {
    /// [`load`] with a memory map.
    pub fn load(path: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Loaded, Error> {
        load(path, Options::default(), progress)
    }
}
