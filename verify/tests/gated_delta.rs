//! Every variant of the gated delta rule on every case and on golden vectors, and the calls it must refuse.

use half::{bf16, f16};
use qwen3next_kernels::ffi::Q3N_DTYPE;
use qwen3next_kernels::gated_delta::{self, Gate, HeadMap, LogDecay, Op, State};
use qwen3next_kernels::memory::Float;
use qwen3next_kernels::{Error, Exec, Operator, View, ViewMut};
use qwen3next_verify::buffer::Layout;
use qwen3next_verify::cases::gated_delta::{
    call, judge, sequences_alone, Case, Dtype as Number, GateKind, GatedDelta, Heads, Inputs, Regime, Rows, StateKind,
};
use qwen3next_verify::compare::bitwise;
use qwen3next_verify::reference::gated_delta::Form;
use qwen3next_verify::suite::{assert_cases_round_trip, assert_passes, Options, Suite};
use safetensors::{tensor::TensorView, Dtype, SafeTensors};

#[test]
fn every_variant_passes_every_check() {
    assert_passes::<GatedDelta>(&Options::default());
}

#[test]
fn cases_round_trip() {
    assert_cases_round_trip::<GatedDelta>();
}

#[test]
fn dispatch_runs_one_of_the_variants() {
    let base = GatedDelta::grid().into_iter().find(|c| c.k == 128 && c.t == 129).expect("the model's head size");
    for t in [1, 8, 31, 32, 64] {
        let case = Case { t, ..base.clone() };
        let inputs = Inputs::generate(&case, 5);
        let got = call(&Exec::default(), &case, &inputs).expect("accepted");
        let same = Op::variants().into_iter().filter(|v| v.isa().available()).any(|v| {
            let of = call(&Exec::variant(v), &case, &inputs).expect("accepted");
            bitwise("o", &got.o, &of.o).is_ok() && bitwise("state", &got.state, &of.state).is_ok()
        });
        assert!(same, "T={t}: no variant gives what dispatch gave");
    }
}

#[test]
fn dispatch_gives_a_sequence_the_same_bits_whatever_stands_beside_it() {
    let base = GatedDelta::grid().into_iter().find(|c| c.k == 128 && c.t == 129).expect("the model's head size");
    // Packed: lengths t, 0, t / 2, t, and so on, on both sides of every threshold of dispatch.
    for t in [3, 9, 14, 31, 64, 129] {
        let case = Case { t, b: 4, rows: Rows::Packed, ..base.clone() };
        sequences_alone(&Exec::default(), &case, 7).unwrap_or_else(|e| panic!("T={t}: {e}"));
    }
}

/// A golden tensor as float64.
fn wide(x: &TensorView) -> Vec<f64> {
    match x.dtype() {
        Dtype::F64 => x.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("eight"))).collect(),
        Dtype::F32 => {
            x.data().chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().expect("four")))).collect()
        }
        other => panic!("golden tensors are f32 or f64, not {other:?}"),
    }
}

/// Hugging Face keeps a state as [K][V], we as [V][K].
fn transpose_states(x: &[f64], k: usize, v: usize) -> Vec<f64> {
    x.chunks(k * v).flat_map(|s| (0..v).flat_map(move |j| (0..k).map(move |c| s[c * v + j]))).collect()
}

