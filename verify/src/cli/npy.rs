//! Rows of float32 into a .npy file, one after another, so that a long output need not fit in memory.

use anyhow::Context;
use qwen3next_model::whole::WholeFile;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// A file that appears under its name only when it is whole.
pub struct Writer {
    file: BufWriter<WholeFile>,
    path: PathBuf,
    left: usize,
}

/// Magic, version 1.0, length of the text, and the text, which ends at a multiple of 64.
fn header(rows: usize, columns: usize) -> Vec<u8> {
    let mut text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
    let length = (10 + text.len() + 1).next_multiple_of(64) - 10;
    text = format!("{text:<width$}\n", width = length - 1);
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((length as u16).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes
}

impl Writer {
    /// A file of `rows` × `columns`.
    pub fn create(path: &Path, rows: usize, columns: usize) -> anyhow::Result<Writer> {
        let fail = || format!("{}: cannot write", path.display());
        let mut file = BufWriter::new(WholeFile::create(path).with_context(fail)?);
        file.write_all(&header(rows, columns)).with_context(fail)?;
        let left = rows.checked_mul(columns).with_context(fail)?;
        Ok(Writer { file, path: path.into(), left })
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
        self.file.into_inner().map_err(|e| e.into_error()).with_context(fail)?.finish().with_context(fail)
    }
}

#[cfg(test)]
mod tests {
    use super::Writer;
    use ndarray::{arr2, Array2};
    use ndarray_npy::ReadNpyExt;

    #[test]
    fn what_is_written_reads_back() {
        let path = std::env::temp_dir().join(format!("q3n-npy-{}.npy", std::process::id()));
        let mut file = Writer::create(&path, 2, 3).unwrap();
        file.write(&[1.0, 2.0]).unwrap();
        file.write(&[3.0, 4.0, 5.0, 6.0]).unwrap();
        assert!(file.write(&[7.0]).is_err());
        assert!(!path.exists());
        let mut file = Writer::create(&path, 2, 3).unwrap();
        file.write(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        file.finish().unwrap();
        let read = Array2::<f32>::read_npy(std::fs::File::open(&path).unwrap()).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read, arr2(&[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]));
    }
}
