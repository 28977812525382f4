//! Operators on devices: what `queue` leaves in buffers against what `run` computes on the CPU, and what is refused. On the
//! host executor, and on the first GPU where there is one.
#![cfg(any(feature = "cuda", feature = "cuda-host"))]

use half::{bf16, f16};
use qwen3next_kernels::activations::Q8;
use qwen3next_kernels::device::{Buffer, Device, Graph, Indices, Stream};
use qwen3next_kernels::memory::Float;
use qwen3next_kernels::{
    attention, causal_conv, gated_delta, layer, matmul, moe, norm, quant, rope, solve_tri, DType, Error, Exec, View,
    ViewMut, Weight,
};

fn devices() -> Vec<Device> {
    #[allow(unused_mut)]
    let mut all = vec![
        #[cfg(feature = "cuda-host")]
        Device::executor(),
    ];
    #[cfg(feature = "cuda")]
    match Device::open(0) {
        Ok(gpu) => all.push(gpu),
        Err(why) => println!("SKIPPED: {why}"),
    }
    all
}

/// Values in -1 .. 1 that no pattern of indices hits.
fn fill(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Within rounding of sums of some hundred terms.
fn assert_near(got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= 2e-5 * largest, "element {i}: {a}, on the CPU {b}");
    }
}

#[test]
fn norms() -> Result<(), Error> {
    let (t, h, d) = (3, 2, 64);
    let (x, z, w) = (fill(t * h * d, 1), fill(t * h * d, 2), fill(d, 3));
    let mut expected = vec![0.0; t * h * d];
    let kind = norm::Kind::RmsGated { w: Some(w[..].into()), z: View::new(&z, [t, h, d])? };
    let x_view = Some(View::new(&x, [t, h, d])?);
    norm::run(norm::Args { y: ViewMut::new(&mut expected, [t, h, d])?, x: x_view, kind, eps: 1e-6 }, &Exec::default())?;
    for device in devices() {
        let stream = device.stream()?;
        let (x, z, w) = (device.upload(&x)?, device.upload(&z)?, device.upload(&w)?);
        let mut y = device.zeros(t * h * d)?;
        let kind = norm::Kind::RmsGated { w: Some(w.view([d])?), z: z.view([t, h, d])? };
        let x = Some(x.view([t, h, d])?);
        norm::queue(norm::Args { y: y.view_mut([t, h, d])?, x, kind, eps: 1e-6 }, &stream)?;
        assert_near(&y.download()?, &expected);
    }
    Ok(())
}

#[test]
fn rotary_positions_come_from_the_device() -> Result<(), Error> {
    let (shape, pos) = ([3, 2, 32], [7i64, 0, 100]);
    let x = fill(3 * 2 * 32, 4);
    let mut expected = x.clone();
    let y = ViewMut::new(&mut expected, shape)?;
    rope::run(rope::Args { y, x: None, pos: &pos, base: 1e4, rotary: 16 }, &Exec::default())?;
    for device in devices() {
        let (stream, pos, mut y) = (device.stream()?, device.indices(&pos)?, device.upload(&x)?);
        let y_view = y.view_mut(shape)?;
        rope::queue(rope::Args { y: y_view, x: None, pos: &pos, base: 1e4, rotary: 16 }, &stream)?;
        assert_near(&y.download()?, &expected);
        let negative = device.indices(&[0, -1, 2])?;
        let args = rope::Args { y: y.view_mut(shape)?, x: None, pos: &negative, base: 1e4, rotary: 16 };
        assert!(rope::queue(args, &stream).unwrap_err().to_string().contains("pos"));
    }
    Ok(())
}

#[test]
fn convolutions_update_their_slots() -> Result<(), Error> {
    let (c, width, slots, cu, slot) = (24, 4, 3, [0i64, 2, 7], [2i64, 0]);
    let (x, w, bias, pool) = (fill(7 * c, 5), fill(c * width, 6), fill(c, 7), fill(slots * c * (width - 1), 8));
    let pool_shape = [slots, c, width - 1];
    let (mut expected, mut expected_pool) = (vec![0.0; 7 * c], pool.clone());
    let args = causal_conv::Args {
        y: ViewMut::new(&mut expected, [1, 7, c])?,
        x: View::new(&x, [1, 7, c])?,
        w: View::new(&w, [c, width])?,
        bias: Some(bias[..].into()),
        state: causal_conv::State::InPlace(ViewMut::new(&mut expected_pool, pool_shape)?),
        snapshots: None,
        slot_in: Some(&slot),
        slot_out: Some(&slot),
        cu_seqlens: Some(&cu),
        silu: true,
    };
    causal_conv::run(args, &Exec::default())?;
    for device in devices() {
        let stream = device.stream()?;
        let (x, w, bias, mut pool) =
            (device.upload(&x)?, device.upload(&w)?, device.upload(&bias)?, device.upload(&pool)?);
        let (cu, slot, mut y) = (device.indices(&cu)?, device.indices(&slot)?, device.zeros(7 * c)?);
        let args = causal_conv::Args {
            y: y.view_mut([1, 7, c])?,
            x: x.view([1, 7, c])?,
            w: w.view([c, width])?,
            bias: Some(bias.view([c])?),
            state: causal_conv::State::InPlace(pool.view_mut(pool_shape)?),
            snapshots: None,
            slot_in: Some(&slot),
            slot_out: Some(&slot),
            cu_seqlens: Some(&cu),
            silu: true,
        };
        causal_conv::queue(args, &stream)?;
        assert_near(&y.download()?, &expected);
        assert_near(&pool.download()?, &expected_pool);
    }
    Ok(())
}

#[test]
fn delta_rule_from_pool_to_pool() -> Result<(), Error> {
    let (hk, hv, k, v, slots, cu, from, to) = (2, 4, 32, 16, 3, [0i64, 3, 40], [1i64, 1], [0i64, 2]);
    let t = 40;
    let (q, keys, values) = (fill(t * hk * k, 9), fill(t * hk * k, 10), fill(t * hv * v, 11));
    let beta: Vec<f32> = fill(t * hv, 12).iter().map(|b| b.abs()).collect();
    let g: Vec<f32> = fill(t * hv, 13).iter().map(|g| -g.abs()).collect();
    let (pool, shape) = (fill(slots * hv * v * k, 14), [slots, hv, v, k]);
    let (mut expected, mut expected_pool) = (vec![0.0; t * hv * v], vec![0.0; pool.len()]);
    let args = gated_delta::Args {
        o: ViewMut::new(&mut expected, [1, t, hv, v])?,
        snapshots: None,
        state: gated_delta::State::InOut {
            input: View::new(&pool, shape)?,
            slot_in: Some(&from),
            out: Some(ViewMut::new(&mut expected_pool, shape)?),
            slot_out: Some(&to),
        },
        q: View::new(&q, [1, t, hk, k])?,
        k: View::new(&keys, [1, t, hk, k])?,
        v: View::new(&values, [1, t, hv, v])?,
        gate: gated_delta::Gate::Scalar(gated_delta::LogDecay::new(&g, [1, t, hv])?),
        beta: View::new(&beta, [1, t, hv])?,
        cu_seqlens: Some(&cu),
        head_map: gated_delta::HeadMap::Grouped,
        qk_l2norm: Some(gated_delta::L2_NORM_EPS),
        scale: 0.25,
    };
    gated_delta::run(args, &Exec::default())?;
    for device in devices() {
        let stream = device.stream()?;
        let (q, keys, values) = (device.upload(&q)?, device.upload(&keys)?, device.upload(&values)?);
        let (beta, g, pool) = (device.upload(&beta)?, device.upload(&g)?, device.upload(&pool)?);
        let (cu, from, to) = (device.indices(&cu)?, device.indices(&from)?, device.indices(&to)?);
        let (mut o, mut out) = (device.zeros(t * hv * v)?, device.zeros(slots * hv * v * k)?);
        let args = gated_delta::Args {
            o: o.view_mut([1, t, hv, v])?,
            snapshots: None,
            state: gated_delta::State::InOut {
                input: pool.view(shape)?,
                slot_in: Some(&from),
                out: Some(out.view_mut(shape)?),
                slot_out: Some(&to),
            },
            q: q.view([1, t, hk, k])?,
            k: keys.view([1, t, hk, k])?,
            v: values.view([1, t, hv, v])?,
            gate: gated_delta::Gate::Scalar(gated_delta::LogDecay::unchecked(g.view([1, t, hv])?)),
            beta: beta.view([1, t, hv])?,
            cu_seqlens: Some(&cu),
            head_map: gated_delta::HeadMap::Grouped,
            qk_l2norm: Some(gated_delta::L2_NORM_EPS),
            scale: 0.25,
        };
        gated_delta::queue(args, &stream)?;
        assert_near(&o.download()?, &expected);
        assert_near(&out.download()?, &expected_pool);
    }
    Ok(())
}

