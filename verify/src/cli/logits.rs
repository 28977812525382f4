//! `qwen3next logits`: logits as .npy, for comparison with other engines.

use crate::cli::{model, npy};
use crate::Done;
use anyhow::{bail, Context};
use qwen3next_model::Batch;
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("input").required(true))]
pub struct Args {
    #[command(flatten)]
    model: model::Args,
    /// Token ids, separated by commas.
    #[arg(long, group = "input", value_name = "1,2,3")]
    tokens: Option<String>,
    /// File of token ids, separated by commas or white space, or a JSON array.
    #[arg(long, group = "input", value_name = "FILE")]
    tokens_file: Option<PathBuf>,
    /// Text, tokenised by the model's tokenizer.
    #[arg(long, group = "input")]
    text: Option<String>,
    /// File to write: float32, [n, vocab] with --all, else [1, vocab].
    #[arg(long, value_name = "FILE.npy")]
    out: PathBuf,
    /// Logits of every token, not of the last one alone.
    #[arg(long)]
    all: bool,
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    let given = match (&args.tokens, &args.tokens_file) {
        (Some(list), _) => Some(parse(list).context("--tokens")?),
        (_, Some(path)) => {
            let text = super::read_text(path)?;
            Some(parse(&text).with_context(|| format!("{}", path.display()))?)
        }
        _ => None,
    };
    let loaded = args.model.load()?;
    let tokens = match (given, &args.text) {
        (Some(tokens), _) => tokens,
        (None, text) => loaded.tokenizer()?.encode(text.as_deref().unwrap_or_default(), true)?,
    };
    if tokens.is_empty() {
        bail!("no tokens: expected at least one");
    }

    let config = loaded.model.config();
    let mut state = loaded.model.state(1, tokens.len(), args.model.cache())?;
    let rows = if args.all { tokens.len() } else { 1 };
    let mut out = npy::Writer::create(&args.out, rows, config.vocab)?;
    let bar = super::progress(tokens.len() as u64, "logits {wide_bar} {pos}/{len} {eta}");
    let options = args.model.exact()?;
    let mut left = tokens.len();
    for piece in tokens.chunks(args.model.batch) {
        left -= piece.len();
        let from = if args.all { 0 } else { piece.len() - usize::from(left == 0) };
        let batch = Batch::one(0, piece).logits_from(from);
        loaded.model.forward_each(&mut state, &batch, &options, |rows| out.write(rows))?;
        bar.inc(piece.len() as u64);
    }
    bar.finish_and_clear();
    out.finish()?;
    writeln!(std::io::stdout(), "{}: float32 [{rows}, {}]", args.out.display(), config.vocab)?;
    Ok(Done::Ok)
}

fn parse(text: &str) -> anyhow::Result<Vec<u32>> {
    text.trim()
        .trim_start_matches('[')
        .trim_end_matches(']')
        .split(|c: char| c == ',' || c.is_whitespace())
        .filter(|word| !word.is_empty())
        .map(|word| word.parse().with_context(|| format!("{word:?} is no token id")))
        .collect()
}
