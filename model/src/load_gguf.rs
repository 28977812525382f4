//! A GGUF file of architecture `qwen3next` as config and weights.

use crate::config::{AttentionConfig, Config, DeltaConfig, HeadMap, LayerKind, Mlp, MoeConfig, MAX_LAYERS};
use crate::error::Error;
use crate::file::Options;
use crate::gguf::{self, Gguf, Value};
use crate::source::{deinterleave, some_names, validated, Found, Loaded, Metadata, Progress, Source, TensorInfo};
use crate::tokenizer::Tokenizer;
use crate::weights::{Attention, Delta, Ffn, Layer, Mixer, Moe, Shared, Swiglu, Weights};
use std::path::Path;

const ARCHITECTURE: &str = "qwen3next";

pub(crate) fn load(path: &Path, options: Options, progress: &mut dyn FnMut(Progress)) -> Result<Loaded, Error> {
    load_parts(path, &gguf::open_all(path, options)?, progress)
}

/// A model from the opened parts of its file.
pub(crate) fn load_parts(path: &Path, parts: &[Gguf], progress: &mut dyn FnMut(Progress)) -> Result<Loaded, Error> {
    let Some(first) = parts.first() else { return Err(Error::format(path, "has no parts")) };
    let find = |name: &str| {
        parts.iter().find_map(|part| {
            let entry = part.tensor(name)?;
            let shape = entry.dims.iter().rev().copied().collect();
            Some(Found {
                path: part.path(),
                store: part.store(),
                start: entry.start,
                dtype: gguf::supported(entry),
                shape,
            })
        })
    };
    let source = Source::new(path, &find);
    let config = config(first, &source)?;
    let weights = weights(&config, &source, progress)?;

    let layers = config.layers.len();
    let mut skipped = Vec::new();
    for entry in parts.iter().flat_map(|p| p.tensors()) {
        let block = entry.name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        if block.is_some_and(|b| b >= layers && b < layers + config.mtp_layers) {
            skipped.push(entry.name.clone());
        }
    }
    let mut warnings = Vec::new();
    if !skipped.is_empty() {
        warnings.push(format!("the MTP block is not used: {}", some_names(&skipped)));
    }
    let names = parts.iter().flat_map(|p| p.tensors()).map(|t| t.name.as_str());
    let skipped: std::collections::HashSet<_> = skipped.iter().map(String::as_str).collect();
    source.refuse_unused(names.filter(|n| !skipped.contains(n)))?;

    let tensors = parts.iter().flat_map(|p| p.tensors()).map(|t| TensorInfo {
        name: t.name.clone(),
        dtype: gguf::type_name(t.kind),
        shape: t.dims.iter().rev().copied().collect(),
        bytes: t.bytes as u64,
        used: !skipped.contains(t.name.as_str()),
    });
    let tokenizer = Tokenizer::from_gguf(first, config.vocab);
    let token = |key: &str| -> Result<Option<String>, Error> {
        let id = first.uint(key)?.and_then(|id| u32::try_from(id).ok());
        let bytes = id.and_then(|id| tokenizer.as_ref().ok()?.token(id));
        Ok(bytes.map(|bytes| String::from_utf8_lossy(bytes).into_owned()))
    };
    let metadata = Metadata {
        container: format!("GGUF v{}", first.version()),
        name: first.string("general.name")?,
        files: parts.iter().map(|p| p.path().to_path_buf()).collect(),
        file_bytes: parts.iter().map(|p| p.file_bytes() as u64).sum(),
        tensors: tensors.collect(),
        chat_template: first.string("tokenizer.chat_template")?,
        bos_token: token("tokenizer.ggml.bos_token_id").unwrap_or_default(),
        eos_token: token("tokenizer.ggml.eos_token_id").unwrap_or_default(),
        warnings,
    };
    Ok(Loaded { tokenizer, config, weights, metadata })
}

/// Reads keys `qwen3next.*`.
struct Keys<'a>(&'a Gguf);

impl Keys<'_> {
    fn name(key: &str) -> String {
        format!("{ARCHITECTURE}.{key}")
    }

    fn optional(&self, key: &str) -> Result<Option<usize>, Error> {
        self.0.uint_or_same(&Self::name(key))
    }

    fn required(&self, key: &str) -> Result<usize, Error> {
        self.optional(key)?
            .ok_or_else(|| Error::key(self.0.path(), Self::name(key), "is missing, expected a whole number"))
    }

    fn refuse(&self, key: &str, why: impl Into<String>) -> Error {
        Error::key(self.0.path(), Self::name(key), why)
    }

    /// A key whose every value but the neutral ones changes the model in a way that is not built.
    fn neutral(&self, key: &str, neutral: &[f64]) -> Result<(), Error> {
        match self.0.float(&Self::name(key))? {
            Some(x) if !neutral.contains(&x) => Err(self.refuse(key, format!("is {x}, which is not supported"))),
            _ => Ok(()),
        }
    }
}

