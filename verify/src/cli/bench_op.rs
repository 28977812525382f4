//! `qwen3next bench op`: the variants of an operator side by side, on inputs they have just been verified on.

use super::bench_peers::Peers;
use crate::Done;
use anyhow::{bail, ensure, Context};
use qwen3next_kernels::{Exec, Isa, Operator, Variant};
use qwen3next_verify::cases::attention::KvType;
use qwen3next_verify::cases::gated_delta::Dtype;
use qwen3next_verify::cases::norm::Kind;
use qwen3next_verify::cases::quant::{Form, Type};
use qwen3next_verify::compare::{Failure, Metrics};
use qwen3next_verify::peaks::{Peaks, Roof};
use qwen3next_verify::plugin::Plugin;
use qwen3next_verify::timed::{
    attention, causal_conv, gated_delta, layer, matmul, moe, norm, quant, rope, solve_tri, Timed,
};
use qwen3next_verify::timing::{interleaved, Time};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

#[derive(clap::Args)]
pub struct Args {
    /// Operator, as `verify --op` names it.
    op: String,
    /// Where variants run: the CPU's on the CPU, or the CUDA kernels on a GPU (feature cuda), timed by events on arguments
    /// that lie there.
    #[arg(long, default_value = "cpu", value_enum)]
    backend: Backend,
    /// With --backend cuda: leave the L2 cache as the launch before left it, instead of flushing it before each.
    #[arg(long)]
    warm: bool,
    /// With --backend cuda: also what torch, flash-linear-attention, flashinfer and causal-conv1d offer, where python3 has
    /// them, each verified first (benches/peers/cuda_ops.py).
    #[arg(long)]
    peers: bool,
    /// Only these variants, separated by commas; the first one is the base of the ratios.
    #[arg(long, value_delimiter = ',')]
    variant: Vec<String>,
    /// Also time this kernel from a shared library, as in `verify --plugin`. Repeatable.
    #[arg(long, value_name = "LIBRARY:SYMBOL")]
    plugin: Vec<Plugin>,
    /// Tokens of a call, separated by commas (solve_tri: triangles; quantize, dequantize: rows).
    #[arg(long, value_delimiter = ',')]
    tokens: Vec<usize>,
    /// gated_delta: key and value heads, 16/32; attention: query and KV heads, 16/2.
    #[arg(long, value_name = "HK/HV")]
    heads: Option<String>,
    /// gated_delta: sequences of a call, of --tokens each.
    #[arg(long, default_value_t = 1, value_parser = super::model::at_least_one)]
    batch: usize,
    /// Channels of a head: gated_delta 128, attention 256.
    #[arg(long)]
    dim: Option<usize>,
    /// Sizes, separated by commas: causal_conv CxW, norm KIND:HxD, rope HxDxR, solve_tri NxM or inverse:N, attention KEYS,
    /// attention_merge PARTS, quantize and dequantize N, matmul NxK, moe_route and moe_group E/K, moe_up and moe_down
    /// E/K:FxD, gather, add and kv_store N, delta_gates HKxHV, row_gate D. By default those of the 80B-A3B model.
    #[arg(long, value_delimiter = ',')]
    shape: Vec<String>,
    /// Types of weights or cache, separated by commas; gated_delta: of q, k, v and o, f32 or for CUDA kernels bf16, f16.
    #[arg(long, value_delimiter = ',')]
    dtype: Vec<String>,
    /// Threads.
    #[arg(short, long, default_value_t = 1, value_parser = super::model::threads)]
    threads: usize,
    /// Samples of every variant and length, interleaved; of slow ones fewer. By default 7; on a GPU, where one is a launch,
    /// 100.
    #[arg(short, long, value_parser = super::model::at_least_one)]
    repetitions: Option<usize>,
    /// Also draw tokens per second over tokens.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// How activations and quantised weights meet in matmul, moe_up and moe_down: f32 or 8-bit activations, rows or
    /// interleaved rows.
    #[arg(long, default_value_t = Form::Q8R16)]
    form: Form,
    /// Format of the table.
    #[arg(short, long, default_value = "md", value_parser = ["md", "json", "csv"])]
    output: String,
    /// Run in this process and report into this file.
    #[arg(long, value_name = "FILE", hide = true)]
    child: Option<PathBuf>,
    /// The device of --backend cuda, once it is open.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    #[arg(skip)]
    device: Option<&'static qwen3next_kernels::device::Device>,
    /// Those of --peers, once they are found.
    #[arg(skip)]
    others: Option<Peers>,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Backend {
    Cpu,
    Cuda,
}

/// One line of the table.
pub struct Line {
    op: &'static str,
    variant: &'static str,
    dtype: String,
    shape: String,
    tokens: usize,
    threads: usize,
    time: Time,
    /// Median time of the first variant over this one's.
    ratio: f64,
    gflops: f64,
    gbs: f64,
    roof: Roof,
    metrics: Metrics,
    /// Seconds a launch in a graph of many, on a device that was kept warm.
    in_graph: Option<f64>,
    /// `None`: the CPU.
    device: Option<Rc<OnDevice>>,
}

/// What lines measured on a device have in common.
struct OnDevice {
    name: String,
    driver: String,
    /// GB/s of a copy within it.
    copy: f64,
    /// Seconds between two events with nothing in between.
    empty: f64,
    warm: bool,
}

/// A call to time.
struct Point<T> {
    tokens: usize,
    shape: String,
    dtype: String,
    make: Box<dyn Fn() -> anyhow::Result<T>>,
}

pub fn run(#[allow(unused_mut)] mut args: Args) -> anyhow::Result<Done> {
    for (flag, given) in [("--warm", args.warm), ("--peers", args.peers)] {
        ensure!(args.backend == Backend::Cuda || !given, "{flag}: is for --backend cuda");
    }
    if args.backend == Backend::Cuda {
        ensure!(args.plugin.is_empty(), "--plugin: runs on the CPU, not with --backend cuda");
        args.lines(true)?;
        #[cfg(feature = "cuda")]
        let missing = super::verify::gpu().map(|gpu| args.device = Some(gpu)).err();
        #[cfg(not(feature = "cuda"))]
        let missing = Some("built without the feature cuda");
        if let Some(why) = missing {
            return skipped(&args.output, &why);
        }
        if args.peers {
            args.others = Some(Peers::find(args.sizes_of_heads()?)?);
        }
    }
    if !args.plugin.is_empty() {
        for plugin in &args.plugin {
            plugin.kind().map_err(anyhow::Error::msg)?;
        }
        // A kernel that crashes takes only a child down.
        let Some(file) = &args.child else {
            args.lines(true)?;
            return super::plugin::again();
        };
        super::plugin::become_child(file)?;
    }
    args.lines(true)?;
    let plot_to = args.plot.as_deref().map(super::Output::create).transpose()?;
    super::bench::warn_of_others();
    let lines = args.lines(false)?;
    let notes = args.others.as_ref().map(Peers::notes).unwrap_or_default();
    if args.output == "csv" {
        notes.iter().for_each(|note| eprintln!("{note}"));
    }
    let out = &mut std::io::stdout().lock();
    match args.output.as_str() {
        "md" => {
            table(&lines, out)?;
            if args.peers {
                writeln!(
                    out,
                    "with a type in brackets: others' code, on inputs of that type, which agreed with float64 in the same run; \
                     GB/s count its own bytes"
                )?;
            }
            for note in &notes {
                writeln!(out, "{note}")?;
            }
        }
        "csv" => {
            writeln!(
                out,
                "op,variant,dtype,shape,tokens,threads,median_s,min_s,samples,ratio,gflops,gbs,peak_fraction,peak,row_l2"
            )?;
            for l in &lines {
                writeln!(
                    out,
                    "{},{},{},{},{},{},{:e},{:e},{},{:.4},{:.3},{:.3},{:.4},{},{:e}",
                    l.op,
                    l.variant,
                    l.dtype,
                    l.shape,
                    l.tokens,
                    l.threads,
                    l.time.median,
                    l.time.min,
                    l.time.samples,
                    l.ratio,
                    l.gflops,
                    l.gbs,
                    l.roof.fraction,
                    l.roof.name,
                    l.metrics.row_l2
                )?;
            }
        }
        _ => {
            let rows: Vec<_> = lines
                .iter()
                .map(|l| {
                    let mut row = json!({
                        "op": l.op, "variant": l.variant, "dtype": l.dtype, "shape": l.shape, "tokens": l.tokens,
                        "threads": l.threads, "median_s": l.time.median, "min_s": l.time.min,
                        "samples": l.time.samples, "ratio": l.ratio, "gflops": l.gflops, "gbs": l.gbs,
                        "peak_fraction": l.roof.fraction, "peak": l.roof.name,
                        "row_l2": l.metrics.row_l2, "bound_multiple": l.metrics.bound_multiple,
                    });
                    if let Some(on) = &l.device {
                        row["device"] = json!(on.name);
                        row["driver"] = json!(on.driver);
                        row["copy_gbs"] = json!(on.copy);
                        row["empty_s"] = json!(on.empty);
                        row["warm"] = json!(on.warm);
                        row["graph_s"] = json!(l.in_graph);
                    }
                    row
                })
                .chain(notes.iter().map(|note| note.json(&args.op)))
                .collect();
            writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
        }
    }
    if let Some(file) = plot_to {
        plot(&args.op, &lines, file)?;
    }
    Ok(Done::Ok)
}

/// One line where there is no GPU; a document that is read by programs is empty.
fn skipped(output: &str, why: &impl std::fmt::Display) -> anyhow::Result<Done> {
    match output {
        "md" => writeln!(std::io::stdout(), "SKIPPED cuda: {why}")?,
        other => {
            eprintln!("SKIPPED cuda: {why}");
            if other == "json" {
                writeln!(std::io::stdout(), "[]")?;
            }
        }
    }
    Ok(Done::Ok)
}

/// The delta rule's variants on one thread, in the 80B-A3B model's heads.
pub fn delta_rule(tokens: &[usize], samples: usize) -> anyhow::Result<Vec<Line>> {
    let points = tokens.iter().map(|&t| delta_point(1, t, 16, 32, 128, Dtype::F32)).collect();
    measure(points, &chosen::<qwen3next_kernels::gated_delta::Op>(&[])?, 1, samples)
}

fn delta_point(b: usize, t: usize, hk: usize, hv: usize, d: usize, dtype: Dtype) -> Point<gated_delta::GatedDelta> {
    let make = Box::new(move || Ok(gated_delta::GatedDelta::batch(b, t, hk, hv, d, dtype)));
    let batch = if b == 1 { String::new() } else { format!("{b} of ") };
    Point { tokens: t, shape: format!("{batch}{hk}/{hv}x{d}"), dtype: dtype.to_string(), make }
}

/// The numbers of a shape `AxB`, `A/B:CxD` ..., whose separators are those of `form`.
fn sizes<const N: usize>(flag: &str, text: &str, form: &str) -> anyhow::Result<[usize; N]> {
    let separators = |s: &str| s.chars().filter(|c| "x/:".contains(*c)).collect::<String>();
    let parts = || text.split(['x', '/', ':']).map(|n| n.parse::<usize>().ok().filter(|n| (1..=1 << 24).contains(n)));
    let numbers: Option<Vec<usize>> = parts().collect();
    let fits = separators(text) == separators(form);
    match numbers.filter(|_| fits).and_then(|n| <[usize; N]>::try_from(n).ok()) {
        // Products of all sizes are elements of an array.
        Some(n) if n.iter().try_fold(1usize, |all, &n| all.checked_mul(n)).is_some_and(|n| n <= 1 << 40) => Ok(n),
        _ => bail!("{flag} {text}: expected {form}, whole numbers from 1"),
    }
}

impl Args {
    /// Measures what was asked for; `only_check`: refuses what can't be, and measures nothing.
    fn lines(&self, only_check: bool) -> anyhow::Result<Vec<Line>> {
        if let Some(t) = self.tokens.iter().find(|t| !(1..=1 << 16).contains(*t)) {
            bail!("--tokens {t}: expected 1 to 65536");
        }
        if self.op != "gated_delta" {
            self.takes_no(&[("--batch", self.batch != 1)])?;
        }
        match self.op.as_str() {
            "gated_delta" => {
                self.takes_no(&[("--shape", !self.shape.is_empty())])?;
                let dtypes = self.token_types()?;
                let [hk, hv] = sizes("--heads", self.heads.as_deref().unwrap_or("16/32"), "HK/HV")?;
                ensure!(hv % hk == 0 && hv <= 1024, "--heads {hk}/{hv}: expected HV a multiple of HK, up to 1024");
                let d = self.dim(128, 1024)?;
                let tokens = self.tokens(&[1, 16, 64, 256, 512]);
                let b = self.batch;
                let fits =
                    b.checked_mul(hv * d * d).is_some_and(|n| n <= 1 << 30) && tokens.iter().all(|t| b * t <= 1 << 19);
                ensure!(fits, "--batch {b}: expected up to 524288 tokens in all, and states of up to 2^30 elements");
                let each = dtypes.iter().flat_map(|dtype| tokens.iter().map(move |t| (*t, *dtype)));
                self.measure(only_check, each.map(|(t, dtype)| delta_point(b, t, hk, hv, d, dtype)).collect())
            }
            "solve_tri" => {
                self.no_heads()?;
                self.only_f32()?;
                let points = self.points(&[64], &["64x128", "inverse:64"], &["f32"], |t, shape, _| {
                    let (n, m) = match shape.strip_prefix("inverse:") {
                        Some(n) => (sizes::<1>("--shape", n, "N")?[0], None),
                        None => {
                            let [n, m] = sizes("--shape", shape, "NxM")?;
                            (n, Some(m))
                        }
                    };
                    ensure!(n <= 256 && m.unwrap_or(1) <= 1 << 14, "--shape {shape}: expected N up to 256, M to 16384");
                    Ok(Box::new(move || Ok(solve_tri::SolveTri::new(t, n, m))))
                })?;
                self.measure(only_check, points)
            }
            "causal_conv" => {
                self.no_heads()?;
                self.only_f32()?;
                let points = self.points(&[1, 512], &["8192x4"], &["f32"], |t, shape, _| {
                    let [c, width] = sizes("--shape", shape, "CxW")?;
                    ensure!(
                        c <= 1 << 20 && (2..=16).contains(&width),
                        "--shape {shape}: expected C to 1048576, W 2 to 16"
                    );
                    Ok(Box::new(move || Ok(causal_conv::CausalConv::new(t, c, width))))
                })?;
                self.measure(only_check, points)
            }
            "norm" => {
                self.no_heads()?;
                self.only_f32()?;
                let shapes = ["rms:1x2048", "gated:32x128", "l2:16x128"];
                let points = self.points(&[1, 512], &shapes, &["f32"], |t, shape, _| {
                    let (kind, size) = shape.split_once(':').unwrap_or(("rms", shape));
                    let kind: Kind = kind.parse().map_err(|e| anyhow::anyhow!("--shape {shape}: {e}"))?;
                    let [h, d] = sizes("--shape", size, "HxD")?;
                    ensure!(h * d <= 1 << 20, "--shape {shape}: expected H times D to 1048576");
                    Ok(Box::new(move || Ok(norm::Norm::new(kind, t, h, d))))
                })?;
                self.measure(only_check, points)
            }
            "rope" => {
                self.no_heads()?;
                self.only_f32()?;
                let points = self.points(&[1, 512], &["16x256x64"], &["f32"], |t, shape, _| {
                    let [h, d, r] = sizes("--shape", shape, "HxDxR")?;
                    let fits = h * d <= 1 << 20 && r <= d && r % 2 == 0;
                    ensure!(fits, "--shape {shape}: expected an even R up to D, H times D to 1048576");
                    Ok(Box::new(move || Ok(rope::Rope::new(t, h, d, r))))
                })?;
                self.measure(only_check, points)
            }
            "attention" => {
                let [hq, hkv] = self.query_heads()?;
                let d = self.dim(256, 512)?;
                let points = self.points(&[1, 128], &["2048"], &["f16"], |t, shape, dtype| {
                    let [keys] = sizes("--shape", shape, "KEYS")?;
                    let kv: KvType = dtype.parse().map_err(|e| anyhow::anyhow!("--dtype {dtype}: {e}"))?;
                    ensure!(kv != KvType::Q8_0 || d % 32 == 0, "--dim {d}: expected a multiple of q8_0's block of 32");
                    ensure!(keys <= 1 << 20, "--shape {shape}: expected up to 1048576 keys");
                    let sizes = attention::Sizes { t, s: keys.max(t), hq, hkv, d };
                    Ok(Box::new(move || Ok(attention::Attention::new(sizes, kv)?)))
                })?;
                self.measure(only_check, points)
            }
            "attention_merge" => {
                self.only_f32()?;
                let ([hq, _], d) = (self.query_heads()?, self.dim(256, 512)?);
                let points = self.points(&[1, 8], &["8"], &["f32"], |t, shape, _| {
                    let [parts] = sizes("--shape", shape, "PARTS")?;
                    ensure!(parts <= 1 << 12, "--shape {shape}: expected up to 4096 parts");
                    Ok(Box::new(move || Ok(attention::Merge::new(parts, t, hq, d))))
                })?;
                self.measure(only_check, points)
            }
            "dequantize" => {
                self.no_heads()?;
                let points = self.points(&[512], &["2048"], &["q8_0", "q4_k"], |rows, shape, dtype| {
                    let ([n], dtype) = (sizes("--shape", shape, "N")?, weight_type(dtype)?);
                    whole_blocks(shape, n, dtype)?;
                    Ok(Box::new(move || Ok(quant::Dequantize::new(rows, n, dtype))))
                })?;
                self.measure(only_check, points)
            }
            "quantize" => {
                self.no_heads()?;
                let points = self.points(&[64], &["2048"], &["q8_0", "q4_k"], |rows, shape, dtype| {
                    let ([n], dtype) = (sizes("--shape", shape, "N")?, weight_type(dtype)?);
                    whole_blocks(shape, n, dtype)?;
                    Ok(Box::new(move || Ok(quant::Quantize::new(rows, n, dtype))))
                })?;
                self.measure(only_check, points)
            }
            "gather" => {
                self.no_heads()?;
                let points = self.points(&[1, 512], &["2048"], &["q8_0", "q4_k", "f32"], |t, shape, dtype| {
                    let ([n], dtype) = (sizes("--shape", shape, "N")?, weight_type(dtype)?);
                    whole_blocks(shape, n, dtype)?;
                    Ok(Box::new(move || Ok(layer::Gather::new(t, n, dtype))))
                })?;
                self.measure(only_check, points)
            }
            "add" => {
                self.no_heads()?;
                self.only_f32()?;
                let points = self.points(&[1, 512], &["2048"], &["f32"], |t, shape, _| {
                    let [n] = sizes("--shape", shape, "N")?;
                    ensure!(n <= 1 << 20, "--shape {shape}: expected N to 1048576");
                    Ok(Box::new(move || Ok(layer::Add::new(t, n))))
                })?;
                self.measure(only_check, points)
            }
            "delta_gates" => {
                self.no_heads()?;
                self.only_f32()?;
                let points = self.points(&[1, 512], &["16x32"], &["f32"], |t, shape, _| {
                    let [hk, hv] = sizes("--shape", shape, "HKxHV")?;
                    ensure!(hv % hk == 0 && hv <= 1024, "--shape {shape}: expected HV a multiple of HK, up to 1024");
                    Ok(Box::new(move || Ok(layer::Gates::new(t, hk, hv))))
                })?;
                self.measure(only_check, points)
            }
            "kv_store" => {
                self.no_heads()?;
                let points = self.points(&[1, 512], &["512"], &["f16", "q8_0"], |t, shape, dtype| {
                    let [n] = sizes("--shape", shape, "N")?;
                    let kv: KvType = dtype.parse().map_err(|e| anyhow::anyhow!("--dtype {dtype}: {e}"))?;
                    let whole = kv != KvType::Q8_0 || n % 32 == 0;
                    ensure!(whole, "--shape {shape}: expected a multiple of q8_0's block of 32");
                    ensure!(n <= 1 << 20, "--shape {shape}: expected N to 1048576");
                    Ok(Box::new(move || Ok(layer::Store::new(t, n, kv))))
                })?;
                self.measure(only_check, points)
            }
            "row_gate" => {
                self.no_heads()?;
                self.only_f32()?;
                let points = self.points(&[1, 512], &["2048"], &["f32"], |t, shape, _| {
                    let [d] = sizes("--shape", shape, "D")?;
                    ensure!(d <= 1 << 20, "--shape {shape}: expected D to 1048576");
                    Ok(Box::new(move || Ok(layer::Gate::new(t, d))))
                })?;
                self.measure(only_check, points)
            }
            "matmul" => {
                self.no_heads()?;
                let form = self.form;
                // Projections of both layer kinds; the head, which only the last token needs.
                let shapes = ["8192x2048", "2048x4096", HEAD];
                let points = self.points(&[1, 64], &shapes, &["q4_k"], |m, shape, dtype| {
                    let ([n, k], dtype) = (sizes("--shape", shape, "NxK")?, weight_type(dtype)?);
                    whole_blocks(shape, k, dtype)?;
                    ensure!(n * k <= 1 << 33, "--shape {shape}: expected N times K to 2^33");
                    Ok(Box::new(move || matmul::Matmul::new(m, n, k, dtype, form).map_err(failed)))
                })?;
                let asked = !self.shape.is_empty() || !self.tokens.is_empty();
                self.measure(
                    only_check,
                    points.into_iter().filter(|p| asked || p.shape != HEAD || p.tokens == 1).collect(),
                )
            }
            "moe_route" => {
                let points = self.experts("E/K", &[1, 512], &["f32"], |sizes, _| Ok(moe::Route::new(sizes)))?;
                self.measure(only_check, points)
            }
            "moe_group" => {
                let points = self.experts("E/K", &[1, 512], &["f32"], |sizes, _| Ok(moe::Group::new(sizes)))?;
                self.measure(only_check, points)
            }
            "moe_up" => {
                let form = self.form;
                let make = move |sizes, dtype: &str| moe::Up::new(sizes, weight_type(dtype)?, form).map_err(failed);
                let points = self.experts("E/K:FxD", &[1, 64], &["q4_k"], make)?;
                self.measure(only_check, points)
            }
            "moe_down" => {
                let form = self.form;
                let make = move |sizes, dtype: &str| moe::Down::new(sizes, weight_type(dtype)?, form).map_err(failed);
                let points = self.experts("E/K:FxD", &[1, 64], &["q4_k"], make)?;
                self.measure(only_check, points)
            }
            other => {
                let known = qwen3next_verify::cases::all();
                let known: Vec<&str> = known.iter().map(|e| e.op).filter(|op| *op != "model").collect();
                bail!("bench op {other}: expected one of {}", known.join(", "))
            }
        }
    }

