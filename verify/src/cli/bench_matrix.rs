//! `qwen3next bench matrix`: builds side by side, this one and others that have llama-bench's flags and JSON, in turns, a
//! process each.

use super::child;
use super::plot::{bars, Bars};
use super::run_model::numbers;
use crate::Done;
use anyhow::{bail, ensure, Context};
use qwen3next_verify::llama_bench;
use qwen3next_verify::report::Machine;
use serde_json::{json, Map, Value};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::str::FromStr;

#[derive(clap::Args)]
pub struct Args {
    /// GGUF file that all builds read; by default, without peers, the embedded model.
    #[arg(short, long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Another build: its name and a command that has llama-bench's flags and JSON, such as
    /// `theirs=/path/llama-bench -mmp 0`. Repeatable.
    #[arg(long, value_name = "NAME=COMMAND")]
    peer: Vec<Peer>,
    /// Flags of `bench model` for this build, such as `-rtr 1`. Repeatable: a row each.
    #[arg(long, value_name = "FLAGS", allow_hyphen_values = true)]
    ours: Vec<String>,
    /// Tokens of a prompt: a list; 0: none.
    #[arg(short = 'p', long, value_name = "LIST", default_value = "512")]
    n_prompt: String,
    /// Tokens generated: a list; 0: none.
    #[arg(short = 'n', long, value_name = "LIST", default_value = "128")]
    n_gen: String,
    /// Tokens handed to the model in one call.
    #[arg(short, long, default_value_t = 2048, value_parser = super::model::at_least_one)]
    batch: usize,
    /// Tokens that go through the layers together (-ub).
    #[arg(long, default_value_t = 512, value_parser = super::model::at_least_one)]
    ubatch: usize,
    /// Threads; by default one a core.
    #[arg(short, long, value_parser = super::model::threads)]
    threads: Option<usize>,
    /// Type of cached keys and values (-ctk).
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = ["f32", "f16", "bf16", "q8_0"])]
    cache_type_k: String,
    /// Repetitions in a turn.
    #[arg(short, long, default_value_t = 2, value_parser = super::model::at_least_one)]
    repetitions: usize,
    /// Turns of all builds.
    #[arg(long, default_value_t = 3, value_parser = super::model::at_least_one)]
    turns: usize,
    /// Also draw the speeds.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Format of the result.
    #[arg(short, long, default_value = "md", value_parser = ["md", "json"])]
    output: String,
}

/// Another build.
#[derive(Debug, Clone, PartialEq)]
pub struct Peer {
    name: String,
    /// Program and its flags.
    command: Vec<String>,
}

impl FromStr for Peer {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || "expected NAME=COMMAND such as `theirs=/path/llama-bench -mmp 0`".to_string();
        let (name, command) = text.split_once('=').ok_or_else(refused)?;
        let command: Vec<String> = command.split_whitespace().map(str::to_string).collect();
        if name.trim().is_empty() || command.is_empty() {
            return Err(refused());
        }
        Ok(Peer { name: name.trim().into(), command })
    }
}

impl Peer {
    /// The program, to see whether it has changed.
    pub fn program(&self) -> PathBuf {
        PathBuf::from(&self.command[0])
    }
}