/// Which layers are recurrent: a list, one value for all, or every layer but each `interval`-th.
fn layer_kinds(keys: &Keys, layers: usize) -> Result<Vec<LayerKind>, Error> {
    const KEY: &str = "attention.recurrent_layers";
    let kind =
        |value: Value| match value {
            Value::Bool(true) | Value::Int(1) => Ok(LayerKind::Delta),
            Value::Bool(false) | Value::Int(0) => Ok(LayerKind::Attention),
            other => Err(keys
                .refuse(KEY, format!("holds {}, expected true or false", crate::error::shown(&format!("{other:?}"))))),
        };
    match keys.0.value(&Keys::name(KEY)) {
        Some(Value::Array(list)) if list.len() < layers => {
            Err(keys.refuse(KEY, format!("has {} entries, expected one a layer ({layers})", list.len())))
        }
        Some(Value::Array(list)) => list.iter().take(layers).map(kind).collect(),
        Some(value) => Ok(vec![kind(value)?; layers]),
        None => {
            let interval = keys.optional("full_attention_interval")?.unwrap_or(4);
            if interval == 0 {
                return Err(keys.refuse("full_attention_interval", "is 0, expected 1 or more"));
            }
            let kind = |i: usize| if (i + 1) % interval == 0 { LayerKind::Attention } else { LayerKind::Delta };
            Ok((0..layers).map(kind).collect())
        }
    }
}

fn config(file: &Gguf, source: &Source) -> Result<Config, Error> {
    match file.string("general.architecture")? {
        Some(a) if a == ARCHITECTURE => {}
        Some(a) => {
            let why = format!("is \"{}\", expected \"{ARCHITECTURE}\"", crate::error::shown(&a));
            return Err(Error::key(file.path(), "general.architecture", why));
        }
        None => return Err(Error::key(file.path(), "general.architecture", "is missing")),
    }
    let keys = Keys(file);
    let blocks = keys.required("block_count")?;
    let mtp_layers = keys.optional("nextn_predict_layers")?.unwrap_or(0);
    let layers = match blocks.checked_sub(mtp_layers) {
        Some(n) if (1..=MAX_LAYERS).contains(&n) => n,
        _ => {
            let why = format!("is {blocks} with {mtp_layers} MTP blocks, expected 1 to {MAX_LAYERS} other ones");
            return Err(keys.refuse("block_count", why));
        }
    };
    let hidden = keys.required("embedding_length")?;
    let heads = keys.required("attention.head_count")?;
    let head_dim = match keys.optional("attention.key_length")? {
        Some(d) => d,
        None => hidden / heads.max(1),
    };
    let value_length = keys.optional("attention.value_length")?.unwrap_or(head_dim);
    if value_length != head_dim {
        return Err(
            keys.refuse("attention.value_length", format!("is {value_length}, expected key_length ({head_dim})"))
        );
    }
    if let Some(scaling) = file.string(&Keys::name("rope.scaling.type"))? {
        if scaling != "none" && scaling != "linear" {
            return Err(
                keys.refuse("rope.scaling.type", format!("is {}, expected none", crate::error::shown(&scaling)))
            );
        }
    }
    keys.neutral("rope.scaling.factor", &[0.0, 1.0])?;
    keys.neutral("rope.scale_linear", &[0.0, 1.0])?;
    keys.neutral("expert_weights_scale", &[0.0, 1.0])?;
    keys.neutral("expert_gating_func", &[0.0, 1.0])?;
    keys.neutral("expert_group_count", &[0.0, 1.0])?;

    let (v_heads, inner) = (keys.required("ssm.time_step_rank")?, keys.required("ssm.inner_size")?);
    if v_heads == 0 || inner % v_heads != 0 {
        return Err(
            keys.refuse("ssm.inner_size", format!("is {inner}, expected a multiple of time_step_rank ({v_heads})"))
        );
    }

    // A row count of the embedding is what the file holds; the key and the token list may only agree with it.
    let shape = |name: &str| source.shape(name);
    let vocab = match shape("token_embd.weight").as_deref() {
        Some([rows, _]) => *rows,
        _ => {
            return Err(Error::tensor(
                file.path(),
                "token_embd.weight",
                format!("is missing, expected [vocabulary, {hidden}]"),
            ))
        }
    };
    if let Some(claimed) = keys.optional("vocab_size")?.filter(|&v| v != vocab) {
        return Err(keys.refuse("vocab_size", format!("is {claimed}, token_embd.weight has {vocab} rows")));
    }

    let experts = keys.optional("expert_count")?.unwrap_or(0);
    let sparse = |i: usize| {
        experts > 0
            && (source.has(&format!("blk.{i}.ffn_gate_inp.weight")) || !source.has(&format!("blk.{i}.ffn_gate.weight")))
    };
    let mlp: Vec<Mlp> = (0..layers).map(|i| if sparse(i) { Mlp::Moe } else { Mlp::Dense }).collect();
    let dense_ff = match keys.optional("feed_forward_length")? {
        Some(n) => n,
        None if !mlp.contains(&Mlp::Dense) => 0,
        None => keys.required("feed_forward_length")?,
    };
    let moe = if mlp.contains(&Mlp::Moe) {
        let top_k = keys.required("expert_used_count")?;
        let ff = match keys.optional("expert_feed_forward_length")? {
            Some(n) if n > 0 => n,
            _ => dense_ff / top_k.max(1),
        };
        let in_file =
            mlp.iter().position(|&m| m == Mlp::Moe).and_then(|i| shape(&format!("blk.{i}.ffn_up_shexp.weight")));
        let shared_ff = match keys.optional("expert_shared_feed_forward_length")? {
            Some(n) if n > 0 => n,
            _ => in_file.and_then(|s| s.first().copied()).unwrap_or(0),
        };
        let normalize = file.boolean(&Keys::name("expert_weights_norm"))?.unwrap_or(true);
        MoeConfig { experts, top_k, ff, shared_ff, normalize }
    } else {
        MoeConfig { experts: 0, top_k: 0, ff: 0, shared_ff: 0, normalize: true }
    };

    let epsilon = "attention.layer_norm_rms_epsilon";
    let norm_eps =
        file.float(&Keys::name(epsilon))?.ok_or_else(|| keys.refuse(epsilon, "is missing, expected a number"))?;
    let config = Config {
        vocab,
        hidden,
        layers: layer_kinds(&keys, layers)?,
        mlp,
        attention: AttentionConfig {
            heads,
            kv_heads: keys.optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            rotary: keys.optional("rope.dimension_count")?.unwrap_or(head_dim),
            rope_base: file.float(&Keys::name("rope.freq_base"))?.unwrap_or(10_000.0),
        },
        delta: DeltaConfig {
            k_heads: keys.required("ssm.group_count")?,
            v_heads,
            k_dim: keys.required("ssm.state_size")?,
            v_dim: inner / v_heads,
            conv_width: keys.required("ssm.conv_kernel")?,
            head_map: HeadMap::Grouped,
        },
        moe,
        dense_ff,
        norm_eps: norm_eps as f32,
        context: keys.required("context_length")?,
        tied: !source.has("output.weight"),
        mtp_layers,
    };
    validated(config, file.path())
}

