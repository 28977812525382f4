//! Kernels from a shared library, to be judged and timed beside the built-in variants.
//!
//! `LIBRARY:SYMBOL` names either
//! - data: a `q3n_<op>_variant`, complete as `csrc/base/operator.h` declares it; or
//! - a function of the type of its `run`. It is then a variant of the symbol's name for any CPU. `<symbol>_items` and
//!   `<symbol>_scratch_bytes`, where the library has them, are its `items` and `scratch_bytes`; without the first, a
//!   call is one item (`begin, end` = 0, 1: the function computes everything); without the second, it gets no scratch.

use libloading::Library;
use object::{Object, ObjectSymbol, SymbolKind};
use qwen3next_kernels::{Isa, Operator, Variant};
use std::ffi::{c_char, c_void, CStr};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where a foreign variant is: a shared library and a symbol in it. Prints and parses as `LIBRARY:SYMBOL`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugin {
    /// The shared library.
    pub library: PathBuf,
    /// Data or function in it.
    pub symbol: String,
}

impl FromStr for Plugin {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.rsplit_once(':') {
            Some((library, symbol)) if !library.is_empty() && !symbol.is_empty() => {
                Ok(Plugin { library: library.into(), symbol: symbol.into() })
            }
            _ => Err("expected LIBRARY:SYMBOL such as ./libmine.so:my_gated_delta".into()),
        }
    }
}

impl fmt::Display for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.library.display(), self.symbol)
    }
}

/// What a symbol is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A `q3n_<op>_variant`.
    Table,
    /// A function of the type of its `run`.
    Function,
}

type Size<R> = unsafe extern "C" fn(*const R) -> i64;
type Run<R> = unsafe extern "C" fn(*const R, i64, i64, *mut c_void) -> i32;

/// `q3n_<op>_variant`: the same layout for every operator.
#[repr(C)]
struct Table<R> {
    name: *const c_char,
    isa: u32,
    items: Option<Size<R>>,
    scratch_bytes: Option<Size<R>>,
    run: Option<Run<R>>,
}

unsafe extern "C" fn one_item<R>(_: *const R) -> i64 {
    1
}

unsafe extern "C" fn no_scratch<R>(_: *const R) -> i64 {
    0
}

impl Plugin {
    /// What the symbol is, read from the file without loading it. `Err`: one line that names what is missing.
    pub fn kind(&self) -> Result<Kind, String> {
        let fail = |why: String| Err(format!("--plugin {self}: {why}"));
        let bytes = match std::fs::read(&self.library) {
            Ok(bytes) => bytes,
            Err(e) => return fail(format!("{}: {e}", self.library.display())),
        };
        let file = match object::File::parse(&*bytes) {
            Ok(file) => file,
            Err(e) => return fail(format!("{} is not a shared library: {e}", self.library.display())),
        };
        // Mach-O writes C's names with an underscore before them.
        let prefix = if file.format() == object::BinaryFormat::MachO { "_" } else { "" };
        let exported = || {
            file.dynamic_symbols()
                .chain(file.symbols())
                .filter(|s| s.is_definition() && s.is_global())
                .filter_map(|s| Some((s.name().ok()?.strip_prefix(prefix)?.to_string(), s.kind(), s.size())))
        };
        let Some((_, kind, size)) = exported().find(|(name, ..)| *name == self.symbol) else {
            let mut names: Vec<String> = exported()
                .map(|(name, ..)| name)
                .filter(|name| !name.starts_with('_') && !name.contains('.') && !name.is_empty())
                .collect();
            names.sort();
            names.dedup();
            let more = if names.len() > 8 { ", ..." } else { "" };
            names.truncate(8);
            return fail(format!("no symbol `{}`; the library exports {}{more}", self.symbol, names.join(", ")));
        };
        match kind {
            SymbolKind::Text => Ok(Kind::Function),
            SymbolKind::Data if size == 0 || size == size_of::<Table<()>>() as u64 => Ok(Kind::Table),
            SymbolKind::Data => fail(format!(
                "`{}` is data of {size} bytes; a q3n_<op>_variant has {}",
                self.symbol,
                size_of::<Table<()>>()
            )),
            _ => fail(format!("`{}` is neither data nor a function", self.symbol)),
        }
    }

    /// Loads the library, for good, and makes a variant of the symbol. `Err`: one line that says what is wrong.
    ///
    /// # Safety
    /// Loading runs the library's initialisers, and a symbol has no type: it must be what the module's documentation
    /// says, for this operator and this version of the headers, and keep the contract of [`Variant::foreign`].
    pub unsafe fn load<O: Operator>(&self) -> Result<Variant<O>, String> {
        let kind = self.kind()?;
        let fail = |why: String| format!("--plugin {self}: {why}");
        // A bare file name would be searched for elsewhere.
        let path = self.library.canonicalize().map_err(|e| fail(e.to_string()))?;
        // SAFETY: the caller vouches for the initialisers.
        let library: &'static Library = match unsafe { Library::new(path) } {
            Ok(library) => Box::leak(Box::new(library)),
            Err(e) => return Err(fail(format!("cannot be loaded: {e}"))),
        };
        let missing = |e: libloading::Error| fail(e.to_string());
        let size = |suffix: &str| {
            // SAFETY: a function with this name is of this type, as the caller vouches.
            unsafe { library.get::<Size<O::Raw>>(format!("{}{suffix}", self.symbol).as_bytes()) }.ok().map(|f| *f)
        };
        let (name, isa, items, scratch_bytes, run) = match kind {
            Kind::Function => {
                // SAFETY: the symbol is a function, and the caller vouches for its type.
                let run = *unsafe { library.get::<Run<O::Raw>>(self.symbol.as_bytes()) }.map_err(missing)?;
                let (items, scratch) = (size("_items"), size("_scratch_bytes"));
                let name = self.symbol.clone();
                (name, Isa::SCALAR, items.unwrap_or(one_item), scratch.unwrap_or(no_scratch), run)
            }
            Kind::Table => {
                // SAFETY: the symbol is data of the table's size, and the caller vouches for its type.
                let table = unsafe { &**library.get::<*const Table<O::Raw>>(self.symbol.as_bytes()).map_err(missing)? };
                if table.name.is_null() {
                    return Err(fail("its name is NULL".into()));
                }
                // SAFETY: a C string, as the caller vouches.
                let name = unsafe { CStr::from_ptr(table.name) }.to_string_lossy().into_owned();
                let isa = Isa::all()
                    .nth(table.isa as usize)
                    .ok_or_else(|| fail(format!("its isa is {}, which is no q3n_isa", table.isa)))?;
                let (Some(items), Some(scratch_bytes), Some(run)) = (table.items, table.scratch_bytes, table.run)
                else {
                    return Err(fail("items, scratch_bytes or run is NULL".into()));
                };
                (name, isa, items, scratch_bytes, run)
            }
        };
        if Variant::<O>::by_name(&name).is_some() {
            return Err(fail(format!("`{name}` is the name of a built-in variant of {}", O::NAME)));
        }
        if !isa.available() {
            return Err(fail(format!("{name} needs {isa}, which this CPU or the ISA mask does not offer")));
        }
        // SAFETY: the caller vouches for the contract; the library is never unloaded.
        Ok(unsafe { Variant::foreign(name.leak(), isa, items, scratch_bytes, run) })
    }
}
