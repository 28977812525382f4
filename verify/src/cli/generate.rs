//! `qwen3next generate`: text in, text out.

use crate::cli::model::{self, Loaded};
use crate::Done;
use anyhow::bail;
use qwen3next_model::generate::{Sampler, Sampling};
use qwen3next_model::{Batch, State};
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: model::Args,
    /// Text to continue.
    #[arg(short, long, default_value = "In the beginning", conflicts_with = "file")]
    prompt: String,
    /// Read the prompt from this file.
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// Tokens to write.
    #[arg(short = 'n', long = "predict", default_value_t = 128)]
    predict: usize,
    /// Tokens the sequence may have in all; by default what prompt and answer need.
    #[arg(short, long)]
    ctx: Option<usize>,
    /// Divides the logits; 0 always takes the most likely token.
    #[arg(long, default_value_t = Sampling::default().temperature)]
    temp: f32,
    /// Only among this many most likely tokens; 0: all.
    #[arg(long, default_value_t = Sampling::default().top_k)]
    top_k: usize,
    /// Only among the fewest tokens with this probability together.
    #[arg(long, default_value_t = Sampling::default().top_p)]
    top_p: f32,
    /// Only among tokens at least this fraction as likely as the first.
    #[arg(long, default_value_t = Sampling::default().min_p)]
    min_p: f32,
    /// Equal seeds give equal texts.
    #[arg(short, long, default_value_t = 1)]
    seed: u64,
    /// Do not repeat the prompt before the answer.
    #[arg(long)]
    no_echo: bool,
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    let prompt = match &args.file {
        Some(path) => super::read_text(path)?,
        None => args.prompt.clone(),
    };
    let sampling =
        Sampling { temperature: args.temp, top_k: args.top_k, top_p: args.top_p, min_p: args.min_p, seed: args.seed };
    let sampler = Sampler::new(sampling)?;
    let loaded = args.model.load()?;
    // With the first text, so that nothing is printed where the prompt cannot be read.
    let mut echo = (!args.no_echo).then_some(prompt.as_str());
    let written = speak(&loaded, &args.model, &prompt, args.predict, args.ctx, sampler, |text| {
        let mut out = std::io::stdout();
        write!(out, "{}{text}", echo.take().unwrap_or_default())?;
        Ok(out.flush()?)
    })?;
    writeln!(std::io::stdout())?;
    eprintln!(
        "prompt {} tokens, {:.1} tok/s; answer {} tokens, {:.1} tok/s",
        written.prompt,
        written.prompt as f64 / written.prompt_seconds,
        written.answer,
        written.answer.saturating_sub(1) as f64 / written.answer_seconds.max(1e-9)
    );
    Ok(Done::Ok)
}

/// What [`speak`] did.
pub struct Written {
    /// Tokens read.
    pub prompt: usize,
    /// Tokens drawn.
    pub answer: usize,
    /// Time to read the prompt.
    pub prompt_seconds: f64,
    /// Time for the tokens after the first one.
    pub answer_seconds: f64,
}

/// Continues `prompt`, handing over text as soon as it is whole characters.
pub fn speak(
    loaded: &Loaded,
    options: &model::Args,
    prompt: &str,
    predict: usize,
    ctx: Option<usize>,
    mut sampler: Sampler,
    mut each: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Written> {
    let tokenizer = loaded.tokenizer()?;
    let tokens = tokenizer.encode(prompt, true)?;
    if tokens.is_empty() {
        bail!("the prompt is empty and the model has no token to begin with");
    }
    let ctx = ctx.unwrap_or(tokens.len().saturating_add(predict));
    if tokens.len() > ctx {
        bail!("--ctx {ctx}: the prompt has {} tokens", tokens.len());
    }
    let mut state = State::with_cache(loaded.model.config(), 1, ctx, options.cache())?;

    let bar = super::progress(tokens.len() as u64, "reading the prompt {wide_bar} {pos}/{len} {eta}");
    let begin = std::time::Instant::now();
    let mut logits = Vec::new();
    for piece in tokens.chunks(options.batch) {
        logits = loaded.model.forward(&mut state, &Batch::one(0, piece), &options.forward()?)?;
        bar.inc(piece.len() as u64);
    }
    bar.finish_and_clear();
    let prompt_seconds = begin.elapsed().as_secs_f64();

    let mut decoder = tokenizer.stream();
    let begin = std::time::Instant::now();
    let mut answer = 0;
    for i in 0..predict {
        let token = sampler.sample(&logits)?;
        answer += 1;
        if tokenizer.eos().contains(&token) {
            break;
        }
        each(&decoder.push(token)?)?;
        if i + 1 == predict || state.len(0)? == ctx {
            break;
        }
        logits = loaded.model.forward(&mut state, &Batch::one(0, &[token]), &options.forward()?)?;
    }
    each(&decoder.finish())?;
    Ok(Written { prompt: tokens.len(), answer, prompt_seconds, answer_seconds: begin.elapsed().as_secs_f64() })
}
