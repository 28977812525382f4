//! Runs checks: every variant of an operator on a grid of cases and on random ones, shrunk to a small one on failure.
//!
//! A [`Suite`] describes an operator's cases and checks; [`run`] tries them. A failure carries the command that repeats
//! it. A check that applied to no case at all is reported as a failure: a test that can't fail is none.

use crate::compare::{Failure, Histogram, Metrics};
use crate::current;
use crate::guard::{self, Place};
use crate::plugin::Plugin;
use crate::record;
use proptest::strategy::{BoxedStrategy, Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};
use qwen3next_kernels::operator::ScratchGuard;
use qwen3next_kernels::{Exec, Isa, Operator, Variant};
use rand::SeedableRng;
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::{Debug, Display};
use std::str::FromStr;
use std::sync::OnceLock;

/// The generator all inputs come from.
pub type Rng = rand_chacha::ChaCha8Rng;

/// Generator of the inputs of one case.
pub fn rng(seed: u64) -> Rng {
    Rng::seed_from_u64(seed)
}

/// `Ok(Some)`: checked. `Ok(None)`: the check says nothing about this case.
pub type Outcome = Result<Option<Metrics>, Failure>;

/// A named check of one variant on one case with inputs drawn from a seed.
pub struct Check<S: Suite + ?Sized> {
    /// Name on the command line.
    pub name: &'static str,
    /// Runs it.
    pub run: fn(&Variant<S::Op>, &S::Case, u64) -> Outcome,
}

/// Calls `each` with every way to run `variant` that must not change a bit: cut into 1 to 16 parts and into more parts
/// than there are items, and as many parts as the library chooses, on pools of 1, 2, 3, 8 and 16 threads.
pub fn everywhere<O: Operator>(
    variant: &Variant<O>,
    each: impl Fn(Exec<O>) -> Result<(), Failure> + Sync,
) -> Result<(), Failure> {
    static POOLS: OnceLock<Vec<ThreadPool>> = OnceLock::new();
    let pools = POOLS.get_or_init(|| {
        let pool = |n| ThreadPoolBuilder::new().num_threads(n).build().expect("a pool of a few threads");
        [1, 2, 3, 8, 16].map(pool).into()
    });
    // The pool's threads make arrays too: where this one would.
    let place = guard::place();
    // The second round of a check, at the other end of memory, is about stray accesses: some cuts on one pool show them.
    let rounds = if place == Place::End { pools.len() } else { 1 };
    for (i, pool) in pools.iter().enumerate().take(rounds) {
        pool.install(|| {
            guard::with(place, || {
                each(Exec::variant(*variant))?;
                // Every number of parts on one of the pools; all of them together see all numbers.
                (1..=16)
                    .chain([1 << 16])
                    .skip(i)
                    .step_by(pools.len())
                    .try_for_each(|n| each(Exec::variant(*variant).parts(n)))
            })
        })?;
    }
    Ok(())
}

/// The cases and checks of one operator.
pub trait Suite: 'static {
    /// Operator under test.
    type Op: Operator;
    /// What varies: shapes, layout, regime. Prints as `a=1,b=2` and parses back.
    type Case: Clone + Debug + Display + FromStr<Err = String> + 'static;

    /// Every corner that is always tried.
    fn grid() -> Vec<Self::Case>;

    /// Random cases; shrinks towards small ones.
    fn strategy() -> BoxedStrategy<Self::Case>;

    /// Reference check and properties.
    fn checks() -> Vec<Check<Self>>;

    /// Where a variant refuses a part of the case, and may: that part, and the case without it, which is run instead.
    fn refusal(_: &Variant<Self::Op>, _: &Self::Case) -> Option<(&'static str, Self::Case)> {
        None
    }
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Seed of the random cases and of the inputs.
    pub seed: u64,
    /// Random cases a check and variant.
    pub random: usize,
    /// Every how many-th case of the grid: 1 is all of it.
    pub stride: usize,
    /// Only this variant.
    pub variant: Option<String>,
    /// Only variants of this instruction set.
    pub isa: Option<Isa>,
    /// Also variants of the host executor, where neither variant nor instruction set is named.
    pub cuda_host: bool,
    /// The CUDA kernels on this device instead of the variants: arguments are copied there and back.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub device: Option<&'static qwen3next_kernels::device::Device>,
    /// Only this check.
    pub check: Option<String>,
    /// Only this case, in its printed form, instead of grid and random ones.
    pub case: Option<String>,
    /// Steps that may be spent on making a failing random case smaller.
    pub shrink: u32,
    /// Where the variant came from, for the reproducer. [`Entry::run_plugin`] sets it.
    pub plugin: Option<Plugin>,
    /// Called before every case with variant, instruction set and reproducer, so that someone knows if the kernel takes
    /// the process down.
    pub announce: Option<fn(&str, Isa, &str)>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            seed: 1,
            random: 24,
            stride: 1,
            variant: None,
            isa: None,
            cuda_host: true,
            #[cfg(any(feature = "cuda", feature = "cuda-host"))]
            device: None,
            check: None,
            case: None,
            shrink: 400,
            plugin: None,
            announce: None,
        }
    }
}

