//! Kernels from shared libraries: the command judges right and wrong ones, and outlives those that crash or hang.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/plugin");
const HEADERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../csrc");

/// Compiles C text as the examples' comments say.
fn compile(folder: &Path, name: &str, text: &str) -> PathBuf {
    let (source, library) = (folder.join(format!("{name}.c")), folder.join(format!("lib{name}.so")));
    std::fs::write(&source, text).unwrap();
    let compiler = std::env::var("CC").unwrap_or("cc".into());
    let output = Command::new(&compiler)
        .args(["-O2", "-fPIC", "-shared", "-I", HEADERS, "-I", EXAMPLES])
        .arg(&source)
        .args(["-lm", "-o"])
        .arg(&library)
        .output()
        .unwrap_or_else(|e| panic!("{compiler}, which also compiles the kernels: {e}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}

fn example(folder: &Path, name: &str) -> PathBuf {
    compile(folder, name, &std::fs::read_to_string(format!("{EXAMPLES}/{name}.c")).unwrap())
}

fn qwen3next(args: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_qwen3next")).args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code().expect("the command itself never dies of a signal"), text(stdout), text(stderr))
}

fn judge(op: &str, plugin: &str, more: &[&str]) -> (i32, String, String) {
    qwen3next(&[&["verify", "--op", op, "--plugin", plugin], more].concat())
}

/// The reproducer that a report prints for a check, as arguments.
fn reproducer<'a>(report: &'a str, check: &str) -> Vec<&'a str> {
    let line = report
        .lines()
        .find(|l| l.trim_start().starts_with("qwen3next verify") && l.contains(&format!("--check {check} ")))
        .unwrap_or_else(|| panic!("no reproducer of {check} in\n{report}"));
    assert!(line.contains("--case ") && line.contains("--seed "), "{line}");
    line.split_whitespace().skip(1).collect()
}

#[test]
fn a_right_kernel_passes_every_check() {
    let folder = tempfile::tempdir().unwrap();
    let library = example(folder.path(), "gated_delta");
    let (code, report, errors) = judge("gated_delta", &format!("{}:my_gated_delta", library.display()), &[]);
    assert_eq!(code, 0, "{report}{errors}");
    assert!(report.contains("my_gated_delta") && report.contains(" checks passed, 0 failed, 0 skipped"), "{report}");
    assert!(!report.contains("recurrent_scalar"), "built-in variants are not asked about: {report}");
    assert!(report.contains("; not taken: dtype bf16 (") && report.contains(", dtype f16 ("), "{report}");
}

#[test]
fn a_wrong_kernel_fails_by_name_and_its_reproducer_repeats_it() {
    let folder = tempfile::tempdir().unwrap();
    let (right, wrong) = (example(folder.path(), "gated_delta"), example(folder.path(), "gated_delta_wrong"));
    let plugin = format!("{}:late_decay", wrong.display());
    let files = ["r.json", "r.html"].map(|name| folder.path().join(name).display().to_string());
    let more = ["--quick", "--json", &files[0], "--html", &files[1]];
    let (code, report, errors) = judge("gated_delta", &plugin, &more);
    assert_eq!(code, 1, "{report}{errors}");
    for check in ["reference", "split", "snapshots", "non-finite"] {
        assert!(report.contains(&format!("\ngated_delta late_decay {check}: ")), "{check} noticed nothing:\n{report}");
    }
    assert!(report.contains("times the bound"), "{report}");

    let again = reproducer(&report, "reference");
    assert!(again.windows(2).any(|w| w == ["--plugin", plugin.as_str()]), "{again:?}");
    let (code, repeated, _) = qwen3next(&again);
    assert_eq!(code, 1);
    let failure =
        |text: &str| text.lines().find(|l| l.starts_with("gated_delta late_decay reference:")).unwrap().to_string();
    assert_eq!(failure(&repeated), failure(&report));

    let other = format!("{}:my_gated_delta", right.display());
    let on_right: Vec<&str> = again.iter().map(|a| if *a == plugin { other.as_str() } else { a }).collect();
    assert_eq!(qwen3next(&on_right).0, 0, "the right kernel passes the same case");

    let json: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&files[0]).unwrap()).unwrap();
    let failed = json["totals"]["failed"].as_u64().unwrap();
    let passed = json["totals"]["passed"].as_u64().unwrap();
    assert!(failed >= 4 && passed > 4 && json["totals"]["checks"] == passed + failed, "{}", json["totals"]);
    let rows = json["results"].as_array().unwrap();
    let reference = rows.iter().find(|r| r["check"] == "reference").unwrap();
    assert_eq!((&reference["op"], &reference["variant"]), (&"gated_delta".into(), &"late_decay".into()));
    assert_eq!(reference["reproduce"], format!("qwen3next {}", again.join(" ")));
    assert!(json["machine"]["isas"].as_array().unwrap().contains(&"scalar".into()), "{}", json["machine"]);

    let page = std::fs::read_to_string(&files[1]).unwrap();
    assert!(page.contains("late_decay") && page.contains("--check reference --case") && page.contains("<svg"));
    assert!(!page.contains("<script") && !page.contains("src="), "the page needs nothing else");
}

