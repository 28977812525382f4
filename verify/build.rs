//! Compiles the mutants: copies of the kernels in csrc with the patches of src/mutants/catalogue.rs applied, and unpatched
//! copies made the same way (the control group). Nothing here reaches the library crate.

#[allow(dead_code)]
#[path = "src/mutants/catalogue.rs"]
mod catalogue;

use catalogue::{Form, Patch, CATALOGUE};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// (operator, folder in csrc, its suite in `cases`).
const OPERATORS: &[(&str, &str, &str)] = &[
    ("gated_delta", "gated_delta", "gated_delta::GatedDelta"),
    ("solve_tri", "solve_tri", "solve_tri::SolveTri"),
    ("causal_conv", "causal_conv", "causal_conv::CausalConv"),
    ("norm", "norm", "norm::Norm"),
    ("rope", "rope", "rope::Rope"),
    ("attention", "attention", "attention::Attention"),
    ("dequantize", "quant", "quant::Dequantize"),
    ("matmul", "matmul", "matmul::Matmul"),
    ("moe_route", "moe", "moe::MoeRoute"),
    ("moe_down", "moe", "moe::MoeDown"),
];

/// A copy of one variant to compile: a mutant, or an unpatched one where there are no patches.
struct Copy {
    id: String,
    op: &'static str,
    variant: &'static str,
    patches: &'static [Patch],
}

fn main() {
    let csrc = PathBuf::from(std::env::var_os("DEP_QWEN3NEXT_KERNELS_INCLUDE").expect("set by the library's build"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("set by cargo"));
    println!("cargo:rerun-if-changed={}", csrc.display());
    println!("cargo:rerun-if-changed=src/mutants/catalogue.rs");
    let library = PathBuf::from(std::env::var_os("DEP_QWEN3NEXT_KERNELS_LIB").expect("set by the library's build"));
    println!("cargo:rustc-env=Q3N_LIBRARY={}", library.join("libq3n.a").display());

    let mut copies: Vec<Copy> = Vec::new();
    let mut controls: Vec<Copy> = Vec::new();
    for mutant in CATALOGUE {
        let Form::Kernel { op, variant, patches } = mutant.form else { continue };
        assert!(!patches.is_empty(), "mutant {}: has no patch", mutant.id);
        assert!(copies.iter().all(|c| c.id != mutant.id), "mutant {}: is listed twice", mutant.id);
        copies.push(Copy { id: mutant.id.into(), op, variant, patches });
        if !controls.iter().any(|c| c.op == op && c.variant == variant) {
            controls.push(Copy { id: format!("control_{op}_{variant}"), op, variant, patches: &[] });
        }
    }
    copies.extend(controls);

    let folder = out.join("mutants");
    let _ = std::fs::remove_dir_all(&folder);
    let mut archive = compiler();
    let mut code = String::from("[\n");
    for (objects, entry) in in_parallel(&copies, |copy| make(&csrc, &folder, copy)) {
        objects.iter().for_each(|object| {
            archive.object(object);
        });
        code += &entry;
    }
    code += "]\n";
    archive.compile("q3n_mutants");
    #[cfg(feature = "cuda-host")]
    executor(&csrc);
    write(&out.join("mutants.rs"), &code);
}

/// The kernels that the host executor of CUDA kernels is judged by.
#[cfg(feature = "cuda-host")]
fn executor(csrc: &Path) {
    println!("cargo:rerun-if-changed=executor");
    cuda_compiler().warnings(true).include(csrc).file("executor/kernels.cu").compile("q3n_executor");
}

/// `f` of every item, in order, on all cores.
fn in_parallel<T: Sync, R: Send>(items: &[T], f: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let next = std::sync::atomic::AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some((i, item)) = {
            let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            items.get(i).map(|item| (i, item))
        } {
            done.push((i, f(item)));
        }
        done
    };
    let mut all: Vec<(usize, R)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|t| t.join().unwrap_or_else(|e| std::panic::resume_unwind(e))).collect()
    });
    all.sort_by_key(|(i, _)| *i);
    all.into_iter().map(|(_, r)| r).collect()
}

