//! `bench` and `sweep`: the shape of what they print, what they refuse, and that a plot is there whole or not at all.

use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};

fn run(line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qwen3next"));
    command.args(line.split_whitespace()).current_dir(std::env::temp_dir());
    command.env_remove("Q3N_FUSED_DELTA").env_remove("LLAMA_QWEN3NEXT_FUSED_DELTA").output().unwrap()
}

fn stdout(line: &str) -> String {
    let output = run(line);
    assert_eq!(output.status.code(), Some(0), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(line: &str) -> Value {
    serde_json::from_str(&stdout(line)).expect(line)
}

/// The cells of the rows of a markdown table, its rule left out.
fn cells(table: &str) -> Vec<Vec<String>> {
    let rows = table.lines().filter(|l| l.starts_with('|') && !l.starts_with("| -"));
    rows.map(|l| l.trim_matches('|').split('|').map(|c| c.trim().to_string()).collect()).collect()
}

#[test]
fn peaks_are_of_this_machine() {
    let document = json("bench peaks -o json -t 2");
    let peaks = document["peaks"].as_array().unwrap();
    for name in ["read", "f32", "int8"] {
        let peak = peaks.iter().find(|p| p["peak"] == name).unwrap();
        assert!(peak["one_thread"].as_f64().unwrap() > 1e7, "{peak}");
        assert!(peak["kernel"].as_str().unwrap().starts_with(name), "{peak}");
    }
    assert_eq!(document["threads"], 2);
    assert_eq!(cells(&stdout("bench peaks")).len(), 1 + peaks.len());
    let csv = stdout("bench peaks -o csv");
    assert_eq!(csv.lines().next(), Some("peak,kernel,threads,one_thread,all_threads"));
}

#[test]
fn every_operator_can_be_timed() {
    for (op, flags, lines) in [
        ("gated_delta", "--tokens 1,3 --heads 2/4 --dim 32", 2),
        ("solve_tri", "--tokens 2 --shape 9x5,inverse:7", 2),
        ("causal_conv", "--tokens 3 --shape 20x4", 1),
        ("norm", "--tokens 3 --shape rms:1x20,gated:2x8,l2:2x8,3x4", 4),
        ("rope", "--tokens 3 --shape 2x16x8", 1),
        ("attention", "--tokens 1,5 --heads 4/2 --dim 32 --shape 700 --dtype f32,f16,bf16,q8_0", 8),
        ("attention_merge", "--tokens 2 --heads 4/2 --dim 32 --shape 3", 1),
        ("dequantize", "--tokens 3 --shape 256 --dtype q6_k,bf16", 2),
        ("quantize", "--tokens 3 --shape 256 --dtype q8_0", 1),
        ("matmul", "--tokens 1,3 --shape 5x256 --dtype q4_k,f32", 4),
        ("moe_route", "--tokens 3 --shape 9/2", 1),
        ("moe_group", "--tokens 3 --shape 9/2", 1),
        ("moe_up", "--tokens 3 --shape 9/2:32x64 --dtype q8_0", 1),
        ("moe_down", "--tokens 3 --shape 9/2:32x64 --dtype q8_0,f16", 2),
    ] {
        let rows = json(&format!("bench op {op} -r 1 -o json {flags}"));
        let rows = rows.as_array().unwrap();
        let variants: std::collections::BTreeSet<&str> = rows.iter().map(|r| r["variant"].as_str().unwrap()).collect();
        assert_eq!(rows.len(), lines * variants.len(), "{op}");
        for row in rows {
            assert_eq!(row["op"], op);
            for field in ["median_s", "min_s", "ratio", "gflops", "gbs", "peak_fraction"] {
                assert!(row[field].as_f64().unwrap() > 0.0, "{field} of {row}");
            }
            assert!(row["bound_multiple"].as_f64().unwrap() <= 1.0, "{row}");
            let roof = row["peak"].as_str().unwrap();
            assert!(["memory", "cache", "f32", "bf16", "int8"].contains(&roof), "{row}");
        }
    }
}

#[test]
fn an_operators_csv_and_markdown_have_the_same_rows() {
    let ask = "bench op norm -r 1 --tokens 1,2 --shape 1x64";
    let (csv, table) = (stdout(&format!("{ask} -o csv")), cells(&stdout(ask)));
    let header =
        "op,variant,dtype,shape,tokens,threads,median_s,min_s,samples,ratio,gflops,gbs,peak_fraction,peak,row_l2";
    assert_eq!(csv.lines().next(), Some(header));
    assert!(csv.lines().all(|l| l.split(',').count() == header.split(',').count()), "{csv}");
    assert_eq!(csv.lines().count(), table.len());
    assert_eq!(table[0][9], "of peak");
}

#[test]
fn models_json_has_llama_benchs_fields() {
    let ask =
        "bench model -p 8,12 -n 2 -pg 4,2 -d 3 -r 2 -b 6 -ub 4 -t 2 -fa 1 -ngl 0 -mmp 1 -rtr 0 --n-cpu-moe 0 -ctk f32 \
               -ctv f32 --fused-delta 2";
    let tests = json(&format!("{ask} -o json"));
    let tests = tests.as_array().unwrap();
    let sizes: Vec<_> = tests.iter().map(|t| (t["n_prompt"].as_u64().unwrap(), t["n_gen"].as_u64().unwrap())).collect();
    assert_eq!(sizes, [(8, 0), (12, 0), (0, 2), (4, 2)]);
    for test in tests {
        for text in [
            "build_commit",
            "cpu_info",
            "gpu_info",
            "backends",
            "model_filename",
            "model_type",
            "type_k",
            "type_v",
            "cpu_mask",
            "split_mode",
            "devices",
            "tensor_split",
            "tensor_buft_overrides",
            "test_time",
        ] {
            assert!(test[text].is_string(), "{text}: {}", test[text]);
        }
        for number in [
            "build_number",
            "model_size",
            "model_n_params",
            "n_batch",
            "n_ubatch",
            "n_threads",
            "poll",
            "n_gpu_layers",
            "n_cpu_moe",
            "main_gpu",
            "n_prompt",
            "n_gen",
            "n_depth",
            "avg_ns",
            "stddev_ns",
            "flash_attn",
        ] {
            assert!(test[number].is_i64(), "{number}: {}", test[number]);
        }
        for flag in ["cpu_strict", "no_kv_offload", "embeddings", "no_host", "use_mmap", "repack"] {
            assert!(test[flag].is_boolean(), "{flag}: {}", test[flag]);
        }
        let tokens = test["n_prompt"].as_f64().unwrap() + test["n_gen"].as_f64().unwrap();
        let ns: Vec<f64> = test["samples_ns"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        let ts: Vec<f64> = test["samples_ts"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        assert_eq!((ns.len(), ts.len()), (2, 2));
        assert!(ns.iter().zip(&ts).all(|(ns, ts)| (ts - 1e9 * tokens / ns).abs() < 1e-6 * ts));
        assert!((test["avg_ts"].as_f64().unwrap() - (ts[0] + ts[1]) / 2.0).abs() < 1e-6 * ts[0]);
        assert!((test["avg_ns"].as_f64().unwrap() - (ns[0] + ns[1]) / 2.0).abs() <= 1.0);
        let spread = (ts[0] - ts[1]).abs() / 2f64.sqrt();
        assert!((test["stddev_ts"].as_f64().unwrap() - spread).abs() <= 1e-6 * ts[0]);
        assert_eq!(
            (test["n_depth"].as_u64(), test["n_batch"].as_u64(), test["n_ubatch"].as_u64()),
            (Some(3), Some(6), Some(4))
        );
        // Only a test of one kind says how near it came to one roof.
        let (reads, computes) = (test["bytes_per_token"].is_number(), test["ops_per_token"].is_number());
        assert_eq!(reads, test["n_prompt"] == 0);
        assert_eq!(computes, test["n_gen"] == 0);
        assert_eq!(test["peak_fraction"].as_f64().is_some_and(|f| f > 0.0), reads || computes);
    }
}

#[test]
fn models_matrix_is_every_value_with_every_other() {
    let ask = "bench model -p 4 -n 0 -r 1 --no-warmup -b 4,8 -ub 1-4*2 -t 1 -t 2";
    let lines = stdout(&format!("{ask} -o jsonl"));
    let all: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let of = |v: &Value| ["n_batch", "n_ubatch", "n_threads"].map(|f| v[f].as_u64().unwrap());
    let mut want = Vec::new();
    for b in [4, 8] {
        for ub in [1, 2, 4] {
            want.extend([[b, ub, 1], [b, ub, 2]]);
        }
    }
    assert_eq!(all.iter().map(of).collect::<Vec<_>>(), want);

    let lines = stdout("bench model -p 4 -n 0 -r 1 --no-warmup --fused-delta 0,1 --fused-delta 2 -o jsonl");
    let modes = lines.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["fused_delta"].as_u64().unwrap());
    assert_eq!(modes.collect::<Vec<_>>(), [0, 1, 2]);

    let csv = stdout("bench model -p 4 -n 2 -r 1 -o csv");
    let columns: Vec<&str> = csv.lines().next().unwrap().split(',').collect();
    assert_eq!(columns[..3], ["build_commit", "build_number", "cpu_info"]);
    assert_eq!(csv.lines().count(), 3);
    assert!(csv.lines().skip(1).all(|l| l.split("\",\"").count() == columns.len()), "{csv}");

    let table = stdout("bench model -p 4 -n 2 -r 1 -ub 2");
    let rows = cells(&table);
    let names = ["model", "size", "params", "backend", "threads", "n_ubatch", "test", "t/s", "of peak"];
    assert_eq!(rows[0], names);
    assert_eq!([&rows[1][6], &rows[2][6]], ["pp4", "tg2"]);
    assert!(rows[1][7].contains(" ± ") && rows[2][8].contains("a token"), "{table}");
    assert!(table.lines().last().unwrap().starts_with("build: "), "{table}");
}

#[test]
fn a_sweep_marks_the_best_and_draws() {
    let folder = tempfile::tempdir().unwrap();
    let plot: PathBuf = folder.path().join("sweep.svg");
    let ask = "sweep -p 12 -n 2 -r 1 -b 4,8 -ub 2,4,8 -t 1";
    let document = json(&format!("{ask} -o json --plot {}", plot.display()));
    let rows = document["rows"].as_array().unwrap();
    let sizes: Vec<_> =
        rows.iter().map(|r| (r["n_batch"].as_u64().unwrap(), r["n_ubatch"].as_u64().unwrap())).collect();
    assert_eq!(sizes, [(4, 2), (4, 4), (8, 2), (8, 4), (8, 8)]);
    for (best, speed) in [("best_pp", "pp_avg_ts"), ("best_tg", "tg_avg_ts")] {
        let best = rows[document[best].as_u64().unwrap() as usize][speed].as_f64().unwrap();
        assert!(rows.iter().all(|r| r[speed].as_f64().unwrap() <= best));
    }
    let svg = std::fs::read_to_string(&plot).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

    let table = cells(&stdout(ask));
    let marks: String = table.iter().skip(1).map(|row| row[5].clone() + " ").collect();
    assert_eq!((marks.matches("PP").count(), marks.matches("TG").count()), (1, 1), "{table:?}");
    let csv = stdout(&format!("{ask} -o csv"));
    assert_eq!(csv.lines().count(), 6);
}

#[test]
fn what_is_not_there_or_makes_no_sense_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let plot = folder.path().join("x.svg");
    let plot = format!("sweep -p 4 -n 1 -b 2 -ub 4 --plot {}", plot.display());
    for (line, names) in [
        ("bench model -ngl 99", "-ngl 99"),
        ("bench model -ncmoe 4", "--n-cpu-moe 4"),
        ("bench model -fa 0", "-fa 0"),
        ("bench model -mmp 2", "-mmp 2"),
        ("bench model -ctk q5_1", "-ctk q5_1"),
        ("bench model -ctv nonsense", "-ctv nonsense"),
        ("bench model -rtr 2", "-rtr 2"),
        ("bench model -p x", "-p x"),
        ("bench model -p 8-4x", "-p 8-4x"),
        ("bench model -b 0", "-b 0"),
        ("bench model -ub 1,0", "-ub 0"),
        ("bench model -t 5000", "-t 5000"),
        ("bench model -pg 5", "-pg 5"),
        ("bench model -pg 5,x", "-pg 5,x"),
        ("bench model --fused-delta 3", "--fused-delta 3"),
        ("bench model -m no-such-file.gguf", "no-such-file.gguf"),
        ("bench model --n-promt 4", "--n-prompt"),
        ("bench model --repeat-layers 6", "is 6, expected a multiple of the file's 4 layers"),
        ("bench model --op-offload maybe", "--op-offload"),
        ("bench op nonsense", "nonsense"),
        ("bench op norm --heads 2/4", "--heads"),
        ("bench op norm --dtype q4_k", "--dtype q4_k"),
        ("bench op norm --shape 4", "--shape 4"),
        ("bench op norm --shape 0x4", "--shape 0x4"),
        ("bench op norm --shape odd:1x4", "odd"),
        ("bench op matmul --shape 4x100", "--shape 4x100"),
        ("bench op matmul --dtype q9_9", "q9_9"),
        ("bench op matmul --variant nonsense", "--variant nonsense"),
        ("bench op attention --heads 3/2", "--heads 3/2"),
        ("bench op attention --dim 1000", "--dim 1000"),
        ("bench op moe_up --shape 4/5:256x256", "--shape 4/5"),
        ("bench op norm --plot no/such/folder/x.svg", "no/such/folder/x.svg"),
        ("sweep -b 4,x", "-b x"),
        ("sweep -ctk q8_1", "-ctk q8_1"),
        (plot.as_str(), "-ub"),
    ] {
        let output = run(line);
        let text = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = text.lines().filter(|l| !l.starts_with("note: ")).collect();
        assert_eq!(output.status.code(), Some(2), "{line}: {text}");
        assert_eq!((lines.len(), output.stdout.len()), (1, 0), "{line}: {text}");
        assert!(lines[0].starts_with("error: ") && lines[0].contains(names), "{line}: {text}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// Commands with a model take the same options of where its layers lie.
#[test]
fn placement_is_said_the_same_way() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("x.npy").display().to_string();
    let text = folder.path().join("x.txt").display().to_string();
    std::fs::write(&text, "In the beginning").unwrap();
    let logits = format!("logits --tokens 1,2 --out {out}");
    let perplexity = format!("perplexity -f {text} -c 4");
    let place = match cfg!(feature = "cuda-host") {
        true => "-ngl 99 -ncmoe 3 --device executor",
        false => "-ngl 0 -ncmoe 0",
    };
    for command in [
        "bench model -p 2 -n 1 -r 1 --no-warmup",
        "sweep -p 2 -n 1 -r 1 -b 2 -ub 2",
        &logits,
        &perplexity,
        "generate -p a -n 1",
    ] {
        for how in ["--op-offload on -no-ooae", "--op-offload=on --no-offload-only-active-experts", "--no-op-offload"] {
            stdout(&format!("{command} {place} {how}"));
        }
    }
    let rows = json("bench model -p 2 -n 0 -r 1 --no-warmup --no-op-offload --repeat-layers 8 -o json");
    let once = json("bench model -p 2 -n 0 -r 1 --no-warmup -o json");
    assert_eq!((rows[0]["no_op_offload"].as_u64(), rows[0]["repeat_layers"].as_u64()), (Some(1), Some(8)));
    assert!(once[0]["repeat_layers"].is_null());
    let size = |rows: &Value| rows[0]["model_n_params"].as_u64().unwrap();
    assert!(size(&rows) > size(&once) && size(&rows) < 2 * size(&once));
}

/// Where this build or machine has no GPU: one line, no failure.
#[test]
fn without_a_gpu_its_benches_say_so() {
    let ask = "bench op norm --backend cuda -r 2 --tokens 2 --shape 1x64";
    let text = stdout(ask);
    let table = cells(&text);
    assert!(text.starts_with("SKIPPED cuda: ") && text.lines().count() == 1 || table.len() >= 2, "{text}");
    let rows = json(&format!("{ask} -o json"));
    assert_eq!(rows.as_array().unwrap().is_empty(), table.is_empty());
    // So do those that would run beside our kernels.
    let text = stdout(&format!("{ask} --peers"));
    assert!(text.lines().count() == 1 || cells(&text).len() >= 2, "{text}");

    for (line, why) in [
        ("bench op norm --warm", "--warm: is for --backend cuda"),
        ("bench op norm --peers", "--peers: is for --backend cuda"),
        ("bench op none --backend cuda", "expected one of"),
        ("bench op norm --backend cuda --batch 2", "--batch: norm takes none"),
        ("bench op norm --backend cuda --dtype bf16", "--dtype bf16: expected f32"),
        ("bench op gated_delta --dtype bf16 --tokens 1", "--dtype bf16: expected f32, or the CUDA kernels"),
        ("bench op gated_delta --backend cuda --dtype f64", "--dtype f64: expected one of f32, bf16, f16"),
        ("bench op gated_delta --backend cuda --batch 999999", "--batch 999999"),
        ("bench op norm --backend cuda-host", "cuda-host"),
        ("bench op norm --backend cuda --plugin a.so:b", "--plugin"),
    ] {
        let output = run(line);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), error.lines().count()), (Some(2), 1), "{line}: {error}");
        assert!(error.contains(why), "{line}: {error}");
    }
}