/// A build and what it did.
struct Build {
    name: String,
    command: Vec<String>,
    /// Samples by test.
    samples: Vec<Vec<f64>>,
    version: String,
    backend: String,
    failed: bool,
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    ensure!(args.model.is_some() || args.peer.is_empty(), "--peer: expected -m with a file that all builds read");
    let most = 1 << 24;
    let prompts = numbers("-p", std::slice::from_ref(&args.n_prompt), &[], 0, most)?;
    let gens = numbers("-n", std::slice::from_ref(&args.n_gen), &[], 0, most)?;
    let tests: Vec<(usize, usize)> =
        prompts.into_iter().map(|p| (p, 0)).chain(gens.into_iter().map(|n| (0, n))).filter(|&t| t != (0, 0)).collect();
    ensure!(!tests.is_empty(), "-p 0 -n 0: nothing to measure");
    if let Some(path) = &args.model {
        std::fs::metadata(path).with_context(|| format!("{}", path.display()))?;
    }
    let plot = args.plot.as_deref().map(super::Output::create).transpose()?;
    let threads = args.threads.unwrap_or_else(rayon::current_num_threads);
    let mut builds = builds(&args, tests.len())?;
    let flags = flags(&args, &tests, threads);
    super::bench::warn_of_others();
    let mut notes = Vec::new();
    let bar = super::progress((args.turns * builds.len()) as u64, "matrix {wide_bar} {pos}/{len} {msg} {eta}");
    for _ in 0..args.turns {
        for build in &mut builds {
            bar.set_message(build.name.clone());
            if !build.failed {
                if let Err(why) = turn(build, &flags, &tests, &args, threads, &mut notes) {
                    build.failed = true;
                    notes.push(format!("{}: {why:#}", build.name));
                }
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let document = document(&args, &tests, threads, &builds, &notes);
    if let Some(file) = plot {
        file.finish(draw(&document)?.as_bytes())?;
    }
    let mut out = std::io::stdout().lock();
    if args.output == "json" {
        writeln!(out, "{}", serde_json::to_string_pretty(&document)?)?;
    } else {
        write!(out, "{}", markdown(&document))?;
    }
    // A peer that cannot run is a note; this build must.
    let ours = builds.iter().zip(0..args.ours.len().max(1)).any(|(b, _)| b.failed);
    Ok(if ours { Done::Failed } else { Done::Ok })
}

fn builds(args: &Args, tests: usize) -> anyhow::Result<Vec<Build>> {
    let this = std::env::current_exe().context("the path of this command")?;
    let this = this.to_str().context("the path of this command is not UTF-8")?.to_string();
    let plain = [String::new()];
    let ours = if args.ours.is_empty() { &plain[..] } else { &args.ours };
    let mut builds: Vec<(String, Vec<String>)> = Vec::new();
    for flags in ours {
        let mut command = vec![this.clone(), "bench".into(), "model".into()];
        command.extend(flags.split_whitespace().map(str::to_string));
        builds.push((format!("qwen3next {}", flags.trim()).trim().into(), command));
    }
    builds.extend(args.peer.iter().map(|p| (p.name.clone(), p.command.clone())));
    for (i, (name, _)) in builds.iter().enumerate() {
        ensure!(builds[..i].iter().all(|(other, _)| other != name), "{name}: two builds of this name");
    }
    let build = |(name, command)| Build {
        name,
        command,
        samples: vec![Vec::new(); tests],
        version: String::new(),
        backend: String::new(),
        failed: false,
    };
    Ok(builds.into_iter().map(build).collect())
}

/// What every build is given.
fn flags(args: &Args, tests: &[(usize, usize)], threads: usize) -> Vec<String> {
    let list = |of: fn(&(usize, usize)) -> usize| {
        let list: Vec<String> = tests.iter().map(of).filter(|&n| n > 0).map(|n| n.to_string()).collect();
        if list.is_empty() {
            "0".to_string()
        } else {
            list.join(",")
        }
    };
    let model = args.model.iter().flat_map(|m| ["-m".to_string(), m.display().to_string()]);
    let pairs = [
        ("-p", list(|t| t.0)),
        ("-n", list(|t| t.1)),
        ("-b", args.batch.to_string()),
        ("-ub", args.ubatch.to_string()),
        ("-t", threads.to_string()),
        ("-ctk", args.cache_type_k.clone()),
        ("-ctv", args.cache_type_k.clone()),
        ("-fa", "1".into()),
        ("-r", args.repetitions.to_string()),
        ("-o", "json".into()),
    ];
    model.chain(pairs.into_iter().flat_map(|(flag, value)| [flag.to_string(), value])).collect()
}

fn turn(
    build: &mut Build,
    flags: &[String],
    tests: &[(usize, usize)],
    args: &Args,
    threads: usize,
    notes: &mut Vec<String>,
) -> anyhow::Result<()> {
    let [program, own @ ..] = &build.command[..] else { bail!("no command") };
    let ended = child::run(Command::new(program).args(own).args(flags), true)?;
    ensure!(ended.status.success(), "{}", ended.last_words());
    let rows = llama_bench::parse(&ended.stdout).map_err(|why| anyhow::anyhow!("{why}: {}", ended.last_words()))?;
    for (test, samples) in tests.iter().zip(&mut build.samples) {
        let row = rows.iter().find(|r| (r.n_prompt, r.n_gen) == (test.0 as u64, test.1 as u64));
        samples.extend(&row.with_context(|| format!("no result of {}", name(test)))?.samples);
    }
    let asked = [
        ("n_batch", json!(args.batch)),
        ("n_ubatch", json!(args.ubatch)),
        ("n_threads", json!(threads)),
        ("type_k", json!(args.cache_type_k)),
        ("type_v", json!(args.cache_type_k)),
    ];
    for row in &rows {
        for (field, want) in &asked {
            let got = &row.fields[*field];
            let note = format!("{}: ran with {field} {got}, asked for {want}: not matched", build.name);
            if !got.is_null() && got != want && !notes.contains(&note) {
                notes.push(note);
            }
        }
        let text = |field: &str| row.fields[field].as_str().unwrap_or_default().to_string();
        build.version = text("build_commit");
        build.backend = text("backends");
    }
    Ok(())
}

/// `pp512`, `tg128`.
fn name(test: &(usize, usize)) -> String {
    if test.0 > 0 {
        format!("pp{}", test.0)
    } else {
        format!("tg{}", test.1)
    }
}

fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    (n > 0).then(|| (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0)
}

fn document(args: &Args, tests: &[(usize, usize)], threads: usize, builds: &[Build], notes: &[String]) -> Value {
    let machine = Machine::here();
    let rows: Vec<Value> = builds
        .iter()
        .map(|build| {
            let mut of: Map<String, Value> = Map::new();
            for (i, test) in tests.iter().enumerate() {
                let (speed, first) = (median(&build.samples[i]), median(&builds[0].samples[i]));
                let relative = speed.zip(first).map(|(speed, first)| speed / first);
                of.insert(
                    name(test),
                    json!({ "median_ts": speed, "relative": relative, "samples_ts": build.samples[i] }),
                );
            }
            // Where a program lies is the machine's own business.
            let program = PathBuf::from(&build.command[0]).file_name().map(|n| n.to_string_lossy().into_owned());
            json!({
                "name": build.name, "version": build.version, "backend": build.backend, "program": program,
                "flags": build.command[1..].join(" "), "failed": build.failed, "tests": of,
            })
        })
        .collect();
    let model = args.model.as_ref().and_then(|m| Some(m.file_name()?.to_string_lossy().into_owned()));
    json!({
        "machine": { "cpu": machine.cpu, "os": machine.os, "isas": machine.isas }, "date": machine.date,
        "model": model.unwrap_or("the embedded model".into()), "n_batch": args.batch, "n_ubatch": args.ubatch,
        "n_threads": threads, "cache_type": args.cache_type_k, "turns": args.turns, "repetitions": args.repetitions,
        "tests": tests.iter().map(name).collect::<Vec<_>>(), "builds": rows, "notes": notes,
    })
}

/// Builds down, tests across; percentages are of the first row.
pub fn markdown(document: &Value) -> String {
    let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_string);
    let tests: Vec<String> = document["tests"].as_array().into_iter().flatten().map(text).collect();
    let mut out = format!(
        "{}; {} threads of {}; -b {} -ub {}, {} cache; builds in turns, medians of {} × {}\n\n| build | backend |",
        text(&document["model"]),
        document["n_threads"],
        text(&document["machine"]["cpu"]),
        document["n_batch"],
        document["n_ubatch"],
        text(&document["cache_type"]),
        document["turns"],
        document["repetitions"]
    );
    tests.iter().for_each(|t| out += &format!(" {t}, t/s | |"));
    out += "\n| --- | --- |";
    tests.iter().for_each(|_| out += " ---: | ---: |");
    out.push('\n');
    for build in document["builds"].as_array().into_iter().flatten() {
        // A String takes all that is written to it.
        let _ = write!(out, "| {} | {} |", text(&build["name"]), text(&build["backend"]));
        for test in &tests {
            let cell = &build["tests"][test];
            let shown = |key: &str, show: fn(f64) -> String| cell[key].as_f64().map_or("–".into(), show);
            let speed = shown("median_ts", |v| format!("{v:.1}"));
            let _ = write!(out, " {speed} | {} |", shown("relative", |v| format!("{:.0} %", 100.0 * v)));
        }
        out.push('\n');
    }
    let on_cpu = |build: &Value| build["failed"] == json!(true) || build["backend"] == json!("CPU");
    out += if document["builds"].as_array().into_iter().flatten().all(on_cpu) { "\nThe CPU alone.\n" } else { "\n" };
    document["notes"].as_array().into_iter().flatten().for_each(|n| out += &format!("- {}\n", text(n)));
    out
}

/// Bars of every build, test by test.
pub fn draw(document: &Value) -> anyhow::Result<String> {
    let list = |v: &Value| v.as_array().cloned().unwrap_or_default();
    let text = |v: &Value| v.as_str().unwrap_or_default().to_string();
    let builds = list(&document["builds"]);
    let groups = list(&document["tests"])
        .iter()
        .map(|test| {
            let speed = |b: &Value| b["tests"][text(test)]["median_ts"].as_f64().unwrap_or(0.0);
            Bars { name: text(test), values: builds.iter().map(speed).collect() }
        })
        .collect::<Vec<_>>();
    let names: Vec<String> = builds.iter().map(|b| text(&b["name"])).collect();
    bars(&text(&document["model"]), "tokens / s", &names, &groups)
}