/// The flags of the library, one level lower: these kernels are judged, not timed.
fn compiler() -> cc::Build {
    let mut build = cc::Build::new();
    build.std("c11").opt_level(2).warnings(false).cargo_metadata(true);
    build.flag("-ffp-contract=off").flag("-fno-math-errno").flag("-fvisibility=hidden");
    build
}

/// The same for CUDA kernels, which the host executor runs.
fn cuda_compiler() -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).cpp_link_stdlib(None).std("c++17").opt_level(2).warnings(false);
    build.flags(["-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-x", "c++"]);
    build.flags(["-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]);
    build
}

/// Objects of a copy, and the Rust expression of its entry.
fn make(csrc: &Path, folder: &Path, copy: &Copy) -> (Vec<PathBuf>, String) {
    let Copy { id, op, variant, .. } = copy;
    let who = format!("mutant {id}");
    let &(_, room, suite) =
        OPERATORS.iter().find(|(o, ..)| o == op).unwrap_or_else(|| panic!("{who}: build.rs knows no operator {op}"));
    let root = folder.join(id);
    let mut sources: BTreeMap<String, String> = BTreeMap::new();
    let known = ["h", "c", "inc", "cu", "cuh"].map(std::ffi::OsStr::new);
    for dir in read_dir(csrc).filter(|p| p.is_dir()).chain([csrc.join("cuda/host")]) {
        for file in read_dir(&dir).filter(|p| p.extension().is_some_and(|e| known.contains(&e))) {
            let name = file.strip_prefix(csrc).expect("below csrc").to_string_lossy().into_owned();
            sources.insert(name, read(&file));
        }
    }
    for patch in copy.patches {
        let text = sources.get_mut(patch.file).unwrap_or_else(|| panic!("{who}: csrc has no file {}", patch.file));
        let count = text.matches(patch.find).count();
        assert!(
            count == 1,
            "{who}: {} holds the text to replace {count} times, expected once:\n{}",
            patch.file,
            patch.find
        );
        *text = text.replace(patch.find, patch.replace);
    }

    let inc = &sources[&format!("{room}/{room}.inc")];
    let [items, scratch, run] = functions(inc, op, variant)
        .unwrap_or_else(|| panic!("{who}: {room}.inc has no scalar or cuda_host {op} {variant}"));
    let home = sources
        .iter()
        .find(|(name, text)| name.starts_with(&format!("{room}/")) && is_source(name) && defined(text).contains(&run))
        .unwrap_or_else(|| panic!("{who}: no file of {room} defines {run}"))
        .0
        .clone();
    let cuda = home.ends_with(".cu");
    let mut files = vec![home];
    for patch in copy.patches.iter().filter(|p| is_source(p.file)) {
        if !files.iter().any(|f| f == patch.file) {
            files.push(patch.file.to_string());
        }
    }

    for (name, text) in &sources {
        if !is_source(name) || files.contains(name) {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().expect("below the root")).expect("a folder in OUT_DIR");
            write(&path, text);
        }
    }
    // The public functions of these files get names of their own: the library's stay what they are.
    let own: Vec<String> = files.iter().flat_map(|f| defined(&sources[f])).collect();
    let mut build = if cuda { cuda_compiler() } else { compiler() };
    for name in &own {
        build.define(name, format!("q3n_mutant_{id}_{name}").as_str());
    }
    files.iter().for_each(|f| {
        build.file(root.join(f));
    });
    let symbol = |name: &String| if own.contains(name) { format!("q3n_mutant_{id}_{name}") } else { name.clone() };
    let [items, scratch, run] = [items, scratch, run].map(|name| symbol(&name));

    let mut entry = String::new();
    write!(
        entry,
        "    {{
        type Raw = <<cases::{suite} as Suite>::Op as Operator>::Raw;
        extern \"C\" {{
            fn {items}(args: *const Raw) -> i64;
            fn {scratch}(args: *const Raw) -> i64;
            fn {run}(args: *const Raw, begin: i64, end: i64, scratch: *mut std::ffi::c_void) -> i32;
        }}
        Copy {{
            id: {id:?},
            op: {op:?},
            variant: {variant:?},
            checks: || cases::{suite}::checks().iter().map(|check| check.name).collect(),
            run: |options| {{
                // SAFETY: the signatures are those of the operator's table. That a mutant keeps the contract is what the
                // suite doubts; it runs in a process of its own.
                let variant = unsafe {{ Variant::foreign({variant:?}, Isa::SCALAR, {items}, {scratch}, {run}) }};
                run_on::<cases::{suite}>(options, &[variant])
            }},
        }}
    }},\n"
    )
    .expect("a string");
    (build.compile_intermediates(), entry)
}

