//! Compiles csrc with `cc`: one row of `FLAGS` an instruction set, every C file of a room by its suffix.

use std::path::{Path, PathBuf};

/// Operator rooms under csrc; a file `<room>/<anything>_<suffix>.c` is compiled with the flags of that suffix.
const ROOMS: &[&str] = &[
    "base",
    "attention",
    "causal_conv",
    "gated_delta",
    "layer",
    "matmul",
    "moe",
    "norm",
    "quant",
    "rope",
    "solve_tri",
];

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
    for file in in_rooms(&csrc, "c") {
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
    #[cfg(feature = "cuda-host")]
    cuda_host::compile(&csrc, &mut plain);
    #[cfg(feature = "cuda")]
    cuda::compile(&csrc, &mut plain);
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
    compiler_of("c11")
}

fn compiler_of(standard: &str) -> cc::Build {
    let mut build = cc::Build::new();
    build.std(standard).opt_level(3).extra_warnings(true).warnings(true).flag("-Wconversion");
    // The same bits from every compiler: a product and a sum are fused only where the source says fma.
    build.flag("-ffp-contract=off").flag("-fno-math-errno");
    build.flag("-fvisibility=hidden");
    for flag in std::env::var("Q3N_CFLAGS").unwrap_or_default().split_whitespace() {
        build.flag(flag);
    }
    build
}

