//! Every variant of the gated delta rule on every case.

use qwen3next_verify::cases::gated_delta::GatedDelta;
use qwen3next_verify::suite::{assert_cases_round_trip, assert_passes, Options};

#[test]
fn every_variant_passes_every_check() {
    assert_passes::<GatedDelta>(&Options::default());
}

#[test]
fn cases_round_trip() {
    assert_cases_round_trip::<GatedDelta>();
}