#[test]
fn golden_vectors_of_hugging_face() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/delta_rule.safetensors");
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{path}: {e}; make_delta_rule.py beside it writes it"));
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let mut names: Vec<&str> = file.names().into_iter().filter_map(|n| n.strip_suffix(".out_recurrent64")).collect();
    names.sort_unstable();
    assert!(!names.is_empty(), "{path}: holds no case");
    for name in names {
        let tensor =
            |what: &str| file.tensor(&format!("{name}.{what}")).unwrap_or_else(|e| panic!("{name}.{what}: {e}"));
        let narrow = |what: &str| wide(&tensor(what)).into_iter().map(|x| x as f32).collect::<Vec<f32>>();
        let (q, v) = (tensor("q"), tensor("v"));
        let ([b, t, hk, k], [_, _, hv, dv]) = (q.shape(), v.shape()) else { panic!("{name}: q and v have four axes") };
        let (b, t, hk, k, hv, dv) = (*b, *t, *hk, *k, *hv, *dv);
        let state = match file.tensor(&format!("{name}.state0")) {
            Ok(s) => Some(transpose_states(&wide(&s), k, dv).into_iter().map(|x| x as f32).collect::<Vec<f32>>()),
            Err(_) => None,
        };
        let case = Case {
            b,
            t,
            hk,
            hv,
            k,
            v: dv,
            gate: GateKind::Scalar,
            heads: Heads::Grouped,
            l2norm: true,
            state: if state.is_some() { StateKind::InOut } else { StateKind::Zero },
            slots: false,
            snapshots: false,
            rows: Rows::Dense,
            layout: Layout::Packed,
            regime: Regime::Mild,
            dtype: Number::F32,
        };
        let inputs = Inputs {
            q: narrow("q"),
            k: narrow("k"),
            v: narrow("v"),
            g: narrow("g"),
            beta: narrow("beta"),
            state: state.unwrap_or_else(|| vec![0.0; b * hv * dv * k]),
            ..Inputs::generate(&Case { t: 0, ..case.clone() }, 0)
        };
        let golden_o = wide(&tensor("out_recurrent64"));
        let golden_state = transpose_states(&wide(&tensor("state_recurrent64")), k, dv);
        for variant in Op::variants() {
            if !variant.isa().available() {
                println!("SKIPPED {} on {name}: {} is not available", variant.name(), variant.isa());
                continue;
            }
            let mut judged = judge(&case, &inputs, Form::of(variant.name()), 0);
            // Our float64 loop is theirs, up to the f32 rounding of 1/sqrt(K) in `scale` and of the norm's epsilon.
            let scale_error = (f64::from(inputs.scale) * (k as f64).sqrt() - 1.0).abs();
            let largest = |x: &[f64]| x.iter().fold(1.0f64, |m, x| m.max(x.abs()));
            let rounding = ((t + 1) * (2 * k + 16)) as f64 * f64::EPSILON;
            for (ours, theirs) in [(&judged.o, &golden_o), (&judged.state, &golden_state)] {
                let bound = (rounding + scale_error) * largest(theirs);
                for (ours, theirs) in ours.iter().zip(theirs) {
                    assert!((ours - theirs).abs() <= bound, "{name}: {ours:e} is not {theirs:e}, bound {bound:e}");
                }
            }
            judged.o_bound.iter_mut().zip(&golden_o).for_each(|(bound, o)| *bound += scale_error * o.abs());
            judged.o.clone_from(&golden_o);
            judged.state.clone_from(&golden_state);
            let got = call(&Exec::variant(variant), &case, &inputs).unwrap_or_else(|e| panic!("{name}: {e}"));
            if let Err(e) = judged.compare(&case, &got) {
                panic!("{} on {name}: {e}", variant.name());
            }
        }
    }
}

/// Two sequences of three tokens, HK = 1, HV = 2, K = 4, V = 3, as slices to be spoilt one at a time.
struct Call {
    q: [usize; 4],
    v: [usize; 4],
    beta: [usize; 3],
    o_strides: [usize; 4],
    pool: [usize; 4],
    pool_strides: [usize; 4],
    slots: Option<Vec<i64>>,
    cu_seqlens: Option<Vec<i64>>,
    eps: Option<f32>,
}

impl Default for Call {
    fn default() -> Self {
        Call {
            q: [2, 3, 1, 4],
            v: [2, 3, 2, 3],
            beta: [2, 3, 2],
            o_strides: [18, 6, 3, 1],
            pool: [4, 2, 3, 4],
            pool_strides: [24, 12, 4, 1],
            slots: Some(vec![3, 1]),
            cu_seqlens: None,
            eps: None,
        }
    }
}

