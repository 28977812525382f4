//! `qwen3next synth`: a model of the real layer shapes with random weights, to measure without the weights.

use crate::Done;
use anyhow::bail;
use qwen3next_kernels::DType;
use qwen3next_model::synth::{synth, Synth};
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// GGUF file to write.
    out: PathBuf,
    /// Layers; every fourth is full attention.
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Type of the large weights.
    #[arg(long, default_value = "q4_k")]
    quant: String,
    /// A few MB instead of the 80B-A3B's shapes.
    #[arg(long)]
    tiny: bool,
    /// Write ssm_in in place of attn_qkv and attn_gate.
    #[arg(long)]
    legacy: bool,
    /// Equal seeds give equal files.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    let Some(quant) = DType::from_name(&args.quant) else {
        bail!("--quant {}: expected one of {}", args.quant, DType::ALL.map(DType::name).join(", "));
    };
    let what = Synth { layers: args.layers, quant, tiny: args.tiny, legacy: args.legacy, seed: args.seed };
    let bar = super::progress(0, "synth {wide_bar} {pos}/{len} tensors {eta}");
    synth(&args.out, &what, &mut |progress| {
        bar.set_length(progress.total as u64);
        bar.set_position(progress.done as u64);
    })?;
    bar.finish_and_clear();
    writeln!(std::io::stdout(), "{}", args.out.display())?;
    Ok(Done::Ok)
}
