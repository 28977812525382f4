//! Options that every command with a model takes, and loading it.

use anyhow::{bail, Context};
use qwen3next_kernels::DType;
use qwen3next_model::forward::{Activations, FusedDelta, Options};
use qwen3next_model::tokenizer::Tokenizer;
use qwen3next_model::{CacheTypes, Metadata, Model};
use std::path::{Path, PathBuf};

#[derive(clap::Args, Clone)]
pub struct Args {
    /// GGUF file (any part of a split one) or Hugging Face folder; by default the embedded model.
    #[arg(short, long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Tokens handed to the model in one call.
    #[arg(short, long, default_value_t = 2048, value_parser = at_least_one)]
    pub batch: usize,
    /// Tokens that go through the layers together (-ub).
    #[arg(long, default_value_t = 512, value_parser = at_least_one)]
    pub ubatch: usize,
    /// Threads, at most 1024; by default one a core.
    #[arg(short, long, value_parser = threads)]
    pub threads: Option<usize>,
    /// Delta rule: 0 unfused, 1 fused for several tokens, 2 fused (default; also from Q3N_FUSED_DELTA or
    /// LLAMA_QWEN3NEXT_FUSED_DELTA).
    #[arg(long, value_name = "0|1|2")]
    pub fused_delta: Option<u32>,
    /// What quantised weights meet: f32 activations, exact but slow, or 8 bits a value. Commands that judge numerics
    /// (logits, perplexity) take f32 by default, the others q8.
    #[arg(long, value_name = "f32|q8", value_parser = activations)]
    pub activations: Option<Activations>,
    /// Interleave the rows of the weights while loading (-rtr): faster, and the memory of the weights is no file cache.
    #[arg(long, value_name = "0|1", num_args = 0..=1, default_value = "0", default_missing_value = "1",
        value_parser = switch)]
    pub run_time_repack: bool,
    /// Type of the cached keys (-ctk): f32, f16, bf16 or q8_0.
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = cache_type)]
    pub cache_type_k: DType,
    /// Type of the cached values (-ctv), that of the keys.
    #[arg(long, value_name = "TYPE", value_parser = cache_type)]
    pub cache_type_v: Option<DType>,
    #[command(flatten)]
    pub offload: Offload,
}

/// Layers on a CUDA device.
#[derive(clap::Args, Clone, Debug)]
pub struct Offload {
    /// Layers on the GPU, the last ones first (-ngl); -1, or more than there are: all, and the output matrix.
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    pub gpu_layers: i64,
    /// The experts of the first N layers stay on the CPU (-ncmoe).
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub n_cpu_moe: usize,
    /// What a GPU is: the first CUDA device (CUDA_VISIBLE_DEVICES hides others), or the host executor, which runs the same
    /// kernels on the CPU, slowly, and watches them.
    #[arg(long, value_enum, default_value = "cuda")]
    pub device: Device,
}

/// What `--gpu-layers` lie on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Device {
    Cuda,
    Executor,
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Device::Cuda => "CUDA",
            Device::Executor => "executor",
        })
    }
}

impl Offload {
    /// Copies the layers to the device, with a progress bar.
    pub fn apply(&self, loaded: &mut Loaded) -> anyhow::Result<()> {
        self.upload(&mut loaded.model)
    }

    /// As [`Offload::apply`].
    pub fn upload(&self, model: &mut Model) -> anyhow::Result<()> {
        if self.gpu_layers == 0 {
            return Ok(());
        }
        #[cfg(any(feature = "cuda", feature = "cuda-host"))]
        {
            let device = self.open().with_context(|| format!("--gpu-layers {}", self.gpu_layers))?;
            let layers = usize::try_from(self.gpu_layers).unwrap_or(usize::MAX);
            let placement = qwen3next_model::offload::Placement { layers, cpu_experts: self.n_cpu_moe };
            let bar = super::progress(0, "to the device {wide_bar} {bytes}/{total_bytes}");
            model.offload(&device, placement, &mut |done, total| {
                bar.set_length(total);
                bar.set_position(done);
            })?;
            bar.finish_and_clear();
            Ok(())
        }
        #[cfg(not(any(feature = "cuda", feature = "cuda-host")))]
        {
            let _ = model;
            bail!("--gpu-layers {}: built without the feature cuda, expected 0", self.gpu_layers)
        }
    }

    /// The device's name, or why there is none.
    pub fn device_name(&self) -> anyhow::Result<String> {
        #[cfg(any(feature = "cuda", feature = "cuda-host"))]
        {
            let device = self.open()?;
            Ok(format!("{}, {}", device.name()?, device.driver()?))
        }
        #[cfg(not(any(feature = "cuda", feature = "cuda-host")))]
        match self.device {
            Device::Cuda => bail!("built without the feature cuda"),
            Device::Executor => bail!("built without the feature cuda-host"),
        }
    }

    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    fn open(&self) -> anyhow::Result<qwen3next_kernels::device::Device> {
        use qwen3next_kernels::device;
        match self.device {
            #[cfg(feature = "cuda")]
            Device::Cuda => Ok(device::Device::open(0)?),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda => bail!("--device cuda: built without the feature cuda"),
            #[cfg(feature = "cuda-host")]
            Device::Executor => Ok(device::Device::executor()),
            #[cfg(not(feature = "cuda-host"))]
            Device::Executor => bail!("--device executor: built without the feature cuda-host"),
        }
    }
}

