//! `qwen3next verify`: every variant of every operator on shared cases; failures print how to repeat them.

use crate::cli::mutants;
use crate::Done;
use anyhow::{bail, Context};
use qwen3next_kernels::Isa;
use qwen3next_verify::plugin::Plugin;
use qwen3next_verify::suite::{not_taken, Entry, Options, Row, Verdict};
use qwen3next_verify::{cases, report};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(clap::Args)]
pub struct Args {
    /// Only this operator.
    #[arg(long)]
    op: Option<String>,
    /// Where kernels run: the C variants, the CUDA kernels through the host executor (in builds with the feature
    /// cuda-host), both, or the CUDA kernels on a GPU (feature cuda).
    #[arg(long, default_value = "cpu", value_enum)]
    backend: Backend,
    /// Only variants of this instruction set.
    #[arg(long)]
    isa: Option<String>,
    /// Only this variant.
    #[arg(long)]
    variant: Option<String>,
    /// Only this check.
    #[arg(long)]
    check: Option<String>,
    /// Only this case, as a failure prints it.
    #[arg(long)]
    case: Option<String>,
    /// Random cases a check and variant, beside the fixed grid.
    #[arg(long, default_value_t = 24)]
    cases: usize,
    /// Seed of inputs and random cases.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Every fifth case of the grid, few random ones.
    #[arg(long)]
    quick: bool,
    /// Put known bugs back into copies of the kernels, one after the other: the checks must notice every one of them.
    #[arg(long, conflicts_with_all = ["op", "isa", "variant", "check", "case", "mutant"])]
    mutants: bool,
    /// Run the checks of its operator on this mutant (or on `control_...`, see --mutants), which must fail.
    #[arg(long, value_name = "ID", conflicts_with_all = ["op", "isa", "variant"])]
    mutant: Option<String>,
    /// With --mutants: one check that notices a mutant is enough, and the control group takes the quick grid.
    #[arg(long, requires = "mutants")]
    first: bool,
    /// With --mutant: tell the progress as JSON lines (how --mutants runs it).
    #[arg(long, requires = "mutant", hide = true)]
    lines: bool,
    /// Every how many-th case of the grid.
    #[arg(long, value_parser = super::model::at_least_one)]
    stride: Option<usize>,
    /// Judge this kernel from a shared library instead of the built-in variants: a q3n_OP_variant, or a function of
    /// the type of its run. Repeatable; needs --op.
    #[arg(long, value_name = "LIBRARY:SYMBOL")]
    plugin: Vec<Plugin>,
    /// Seconds after which a call of a --plugin that does not return fails.
    #[arg(long, default_value_t = 120, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// Also write the results to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also write a page with tables and plots to this file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Instead of running anything, write the cases of the grid and what they must give into this folder, a file an
    /// operator: verify/neon/replay.c runs kernels on them where there is no Rust.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["mutants", "mutant", "plugin", "json", "html", "check", "case"])]
    write_cases: Option<PathBuf>,
    /// Run one check of one --plugin in this process and report into this file.
    #[arg(long, value_name = "FILE", hide = true)]
    child: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Backend {
    Cpu,
    CudaHost,
    Cuda,
    All,
}

/// The first GPU, or why there is none.
#[cfg(feature = "cuda")]
pub fn gpu() -> Result<&'static qwen3next_kernels::device::Device, String> {
    use qwen3next_kernels::device::Device;
    match Device::count() {
        Ok(0) => Err("the driver knows no device".into()),
        Ok(_) => Ok(Box::leak(Box::new(Device::open(0).map_err(|e| e.to_string())?))),
        Err(why) => Err(why.to_string()),
    }
}

/// Has the kernels run on the first GPU and names it, or says why they can't.
#[cfg(feature = "cuda")]
fn on_gpu(options: &mut Options) -> Result<String, String> {
    let device = gpu()?;
    options.device = Some(device);
    device.name().map_err(|e| e.to_string())
}

