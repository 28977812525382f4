//! Every variant of dequantize and quantize on every case, 16-bit floats exhaustively, gguf-py's vectors, and the calls
//! that must be refused.

use qwen3next_kernels::quant::{dequantize, quantize, to_bytes, to_floats};
use qwen3next_kernels::{DType, Exec, View, ViewMut, Weight};
use qwen3next_verify::cases::quant::{Dequantize, Quantize};
use qwen3next_verify::suite::{assert_cases_round_trip, assert_passes, Options};
use safetensors::SafeTensors;

#[test]
fn every_variant_of_dequantize_passes_every_check() {
    assert_passes::<Dequantize>(&Options::default());
}

#[test]
fn every_variant_of_quantize_passes_every_check() {
    assert_passes::<Quantize>(&Options::default());
}

#[test]
fn cases_round_trip() {
    assert_cases_round_trip::<Dequantize>();
}

#[test]
fn every_16_bit_float_decodes_as_the_half_crate_decodes_it() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let decode = |dtype| to_floats(Weight::new(&bytes, dtype, [1, 1 << 16]).unwrap()).unwrap();
    for (bits, (f16, bf16)) in (0..=u16::MAX).zip(decode(DType::F16).into_iter().zip(decode(DType::BF16))) {
        let (want, want_b) = (half::f16::from_bits(bits).to_f32(), half::bf16::from_bits(bits).to_f32());
        assert!(f16.to_bits() == want.to_bits() || (f16.is_nan() && want.is_nan()), "f16 {bits:#x}: {f16}");
        assert!(bf16.to_bits() == want_b.to_bits() || (bf16.is_nan() && want_b.is_nan()), "bf16 {bits:#x}: {bf16}");
    }
}

/// Every f16, every midpoint between neighbours, and the floats beside both.
#[test]
fn rounding_to_16_bits_is_that_of_the_half_crate() {
    let mut x = vec![f32::MAX, f32::MIN_POSITIVE, 1e-45, 65519.0, 65519.996, 65520.0, f32::INFINITY];
    for bits in 0..0x7c00u16 {
        let (a, b) = (half::f16::from_bits(bits).to_f32(), half::f16::from_bits(bits + 1).to_f32());
        for v in [a, if b.is_finite() { (a + b) / 2.0 } else { a }] {
            x.extend([v, f32::from_bits(v.to_bits() + 1), f32::from_bits(v.to_bits().saturating_sub(1))]);
        }
    }
    for bits in (0..0x7f80_0000u32).step_by(0x7fff) {
        x.push(f32::from_bits(bits));
    }
    x.extend(x.clone().iter().map(|v| -v));
    let view = View::new(&x, [1, x.len()]).unwrap();
    let (f16, bf16) = (to_bytes(DType::F16, view).unwrap(), to_bytes(DType::BF16, view).unwrap());
    for (i, &v) in x.iter().enumerate() {
        assert_eq!(f16[2 * i..2 * i + 2], half::f16::from_f32(v).to_le_bytes(), "{v:e} to f16");
        assert_eq!(bf16[2 * i..2 * i + 2], half::bf16::from_f32(v).to_le_bytes(), "{v:e} to bf16");
    }
}

/// verify/golden/quant.safetensors, by gguf-py: values decoded bit for bit, and the bytes of the types it can make.
#[test]
fn gguf_py_vectors_bit_for_bit() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/quant.safetensors");
    let file = std::fs::read(path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let bytes = |name: String| tensors.tensor(&name).ok().map(|t| t.data().to_vec());
    let floats = |name: String| {
        bytes(name).map(|b| b.chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect::<Vec<_>>())
    };
    let (mut decoded, mut encoded) = (0, 0);
    for dtype in DType::ALL {
        let name = dtype.name().to_uppercase();
        for set in ["random", "made"] {
            let Some(raw) = bytes(format!("{name}.{set}.bytes")) else { continue };
            let want = floats(format!("{name}.{set}.values")).expect("bytes come with values");
            let got = to_floats(Weight::new(&raw, dtype, [1, want.len()]).unwrap()).unwrap();
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert_eq!(g.to_bits(), w.to_bits(), "{name} {set} element {i}: {g:e}, gguf-py has {w:e}");
            }
            decoded += 1;
            if let Some(source) = floats(format!("{name}.{set}.source")) {
                let made = to_bytes(dtype, View::new(&source, [1, source.len()]).unwrap()).unwrap();
                assert_eq!(made.iter().zip(&raw).position(|(a, b)| a != b), None, "{name}: bytes differ");
                encoded += 1;
            }
        }
    }
    assert!(decoded >= 23 && encoded >= 8, "{decoded} sets decoded, {encoded} encoded");
}

#[test]
fn wrong_arguments_are_refused_by_name() {
    let (bytes, x) = (vec![0u8; 210 * 4], vec![0f32; 1024]);
    let mut y = vec![0f32; 1024];
    let w = Weight::new(&bytes, DType::Q8_0, [2, 64]).unwrap();
    let mut decode = |shape, strides| {
        let y = ViewMut::strided(&mut y, shape, strides).unwrap();
        dequantize::run(dequantize::Args { y, x: w }, &Exec::default()).unwrap_err().to_string()
    };
    assert!(decode([2, 32], [32, 1]).starts_with("x: shape"));
    assert!(decode([2, 64], [32, 1]).contains("y: stride"));

    let mut out = vec![0u8; 64];
    let mut encode = |dtype, n: usize, y_row| {
        let x = View::new(&x, [2, n]).unwrap();
        quantize::run(quantize::Args { y: &mut out, dtype, y_row, x }, &Exec::default()).unwrap_err().to_string()
    };
    assert!(encode(DType::Q8_0, 33, None).contains("q8_0's block of 32"));
    assert!(encode(DType::Q8_0, 32, None).contains("needs 68 bytes, there are 64"));
    assert!(encode(DType::F16, 2, Some(1)).contains("y: stride"));
    assert!(to_bytes(DType::Q4_K, View::new(&x, [1, 255]).unwrap()).is_err());
}
