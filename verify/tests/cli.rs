//! The command itself: exit status, one line for what is wrong, clean stdout, files whole or not at all.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("q3n-cli-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(&self.0)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn command<S: AsRef<OsStr>>(folder: &Path, args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qwen3next"));
    command.args(args).current_dir(folder).env_remove("Q3N_FUSED_DELTA").env_remove("LLAMA_QWEN3NEXT_FUSED_DELTA");
    command
}

fn run(folder: &Folder, line: &str) -> Output {
    command(&folder.0, line.split_whitespace()).output().unwrap()
}

fn expect_refused(output: &Output, what: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{what}: {text}");
    assert_eq!(text.lines().count(), 1, "{what}: {text}");
    assert!(text.starts_with("error: "), "{what}: {text}");
}

#[test]
fn the_environment_holds_the_program_to_instruction_sets() {
    let folder = Folder::new("isa");
    let verify = |names: &str| {
        let line = "verify --op rope --quick --json report.json";
        command(&folder.0, line.split_whitespace()).env("Q3N_ISA", names).output().unwrap()
    };
    let ran = |output: &Output| {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report = std::fs::read(folder.0.join("report.json")).unwrap();
        let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
        let named = |verdict: &str| {
            let of = report["results"].as_array().unwrap().iter().filter(|r| r["verdict"] == verdict);
            of.map(|r| r["variant"].as_str().unwrap().to_string()).collect::<std::collections::BTreeSet<_>>()
        };
        (named("passed"), named("skipped"))
    };
    let (passed, skipped) = ran(&verify("scalar"));
    assert_eq!(passed.into_iter().collect::<Vec<_>>(), ["scalar"]);
    assert!(!skipped.is_empty() && !skipped.contains("scalar"));
    expect_refused(&verify("sclar"), "Q3N_ISA=sclar");
    expect_refused(&verify("scalar,,avx2"), "Q3N_ISA=scalar,,avx2");
}

#[test]
fn bad_input_is_status_2_and_one_line() {
    let folder = Folder::new("bad");
    std::fs::write(folder.0.join("empty"), "").unwrap();
    std::fs::write(folder.0.join("latin1"), b"caf\xe9").unwrap();
    std::fs::write(folder.0.join("short.npy"), b"\x93NUMPY\x02\x00\xff\xff\xff\xff").unwrap();
    for line in [
        "nonsense",
        "logits",
        "logits --tokens 1 --tokens-file empty --out x.npy",
        "logits --tokens -1 --out x.npy",
        "logits --tokens=-1 --out x.npy",
        "logits --tokens 99999999999999999999 --out x.npy",
        "logits --tokens 999999 --out x.npy",
        "logits --tokens-file empty --out x.npy",
        "logits --tokens-file latin1 --out x.npy",
        "logits --tokens-file . --out x.npy",
        "logits --tokens 1 --out no/such/folder/x.npy",
        "logits --tokens 1 --out .",
        "logits --tokens 1 --out x.npy -m empty",
        "logits --tokens 1 --out x.npy -m .",
        "logits --tokens 1 --out x.npy -ub 0",
        "logits --tokens 1 --out x.npy -t 100000",
        "logits --tokens 1 --out x.npy --fused-delta 3",
        "generate -n -2",
        "generate -n 1 --stop=",
        "generate -n 1 --prompt-cache empty",
        "generate -n 1 --prompt-cache no/such/folder/x",
        "chat --prompt hi --chat-template chatml --prompt-cache .",
        "generate -n 1 --prompt-cache-ro",
        "generate -n 1 --repeat-penalty 0",
        "chat --prompt hi",
        "chat --prompt hi --chat-template latin1",
        "chat --prompt hi --chat-template chatml --chat-template-kwargs [1]",
        "chat --prompt hi --chat-template chatml --tools empty",
        "generate -n 18446744073709551615",
        "generate -n 1 --ctx 1000000000000",
        "generate -n 1 --temp nan",
        "perplexity -c 1",
        "perplexity -c 16 --windows 1 --kl-base short.npy",
        "inspect no-such-file",
        "quantize no-such-file x.gguf --type q8_0",
        "quantize empty x.gguf --type q8_0",
        "quantize . x.gguf --type q8_0",
        "quantize empty x.gguf",
        "quantize empty x.gguf --type q9_9",
        "quantize empty x.gguf --type Q4_K_M",
        "synth . --tiny",
        "synth x.gguf --layers 0",
        "generate --ctx 3",
        "verify --op norm --json no/such/folder/x.json",
        "bench op gated_delta --tokens 0",
        "drift --tokens 64 --plot no/such/folder/x.svg",
        "drift --tokens 0",
    ] {
        let output = run(&folder, line);
        expect_refused(&output, line);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{line}");
    }
    assert_eq!(folder.names(), ["empty", "latin1", "short.npy"]);
}