/// q, k, v and o of a type, beside the call in f32 on the same numbers: o is rounded once, the states are not.
fn delta_rule_of<E: Float>(of: fn(f32) -> E, wide: fn(E) -> f32, unit: f32) -> Result<(), Error> {
    let (b, t, hk, hv, k, v) = (2, 70, 1, 2, 32, 16);
    let typed = |n: usize, seed: u64| fill(n, seed).into_iter().map(of).collect::<Vec<E>>();
    let (q, keys, values) = (typed(b * t * hk * k, 31), typed(b * t * hk * k, 32), typed(b * t * hv * v, 33));
    let [wide_q, wide_k, wide_v] = [&q, &keys, &values].map(|x| x.iter().map(|&x| wide(x)).collect::<Vec<f32>>());
    let (beta, pool) = (vec![0.5f32; b * t * hv], fill(b * hv * v * k, 34));
    let (mut expected, mut expected_pool) = (vec![0.0; b * t * hv * v], pool.clone());
    let args = gated_delta::Args {
        o: ViewMut::new(&mut expected, [b, t, hv, v])?,
        snapshots: None,
        state: gated_delta::State::InPlace { pool: ViewMut::new(&mut expected_pool, [b, hv, v, k])?, slots: None },
        q: View::new(&wide_q, [b, t, hk, k])?,
        k: View::new(&wide_k, [b, t, hk, k])?,
        v: View::new(&wide_v, [b, t, hv, v])?,
        gate: gated_delta::Gate::None,
        beta: View::new(&beta, [b, t, hv])?,
        cu_seqlens: None,
        head_map: gated_delta::HeadMap::Grouped,
        qk_l2norm: Some(gated_delta::L2_NORM_EPS),
        scale: 0.25,
    };
    gated_delta::run(args, &Exec::default())?;
    for device in devices() {
        let (stream, q, keys, values) =
            (device.stream()?, device.upload(&q)?, device.upload(&keys)?, device.upload(&values)?);
        let (beta, mut pool, mut o) =
            (device.upload(&beta)?, device.upload(&pool)?, device.zeros::<E>(b * t * hv * v)?);
        let args = gated_delta::Args {
            o: o.view_mut([b, t, hv, v])?,
            snapshots: None,
            state: gated_delta::State::InPlace { pool: pool.view_mut([b, hv, v, k])?, slots: None },
            q: q.view([b, t, hk, k])?,
            k: keys.view([b, t, hk, k])?,
            v: values.view([b, t, hv, v])?,
            gate: gated_delta::Gate::None,
            beta: beta.view([b, t, hv])?,
            cu_seqlens: None,
            head_map: gated_delta::HeadMap::Grouped,
            qk_l2norm: Some(gated_delta::L2_NORM_EPS),
            scale: 0.25,
        };
        gated_delta::queue(args, &stream)?;
        let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        for (i, (&o, expected)) in o.download()?.iter().zip(&expected).enumerate() {
            let off = (wide(o) - expected).abs();
            assert!(off <= unit * expected.abs() + 1e-4 * largest, "o[{i}]: {}, in f32 {expected}", wide(o));
        }
        for (i, (state, expected)) in pool.download()?.iter().zip(&expected_pool).enumerate() {
            assert!((state - expected).abs() <= 1e-4, "state[{i}]: {state}, in f32 {expected}");
        }
    }
    Ok(())
}

#[test]
fn delta_rule_in_16_bits() -> Result<(), Error> {
    delta_rule_of(bf16::from_f32, bf16::to_f32, 1.0 / 256.0)?;
    delta_rule_of(f16::from_f32, f16::to_f32, 1.0 / 2048.0)
}

/// The kernel that chooses by the sizes of a call: one that no name of a variant stands for.
#[cfg(feature = "cuda-host")]
#[test]
fn the_chooser_of_the_delta_rule_passes_its_checks() {
    use qwen3next_verify::cases::gated_delta::GatedDelta;
    use qwen3next_verify::suite::{assert_passed, run_on, Options};
    let device: &'static Device = Box::leak(Box::new(Device::executor()));
    for check in ["reference", "split", "alone"] {
        let (check, variant) = (Some(check.into()), Some("cuda".into()));
        let options = Options { check, variant, ..Options::quick() };
        assert_passed(&run_on::<GatedDelta>(&options, &qwen3next_kernels::Variant::staged(device)).unwrap());
    }
}

#[test]
fn triangular_solves() -> Result<(), Error> {
    let (batch, n, m) = (3, 20, 5);
    let (l, b) = (fill(batch * n * n, 15), fill(batch * n * m, 16));
    let mut expected = b.clone();
    let x = ViewMut::new(&mut expected, [batch, n, m])?;
    let l_view = View::new(&l, [batch, n, n])?;
    solve_tri::run_in_place(solve_tri::InPlace { x, l: l_view, unit_diagonal: true }, &Exec::default())?;
    for device in devices() {
        let (stream, l, b) = (device.stream()?, device.upload(&l)?, device.upload(&b)?);
        let (mut x, mut in_place) = (device.zeros(batch * n * m)?, device.upload(&b.download()?)?);
        let args = solve_tri::Args {
            x: x.view_mut([batch, n, m])?,
            l: l.view([batch, n, n])?,
            b: Some(b.view([batch, n, m])?),
            unit_diagonal: true,
        };
        solve_tri::queue(args, &stream)?;
        let x_view = in_place.view_mut([batch, n, m])?;
        let args = solve_tri::InPlace { x: x_view, l: l.view([batch, n, n])?, unit_diagonal: true };
        solve_tri::queue_in_place(args, &stream)?;
        assert_near(&x.download()?, &expected);
        assert_near(&in_place.download()?, &expected);
    }
    Ok(())
}

