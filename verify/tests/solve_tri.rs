//! Every variant of solve_tri on every case, and the calls it must refuse.

use ndarray::Array2;
use qwen3next_kernels::{solve_tri, Error, Exec, Operator, View, ViewMut};
use qwen3next_verify::cases::solve_tri::SolveTri;
use qwen3next_verify::compare::{compare, gamma, TINY32};
use qwen3next_verify::reference::solve_tri as reference;
use qwen3next_verify::suite::{assert_cases_round_trip, assert_passes, Options};
use safetensors::SafeTensors;

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

/// scipy's float64 solutions (golden/README.md): our reference gives them, and every variant is as near to them as to it.
#[test]
fn scipy_solves_the_same() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/solve_tri.safetensors");
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let index: serde_json::Value = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["cases"]).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let cases = index.as_object().unwrap();
    assert!(cases.len() >= 20, "{} cases", cases.len());
    for (name, case) in cases {
        let size = |key: &str| case[key].as_u64().unwrap() as usize;
        let (n, m, unit) = (size("n"), size("m"), case["unit"].as_bool().unwrap());
        let data = |key: &str| file.tensor(&format!("{name}.{key}")).unwrap().data().to_vec();
        let floats = |key: &str| -> Vec<f32> {
            data(key).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let (l, b) = (floats("l"), floats("b"));
        let x = data("x").chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect();
        let wide = |v: &[f32], columns| Array2::from_shape_vec((n, columns), v.iter().map(|&x| f64::from(x)).collect());
        let (wide_l, wide_b, scipy) =
            (wide(&l, n).unwrap(), wide(&b, m).unwrap(), Array2::from_shape_vec((n, m), x).unwrap());

        // |L⁻¹| |L| |x| is how far x moves for a relative change of 1 in every element of L.
        let inverse = reference::solve_tri(wide_l.view(), Array2::eye(n).view(), unit).mapv(f64::abs);
        let scale = inverse.dot(&reference::abs_product(wide_l.view(), scipy.view(), unit));
        let ours = reference::solve_tri(wide_l.view(), wide_b.view(), unit);
        for ((&ours, &scipy), &scale) in ours.iter().zip(&scipy).zip(&scale) {
            approx::assert_abs_diff_eq!(ours, scipy, epsilon = (2 * n + 4) as f64 * f64::EPSILON * scale);
        }

        let bound: Vec<f64> = scale.iter().map(|s| 2.0 * gamma(n + 2) * s + n as f64 * TINY32).collect();
        for variant in solve_tri::Op::variants().into_iter().filter(|v| v.isa().available()) {
            let mut x = vec![f32::NAN; n * m];
            let args = solve_tri::Args {
                x: ViewMut::new(&mut x, [1, n, m]).unwrap(),
                l: View::new(&l, [1, n, n]).unwrap(),
                b: Some(View::new(&b, [1, n, m]).unwrap()),
                unit_diagonal: unit,
            };
            solve_tri::run(args, &Exec::variant(variant)).unwrap();
            compare(name, &x, scipy.as_slice().unwrap(), &bound, m)
                .unwrap_or_else(|e| panic!("{}: {e}", variant.name()));
        }
    }
}
