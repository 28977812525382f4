//! `bench op --peers`: what others offer for an operator on the same GPU, which `benches/peers/cuda_ops.py` verifies and
//! times, in a process of its own for every call.

use super::child;
use anyhow::ensure;
use qwen3next_verify::compare::Metrics;
use serde::Deserialize;
use serde_json::{json, Value};
use std::cell::RefCell;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the script lies in a source tree.
const SCRIPT: &str = "benches/peers/cuda_ops.py";

/// The peers of one operator.
pub struct Peers {
    python: &'static str,
    script: PathBuf,
    device: &'static str,
    /// What a case holds beside its shape.
    sizes: Value,
    notes: RefCell<Vec<Note>>,
}

/// A peer without a row.
#[derive(Debug, Clone, PartialEq)]
pub enum Note {
    /// It can't be used here.
    Skipped { peer: String, why: String },
    /// It is wrong, or fails, at this call.
    Failed { peer: String, at: String, why: String },
}

/// A peer's row.
#[derive(Debug, PartialEq)]
pub struct Row {
    /// With its type in brackets.
    pub name: String,
    /// Its type of inputs.
    pub dtype: String,
    /// Seconds of every launch, the shortest first.
    pub seconds: Vec<f64>,
    /// Seconds a launch in a graph.
    pub in_graph: Option<f64>,
    /// Its inputs and outputs.
    pub bytes: f64,
    /// Its error, and that over what it may be.
    pub metrics: Metrics,
}

/// A line of the script.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Said {
    Skipped { peer: String, why: String },
    Failed { peer: String, why: String },
    Timed { peer: String, dtype: String, seconds: Vec<f64>, graph_s: Option<f64>, bytes: f64, row_l2: f64, limit: f64 },
}

impl Note {
    /// For `-o json`.
    pub fn json(&self, op: &str) -> Value {
        match self {
            Note::Skipped { peer, why } => json!({ "op": op, "variant": peer, "skipped": why }),
            Note::Failed { peer, at, why } => json!({ "op": op, "variant": peer, "call": at, "failed": why }),
        }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Note::Skipped { peer, why } => write!(f, "SKIPPED {peer}: {why}"),
            Note::Failed { peer, at, why } => write!(f, "FAILED {peer}, {at}: {why}"),
        }
    }
}

impl Peers {
    /// The script of the source tree that this was built from, or of the one that a copied command is run in. `sizes`: an
    /// object, what a case holds beside its shape. Errors: it is in neither.
    pub fn find(sizes: Value) -> anyhow::Result<Peers> {
        let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(SCRIPT);
        let script = if built_in.is_file() { built_in } else { PathBuf::from(SCRIPT) };
        ensure!(script.is_file(), "--peers: {SCRIPT}: not there, expected to be run in the source tree");
        Ok(Peers { python: "python3", script, device: "cuda", sizes, notes: RefCell::default() })
    }

    /// Has the peers verified and timed at a call. Whatever goes wrong with them is noted.
    pub fn measure(&self, case: [&str; 3], tokens: usize, samples: usize, warm: bool) -> Vec<Row> {
        let [op, shape, dtype] = case;
        let mut case = json!({ "op": op, "shape": shape, "dtype": dtype, "tokens": tokens });
        if let (Some(case), Some(sizes)) = (case.as_object_mut(), self.sizes.as_object()) {
            case.extend(sizes.clone());
        }
        let mut command = Command::new(self.python);
        command.arg(&self.script).args(["--device", self.device, "--repetitions", &samples.to_string()]);
        command.args(["--case", &case.to_string()]).args(warm.then_some("--warm"));
        let mut ended = match child::run(&mut command, true) {
            Ok(ended) => ended,
            Err(e) => {
                self.note(Note::Skipped { peer: "peers".into(), why: format!("{e:#}") });
                return Vec::new();
            }
        };
        let at = format!("{tokens} tokens of {shape}");
        let failed = |peer: &str, why: String| self.note(Note::Failed { peer: peer.into(), at: at.clone(), why });
        let mut rows = Vec::new();
        for line in std::mem::take(&mut ended.stdout).lines() {
            match serde_json::from_str(line) {
                Ok(Said::Skipped { peer, why }) => self.note(Note::Skipped { peer, why }),
                Ok(Said::Failed { peer, why }) => failed(&peer, why),
                Ok(Said::Timed { peer, dtype, mut seconds, graph_s, bytes, row_l2, limit }) => {
                    seconds.sort_by(f64::total_cmp);
                    if seconds.is_empty() || seconds.iter().any(|s| !(s.is_finite() && *s > 0.0)) {
                        failed(&peer, "gave no times".into());
                        continue;
                    }
                    let metrics = Metrics { row_l2, bound_multiple: row_l2 / limit, ..Metrics::default() };
                    rows.push(Row { name: peer, dtype, seconds, in_graph: graph_s, bytes, metrics });
                }
                Err(_) => failed("peers", format!("no result: {}", line.chars().take(120).collect::<String>())),
            }
        }
        if !ended.status.success() {
            let (status, words) = (ended.status.to_string(), ended.last_words());
            failed("peers", if words == status { status } else { format!("{status}: {words}") });
        }
        rows
    }

