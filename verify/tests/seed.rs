//! The commands that compare: fused modes on a text, what fits a GPU, builds side by side, the whole harness.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qwen3next"));
    command.args(args).env_remove("Q3N_FUSED_DELTA").env_remove("LLAMA_QWEN3NEXT_FUSED_DELTA");
    command
}

fn run(line: &str) -> Output {
    command(&line.split_whitespace().collect::<Vec<_>>()).output().unwrap()
}

fn json_of(output: &Output, status: i32) -> Value {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {errors}"))
}

fn refused(output: &Output, names: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.lines().count() == 1 && text.starts_with("error: ") && text.contains(names), "{names}: {text}");
}

#[test]
fn the_modes_agree() {
    let document = json_of(&run("regress --windows 2 -c 96 -o json"), 0);
    let rows = document["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 6);
    assert_eq!(document["positions"], 190);
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap();
        assert!(number("kl_mean") <= 1e-6 && number("kl_p99_9") >= number("kl_mean"), "{row}");
        assert!((number("ppl_ratio") - 1.0).abs() <= 1e-4 && number("top1_agreement") > 0.99, "{row}");
        assert!(number("ppl_error") > 0.0, "{row}");
    }
    // One token at a time mode 1 is mode 0; of a prompt it is mode 2.
    assert_eq!((rows[1]["kl_mean"].as_f64(), rows[1]["ppl"].clone()), (Some(0.0), rows[0]["ppl"].clone()));
    assert_eq!(rows[4]["ppl"], rows[5]["ppl"]);
    // Mode 2 is another kernel: equal bits would mean that it did not run.
    assert!(rows[2]["kl_mean"].as_f64().unwrap() > 0.0 && rows[5]["kl_mean"].as_f64().unwrap() > 0.0);
    assert!(rows.iter().all(|r| r["device"] == "CPU" && r["why_cpu"].is_null()), "{document}");
    assert_eq!((&document["backend"], &document["device"]), (&"CPU".into(), &Value::Null));
}

#[cfg(not(any(feature = "cuda", feature = "cuda-host")))]
#[test]
fn devices_that_are_not_built_in_are_refused_by_name() {
    for flag in ["-ngl", "--ngl", "--gpu-layers", "--n-gpu-layers"] {
        refused(&run(&format!("regress {flag} 99")), "--gpu-layers 99: built without the feature cuda");
    }
}

/// A kernel that forgets the decay where it gets a single token: prompts are right, decoding is not.
const WRONG_DECODE: &str = r#"
#include "gated_delta.c"
int64_t no_decay_items(const q3n_gated_delta_args *a) { return my_gated_delta_items(a); }
int64_t no_decay_scratch_bytes(const q3n_gated_delta_args *a) { return my_gated_delta_scratch_bytes(a); }
q3n_status no_decay(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {
  q3n_gated_delta_args one = *a;
  if (a->T == 1) one.g = NULL;
  return my_gated_delta(&one, begin, end, scratch);
}
"#;

#[test]
fn a_kernel_that_is_wrong_in_decode_alone_is_caught() {
    let folder = tempfile::tempdir().unwrap();
    let (source, library) = (folder.path().join("wrong.c"), folder.path().join("libwrong.so"));
    std::fs::write(&source, WRONG_DECODE).unwrap();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let compiled = Command::new(std::env::var("CC").unwrap_or("cc".into()))
        .args(["-O2", "-fPIC", "-shared", "-I"])
        .arg(here.join("../csrc"))
        .arg("-I")
        .arg(here.join("examples/plugin"))
        .arg(&source)
        .args(["-lm", "-o"])
        .arg(&library)
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));

    let ask = |symbol: &str| run(&format!("regress --windows 1 -c 96 -o json --plugin {}:{symbol}", library.display()));
    assert_eq!(json_of(&ask("my_gated_delta"), 0)["fused_variant"], "my_gated_delta");
    let output = ask("no_decay");
    let document = json_of(&output, 1);
    let broken: Vec<&str> = document["broken"].as_array().unwrap().iter().map(|b| b.as_str().unwrap()).collect();
    assert!(!broken.is_empty() && broken.iter().all(|b| b.starts_with("mode 2, decode (b 1, ub 1): ")), "{broken:?}");
    for what in ["perplexity ratio to mode 0", "mean KL divergence"] {
        assert!(broken.iter().any(|b| b.contains(what)), "{what}: {broken:?}");
    }
    let lines = String::from_utf8(output.stderr).unwrap();
    assert_eq!(lines.lines().filter(|l| l.starts_with("regression: ")).count(), broken.len(), "{lines}");
}

