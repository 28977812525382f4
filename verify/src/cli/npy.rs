//! Rows of float32 into a .npy file, one after another, so that a long output need not fit in memory.

use anyhow::{bail, Context};
use qwen3next_model::whole::WholeFile;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
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

/// The rows of a float32 .npy file, one after another. Nothing is allocated on the word of its header.
pub struct Reader {
    file: BufReader<File>,
    path: PathBuf,
    columns: usize,
}

impl Reader {
    /// Opens a file of `rows` × `columns`.
    pub fn open(path: &Path, rows: usize, columns: usize) -> anyhow::Result<Reader> {
        let name = || format!("{}", path.display());
        let mut file = BufReader::new(File::open(path).with_context(name)?);
        let mut start = [0; 10];
        if file.read_exact(&mut start).is_err() || start[..8] != *b"\x93NUMPY\x01\x00" {
            bail!("{}: is no .npy file of version 1", path.display());
        }
        let mut text = vec![0; u16::from_le_bytes([start[8], start[9]]).into()];
        file.read_exact(&mut text).with_context(name)?;
        let text = String::from_utf8_lossy(&text).replace(char::is_whitespace, "");
        let expected = ["'descr':'<f4'", "'fortran_order':False", &format!("'shape':({rows},{columns})")];
        if !expected.iter().all(|part| text.contains(part)) {
            let found: String = text.chars().take(100).flat_map(char::escape_debug).collect();
            bail!("{}: holds {found}, expected float32 [{rows}, {columns}] for this text, context and model", name());
        }
        Ok(Reader { file, path: path.into(), columns })
    }

    /// The next row.
    pub fn row(&mut self) -> anyhow::Result<Vec<f32>> {
        let mut bytes = vec![0; self.columns * 4];
        self.file.read_exact(&mut bytes).with_context(|| format!("{}", self.path.display()))?;
        Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::{Reader, Writer};

    /// What `numpy.save` (2.4.6) writes for a C-contiguous array.
    fn numpy(descr: &str, shape: &str, values: &[u8]) -> Vec<u8> {
        let text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
        [b"\x93NUMPY\x01\x00\x76\x00", format!("{text:<117}\n").as_bytes(), values].concat()
    }

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn the_bytes_are_those_of_numpy() {
        let path = std::env::temp_dir().join(format!("q3n-npy-{}.npy", std::process::id()));
        let mut file = Writer::create(&path, 2, 3).unwrap();
        file.write(&[1.0, 2.0]).unwrap();
        file.write(&[3.0, 4.0, 5.0, 6.0]).unwrap();
        assert!(file.write(&[7.0]).is_err());
        drop(file);
        assert!(!path.exists());
        let mut file = Writer::create(&path, 2, 3).unwrap();
        file.write(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        file.finish().unwrap();
        let values = bytes(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(std::fs::read(&path).unwrap(), numpy("<f4", "(2, 3)", &values));

        std::fs::write(&path, numpy("<f4", "(2, 2)", &bytes(&[7.0, 8.0, 9.0, 1.5]))).unwrap();
        let mut file = Reader::open(&path, 2, 2).unwrap();
        assert_eq!((file.row().unwrap(), file.row().unwrap()), (vec![7.0, 8.0], vec![9.0, 1.5]));
        assert!(file.row().is_err());
        assert!(Reader::open(&path, 2, 3).is_err());
        std::fs::write(&path, numpy("<f8", "(1, 1)", &1.0f64.to_le_bytes())).unwrap();
        assert!(Reader::open(&path, 1, 1).is_err());
        std::fs::write(&path, b"\x93NUMPY\x02\x00\xff\xff\xff\xff").unwrap();
        assert!(Reader::open(&path, 1, 1).is_err());
        std::fs::remove_file(&path).unwrap();
    }
}