impl Call {
    fn run(&self) -> Result<(), Error> {
        let (x, mut o, mut pool) = (vec![0.5f32; 2 * 3 * 2 * 1100], vec![0.0f32; 4000], vec![0.0f32; 4000]);
        gated_delta::run(
            gated_delta::Args {
                o: ViewMut::strided(&mut o, self.v, self.o_strides)?,
                snapshots: None,
                state: State::InPlace {
                    pool: ViewMut::strided(&mut pool, self.pool, self.pool_strides)?,
                    slots: self.slots.as_deref(),
                },
                q: View::new(&x, self.q)?,
                k: View::new(&x, [2, 3, 1, 4])?,
                v: View::new(&x, self.v)?,
                gate: Gate::None,
                beta: View::new(&x, self.beta)?,
                cu_seqlens: self.cu_seqlens.as_deref(),
                head_map: HeadMap::Grouped,
                qk_l2norm: self.eps,
                scale: 1.0,
            },
            &Exec::default(),
        )
    }

    fn refused(&self, what: &str) {
        let error = self.run().expect_err(what).to_string();
        assert!(error.contains(what), "{error:?} does not name {what:?}");
    }
}

#[test]
fn wrong_arguments_are_refused_by_name() {
    Call::default().run().expect("the call to spoil is right");
    Call { q: [2, 3, 1, 5], ..Call::default() }.refused("q: shape");
    Call { beta: [2, 3, 1], ..Call::default() }.refused("beta: shape");
    Call { pool: [4, 2, 4, 3], pool_strides: [24, 12, 3, 1], ..Call::default() }.refused("state_out: shape");
    Call { pool_strides: [24, 11, 4, 1], ..Call::default() }.refused("state_out: stride");
    Call { o_strides: [18, 5, 3, 1], ..Call::default() }.refused("o: stride");
    Call { slots: Some(vec![4, 1]), ..Call::default() }.refused("slot_in: value");
    Call { slots: Some(vec![-1, 1]), ..Call::default() }.refused("slot_in: value");
    Call { slots: Some(vec![1, 1]), ..Call::default() }.refused("slot_out: value");
    Call { slots: Some(vec![1]), ..Call::default() }.refused("slot_in: shape [1], expected [2]");
    Call { slots: None, pool: [1, 2, 3, 4], ..Call::default() }.refused("slot_in: value");
    Call { cu_seqlens: Some(vec![0, 3]), ..Call::default() }.refused("cu_seqlens: packs one row");
    Call { cu_seqlens: Some(vec![]), ..Call::default() }.refused("cu_seqlens: is empty");
    Call { eps: Some(-1.0), ..Call::default() }.refused("eps: value");
    Call { eps: Some(f32::NAN), ..Call::default() }.refused("eps: value");
    Call { v: [2, 3, 2, 1025], o_strides: [6150, 2050, 1025, 1], ..Call::default() }.run().expect_err("V over 1024");
}

/// A call of one token in a type.
fn typed<E: Float>(zero: E, exec: &Exec<Op>) -> Result<(), Error> {
    let (x, mut o, one) = (vec![zero; 4], vec![zero; 4], [1.0f32]);
    gated_delta::run(
        gated_delta::Args {
            o: ViewMut::new(&mut o, [1, 1, 1, 4])?,
            snapshots: None,
            state: State::Zero { out: None, slot_out: None },
            q: View::new(&x, [1, 1, 1, 4])?,
            k: View::new(&x, [1, 1, 1, 4])?,
            v: View::new(&x, [1, 1, 1, 4])?,
            gate: Gate::None,
            beta: View::new(&one, [1, 1, 1])?,
            cu_seqlens: None,
            head_map: HeadMap::Grouped,
            qk_l2norm: None,
            scale: 1.0,
        },
        exec,
    )
}

#[test]
fn variants_of_the_cpu_refuse_16_bits_and_cuda_kernels_take_them() {
    let variants = Op::variants().into_iter().filter(|v| v.isa().available());
    for exec in std::iter::once(Exec::default())
        .chain(variants.clone().filter(|v| !v.name().contains("cuda")).map(Exec::variant))
    {
        typed(0.0f32, &exec).expect("f32 is taken");
        for refused in [typed(bf16::ZERO, &exec), typed(f16::ZERO, &exec)] {
            let error = refused.expect_err("16 bits on the CPU");
            assert_eq!(error.kind(), Some(Q3N_DTYPE));
            assert_eq!(
                error.to_string(),
                "gated_delta: dtype: q, k, v and o are bf16 or f16: expected f32, or a CUDA kernel"
            );
        }
    }
    for variant in variants.filter(|v| v.name().contains("cuda")) {
        let exec = Exec::variant(variant);
        typed(0.0f32, &exec).and(typed(bf16::ZERO, &exec)).and(typed(f16::ZERO, &exec)).expect("CUDA takes all three");
    }
}