#[test]
fn attention_over_a_cache() -> Result<(), Error> {
    let (b, t, hq, hkv, d, slots, s) = (2, 2, 4, 2, 64, 3, 40);
    let (q, gate) = (fill(b * t * hq * d, 17), fill(b * t * hq * d, 18));
    let half = |seed| fill(slots * s * hkv * d, seed).into_iter().map(half::f16::from_f32).collect::<Vec<_>>();
    let (keys, values, sinks) = (half(19), half(20), fill(hq, 21));
    let (slot, kv_len, shape, kv) = ([2i64, 0], [33i64, 40], [b, t, hq, d], [slots, s, hkv, d]);
    let mut expected = vec![0.0; b * t * hq * d];
    let args = attention::Args {
        o: ViewMut::new(&mut expected, shape)?,
        lse: None,
        q: View::new(&q, shape)?,
        k: attention::Kv::F16(View::new(&keys, kv)?),
        v: attention::Kv::F16(View::new(&values, kv)?),
        gate: Some(View::new(&gate, shape)?),
        mask: None,
        sinks: Some(sinks[..].into()),
        slot: Some(&slot),
        kv_len: Some(&kv_len),
        cu_seqlens: None,
        causal: true,
        scale: 0.125,
        window: None,
    };
    attention::run(args, &Exec::default())?;
    for device in devices() {
        let stream = device.stream()?;
        let (q, gate, sinks) = (device.upload(&q)?, device.upload(&gate)?, device.upload(&sinks)?);
        let (keys, values) = (device.upload(&keys)?, device.upload(&values)?);
        let (slot, kv_len) = (device.indices(&slot)?, device.indices(&kv_len)?);
        let mut o = device.zeros(b * t * hq * d)?;
        let args = attention::Args {
            o: o.view_mut(shape)?,
            lse: None,
            q: q.view(shape)?,
            k: attention::Kv::F16(keys.view(kv)?),
            v: attention::Kv::F16(values.view(kv)?),
            gate: Some(gate.view(shape)?),
            mask: None,
            sinks: Some(sinks.view([hq])?),
            slot: Some(&slot),
            kv_len: Some(&kv_len),
            cu_seqlens: None,
            causal: true,
            scale: 0.125,
            window: None,
        };
        attention::queue(args, &stream)?;
        assert_near(&o.download()?, &expected);
    }
    Ok(())
}

#[test]
fn parts_of_attention_merge() -> Result<(), Error> {
    let (parts, t, hq, d) = (3, 2, 2, 64);
    let (part_o, part_lse) = (fill(parts * t * hq * d, 22), fill(parts * t * hq, 23));
    let mut expected = vec![0.0; t * hq * d];
    let args = attention::merge::Args {
        o: ViewMut::new(&mut expected, [t, hq, d])?,
        lse: None,
        part_o: View::new(&part_o, [parts, t, hq, d])?,
        part_lse: View::new(&part_lse, [parts, t, hq])?,
        gate: None,
        sinks: None,
    };
    attention::merge::run(args, &Exec::default())?;
    for device in devices() {
        let (stream, mut o) = (device.stream()?, device.zeros(t * hq * d)?);
        let (part_o, part_lse) = (device.upload(&part_o)?, device.upload(&part_lse)?);
        let args = attention::merge::Args {
            o: o.view_mut([t, hq, d])?,
            lse: None,
            part_o: part_o.view([parts, t, hq, d])?,
            part_lse: part_lse.view([parts, t, hq])?,
            gate: None,
            sinks: None,
        };
        attention::merge::queue(args, &stream)?;
        assert_near(&o.download()?, &expected);
    }
    Ok(())
}

#[test]
fn weights_decode_and_multiply() -> Result<(), Error> {
    let (m, n, k, dtype) = (3, 48, 512, DType::Q4_K);
    let (x, w) = (fill(m * k, 24), quant::to_bytes(dtype, View::new(&fill(n * k, 25), [n, k])?)?);
    let decoded = quant::to_floats(Weight::new(&w, dtype, [n, k])?)?;
    let mut q8 = Q8::default();
    q8.quantize(dtype.activations(), View::new(&x, [m, k])?, &Exec::default())?;
    let (mut plain, mut integers) = (vec![0.0; m * n], vec![0.0; m * n]);
    let weights = Weight::new(&w, dtype, [n, k])?;
    let y = ViewMut::new(&mut plain, [m, n])?;
    matmul::run(matmul::Args { y, x: View::new(&x, [m, k])?.into(), w: weights }, &Exec::default())?;
    let y = ViewMut::new(&mut integers, [m, n])?;
    matmul::run(matmul::Args { y, x: (&q8).into(), w: weights }, &Exec::default())?;
    for device in devices() {
        let (stream, x, w) = (device.stream()?, device.upload(&x)?, device.upload(&w)?);
        let (mut y, mut floats, weights) = (device.zeros(m * n)?, device.zeros(n * k)?, w.weight(dtype, [n, k])?);
        let args = quant::dequantize::Args { y: floats.view_mut([n, k])?, x: weights };
        quant::dequantize::queue(args, &stream)?;
        assert_eq!(floats.download()?, decoded);
        let args = matmul::Args { y: y.view_mut([m, n])?, x: x.view([m, k])?.into(), w: weights };
        matmul::queue(args, &stream)?;
        assert_near(&y.download()?, &plain);
        let mut q8 = Q8::on(&device)?;
        q8.queue(dtype.activations(), x.view([m, k])?, &stream)?;
        matmul::queue(matmul::Args { y: y.view_mut([m, n])?, x: (&q8).into(), w: weights }, &stream)?;
        assert_near(&y.download()?, &integers);
    }
    Ok(())
}

#[test]
fn experts_from_logits_to_sum() -> Result<(), Error> {
    let (t, e, top_k, d, f) = (5, 8, 3, 256, 256);
    let (logits, x) = (fill(t * e, 26), fill(t * d, 27));
    let quantized = |dtype, seed| quant::to_bytes(dtype, View::new(&fill(2 * e * f * d, seed), [2 * e * f, d])?);
    let (gate_up, down) = (quantized(DType::Q4_K, 28)?, quantized(DType::Q6_K, 29)?);
    let routing = moe::Routing::route(View::new(&logits, [t, e])?, top_k, true, &Exec::default())?;
    let mut q8 = Q8::default();
    q8.quantize(DType::Q8_X256, View::new(&x, [t, d])?, &Exec::default())?;
    let (mut expected, mut h) = (vec![0.0; t * d], moe::Hidden::default());
    let (gate, up) = Weight::split_gate_up(&gate_up, DType::Q4_K, [e, f, d])?;
    let args = moe::Args {
        y: ViewMut::new(&mut expected, [t, d])?,
        x: (&q8).into(),
        gate,
        up,
        down: Weight::new(&down, DType::Q6_K, [e, d, f])?,
        routing: &routing,
        accumulate: false,
        h: &mut h,
    };
    moe::run(args, &Default::default())?;
    for device in devices() {
        let (stream, logits, x) = (device.stream()?, device.upload(&logits)?, device.upload(&x)?);
        let (gate_up, down, mut y) = (device.upload(&gate_up)?, device.upload(&down)?, device.zeros(t * d)?);
        let (mut routed, mut bad) = (moe::Routing::on(&device)?, device.upload(&[i64::MAX])?);
        routed.queue_route(logits.view([t, e])?, top_k, true, bad.view_mut([1])?, &stream)?;
        assert_eq!(routed.ids().download()?, routing.ids());
        assert_eq!(bad.download()?, [i64::MAX]);
        let (mut q8, mut h) = (Q8::on(&device)?, moe::Hidden::on(&device)?);
        q8.queue(DType::Q8_X256, x.view([t, d])?, &stream)?;
        let (gate, up) = gate_up.weight(DType::Q4_K, [e, 2 * f, d])?.halves()?;
        let args = moe::Args {
            y: y.view_mut([t, d])?,
            x: (&q8).into(),
            gate,
            up,
            down: down.weight(DType::Q6_K, [e, d, f])?,
            routing: &routed,
            accumulate: false,
            h: &mut h,
        };
        moe::queue(args, &stream)?;
        assert_near(&y.download()?, &expected);
    }
    Ok(())
}