impl Options {
    /// A thinner grid and fewer random cases, for a first look.
    pub fn quick() -> Self {
        Options { random: 4, stride: 5, ..Options::default() }
    }
}

/// The result of one check on one variant.
#[derive(Debug, Clone)]
pub struct Row {
    /// Operator name.
    pub op: &'static str,
    /// Variant name.
    pub variant: &'static str,
    /// Instruction set of the variant.
    pub isa: Isa,
    /// Check name.
    pub check: &'static str,
    /// Cases it applied to and passed.
    pub passed: usize,
    /// Parts of cases that the variant refused, as it may, and how many cases ran without them.
    pub not_taken: BTreeMap<String, usize>,
    /// Worst metrics over the passed cases.
    pub metrics: Metrics,
    /// Metrics of every passed case that was measured (a bitwise check measures nothing).
    pub distribution: Distribution,
    /// What came of it.
    pub verdict: Verdict,
}

/// How the metrics of single cases are spread.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// Relative L2 error of the worst row of each case.
    pub row_l2: Histogram,
    /// Largest multiple of the bound in each case.
    pub bound_multiple: Histogram,
}

impl Distribution {
    /// Adds the counts of another one.
    pub fn merge(&mut self, other: &Distribution) {
        self.row_l2.merge(&other.row_l2);
        self.bound_multiple.merge(&other.bound_multiple);
    }
}

impl Row {
    /// A row of a check that has not run yet: nothing passed, nothing failed.
    pub fn new(op: &'static str, variant: &'static str, isa: Isa, check: &'static str) -> Row {
        Row {
            op,
            variant,
            isa,
            check,
            passed: 0,
            not_taken: BTreeMap::new(),
            metrics: Metrics::default(),
            distribution: Distribution::default(),
            verdict: Verdict::Passed,
        }
    }

    /// Counts a case that passed, without what the variant refused of it.
    fn pass_without(&mut self, metrics: Metrics, refused: Option<&str>) {
        self.pass(metrics);
        if let Some(what) = refused {
            *self.not_taken.entry(what.into()).or_default() += 1;
        }
    }

    /// Counts a case that passed.
    pub(crate) fn pass(&mut self, metrics: Metrics) {
        self.passed += 1;
        self.metrics = self.metrics.worst(metrics);
        if metrics.rows > metrics.tiny_rows {
            self.distribution.row_l2.add(metrics.row_l2);
        }
        if metrics.rows > 0 || metrics.bound_multiple > 0.0 {
            self.distribution.bound_multiple.add(metrics.bound_multiple);
        }
    }
}

/// What is told of rows of one variant beside their verdict: what it did not take, and of how many cases.
pub fn not_taken(rows: &[Row]) -> String {
    let mut parts = BTreeMap::<&str, usize>::new();
    for (what, cases) in rows.iter().flat_map(|row| &row.not_taken) {
        *parts.entry(what).or_default() += cases;
    }
    let parts: Vec<String> = parts.iter().map(|(what, n)| format!("{what} ({n} cases ran without)")).collect();
    match parts.is_empty() {
        true => String::new(),
        false => format!("; not taken: {}", parts.join(", ")),
    }
}