#[test]
fn thresholds_are_held_and_flags_refused() {
    let output = run("regress --windows 1 -c 64 --max-decode-ppl 1.5 --max-prefill-ppl 1.25");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    let broken: Vec<&str> = text.lines().filter(|l| l.starts_with("- ")).collect();
    assert_eq!(broken.len(), 6, "{text}");
    assert!(broken[0].contains("mode 0, decode") && broken[0].ends_with("limit 1.5"), "{text}");
    assert!(broken[5].contains("mode 2, prefill") && broken[5].ends_with("limit 1.25"), "{text}");
    for (line, names) in [
        ("regress -ngl 99 --variant recurrent_scalar", "--gpu-layers 99"),
        ("regress --variant nonsense", "--variant nonsense"),
        ("regress -c 100000", "--ctx 100000"),
        ("regress -m nowhere.gguf -f nowhere.txt", "nowhere"),
        ("regress --plugin nowhere.so:x", "nowhere.so"),
        ("eval out -ngl 4", "--with-gpu"),
        ("eval out --with-gpu -ngl 0", "-1 for all"),
        ("eval out --with-gpu --device tpu", "--device"),
        ("eval out --peer x=y", "--peer"),
        ("bench matrix --peer x=y", "--peer"),
        ("bench matrix -p 0 -n 0", "-p 0 -n 0"),
        ("bench matrix -m nowhere.gguf", "nowhere.gguf"),
        ("regress --max-ratio x", "--max-ratio"),
        ("regress -c -5", "'-5' for '--ctx"),
        ("perplexity --windows 0", "--windows"),
        ("perplexity -f /dev/null", "the text has 0 tokens"),
        ("eval out -f /dev/null", "/dev/null: holds no text"),
        ("eval out -p x", "-p x"),
        ("eval out -p 0 -n 0", "-p 0 -n 0"),
        ("eval out -c 0", "--ctx"),
        ("eval out --vram nan", "--vram NaN"),
        ("eval out -m Cargo.toml", "Cargo.toml"),
        ("fit --vram=-1", "--vram -1"),
        ("fit --n-cpu-moe 49", "--n-cpu-moe 49"),
        ("fit --quant nonsense", "--quant nonsense"),
        ("fit -m nowhere.gguf", "nowhere.gguf"),
    ] {
        refused(&run(line), names);
    }
}

#[test]
fn the_environment_sets_the_mode_unless_the_flag_does() {
    let ask = "bench model -p 2 -n 0 -r 1 --no-warmup -o json";
    let mode = |set: &[(&str, &str)], more: &str| {
        let line = format!("{ask} {more}");
        let mut command = command(&line.split_whitespace().collect::<Vec<_>>());
        json_of(&command.envs(set.iter().copied()).output().unwrap(), 0)[0]["fused_delta"].as_u64().unwrap()
    };
    let (own, theirs) = ("Q3N_FUSED_DELTA", "LLAMA_QWEN3NEXT_FUSED_DELTA");
    assert_eq!(mode(&[], ""), 2);
    assert_eq!(mode(&[(theirs, "1")], ""), 1);
    assert_eq!(mode(&[(own, "0"), (theirs, "1")], ""), 0);
    assert_eq!(mode(&[(own, "0")], "--fused-delta 1"), 1);
    for name in [own, theirs] {
        refused(&command(&["perplexity"]).env(name, "3").output().unwrap(), &format!("{name} 3"));
    }
}

