//! What all operators share: variants, and how a call is cut over threads.

use crate::isa::Isa;
use crate::memory::Addresses;
use crate::status::{check, Error};
use rayon::prelude::*;
use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// An operator of the C library. Implemented by the marker type `Op` of every operator module.
pub trait Operator: Sized + 'static {
    /// Name of the operator, as its folder in `csrc/`.
    const NAME: &'static str;
    /// The C args struct.
    type Raw: Copy + PartialEq + 'static;

    /// CUDA kernels, the one that `queue` takes first; none where they are not built in.
    #[doc(hidden)]
    const KERNELS: &'static [Kernel<Self::Raw>];

    /// Every variant built into the library, in the order of the `.inc` list, available on this CPU or not.
    fn variants() -> Vec<Variant<Self>>;

    /// The variant that dispatch picks for these (checked) args.
    #[doc(hidden)]
    fn best(raw: &Self::Raw) -> Variant<Self>;

    /// Validates args.
    #[doc(hidden)]
    fn check(raw: &Self::Raw) -> i32;
}

/// A CUDA kernel, as `Q3N_DECLARE_CUDA` declares it: its launcher for GPUs, the variant that the host executor runs, and
/// their bytes of scratch. `None` where it is not built in.
#[doc(hidden)]
#[allow(missing_docs)]
pub struct Kernel<Raw: 'static> {
    pub name: &'static str,
    pub gpu: Option<Launcher<Raw>>,
    pub executor: Option<Executed<Raw>>,
}

/// Launcher and bytes of scratch.
#[doc(hidden)]
pub type Launcher<Raw> = (
    unsafe extern "C" fn(*const Raw, *mut std::ffi::c_void, crate::ffi::q3n_stream) -> i32,
    unsafe extern "C" fn(*const Raw) -> i64,
);

/// Items, run and bytes of scratch.
#[doc(hidden)]
pub type Executed<Raw> = (
    unsafe extern "C" fn(*const Raw) -> i64,
    unsafe extern "C" fn(*const Raw, i64, i64, *mut std::ffi::c_void) -> i32,
    unsafe extern "C" fn(*const Raw) -> i64,
);

/// One implementation of an operator. The functions take args that passed the operator's check.
pub struct Variant<O: Operator> {
    name: &'static str,
    isa: Isa,
    items: unsafe extern "C" fn(*const O::Raw) -> i64,
    scratch_bytes: unsafe extern "C" fn(*const O::Raw) -> i64,
    run: unsafe extern "C" fn(*const O::Raw, i64, i64, *mut std::ffi::c_void) -> i32,
    /// Where its kernel runs instead.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    staged: Option<Staged<O>>,
}

/// A kernel, the device it runs on, and where its times go if it is timed.
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
struct Staged<O: Operator> {
    device: &'static crate::device::Device,
    kernel: &'static Kernel<O::Raw>,
    times: Option<&'static crate::device::Times>,
}

#[cfg(any(feature = "cuda", feature = "cuda-host"))]
impl<O: Operator> Clone for Staged<O> {
    fn clone(&self) -> Self {
        *self
    }
}
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
impl<O: Operator> Copy for Staged<O> {}

impl<O: Operator> Clone for Variant<O> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<O: Operator> Copy for Variant<O> {}

impl<O: Operator> Variant<O> {
    /// A variant from outside the library: a kernel under test.
    ///
    /// # Safety
    /// For every args struct that passes the operator's check, the functions must keep the contract of the operator's
    /// header: write only the outputs of the items begin..end, read only the inputs, use no more scratch than they say,
    /// and allow calls over disjoint ranges at the same time.
    pub unsafe fn foreign(
        name: &'static str,
        isa: Isa,
        items: unsafe extern "C" fn(*const O::Raw) -> i64,
        scratch_bytes: unsafe extern "C" fn(*const O::Raw) -> i64,
        run: unsafe extern "C" fn(*const O::Raw, i64, i64, *mut std::ffi::c_void) -> i32,
    ) -> Self {
        Variant {
            name,
            isa,
            items,
            scratch_bytes,
            run,
            #[cfg(any(feature = "cuda", feature = "cuda-host"))]
            staged: None,
        }
    }

