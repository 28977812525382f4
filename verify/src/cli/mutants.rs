//! `qwen3next verify --mutants`: which check notices which known bug. Every mutant runs in a process of its own, so that
//! one that ends it is noticed too.

use crate::Done;
use anyhow::{bail, Context};
use qwen3next_verify::mutants::catalogue::{Form, CATALOGUE};
use qwen3next_verify::mutants::{subjects, Subject};
use qwen3next_verify::suite::{Options, Row, Verdict};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

/// What the process of a mutant tells about a check.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Begin { check: String },
    Passed { cases: usize },
    Skipped { why: String },
    Failed { failure: String, reproduce: String },
}

/// A check that noticed a mutant.
struct Kill {
    check: String,
    failure: String,
    reproduce: String,
}

/// What came of one subject.
struct Report {
    subject: Subject,
    kills: Vec<Kill>,
    passed: usize,
    skipped: Vec<String>,
}

fn find(id: &str) -> anyhow::Result<Subject> {
    let all = subjects();
    let ids = all.iter().map(|s| s.id).collect::<Vec<_>>().join(", ");
    all.into_iter().find(|s| s.id == id).with_context(|| format!("--mutant {id}: expected one of {ids}"))
}

/// The command that repeats what happened to a mutant.
fn reproducer(subject: &Subject, reproduce: &str) -> String {
    let plain = format!("--op {} --variant {}", subject.op, subject.variant);
    let model = format!("--op {}", subject.op);
    let mine = format!("--mutant {}", subject.id);
    if reproduce.contains(&plain) {
        reproduce.replace(&plain, &mine)
    } else {
        // Of a model, the variant is one of the golden models: all of them run.
        let (head, tail) = reproduce.split_once(&model).unwrap_or((reproduce, ""));
        format!("{head}{mine}{}", tail.find(" --check").map_or("", |at| &tail[at..]))
    }
}

/// Runs one subject in this process.
pub fn one(id: &str, options: &Options) -> anyhow::Result<Vec<Row>> {
    let subject = find(id)?;
    let mut rows = subject.run(options).map_err(anyhow::Error::msg)?;
    for row in &mut rows {
        if let Verdict::Failed { reproduce, .. } = &mut row.verdict {
            *reproduce = reproducer(&subject, reproduce);
        }
    }
    Ok(rows)
}

/// Runs one subject check by check and tells on stdout what comes of it.
pub fn tell(id: &str, options: &Options) -> anyhow::Result<Done> {
    let subject = find(id)?;
    let mut out = std::io::stdout();
    let mut say = |line: &Line| -> anyhow::Result<()> {
        writeln!(out, "{}", serde_json::to_string(line)?)?;
        Ok(out.flush()?)
    };
    for check in &subject.checks {
        say(&Line::Begin { check: check.to_string() })?;
        let options = Options { check: Some(check.to_string()), shrink: 0, ..options.clone() };
        for row in subject.run(&options).map_err(anyhow::Error::msg)? {
            say(&match row.verdict {
                Verdict::Passed => Line::Passed { cases: row.passed },
                Verdict::Skipped(why) => Line::Skipped { why },
                Verdict::Failed { failure, reproduce } => {
                    Line::Failed { failure, reproduce: reproducer(&subject, &reproduce) }
                }
            })?;
        }
    }
    Ok(Done::Ok)
}