#[test]
fn the_65k_plan_of_the_published_model() {
    let document = json_of(&run("fit -c 65536 --vram 16 -o json"), 0);
    let part = |name: &str| {
        let list = document["parts"].as_array().unwrap();
        list.iter().find(|p| p["name"] == name).unwrap_or_else(|| panic!("{name}: {list:?}"))["gpu"].as_u64().unwrap()
    };
    // 12 layers × 2 heads × 256 channels, keys and values, two bytes each.
    assert_eq!(part("KV cache"), 65_536 * 24_576);
    // 36 layers of 32 × 128 × 128 states and 8192 × 3 windows in f32.
    assert_eq!(part("recurrent state"), 36 * 4 * (32 * 128 * 128 + 8192 * 3));
    // A layer's experts: 512 × 3 × 512 × 2048 weights of 144 bytes in 256.
    let experts = 512 * 3 * 512 * 2048 / 256 * 144;
    let n = document["n_cpu_moe"].as_u64().unwrap();
    assert_eq!(part("routed experts"), (48 - n) * experts);
    let (gpu, vram) = (document["gpu"].as_u64().unwrap(), 16u64 << 30);
    assert!((1..48).contains(&n) && gpu <= vram && gpu + experts > vram, "{n} {gpu}");
    assert_eq!(document["gpu_by_n_cpu_moe"][n as usize - 1].as_u64().unwrap(), gpu + experts);
    json_of(&run(&format!("fit -c 65536 --vram 16 --n-cpu-moe {} -o json", n - 1)), 1);
    let none = json_of(&run("fit -c 1000000 --vram 8 -o json"), 1);
    assert!(none["smallest_n_cpu_moe"].is_null() && none["fits"] == false);
}

#[test]
fn a_plan_from_a_config_is_that_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("tiny.gguf");
    let model = model.to_str().unwrap();
    for quant in ["q4_k", "q8_0"] {
        assert!(run(&format!("synth {model} --tiny --layers 8 --quant {quant}")).status.success());
        let loaded = qwen3next_model::load(Path::new(model), Default::default(), &mut |_| ()).unwrap();
        let sizes = qwen3next_verify::memory::Sizes::of(&loaded.weights, &loaded.config);
        let dtype = qwen3next_kernels::DType::from_name(quant).unwrap();
        assert_eq!(qwen3next_verify::memory::Sizes::planned(&loaded.config, dtype).unwrap(), sizes);
        // Every byte of the file's tensors, and no other.
        let used: u64 = loaded.metadata.tensors.iter().filter(|t| t.used).map(|t| t.bytes).sum();
        assert_eq!(sizes.total(), used);
        let document = json_of(&run(&format!("fit -m {model} -c 4096 --vram 1 -o json")), 0);
        assert_eq!((document["weights"].as_u64(), document["n_cpu_moe"].as_u64()), (Some(used), Some(0)));
    }
}

/// A script in the place of another engine's llama-bench.
#[cfg(unix)]
fn peer(folder: &Path, name: &str, text: &str) -> String {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.display().to_string()
}

#[cfg(unix)]
const PEER: &str = r#"echo 'load: [1/2]'; echo '[
  {"n_prompt": 4, "n_gen": 0, "n_batch": 2048, "n_ubatch": 256, "backends": "CPU", "avg_ts": 50.0, "samples_ts": [40, 60]},
warning: slow
  {"n_prompt": 0, "n_gen": 2, "n_batch": 2048, "n_ubatch": 512, "avg_ts": 7.0}
]'; echo 'bye [now]'"#;

