//! A Hugging Face folder (config.json, safetensors, tokenizer.json) as config and weights.

use crate::config::{AttentionConfig, Config, DeltaConfig, HeadMap, LayerKind, Mlp, MoeConfig, MAX_LAYERS};
use crate::error::{shown, Error};
use crate::file::{read_text, Options};
use crate::safetensors::{supported, Folder};
use crate::source::{deinterleave, some_names, validated, Found, Loaded, Metadata, Progress, Source, TensorInfo};
use crate::tokenizer::Tokenizer;
use crate::weights::{Attention, Delta, Ffn, Layer, Mixer, Moe, Shared, Swiglu, Tensor, Weights};
use serde_json::{Map, Value};
use std::path::Path;

const MAX_CONFIG: u64 = 16 << 20;

pub(crate) fn load(folder: &Path, options: Options, progress: &mut dyn FnMut(Progress)) -> Result<Loaded, Error> {
    let json = Json::open(&folder.join("config.json"))?;
    let mut config = config(&json)?;
    let files = Folder::open(folder, options)?;
    let find = |name: &str| {
        let (file, entry) = files.tensor(name)?;
        Some(Found {
            path: file.path(),
            store: file.store(),
            start: entry.start,
            dtype: supported(entry),
            shape: entry.shape.clone(),
        })
    };
    let source = Source::new(folder, &find);
    let weights = weights(&config, &source, progress)?;

    let mtp: Vec<String> = files.home.keys().filter(|n| n.starts_with("mtp.")).cloned().collect();
    let mut warnings = Vec::new();
    if !mtp.is_empty() {
        let block = |n: &String| n.strip_prefix("mtp.layers.")?.split('.').next()?.parse::<usize>().ok();
        config.mtp_layers = mtp.iter().filter_map(block).max().map_or(1, |last| last.saturating_add(1));
        warnings.push(format!("the MTP block is not used: {}", some_names(&mtp)));
    }
    let config = validated(config, &json.path)?;
    let skipped = |n: &str| {
        n.starts_with("mtp.") || n.ends_with(".rotary_emb.inv_freq") || (config.tied && n == "lm_head.weight")
    };
    source.refuse_unused(files.home.keys().map(String::as_str).filter(|n| !skipped(n)))?;

    let tensors = files.home.keys().filter_map(|name| {
        let (_, entry) = files.tensor(name)?;
        Some(TensorInfo {
            name: name.clone(),
            dtype: format!("{:?}", entry.dtype),
            shape: entry.shape.clone(),
            bytes: entry.bytes as u64,
            used: !skipped(name),
        })
    });
    let metadata = Metadata {
        container: "safetensors".into(),
        name: json.text("_name_or_path")?.or_else(|| Some(folder.file_name()?.to_string_lossy().into_owned())),
        files: files.files.iter().map(|f| f.path().to_path_buf()).collect(),
        file_bytes: files.files.iter().map(|f| f.file_bytes() as u64).sum(),
        tensors: tensors.collect(),
        chat_template: chat_template(folder),
        bos_token: special_token(folder, "bos_token"),
        eos_token: special_token(folder, "eos_token"),
        warnings,
    };
    let tokenizer = tokenizer(folder, &json, config.vocab);
    Ok(Loaded { tokenizer, config, weights, metadata })
}

fn chat_template(folder: &Path) -> Option<String> {
    let own = folder.join("chat_template.jinja");
    if own.exists() {
        return read_text(&own, MAX_CONFIG).ok();
    }
    let json = Json::open(&folder.join("tokenizer_config.json")).ok()?;
    match json.map.get("chat_template")? {
        Value::String(text) => Some(text.clone()),
        // Several templates by name.
        Value::Array(list) => {
            let named = list.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"))?;
            Some(named.get("template")?.as_str()?.to_string())
        }
        _ => None,
    }
}

/// A token of tokenizer_config.json: its text, or an object that holds it.
fn special_token(folder: &Path, key: &str) -> Option<String> {
    let json = Json::open(&folder.join("tokenizer_config.json")).ok()?;
    let token = json.map.get(key)?;
    Some(token.get("content").unwrap_or(token).as_str()?.to_string())
}

