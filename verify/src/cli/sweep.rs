//! `qwen3next sweep`: a long prompt and some tokens after it, over a grid of batch and ubatch sizes and threads.

use super::bench_model::{describe, mean};
use super::plot::{svg, Series};
use super::run_model::{
    cpu_moe, fused_deltas, gpu_layers, numbers, Bench, Setting, ACTIVATIONS, FLASH_ATTN, MMAP, REPACK, TYPE_K, TYPE_V,
};
use crate::Done;
use anyhow::ensure;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// GGUF file or Hugging Face folder; by default the embedded model.
    #[arg(short, long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Tokens of the prompt.
    #[arg(short = 'p', long, value_name = "N", default_value_t = 8192, value_parser = super::model::at_least_one)]
    n_prompt: usize,
    /// Tokens generated after it.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 32, value_parser = super::model::at_least_one)]
    n_gen: usize,
    /// Tokens handed to the model in one call: a list or ranges, as in `bench model`. Default 2048,3072.
    #[arg(short, long, value_name = "LIST")]
    batch: Vec<String>,
    /// Tokens that go through the layers together (-ub); those above the batch are left out. Default
    /// 128,256,512,768,1024.
    #[arg(long, value_name = "LIST")]
    ubatch: Vec<String>,
    /// Threads; by default one a core.
    #[arg(short, long, value_name = "LIST")]
    threads: Vec<String>,
    /// Times the grid is gone through.
    #[arg(short, long, default_value_t = 2, value_parser = super::model::at_least_one)]
    repetitions: usize,
    /// Layers whose experts stay on the CPU (-ncmoe).
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    n_cpu_moe: Option<String>,
    /// Layers on a GPU (-ngl).
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    gpu_layers: Option<String>,
    #[command(flatten)]
    on: super::model::OnDevice,
    /// Flash attention (-fa): attention always is.
    #[arg(long, value_name = "0|1|on|off|auto")]
    flash_attn: Option<String>,
    /// Weights in the file's memory map (-mmp).
    #[arg(long, value_name = "0|1")]
    mmap: Option<String>,
    /// What quantised weights meet: 8 bits a value or f32.
    #[arg(long, value_name = "q8|f32")]
    activations: Option<String>,
    /// Run-time repacking of weights (-rtr).
    #[arg(long, value_name = "0|1")]
    run_time_repack: Option<String>,
    /// Type of cached keys (-ctk).
    #[arg(long, value_name = "TYPE")]
    cache_type_k: Option<String>,
    /// Type of cached values (-ctv).
    #[arg(long, value_name = "TYPE")]
    cache_type_v: Option<String>,
    /// Delta rule: 0 unfused, 1 fused for several tokens, 2 fused.
    #[arg(long, value_name = "0|1|2")]
    fused_delta: Option<String>,
    /// Also draw the prompt's speed over ubatch sizes.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Format of the result.
    #[arg(short, long, default_value = "md", value_parser = ["md", "json", "csv"])]
    output: String,
}

/// One point of the grid.
struct Point {
    setting: Setting,
    /// Tokens a second of every pass.
    pp: Vec<f64>,
    tg: Vec<f64>,
}