    fn takes_no(&self, flags: &[(&str, bool)]) -> anyhow::Result<()> {
        match flags.iter().find(|(_, given)| *given) {
            Some((flag, _)) => bail!("{flag}: {} takes none", self.op),
            None => Ok(()),
        }
    }

    fn no_heads(&self) -> anyhow::Result<()> {
        self.takes_no(&[("--heads", self.heads.is_some()), ("--dim", self.dim.is_some())])
    }

    fn only_f32(&self) -> anyhow::Result<()> {
        match self.dtype.iter().find(|d| *d != "f32") {
            Some(dtype) => bail!("--dtype {dtype}: expected f32, which is what {} takes", self.op),
            None => Ok(()),
        }
    }

    /// Those of gated_delta's tokens.
    fn token_types(&self) -> anyhow::Result<Vec<Dtype>> {
        let kernels = self.backend == Backend::Cuda
            || !self.variant.is_empty() && self.variant.iter().all(|name| name.contains("cuda"));
        let parsed = |name: &String| -> anyhow::Result<Dtype> {
            let dtype = name.parse().map_err(|e| anyhow::anyhow!("--dtype {name}: {e}"))?;
            ensure!(
                kernels || dtype == Dtype::F32,
                "--dtype {name}: expected f32, or the CUDA kernels of --backend cuda"
            );
            Ok(dtype)
        };
        match self.dtype.is_empty() {
            true => Ok(vec![Dtype::F32]),
            false => self.dtype.iter().map(parsed).collect(),
        }
    }

