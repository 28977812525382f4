//! The public items of the two libraries, as lists under `api/`: a change of the interface shows in review, and one that
//! breaks callers is named as such. (What this crate offers is the command, and the plug-in interface of csrc/base.) After a wanted change: `Q3N_WRITE_API=1 cargo test --release -p qwen3next-verify --test
//! public_api`. The C functions and structs are `src/ffi.rs`, which CI compares with fresh bindings.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Crate, folder of its sources.
const CRATES: &[(&str, &str)] = &[("qwen3next-kernels", "src"), ("qwen3next-model", "model/src")];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
        if entry.is_dir() {
            files.extend(rust_files(&entry));
        } else if entry.extension().is_some_and(|e| e == "rs") {
            files.push(entry);
        }
    }
    files.sort();
    files
}

/// Every public declaration of a source, without bodies, comments and attributes, a line each: what `pub` starts, the
/// variants of a public enum, the items of a public trait, and which trait is implemented for what.
fn declarations(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    // Names of the modules and impl blocks around a line, with the indentation of each.
    let mut around: Vec<(usize, String, bool)> = Vec::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let (indent, line) = (line.len() - line.trim_start().len(), line.trim());
        if line == "#[cfg(test)]" || line.starts_with("#[cfg(all(test") {
            break;
        }
        while around.last().is_some_and(|(at, ..)| indent <= *at && !line.is_empty() && line != ")") {
            around.pop();
        }
        if line.is_empty() || line.starts_with("//") || line.starts_with('#') || line.starts_with('}') {
            continue;
        }
        let inside = around.last().is_some_and(|(at, _, open)| *open && indent == at + 4);
        let public = line.starts_with("pub ") && !line.starts_with("pub(");
        let block = line.starts_with("impl") || line.starts_with("unsafe impl");
        if !(public || block || inside) {
            continue;
        }
        let mut whole = line.to_string();
        let ends = |s: &str| {
            s.ends_with('{')
                || s.ends_with(';')
                || s.ends_with('}')
                || (inside || public) && s.ends_with(',') && balanced(s)
        };
        while !ends(&whole) {
            let Some(next) = lines.next() else { break };
            whole = format!("{whole} {}", next.trim());
        }
        let opens = whole.ends_with('{');
        let mut whole = whole.trim_end_matches(['{', ';', ',', ' ']).to_string();
        if whole.starts_with("pub const") || whole.starts_with("pub static") {
            whole = whole.split(" = ").next().unwrap().to_string();
        }
        let path: String = around.iter().map(|(_, name, _)| format!("{name} / ")).collect();
        // An inherent impl is only where methods are.
        if !block || whole.contains(" for ") {
            found.push(format!("{path}{whole}"));
        }
        if opens {
            let of_enum = inside && around.last().is_some_and(|(_, name, _)| name.starts_with("pub enum"));
            let listed = of_enum || whole.starts_with("pub enum") || whole.starts_with("pub trait");
            around.push((indent, whole, listed));
        }
    }
    found
}

fn balanced(text: &str) -> bool {
    ["()", "[]", "{}"].iter().all(|pair| {
        let count = |c: char| text.matches(c).count();
        count(pair.chars().next().unwrap()) == count(pair.chars().nth(1).unwrap())
    })
}

fn items(sources: &str) -> BTreeSet<String> {
    let folder = root().join(sources);
    let mut items = BTreeSet::new();
    for file in rust_files(&folder) {
        let name = file.strip_prefix(&folder).unwrap().with_extension("").to_string_lossy().replace('\\', "/");
        // Bindings have their own check.
        if name == "ffi" {
            continue;
        }
        let text = std::fs::read_to_string(&file).unwrap();
        items.extend(declarations(&text).into_iter().map(|item| format!("{name}: {item}")));
    }
    items
}

#[test]
fn the_public_items_are_those_listed() {
    let mut wrong = String::new();
    for (name, sources) in CRATES {
        let path = root().join("verify/api").join(name).with_extension("txt");
        let now = items(sources);
        assert!(now.len() > 50, "{name}: only {} public items found", now.len());
        if std::env::var_os("Q3N_WRITE_API").is_some() {
            let text: String = now.iter().map(|item| format!("{item}\n")).collect();
            std::fs::write(&path, text).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let listed: BTreeSet<String> = text.lines().map(String::from).collect();
        for gone in listed.difference(&now) {
            wrong += &format!("{name}: breaks callers (next minor version): - {gone}\n");
        }
        for new in now.difference(&listed) {
            wrong += &format!("{name}: new: + {new}\n");
        }
    }
    assert!(wrong.is_empty(), "the public interface changed; Q3N_WRITE_API=1 writes it down:\n{wrong}");
}

#[test]
fn declarations_are_found_and_bodies_are_not() {
    let source = "
/// Doc.
pub struct A<'a> {
    /// Doc.
    pub x: &'a [f32],
    y: u8,
}

pub(crate) fn hidden() {}

impl<'a> A<'a> {
    /// Doc.
    pub fn f(
        &self,
        n: usize,
    ) -> usize {
        let pub_like = 1;
        n
    }
    fn g(&self) {}
}

impl Drop for A<'_> {
    fn drop(&mut self) {}
}

pub enum E {
    One,
    Two { x: u8 },
    Three {
        /// Doc.
        y: u8,
    },
}

pub const N: usize = 7;

#[cfg(test)]
mod tests {
    pub fn not_this() {}
}
";
    let expected = [
        "pub struct A<'a>",
        "pub struct A<'a> / pub x: &'a [f32]",
        "impl<'a> A<'a> / pub fn f( &self, n: usize, ) -> usize",
        "impl Drop for A<'_>",
        "pub enum E",
        "pub enum E / One",
        "pub enum E / Two { x: u8 }",
        "pub enum E / Three",
        "pub enum E / Three / y: u8",
        "pub const N: usize",
    ];
    assert_eq!(declarations(source), expected);
}
