//! The operators beside the same formulas in candle's own arithmetic, in f64.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor, D};
use qwen3next_candle::{Attention, CausalConv, Experts, GatedDelta, Moe};
use qwen3next_kernels::gated_delta::HeadMap;
use std::sync::Arc;

/// Standard normal, from a seed of its own.
fn normal(seed: u64, shape: &[usize]) -> Tensor {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| ((-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32)
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn f64(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F64).unwrap()
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

/// Worst relative L2 error of a row.
fn error(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.dims(), theirs.dims());
    let off = (f64(ours) - theirs).unwrap().sqr().unwrap().sum(D::Minus1).unwrap();
    let size = theirs.sqr().unwrap().sum(D::Minus1).unwrap();
    let worst = (off / size).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    worst.into_iter().fold(0.0, |a: f64, b| if b.is_nan() { b } else { a.max(b) }).sqrt()
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

const EPS: f32 = 1e-6;

/// q, k, v and the rest of a call.
fn delta(hk: usize, hv: usize) -> (Tensor, Tensor, Tensor, GatedDelta) {
    let (b, t, kd, vd) = (2, 21, 32, 24);
    let (q, k, v) = (normal(5, &[b, t, hk, kd]), normal(6, &[b, t, hk, kd]), normal(7, &[b, t, hv, vd]));
    let op = GatedDelta {
        g: Some(normal(2, &[b, t, hv]).abs().unwrap().neg().unwrap()),
        beta: sigmoid(&normal(3, &[b, t, hv])).unwrap(),
        state: Some(normal(4, &[b, hv, vd, kd])),
        head_map: HeadMap::Grouped,
        qk_l2norm: Some(EPS),
        scale: (kd as f32).powf(-0.5),
    };
    (q, k, v, op)
}

/// The formula of gated_delta.h, one token after the other.
fn delta_in_candle(q: &Tensor, k: &Tensor, v: &Tensor, op: &GatedDelta) -> Result<(Tensor, Tensor)> {
    let (_, t, hv, _) = v.dims4()?;
    let hk = q.dim(2)?;
    let heads = Tensor::from_vec((0..hv).map(|h| (h / (hv / hk)) as u32).collect(), hv, &Device::Cpu)?;
    let unit = |x: &Tensor| {
        let x = f64(x).index_select(&heads, 2)?;
        x.broadcast_mul(&(x.sqr()?.sum_keepdim(D::Minus1)? + f64::from(EPS))?.sqrt()?.recip()?)
    };
    let (q, k, v) = ((unit(q)? * f64::from(op.scale))?, unit(k)?, f64(v));
    let (decay, beta) = (f64(op.g.as_ref().unwrap()).exp()?, f64(&op.beta));
    let mut s = f64(op.state.as_ref().unwrap());
    let mut outputs = Vec::new();
    for i in 0..t {
        let at = |x: &Tensor| x.narrow(1, i, 1)?.squeeze(1);
        let (q, k, v) = (at(&q)?.unsqueeze(3)?, at(&k)?.unsqueeze(3)?, at(&v)?.unsqueeze(3)?);
        let factor = |x: &Tensor| at(x)?.unsqueeze(2)?.unsqueeze(3);
        s = s.broadcast_mul(&factor(&decay)?)?;
        let u = (v - s.contiguous()?.matmul(&k.contiguous()?)?)?.broadcast_mul(&factor(&beta)?)?;
        s = (s + u.contiguous()?.matmul(&k.transpose(2, 3)?.contiguous()?)?)?;
        outputs.push(s.contiguous()?.matmul(&q.contiguous()?)?.squeeze(3)?);
    }
    Ok((Tensor::stack(&outputs, 1)?, s))
}

#[test]
fn gated_delta_agrees() {
    for (hk, hv) in [(2, 6), (3, 3)] {
        let (q, k, v, op) = delta(hk, hv);
        let (o, s) = op.apply(&q, &k, &v).unwrap();
        let (expected, last) = delta_in_candle(&q, &k, &v, &op).unwrap();
        assert!(error(&o, &expected) < 1e-5, "o: {:e}", error(&o, &expected));
        assert!(error(&s, &last) < 1e-5, "state: {:e}", error(&s, &last));
    }
}

#[test]
fn views_with_gaps_and_any_pool_give_the_same_bits() {
    let (q, k, v, op) = delta(2, 6);
    let dense = op.apply(&q, &k, &v).unwrap();
    // The same values as the middle of a larger tensor.
    let wide = |x: &Tensor| {
        let pad = Tensor::full(f32::NAN, (2, 21, x.dim(2).unwrap(), 8), &Device::Cpu).unwrap();
        Tensor::cat(&[&pad, x, &pad], 3).unwrap().contiguous().unwrap().narrow(3, 8, x.dim(3).unwrap()).unwrap()
    };
    let (gq, gk, gv) = (wide(&q), wide(&k), wide(&v));
    assert!(!gq.is_contiguous());
    for threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let gaps = pool.install(|| op.apply(&gq, &gk, &gv)).unwrap();
        assert_eq!(bits(&dense.0), bits(&gaps.0));
        assert_eq!(bits(&dense.1), bits(&gaps.1));
    }
}

#[test]
fn causal_conv_agrees() {
    let (b, t, c, width) = (2, 9, 37, 4);
    let (x, w, window) = (normal(1, &[b, t, c]), normal(2, &[c, width]), normal(3, &[b, c, width - 1]));
    let bias = normal(4, &[c]);
    let (y, after) = CausalConv { bias: Some(bias.clone()), silu: true }.apply(&x, &w, &window).unwrap();
    let run = || -> Result<(Tensor, Tensor)> {
        let history = Tensor::cat(&[f64(&window), f64(&x).transpose(1, 2)?], 2)?;
        let sum = history.contiguous()?.conv1d(&f64(&w).unsqueeze(1)?, 0, 1, 1, c)?;
        let sum = sum.broadcast_add(&f64(&bias).reshape((1, c, 1))?)?;
        Ok(((&sum * sigmoid(&sum)?)?.transpose(1, 2)?, history.narrow(2, t, width - 1)?))
    };
    let (expected, last) = run().unwrap();
    assert!(error(&y, &expected) < 1e-6, "y: {:e}", error(&y, &expected));
    assert_eq!(error(&after, &last), 0.0);
}

#[test]
fn attention_agrees() {
    let (b, t, s, hq, hkv, d) = (2, 7, 40, 6, 2, 64);
    let (q, k, v) = (normal(1, &[b, t, hq, d]), normal(2, &[b, s, hkv, d]), normal(3, &[b, s, hkv, d]));
    let gate = normal(4, &[b, t, hq, d]);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let (k, v) = (k.to_dtype(dtype).unwrap(), v.to_dtype(dtype).unwrap());
        let op = Attention { causal: true, scale: 0.125, gate: Some(gate.clone()) };
        let o = op.apply(&q, &k, &v).unwrap();
        let run = || -> Result<Tensor> {
            let heads = Tensor::from_vec((0..hq).map(|h| (h / (hq / hkv)) as u32).collect(), hq, &Device::Cpu)?;
            let side = |x: &Tensor| f64(x).index_select(&heads, 2)?.transpose(1, 2)?.contiguous();
            let (k, v, q) = (side(&k)?, side(&v)?, f64(&q).transpose(1, 2)?.contiguous()?);
            let hidden: Vec<f64> =
                (0..t * s).map(|i| if i % s > s - t + i / s { f64::NEG_INFINITY } else { 0.0 }).collect();
            let hidden = Tensor::from_vec(hidden, (1, 1, t, s), &Device::Cpu)?;
            let scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? * 0.125)?.broadcast_add(&hidden)?;
            let p = scores.broadcast_sub(&scores.max_keepdim(3)?)?.exp()?;
            let p = p.broadcast_div(&p.sum_keepdim(3)?)?;
            p.matmul(&v)?.transpose(1, 2)? * sigmoid(&f64(&gate))?
        };
        let worst = error(&o, &run().unwrap());
        assert!(worst < 1e-5, "{dtype:?}: {worst:e}");
    }
}