/// Runs every mutant and the control group, prints who noticed what, and fails where nobody did.
pub fn all(
    options: &Options,
    first: bool,
    json: Option<super::Output>,
    html: Option<super::Output>,
) -> anyhow::Result<Done> {
    let begin = std::time::Instant::now();
    let subjects = subjects();
    let bar = super::progress(subjects.len() as u64, "{prefix} {wide_bar} {pos}/{len} {msg}");
    bar.set_prefix("mutants");
    let mut reports = Vec::new();
    for subject in subjects {
        bar.set_message(subject.id);
        let of_it = match (first, subject.bug) {
            (true, None) => Options { seed: options.seed, ..Options::quick() },
            _ => options.clone(),
        };
        reports.push(watch(subject, &of_it, first)?);
        bar.inc(1);
    }
    bar.finish_and_clear();

    let out = &mut std::io::stdout().lock();
    print(&reports, out)?;
    writeln!(out, "{:.0} s", begin.elapsed().as_secs_f64())?;
    if let Some(file) = json {
        write_json(file, options, &reports)?;
    }
    if let Some(file) = html {
        let mutants: Vec<_> = reports.iter().filter_map(Report::for_the_page).collect();
        let machine = qwen3next_verify::report::Machine::here();
        file.finish(qwen3next_verify::report::html(&machine, options, &[], Some(&mutants)).as_bytes())?;
    }
    Ok(if reports.iter().all(Report::as_it_should_be) { Done::Ok } else { Done::Failed })
}

impl Report {
    /// A line of the HTML report's kill matrix; the control group has none.
    fn for_the_page(&self) -> Option<qwen3next_verify::report::Mutant> {
        Some(qwen3next_verify::report::Mutant {
            id: self.subject.id.into(),
            name: self.subject.bug?.into(),
            killed_by: self.kills.first().map(|kill| format!("{} {}", self.subject.op, kill.check)),
        })
    }

    /// A mutant was noticed; one of the control group was not, and something ran.
    fn as_it_should_be(&self) -> bool {
        match self.subject.bug {
            Some(_) => !self.kills.is_empty() || self.is_skipped(),
            None => self.kills.is_empty() && self.passed + self.skipped.len() > 0,
        }
    }

    /// No check could run.
    fn is_skipped(&self) -> bool {
        self.kills.is_empty() && self.passed == 0 && !self.skipped.is_empty()
    }

    fn verdict(&self) -> &'static str {
        match (self.subject.bug, self.as_it_should_be()) {
            _ if self.is_skipped() => "skipped",
            (Some(_), true) => "noticed",
            (Some(_), false) => "survived",
            (None, true) => "passed",
            (None, false) => "failed",
        }
    }
}