/// The verdict of a [`Row`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Verdict {
    /// Every case passed.
    Passed,
    /// Not run, and why.
    Skipped(String),
    /// A case failed: what happened, and the command that repeats it.
    Failed {
        /// One line.
        failure: String,
        /// A `qwen3next verify` command line.
        reproduce: String,
    },
}

/// Cases as a file: how many, and its bytes.
type Written = (usize, Vec<u8>);

/// A suite behind a plain value, so that suites of different operators can stand in one list.
#[derive(Clone, Copy)]
pub struct Entry {
    /// Operator name.
    pub op: &'static str,
    run: fn(&Options) -> Result<Vec<Row>, String>,
    checks: fn() -> Vec<&'static str>,
    run_plugin: unsafe fn(&Options, &Plugin) -> Result<Vec<Row>, String>,
    write_cases: fn(&Options) -> Result<Option<Written>, String>,
}

impl Entry {
    /// The entry of a suite.
    pub fn of<S: Suite>() -> Entry {
        Entry {
            op: S::Op::NAME,
            run: run::<S>,
            checks: || S::checks().into_iter().map(|c| c.name).collect(),
            run_plugin: run_plugin::<S>,
            write_cases: record::cases::<S>,
        }
    }

    /// Names of the checks.
    pub fn checks(&self) -> Vec<&'static str> {
        (self.checks)()
    }

    /// The entry of what is no operator and runs its checks itself.
    pub fn new(op: &'static str, run: fn(&Options) -> Result<Vec<Row>, String>) -> Entry {
        Entry {
            op,
            run,
            checks: Vec::new,
            run_plugin: |_, _| Err("takes no plug-in: it is no operator".into()),
            write_cases: |_| Ok(None),
        }
    }

    /// The cases of the grid with what their outputs must hold, as a file of neon/README.md's format, and how many.
    /// `None`: the outputs are neither f32 nor compared as bytes, or no operator's.
    pub fn write_cases(&self, options: &Options) -> Result<Option<(usize, Vec<u8>)>, String> {
        (self.write_cases)(options)
    }

    /// Runs the suite. `Err` is a bad option, named.
    pub fn run(&self, options: &Options) -> Result<Vec<Row>, String> {
        (self.run)(options)
    }

    /// Runs the suite on a variant from a shared library, in this process. `Err`: a bad option or library, named.
    ///
    /// # Safety
    /// As [`Plugin::load`]. A kernel that does not keep its contract may take the process down: `qwen3next verify` runs
    /// this in a child process.
    pub unsafe fn run_plugin(&self, options: &Options, plugin: &Plugin) -> Result<Vec<Row>, String> {
        // SAFETY: the same promise.
        unsafe { (self.run_plugin)(options, plugin) }
    }
}

/// # Safety
/// As [`Plugin::load`].
unsafe fn run_plugin<S: Suite>(options: &Options, plugin: &Plugin) -> Result<Vec<Row>, String> {
    // SAFETY: the same promise.
    let variant = unsafe { plugin.load::<S::Op>() }?;
    run_on::<S>(&Options { plugin: Some(plugin.clone()), ..options.clone() }, &[variant])
}

/// Runs every chosen check of `S` on every chosen variant. `Err` is a bad option, named.
pub fn run<S: Suite>(options: &Options) -> Result<Vec<Row>, String> {
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    if let Some(device) = options.device {
        let kernels = Variant::staged(device);
        if kernels.is_empty() {
            let mut row = Row::new(S::Op::NAME, "cuda", Isa::SCALAR, "all");
            row.verdict = Verdict::Skipped("the operator has no CUDA kernel".into());
            return Ok(vec![row]);
        }
        return run_on::<S>(options, &kernels);
    }
    run_on::<S>(options, &S::Op::variants())
}

