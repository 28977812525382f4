//! `qwen3next chat`: a conversation, line by line from stdin.

use crate::cli::generate::read_prompt;
use crate::cli::interrupt::Guard;
use crate::cli::model::{self, Loaded};
use crate::cli::sampling::{self, Predict};
use crate::Done;
use anyhow::{bail, ensure, Context};
use qwen3next_model::chat::{Extra, Message, Template, CHATML};
use qwen3next_model::generate::Sampler;
use qwen3next_model::session::End;
use qwen3next_model::{prompt_cache, Session};
use serde::{Deserialize, Serialize};
use std::io::{stdout, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

const HELP: &str = "\
a line is a message to the model, and goes on in the next line where it ends in \\
/reset       begin again, with the same system message and seed
/save FILE   write the conversation and what the model remembers of it
/load FILE   go on with a conversation that was saved
/exit        end (also the end of the input)
/help        this text
Ctrl-C ends an answer; at the prompt, the program";

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: model::Args,
    /// What the model is told before the conversation.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Say only this, print the answer and end.
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// A Jinja file, or `chatml`; by default the template in the model's files.
    #[arg(long, value_name = "FILE|chatml")]
    chat_template: Option<PathBuf>,
    /// More values for the template, a JSON object such as {"enable_thinking": false}.
    #[arg(long, value_name = "JSON")]
    chat_template_kwargs: Option<String>,
    /// Functions that the model may call, for templates that list them: a file with a JSON list.
    #[arg(long, value_name = "FILE")]
    tools: Option<PathBuf>,
    /// Tokens an answer may have; -1: until the model ends it or the context is full.
    #[arg(short = 'n', long = "predict", visible_alias = "max-tokens", default_value = "-1", allow_hyphen_values = true,
        value_parser = sampling::predict)]
    predict: Predict,
    /// Tokens the conversation may have in all; by default the model's context, at most 32768.
    #[arg(short, long, value_parser = model::at_least_one)]
    ctx: Option<usize>,
    #[command(flatten)]
    sampling: sampling::Args,
}

/// A conversation and what the model has read of it.
struct Chat<'a> {
    args: &'a Args,
    loaded: &'a Loaded,
    template: Template,
    extra: Extra,
    /// Ends of a turn that this tokenizer has no token for.
    stops: Vec<String>,
    messages: Vec<Message>,
    session: Session<'a>,
    /// The text of exactly what the session has read, where that is known.
    read: Option<String>,
    sampler: Sampler,
}

/// What a file of a conversation holds beside the session.
#[derive(Serialize, Deserialize)]
struct Note {
    messages: Vec<Message>,
    read: Option<String>,
}

pub fn run(args: Args) -> anyhow::Result<Done> {
    args.sampling.sampler()?;
    args.sampling.limits(None, &[])?;
    args.sampling.expect_writable()?;
    let mut extra = Extra::default();
    if let Some(path) = &args.tools {
        extra.json("tools", &super::read_text(path)?).with_context(|| path.display().to_string())?;
    }
    if let Some(json) = &args.chat_template_kwargs {
        extra.object(json).context("--chat-template-kwargs")?;
    }
    let given = match args.chat_template.as_deref() {
        Some(name) if name == Path::new("chatml") => Some(CHATML.to_string()),
        Some(path) => Some(super::read_text(path)?),
        None => None,
    };
    let loaded = args.model.load()?;
    for (name, token) in [("bos_token", &loaded.metadata.bos_token), ("eos_token", &loaded.metadata.eos_token)] {
        extra.text(name, token.as_deref().unwrap_or_default());
    }
    let origin = match &args.chat_template {
        Some(path) => path.display().to_string(),
        None => loaded.name.clone(),
    };
    let Some(source) = given.or_else(|| loaded.metadata.chat_template.clone()) else {
        bail!(
            "{} has no chat template: use `generate`, or --chat-template FILE or --chat-template chatml",
            loaded.name
        );
    };
    let tokenizer = loaded.tokenizer()?;
    let mut stops = Vec::new();
    if source == CHATML && tokenizer.special_id("<|im_end|>").is_none() {
        eprintln!("warning: {} has no tokens for ChatML, which it reads as plain text", loaded.name);
        stops.push("<|im_end|>".to_string());
    }
    let ctx = args.ctx.unwrap_or(sampling::open_context(loaded.model.config().context));
    let mut chat = Chat {
        args: &args,
        template: Template::new(&source).context(origin)?,
        extra,
        stops,
        messages: Vec::new(),
        session: Session::new(&loaded.model, ctx, args.model.cache())?,
        read: None,
        sampler: args.sampling.sampler()?,
        loaded: &loaded,
    };
    chat.reset()?;
    if let Some(path) = args.sampling.prompt_cache.as_deref().filter(|path| path.exists()) {
        chat.load(path)?;
    }
    match &args.prompt {
        Some(text) => {
            if chat.say(text)? == End::Interrupted {
                std::process::exit(130);
            }
        }
        None => chat.converse()?,
    }
    Ok(Done::Ok)
}

