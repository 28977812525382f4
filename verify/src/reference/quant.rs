//! Block formats, decoded element by element in float64 from the published layouts.

use qwen3next_kernels::DType;

fn f16(bytes: &[u8], at: usize) -> f64 {
    half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f64()
}

/// Bits `from .. from + count` of the number that `bytes` spell little-endian from byte `at` on.
fn bits(bytes: &[u8], at: usize, from: usize, count: usize) -> u32 {
    (0..count).map(|i| u32::from(bytes[at + (from + i) / 8] >> ((from + i) % 8) & 1) << i).sum()
}

/// Six-bit scale and minimum of sub-block `j`; the twelve bytes start at `at`. The first four have a byte each; the
/// others take a nibble of bytes 8..12 as low bits and the spare top bits of bytes 0..8 as high ones.
fn scale_min(b: &[u8], at: usize, j: usize) -> (f64, f64) {
    let (scale, min) = if j < 4 {
        (bits(b, at + j, 0, 6), bits(b, at + 4 + j, 0, 6))
    } else {
        let i = j - 4;
        (
            bits(b, at + 8 + i, 0, 4) + 16 * bits(b, at + i, 6, 2),
            bits(b, at + 8 + i, 4, 4) + 16 * bits(b, at + 4 + i, 6, 2),
        )
    };
    (f64::from(scale), f64::from(min))
}

/// Element `i` of one block.
fn element(dtype: DType, b: &[u8], i: usize) -> f64 {
    match dtype {
        DType::F32 => f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        DType::F16 => f16(b, 0),
        DType::BF16 => half::bf16::from_le_bytes([b[0], b[1]]).to_f64(),
        DType::Q8_0 => f16(b, 0) * f64::from(b[2 + i] as i8),
        DType::Q4_0 => f16(b, 0) * (f64::from(bits(b, 2 + i % 16, i / 16 * 4, 4)) - 8.0),
        DType::Q4_K | DType::Q5_K => {
            let (j, within) = (i / 32, i % 32);
            let (scale, min) = scale_min(b, 4, j);
            let (low_at, high) = match dtype {
                DType::Q4_K => (16, 0),
                _ => (48, bits(b, 16 + within, j, 1)),
            };
            let q = bits(b, low_at + j / 2 * 32 + within, j % 2 * 4, 4) + 16 * high;
            f16(b, 0) * scale * f64::from(q) - f16(b, 2) * min
        }
        DType::Q6_K => {
            let (half, quarter, within) = (i / 128, i % 128 / 32, i % 32);
            let low = bits(b, 64 * half + i % 64, quarter / 2 * 4, 4);
            let high = bits(b, 128 + 32 * half + within, quarter * 2, 2);
            f16(b, 208) * f64::from(b[192 + i / 16] as i8) * (f64::from(low + 16 * high) - 32.0)
        }
        _ => panic!("{dtype} has no reference"),
    }
}

/// The exact values of packed blocks. f32 arithmetic gives the same ones, but for the last subtraction of Q4_K and
/// Q5_K, which it rounds.
pub fn dequantize(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    bytes.chunks(dtype.block_bytes()).flat_map(|b| (0..dtype.block()).map(move |i| element(dtype, b, i))).collect()
}

/// Sum of squared errors of the plain scheme for a block of a K type: each sub-block's extremes (Q6_K: its largest
/// element) set its scale, the largest sub-block's scale sets the block's.
pub fn plain_error(dtype: DType, x: &[f32]) -> f64 {
    let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let stored = |d: f64| half::f16::from_f64(d).to_f64();
    let largest = |v: &[f64]| v.iter().fold(0.0f64, |a, &b| if b.abs() > a.abs() { b } else { a });
    let ratio = |a: f64, b: f64| if b == 0.0 { 0.0 } else { a / b };
    if dtype == DType::Q6_K {
        let scales: Vec<f64> = x.chunks(16).map(|s| largest(s) / -32.0).collect();
        let d = stored(largest(&scales) / -128.0);
        let error = |(s, &scale): (&[f64], &f64)| {
            let scale = ratio(scale, d).round().clamp(-128.0, 127.0) * d;
            s.iter().map(|x| (ratio(*x, scale).round().clamp(-32.0, 31.0) * scale - x).powi(2)).sum::<f64>()
        };
        return x.chunks(16).zip(&scales).map(error).sum();
    }
    let levels = if dtype == DType::Q4_K { 15.0 } else { 31.0 };
    let fits: Vec<(f64, f64)> = x
        .chunks(32)
        .map(|s| {
            let (lo, hi) = s.iter().fold((0.0f64, 0.0f64), |(lo, hi), &x| (lo.min(x), hi.max(x)));
            ((hi - lo) / levels, -lo)
        })
        .collect();
    let d = stored(fits.iter().fold(0.0f64, |a, f| a.max(f.0)) / 63.0);
    let dmin = stored(fits.iter().fold(0.0f64, |a, f| a.max(f.1)) / 63.0);
    let error = |(s, fit): (&[f64], &(f64, f64))| {
        let scale = ratio(fit.0, d).round().clamp(0.0, 63.0) * d;
        let min = ratio(fit.1, dmin).round().clamp(0.0, 63.0) * dmin;
        s.iter().map(|x| (ratio(x + min, scale).round().clamp(0.0, levels) * scale - min - x).powi(2)).sum::<f64>()
    };
    x.chunks(32).zip(&fits).map(error).sum()
}
