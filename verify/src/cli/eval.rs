//! `qwen3next eval`: the whole harness into a folder. Every part is a process of its own, whose result is kept: a run that
//! was cut off goes on where it was, and a part runs again only where what it reads has changed.

use super::bench_matrix::{self, Peer};
use super::model::{self, Device, Offload, OnDevice};
use super::run_model::numbers;
use super::{child, fit, regress};
use crate::Done;
use anyhow::{ensure, Context};
use qwen3next_verify::report::Machine;
use serde_json::{json, Value};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Instant, UNIX_EPOCH};

#[derive(clap::Args)]
pub struct Args {
    /// Folder for SUMMARY.md, results.json and plots; made where there is none.
    out: PathBuf,
    /// GGUF file or Hugging Face folder; by default the embedded model, and for `fit` the shapes of the 80B-A3B.
    #[arg(short, long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Text for the fused modes; by default, with the embedded model, the text it was not trained on. With --model and
    /// without a text the fused modes run on the embedded model.
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// Another build in the matrix: NAME=COMMAND, as for `bench matrix`. Repeatable.
    #[arg(long, value_name = "NAME=COMMAND")]
    peer: Vec<String>,
    /// Flags of `bench model` for this build in the matrix. Repeatable: a row each.
    #[arg(long, value_name = "FLAGS", allow_hyphen_values = true)]
    ours: Vec<String>,
    /// Tokens of a prompt in the matrix: a list.
    #[arg(short = 'p', long, value_name = "LIST", default_value = "512")]
    n_prompt: String,
    /// Tokens generated in the matrix: a list.
    #[arg(short = 'n', long, value_name = "LIST", default_value = "128")]
    n_gen: String,
    /// Threads; by default one a core.
    #[arg(short, long, value_parser = model::threads)]
    threads: Option<usize>,
    /// Tokens of the sequence that must fit.
    #[arg(short, long, default_value_t = 65_536, value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    ctx: u64,
    /// Memory of the GPU that it must fit, in GiB.
    #[arg(long, value_name = "GIB", default_value_t = 16.0)]
    vram: f64,
    /// Also, on the GPU: every kernel's checks, the fused modes, the model's speed; SKIPPED with the reason where there is
    /// none. On the executor, which is slow: fewer cases, few tokens, no speed.
    #[arg(long)]
    with_gpu: bool,
    /// Layers on the GPU (-ngl), the last ones first; -1, or more than there are: all, and the output matrix.
    #[arg(long, value_name = "N", default_value = "-1", allow_negative_numbers = true, requires = "with_gpu",
        value_parser = some_layers)]
    gpu_layers: i64,
    /// The experts of the first N layers stay on the CPU (-ncmoe).
    #[arg(long, value_name = "N", default_value_t = 0, requires = "with_gpu")]
    n_cpu_moe: usize,
    /// What a GPU is: the first CUDA device, or the host executor.
    #[arg(long, value_enum, default_value = "cuda", requires = "with_gpu")]
    device: Device,
    /// The fused modes on the whole text, not on its first windows alone.
    #[arg(long)]
    with_fused_regression: bool,
    /// A look in a minute: every fifth case of the verification, two windows of text, one turn of the matrix.
    #[arg(long)]
    quick: bool,
    /// Run every part again.
    #[arg(long)]
    fresh: bool,
}

/// A part of the harness.
struct Part {
    name: &'static str,
    /// The command line, without this program's name.
    line: Vec<String>,
    /// What else it reads: a change makes its result stale.
    inputs: Vec<PathBuf>,
    /// The device that it runs on, or why it cannot; `None`: the CPU alone.
    device: Option<Result<String, String>>,
}

fn some_layers(text: &str) -> Result<i64, String> {
    match text.parse() {
        Ok(n) if n != 0 => Ok(n),
        _ => Err("expected a whole number from 1 on, or -1 for all".into()),
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_string).collect()
}

