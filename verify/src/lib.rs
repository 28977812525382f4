//! What makes a kernel's result believed: float64 references, shared cases, properties, and the runner that tries every
//! variant on them. The `qwen3next` command and the tests of this crate run the same checks.
//!
//! [`reference`](mod@reference) judges, [`cases`] makes inputs and states the properties, [`compare`] measures, [`buffer`] lays out strided
//! arrays, [`guard`] puts them against inaccessible memory, [`suite`] runs it all and prints reproducers, [`current`] does
//! so where a kernel kills the process, [`timing`] measures variants side by side, on the calls of [`timed`] and under the
//! roofs that [`peaks`] finds, [`drift`] follows the delta rule's error over long sequences, [`mutants`] holds the bugs that
//! the suites must notice, [`plugin`] loads variants from shared libraries, [`report`] writes JSON and HTML, `record` writes cases
//! for machines without Rust, [`memory`] plans what fits where, with what [`working`] says of a ubatch, [`llama_bench`] reads what other engines' benchmarks print.

pub mod buffer;
pub mod cases;
pub mod compare;
pub mod current;
pub mod drift;
pub mod guard;
pub mod llama_bench;
pub mod memory;
pub mod mutants;
pub mod peaks;
pub mod plugin;
mod record;
pub mod reference;
pub mod report;
pub mod suite;
pub mod timed;
pub mod timing;
pub mod working;
