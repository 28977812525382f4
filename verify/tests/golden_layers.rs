//! Norms, rotary embedding, convolution, attention and feed-forward against Hugging Face's modules (golden/README.md).
//!
//! The vectors were made in f32, so both sides have an error: ours, as the cases state it, and theirs, by the formula of
//! their module. The bound is the sum.

use qwen3next_kernels::{attention, causal_conv, moe, norm, rope, DType, Exec, Operator, View, ViewMut, Weight};
use qwen3next_verify::buffer::Layout;
use qwen3next_verify::cases::attention::{KvType, Problem as Attention};
use qwen3next_verify::cases::causal_conv::{Case as ConvCase, Problem as Conv, States};
use qwen3next_verify::cases::{norm as norms, rope as ropes};
use qwen3next_verify::compare::{bitwise, compare, gamma, U32};
use safetensors::SafeTensors;
use serde_json::Value;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/layers.safetensors");

/// Calls `test` with every case whose name starts with `prefix`: a reader of its arrays and its parameters.
fn each(prefix: &str, mut test: impl FnMut(&str, &dyn Fn(&str) -> (Vec<usize>, Vec<f32>), &Value)) {
    let bytes = std::fs::read(FILE).unwrap_or_else(|e| panic!("{FILE}: {e}"));
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let index: Value = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["cases"]).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut found = 0;
    for (name, parameters) in index.as_object().unwrap().iter().filter(|(name, _)| name.starts_with(prefix)) {
        let array = |key: &str| {
            let tensor = tensors.tensor(&format!("{name}.{key}")).unwrap_or_else(|e| panic!("{name}.{key}: {e}"));
            let values: Vec<f32> = match tensor.dtype() {
                safetensors::Dtype::F32 => {
                    tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
                }
                safetensors::Dtype::I64 => {
                    tensor.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32).collect()
                }
                other => panic!("{name}.{key}: {other:?}"),
            };
            (tensor.shape().to_vec(), values)
        };
        test(name, &array, parameters);
        found += 1;
    }
    assert!(found > 0, "no case of {prefix} in {FILE}");
}

/// `[B][M][N]` from `[B][N][M]`, elements of `d`.
fn swapped(x: &[f32], [b, n, m, d]: [usize; 4]) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len());
    for b in 0..b {
        for j in 0..m {
            (0..n).for_each(|i| y.extend_from_slice(&x[((b * n + i) * m + j) * d..][..d]));
        }
    }
    y
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// On every variant that the CPU offers.
fn on_variants<O: Operator>(mut test: impl FnMut(&Exec<O>)) {
    O::variants().into_iter().filter(|v| v.isa().available()).for_each(|v| test(&Exec::variant(v)));
}

#[test]
fn norms_agree() {
    for (prefix, kind) in
        [("rms_zero_centred", norms::Kind::Plus1), ("rms_gated", norms::Kind::Gated), ("l2", norms::Kind::L2)]
    {
        each(prefix, |name, array, parameters| {
            let (shape, x) = array("x");
            let want = wide(&array("out").1);
            let case = norms::Case {
                t: shape[0],
                h: 1,
                d: shape[1],
                kind,
                eps: parameters["eps"].as_f64().unwrap() as f32,
                in_place: false,
                layout: Layout::Gaps,
                regime: norms::Regime::Normal,
            };
            let w = if kind == norms::Kind::L2 { vec![] } else { array("w").1 };
            let z = if kind == norms::Kind::Gated { array("z").1 } else { vec![0.0; x.len()] };
            let inputs = norms::Inputs { x, w, z };
            // Theirs: the sum of squares in f32 too, in eight partial sums or more.
            let (_, mut bound) = norms::judge(&case, &inputs);
            bound.iter_mut().zip(&want).for_each(|(b, w)| *b += gamma(shape[1] / 8 + 20) * w.abs());
            on_variants::<norm::Op>(|exec| {
                let y = norms::call(exec, &case, &inputs).unwrap();
                compare(name, &y, &want, &bound, shape[1]).unwrap();
            });
        });
    }
}

#[test]
fn rotations_agree() {
    each("rope", |name, array, parameters| {
        let pos: Vec<i64> = array("positions").1.iter().map(|&p| p as i64).collect();
        for key in ["q", "k"] {
            let (shape, x) = array(key);
            let [h, t, d] = [shape[1], shape[2], shape[3]];
            let case = ropes::Case {
                t,
                h,
                d,
                half: parameters["rotary"].as_u64().unwrap() as usize / 2,
                base: parameters["theta"].as_f64().unwrap(),
                in_place: false,
                layout: Layout::Gaps,
                positions: ropes::Positions::Short,
            };
            let inputs = ropes::Inputs { x: swapped(&x, [1, h, t, d]), pos: pos.clone() };
            let want = wide(&swapped(&array(&format!("{key}_out")).1, [1, h, t, d]));
            // Theirs: the angle in f32, off by three roundings of its size, and then our roundings.
            let (_, mut bound) = ropes::judge(&case, &inputs);
            for (i, b) in bound.iter_mut().enumerate().filter(|(i, _)| i % d < 2 * case.half) {
                let (row, pair) = (i / d, i % d % case.half);
                let angle = pos[row / h] as f64 * case.base.powf(-(pair as f64) / case.half as f64);
                let length = inputs.x[row * d + pair].abs() + inputs.x[row * d + pair + case.half].abs();
                *b = 2.0 * *b + 3.0 * U32 * angle * f64::from(length);
            }
            on_variants::<rope::Op>(|exec| {
                let y = ropes::call(exec, &case, &inputs).unwrap();
                compare(&format!("{name}.{key}"), &y, &want, &bound, d).unwrap();
            });
        }
    });
}