impl Args {
    fn parts(&self) -> anyhow::Result<Vec<Part>> {
        let this = std::env::current_exe().context("the path of this command")?;
        let of_model = |line: &mut Vec<String>, inputs: &mut Vec<PathBuf>| {
            if let Some(path) = &self.model {
                line.extend(["-m".to_string(), path.display().to_string()]);
                inputs.push(path.clone());
            }
        };
        let threads: Vec<String> = self.threads.iter().flat_map(|t| ["-t".to_string(), t.to_string()]).collect();
        let mut parts = Vec::new();

        let quick = if self.quick { "verify --quick" } else { "verify" };
        parts.push(Part { name: "verify", line: words(quick), inputs: vec![this.clone()], device: None });

        let mut inputs = vec![this.clone()];
        let mut line = words("regress -o json");
        line.extend(threads.clone());
        if let Some(text) = &self.file {
            of_model(&mut line, &mut inputs);
            line.extend(["-f".to_string(), text.display().to_string()]);
            inputs.push(text.clone());
        }
        let mut fused = Part { name: "regress-gpu", line: line.clone(), inputs: inputs.clone(), device: None };
        let windows = match (self.with_fused_regression, self.quick) {
            (true, _) => "",
            (false, true) => "--windows 2",
            (false, false) => "--windows 8",
        };
        line.extend(words(windows));
        parts.push(Part { name: "regress", line, inputs, device: None });

        let mut inputs = vec![this.clone()];
        let mut line = words("bench matrix -o json");
        line.extend(threads.clone());
        line.extend(["-p".into(), self.n_prompt.clone(), "-n".into(), self.n_gen.clone()]);
        if self.quick {
            line.extend(words("--turns 1 -r 1"));
        }
        of_model(&mut line, &mut inputs);
        for text in &self.peer {
            let peer: Peer = text.parse().map_err(|e| anyhow::anyhow!("--peer {text}: {e}"))?;
            line.extend(["--peer".to_string(), text.clone()]);
            inputs.push(peer.program());
        }
        self.ours.iter().for_each(|flags| line.push(format!("--ours={flags}")));
        parts.push(Part { name: "matrix", line, inputs, device: None });

        let mut inputs = vec![this.clone()];
        let mut line = words(&format!("fit -o json -c {} --vram {}", self.ctx, self.vram));
        of_model(&mut line, &mut inputs);
        parts.push(Part { name: "fit", line, inputs, device: None });
        if !self.with_gpu {
            return Ok(parts);
        }

        let on = OnDevice { device: self.device, experts: Default::default() };
        let offload = Offload { gpu_layers: self.gpu_layers, n_cpu_moe: self.n_cpu_moe, on };
        let device = offload.device_name().map_err(|e| format!("{e:#}"));
        let placed = words(&format!("--gpu-layers {} --n-cpu-moe {}", self.gpu_layers, self.n_cpu_moe));
        let (line, few, times) = match self.device {
            Device::Cuda => (format!("{quick} --backend cuda"), windows, device.clone()),
            Device::Executor => {
                let why = "the executor runs on the CPU: its times tell nothing of a GPU";
                // Of so few tokens the perplexity itself means nothing: how far it is from mode 0's does.
                let few = "--device executor -c 32 --windows 1 --max-decode-ppl 1e9 --max-prefill-ppl 1e9";
                ("verify --quick --backend cuda-host".into(), few, Err(why.into()))
            }
        };
        let on = Some(device);
        parts.push(Part { name: "verify-gpu", line: words(&line), inputs: vec![this.clone()], device: on.clone() });

        fused.line.extend(placed.iter().cloned().chain(words(few)));
        parts.push(Part { device: on, ..fused });

        let mut inputs = vec![this];
        let mut line = words("bench model -o json");
        line.extend(threads.into_iter().chain(placed));
        line.extend(["-p".into(), self.n_prompt.clone(), "-n".into(), self.n_gen.clone()]);
        if self.quick {
            line.extend(words("-r 1"));
        }
        of_model(&mut line, &mut inputs);
        parts.push(Part { name: "bench-gpu", line, inputs, device: Some(times) });
        Ok(parts)
    }
}

/// What tells a file's contents from later ones: of a folder, of all files in it.
fn stamp(path: &Path) -> String {
    let of = |path: &Path| {
        let meta = std::fs::metadata(path).ok()?;
        let time = meta.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        Some(format!("{} {} {}", path.display(), meta.len(), time.as_nanos()))
    };
    let mut stamps: Vec<String> = of(path).into_iter().collect();
    if let Ok(entries) = std::fs::read_dir(path) {
        stamps.extend(entries.flatten().filter_map(|e| of(&e.path())));
    }
    stamps.sort();
    stamps.join("\n")
}

impl Part {
    /// Of the command line, the device, and all that it reads.
    fn key(&self) -> String {
        let inputs = self.inputs.iter().map(|p| stamp(p));
        let device = self.device.iter().flatten().cloned();
        let lines: Vec<String> = std::iter::once(self.line.join("\u{1f}")).chain(device).chain(inputs).collect();
        lines.join("\n")
    }

    /// Why it cannot run here.
    fn skipped(&self) -> Option<&str> {
        self.device.as_ref()?.as_ref().err().map(String::as_str)
    }

    /// It reports into a file; the others into their standard output.
    fn has_report(&self) -> bool {
        self.line.first().is_some_and(|w| w == "verify")
    }

