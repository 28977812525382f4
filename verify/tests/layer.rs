//! Every variant of the small steps of a layer on every case, and the calls they must refuse.

use half::f16;
use qwen3next_kernels::layer::{add, delta_gates, gather, kv_store, row_gate};
use qwen3next_kernels::{DType, Error, Exec, View, ViewMut, Weight};
use qwen3next_verify::cases::layer::{AddSuite, GateSuite, GatesSuite, GatherSuite, StoreSuite};
use qwen3next_verify::suite::{assert_cases_round_trip, assert_passes, Options};

#[test]
fn every_gather_passes_every_check() {
    assert_passes::<GatherSuite>(&Options::default());
}

#[test]
fn every_add_passes_every_check() {
    assert_passes::<AddSuite>(&Options::default());
}

#[test]
fn every_delta_gates_passes_every_check() {
    assert_passes::<GatesSuite>(&Options::default());
}

#[test]
fn every_kv_store_passes_every_check() {
    assert_passes::<StoreSuite>(&Options::default());
}

#[test]
fn every_row_gate_passes_every_check() {
    assert_passes::<GateSuite>(&Options::default());
}

#[test]
fn cases_round_trip() {
    assert_cases_round_trip::<GatherSuite>();
    assert_cases_round_trip::<AddSuite>();
    assert_cases_round_trip::<GatesSuite>();
    assert_cases_round_trip::<StoreSuite>();
    assert_cases_round_trip::<GateSuite>();
}

#[test]
fn gather_refuses_by_name() {
    let table = [0u8; 2 * 34];
    let mut y = [0.0; 64];
    let mut call = |n: usize, ids: &[i64], row: usize| {
        let y = ViewMut::strided(&mut y, [2, n], [row, 1]).unwrap();
        let table = Weight::new(&table, DType::Q8_0, [2, 32]).unwrap();
        gather::run(gather::Args { y, table, ids }, &Exec::default())
    };
    assert!(call(32, &[1, 0], 32).is_ok());
    assert!(matches!(call(31, &[1, 0], 32), Err(Error::Shape { arg: "table", .. })));
    assert!(matches!(call(32, &[1], 32), Err(Error::Shape { arg: "ids", .. })));
    assert!(call(32, &[1, 2], 32).unwrap_err().to_string().contains("ids: value"));
    assert!(call(32, &[-1, 0], 32).unwrap_err().to_string().contains("ids: value"));
    assert!(call(32, &[1, 0], 31).unwrap_err().to_string().contains("y: stride"));
}

#[test]
fn add_refuses_by_name() {
    let (mut y, x) = ([0.0; 6], [1.0; 6]);
    let mut call = |shape: [usize; 2], row: usize| {
        let y = ViewMut::strided(&mut y, [2, 3], [row, 1]).unwrap();
        add::run(add::Args { y, x: View::new(&x, shape).unwrap() }, &Exec::default())
    };
    assert!(call([2, 3], 3).is_ok());
    assert!(matches!(call([3, 2], 3), Err(Error::Shape { arg: "x", .. })));
    assert!(call([2, 3], 2).unwrap_err().to_string().contains("y: stride"));
    assert_eq!(y, [1.0; 6]);
}

#[test]
fn delta_gates_refuses_by_name() {
    let (mut g, mut beta, ba) = ([0.0; 8], [0.0; 8], [0.0; 16]);
    let mut call = |shape: [usize; 2], heads: usize, k_heads: usize, row: usize| {
        let args = delta_gates::Args {
            g: ViewMut::strided(&mut g, [2, 4], [row, 1]).unwrap(),
            beta: ViewMut::new(&mut beta, [2, 4]).unwrap(),
            ba: View::new(&ba, shape).unwrap(),
            a: View::new(&ba, [heads]).unwrap(),
            dt_bias: View::new(&ba, [4]).unwrap(),
            k_heads,
        };
        delta_gates::run(args, &Exec::default())
    };
    assert!(call([2, 8], 4, 2, 4).is_ok());
    assert!(matches!(call([2, 7], 4, 2, 4), Err(Error::Shape { arg: "ba", .. })));
    assert!(matches!(call([2, 8], 3, 2, 4), Err(Error::Shape { arg: "a", .. })));
    assert!(call([2, 8], 4, 3, 4).unwrap_err().to_string().contains("HV: size"));
    assert!(call([2, 8], 4, 0, 4).unwrap_err().to_string().contains("HV: size"));
    assert!(call([2, 8], 4, usize::MAX, 4).unwrap_err().to_string().contains("HV: size"));
    assert!(call([2, 8], 4, 2, 3).unwrap_err().to_string().contains("g: stride"));
}