    /// The operator's CUDA kernels on that device, for the suites: every call copies its arguments there and back.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub fn staged(device: &'static crate::device::Device) -> Vec<Self> {
        unsafe extern "C" fn one<Raw>(_: *const Raw) -> i64 {
            1
        }
        unsafe extern "C" fn none<Raw>(_: *const Raw) -> i64 {
            0
        }
        unsafe extern "C" fn nothing<Raw>(_: *const Raw, _: i64, _: i64, _: *mut std::ffi::c_void) -> i32 {
            crate::ffi::Q3N_DEVICE as i32
        }
        let of = |kernel: &'static Kernel<O::Raw>| Variant {
            name: kernel.name,
            isa: Isa::SCALAR,
            items: one::<O::Raw>,
            scratch_bytes: none::<O::Raw>,
            run: nothing::<O::Raw>,
            staged: Some(Staged { device, kernel, times: None }),
        };
        O::KERNELS.iter().map(of).collect()
    }

    /// As [`Variant::staged`], for benches: a call copies its arguments once, launches the kernel many times over, and what
    /// each launch took is in `times` when it returns. What it leaves in arguments that it updates is not one call's.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    #[doc(hidden)]
    pub fn staged_timed(device: &'static crate::device::Device, times: &'static crate::device::Times) -> Vec<Self> {
        let mut variants = Self::staged(device);
        variants.iter_mut().filter_map(|v| v.staged.as_mut()).for_each(|staged| staged.times = Some(times));
        variants
    }

    /// Name of the variant within its operator, e.g. `recurrent_scalar`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Instruction set it needs.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The built-in variant of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        O::variants().into_iter().find(|v| v.name == name)
    }
}

/// How a call runs: which variant, and over how many parts.
pub struct Exec<O: Operator> {
    variant: Option<Variant<O>>,
    parts: Option<usize>,
}

impl<O: Operator> Default for Exec<O> {
    /// Dispatch picks the variant; as many parts as rayon has threads, fewer for little work.
    fn default() -> Self {
        Exec { variant: None, parts: None }
    }
}

impl<O: Operator> Clone for Exec<O> {
    fn clone(&self) -> Self {
        Exec { variant: self.variant, parts: self.parts }
    }
}

impl<O: Operator> Exec<O> {
    /// Run this variant.
    pub fn variant(variant: Variant<O>) -> Self {
        Exec { variant: Some(variant), parts: None }
    }

    /// Cut the work items into exactly this many ranges (some empty where there are fewer items). 1 stays on the
    /// calling thread.
    pub fn parts(mut self, parts: usize) -> Self {
        self.parts = Some(parts.max(1));
        self
    }

    /// Whether the caller wants the call to stay on its thread.
    pub(crate) fn stays(&self) -> bool {
        self.parts == Some(1)
    }

