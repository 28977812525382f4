//! What a model takes of memory, part by part: of loaded weights, or of a config alone.

use crate::working::Working;
use qwen3next_kernels::DType;
use qwen3next_model::config::{AttentionConfig, Config, DeltaConfig, HeadMap, LayerKind, Mlp, MoeConfig};
use qwen3next_model::streaming::Streaming;
use qwen3next_model::weights::{Ffn, Mixer, Swiglu, Tensor};
use qwen3next_model::{CacheTypes, Weights};

/// Bytes and types of one layer's weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// DeltaNet, or attention, with its norm.
    pub mixer: u64,
    /// Router, shared expert or dense feed-forward, with its norm: what every token needs.
    pub dense: u64,
    /// Routed experts.
    pub experts: u64,
    /// The mixer is full attention.
    pub attention: bool,
    /// Of the matrices that the mixer's input meets.
    pub mixer_types: Vec<DType>,
    /// Of the matrix behind the mixer.
    pub out_type: DType,
    /// `None`: a dense feed-forward.
    pub router: Option<DType>,
    /// Of gate, up and down: of the experts, or of a dense feed-forward.
    pub expert_types: [DType; 3],
    /// The same of the shared expert.
    pub shared: Option<[DType; 3]>,
}

/// Bytes of a model's weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    /// The embedding, of which a token needs a row.
    pub embedding: u64,
    /// The output projection with its norm; in tied models the embedding again, where it is a copy.
    pub output: u64,
    /// Type of the output projection.
    pub output_type: DType,
    /// The output projection is the embedding.
    pub tied: bool,
    /// Every layer.
    pub layers: Vec<Layer>,
}

/// The published 80B-A3B model.
pub fn published() -> Config {
    let layers = 48;
    let kind = |i: usize| if (i + 1) % 4 == 0 { LayerKind::Attention } else { LayerKind::Delta };
    Config {
        vocab: 151_936,
        hidden: 2048,
        layers: (0..layers).map(kind).collect(),
        mlp: vec![Mlp::Moe; layers],
        attention: AttentionConfig { heads: 16, kv_heads: 2, head_dim: 256, rotary: 64, rope_base: 1e7 },
        delta: DeltaConfig {
            k_heads: 16,
            v_heads: 32,
            k_dim: 128,
            v_dim: 128,
            conv_width: 4,
            head_map: HeadMap::Grouped,
        },
        moe: MoeConfig { experts: 512, top_k: 10, ff: 512, shared_ff: 512, normalize: true },
        dense_ff: 5120,
        norm_eps: 1e-6,
        context: 262_144,
        tied: false,
        mtp_layers: 0,
    }
}

const F32: u64 = 4;

impl Sizes {
    /// As these weights lie in memory or in the file's memory map: vectors are f32, whatever the file has.
    pub fn of(weights: &Weights, config: &Config) -> Sizes {
        let tensor = |t: &Tensor| t.packed_bytes() as u64;
        let vector = |v: &[f32]| F32 * v.len() as u64;
        let swiglu = |w: &Swiglu| [&w.gate, &w.up, &w.down].into_iter().map(tensor).sum::<u64>();
        let types = |w: &Swiglu| [w.gate.dtype(), w.up.dtype(), w.down.dtype()];
        let layers = weights.layers.iter().map(|layer| {
            let (read, out) = match &layer.mixer {
                Mixer::Delta(w) => ([&w.qkv, &w.z, &w.ba], &w.out),
                Mixer::Attention(w) => ([&w.q, &w.k, &w.v], &w.o),
            };
            let (router, expert_types, shared) = match &layer.ffn {
                Ffn::Dense(w) => (None, types(w), None),
                Ffn::Moe(w) => {
                    let own = [w.gate.dtype(), w.up.dtype(), w.down.dtype()];
                    (Some(w.router.dtype()), own, w.shared.as_ref().map(|s| types(&s.expert)))
                }
            };
            let mixer = match &layer.mixer {
                Mixer::Delta(w) => {
                    [&w.qkv, &w.z, &w.ba, &w.out].into_iter().map(tensor).sum::<u64>()
                        + [&w.conv, &w.dt_bias, &w.a, &w.norm].into_iter().map(|v| vector(v)).sum::<u64>()
                }
                Mixer::Attention(w) => {
                    [&w.q, &w.k, &w.v, &w.o].into_iter().map(tensor).sum::<u64>()
                        + vector(&w.q_norm)
                        + vector(&w.k_norm)
                }
            };
            let (dense, experts) = match &layer.ffn {
                Ffn::Dense(w) => (swiglu(w), 0),
                Ffn::Moe(w) => {
                    let shared = w.shared.as_ref().map_or(0, |s| swiglu(&s.expert) + vector(&s.gate_vec));
                    (tensor(&w.router) + shared, [&w.gate, &w.up, &w.down].into_iter().map(tensor).sum())
                }
            };
            Layer {
                mixer: mixer + vector(&layer.attn_norm),
                dense: dense + vector(&layer.post_attention_norm),
                experts,
                attention: matches!(layer.mixer, Mixer::Attention(_)),
                mixer_types: read.map(Tensor::dtype).to_vec(),
                out_type: out.dtype(),
                router,
                expert_types,
                shared,
            }
        });
        Sizes {
            embedding: tensor(&weights.token_embd),
            output: tensor(&weights.output) + vector(&weights.output_norm),
            output_type: weights.output.dtype(),
            tied: config.tied,
            layers: layers.collect(),
        }
    }

