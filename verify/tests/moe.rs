//! Every variant of the four steps of moe on every case, and the calls that must be refused.

use qwen3next_kernels::moe::{self, Routing};
use qwen3next_kernels::{DType, Error, View, ViewMut, Weight};
use qwen3next_verify::cases::moe::{MoeDown, MoeGroup, MoeRoute, MoeUp};
use qwen3next_verify::suite::{assert_cases_round_trip, assert_passes, Options};

#[test]
fn every_variant_of_route_passes_every_check() {
    assert_passes::<MoeRoute>(&Options::default());
}

#[test]
fn every_variant_of_group_passes_every_check() {
    assert_passes::<MoeGroup>(&Options::default());
}

#[test]
fn every_variant_of_up_passes_every_check() {
    assert_passes::<MoeUp>(&Options::default());
}

#[test]
fn every_variant_of_down_passes_every_check() {
    assert_passes::<MoeDown>(&Options::default());
}

#[test]
fn cases_round_trip() {
    assert_cases_round_trip::<MoeRoute>();
    assert_cases_round_trip::<MoeGroup>();
    assert_cases_round_trip::<MoeUp>();
}

#[test]
fn infinite_logits_are_limits() {
    let inf = f32::INFINITY;
    let route = |logits: &[f32], top_k, normalize| {
        let logits = View::new(logits, [1, logits.len()]).unwrap();
        let r = Routing::route(logits, top_k, normalize, &Default::default()).unwrap();
        (r.ids().to_vec(), r.weights().unwrap().to_vec())
    };
    assert_eq!(route(&[1.0, inf, 2.0], 2, true), (vec![1, 2], vec![1.0, 0.0]));
    assert_eq!(route(&[inf, 0.0, inf], 1, false), (vec![0], vec![0.5]));
    assert_eq!(route(&[-inf; 4], 2, false), (vec![0, 1], vec![0.25, 0.25]));
    assert_eq!(route(&[-6e4, 6e4, -0.0, 0.0], 4, false), (vec![1, 2, 3, 0], vec![1.0, 0.0, 0.0, 0.0]));
}

#[test]
fn wrong_arguments_are_refused_by_name() {
    let logits = [0f32; 8];
    let route = |top_k| Routing::route(View::new(&logits, [2, 4]).unwrap(), top_k, true, &Default::default());
    assert!(matches!(route(0), Err(Error::Argument { arg: "top_k", .. })));
    assert!(matches!(route(5), Err(Error::Argument { arg: "top_k", .. })));
    assert!(route(4).is_ok());

    let ids = |experts, top_k, ids: &[i32], weights| Routing::from_ids(experts, top_k, ids.to_vec(), weights);
    assert!(ids(4, 2, &[0, 4], None).unwrap_err().to_string().contains("ids: value"));
    assert!(ids(4, 2, &[0, -1], None).unwrap_err().to_string().contains("ids: value"));
    assert!(ids(0, 1, &[0], None).is_err());
    assert!(matches!(ids(4, 2, &[0, 1, 2], None), Err(Error::Argument { arg: "top_k", .. })));
    assert!(matches!(ids(4, 0, &[], None), Err(Error::Argument { arg: "top_k", .. })));
    assert!(matches!(ids(4, 2, &[0, 1], Some(vec![1.0])), Err(Error::Argument { arg: "weights", .. })));
    assert!(ids(usize::MAX, 1, &[], None).is_err());

    // T = 2, E = 2, D = 3, F = 4
    let routing = ids(2, 1, &[0, 1], None).unwrap();
    let (x, bytes) = ([0f32; 6], [0u8; 96]);
    let call = |y_shape: [usize; 2], gate: [usize; 3], up: [usize; 3], down: [usize; 3], y_row: usize| {
        let weight = |shape| Weight::new(&bytes, DType::F32, shape).unwrap();
        let mut y = [0f32; 8];
        let args = moe::Args {
            y: ViewMut::strided(&mut y, y_shape, [y_row, 1]).unwrap(),
            x: View::new(&x, [2, 3]).unwrap().into(),
            gate: weight(gate),
            up: weight(up),
            down: weight(down),
            routing: &routing,
            accumulate: false,
            h: &mut moe::Hidden::default(),
        };
        moe::run(args, &Default::default())
    };
    let (u, d) = ([2, 4, 3], [2, 3, 4]);
    assert_eq!(call([2, 3], u, u, d, 3), Ok(()));
    assert!(matches!(call([2, 3], [1, 4, 3], u, d, 3), Err(Error::Shape { arg: "gate", .. })));
    assert!(matches!(call([2, 3], u, [2, 3, 3], d, 3), Err(Error::Shape { arg: "up", .. })));
    assert!(matches!(call([2, 3], u, u, [2, 3, 3], 3), Err(Error::Shape { arg: "down", .. })));
    assert!(matches!(call([1, 3], u, u, d, 3), Err(Error::Shape { arg: "y", .. })));
    assert!(call([2, 3], u, u, d, 2).unwrap_err().to_string().contains("y: stride"));
}
