//! `qwen3next regress`: the delta rule's modes 0, 1 and 2 against each other on a text, decoded token by token and read as
//! a prompt.

use super::model::{self, Loaded};
use super::run_model::{CPU_MOE, GPU_LAYERS};
use crate::Done;
use anyhow::{bail, ensure, Context};
use qwen3next_kernels::gated_delta::Op;
use qwen3next_kernels::{DType, Operator, Variant};
use qwen3next_model::forward::{Activations, FusedDelta, Options};
use qwen3next_model::perplexity::{divergence, negative_log_likelihood, top, window_logits, Sum};
use qwen3next_model::CacheTypes;
use qwen3next_verify::plugin::Plugin;
use qwen3next_verify::report::Machine;
use rayon::prelude::*;
use serde_json::{json, Value};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Instant;

#[derive(clap::Args)]
pub struct Args {
    /// GGUF file or Hugging Face folder; by default the embedded model.
    #[arg(short, long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Text; by default, with the embedded model, the text it was not trained on.
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// Tokens of a window; windows do not overlap and start from an empty state.
    #[arg(short, long, default_value_t = 512, value_parser = model::at_least_one)]
    ctx: usize,
    /// Only the first so many windows.
    #[arg(long, value_parser = model::at_least_one)]
    windows: Option<usize>,
    /// Decode shape: tokens handed to the model in one call.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = model::at_least_one)]
    decode_b: usize,
    /// Decode shape: tokens that go through the layers together.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = model::at_least_one)]
    decode_ub: usize,
    /// Prefill shape: tokens handed to the model in one call.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = model::at_least_one)]
    prefill_b: usize,
    /// Prefill shape: tokens that go through the layers together.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = model::at_least_one)]
    prefill_ub: usize,
    /// Largest perplexity of the decode shape, in any mode.
    #[arg(long, value_name = "PPL", default_value_t = 10.0)]
    max_decode_ppl: f64,
    /// Largest perplexity of the prefill shape, in any mode.
    #[arg(long, value_name = "PPL", default_value_t = 10.0)]
    max_prefill_ppl: f64,
    /// How far a mode's perplexity may be from mode 0's, as a ratio from 1; also mode 0's two shapes from one another.
    #[arg(long, value_name = "R", default_value_t = 1e-4)]
    max_ratio: f64,
    /// Largest mean KL divergence from mode 0, in nats.
    #[arg(long, value_name = "KL", default_value_t = 1e-6)]
    max_kl: f64,
    /// What quantised weights meet: f32, or 8 bits a value, whose roundings modes 1 and 2 do not share with mode 0 (give
    /// thresholds for it).
    #[arg(long, value_name = "f32|q8", default_value = "f32", value_parser = ["f32", "q8"])]
    activations: String,
    /// Type of cached keys and values (-ctk).
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = model::cache_type)]
    cache_type_k: DType,
    /// Threads; by default one a core.
    #[arg(short, long, value_parser = model::threads)]
    threads: Option<usize>,
    /// Layers on a GPU (-ngl).
    #[arg(long, alias = "gpu-layers", value_name = "N", allow_hyphen_values = true)]
    ngl: Option<String>,
    /// Layers whose experts stay on the CPU (-ncmoe).
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    n_cpu_moe: Option<String>,
    /// Built-in variant of the delta rule that the fused modes run, in the place of the one that dispatch picks.
    #[arg(long, value_name = "NAME", conflicts_with = "plugin")]
    variant: Option<String>,
    /// Kernel from a shared library that the fused modes run: a q3n_gated_delta_variant, or a function of the type of
    /// its run.
    #[arg(long, value_name = "LIBRARY:SYMBOL")]
    plugin: Option<Plugin>,
    /// Run a --plugin in this process.
    #[arg(long, value_name = "FILE", hide = true)]
    child: Option<PathBuf>,
    /// Format of the result.
    #[arg(short, long, default_value = "md", value_parser = ["md", "json"])]
    output: String,
}

/// How a text is read.
struct Shape {
    name: &'static str,
    batch: usize,
    ubatch: usize,
    /// Largest perplexity.
    limit: f64,
}