/// The right kernel, preceded by something.
fn spoilt(first: &str) -> String {
    format!(
        "#include \"gated_delta.c\"\n\
         q3n_status spoilt(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {{\n{first}\n\
         return my_gated_delta(a, begin, end, scratch); }}\n\
         int64_t spoilt_items(const q3n_gated_delta_args *a) {{ return my_gated_delta_items(a); }}\n\
         int64_t spoilt_scratch_bytes(const q3n_gated_delta_args *a) {{ return my_gated_delta_scratch_bytes(a); }}\n"
    )
}

#[test]
fn a_crash_is_a_failure_of_its_case() {
    let folder = tempfile::tempdir().unwrap();
    let library = compile(folder.path(), "crash", &spoilt("if (a->T == 17) *(volatile int *)8 = 1;"));
    let (code, report, errors) = judge("gated_delta", &format!("{}:spoilt", library.display()), &["--cases", "0"]);
    assert_eq!(code, 1, "{report}{errors}");
    let line =
        report.lines().find(|l| l.starts_with("gated_delta spoilt reference: ")).unwrap_or_else(|| panic!("{report}"));
    assert!(line.contains("SIGSEGV"), "{line}");
    let again = reproducer(&report, "reference");
    assert!(again.iter().any(|a| a.contains("t=17,")), "{again:?}");
    assert_eq!(qwen3next(&again).0, 1);
    assert!(report.contains("gated_delta spoilt cuts: "), "the other checks run all the same: {report}");
}

#[test]
fn a_write_outside_the_output_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let library = compile(folder.path(), "outside", &spoilt("if (a->o && a->T > 1) ((float *)a->o)[-1] = 0.0f;"));
    let (code, report, errors) = judge("gated_delta", &format!("{}:spoilt", library.display()), &["--quick"]);
    assert_eq!(code, 1, "{report}{errors}");
    assert!(
        report.contains("gated_delta spoilt reference: o: wrote outside the array, -1 elements from its first"),
        "{report}"
    );
    reproducer(&report, "reference");
}