#[test]
fn convolutions_agree() {
    each("conv", |name, array, parameters| {
        let (shape, x) = array("x");
        let [batch, c, t] = [shape[0], shape[1], shape[2]];
        let width = parameters["K"].as_u64().unwrap() as usize;
        let stateful = name.ends_with("_state");
        let case = ConvCase {
            batch,
            t,
            c,
            width,
            bias: false,
            silu: true,
            states: if stateful { States::InPlace } else { States::Zeros },
            snapshots: false,
            packed: false,
            layout: Layout::Gaps,
        };
        let problem = Conv {
            x: swapped(&x, [batch, c, t, 1]),
            w: array("w").1,
            bias: None,
            pool: if stateful { array("state_in").1 } else { vec![0.0; batch * c * (width - 1)] },
            slots: batch,
            slot_in: (0..batch as i64).collect(),
            slot_out: (0..batch as i64).collect(),
            cu: (0..=batch).map(|b| (b * t) as i64).collect(),
            c,
            width,
            case,
        };
        let want = wide(&swapped(&array("out").1, [batch, c, t, 1]));
        // Theirs: the same terms in another order.
        let bound: Vec<f64> = problem.expected().1.iter().map(|b| 2.0 * b).collect();
        on_variants::<causal_conv::Op>(|exec| {
            let got = problem.call(exec).unwrap();
            compare(name, &got.y, &want, &bound, c).unwrap();
            if stateful {
                bitwise(name, got.pool.as_deref().unwrap_or(&[]), &array("state_out").1).unwrap();
            }
        });
    });
}

#[test]
fn attention_agrees() {
    each("attn", |name, array, parameters| {
        let ((q_shape, q), (k_shape, k), (_, v)) = (array("q"), array("k"), array("v"));
        let ([hq, t, d], [hkv, s]) = ([q_shape[1], q_shape[2], q_shape[3]], [k_shape[1], k_shape[2]]);
        assert_eq!(parameters["past"].as_u64(), Some((s - t) as u64));
        let problem = Attention {
            q: swapped(&q, [1, hq, t, d]),
            k: swapped(&k, [1, hkv, s, d]),
            v: swapped(&v, [1, hkv, s, d]),
            gate: None,
            mask: None,
            sinks: None,
            slot: vec![0],
            kv_len: vec![s as i64],
            cu: vec![0, t as i64],
            window: 0..s,
            cache: [1, s, hkv, d],
            hq,
            causal: true,
            scale: parameters["scale"].as_f64().unwrap() as f32,
            kv: KvType::F32,
            packed: false,
            layout: Layout::Gaps,
        };
        let want = wide(&array("o").1);
        // Theirs: a plain softmax in f32, with fewer roundings than ours is allowed.
        let bound: Vec<f64> = problem.judge(1).o_bound.iter().map(|b| 2.0 * b).collect();
        on_variants::<attention::Op>(|exec| {
            compare(name, &problem.call(exec).unwrap().o, &want, &bound, d).unwrap();
        });
    });
}

/// What both sides may be off by: f32 rounding of one feed-forward, element by element, from its float64 terms.
struct Feed {
    out: Vec<f64>,
    bound: Vec<f64>,
    /// The absolute terms of `out`, for what an error of the weights does.
    terms: Vec<f64>,
}

/// One chosen expert: its weight, and gate, up and down projections.
type Expert<'a> = (f32, &'a [f32], &'a [f32], &'a [f32]);

/// Σ over `experts` of weight · Wdown (silu(Wgate x) · (Wup x)) in float64. A pre-activation of D products is off by
/// γ(D) Σ|w x|; silu' is at most 1.1; the product and silu itself add a few roundings, the sum over F another γ(F).
fn feed(x: &[f32], experts: &[Expert]) -> Feed {
    let d = x.len();
    let mut feed = Feed { out: vec![0.0; d], bound: vec![0.0; d], terms: vec![0.0; d] };
    let dot = |w: &[f32]| -> (f64, f64) {
        let terms = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
        (terms.clone().sum(), terms.map(f64::abs).sum::<f64>() * gamma(d))
    };
    for &(weight, gate, up, down) in experts {
        let f = gate.len() / d;
        for j in 0..f {
            let ((g, g_error), (u, u_error)) = (dot(&gate[j * d..][..d]), dot(&up[j * d..][..d]));
            let silu = g / (1.0 + (-g).exp());
            let h = silu * u;
            let h_error = 1.1 * g_error * (u.abs() + u_error) + silu.abs() * u_error + gamma(8) * h.abs();
            for i in 0..d {
                let w = f64::from(weight) * f64::from(down[i * f + j]);
                feed.out[i] += w * h;
                feed.terms[i] += (w * h).abs();
                feed.bound[i] += w.abs() * (h_error + gamma(f + experts.len() + 4) * h.abs());
            }
        }
    }
    feed
}

