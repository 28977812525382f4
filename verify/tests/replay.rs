//! Cases written as files and replayed by the C program of verify/neon, natively: all variants pass, and it can fail.

use std::path::{Path, PathBuf};
use std::process::Command;

const REPLAY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/neon/replay.c");

fn run(command: &mut Command) -> (i32, String) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (output.status.code().unwrap_or_else(|| panic!("{command:?} died of a signal\n{text}")), text)
}

fn write_cases(folder: &Path, op: &str) -> PathBuf {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qwen3next"));
    let (code, text) = run(command.args(["verify", "--quick", "--op", op, "--write-cases"]).arg(folder));
    assert_eq!(code, 0, "{text}");
    folder.join(format!("{op}.cases"))
}

fn compile(folder: &Path) -> PathBuf {
    let program = folder.join("replay");
    let compiler = std::env::var("CC").unwrap_or("cc".into());
    let mut command = Command::new(compiler);
    command.args(["-std=c11", "-D_GNU_SOURCE", "-O1", REPLAY, env!("Q3N_LIBRARY"), "-lm", "-o"]).arg(&program);
    let (code, text) = run(&mut command);
    assert_eq!(code, 0, "{text}");
    program
}

/// What a file expects: (bitwise, where the wanted values start, how many), read as verify/neon/README.md says.
fn expectations(file: &[u8]) -> Vec<(bool, usize, usize)> {
    let mut at = 12;
    let take = |at: &mut usize, n: usize| {
        let value = file[*at..*at + n].iter().rev().fold(0usize, |value, &byte| value << 8 | usize::from(byte));
        *at += n;
        value
    };
    let mut found = Vec::new();
    while at < file.len() {
        // operator, form, note, args
        for _ in 0..4 {
            let length = take(&mut at, 4);
            at += length;
        }
        for _ in 0..take(&mut at, 4) {
            at += 4;
            at += 16 * take(&mut at, 4);
            let bytes = take(&mut at, 8);
            at += bytes;
            for _ in 0..take(&mut at, 4) {
                at += 8;
                let (bitwise, count) = (take(&mut at, 4) == 1, take(&mut at, 8));
                found.push((bitwise, at, count));
                at += count * if bitwise { 4 } else { 16 };
            }
        }
    }
    assert_eq!(at, file.len());
    found
}

#[test]
fn replayed_cases_pass_and_a_wrong_bit_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let program = compile(folder.path());
    let ops = ["solve_tri", "causal_conv", "norm", "rope", "attention", "dequantize", "matmul", "moe_up", "moe_down"];
    let files = ops.map(|op| write_cases(folder.path(), op));
    let (code, report) = run(Command::new(&program).args(&files));
    assert_eq!(code, 0, "{report}");
    for op in ops {
        assert!(report.lines().any(|l| l.split_whitespace().take(2).eq([op, "scalar"])), "{op}:\n{report}");
    }
    assert!(report.trim_end().ends_with(" 0 failures"), "{report}");

    let bad = folder.path().join("bad.cases");
    let fails = |bytes: &[u8], code: i32, message: &str| {
        std::fs::write(&bad, bytes).unwrap();
        let (got, report) = run(Command::new(&program).arg(&bad));
        assert_eq!(got, code, "{report}");
        assert!(report.contains(message), "{message}:\n{report}");
    };
    // One bit of one wanted value, within a bound and bit for bit.
    for (op, bit_for_bit) in [("solve_tri", false), ("causal_conv", true)] {
        let mut bytes = std::fs::read(folder.path().join(format!("{op}.cases"))).unwrap();
        let list = expectations(&bytes);
        let &(_, at, count) = list.iter().rfind(|e| e.0 == bit_for_bit && e.2 > 0).unwrap();
        // The exponent's highest bits: no bound is that wide.
        bytes[at + (count - 1) * if bit_for_bit { 4 } else { 8 } + if bit_for_bit { 3 } else { 7 }] ^= 0x40;
        fails(&bytes, 1, if bit_for_bit { "expected the same bits as" } else { "expected " });
        fails(&bytes, 1, &format!("\n  qwen3next verify --op {op} --check "));
    }
    // An element that nothing is expected of must not be written.
    let mut bytes = std::fs::read(folder.path().join("solve_tri.cases")).unwrap();
    let &(_, at, count) = expectations(&bytes).iter().rfind(|e| !e.0 && e.2 > 1).unwrap();
    let (last_want, last_bound) = (at + (count - 1) * 8, at + (2 * count - 1) * 8);
    bytes.drain(last_bound..last_bound + 8);
    bytes.drain(last_want..last_want + 8);
    bytes[at - 8..at].copy_from_slice(&(count as u64 - 1).to_le_bytes());
    fails(&bytes, 1, "which is no output");
    // Half a file, and no file of cases.
    fails(&bytes[..bytes.len() / 2], 2, "ends in the middle of a case");
    fails(b"GGUF and more than twelve bytes", 2, "is no file of cases");
}