#[test]
fn a_kernel_that_takes_a_type_is_tested_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let (wide, narrow) = ("#include <math.h>\n#include <stdlib.h>\n", "static float narrow(uint16_t h) {");
    // bf16 through floats of its own, by all tokens at once: o is rounded to the nearest or not at all.
    let through = |rounding: &str| {
        format!(
            "{wide}#include \"gated_delta.c\"
            {narrow} union {{ uint32_t u; float f; }} x = {{(uint32_t)h << 16}}; return x.f; }}
            static float *widened(const void *x, int64_t n) {{
              float *y = malloc((size_t)n * 4 + 4);
              for (int64_t i = 0; i < n; i++) y[i] = narrow(((const uint16_t *)x)[i]);
              return y;
            }}
            static int64_t reach(int64_t b, int64_t b_s, int64_t t, int64_t t_s, int64_t h, int64_t h_s, int64_t n) {{
              return b && t && h && n ? (b - 1) * b_s + (t - 1) * t_s + (h - 1) * h_s + n : 0;
            }}
            int64_t taking_items(const q3n_gated_delta_args *a) {{ return my_gated_delta_items(a) ? 1 : 0; }}
            int64_t taking_scratch_bytes(const q3n_gated_delta_args *a) {{ return my_gated_delta_scratch_bytes(a); }}
            q3n_status taking(const q3n_gated_delta_args *a, int64_t begin, int64_t end, void *scratch) {{
              (void)begin; (void)end;
              if (a->dtype == Q3N_F32) return my_gated_delta(a, 0, my_gated_delta_items(a), scratch);
              if (a->dtype != Q3N_BF16) return q3n_fail(Q3N_DTYPE, Q3N_ARG_DTYPE);
              q3n_gated_delta_args f = *a;
              const int64_t rows = a->cu_seqlens ? 1 : a->B;
              float *q = widened(a->q, reach(rows, a->q_b, a->T, a->q_t, a->HK, a->q_h, a->K));
              float *k = widened(a->k, reach(rows, a->k_b, a->T, a->k_t, a->HK, a->k_h, a->K));
              float *v = widened(a->v, reach(rows, a->v_b, a->T, a->v_t, a->HV, a->v_h, a->V));
              float *o = malloc((size_t)reach(rows, a->o_b, a->T, a->o_t, a->HV, a->o_h, a->V) * 4 + 4);
              f.q = q, f.k = k, f.v = v, f.o = o, f.dtype = Q3N_F32;
              const q3n_status status = my_gated_delta(&f, 0, my_gated_delta_items(&f), scratch);
              for (int64_t b = 0; b < rows; b++) for (int64_t t = 0; t < a->T; t++) for (int64_t h = 0; h < a->HV; h++)
              for (int64_t j = 0; j < a->V; j++) {{
                const int64_t at = b * a->o_b + t * a->o_t + h * a->o_h + j;
                union {{ float f; uint32_t u; }} x = {{o[at]}};
                ((uint16_t *)a->o)[at] = (uint16_t)(x.f == x.f ? (x.u + ({rounding})) >> 16 : 0x7fc0);
              }}
              free(q), free(k), free(v), free(o);
              return status;
            }}"
        )
    };
    for (name, rounding, wanted) in [("nearest", "0x7fffu + (x.u >> 16 & 1u)", 0), ("toward_zero", "0u", 1)] {
        let library = compile(folder.path(), name, &through(rounding));
        let plugin = format!("{}:taking", library.display());
        let (code, report, errors) = judge("gated_delta", &plugin, &["--check", "reference"]);
        assert_eq!(code, wanted, "{name}: {report}{errors}");
        assert!(!report.contains("dtype bf16 (") && report.contains("dtype f16 ("), "{name}: {report}");
        assert_eq!(wanted == 1, report.contains("dtype=bf16"), "{name}: {report}");
    }
}

#[test]
fn a_kernel_that_does_not_return_is_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let library = compile(folder.path(), "stuck", &spoilt("for (volatile int i = 1; i;) {}"));
    let more = ["--check", "reference", "--timeout", "1"];
    let (code, report, errors) = judge("gated_delta", &format!("{}:spoilt", library.display()), &more);
    assert_eq!(code, 1, "{report}{errors}");
    assert!(report.contains("did not return within 1 s"), "{report}");
    reproducer(&report, "reference");
}

#[test]
fn a_plain_function_is_one_item() {
    let folder = tempfile::tempdir().unwrap();
    let text = "#include \"q3n.h\"\n\
        q3n_status all(const q3n_solve_tri_args *a, int64_t begin, int64_t end, void *scratch) {\n\
          if (begin != 0 || end != 1) return q3n_fail(Q3N_RANGE, Q3N_ARG_BEGIN_END);\n\
          (void)scratch;\n\
          for (int64_t e = 0; e < a->batch; e++)\n\
            for (int64_t i = 0; i < a->n; i++)\n\
              for (int64_t c = 0; c < a->m; c++) {\n\
                const float *l = a->l + e * a->l_batch + i * a->l_row;\n\
                float *x = a->x + e * a->x_batch + c;\n\
                double sum = a->b ? a->b[e * a->b_batch + i * a->b_row + c] : i == c;\n\
                for (int64_t j = 0; j < i; j++) sum -= (double)l[j] * x[j * a->x_row];\n\
                x[i * a->x_row] = (float)(a->unit_diagonal ? sum : sum / l[i]);\n\
              }\n\
          return Q3N_OK;\n\
        }\n";
    let library = compile(folder.path(), "solve", text);
    let (code, report, errors) = judge("solve_tri", &format!("{}:all", library.display()), &[]);
    assert_eq!(code, 0, "{report}{errors}");
    assert!(report.contains(" checks passed, 0 failed, 0 skipped"), "{report}");
}

