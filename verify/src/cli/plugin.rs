//! Kernels from shared libraries run in a child process, so that one that crashes or hangs becomes a line of the
//! report.
//!
//! The child is this command with `--child FILE`. Into the file it writes a JSON line before every case, and one with
//! the outcome at the end; the last line tells how far a dead child came.

use anyhow::{bail, Context};
use qwen3next_kernels::Isa;
use qwen3next_verify::compare::Metrics;
use qwen3next_verify::plugin::Plugin;
use qwen3next_verify::suite::{Distribution, Entry, Options, Row, Verdict};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A line of the child's file.
#[derive(Debug, Serialize, Deserialize)]
enum Line {
    /// About to do what this command repeats.
    At { variant: String, isa: String, command: String },
    /// The rows of one check.
    Rows(Vec<Sent>),
    /// Bad input: one line.
    Refused(String),
}

/// A [`Row`], less what the parent knows.
#[derive(Debug, Serialize, Deserialize)]
struct Sent {
    variant: String,
    isa: String,
    passed: usize,
    not_taken: BTreeMap<String, usize>,
    metrics: Metrics,
    distribution: Distribution,
    verdict: Verdict,
}

static FILE: OnceLock<File> = OnceLock::new();

fn write(line: &Line) {
    if let Some(mut file) = FILE.get() {
        let text = serde_json::to_string(line).expect("strings and numbers") + "\n";
        // One call a line, unbuffered: what is written outlives this process.
        if let Err(e) = file.write_all(text.as_bytes()) {
            eprintln!("error: the report of the child process: {e}");
            std::process::exit(2);
        }
    }
}

/// In the child: notes what comes next. Elsewhere: nothing.
pub fn announce(variant: &str, isa: Isa, command: &str) {
    write(&Line::At { variant: variant.into(), isa: isa.name().into(), command: command.into() });
}

/// Makes this process the child that reports into `path`.
pub fn become_child(path: &Path) -> anyhow::Result<()> {
    let file = File::options().append(true).open(path).with_context(|| format!("--child {}", path.display()))?;
    FILE.set(file).map_err(|_| anyhow::anyhow!("--child {}: twice", path.display()))
}

/// In the child: runs one check on one library's variant and reports.
pub fn verify_here(entry: &Entry, options: &Options, plugin: &Plugin) {
    let options = Options { announce: Some(announce), ..options.clone() };
    // SAFETY: whoever names a library on the command line wants it run. What it is, is theirs to know; this process is
    // there to die of it.
    write(&match unsafe { entry.run_plugin(&options, plugin) } {
        Err(why) => Line::Refused(why),
        Ok(rows) => Line::Rows(
            rows.into_iter()
                .map(|r| Sent {
                    variant: r.variant.into(),
                    isa: r.isa.name().into(),
                    passed: r.passed,
                    not_taken: r.not_taken,
                    metrics: r.metrics,
                    distribution: r.distribution,
                    verdict: r.verdict,
                })
                .collect(),
        ),
    });
}

/// How a child ended.
enum End {
    Exited(ExitStatus),
    /// Wrote nothing for so long that it was stopped.
    Stuck(Duration),
}

impl End {
    fn describe(&self) -> String {
        match self {
            End::Stuck(limit) => format!("did not return within {} s and was stopped", limit.as_secs()),
            End::Exited(status) => {
                #[cfg(unix)]
                if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(status) {
                    let names = [
                        (4, "SIGILL"),
                        (5, "SIGTRAP"),
                        (6, "SIGABRT"),
                        (if cfg!(target_os = "linux") { 7 } else { 10 }, "SIGBUS"),
                        (8, "SIGFPE"),
                        (9, "SIGKILL"),
                        (11, "SIGSEGV"),
                    ];
                    let name = names.iter().find(|(n, _)| *n == signal).map_or("", |(_, name)| name);
                    return format!("took the process down: {name} (signal {signal})");
                }
                format!("took the process down: {status}")
            }
        }
    }
}

/// Runs this command with `args` in a child; returns its end and its report, but for a half-written last line.
fn child(args: &[OsString], stdout: Stdio, limit: Option<Duration>) -> anyhow::Result<(End, Vec<Line>)> {
    let report = tempfile::NamedTempFile::new().context("a temporary file for the child's report")?;
    let mut process = Command::new(std::env::current_exe().context("the path of this command")?)
        .args(args)
        .arg("--child")
        .arg(report.path())
        .stdin(Stdio::null())
        .stdout(stdout)
        .spawn()
        .context("cannot start the child process")?;
    let (mut length, mut since) = (0, Instant::now());
    let end = loop {
        if let Some(status) = process.try_wait()? {
            break End::Exited(status);
        }
        let now = report.as_file().metadata()?.len();
        if now != length {
            (length, since) = (now, Instant::now());
        }
        if let Some(limit) = limit.filter(|&limit| since.elapsed() > limit) {
            process.kill()?;
            process.wait()?;
            break End::Stuck(limit);
        }
        std::thread::sleep(Duration::from_millis(3));
    };
    let text = std::fs::read_to_string(report.path()).context("the child's report")?;
    Ok((end, text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()))
}

