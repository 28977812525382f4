//! Every variant of solve_tri on every case, and the calls it must refuse.

use qwen3next_kernels::{solve_tri, Error, Exec, View, ViewMut};
use qwen3next_verify::cases::solve_tri::SolveTri;
use qwen3next_verify::suite::{assert_cases_round_trip, assert_passes, Options};

#[test]
fn every_variant_passes_every_check() {
    assert_passes::<SolveTri>(&Options::default());
}

#[test]
fn cases_round_trip() {
    assert_cases_round_trip::<SolveTri>();
}

#[test]
fn in_place_gives_the_same_bits() {
    let l = [2.0f32, 0.0, 3.0, 5.0];
    let b = [1.0f32, 2.0, 3.0, 4.0];
    let (mut x, mut y) = ([0.0f32; 4], b);
    let args = solve_tri::Args {
        x: ViewMut::new(&mut x, [1, 2, 2]).unwrap(),
        l: View::new(&l, [1, 2, 2]).unwrap(),
        b: Some(View::new(&b, [1, 2, 2]).unwrap()),
        unit_diagonal: false,
    };
    solve_tri::run(args, &Exec::default()).unwrap();
    let in_place = solve_tri::InPlace {
        x: ViewMut::new(&mut y, [1, 2, 2]).unwrap(),
        l: View::new(&l, [1, 2, 2]).unwrap(),
        unit_diagonal: false,
    };
    solve_tri::run_in_place(in_place, &Exec::default()).unwrap();
    assert_eq!(x, y);
}

#[test]
fn wrong_arguments_are_refused_by_name() {
    let (l, b, mut x) = (vec![1.0f32; 257 * 257], vec![1.0f32; 257 * 4], vec![0.0f32; 257 * 4]);
    let mut call = |n: usize, l_shape: [usize; 3], row: usize| {
        let args = solve_tri::Args {
            x: ViewMut::strided(&mut x, [1, n, 2], [0, row, 1]).unwrap(),
            l: View::new(&l, l_shape).unwrap(),
            b: Some(View::new(&b, [1, n, 2]).unwrap()),
            unit_diagonal: true,
        };
        solve_tri::run(args, &Exec::default()).unwrap_err()
    };
    assert!(call(257, [1, 257, 257], 2).to_string().contains("N: size"));
    assert!(matches!(call(3, [1, 3, 4], 2), Error::Shape { arg: "l", .. }));
    assert!(call(3, [1, 3, 3], 1).to_string().contains("x: stride"));
}