fn weights(c: &Config, s: &Source, progress: &mut dyn FnMut(Progress)) -> Result<Weights, Error> {
    let token_embd = s.matrix("token_embd.weight", c.vocab, c.hidden)?;
    let output = if c.tied { token_embd.clone() } else { s.matrix("output.weight", c.vocab, c.hidden)? };
    let output_norm = s.floats("output_norm.weight", &[c.hidden])?;
    let mut layers = Vec::new();
    for (i, (&kind, &mlp)) in c.layers.iter().zip(&c.mlp).enumerate() {
        let block = Block { c, s, i };
        layers.push(Layer {
            attn_norm: s.floats(&block.name("attn_norm.weight"), &[c.hidden])?,
            post_attention_norm: s.floats(&block.name("post_attention_norm.weight"), &[c.hidden])?,
            mixer: match kind {
                LayerKind::Delta => Mixer::Delta(block.delta()?),
                LayerKind::Attention => Mixer::Attention(block.attention()?),
            },
            ffn: match mlp {
                Mlp::Dense => Ffn::Dense(block.swiglu("", c.dense_ff)?),
                Mlp::Moe => Ffn::Moe(block.moe()?),
            },
        });
        progress(Progress { done: i + 1, total: c.layers.len() });
    }
    Ok(Weights { token_embd, output_norm, output, layers })
}

/// Block `blk.<i>`.
struct Block<'a, 's> {
    c: &'a Config,
    s: &'a Source<'s>,
    i: usize,
}

impl Block<'_, '_> {
    fn name(&self, suffix: &str) -> String {
        format!("blk.{}.{suffix}", self.i)
    }