#[test]
fn sequence_lengths_are_held_against_the_tokens() {
    let x = vec![0.5f32; 64];
    let call = |cu: &[i64], hv: usize| {
        let mut o = vec![0.0f32; 64];
        gated_delta::run(
            gated_delta::Args {
                o: ViewMut::new(&mut o, [1, 4, hv, 2]).unwrap(),
                snapshots: None,
                state: State::Zero { out: None, slot_out: None },
                q: View::new(&x, [1, 4, 2, 2]).unwrap(),
                k: View::new(&x, [1, 4, 2, 2]).unwrap(),
                v: View::new(&x, [1, 4, hv, 2]).unwrap(),
                gate: Gate::None,
                beta: View::new(&x, [1, 4, hv]).unwrap(),
                cu_seqlens: Some(cu),
                head_map: HeadMap::Tiled,
                qk_l2norm: None,
                scale: 1.0,
            },
            &Exec::default(),
        )
        .map_err(|e| e.to_string())
    };
    call(&[0, 1, 1, 4], 2).expect("an empty sequence is a sequence");
    for bad in [&[0, 5][..], &[1, 4], &[0, 3, 2, 4], &[0], &[0, 3], &[0, i64::MAX, 4]] {
        let error = call(bad, 2).expect_err("bad cu_seqlens");
        assert!(error.contains("cu_seqlens: value"), "{bad:?}: {error}");
    }
    assert!(call(&[0, 4], 3).expect_err("HV no multiple of HK").contains("HV: size"));
}

#[test]
fn a_linear_gate_is_refused() {
    assert!(LogDecay::new(&[-0.1, 0.0, -316.0, f32::NEG_INFINITY, f32::NAN], [1, 1, 5]).is_ok());
    let error = LogDecay::new(&[-0.1, 0.97], [1, 1, 2]).expect_err("0.97 is a decay, not its logarithm");
    assert!(error.to_string().contains("g: holds a value above 0"));
    // Gaps are not looked at; values are, through every axis.
    let data = [-1.0, -1.0, 7.0, -1.0, -1.0, 7.0];
    assert!(LogDecay::strided(&data, [1, 2, 2], [6, 3, 1]).is_ok());
    assert!(LogDecay::strided(&data, [1, 2, 3], [6, 3, 1]).is_err());
    assert!(LogDecay::new(&data, [0, 2, 3]).is_ok());
}

#[test]
fn the_pools_of_a_call_have_one_layout() {
    let (x, mut o, mut out) = (vec![0.5f32; 64], vec![0.0f32; 64], vec![0.0f32; 64]);
    let error = gated_delta::run(
        gated_delta::Args {
            o: ViewMut::new(&mut o, [1, 1, 1, 2]).unwrap(),
            snapshots: None,
            state: State::InOut {
                input: View::new(&x, [1, 1, 2, 2]).unwrap(),
                slot_in: None,
                out: Some(ViewMut::strided(&mut out, [1, 1, 2, 2], [6, 6, 3, 1]).unwrap()),
                slot_out: None,
            },
            q: View::new(&x, [1, 1, 1, 2]).unwrap(),
            k: View::new(&x, [1, 1, 1, 2]).unwrap(),
            v: View::new(&x, [1, 1, 1, 2]).unwrap(),
            gate: Gate::None,
            beta: View::new(&x, [1, 1, 1]).unwrap(),
            cu_seqlens: None,
            head_map: HeadMap::Grouped,
            qk_l2norm: None,
            scale: 1.0,
        },
        &Exec::default(),
    )
    .expect_err("two layouts");
    assert!(error.to_string().contains("state_out: has other strides"));
}
