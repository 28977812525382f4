//! `qwen3next` without arguments: what works here, in under a minute.

use crate::cli::verify;
use crate::Done;
use qwen3next_verify::cases;
use qwen3next_verify::suite::Options;

pub fn run() -> anyhow::Result<Done> {
    let rows = verify::verify(&cases::all(), &Options::quick())?;
    verify::print(&rows, &mut std::io::stdout().lock())?;
    Ok(Done::Ok)
}