fn tokenizer(folder: &Path, config: &Json, vocab: usize) -> Result<Tokenizer, Error> {
    let mut tokenizer = Tokenizer::from_json(&folder.join("tokenizer.json"), vocab)?;
    let generation = folder.join("generation_config.json");
    let mut eos = config.ids("eos_token_id")?;
    if generation.exists() {
        let more = Json::open(&generation)?.ids("eos_token_id")?;
        if !more.is_empty() {
            eos = more;
        }
    }
    let bos = config.ids("bos_token_id")?.first().copied();
    tokenizer.set_special(bos, &eos)?;
    Ok(tokenizer)
}

/// A JSON object in a file.
struct Json {
    path: std::path::PathBuf,
    map: Map<String, Value>,
}

impl Json {
    fn open(path: &Path) -> Result<Json, Error> {
        Json::parse(path, &read_text(path, MAX_CONFIG)?)
    }

    fn parse(path: &Path, text: &str) -> Result<Json, Error> {
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Json { path: path.into(), map }),
            Ok(_) => Err(Error::format(path, "is not a JSON object")),
            Err(e) => Err(Error::format(path, format!("is not JSON: {}", shown(&e.to_string())))),
        }
    }

    fn get<T>(&self, key: &str, what: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, Error> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| {
                Error::key(&self.path, key, format!("is {}, expected {what}", shown(&value.to_string())))
            }),
        }
    }

    fn size(&self, key: &str) -> Result<Option<usize>, Error> {
        self.get(key, "a whole number", |v| usize::try_from(v.as_u64()?).ok())
    }

    fn sized(&self, key: &str, default: usize) -> Result<usize, Error> {
        Ok(self.size(key)?.unwrap_or(default))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        self.get(key, "a number", Value::as_f64)
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, Error> {
        Ok(self.get(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    fn text(&self, key: &str) -> Result<Option<String>, Error> {
        self.get(key, "a text", |v| v.as_str().map(str::to_string))
    }

    fn list<T>(&self, key: &str, what: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<Vec<T>>, Error> {
        self.get(key, what, |v| v.as_array()?.iter().map(&read).collect())
    }

    /// A token id or a list of them.
    fn ids(&self, key: &str) -> Result<Vec<u32>, Error> {
        let id = |v: &Value| u32::try_from(v.as_u64()?).ok();
        let ids = self.get(key, "a token id or a list of them", |v| match v {
            Value::Array(list) => list.iter().map(id).collect::<Option<Vec<_>>>(),
            one => Some(vec![id(one)?]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    /// An object below this one; empty where it is absent.
    fn inner(&self, key: &str) -> Result<Json, Error> {
        let map = self.get(key, "an object", |v| v.as_object().cloned())?.unwrap_or_default();
        Ok(Json { path: self.path.clone(), map })
    }

    fn refuse(&self, key: &str, why: impl Into<String>) -> Error {
        Error::key(&self.path, key, why)
    }
}

impl Config {
    /// Sizes by the text of a config.json; `path` names it in errors.
    pub fn parse_json(path: &Path, text: &str) -> Result<Config, Error> {
        config(&Json::parse(path, text)?)
    }
}

/// config.json with the defaults of transformers.
fn config(j: &Json) -> Result<Config, Error> {
    match j.text("model_type")? {
        Some(t) if t == "qwen3_next" => {}
        Some(t) => return Err(j.refuse("model_type", format!("is \"{}\", expected \"qwen3_next\"", shown(&t)))),
        None => return Err(j.refuse("model_type", "is missing, expected \"qwen3_next\"")),
    }
    if let Some(act) = j.text("hidden_act")?.filter(|a| a != "silu") {
        return Err(j.refuse("hidden_act", format!("is \"{}\", expected \"silu\"", shown(&act))));
    }
    if j.flag("attention_bias", false)? {
        return Err(j.refuse("attention_bias", "is true, which is not supported"));
    }
    let layers = j.sized("num_hidden_layers", 48)?;
    if !(1..=MAX_LAYERS).contains(&layers) {
        return Err(j.refuse("num_hidden_layers", format!("is {layers}, expected 1 to {MAX_LAYERS}")));
    }

    // New configs keep rotary settings in rope_parameters, older ones beside the rest.
    let rope = j.inner("rope_parameters")?;
    for inner in [&rope, &j.inner("rope_scaling")?] {
        let kind = inner.text("rope_type")?.or(inner.text("type")?);
        if let Some(kind) = kind.filter(|k| k != "default") {
            return Err(j.refuse("rope_type", format!("is \"{}\", expected \"default\"", shown(&kind))));
        }
    }
    let theta = rope.number("rope_theta")?.or(j.number("rope_theta")?).unwrap_or(10_000.0);
    let part = rope.number("partial_rotary_factor")?.or(j.number("partial_rotary_factor")?).unwrap_or(0.25);
    if !(0.0..=1.0).contains(&part) {
        return Err(j.refuse("partial_rotary_factor", format!("is {part}, expected 0 to 1")));
    }
    let head_dim = j.sized("head_dim", 256)?;
    // transformers takes the frequencies theta^(-2i/width) with 2i < width: an odd width rotates one channel more.
    let width = (head_dim as f64 * part) as usize;
    let rotary = width.saturating_add(width % 2);
    let rope_base = if width % 2 == 0 { theta } else { theta.powf(rotary as f64 / width as f64) };

    let experts = j.sized("num_experts", 512)?;
    let step = j.sized("decoder_sparse_step", 1)?;
    if step == 0 && experts > 0 {
        return Err(j.refuse("decoder_sparse_step", "is 0, expected 1 or more"));
    }
    let dense_layers = j.list("mlp_only_layers", "a list of layer numbers", |v| usize::try_from(v.as_u64()?).ok())?;
    let dense_layers = dense_layers.unwrap_or_default();
    let sparse = |i: usize| !dense_layers.contains(&i) && experts > 0 && (i + 1) % step == 0;
    let mlp: Vec<Mlp> = (0..layers).map(|i| if sparse(i) { Mlp::Moe } else { Mlp::Dense }).collect();
    let moe = if mlp.contains(&Mlp::Moe) {
        MoeConfig {
            experts,
            top_k: j.sized("num_experts_per_tok", 10)?,
            ff: j.sized("moe_intermediate_size", 512)?,
            shared_ff: j.sized("shared_expert_intermediate_size", 512)?,
            normalize: j.flag("norm_topk_prob", true)?,
        }
    } else {
        MoeConfig { experts: 0, top_k: 0, ff: 0, shared_ff: 0, normalize: true }
    };

    let config = Config {
        vocab: j.sized("vocab_size", 151_936)?,
        hidden: j.sized("hidden_size", 2048)?,
        layers: layer_kinds(j, layers)?,
        mlp,
        attention: AttentionConfig {
            heads: j.sized("num_attention_heads", 16)?,
            kv_heads: j.sized("num_key_value_heads", 2)?,
            head_dim,
            rotary,
            rope_base,
        },
        delta: DeltaConfig {
            k_heads: j.sized("linear_num_key_heads", 16)?,
            v_heads: j.sized("linear_num_value_heads", 32)?,
            k_dim: j.sized("linear_key_head_dim", 128)?,
            v_dim: j.sized("linear_value_head_dim", 128)?,
            conv_width: j.sized("linear_conv_kernel_dim", 4)?,
            head_map: HeadMap::Grouped,
        },
        moe,
        dense_ff: j.sized("intermediate_size", 5632)?,
        norm_eps: j.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        context: j.sized("max_position_embeddings", 32_768)?,
        tied: j.flag("tie_word_embeddings", false)?,
        mtp_layers: 0,
    };
    validated(config, &j.path)
}

fn layer_kinds(j: &Json, layers: usize) -> Result<Vec<LayerKind>, Error> {
    let kind = |v: &Value| match v.as_str()? {
        "linear_attention" => Some(LayerKind::Delta),
        "full_attention" => Some(LayerKind::Attention),
        _ => None,
    };
    match j.list("layer_types", "a list of linear_attention and full_attention", kind)? {
        Some(list) if list.len() == layers => Ok(list),
        Some(list) => Err(j.refuse("layer_types", format!("has {} entries, expected {layers}", list.len()))),
        None => {
            let interval = j.sized("full_attention_interval", 4)?;
            if interval == 0 {
                return Err(j.refuse("full_attention_interval", "is 0, expected 1 or more"));
            }
            let kind = |i: usize| if (i + 1) % interval == 0 { LayerKind::Attention } else { LayerKind::Delta };
            Ok((0..layers).map(kind).collect())
        }
    }
}

fn weights(c: &Config, s: &Source, progress: &mut dyn FnMut(Progress)) -> Result<Weights, Error> {
    let token_embd = s.matrix("model.embed_tokens.weight", c.vocab, c.hidden)?;
    let output = if c.tied { token_embd.clone() } else { s.matrix("lm_head.weight", c.vocab, c.hidden)? };
    let output_norm = plus_one(s.floats("model.norm.weight", &[c.hidden])?);
    let mut layers = Vec::new();
    for (i, (&kind, &mlp)) in c.layers.iter().zip(&c.mlp).enumerate() {
        let layer = Names { c, s, i };
        layers.push(Layer {
            attn_norm: plus_one(s.floats(&layer.name("input_layernorm.weight"), &[c.hidden])?),
            post_attention_norm: plus_one(s.floats(&layer.name("post_attention_layernorm.weight"), &[c.hidden])?),
            mixer: match kind {
                LayerKind::Delta => Mixer::Delta(layer.delta()?),
                LayerKind::Attention => Mixer::Attention(layer.attention()?),
            },
            ffn: match mlp {
                Mlp::Dense => Ffn::Dense(layer.swiglu("mlp", c.dense_ff)?),
                Mlp::Moe => Ffn::Moe(layer.moe()?),
            },
        });
        progress(Progress { done: i + 1, total: c.layers.len() });
    }
    Ok(Weights { token_embd, output_norm, output, layers })
}

/// Zero-centred norm weights as plain factors.
fn plus_one(weights: Vec<f32>) -> Vec<f32> {
    weights.into_iter().map(|w| 1.0 + w).collect()
}

/// Layer `model.layers.<i>`.
struct Names<'a, 's> {
    c: &'a Config,
    s: &'a Source<'s>,
    i: usize,
}

impl Names<'_, '_> {
    fn name(&self, suffix: &str) -> String {
        format!("model.layers.{}.{suffix}", self.i)
    }

    fn delta(&self) -> Result<Delta, Error> {
        let (d, hidden, s) = (&self.c.delta, self.c.hidden, self.s);
        let (keys, values) = (d.key_channels(), d.value_channels());
        let name = |suffix: &str| self.name(&format!("linear_attn.{suffix}"));
        let both = s.matrix(&name("in_proj_qkvz.weight"), 2 * keys + 2 * values, hidden)?;
        let (qkv, z) = deinterleave(&both, d)
            .ok_or_else(|| Error::tensor(s.path(), &name("in_proj_qkvz.weight"), "cannot be split by key head"))?;
        let a_log = s.floats(&name("A_log"), &[d.v_heads])?;
        Ok(Delta {
            qkv,
            z,
            ba: s.matrix(&name("in_proj_ba.weight"), 2 * d.v_heads, hidden)?,
            conv: s.floats(&name("conv1d.weight"), &[d.conv_channels(), 1, d.conv_width])?,
            dt_bias: s.floats(&name("dt_bias"), &[d.v_heads])?,
            a: a_log.into_iter().map(|x| -(f64::from(x).exp()) as f32).collect(),
            norm: s.floats(&name("norm.weight"), &[d.v_dim])?,
            out: s.matrix(&name("out_proj.weight"), hidden, values)?,
        })
    }

    fn attention(&self) -> Result<Attention, Error> {
        let (a, hidden, s) = (&self.c.attention, self.c.hidden, self.s);
        let (queries, keys) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
        let name = |suffix: &str| self.name(&format!("self_attn.{suffix}.weight"));
        Ok(Attention {
            q: s.matrix(&name("q_proj"), 2 * queries, hidden)?,
            k: s.matrix(&name("k_proj"), keys, hidden)?,
            v: s.matrix(&name("v_proj"), keys, hidden)?,
            o: s.matrix(&name("o_proj"), hidden, queries)?,
            q_norm: plus_one(s.floats(&name("q_norm"), &[a.head_dim])?),
            k_norm: plus_one(s.floats(&name("k_norm"), &[a.head_dim])?),
        })
    }

    fn swiglu(&self, prefix: &str, ff: usize) -> Result<Swiglu, Error> {
        let (hidden, s) = (self.c.hidden, self.s);
        let name = |suffix: &str| self.name(&format!("{prefix}.{suffix}_proj.weight"));
        Ok(Swiglu {
            gate: s.matrix(&name("gate"), ff, hidden)?,
            up: s.matrix(&name("up"), ff, hidden)?,
            down: s.matrix(&name("down"), hidden, ff)?,
        })
    }

    fn moe(&self) -> Result<Moe, Error> {
        let (m, hidden, s) = (&self.c.moe, self.c.hidden, self.s);
        let fused = self.name("mlp.experts.gate_up_proj");
        let (gate, up, down) = if s.has(&fused) {
            let both = s.experts(&fused, [m.experts, 2 * m.ff, hidden])?;
            let half = |first| {
                both.row_range(first, m.ff)
                    .ok_or_else(|| Error::tensor(s.path(), &fused, "cannot be split into gate and up"))
            };
            (half(0)?, half(m.ff)?, s.experts(&self.name("mlp.experts.down_proj"), [m.experts, hidden, m.ff])?)
        } else {
            (
                self.separate("gate_proj", m.ff, hidden)?,
                self.separate("up_proj", m.ff, hidden)?,
                self.separate("down_proj", hidden, m.ff)?,
            )
        };
        let gate_vec = self.name("mlp.shared_expert_gate.weight");
        let shared = match m.shared_ff {
            0 => {
                s.ignore(&gate_vec);
                for part in ["gate", "up", "down"] {
                    s.ignore(&self.name(&format!("mlp.shared_expert.{part}_proj.weight")));
                }
                None
            }
            ff => Some(Shared {
                gate_vec: s.floats(&gate_vec, &[hidden])?,
                expert: self.swiglu("mlp.shared_expert", ff)?,
            }),
        };
        let router = s.matrix(&self.name("mlp.gate.weight"), m.experts, hidden)?;
        Ok(Moe { router, gate, up, down, shared })
    }

    /// One tensor an expert as one tensor: a view where they lie at equal distances in one file, else a copy.
    fn separate(&self, projection: &str, rows: usize, cols: usize) -> Result<Tensor, Error> {
        let (experts, s) = (self.c.moe.experts, self.s);
        let name = |e: usize| self.name(&format!("mlp.experts.{e}.{projection}.weight"));
        let mut parts = Vec::new();
        for e in 0..experts {
            parts.push(s.found(&name(e), &[rows, cols])?);
        }
        let bad = |e: usize, why: &str| Error::tensor(s.path(), &name(e), why);
        let Some((first, dtype)) = parts.first() else { return Err(bad(0, "is missing")) };
        if let Some(e) = parts.iter().position(|(_, d)| d != dtype) {
            return Err(bad(e, "has another type than expert 0"));
        }
        let shape = [experts, rows, cols];
        let element = dtype.block_bytes();
        let step = parts.get(1).map_or(Some(rows * cols * element), |(p, _)| p.start.checked_sub(first.start));
        let even = |step: usize| {
            let follows = |(e, (p, _)): (usize, &(Found, _))| p.path == first.path && p.start == first.start + e * step;
            step % element == 0 && parts.iter().enumerate().all(follows)
        };
        if let Some(step) = step.filter(|&step| even(step)) {
            if let Some(view) = Tensor::new(first.store.clone(), first.start, *dtype, shape, step / element) {
                return Ok(view);
            }
        }
        let bytes = rows * cols * element;
        let copy = Tensor::owned(*dtype, shape, |out| {
            for (to, (part, _)) in out.chunks_exact_mut(bytes.max(1)).zip(&parts) {
                to.copy_from_slice(part.store.bytes().get(part.start..)?.get(..bytes)?);
            }
            Some(())
        });
        copy.ok_or_else(|| bad(0, "does not fit its type"))
    }
}

#[cfg(test)]
mod tests {
    use super::{config, Json};

    #[test]
    fn an_odd_rotary_width_keeps_its_frequencies() {
        let json = serde_json::json!({"model_type": "qwen3_next", "head_dim": 20, "rope_theta": 1e6});
        let json = Json { path: "config.json".into(), map: json.as_object().cloned().unwrap_or_default() };
        let a = config(&json).unwrap().attention;
        assert_eq!(a.rotary, 6);
        for i in 0..3 {
            let (got, expected) = (a.rope_base.powf(-f64::from(2 * i) / 6.0), 1e6f64.powf(-f64::from(2 * i) / 5.0));
            assert!((got / expected - 1.0).abs() < 1e-12, "{i}: {got} {expected}");
        }
    }
}
