//! `qwen3next bench peaks`: the roofs of this machine.

use crate::Done;
use qwen3next_verify::peaks::{buffer_bytes, Peaks, Unit};
use qwen3next_verify::report::Machine;
use serde_json::json;
use std::io::Write;

#[derive(clap::Args)]
pub struct Args {
    /// Threads of the second column; by default one a core.
    #[arg(short, long, value_parser = super::model::threads)]
    threads: Option<usize>,
    /// Format of the result.
    #[arg(short, long, default_value = "md", value_parser = ["md", "json", "csv"])]
    output: String,
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    super::bench::warn_of_others();
    let machine = Machine::here();
    let threads = args.threads.unwrap_or(machine.threads);
    let peaks = Peaks::new();
    let rows: Vec<_> = Unit::ALL
        .into_iter()
        .filter_map(|unit| Some((unit, peaks.kernel(unit)?, peaks.rate(unit, 1)?, peaks.rate(unit, threads)?)))
        .collect();
    let mut out = std::io::stdout().lock();
    match args.output.as_str() {
        "json" => {
            let peaks: Vec<_> = rows
                .iter()
                .map(|(unit, kernel, one, all)| {
                    json!({"peak": unit.name(), "kernel": kernel, "one_thread": one, "all_threads": all,
                        "unit": if *unit == Unit::Read { "bytes/s" } else { "ops/s" }})
                })
                .collect();
            let document = json!({
                "cpu": machine.cpu, "isas": machine.isas, "date": machine.date, "threads": threads,
                "read_bytes": buffer_bytes(), "peaks": peaks,
            });
            writeln!(out, "{}", serde_json::to_string_pretty(&document)?)?;
        }
        "csv" => {
            writeln!(out, "peak,kernel,threads,one_thread,all_threads")?;
            for (unit, kernel, one, all) in rows {
                writeln!(out, "{},{kernel},{threads},{one:e},{all:e}", unit.name())?;
            }
        }
        _ => {
            writeln!(out, "{}, {threads} threads\n", machine.cpu)?;
            let all = format!("{threads} threads");
            writeln!(out, "| {:<5} | {:<16} | {:>10} | {all:>10} | unit     |", "peak", "kernel", "one thread")?;
            writeln!(out, "| {:-<5} | {:-<16} | {:->9}: | {:->9}: | -------- |", "", "", "", "")?;
            for (unit, kernel, one, all) in rows {
                let of = if unit == Unit::Read { "GB/s" } else { "GOP/s" };
                writeln!(
                    out,
                    "| {:<5} | {kernel:<16} | {:>10.1} | {:>10.1} | {of:<8} |",
                    unit.name(),
                    one / 1e9,
                    all / 1e9
                )?;
            }
        }
    }
    Ok(Done::Ok)
}