/// Runs a subject in a process of its own, to the end or to the first check that fails.
fn watch(subject: Subject, options: &Options, first: bool) -> anyhow::Result<Report> {
    let program = std::env::current_exe().context("where this program is")?;
    let mut child = Command::new(program)
        .args(["verify", "--lines", "--mutant", subject.id, "--seed", &options.seed.to_string()])
        .args(["--cases", &options.random.to_string(), "--stride", &options.stride.to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run this program again")?;
    let mut report = Report { subject, kills: Vec::new(), passed: 0, skipped: Vec::new() };
    let mut check = String::new();
    for line in BufReader::new(child.stdout.take().expect("piped")).lines() {
        match serde_json::from_str(&line?)? {
            Line::Begin { check: name } => check = name,
            Line::Passed { cases } => report.passed += cases,
            Line::Skipped { why } => report.skipped.push(why),
            Line::Failed { failure, reproduce } => {
                report.kills.push(Kill { check: check.clone(), failure, reproduce });
                if first {
                    child.kill()?;
                    child.wait()?;
                    return Ok(report);
                }
            }
        }
    }
    let end = child.wait_with_output()?;
    match end.status.code() {
        Some(0) => {}
        // Killed by a signal: the mutant did that. Any status is of this program's own making, and would hide a mutant
        // behind a mistake in the suite.
        None => {
            let reproduce = format!("qwen3next verify --mutant {} --check {check}", report.subject.id);
            report.kills.push(Kill { check, failure: format!("the process ended: {}", end.status), reproduce });
        }
        Some(_) => bail!("{}: {}", report.subject.id, String::from_utf8_lossy(&end.stderr).trim()),
    }
    Ok(report)
}

fn print(reports: &[Report], out: &mut impl Write) -> anyhow::Result<()> {
    writeln!(out, "{:<4} {:<12} {:<18} {:>6}  noticed by", "id", "operator", "variant", "checks")?;
    let mut pending = 0;
    for mutant in CATALOGUE {
        if let Form::Pending(why) = mutant.form {
            pending += 1;
            writeln!(out, "{:<4} {:<12} {:<18} {:>6}  PENDING: {why}", mutant.id, "-", "-", "-")?;
        }
        let Some(report) = reports.iter().find(|r| r.subject.id == mutant.id) else { continue };
        let by = match report.verdict() {
            "skipped" => format!("SKIPPED: {}", report.skipped[0]),
            "survived" => "NOBODY".into(),
            _ => names(&report.kills).join(" "),
        };
        let counts = format!("{}/{}", names(&report.kills).len(), report.subject.checks.len());
        let Subject { id, op, variant, .. } = report.subject;
        writeln!(out, "{id:<4} {op:<12} {variant:<18} {counts:>6}  {by}")?;
    }
    let (mutants, control): (Vec<_>, Vec<_>) = reports.iter().partition(|r| r.subject.bug.is_some());
    for report in &mutants {
        let Some(bug) = report.subject.bug.filter(|_| !report.as_it_should_be()) else { continue };
        writeln!(out, "\nSURVIVED {}: {bug}", report.subject.id)?;
    }
    for report in control.iter().filter(|r| !r.as_it_should_be()) {
        writeln!(out, "\n{} must pass:", report.subject.id)?;
        for kill in &report.kills {
            writeln!(out, "{}: {}\n  {}", kill.check, kill.failure, kill.reproduce)?;
        }
    }
    for report in control.iter().filter(|r| !r.skipped.is_empty()) {
        writeln!(out, "SKIPPED {} checks of {}: {}", report.skipped.len(), report.subject.id, report.skipped[0])?;
    }
    let count = |list: &[&Report], verdict: &str| list.iter().filter(|r| r.verdict() == verdict).count();
    writeln!(
        out,
        "\n{} of {} mutants noticed, {} skipped, {pending} pending; {} of {} unpatched copies pass, {} skipped",
        count(&mutants, "noticed"),
        mutants.len(),
        count(&mutants, "skipped"),
        count(&control, "passed"),
        control.len(),
        count(&control, "skipped")
    )?;
    Ok(())
}

/// Checks that failed, once each.
fn names(kills: &[Kill]) -> Vec<&str> {
    let mut names: Vec<&str> = kills.iter().map(|k| k.check.as_str()).collect();
    names.dedup();
    names
}

fn write_json(file: super::Output, options: &Options, reports: &[Report]) -> anyhow::Result<()> {
    let report = |id: &str| reports.iter().find(|r| r.subject.id == id);
    let kills = |kills: &[Kill]| -> Vec<_> {
        let of = |k: &Kill| json!({ "check": k.check, "failure": k.failure, "reproduce": k.reproduce });
        kills.iter().map(of).collect()
    };
    let mutants: Vec<_> = CATALOGUE
        .iter()
        .map(|mutant| match (&mutant.form, report(mutant.id)) {
            (Form::Pending(why), _) => {
                json!({ "id": mutant.id, "bug": mutant.bug, "verdict": "pending", "text": why })
            }
            (_, report) => json!({
                "id": mutant.id, "bug": mutant.bug,
                "op": report.map(|r| r.subject.op), "variant": report.map(|r| r.subject.variant),
                "verdict": report.map(Report::verdict), "skipped": report.map(|r| &r.skipped),
                "noticed_by": report.map(|r| kills(&r.kills)),
            }),
        })
        .collect();
    let control: Vec<_> = reports
        .iter()
        .filter(|r| r.subject.bug.is_none())
        .map(|r| {
            json!({
                "id": r.subject.id, "op": r.subject.op, "variant": r.subject.variant, "cases": r.passed,
                "skipped": r.skipped, "verdict": r.verdict(),
                "failures": kills(&r.kills),
            })
        })
        .collect();
    let document = json!({
        "version": env!("CARGO_PKG_VERSION"), "seed": options.seed, "mutants": mutants, "control": control,
    });
    file.finish(serde_json::to_string_pretty(&document)?.as_bytes())
}
