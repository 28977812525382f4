//! `qwen3next bench model`: llama-bench's job, with its flags, its defaults and its output.

use super::run_model::{
    cpu_moe, fused_deltas, gpu_layers, main_type, model_size, numbers, Bench, Run, Setting, Work, ACTIVATIONS,
    FLASH_ATTN, MMAP, REPACK, TYPE_K, TYPE_V,
};
use crate::Done;
use anyhow::Context;
use qwen3next_model::config::Mlp;
use qwen3next_model::streaming::When;
use qwen3next_verify::peaks::{Peaks, Roof, Unit};
use qwen3next_verify::report::Machine;
use serde_json::{json, Value};
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// GGUF files or Hugging Face folders, separated by commas; by default the embedded model.
    #[arg(short, long, value_name = "MODEL", value_delimiter = ',')]
    model: Vec<PathBuf>,
    /// Tokens of a prompt; this and the other numbers: lists, ranges such as 128-512+128 or 1-8*2, and repeated flags
    /// make a matrix. 0: no such test. Default 512.
    #[arg(short = 'p', long, value_name = "N")]
    n_prompt: Vec<String>,
    /// Tokens generated. Default 128.
    #[arg(short = 'n', long, value_name = "N")]
    n_gen: Vec<String>,
    /// A prompt and a generation in one test (-pg). Repeatable.
    #[arg(long, value_name = "PP,TG")]
    prompt_gen: Vec<String>,
    /// Tokens in the sequence before. Default 0.
    #[arg(short = 'd', long, value_name = "N")]
    n_depth: Vec<String>,
    /// Tokens handed to the model in one call. Default 2048.
    #[arg(short, long, value_name = "N")]
    batch: Vec<String>,
    /// Tokens that go through the layers together (-ub). Default 512.
    #[arg(long, value_name = "N")]
    ubatch: Vec<String>,
    /// Threads; by default one a core.
    #[arg(short, long, value_name = "N")]
    threads: Vec<String>,
    /// Times each test is repeated.
    #[arg(short, long, default_value_t = 5, value_parser = super::model::at_least_one)]
    repetitions: usize,
    /// Flash attention (-fa): attention always is.
    #[arg(long, value_name = "0|1|on|off|auto")]
    flash_attn: Vec<String>,
    /// Layers on a GPU (-ngl).
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    gpu_layers: Vec<String>,
    /// Layers whose experts stay on the CPU (-ncmoe).
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    n_cpu_moe: Vec<String>,
    #[command(flatten)]
    on: super::model::OnDevice,
    /// A model of N layers out of a file with fewer: its layers again and again, each with its own memory on a GPU.
    #[arg(long, value_name = "N")]
    repeat_layers: Option<usize>,
    /// Weights in the file's memory map (-mmp).
    #[arg(long, value_name = "0|1")]
    mmap: Vec<String>,
    /// Run-time repacking of weights (-rtr).
    #[arg(long, value_name = "0|1")]
    run_time_repack: Vec<String>,
    /// What quantised weights meet: 8 bits a value or f32.
    #[arg(long, value_name = "q8|f32")]
    activations: Vec<String>,
    /// Type of cached keys (-ctk).
    #[arg(long, value_name = "TYPE")]
    cache_type_k: Vec<String>,
    /// Type of cached values (-ctv).
    #[arg(long, value_name = "TYPE")]
    cache_type_v: Vec<String>,
    /// Delta rule: 0 unfused, 1 fused for several tokens, 2 fused; 0,1,2 measures all.
    #[arg(long, value_name = "0|1|2")]
    fused_delta: Vec<String>,
    /// Skip the run before the first measured one.
    #[arg(long)]
    no_warmup: bool,
    /// Format of the result.
    #[arg(short, long, default_value = "md", value_parser = ["md", "json", "jsonl", "csv"])]
    output: String,
}

/// One test of the matrix.
struct Test {
    setting: Setting,
    prompt: usize,
    gen: usize,
    depth: usize,
}

