//! Activations: the suite over every variant, and what is refused.

use qwen3next_kernels::activations::Q8;
use qwen3next_kernels::{DType, View};
use qwen3next_verify::cases::activations::Activations;
use qwen3next_verify::suite::{assert_cases_round_trip, assert_passes, Options};

#[test]
fn every_variant_passes_every_check() {
    assert_passes::<Activations>(&Options::default());
}

#[test]
fn cases_round_trip() {
    assert_cases_round_trip::<Activations>();
}

#[test]
fn another_type_and_cut_blocks_are_refused_by_name() {
    let x = [0.0f32; 96];
    let mut q = Q8::default();
    let refused = |r: Result<(), qwen3next_kernels::Error>| r.unwrap_err().to_string();
    let mut call = |dtype, shape| q.quantize(dtype, View::new(&x, shape).unwrap(), &Default::default());
    assert!(refused(call(DType::Q8_0, [1, 96])).contains("dtype: q8_0"));
    assert!(refused(call(DType::Q8_X256, [1, 96])).contains("multiple of the block of 256"));
    assert!(call(DType::Q8_X32, [3, 32]).is_ok());
    assert_eq!(q.shape(), [3, 32]);
}
