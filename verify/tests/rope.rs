//! Every variant of rope on every case, and the calls it must refuse.

use qwen3next_kernels::{rope, Error, Exec, View, ViewMut};
use qwen3next_verify::cases::rope::Rope;
use qwen3next_verify::suite::{assert_cases_round_trip, assert_passes, Options};

#[test]
fn every_variant_passes_every_check() {
    assert_passes::<Rope>(&Options::default());
}

#[test]
fn cases_round_trip() {
    assert_cases_round_trip::<Rope>();
}

#[test]
fn wrong_arguments_are_refused_by_name() {
    let (x, mut y) = ([1.0f32; 24], [0.0f32; 24]);
    let mut call = |x_shape: [usize; 3], pos: &[i64], base: f64, rotary: usize, row: usize| {
        let y = ViewMut::strided(&mut y, [2, 3, 4], [12, row, 1]).unwrap();
        let x = Some(View::new(&x, x_shape).unwrap());
        rope::run(rope::Args { y, x, pos, base, rotary }, &Exec::default()).unwrap_err()
    };
    assert!(matches!(call([3, 2, 4], &[0, 1], 1e4, 4, 4), Error::Shape { arg: "x", .. }));
    assert!(matches!(call([2, 3, 4], &[0], 1e4, 4, 4), Error::Shape { arg: "pos", .. }));
    assert!(call([2, 3, 4], &[0, -1], 1e4, 4, 4).to_string().contains("pos: value"));
    assert!(call([2, 3, 4], &[0, 1], 0.0, 4, 4).to_string().contains("base: value"));
    assert!(call([2, 3, 4], &[0, 1], f64::NAN, 4, 4).to_string().contains("base: value"));
    assert!(call([2, 3, 4], &[0, 1], 1e4, 3, 4).to_string().contains("R: size"));
    assert!(call([2, 3, 4], &[0, 1], 1e4, 6, 4).to_string().contains("R: size"));
    assert!(call([2, 3, 4], &[0, 1], 1e4, usize::MAX, 4).to_string().contains("R: size"));
    assert!(call([2, 3, 4], &[0, 1], 1e4, 2, 3).to_string().contains("y: stride"));
}
