//! Every known bug that can be rebuilt is noticed by the suite of its operator, and unpatched copies pass.

use serde_json::Value;
use std::process::Command;

#[test]
fn every_mutant_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("mutants.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_qwen3next"));
    let output = command.args(["verify", "--mutants", "--first", "--json"]).arg(&json).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));

    let document: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let of = |verdict: &str| document["mutants"].as_array().unwrap().iter().filter(|m| m["verdict"] == verdict).count();
    let (noticed, pending) = (of("noticed"), of("pending"));
    assert_eq!((noticed + pending, of("survived")), (document["mutants"].as_array().unwrap().len(), 0));
    let control = document["control"].as_array().unwrap();
    assert!(control.iter().all(|c| c["verdict"] == "passed" && c["cases"].as_u64() > Some(0)));
    println!("{text}");
}

#[test]
fn a_mutant_fails_as_its_reproducer_says() {
    let run = |args: &[&str]| Command::new(env!("CARGO_BIN_EXE_qwen3next")).args(args).output().unwrap();
    let output = run(&["verify", "--mutant", "36a", "--check", "reference", "--cases", "0"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find(|l| l.contains("qwen3next verify")).expect("a reproducer").trim();
    let args: Vec<&str> = line.split_whitespace().skip(1).collect();
    assert_eq!(args[..3], ["verify", "--mutant", "36a"]);
    assert_eq!(run(&args).status.code(), Some(1), "{line}");
    let unknown = run(&["verify", "--mutant", "99"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("--mutant 99: expected one of 1a, 1b"));
}