/// As [`run`], on these variants: built in or from outside. This is how another crate's tests judge a kernel of theirs:
///
/// ```
/// use qwen3next_kernels::{ffi::q3n_solve_tri_args as Args, solve_tri, Isa, Variant};
/// use qwen3next_verify::cases::solve_tri::SolveTri;
/// use qwen3next_verify::suite::{assert_passed, run_on, Options};
/// use std::ffi::c_void;
///
/// /// A batch entry is an item.
/// unsafe extern "C" fn items(a: *const Args) -> i64 {
///     (*a).batch
/// }
/// unsafe extern "C" fn no_scratch(_: *const Args) -> i64 {
///     0
/// }
/// /// x_i = (b_i − Σ_{j<i} L_ij x_j) / L_ii, sums in f64.
/// unsafe extern "C" fn solve(a: *const Args, begin: i64, end: i64, _: *mut c_void) -> i32 {
///     let a = &*a;
///     for e in begin..end {
///         for i in 0..a.n {
///             let l = a.l.offset((e * a.l_batch + i * a.l_row) as isize);
///             for c in 0..a.m {
///                 let x = |j: i64| a.x.offset((e * a.x_batch + j * a.x_row + c) as isize);
///                 let mut sum = match a.b.is_null() {
///                     true => f64::from(u8::from(c == i)),
///                     false => f64::from(*a.b.offset((e * a.b_batch + i * a.b_row + c) as isize)),
///                 };
///                 for j in 0..i {
///                     sum -= f64::from(*l.offset(j as isize)) * f64::from(*x(j));
///                 }
///                 if a.unit_diagonal == 0 {
///                     sum /= f64::from(*l.offset(i as isize));
///                 }
///                 *x(i) = sum as f32;
///             }
///         }
///     }
///     0
/// }
///
/// // SAFETY: `solve` reads and writes what csrc/solve_tri/solve_tri.h allows, for the items of its range alone.
/// let mine = unsafe { Variant::<solve_tri::Op>::foreign("mine", Isa::SCALAR, items, no_scratch, solve) };
/// let rows = run_on::<SolveTri>(&Options::quick(), &[mine]).unwrap();
/// assert_passed(&rows);
/// ```
///
/// [`Options`] with a failure's `check`, `case` and `seed` repeat it alone; the failure prints them.
pub fn run_on<S: Suite>(options: &Options, variants: &[Variant<S::Op>]) -> Result<Vec<Row>, String> {
    let op = S::Op::NAME;
    let checks = S::checks();
    let known = |list: Vec<&str>, wanted: &Option<String>, what: &str| match wanted {
        Some(w) if !list.contains(&w.as_str()) => {
            Err(format!("--{what} {w}: {op} has no such {what}, it has {}", list.join(", ")))
        }
        _ => Ok(()),
    };
    known(variants.iter().map(|v| v.name()).collect(), &options.variant, "variant")?;
    known(checks.iter().map(|c| c.name).collect(), &options.check, "check")?;
    let grid: Vec<S::Case> = match &options.case {
        Some(text) => vec![text.parse().map_err(|e| format!("--case {text}: {e}"))?],
        None => S::grid(),
    };
    let stride = if options.case.is_some() { 1 } else { options.stride.max(1) };

    let mut rows = Vec::new();
    for variant in variants {
        if options.variant.as_deref().is_some_and(|v| v != variant.name())
            || options.isa.is_some_and(|isa| isa != variant.isa())
            || (variant.isa() == Isa::CUDA_HOST
                && !options.cuda_host
                && options.variant.is_none()
                && options.isa.is_none())
        {
            continue;
        }
        for check in &checks {
            if options.check.as_deref().is_none_or(|c| c == check.name) {
                rows.push(run_check::<S>(options, variant, check, &grid, stride));
            }
        }
        if !guard::AVAILABLE {
            let mut row = Row::new(S::Op::NAME, variant.name(), variant.isa(), "guard_pages");
            let why = "this system is not asked for inaccessible pages: arrays lie on the heap".into();
            row.verdict = Verdict::Skipped(why);
            rows.push(row);
        }
    }
    Ok(rows)
}

