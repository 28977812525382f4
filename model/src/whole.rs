//! Output files that appear under their name only when they are whole.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Error, ErrorKind, Result, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

static UNFINISHED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// A file that is written under a temporary name beside its target, and removed unless it is finished.
///
/// A symbolic link stays one: the file it names is replaced. A device or pipe is written directly, since a rename would
/// put a file in its place.
#[derive(Debug)]
pub struct WholeFile {
    file: File,
    target: PathBuf,
    /// `None` where the target is written directly, or the file is finished.
    temporary: Option<PathBuf>,
}

impl WholeFile {
    /// Begins a file. A folder is refused.
    pub fn create(path: &Path) -> Result<WholeFile> {
        let existing = match fs::metadata(path) {
            Ok(meta) => Some(meta.file_type()),
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(e),
        };
        let target = match existing {
            Some(kind) if kind.is_dir() => return Err(Error::new(ErrorKind::IsADirectory, "is a folder")),
            Some(kind) if !kind.is_file() => {
                let file = OpenOptions::new().write(true).open(path)?;
                return Ok(WholeFile { file, target: path.into(), temporary: None });
            }
            Some(_) => fs::canonicalize(path)?,
            None => path.into(),
        };
        let name = format!(".q3n-{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let temporary = target.with_file_name(name);
        let mut list = unfinished();
        let file = OpenOptions::new().write(true).create_new(true).open(&temporary)?;
        list.insert(temporary.clone());
        drop(list);
        Ok(WholeFile { file, target, temporary: Some(temporary) })
    }

    /// Puts the file in its place.
    pub fn finish(mut self) -> Result<()> {
        self.file.flush()?;
        if let Some(temporary) = &self.temporary {
            fs::rename(temporary, &self.target)?;
            unfinished().remove(temporary);
            self.temporary = None;
        }
        Ok(())
    }
}

impl Write for WholeFile {
    fn write(&mut self, buffer: &[u8]) -> Result<usize> {
        self.file.write(buffer)
    }

    fn flush(&mut self) -> Result<()> {
        self.file.flush()
    }
}

impl Drop for WholeFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = fs::remove_file(temporary);
            unfinished().remove(temporary);
        }
    }
}

/// Removes what is half written, before a program ends without dropping it. No file can be begun after that.
pub fn remove_unfinished() {
    let list = unfinished();
    for temporary in list.iter() {
        let _ = fs::remove_file(temporary);
    }
    std::mem::forget(list);
}

fn unfinished() -> std::sync::MutexGuard<'static, BTreeSet<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}
