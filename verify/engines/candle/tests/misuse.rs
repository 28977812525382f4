//! Wrong calls are errors that name the argument, never a panic or a wrong answer.

use candle_core::{DType, Device, Tensor};
use qwen3next_candle::{Attention, CausalConv, Experts, GatedDelta, Moe};
use qwen3next_kernels::ffi;
use qwen3next_kernels::gated_delta::HeadMap;
use std::ffi::CStr;

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

fn refused<T>(result: candle_core::Result<T>, text: &str) {
    let Err(error) = result else { panic!("accepted; expected {text:?}") };
    assert!(error.to_string().contains(text), "{error}: expected {text:?}");
}

fn delta() -> GatedDelta {
    GatedDelta {
        g: None,
        beta: zeros(&[1, 3, 2]),
        state: None,
        head_map: HeadMap::Grouped,
        qk_l2norm: None,
        scale: 1.0,
    }
}

#[test]
fn wrong_tensors_are_named() {
    let (q, v) = (zeros(&[1, 3, 2, 8]), zeros(&[1, 3, 2, 4]));
    assert!(delta().apply(&q, &q, &v).is_ok());
    refused(delta().apply(&zeros(&[1, 3, 8, 2]).transpose(2, 3).unwrap(), &q, &v), "q: strides");
    refused(delta().apply(&q, &zeros(&[1, 4, 2, 8]), &v), "k: shape");
    refused(delta().apply(&q, &q.to_dtype(DType::F64).unwrap(), &v), "k: ");
    refused(GatedDelta { beta: zeros(&[1, 3]), ..delta() }.apply(&q, &q, &v), "beta: 2 axes, expected 3");
    let positive = Tensor::full(0.5f32, (1, 3, 2), &Device::Cpu).unwrap();
    refused(GatedDelta { g: Some(positive), ..delta() }.apply(&q, &q, &v), "g: holds a value above 0");
    let q3 = zeros(&[1, 3, 3, 8]);
    refused(delta().apply(&q3, &q3, &v), "gated_delta: H");

    let conv = CausalConv { bias: Some(zeros(&[5])), silu: true };
    refused(conv.apply(&zeros(&[1, 3, 4]), &zeros(&[4, 4]), &zeros(&[1, 4, 3])), "bias");
    let conv = CausalConv { bias: None, silu: true };
    refused(conv.apply(&zeros(&[1, 3, 4]), &zeros(&[4, 4]), &zeros(&[1, 4, 2])), "state_in: shape");

    let attention = Attention { causal: true, scale: 1.0, gate: None };
    let (q, kv) = (zeros(&[1, 3, 2, 8]), zeros(&[1, 2, 2, 8]));
    refused(attention.apply(&q, &kv, &kv), "attention: kv_len");
    refused(attention.apply(&q, &kv, &kv.to_dtype(DType::F16).unwrap()), "v");

    let moe = Moe {
        gate: Experts::F32(zeros(&[2, 4, 8])),
        up: Experts::F32(zeros(&[2, 4, 8])),
        down: Experts::F32(zeros(&[2, 8, 4])),
        top_k: 1,
        normalize: true,
    };
    assert!(moe.apply(&zeros(&[3, 8]), &zeros(&[3, 2])).is_ok());
    let nan = Tensor::new(&[[0f32, 0.0], [f32::NAN, 0.0], [0.0, 0.0]], &Device::Cpu).unwrap();
    refused(moe.apply(&zeros(&[3, 8]), &nan), "logits of token 1 hold a NaN");
    let gaps = Experts::F32(zeros(&[2, 8, 4]).transpose(1, 2).unwrap());
    refused(Moe { gate: gaps, ..moe.clone() }.apply(&zeros(&[3, 8]), &zeros(&[3, 2])), "gate: is not contiguous");
    refused(Moe { top_k: 3, ..moe }.apply(&zeros(&[3, 8]), &zeros(&[3, 2])), "top_k");
}

/// What tensors cannot get wrong, because outputs and scratch are made for them, at the interface below.
#[test]
fn the_interface_below_refuses_too() {
    let mut x = [0f32; 64];
    let at = x.as_mut_ptr();
    let good = || ffi::q3n_gated_delta_args {
        struct_bytes: size_of::<ffi::q3n_gated_delta_args>() as u64,
        o: at.cast(),
        q: at.wrapping_add(8).cast(),
        k: at.wrapping_add(16).cast(),
        v: at.wrapping_add(24).cast(),
        beta: at.wrapping_add(32),
        slots: 1,
        B: 1,
        T: 1,
        HK: 1,
        HV: 1,
        K: 4,
        V: 4,
        // SAFETY: null pointers, zeros and the first value of an enum are a valid struct.
        ..unsafe { std::mem::zeroed() }
    };
    let text = |args: &ffi::q3n_gated_delta_args, variant: Option<&str>| {
        // SAFETY: the arrays of a call that passes the check lie in `x`; a refused one touches none.
        unsafe {
            let variant = variant.map_or(std::ptr::null(), |name| {
                (0..ffi::q3n_gated_delta_variant_count())
                    .map(|i| ffi::q3n_gated_delta_variant_at(i))
                    .find(|&v| CStr::from_ptr((*v).name).to_str() == Ok(name))
                    .expect("a variant of that name")
            });
            let status = ffi::q3n_gated_delta_run(variant, args, 0, 1, std::ptr::null_mut(), 0);
            CStr::from_ptr(ffi::q3n_status_string(status)).to_str().unwrap()
        }
    };
    let args = ffi::q3n_gated_delta_args { struct_bytes: 8, ..good() };
    assert_eq!(text(&args, None), "struct_bytes: not the struct size of this library version");
    let args = ffi::q3n_gated_delta_args { v: at.wrapping_add(2).cast(), ..good() };
    assert_eq!(text(&args, None), "o: overlaps an argument it must not overlap");
    let args = ffi::q3n_gated_delta_args { q_t: -1, ..good() };
    assert_eq!(text(&args, None), "q: stride is negative or lets elements of an output overlap");
    for dtype in [ffi::Q3N_Q8_0, 999] {
        let args = ffi::q3n_gated_delta_args { dtype, ..good() };
        assert_eq!(text(&args, Some("recurrent_scalar")), "dtype: dtype not supported by this operator");
    }
    let scratch = "scratch: scratch is NULL, too small or not 64-byte aligned";
    assert_eq!(text(&good(), Some("chunked64_scalar")), scratch);
    // SAFETY: a valid struct.
    assert_eq!(unsafe { ffi::q3n_gated_delta_check(&good()) }, 0);
}