    fn query_heads(&self) -> anyhow::Result<[usize; 2]> {
        let [hq, hkv] = sizes("--heads", self.heads.as_deref().unwrap_or("16/2"), "HQ/HKV")?;
        ensure!(hq % hkv == 0 && hq <= 1024, "--heads {hq}/{hkv}: expected HQ a multiple of HKV, up to 1024");
        Ok([hq, hkv])
    }

    /// What a peer's case holds beside its shape.
    fn sizes_of_heads(&self) -> anyhow::Result<serde_json::Value> {
        Ok(match self.op.as_str() {
            "gated_delta" => json!({ "batch": self.batch }),
            "attention" => {
                let [hq, hkv] = self.query_heads()?;
                json!({ "heads": format!("{hq}/{hkv}"), "dim": self.dim(256, 512)? })
            }
            _ => json!({}),
        })
    }

    fn dim(&self, default: usize, most: usize) -> anyhow::Result<usize> {
        let d = self.dim.unwrap_or(default);
        ensure!((1..=most).contains(&d), "--dim {d}: expected 1 to {most}");
        Ok(d)
    }

    fn tokens(&self, default: &[usize]) -> Vec<usize> {
        if self.tokens.is_empty() {
            default.to_vec()
        } else {
            self.tokens.clone()
        }
    }