fn run_check<S: Suite>(
    options: &Options,
    variant: &Variant<S::Op>,
    check: &Check<S>,
    grid: &[S::Case],
    stride: usize,
) -> Row {
    let mut row = Row::new(S::Op::NAME, variant.name(), variant.isa(), check.name);
    if !variant.isa().available() {
        row.verdict = Verdict::Skipped(format!("{} is not offered by this CPU or the ISA mask", variant.isa()));
        return row;
    }
    let failed = |case: &S::Case, seed: u64, failure: Failure| Verdict::Failed {
        failure: failure.0,
        reproduce: reproduce::<S>(options, variant, check.name, Some((case, seed))),
    };
    let (running, _scratch) = (current::enter(), ScratchGuard::install());
    let next = |case: &S::Case, seed: u64| {
        let command = reproduce::<S>(options, variant, check.name, Some((case, seed)));
        running.is(&command);
        if let Some(announce) = options.announce {
            announce(variant.name(), variant.isa(), &command);
        }
    };
    let attempt = |case: &S::Case, seed: u64, place: Place| {
        next(case, seed);
        guard::with(place, || (check.run)(variant, case, seed))
    };
    let taken = |case: &S::Case, seed: u64| {
        next(case, seed);
        match S::refusal(variant, case) {
            Some((what, without)) => (without, Some(what)),
            None => (case.clone(), None),
        }
    };
    // Cases of the grid run with the ends of their arrays, then with their starts at inaccessible memory.
    let both = |case: &S::Case, seed: u64| -> Outcome {
        let mut worst = attempt(case, seed, Place::End)?;
        if guard::AVAILABLE {
            let at_start = attempt(case, seed, Place::Start)?;
            worst = worst.map(|m| m.worst(at_start.unwrap_or_default()));
        }
        Ok(worst)
    };
    // Random ones with either.
    let either = |case: &S::Case, seed: u64| attempt(case, seed, if seed % 2 == 0 { Place::End } else { Place::Start });
    // Every stride-th case; then the others, until the check has applied to one at all.
    let (first, rest): (Vec<_>, Vec<_>) = grid.iter().enumerate().partition(|(i, _)| i % stride == 0);
    for (i, case) in first.into_iter().chain(rest) {
        if i % stride != 0 && row.passed > 0 {
            break;
        }
        let (case, refused) = taken(case, options.seed);
        if let (Some(what), Some(_)) = (refused, &options.case) {
            row.verdict = Verdict::Skipped(format!("{what} is not taken"));
            return row;
        }
        match both(&case, options.seed) {
            Ok(Some(metrics)) => row.pass_without(metrics, refused),
            Ok(None) => {}
            Err(failure) => {
                row.verdict = failed(&case, options.seed, failure);
                return row;
            }
        }
    }

    if options.case.is_none() && options.random > 0 {
        // One stream of random cases an operator, check and variant, the same in every run.
        let name = format!("{}/{}/{}", S::Op::NAME, check.name, variant.name());
        let mut seed = [0u8; 32];
        name.bytes().enumerate().for_each(|(i, b)| seed[8 + i % 24] = seed[8 + i % 24].wrapping_mul(31) ^ b);
        seed[..8].copy_from_slice(&options.seed.to_le_bytes());
        let config = Config {
            cases: options.random as u32,
            failure_persistence: None,
            max_shrink_iters: options.shrink,
            ..Config::default()
        };
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &seed));
        let shared = RefCell::new(row);
        let result = runner.run(&(S::strategy(), 0u64..1 << 32), |(case, seed)| {
            let (case, refused) = taken(&case, seed);
            match either(&case, seed) {
                Ok(Some(metrics)) => {
                    shared.borrow_mut().pass_without(metrics, refused);
                    Ok(())
                }
                Ok(None) => Ok(()),
                Err(failure) => Err(proptest::test_runner::TestCaseError::fail(failure.0)),
            }
        });
        row = shared.into_inner();
        match result {
            Ok(()) => {}
            Err(TestError::Fail(reason, (case, seed))) => {
                row.verdict = failed(&taken(&case, seed).0, seed, Failure::new(reason.message()));
                return row;
            }
            Err(TestError::Abort(reason)) => {
                row.verdict = Verdict::Skipped(format!("no random cases: {}", reason.message()));
                return row;
            }
        }
    }
    if row.passed == 0 && options.case.is_none() {
        row.verdict = Verdict::Failed {
            failure: "the check applied to no case".into(),
            reproduce: reproduce::<S>(options, variant, check.name, None),
        };
    }
    row
}

