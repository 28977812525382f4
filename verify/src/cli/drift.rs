//! `qwen3next drift`: how far the delta rule's state strays from float64 over thousands of tokens.

use crate::Done;
use anyhow::Context;
use plotters::prelude::*;
use qwen3next_kernels::Variant;
use qwen3next_verify::drift::{self, Curve, Point, Runner, Store, HEADS, QUICK, STEP};
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// Tokens of the sequence; the state rounded at every token stops at 4,096.
    #[arg(long, default_value_t = 65536)]
    tokens: usize,
    /// Channels of keys and values.
    #[arg(long, default_value_t = 64)]
    dim: usize,
    /// Variants, separated by commas; with the first one the state is also rounded at every token.
    #[arg(long, value_delimiter = ',', default_value = "recurrent_scalar,chunked64_scalar")]
    variant: Vec<String>,
    /// Seed of the inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Also draw the errors over the tokens.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    anyhow::ensure!(
        args.tokens % STEP == 0 && (STEP..=1 << 20).contains(&args.tokens),
        "--tokens {}: expected a multiple of {STEP} up to 1048576",
        args.tokens
    );
    anyhow::ensure!((1..=256).contains(&args.dim), "--dim {}: expected 1 to 256", args.dim);
    let variants: Vec<_> = args
        .variant
        .iter()
        .map(|name| {
            Variant::by_name(name)
                .filter(|v| v.isa().available())
                .with_context(|| format!("--variant {name}: no such variant of gated_delta on this CPU"))
        })
        .collect::<anyhow::Result<_>>()?;
    let plot_to = args.plot.as_deref().map(super::Output::create).transpose()?;
    let all = |state| variants.iter().map(move |&variant| Runner { variant, state, step: STEP, tokens: args.tokens });
    let every_token = variants.first().map(|&variant| Runner {
        variant,
        state: Store::Bf16,
        step: 1,
        tokens: QUICK.min(args.tokens),
    });
    let runners: Vec<Runner> = all(Store::F32).chain(all(Store::Bf16)).chain(every_token).collect();
    let curves = drift::run(args.tokens, args.dim, args.seed, &runners).map_err(|e| anyhow::anyhow!("{e}"))?;
    table(&runners, &curves, &mut std::io::stdout().lock())?;
    if let Some(file) = plot_to {
        plot(&runners, &curves, args.dim, file)?;
    }
    Ok(Done::Ok)
}

/// Markdown: a line a head and point, a column a runner.
fn table(runners: &[Runner], curves: &[Curve], out: &mut impl Write) -> anyhow::Result<()> {
    let names: Vec<String> = runners.iter().map(Runner::name).collect();
    write!(out, "| head | tokens |")?;
    names.iter().try_for_each(|name| write!(out, " {name} |"))?;
    writeln!(out, " independent roundings |")?;
    writeln!(out, "| --- | ---: |{}", " ---: |".repeat(runners.len() + 1))?;
    for (h, head) in HEADS.iter().enumerate() {
        for (i, longest) in curves[h].points.iter().enumerate() {
            write!(out, "| {head} | {} |", longest.tokens)?;
            for (name, curve) in names.iter().zip(curves.iter().skip(h).step_by(HEADS.len())) {
                match curve.points.get(i) {
                    Some(p) => write!(out, " {:>w$} |", format!("{:.1e} / {:.1e}", p.state, p.output), w = name.len())?,
                    None => write!(out, " {:>w$} |", "", w = name.len())?,
                }
            }
            writeln!(out, " {:>21} |", format!("{:.1e}", longest.bound))?;
        }
    }
    writeln!(out, "\nstate / output: relative L2 error of the head's state, and of its last {STEP} outputs.")?;
    Ok(())
}

/// Four panels: state and outputs, a column a head; both axes logarithmic.
fn plot(runners: &[Runner], curves: &[Curve], dim: usize, file: super::Output) -> anyhow::Result<()> {
    type Of = fn(&Point) -> f64;
    let kinds: [(&str, Of); 2] = [("state", |p| p.state), ("last 64 outputs", |p| p.output)];
    let points = || curves.iter().flat_map(|c| &c.points);
    let last = points().map(|p| p.tokens).max().unwrap_or(STEP) as f64;
    let errors = || points().flat_map(|p| [p.state, p.output]).filter(|e| *e > 0.0);
    let (low, high) = errors().fold((f64::MAX, f64::MIN_POSITIVE), |(a, b), e| (a.min(e), b.max(e)));
    let power = |e: &f64| format!("1e{:.0}", e.log10());
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (1000, 780)).into_drawing_area();
        root.fill(&WHITE)?;
        let (head, body) = root.split_vertically(110);
        let title = format!("gated_delta: error against float64 along the sequence, K = V = {dim}");
        head.draw(&Text::new(title, (20, 12), ("sans-serif", 20)))?;
        let style = |i: usize| Palette99::pick([0, 1, 3, 4, 5, 6][i % 6]).to_rgba();
        // The first variant's curve is wider, so that it shows below another one that agrees with it.
        let wide = |i: usize| {
            let covered = runners[i + 1..].iter().any(|r| r.state == runners[i].state && r.step == runners[i].step);
            if covered {
                6
            } else {
                2
            }
        };
        for (i, runner) in runners.iter().enumerate() {
            let (x, y) = (24 + (i % 2) as i32 * 400, 48 + (i / 2) as i32 * 20);
            head.draw(&PathElement::new([(x, y + 6), (x + 24, y + 6)], style(i).stroke_width(wide(i))))?;
            head.draw(&Text::new(runner.name(), (x + 32, y), ("sans-serif", 14)))?;
        }
        for (panel, area) in body.split_evenly((2, 2)).iter().enumerate() {
            let ((kind, of), h) = (kinds[panel / 2], panel % 2);
            let mut chart = ChartBuilder::on(area)
                .caption(format!("{} head: {kind}", HEADS[h]), ("sans-serif", 16))
                .margin(10)
                .x_label_area_size(40)
                .y_label_area_size(64)
                .build_cartesian_2d(
                    (STEP as f64..last.max(2.0 * STEP as f64)).log_scale(),
                    (low / 2.0..high * 2.0).log_scale(),
                )?;
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .x_desc("tokens")
                .y_desc("relative L2 error")
                .x_label_formatter(&|t| format!("{t:.0}"))
                .y_label_formatter(&power)
                .draw()?;
            for (i, curve) in curves.iter().skip(h).step_by(HEADS.len()).enumerate() {
                let line = curve.points.iter().map(|p| (p.tokens as f64, of(p).max(low)));
                chart.draw_series(LineSeries::new(line, style(i).stroke_width(wide(i))))?;
            }
        }
        root.present()?;
    }
    file.finish(svg.as_bytes())
}