    /// Every shape, type and number of tokens.
    fn points<T>(
        &self,
        tokens: &[usize],
        shapes: &[&str],
        dtypes: &[&str],
        point: impl Fn(usize, &str, &str) -> anyhow::Result<Box<dyn Fn() -> anyhow::Result<T>>>,
    ) -> anyhow::Result<Vec<Point<T>>> {
        let or = |given: &[String], default: &[&str]| match given {
            [] => default.iter().map(|s| s.to_string()).collect(),
            given => given.to_vec(),
        };
        let mut points = Vec::new();
        for shape in or(&self.shape, shapes) {
            for dtype in or(&self.dtype, dtypes) {
                for tokens in self.tokens(tokens) {
                    let make = point(tokens, &shape, &dtype)?;
                    points.push(Point { tokens, shape: shape.clone(), dtype: dtype.clone(), make });
                }
            }
        }
        Ok(points)
    }

    /// The points of a step of the sparse feed-forward.
    fn experts<T: 'static>(
        &self,
        form: &str,
        tokens: &[usize],
        dtypes: &[&str],
        make: impl Fn(moe::Sizes, &str) -> anyhow::Result<T> + Copy + 'static,
    ) -> anyhow::Result<Vec<Point<T>>> {
        self.no_heads()?;
        let full = form.contains(':');
        if !full {
            self.only_f32()?;
        }
        let shape = if full { "512/10:512x2048" } else { "512/10" };
        self.points(tokens, &[shape], dtypes, |t, shape, dtype| {
            let [e, top_k, f, d] = match full {
                true => sizes("--shape", shape, form)?,
                false => {
                    let [e, top_k] = sizes("--shape", shape, form)?;
                    [e, top_k, 1, 1]
                }
            };
            ensure!(top_k <= e && e <= 65536, "--shape {shape}: expected K up to E, E to 65536");
            ensure!(e * f * d <= 1 << 32, "--shape {shape}: expected E times F times D to 2^32");
            if full {
                let dtype = weight_type(dtype)?;
                whole_blocks(shape, f, dtype)?;
                whole_blocks(shape, d, dtype)?;
            }
            let (sizes, dtype) = (moe::Sizes { t, e, top_k, d, f }, dtype.to_string());
            Ok(Box::new(move || make(sizes, &dtype)))
        })
    }

