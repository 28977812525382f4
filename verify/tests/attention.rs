//! Every variant of attention and of its merge on every case, and the calls they must refuse.

use half::f16;
use qwen3next_kernels::attention::{self, merge, Kv};
use qwen3next_kernels::{Error, Exec, View, ViewMut};
use qwen3next_verify::cases::attention::{Attention, Merge};
use qwen3next_verify::suite::{assert_cases_round_trip, assert_passes, Options};

#[test]
fn every_variant_passes_every_check() {
    assert_passes::<Attention>(&Options::default());
}

#[test]
fn every_variant_of_the_merge_passes_every_check() {
    assert_passes::<Merge>(&Options::default());
}

#[test]
fn cases_round_trip() {
    assert_cases_round_trip::<Attention>();
    assert_cases_round_trip::<Merge>();
}

/// Two sequences of three queries and four heads, two KV heads, five keys in each of two slots; `change` spoils the
/// call. (The arrays are leaked, so that `change` may bring its own.)
fn refusal(change: impl FnOnce(&mut attention::Args<'static>)) -> Error {
    let [q, k, v, o] = [192, 160, 160, 192].map(|n| vec![1.0f32; n].leak());
    let mut args = attention::Args {
        o: ViewMut::new(o, [2, 3, 4, 8]).unwrap(),
        lse: None,
        q: View::new(q, [2, 3, 4, 8]).unwrap(),
        k: Kv::F32(View::new(k, [2, 5, 2, 8]).unwrap()),
        v: Kv::F32(View::new(v, [2, 5, 2, 8]).unwrap()),
        gate: None,
        mask: None,
        sinks: None,
        slot: None,
        kv_len: None,
        cu_seqlens: None,
        causal: true,
        scale: 1.0,
        window: None,
    };
    change(&mut args);
    attention::run(args, &Exec::default()).unwrap_err()
}

#[test]
fn wrong_arguments_are_refused_by_name() {
    let zeros: &'static [f32] = vec![0.0f32; 1 << 16].leak();
    let halves: &'static [f16] = vec![f16::ZERO; 160].leak();
    let text = |change: fn(&mut attention::Args<'static>)| refusal(change).to_string();
    assert!(matches!(refusal(|a| a.sinks = Some((&[1.0][..]).into())), Error::Shape { arg: "sinks", .. }));
    assert!(matches!(refusal(|a| a.slot = Some(&[0])), Error::Shape { arg: "slot", .. }));
    assert!(matches!(refusal(|a| a.kv_len = Some(&[3, 3, 3])), Error::Shape { arg: "kv_len", .. }));
    assert!(text(|a| a.slot = Some(&[0, 2])).contains("slots: value"));
    assert!(text(|a| a.slot = Some(&[-1, 0])).contains("slots: value"));
    assert!(text(|a| a.kv_len = Some(&[5, 6])).contains("kv_len: value"));
    assert!(text(|a| a.kv_len = Some(&[5, -1])).contains("kv_len: value"));
    assert!(text(|a| a.kv_len = Some(&[5, 2])).contains("kv_len: value"));
    assert!(text(|a| a.window = Some(0..6)).contains("kv_end: value"));
    assert!(text(|a| a.window = Some(6..6)).contains("kv_begin: value"));
    assert!(text(|a| a.window = Some(std::ops::Range { start: usize::MAX, end: 2 })).contains("kv_begin: value"));
    assert!(text(|a| a.cu_seqlens = Some(&[0, 3])).contains("cu_seqlens: packs one row"));
    assert!(text(|a| a.cu_seqlens = Some(&[])).contains("cu_seqlens: is empty"));

    let mask = View::new(zeros, [2, 3, 4]).unwrap();
    assert!(matches!(refusal(|a| a.mask = Some(mask)), Error::Shape { arg: "mask", .. }));
    let gate = View::new(zeros, [2, 3, 4, 4]).unwrap();
    assert!(matches!(refusal(|a| a.gate = Some(gate)), Error::Shape { arg: "gate", .. }));
    let v = Kv::F32(View::new(zeros, [2, 5, 4, 8]).unwrap());
    assert!(matches!(refusal(|a| a.v = v), Error::Shape { arg: "v", .. }));
    let v = Kv::F16(View::new(halves, [2, 5, 2, 8]).unwrap());
    assert!(refusal(|a| a.v = v).to_string().contains("v: is not of the type of k"));
    let kv = Kv::F32(View::new(zeros, [2, 5, 3, 8]).unwrap());
    assert!(refusal(|a| (a.k, a.v) = (kv, kv)).to_string().contains("HQ: size"));
    let kv = Kv::F32(View::new(zeros, [1, 5, 2, 8]).unwrap());
    assert!(refusal(|a| (a.k, a.v) = (kv, kv)).to_string().contains("slots: size"));

    let o = ViewMut::strided(vec![0.0f32; 192].leak(), [2, 3, 4, 8], [96, 31, 8, 1]).unwrap();
    assert!(refusal(|a| a.o = o).to_string().contains("o: stride"));
    let o = ViewMut::new(vec![0.0f32; 2 * 3 * 4 * 513].leak(), [2, 3, 4, 513]).unwrap();
    let q = View::new(zeros, [2, 3, 4, 513]).unwrap();
    let kv = Kv::F32(View::new(zeros, [2, 5, 2, 513]).unwrap());
    let too_wide = refusal(|a| {
        (a.o, a.q) = (o, q);
        (a.k, a.v) = (kv, kv);
    });
    assert!(too_wide.to_string().contains("D: size"));
}

#[test]
fn the_split_of_decode_refuses_the_same() {
    let (q, kv, mut o) = (vec![1.0f32; 8], vec![1.0f32; 2000 * 8], vec![0.0f32; 8]);
    let kv = Kv::F32(View::new(&kv, [1, 2000, 1, 8]).unwrap());
    let args = attention::Args {
        o: ViewMut::new(&mut o, [1, 1, 1, 8]).unwrap(),
        lse: None,
        q: View::new(&q, [1, 1, 1, 8]).unwrap(),
        k: kv,
        v: kv,
        gate: None,
        mask: None,
        sinks: None,
        slot: None,
        kv_len: Some(&[2001]),
        cu_seqlens: None,
        causal: true,
        scale: 1.0,
        window: None,
    };
    let refused = attention::run_split(args, &Exec::default()).unwrap_err();
    assert!(refused.to_string().contains("kv_len: value"));
    assert_eq!(o, [0.0; 8]);
}

#[test]
fn a_merge_of_other_shapes_is_refused() {
    let (part_o, part_lse) = ([1.0f32; 48], [0.0f32; 6]);
    let call = |o_shape: [usize; 4], lse_shape: [usize; 3], strides: [usize; 4]| {
        let mut o = [0.0f32; 24];
        let args = merge::Args {
            o: ViewMut::new(&mut o, [1, 3, 8]).unwrap(),
            lse: None,
            part_o: View::strided(&part_o, o_shape, strides).unwrap(),
            part_lse: View::new(&part_lse, lse_shape).unwrap(),
            gate: None,
            sinks: None,
        };
        merge::run(args, &Exec::default()).map_err(|e| e.to_string())
    };
    assert_eq!(call([2, 1, 3, 8], [2, 1, 3], [24, 24, 8, 1]), Ok(()));
    assert!(call([2, 3, 1, 8], [2, 1, 3], [24, 8, 8, 1]).unwrap_err().contains("part_o"));
    assert!(call([2, 1, 3, 8], [1, 1, 3], [24, 24, 8, 1]).unwrap_err().contains("part_lse"));
    assert!(call([2, 1, 3, 8], [2, 1, 3], [0, 24, 8, 1]).unwrap_err().contains("part_o: has gaps"));
}
