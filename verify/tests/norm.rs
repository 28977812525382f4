//! Every variant of norm on every case, and the calls it must refuse.

use qwen3next_kernels::norm::{self, Kind};
use qwen3next_kernels::{Error, Exec, View, ViewMut};
use qwen3next_verify::cases::norm::Norm;
use qwen3next_verify::suite::{assert_cases_round_trip, assert_passes, Options};

#[test]
fn every_variant_passes_every_check() {
    assert_passes::<Norm>(&Options::default());
}

#[test]
fn cases_round_trip() {
    assert_cases_round_trip::<Norm>();
}

#[test]
fn wrong_arguments_are_refused_by_name() {
    let (x, w, mut y) = ([1.0f32; 24], [1.0f32; 4], [0.0f32; 24]);
    let mut call = |x_shape: [usize; 3], kind: Kind, eps: f32, row: usize| {
        let y = ViewMut::strided(&mut y, [2, 3, 4], [12, row, 1]).unwrap();
        let x = Some(View::new(&x, x_shape).unwrap());
        norm::run(norm::Args { y, x, kind, eps }, &Exec::default()).unwrap_err()
    };
    let z = View::new(&x[..12], [1, 3, 4]).unwrap();
    assert!(matches!(call([2, 4, 3], Kind::L2, 0.0, 4), Error::Shape { arg: "x", .. }));
    assert!(matches!(call([2, 3, 4], Kind::Rms(Some((&w[..3]).into())), 0.0, 4), Error::Shape { arg: "w", .. }));
    assert!(matches!(call([2, 3, 4], Kind::RmsGated { w: None, z }, 0.0, 4), Error::Shape { arg: "z", .. }));
    assert!(call([2, 3, 4], Kind::L2, -1.0, 4).to_string().contains("eps: value"));
    assert!(call([2, 3, 4], Kind::L2, f32::NAN, 4).to_string().contains("eps: value"));
    assert!(call([2, 3, 4], Kind::L2, 0.0, 3).to_string().contains("y: stride"));
}
