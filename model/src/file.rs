//! Opening files: mapped or read whole.

use crate::error::Error;
use crate::weights::{Memory, Store};
use memmap2::Mmap;
use rayon::prelude::*;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

/// How weights come into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Map the files (pages are read when a kernel first touches them) instead of reading them whole.
    pub mmap: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { mmap: true }
    }
}

/// The bytes of a file.
pub(crate) fn open(path: &Path, options: Options) -> Result<Store, Error> {
    let io = |source| Error::io(path, source);
    expect_regular(path)?;
    let file = File::open(path).map_err(io)?;
    if !options.mmap {
        let len = usize::try_from(file.metadata().map_err(io)?.len()).unwrap_or(usize::MAX);
        let memory = Memory::zeros(len).ok_or_else(|| Error::format(path, format!("no memory for its {len} bytes")))?;
        return Ok(Store::Owned(Arc::new(read_parts(&file, memory).map_err(io)?)));
    }
    // SAFETY: the file is mapped read-only and its bytes are only ever read as plain numbers and as text that is
    // checked where it is used; that nobody shortens or rewrites a model while it is loaded is the user's part.
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    Ok(Store::Mapped(Arc::new(map)))
}

/// Fills `memory` from the start of the file, several parts at a time: the system copies from its cache.
fn read_parts(file: &File, mut memory: Memory) -> std::io::Result<Memory> {
    const PART: usize = 16 << 20;
    memory.bytes_mut().par_chunks_mut(PART).enumerate().try_for_each(|(i, part)| read_at(file, part, i * PART))?;
    Ok(memory)
}

#[cfg(unix)]
fn read_at(file: &File, part: &mut [u8], at: usize) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, part, at as u64)
}

#[cfg(not(unix))]
fn read_at(mut file: &File, part: &mut [u8], at: usize) -> std::io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    // The position is the file's, shared by all threads: one part at a time.
    static POSITION: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _alone = POSITION.lock();
    file.seek(SeekFrom::Start(at as u64))?;
    file.read_exact(part)
}

/// Bytes of a regular file. A device may have no end, and opening a pipe may wait for ever.
pub(crate) fn expect_regular(path: &Path) -> Result<u64, Error> {
    let meta = std::fs::metadata(path).map_err(|source| Error::io(path, source))?;
    if meta.is_file() {
        return Ok(meta.len());
    }
    Err(Error::format(path, "is not a regular file"))
}

/// A small text file, refused where it is larger than `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, Error> {
    let io = |source| Error::io(path, source);
    let size = expect_regular(path)?;
    if size > limit {
        return Err(Error::format(path, format!("has {size} bytes, expected at most {limit}")));
    }
    String::from_utf8(std::fs::read(path).map_err(io)?).map_err(|_| Error::format(path, "is not UTF-8 text"))
}
