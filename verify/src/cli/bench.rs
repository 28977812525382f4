//! `qwen3next bench op`: the variants of an operator side by side, on inputs they have just been verified on.

use crate::Done;
use anyhow::{bail, Context};
use plotters::prelude::*;
use qwen3next_kernels::gated_delta::Op;
use qwen3next_kernels::{Exec, Isa, Operator, Variant};
use qwen3next_verify::cases::gated_delta::Timed;
use qwen3next_verify::plugin::Plugin;
use qwen3next_verify::timing::{interleaved, Time};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Time the variants of one operator.
    Op(OpArgs),
}

#[derive(clap::Args)]
struct OpArgs {
    /// Operator; today gated_delta (the others: cargo bench).
    op: String,
    /// Only these variants, separated by commas; the first one is the base of the ratios.
    #[arg(long, value_delimiter = ',')]
    variant: Vec<String>,
    /// Also time this kernel from a shared library, as in `verify --plugin`. Repeatable.
    #[arg(long, value_name = "LIBRARY:SYMBOL")]
    plugin: Vec<Plugin>,
    /// Tokens of a call, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 64, 256, 512])]
    tokens: Vec<usize>,
    /// Key and value heads.
    #[arg(long, default_value = "16/32", value_name = "HK/HV")]
    heads: String,
    /// Channels of a head.
    #[arg(long, default_value_t = 128)]
    dim: usize,
    /// Type of the activations: f32 is what the CPU kernels take.
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Threads.
    #[arg(short, long, default_value_t = 1)]
    threads: usize,
    /// Samples of every variant and length, interleaved.
    #[arg(short, long, default_value_t = 7)]
    repetitions: usize,
    /// Also draw tokens per second over tokens.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Format of the table.
    #[arg(short, long, default_value = "md", value_parser = ["md", "json", "csv"])]
    output: String,
    /// Run in this process and report into this file.
    #[arg(long, value_name = "FILE", hide = true)]
    child: Option<PathBuf>,
}

/// One line of the table.
pub struct Line {
    variant: &'static str,
    tokens: usize,
    time: Time,
    /// Median time of the first variant over this one's.
    ratio: f64,
    gflops: f64,
    gbs: f64,
    row_l2: f64,
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    let What::Op(args) = args.what;
    if args.op != "gated_delta" {
        bail!("bench op {}: expected gated_delta; the other operators have criterion benches (cargo bench)", args.op);
    }
    if args.dtype != "f32" {
        bail!("--dtype {}: expected f32", args.dtype);
    }
    let heads = args.heads.split_once('/').and_then(|(k, v)| Some((k.parse().ok()?, v.parse().ok()?)));
    let Some((hk, hv)) = heads.filter(|&(hk, hv): &(usize, usize)| hk > 0 && hv > 0 && hv % hk == 0 && hv <= 1024)
    else {
        bail!("--heads {}: expected HK/HV such as 16/32, HV a multiple of HK", args.heads);
    };
    if !(1..=1024).contains(&args.dim) || !(1..=1024).contains(&args.threads) || args.repetitions == 0 {
        bail!("--dim, --threads and --repetitions: expected 1 to 1024, 1 to 1024 and at least 1");
    }
    if let Some(t) = args.tokens.iter().find(|t| !(1..=1 << 16).contains(*t)) {
        bail!("--tokens {t}: expected 1 to 65536");
    }
    let mut variants = chosen(&args.variant)?;
    if !args.plugin.is_empty() {
        for plugin in &args.plugin {
            plugin.kind().map_err(anyhow::Error::msg)?;
        }
        // A kernel that crashes takes only a child down.
        let Some(file) = &args.child else { return super::plugin::again() };
        super::plugin::become_child(file)?;
        variants.extend(load(&args.plugin)?);
    }
    let plot_to = args.plot.as_deref().map(super::Output::create).transpose()?;
    let lines = measure(&variants, &args.tokens, [hk, hv, args.dim], args.threads, args.repetitions)?;
    let out = &mut std::io::stdout().lock();
    match args.output.as_str() {
        "md" => table(&lines, out)?,
        "csv" => {
            writeln!(out, "op,variant,hk,hv,d,tokens,threads,median_s,min_s,samples,ratio,gflops,gbs,row_l2")?;
            for l in &lines {
                writeln!(
                    out,
                    "gated_delta,{},{hk},{hv},{},{},{},{:e},{:e},{},{:.4},{:.3},{:.3},{:e}",
                    l.variant,
                    args.dim,
                    l.tokens,
                    args.threads,
                    l.time.median,
                    l.time.min,
                    l.time.samples,
                    l.ratio,
                    l.gflops,
                    l.gbs,
                    l.row_l2
                )?;
            }
        }
        _ => {
            let rows: Vec<_> = lines
                .iter()
                .map(|l| {
                    json!({
                        "op": "gated_delta", "variant": l.variant, "hk": hk, "hv": hv, "d": args.dim, "tokens": l.tokens,
                        "threads": args.threads, "median_s": l.time.median, "min_s": l.time.min,
                        "samples": l.time.samples, "ratio": l.ratio, "gflops": l.gflops, "gbs": l.gbs,
                        "row_l2": l.row_l2,
                    })
                })
                .collect();
            writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
        }
    }
    if let Some(file) = plot_to {
        plot(&lines, file)?;
    }
    Ok(Done::Ok)
}

/// The variants of these names, in their order; all available ones where no name is given.
fn chosen(names: &[String]) -> anyhow::Result<Vec<Variant<Op>>> {
    let all = Op::variants();
    if names.is_empty() {
        return Ok(all.into_iter().filter(|v| v.isa().available()).collect());
    }
    names
        .iter()
        .map(|name| {
            let known = || all.iter().map(|v| v.name()).collect::<Vec<_>>().join(", ");
            let found =
                Variant::by_name(name).with_context(|| format!("--variant {name}: expected one of {}", known()))?;
            anyhow::ensure!(found.isa().available(), "--variant {name}: needs {}, which this CPU lacks", found.isa());
            Ok(found)
        })
        .collect()
}

