//! Models with random weights: the real layer shapes of Qwen3-Next-80B-A3B with as many layers as asked, or a tiny
//! one of the same structure. A slice of n layers costs what n layers of the real model cost; its text is noise.
//!
//! Every row is drawn from its own seed, so that the legacy layout holds the same rows as the current one.

use crate::config::DeltaConfig;
use crate::config::HeadMap;
use crate::error::Error;
use crate::gguf::{Put, Writer};
use crate::source::{interleaved_rows, Progress};
use half::{bf16, f16};
use qwen3next_kernels::DType;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::path::Path;

/// What to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Synth {
    /// Layers; every fourth is full attention.
    pub layers: usize,
    /// Type of the large weights.
    pub quant: DType,
    /// A few MB instead of the real shapes.
    pub tiny: bool,
    /// `ssm_in` in place of `attn_qkv` and `attn_gate`.
    pub legacy: bool,
    /// Equal seeds give equal files.
    pub seed: u64,
}

impl Default for Synth {
    fn default() -> Self {
        Synth { layers: 4, quant: DType::Q4_K, tiny: false, legacy: false, seed: 1 }
    }
}

/// Standard deviation of the large weights.
const STD: f32 = 0.02;
/// Rows drawn and written at a time.
const ROWS: usize = 4096;

struct Shape {
    hidden: usize,
    experts: usize,
    top_k: usize,
    ff: usize,
    dense_ff: usize,
    vocab: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    rotary: usize,
    delta: DeltaConfig,
}

impl Shape {
    fn new(tiny: bool) -> Shape {
        let delta = |k_heads, v_heads| DeltaConfig {
            k_heads,
            v_heads,
            k_dim: 128,
            v_dim: 128,
            conv_width: 4,
            head_map: HeadMap::Grouped,
        };
        if tiny {
            return Shape {
                hidden: 256,
                experts: 16,
                top_k: 4,
                ff: 256,
                dense_ff: 256,
                vocab: 512,
                heads: 4,
                kv_heads: 2,
                head_dim: 128,
                rotary: 32,
                delta: delta(2, 4),
            };
        }
        Shape {
            hidden: 2048,
            experts: 512,
            top_k: 10,
            ff: 512,
            dense_ff: 5120,
            vocab: 151_936,
            heads: 16,
            kv_heads: 2,
            head_dim: 256,
            rotary: 64,
            delta: delta(16, 32),
        }
    }
}

/// How the rows of a tensor are drawn.
#[derive(Clone)]
enum Fill {
    /// Large weights with standard deviation [`STD`].
    Weight,
    /// Normal numbers: mean and deviation.
    Normal(f32, f32),
    /// Uniform numbers.
    Uniform(f32, f32),
    /// −exp of uniform numbers.
    NegExp(f32, f32),
}

/// A tensor's rows: runs of other tensors' seeds. A plain tensor is one run of its own.
struct Plan {
    fill: Fill,
    dtype: DType,
    cols: usize,
    /// (seed of the logical tensor, row in it) by row.
    rows: Rows,
}

enum Rows {
    /// `count` rows of one logical tensor.
    Plain { tensor: u64, count: usize },
    /// Rows in another order, of several logical tensors.
    Listed(Vec<(u64, usize)>),
}

impl Rows {
    fn len(&self) -> usize {
        match self {
            Rows::Plain { count, .. } => *count,
            Rows::Listed(rows) => rows.len(),
        }
    }

    fn get(&self, row: usize) -> (u64, usize) {
        match self {
            Rows::Plain { tensor, .. } => (*tensor, row),
            Rows::Listed(rows) => rows.get(row).copied().unwrap_or_default(),
        }
    }
}

struct Plans {
    writer: Writer,
    plans: Vec<Plan>,
    quant: DType,
}