#[test]
fn bad_input_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let right = example(folder.path(), "gated_delta").display().to_string();
    let table = |name: &str, isa: &str| {
        format!(
            "const q3n_gated_delta_variant {name} =\n\
             {{\"{name}\", {isa}, spoilt_items, spoilt_scratch_bytes, spoilt}};\n"
        )
    };
    let text = spoilt("")
        + &table("recurrent_scalar", "Q3N_ISA_SCALAR")
        + &table("unknown", "99")
        + &table("elsewhere", if cfg!(target_arch = "aarch64") { "Q3N_ISA_AVX2" } else { "Q3N_ISA_NEON" })
        + "const q3n_gated_delta_variant empty =\n\
           {\"empty\", Q3N_ISA_SCALAR, spoilt_items, spoilt_scratch_bytes, NULL};\n\
           int number = 7;\n";
    let odd = compile(folder.path(), "odd", &text).display().to_string();
    let source = folder.path().join("odd.c").display().to_string();
    let gone = folder.path().join("gone.so").display().to_string();
    for (op, plugin, wanted) in [
        ("gated_delta", format!("{gone}:x"), "gone.so: No such file"),
        ("gated_delta", format!("{source}:x"), "odd.c is not a shared library"),
        ("gated_delta", format!("{right}:mine"), "no symbol `mine`; the library exports my_gated_delta, "),
        ("gated_delta", format!("{odd}:number"), "`number` is data of 4 bytes; a q3n_<op>_variant has 40"),
        ("gated_delta", format!("{odd}:recurrent_scalar"), "the name of a built-in variant"),
        ("gated_delta", format!("{odd}:unknown"), "isa is 99"),
        ("gated_delta", format!("{odd}:elsewhere"), "which this CPU or the ISA mask does not offer"),
        ("gated_delta", format!("{odd}:empty"), "items, scratch_bytes or run is NULL"),
        ("gate", format!("{right}:my_gated_delta"), "--op gate: expected one of gated_delta, "),
    ] {
        let (code, report, errors) = judge(op, &plugin, &["--quick"]);
        assert_eq!((code, report.as_str()), (2, ""), "{plugin}: {errors}");
        assert!(errors.contains(wanted) && errors.lines().count() == 1, "{plugin}: {errors}");
    }
    let (code, _, errors) = qwen3next(&["verify", "--plugin", &format!("{right}:my_gated_delta")]);
    assert!(code == 2 && errors.contains("give --op"), "{errors}");
}

#[test]
fn bench_times_right_kernels_and_refuses_wrong_ones() {
    let folder = tempfile::tempdir().unwrap();
    let shape = "bench op gated_delta --tokens 2 --heads 1/2 --dim 8 --repetitions 1 --variant recurrent_scalar -o csv";
    let bench = |plugins: &[String]| {
        let mut args: Vec<&str> = shape.split(' ').collect();
        plugins.iter().for_each(|p| args.extend(["--plugin", p]));
        qwen3next(&args)
    };
    let right = format!("{}:my_gated_delta", example(folder.path(), "gated_delta").display());
    let wrong = format!("{}:late_decay", example(folder.path(), "gated_delta_wrong").display());
    let crash = format!("{}:spoilt", compile(folder.path(), "crash", &spoilt("*(volatile int *)8 = 1;")).display());

    let (code, table, errors) = bench(std::slice::from_ref(&right));
    assert_eq!(code, 0, "{errors}");
    let names: Vec<&str> = table.lines().skip(1).map(|l| l.split(',').nth(1).unwrap()).collect();
    assert_eq!(names, ["recurrent_scalar", "my_gated_delta"]);
    let (code, _, errors) = bench(&[right.clone(), wrong]);
    assert!(code == 1 && errors.contains("late_decay is wrong, so it is not timed"), "{code} {errors}");
    let (code, _, errors) = bench(&[crash]);
    assert!(code == 1 && errors.contains("spoilt took the process down: SIGSEGV"), "{code} {errors}");
    let (code, _, errors) = bench(&[right.clone(), right]);
    assert!(code == 2 && errors.contains("a second variant named my_gated_delta"), "{code} {errors}");
}