/// Files of the rooms with this extension.
fn in_rooms(csrc: &Path, extension: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = ROOMS
        .iter()
        .flat_map(|room| {
            let dir = csrc.join(room);
            std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        })
        .map(|entry| entry.expect("readable directory").path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    files
}

/// The CUDA kernels as C++ for the host executor (csrc/cuda/README.md).
#[cfg(feature = "cuda-host")]
mod cuda_host {
    use super::{compiler_of, in_rooms};
    use std::path::Path;

    pub fn compile(csrc: &Path, archive: &mut cc::Build) {
        archive.define("Q3N_CUDA_HOST", None);
        let mut build = compiler_of("c++17");
        // The executor needs nothing of the C++ library, which a C program that links the kernels may not have.
        build.cpp(true).cpp_link_stdlib(None).flags(["-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]);
        build.file(csrc.join("cuda/host/executor.cpp"));
        // The compiler takes no .cu for C++ by itself.
        build.flags(["-x", "c++"]).files(in_rooms(csrc, "cu"));
        build.compile_intermediates().into_iter().for_each(|object| {
            archive.object(object);
        });
    }
}

/// The CUDA kernels by nvcc, and the shim of the driver (csrc/cuda/README.md).
#[cfg(feature = "cuda")]
mod cuda {
    use super::in_rooms;
    use std::collections::BTreeSet;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// Compute capabilities that Q3N_CUDA_ARCHS chooses from; all by default.
    const ARCHS: &[&str] = &["80", "86", "89", "90a", "120"];
    /// Where csrc/cuda/install-nvcc.sh puts the toolkit.
    const INSTALLED: &str = "target/cuda/nvidia/cu13";

    pub fn compile(csrc: &Path, archive: &mut cc::Build) {
        for variable in ["CUDA_PATH", "CUDA_ROOT", "PATH", "Q3N_CUDA_ARCHS", "NVCC_CCBIN"] {
            println!("cargo:rerun-if-env-changed={variable}");
        }
        let root = toolkit(csrc.parent().expect("csrc has a parent"));
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("set by cargo"));
        let nvcc = root.join("bin/nvcc");
        let mut sources = in_rooms(csrc, "cu");
        sources.push(csrc.join("cuda/driver/runtime.cu"));
        for source in sources {
            let stem = source.file_stem().expect("listed by extension").to_string_lossy().into_owned();
            let object = out.join(format!("{stem}.cu.o"));
            let mut command = Command::new(&nvcc);
            command.args(["-std=c++17", "-O3", "-fmad=false", "-lineinfo", "--threads", &jobs()]);
            command.args(["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra"]).args(codes());
            command.arg("-c").arg(&source).arg("-o").arg(&object);
            let status = command.status().unwrap_or_else(|e| fail(&format!("{}: {e}", nvcc.display())));
            if !status.success() {
                fail(&format!("{} does not compile: {status}", source.display()));
            }
            archive.object(object);
        }

        write_symbols(&root, &out);
        let mut driver = super::compiler();
        driver.include(&out).file(csrc.join("cuda/driver/driver.c"));
        driver.compile_intermediates().into_iter().for_each(|object| {
            archive.object(object);
        });

        let libraries = ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|l| root.join(l));
        let library = libraries.iter().find(|l| l.join("libcudart_static.a").is_file());
        let library = library.unwrap_or_else(|| fail(&format!("{}: has no libcudart_static.a", root.display())));
        println!("cargo:rustc-link-search=native={}", library.display());
        println!("cargo:rustc-link-lib=static=cudart_static");
        for needed in ["stdc++", "pthread", "dl", "rt"] {
            println!("cargo:rustc-link-lib={needed}");
        }
    }

    fn jobs() -> String {
        std::env::var("NUM_JOBS").unwrap_or_else(|_| "1".into())
    }

    /// Code for every chosen GPU, and PTX for those that come after.
    fn codes() -> Vec<String> {
        let chosen = std::env::var("Q3N_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.join(","));
        let chosen: Vec<&str> = chosen.split(',').map(str::trim).filter(|a| !a.is_empty()).collect();
        if let Some(unknown) = chosen.iter().find(|a| !ARCHS.contains(a)) {
            fail(&format!("Q3N_CUDA_ARCHS: {unknown} is none of {}", ARCHS.join(",")));
        }
        let Some(first) = chosen.first() else { fail("Q3N_CUDA_ARCHS is empty") };
        let mut codes: Vec<String> = chosen.iter().map(|a| format!("-gencode=arch=compute_{a},code=sm_{a}")).collect();
        if !first.ends_with('a') {
            codes.push(format!("-gencode=arch=compute_{first},code=compute_{first}"));
        }
        codes
    }

    /// The folder with bin/nvcc: CUDA_PATH, CUDA_ROOT, the nvcc of PATH, what the script installed.
    fn toolkit(manifest: &Path) -> PathBuf {
        let named = ["CUDA_PATH", "CUDA_ROOT"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let on_path = std::env::split_paths(&path).filter_map(|bin| {
            let nvcc = bin.join("nvcc").canonicalize().ok()?;
            Some(nvcc.parent()?.parent()?.to_path_buf())
        });
        let mut roots = named.chain(on_path).chain([manifest.join(INSTALLED)]);
        roots.find(|root| root.join("bin/nvcc").is_file()).unwrap_or_else(|| {
            let script = manifest.join("csrc/cuda/install-nvcc.sh");
            fail(&format!(
                "feature `cuda` needs nvcc, which none of CUDA_PATH, CUDA_ROOT and PATH leads to; run\n\n    {}\n",
                script.display()
            ))
        })
    }

    /// OUT_DIR/driver_symbols.inc: X(number, name) for every function that cuda.h knows.
    fn write_symbols(root: &Path, out: &Path) {
        let headers = ["include", "targets/x86_64-linux/include", "targets/sbsa-linux/include"];
        let header = headers.iter().map(|h| root.join(h).join("cuda.h")).find(|h| h.is_file());
        let header = header.unwrap_or_else(|| fail(&format!("{}: has no include/cuda.h", root.display())));
        let text = std::fs::read(&header).unwrap_or_else(|e| fail(&format!("{}: {e}", header.display())));
        let text = String::from_utf8_lossy(&text);
        let names: BTreeSet<&str> = text
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
            .filter(|w| w.strip_prefix("cu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_uppercase())))
            .collect();
        let rows: String = names.iter().enumerate().map(|(i, name)| format!("X({i}, {name})\n")).collect();
        std::fs::write(out.join("driver_symbols.inc"), rows)
            .unwrap_or_else(|e| fail(&format!("{}: {e}", out.display())));
    }

    /// Ends the build with this message alone.
    fn fail(message: &str) -> ! {
        eprintln!("{message}");
        std::process::exit(1)
    }
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
        .derive_partialeq(true)
        .no_partialeq("CUstream_st|q3n_(peak|block_.*|.*_variant)")
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