/// Verifies variants from shared libraries, every check in a process of its own.
pub fn verify(entry: &Entry, options: &Options, plugins: &[Plugin], limit: Duration) -> anyhow::Result<Vec<Row>> {
    let checks = entry.checks();
    for plugin in plugins {
        plugin.kind().map_err(anyhow::Error::msg)?;
    }
    if let Some(check) = options.check.as_deref().filter(|c| !checks.contains(c)) {
        bail!("--check {check}: {} has no such check, it has {}", entry.op, checks.join(", "));
    }
    let chosen: Vec<&'static str> =
        checks.into_iter().filter(|c| options.check.as_deref().is_none_or(|wanted| wanted == *c)).collect();
    let bar = super::progress((plugins.len() * chosen.len()) as u64, "{prefix} {wide_bar} {pos}/{len} {msg}");
    bar.set_prefix("verify");
    let mut rows = Vec::new();
    for plugin in plugins {
        for check in &chosen {
            bar.set_message(format!("{plugin} {check}"));
            let (end, lines) =
                child(&arguments(entry.op, options, plugin, check), Stdio::from(std::io::stderr()), Some(limit))?;
            let at = lines.iter().rev().find_map(|line| match line {
                Line::At { variant, isa, command } => Some((variant, isa, command)),
                _ => None,
            });
            let row = |variant: &str, isa: &str, verdict: Verdict| Row {
                op: entry.op,
                variant: variant.to_string().leak(),
                isa: Isa::from_name(isa).unwrap_or(Isa::SCALAR),
                check,
                passed: 0,
                not_taken: BTreeMap::new(),
                metrics: Metrics::default(),
                distribution: Distribution::default(),
                verdict,
            };
            match (lines.last(), at) {
                (Some(Line::Refused(why)), _) => bail!("{why}"),
                (Some(Line::Rows(sent)), _) => rows.extend(sent.iter().map(|s| Row {
                    passed: s.passed,
                    not_taken: s.not_taken.clone(),
                    metrics: s.metrics,
                    distribution: s.distribution.clone(),
                    ..row(&s.variant, &s.isa, s.verdict.clone())
                })),
                (_, Some((variant, isa, command))) => {
                    let verdict = Verdict::Failed { failure: end.describe(), reproduce: command.clone() };
                    rows.push(row(variant, isa, verdict));
                }
                (_, None) => {
                    let failure = format!("before the first case: {}", end.describe());
                    let reproduce = format!("qwen3next verify --op {} --plugin {plugin} --check {check}", entry.op);
                    rows.push(row(&plugin.symbol, Isa::SCALAR.name(), Verdict::Failed { failure, reproduce }));
                    break;
                }
            }
        }
    }
    bar.finish_and_clear();
    Ok(rows)
}

fn arguments(op: &str, options: &Options, plugin: &Plugin, check: &str) -> Vec<OsString> {
    let mut args: Vec<String> = ["verify", "--op", op, "--check", check].map(Into::into).to_vec();
    let isa = options.isa.map(|isa| isa.name().to_string());
    for (flag, value) in [
        ("--plugin", Some(plugin.to_string())),
        ("--seed", Some(options.seed.to_string())),
        ("--cases", (options.stride <= 1).then(|| options.random.to_string())),
        ("--variant", options.variant.clone()),
        ("--case", options.case.clone()),
        ("--isa", isa),
    ] {
        args.extend(value.into_iter().flat_map(|value| [flag.to_string(), value]));
    }
    if options.stride > 1 {
        args.push("--quick".into());
    }
    args.into_iter().map(Into::into).collect()
}

/// Runs this whole command again in a child; `Err` is a [`super::Wrong`] where a kernel took it down.
pub fn again() -> anyhow::Result<crate::Done> {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let (end, lines) = child(&args, Stdio::inherit(), None)?;
    match end {
        End::Exited(status) if status.code() == Some(0) => Ok(crate::Done::Ok),
        End::Exited(status) if status.code() == Some(1) => Ok(crate::Done::Failed),
        // It said why.
        End::Exited(status) if status.code() == Some(2) => std::process::exit(2),
        end => match lines.last() {
            Some(Line::At { variant, command, .. }) => {
                Err(super::Wrong(format!("{variant} {} {command}", end.describe())).into())
            }
            _ => Err(super::Wrong(format!("a plug-in {}", end.describe())).into()),
        },
    }
}
