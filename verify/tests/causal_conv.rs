//! Every variant of causal_conv on every case, and the calls it must refuse.

use qwen3next_kernels::causal_conv::{self, State};
use qwen3next_kernels::{Error, Exec, View, ViewMut};
use qwen3next_verify::cases::causal_conv::CausalConv;
use qwen3next_verify::suite::{assert_cases_round_trip, assert_passes, Options};

#[test]
fn every_variant_passes_every_check() {
    assert_passes::<CausalConv>(&Options::default());
}

#[test]
fn cases_round_trip() {
    assert_cases_round_trip::<CausalConv>();
}

/// Two sequences of three tokens and four channels, four taps, a pool of two; `change` spoils the call.
/// (The arrays are leaked, so that `change` may bring its own.)
fn refusal(change: impl FnOnce(&mut causal_conv::Args<'static>)) -> Error {
    let [x, w, y, pool] = [24, 16, 24, 24].map(|n| vec![1.0f32; n].leak());
    let mut args = causal_conv::Args {
        y: ViewMut::new(y, [2, 3, 4]).unwrap(),
        x: View::new(x, [2, 3, 4]).unwrap(),
        w: View::new(w, [4, 4]).unwrap(),
        bias: None,
        state: State::InPlace(ViewMut::new(pool, [2, 4, 3]).unwrap()),
        snapshots: None,
        slot_in: None,
        slot_out: None,
        cu_seqlens: None,
        silu: true,
    };
    change(&mut args);
    causal_conv::run(args, &Exec::default()).unwrap_err()
}

#[test]
fn wrong_arguments_are_refused_by_name() {
    let text = |change: fn(&mut causal_conv::Args<'static>)| refusal(change).to_string();
    assert!(matches!(refusal(|a| a.bias = Some((&[1.0][..]).into())), Error::Shape { arg: "bias", .. }));
    assert!(matches!(refusal(|a| a.slot_in = Some(&[0])), Error::Shape { arg: "slot_in", .. }));
    assert!(matches!(refusal(|a| a.x = View::new(&[], [2, 0, 4]).unwrap()), Error::Shape { arg: "x", .. }));
    let one_tap = |a: &mut causal_conv::Args<'static>| a.w = View::new(&[1.0; 4], [4, 1]).unwrap();
    assert!(matches!(refusal(one_tap), Error::Shape { arg: "state_out", .. }));
    assert!(text(|a| a.slot_in = Some(&[0, 2])).contains("slot_in: value"));
    assert!(text(|a| a.slot_in = Some(&[-1, 0])).contains("slot_in: value"));
    assert!(text(|a| a.slot_out = Some(&[0, 0])).contains("slot_out: value"));
    assert!(text(|a| a.slot_out = Some(&[1, 0])).contains("state_out: overlaps"));
    assert!(text(|a| a.cu_seqlens = Some(&[0, 3])).contains("cu_seqlens: packs one row"));

    let y = ViewMut::strided(vec![0.0f32; 24].leak(), [2, 3, 4], [12, 3, 1]).unwrap();
    assert!(refusal(|a| a.y = y).to_string().contains("y: stride"));
    let w = View::new(vec![0.0f32; 4 * 17].leak(), [4, 17]).unwrap();
    let too_wide = refusal(|a| {
        a.w = w;
        a.state = State::Zeros;
    });
    assert!(too_wide.to_string().contains("width: size"));
}

#[test]
fn sequences_must_cover_the_packed_row() {
    let (x, w) = ([1.0f32; 24], [1.0f32; 16]);
    for cu in [&[1, 6][..], &[0, 5], &[0, 7], &[0, 4, 2, 6], &[]] {
        let mut y = [0.0f32; 24];
        let args = causal_conv::Args {
            y: ViewMut::new(&mut y, [1, 6, 4]).unwrap(),
            x: View::new(&x, [1, 6, 4]).unwrap(),
            w: View::new(&w, [4, 4]).unwrap(),
            bias: None,
            state: State::Zeros,
            snapshots: None,
            slot_in: None,
            slot_out: None,
            cu_seqlens: Some(cu),
            silu: true,
        };
        let refused = causal_conv::run(args, &Exec::default()).unwrap_err().to_string();
        assert!(refused.contains("cu_seqlens"), "{cu:?}: {refused}");
    }
}