    /// What was noted, each thing once.
    pub fn notes(&self) -> Vec<Note> {
        self.notes.borrow().clone()
    }

    fn note(&self, note: Note) {
        let mut notes = self.notes.borrow_mut();
        if !notes.contains(&note) {
            notes.push(note);
        }
    }
}

#[cfg(all(test, unix))]
pub mod tests {
    use super::*;
    use std::io::Write;

    /// The peers of a shell script.
    pub fn fake(text: &str) -> (tempfile::NamedTempFile, Peers) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let script = file.path().to_path_buf();
        let sizes = json!({ "heads": "4/2" });
        (file, Peers { python: "sh", script, device: "cpu", sizes, notes: RefCell::default() })
    }

    /// The script itself, on the CPU.
    pub fn on_cpu() -> anyhow::Result<Peers> {
        Ok(Peers { device: "cpu", ..Peers::find(json!({}))? })
    }

    fn ask(peers: &Peers) -> Vec<Row> {
        peers.measure(["attention", "64", "f16"], 3, 7, true)
    }

    #[test]
    fn lines_become_rows_and_notes() {
        let (_file, peers) = fake(
            r#"echo '{"skipped": {"peer": "fla", "why": "No module named fla"}}'
            echo '{"timed": {"peer": "one (bf16)", "dtype": "bf16", "seconds": [3e-6, 1e-6, 2e-6], "graph_s": 5e-7,
            "bytes": 10, "row_l2": 0.01, "limit": 0.05}}' | tr -d '\n'
            echo
            echo '{"failed": {"peer": "two (f32)", "why": "a row is off"}}'"#,
        );
        let rows = ask(&peers);
        let metrics = Metrics { row_l2: 0.01, bound_multiple: 0.01 / 0.05, ..Metrics::default() };
        let seconds = vec![1e-6, 2e-6, 3e-6];
        let (name, dtype) = ("one (bf16)".to_string(), "bf16".to_string());
        assert_eq!(rows, [Row { name, dtype, seconds, in_graph: Some(5e-7), bytes: 10.0, metrics }]);
        let said = || peers.notes().iter().map(Note::to_string).collect::<Vec<_>>();
        let expected = ["SKIPPED fla: No module named fla", "FAILED two (f32), 3 tokens of 64: a row is off"];
        assert_eq!(said(), expected);
        // A second call finds the same module missing: one note of it.
        ask(&peers);
        assert_eq!(said(), expected);
        let failed = peers.notes()[1].json("attention");
        assert_eq!((failed["variant"].as_str(), failed["failed"].as_str()), (Some("two (f32)"), Some("a row is off")));
    }

    #[test]
    fn a_case_says_all_that_was_asked_for() {
        let (_file, peers) = fake(r#"printf '{"skipped": {"peer": "p", "why": "%s"}}' "$(echo "$@" | tr -d '"')""#);
        assert!(ask(&peers).is_empty());
        let expected = "SKIPPED p: --device cpu --repetitions 7 --case \
                        {dtype:f16,heads:4/2,op:attention,shape:64,tokens:3} --warm";
        assert_eq!(peers.notes()[0].to_string(), expected);
    }

    #[test]
    fn what_goes_wrong_is_a_note() {
        let timed =
            r#"{"timed": {"peer": "one", "dtype": "f32", "seconds": [], "graph_s": null, "bytes": 1, "row_l2": 0,
            "limit": 1}}"#
                .replace('\n', "");
        for (script, expected) in [
            ("echo 'Loading ...'", "FAILED peers, 3 tokens of 64: no result: Loading ..."),
            (
                r#"echo '{"timed": {"peer": "one"}}'"#,
                r#"FAILED peers, 3 tokens of 64: no result: {"timed": {"peer": "one"}}"#,
            ),
            (&format!("echo '{timed}'"), "FAILED one, 3 tokens of 64: gave no times"),
            ("echo 'Error: why' >&2; exit 3", "FAILED peers, 3 tokens of 64: exit status: 3: Error: why"),
            ("kill -9 $$", "FAILED peers, 3 tokens of 64: signal: 9 (SIGKILL)"),
        ] {
            let (_file, peers) = fake(script);
            assert!(ask(&peers).is_empty(), "{script}");
            assert_eq!(peers.notes().iter().map(Note::to_string).collect::<Vec<_>>(), [expected], "{script}");
        }
        let (_file, peers) = fake("");
        let peers = Peers { python: "no-such-python", ..peers };
        assert!(ask(&peers).is_empty());
        let said = peers.notes()[0].to_string();
        assert!(said.starts_with("SKIPPED peers: no-such-python: cannot be run: "), "{said}");
    }
}