#[cfg(unix)]
#[test]
fn arguments_need_not_be_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let folder = Folder::new("bytes");
    let odd = OsStr::from_bytes(b"\xff");
    for args in [[OsStr::new("inspect"), odd], [odd, odd]] {
        expect_refused(&command(&folder.0, args).output().unwrap(), "bytes");
    }
}

#[test]
fn json_is_all_of_stdout() {
    let folder = Folder::new("json");
    for line in
        ["inspect -o json", "perplexity -o json -c 16 --windows 2", "bench op gated_delta -o json --tokens 1 -r 1"]
    {
        let output = run(&folder, line);
        assert_eq!(output.status.code(), Some(0), "{line}");
        serde_json::from_slice::<serde_json::Value>(&output.stdout).expect(line);
    }
}

#[test]
fn quantize_keeps_all_but_the_types_of_the_matrices() {
    let folder = Folder::new("quantize");
    let json = |line: &str| -> serde_json::Value {
        let output = run(&folder, line);
        assert_eq!(output.status.code(), Some(0), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect(line)
    };
    assert_eq!(run(&folder, "synth x.gguf --tiny --layers 2 --quant bf16").status.code(), Some(0));
    let report = json("quantize x.gguf y.gguf --type IQ4_xs --output-tensor-type q8_0 -o json");
    assert_eq!(report["types"]["q8_0"]["tensors"], 1);
    let error = report["types"]["iq4_xs"]["relative_error"].as_f64().unwrap();
    assert!((0.06..0.08).contains(&error), "{error}");
    let (before, after) = (json("inspect -o json x.gguf"), json("inspect -o json y.gguf"));
    for key in ["vocab", "hidden", "layers", "parameters", "name"] {
        assert_eq!(before[key], after[key], "{key}");
    }
    let tensors = before["tensors"].as_array().unwrap().iter().zip(after["tensors"].as_array().unwrap());
    for (a, b) in tensors {
        assert_eq!((&a["name"], &a["shape"]), (&b["name"], &b["shape"]));
        let expected = match (a["name"].as_str().unwrap(), a["type"].as_str().unwrap()) {
            ("output.weight", _) => "Q8_0",
            (_, "BF16") => "IQ4_XS",
            (_, other) => other,
        };
        assert_eq!(b["type"], expected, "{}", a["name"]);
    }
    // A file may take its own place.
    json("quantize y.gguf y.gguf --type q4_k -o json");
    assert_eq!(
        json("inspect -o json y.gguf")["types"]["Q4_K"]["tensors"],
        report["types"]["iq4_xs"]["tensors"].as_u64().unwrap() + 1
    );
    expect_refused(&run(&folder, "quantize x.gguf . --type q4_0"), "a folder");
    assert_eq!(folder.names(), ["x.gguf", "y.gguf"]);
}

#[cfg(unix)]
#[test]
fn outputs_keep_links_and_never_replace_what_is_no_file() {
    let folder = Folder::new("special");
    let at = |name: &str| folder.0.join(name);
    std::fs::write(at("real.npy"), "old").unwrap();
    std::os::unix::fs::symlink("real.npy", at("link.npy")).unwrap();
    assert_eq!(run(&folder, "logits --tokens 1,2 --out link.npy").status.code(), Some(0));
    assert!(at("link.npy").is_symlink());
    assert!(std::fs::read(at("real.npy")).unwrap().starts_with(b"\x93NUMPY"));

    let socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    for line in [
        "logits --tokens 1 --out socket",
        "synth socket --tiny",
        "inspect socket",
        "logits --tokens 1 --out link.npy/x",
    ] {
        expect_refused(&run(&folder, line), line);
    }
    assert!(!at("socket").metadata().unwrap().is_file());
    assert_eq!(folder.names(), ["link.npy", "real.npy", "socket"]);
    drop(socket);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_and_a_closed_pipe_is_none() {
    let folder = Folder::new("full");
    for line in ["generate -n 2", "inspect", "perplexity -c 16 --windows 1", "logits --tokens 1 --out x.npy"] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = command(&folder.0, line.split_whitespace()).stdout(full).output().unwrap();
        expect_refused(&output, line);
    }
    let mut child =
        command(&folder.0, ["inspect", "--tensors"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0));
}

#[cfg(unix)]
#[test]
fn an_interrupt_leaves_no_file() {
    let folder = Folder::new("interrupt");
    let mut child = command(&folder.0, ["synth", "x.gguf", "--layers", "4"]).stderr(Stdio::null()).spawn().unwrap();
    let begin = std::time::Instant::now();
    while folder.names().is_empty() {
        assert!(begin.elapsed().as_secs() < 60, "no file was begun");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(folder.names().is_empty(), "{:?}", folder.names());
}