/// Nobody waits for the router: what comes after a NaN must still find experts that there are.
#[test]
fn a_nan_among_router_logits_stays_with_its_token() -> Result<(), Error> {
    let (t, e, top_k, d, f) = (4, 8, 3, 32, 32);
    let mut logits = fill(t * e, 30);
    logits[2 * e + 5] = f32::NAN;
    let zeros = vec![0u8; 4 * e * f * d];
    for device in devices() {
        let (stream, logits, x) = (device.stream()?, device.upload(&logits)?, device.upload(&fill(t * d, 31))?);
        let (weights, mut y) = (device.upload(&zeros)?, device.zeros(t * d)?);
        let (mut routed, mut bad) = (moe::Routing::on(&device)?, device.upload(&[i64::MAX])?);
        routed.queue_route(logits.view([t, e])?, top_k, true, bad.view_mut([1])?, &stream)?;
        let mut h = moe::Hidden::on(&device)?;
        let args = moe::Args {
            y: y.view_mut([t, d])?,
            x: x.view([t, d])?.into(),
            gate: weights.weight(DType::F32, [e, f, d])?,
            up: weights.weight(DType::F32, [e, f, d])?,
            down: weights.weight(DType::F32, [e, d, f])?,
            routing: &routed,
            accumulate: false,
            h: &mut h,
        };
        moe::queue(args, &stream)?;
        assert_eq!(bad.download()?, [2]);
        let y = y.download()?;
        for (token, row) in y.chunks(d).enumerate() {
            assert!(row.iter().all(|y| if token == 2 { y.is_nan() } else { *y == 0.0 }), "token {token}: {row:?}");
        }
    }
    Ok(())
}

#[test]
fn misuse_is_refused_by_name() -> Result<(), Error> {
    for device in devices() {
        let (stream, mut y) = (device.stream()?, device.zeros::<f32>(12)?);
        let x = device.zeros::<f32>(12)?;
        let l2 = || norm::Kind::L2;
        assert!(y.view_mut([13]).unwrap_err().to_string().contains("needs 13 elements"));
        assert!(device.zeros::<f32>(usize::MAX).unwrap_err().to_string().contains("len"));
        assert!(y.write(&[1.0]).unwrap_err().to_string().contains("expected 12"));
        assert!(y.write_at(11, &[1.0; 2]).unwrap_err().to_string().contains("from 11 on"));
        let args = norm::Args { y: y.view_mut([1, 3, 4])?, x: Some(x.view([1, 4, 3])?), kind: l2(), eps: 0.0 };
        assert!(matches!(norm::queue(args, &stream), Err(Error::Shape { arg: "x", .. })));
        let args = norm::Args { y: y.view_mut([1, 3, 4])?, x: None, kind: l2(), eps: -1.0 };
        assert!(norm::queue(args, &stream).unwrap_err().to_string().contains("eps"));
        stream.wait()?;
        assert_eq!(y.download()?, [0.0; 12]);
    }
    if let [one, other] = &devices()[..] {
        let (mut y, x) = (one.zeros::<f32>(4)?, other.zeros::<f32>(4)?);
        let args =
            norm::Args { y: y.view_mut([1, 1, 4])?, x: Some(x.view([1, 1, 4])?), kind: norm::Kind::L2, eps: 0.0 };
        assert!(norm::queue(args, &one.stream()?).unwrap_err().to_string().contains("more than one device"));
    }
    Ok(())
}

/// What `--backend cuda` does on a GPU: suites whose calls are copied to a device and back.
#[test]
fn suites_run_on_a_device() {
    use qwen3next_verify::suite::{assert_passed, Options, Verdict};
    for device in devices() {
        let device: &'static Device = Box::leak(Box::new(device));
        let options = Options {
            device: Some(device),
            check: Some("reference".into()),
            stride: 40,
            random: 1,
            ..Options::default()
        };
        let (mut ran, mut without) = (0, Vec::new());
        for entry in qwen3next_verify::cases::all().into_iter().filter(|e| e.op != "model") {
            let rows = entry.run(&options).unwrap();
            if rows.iter().all(|r| matches!(r.verdict, Verdict::Skipped(_))) {
                without.push(entry.op);
                continue;
            }
            assert_passed(&rows);
            ran += rows.iter().map(|r| r.passed).sum::<usize>();
        }
        assert!(ran > 80, "{ran} cases");
        assert_eq!(without, ["quantize", "repack"], "operators without a kernel");
    }
}

/// The model's own checks with all layers on a device, and the golden logits with layers and experts on either side.
#[test]
fn models_run_on_a_device() {
    use qwen3next_model::offload::Placement;
    use qwen3next_model::{Batch, Model, Weights};
    use qwen3next_verify::suite::{assert_passed, Options};
    for device in devices() {
        let device: &'static Device = Box::leak(Box::new(device));
        let options = Options { device: Some(device), stride: 3, ..Options::default() };
        let model = qwen3next_verify::cases::all().into_iter().find(|e| e.op == "model").unwrap();
        assert_passed(&model.run(&options).unwrap());

        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/models/ratio3");
        let open = || {
            let loaded = Weights::load(folder.as_ref(), &mut |_| ()).unwrap();
            Model::new(loaded.config, loaded.weights)
        };
        let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 50).collect();
        let logits = |model: &Model| {
            let mut state = model.state(1, 64, Default::default()).unwrap();
            model.forward(&mut state, &Batch::one(0, &tokens).logits_from(0), &Default::default()).unwrap()
        };
        let expected = logits(&open());
        for (layers, cpu_experts) in [(0, 0), (1, 0), (2, 3), (usize::MAX, 2), (usize::MAX, usize::MAX)] {
            let mut model = open();
            let placement = Placement { layers, cpu_experts, ..Placement::ALL };
            model.offload(device, placement, &mut |_, _| ()).unwrap();
            assert_near(&logits(&model), &expected);
        }
    }
}

/// Models with their experts in the CPU's memory: the embedded one, and files.
mod experts_on_the_cpu {
    use super::*;
    use qwen3next_model::forward::{Activations, Options};
    use qwen3next_model::offload::Placement;
    use qwen3next_model::streaming::{Streaming, When};
    use qwen3next_model::synth::{synth, Synth};
    use qwen3next_model::{Batch, CacheTypes, Loaded, Model};
    use qwen3next_verify::memory::{Plan, Sizes, Use};

    fn golden(name: &str) -> Loaded {
        let folder = format!("{}/golden/models/{name}", env!("CARGO_MANIFEST_DIR"));
        qwen3next_model::load(folder.as_ref(), Default::default(), &mut |_| ()).unwrap()
    }

    /// Layers of a few MB, experts and all.
    fn tiny(layers: usize) -> Loaded {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        synth(&path, &Synth { layers, tiny: true, ..Default::default() }, &mut |_| ()).unwrap();
        let read = qwen3next_model::file::Options { mmap: false };
        qwen3next_model::load(&path, read, &mut |_| ()).unwrap()
    }

    fn model(loaded: Loaded, device: &Device, placement: Placement) -> Model {
        let mut model = Model::new(loaded.config, loaded.weights);
        model.offload(device, placement, &mut |_, _| ()).unwrap();
        model
    }

    fn placed(cpu_experts: usize, when: When, only_active: bool) -> Placement {
        Placement { cpu_experts, streaming: Streaming { when, only_active }, ..Placement::ALL }
    }

    fn logits(model: &Model, tokens: usize, options: &Options) -> Vec<f32> {
        let mut state = model.state(1, 64, Default::default()).unwrap();
        let vocab = model.config().vocab as u32;
        let tokens: Vec<u32> = (0..tokens as u32).map(|i| i * 7 % vocab).collect();
        model.forward(&mut state, &Batch::one(0, &tokens).logits_from(0), options).unwrap()
    }

