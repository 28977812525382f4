//! Rows of float32 into a .npy file, one after another, so that a long output need not fit in memory.

use anyhow::Context;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A file that appears under its name only when it is whole.
pub struct Writer {
    file: BufWriter<tempfile::NamedTempFile>,
    path: PathBuf,
    left: usize,
}

impl Writer {
    /// A file of `rows` × `columns`.
    pub fn create(path: &Path, rows: usize, columns: usize) -> anyhow::Result<Writer> {
        let fail = || format!("{}: cannot write", path.display());
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder).with_context(fail)?;
        ndarray_npy::write_zeroed_npy::<f32, _>(file.as_file(), (rows, columns)).with_context(fail)?;
        // The header is what stands before the values.
        let bytes = rows as u64 * columns as u64 * 4;
        let length = file.as_file().metadata().with_context(fail)?.len();
        file.seek(SeekFrom::Start(length - bytes)).with_context(fail)?;
        Ok(Writer { file: BufWriter::new(file), path: path.into(), left: rows * columns })
    }

    /// Appends values.
    pub fn write(&mut self, values: &[f32]) -> anyhow::Result<()> {
        self.left = self.left.checked_sub(values.len()).context("more logits than announced")?;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.file.write_all(&bytes).with_context(|| format!("{}: cannot write", self.path.display()))
    }

    /// Puts the file in its place.
    pub fn finish(self) -> anyhow::Result<()> {
        let fail = || format!("{}: cannot write", self.path.display());
        anyhow::ensure!(self.left == 0, "{}: {} values are missing", self.path.display(), self.left);
        self.file
            .into_inner()
            .map_err(|e| e.into_error())
            .with_context(fail)?
            .persist(&self.path)
            .with_context(fail)?;
        Ok(())
    }
}
