//! Compiles csrc with `cc`: one row of `FLAGS` an instruction set, every C file of a room by its suffix.

use std::path::{Path, PathBuf};

/// Operator rooms under csrc; a file `<room>/<anything>_<suffix>.c` is compiled with the flags of that suffix.
const ROOMS: &[&str] =
    &["base", "attention", "causal_conv", "gated_delta", "matmul", "moe", "norm", "quant", "rope", "solve_tri"];

/// (target architecture, file suffix, compiler flags). Files with none of these suffixes are plain C.
const FLAGS: &[(&str, &str, &str)] = &[
    ("x86_64", "_avx2", "-mavx2 -mfma -mf16c"),
    ("x86_64", "_avx512", "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl"),
    ("x86_64", "_avx512vnni", "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"),
    (
        "x86_64",
        "_avx512bf16",
        "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16",
    ),
    ("aarch64", "_neon", ""),
    ("aarch64", "_neondot", "-march=armv8.2-a+dotprod"),
];

fn main() {
    let csrc = Path::new(&std::env::var("CARGO_MANIFEST_DIR").expect("set by cargo")).join("csrc");
    println!("cargo:rerun-if-changed={}", csrc.display());
    println!("cargo:rerun-if-env-changed=Q3N_CFLAGS");
    let arch = std::env::var("CARGO_CFG_TARGET_ARCH").expect("set by cargo");

    let mut plain = compiler();
    let mut by_isa: Vec<(cc::Build, bool)> = FLAGS
        .iter()
        .map(|(_, _, flags)| {
            let mut build = compiler();
            flags.split_whitespace().for_each(|f| {
                build.flag(f);
            });
            (build, false)
        })
        .collect();
    for file in sources(&csrc) {
        let stem = file.file_stem().expect("listed by extension").to_string_lossy().into_owned();
        match FLAGS.iter().position(|(_, suffix, _)| stem.ends_with(suffix)) {
            None => {
                plain.file(&file);
            }
            Some(i) if FLAGS[i].0 == arch => {
                by_isa[i].0.file(&file);
                by_isa[i].1 = true;
            }
            Some(_) => {}
        }
    }
    // One archive: the objects of every ISA join the plain ones.
    for (build, used) in by_isa.into_iter().filter(|(_, used)| *used) {
        debug_assert!(used);
        build.compile_intermediates().into_iter().for_each(|object| {
            plain.object(object);
        });
    }
    plain.compile("q3n");
    if std::env::var("CARGO_CFG_UNIX").is_ok() {
        println!("cargo:rustc-link-lib=m");
    }
    println!("cargo:include={}", csrc.display());
    println!("cargo:lib={}", std::env::var("OUT_DIR").expect("set by cargo"));

    #[cfg(feature = "bindgen")]
    bindings(&csrc);
}

/// The flags every C file shares. Warnings are shown, not errors: CI turns them into errors through Q3N_CFLAGS.
fn compiler() -> cc::Build {
    let mut build = cc::Build::new();
    build.std("c11").opt_level(3).extra_warnings(true).warnings(true).flag("-Wconversion");
    // The same bits from every compiler: a product and a sum are fused only where the source says fma.
    build.flag("-ffp-contract=off").flag("-fno-math-errno");
    build.flag("-fvisibility=hidden");
    for flag in std::env::var("Q3N_CFLAGS").unwrap_or_default().split_whitespace() {
        build.flag(flag);
    }
    build
}

fn sources(csrc: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = ROOMS
        .iter()
        .flat_map(|room| {
            let dir = csrc.join(room);
            std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        })
        .map(|entry| entry.expect("readable directory").path())
        .filter(|path| path.extension().is_some_and(|e| e == "c"))
        .collect();
    files.sort();
    files
}

/// Writes OUT_DIR/ffi.rs from csrc/q3n.h; with Q3N_WRITE_BINDINGS set also src/ffi.rs, the committed copy.
#[cfg(feature = "bindgen")]
fn bindings(csrc: &Path) {
    println!("cargo:rerun-if-env-changed=Q3N_WRITE_BINDINGS");
    let out = Path::new(&std::env::var("OUT_DIR").expect("set by cargo")).join("ffi.rs");
    bindgen::Builder::default()
        .header(csrc.join("q3n.h").display().to_string())
        .allowlist_item("[qQ]3[nN]_.*")
        .prepend_enum_name(false)
        .generate_comments(false)
        .use_core()
        .formatter(bindgen::Formatter::Prettyplease)
        .generate()
        .unwrap_or_else(|e| panic!("csrc/q3n.h: {e}"))
        .write_to_file(&out)
        .unwrap_or_else(|e| panic!("{}: {e}", out.display()));
    if std::env::var_os("Q3N_WRITE_BINDINGS").is_some() {
        let committed = csrc.parent().expect("csrc has a parent").join("src/ffi.rs");
        std::fs::copy(&out, &committed).unwrap_or_else(|e| panic!("{}: {e}", committed.display()));
    }
}
