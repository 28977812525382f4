//! One file a subcommand.

pub mod bench;
pub mod bench_matrix;
pub mod bench_model;
pub mod bench_op;
pub mod bench_peaks;
// Peers stand beside kernels on a device.
#[cfg_attr(not(any(feature = "cuda", feature = "cuda-host")), allow(dead_code))]
pub mod bench_peers;
pub mod chat;
pub mod child;
pub mod drift;
pub mod eval;
pub mod fit;
pub mod generate;
pub mod inspect;
pub mod interrupt;
pub mod logits;
pub mod model;
pub mod mutants;
pub mod npy;
pub mod perplexity;
pub mod plot;
pub mod plugin;
pub mod quantize;
pub mod regress;
pub mod run_model;
pub mod sampling;
pub mod spelling;
pub mod sweep;
pub mod synth;
pub mod tour;
pub mod verify;

use anyhow::{bail, Context};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use qwen3next_kernels::isa::{self, Isa};
use qwen3next_model::whole::WholeFile;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// Holds the whole program to the instruction sets that Q3N_ISA names (`avx2`, or several with commas): how a kernel does
/// on a smaller machine.
pub fn mask_from_environment() -> anyhow::Result<()> {
    let Some(names) = std::env::var_os("Q3N_ISA") else { return Ok(()) };
    let names = names.to_string_lossy();
    let isas = names.split(',').map(|name| Isa::from_name(name.trim())).collect::<Option<Vec<_>>>();
    let Some(isas) = isas else {
        let known: Vec<&str> = Isa::all().map(Isa::name).collect();
        bail!("Q3N_ISA={names}: expected names out of {}", known.join(", "));
    };
    isa::allow(&isas);
    Ok(())
}

/// A progress bar on stderr (hidden where stderr is no terminal).
pub fn progress(len: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(len), ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template(template).expect("a fixed template"));
    bar
}

/// A file to write that will be there whole or not at all. Made before the work starts: a bad path costs no time.
pub struct Output {
    file: WholeFile,
    path: PathBuf,
}

impl Output {
    /// Begins the file.
    pub fn create(path: &Path) -> anyhow::Result<Output> {
        let file = WholeFile::create(path).with_context(|| format!("{}: cannot write", path.display()))?;
        Ok(Output { file, path: path.into() })
    }

    /// Writes all of it and puts it in its place.
    pub fn finish(mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let written = self.file.write_all(bytes).and_then(|()| self.file.finish());
        written.with_context(|| format!("{}: cannot write", self.path.display()))
    }
}

/// A text to read, from a file or a pipe.
pub fn read_text(path: &Path) -> anyhow::Result<String> {
    const MOST: u64 = 1 << 28;
    let fail = || format!("{}", path.display());
    let mut bytes = Vec::new();
    std::fs::File::open(path).and_then(|f| f.take(MOST + 1).read_to_end(&mut bytes)).with_context(fail)?;
    anyhow::ensure!(bytes.len() as u64 <= MOST, "{}: has more than {MOST} bytes", path.display());
    String::from_utf8(bytes).map_err(|_| anyhow::anyhow!("{}: is not UTF-8 text", path.display()))
}

/// Refuses a window that a text of so many tokens does not fill.
pub fn expect_window(ctx: usize, tokens: usize) -> anyhow::Result<()> {
    anyhow::ensure!(tokens >= 2, "the text has {tokens} tokens, expected at least 2");
    anyhow::ensure!((2..=tokens).contains(&ctx), "--ctx {ctx}: expected 2 to {tokens}, the tokens of the text");
    Ok(())
}

/// An error that is a wrong kernel rather than bad input: exit status 1.
#[derive(Debug)]
pub struct Wrong(pub String);

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Wrong {}
