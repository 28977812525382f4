//! `qwen3next generate`: text in, text out.

use crate::cli::interrupt::Guard;
use crate::cli::model::{self, Loaded};
use crate::cli::sampling::{self, Predict};
use crate::Done;
use anyhow::{bail, Context};
use qwen3next_model::generate::Sampler;
use qwen3next_model::prompt_cache;
use qwen3next_model::session::{Answer, End, Limits};
use qwen3next_model::Session;
use std::io::Write;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: model::Args,
    /// Text to continue. Control tokens such as <|im_end|> may be written in it.
    #[arg(short, long, default_value = "In the beginning", conflicts_with = "file")]
    prompt: String,
    /// Read the prompt from this file.
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// Tokens to write; -1: until the model ends the text or the context is full.
    #[arg(short = 'n', long = "predict", visible_alias = "max-tokens", default_value = "128", allow_hyphen_values = true,
        value_parser = sampling::predict)]
    predict: Predict,
    /// Tokens the sequence may have in all; by default what prompt and answer need, with -n -1 the model's context, at
    /// most 32768.
    #[arg(short, long)]
    ctx: Option<usize>,
    #[command(flatten)]
    sampling: sampling::Args,
    /// Do not repeat the prompt before the answer.
    #[arg(long)]
    no_echo: bool,
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    let prompt = match &args.file {
        Some(path) => super::read_text(path)?,
        None => args.prompt.clone(),
    };
    let sampler = args.sampling.sampler()?;
    let limits = args.sampling.limits(args.predict.0, &[])?;
    args.sampling.expect_writable()?;
    let loaded = args.model.load()?;
    // With the first text, so that nothing is printed where the prompt cannot be read.
    let mut echo = (!args.no_echo).then_some(prompt.as_str());
    let cache = args.sampling.prompt_cache.as_deref().map(|path| Cache { path, write: !args.sampling.prompt_cache_ro });
    let written = speak_cached(&loaded, &args.model, &prompt, limits, args.ctx, sampler, cache, |text| {
        let mut out = std::io::stdout();
        write!(out, "{}{text}", echo.take().unwrap_or_default())?;
        Ok(out.flush()?)
    })?;
    writeln!(std::io::stdout())?;
    eprintln!(
        "prompt {} tokens{}, {:.1} tok/s; answer {} tokens, {:.1} tok/s{}",
        written.prompt,
        if written.reused > 0 { format!(", {} of them from the cache", written.reused) } else { String::new() },
        (written.prompt - written.reused) as f64 / written.prompt_seconds.max(1e-9),
        written.answer,
        written.answer.saturating_sub(1) as f64 / written.answer_seconds.max(1e-9),
        sampling::ending(written.end)
    );
    if written.end == End::Interrupted {
        std::process::exit(130);
    }
    Ok(Done::Ok)
}

/// A prompt cache on disk.
#[derive(Clone, Copy)]
pub struct Cache<'a> {
    path: &'a Path,
    write: bool,
}

/// What [`speak`] did.
pub struct Written {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Of them, tokens that were in the cache.
    pub reused: usize,
    /// Tokens drawn.
    pub answer: usize,
    /// Time to read the prompt.
    pub prompt_seconds: f64,
    /// Time for the tokens after the first one.
    pub answer_seconds: f64,
    /// Why it ended.
    pub end: End,
}

/// Continues `prompt`, handing over text as soon as it is whole characters.
pub fn speak(
    loaded: &Loaded,
    options: &model::Args,
    prompt: &str,
    predict: usize,
    sampler: Sampler,
    each: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Written> {
    let limits = Limits { tokens: Some(predict), ..Limits::default() };
    speak_cached(loaded, options, prompt, limits, None, sampler, None, each)
}

#[allow(clippy::too_many_arguments)]
fn speak_cached(
    loaded: &Loaded,
    options: &model::Args,
    prompt: &str,
    limits: Limits,
    ctx: Option<usize>,
    mut sampler: Sampler,
    cache: Option<Cache>,
    mut each: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Written> {
    let tokenizer = loaded.tokenizer()?;
    let mut tokens = tokenizer.encode(prompt, true)?;
    if let Some(bos) = tokenizer.bos().filter(|bos| tokenizer.add_bos() && tokens.first() != Some(bos)) {
        tokens.insert(0, bos);
    }
    if tokens.is_empty() {
        bail!("the prompt is empty and the model has no token to begin with");
    }
    let ctx = ctx.unwrap_or_else(|| match limits.tokens {
        Some(n) => tokens.len().saturating_add(n),
        None => sampling::open_context(loaded.model.config().context).max(tokens.len()),
    });
    sampling::expect_fit(tokens.len(), ctx)?;
    let mut session = Session::new(&loaded.model, ctx, options.cache())?;
    if let Some(cache) = cache.filter(|cache| cache.path.exists()) {
        prompt_cache::load(cache.path, &mut session)?;
    }
    let guard = Guard::new();
    let begin = std::time::Instant::now();
    let Some(reused) = read_prompt(&mut session, options, &tokens, &guard)? else {
        eprintln!("interrupted");
        std::process::exit(130)
    };
    let prompt_seconds = begin.elapsed().as_secs_f64();
    if let Some(cache) = cache.filter(|cache| cache.write && reused < tokens.len()) {
        prompt_cache::save(cache.path, &session, "").context("--prompt-cache")?;
    }
    tokens.iter().for_each(|&token| sampler.accept(token));
    let Answer { tokens: answer, time, end, .. } =
        session.answer(tokenizer, &mut sampler, limits, &options.forward()?, |text| {
            each(text)?;
            Ok::<_, anyhow::Error>(!guard.caught())
        })?;
    Ok(Written { prompt: tokens.len(), reused, answer, prompt_seconds, answer_seconds: time.as_secs_f64(), end })
}

/// Brings a session to the end of a prompt, with a progress bar; tokens that it had read already are told, `None` where
/// an interrupt came first.
pub fn read_prompt(
    session: &mut Session,
    options: &model::Args,
    prompt: &[u32],
    guard: &Guard,
) -> anyhow::Result<Option<usize>> {
    let reused = session.reusable(prompt);
    if reused < session.tokens().len() {
        let common = session.tokens().iter().zip(prompt).take_while(|(a, b)| a == b).count();
        eprintln!(
            "the {} tokens remembered differ from the prompt at token {common}, and a recurrent state cannot go back: \
             reading it all",
            session.tokens().len()
        );
        session.clear()?;
    }
    let rest = &prompt[reused..];
    let bar = super::progress(rest.len() as u64, "reading the prompt {wide_bar} {pos}/{len} {eta}");
    let whole = session.read(rest, options.batch, &options.forward()?, &mut |done| {
        bar.set_position(done as u64);
        !guard.caught()
    });
    bar.finish_and_clear();
    Ok(whole?.then_some(reused))
}
