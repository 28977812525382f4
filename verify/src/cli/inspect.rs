//! `qwen3next inspect`: config, tensors, types, sizes, bytes of state and cache.

use crate::cli::model;
use crate::Done;
use qwen3next_model::config::{LayerKind, Mlp};
use qwen3next_model::CacheTypes;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// GGUF file or Hugging Face folder; by default the embedded model.
    model: Option<PathBuf>,
    /// Format of the result.
    #[arg(short, long, default_value = "text", value_parser = ["text", "json"])]
    output: String,
    /// Also list every tensor.
    #[arg(long)]
    tensors: bool,
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    let loaded = model::load(args.model.as_deref())?;
    let (c, meta) = (loaded.model.config(), &loaded.metadata);
    let (a, d, m) = (&c.attention, &c.delta, &c.moe);
    let mut types: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for t in &meta.tensors {
        let entry = types.entry(&t.dtype).or_default();
        *entry = (entry.0 + 1, entry.1 + t.bytes);
    }
    let kv_bytes = c.kv_elements() * size_of::<f32>();
    let kv_types: Vec<(String, Option<usize>)> =
        CacheTypes::ALL.into_iter().map(|t| (t.to_string(), CacheTypes { k: t, v: t }.bytes_per_token(c))).collect();
    let kinds: String = c.layers.iter().map(|k| if *k == LayerKind::Delta { 'D' } else { 'A' }).collect();

    let mut out = std::io::stdout().lock();
    if args.output == "json" {
        let tensors: Vec<_> = meta
            .tensors
            .iter()
            .map(|t| json!({"name": t.name, "type": t.dtype, "shape": t.shape, "bytes": t.bytes, "used": t.used}))
            .collect();
        let document = json!({
            "model": loaded.name, "name": meta.name, "container": meta.container, "files": meta.files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>(),
            "file_bytes": meta.file_bytes, "parameters": meta.parameters(), "vocab": c.vocab, "hidden": c.hidden,
            "layers": kinds, "context": c.context, "norm_eps": c.norm_eps, "tied": c.tied, "mtp_layers": c.mtp_layers,
            "attention": {"heads": a.heads, "kv_heads": a.kv_heads, "head_dim": a.head_dim, "rotary": a.rotary,
                "rope_base": a.rope_base},
            "delta": {"k_heads": d.k_heads, "v_heads": d.v_heads, "k_dim": d.k_dim, "v_dim": d.v_dim,
                "conv_width": d.conv_width},
            "moe": {"experts": m.experts, "top_k": m.top_k, "ff": m.ff, "shared_ff": m.shared_ff,
                "normalize": m.normalize},
            "dense_ff": c.dense_ff, "state_bytes": c.state_bytes(), "kv_bytes_per_token": kv_bytes,
            "kv_bytes_per_token_by_type": kv_types.iter().cloned().collect::<BTreeMap<_, _>>(),
            "types": types.iter().map(|(k, v)| (k.to_string(), json!({"tensors": v.0, "bytes": v.1})))
                .collect::<serde_json::Map<_, _>>(),
            "tensors": tensors,
        });
        writeln!(out, "{}", serde_json::to_string_pretty(&document)?)?;
        return Ok(Done::Ok);
    }

    writeln!(
        out,
        "{} ({}{})",
        loaded.name,
        meta.container,
        meta.name.iter().map(|n| format!(", {n}")).collect::<String>()
    )?;
    writeln!(
        out,
        "parameters      {} in {} tensors, {} bytes of files",
        meta.parameters(),
        meta.tensors.len(),
        meta.file_bytes
    )?;
    for (name, (count, bytes)) in &types {
        writeln!(out, "  {name:<13} {count} tensors, {bytes} bytes")?;
    }
    writeln!(
        out,
        "layers          {} = {kinds} (D DeltaNet, A attention), {} MTP skipped",
        c.layers.len(),
        c.mtp_layers
    )?;
    writeln!(
        out,
        "hidden          {}, vocabulary {}{}, context {}",
        c.hidden,
        c.vocab,
        if c.tied { " (tied)" } else { "" },
        c.context
    )?;
    writeln!(
        out,
        "attention       HQ {} HKV {} D {} rotary {} base {}",
        a.heads, a.kv_heads, a.head_dim, a.rotary, a.rope_base
    )?;
    writeln!(
        out,
        "delta           HK {} HV {} K {} V {} conv {}",
        d.k_heads, d.v_heads, d.k_dim, d.v_dim, d.conv_width
    )?;
    if c.mlp.contains(&Mlp::Moe) {
        let renormalised = if m.normalize { "renormalised" } else { "not renormalised" };
        writeln!(
            out,
            "moe             {} experts of {}, top {} {renormalised}, shared {}",
            m.experts, m.ff, m.top_k, m.shared_ff
        )?;
    }
    if c.mlp.contains(&Mlp::Dense) {
        let layers = c.mlp.iter().filter(|m| **m == Mlp::Dense).count();
        writeln!(out, "dense           {layers} layers of {}", c.dense_ff)?;
    }
    writeln!(out, "state           {} bytes a sequence (f32)", c.state_bytes())?;
    let kv: Vec<String> =
        kv_types.iter().filter_map(|(t, bytes)| bytes.map(|bytes| format!("{bytes} ({t})"))).collect();
    writeln!(out, "kv cache        bytes a token: {}", kv.join(", "))?;
    if args.tensors {
        for t in &meta.tensors {
            writeln!(
                out,
                "{:<44} {:<6} {:?} {} bytes{}",
                t.name,
                t.dtype,
                t.shape,
                t.bytes,
                if t.used { "" } else { " (not used)" }
            )?;
        }
    }
    Ok(Done::Ok)
}
