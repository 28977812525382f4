//! What can go wrong with a model's files, as a value; every text is one line.

use std::fmt;
use std::path::{Path, PathBuf};

/// Why a file could not be read, or a request not be served. The text names the file and the key or tensor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused to open, map, read or write a file.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file breaks the rules of its container format.
    #[error("{}: {why}", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is broken and where.
        why: String,
    },
    /// A metadata or configuration key is missing or holds a value that no model can have.
    #[error("{}: {key}: {why}", .path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Key in the file.
        key: String,
        /// What was expected and found.
        why: String,
    },
    /// A tensor is missing, or its type or shape is not the expected one.
    #[error("{}: {tensor}: {why}", .path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// Name of the tensor in the file.
        tensor: String,
        /// What was expected and found.
        why: String,
    },
    /// Sizes of a configuration do not fit together.
    #[error("config: {field}: {why}")]
    Config {
        /// Field of [`Config`](crate::config::Config).
        field: &'static str,
        /// What was expected and found.
        why: String,
    },
    /// The tokenizer's data is unusable.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab}")]
    Token {
        /// The id.
        id: u32,
        /// Ids there are.
        vocab: usize,
    },
    /// An argument of a call is unusable.
    #[error("{arg}: {why}")]
    Argument {
        /// Name of the argument.
        arg: &'static str,
        /// What was expected and found.
        why: String,
    },
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] qwen3next_kernels::Error),
}

impl Error {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Error::Io { path: path.into(), source }
    }

    pub(crate) fn format(path: &Path, why: impl Into<String>) -> Self {
        Error::Format { path: path.into(), why: why.into() }
    }

    pub(crate) fn key(path: &Path, key: impl fmt::Display, why: impl Into<String>) -> Self {
        Error::Key { path: path.into(), key: key.to_string(), why: why.into() }
    }

    pub(crate) fn tensor(path: &Path, tensor: &str, why: impl Into<String>) -> Self {
        Error::Tensor { path: path.into(), tensor: shown(tensor), why: why.into() }
    }

    pub(crate) fn config(field: &'static str, why: impl Into<String>) -> Self {
        Error::Config { field, why: why.into() }
    }

    /// A call was given an unusable argument.
    pub fn argument(arg: &'static str, why: impl Into<String>) -> Self {
        Error::Argument { arg, why: why.into() }
    }
}

/// A name out of a file as it may stand in an error: escaped, and cut where it is absurdly long.
pub(crate) fn shown(name: &str) -> String {
    const MOST: usize = 80;
    let mut text: String = name.chars().take(MOST).flat_map(char::escape_debug).collect();
    if name.chars().nth(MOST).is_some() {
        text.push_str("...");
    }
    text
}