/// The variants of these libraries, each with a name of its own.
fn load(plugins: &[Plugin]) -> anyhow::Result<Vec<Variant<Op>>> {
    let mut variants: Vec<Variant<Op>> = Vec::new();
    for plugin in plugins {
        // SAFETY: whoever names a library on the command line wants it run; what it is, is theirs to know.
        let variant = unsafe { plugin.load::<Op>() }.map_err(anyhow::Error::msg)?;
        if variants.iter().any(|v| v.name() == variant.name()) {
            bail!("--plugin {plugin}: a second variant named {}", variant.name());
        }
        variants.push(variant);
    }
    Ok(variants)
}

/// Verifies and times the variants; `shape` is HK, HV, d.
pub fn measure(
    variants: &[Variant<Op>],
    tokens: &[usize],
    shape: [usize; 3],
    threads: usize,
    samples: usize,
) -> anyhow::Result<Vec<Line>> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().context("--threads")?;
    let bar = super::progress(tokens.len() as u64, "bench {wide_bar} {pos}/{len} {msg}");
    let mut lines = Vec::new();
    for &t in tokens {
        bar.set_message(format!("{t} tokens"));
        let mut timed = Timed::new(t, shape[0], shape[1], shape[2]);
        let (flops, bytes) = (timed.flops(), timed.bytes());
        let mut errors = Vec::new();
        let again =
            format!("qwen3next bench op gated_delta --tokens {t} --heads {}/{} --dim {}", shape[0], shape[1], shape[2]);
        for v in variants {
            super::plugin::announce(v.name(), v.isa(), &format!("while it was verified for {again}"));
            let metrics =
                timed.verify(v).map_err(|e| super::Wrong(format!("{} is wrong, so it is not timed: {e}", v.name())))?;
            errors.push(metrics.row_l2);
        }
        super::plugin::announce("a variant", Isa::SCALAR, &format!("while all were timed for {again}"));
        let execs: Vec<Exec<Op>> = variants.iter().map(|v| Exec::variant(*v).parts(threads)).collect();
        let times = pool
            .install(|| interleaved(variants.len(), samples, Duration::from_millis(4), |i| timed.run(&execs[i])))
            .map_err(|e| anyhow::anyhow!("{e}"))?;
        for ((v, time), row_l2) in variants.iter().zip(&times).zip(errors) {
            lines.push(Line {
                variant: v.name(),
                tokens: t,
                time: *time,
                ratio: times[0].median / time.median,
                gflops: flops / time.median / 1e9,
                gbs: bytes / time.median / 1e9,
                row_l2,
            });
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(lines)
}

/// A markdown table.
pub fn table(lines: &[Line], out: &mut impl Write) -> anyhow::Result<()> {
    writeln!(
        out,
        "| {:<20} | {:>6} | {:>10} | {:>10} | {:>7} | {:>9} | {:>7} | {:>12} |",
        "gated_delta", "tokens", "median µs", "min µs", "speed", "GFLOP/s", "GB/s", "worst row L2"
    )?;
    writeln!(
        out,
        "| {:-<20} | {:->5}: | {:->9}: | {:->9}: | {:->6}: | {:->8}: | {:->6}: | {:->11}: |",
        "", "", "", "", "", "", "", ""
    )?;
    for l in lines {
        writeln!(
            out,
            "| {:<20} | {:>6} | {:>10.1} | {:>10.1} | {:>6.2}× | {:>9.2} | {:>7.2} | {:>12.1e} |",
            l.variant,
            l.tokens,
            l.time.median * 1e6,
            l.time.min * 1e6,
            l.ratio,
            l.gflops,
            l.gbs,
            l.row_l2
        )?;
    }
    writeln!(
        out,
        "speed: against {}, medians of one interleaved run; GFLOP/s: 7 K V a token and head",
        lines.first().map_or("", |l| l.variant)
    )?;
    Ok(())
}

/// Tokens per second over tokens, one line a variant, both axes logarithmic.
fn plot(lines: &[Line], file: super::Output) -> anyhow::Result<()> {
    let mut svg = String::new();
    let speed = |l: &Line| l.tokens as f64 / l.time.median;
    let range = |values: Vec<f64>, margin: f64| {
        let (low, high) = values.iter().fold((f64::MAX, 0.0f64), |(a, b), &v| (a.min(v), b.max(v)));
        (low / margin..high * margin).log_scale()
    };
    let xs = range(lines.iter().map(|l| l.tokens as f64).collect(), 1.1);
    let ys = range(lines.iter().map(speed).collect(), 1.3);
    {
        let root = SVGBackend::with_string(&mut svg, (900, 560)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption("gated_delta: tokens per second by variant", ("sans-serif", 20))
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(80)
            .build_cartesian_2d(xs, ys)?;
        chart.configure_mesh().x_desc("tokens of a call").y_desc("tokens / s").draw()?;
        let mut names: Vec<&str> = lines.iter().map(|l| l.variant).collect();
        names.dedup();
        names.sort_unstable();
        names.dedup();
        for (i, name) in names.into_iter().enumerate() {
            let color = Palette99::pick(i).to_rgba();
            let points = lines.iter().filter(|l| l.variant == name).map(|l| (l.tokens as f64, speed(l)));
            chart
                .draw_series(LineSeries::new(points, color.stroke_width(2)).point_size(3))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
        root.present()?;
    }
    file.finish(svg.as_bytes())
}