/// What one mode made of one shape: of a window, or of all.
#[derive(Default, Clone)]
struct Cell {
    nll: Vec<f64>,
    /// From mode 0 at the same position.
    kl: Vec<f64>,
    agree: usize,
    seconds: f64,
}

/// A row of the table.
struct Row {
    mode: usize,
    shape: usize,
    ppl: f64,
    error: f64,
    ratio: f64,
    kl_mean: f64,
    kl_error: f64,
    kl_p999: f64,
    agreement: f64,
    speed: f64,
}

const MODES: usize = 3;

/// Parameters of a model whose tokens are too little work to share: windows run side by side, each on a thread.
const SMALL: u64 = 64 << 20;

pub fn run(args: Args) -> anyhow::Result<Done> {
    GPU_LAYERS.parse(args.ngl.as_slice())?;
    CPU_MOE.parse(args.n_cpu_moe.as_slice())?;
    match (&args.plugin, &args.child) {
        (Some(plugin), None) => {
            plugin.kind().map_err(anyhow::Error::msg)?;
            return super::plugin::again();
        }
        (_, Some(file)) => super::plugin::become_child(file)?,
        (None, None) => {}
    }
    let shapes = [
        Shape { name: "decode", batch: args.decode_b, ubatch: args.decode_ub, limit: args.max_decode_ppl },
        Shape { name: "prefill", batch: args.prefill_b, ubatch: args.prefill_ub, limit: args.max_prefill_ppl },
    ];
    let text = match (&args.file, &args.model) {
        (Some(path), _) => super::read_text(path)?,
        (None, None) => qwen3next_model::embedded::HELD_OUT.to_string(),
        (None, Some(_)) => bail!("--file: expected a text to read with this model"),
    };
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("--threads")?;
    }
    let mut loaded = model::load(args.model.as_deref())?;
    let chosen = match (&args.variant, &args.plugin) {
        (Some(name), _) => Some(Variant::<Op>::by_name(name).filter(|v| v.isa().available()).with_context(|| {
            let usable = Op::variants().into_iter().filter(|v| v.isa().available());
            let names: Vec<_> = usable.map(|v| v.name()).collect();
            format!("--variant {name}: expected one of {}", names.join(", "))
        })?),
        // SAFETY: whoever names a library on the command line wants it run; this process is there to die of it.
        (None, Some(plugin)) => Some(unsafe { plugin.load::<Op>() }.map_err(anyhow::Error::msg)?),
        (None, None) => None,
    };
    if let Some(variant) = chosen {
        loaded.model.set_delta(variant);
    }
    let mut tokens = loaded.tokenizer()?.encode(&text, false)?;
    if let Some(n) = args.windows {
        tokens.truncate(n.saturating_mul(args.ctx));
    }
    ensure!(
        args.ctx >= 2 && tokens.len() >= args.ctx,
        "--ctx {}: expected 2 to {}, the tokens of the text",
        args.ctx,
        tokens.len()
    );
    let windows: Vec<&[u32]> = tokens.chunks_exact(args.ctx).collect();

    let cells = read(&args, &loaded, &shapes, &windows)?;
    let rows = rows(&shapes, &cells);
    let broken = broken(&args, &shapes, &rows);
    let positions = cells[0].nll.len();
    let variant = chosen.map_or("dispatch".into(), |v| v.name().to_string());
    let machine = Machine::here();
    let document = json!({
        "model": loaded.name, "machine": { "cpu": machine.cpu, "os": machine.os, "threads": machine.threads },
        "date": machine.date, "windows": windows.len(), "ctx": args.ctx, "positions": positions,
        "activations": args.activations, "cache_type": args.cache_type_k.to_string(), "fused_variant": variant,
        "backend": "CPU",
        "limits": { "decode_ppl": args.max_decode_ppl, "prefill_ppl": args.max_prefill_ppl,
            "ratio": args.max_ratio, "kl_mean": args.max_kl },
        "rows": rows.iter().map(|r| r.json(&shapes)).collect::<Vec<_>>(), "broken": broken,
        "passed": broken.is_empty(),
    });
    let mut out = std::io::stdout().lock();
    if args.output == "json" {
        writeln!(out, "{}", serde_json::to_string_pretty(&document)?)?;
    } else {
        write!(out, "{}", markdown(&document))?;
    }
    out.flush()?;
    broken.iter().for_each(|line| eprintln!("regression: {line}"));
    Ok(if broken.is_empty() { Done::Ok } else { Done::Failed })
}

