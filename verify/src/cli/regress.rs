//! `qwen3next regress`: the delta rule's modes 0, 1 and 2 against each other on a text, decoded token by token and read as
//! a prompt. The fused modes may run on a device; mode 0, which all are compared with, is the CPU's.

use super::model::{self, Loaded};
use crate::Done;
use anyhow::{bail, ensure, Context};
use qwen3next_kernels::gated_delta::Op;
use qwen3next_kernels::{DType, Operator, Variant};
use qwen3next_model::forward::{Activations, FusedDelta, Options};
use qwen3next_model::perplexity::{divergence, negative_log_likelihood, top, window_logits, Sum};
use qwen3next_model::{CacheTypes, Model};
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
    #[command(flatten)]
    offload: model::Offload,
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

impl Shape {
    /// Reading a window of `ctx` tokens has the layers go through a single one.
    fn single(&self, ctx: usize) -> bool {
        // A window's last token is not read.
        let (read, ubatch) = (ctx - 1, self.ubatch.min(self.batch));
        let calls = [self.batch.min(read), read % self.batch];
        calls.into_iter().filter(|&tokens| tokens > 0).any(|tokens| ubatch.min(tokens) == 1 || tokens % ubatch == 1)
    }

    /// Why this mode can run on the CPU alone; `None`: every one of its delta rules is fused, and a device has those.
    fn unfused(&self, mode: usize, ctx: usize) -> Option<&'static str> {
        match mode {
            0 => Some("it is the unfused graph, which only the CPU has"),
            1 if self.single(ctx) => Some("single tokens go through the unfused graph, which only the CPU has"),
            _ => None,
        }
    }
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
    /// It ran on the device.
    on_device: bool,
    /// Why it did not, where there is one.
    why_cpu: Option<&'static str>,
}

const MODES: usize = 3;

/// Parameters of a model whose tokens are too little work to share: windows run side by side, each on a thread.
const SMALL: u64 = 64 << 20;

pub fn run(args: Args) -> anyhow::Result<Done> {
    match (&args.plugin, &args.child) {
        (Some(plugin), None) => {
            plugin.kind().map_err(anyhow::Error::msg)?;
            return super::plugin::again();
        }
        (_, Some(file)) => super::plugin::become_child(file)?,
        (None, None) => {}
    }
    let on_device = args.offload.gpu_layers != 0;
    ensure!(
        !on_device || (args.variant.is_none() && args.plugin.is_none()),
        "--gpu-layers {}: --variant and --plugin are kernels of the CPU, expected 0 with them",
        args.offload.gpu_layers
    );
    let text = match (&args.file, &args.model) {
        (Some(path), _) => super::read_text(path)?,
        (None, None) => qwen3next_model::embedded::HELD_OUT.to_string(),
        (None, Some(_)) => bail!("--file: expected a text to read with this model"),
    };
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("--threads")?;
    }
    let mut loaded = model::load(args.model.as_deref())?;
    // The same weights: what is in the file's memory map is there once.
    let mut there = Model::new(loaded.model.config().clone(), loaded.model.weights().clone());
    args.offload.upload(&mut there)?;
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
    let variant = chosen.map_or("dispatch", |v| v.name());
    let document = compare(&args, &loaded, on_device.then_some(&there), &text, variant)?;
    let mut out = std::io::stdout().lock();
    if args.output == "json" {
        writeln!(out, "{}", serde_json::to_string_pretty(&document)?)?;
    } else {
        write!(out, "{}", markdown(&document))?;
    }
    out.flush()?;
    let broken: Vec<&str> = document["broken"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    broken.iter().for_each(|line| eprintln!("regression: {line}"));
    Ok(if broken.is_empty() { Done::Ok } else { Done::Failed })
}