/// Its result.
struct Result {
    /// llama-bench's fields in llama-bench's order, then ours.
    fields: Vec<(&'static str, Value)>,
    /// Cells of the markdown table by heading.
    cells: Vec<(&'static str, String)>,
}

/// Tokens a test may have.
const MOST: usize = 1 << 24;

impl Args {
    fn tests(&self) -> anyhow::Result<Vec<Test>> {
        let models: Vec<Option<PathBuf>> =
            if self.model.is_empty() { vec![None] } else { self.model.iter().cloned().map(Some).collect() };
        let prompts = numbers("-p", &self.n_prompt, &[512], 0, MOST)?;
        let gens = numbers("-n", &self.n_gen, &[128], 0, MOST)?;
        let depths = numbers("-d", &self.n_depth, &[0], 0, MOST)?;
        let mut both = Vec::new();
        for text in &self.prompt_gen {
            let pair = numbers("-pg", std::slice::from_ref(text), &[], 0, MOST);
            let pair = pair.ok().filter(|pair| pair.len() == 2 && !text.contains('-'));
            let pair =
                pair.with_context(|| format!("-pg {text}: expected tokens of prompt and generation as 512,128"))?;
            both.push((pair[0], pair[1]));
        }
        let wanted = prompts.iter().map(|&p| (p, 0)).chain(gens.iter().map(|&n| (0, n))).chain(both);
        let wanted: Vec<(usize, usize)> = wanted.filter(|(p, n)| p + n > 0).collect();
        let batches = numbers("-b", &self.batch, &[2048], 1, 1 << 20)?;
        let ubatches = numbers("-ub", &self.ubatch, &[512], 1, 1 << 20)?;
        let threads = numbers("-t", &self.threads, &[rayon::current_num_threads()], 1, 1024)?;
        let modes = fused_deltas(&self.fused_delta)?;
        let mut settings = vec![];
        for model in &models {
            settings.push(Setting {
                model: model.clone(),
                gpu_layers: String::new(),
                cpu_moe: String::new(),
                on: self.on.clone(),
                repeat_layers: self.repeat_layers,
                mmap: String::new(),
                repack: String::new(),
                activations: String::new(),
                type_k: String::new(),
                type_v: String::new(),
                flash_attn: String::new(),
                batch: 0,
                ubatch: 0,
                threads: 0,
                fused_delta: modes[0],
            });
        }
        /// Every setting with every value.
        fn each<T: Clone>(settings: Vec<Setting>, values: &[T], set: fn(&mut Setting, T)) -> Vec<Setting> {
            let mut all = Vec::new();
            for setting in settings {
                for value in values {
                    let mut one = setting.clone();
                    set(&mut one, value.clone());
                    all.push(one);
                }
            }
            all
        }
        // In llama-bench's order, which reloads a model as rarely as possible.
        settings = each(settings, &gpu_layers(&self.gpu_layers, self.on.device)?, |s, v| s.gpu_layers = v);
        settings = each(settings, &cpu_moe(&self.n_cpu_moe, self.on.device)?, |s, v| s.cpu_moe = v);
        settings = each(settings, &MMAP.parse(&self.mmap)?, |s, v| s.mmap = v);
        settings = each(settings, &REPACK.parse(&self.run_time_repack)?, |s, v| s.repack = v);
        settings = each(settings, &ACTIVATIONS.parse(&self.activations)?, |s, v| s.activations = v);
        settings = each(settings, &batches, |s, v| s.batch = v);
        settings = each(settings, &ubatches, |s, v| s.ubatch = v);
        settings = each(settings, &TYPE_K.parse(&self.cache_type_k)?, |s, v| s.type_k = v);
        if self.cache_type_v.is_empty() {
            settings.iter_mut().for_each(|s| s.type_v = s.type_k.clone());
        } else {
            settings = each(settings, &TYPE_V.parse(&self.cache_type_v)?, |s, v| s.type_v = v);
        }
        settings = each(settings, &FLASH_ATTN.parse(&self.flash_attn)?, |s, v| s.flash_attn = v);
        settings = each(settings, &modes, |s, v| s.fused_delta = v);
        settings = each(settings, &threads, |s, v| s.threads = v);
        let mut tests = Vec::new();
        for setting in settings {
            for &depth in &depths {
                for &(prompt, gen) in &wanted {
                    tests.push(Test { setting: setting.clone(), prompt, gen, depth });
                }
            }
        }
        Ok(tests)
    }
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    let tests = args.tests()?;
    super::bench::warn_of_others();
    let machine = Machine::here();
    let bar = super::progress((tests.len() * args.repetitions) as u64, "bench {wide_bar} {pos}/{len} {msg} {eta}");
    let mut out = std::io::stdout();
    let mut bench = Bench::default();
    let mut results: Vec<Result> = Vec::new();
    let columns = columns(&tests);
    for test in &tests {
        bar.set_message(test.name());
        let (mut run, peaks) = bench.run(&test.setting, test.prompt + test.gen + test.depth)?;
        let samples = test.measure(&mut run, args.repetitions, !args.no_warmup, || bar.inc(1))?;
        let result = test.result(&run, &samples, peaks, &machine);
        match args.output.as_str() {
            "md" => {
                if results.is_empty() {
                    header(&columns, &mut out)?;
                }
                row(&columns, &result, &mut out)?;
            }
            "csv" => {
                if results.is_empty() {
                    let names: Vec<&str> = result.fields.iter().map(|(name, _)| *name).collect();
                    writeln!(out, "{}", names.join(","))?;
                }
                let values: Vec<String> = result.fields.iter().map(|(_, value)| quoted(value)).collect();
                writeln!(out, "{}", values.join(","))?;
            }
            "jsonl" => writeln!(out, "{}", object(&result.fields, " "))?,
            _ => {}
        }
        results.push(result);
    }
    bar.finish_and_clear();
    match args.output.as_str() {
        "md" => writeln!(out, "\nbuild: {} ({})", env!("CARGO_PKG_VERSION"), BUILD_NUMBER)?,
        "json" => {
            let objects: Vec<String> = results.iter().map(|r| object(&r.fields, "\n    ")).collect();
            writeln!(out, "[\n  {}\n]", objects.join(",\n  "))?;
        }
        _ => {}
    }
    Ok(Done::Ok)
}

/// llama-bench's count of commits; this project counts versions.
const BUILD_NUMBER: u32 = 0;

impl Test {
    /// `pp512`, `tg128 @ d1024`.
    fn name(&self) -> String {
        let name = match (self.prompt, self.gen) {
            (p, 0) => format!("pp{p}"),
            (0, n) => format!("tg{n}"),
            (p, n) => format!("pp{p}+tg{n}"),
        };
        if self.depth > 0 {
            format!("{name} @ d{}", self.depth)
        } else {
            name
        }
    }

    /// Nanoseconds of every repetition.
    fn measure(&self, run: &mut Run, times: usize, warm_up: bool, done: impl Fn()) -> anyhow::Result<Vec<u64>> {
        if warm_up {
            run.clear()?;
            if self.prompt > 0 {
                run.prompt(self.prompt)?;
            }
            if self.gen > 0 {
                run.generate(1)?;
            }
        }
        let (mut samples, mut kept) = (Vec::new(), None);
        for _ in 0..times {
            run.depth(self.depth, &mut kept)?;
            let mut nanoseconds = 0;
            if self.prompt > 0 {
                nanoseconds += run.prompt(self.prompt)?;
            }
            if self.gen > 0 {
                nanoseconds += run.generate(self.gen)?;
            }
            samples.push(nanoseconds);
            done();
        }
        Ok(samples)
    }

    fn result(&self, run: &Run, samples: &[u64], peaks: &Peaks, machine: &Machine) -> Result {
        let (s, loaded) = (&self.setting, run.loaded);
        let tokens = (self.prompt + self.gen) as f64;
        let speeds: Vec<f64> = samples.iter().map(|&ns| 1e9 * tokens / ns as f64).collect();
        let times: Vec<f64> = samples.iter().map(|&ns| ns as f64).collect();
        let ((ns, ns_spread), (speed, spread)) = (mean(&times), mean(&speeds));
        let parameters = loaded.metadata.parameters();
        let size = model_size(loaded);
        let kind = describe(loaded);
        let filename = s.model.as_ref().map_or("embedded".into(), |p| p.display().to_string());
        let near = self.near(run, speed, size, peaks);

        let mut fields = vec![
            ("build_commit", json!(env!("CARGO_PKG_VERSION"))),
            ("build_number", json!(BUILD_NUMBER)),
            ("cpu_info", json!(machine.cpu)),
            ("gpu_info", json!("")),
            ("backends", json!(if s.on_gpu() { format!("{},CPU", s.on.device) } else { "CPU".into() })),
            ("model_filename", json!(filename)),
            ("model_type", json!(kind)),
            ("model_size", json!(size)),
            ("model_n_params", json!(parameters)),
            ("n_batch", json!(s.batch)),
            ("n_ubatch", json!(s.ubatch)),
            ("n_threads", json!(s.threads)),
            ("cpu_mask", json!("0x0")),
            ("cpu_strict", json!(false)),
            ("poll", json!(0)),
            ("type_k", json!(s.type_k)),
            ("type_v", json!(s.type_v)),
            ("n_gpu_layers", json!(s.gpu_layers.parse::<i64>().unwrap_or(0))),
            ("n_cpu_moe", json!(s.cpu_moe.parse::<i64>().unwrap_or(0))),
            ("split_mode", json!("layer")),
            ("main_gpu", json!(0)),
            ("no_kv_offload", json!(false)),
            ("flash_attn", json!(1)),
            ("devices", json!("auto")),
            ("tensor_split", json!("0.00")),
            ("tensor_buft_overrides", json!("none")),
            ("use_mmap", json!(s.mmap == "1")),
            ("embeddings", json!(false)),
            ("no_op_offload", json!(u8::from(s.on.experts.op_offload == When::Never))),
            ("no_host", json!(false)),
            ("repack", json!(s.repack == "1")),
            ("activations", json!(s.activations)),
            ("n_prompt", json!(self.prompt)),
            ("n_gen", json!(self.gen)),
            ("n_depth", json!(self.depth)),
            ("test_time", json!(Machine::here().date)),
            ("avg_ns", json!(ns.round() as u64)),
            ("stddev_ns", json!(ns_spread.round() as u64)),
            ("avg_ts", json!(speed)),
            ("stddev_ts", json!(spread)),
            ("samples_ns", json!(samples)),
            ("samples_ts", json!(speeds)),
            ("fused_delta", json!(s.fused_number())),
            ("only_active_experts", json!(!s.on.experts.no_offload_only_active_experts)),
            ("repeat_layers", json!(s.repeat_layers)),
        ];
        fields.extend(near.fields());
        let cells = vec![
            ("model", kind),
            ("size", in_units(size as f64, 1024.0, ["MiB", "GiB"])),
            ("params", in_units(parameters as f64, 1000.0, ["M", "B"])),
            ("backend", if s.on_gpu() { s.on.device.to_string() } else { "CPU".into() }),
            ("n_cpu_moe", s.cpu_moe.clone()),
            ("threads", s.threads.to_string()),
            ("n_batch", s.batch.to_string()),
            ("n_ubatch", s.ubatch.to_string()),
            ("type_k", s.type_k.clone()),
            ("type_v", s.type_v.clone()),
            ("rtr", s.repack.clone()),
            ("activations", s.activations.clone()),
            ("fused", s.fused_number().to_string()),
            ("test", self.name()),
            ("t/s", format!("{speed:.2} ± {spread:.2}")),
            ("of peak", near.cell()),
        ];
        Result { fields, cells }
    }

    /// How near the machine's roof the test came: reads for a generation, products for a prompt.
    fn near(&self, run: &Run, speed: f64, size: u64, peaks: &Peaks) -> Near {
        let work = Work::of(&run.loaded.model);
        let threads = self.setting.threads;
        match (self.prompt, self.gen) {
            _ if self.setting.on_gpu() => Near::Unknown,
            (0, n) => {
                let bytes = work.token_bytes(self.depth, n);
                // The tokens together go over the whole model: where that fits a cache, so do the reads.
                let roof = peaks.read(size as usize, threads);
                let name = if size as usize > qwen3next_verify::peaks::last_cache() { "memory" } else { "cache" };
                Near::Generation { bytes, roof, near: Roof { name, fraction: bytes * speed / roof } }
            }
            (p, 0) => {
                let ops = work.prompt_ops(p, self.setting.batch);
                let known = |unit| Some((unit, peaks.rate(unit, threads)?));
                let unit = if self.setting.activations == "f32" { Unit::F32 } else { work.unit() };
                let (unit, roof) = known(unit).or_else(|| known(Unit::F32)).unwrap_or((Unit::F32, f64::NAN));
                Near::Prompt { ops, roof, near: Roof { name: unit.name(), fraction: ops * speed / roof } }
            }
            _ => Near::Unknown,
        }
    }
}

/// A test against the machine's roofs.
enum Near {
    /// Bytes a token, bytes a second that this machine reads.
    Generation { bytes: f64, roof: f64, near: Roof },
    /// Operations a token, operations a second that this machine does.
    Prompt { ops: f64, roof: f64, near: Roof },
    /// Two bounds in one time, or layers on a device, whose roofs are not the CPU's.
    Unknown,
}

impl Near {
    fn fields(&self) -> Vec<(&'static str, Value)> {
        let (bytes, ops, roof, near) = match *self {
            Near::Generation { bytes, roof, near } => (Some(bytes), None, Some(roof), Some(near)),
            Near::Prompt { ops, roof, near } => (None, Some(ops), Some(roof), Some(near)),
            Near::Unknown => (None, None, None, None),
        };
        vec![
            ("bytes_per_token", json!(bytes.map(f64::round))),
            ("ops_per_token", json!(ops.map(f64::round))),
            ("peak", json!(near.map(|n| n.name))),
            ("peak_per_second", json!(roof)),
            ("peak_fraction", json!(near.map(|n| n.fraction))),
        ]
    }

    fn cell(&self) -> String {
        match *self {
            Near::Generation { bytes, near, .. } => {
                format!("{} a token, {}", in_units(bytes, 1000.0, ["MB", "GB"]), super::bench_op::percent(near))
            }
            Near::Prompt { ops, near, .. } => {
                format!("{} a token, {}", in_units(ops, 1000.0, ["MOP", "GOP"]), super::bench_op::percent(near))
            }
            Near::Unknown => "–".into(),
        }
    }
}

/// Mean and standard deviation (of a sample).
pub fn mean(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (mean, if values.len() > 1 { (squares / (n - 1.0)).sqrt() } else { 0.0 })
}

/// `qwen3next 80B.A3B Q4_K`.
pub fn describe(loaded: &super::model::Loaded) -> String {
    let total = loaded.metadata.parameters() as f64;
    let short = |n: f64| if n >= 1e9 { format!("{:.0}B", n / 1e9) } else { format!("{:.0}M", n / 1e6) };
    let (config, weights) = (loaded.model.config(), loaded.model.weights());
    let size = if config.mlp.contains(&Mlp::Moe) {
        // Of the embedding a token needs a row.
        let work = Work::of(&loaded.model);
        let active = (work.ops + work.head_ops) / 2.0 + weights.token_embd.cols() as f64;
        format!("{}.A{}", short(total), short(active))
    } else {
        short(total)
    };
    format!("qwen3next {size} {}", main_type(loaded))
}

/// Two decimals in the smaller of two units, or from a thousand of them on in the larger.
fn in_units(n: f64, thousand: f64, [small, large]: [&str; 2]) -> String {
    let n = n / (thousand * thousand);
    if n < thousand {
        format!("{n:.2} {small}")
    } else {
        format!("{:.2} {large}", n / thousand)
    }
}

/// A column of the markdown table: heading and width, negative where it is flush left.
struct Column(&'static str, i32);

/// llama-bench's columns: always these, and what differs from the defaults.
fn columns(tests: &[Test]) -> Vec<Column> {
    let varied = |of: fn(&Setting) -> String, default: &str| tests.iter().any(|t| of(&t.setting) != default);
    let usual = super::model::fused_delta(None).unwrap_or_default();
    let all = [
        (true, Column("model", -30)),
        (true, Column("size", 10)),
        (true, Column("params", 10)),
        (true, Column("backend", -10)),
        (varied(|s| s.cpu_moe.clone(), "0"), Column("n_cpu_moe", 10)),
        (true, Column("threads", 7)),
        (varied(|s| s.batch.to_string(), "2048"), Column("n_batch", 7)),
        (varied(|s| s.ubatch.to_string(), "512"), Column("n_ubatch", 8)),
        (varied(|s| s.type_k.clone(), "f32"), Column("type_k", 6)),
        (varied(|s| s.type_v.clone(), "f32"), Column("type_v", 6)),
        (varied(|s| s.repack.clone(), "0"), Column("rtr", 3)),
        (varied(|s| s.activations.clone(), "q8"), Column("activations", 11)),
        (tests.iter().any(|t| t.setting.fused_delta != usual), Column("fused", 5)),
        (true, Column("test", 15)),
        (true, Column("t/s", 20)),
        (true, Column("of peak", 30)),
    ];
    all.into_iter().filter(|(shown, _)| *shown).map(|(_, column)| column).collect()
}

fn header(columns: &[Column], out: &mut impl Write) -> std::io::Result<()> {
    line(columns, |c| c.0.to_string(), out)?;
    let rule = |c: &Column| {
        let dashes = "-".repeat(c.1.unsigned_abs() as usize - 1);
        format!("{dashes}{}", if c.1 > 0 { ":" } else { "-" })
    };
    line(columns, rule, out)
}

fn row(columns: &[Column], result: &Result, out: &mut impl Write) -> std::io::Result<()> {
    let cell =
        |c: &Column| result.cells.iter().find(|(name, _)| *name == c.0).map_or(String::new(), |(_, v)| v.clone());
    line(columns, cell, out)?;
    out.flush()
}

fn line(columns: &[Column], cell: impl Fn(&Column) -> String, out: &mut impl Write) -> std::io::Result<()> {
    write!(out, "|")?;
    for c in columns {
        let width = c.1.unsigned_abs() as usize;
        match c.1 < 0 {
            true => write!(out, " {:<width$} |", cell(c))?,
            false => write!(out, " {:>width$} |", cell(c))?,
        }
    }
    writeln!(out)
}

/// A JSON object whose fields keep their order, each after `gap`.
fn object(fields: &[(&'static str, Value)], gap: &str) -> String {
    let fields: Vec<String> = fields.iter().map(|(name, value)| format!("{gap}\"{name}\": {value}")).collect();
    let end = if gap.starts_with('\n') { "\n  " } else { " " };
    format!("{{{}{end}}}", fields.join(","))
}

/// A CSV field as llama-bench writes it.
fn quoted(value: &Value) -> String {
    let text = match value {
        Value::String(s) => s.clone(),
        Value::Bool(b) => u8::from(*b).to_string(),
        Value::Null => String::new(),
        Value::Array(list) => list.iter().map(Value::to_string).collect::<Vec<_>>().join(" "),
        other => other.to_string(),
    };
    format!("\"{}\"", text.replace('"', "\"\""))
}