/// Every window in every mode and shape; cells by shape, then mode.
fn read(args: &Args, loaded: &Loaded, shapes: &[Shape], windows: &[&[u32]]) -> anyhow::Result<Vec<Cell>> {
    let bar = super::progress((windows.len() * shapes.len() * MODES) as u64, "regress {wide_bar} {pos}/{len} {eta}");
    let model = &loaded.model;
    let vocab = model.config().vocab;
    let activations = if args.activations == "q8" { Activations::Q8 } else { Activations::F32 };
    let cache = CacheTypes { k: args.cache_type_k, v: args.cache_type_k };
    let one = |window: &&[u32]| -> anyhow::Result<Vec<Cell>> {
        let mut state = model.state(1, args.ctx, cache)?;
        let mut cells = Vec::new();
        for shape in shapes {
            let mut base: Vec<f32> = Vec::new();
            for mode in 0..MODES {
                let fused_delta = FusedDelta::from_number(mode as u32).context("three modes")?;
                let options = Options { ubatch: shape.ubatch.min(shape.batch), fused_delta, activations };
                let begin = Instant::now();
                let logits = window_logits(model, &mut state, window, 0, shape.batch, &options)?;
                let mut cell = Cell { seconds: begin.elapsed().as_secs_f64(), ..Cell::default() };
                if mode == 0 {
                    base = logits.clone();
                }
                for ((row, base), &next) in logits.chunks_exact(vocab).zip(base.chunks_exact(vocab)).zip(&window[1..]) {
                    cell.nll.push(negative_log_likelihood(row, next)?);
                    // The same bits are no divergence at all; rounding of its sum would be.
                    cell.kl.push(if row == base { 0.0 } else { divergence(base, row) });
                    cell.agree += usize::from(top(base) == top(row));
                }
                cells.push(cell);
                bar.inc(1);
            }
        }
        Ok(cells)
    };
    let small = loaded.metadata.parameters() < SMALL;
    let parts: Vec<Vec<Cell>> = if small {
        windows.par_iter().map(one).collect::<anyhow::Result<_>>()?
    } else {
        windows.iter().map(one).collect::<anyhow::Result<_>>()?
    };
    bar.finish_and_clear();
    // Sums go over the windows in their order, whatever order they ran in.
    let mut all = vec![Cell::default(); shapes.len() * MODES];
    for (i, part) in parts.into_iter().flat_map(|cells| cells.into_iter().enumerate()) {
        let to = &mut all[i];
        to.nll.extend(part.nll);
        to.kl.extend(part.kl);
        to.agree += part.agree;
        to.seconds += part.seconds;
    }
    Ok(all)
}

fn rows(shapes: &[Shape], cells: &[Cell]) -> Vec<Row> {
    let sum = |values: &[f64]| {
        let mut sum = Sum::default();
        values.iter().for_each(|&v| sum.add(v));
        sum
    };
    let mut rows = Vec::new();
    for shape in 0..shapes.len() {
        let base = sum(&cells[shape * MODES].nll);
        for mode in 0..MODES {
            let cell = &cells[shape * MODES + mode];
            let (nll, kl) = (sum(&cell.nll), sum(&cell.kl));
            let mut sorted = cell.kl.clone();
            sorted.sort_by(f64::total_cmp);
            let at = (sorted.len() * 999).div_ceil(1000).saturating_sub(1);
            rows.push(Row {
                mode,
                shape,
                ppl: nll.perplexity(),
                error: nll.perplexity_error(),
                ratio: nll.perplexity() / base.perplexity(),
                kl_mean: kl.mean(),
                kl_error: kl.error(),
                kl_p999: sorted.get(at).copied().unwrap_or(f64::NAN),
                agreement: cell.agree as f64 / cell.nll.len() as f64,
                speed: cell.nll.len() as f64 / cell.seconds,
            });
        }
    }
    rows
}