#[cfg(not(feature = "cuda"))]
fn on_gpu(_: &mut Options) -> Result<String, String> {
    Err("built without the feature cuda".into())
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    if args.backend == Backend::CudaHost && !Isa::CUDA_HOST.available() {
        bail!("--backend cuda-host: not built in: build with --features cuda-host");
    }
    let entries = chosen(args.op.as_deref())?;
    if args.op.is_none()
        && args.mutant.is_none()
        && (args.variant.is_some() || args.check.is_some() || args.case.is_some())
    {
        bail!("--variant, --check and --case belong to one operator: give --op");
    }
    if args.op.is_none() && !args.plugin.is_empty() {
        bail!("--plugin belongs to one operator: give --op");
    }
    let isa = match &args.isa {
        None => None,
        Some(name) => Some(Isa::from_name(name).with_context(|| {
            format!("--isa {name}: expected one of {}", Isa::all().map(Isa::name).collect::<Vec<_>>().join(", "))
        })?),
    };
    let mut options = if args.quick { Options::quick() } else { Options { random: args.cases, ..Options::default() } };
    options.stride = args.stride.unwrap_or(options.stride);
    let isa = isa.or((args.backend == Backend::CudaHost).then_some(Isa::CUDA_HOST));
    let cuda_host = args.backend != Backend::Cpu;
    let (variant, check, case) = (args.variant, args.check, args.case);
    options = Options { seed: args.seed, variant, isa, cuda_host, check, case, ..options };
    if args.backend == Backend::Cuda {
        match on_gpu(&mut options) {
            Ok(name) => writeln!(std::io::stdout(), "on {name}")?,
            Err(why) => {
                let rows: Vec<Row> = entries.iter().map(|entry| no_gpu(entry.op, &why)).collect();
                write_reports(reports(&args.json, &args.html)?, &options, &rows)?;
                let skipped = entries.len();
                let mut out = std::io::stdout();
                writeln!(out, "SKIPPED cuda: {why}\n\n0 checks passed, 0 failed, {skipped} skipped")?;
                return Ok(Done::Ok);
            }
        }
    }

    if let Some(folder) = &args.write_cases {
        return write_cases(&entries, &options, folder);
    }
    if let (Some(file), [plugin], [entry]) = (&args.child, args.plugin.as_slice(), entries.as_slice()) {
        super::plugin::become_child(file)?;
        super::plugin::verify_here(entry, &options, plugin);
        return Ok(Done::Ok);
    }
    let [json, html] = reports(&args.json, &args.html)?;
    if args.mutants {
        return mutants::all(&options, args.first, json, html);
    }
    let rows = match (&args.mutant, args.plugin.as_slice()) {
        (Some(id), _) if args.lines => return mutants::tell(id, &options),
        (Some(id), _) => mutants::one(id, &options)?,
        (None, []) => verify(&entries, &options)?,
        (None, plugins) => super::plugin::verify(&entries[0], &options, plugins, Duration::from_secs(args.timeout))?,
    };
    print(&rows, &mut std::io::stdout().lock())?;
    write_reports([json, html], &options, &rows)?;
    if rows.is_empty() {
        bail!("nothing to run: no variant has the instruction set {}", args.isa.unwrap_or_default());
    }
    Ok(if rows.iter().any(|r| matches!(r.verdict, Verdict::Failed { .. })) { Done::Failed } else { Done::Ok })
}

/// What stands for an operator where there is no GPU.
fn no_gpu(op: &'static str, why: &str) -> Row {
    Row {
        op,
        variant: "cuda",
        isa: Isa::SCALAR,
        check: "all",
        passed: 0,
        not_taken: Default::default(),
        metrics: Default::default(),
        distribution: Default::default(),
        verdict: Verdict::Skipped(why.into()),
    }
}

/// The files of `--json` and `--html`, begun.
fn reports(json: &Option<PathBuf>, html: &Option<PathBuf>) -> anyhow::Result<[Option<super::Output>; 2]> {
    let create = |path: &Option<PathBuf>| path.as_deref().map(super::Output::create).transpose();
    Ok([create(json)?, create(html)?])
}