#[cfg(unix)]
#[test]
fn builds_side_by_side() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("tiny.gguf").display().to_string();
    assert!(run(&format!("synth {model} --tiny")).status.success());
    let good = format!("theirs={} -mmp 0", peer(folder.path(), "good", PEER));
    let bad = format!("broken={}", peer(folder.path(), "bad", "echo 'no such model' >&2; exit 3"));
    let svg = folder.path().join("m.svg").display().to_string();
    let args =
        ["bench", "matrix", "-m", &model, "-p", "4", "-n", "2", "-t", "1", "-r", "2", "--turns", "2", "-o", "json"];
    let more = ["--peer", &good, "--peer", &bad, "--ours=-rtr 0", "--ours=-rtr 1", "--plot", &svg];
    let document = json_of(&command(&[&args[..], &more[..]].concat()).output().unwrap(), 0);
    let builds = document["builds"].as_array().unwrap();
    let names: Vec<&str> = builds.iter().map(|b| b["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["qwen3next -rtr 0", "qwen3next -rtr 1", "theirs", "broken"]);
    assert_eq!(builds[0]["tests"]["pp4"]["samples_ts"].as_array().unwrap().len(), 4);
    assert_eq!(builds[0]["tests"]["tg2"]["relative"], 1.0);
    assert_eq!(builds[2]["tests"]["pp4"]["samples_ts"], serde_json::json!([40.0, 60.0, 40.0, 60.0]));
    assert_eq!(builds[2]["tests"]["tg2"]["median_ts"], 7.0);
    assert!(builds[3]["tests"]["pp4"]["median_ts"].is_null());
    let notes = document["notes"].to_string();
    assert!(notes.contains("theirs: ran with n_ubatch 256, asked for 512"), "{notes}");
    assert!(notes.contains("broken: no such model") && document["notes"].as_array().unwrap().len() == 2, "{notes}");
    assert!(std::fs::read_to_string(svg).unwrap().trim_end().ends_with("</svg>"));
}

#[cfg(unix)]
#[test]
fn the_harness_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out").display().to_string();
    let line = format!("eval {out} --quick -p 4 -n 2 -t 1 --with-gpu");
    // Interrupted as soon as the first part is done: what is done is there, and nothing half-written.
    let mut child =
        command(&line.split_whitespace().collect::<Vec<_>>()).stderr(std::process::Stdio::null()).spawn().unwrap();
    let begin = std::time::Instant::now();
    while !Path::new(&out).join("SUMMARY.md").exists() {
        assert!(begin.elapsed().as_secs() < 600 && child.try_wait().unwrap().is_none(), "no summary");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let output = run(&line);
    let kept = |output: &Output| -> Vec<bool> {
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        told.lines().filter(|l| l.contains(" of 7: ")).map(|l| l.ends_with("(kept)")).collect()
    };
    assert!(kept(&output)[0] && !kept(&output)[3]);
    let at = |name: &str| std::fs::read_to_string(Path::new(&out).join(name)).unwrap();
    let results = |_: ()| serde_json::from_str::<Value>(&at("results.json")).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}{}", at("SUMMARY.md"), String::from_utf8_lossy(&output.stderr));
    let first = results(());
    assert_eq!(first["parts"].as_array().unwrap().len(), 7);
    let summary = at("SUMMARY.md");
    // Where there is no GPU its parts say so, and fail nothing.
    for (i, name) in ["verify-gpu", "regress-gpu", "bench-gpu"].into_iter().enumerate() {
        let part = &first["parts"][4 + i];
        assert_eq!((&part["name"], &part["status"]), (&name.into(), &0.into()), "{part}");
        let verdict = match first["gpu"]["skipped"].as_str() {
            Some(why) => {
                assert!(part["skipped"] == why && part["result"].is_null() && why.len() > 10, "{part}");
                format!("| {name} | SKIPPED: {why} |")
            }
            None => format!("| {name} | passed |"),
        };
        assert!(summary.contains(&verdict), "{verdict}\n{summary}");
    }
    for text in ["| verify | passed |", "| regress | passed |", "| matrix | passed |", "| fit | passed |", "## Memory"]
    {
        assert!(summary.contains(text), "{text}\n{summary}");
    }
    assert!(["matrix.svg", "fit.svg"].iter().all(|f| at(f).starts_with("<svg")));

    // Cut off in the matrix: the parts before it are kept, and what is asked differently runs again.
    std::fs::remove_file(Path::new(&out).join("parts/matrix.json")).unwrap();
    let again = run(&format!("{line} --vram 24"));
    let gpu = first["gpu"]["device"].is_string();
    assert_eq!(kept(&again), [true, true, false, false, gpu, gpu, gpu]);
    let second = results(());
    assert_eq!(first["parts"][0], second["parts"][0]);
    assert_ne!(first["parts"][3]["result"]["vram"], second["parts"][3]["result"]["vram"]);
    assert!(std::fs::read_dir(&out).unwrap().all(|e| !e.unwrap().file_name().to_string_lossy().ends_with(".tmp")));
}