    /// Copied to the device they are computed as if they lay there, bit for bit; the CPU's results are near.
    #[test]
    fn streamed_or_not_they_give_the_same() {
        for device in devices() {
            for (open, activations) in [
                (&(|| golden("ratio3")) as &dyn Fn() -> Loaded, Activations::F32),
                (&|| golden("dense_mix"), Activations::F32),
                (&|| qwen3next_model::embedded::load().unwrap(), Activations::Q8),
            ] {
                let options = Options { ubatch: 7, activations, ..Options::default() };
                let run = |placement| logits(&model(open(), &device, placement), 12, &options);
                let there = run(Placement::ALL);
                for only_active in [true, false] {
                    assert_eq!(run(placed(usize::MAX, When::Always, only_active)), there);
                }
                assert_near_quantised(&run(placed(usize::MAX, When::Never, true)), &there, activations);
                assert_near_quantised(&run(placed(1, When::Auto, true)), &there, activations);
                let mut model = model(open(), &device, placed(usize::MAX, When::Always, true));
                model.repack(&mut |_, _| ());
                assert_eq!(logits(&model, 12, &options), there);
            }
        }
    }

    /// Where 8-bit activations differ by a rounding, results do by more.
    fn assert_near_quantised(got: &[f32], expected: &[f32], activations: Activations) {
        match activations {
            Activations::F32 => assert_near(got, expected),
            Activations::Q8 => {
                let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 0.02 * largest));
            }
        }
    }

    /// What is told before anything is copied: the part, and what would fit.
    #[cfg(feature = "cuda-host")]
    #[test]
    fn too_little_memory_is_told_before_the_upload() {
        let offload = |device: &Device, placement| {
            let loaded = tiny(8);
            let mut model = Model::new(loaded.config, loaded.weights);
            model.offload(device, placement, &mut |_, _| ()).map(|()| model)
        };
        let weights = |n| {
            let device = Device::executor();
            let _model = offload(&device, placed(n, When::Never, true)).unwrap();
            device.allocated()
        };
        let experts = weights(2) - weights(3);
        assert_eq!(weights(0) - weights(2), 2 * experts);
        let device = Device::executor_with(weights(3) + experts / 2);
        for n in [0, 2] {
            let why = offload(&device, placed(n, When::Never, true)).err().unwrap().to_string();
            assert!(why.starts_with("device: no room for the ") && why.contains(" of layer "), "{why}");
            assert!(why.contains("--n-cpu-moe 3 is the smallest that fits"), "{why}");
            assert_eq!(device.allocated(), 0);
        }
        let model = offload(&device, placed(3, When::Never, true)).unwrap();
        let why = model.state(1, 64, CacheTypes::default()).unwrap_err().to_string();
        assert!(why.starts_with("context: states and caches of 1 x 64 tokens take "), "{why}");
        assert!(why.contains("--n-cpu-moe 4 is the smallest that makes room"), "{why}");
        drop(model);
        assert_eq!(device.allocated(), 0);

        let device = Device::executor_with(weights(8) / 2);
        let why = offload(&device, placed(0, When::Never, true)).err().unwrap().to_string();
        assert!(why.contains("do not fit with all experts on the CPU either, -ngl "), "{why}");

        // States fit, and then nothing is left.
        let device = Device::executor();
        let state = {
            let model = offload(&device, placed(8, When::Never, true)).unwrap();
            let _state = model.state(1, 64, CacheTypes::default()).unwrap();
            device.allocated()
        };
        let model = offload(&Device::executor_with(state + 50_000), placed(8, When::Never, true)).unwrap();
        let mut state = model.state(1, 64, CacheTypes::default()).unwrap();
        let why = model.forward(&mut state, &Batch::one(0, &[1; 40]), &Options::default()).unwrap_err().to_string();
        assert!(why.starts_with("ubatch: working memory of 40 tokens: out of memory: "), "{why}");
    }

    /// The parts of a plan are the bytes of the buffers that live after a prompt and a token.
    #[cfg(feature = "cuda-host")]
    #[test]
    fn a_plan_is_what_is_allocated() {
        let within = |got: u64, plan: u64, what: &str| {
            assert!(got.abs_diff(plan) as f64 <= 0.03 * got as f64, "{what}: {got} bytes, planned {plan}");
        };
        let stream = |when, only_active| Streaming { when, only_active };
        let auto = Streaming::DEFAULT;
        let cases = [
            // Layers, experts on the CPU, how, ubatch, context, tokens, quantised, f16 cache, all logits.
            (usize::MAX, 0, auto, 16, 64, 20, true, false, false),
            (usize::MAX, 0, auto, 9, 700, 12, false, true, true),
            (usize::MAX, usize::MAX, auto, 16, 64, 20, true, false, false),
            (usize::MAX, usize::MAX, stream(When::Always, true), 2, 300, 6, true, true, false),
            (usize::MAX, 2, stream(When::Always, false), 16, 64, 20, true, false, true),
            (2, 0, auto, 12, 128, 14, true, false, false),
            (3, usize::MAX, auto, 12, 128, 14, false, false, false),
        ];
        for (name, open) in [
            ("tiny", &(|| tiny(4)) as &dyn Fn() -> Loaded),
            ("embedded", &|| qwen3next_model::embedded::load().unwrap()),
        ] {
            for (layers, cpu_experts, streaming, ubatch, context, tokens, quantize, half, all) in cases {
                let loaded = open();
                let (sizes, config) = (Sizes::of(&loaded.weights, &loaded.config), loaded.config.clone());
                let kind = if half { DType::F16 } else { DType::F32 };
                let cache = CacheTypes { k: kind, v: kind };
                let logits = if all { ubatch } else { 1 };
                let of = Use { context, ubatch, cache, reserve: 0, gpu_layers: layers, streaming, quantize, logits };
                let plan = Plan::new(&sizes, &config, &of, cpu_experts).unwrap();
                let part = |names: &[&str]| -> u64 {
                    plan.parts.iter().filter(|p| names.contains(&p.name)).map(|p| p.gpu).sum()
                };
                let case = format!("{name}, {of:?}, {cpu_experts} experts' layers on the CPU");

                let device = Device::executor();
                let model = model(loaded, &device, Placement { layers, cpu_experts, streaming });
                let weights = part(&[
                    "output projection",
                    "attention",
                    "DeltaNet",
                    "routers, shared experts, dense",
                    "routed experts",
                ]);
                assert_eq!(device.allocated(), weights, "{case}: weights");
                let mut state = model.state(1, context, cache).unwrap();
                // A few words of the working memory are there at once.
                within(device.allocated() - weights, part(&["KV cache", "recurrent state"]) + 24, &case);

                let activations = if quantize { Activations::Q8 } else { Activations::F32 };
                let options = Options { ubatch, activations, ..Options::default() };
                let prompt: Vec<u32> = (0..tokens).map(|i| i * 5 % 300).collect();
                let batch = Batch::one(0, &prompt).logits_from(if all { 0 } else { prompt.len() - 1 });
                let before = device.allocated();
                model.forward(&mut state, &batch, &options).unwrap();
                model.forward(&mut state, &Batch::one(0, &[1]), &options).unwrap();
                let working =
                    ["activations of a ubatch", "logits", "scratch of kernels", "experts copied for a ubatch"];
                within(device.allocated() - before, part(&working), &format!("{case}: working memory"));
                within(device.allocated(), plan.gpu(), &case);
            }
        }
    }

    #[test]
    fn repeated_layers_have_their_own_memory() {
        for device in devices() {
            let before = device.allocated();
            let once = model(tiny(4), &device, placed(usize::MAX, When::Never, true));
            let own = device.allocated() - before;
            let mut loaded = tiny(4);
            let output = Sizes::of(&loaded.weights, &loaded.config).output;
            loaded.repeat_layers(12).unwrap();
            let thrice = model(loaded, &device, placed(usize::MAX, When::Never, true));
            assert_eq!(device.allocated() - before - own, 3 * own - 2 * output);
            let run = |model: &Model| logits(model, 2, &Options::default());
            assert_eq!(run(&thrice).len(), run(&once).len());
            assert_ne!(run(&thrice), run(&once));
        }
    }
}