/// A number of a tensor's name, for its seed.
fn seed_of(name: &str) -> u64 {
    // FNV-1a
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

impl Plans {
    fn add(&mut self, name: &str, shape: &[usize], dtype: DType, fill: Fill) {
        let cols = shape.last().copied().unwrap_or(0);
        let count = shape.iter().rev().skip(1).product();
        self.add_rows(name, shape, dtype, fill, Rows::Plain { tensor: seed_of(name), count }, cols);
    }

    fn add_rows(&mut self, name: &str, shape: &[usize], dtype: DType, fill: Fill, rows: Rows, cols: usize) {
        self.writer.tensor(name, dtype, shape);
        self.plans.push(Plan { fill, dtype, cols, rows });
    }

    fn weight(&mut self, name: &str, shape: &[usize]) {
        self.add(name, shape, self.quant, Fill::Weight);
    }

    fn norm(&mut self, name: &str, size: usize) {
        self.add(name, &[size], DType::F32, Fill::Normal(1.0, 0.1));
    }
}

/// Writes the model; `progress` counts tensors.
pub fn synth(path: &Path, what: &Synth, progress: &mut dyn FnMut(Progress)) -> Result<(), Error> {
    if !(1..=crate::config::MAX_LAYERS).contains(&what.layers) {
        let why = format!("is {}, expected 1 to {}", what.layers, crate::config::MAX_LAYERS);
        return Err(Error::argument("layers", why));
    }
    let Plans { writer, plans, .. } = plan(what);
    let total = plans.len();
    writer.write(path, |i, out| {
        let Some(plan) = plans.get(i) else { return Err(Error::argument("tensor", "is not planned")) };
        let row_bytes = plan.cols / plan.dtype.block() * plan.dtype.block_bytes();
        for first in (0..plan.rows.len()).step_by(ROWS) {
            let count = ROWS.min(plan.rows.len() - first);
            let mut buffer = vec![0u8; count * row_bytes];
            buffer.par_chunks_exact_mut(row_bytes.max(1)).enumerate().for_each(|(row, bytes)| {
                let (tensor, row) = plan.rows.get(first + row);
                let mut rng = ChaCha8Rng::seed_from_u64(what.seed ^ tensor);
                rng.set_stream(row as u64);
                draw(plan, &mut rng, bytes);
            });
            out.write_all(&buffer).map_err(|e| Error::io(path, e))?;
        }
        progress(Progress { done: i + 1, total });
        Ok(())
    })
}

fn plan(what: &Synth) -> Plans {
    let s = Shape::new(what.tiny);
    let d = &s.delta;
    let (keys, values) = (d.key_channels(), d.value_channels());
    let mut p = Plans { writer: Writer::new("qwen3next"), plans: Vec::new(), quant: what.quant };
    p.writer.put("general.name", Put::Str(format!("qwen3next slice, {} layers, {}", what.layers, what.quant)));
    let sizes = [
        ("block_count", what.layers),
        ("context_length", 262_144),
        ("embedding_length", s.hidden),
        ("feed_forward_length", s.dense_ff),
        ("attention.head_count", s.heads),
        ("attention.head_count_kv", s.kv_heads),
        ("attention.key_length", s.head_dim),
        ("attention.value_length", s.head_dim),
        ("rope.dimension_count", s.rotary),
        ("expert_count", s.experts),
        ("expert_used_count", s.top_k),
        ("expert_feed_forward_length", s.ff),
        ("expert_shared_feed_forward_length", s.ff),
        ("ssm.conv_kernel", d.conv_width),
        ("ssm.state_size", d.k_dim),
        ("ssm.group_count", d.k_heads),
        ("ssm.time_step_rank", d.v_heads),
        ("ssm.inner_size", values),
        ("full_attention_interval", 4),
    ];
    for (key, size) in sizes {
        p.writer.put(format!("qwen3next.{key}"), Put::U32(size as u32));
    }
    p.writer.put("qwen3next.attention.layer_norm_rms_epsilon", Put::F32(1e-6));
    p.writer.put("qwen3next.rope.freq_base", Put::F32(1e7));
    let mut tokens: Vec<String> = crate::tokenizer::byte_chars().iter().map(char::to_string).collect();
    tokens.extend((tokens.len()..s.vocab).map(|i| format!("<t{i}>")));
    p.writer.put("tokenizer.ggml.model", Put::Str("gpt2".into()));
    p.writer.put("tokenizer.ggml.pre", Put::Str("qwen2".into()));
    p.writer.put("tokenizer.ggml.tokens", Put::Strs(tokens));
    p.writer.put("tokenizer.ggml.token_type", Put::I32s(vec![1; s.vocab]));
    p.writer.put("tokenizer.ggml.merges", Put::Strs(Vec::new()));
    p.writer.put("tokenizer.ggml.eos_token_id", Put::U32(s.vocab as u32 - 1));
    p.writer.put("tokenizer.ggml.bos_token_id", Put::U32(s.vocab as u32 - 1));

    p.weight("token_embd.weight", &[s.vocab, s.hidden]);
    // Like quantised releases, which keep the output projection finer.
    let output = if what.quant == DType::Q4_K { DType::Q6_K } else { what.quant };
    p.add("output.weight", &[s.vocab, s.hidden], output, Fill::Weight);
    p.norm("output_norm.weight", s.hidden);
    for i in 0..what.layers {
        let name = |suffix: &str| format!("blk.{i}.{suffix}");
        p.norm(&name("attn_norm.weight"), s.hidden);
        p.norm(&name("post_attention_norm.weight"), s.hidden);
        if (i + 1) % 4 == 0 {
            p.weight(&name("attn_q.weight"), &[2 * s.heads * s.head_dim, s.hidden]);
            p.weight(&name("attn_k.weight"), &[s.kv_heads * s.head_dim, s.hidden]);
            p.weight(&name("attn_v.weight"), &[s.kv_heads * s.head_dim, s.hidden]);
            p.weight(&name("attn_output.weight"), &[s.hidden, s.heads * s.head_dim]);
            p.norm(&name("attn_q_norm.weight"), s.head_dim);
            p.norm(&name("attn_k_norm.weight"), s.head_dim);
        } else {
            let (qkv, z) = (name("attn_qkv.weight"), name("attn_gate.weight"));
            if what.legacy {
                let mut rows = vec![(0, 0); 2 * keys + 2 * values];
                let (qkv_at, z_at) = interleaved_rows(d);
                for (tensor, places) in [(seed_of(&qkv), qkv_at), (seed_of(&z), z_at)] {
                    for (row, place) in places.into_iter().enumerate() {
                        if let Some(entry) = rows.get_mut(place) {
                            *entry = (tensor, row);
                        }
                    }
                }
                let shape = [rows.len(), s.hidden];
                p.add_rows(&name("ssm_in.weight"), &shape, what.quant, Fill::Weight, Rows::Listed(rows), s.hidden);
            } else {
                p.weight(&qkv, &[2 * keys + values, s.hidden]);
                p.weight(&z, &[values, s.hidden]);
            }
            p.weight(&name("ssm_ba.weight"), &[2 * d.v_heads, s.hidden]);
            p.weight(&name("ssm_out.weight"), &[s.hidden, values]);
            let conv = [d.conv_channels(), d.conv_width];
            p.add(&name("ssm_conv1d.weight"), &conv, DType::F32, Fill::Normal(0.0, 0.3));
            p.add(&name("ssm_a"), &[d.v_heads], DType::F32, Fill::NegExp(0.0, 2.0));
            p.add(&name("ssm_dt.bias"), &[d.v_heads], DType::F32, Fill::Uniform(-4.0, 0.0));
            p.norm(&name("ssm_norm.weight"), d.v_dim);
        }
        p.add(&name("ffn_gate_inp.weight"), &[s.experts, s.hidden], DType::F32, Fill::Normal(0.0, STD));
        p.add(&name("ffn_gate_inp_shexp.weight"), &[s.hidden], DType::F32, Fill::Normal(0.0, STD));
        p.weight(&name("ffn_gate_exps.weight"), &[s.experts, s.ff, s.hidden]);
        p.weight(&name("ffn_up_exps.weight"), &[s.experts, s.ff, s.hidden]);
        p.weight(&name("ffn_down_exps.weight"), &[s.experts, s.hidden, s.ff]);
        p.weight(&name("ffn_gate_shexp.weight"), &[s.ff, s.hidden]);
        p.weight(&name("ffn_up_shexp.weight"), &[s.ff, s.hidden]);
        p.weight(&name("ffn_down_shexp.weight"), &[s.hidden, s.ff]);
    }
    p
}

/// Where a block's f16 scales lie, and their size for values of deviation [`STD`] when all other bits are random.
fn scales(dtype: DType) -> &'static [(usize, f32)] {
    match dtype {
        // d * q + m, q in 0..16 or 0..32
        DType::Q4_1 => &[(0, STD / 4.9), (2, -7.5 * STD / 4.9)],
        DType::Q5_1 => &[(0, STD / 9.85), (2, -15.5 * STD / 9.85)],
        // d * sc * q - dmin * m, sc and m in 0..16, q in 0..4
        DType::Q2_K => &[(80, STD / 14.2), (82, 1.5 * STD / 14.2)],
        // d * sc * q - dmin * m, sc and m in 0..64, q in 0..16 or 0..32
        DType::Q4_K => &[(0, STD / 258.0), (2, 7.5 * STD / 258.0)],
        DType::Q5_K => &[(0, STD / 527.0), (2, 15.5 * STD / 527.0)],
        // d * (sc - 32) * (q - 4), sc in 0..64, q in 0..8
        DType::Q3_K => &[(108, STD / 43.8)],
        // d * sc * (q - 32), sc in -128..128, q in 0..64
        DType::Q6_K => &[(208, STD / 1360.0)],
        DType::Q8_0 => &[(0, STD / 74.0)],
        DType::Q4_0 => &[(0, STD / 4.6)],
        DType::Q5_0 => &[(0, STD / 9.33)],
        DType::IQ4_NL => &[(0, STD / 67.9)],
        // d * (sc - 32) * level, sc in 0..64
        DType::IQ4_XS => &[(0, STD / 1259.0)],
        _ => &[],
    }
}