#[test]
fn experts_and_router_give_what_hugging_face_gives() {
    each("moe", |name, array, parameters| {
        let (shape, logits) = array("router_logits");
        let (tokens, experts) = (shape[0], shape[1]);
        let top_k = parameters["top_k"].as_u64().unwrap() as usize;
        let normalize = parameters["norm_topk_prob"].as_bool().unwrap();
        let view = View::new(&logits, [tokens, experts]).unwrap();
        let routing = moe::Routing::route(view, top_k, normalize, &Exec::default()).unwrap();
        let ids: Vec<i32> = array("topk_ids").1.iter().map(|&id| id as i32).collect();
        assert_eq!(routing.ids(), ids, "{name}");
        let weights = array("topk_weights").1;
        // Both softmaxes: an exponential, a sum of E, one or two quotients; the logits' own scale is in the exponent.
        let spread = logits.iter().fold(0.0f64, |m, l| m.max(f64::from(l.abs())));
        let relative = 2.0 * (gamma(experts + 8) + 2.0 * spread * U32);
        let bound: Vec<f64> = weights.iter().map(|w| f64::from(*w) * relative).collect();
        compare(name, routing.weights().unwrap(), &wide(&weights), &bound, top_k).unwrap();

        let (x, out) = (array("x").1, array("expert_out").1);
        let (gate_up, down) = (array("experts.gate_up_proj").1, array("experts.down_proj").1);
        let d = x.len() / tokens;
        let f = down.len() / experts / d;
        let bytes = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (gate_up_bytes, down_bytes) = (bytes(&gate_up), bytes(&down));
        let (gate, up) = Weight::split_gate_up(&gate_up_bytes, DType::F32, [experts, f, d]).unwrap();
        let (mut y, mut h) = (vec![f32::NAN; tokens * d], moe::Hidden::default());
        let args = moe::Args {
            y: ViewMut::new(&mut y, [tokens, d]).unwrap(),
            x: View::new(&x, [tokens, d]).unwrap().into(),
            gate,
            up,
            down: Weight::new(&down_bytes, DType::F32, [experts, d, f]).unwrap(),
            routing: &routing,
            accumulate: false,
            h: &mut h,
        };
        moe::run(args, &Default::default()).unwrap();
        for t in 0..tokens {
            let chosen: Vec<_> = (0..top_k)
                .map(|c| {
                    let (e, weight) = (ids[t * top_k + c] as usize, weights[t * top_k + c]);
                    let merged = &gate_up[e * 2 * f * d..][..2 * f * d];
                    (weight, &merged[..f * d], &merged[f * d..], &down[e * d * f..][..d * f])
                })
                .collect();
            let judge = feed(&x[t * d..][..d], &chosen);
            // Both sides' rounding, and weights that differ by `relative`.
            let bound: Vec<f64> = judge.bound.iter().zip(&judge.terms).map(|(b, t)| 2.0 * b + relative * t).collect();
            compare(name, &y[t * d..][..d], &wide(&out[t * d..][..d]), &bound, d).unwrap();
        }
    });
}

#[test]
fn a_dense_feed_forward_gives_what_hugging_face_gives() {
    each("mlp", |name, array, _| {
        let ((shape, x), out) = (array("x"), array("out").1);
        let (tokens, d) = (shape[0], shape[1]);
        let [gate, up, down] = ["gate_proj", "up_proj", "down_proj"].map(|w| array(&format!("{w}.weight")).1);
        let f = gate.len() / d;
        let bytes = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let [gate_bytes, up_bytes, down_bytes] = [&gate, &up, &down].map(|w| bytes(w));
        let routing = moe::Routing::dense(tokens, None).unwrap();
        let (mut y, mut h) = (vec![f32::NAN; tokens * d], moe::Hidden::default());
        let args = moe::Args {
            y: ViewMut::new(&mut y, [tokens, d]).unwrap(),
            x: View::new(&x, [tokens, d]).unwrap().into(),
            gate: Weight::new(&gate_bytes, DType::F32, [1, f, d]).unwrap(),
            up: Weight::new(&up_bytes, DType::F32, [1, f, d]).unwrap(),
            down: Weight::new(&down_bytes, DType::F32, [1, d, f]).unwrap(),
            routing: &routing,
            accumulate: false,
            h: &mut h,
        };
        moe::run(args, &Default::default()).unwrap();
        for t in 0..tokens {
            let judge = feed(&x[t * d..][..d], &[(1.0, &gate, &up, &down)]);
            let bound: Vec<f64> = judge.bound.iter().map(|b| 2.0 * b).collect();
            compare(name, &y[t * d..][..d], &wide(&out[t * d..][..d]), &bound, d).unwrap();
        }
    });
}
