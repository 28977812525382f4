//! `qwen3next` without arguments: what works here, in under a minute.

use crate::cli::{bench_op, generate, model, verify};
use crate::Done;
use clap::Parser;
use qwen3next_kernels::Isa;
use qwen3next_model::generate::{Sampler, Sampling};
use qwen3next_verify::cases;
use qwen3next_verify::suite::{Options, Verdict};
use std::io::{stdout, Write};

/// The model options of a command line without any.
#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    model: model::Args,
}

pub fn run() -> anyhow::Result<Done> {
    let begin = std::time::Instant::now();
    let isas: Vec<&str> = Isa::all().filter(|isa| isa.available()).map(Isa::name).collect();
    writeln!(
        stdout(),
        "1. Every kernel against float64 references and properties (quick grid; this CPU: {})\n",
        isas.join(" ")
    )?;
    let rows = verify::verify(&cases::all(), &Options::quick())?;
    verify::print(&rows, &mut stdout().lock())?;

    writeln!(stdout(), "\n2. The delta rule's variants: 16 key and 32 value heads of 128 channels, one thread\n")?;
    bench_op::table(&bench_op::delta_rule(&[1, 64, 256], 9)?, &mut stdout().lock())?;

    writeln!(stdout(), "\n3. The whole forward pass: a small Qwen3-Next, trained on the King James Bible\n")?;
    let options = Defaults::parse_from(["tour"]).model;
    let loaded = options.load()?;
    let prompt = "In the beginning";
    write!(stdout(), "{prompt}")?;
    let sampler = Sampler::new(Sampling { seed: 7, temperature: 0.7, ..Sampling::default() })?;
    let written = generate::speak(&loaded, &options, prompt, 160, sampler, |text| {
        write!(stdout(), "{text}")?;
        Ok(stdout().flush()?)
    })?;
    let speed = written.answer.saturating_sub(1) as f64 / written.answer_seconds.max(1e-9);
    writeln!(
        stdout(),
        "\n\n{} tokens at {speed:.0} a second; {:.0} s in all",
        written.answer,
        begin.elapsed().as_secs_f64()
    )?;
    writeln!(stdout(), "Next: qwen3next --help; README.md has the map and the six steps to add a kernel.")?;
    Ok(if rows.iter().any(|r| matches!(r.verdict, Verdict::Failed { .. })) { Done::Failed } else { Done::Ok })
}