    fn measure<T: Timed + Send>(&self, only_check: bool, points: Vec<Point<T>>) -> anyhow::Result<Vec<Line>> {
        if self.backend == Backend::Cuda && only_check {
            return Ok(Vec::new());
        }
        #[cfg(any(feature = "cuda", feature = "cuda-host"))]
        if let Some(device) = self.device {
            let samples = self.repetitions.unwrap_or(100);
            return measure_on(device, points, &self.variant, samples, self.warm, self.others.as_ref());
        }
        let mut variants = chosen::<T::Op>(&self.variant)?;
        if only_check {
            return Ok(Vec::new());
        }
        variants.extend(load(&self.plugin)?);
        measure(points, &variants, self.threads, self.repetitions.unwrap_or(7))
    }
}

/// Rows of the output projection.
const HEAD: &str = "151936x2048";

fn failed(failure: Failure) -> anyhow::Error {
    anyhow::anyhow!("{failure}")
}

fn weight_type(name: &str) -> anyhow::Result<Type> {
    name.parse().map_err(|e| anyhow::anyhow!("--dtype {name}: {e}"))
}

fn whole_blocks(shape: &str, n: usize, dtype: Type) -> anyhow::Result<()> {
    let block = dtype.dtype().block();
    ensure!(n % block == 0, "--shape {shape}: {n} is no multiple of {dtype}'s block of {block}");
    Ok(())
}

