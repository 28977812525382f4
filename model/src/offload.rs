//! Layers on a CUDA device: which ones, and their weights there.

use crate::cache::CacheTypes;
use crate::config::Config;
use crate::error::Error;
use crate::streaming::Streaming;
use crate::weights::{self, Ffn, Mixer, Tensor, Weights};
use qwen3next_kernels::device::{Buffer, Cuda, Device};
use qwen3next_kernels::{DType, Weight};

/// What lies on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Layers, the last ones first; more than the model has: the output matrix too.
    pub layers: usize,
    /// Of the first so many layers the routed experts stay in the CPU's memory.
    pub cpu_experts: usize,
    /// How those are computed.
    pub streaming: Streaming,
}

impl Default for Placement {
    fn default() -> Self {
        Placement::ALL
    }
}

impl Placement {
    /// All of it.
    pub const ALL: Placement = Placement { layers: usize::MAX, cpu_experts: 0, streaming: Streaming::DEFAULT };

    /// Layers of `config` that lie on the device: from this one on.
    pub(crate) fn first(&self, config: &Config) -> usize {
        config.layers.len().saturating_sub(self.layers)
    }
}

/// A matrix, or one an expert, in a device's memory, packed.
#[derive(Debug)]
pub(crate) struct Matrix {
    bytes: Buffer<u8>,
    dtype: DType,
    shape: [usize; 3],
}

impl Matrix {
    fn upload(device: &Device, w: &Tensor) -> Result<Matrix, Error> {
        let [experts, rows, _] = w.shape();
        let matrix = rows * w.row_bytes();
        let mut bytes = device.zeros(w.packed_bytes())?;
        let stride = w.dtype().bytes(w.expert_stride()).unwrap_or(0);
        if experts <= 1 || stride == matrix {
            bytes.write(w.bytes())?;
        } else {
            for e in 0..experts {
                bytes.write_at(e * matrix, w.bytes().get(e * stride..e * stride + matrix).unwrap_or(&[]))?;
            }
        }
        Ok(Matrix { bytes, dtype: w.dtype(), shape: w.shape() })
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn rows(&self) -> usize {
        self.shape[1]
    }

    pub fn cols(&self) -> usize {
        self.shape[2]
    }

    /// As one matrix.
    pub fn view(&self) -> Result<Weight<'_, 2, Cuda>, Error> {
        Ok(self.bytes.weight(self.dtype, [self.shape[0] * self.shape[1], self.shape[2]])?)
    }

    /// `[experts][rows][cols]`.
    pub fn experts(&self) -> Result<Weight<'_, 3, Cuda>, Error> {
        Ok(self.bytes.weight(self.dtype, self.shape)?)
    }
}

#[derive(Debug)]
pub(crate) struct Layer {
    pub attn_norm: Buffer<f32>,
    pub post_attention_norm: Buffer<f32>,
    pub mixer: DeviceMixer,
    /// `None`: the CPU has the routed experts.
    pub ffn: Option<DeviceFfn>,
    /// What lies here where the CPU has the routed experts.
    pub split: Option<Split>,
}

#[derive(Debug)]
pub(crate) enum DeviceMixer {
    Delta(Box<Delta>),
    Attention(Box<Attention>),
}

#[derive(Debug)]
pub(crate) struct Delta {
    pub qkv: Matrix,
    pub z: Matrix,
    pub ba: Matrix,
    pub conv: Buffer<f32>,
    pub dt_bias: Buffer<f32>,
    pub a: Buffer<f32>,
    pub norm: Buffer<f32>,
    pub out: Matrix,
}

#[derive(Debug)]
pub(crate) struct Attention {
    pub q: Matrix,
    pub k: Matrix,
    pub v: Matrix,
    pub o: Matrix,
    pub q_norm: Buffer<f32>,
    pub k_norm: Buffer<f32>,
}

#[derive(Debug)]
pub(crate) struct Swiglu {
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
}

#[derive(Debug)]
pub(crate) struct DeviceFfn {
    /// Of routed experts; `None`: one SwiGLU that every token takes.
    pub router: Option<Matrix>,
    pub experts: Swiglu,
    /// The shared expert and its gate.
    pub shared: Option<(Swiglu, Buffer<f32>)>,
}

/// A feed-forward without its routed experts.
#[derive(Debug)]
pub(crate) struct Split {
    pub router: Matrix,
    /// The shared expert and its gate.
    pub shared: Option<(Swiglu, Buffer<f32>)>,
}

/// The output norm and matrix.
#[derive(Debug)]
pub(crate) struct Output {
    pub norm: Buffer<f32>,
    pub matrix: Matrix,
}

/// What a model has on a device.
#[derive(Debug)]
pub(crate) struct Offloaded {
    pub device: Device,
    pub placement: Placement,
    pub first: usize,
    pub layers: Vec<Layer>,
    pub output: Option<Output>,
}

