//! `qwen3next bench`: what this machine can do, what operators and the model make of it.

use super::{bench_matrix, bench_model, bench_op, bench_peaks};
use crate::Done;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Time the variants of one operator, verified first, against this machine's peaks.
    Op(bench_op::Args),
    /// Time prompt and generation of a model, with llama-bench's flags and output.
    Model(bench_model::Args),
    /// Builds side by side: this one and others that have llama-bench's flags, in turns.
    Matrix(bench_matrix::Args),
    /// Measure this machine's peaks: memory read, f32, bf16 and int8 arithmetic.
    Peaks(bench_peaks::Args),
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    match args.what {
        What::Op(args) => bench_op::run(args),
        What::Model(args) => bench_model::run(args),
        What::Matrix(args) => bench_matrix::run(args),
        What::Peaks(args) => bench_peaks::run(args),
    }
}

/// Says on stderr where other work may make every figure too low.
pub fn warn_of_others() {
    if let Some(load) = qwen3next_verify::peaks::load().filter(|&load| load > 0.5) {
        eprintln!("note: load {load:.1} in the last minute; where other work goes on, figures come out too low");
    }
}
