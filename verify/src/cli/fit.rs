//! `qwen3next fit`: what a model takes of a GPU and of the host, part by part, and how many layers' experts must stay on
//! the CPU.

use super::model;
use super::plot::{svg_of, Series};
use crate::Done;
use anyhow::{bail, ensure, Context};
use qwen3next_kernels::DType;
use qwen3next_model::forward::Activations;
use qwen3next_model::{CacheTypes, Config};
use qwen3next_verify::memory::{published, Plan, Sizes, Use};
use serde_json::{json, Value};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Args {
    /// GGUF file, Hugging Face folder, or a config.json alone; by default the shapes of the published 80B-A3B.
    #[arg(short, long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Type of the matrices, where there is only a config.
    #[arg(long, value_name = "TYPE")]
    quant: Option<String>,
    /// Tokens of the sequence.
    #[arg(short, long, default_value_t = 65_536, value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    ctx: u64,
    /// Memory of the GPU in GiB.
    #[arg(long, value_name = "GIB", default_value_t = 16.0)]
    vram: f64,
    /// Of it, what driver and libraries take, in GiB.
    #[arg(long, value_name = "GIB", default_value_t = 0.5)]
    reserve: f64,
    /// Layers on the GPU, the last ones first (-ngl); -1, or more than there are: all, and the output matrix.
    #[arg(long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    gpu_layers: i64,
    /// Layers whose experts stay on the CPU (-ncmoe): a number, or the smallest that fits.
    #[arg(long, value_name = "N|auto", default_value = "auto")]
    n_cpu_moe: String,
    /// Tokens that go through the layers together (-ub).
    #[arg(long, default_value_t = 512, value_parser = model::at_least_one)]
    ubatch: usize,
    /// Type of cached keys and values (-ctk).
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = model::cache_type)]
    cache_type_k: DType,
    /// What quantised weights meet: 8 bits a value or f32.
    #[arg(long, value_name = "q8|f32", default_value = "q8", value_parser = model::activations)]
    activations: Activations,
    #[command(flatten)]
    experts: model::Experts,
    /// A model of N layers out of the file's: its layers again and again.
    #[arg(long, value_name = "N", requires = "model")]
    repeat_layers: Option<usize>,
    /// Also draw the GPU's memory over --n-cpu-moe.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Format of the result.
    #[arg(short, long, default_value = "md", value_parser = ["md", "json"])]
    output: String,
}

const GIB: f64 = (1u64 << 30) as f64;

fn bytes(flag: &str, gib: f64) -> anyhow::Result<u64> {
    ensure!((0.0..=1e6).contains(&gib), "{flag} {gib}: expected GiB from 0 to a million");
    Ok((gib * GIB) as u64)
}

/// Sizes of a config without weights.
fn planned(name: &str, config: Config, quant: &Option<String>) -> anyhow::Result<(String, Config, Sizes)> {
    let quant = quant.as_deref().unwrap_or("q4_k");
    let dtype = DType::from_name(quant).filter(|t| !t.is_interleaved());
    let dtype = dtype.with_context(|| format!("--quant {quant}: expected a type such as q4_k, q8_0 or bf16"))?;
    let sizes = Sizes::planned(&config, dtype).map_err(|e| anyhow::anyhow!("--quant {quant}: {e}"))?;
    Ok((format!("{name} at {dtype}"), config, sizes))
}