impl Offloaded {
    /// Copies the weights, telling `progress` how many bytes of how many are done.
    pub fn upload(
        config: &Config,
        weights: &Weights,
        device: &Device,
        placement: Placement,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Offloaded, Error> {
        let first = placement.first(config);
        let on_cpu = |i: usize| i < placement.cpu_experts;
        let with_output = placement.layers > config.layers.len();
        let total = expect_room(config, weights, device, placement)?;
        let mut done = 0;
        let mut matrix = |w: &Tensor, part: &str| {
            let uploaded = Matrix::upload(device, w).map_err(|e| {
                Error::argument("device", format!("{e}: {part} came after {done} of {total} bytes of weights"))
            })?;
            done += w.packed_bytes() as u64;
            progress(done, total);
            Ok::<_, Error>(uploaded)
        };
        let vector = |values: &[f32]| device.upload(values);
        let mut layers = Vec::new();
        for (i, layer) in weights.layers.iter().enumerate().skip(first) {
            let mixer = match &layer.mixer {
                Mixer::Delta(w) => DeviceMixer::Delta(Box::new(Delta {
                    qkv: matrix(&w.qkv, "the projections")?,
                    z: matrix(&w.z, "the projections")?,
                    ba: matrix(&w.ba, "the projections")?,
                    conv: vector(&w.conv)?,
                    dt_bias: vector(&w.dt_bias)?,
                    a: vector(&w.a)?,
                    norm: vector(&w.norm)?,
                    out: matrix(&w.out, "the projections")?,
                })),
                Mixer::Attention(w) => DeviceMixer::Attention(Box::new(Attention {
                    q: matrix(&w.q, "the projections")?,
                    k: matrix(&w.k, "the projections")?,
                    v: matrix(&w.v, "the projections")?,
                    o: matrix(&w.o, "the projections")?,
                    q_norm: vector(&w.q_norm)?,
                    k_norm: vector(&w.k_norm)?,
                })),
            };
            let mut swiglu = |w: &weights::Swiglu| {
                Ok::<_, Error>(Swiglu {
                    gate: matrix(&w.gate, "the feed-forward")?,
                    up: matrix(&w.up, "the feed-forward")?,
                    down: matrix(&w.down, "the feed-forward")?,
                })
            };
            let (ffn, split) = match &layer.ffn {
                Ffn::Dense(w) => (Some(DeviceFfn { router: None, experts: swiglu(w)?, shared: None }), None),
                Ffn::Moe(w) => {
                    let shared = w.shared.as_ref();
                    let shared =
                        shared.map(|s| Ok::<_, Error>((swiglu(&s.expert)?, vector(&s.gate_vec)?))).transpose()?;
                    let router = matrix(&w.router, "the router")?;
                    if on_cpu(i) {
                        (None, Some(Split { router, shared }))
                    } else {
                        let experts = Swiglu {
                            gate: matrix(&w.gate, "the experts")?,
                            up: matrix(&w.up, "the experts")?,
                            down: matrix(&w.down, "the experts")?,
                        };
                        (Some(DeviceFfn { router: Some(router), experts, shared }), None)
                    }
                }
            };
            let attn_norm = vector(&layer.attn_norm)?;
            let post_attention_norm = vector(&layer.post_attention_norm)?;
            layers.push(Layer { attn_norm, post_attention_norm, mixer, ffn, split });
        }
        let output = match with_output {
            true => Some(Output {
                norm: vector(&weights.output_norm)?,
                matrix: matrix(&weights.output, "the output matrix")?,
            }),
            false => None,
        };
        Ok(Offloaded { device: device.clone(), placement, first, layers, output })
    }

    /// The weights of layer `i` where it lies on the device.
    pub fn layer(&self, i: usize) -> Option<&Layer> {
        self.layers.get(i.checked_sub(self.first)?)
    }

    /// The states and caches of so many sequences fit beside what lies there. Error: they do not; it names the smallest
    /// `--n-cpu-moe` that makes room.
    pub fn expect_room_for_state(
        &self,
        config: &Config,
        weights: &Weights,
        [slots, capacity]: [usize; 2],
        cache: CacheTypes,
    ) -> Result<(), Error> {
        let bytes = state_bytes(config, self.first, [slots, capacity], cache)?;
        let free = self.device.free_memory()?;
        if bytes <= free {
            return Ok(());
        }
        let what = format!("states and caches of {slots} x {capacity} tokens take {bytes} bytes, {free} are free");
        Err(Error::argument("context", format!("{what}; {}", self.advice(weights, bytes - free))))
    }

    /// Names what working memory was for, where there was none.
    pub fn working_memory(&self, weights: &Weights, tokens: usize, e: Error) -> Error {
        match e {
            Error::Kernel(qwen3next_kernels::Error::Device { operator: "buffer", report })
                if report.contains("out of memory") =>
            {
                let what = format!("working memory of {tokens} tokens: {report}");
                Error::argument("ubatch", format!("{what}; a smaller one takes less, and {}", self.advice(weights, 1)))
            }
            other => other,
        }
    }

    /// What frees so many bytes more.
    fn advice(&self, weights: &Weights, bytes: u64) -> String {
        let mut freed = 0;
        for (i, layer) in weights.layers.iter().enumerate().skip(self.first.max(self.placement.cpu_experts)) {
            freed += Bytes::of(layer).experts;
            if freed >= bytes {
                return format!("--n-cpu-moe {} is the smallest that makes room", i + 1);
            }
        }
        "no --n-cpu-moe makes room, fewer layers (-ngl) do".into()
    }
}

/// What a layer takes of the device.
struct Bytes {
    mixer: u64,
    /// Router and shared expert, or a dense feed-forward.
    dense: u64,
    /// Routed experts.
    experts: u64,
}

impl Bytes {
    fn of(layer: &weights::Layer) -> Bytes {
        let sum = |all: &[&Tensor]| all.iter().map(|w| w.packed_bytes() as u64).sum::<u64>();
        let floats = |all: &[&[f32]]| all.iter().map(|v| size_of_val(*v) as u64).sum::<u64>();
        let mixer = match &layer.mixer {
            Mixer::Delta(w) => sum(&[&w.qkv, &w.z, &w.ba, &w.out]) + floats(&[&w.conv, &w.dt_bias, &w.a, &w.norm]),
            Mixer::Attention(w) => sum(&[&w.q, &w.k, &w.v, &w.o]) + floats(&[&w.q_norm, &w.k_norm]),
        };
        let (dense, experts) = match &layer.ffn {
            Ffn::Dense(w) => (sum(&[&w.gate, &w.up, &w.down]), 0),
            Ffn::Moe(w) => {
                let shared = w
                    .shared
                    .as_ref()
                    .map_or(0, |s| sum(&[&s.expert.gate, &s.expert.up, &s.expert.down]) + floats(&[&s.gate_vec]));
                (sum(&[&w.router]) + shared, sum(&[&w.gate, &w.up, &w.down]))
            }
        };
        let norms = floats(&[&layer.attn_norm, &layer.post_attention_norm]);
        Bytes { mixer: mixer + norms, dense, experts }
    }
}

/// Bytes of the weights, where they fit into what is free. Error: they do not; it names the first part that does not, and
/// the smallest `--n-cpu-moe`, or `-ngl`, that fits.
fn expect_room(config: &Config, weights: &Weights, device: &Device, placement: Placement) -> Result<u64, Error> {
    let free = device.free_memory()?;
    let layers: Vec<Bytes> = weights.layers.iter().map(Bytes::of).collect();
    let parts = |first: usize, cpu_experts: usize| {
        let mut parts = Vec::new();
        for (i, layer) in layers.iter().enumerate().skip(first) {
            parts.push((format!("the mixer of layer {i}"), layer.mixer));
            parts.push((format!("the feed-forward of layer {i}"), layer.dense));
            parts.push((format!("the experts of layer {i}"), if i < cpu_experts { 0 } else { layer.experts }));
        }
        if placement.layers > layers.len() {
            let bytes = weights.output.packed_bytes() + size_of_val(&weights.output_norm[..]);
            parts.push(("the output matrix".into(), bytes as u64));
        }
        parts
    };
    let total = |first, cpu_experts| parts(first, cpu_experts).iter().map(|(_, bytes)| bytes).sum::<u64>();
    let first = placement.first(config);
    let needed = total(first, placement.cpu_experts);
    if needed <= free {
        return Ok(needed);
    }
    let mut sum = 0;
    let part = parts(first, placement.cpu_experts).into_iter().find(|(_, bytes)| {
        sum += bytes;
        sum > free
    });
    let part = part.map_or(String::new(), |(part, _)| part);
    let advice = match (placement.cpu_experts..=layers.len()).find(|&n| total(first, n) <= free) {
        Some(n) => format!("--n-cpu-moe {n} is the smallest that fits"),
        None => {
            let fewer = (first..=layers.len()).find(|&first| total(first, layers.len()) <= free);
            let most = fewer.map_or(0, |first| layers.len() - first);
            format!("they do not fit with all experts on the CPU either, -ngl {most} would")
        }
    };
    let what = format!("no room for {part}: {free} bytes are free, the weights take {needed}");
    Err(Error::argument("device", format!("{what}; {advice}, caches and activations not counted (`fit` does)")))
}

/// Bytes of the states and caches of the layers from `first` on.
fn state_bytes(config: &Config, first: usize, [slots, capacity]: [usize; 2], cache: CacheTypes) -> Result<u64, Error> {
    let mut here = config.clone();
    here.layers.drain(..first.min(config.layers.len()));
    let keys = cache.bytes_per_token(&here).and_then(|bytes| bytes.checked_mul(capacity));
    let slot = keys.and_then(|bytes| bytes.checked_add(here.state_bytes()));
    let all = slot.and_then(|bytes| bytes.checked_mul(slots));
    all.map(|bytes| bytes as u64)
        .ok_or_else(|| Error::argument("context", format!("{slots} slots of {capacity} tokens are too large")))
}
