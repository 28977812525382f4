//! A model with its matrices in another type, and everything else as it was.
//!
//! Norms, biases, the convolution and the router stay f32, as llama.cpp keeps them: they are small, and an error in
//! them reaches every token. Of a GGUF file all keys are kept byte for byte but those that say how it is stored; a
//! Hugging Face folder gets the keys that its config has in GGUF.

use crate::config::{Config, LayerKind};
use crate::error::Error;
use crate::file::Options;
use crate::gguf::{self, Gguf, Put, Writer};
use crate::load_gguf;
use crate::load_hf;
use crate::source::Progress;
use crate::weights::{Ffn, Mixer, Swiglu, Tensor, Weights};
use qwen3next_kernels::quant::{to_bytes, to_floats};
use qwen3next_kernels::{DType, View, Weight};
use std::collections::BTreeMap;
use std::path::Path;

/// What the matrices become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Types {
    /// All but the following two.
    pub matrices: DType,
    /// The output projection.
    pub output: DType,
    /// The token embedding, which is the output projection too in tied models.
    pub embedding: DType,
}

impl Types {
    /// One type for all.
    pub fn all(dtype: DType) -> Types {
        Types { matrices: dtype, output: dtype, embedding: dtype }
    }
}

/// What was written.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// By the name of the type.
    pub types: BTreeMap<&'static str, OfType>,
    /// Sentences about what is not as asked.
    pub warnings: Vec<String>,
}

/// The tensors of one type.
#[derive(Debug, Clone, Copy, Default)]
pub struct OfType {
    /// Tensors.
    pub tensors: usize,
    /// Bytes of their data.
    pub bytes: usize,
    /// Sum of the squares of what the input holds.
    pub squares: f64,
    /// Sum of the squared differences to what the output holds.
    pub errors: f64,
}

impl OfType {
    /// Root mean square error, relative to the values.
    pub fn relative_error(&self) -> f64 {
        if self.errors > 0.0 {
            (self.errors / self.squares).sqrt()
        } else {
            0.0
        }
    }
}

/// A tensor to write.
struct Job {
    name: String,
    /// Columns last.
    shape: Vec<usize>,
    from: Tensor,
    to: DType,
}

/// Numbers converted at a time.
const CHUNK: usize = 1 << 21;