    /// Checks `raw`, cuts its items into ranges and runs them. `cost` is the rough number of arithmetic operations of
    /// the whole call: it only decides how many parts are worth a fork.
    ///
    /// # Safety
    /// Every pointer in `raw` must be valid for what the operator's header says of it, for this call; `at` noted those of
    /// operators with CUDA kernels.
    pub(crate) unsafe fn execute(&self, raw: &O::Raw, at: &Addresses, cost: usize) -> Result<(), Error> {
        check(O::NAME, O::check(raw))?;
        let variant = self.variant.unwrap_or_else(|| O::best(raw));
        if !variant.isa.available() {
            let why = format!("{} needs {}, which this CPU or the ISA mask does not offer", variant.name, variant.isa);
            return Err(Error::argument("variant", why));
        }
        #[cfg(any(feature = "cuda", feature = "cuda-host"))]
        if let Some(Staged { device, kernel, times }) = variant.staged {
            // SAFETY: `raw` passed the operator's check just above, and `at` noted its pointers.
            return unsafe { crate::device::run_staged::<O>(&device.stream()?, kernel, raw, at, times) };
        }
        #[cfg(not(any(feature = "cuda", feature = "cuda-host")))]
        let _ = at;
        // SAFETY: `raw` passed the operator's check just above.
        let (items, bytes) = unsafe { ((variant.items)(raw), (variant.scratch_bytes)(raw)) };
        let (items, bytes) = (items.max(0) as usize, bytes.max(0) as usize);
        if items == 0 {
            return Ok(());
        }
        let parts = self.parts.unwrap_or_else(|| rayon::current_num_threads().min(cost / FORK_COST).max(1).min(items));

        let shared = Shared(raw as *const O::Raw);
        let run = |part: usize| {
            let (begin, end) = (items * part / parts, items * (part + 1) / parts);
            if begin == end {
                return Ok(());
            }
            let raw = shared.get();
            // SAFETY: checked args, a range within the items, scratch of the size and alignment the variant asked for.
            let call = |scratch| unsafe { (variant.run)(raw, begin as i64, end as i64, scratch) };
            let status = match GUARDS.load(Ordering::Relaxed) {
                0 => with_scratch(bytes, call),
                _ => with_guarded_scratch(bytes, call)?,
            };
            check(O::NAME, status)
        };
        match parts {
            1 => run(0),
            // The first failing part decides, whatever the order they ran in.
            _ => (0..parts).into_par_iter().map(run).reduce(|| Ok(()), Result::and),
        }
    }
}

/// Operations below which a part is not worth a fork and a join.
const FORK_COST: usize = 40_000;

/// Args shared by the threads of one call.
struct Shared<T>(*const T);
impl<T> Shared<T> {
    fn get(&self) -> *const T {
        self.0
    }
}
// SAFETY: kernels read the args and inputs, and write only the outputs of their own items (csrc/base/operator.h).
unsafe impl<T> Sync for Shared<T> {}

/// One cache line, the alignment of scratch.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u8; 64]);

