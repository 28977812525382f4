//! `qwen3next quantize`: a model with its matrices in another type.

use crate::Done;
use qwen3next_kernels::DType;
use qwen3next_model::quantize::{quantize, Types};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// GGUF file (any part of a split one) or Hugging Face folder.
    input: PathBuf,
    /// GGUF file to write.
    out: PathBuf,
    /// Type of the matrices.
    #[arg(short = 'q', long = "type", value_name = "TYPE", value_parser = parse)]
    dtype: DType,
    /// Type of the output projection, where it is another one.
    #[arg(long, value_name = "TYPE", value_parser = parse)]
    output_tensor_type: Option<DType>,
    /// Type of the token embedding, where it is another one.
    #[arg(long, value_name = "TYPE", value_parser = parse)]
    token_embedding_type: Option<DType>,
    /// Format of the result.
    #[arg(short, long, default_value = "text", value_parser = ["text", "json"])]
    output: String,
}

/// A type by its name, in any case. llama.cpp also names mixtures, which are refused: here one type is one type.
fn parse(text: &str) -> Result<DType, String> {
    if let Some(dtype) = DType::from_name(text) {
        return Ok(dtype);
    }
    let mixture = ["_S", "_M", "_L", "_XL", "_MOE"].iter().find_map(|end| {
        let of = text.len().checked_sub(end.len()).and_then(|at| text.get(..at))?;
        text.to_ascii_uppercase().ends_with(end).then(|| DType::from_name(of)).flatten()
    });
    let names = || DType::ALL.map(|t| t.name().to_uppercase()).join(", ");
    Err(match mixture {
        Some(of) => {
            let of = of.name().to_uppercase();
            format!("is a mixture of types; {of} makes all matrices {of}, --output-tensor-type makes one finer")
        }
        None => format!("expected one of {}", names()),
    })
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    let types = Types {
        matrices: args.dtype,
        output: args.output_tensor_type.unwrap_or(args.dtype),
        embedding: args.token_embedding_type.unwrap_or(args.dtype),
    };
    let bar = super::progress(0, "quantize {wide_bar} {bytes}/{total_bytes} {eta}");
    let report = quantize(&args.input, &args.out, types, &mut |progress| {
        bar.set_length(progress.total as u64);
        bar.set_position(progress.done as u64);
    })?;
    bar.finish_and_clear();
    for warning in &report.warnings {
        eprintln!("warning: {warning}");
    }
    let mut out = std::io::stdout().lock();
    if args.output == "json" {
        let types = report.types.iter().map(|(name, of)| {
            let entry = json!({"tensors": of.tensors, "bytes": of.bytes, "relative_error": of.relative_error()});
            (name.to_string(), entry)
        });
        let document = json!({
            "out": args.out.display().to_string(), "types": types.collect::<serde_json::Map<_, _>>(),
            "warnings": report.warnings,
        });
        writeln!(out, "{}", serde_json::to_string_pretty(&document)?)?;
        return Ok(Done::Ok);
    }
    writeln!(out, "{}", args.out.display())?;
    for (name, of) in &report.types {
        writeln!(
            out,
            "  {name:<7} {:>5} tensors, {} bytes, relative error {:.2e}",
            of.tensors,
            of.bytes,
            of.relative_error()
        )?;
    }
    Ok(Done::Ok)
}