/// Softmax, the largest, SwiGLU of each, weighted sum: in plain loops over candle tensors.
fn moe_in_candle(x: &Tensor, logits: &Tensor, [gate, up, down]: [&Tensor; 3], top_k: usize) -> Result<Tensor> {
    let mut rows = Vec::new();
    for t in 0..x.dim(0)? {
        let row = f64(&x.narrow(0, t, 1)?.t()?.contiguous()?);
        let p: Vec<f64> = f64(&logits.get(t)?).exp()?.to_vec1()?;
        let mut order: Vec<usize> = (0..p.len()).collect();
        order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
        let sum: f64 = order[..top_k].iter().map(|&e| p[e]).sum();
        let mut y = Tensor::zeros((x.dim(1)?, 1), DType::F64, &Device::Cpu)?;
        for &e in &order[..top_k] {
            let g = gate.get(e)?.matmul(&row)?;
            let h = (&g * sigmoid(&g)?)?.mul(&up.get(e)?.matmul(&row)?)?;
            y = (y + (down.get(e)?.matmul(&h)? * (p[e] / sum))?)?;
        }
        rows.push(y.flatten_all()?);
    }
    Tensor::stack(&rows, 0)
}

#[test]
fn moe_agrees_with_floats_and_blocks() {
    let (t, e, f, d, top_k) = (9, 5, 256, 512, 3);
    let (x, logits) = (normal(1, &[t, d]), normal(2, &[t, e]));
    let weights = [normal(3, &[e, f, d]), normal(4, &[e, f, d]), normal(5, &[e, d, f])];
    let check = |[gate, up, down]: [Experts; 3], judged: [Tensor; 3]| {
        let y = Moe { gate, up, down, top_k, normalize: true }.apply(&x, &logits).unwrap();
        let worst = error(&y, &moe_in_candle(&x, &logits, judged.each_ref(), top_k).unwrap());
        assert!(worst < 1e-5, "{worst:e}");
    };
    check(weights.clone().map(Experts::F32), weights.each_ref().map(f64));
    for dtype in [GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q6K] {
        let blocks = weights.each_ref().map(|w| Arc::new(QTensor::quantize(w, dtype).unwrap()));
        // candle's own decoding is the judge of what the blocks hold.
        let decoded = blocks.each_ref().map(|w| f64(&w.dequantize(&Device::Cpu).unwrap()));
        check(blocks.map(Experts::Quantized), decoded);
    }
}