fn sizes(args: &Args) -> anyhow::Result<(String, Config, Sizes)> {
    let Some(path) = &args.model else { return planned("80B-A3B", published(), &args.quant) };
    if path.extension().is_some_and(|e| e == "json") {
        if let Some(n) = args.repeat_layers {
            bail!("--repeat-layers {n}: {} has no weights, expected a GGUF file or a folder", path.display());
        }
        let config = Config::parse_json(path, &super::read_text(path)?)?;
        return planned(&path.display().to_string(), config, &args.quant);
    }
    if let Some(quant) = &args.quant {
        bail!("--quant {quant}: {} has weights, whose types count", path.display());
    }
    let loaded = model::load_with(Some(Path::new(path)), true, args.repeat_layers)?;
    let config = loaded.model.config().clone();
    let sizes = Sizes::of(loaded.model.weights(), &config);
    Ok((loaded.name, config, sizes))
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    let (vram, reserve) = (bytes("--vram", args.vram)?, bytes("--reserve", args.reserve)?);
    let plot = args.plot.as_deref().map(super::Output::create).transpose()?;
    let (name, config, sizes) = sizes(&args)?;
    let cache = CacheTypes { k: args.cache_type_k, v: args.cache_type_k };
    let of = Use {
        context: args.ctx as usize,
        ubatch: args.ubatch,
        cache,
        reserve,
        gpu_layers: usize::try_from(args.gpu_layers).unwrap_or(usize::MAX),
        streaming: args.experts.streaming(),
        quantize: args.activations == Activations::Q8,
        logits: 1,
    };
    let refused = |e: String| anyhow::anyhow!("{name}: {e}");
    let layers = sizes.layers.len();
    let smallest = Plan::smallest(&sizes, &config, &of, vram).map_err(refused)?;
    let plan = match args.n_cpu_moe.as_str() {
        "auto" => smallest.clone(),
        n => {
            let n = n.parse().ok().filter(|&n: &usize| n <= layers);
            let n = n.with_context(|| format!("--n-cpu-moe {}: expected auto or 0 to {layers}", args.n_cpu_moe))?;
            Some(Plan::new(&sizes, &config, &of, n).map_err(refused)?)
        }
    };
    let fits = plan.as_ref().is_some_and(|p| p.gpu() <= vram);
    // Where nothing fits, what it would take without any expert on the GPU is shown.
    let shown = match plan {
        Some(plan) => plan,
        None => Plan::new(&sizes, &config, &of, layers).map_err(refused)?,
    };
    let document = json!({
        "model": name, "ctx": args.ctx, "n_ubatch": args.ubatch,
        "n_gpu_layers": args.gpu_layers, "cache_type": args.cache_type_k.to_string(),
        "vram": vram, "fits": fits, "n_cpu_moe": shown.n_cpu_moe, "layers": layers,
        "smallest_n_cpu_moe": smallest.map(|p| p.n_cpu_moe), "gpu": shown.gpu(), "host": shown.host(),
        "weights": sizes.total(),
        "parts": shown.parts.iter().map(|p| json!({ "name": p.name, "gpu": p.gpu, "host": p.host })).collect::<Vec<_>>(),
        "gpu_by_n_cpu_moe": (0..=layers)
            .map(|n| Plan::new(&sizes, &config, &of, n).map(|p| p.gpu()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(refused)?,
    });
    if let Some(file) = plot {
        file.finish(draw(&document)?.as_bytes())?;
    }
    let mut out = std::io::stdout().lock();
    if args.output == "json" {
        writeln!(out, "{}", serde_json::to_string_pretty(&document)?)?;
    } else {
        write!(out, "{}", markdown(&document))?;
    }
    Ok(if fits { Done::Ok } else { Done::Failed })
}

/// The GPU's memory over --n-cpu-moe, beside what there is.
pub fn draw(document: &Value) -> anyhow::Result<String> {
    let gib = |v: &Value| v.as_f64().unwrap_or(0.0) / GIB;
    let list = document["gpu_by_n_cpu_moe"].as_array().map(Vec::as_slice).unwrap_or_default();
    let need = list.iter().enumerate().map(|(n, v)| (n as f64, gib(v))).collect::<Vec<_>>();
    let have = need.iter().map(|&(n, _)| (n, gib(&document["vram"]))).collect();
    let series = [Series { name: "needed".into(), points: need }, Series { name: "there is".into(), points: have }];
    let caption = format!("{}, {} tokens", document["model"].as_str().unwrap_or_default(), document["ctx"]);
    svg_of(&caption, "layers whose experts stay on the CPU", "GiB of the GPU", &series, false)
}

/// The document as a table and a verdict.
pub fn markdown(document: &Value) -> String {
    let number = |v: &Value| v.as_u64().unwrap_or(0);
    let gib = |v: &Value| number(v) as f64 / GIB;
    let text = |key: &str| document[key].as_str().unwrap_or_default();
    let mut out = format!(
        "{}: {} tokens of {} cache, ubatch {}, {:.2} GiB of GPU memory (a plan: bytes of the buffers, as the host executor's count has them)\n\n\
         | part | GPU bytes | GiB | host bytes |\n| --- | ---: | ---: | ---: |\n",
        text("model"),
        number(&document["ctx"]),
        text("cache_type"),
        number(&document["n_ubatch"]),
        gib(&document["vram"])
    );
    // A String takes all that is written to it.
    for part in document["parts"].as_array().into_iter().flatten() {
        let name = part["name"].as_str().unwrap_or_default();
        let _ = writeln!(
            out,
            "| {name} | {} | {:.2} | {} |",
            number(&part["gpu"]),
            gib(&part["gpu"]),
            number(&part["host"])
        );
    }
    let (gpu, host) = (&document["gpu"], &document["host"]);
    let _ = writeln!(out, "| all | {} | {:.2} | {} |\n", number(gpu), gib(gpu), number(host));
    let n = number(&document["n_cpu_moe"]);
    let _ = match (document["fits"].as_bool(), document["smallest_n_cpu_moe"].as_u64()) {
        (Some(true), Some(smallest)) => {
            let left = gib(&document["vram"]) - gib(gpu);
            writeln!(out, "--n-cpu-moe {n} fits, {left:.2} GiB are left; the smallest that fits is {smallest}")
        }
        (_, Some(smallest)) => writeln!(out, "--n-cpu-moe {n} does not fit; the smallest that does is {smallest}"),
        (_, None) => writeln!(out, "does not fit, even with all routed experts on the CPU"),
    };
    out
}