/// Writes the model at `input` (GGUF, any part of a split one, or a Hugging Face folder) as one GGUF file. `progress`
/// counts bytes of the input's tensors.
pub fn quantize(
    input: &Path,
    output: &Path,
    types: Types,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, Error> {
    let meta = std::fs::metadata(input).map_err(|e| Error::io(input, e))?;
    let (writer, mut jobs, warnings) = if meta.is_dir() { of_folder(input, types)? } else { of_gguf(input, types)? };
    let mut report = Report { warnings, ..Report::default() };
    fit(&mut jobs, &mut report.warnings);
    write(input, output, writer, &jobs, &mut report, progress)?;
    Ok(report)
}

fn write(
    input: &Path,
    output: &Path,
    mut writer: Writer,
    jobs: &[Job],
    report: &mut Report,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), Error> {
    for job in jobs {
        writer.tensor(&job.name, job.to, &job.shape);
    }
    let total = jobs.iter().map(|job| job.from.packed_bytes()).sum();
    let mut done = 0;
    writer.write(output, |i, out| {
        let Some(job) = jobs.get(i) else { return Err(Error::argument("tensor", "is not planned")) };
        let of_type = report.types.entry(job.to.name()).or_default();
        of_type.tensors += 1;
        for expert in 0..job.from.experts() {
            let rows = (CHUNK / job.from.cols().max(1)).max(1);
            for first in (0..job.from.rows()).step_by(rows) {
                let count = rows.min(job.from.rows() - first);
                let part = job.from.expert(expert).and_then(|matrix| matrix.row_range(first, count));
                let part = part.ok_or_else(|| Error::tensor(input, &job.name, "cannot be cut into rows"))?;
                let bytes = convert(&part, job.to, of_type).map_err(|why| Error::tensor(input, &job.name, why))?;
                out.write_all(&bytes).map_err(|e| Error::io(output, e))?;
                of_type.bytes += bytes.len();
                done += part.packed_bytes();
                progress(Progress { done, total });
            }
        }
        Ok(())
    })
}

/// Rows of a matrix as packed rows of another type. Only finite numbers go in, and only such come out.
fn convert(part: &Tensor, to: DType, stats: &mut OfType) -> Result<Vec<u8>, String> {
    let shape = [part.rows(), part.cols()];
    let text = |e: qwen3next_kernels::Error| e.to_string();
    let floats = |dtype, bytes: &[u8]| to_floats(Weight::new(bytes, dtype, shape).map_err(text)?).map_err(text);
    let values = floats(part.dtype(), part.bytes())?;
    if values.iter().any(|x| !x.is_finite()) {
        return Err("holds a NaN or an infinity".into());
    }
    stats.squares += values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
    if part.dtype() == to {
        return Ok(part.bytes().to_vec());
    }
    let bytes = to_bytes(to, View::new(&values, shape).map_err(text)?).map_err(text)?;
    let back = floats(to, &bytes)?;
    if back.iter().any(|x| !x.is_finite()) {
        let most = values.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        return Err(format!("holds {most:e}, which is past the range of {to}"));
    }
    stats.errors += values.iter().zip(&back).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum::<f64>();
    Ok(bytes)
}

/// The type of a tensor in the output.
fn target(name: &str, shape: &[usize], types: Types) -> DType {
    const F32: [&str; 4] = ["_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight"];
    if shape.len() < 2 || !name.ends_with(".weight") || F32.iter().any(|end| name.ends_with(end)) {
        return DType::F32;
    }
    match name {
        "output.weight" => types.output,
        "token_embd.weight" => types.embedding,
        _ => types.matrices,
    }
}

/// What llama.cpp takes where rows are no multiple of a type's block.
fn fallback(dtype: DType) -> DType {
    match dtype {
        DType::Q2_K | DType::Q3_K | DType::IQ4_XS => DType::IQ4_NL,
        DType::Q4_K => DType::Q5_0,
        DType::Q5_K => DType::Q5_1,
        DType::Q6_K => DType::Q8_0,
        _ => DType::F16,
    }
}

/// Gives jobs whose rows their type cannot hold another one, and says so once a type and row length.
fn fit(jobs: &mut [Job], warnings: &mut Vec<String>) {
    let mut fell: BTreeMap<(&str, usize), (&str, usize, String)> = BTreeMap::new();
    for job in jobs {
        let (asked, columns) = (job.to, job.from.cols());
        while columns % job.to.block() != 0 {
            job.to = fallback(job.to);
        }
        if job.to != asked {
            let entry = fell.entry((asked.name(), columns));
            entry.or_insert_with(|| (job.to.name(), 0, job.name.clone())).1 += 1;
        }
    }
    for ((asked, columns), (got, count, first)) in fell {
        let others = if count > 1 { format!(" and {} more", count - 1) } else { String::new() };
        warnings.push(format!("{first}{others}: rows of {columns} are no multiple of {asked}'s block, {got} is used"));
    }
}

/// llama.cpp's number of a file whose matrices are of one type.
fn file_type(dtype: DType) -> Option<u32> {
    Some(match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Q4_0 => 2,
        DType::Q4_1 => 3,
        DType::Q8_0 => 7,
        DType::Q5_0 => 8,
        DType::Q5_1 => 9,
        DType::Q2_K => 10,
        DType::Q3_K => 11,
        DType::Q4_K => 14,
        DType::Q5_K => 16,
        DType::Q6_K => 18,
        DType::IQ4_NL => 25,
        DType::IQ4_XS => 30,
        DType::BF16 => 32,
        DType::MXFP4 => 38,
        _ => return None,
    })
}

const FILE_TYPE: &str = "general.file_type";
const QUANTIZATION_VERSION: &str = "general.quantization_version";