    /// As quantised files have it: matrices of one type, the output projection in Q6_K where that is Q4_K, routers and
    /// vectors in f32. `Err`: rows that are no whole blocks of the type.
    pub fn planned(config: &Config, quant: DType) -> Result<Sizes, String> {
        let matrix = |rows: usize, cols: usize, dtype: DType| -> Result<u64, String> {
            if cols % dtype.block() != 0 {
                return Err(format!("rows of {cols} are no whole blocks of {dtype}"));
            }
            Ok(rows as u64 * (cols / dtype.block() * dtype.block_bytes()) as u64)
        };
        let vector = |n: usize| F32 * n as u64;
        let (e, a, d, m) = (config.hidden, &config.attention, &config.delta, &config.moe);
        let swiglu = |ff: usize| Ok::<u64, String>(2 * matrix(ff, e, quant)? + matrix(e, ff, quant)?);
        let mut layers = Vec::new();
        for (kind, mlp) in config.layers.iter().zip(&config.mlp) {
            let mixer = match kind {
                LayerKind::Delta => {
                    let rows = d.conv_channels() + d.value_channels() + 2 * d.v_heads;
                    let vectors = d.conv_channels() * d.conv_width + 2 * d.v_heads + d.v_dim;
                    matrix(rows, e, quant)? + matrix(e, d.value_channels(), quant)? + vector(vectors)
                }
                LayerKind::Attention => {
                    let rows = 2 * (a.heads + a.kv_heads) * a.head_dim;
                    matrix(rows, e, quant)? + matrix(e, a.heads * a.head_dim, quant)? + vector(2 * a.head_dim)
                }
            };
            let (dense, experts) = match mlp {
                Mlp::Dense => (swiglu(config.dense_ff)?, 0),
                Mlp::Moe => {
                    let shared = if m.shared_ff > 0 { swiglu(m.shared_ff)? + vector(e) } else { 0 };
                    (vector(m.experts * e) + shared, m.experts as u64 * swiglu(m.ff)?)
                }
            };
            layers.push(Layer {
                mixer: mixer + vector(e),
                dense: dense + vector(e),
                experts,
                attention: *kind == LayerKind::Attention,
                mixer_types: vec![quant; 3],
                out_type: quant,
                router: (*mlp == Mlp::Moe).then_some(DType::F32),
                expert_types: [quant; 3],
                shared: (*mlp == Mlp::Moe && m.shared_ff > 0).then_some([quant; 3]),
            });
        }
        let output = if config.tied || quant != DType::Q4_K { quant } else { DType::Q6_K };
        Ok(Sizes {
            embedding: matrix(config.vocab, e, quant)?,
            output: matrix(config.vocab, e, output)? + vector(e),
            output_type: output,
            tied: config.tied,
            layers,
        })
    }

    /// Weights in one memory: the embedding of a tied model once.
    pub fn total(&self) -> u64 {
        let layers: u64 = self.layers.iter().map(|l| l.mixer + l.dense + l.experts).sum();
        self.output + layers + if self.tied { 0 } else { self.embedding }
    }
}