impl Args {
    fn grid(&self) -> anyhow::Result<Vec<Point>> {
        let one = |values: Vec<String>| {
            ensure!(values.len() == 1, "{}: expected one value", values.join(","));
            Ok::<String, anyhow::Error>(values[0].clone())
        };
        let only = |choice: &super::run_model::Choice, given: &Option<String>| one(choice.parse(given.as_slice())?);
        let device = self.on.device;
        let (cpu_moe, gpu_layers) =
            (one(cpu_moe(self.n_cpu_moe.as_slice(), device)?)?, one(gpu_layers(self.gpu_layers.as_slice(), device)?)?);
        let (mmap, repack) = (only(&MMAP, &self.mmap)?, only(&REPACK, &self.run_time_repack)?);
        let flash_attn = only(&FLASH_ATTN, &self.flash_attn)?;
        let activations = only(&ACTIVATIONS, &self.activations)?;
        let type_k = only(&TYPE_K, &self.cache_type_k)?;
        let type_v = if self.cache_type_v.is_some() { only(&TYPE_V, &self.cache_type_v)? } else { type_k.clone() };
        let modes = fused_deltas(self.fused_delta.as_slice())?;
        ensure!(modes.len() == 1, "--fused-delta: expected one value");
        let mut grid = Vec::new();
        for &threads in &numbers("-t", &self.threads, &[rayon::current_num_threads()], 1, 1024)? {
            for &batch in &numbers("-b", &self.batch, &[2048, 3072], 1, 1 << 20)? {
                for &ubatch in &numbers("-ub", &self.ubatch, &[128, 256, 512, 768, 1024], 1, 1 << 20)? {
                    let setting = Setting {
                        model: self.model.clone(),
                        gpu_layers: gpu_layers.clone(),
                        cpu_moe: cpu_moe.clone(),
                        on: self.on.clone(),
                        repeat_layers: None,
                        mmap: mmap.clone(),
                        repack: repack.clone(),
                        activations: activations.clone(),
                        type_k: type_k.clone(),
                        type_v: type_v.clone(),
                        flash_attn: flash_attn.clone(),
                        batch,
                        ubatch,
                        threads,
                        fused_delta: modes[0],
                    };
                    // More than a batch never goes through the layers together.
                    if ubatch <= batch {
                        grid.push(Point { setting, pp: Vec::new(), tg: Vec::new() });
                    }
                }
            }
        }
        ensure!(!grid.is_empty(), "-ub: every size is above every batch size, so there is nothing to try");
        Ok(grid)
    }
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    let mut grid = args.grid()?;
    let plot_to = args.plot.as_deref().map(super::Output::create).transpose()?;
    super::bench::warn_of_others();
    let bar = super::progress((grid.len() * args.repetitions) as u64, "sweep {wide_bar} {pos}/{len} {msg} {eta}");
    let mut bench = Bench::default();
    let mut model = String::new();
    // The grid again and again, so that a drifting machine slows all points alike.
    for pass in 0..args.repetitions {
        for point in &mut grid {
            let s = &point.setting;
            bar.set_message(format!("-b {} -ub {} -t {}", s.batch, s.ubatch, s.threads));
            let (mut run, _) = bench.run(s, args.n_prompt + args.n_gen)?;
            if pass == 0 {
                model = describe(run.loaded);
                run.prompt(args.n_prompt.min(s.ubatch))?;
                run.clear()?;
            }
            point.pp.push(1e9 * args.n_prompt as f64 / run.prompt(args.n_prompt)? as f64);
            point.tg.push(1e9 * args.n_gen as f64 / run.generate(args.n_gen)? as f64);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let best = |of: fn(&Point) -> &[f64]| {
        let speed = |i: usize| mean(of(&grid[i])).0;
        (0..grid.len()).max_by(|&a, &b| speed(a).total_cmp(&speed(b))).unwrap_or(0)
    };
    let (best_pp, best_tg) = (best(|p| &p.pp), best(|p| &p.tg));
    let mut out = std::io::stdout().lock();
    match args.output.as_str() {
        "json" => {
            let rows: Vec<_> = grid
                .iter()
                .map(|p| {
                    let ((pp, pp_spread), (tg, tg_spread)) = (mean(&p.pp), mean(&p.tg));
                    json!({
                        "n_threads": p.setting.threads, "n_batch": p.setting.batch, "n_ubatch": p.setting.ubatch,
                        "pp_avg_ts": pp, "pp_stddev_ts": pp_spread, "pp_samples_ts": p.pp,
                        "tg_avg_ts": tg, "tg_stddev_ts": tg_spread, "tg_samples_ts": p.tg,
                    })
                })
                .collect();
            let document = json!({
                "model_type": model, "n_prompt": args.n_prompt, "n_gen": args.n_gen, "rows": rows,
                "best_pp": best_pp, "best_tg": best_tg,
            });
            writeln!(out, "{}", serde_json::to_string_pretty(&document)?)?;
        }
        "csv" => {
            writeln!(out, "n_threads,n_batch,n_ubatch,pp_avg_ts,pp_stddev_ts,tg_avg_ts,tg_stddev_ts,best_pp,best_tg")?;
            for (i, p) in grid.iter().enumerate() {
                let (s, (pp, pp_spread), (tg, tg_spread)) = (&p.setting, mean(&p.pp), mean(&p.tg));
                writeln!(
                    out,
                    "{},{},{},{pp:.3},{pp_spread:.3},{tg:.3},{tg_spread:.3},{},{}",
                    s.threads,
                    s.batch,
                    s.ubatch,
                    u8::from(i == best_pp),
                    u8::from(i == best_tg)
                )?;
            }
        }
        _ => {
            writeln!(out, "{model}: {} tokens read, {} generated after them\n", args.n_prompt, args.n_gen)?;
            let (pp, tg) = (format!("pp{} t/s", args.n_prompt), format!("tg{} t/s", args.n_gen));
            writeln!(out, "| threads | n_batch | n_ubatch | {pp:>20} | {tg:>20} | best  |")?;
            writeln!(out, "| ------: | ------: | -------: | {0:->19}: | {0:->19}: | ----- |", "")?;
            for (i, p) in grid.iter().enumerate() {
                let (s, (pp, pp_spread), (tg, tg_spread)) = (&p.setting, mean(&p.pp), mean(&p.tg));
                let mark = match (i == best_pp, i == best_tg) {
                    (true, true) => "PP TG",
                    (true, false) => "PP",
                    (false, true) => "TG",
                    (false, false) => "",
                };
                let (pp, tg) = (format!("{pp:.2} ± {pp_spread:.2}"), format!("{tg:.2} ± {tg_spread:.2}"));
                writeln!(
                    out,
                    "| {:>7} | {:>7} | {:>8} | {pp:>20} | {tg:>20} | {mark:<5} |",
                    s.threads, s.batch, s.ubatch
                )?;
            }
        }
    }
    if let Some(file) = plot_to {
        let mut series: Vec<Series> = Vec::new();
        for p in &grid {
            let (s, point) = (&p.setting, (p.setting.ubatch as f64, mean(&p.pp).0));
            let name = format!("-b {} -t {}", s.batch, s.threads);
            match series.iter_mut().find(|s| s.name == name) {
                Some(s) => s.points.push(point),
                None => series.push(Series { name, points: vec![point] }),
            }
        }
        let caption = format!("{model}: {} tokens of prompt", args.n_prompt);
        file.finish(svg(&caption, "tokens of a ubatch", &series)?.as_bytes())?;
    }
    Ok(Done::Ok)
}
