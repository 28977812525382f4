//! Every golden model passes every check of the whole forward pass.

use qwen3next_verify::cases::model;
use qwen3next_verify::suite::{Options, Verdict};

#[test]
fn every_golden_model_passes_every_check() {
    let rows = model::run(&Options::default()).unwrap();
    assert_eq!(rows.len(), 7 * model::checks().len());
    for row in rows {
        println!("{} {}: worst row {:.2e}", row.variant, row.check, row.metrics.row_l2);
        assert!(matches!(row.verdict, Verdict::Passed), "{} {}: {:?}", row.variant, row.check, row.verdict);
    }
}

#[test]
fn options_that_name_nothing_are_refused() {
    let refused = |options: Options| model::run(&options).unwrap_err();
    assert!(refused(Options { check: Some("gold".into()), ..Options::default() }).contains("it has golden, ubatches"));
    assert!(refused(Options { variant: Some("huge".into()), ..Options::default() }).contains("it has dense_mix"));
    assert!(refused(Options { case: Some("t=1".into()), ..Options::default() }).contains("has no cases"));
}