    /// The line as one would type it.
    fn command(&self) -> String {
        let shown = self.line.iter().map(|w| if w.contains(' ') { format!("'{w}'") } else { w.clone() });
        format!("qwen3next {}", shown.collect::<Vec<_>>().join(" "))
    }

    /// The record of an earlier run with the same inputs.
    fn kept(&self, file: &Path) -> Option<Value> {
        let record: Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
        (record["key"] == json!(self.key()) && record["status"].as_i64().is_some_and(|s| s < 2)).then_some(record)
    }

    /// Runs it. Status 0: passed or skipped, 1: a check failed, 2 and above, or a signal: it could not run.
    fn run(&self) -> anyhow::Result<Value> {
        if let Some(why) = self.skipped() {
            return Ok(json!({
                "name": self.name, "key": self.key(), "command": self.command(), "status": 0, "skipped": why,
                "error": null, "seconds": 0.0, "result": null,
            }));
        }
        let begin = Instant::now();
        let this = std::env::current_exe().context("the path of this command")?;
        let mut command = Command::new(this);
        command.args(&self.line);
        // The verification prints a table: its report is a file.
        let report = tempfile::NamedTempFile::new().context("a temporary file for a report")?;
        if self.has_report() {
            command.arg("--json").arg(report.path());
        }
        let ended = child::run(&mut command, true)?;
        let text = if self.has_report() {
            std::fs::read_to_string(report.path()).context("the verification's report")?
        } else {
            ended.stdout.clone()
        };
        let (mut status, result) = match (ended.status.code(), serde_json::from_str::<Value>(&text)) {
            (Some(code), Ok(result)) => (i64::from(code), result),
            (code, Err(_)) => (code.map_or(128, |c| i64::from(c.max(2))), Value::Null),
            (None, Ok(result)) => (128, result),
        };
        if result.is_null() {
            status = status.max(2);
        }
        Ok(json!({
            "name": self.name, "key": self.key(), "command": self.command(), "status": status,
            "error": (status > 1).then(|| ended.last_words()), "seconds": begin.elapsed().as_secs_f64(), "result": result,
        }))
    }
}

fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    super::Output::create(path)?.finish(bytes)
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    ensure!(args.model.is_some() || args.peer.is_empty(), "--peer: expected -m with a file that all builds read");
    // What a part would refuse after hours is refused now.
    ensure!((0.0..=1e6).contains(&args.vram), "--vram {}: expected GiB from 0 to a million", args.vram);
    let mut tokens = numbers("-p", std::slice::from_ref(&args.n_prompt), &[], 0, 1 << 24)?;
    tokens.extend(numbers("-n", std::slice::from_ref(&args.n_gen), &[], 0, 1 << 24)?);
    ensure!(tokens.iter().any(|&n| n > 0), "-p 0 -n 0: nothing to measure");
    if let Some(path) = &args.file {
        ensure!(!super::read_text(path)?.trim().is_empty(), "{}: holds no text", path.display());
    }
    if let Some(path) = &args.model {
        qwen3next_model::load(path, Default::default(), &mut |_| ())?;
    }
    let parts = args.parts()?;
    let folder = args.out.join("parts");
    std::fs::create_dir_all(&folder).with_context(|| format!("{}: cannot make this folder", folder.display()))?;
    let mut records: Vec<Value> = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        let file = folder.join(format!("{}.json", part.name));
        let kept = part.kept(&file).filter(|_| !args.fresh && part.skipped().is_none());
        let note = match (&kept, part.skipped()) {
            (Some(_), _) => " (kept)".to_string(),
            (None, Some(why)) => format!(" (SKIPPED: {why})"),
            (None, None) => String::new(),
        };
        eprintln!("{} of {}: {}{note}", i + 1, parts.len(), part.command());
        let record = match kept {
            Some(record) => record,
            None => {
                let record = part.run()?;
                // Where a device is away, what it did before is kept for its return.
                if part.skipped().is_none() {
                    write(&file, serde_json::to_string_pretty(&record)?.as_bytes())?;
                }
                record
            }
        };
        records.push(record);
        // After every part: an interrupt in a later one leaves a summary of what is done.
        report(&args.out, &parts, &records)?;
    }
    writeln!(std::io::stdout(), "{}", args.out.join("SUMMARY.md").display())?;
    Ok(if records.iter().all(|r| r["status"] == json!(0)) { Done::Ok } else { Done::Failed })
}