impl Chat<'_> {
    fn reset(&mut self) -> anyhow::Result<()> {
        self.messages = self.args.system.iter().map(|text| Message::new("system", text)).collect();
        self.sampler = self.args.sampling.sampler()?;
        self.read = None;
        Ok(self.session.clear()?)
    }

    /// Lines from stdin until it ends. At a terminal an error is told and the conversation goes on.
    fn converse(&mut self) -> anyhow::Result<()> {
        let terminal = std::io::stdin().is_terminal();
        let mut lines = std::io::stdin().lock();
        if terminal {
            eprintln!("{HELP}");
        }
        loop {
            let Some(line) = read_message(&mut lines, terminal)? else { return Ok(()) };
            let done = match line.trim() {
                "" => Ok(()),
                "/exit" | "/quit" => return Ok(()),
                command if command.starts_with('/') => self.command(command),
                _ => self.say(&line).map(|end| {
                    // A pipe has nobody who would go on.
                    if end == End::Interrupted && !terminal {
                        std::process::exit(130);
                    }
                }),
            };
            match done {
                Err(e) if terminal && !e.is::<std::io::Error>() => eprintln!("error: {}", crate::one_line(&e)),
                other => other?,
            }
        }
    }

    fn command(&mut self, line: &str) -> anyhow::Result<()> {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let file = || {
            ensure!(!rest.trim().is_empty(), "{name}: which file?");
            Ok(Path::new(rest.trim()))
        };
        match name {
            "/help" => eprintln!("{HELP}"),
            "/reset" => self.reset()?,
            "/save" => self.save(file()?)?,
            "/load" => self.load(file()?)?,
            _ => bail!("{name}: no such command; /help lists them"),
        }
        Ok(())
    }

    fn save(&self, path: &Path) -> anyhow::Result<()> {
        let note = Note { messages: self.messages.clone(), read: self.read.clone() };
        prompt_cache::save(path, &self.session, &serde_json::to_string(&note)?)?;
        Ok(())
    }

    /// Goes on with what a file holds: a conversation, or only the memory of a prompt.
    fn load(&mut self, path: &Path) -> anyhow::Result<()> {
        self.read = None;
        let note = prompt_cache::load(path, &mut self.session)?;
        if note.is_empty() {
            return Ok(());
        }
        let note: Note = serde_json::from_str(&note)
            .map_err(|e| anyhow::anyhow!("{}: its note is no conversation: {e}", path.display()))?;
        let system = |messages: &[Message]| messages.first().filter(|m| m.role == "system").cloned();
        if self.args.system.is_some() && system(&note.messages) != system(&self.messages) {
            eprintln!("{}: has another system message, which stays", path.display());
        }
        (self.messages, self.read) = (note.messages, note.read);
        Ok(())
    }

    /// One turn: the user's text, then the answer on stdout. Where it fails, the conversation is as before.
    fn say(&mut self, text: &str) -> anyhow::Result<End> {
        self.messages.push(Message::new("user", text));
        let said = self.turn();
        if said.is_err() {
            self.messages.pop();
        }
        said
    }

    fn turn(&mut self) -> anyhow::Result<End> {
        let (args, tokenizer) = (self.args, self.loaded.tokenizer()?);
        let prompt = self.template.prompt(tokenizer, &self.messages, &self.extra, true)?;
        // What was read stays where the text goes on from it, whatever tokens an answer was drawn in.
        let known = self.read.as_ref().filter(|read| prompt.text.starts_with(read.as_str())).map(String::len);
        let tokens = match known {
            Some(from) => [self.session.tokens(), &prompt.encode_from(tokenizer, from)?].concat(),
            None => prompt.encode(tokenizer)?,
        };
        ensure!(!tokens.is_empty(), "the chat template writes nothing");
        let ctx = self.session.capacity();
        ensure!(
            tokens.len() < ctx,
            "the conversation has {} tokens and the context room for {ctx}: /reset, or a larger --ctx",
            tokens.len()
        );
        let guard = Guard::new();
        self.read = None;
        if read_prompt(&mut self.session, &args.model, &tokens, &guard)?.is_none() {
            self.messages.pop();
            eprintln!("interrupted");
            return Ok(End::Interrupted);
        }
        tokens.iter().for_each(|&token| self.sampler.accept(token));
        let limits = args.sampling.limits(args.predict.0, &self.stops)?;
        let answer = self.session.answer(tokenizer, &mut self.sampler, limits, &args.model.forward()?, |text| {
            let mut out = stdout();
            out.write_all(text.as_bytes())?;
            out.flush()?;
            Ok::<_, anyhow::Error>(!guard.caught())
        })?;
        writeln!(stdout())?;
        if let End::Full | End::Interrupted = answer.end {
            eprintln!("{}", sampling::ending(answer.end).trim_start_matches("; "));
        }
        self.read = answer.exact.then(|| prompt.text + &answer.text);
        self.messages.push(Message::new("assistant", answer.text));
        if let Some(path) = args.sampling.prompt_cache.as_deref().filter(|_| !args.sampling.prompt_cache_ro) {
            self.save(path)?;
        }
        Ok(answer.end)
    }
}

/// A line without its end, or several where all but the last end in a backslash; `None` at the end of the input.
fn read_message(lines: &mut impl BufRead, terminal: bool) -> anyhow::Result<Option<String>> {
    let mut message = String::new();
    loop {
        if terminal {
            eprint!("{}", if message.is_empty() { "> " } else { ". " });
        }
        let mut line = Vec::new();
        let n = lines.read_until(b'\n', &mut line).context("stdin")?;
        if n == 0 {
            return Ok((!message.is_empty()).then_some(message));
        }
        let line = std::str::from_utf8(&line).map_err(|_| anyhow::anyhow!("stdin: is not UTF-8 text"))?;
        let line = line.strip_suffix('\n').unwrap_or(line);
        let line = line.strip_suffix('\r').unwrap_or(line);
        match line.strip_suffix('\\') {
            Some(part) => {
                message.push_str(part);
                message.push('\n');
            }
            None => {
                message.push_str(line);
                return Ok(Some(message));
            }
        }
    }
}