/// The keys that say how the tensors are stored.
fn storage(types: Types) -> [Option<(&'static str, Put)>; 2] {
    let version = (types.matrices.block() > 1).then_some((QUANTIZATION_VERSION, Put::U32(2)));
    [file_type(types.matrices).map(|number| (FILE_TYPE, Put::U32(number))), version]
}

type Planned = (Writer, Vec<Job>, Vec<String>);

fn of_gguf(input: &Path, types: Types) -> Result<Planned, Error> {
    let parts = gguf::open_all(input, Options::default())?;
    // Whatever is wrong with the model is said before anything is written.
    let mut warnings = load_gguf::load_parts(input, &parts, &mut |_| ())?.metadata.warnings;
    warnings.retain(|w| !w.starts_with("the MTP block"));
    let mut writer = Writer::default();
    for (key, kind, bytes) in parts.first().into_iter().flat_map(Gguf::raw_keys) {
        match key {
            FILE_TYPE | QUANTIZATION_VERSION | "split.no" | "split.count" | "split.tensors.count" => {}
            "general.alignment" => {
                let alignment = parts.first().map(|p| p.uint(key)).transpose()?.flatten().unwrap_or(32);
                writer.align(alignment);
            }
            _ => {
                writer.put(key, Put::Raw(kind, bytes.to_vec()));
            }
        }
    }
    for (key, value) in storage(types).into_iter().flatten() {
        writer.put(key, value);
    }
    let mut jobs = Vec::new();
    for part in &parts {
        for entry in part.tensors() {
            let bad = |why: String| Error::tensor(part.path(), &entry.name, why);
            let dtype = gguf::supported(entry).map_err(bad)?;
            let shape: Vec<usize> = entry.dims.iter().rev().copied().collect();
            let cols = shape.last().copied().unwrap_or(0);
            let rows = shape.iter().rev().skip(1).product::<usize>();
            let from = Tensor::new(part.store().clone(), entry.start, dtype, [1, rows, cols], rows * cols);
            let from = from.ok_or_else(|| bad(format!("shape {shape:?} does not fit type {dtype}")))?;
            jobs.push(Job { name: entry.name.clone(), to: target(&entry.name, &shape, types), shape, from });
        }
    }
    Ok((writer, jobs, warnings))
}

fn of_folder(input: &Path, types: Types) -> Result<Planned, Error> {
    let loaded = load_hf::load(input, Options::default(), &mut |_| ())?;
    let (c, mut warnings) = (&loaded.config, loaded.metadata.warnings);
    let mut writer = Writer::new("qwen3next");
    if let Some(name) = loaded.metadata.name {
        writer.put("general.name", Put::Str(name));
    }
    keys(c, &mut writer);
    match loaded.tokenizer.and_then(|t| t.gguf_keys(&input.join("tokenizer.json"))) {
        Ok(tokenizer) => {
            for (key, value) in tokenizer {
                writer.put(format!("tokenizer.ggml.{key}"), value);
            }
            if let Some(template) = loaded.metadata.chat_template {
                writer.put("tokenizer.chat_template", Put::Str(template));
            }
        }
        Err(why) => {
            warnings.push(format!("no tokenizer is written: {why}"));
            writer.put("tokenizer.ggml.model", Put::Str("none".into()));
        }
    }
    for (key, value) in storage(types).into_iter().flatten() {
        writer.put(key, value);
    }
    let mut jobs = Jobs { types, jobs: Vec::new() };
    jobs.model(c, &loaded.weights)?;
    Ok((writer, jobs.jobs, warnings))
}

/// The sizes of a model as the keys of its architecture.
fn keys(c: &Config, writer: &mut Writer) {
    let (a, d, m) = (&c.attention, &c.delta, &c.moe);
    let sizes = [
        ("block_count", c.layers.len()),
        ("context_length", c.context),
        ("embedding_length", c.hidden),
        ("feed_forward_length", c.dense_ff),
        ("attention.head_count", a.heads),
        ("attention.head_count_kv", a.kv_heads),
        ("attention.key_length", a.head_dim),
        ("attention.value_length", a.head_dim),
        ("rope.dimension_count", a.rotary),
        ("expert_count", m.experts),
        ("expert_used_count", m.top_k),
        ("expert_feed_forward_length", m.ff),
        ("expert_shared_feed_forward_length", m.shared_ff),
        ("ssm.conv_kernel", d.conv_width),
        ("ssm.state_size", d.k_dim),
        ("ssm.group_count", d.k_heads),
        ("ssm.time_step_rank", d.v_heads),
        ("ssm.inner_size", d.value_channels()),
        ("vocab_size", c.vocab),
    ];
    for (key, size) in sizes {
        writer.put(format!("qwen3next.{key}"), Put::U32(size as u32));
    }
    writer.put("qwen3next.attention.layer_norm_rms_epsilon", Put::F32(c.norm_eps));
    writer.put("qwen3next.rope.freq_base", Put::F32(a.rope_base as f32));
    if m.experts > 0 {
        writer.put("qwen3next.expert_weights_norm", Put::Bool(m.normalize));
    }
    let recurrent = c.layers.iter().map(|&kind| kind == LayerKind::Delta).collect();
    writer.put("qwen3next.attention.recurrent_layers", Put::Bools(recurrent));
}

/// Collects tensors under their GGUF names.
struct Jobs {
    types: Types,
    jobs: Vec<Job>,
}

impl Jobs {
    fn tensor(&mut self, name: String, from: &Tensor) {
        let [experts, rows, cols] = from.shape();
        let stacked = name.ends_with("_exps.weight");
        let shape = if stacked { vec![experts, rows, cols] } else { vec![rows, cols] };
        let to = target(&name, &shape, self.types);
        self.jobs.push(Job { name, shape, from: from.clone(), to });
    }

    fn floats(&mut self, name: String, values: &[f32], shape: &[usize]) -> Result<(), Error> {
        let cols = shape.last().copied().unwrap_or(0);
        let from = Tensor::from_f32(values, [1, shape.iter().rev().skip(1).product(), cols])?;
        self.jobs.push(Job { name, shape: shape.to_vec(), from, to: DType::F32 });
        Ok(())
    }

    fn vector(&mut self, name: String, values: &[f32]) -> Result<(), Error> {
        self.floats(name, values, &[values.len()])
    }

    fn swiglu(&mut self, block: &dyn Fn(&str) -> String, suffix: &str, s: &Swiglu) {
        for (part, from) in [("gate", &s.gate), ("up", &s.up), ("down", &s.down)] {
            self.tensor(block(&format!("ffn_{part}{suffix}.weight")), from);
        }
    }

    fn model(&mut self, c: &Config, w: &Weights) -> Result<(), Error> {
        self.tensor("token_embd.weight".into(), &w.token_embd);
        self.vector("output_norm.weight".into(), &w.output_norm)?;
        if !c.tied {
            self.tensor("output.weight".into(), &w.output);
        }
        for (i, layer) in w.layers.iter().enumerate() {
            let block = |suffix: &str| format!("blk.{i}.{suffix}");
            self.vector(block("attn_norm.weight"), &layer.attn_norm)?;
            self.vector(block("post_attention_norm.weight"), &layer.post_attention_norm)?;
            match &layer.mixer {
                Mixer::Delta(d) => {
                    self.tensor(block("attn_qkv.weight"), &d.qkv);
                    self.tensor(block("attn_gate.weight"), &d.z);
                    self.tensor(block("ssm_ba.weight"), &d.ba);
                    self.floats(block("ssm_conv1d.weight"), &d.conv, &[c.delta.conv_channels(), c.delta.conv_width])?;
                    self.vector(block("ssm_dt.bias"), &d.dt_bias)?;
                    self.vector(block("ssm_a"), &d.a)?;
                    self.vector(block("ssm_norm.weight"), &d.norm)?;
                    self.tensor(block("ssm_out.weight"), &d.out);
                }
                Mixer::Attention(a) => {
                    for (name, from) in [("q", &a.q), ("k", &a.k), ("v", &a.v), ("output", &a.o)] {
                        self.tensor(block(&format!("attn_{name}.weight")), from);
                    }
                    self.vector(block("attn_q_norm.weight"), &a.q_norm)?;
                    self.vector(block("attn_k_norm.weight"), &a.k_norm)?;
                }
            }
            match &layer.ffn {
                Ffn::Dense(s) => self.swiglu(&block, "", s),
                Ffn::Moe(m) => {
                    self.tensor(block("ffn_gate_inp.weight"), &m.router);
                    for (part, from) in [("gate", &m.gate), ("up", &m.up), ("down", &m.down)] {
                        self.tensor(block(&format!("ffn_{part}_exps.weight")), from);
                    }
                    if let Some(shared) = &m.shared {
                        self.vector(block("ffn_gate_inp_shexp.weight"), &shared.gate_vec)?;
                        self.swiglu(&block, "_shexp", &shared.expert);
                    }
                }
            }
        }
        Ok(())
    }
}
