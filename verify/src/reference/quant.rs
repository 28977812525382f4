//! Block formats, decoded element by element in float64 from the published layouts.

use qwen3next_kernels::DType;

/// The uneven levels of IQ4_NL and IQ4_XS.
const IQ4_LEVELS: [f64; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];
/// Magnitudes of the e2m1 floats.
const E2M1: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

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
        DType::Q4_1 => f16(b, 0) * f64::from(bits(b, 4 + i % 16, i / 16 * 4, 4)) + f16(b, 2),
        DType::Q5_0 => f16(b, 0) * (f64::from(bits(b, 6 + i % 16, i / 16 * 4, 4) + 16 * bits(b, 2, i, 1)) - 16.0),
        DType::Q5_1 => f16(b, 0) * f64::from(bits(b, 8 + i % 16, i / 16 * 4, 4) + 16 * bits(b, 4, i, 1)) + f16(b, 2),
        DType::IQ4_NL => f16(b, 0) * IQ4_LEVELS[bits(b, 2 + i % 16, i / 16 * 4, 4) as usize],
        DType::MXFP4 => {
            let q = bits(b, 1 + i % 16, i / 16 * 4, 4);
            let magnitude = E2M1[q as usize % 8];
            // a bias of 127, and past f32's range infinity
            let value = 2f64.powi(i32::from(b[0]) - 127) * if q < 8 { magnitude } else { -magnitude };
            f64::from(value as f32)
        }
        DType::Q2_K => {
            let (j, quarter) = (i / 16, i % 128 / 32);
            let q = bits(b, 16 + i / 128 * 32 + i % 32, 2 * quarter, 2);
            f16(b, 80) * f64::from(bits(b, j, 0, 4)) * f64::from(q) - f16(b, 82) * f64::from(bits(b, j, 4, 4))
        }
        DType::Q3_K => {
            let (j, quarter) = (i / 16, i % 128 / 32);
            let q = bits(b, 32 + i / 128 * 32 + i % 32, 2 * quarter, 2) + 4 * bits(b, i % 32, i / 32, 1);
            // sixteen low nibbles, byte by byte and low halves first; then their two high bits, four a byte
            let scale = bits(b, 96 + j % 8, j / 8 * 4, 4) + 16 * bits(b, 104 + j % 4, j / 4 * 2, 2);
            f16(b, 108) * (f64::from(scale) - 32.0) * (f64::from(q) - 4.0)
        }
        DType::IQ4_XS => {
            let j = i / 32;
            let scale = bits(b, 4, 4 * j, 4) + 16 * bits(b, 2, 2 * j, 2);
            let q = bits(b, 8 + 16 * j + i % 16, i % 32 / 16 * 4, 4);
            f16(b, 0) * (f64::from(scale) - 32.0) * IQ4_LEVELS[q as usize]
        }
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

/// The exact values of packed blocks. f32 arithmetic gives the same ones, but for the last addition of a minimum, which
/// it rounds.
pub fn dequantize(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    bytes.chunks(dtype.block_bytes()).flat_map(|b| (0..dtype.block()).map(move |i| element(dtype, b, i))).collect()
}

/// The nearest level of IQ4 to a multiple of the scale.
fn iq4_nearest(v: f64) -> f64 {
    IQ4_LEVELS.into_iter().min_by(|a, b| (a - v).abs().total_cmp(&(b - v).abs())).expect("there are sixteen")
}

/// Sum of squared errors of the plain scheme for a block of a type whose scales are searched. With minima: each
/// sub-block's extremes set its scale and minimum. Without: its largest element lies at the lowest level. The largest
/// sub-block's scale sets the block's.
pub fn plain_error(dtype: DType, x: &[f32]) -> f64 {
    let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let stored = |d: f64| half::f16::from_f64(d).to_f64();
    let largest = |v: &[f64]| v.iter().fold(0.0f64, |a, &b| if b.abs() > a.abs() { b } else { a });
    let ratio = |a: f64, b: f64| if b == 0.0 { 0.0 } else { a / b };
    // (elements of a sub-block, levels, codes of a scale)
    let (size, levels, codes) = match dtype {
        DType::Q2_K => (16, 3.0, 15.0),
        DType::Q4_K => (32, 15.0, 63.0),
        DType::Q5_K => (32, 31.0, 63.0),
        DType::Q3_K => (16, 4.0, 32.0),
        DType::Q6_K => (16, 32.0, 128.0),
        DType::IQ4_XS => (32, 127.0, 32.0),
        DType::IQ4_NL => {
            let d = stored(largest(&x) / -127.0);
            return x.iter().map(|x| (iq4_nearest(ratio(*x, d)) * d - x).powi(2)).sum();
        }
        _ => panic!("{dtype} has no searched scale"),
    };
    if matches!(dtype, DType::Q3_K | DType::Q6_K | DType::IQ4_XS) {
        let scales: Vec<f64> = x.chunks(size).map(|s| largest(s) / -levels).collect();
        let d = stored(largest(&scales) / -codes);
        let level = |v: f64| match dtype {
            DType::IQ4_XS => iq4_nearest(v),
            _ => v.round().clamp(-levels, levels - 1.0),
        };
        let error = |(s, &scale): (&[f64], &f64)| {
            let scale = ratio(scale, d).round().clamp(-codes, codes - 1.0) * d;
            s.iter().map(|x| (level(ratio(*x, scale)) * scale - x).powi(2)).sum::<f64>()
        };
        return x.chunks(size).zip(&scales).map(error).sum();
    }
    let fits: Vec<(f64, f64)> = x
        .chunks(size)
        .map(|s| {
            let (lo, hi) = s.iter().fold((0.0f64, 0.0f64), |(lo, hi), &x| (lo.min(x), hi.max(x)));
            ((hi - lo) / levels, -lo)
        })
        .collect();
    let d = stored(fits.iter().fold(0.0f64, |a, f| a.max(f.0)) / codes);
    let dmin = stored(fits.iter().fold(0.0f64, |a, f| a.max(f.1)) / codes);
    let error = |(s, fit): (&[f64], &(f64, f64))| {
        let scale = ratio(fit.0, d).round().clamp(0.0, codes) * d;
        let min = ratio(fit.1, dmin).round().clamp(0.0, codes) * dmin;
        s.iter().map(|x| (ratio(x + min, scale).round().clamp(0.0, levels) * scale - min - x).powi(2)).sum::<f64>()
    };
    x.chunks(size).zip(&fits).map(error).sum()
}
