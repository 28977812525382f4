//! One file a subcommand.

pub mod bench;
pub mod drift;
pub mod generate;
pub mod inspect;
pub mod logits;
pub mod model;
pub mod npy;
pub mod perplexity;
pub mod plugin;
pub mod spelling;
pub mod synth;
pub mod tour;
pub mod verify;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::Write;
use std::path::Path;

/// A progress bar on stderr (hidden where stderr is no terminal).
pub fn progress(len: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(len), ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template(template).expect("a fixed template"));
    bar
}

/// Writes a file so that it is there whole or not at all.
pub fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let fail = || format!("{}: cannot write", path.display());
    let mut builder = tempfile::Builder::new();
    // As any new file, under the umask; a temporary file is its owner's alone.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).with_context(fail)?;
    file.write_all(bytes).with_context(fail)?;
    file.persist(path).with_context(fail)?;
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
