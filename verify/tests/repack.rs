//! Repack: the suite over every variant, and what is refused.

use qwen3next_kernels::repack::{run, Args};
use qwen3next_kernels::{DType, Weight};
use qwen3next_verify::cases::repack::Repack;
use qwen3next_verify::suite::{assert_cases_round_trip, assert_passes, Options};

#[test]
fn every_variant_passes_every_check() {
    assert_passes::<Repack>(&Options::default());
}

#[test]
fn cases_round_trip() {
    assert_cases_round_trip::<Repack>();
}

#[test]
fn plain_types_odd_rows_and_other_lengths_are_refused_by_name() {
    let bytes = [0u8; 17 * 34];
    let mut y = [0u8; 17 * 34];
    let mut call = |dtype, rows, n, len: usize| {
        let x = Weight::new(&bytes, dtype, [rows, n]).unwrap();
        run(Args { y: &mut y[..len], x }, &Default::default()).map_err(|e| e.to_string())
    };
    assert!(call(DType::F32, 16, 4, 256).unwrap_err().contains("dtype"));
    assert!(call(DType::Q8_0, 17, 32, 17 * 34).unwrap_err().contains('R'));
    assert!(call(DType::Q8_0, 16, 32, 34).unwrap_err().contains('y'));
    assert!(call(DType::Q8_0, 16, 32, 16 * 34).is_ok());
}