#[test]
fn kv_store_refuses_by_name() {
    let x = [1.0; 3 * 4];
    let mut cache = [f16::ZERO; 2 * 5 * 4];
    let mut call = |n: usize, slot: &[i64], pos: &[i64], cu_seqlens: &[i64], row: usize| {
        let view = ViewMut::strided(&mut cache, [2, 5, n], [20, row, 1]).unwrap();
        let x = View::new(&x, [3, 4]).unwrap();
        let args = kv_store::Args { cache: kv_store::Cache::F16(view), x, slot, pos, cu_seqlens };
        kv_store::run(args, &Exec::default())
    };
    assert!(call(4, &[1, 0], &[4, 0, 3], &[0, 1, 3], 4).is_ok());
    assert!(matches!(call(3, &[1, 0], &[4, 0, 3], &[0, 1, 3], 4), Err(Error::Shape { arg: "cache", .. })));
    assert!(matches!(call(4, &[1], &[4, 0, 3], &[0, 1, 3], 4), Err(Error::Shape { arg: "slot", .. })));
    assert!(matches!(call(4, &[1, 0], &[4, 0], &[0, 1, 3], 4), Err(Error::Shape { arg: "pos", .. })));
    let mut refused = |slot: &[i64], pos: &[i64], cu: &[i64], row: usize, what: &str| {
        let message = call(4, slot, pos, cu, row).unwrap_err().to_string();
        assert!(message.contains(what), "{message}, expected {what}");
    };
    refused(&[1, 0], &[4, 0, 3], &[], 4, "cu_seqlens");
    refused(&[1, 0], &[4, 0, 3], &[0, 1, 2], 4, "cu_seqlens: value");
    refused(&[1, 0], &[4, 0, 3], &[1, 1, 3], 4, "cu_seqlens: value");
    refused(&[1, 0, 0], &[4, 0, 3], &[0, 2, 1, 3], 4, "cu_seqlens: value");
    refused(&[1, 1], &[4, 0, 3], &[0, 1, 3], 4, "slot: value");
    refused(&[1, 2], &[4, 0, 3], &[0, 1, 3], 4, "slot: value");
    refused(&[-1, 0], &[4, 0, 3], &[0, 1, 3], 4, "slot: value");
    refused(&[1, 0], &[5, 0, 3], &[0, 1, 3], 4, "pos: value");
    refused(&[1, 0], &[4, -1, 3], &[0, 1, 3], 4, "pos: value");
    refused(&[1, 0], &[4, 3, 3], &[0, 1, 3], 4, "pos: value");
    refused(&[1, 0], &[4, 3, 2], &[0, 1, 3], 4, "pos: value");
    refused(&[1, 0], &[4, 0, 3], &[0, 1, 3], 3, "cache: stride");
}

#[test]
fn row_gate_refuses_by_name() {
    let (mut y, x) = ([0.0; 2], [0.0; 6]);
    let mut call = |t: usize, d: usize| {
        let args = row_gate::Args {
            y: ViewMut::new(&mut y[..t], [t]).unwrap(),
            x: View::new(&x, [2, 3]).unwrap(),
            w: View::new(&x, [d]).unwrap(),
        };
        row_gate::run(args, &Exec::default())
    };
    assert!(call(2, 3).is_ok());
    assert!(matches!(call(1, 3), Err(Error::Shape { arg: "y", .. })));
    assert!(matches!(call(2, 2), Err(Error::Shape { arg: "w", .. })));
    assert_eq!(y, [0.5; 2]);
}