#[test]
fn a_copy_lands_while_more_is_queued() -> Result<(), Error> {
    use qwen3next_kernels::device::Landing;
    for device in devices() {
        let (stream, x) = (device.stream()?, fill(100, 50));
        let (mut y, mut landing) = (device.upload(&x)?, Landing::on(&device)?);
        assert_eq!(landing.wait()?, &[] as &[f32]);
        for count in [40, 100, 0, 7] {
            stream.land(&y, count, &mut landing)?;
            layer::add::queue(
                layer::add::Args { y: y.view_mut([1, 100])?, x: device.zeros(100)?.view([1, 100])? },
                &stream,
            )?;
            assert_eq!(landing.wait()?, &x[..count]);
        }
        assert!(stream.land(&y, 101, &mut landing).unwrap_err().to_string().contains("count"));
    }
    Ok(())
}

/// Bytes of live buffers, and of one that grew only the new ones.
#[test]
fn buffers_are_counted() -> Result<(), Error> {
    for device in devices() {
        let before = device.allocated();
        let (mut x, y) = (device.zeros::<f32>(10)?, device.upload(&[1u8; 3])?);
        assert_eq!(device.clone().allocated() - before, 43);
        x.reserve(20)?;
        assert_eq!(device.allocated() - before, 83);
        drop((x, y));
        assert_eq!(device.allocated(), before);
        assert!(device.free_memory()? > 0);
    }
    #[cfg(feature = "cuda-host")]
    {
        let device = Device::executor_with(100);
        let x = device.zeros::<f32>(20)?;
        assert_eq!((device.allocated(), device.free_memory()?), (80, 20));
        assert!(device.zeros::<u8>(21).unwrap_err().to_string().contains("out of memory: 21 bytes, 20 are free"));
        drop(x);
        assert_eq!(device.zeros::<u8>(100)?.len(), 100);
    }
    Ok(())
}

/// What benches of a device do: one copy of the arguments, as many launches as asked for, and the outputs come back.
#[test]
fn staged_launches_are_timed() -> Result<(), Error> {
    use qwen3next_kernels::device::Times;
    use qwen3next_kernels::Variant;
    let (x, shape) = (fill(3 * 40, 1), [3, 1, 40]);
    let run = |exec: &Exec<norm::Op>| -> Result<Vec<f32>, Error> {
        let mut y = vec![f32::NAN; 3 * 40];
        let args = norm::Args {
            y: ViewMut::new(&mut y, shape)?,
            x: Some(View::new(&x, shape)?),
            kind: norm::Kind::L2,
            eps: 1e-6,
        };
        norm::run(args, exec)?;
        Ok(y)
    };
    let expected = run(&Exec::default())?;
    for device in devices() {
        let device: &'static Device = Box::leak(Box::new(device));
        for cold in [true, false] {
            let times: &'static Times = Box::leak(Box::new(Times::new(4, cold)));
            for variant in Variant::staged_timed(device, times) {
                assert_near(&run(&Exec::variant(variant))?, &expected);
                let taken = times.take();
                assert_eq!(taken.len(), 4, "{taken:?}");
                assert!(taken.iter().all(|&ns| ns > 0.0 && ns < 1e9), "{taken:?}");
                assert!(times.take().is_empty());
            }
        }
        for variant in Variant::staged(device) {
            assert_near(&run(&Exec::variant(variant))?, &expected);
        }
        let limits = device.limits()?;
        assert!(limits.copy > 1e7 && limits.copy < 1e14, "{limits:?}");
        assert!(!device.driver()?.is_empty());
    }
    Ok(())
}

#[test]
fn a_layer_between_its_operators() -> Result<(), Error> {
    use layer::{add, delta_gates, gather, kv_store, row_gate};
    let (n, ids, slot, pos, cu) = (64, [3i64, 0, 3], [1i64, 0], [4i64, 0, 2], [0i64, 1, 3]);
    let (floats, other, gate) = (fill(4 * n, 40), fill(3 * n, 41), fill(n, 42));
    let table = quant::to_bytes(DType::Q4_1, View::new(&floats, [4, n])?)?;
    let shape_x = [3, n];

    let mut x = vec![0.0; 3 * n];
    let weight = Weight::new(&table, DType::Q4_1, [4, n])?;
    let args = gather::Args { y: ViewMut::new(&mut x, shape_x)?, table: weight, ids: &ids };
    gather::run(args, &Exec::default())?;
    let args = add::Args { y: ViewMut::new(&mut x, shape_x)?, x: View::new(&other, shape_x)? };
    add::run(args, &Exec::default())?;
    // Two rows of the sum, by the same operator.
    let mut picked = vec![0.0; 2 * n];
    let args =
        gather::Args { y: ViewMut::new(&mut picked, [2, n])?, table: View::new(&x, shape_x)?.into(), ids: &[2, 1] };
    gather::run(args, &Exec::default())?;
    let mut cache = vec![[0u8; 34]; 2 * 5 * n / 32];
    let args = kv_store::Args {
        cache: kv_store::Cache::Q8_0(ViewMut::new(&mut cache, [2, 5, n / 32])?),
        x: View::new(&x, shape_x)?,
        slot: &slot,
        pos: &pos,
        cu_seqlens: &cu,
    };
    kv_store::run(args, &Exec::default())?;
    let (mut g, mut beta, mut share) = (vec![0.0; 3 * n / 2], vec![0.0; 3 * n / 2], vec![0.0; 3]);
    let args = delta_gates::Args {
        g: ViewMut::new(&mut g, [3, n / 2])?,
        beta: ViewMut::new(&mut beta, [3, n / 2])?,
        ba: View::new(&x, shape_x)?,
        a: gate[..n / 2].into(),
        dt_bias: gate[n / 2..].into(),
        k_heads: n / 4,
    };
    delta_gates::run(args, &Exec::default())?;
    let y = ViewMut::new(&mut share, [3])?;
    let args = row_gate::Args { y, x: View::new(&x, shape_x)?, w: gate[..].into() };
    row_gate::run(args, &Exec::default())?;

    for device in devices() {
        let stream = device.stream()?;
        let (table, other, gates) = (device.upload(&table)?, device.upload(&other)?, device.upload(&gate)?);
        let halves = [device.upload(&gate[..n / 2])?, device.upload(&gate[n / 2..])?];
        let (mut on_x, on_ids) = (device.zeros(3 * n)?, device.indices(&ids)?);
        let weight = table.weight(DType::Q4_1, [4, n])?;
        gather::queue(gather::Args { y: on_x.view_mut(shape_x)?, table: weight, ids: &on_ids }, &stream)?;
        add::queue(add::Args { y: on_x.view_mut(shape_x)?, x: other.view(shape_x)? }, &stream)?;
        assert_eq!(on_x.download()?, x);

        let (mut on_picked, two) = (device.zeros(2 * n)?, device.indices(&[2, 1])?);
        let rows = on_x.view(shape_x)?.into();
        gather::queue(gather::Args { y: on_picked.view_mut([2, n])?, table: rows, ids: &two }, &stream)?;
        assert_eq!(on_picked.download()?, picked);
        let outside = device.indices(&[2, 3])?;
        let args = gather::Args { y: on_picked.view_mut([2, n])?, table: on_x.view(shape_x)?.into(), ids: &outside };
        assert!(gather::queue(args, &stream).unwrap_err().to_string().contains("ids"));

        let mut on_cache = device.upload(&vec![[0u8; 34]; cache.len()])?;
        let (slot, pos, cu) = (device.indices(&slot)?, device.indices(&pos)?, device.indices(&cu)?);
        let args = kv_store::Args {
            cache: kv_store::Cache::Q8_0(on_cache.view_mut([2, 5, n / 32])?),
            x: on_x.view(shape_x)?,
            slot: &slot,
            pos: &pos,
            cu_seqlens: &cu,
        };
        kv_store::queue(args, &stream)?;
        assert_eq!(on_cache.download()?, cache);

        let (mut on_g, mut on_beta, mut on_share) = (device.zeros(g.len())?, device.zeros(g.len())?, device.zeros(3)?);
        let args = delta_gates::Args {
            g: on_g.view_mut([3, n / 2])?,
            beta: on_beta.view_mut([3, n / 2])?,
            ba: on_x.view(shape_x)?,
            a: halves[0].view([n / 2])?,
            dt_bias: halves[1].view([n / 2])?,
            k_heads: n / 4,
        };
        delta_gates::queue(args, &stream)?;
        assert_near(&on_g.download()?, &g);
        assert_near(&on_beta.download()?, &beta);
        let args = row_gate::Args { y: on_share.view_mut([3])?, x: on_x.view(shape_x)?, w: gates.view([n])? };
        row_gate::queue(args, &stream)?;
        assert_near(&on_share.download()?, &share);
    }
    Ok(())
}