    fn delta(&self) -> Result<Delta, Error> {
        let (d, hidden, s) = (&self.c.delta, self.c.hidden, self.s);
        let (keys, values) = (d.key_channels(), d.value_channels());
        let legacy = self.name("ssm_in.weight");
        let current = self.name("attn_qkv.weight");
        let (qkv, z) = if s.has(&current) || !s.has(&legacy) {
            s.ignore(&legacy);
            (s.matrix(&current, 2 * keys + values, hidden)?, s.matrix(&self.name("attn_gate.weight"), values, hidden)?)
        } else {
            let both = s.matrix(&legacy, 2 * keys + 2 * values, hidden)?;
            deinterleave(&both, d).ok_or_else(|| Error::tensor(s.path(), &legacy, "cannot be split by key head"))?
        };
        Ok(Delta {
            qkv,
            z,
            ba: s.matrix(&self.name("ssm_ba.weight"), 2 * d.v_heads, hidden)?,
            conv: s.floats(&self.name("ssm_conv1d.weight"), &[d.conv_channels(), d.conv_width])?,
            dt_bias: s.floats(&self.name("ssm_dt.bias"), &[d.v_heads])?,
            a: s.floats(&self.name("ssm_a"), &[d.v_heads])?,
            norm: s.floats(&self.name("ssm_norm.weight"), &[d.v_dim])?,
            out: s.matrix(&self.name("ssm_out.weight"), hidden, values)?,
        })
    }

    fn attention(&self) -> Result<Attention, Error> {
        let (a, hidden, s) = (&self.c.attention, self.c.hidden, self.s);
        let (queries, keys) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
        let fused = self.name("attn_qkv.weight");
        let (q, k, v) = if s.has(&fused) {
            let all = s.matrix(&fused, 2 * queries + 2 * keys, hidden)?;
            let rows = |first, count| {
                all.row_range(first, count)
                    .ok_or_else(|| Error::tensor(s.path(), &fused, "cannot be split into q, k, v"))
            };
            (rows(0, 2 * queries)?, rows(2 * queries, keys)?, rows(2 * queries + keys, keys)?)
        } else {
            (
                s.matrix(&self.name("attn_q.weight"), 2 * queries, hidden)?,
                s.matrix(&self.name("attn_k.weight"), keys, hidden)?,
                s.matrix(&self.name("attn_v.weight"), keys, hidden)?,
            )
        };
        Ok(Attention {
            q,
            k,
            v,
            o: s.matrix(&self.name("attn_output.weight"), hidden, queries)?,
            q_norm: s.floats(&self.name("attn_q_norm.weight"), &[a.head_dim])?,
            k_norm: s.floats(&self.name("attn_k_norm.weight"), &[a.head_dim])?,
        })
    }

    /// `suffix` is empty for a dense layer, `_shexp` for the shared expert.
    fn swiglu(&self, suffix: &str, ff: usize) -> Result<Swiglu, Error> {
        let (hidden, s) = (self.c.hidden, self.s);
        Ok(Swiglu {
            gate: s.matrix(&self.name(&format!("ffn_gate{suffix}.weight")), ff, hidden)?,
            up: s.matrix(&self.name(&format!("ffn_up{suffix}.weight")), ff, hidden)?,
            down: s.matrix(&self.name(&format!("ffn_down{suffix}.weight")), hidden, ff)?,
        })
    }

    fn moe(&self) -> Result<Moe, Error> {
        let (m, hidden, s) = (&self.c.moe, self.c.hidden, self.s);
        let merged = self.name("ffn_gate_up_exps.weight");
        let (gate, up) = if s.has(&merged) {
            let both = s.experts(&merged, [m.experts, 2 * m.ff, hidden])?;
            let half = |first| {
                both.row_range(first, m.ff)
                    .ok_or_else(|| Error::tensor(s.path(), &merged, "cannot be split into gate and up"))
            };
            (half(0)?, half(m.ff)?)
        } else {
            (
                s.experts(&self.name("ffn_gate_exps.weight"), [m.experts, m.ff, hidden])?,
                s.experts(&self.name("ffn_up_exps.weight"), [m.experts, m.ff, hidden])?,
            )
        };
        let shared = match m.shared_ff {
            0 => None,
            ff => Some(Shared {
                gate_vec: s.floats(&self.name("ffn_gate_inp_shexp.weight"), &[hidden])?,
                expert: self.swiglu("_shexp", ff)?,
            }),
        };
        Ok(Moe {
            router: s.matrix(&self.name("ffn_gate_inp.weight"), m.experts, hidden)?,
            gate,
            up,
            down: s.experts(&self.name("ffn_down_exps.weight"), [m.experts, hidden, m.ff])?,
            shared,
        })
    }
}
