//! `qwen3next perplexity`: perplexity of a text, and its divergence from saved logits.

use crate::cli::{model, npy};
use crate::Done;
use anyhow::bail;
use qwen3next_model::perplexity::{divergence, negative_log_likelihood, scored_rows, top, windows_cached, Scored, Sum};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: model::Args,
    /// Text; by default, with the embedded model, the text it was not trained on.
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// Tokens of a window; windows do not overlap and start from an empty state.
    #[arg(short, long, default_value_t = 512, value_parser = model::at_least_one)]
    ctx: usize,
    /// Score every position of a window, not its second half alone.
    #[arg(long)]
    all_positions: bool,
    /// Only the first so many windows.
    #[arg(long, value_parser = model::at_least_one)]
    windows: Option<usize>,
    /// Also save the logits of the scored positions, float32 [positions, vocab].
    #[arg(long, value_name = "FILE.npy")]
    save_logits: Option<PathBuf>,
    /// Logits saved by another run on the same text: print the divergence from them.
    #[arg(long, value_name = "FILE.npy")]
    kl_base: Option<PathBuf>,
    /// Format of the result.
    #[arg(short, long, default_value = "text", value_parser = ["text", "json"])]
    output: String,
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    let text = match (&args.file, &args.model.model) {
        (Some(path), _) => super::read_text(path)?,
        (None, None) => qwen3next_model::embedded::HELD_OUT.to_string(),
        (None, Some(_)) => bail!("--file: expected a text to read with this model"),
    };
    let loaded = args.model.load()?;
    let mut tokens = loaded.tokenizer()?.encode(&text, false)?;
    super::expect_window(args.ctx, tokens.len())?;
    if let Some(n) = args.windows {
        tokens.truncate(n.saturating_mul(args.ctx));
    }
    let scored = if args.all_positions { Scored::All } else { Scored::SecondHalf };
    let vocab = loaded.model.config().vocab;
    let rows = scored_rows(tokens.len(), args.ctx, scored);
    let mut base = args.kl_base.as_deref().map(|path| npy::Reader::open(path, rows, vocab)).transpose()?;
    let mut save = args.save_logits.as_deref().map(|path| npy::Writer::create(path, rows, vocab)).transpose()?;

    let bar = super::progress((tokens.len() / args.ctx) as u64, "perplexity {wide_bar} {pos}/{len} {msg} {eta}");
    let (mut nll, mut kl, mut kls, mut agree, mut row) = (Sum::default(), Sum::default(), Vec::new(), 0usize, 0usize);
    let mut base_nll = Sum::default();
    let (options, cache, batch) = (args.model.exact()?, args.model.cache(), args.model.batch);
    windows_cached(&loaded.model, &tokens, args.ctx, scored, batch, &options, cache, |window| -> anyhow::Result<()> {
        for (logits, &next) in window.logits.chunks_exact(vocab).zip(window.next) {
            let likelihood = negative_log_likelihood(logits, next)?;
            anyhow::ensure!(!likelihood.is_nan(), "window {}: a logit is NaN", window.index);
            nll.add(likelihood);
            if let Some(base) = &mut base {
                let base = base.row()?;
                base_nll.add(negative_log_likelihood(&base, next)?);
                let d = divergence(&base, logits);
                kl.add(d);
                kls.push(d);
                agree += usize::from(top(&base) == top(logits));
            }
            row += 1;
        }
        if let Some(save) = &mut save {
            save.write(window.logits)?;
        }
        bar.inc(1);
        bar.set_message(format!("PPL {:.4}", nll.perplexity()));
        Ok(())
    })?;
    bar.finish_and_clear();
    if let Some(save) = save {
        save.finish()?;
    }

    kls.sort_by(f64::total_cmp);
    let p999 = kls.get((kls.len() * 999).div_ceil(1000).saturating_sub(1)).copied();
    let agreement = agree as f64 / row.max(1) as f64;
    let ratio = nll.perplexity() / base_nll.perplexity();
    let mut out = std::io::stdout().lock();
    if args.output == "json" {
        let mut result = json!({
            "model": loaded.name, "tokens": tokens.len(), "ctx": args.ctx, "scored": nll.count(),
            "ppl": nll.perplexity(), "ppl_error": nll.perplexity_error(), "nll": nll.mean(),
        });
        if base.is_some() {
            result["kl_mean"] = json!(kl.mean());
            result["kl_error"] = json!(kl.error());
            result["kl_p99_9"] = json!(p999);
            result["top1_agreement"] = json!(agreement);
            result["ppl_ratio"] = json!(ratio);
        }
        writeln!(out, "{}", serde_json::to_string_pretty(&result)?)?;
    } else {
        writeln!(
            out,
            "PPL = {:.4} +/- {:.4}  ({} positions in {} windows of {} tokens)",
            nll.perplexity(),
            nll.perplexity_error(),
            nll.count(),
            tokens.len() / args.ctx,
            args.ctx
        )?;
        if let Some(p999) = p999 {
            writeln!(
                out,
                "KL divergence from the base: mean {:.3e} +/- {:.1e}, p99.9 {p999:.3e}",
                kl.mean(),
                kl.error()
            )?;
            writeln!(out, "top-1 agreement {:.4} %, PPL ratio {ratio:.6}", 100.0 * agreement)?;
        }
    }
    Ok(Done::Ok)
}
