//! Options of commands that write text.

use anyhow::{bail, Context};
use qwen3next_model::generate::{Sampler, Sampling};
use qwen3next_model::session::{End, Limits};
use qwen3next_model::stop::Stops;
use std::path::PathBuf;

#[derive(clap::Args, Clone)]
pub struct Args {
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
    /// Divides positive logits of tokens that came lately and multiplies negative ones; 1: off.
    #[arg(long, default_value_t = Sampling::default().repeat_penalty)]
    repeat_penalty: f32,
    /// How many tokens back the penalty looks.
    #[arg(long, value_name = "N", default_value_t = Sampling::default().repeat_last_n)]
    repeat_last_n: usize,
    /// Equal seeds give equal texts, on any number of threads.
    #[arg(short, long, default_value_t = 1)]
    seed: u64,
    /// Ends the text where this comes; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Keep what the model remembers in this file: read where it exists, written at the end.
    #[arg(long, value_name = "FILE")]
    pub prompt_cache: Option<PathBuf>,
    /// Only read the prompt cache.
    #[arg(long, requires = "prompt_cache")]
    pub prompt_cache_ro: bool,
}

impl Args {
    /// Refuses a prompt cache that cannot be written, before a prompt is read for it.
    pub fn expect_writable(&self) -> anyhow::Result<()> {
        if let Some(path) = self.prompt_cache.as_deref().filter(|_| !self.prompt_cache_ro) {
            drop(super::Output::create(path).context("--prompt-cache")?);
        }
        Ok(())
    }

    /// A sampler at the start of its seed's draws.
    pub fn sampler(&self) -> anyhow::Result<Sampler> {
        Ok(Sampler::new(Sampling {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
            seed: self.seed,
        })?)
    }

    /// Limits of one text; `stops` beside those of the command line.
    pub fn limits(&self, tokens: Option<usize>, stops: &[String]) -> anyhow::Result<Limits> {
        Ok(Limits { tokens, stops: Stops::new(&[&self.stop, stops].concat())? })
    }
}

/// A number of tokens, or -1 for as many as fit.
pub fn predict(text: &str) -> Result<Predict, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(Predict(None)),
        Ok(n) if n >= 0 => Ok(Predict(Some(n as usize))),
        _ => Err("expected a number of tokens, or -1".into()),
    }
}

/// Tokens to write, where there is a limit.
#[derive(Debug, Clone, Copy)]
pub struct Predict(pub Option<usize>);

/// The context of a text without a limit of its own.
pub fn open_context(model: usize) -> usize {
    model.min(32_768)
}

/// Why a text ended, for a line on stderr; nothing where it came to its end.
pub fn ending(end: End) -> &'static str {
    match end {
        End::Turn | End::Stop | End::Length => "",
        End::Full => "; the context is full (--ctx)",
        End::Interrupted => "; interrupted",
    }
}

/// Refuses a prompt that is longer than the context.
pub fn expect_fit(tokens: usize, ctx: usize) -> anyhow::Result<()> {
    if tokens > ctx {
        bail!("--ctx {ctx}: the prompt has {tokens} tokens");
    }
    Ok(())
}
