//! One sequence: what it has read, and continuing it.

use crate::error::Error;
use crate::forward::{Batch, Model, Options};
use crate::generate::Sampler;
use crate::state::{CacheTypes, State};
use crate::stop::Stops;
use crate::tokenizer::Tokenizer;
use std::time::{Duration, Instant};

/// A sequence of tokens with the memory that a model has of it.
pub struct Session<'m> {
    model: &'m Model,
    pub(crate) state: State,
    pub(crate) tokens: Vec<u32>,
    /// After the last token; empty where there is none.
    pub(crate) logits: Vec<f32>,
    cache: CacheTypes,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The model ended its turn.
    Turn,
    /// A stop string came.
    Stop,
    /// It has as many tokens as were allowed.
    Length,
    /// The sequence is as long as its memory.
    Full,
    /// The caller wanted no more.
    Interrupted,
}

/// What [`Session::answer`] wrote.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The text, without the stop string.
    pub text: String,
    /// Tokens drawn, the one that ends the turn included.
    pub tokens: usize,
    /// Time for the tokens after the first.
    pub time: Duration,
    /// Why it ended.
    pub end: End,
    /// The session has read the text exactly: no stop string, no hidden token, and nothing drawn but not read.
    pub exact: bool,
}

/// How long and how far to continue.
#[derive(Debug, Clone, Default)]
pub struct Limits {
    /// Tokens at most.
    pub tokens: Option<usize>,
    /// Texts that end it.
    pub stops: Stops,
}

impl<'m> Session<'m> {
    /// An empty sequence of up to `capacity` tokens.
    pub fn new(model: &'m Model, capacity: usize, cache: CacheTypes) -> Result<Session<'m>, Error> {
        let state = model.state(1, capacity, cache)?;
        Ok(Session { model, state, tokens: Vec::new(), logits: Vec::new(), cache })
    }

    /// The model.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// What it has read.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Logits after the last token; empty where none was read.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.state.capacity()
    }

    /// Types of its caches.
    pub fn cache(&self) -> CacheTypes {
        self.cache
    }

    /// Forgets everything.
    pub fn clear(&mut self) -> Result<(), Error> {
        self.tokens.clear();
        self.logits.clear();
        self.state.clear(0)
    }

    /// Tokens of `prompt` that need not be read again: all that the session has read where the prompt goes on from there,
    /// else none. A recurrent state cannot go back to a token in its past, so a part is of no use.
    pub fn reusable(&self, prompt: &[u32]) -> usize {
        if prompt.starts_with(&self.tokens) {
            self.tokens.len()
        } else {
            0
        }
    }

    /// Reads more tokens, `batch` at a time. `progress` hears how many of them are read and whether to go on; false is
    /// returned where it stopped. After an error the session is empty.
    pub fn read(
        &mut self,
        tokens: &[u32],
        batch: usize,
        options: &Options,
        progress: &mut dyn FnMut(usize) -> bool,
    ) -> Result<bool, Error> {
        self.state.expect_room(0, tokens.len())?;
        for (i, part) in tokens.chunks(batch.max(1)).enumerate() {
            match self.model.forward(&mut self.state, &Batch::one(0, part), options) {
                Ok(logits) => self.logits = logits,
                Err(e) => {
                    self.clear()?;
                    return Err(e);
                }
            }
            self.tokens.extend_from_slice(part);
            if !progress(i * batch.max(1) + part.len()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Continues the sequence. `each` gets text as soon as it is whole characters and cannot become a stop string, and
    /// says whether to go on. Control tokens have no text.
    pub fn answer<E: From<Error>>(
        &mut self,
        tokenizer: &Tokenizer,
        sampler: &mut Sampler,
        limits: Limits,
        options: &Options,
        mut each: impl FnMut(&str) -> Result<bool, E>,
    ) -> Result<Answer, E> {
        let mut stops = limits.stops;
        let mut decoder = tokenizer.stream();
        let mut answer = Answer { text: String::new(), tokens: 0, time: Duration::ZERO, end: End::Length, exact: true };
        let mut begin = Instant::now();
        let mut hand = |answer: &mut Answer, text: &str| {
            answer.text.push_str(text);
            each(text)
        };
        while limits.tokens.is_none_or(|most| answer.tokens < most) {
            if self.tokens.len() == self.capacity() {
                answer.end = End::Full;
                break;
            }
            let token = sampler.sample(&self.logits)?;
            answer.tokens += 1;
            match answer.tokens {
                1 => begin = Instant::now(),
                _ => answer.time = begin.elapsed(),
            }
            if tokenizer.eos().contains(&token) {
                answer.end = End::Turn;
                break;
            }
            if tokenizer.is_control(token) {
                answer.exact = false;
            } else {
                let text = stops.push(&decoder.push(token)?);
                if !hand(&mut answer, &text)? {
                    answer.end = End::Interrupted;
                }
            }
            if stops.stopped() {
                answer.end = End::Stop;
                answer.exact = false;
                break;
            }
            self.read(&[token], 1, options, &mut |_| true)?;
            if answer.end == End::Interrupted {
                break;
            }
        }
        if !stops.stopped() {
            let cut = decoder.finish();
            answer.exact &= cut.is_empty();
            let mut rest = stops.push(&cut);
            if stops.stopped() {
                answer.exact = false;
            }
            rest.push_str(&stops.finish());
            hand(&mut answer, &rest)?;
        }
        Ok(answer)
    }
}