/// y = the rotated norms of x, from buffers whose contents change.
struct Step {
    x: Buffer<f32>,
    y: Buffer<f32>,
    pos: Indices,
}

impl Step {
    const SHAPE: [usize; 3] = [3, 2, 32];

    fn on(device: &Device) -> Result<Step, Error> {
        let n = Step::SHAPE.iter().product();
        Ok(Step { x: device.zeros(n)?, y: device.zeros(n)?, pos: device.indices(&[0; 3])? })
    }

    fn write(&mut self, i: u64) -> Result<(), Error> {
        self.x.write(&fill(self.x.len(), i))?;
        self.pos.replace(&[i as i64, 3, 7 * i as i64])
    }

    fn queue(&mut self, stream: &Stream) -> Result<(), Error> {
        let (y, x) = (self.y.view_mut(Step::SHAPE)?, Some(self.x.view(Step::SHAPE)?));
        norm::queue(norm::Args { y, x, kind: norm::Kind::L2, eps: 1e-6 }, stream)?;
        let y = self.y.view_mut(Step::SHAPE)?;
        rope::queue(rope::Args { y, x: None, pos: &self.pos, base: 1e4, rotary: 32 }, stream)
    }

    /// What `queue` makes of `write(i)`, on buffers of its own.
    fn expected(device: &Device, i: u64) -> Result<Vec<f32>, Error> {
        let (mut step, stream) = (Step::on(device)?, device.stream()?);
        step.write(i)?;
        step.queue(&stream)?;
        step.y.download()
    }
}

#[test]
fn graphs_repeat_with_new_contents() -> Result<(), Error> {
    for device in devices() {
        let (mut step, stream, mut graph) = (Step::on(&device)?, device.stream()?, Graph::default());
        for i in 0..6 {
            step.write(i)?;
            stream.repeat(&mut graph, || step.queue(&stream))?;
            assert_eq!(step.y.download()?, Step::expected(&device, i)?);
            assert_eq!(graph.launches(), i, "after {i}");
        }
        // Within another: a part of that one.
        let (mut inner, mut outer) = (Graph::default(), Graph::default());
        for i in 0..3 {
            step.write(i)?;
            stream.repeat(&mut outer, || stream.repeat(&mut inner, || step.queue(&stream)))?;
            assert_eq!(step.y.download()?, Step::expected(&device, i)?);
        }
        assert_eq!((inner.launches(), outer.launches()), (0, 2));
        // Checks see what the indices are now.
        step.pos.replace(&[0, -1, 0])?;
        let refused = stream.repeat(&mut graph, || step.queue(&stream)).unwrap_err();
        assert!(refused.to_string().contains("pos"), "{refused}");
        // Nothing at all is no launch.
        let mut nothing = Graph::default();
        (0..3).try_for_each(|_| stream.repeat(&mut nothing, || Ok::<(), Error>(())))?;
        assert_eq!(nothing.launches(), 0);
    }
    Ok(())
}

/// Other addresses, scratch that grew, another stream or other calls: no launch of the old graph, and the right values.
#[test]
fn graphs_of_what_has_moved_are_not_launched() -> Result<(), Error> {
    for device in devices() {
        let (mut step, stream, mut graph) = (Step::on(&device)?, device.stream()?, Graph::default());
        let mut run = |step: &mut Step, stream: &Stream, i: u64| -> Result<u64, Error> {
            step.write(i)?;
            let before = graph.launches();
            stream.repeat(&mut graph, || step.queue(stream))?;
            assert_eq!(step.y.download()?, Step::expected(&device, i)?);
            Ok(graph.launches() - before)
        };
        let launched = |runs: &[u64]| runs.iter().sum::<u64>();
        assert_eq!(launched(&[run(&mut step, &stream, 1)?, run(&mut step, &stream, 2)?]), 1);
        let mut other = Step::on(&device)?;
        assert_eq!(launched(&[run(&mut other, &stream, 3)?, run(&mut other, &stream, 4)?]), 1);
        assert_eq!(launched(&[run(&mut step, &stream, 5)?, run(&mut step, &stream, 6)?]), 1);

        // Grouping of that many experts takes scratch, which moves.
        let (t, e) = (64, 2048);
        let (logits, mut bad) = (device.upload(&fill(t * e, 7))?, device.upload(&[i64::MAX])?);
        moe::Routing::on(&device)?.queue_route(logits.view([t, e])?, 8, true, bad.view_mut([1])?, &stream)?;
        assert_eq!(launched(&[run(&mut step, &stream, 8)?, run(&mut step, &stream, 9)?]), 1);
        // Scratch of a stream is its own.
        let second = device.stream()?;
        assert_eq!(launched(&[run(&mut step, &second, 10)?, run(&mut step, &second, 11)?]), 1);
        assert_eq!(run(&mut step, &second, 12)?, 1);
    }
    Ok(())
}

/// Copies and frees within the work, by any thread, find all that was queued before them done.
#[test]
fn work_that_is_held_back_is_not_seen_to_be() -> Result<(), Error> {
    for device in devices() {
        let (mut step, stream, mut graph) = (Step::on(&device)?, device.stream()?, Graph::default());
        for i in 0..4 {
            let y = stream.repeat(&mut graph, || {
                step.write(i)?;
                step.queue(&stream)?;
                let y = step.y.download()?;
                step.write(i + 1)?;
                step.queue(&stream)?;
                Ok::<_, Error>(y)
            })?;
            assert_eq!(y, Step::expected(&device, i)?);
            assert_eq!(step.y.download()?, Step::expected(&device, i + 1)?);
        }
        assert_eq!(graph.launches(), 0);

        let n = Step::SHAPE.iter().product::<usize>();
        for elsewhere in [false, true] {
            for i in 0..4 {
                let mut x = device.upload(&fill(n, i))?;
                stream.repeat(&mut graph, || {
                    let (y, x_view) = (step.y.view_mut(Step::SHAPE)?, Some(x.view(Step::SHAPE)?));
                    norm::queue(norm::Args { y, x: x_view, kind: norm::Kind::L2, eps: 1e-6 }, &stream)?;
                    let free = move || x.write(&vec![0.0; n]).map(|()| drop(x));
                    match elsewhere {
                        true => std::thread::spawn(free).join().unwrap()?,
                        false => free()?,
                    }
                    // Where x was, or not: nobody reads it any more.
                    device.zeros::<f32>(n)?;
                    Ok::<_, Error>(())
                })?;
                let (x, mut y) = (device.upload(&fill(n, i))?, device.zeros::<f32>(n)?);
                let (y_view, x) = (y.view_mut(Step::SHAPE)?, Some(x.view(Step::SHAPE)?));
                norm::queue(norm::Args { y: y_view, x, kind: norm::Kind::L2, eps: 1e-6 }, &stream)?;
                assert_eq!(step.y.download()?, y.download()?);
            }
        }
    }
    Ok(())
}

