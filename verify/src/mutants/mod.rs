//! Known bugs, put back into copies of the kernels and into loaded models: every suite must notice the ones of its
//! operator. README.md in this folder says how one is made.

pub mod catalogue;
mod model;

use crate::cases;
use crate::suite::{run_on, Options, Row, Suite};
use catalogue::{Form, CATALOGUE};
use qwen3next_kernels::{Isa, Operator, Variant};

/// A patched or (in the control group) unpatched copy that build.rs compiled.
struct Copy {
    id: &'static str,
    op: &'static str,
    variant: &'static str,
    checks: fn() -> Vec<&'static str>,
    run: fn(&Options) -> Result<Vec<Row>, String>,
}

fn copies() -> Vec<Copy> {
    Vec::from(include!(concat!(env!("OUT_DIR"), "/mutants.rs")))
}

/// Runs the checks that a subject is tried on. `Err` is a bad option, named.
type Run = dyn Fn(&Options) -> Result<Vec<Row>, String>;

/// Something to run the checks of its operator on: a mutant, or of the control group.
pub struct Subject {
    /// Id of the mutant; `control_<operator>_<variant>` in the control group.
    pub id: &'static str,
    /// What was broken; `None` in the control group.
    pub bug: Option<&'static str>,
    /// Operator, or `model`.
    pub op: &'static str,
    /// Variant in whose place it runs.
    pub variant: &'static str,
    /// The checks, in the order they run.
    pub checks: Vec<&'static str>,
    run: Box<Run>,
}

impl Subject {
    /// Runs the chosen checks. A mutant may do anything, down to ending the process: give it one of its own.
    pub fn run(&self, options: &Options) -> Result<Vec<Row>, String> {
        (self.run)(options)
    }
}

/// Every mutant that is built, in the order of the catalogue, then the control group.
pub fn subjects() -> Vec<Subject> {
    let mut mutants: Vec<Subject> = Vec::new();
    let mut copies = copies();
    for mutant in CATALOGUE {
        match mutant.form {
            Form::Pending(_) => {}
            Form::Model => {
                let change = model::change(mutant.id);
                mutants.push(Subject {
                    id: mutant.id,
                    bug: Some(mutant.bug),
                    op: cases::model::NAME,
                    variant: "all",
                    checks: cases::model::checks(),
                    run: Box::new(move |options| cases::model::run_with(options, &change)),
                });
            }
            Form::Kernel { .. } => {
                let at = copies.iter().position(|copy| copy.id == mutant.id).expect("build.rs reads this catalogue");
                mutants.push(subject(copies.remove(at), Some(mutant.bug)));
            }
        }
    }
    let control = copies.into_iter().map(|copy| subject(copy, None));
    let untouched = Subject {
        id: "control_model",
        bug: None,
        op: cases::model::NAME,
        variant: "all",
        checks: cases::model::checks(),
        run: Box::new(cases::model::run),
    };
    mutants.into_iter().chain(control).chain([untouched]).collect()
}

fn subject(copy: Copy, bug: Option<&'static str>) -> Subject {
    Subject { id: copy.id, bug, op: copy.op, variant: copy.variant, checks: (copy.checks)(), run: Box::new(copy.run) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_is_whole() {
        let number = |id: &str| id.trim_end_matches(|c: char| c.is_ascii_alphabetic()).parse::<u32>();
        let numbers: Vec<u32> = CATALOGUE.iter().map(|m| number(m.id).expect("a number and a letter")).collect();
        assert!(numbers.is_sorted());
        assert_eq!(numbers.iter().collect::<std::collections::BTreeSet<_>>().len(), 40);
        assert_eq!((numbers[0], numbers[numbers.len() - 1]), (1, 40));
        let ids: std::collections::BTreeSet<&str> = subjects().iter().map(|s| s.id).collect();
        assert_eq!(ids.len(), subjects().len());
        for mutant in CATALOGUE {
            assert_eq!(ids.contains(mutant.id), !matches!(mutant.form, Form::Pending(_)), "{}", mutant.id);
        }
    }
}