fn is_source(name: &str) -> bool {
    name.ends_with(".c") || name.ends_with(".cu")
}

/// The items, scratch and run functions of a variant in an operator's list: `X(op, name, isa, items, scratch, run)` or
/// `Q3N_CUDA_HOST_VARIANT(X, op, name, functions)`.
fn functions(inc: &str, op: &str, variant: &str) -> Option<[String; 3]> {
    let inc = inc.replace("\\\n", " ");
    let cuda = inc.split("Q3N_CUDA_HOST_VARIANT(").skip(1).find_map(|entry| {
        let fields: Vec<&str> = entry.split(')').next()?.split(',').map(str::trim).collect();
        match fields[..] {
            ["X", o, v, name] if o == op && v == variant => {
                Some(["_items", "_scratch_bytes", ""].map(|end| format!("q3n_{name}_cuda_host{end}")))
            }
            _ => None,
        }
    });
    cuda.or_else(|| {
        inc.split("X(").skip(1).find_map(|entry| {
            let fields: Vec<&str> = entry.split(')').next()?.split(',').map(str::trim).collect();
            match fields[..] {
                [o, v, "Q3N_ISA_SCALAR", items, scratch, run] if o == op && v == variant => {
                    Some([items, scratch, run].map(String::from))
                }
                _ => None,
            }
        })
    })
}

/// Public functions that a C file defines, itself or by one of the macros of base/operator.h.
fn defined(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut offset = 0;
    for line in text.split_inclusive('\n') {
        let start = offset;
        offset += line.len();
        if let Some(rest) = line.strip_prefix("Q3N_DEFINE_OPERATOR(") {
            let op = rest.split(',').next().unwrap_or("").trim();
            names.extend(["variant_count", "variant_at", "run"].map(|f| format!("q3n_{op}_{f}")));
        }
        if let Some(rest) = line.strip_prefix("Q3N_DEFINE_BEST_FIRST(") {
            names.push(format!("q3n_{}_best", rest.split(')').next().unwrap_or("").trim()));
        }
        // csrc/cuda/launch.cuh
        if let Some(rest) = line.strip_prefix("Q3N_CUDA_OPERATOR(") {
            let name = rest.split([',', ')']).nth(1).unwrap_or("").trim();
            names.extend(["", "_items", "_scratch_bytes"].map(|end| format!("q3n_{name}_cuda_host{end}")));
        }
        if !line.starts_with(|c: char| c.is_ascii_alphabetic()) || line.starts_with("static") {
            continue;
        }
        let Some(open) = line.find('(') else { continue };
        let name = line[..open].rsplit(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).next().unwrap_or("");
        // A definition goes on with a body, a declaration ends.
        let after = text[start + open..].find(')').map_or("", |close| text[start + open + close + 1..].trim_start());
        if name.starts_with("q3n_") && after.starts_with('{') {
            names.push(name.to_string());
        }
    }
    names
}

fn read_dir(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let mut list: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|entry| entry.expect("a readable folder").path())
        .collect();
    list.sort();
    list.into_iter()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}