/// What repeats a case (or a whole check): a command, or for a variant that the command cannot reach, the options.
fn reproduce<S: Suite>(
    options: &Options,
    variant: &Variant<S::Op>,
    check: &str,
    case: Option<(&S::Case, u64)>,
) -> String {
    let which = match &options.plugin {
        Some(plugin) => format!("--plugin {plugin}"),
        None if Variant::<S::Op>::by_name(variant.name()).is_some() => format!("--variant {}", variant.name()),
        None => {
            let case = case.map_or(String::new(), |(c, seed)| format!("case: Some(\"{c}\".into()), seed: {seed}, "));
            return format!("Options {{ check: Some(\"{check}\".into()), {case}..Options::default() }}");
        }
    };
    let case = case.map_or(String::new(), |(case, seed)| format!(" --case {case} --seed {seed}"));
    format!("qwen3next verify --op {} {which} --check {check}{case}", S::Op::NAME)
}

/// For tests: runs the whole suite, prints skipped variants, panics with every failure.
pub fn assert_passes<S: Suite>(options: &Options) {
    assert_passed(&run::<S>(options).expect("options name existing things"));
}

/// For tests: prints skipped checks, panics with every failure, or if there is nothing that passed.
pub fn assert_passed(rows: &[Row]) {
    let mut failures = Vec::new();
    for row in rows {
        match &row.verdict {
            Verdict::Passed => {}
            Verdict::Skipped(why) => println!("SKIPPED {} {} {}: {why}", row.op, row.variant, row.check),
            Verdict::Failed { failure, reproduce } => {
                failures.push(format!("{} {} {}: {failure}\n  {reproduce}", row.op, row.variant, row.check))
            }
        }
    }
    assert!(rows.iter().any(|r| matches!(r.verdict, Verdict::Passed)), "nothing ran");
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

/// For tests: every case of the grid and some random ones print and parse back to themselves.
pub fn assert_cases_round_trip<S: Suite>() {
    let mut runner = TestRunner::deterministic();
    let random = (0..50).map(|_| S::strategy().new_tree(&mut runner).expect("strategies do not reject").current());
    for case in S::grid().into_iter().chain(random) {
        let text = case.to_string();
        let back: S::Case = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(back.to_string(), text);
    }
}

/// Declares a case: a struct whose fields print as `a=1,b=2` and parse back.
#[macro_export]
macro_rules! case {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$fmeta:meta])* pub $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone)]
        pub struct $name { $($(#[$fmeta])* pub $field: $type,)* }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                let parts = [$(format!(concat!(stringify!($field), "={}"), self.$field)),*];
                f.write_str(&parts.join(","))
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                let names = [$(stringify!($field)),*];
                let pairs: Vec<(&str, &str)> = text.split(',').map(|p| p.split_once('=').unwrap_or((p, ""))).collect();
                if let Some((k, _)) = pairs.iter().find(|(k, _)| !names.contains(k)) {
                    return Err(format!("unknown field {k:?}, expected {}", names.join(", ")));
                }
                Ok($name {
                    $($field: {
                        let name = stringify!($field);
                        let value = pairs.iter().find(|(k, _)| *k == name).ok_or_else(|| format!("{name} is missing"))?.1;
                        value.parse().map_err(|e| format!("{name}={value}: {e}"))?
                    },)*
                })
            }
        }
    };
}

/// Declares an enum of named choices that prints and parses by name; `ALL` lists them.
#[macro_export]
macro_rules! choice {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$vmeta:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$vmeta])* $variant,)* }

        impl $name {
            /// Every choice.
            pub const ALL: &'static [$name] = &[$($name::$variant),*];
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str(match self { $($name::$variant => $text),* })
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($text => Ok($name::$variant),)*
                    _ => Err(format!("expected one of {}", [$($text),*].join(", "))),
                }
            }
        }
    };
}