/// All modes and shapes on a text; `there` is the model with layers on the device.
fn compare(args: &Args, loaded: &Loaded, there: Option<&Model>, text: &str, variant: &str) -> anyhow::Result<Value> {
    let shapes = [
        Shape { name: "decode", batch: args.decode_b, ubatch: args.decode_ub, limit: args.max_decode_ppl },
        Shape { name: "prefill", batch: args.prefill_b, ubatch: args.prefill_ub, limit: args.max_prefill_ppl },
    ];
    let mut tokens = loaded.tokenizer()?.encode(text, false)?;
    super::expect_window(args.ctx, tokens.len())?;
    if let Some(n) = args.windows {
        tokens.truncate(n.saturating_mul(args.ctx));
    }
    let windows: Vec<&[u32]> = tokens.chunks_exact(args.ctx).collect();

    let cells = read(args, loaded, there, &shapes, &windows)?;
    let rows = rows(args, &shapes, &cells, there.is_some());
    let broken = broken(args, &shapes, &rows);
    let machine = Machine::here();
    let layers = loaded.model.config().layers.len();
    let on_device = there.map(|_| usize::try_from(args.offload.gpu_layers).unwrap_or(layers).min(layers));
    Ok(json!({
        "model": loaded.name, "machine": { "cpu": machine.cpu, "os": machine.os, "threads": machine.threads },
        "date": machine.date, "windows": windows.len(), "ctx": args.ctx, "positions": cells[0].nll.len(),
        "activations": args.activations, "cache_type": args.cache_type_k.to_string(), "fused_variant": variant,
        "backend": if there.is_some() { format!("{},CPU", args.offload.device) } else { "CPU".into() },
        "device": there.map(|_| args.offload.device_name()).transpose()?,
        "layers": layers, "layers_on_device": on_device.unwrap_or(0), "n_cpu_moe": args.offload.n_cpu_moe,
        "limits": { "decode_ppl": args.max_decode_ppl, "prefill_ppl": args.max_prefill_ppl,
            "ratio": args.max_ratio, "kl_mean": args.max_kl },
        "rows": rows.iter().map(|r| r.json(&shapes, args.offload.device)).collect::<Vec<_>>(), "broken": broken,
        "passed": broken.is_empty(),
    }))
}