/// The variants of these names, in their order; all available ones where no name is given, but for those of the host
/// executor, whose times say nothing.
fn chosen<O: Operator>(names: &[String]) -> anyhow::Result<Vec<Variant<O>>> {
    let all = O::variants();
    if names.is_empty() {
        return Ok(all.into_iter().filter(|v| v.isa().available() && v.isa() != Isa::CUDA_HOST).collect());
    }
    names
        .iter()
        .map(|name| {
            let known = || all.iter().map(|v| v.name()).collect::<Vec<_>>().join(", ");
            let found =
                Variant::by_name(name).with_context(|| format!("--variant {name}: expected one of {}", known()))?;
            ensure!(found.isa().available(), "--variant {name}: needs {}, which this CPU lacks", found.isa());
            Ok(found)
        })
        .collect()
}

/// The variants of these libraries, each with a name of its own.
fn load<O: Operator>(plugins: &[Plugin]) -> anyhow::Result<Vec<Variant<O>>> {
    let mut variants: Vec<Variant<O>> = Vec::new();
    for plugin in plugins {
        // SAFETY: whoever names a library on the command line wants it run; what it is, is theirs to know.
        let variant = unsafe { plugin.load::<O>() }.map_err(anyhow::Error::msg)?;
        if variants.iter().any(|v| v.name() == variant.name()) {
            bail!("--plugin {plugin}: a second variant named {}", variant.name());
        }
        variants.push(variant);
    }
    Ok(variants)
}