fn write_reports([json, html]: [Option<super::Output>; 2], options: &Options, rows: &[Row]) -> anyhow::Result<()> {
    let machine = report::Machine::here();
    if let Some(file) = json {
        file.finish(serde_json::to_string_pretty(&report::json(&machine, options, rows))?.as_bytes())?;
    }
    if let Some(file) = html {
        file.finish(report::html(&machine, options, rows, None).as_bytes())?;
    }
    Ok(())
}

/// All suites, or those of one operator.
fn chosen(op: Option<&str>) -> anyhow::Result<Vec<Entry>> {
    let mut entries = cases::all();
    if let Some(op) = op {
        let names: Vec<&str> = entries.iter().map(|e| e.op).collect();
        if !names.contains(&op) {
            bail!("--op {op}: expected one of {}", names.join(", "));
        }
        entries.retain(|e| e.op == op);
    }
    Ok(entries)
}

/// A file of cases an operator, as neon/README.md describes it.
fn write_cases(entries: &[Entry], options: &Options, folder: &Path) -> anyhow::Result<Done> {
    std::fs::create_dir_all(folder).with_context(|| format!("{}: cannot make this folder", folder.display()))?;
    for entry in entries {
        match entry.write_cases(options).map_err(anyhow::Error::msg)? {
            Some((count, bytes)) => {
                let path = folder.join(format!("{}.cases", entry.op));
                super::Output::create(&path)?.finish(&bytes)?;
                writeln!(std::io::stdout(), "{}: {count} cases, {} bytes", path.display(), bytes.len())?;
            }
            None if entries.len() == 1 => bail!("--op {}: case files do not hold its outputs", entry.op),
            None => {}
        }
    }
    Ok(Done::Ok)
}

/// Runs the suites with a progress bar on stderr.
pub fn verify(entries: &[Entry], options: &Options) -> anyhow::Result<Vec<Row>> {
    let bar = super::progress(entries.len() as u64, "{prefix} {wide_bar} {pos}/{len} {msg}");
    bar.set_prefix("verify");
    let mut rows = Vec::new();
    for entry in entries {
        bar.set_message(entry.op);
        rows.extend(entry.run(options).map_err(anyhow::Error::msg)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(rows)
}

/// One line an operator and variant, then every failure with its reproducer, then the totals.
pub fn print(rows: &[Row], out: &mut impl Write) -> anyhow::Result<()> {
    writeln!(
        out,
        "{:<16} {:<20} {:>7} {:>7} {:>12} {:>12} {:>9}  verdict",
        "operator", "variant", "checks", "cases", "worst row L2", "max/row RMS", "× bound"
    )?;
    for group in rows.chunk_by(|a, b| a.op == b.op && a.variant == b.variant) {
        let metrics =
            group.iter().fold(Default::default(), |m: qwen3next_verify::compare::Metrics, r| m.worst(r.metrics));
        let verdict = group
            .iter()
            .find_map(|r| match &r.verdict {
                Verdict::Failed { .. } => Some("FAILED".to_string()),
                Verdict::Skipped(why) => Some(format!("SKIPPED: {why}")),
                Verdict::Passed => None,
            })
            .unwrap_or_else(|| "passed".into());
        writeln!(
            out,
            "{:<16} {:<20} {:>7} {:>7} {:>12.1e} {:>12.1e} {:>9.3}  {verdict}{}",
            group[0].op,
            group[0].variant,
            group.len(),
            group.iter().map(|r| r.passed).sum::<usize>(),
            metrics.row_l2,
            metrics.max_over_rms,
            metrics.bound_multiple,
            not_taken(group),
        )?;
    }
    for row in rows {
        if let Verdict::Failed { failure, reproduce } = &row.verdict {
            writeln!(out, "\n{} {} {}: {failure}\n  {reproduce}", row.op, row.variant, row.check)?;
        }
    }
    let count = |f: fn(&Verdict) -> bool| rows.iter().filter(|r| f(&r.verdict)).count();
    writeln!(
        out,
        "\n{} checks passed, {} failed, {} skipped",
        count(|v| matches!(v, Verdict::Passed)),
        count(|v| matches!(v, Verdict::Failed { .. })),
        count(|v| matches!(v, Verdict::Skipped(_)))
    )?;
    Ok(())
}