thread_local! {
    // Grows to the largest scratch a thread was asked for, so a warm call does not allocate. A stack, because a thread
    // that waits in rayon may start another part.
    static SCRATCH: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

fn with_scratch<R>(bytes: usize, f: impl FnOnce(*mut std::ffi::c_void) -> R) -> R {
    let mut lines = SCRATCH.with(|s| s.borrow_mut().pop()).unwrap_or_default();
    let need = bytes.div_ceil(64);
    if lines.len() < need {
        lines.resize(need, Line([0; 64]));
    }
    let result = f(lines.as_mut_ptr().cast());
    SCRATCH.with(|s| s.borrow_mut().push(lines));
    result
}

static GUARDS: AtomicUsize = AtomicUsize::new(0);

/// While one of these lives, every call in the process gets fresh scratch of exactly the size its variant asked for,
/// filled with NaN, and fails where the bytes around it have changed. For tests.
#[derive(Debug)]
pub struct ScratchGuard(());

impl ScratchGuard {
    /// Guards scratch from now on.
    pub fn install() -> Self {
        GUARDS.fetch_add(1, Ordering::Relaxed);
        ScratchGuard(())
    }
}

impl Drop for ScratchGuard {
    fn drop(&mut self) {
        GUARDS.fetch_sub(1, Ordering::Relaxed);
    }
}

fn with_guarded_scratch<R>(bytes: usize, f: impl FnOnce(*mut std::ffi::c_void) -> R) -> Result<R, Error> {
    // A row of channels that a kernel forgot to ask for fits in: it shows as an error, not as a broken heap.
    const ZONE: usize = 4096;
    // NaN as a float and as a double.
    const POISON: u8 = 0xff;
    const GUARD: u8 = 0xa5;
    let mut memory = vec![POISON; 64 + ZONE + bytes + ZONE];
    let zones = memory.as_ptr().align_offset(64);
    let scratch = zones + ZONE;
    memory[zones..scratch].fill(GUARD);
    memory[scratch + bytes..].fill(GUARD);
    let result = f(memory[scratch..].as_mut_ptr().cast());
    for (side, zone) in [("before", &memory[zones..scratch]), ("past", &memory[scratch + bytes..])] {
        if zone.iter().any(|&byte| byte != GUARD) {
            return Err(Error::argument("scratch", format!("the kernel wrote {side} the {bytes} bytes it asked for")));
        }
    }
    Ok(result)
}

/// Implements [`Operator`] for `Op` over the functions that Q3N_DECLARE_OPERATOR declares for an operator.
macro_rules! operator {
    ($name:literal, $args:ident, $check:ident, $count:ident, $at:ident, $best:ident
     $(, [$kernel:literal, $gpu:ident, $gpu_scratch:ident, $items:ident, $host:ident, $host_scratch:ident])* $(,)?) => {
        #[doc = concat!("Marker of the operator `", $name, "`.")]
        pub struct Op;

        impl crate::operator::Operator for Op {
            const NAME: &'static str = $name;
            type Raw = crate::ffi::$args;

            const KERNELS: &'static [crate::operator::Kernel<Self::Raw>] = &[$(crate::operator::Kernel {
                name: $kernel,
                #[cfg(feature = "cuda")]
                gpu: Some((crate::ffi::$gpu, crate::ffi::$gpu_scratch)),
                #[cfg(not(feature = "cuda"))]
                gpu: None,
                #[cfg(feature = "cuda-host")]
                executor: Some((crate::ffi::$items, crate::ffi::$host, crate::ffi::$host_scratch)),
                #[cfg(not(feature = "cuda-host"))]
                executor: None,
            }),*];

            fn variants() -> Vec<crate::operator::Variant<Self>> {
                // SAFETY: _variant_at is asked only for indices below the count.
                unsafe { (0..crate::ffi::$count()).map(|i| crate::operator::from_table!(crate::ffi::$at(i))).collect() }
            }

            fn best(raw: &Self::Raw) -> crate::operator::Variant<Self> {
                // SAFETY: _best takes checked args and returns an entry of the static table.
                unsafe { crate::operator::from_table!(crate::ffi::$best(raw)) }
            }

            fn check(raw: &Self::Raw) -> i32 {
                // SAFETY: `raw` is a valid args struct; _check reads it and the index arrays it points to.
                unsafe { crate::ffi::$check(raw) }
            }
        }
    };
}
pub(crate) use operator;

/// A [`Variant`] from a pointer to a C table entry, which is complete and never freed.
macro_rules! from_table {
    ($entry:expr) => {{
        let entry = &*$entry;
        crate::operator::Variant::foreign(
            std::ffi::CStr::from_ptr(entry.name).to_str().unwrap_or(""),
            crate::isa::Isa(entry.isa),
            entry.items.expect("table entries are complete"),
            entry.scratch_bytes.expect("table entries are complete"),
            entry.run.expect("table entries are complete"),
        )
    }};
}
pub(crate) use from_table;

/// How many sequences a call has: the rows, or what `cu_seqlens` says of the one packed row.
pub(crate) fn sequences(rows: usize, cu_seqlens: Option<&[i64]>) -> Result<usize, Error> {
    match cu_seqlens {
        None => Ok(rows),
        Some([]) => Err(Error::argument("cu_seqlens", "is empty, expected B + 1 elements")),
        Some(_) if rows != 1 => Err(Error::argument("cu_seqlens", format!("packs one row, but B is {rows}"))),
        Some(cu) => Ok(cu.len() - 1),
    }
}