/// Writes SUMMARY.md, results.json and the plots of what is there so far.
fn report(out: &Path, parts: &[Part], records: &[Value]) -> anyhow::Result<()> {
    let machine = Machine::here();
    let of = |name: &str| records.iter().find(|r| r["name"] == json!(name)).filter(|r| !r["result"].is_null());
    let mut text = format!(
        "# qwen3next {}\n\n{}, {} threads, {}; {}. {}\n\n| part | verdict | s | command |\n| --- | --- | ---: | --- |\n",
        env!("CARGO_PKG_VERSION"),
        machine.cpu,
        machine.threads,
        machine.isas.join(" "),
        machine.os,
        machine.date
    );
    // A String takes all that is written to it.
    for part in parts {
        let record = records.iter().find(|r| r["name"] == json!(part.name));
        let (verdict, seconds) = match record {
            None => ("not run yet".to_string(), String::new()),
            Some(r) => {
                let verdict = match (r["status"].as_i64(), r["skipped"].as_str()) {
                    (_, Some(why)) => format!("SKIPPED: {why}"),
                    (Some(0), _) => "passed".to_string(),
                    (Some(1), _) => "FAILED".to_string(),
                    _ => format!("could not run: {}", r["error"].as_str().unwrap_or_default()),
                };
                (verdict, format!("{:.1}", r["seconds"].as_f64().unwrap_or(0.0)))
            }
        };
        let _ = writeln!(text, "| {} | {verdict} | {seconds} | `{}` |", part.name, part.command());
    }
    if let Some(record) = of("verify") {
        text += &format!("\n## Verification\n\n{}", verification(&record["result"]));
    }
    if let Some(record) = of("regress") {
        text += &format!("\n## Fused modes\n\n{}", regress::markdown(&record["result"]));
    }
    if let Some(record) = of("matrix") {
        let result = &record["result"];
        write(&out.join("matrix.svg"), bench_matrix::draw(result)?.as_bytes())?;
        text += &format!("\n## Builds\n\n{}\n![speeds](matrix.svg)\n", bench_matrix::markdown(result));
    }
    if let Some(record) = of("fit") {
        let result = &record["result"];
        write(&out.join("fit.svg"), fit::draw(result)?.as_bytes())?;
        text += &format!("\n## Memory\n\n{}\n![memory](fit.svg)\n", fit::markdown(result));
    }
    let device = parts.iter().find_map(|p| p.device.as_ref());
    let (line, gpu) = match device {
        None => ("Not run: --with-gpu does.".into(), Value::Null),
        Some(Ok(name)) => (format!("Device: {name}."), json!({ "device": name })),
        Some(Err(why)) => (format!("Device: SKIPPED: {why}."), json!({ "skipped": why })),
    };
    text += &format!("\n## On a device\n\n{line}\n");
    if let Some(record) = of("verify-gpu") {
        text += &format!("\n{}", verification(&record["result"]));
    }
    if let Some(record) = of("regress-gpu") {
        text += &format!("\n{}", regress::markdown(&record["result"]));
    }
    if let Some(record) = of("bench-gpu") {
        text += &format!("\n{}", speeds(&record["result"]));
    }
    let machine = json!({ "cpu": machine.cpu, "os": machine.os, "isas": machine.isas, "threads": machine.threads });
    let document = json!({ "version": env!("CARGO_PKG_VERSION"), "machine": machine, "gpu": gpu, "parts": records });
    write(&out.join("results.json"), serde_json::to_string_pretty(&document)?.as_bytes())?;
    write(&out.join("SUMMARY.md"), text.as_bytes())
}

/// A line a test of `bench model`.
fn speeds(result: &Value) -> String {
    let mut out = String::from("| model | -ngl | test | t/s |\n| --- | ---: | ---: | ---: |\n");
    for row in result.as_array().into_iter().flatten() {
        let name = match (row["n_prompt"].as_u64(), row["n_gen"].as_u64()) {
            (Some(p), Some(0)) => format!("pp{p}"),
            (_, n) => format!("tg{}", n.unwrap_or(0)),
        };
        let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
        let _ = writeln!(
            out,
            "| {} | {} | {name} | {:.1} ± {:.1} |",
            row["model_type"].as_str().unwrap_or_default(),
            row["n_gpu_layers"],
            number("avg_ts"),
            number("stddev_ts")
        );
    }
    out
}

/// Totals, then every failure with the command that repeats it.
fn verification(result: &Value) -> String {
    let totals = &result["totals"];
    let mut out = format!(
        "{} checks passed, {} failed, {} skipped, over {} cases.\n",
        totals["passed"], totals["failed"], totals["skipped"], totals["cases"]
    );
    for row in result["results"].as_array().into_iter().flatten().filter(|r| r["verdict"] == json!("failed")) {
        let text = |key: &str| row[key].as_str().unwrap_or_default();
        let _ = writeln!(
            out,
            "- {} {} {}: {} (`{}`)",
            text("op"),
            text("variant"),
            text("check"),
            text("text"),
            text("reproduce")
        );
    }
    out
}
