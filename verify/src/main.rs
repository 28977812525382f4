//! The `qwen3next` command. Results go to stdout, everything else to stderr; exit status 0 = done, 1 = a check failed,
//! 2 = bad input.

mod cli;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::process::ExitCode;

/// Verify, measure and run the operators of Qwen3-Next.
///
/// Without a subcommand: the tour. It verifies every operator on this machine, benches the DeltaNet variants and lets
/// the embedded model speak, in under a minute.
#[derive(Parser)]
#[command(name = "qwen3next", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Check every kernel against float64 references and properties.
    Verify(cli::verify::Args),
    /// Time operators and the model against this machine's peaks.
    Bench(cli::bench::Args),
    /// Try batch and ubatch sizes and threads on a long prompt; the best are marked.
    Sweep(cli::sweep::Args),
    /// Follow the delta rule's error over thousands of tokens, with f32 and bf16 states.
    Drift(cli::drift::Args),
    /// Continue a text.
    Generate(cli::generate::Args),
    /// Talk with a model, through its chat template.
    Chat(cli::chat::Args),
    /// Write logits as .npy.
    Logits(cli::logits::Args),
    /// Perplexity of a text, and divergence from saved logits.
    Perplexity(cli::perplexity::Args),
    /// The delta rule's modes against each other on a text: perplexity and divergence against thresholds.
    Regress(cli::regress::Args),
    /// The whole harness into a folder: verification, fused modes, builds side by side, what fits.
    Eval(cli::eval::Args),
    /// What a model takes of a GPU and of the host, and how many layers' experts stay on the CPU.
    Fit(cli::fit::Args),
    /// What is in a model.
    Inspect(cli::inspect::Args),
    /// Write a model with its matrices in another type.
    Quantize(cli::quantize::Args),
    /// Write a model of the real layer shapes with random weights.
    Synth(cli::synth::Args),
}

/// Outcome of a command: `Failed` is a check that did not hold, an error is bad input.
pub enum Done {
    /// Exit status 0.
    Ok,
    /// Exit status 1.
    Failed,
}

fn main() -> ExitCode {
    let interrupted = ctrlc::set_handler(|| {
        if cli::interrupt::catch() {
            return;
        }
        cli::child::interrupt();
        qwen3next_model::whole::remove_unfinished();
        std::process::exit(130);
    });
    if let Err(e) = interrupted {
        eprintln!("warning: an interrupt may leave a temporary file: {e}");
    }
    let matches = negative_numbers(Cli::command()).try_get_matches_from(cli::spelling::normalise(std::env::args_os()));
    let cli = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(e) => return refuse(&e),
    };
    if let Err(e) = cli::mask_from_environment() {
        eprintln!("error: {}", one_line(&e));
        return ExitCode::from(2);
    }
    let done = match cli.command {
        None => cli::tour::run(),
        Some(Command::Verify(args)) => cli::verify::run(args),
        Some(Command::Bench(args)) => cli::bench::run(args),
        Some(Command::Sweep(args)) => cli::sweep::run(args),
        Some(Command::Drift(args)) => cli::drift::run(args),
        Some(Command::Generate(args)) => cli::generate::run(args),
        Some(Command::Chat(args)) => cli::chat::run(args),
        Some(Command::Logits(args)) => cli::logits::run(args),
        Some(Command::Perplexity(args)) => cli::perplexity::run(args),
        Some(Command::Regress(args)) => cli::regress::run(args),
        Some(Command::Eval(args)) => cli::eval::run(args),
        Some(Command::Fit(args)) => cli::fit::run(args),
        Some(Command::Inspect(args)) => cli::inspect::run(args),
        Some(Command::Quantize(args)) => cli::quantize::run(args),
        Some(Command::Synth(args)) => cli::synth::run(args),
    };
    match done {
        Ok(Done::Ok) => ExitCode::SUCCESS,
        Ok(Done::Failed) => ExitCode::from(1),
        // A closed pipe (`qwen3next ... | head`) is the reader's wish, not an error.
        Err(e) if e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("error: {}", one_line(&e));
            ExitCode::from(if e.is::<cli::Wrong>() { 1 } else { 2 })
        }
    }
}

/// Has every flag with a value take a negative number for one, so that what refuses it names the flag.
fn negative_numbers(command: clap::Command) -> clap::Command {
    let names: Vec<String> = command.get_subcommands().map(|c| c.get_name().to_string()).collect();
    let command = command.mut_args(|arg| {
        let takes = arg.get_action().takes_values() && !arg.is_positional();
        arg.allow_negative_numbers(takes)
    });
    names.into_iter().fold(command, |command, name| command.mut_subcommand(name, negative_numbers))
}

/// Help goes out as it is; what is wrong with the arguments, in one line.
fn refuse(error: &clap::Error) -> ExitCode {
    let text = error.render().to_string();
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        error.exit();
    }
    let what = text.lines().map(str::trim).take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more"));
    eprintln!("{}", what.filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" "));
    ExitCode::from(2)
}

/// The error and its causes in one line; a cause that the text before it already tells is left out.
fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(|c| c.to_string().replace('\n', " ")) {
        if !text.contains(&cause) {
            text.push_str(if text.is_empty() { "" } else { ": " });
            text.push_str(&cause);
        }
    }
    text
}