/// Work that fails or panics halfway: what it had queued is done, and the stream goes on.
#[test]
fn work_that_fails_leaves_the_stream_usable() -> Result<(), Error> {
    for device in devices() {
        let (mut step, stream, mut graph) = (Step::on(&device)?, device.stream()?, Graph::default());
        for i in 0..4 {
            step.write(i)?;
            let failed = stream.repeat(&mut graph, || {
                step.queue(&stream)?;
                step.y.view([usize::MAX]).map(|_| ())
            });
            assert!(failed.is_err());
            assert_eq!(step.y.download()?, Step::expected(&device, i)?);
        }
        step.write(5)?;
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            stream.repeat(&mut graph, || -> Result<(), Error> {
                step.queue(&stream)?;
                panic!("as asked for")
            })
        }));
        assert!(panicked.is_err());
        assert_eq!(step.y.download()?, Step::expected(&device, 5)?);
        assert_eq!(graph.launches(), 0);
        for i in 6..9 {
            step.write(i)?;
            stream.repeat(&mut graph, || step.queue(&stream))?;
            assert_eq!(step.y.download()?, Step::expected(&device, i)?);
        }
        assert!(graph.launches() >= 2);
    }
    Ok(())
}

#[test]
fn indices_are_replaced_together() -> Result<(), Error> {
    for device in devices() {
        let (stream, x) = (device.stream()?, fill(3 * 2 * 32, 4));
        let rotated = |pos: &Indices| -> Result<Vec<f32>, Error> {
            let mut y = device.upload(&x)?;
            rope::queue(rope::Args { y: y.view_mut(Step::SHAPE)?, x: None, pos, base: 1e4, rotary: 16 }, &stream)?;
            y.download()
        };
        let (mut a, mut b, mut c) = (device.indices(&[])?, device.indices(&[9, 9])?, device.indices(&[])?);
        for i in 0..3 {
            let values = [vec![i, 2, 5], vec![8; 40 * i as usize], vec![7, i, 1]];
            Indices::replace_all([&mut a, &mut b, &mut c], [&values[0], &values[1], &values[2]])?;
            assert_eq!(rotated(&a)?, rotated(&device.indices(&values[0])?)?);
            assert_eq!(rotated(&c)?, rotated(&device.indices(&values[2])?)?);
        }
        // One that leaves the others.
        a.replace(&[4, 4, 4])?;
        assert_eq!(rotated(&a)?, rotated(&device.indices(&[4, 4, 4])?)?);
        assert_eq!(rotated(&c)?, rotated(&device.indices(&[7, 2, 1])?)?);
        assert!(rotated(&b).unwrap_err().to_string().contains("pos"));
    }
    Ok(())
}

/// Logits of decode steps of all kinds, and how many of the steps were graphs.
fn decode(
    model: &qwen3next_model::Model,
    options: &qwen3next_model::forward::Options,
    graphs: bool,
) -> Result<(Vec<f32>, u64), qwen3next_model::Error> {
    use qwen3next_model::Batch;
    let mut states = [0, 1].map(|_| model.state(3, 96, Default::default()).unwrap());
    states.iter_mut().for_each(|state| state.use_graphs(graphs));
    let token = |i: u32| [i * 7 % 50];
    let mut all = Vec::new();
    // Two states in turn.
    for i in 0..24 {
        let state = &mut states[(i % 2) as usize];
        all.extend(model.forward(state, &Batch::one(0, &token(i)), options)?);
    }
    let [state, _] = &mut states;
    // Two sequences, and three of unlike lengths.
    for i in 0..8 {
        all.extend(model.forward(state, &Batch::one(2, &token(i)).and(0, &token(i + 1)), options)?);
    }
    for i in 0..4 {
        let (a, b, c) = (token(i), [token(i)[0], 3, 4], token(i + 2));
        let batch = Batch::one(0, &a).and(1, &b).and(2, &c);
        all.extend(model.forward(state, &batch.logits_from(1), options)?);
    }
    // A long one in between, which moves what it outgrows, and one that wants no logits.
    let long: Vec<u32> = (0..70).map(|i| i * 3 % 50).collect();
    state.clear(1)?;
    for i in 0..3 {
        all.extend(model.forward(state, &Batch::one(0, &token(i)), options)?);
    }
    all.extend(model.forward(state, &Batch::one(1, &long).logits_from(60), options)?);
    for i in 0..4 {
        model.forward(state, &Batch::one(1, &token(i)).logits_from(1), options)?;
        all.extend(model.forward(state, &Batch::one(1, &token(i)), options)?);
    }
    // Back to what a slot was, by a copy and by its history.
    let kept = state.snapshot(1)?;
    all.extend(model.forward(state, &Batch::one(1, &token(9)), options)?);
    state.restore(1, &kept)?;
    all.extend(model.forward(state, &Batch::one(1, &token(8)), options)?);
    state.keep_history(2);
    for i in 0..3 {
        all.extend(model.forward(state, &Batch::one(1, &token(i)), options)?);
    }
    state.rollback(1, 2)?;
    state.keep_history(0);
    for i in 0..3 {
        all.extend(model.forward(state, &Batch::one(1, &token(i)), options)?);
    }
    let launches = states.iter().map(|state| state.graph_launches()).sum();
    Ok((all, launches))
}

#[test]
fn decode_steps_in_graphs_have_the_same_bits() {
    use qwen3next_model::forward::{Activations, Options};
    use qwen3next_model::offload::Placement;
    use qwen3next_model::{Model, Weights};
    for device in devices() {
        for (name, activations) in [("ratio3", Activations::F32), ("dense_mix", Activations::Q8)] {
            let folder = format!("{}/golden/models/{name}", env!("CARGO_MANIFEST_DIR"));
            let options = Options { activations, ..Options::default() };
            let on_device = |placement| {
                let loaded = Weights::load(folder.as_ref(), &mut |_| ()).unwrap();
                let mut model = Model::new(loaded.config, loaded.weights);
                model.offload(&device, placement, &mut |_, _| ()).unwrap();
                model
            };
            let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let model = on_device(Placement::ALL);
            let (expected, none) = decode(&model, &options, false).unwrap();
            assert_eq!(none, 0);
            let (logits, launches) = decode(&model, &options, true).unwrap();
            assert!(launches > 30, "{name}: {launches} launches");
            assert_eq!(bits(&logits), bits(&expected), "{name}");
            assert!(logits.iter().all(|x| x.is_finite()));

            // The output matrix, or the experts of a layer, on the CPU.
            for (placement, some) in [
                (Placement { layers: 2, ..Placement::ALL }, true),
                (Placement { cpu_experts: usize::MAX, ..Placement::ALL }, false),
            ] {
                let model = on_device(placement);
                let (expected, _) = decode(&model, &options, false).unwrap();
                let (logits, launches) = decode(&model, &options, true).unwrap();
                assert_eq!((bits(&logits), launches > 30), (bits(&expected), some), "{name} {placement:?}");
            }
        }
    }
}
