//! `chat` and the prompt cache from outside: turns, commands, refusals, what an interrupt leaves.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("q3n-chat-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qwen3next"));
        command.args(line.split_whitespace()).current_dir(&self.0).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a command on these lines from a pipe.
    fn run(&self, line: &str, lines: &str) -> Output {
        let mut child = self.command(line).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const CHAT: &str = "chat --chat-template chatml -n 16 --seed 3";

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn expect_refused(output: &Output, names: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    let errors: Vec<&str> = said.lines().filter(|l| l.starts_with("error: ")).collect();
    assert!(errors.len() == 1 && errors[0].contains(names), "{said}");
}

#[test]
fn a_model_without_a_template_is_refused_with_a_way_out() {
    let folder = Folder::new("template");
    expect_refused(&folder.run("chat", "Hello\n"), "--chat-template");
    expect_refused(&folder.run("chat --chat-template no-such-file", "Hello\n"), "no-such-file");
    std::fs::write(folder.0.join("broken.jinja"), "{% for m in messages %}").unwrap();
    expect_refused(&folder.run("chat --chat-template broken.jinja", "Hello\n"), "broken.jinja");
}

#[test]
fn a_saved_conversation_goes_on_as_if_it_had_not_been_left() {
    let folder = Folder::new("saved");
    let whole = text(&folder.run(CHAT, "Who made heaven?\n/save talk\nAnd earth?\n/exit\nnot read\n"));
    let first = text(&folder.run(CHAT, "Who made heaven?\n"));
    assert!(whole.starts_with(&first) && whole.len() > first.len(), "{whole:?} {first:?}");
    // The answer to the second message depends on the first: greedy, so that the seed's state plays no part.
    let greedy = format!("{CHAT} --temp 0");
    let whole = text(&folder.run(&greedy, "Who made heaven?\n/save talk\nAnd earth?\n"));
    let first = text(&folder.run(&greedy, "Who made heaven?\n"));
    let second = text(&folder.run(&greedy, "/load talk\nAnd earth?\n"));
    assert_eq!(whole, first + &second);
    // After a reset the first answer comes again.
    let again = text(&folder.run(&greedy, "And earth?\n/reset\nWho made heaven?\n"));
    assert!(again.ends_with(&text(&folder.run(&greedy, "Who made heaven?\n"))), "{again:?}");
    expect_refused(&folder.run(&greedy, "/load no-such-talk\n"), "no-such-talk");
    expect_refused(&folder.run(&greedy, "/dance\n"), "/dance");
}

#[test]
fn a_prompt_is_read_once() {
    let folder = Folder::new("cache");
    let generate = "generate -p beginning -n 12 --seed 1 --prompt-cache kept";
    let first = folder.run(generate, "");
    let bytes = std::fs::read(folder.0.join("kept")).unwrap();
    let again = folder.run(generate, "");
    assert_eq!(text(&first), text(&again));
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(said.contains("from the cache"), "{said}");
    assert!(!String::from_utf8_lossy(&first.stderr).contains("from the cache"));
    for cut in [0, 1, 40, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(folder.0.join("kept"), &bytes[..cut]).unwrap();
        expect_refused(&folder.run(generate, ""), "kept");
    }
    let mut other = bytes.clone();
    other[bytes.len() / 2] ^= 1;
    std::fs::write(folder.0.join("kept"), &other).unwrap();
    expect_refused(&folder.run(generate, ""), "kept");
    // What was refused is not overwritten.
    assert_eq!(std::fs::read(folder.0.join("kept")).unwrap(), other);
}

#[test]
fn an_interrupt_ends_the_text_and_keeps_it() {
    let folder = Folder::new("interrupt");
    let mut child = folder.command("generate -p beginning -n -1").spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut begun = vec![0; 40];
    out.read_exact(&mut begun).unwrap();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let mut rest = String::new();
    while out.read_line(&mut rest).unwrap() > 0 {}
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(rest.ends_with('\n'));
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("interrupted"), "{said}");
}