/// One line for every threshold that does not hold; a NaN holds none.
fn broken(args: &Args, shapes: &[Shape], rows: &[Row]) -> Vec<String> {
    let mut lines = Vec::new();
    for row in rows {
        let shape = &shapes[row.shape];
        let what = format!("mode {}, {} (b {}, ub {})", row.mode, shape.name, shape.batch, shape.ubatch);
        let within = |value: f64, limit: f64| value <= limit;
        if !within(row.ppl, shape.limit) {
            lines.push(format!("{what}: perplexity {:.4}, limit {}", row.ppl, shape.limit));
        }
        if !within((row.ratio - 1.0).abs(), args.max_ratio) {
            lines.push(format!(
                "{what}: perplexity ratio to mode 0 is 1 {:+.2e}, limit ±{:.0e}",
                row.ratio - 1.0,
                args.max_ratio
            ));
        }
        if !within(row.kl_mean, args.max_kl) {
            lines
                .push(format!("{what}: mean KL divergence from mode 0 {:.2e}, limit {:.0e}", row.kl_mean, args.max_kl));
        }
    }
    let ratio = rows[0].ppl / rows[MODES].ppl;
    let near = (ratio - 1.0).abs() <= args.max_ratio;
    if !near {
        lines.push(format!(
            "mode 0: perplexity ratio of decode to prefill is 1 {:+.2e}, limit ±{:.0e}",
            ratio - 1.0,
            args.max_ratio
        ));
    }
    lines
}

impl Row {
    fn json(&self, shapes: &[Shape]) -> Value {
        let shape = &shapes[self.shape];
        json!({
            "mode": self.mode, "shape": shape.name, "n_batch": shape.batch, "n_ubatch": shape.ubatch, "ppl": self.ppl,
            "ppl_error": self.error, "ppl_ratio": self.ratio, "kl_mean": self.kl_mean, "kl_error": self.kl_error,
            "kl_p99_9": self.kl_p999, "top1_agreement": self.agreement, "tokens_per_second_and_thread": self.speed,
        })
    }
}

/// The document as a table and a verdict.
pub fn markdown(document: &Value) -> String {
    let text = |key: &str| document[key].as_str().unwrap_or_default();
    let mut out = format!(
        "{}: {} windows of {} tokens, {} positions; {} activations, {} cache, fused: {}; {}\n\n\
         | mode | shape   |    b |  ub |               PPL |   ratio − 1 |            mean KL |  KL p99.9 |   top-1 |\n\
         | ---: | ------- | ---: | --: | ----------------: | ----------: | -----------------: | --------: | ------: |\n",
        text("model"),
        document["windows"],
        document["ctx"],
        document["positions"],
        text("activations"),
        text("cache_type"),
        text("fused_variant"),
        document["machine"]["cpu"].as_str().unwrap_or_default()
    );
    for r in document["rows"].as_array().into_iter().flatten() {
        // JSON has no NaN: it is null there.
        let number = |key: &str| r[key].as_f64().unwrap_or(f64::NAN);
        let whole = |key: &str| r[key].as_u64().unwrap_or(0);
        // A String takes all that is written to it.
        let _ = writeln!(
            out,
            "| {:>4} | {:<7} | {:>4} | {:>3} | {:>8.4} ± {:<6.4} | {:>11.2e} | {:>8.1e} ± {:<7.0e} | {:>9.1e} | {:>6.2} % |",
            whole("mode"),
            r["shape"].as_str().unwrap_or_default(),
            whole("n_batch"),
            whole("n_ubatch"),
            number("ppl"),
            number("ppl_error"),
            number("ppl_ratio") - 1.0,
            number("kl_mean"),
            number("kl_error"),
            number("kl_p99_9"),
            100.0 * number("top1_agreement")
        );
    }
    let broken: Vec<&str> = document["broken"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    out += if broken.is_empty() { "\nevery threshold holds\n" } else { "\nbroken:\n" };
    broken.iter().for_each(|line| out += &format!("- {line}\n"));
    out
}
