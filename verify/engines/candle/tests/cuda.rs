//! The operators on a GPU's tensors beside the same call on the CPU's, and wrong calls. Every line is SKIPPED, and counted,
//! where there is no GPU.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor, D};
use qwen3next_candle::{Attention, CausalConv, Experts, GatedDelta, Moe};
use qwen3next_kernels::gated_delta::HeadMap;
use std::sync::Arc;

/// Values in -1 .. 1, from a seed of its own.
fn fill(seed: u64, shape: &[usize]) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// Worst relative L2 error of a row.
fn assert_near(ours: &Tensor, expected: &Tensor) -> Result<()> {
    let (ours, expected) = (ours.to_device(&Device::Cpu)?.to_dtype(DType::F64)?, expected.to_dtype(DType::F64)?);
    let off = (ours - &expected)?.sqr()?.sum(D::Minus1)?.sqrt()?;
    let worst = (off / expected.sqr()?.sum(D::Minus1)?.sqrt()?)?.flatten_all()?.to_vec1::<f64>()?;
    assert!(worst.iter().all(|&error| error < 1e-5), "row errors {worst:?}");
    Ok(())
}

fn refused<T>(result: Result<T>, text: &str) {
    let Err(error) = result else { panic!("accepted; expected {text:?}") };
    assert!(error.to_string().contains(text), "{error}: expected {text:?}");
}

/// q, k, v with gaps between their rows, and the rest of a call.
fn delta(t: usize, device: &Device) -> Result<(Tensor, Tensor, Tensor, GatedDelta)> {
    let (b, hk, hv, kd, vd) = (2, 2, 6, 32, 24);
    let heads = |seed, h: usize, d: usize| fill(seed, &[b, t, h, d + 16])?.to_device(device)?.narrow(3, 8, d);
    let (q, k, v) = (heads(5, hk, kd)?, heads(6, hk, kd)?, heads(7, hv, vd)?);
    let op = GatedDelta {
        g: Some(fill(2, &[b, t, hv])?.abs()?.neg()?.to_device(device)?),
        beta: fill(3, &[b, t, hv])?.abs()?.to_device(device)?,
        state: Some(fill(4, &[b, hv, vd, kd])?.to_device(device)?),
        head_map: HeadMap::Grouped,
        qk_l2norm: Some(1e-6),
        scale: 0.2,
    };
    Ok((q, k, v, op))
}

fn gated_delta(gpu: &Device) -> Result<()> {
    for t in [1, 70] {
        let run = |device: &Device| {
            let (q, k, v, op) = delta(t, device)?;
            op.apply(&q, &k, &v)
        };
        let ((o, state), (expected, last)) = (run(gpu)?, run(&Device::Cpu)?);
        assert_near(&o, &expected)?;
        assert_near(&state, &last)?;
    }
    Ok(())
}

fn causal_conv(gpu: &Device) -> Result<()> {
    let run = |device: &Device| {
        let at = |seed, shape: &[usize]| fill(seed, shape)?.to_device(device);
        let op = CausalConv { bias: Some(at(4, &[37])?), silu: true };
        op.apply(&at(1, &[2, 90, 37])?, &at(2, &[37, 4])?, &at(3, &[2, 37, 3])?)
    };
    let ((y, after), (expected, last)) = (run(gpu)?, run(&Device::Cpu)?);
    assert_near(&y, &expected)?;
    assert_near(&after, &last)
}

fn attention(gpu: &Device) -> Result<()> {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for t in [1, 7] {
            let run = |device: &Device| {
                let at = |seed, shape: &[usize]| fill(seed, shape)?.to_device(device);
                let kv = |seed| at(seed, &[2, 40, 2, 64])?.to_dtype(dtype);
                let op = Attention { causal: true, scale: 0.125, gate: Some(at(4, &[2, t, 6, 64])?) };
                op.apply(&at(1, &[2, t, 6, 64])?, &kv(2)?, &kv(3)?)
            };
            assert_near(&run(gpu)?, &run(&Device::Cpu)?)?;
        }
    }
    Ok(())
}

