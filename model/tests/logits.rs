//! Calls of the forward pass that must be refused. What it computes is checked in `verify/src/cases/model.rs`.

use qwen3next_model::forward::Options;
use qwen3next_model::{Batch, Model, State, Weights};
use std::path::Path;

fn open(name: &str) -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../verify/golden/models").join(name);
    let loaded = Weights::load(&path, &mut |_| ()).unwrap_or_else(|e| panic!("{e}"));
    Model::new(loaded.config, loaded.weights)
}

#[test]
fn wrong_calls_are_named_and_leave_the_state_alone() {
    let model = open("plain");
    let vocab = model.config().vocab as u32;
    let options = Options::default();
    let mut state = State::new(model.config(), 2, 4).unwrap();
    let mut refused =
        |batch: Batch, options: &Options| model.forward(&mut state, &batch, options).unwrap_err().to_string();
    assert!(refused(Batch::one(0, &[1, vocab]), &options).contains("outside the vocabulary"));
    assert!(refused(Batch::one(2, &[1]), &options).contains("slot: is 2"));
    assert!(refused(Batch::one(0, &[1, 2, 3, 4, 5]), &options).contains("capacity of 4"));
    assert!(refused(Batch::one(0, &[]), &options).contains("empty"));
    assert!(refused(Batch::one(0, &[1]).and(0, &[2]), &options).contains("twice"));
    assert!(refused(Batch::one(0, &[1]), &Options { ubatch: 0, ..options }).contains("ubatch"));
    assert_eq!(state.len(0).unwrap(), 0);
    let mut other = State::new(open("dk_ne_dv").config(), 1, 4).unwrap();
    assert!(model.forward(&mut other, &Batch::one(0, &[1]), &options).is_err());
}
