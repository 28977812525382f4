//! What a model takes of memory, part by part: of loaded weights, or of a config alone.

use qwen3next_kernels::DType;
use qwen3next_model::config::{AttentionConfig, Config, DeltaConfig, HeadMap, LayerKind, Mlp, MoeConfig};
use qwen3next_model::weights::{Ffn, Mixer, Swiglu, Tensor};
use qwen3next_model::{CacheTypes, Weights};

/// Bytes of one layer's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layer {
    /// DeltaNet, or attention, with its norm.
    pub mixer: u64,
    /// Router, shared expert or dense feed-forward, with its norm: what every token needs.
    pub dense: u64,
    /// Routed experts.
    pub experts: u64,
    /// The mixer is full attention.
    pub attention: bool,
}

/// Bytes of a model's weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    /// The embedding, of which a token needs a row.
    pub embedding: u64,
    /// The output projection with its norm; in tied models the embedding again, where it is a copy.
    pub output: u64,
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
        let layers = weights.layers.iter().map(|layer| {
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
            }
        });
        Sizes {
            embedding: tensor(&weights.token_embd),
            output: tensor(&weights.output) + vector(&weights.output_norm),
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
            });
        }
        let output = if config.tied || quant != DType::Q4_K { quant } else { DType::Q6_K };
        Ok(Sizes {
            embedding: matrix(config.vocab, e, quant)?,
            output: matrix(config.vocab, e, output)? + vector(e),
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
        let sum = |of: &dyn Fn(&Layer) -> u64| sizes.layers.iter().map(of).sum::<u64>();
        let at_cpu: u64 = sizes.layers.iter().take(n_cpu_moe).map(|l| l.experts).sum();
        let gpu = |name, bytes| Part { name, gpu: bytes, host: 0 };
        Ok(Plan {
            n_cpu_moe,
            parts: vec![
                Part { name: "embedding", gpu: 0, host: sizes.embedding },
                gpu("output projection", sizes.output),
                gpu("attention", sum(&|l| if l.attention { l.mixer } else { 0 })),
                gpu("DeltaNet", sum(&|l| if l.attention { 0 } else { l.mixer })),
                gpu("routers, shared experts, dense", sum(&|l| l.dense)),
                Part { name: "routed experts", gpu: sum(&|l| l.experts) - at_cpu, host: at_cpu },
                gpu("KV cache", kv),
                gpu("recurrent state", config.state_bytes() as u64),
                gpu("activations of a ubatch", activations(config, of.ubatch)),
                gpu("reserve", of.reserve),
            ],
        })
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

/// Bytes that `t` tokens' activations take at most: the residual stream, the larger mixer, the feed-forward, the logits of
/// the last token.
pub fn activations(config: &Config, t: usize) -> u64 {
    let (e, a, d, m) = (config.hidden, &config.attention, &config.delta, &config.moe);
    // qkv before and after the convolution (its rows a cache line apart), z, o, β and α, the gates, the projection.
    let delta = 2 * d.conv_channels() + 16 + 2 * d.value_channels() + 4 * d.v_heads + e;
    let attention = (3 * a.heads + 2 * a.kv_heads) * a.head_dim + e;
    let mixer = |kind, floats: usize| if config.count(kind) > 0 { floats } else { 0 };
    let mixer = mixer(LayerKind::Delta, delta).max(mixer(LayerKind::Attention, attention));
    // Hidden values in f32 and in 8 bits with a scale for 32; a choice has its expert, weight, token and place.
    let hidden =
        (m.top_k * m.ff).max(m.shared_ff).max(if config.mlp.contains(&Mlp::Dense) { config.dense_ff } else { 0 });
    let floats = 2 * e + mixer + m.experts + 1 + hidden;
    let eighths = (e + d.value_channels().max(a.heads * a.head_dim) + hidden) * 36 / 32;
    let choices = (m.top_k + 1) * 32;
    t as u64 * (F32 * floats as u64 + (eighths + choices) as u64) + F32 * config.vocab as u64
}