fn moe(gpu: &Device) -> Result<()> {
    let (t, e, f, d) = (9, 5, 256, 512);
    let weights = [fill(3, &[e, f, d])?, fill(4, &[e, f, d])?, fill(5, &[e, d, f])?];
    for dtype in [None, Some(GgmlDType::Q8_0), Some(GgmlDType::Q4K), Some(GgmlDType::Q6K)] {
        let run = |device: &Device| {
            let experts = |w: &Tensor| -> Result<Experts> {
                Ok(match dtype {
                    None => Experts::F32(w.to_device(device)?),
                    Some(dtype) => Experts::Quantized(Arc::new(QTensor::quantize(&w.to_device(device)?, dtype)?)),
                })
            };
            let [gate, up, down] = [experts(&weights[0])?, experts(&weights[1])?, experts(&weights[2])?];
            let (x, logits) = (fill(1, &[t, d])?.to_device(device)?, fill(2, &[t, e])?.to_device(device)?);
            Moe { gate, up, down, top_k: 3, normalize: true }.apply(&x, &logits)
        };
        assert_near(&run(gpu)?, &run(&Device::Cpu)?)?;
    }
    Ok(())
}

fn misuse(gpu: &Device) -> Result<()> {
    let (q, k, v, op) = delta(3, gpu)?;
    refused(op.apply(&q, &k.to_device(&Device::Cpu)?, &v), "device");
    let on_cpu = GatedDelta { beta: op.beta.to_device(&Device::Cpu)?, ..op.clone() };
    refused(on_cpu.apply(&q, &k, &v), "beta: does not lie on the GPU");
    let flipped = fill(1, &[2, 3, 32, 2])?.to_device(gpu)?.transpose(2, 3)?;
    refused(op.apply(&flipped, &k, &v), "q: strides");
    refused(op.apply(&q, &k.narrow(1, 0, 2)?, &v), "k: shape");
    refused(op.apply(&q, &k.to_dtype(DType::F16)?, &v), "k: ");
    refused(GatedDelta { qk_l2norm: Some(-1.0), ..op.clone() }.apply(&q, &k, &v), "gated_delta: eps");
    let q3 = fill(1, &[2, 3, 4, 32])?.to_device(gpu)?;
    refused(op.apply(&q3, &q3, &v), "gated_delta: HV");
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, gpu);
    let moe = Moe {
        gate: Experts::F32(zeros(&[2, 4, 8])?),
        up: Experts::F32(zeros(&[2, 4, 8])?),
        down: Experts::F32(zeros(&[2, 8, 4])?.to_device(&Device::Cpu)?),
        top_k: 1,
        normalize: true,
    };
    refused(moe.apply(&zeros(&[3, 8])?, &zeros(&[3, 2])?), "down: does not lie on the GPU");
    refused(Moe { top_k: 3, ..moe }.apply(&zeros(&[3, 8])?, &zeros(&[3, 2])?), "top_k");
    Ok(())
}

fn main() {
    type Check = fn(&Device) -> Result<()>;
    let checks: [(&str, Check); 5] = [
        ("gated_delta", gated_delta),
        ("causal_conv", causal_conv),
        ("attention", attention),
        ("moe", moe),
        ("misuse", misuse),
    ];
    match Device::new_cuda(0) {
        Err(why) => {
            let why = why.to_string();
            let why = why.lines().next().unwrap_or_default();
            checks.iter().for_each(|(name, _)| println!("SKIPPED {name}: {why}"));
            println!("0 checks passed, {} skipped", checks.len());
        }
        Ok(gpu) => {
            for (name, check) in checks {
                check(&gpu).unwrap_or_else(|why| panic!("{name}: {why}"));
                println!("ok {name}");
            }
            println!("{} checks passed, 0 skipped", checks.len());
        }
    }
}