/// Every window in every mode and shape; cells by shape, then mode.
fn read(
    args: &Args,
    loaded: &Loaded,
    there: Option<&Model>,
    shapes: &[Shape],
    windows: &[&[u32]],
) -> anyhow::Result<Vec<Cell>> {
    let bar = super::progress((windows.len() * shapes.len() * MODES) as u64, "regress {wide_bar} {pos}/{len} {eta}");
    let here = &loaded.model;
    let vocab = here.config().vocab;
    let activations = if args.activations == "q8" { Activations::Q8 } else { Activations::F32 };
    let cache = CacheTypes { k: args.cache_type_k, v: args.cache_type_k };
    let one = |window: &&[u32]| -> anyhow::Result<Vec<Cell>> {
        let mut state = here.state(1, args.ctx, cache)?;
        let mut state_there = there.map(|model| model.state(1, args.ctx, cache)).transpose()?;
        let mut cells = Vec::new();
        for shape in shapes {
            let mut base: Vec<f32> = Vec::new();
            for mode in 0..MODES {
                let fused_delta = FusedDelta::from_number(mode as u32).context("three modes")?;
                let mut options = Options { ubatch: shape.ubatch.min(shape.batch), fused_delta, activations };
                let (model, state) = match (there, &mut state_there) {
                    (Some(model), Some(state)) if shape.unfused(mode, args.ctx).is_none() => {
                        // Mode 1 without single tokens is mode 2.
                        options.fused_delta = FusedDelta::Always;
                        (model, state)
                    }
                    _ => (here, &mut state),
                };
                let begin = Instant::now();
                let logits = window_logits(model, state, window, 0, shape.batch, &options)?;
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
    // A device takes one window after the other.
    let side_by_side = loaded.metadata.parameters() < SMALL && there.is_none();
    let parts: Vec<Vec<Cell>> = if side_by_side {
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

fn rows(args: &Args, shapes: &[Shape], cells: &[Cell], device: bool) -> Vec<Row> {
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
            let why_cpu = shapes[shape].unfused(mode, args.ctx).filter(|_| device);
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
                on_device: device && why_cpu.is_none(),
                why_cpu,
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
        let place = if row.on_device { format!(" on the device ({})", args.offload.device) } else { String::new() };
        let what = format!("mode {}, {} (b {}, ub {}){place}", row.mode, shape.name, shape.batch, shape.ubatch);
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
    fn json(&self, shapes: &[Shape], device: model::Device) -> Value {
        let shape = &shapes[self.shape];
        json!({
            "mode": self.mode, "shape": shape.name, "n_batch": shape.batch, "n_ubatch": shape.ubatch, "ppl": self.ppl,
            "ppl_error": self.error, "ppl_ratio": self.ratio, "kl_mean": self.kl_mean, "kl_error": self.kl_error,
            "kl_p99_9": self.kl_p999, "top1_agreement": self.agreement, "tokens_per_second_and_thread": self.speed,
            "device": if self.on_device { device.to_string() } else { "CPU".into() }, "why_cpu": self.why_cpu,
        })
    }
}

/// The document as a table and a verdict.
pub fn markdown(document: &Value) -> String {
    let text = |key: &str| document[key].as_str().unwrap_or_default();
    let mut out = format!(
        "{}: {} windows of {} tokens, {} positions; {} activations, {} cache, fused: {}; {}",
        text("model"),
        document["windows"],
        document["ctx"],
        document["positions"],
        text("activations"),
        text("cache_type"),
        text("fused_variant"),
        document["machine"]["cpu"].as_str().unwrap_or_default()
    );
    // A String takes all that is written to it.
    if let Some(device) = document["device"].as_str() {
        let (n, layers) = (&document["layers_on_device"], &document["layers"]);
        let _ = write!(out, "; {n} of {layers} layers on: {device}, --n-cpu-moe {}", document["n_cpu_moe"]);
    }
    out += "\n\n\
        | mode | shape   |    b |  ub | device   |               PPL |   ratio − 1 |            mean KL |  KL p99.9 |   top-1 |\n\
        | ---: | ------- | ---: | --: | -------- | ----------------: | ----------: | -----------------: | --------: | ------: |\n";
    let rows = || document["rows"].as_array().into_iter().flatten();
    for r in rows() {
        // JSON has no NaN: it is null there.
        let number = |key: &str| r[key].as_f64().unwrap_or(f64::NAN);
        let whole = |key: &str| r[key].as_u64().unwrap_or(0);
        let _ = writeln!(
            out,
            "| {:>4} | {:<7} | {:>4} | {:>3} | {:<8} | {:>8.4} ± {:<6.4} | {:>11.2e} | {:>8.1e} ± {:<7.0e} | {:>9.1e} | \
             {:>6.2} % |",
            whole("mode"),
            r["shape"].as_str().unwrap_or_default(),
            whole("n_batch"),
            whole("n_ubatch"),
            r["device"].as_str().unwrap_or_default(),
            number("ppl"),
            number("ppl_error"),
            number("ppl_ratio") - 1.0,
            number("kl_mean"),
            number("kl_error"),
            number("kl_p99_9"),
            100.0 * number("top1_agreement")
        );
    }
    out.push('\n');
    for r in rows() {
        if let (Some(shape), Some(why)) = (r["shape"].as_str(), r["why_cpu"].as_str()) {
            let _ = writeln!(out, "mode {}, {shape}, ran on the CPU: {why}", r["mode"]);
        }
    }
    let broken: Vec<&str> = document["broken"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    out += if broken.is_empty() { "every threshold holds\n" } else { "broken:\n" };
    broken.iter().for_each(|line| out += &format!("- {line}\n"));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_tokens_are_foreseen() {
        for (batch, ubatch, ctx) in (1..7).flat_map(|b| (1..7).flat_map(move |u| (2..20).map(move |c| (b, u, c)))) {
            let read = vec![0; ctx - 1];
            let mut ubatches = read.chunks(batch).flat_map(|call| call.chunks(ubatch));
            let shape = Shape { name: "any", batch, ubatch, limit: 0.0 };
            assert_eq!(shape.single(ctx), ubatches.any(|u| u.len() == 1), "{batch} {ubatch} {ctx}");
        }
    }

    /// Few tokens of the embedded model with layers on the executor, whose weights are changed before.
    #[cfg(feature = "cuda-host")]
    fn on_the_executor(flags: &str, change: impl FnOnce(&mut qwen3next_model::Weights)) -> Value {
        use clap::Parser;
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let line =
            format!("regress -c 20 --windows 1 --max-decode-ppl 1e6 --max-prefill-ppl 1e6 --device executor {flags}");
        let args = Line::try_parse_from(line.split_whitespace()).unwrap().args;
        let loaded = model::load(None).unwrap();
        let mut weights = loaded.model.weights().clone();
        change(&mut weights);
        let mut there = Model::new(loaded.model.config().clone(), weights);
        args.offload.upload(&mut there).unwrap();
        compare(&args, &loaded, Some(&there), qwen3next_model::embedded::HELD_OUT, "dispatch").unwrap()
    }

    #[cfg(feature = "cuda-host")]
    #[test]
    fn a_device_agrees_with_the_cpus_unfused_graph() {
        let devices = |document: &Value| -> Vec<String> {
            let rows = document["rows"].as_array().unwrap();
            rows.iter().map(|r| r["device"].as_str().unwrap().to_string()).collect()
        };
        for flags in ["--gpu-layers -1", "--gpu-layers -1 --activations q8 --max-kl 1e-3 --max-ratio 1e-2"] {
            let document = on_the_executor(flags, |_| ());
            assert_eq!(document["passed"], true, "{document}");
            assert_eq!(devices(&document), ["CPU", "CPU", "executor", "CPU", "executor", "executor"]);
            let rows = document["rows"].as_array().unwrap();
            let kl = |i: usize| rows[i]["kl_mean"].as_f64().unwrap();
            // Equal bits would mean that it did not run.
            assert!(kl(1) == 0.0 && [2, 4, 5].into_iter().all(|i| kl(i) > 0.0), "{document}");
            assert_eq!(rows[4]["ppl"], rows[5]["ppl"]);
            assert!(rows[1]["why_cpu"].is_string() && rows[5]["why_cpu"].is_null(), "{document}");
            let text = markdown(&document);
            assert_eq!(text.lines().filter(|l| l.contains(" ran on the CPU: ")).count(), 3, "{text}");
            assert!(text.contains("layers on: host executor"), "{text}");
        }
        // A ubatch of one token at the end, and layers and experts on either side.
        let document = on_the_executor("--gpu-layers 2 --n-cpu-moe 3 --prefill-ub 6", |_| ());
        assert_eq!(document["passed"], true, "{document}");
        assert_eq!(devices(&document), ["CPU", "CPU", "executor", "CPU", "CPU", "executor"]);
        assert_eq!(document["layers_on_device"], 2);
    }

    /// A device that forgets the decay.
    #[cfg(feature = "cuda-host")]
    #[test]
    fn a_device_that_is_wrong_is_caught() {
        use qwen3next_model::weights::Mixer;
        let document = on_the_executor("--gpu-layers -1", |weights| {
            for layer in &mut weights.layers {
                if let Mixer::Delta(delta) = &mut layer.mixer {
                    delta.a.fill(0.0);
                }
            }
        });
        let broken: Vec<&str> = document["broken"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        for row in
            ["mode 2, decode (b 1, ub 1)", "mode 1, prefill (b 2048, ub 512)", "mode 2, prefill (b 2048, ub 512)"]
        {
            for what in ["perplexity ratio to mode 0", "mean KL divergence"] {
                let start = format!("{row} on the device (executor): {what}");
                assert!(broken.iter().any(|line| line.starts_with(&start)), "{start}: {broken:?}");
            }
        }
        assert_eq!(broken.len(), 6, "{broken:?}");
    }
}