/// What a plan is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Use {
    /// Tokens of the sequence.
    pub context: usize,
    /// Tokens that go through the layers together.
    pub ubatch: usize,
    /// Of the KV cache.
    pub cache: CacheTypes,
    /// Bytes that driver, kernels and libraries take of the GPU.
    pub reserve: u64,
    /// Layers on the GPU, the last ones first; more than there are: the output projection too.
    pub gpu_layers: usize,
    /// How experts in the CPU's memory are computed.
    pub streaming: Streaming,
    /// Quantised weights meet 8-bit activations.
    pub quantize: bool,
    /// Rows of logits that a ubatch yields at most: 1, or all its tokens.
    pub logits: usize,
}

impl Use {
    /// The first layer on the GPU.
    pub fn first_on_gpu(&self, sizes: &Sizes) -> usize {
        sizes.layers.len().saturating_sub(self.gpu_layers)
    }

    /// The output projection is on the GPU.
    pub fn output_on_gpu(&self, sizes: &Sizes) -> bool {
        self.gpu_layers > sizes.layers.len()
    }
}

/// A part of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// What it is.
    pub name: &'static str,
    /// Bytes on the GPU.
    pub gpu: u64,
    /// Bytes of the host's memory.
    pub host: u64,
}

/// Where everything lies with the experts of the first `n_cpu_moe` layers on the CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Layers whose experts stay on the CPU.
    pub n_cpu_moe: usize,
    /// Every part.
    pub parts: Vec<Part>,
}

impl Plan {
    /// `Err`: caches of this model cannot be of this type, or the sizes are beyond counting.
    pub fn new(sizes: &Sizes, config: &Config, of: &Use, n_cpu_moe: usize) -> Result<Plan, String> {
        let token =
            of.cache.bytes_per_token(config).ok_or_else(|| format!("a cache of {} does not suit", of.cache.k))?;
        let kv = (token as u64).checked_mul(of.context as u64).ok_or("the cache is beyond counting")?;
        let first = of.first_on_gpu(sizes);
        // Layer by layer, here or there.
        let split = |name, bytes: &dyn Fn(&Layer) -> u64, here: &dyn Fn(usize) -> bool| {
            let mut part = Part { name, gpu: 0, host: 0 };
            for (i, layer) in sizes.layers.iter().enumerate() {
                *(if here(i) { &mut part.gpu } else { &mut part.host }) += bytes(layer);
            }
            part
        };
        let on_gpu = |i: usize| i >= first;
        let output = |here: bool| if of.output_on_gpu(sizes) == here { sizes.output } else { 0 };
        let attention = config.count(LayerKind::Attention).max(1) as u64;
        let delta = config.count(LayerKind::Delta).max(1) as u64;
        let state = config.state_bytes() as u64 / delta;
        let gpu = |name, bytes| Part { name, gpu: bytes, host: 0 };
        let working = Working::of(sizes, config, of, n_cpu_moe);
        let mut parts = vec![
            Part { name: "embedding", gpu: 0, host: sizes.embedding },
            Part { name: "output projection", gpu: output(true), host: output(false) },
            split("attention", &|l| if l.attention { l.mixer } else { 0 }, &on_gpu),
            split("DeltaNet", &|l| if l.attention { 0 } else { l.mixer }, &on_gpu),
            split("routers, shared experts, dense", &|l| l.dense, &on_gpu),
            split("routed experts", &|l| l.experts, &|i| on_gpu(i) && i >= n_cpu_moe),
            split("KV cache", &|l| if l.attention { kv / attention } else { 0 }, &on_gpu),
            split("recurrent state", &|l| if l.attention { 0 } else { state }, &on_gpu),
            gpu("activations of a ubatch", working.activations),
            gpu("logits", working.logits),
            gpu("scratch of kernels", working.scratch),
        ];
        if working.staged > 0 {
            parts.push(gpu("experts copied for a ubatch", working.staged));
        }
        parts.push(gpu("reserve", of.reserve));
        Ok(Plan { n_cpu_moe, parts })
    }

    /// The fewest layers whose experts must leave a GPU of so many bytes; `None`: it does not fit even without any.
    pub fn smallest(sizes: &Sizes, config: &Config, of: &Use, vram: u64) -> Result<Option<Plan>, String> {
        for n in 0..=sizes.layers.len() {
            let plan = Plan::new(sizes, config, of, n)?;
            if plan.gpu() <= vram {
                return Ok(Some(plan));
            }
        }
        Ok(None)
    }

    /// Bytes on the GPU.
    pub fn gpu(&self) -> u64 {
        self.parts.iter().map(|p| p.gpu).sum()
    }

    /// Bytes of the host's memory.
    pub fn host(&self) -> u64 {
        self.parts.iter().map(|p| p.host).sum()
    }
}