/// Verifies and times the variants at every point.
fn measure<T: Timed + Send>(
    points: Vec<Point<T>>,
    variants: &[Variant<T::Op>],
    threads: usize,
    samples: usize,
) -> anyhow::Result<Vec<Line>> {
    let op = T::Op::NAME;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().context("--threads")?;
    let bar = super::progress(points.len() as u64, "bench {wide_bar} {pos}/{len} {msg}");
    let peaks = Peaks::new();
    let mut lines = Vec::new();
    for Point { tokens, shape, dtype, make } in points {
        bar.set_message(format!("{op} {shape} {dtype}, {tokens} tokens"));
        let mut timed = make()?;
        let mut metrics = Vec::new();
        let again = format!("qwen3next bench op {op}, {tokens} tokens of {shape} {dtype}");
        for v in variants {
            super::plugin::announce(v.name(), v.isa(), &format!("while it was verified for {again}"));
            let wrong = |e: Failure| super::Wrong(format!("{} is wrong, so it is not timed: {e}", v.name()));
            metrics.push(timed.verify(v).map_err(wrong)?);
        }
        super::plugin::announce("a variant", Isa::SCALAR, &format!("while all were timed for {again}"));
        let execs: Vec<Exec<T::Op>> = variants.iter().map(|v| Exec::variant(*v).parts(threads)).collect();
        let least = Duration::from_millis(4);
        let times = pool.install(|| interleaved(variants.len(), samples, least, |i| timed.run(&execs[i])));
        let times = times.map_err(|e| anyhow::anyhow!("{e}"))?;
        let work = timed.work();
        for ((v, time), metrics) in variants.iter().zip(&times).zip(metrics) {
            lines.push(Line {
                op,
                variant: v.name(),
                dtype: dtype.clone(),
                shape: shape.clone(),
                tokens,
                threads,
                time: *time,
                ratio: times[0].median / time.median,
                gflops: work.ops / time.median / 1e9,
                gbs: work.bytes / time.median / 1e9,
                roof: peaks.roof(timed.unit(v), work.ops, work.bytes, time.median, threads),
                metrics,
                in_graph: None,
                device: None,
            });
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(lines)
}

/// Verifies the kernels of that device at every point, of these names or all, and times their launches; then the others.
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
fn measure_on<T: Timed>(
    device: &'static qwen3next_kernels::device::Device,
    points: Vec<Point<T>>,
    names: &[String],
    samples: usize,
    warm: bool,
    others: Option<&Peers>,
) -> anyhow::Result<Vec<Line>> {
    let op = T::Op::NAME;
    let times: &'static _ = Box::leak(Box::new(qwen3next_kernels::device::Times::new(samples, !warm)));
    let kernels: Vec<_> =
        Variant::<T::Op>::staged(device).into_iter().zip(Variant::staged_timed(device, times)).collect();
    ensure!(!kernels.is_empty(), "bench op {op}: has no CUDA kernel");
    let known = || kernels.iter().map(|(v, _)| v.name()).collect::<Vec<_>>().join(", ");
    let named = |name: &String| {
        let found = kernels.iter().find(|(v, _)| v.name() == name);
        found.copied().with_context(|| format!("--variant {name}: expected one of {}", known()))
    };
    let chosen = if names.is_empty() { kernels.clone() } else { names.iter().map(named).collect::<Result<_, _>>()? };
    let limits = device.limits()?;
    let on = Rc::new(OnDevice {
        name: device.name()?,
        driver: device.driver()?,
        copy: limits.copy / 1e9,
        empty: limits.empty / 1e9,
        warm,
    });
    let bar = super::progress(points.len() as u64, "bench {wide_bar} {pos}/{len} {msg}");
    let mut lines: Vec<Line> = Vec::new();
    for Point { tokens, shape, dtype, make } in points {
        bar.set_message(format!("{op} {shape} {dtype}, {tokens} tokens"));
        let (mut timed, first) = (make()?, lines.len());
        let work = timed.work();
        for (judged, launched) in &chosen {
            let wrong = |e: Failure| super::Wrong(format!("{} is wrong, so it is not timed: {e}", judged.name()));
            let metrics = timed.verify(judged).map_err(wrong)?;
            timed.run(&Exec::variant(*launched)).map_err(failed)?;
            let mut seconds: Vec<f64> = times.take().into_iter().map(|ns| ns / 1e9).collect();
            seconds.sort_by(f64::total_cmp);
            let (Some(&min), Some(&median)) = (seconds.first(), seconds.get(seconds.len() / 2)) else {
                bail!("{}: was not launched for {tokens} tokens of {shape}", judged.name());
            };
            let gbs = work.bytes / median / 1e9;
            lines.push(Line {
                op,
                variant: judged.name(),
                dtype: dtype.clone(),
                shape: shape.clone(),
                tokens,
                threads: 0,
                time: Time { median, min, samples: seconds.len() },
                ratio: lines.get(first).map_or(median, |l| l.time.median) / median,
                gflops: work.ops / median / 1e9,
                gbs,
                roof: Roof { name: "copy", fraction: gbs / on.copy },
                metrics,
                in_graph: times.take_in_graph().map(|ns| ns / 1e9),
                device: Some(on.clone()),
            });
        }
        for row in others.map(|o| o.measure([op, &shape, &dtype], tokens, samples, warm)).unwrap_or_default() {
            let (min, median) = (row.seconds[0], row.seconds[row.seconds.len() / 2]);
            let gbs = row.bytes / median / 1e9;
            lines.push(Line {
                op,
                variant: row.name.leak(),
                dtype: row.dtype,
                shape: shape.clone(),
                tokens,
                threads: 0,
                time: Time { median, min, samples: row.seconds.len() },
                ratio: lines[first].time.median / median,
                gflops: work.ops / median / 1e9,
                gbs,
                roof: Roof { name: "copy", fraction: gbs / on.copy },
                metrics: row.metrics,
                in_graph: row.in_graph,
                device: Some(on.clone()),
            });
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(lines)
}

/// A markdown table.
pub fn table(lines: &[Line], out: &mut impl Write) -> anyhow::Result<()> {
    let op = lines.first().map_or("", |l| l.op);
    let width = lines.iter().map(|l| l.variant.len()).max().unwrap_or(0).max(op.len());
    // A column more where launches ran in a graph too.
    let graphs = lines.iter().any(|l| l.in_graph.is_some());
    let more = |text: String| if graphs { format!(" {text:>10} |") } else { String::new() };
    let (title, rule) = (more("graph µs".into()), more("---------:".into()));
    let shape_width = lines.iter().map(|l| l.shape.len()).max().unwrap_or(0).max(5);
    writeln!(
        out,
        "| {op:<width$} | {:<shape_width$} | {:<5} | {:>6} | {:>10} | {:>10} | {:>7} | {:>9} | {:>7} | {:>14} | {:>12} |{title}",
        "shape", "dtype", "tokens", "median µs", "min µs", "speed", "GFLOP/s", "GB/s", "of peak", "worst row L2"
    )?;
    writeln!(
        out,
        "| {:-<width$} | {:-<shape_width$} | ----- | {:->5}: | {:->9}: | {:->9}: | {:->6}: | {:->8}: | {:->6}: | {:->13}: | {:->11}: |{rule}",
        "", "", "", "", "", "", "", "", "", ""
    )?;
    for l in lines {
        let graph = more(l.in_graph.map_or(String::new(), |seconds| format!("{:.1}", seconds * 1e6)));
        writeln!(
            out,
            "| {:<width$} | {:<shape_width$} | {:<5} | {:>6} | {:>10.1} | {:>10.1} | {:>6.2}× | {:>9.2} | {:>7.2} | {:>14} | {:>12.1e} |{graph}",
            l.variant,
            l.shape,
            l.dtype,
            l.tokens,
            l.time.median * 1e6,
            l.time.min * 1e6,
            l.ratio,
            l.gflops,
            l.gbs,
            percent(l.roof),
            l.metrics.row_l2
        )?;
    }
    if let Some((on, first)) = lines.first().and_then(|l| Some((l.device.as_ref()?, l.variant))) {
        writeln!(
            out,
            "{}, {}; times of launches between events, {}; between two events alone: {:.1} µs\n\
             speed: against {first}, medians; of peak: of the {:.0} GB/s that a copy within the device reached in the same run",
            on.name,
            on.driver,
            if on.warm { "one after the other" } else { "the L2 cache flushed before each" },
            on.empty * 1e6,
            on.copy,
        )?;
        if graphs {
            writeln!(out, "graph: a launch of many that ran as one captured graph, their gaps included")?;
        }
        return Ok(());
    }
    writeln!(
        out,
        "speed: against {}, medians of one interleaved run; of peak: of what this machine reached in the same run, in the \
         nearer of arithmetic and reading",
        lines.first().map_or("", |l| l.variant)
    )?;
    Ok(())
}

/// `63.0 % memory`.
pub fn percent(roof: Roof) -> String {
    format!("{:.1} % {}", 100.0 * roof.fraction, roof.name)
}

/// Tokens per second over tokens, one line a variant, shape and type, both axes logarithmic.
fn plot(op: &str, lines: &[Line], file: super::Output) -> anyhow::Result<()> {
    let many = |of: fn(&Line) -> &str| lines.iter().any(|l| of(l) != of(&lines[0]));
    let (shapes, dtypes) = (many(|l| &l.shape), many(|l| &l.dtype));
    let name = |l: &Line| {
        let mut name = l.variant.to_string();
        for (_, part) in [(shapes, &l.shape), (dtypes, &l.dtype)].into_iter().filter(|(more, _)| *more) {
            name = format!("{name} {part}");
        }
        name
    };
    let mut series: Vec<super::plot::Series> = Vec::new();
    for l in lines {
        let (name, point) = (name(l), (l.tokens as f64, l.tokens as f64 / l.time.median));
        match series.iter_mut().find(|s| s.name == name) {
            Some(s) => s.points.push(point),
            None => series.push(super::plot::Series { name, points: vec![point] }),
        }
    }
    let caption = format!("{op}: tokens per second by variant");
    file.finish(super::plot::svg(&caption, "tokens of a call", &series)?.as_bytes())
}

#[cfg(all(test, feature = "cuda-host"))]
mod tests {
    use super::*;
    use qwen3next_kernels::device::Device;

    /// The path of a GPU; the times are the executor's.
    #[test]
    fn kernels_are_timed_on_a_device() -> anyhow::Result<()> {
        let device: &'static Device = Box::leak(Box::new(Device::executor()));
        let points = || vec![delta_point(2, 3, 1, 2, 32, Dtype::F32), delta_point(1, 1, 1, 2, 32, Dtype::BF16)];
        let lines = measure_on(device, points(), &[], 3, false, None)?;
        let kernels = Variant::<qwen3next_kernels::gated_delta::Op>::staged(device);
        assert_eq!(lines.len(), 2 * kernels.len());
        for line in &lines {
            assert!(line.time.min > 0.0 && line.time.median >= line.time.min && line.time.samples <= 3);
            assert!(line.roof.fraction > 0.0 && line.metrics.bound_multiple <= 1.0);
        }
        assert_eq!((lines[0].shape.as_str(), lines[0].ratio), ("2 of 1/2x32", 1.0));
        assert_eq!(lines.iter().filter(|l| l.dtype == "bf16").count(), kernels.len());
        // Bytes at the same time: q, k, two heads of v and o in 2 bytes an element, g and β, the states in and out.
        let bytes = (2 * (2 * 32 + 2 * 64) + 4 * (2 + 2) + 2 * 4 * 2 * 32 * 32) as f64;
        let last = &lines[lines.len() - 1];
        assert!((last.gbs * last.time.median * 1e9 / bytes - 1.0).abs() < 1e-6, "{}", last.gbs);
        let mut text = Vec::new();
        table(&lines, &mut text)?;
        let text = String::from_utf8(text)?;
        assert!(text.contains("% copy") && text.contains("host executor, no driver"), "{text}");

        let one = kernels[0].name().to_string();
        let warm = measure_on(device, points(), &[one], 1, true, None)?;
        assert!(warm.len() == 2 && warm.iter().all(|l| l.in_graph.is_some_and(|seconds| seconds > 0.0)));
        let mut text = Vec::new();
        table(&warm, &mut text)?;
        assert!(String::from_utf8(text)?.contains("graph: a launch of many"));
        let unknown = measure_on(device, points(), &["none".to_string()], 1, true, None);
        assert!(unknown.err().unwrap().to_string().contains("--variant none: expected one of"));
        Ok(())
    }

    /// Others' rows stand under ours, against the first of ours at the same point.
    #[cfg(unix)]
    #[test]
    fn peers_stand_in_the_table() -> anyhow::Result<()> {
        let device: &'static Device = Box::leak(Box::new(Device::executor()));
        let kernel = Variant::<qwen3next_kernels::gated_delta::Op>::staged(device)[0].name().to_string();
        let (_file, others) = super::super::bench_peers::tests::fake(
            r#"echo '{"timed": {"peer": "slow (bf16)", "dtype": "bf16", "seconds": [9, 8], "graph_s": 7, "bytes": 16e9,' \
            '"row_l2": 0.01, "limit": 0.05}}'"#,
        );
        let points = vec![delta_point(1, 1, 1, 2, 32, Dtype::F32), delta_point(2, 1, 1, 2, 32, Dtype::F32)];
        let lines = measure_on(device, points, &[kernel], 1, true, Some(&others))?;
        let named: Vec<_> = lines.iter().map(|l| (l.variant.contains("slow"), l.shape.as_str())).collect();
        let (one, two) = ("1/2x32", "2 of 1/2x32");
        assert_eq!(named, [(false, one), (true, one), (false, two), (true, two)]);
        let (ours, slow) = (&lines[2], &lines[3]);
        assert_eq!((slow.time.median, slow.time.min, slow.time.samples, slow.gbs), (9.0, 8.0, 2, 16.0 / 9.0));
        assert_eq!((slow.ratio, slow.dtype.as_str(), slow.in_graph), (ours.time.median / 9.0, "bf16", Some(7.0)));
        assert!(others.notes().is_empty(), "{:?}", others.notes());
        let mut text = Vec::new();
        table(&lines, &mut text)?;
        let text = String::from_utf8(text)?;
        assert!(text.lines().any(|l| l.starts_with("| slow (bf16)") && l.contains("9000000.0")), "{text}");
        Ok(())
    }

    /// The script's own words, with what torch can do on a CPU.
    #[test]
    #[ignore = "python3 has to have torch"]
    fn torch_stands_in_the_table() -> anyhow::Result<()> {
        let device: &'static Device = Box::leak(Box::new(Device::executor()));
        let kernel = Variant::<qwen3next_kernels::gated_delta::Op>::staged(device)[0].name().to_string();
        let others = super::super::bench_peers::tests::on_cpu()?;
        let lines =
            measure_on(device, vec![delta_point(1, 3, 1, 2, 32, Dtype::F32)], &[kernel], 2, false, Some(&others))?;
        let mut text = Vec::new();
        table(&lines, &mut text)?;
        println!("{}{:?}", String::from_utf8(text)?, others.notes());
        assert_eq!(lines.iter().map(|l| l.variant).skip(1).collect::<Vec<_>>(), ["torch chunks (f32)"]);
        assert!(lines[1].metrics.bound_multiple < 0.1 && lines[1].roof.fraction > 0.0);
        Ok(())
    }
}