/// A type of the KV cache.
pub fn cache_type(text: &str) -> Result<DType, String> {
    let known = DType::from_name(text).filter(|t| CacheTypes::ALL.contains(t));
    known.ok_or_else(|| "expected f32, f16, bf16 or q8_0".into())
}

fn activations(text: &str) -> Result<Activations, String> {
    match text {
        "f32" => Ok(Activations::F32),
        "q8" => Ok(Activations::Q8),
        _ => Err("expected f32 or q8".into()),
    }
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "0" | "off" => Ok(false),
        "1" | "on" => Ok(true),
        _ => Err("expected 0 or 1".into()),
    }
}

pub fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if (1..=1 << 20).contains(&n) => Ok(n),
        _ => Err("expected a whole number from 1 to 1048576".into()),
    }
}

pub fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if (1..=1024).contains(&n) => Ok(n),
        _ => Err("expected a whole number from 1 to 1024".into()),
    }
}

/// A model with what its file said beside the weights.
pub struct Loaded {
    /// The model.
    pub model: Model,
    /// Where it came from, for messages.
    pub name: String,
    /// What the file says beside sizes and weights.
    pub metadata: Metadata,
    tokenizer: Result<Tokenizer, qwen3next_model::Error>,
}

impl Loaded {
    /// The tokenizer, or an error that names the file.
    pub fn tokenizer(&self) -> anyhow::Result<&Tokenizer> {
        self.tokenizer.as_ref().map_err(|e| anyhow::anyhow!("{}: no usable tokenizer: {e}", self.name))
    }
}

impl Args {
    /// Loads the model and sets up the threads.
    pub fn load(&self) -> anyhow::Result<Loaded> {
        self.forward()?;
        if let Some(threads) = self.threads {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("--threads")?;
        }
        let mut loaded = load(self.model.as_deref())?;
        self.offload.apply(&mut loaded)?;
        if self.run_time_repack {
            repack(&mut loaded);
        }
        Ok(loaded)
    }

    /// How forward passes run in commands that judge numerics.
    pub fn exact(&self) -> anyhow::Result<Options> {
        Ok(Options { activations: self.activations.unwrap_or(Activations::F32), ..self.forward()? })
    }

    /// Types of the KV caches.
    pub fn cache(&self) -> CacheTypes {
        CacheTypes { k: self.cache_type_k, v: self.cache_type_v.unwrap_or(self.cache_type_k) }
    }

    /// How forward passes run.
    pub fn forward(&self) -> anyhow::Result<Options> {
        let fused_delta = fused_delta(self.fused_delta)?;
        Ok(Options { ubatch: self.ubatch, fused_delta, activations: self.activations.unwrap_or(Activations::Q8) })
    }
}

/// The delta rule's mode: what was asked for, or what the environment says, or the fastest.
pub fn fused_delta(asked: Option<u32>) -> anyhow::Result<FusedDelta> {
    let (source, number) = match asked {
        Some(number) => ("--fused-delta", Some(number.to_string())),
        None => ["Q3N_FUSED_DELTA", "LLAMA_QWEN3NEXT_FUSED_DELTA"]
            .into_iter()
            .find_map(|name| Some((name, Some(std::env::var(name).ok()?))))
            .unwrap_or(("", None)),
    };
    match number {
        None => Ok(FusedDelta::default()),
        Some(text) => match text.trim().parse().ok().and_then(FusedDelta::from_number) {
            Some(mode) => Ok(mode),
            None => bail!("{source} {text}: expected 0, 1 or 2"),
        },
    }
}

/// Interleaves the rows of a model's weights, with a progress bar.
pub fn repack(loaded: &mut Loaded) {
    let bar = super::progress(0, "repacking {wide_bar} {bytes}/{total_bytes}");
    loaded.model.repack(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
}

/// Loads a model, the embedded one where no path is given, with a progress bar.
pub fn load(path: Option<&Path>) -> anyhow::Result<Loaded> {
    load_with(path, true)
}

/// As [`load`], from a memory map of the file or by reading it.
pub fn load_with(path: Option<&Path>, mmap: bool) -> anyhow::Result<Loaded> {
    let bar = super::progress(0, "loading {wide_bar} {pos}/{len} layers");
    let loaded = match path {
        Some(path) => qwen3next_model::load(path, qwen3next_model::file::Options { mmap }, &mut |progress| {
            bar.set_length(progress.total as u64);
            bar.set_position(progress.done as u64);
        })?,
        None => qwen3next_model::embedded::load()?,
    };
    bar.finish_and_clear();
    for warning in &loaded.metadata.warnings {
        eprintln!("warning: {warning}");
    }
    Ok(Loaded {
        model: Model::new(loaded.config, loaded.weights),
        name: path.map_or("the embedded model".into(), |p| p.display().to_string()),
        metadata: loaded.metadata,
        tokenizer: loaded.tokenizer,
    })
}