/// Fills one row.
fn draw(plan: &Plan, rng: &mut ChaCha8Rng, bytes: &mut [u8]) {
    if plan.dtype.block() > 1 {
        rng.fill_bytes(bytes);
        for block in bytes.chunks_exact_mut(plan.dtype.block_bytes()) {
            if let (DType::MXFP4, Some(exponent)) = (plan.dtype, block.first_mut()) {
                // STD / 5.85 lies between two powers of two: so many of each have that mean square
                *exponent = if rng.random_bool(0.687) { 120 } else { 119 };
            }
            for &(offset, scale) in scales(plan.dtype) {
                let d = f16::from_f32(scale * rng.random_range(0.75..1.25));
                if let Some(place) = block.get_mut(offset..offset + 2) {
                    place.copy_from_slice(&d.to_le_bytes());
                }
            }
        }
        return;
    }
    let mut normal = Normal { rng, spare: None };
    let mut number = || match plan.fill {
        Fill::Weight => STD * normal.next(),
        Fill::Normal(mean, deviation) => mean + deviation * normal.next(),
        Fill::Uniform(low, high) => normal.rng.random_range(low..high),
        Fill::NegExp(low, high) => -normal.rng.random_range(low..high).exp(),
    };
    let size = plan.dtype.block_bytes();
    for element in bytes.chunks_exact_mut(size) {
        let x = number();
        match plan.dtype {
            DType::F16 => element.copy_from_slice(&f16::from_f32(x).to_le_bytes()),
            DType::BF16 => element.copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
            _ => element.copy_from_slice(&x.to_le_bytes()),
        }
    }
}

/// Normal numbers, two at a time (Box and Muller).
struct Normal<'a> {
    rng: &'a mut ChaCha8Rng,
    spare: Option<f32>,
}

impl Normal<'_> {
    fn next(&mut self) -> f32 {
        if let Some(x) = self.spare.take() {
            return x;
        }
        let u = 1.0 - self.rng.random::<f32>();
        let (radius, angle) = ((-2.0 * u.ln()).sqrt(), std::f32::consts::TAU * self.rng.random::<f32>());
        self.spare = Some(radius * angle.sin());
        radius * angle.cos()
    }
}
