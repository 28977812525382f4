//! Block formats: exact decoding, bounded and idempotent encoding, isolation of blocks; and weights for other suites.

use crate::buffer::{zones, Input, Layout, Output};
use crate::compare::{bitwise, compare, Failure, Metrics, U32};
use crate::guard::Guarded;
use crate::reference::quant as reference;
use crate::suite::{everywhere, rng, Check, Outcome, Rng, Suite};
use crate::{case, choice};
use proptest::prelude::*;
use qwen3next_kernels::activations::Q8;
use qwen3next_kernels::quant::{dequantize, quantize};
use qwen3next_kernels::{DType, Exec, Variant, View, Weight};
use rand::Rng as _;

choice! {
    /// Every dtype, by the name the library gives it.
    pub enum Type {
        /// 32-bit float.
        F32 = "f32",
        /// IEEE half.
        F16 = "f16",
        /// bfloat16.
        Bf16 = "bf16",
        /// 8-bit blocks of 32.
        Q8 = "q8_0",
        /// 4-bit blocks of 32.
        Q4 = "q4_0",
        /// 4-bit blocks of 32 with a minimum.
        Q41 = "q4_1",
        /// 5-bit blocks of 32.
        Q50 = "q5_0",
        /// 5-bit blocks of 32 with a minimum.
        Q51 = "q5_1",
        /// 2-bit super-blocks.
        Q2K = "q2_k",
        /// 3-bit super-blocks.
        Q3K = "q3_k",
        /// 4-bit super-blocks.
        Q4K = "q4_k",
        /// 5-bit super-blocks.
        Q5K = "q5_k",
        /// 6-bit super-blocks.
        Q6K = "q6_k",
        /// Uneven levels, blocks of 32.
        Iq4Nl = "iq4_nl",
        /// Uneven levels, super-blocks.
        Iq4Xs = "iq4_xs",
        /// 4-bit floats.
        Mxfp4 = "mxfp4",
    }
}

impl Type {
    /// The library's value.
    pub fn dtype(self) -> DType {
        DType::from_name(&self.to_string()).expect("named as the library names it")
    }

    /// Byte offsets of the f16 scales in a block.
    fn scales(self) -> &'static [usize] {
        match self {
            Type::F32 | Type::F16 | Type::Bf16 | Type::Mxfp4 => &[],
            Type::Q8 | Type::Q4 | Type::Q50 | Type::Iq4Nl | Type::Iq4Xs => &[0],
            Type::Q41 | Type::Q51 | Type::Q4K | Type::Q5K => &[0, 2],
            Type::Q2K => &[80, 82],
            Type::Q3K => &[108],
            Type::Q6K => &[208],
        }
    }

    /// The scales are searched, so that all that holds of an element is what holds of its block.
    fn is_searched(self) -> bool {
        use Type::*;
        matches!(self, Q2K | Q3K | Q4K | Q5K | Q6K | Iq4Nl | Iq4Xs)
    }

    /// A minimum is added last, which rounds.
    fn rounds(self) -> bool {
        matches!(self, Type::Q41 | Type::Q51 | Type::Q2K | Type::Q4K | Type::Q5K)
    }

    /// Its scale has the range of f32's exponent.
    fn is_wide(self) -> bool {
        matches!(self, Type::F32 | Type::Bf16 | Type::Mxfp4)
    }

    /// What a block of [`NAN_BYTE`] decodes to.
    pub fn nan_block(self) -> f32 {
        match self {
            // ggml gives no exponent the meaning of a NaN: -12 * 2^127
            Type::Mxfp4 => f32::NEG_INFINITY,
            _ => f32::NAN,
        }
    }

    /// Packed blocks of `n` elements, every bit drawn at random; values of the order of `scale`.
    pub fn random(self, n: usize, scale: f32, rng: &mut Rng) -> Vec<u8> {
        let dtype = self.dtype();
        let mut bytes: Vec<u8> = (0..dtype.bytes(n).expect("whole blocks")).map(|_| rng.random()).collect();
        // The largest multiple of d that a block of the type can hold.
        let reach = match self {
            Type::Q8 => 127.0,
            Type::Q4 => 8.0,
            Type::Q41 | Type::Q50 => 16.0,
            Type::Q51 => 32.0,
            Type::Q2K => 15.0 * 3.0,
            Type::Q3K => 32.0 * 4.0,
            Type::Q4K => 63.0 * 15.0,
            Type::Q5K => 63.0 * 31.0,
            Type::Iq4Nl => 127.0,
            Type::Mxfp4 => 12.0,
            _ => 128.0 * 32.0,
        };
        for block in bytes.chunks_mut(dtype.block_bytes()) {
            let value: f32 = rng.random_range(-1.0f32..1.0) * scale;
            match self {
                Type::F32 => block.copy_from_slice(&value.to_le_bytes()),
                Type::F16 => block.copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
                Type::Bf16 => block.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
                Type::Mxfp4 => {
                    let exponent = (value.abs().max(scale / 8.0) / reach).log2().floor();
                    block[0] = (exponent + 128.0) as u8;
                }
                _ => {
                    for &at in self.scales() {
                        let d = half::f16::from_f32(value.abs().max(scale / 8.0) / reach);
                        block[at..at + 2].copy_from_slice(&d.to_le_bytes());
                    }
                }
            }
        }
        bytes
    }
}

impl Type {
    /// Every quant of a block at an end of its range, in the types that are multiplied as integers; scales stay.
    pub fn fill_with_ends(self, blocks: &mut [u8], rng: &mut Rng) {
        let quants = match self {
            Type::Q8 => 2..34,
            Type::Q4 => 2..18,
            Type::Q4K => 16..144,
            Type::Q5K => 16..176,
            Type::Q6K => 0..192,
            _ => return,
        };
        for block in blocks.chunks_mut(self.dtype().block_bytes()) {
            block[quants.clone()].fill([0x00, 0xff, 0x7f, 0x80][rng.random_range(0..4)]);
        }
    }
}

/// Bytes that decode to no finite number in every type, to NaN in all but MXFP4.
pub const NAN_BYTE: u8 = 0xff;

choice! {
    /// In which form activations and weights meet.
    pub enum Form {
        /// f32 and rows.
        F32 = "f32",
        /// 8-bit activations and rows.
        Q8 = "q8",
        /// f32 and interleaved rows.
        F32R16 = "f32_r16",
        /// 8-bit activations and interleaved rows.
        Q8R16 = "q8_r16",
    }
}

impl Form {
    /// Activations are quantised.
    pub fn is_q8(self) -> bool {
        matches!(self, Form::Q8 | Form::Q8R16)
    }

    /// Rows of weights are interleaved.
    pub fn is_interleaved(self) -> bool {
        matches!(self, Form::F32R16 | Form::Q8R16)
    }

    /// What of it weights of this type with this many rows allow: plain types have one form, and only whole groups of
    /// 16 rows are interleaved.
    pub fn for_weights(self, dtype: DType, rows: usize) -> Form {
        match (self, dtype.block() > 1, rows % 16 == 0) {
            (_, false, _) => Form::F32,
            (Form::F32R16, _, false) => Form::F32,
            (Form::Q8R16, _, false) => Form::Q8,
            (form, ..) => form,
        }
    }

    /// Rows of `n` values in this form, for weights of `dtype`, against guard pages.
    pub fn activations(self, x: View<2>, dtype: DType) -> Result<Option<Guarded<u8>>, Failure> {
        if !self.is_q8() || dtype.activations() == DType::F32 {
            return Ok(None);
        }
        let mut q = Q8::default();
        q.quantize(dtype.activations(), x, &Exec::default())?;
        let [rows, n] = q.shape();
        let bytes = q.dtype().bytes(rows * n).expect("whole blocks");
        Ok(Some(Guarded::of(&q.bytes()[..bytes])))
    }

    /// The type of weights in this form.
    pub fn weight_type(self, dtype: DType) -> DType {
        dtype.interleaved().filter(|_| self.is_interleaved()).unwrap_or(dtype)
    }

    /// Packed rows of `n` elements in this form, and their type.
    pub fn weights(self, packed: &[u8], dtype: DType, n: usize) -> (Vec<u8>, DType) {
        match dtype.interleaved() {
            Some(interleaved) if self.is_interleaved() => (interleave(packed, dtype, n), interleaved),
            _ => (packed.to_vec(), dtype),
        }
    }
}

/// Rows of `n` elements with every 16 interleaved, as csrc/quant/repack.h says: the bytes of a block of 16 rows lie
/// together, in units of four bytes; the scale that is left over lies before the units in blocks of 32, else after.
pub fn interleave(packed: &[u8], dtype: DType, n: usize) -> Vec<u8> {
    let (block, bytes) = (dtype.block(), dtype.block_bytes());
    let left = bytes % 4;
    let units: Vec<(usize, usize)> = if block == 32 {
        (0..usize::from(left > 0)).map(|_| (0, left)).chain((left..bytes).step_by(4).map(|at| (at, 4))).collect()
    } else {
        let whole = (0..bytes - left).step_by(4).map(|at| (at, 4));
        whole.chain((0..usize::from(left > 0)).map(|_| (bytes - left, left))).collect()
    };
    let row = n / block * bytes;
    let mut out = Vec::with_capacity(packed.len());
    for group in packed.chunks(16 * row.max(1)) {
        for b in 0..n / block {
            for &(at, size) in &units {
                (0..16).for_each(|r| out.extend_from_slice(&group[r * row + b * bytes + at..][..size]));
            }
        }
    }
    out
}

/// The values that rows of 8-bit activations stand for.
pub fn decode_q8(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let (scale, values) = if dtype == DType::Q8_X32 { (0, 8) } else { (304, 0) };
    let mut floats = Vec::new();
    for block in bytes.chunks_exact(dtype.block_bytes()) {
        let d = f32::from_ne_bytes(block[scale..scale + 4].try_into().expect("four bytes"));
        floats.extend(block[values..values + dtype.block()].iter().map(|&q| d * f32::from(q as i8)));
    }
    floats
}

/// Σ of the parts that a decoded weight is the difference of, which integer sums keep apart: |w| where there is only
/// one, |w + minimum| + |minimum| in types with minima.
pub fn magnitudes(dtype: Type, bytes: &[u8]) -> Vec<f64> {
    let w = reference::dequantize(dtype.dtype(), bytes);
    if !matches!(dtype, Type::Q4K | Type::Q5K) {
        return w.iter().map(|w| w.abs()).collect();
    }
    let mut minima = bytes.to_vec();
    minima.chunks_exact_mut(dtype.dtype().block_bytes()).for_each(|block| block[16..].fill(0));
    let minima = reference::dequantize(dtype.dtype(), &minima);
    w.iter().zip(&minima).map(|(w, m)| (w - m).abs() + m.abs()).collect()
}

/// A tensor of blocks laid out for a [`Weight`]: with gaps it starts at an odd address and the gaps decode to NaN.
pub struct Blocks<const R: usize> {
    buffer: Guarded<u8>,
    dtype: DType,
    shape: [usize; R],
    strides: [usize; R],
    start: usize,
}

impl<const R: usize> Blocks<R> {
    /// Lays out packed blocks.
    pub fn new(packed: &[u8], dtype: DType, shape: [usize; R], layout: Layout) -> Self {
        let gaps = layout == Layout::Gaps;
        let mut strides = [1; R];
        for i in (0..R - 1).rev() {
            // whole blocks of gap; an inner axis that is empty takes one block of stride
            strides[i] = (strides[i + 1] * shape[i + 1]).max(dtype.block()) + if gaps { dtype.block() } else { 0 };
        }
        let row = shape[R - 1];
        let rows: usize = shape[..R - 1].iter().product();
        let row_bytes = dtype.bytes(row).expect("whole blocks");
        assert_eq!(packed.len(), rows * row_bytes);
        // Past any byte the strides can reach lies nothing: the last row ends the buffer.
        let mut at = vec![0usize];
        for (&n, s) in shape.iter().zip(strides).take(R - 1) {
            at = at.iter().flat_map(|&base| (0..n).map(move |i| base + i * s)).collect();
        }
        let end = at.last().map_or(0, |&last| dtype.bytes(last + row).expect("whole blocks"));
        let start = layout.offset();
        let mut buffer = Guarded::filled(start + end, NAN_BYTE);
        for (r, &first) in at.iter().enumerate() {
            let to = start + dtype.bytes(first).expect("whole blocks");
            buffer[to..to + row_bytes].copy_from_slice(&packed[r * row_bytes..][..row_bytes]);
        }
        Blocks { buffer, dtype, shape, strides, start }
    }

    /// The view to pass to the kernel.
    pub fn view(&self) -> Weight<'_, R> {
        Weight::strided(&self.buffer[self.start..], self.dtype, self.shape, self.strides)
            .expect("laid out for this view")
    }
}

case! {
    /// Rows of blocks.
    pub struct Case {
        /// Type.
        pub dtype: Type,
        /// Rows.
        pub rows: usize,
        /// Blocks a row.
        pub blocks: usize,
        /// Strides.
        pub layout: Layout,
    }
}

impl Case {
    fn n(&self) -> usize {
        self.blocks * self.dtype.dtype().block()
    }

    /// Element ranges of the blocks of the packed array.
    fn block_of(&self, i: usize) -> usize {
        i / self.dtype.dtype().block()
    }
}

fn grid() -> Vec<Case> {
    let mut grid = Vec::new();
    for (i, &dtype) in Type::ALL.iter().enumerate() {
        for (j, (rows, blocks)) in
            [(0, 2), (1, 0), (1, 1), (2, 3), (5, 2), (17, 1), (1, 67), (3, 33)].into_iter().enumerate()
        {
            grid.push(Case { dtype, rows, blocks, layout: Layout::ALL[(i + j) % 2] });
        }
    }
    grid
}

fn strategy() -> BoxedStrategy<Case> {
    (prop::sample::select(Type::ALL), 0usize..6, 0usize..8, prop::sample::select(Layout::ALL))
        .prop_map(|(dtype, rows, blocks, layout)| Case { dtype, rows, blocks, layout })
        .boxed()
}

fn decode(exec: &Exec<dequantize::Op>, case: &Case, bytes: &[u8]) -> Result<Vec<f32>, Failure> {
    let x = Blocks::new(bytes, case.dtype.dtype(), [case.rows, case.n()], case.layout);
    let mut y = Output::new([case.rows, case.n()], case.layout);
    dequantize::run(dequantize::Args { y: y.view(), x: x.view() }, exec)?;
    y.read("y")
}

/// Exact, but for one rounding in the types that subtract a minimum.
fn decoded_reference(variant: &Variant<dequantize::Op>, case: &Case, seed: u64) -> Outcome {
    let bytes = case.dtype.random(case.rows * case.n(), 4.0, &mut rng(seed));
    let want = reference::dequantize(case.dtype.dtype(), &bytes);
    let bound: Vec<f64> = want.iter().map(|w| if case.dtype.rounds() { U32 * w.abs() } else { 0.0 }).collect();
    compare("y", &decode(&Exec::variant(*variant), case, &bytes)?, &want, &bound, case.n()).map(Some)
}

/// Random bytes throughout, scales included: infinities, NaN and subnormal scales come out where the reference has
/// them.
fn any_bytes(variant: &Variant<dequantize::Op>, case: &Case, seed: u64) -> Outcome {
    let mut rng = rng(seed);
    let n = case.dtype.dtype().bytes(case.rows * case.n()).expect("whole blocks");
    let bytes: Vec<u8> = (0..n).map(|_| rng.random()).collect();
    let want = reference::dequantize(case.dtype.dtype(), &bytes);
    let bound: Vec<f64> = want.iter().map(|w| if case.dtype.rounds() { U32 * w.abs() } else { 0.0 }).collect();
    compare("y", &decode(&Exec::variant(*variant), case, &bytes)?, &want, &bound, case.n()).map(Some)
}

/// Any cut over any number of parts and threads, and a row alone, give the same bits.
fn decoded_cuts(variant: &Variant<dequantize::Op>, case: &Case, seed: u64) -> Outcome {
    let bytes = case.dtype.random(case.rows * case.n(), 1.0, &mut rng(seed));
    let whole = decode(&Exec::variant(*variant).parts(1), case, &bytes)?;
    everywhere(variant, |exec| bitwise("cut", &decode(&exec, case, &bytes)?, &whole))?;
    let one = Case { rows: 1, ..case.clone() };
    let row_bytes = bytes.len() / case.rows.max(1);
    for row in 0..case.rows {
        let alone = decode(&Exec::variant(*variant), &one, &bytes[row * row_bytes..][..row_bytes])?;
        bitwise("a row alone", &alone, &whole[row * case.n()..][..case.n()])?;
    }
    Ok(Some(Metrics::default()))
}

/// A block that is not finite stays in its block.
fn decoded_isolation(variant: &Variant<dequantize::Op>, case: &Case, seed: u64) -> Outcome {
    let total = case.rows * case.blocks;
    if total == 0 {
        return Ok(None);
    }
    let mut bytes = case.dtype.random(case.rows * case.n(), 1.0, &mut rng(seed));
    let mut want = decode(&Exec::variant(*variant), case, &bytes)?;
    let bad = seed as usize % total;
    let size = case.dtype.dtype().block_bytes();
    bytes[bad * size..][..size].fill(NAN_BYTE);
    want.iter_mut()
        .enumerate()
        .filter(|(i, _)| case.block_of(*i) == bad)
        .for_each(|(_, w)| *w = case.dtype.nan_block());
    bitwise("y", &decode(&Exec::variant(*variant), case, &bytes)?, &want)?;
    Ok(Some(Metrics::default()))
}

/// The suite of dequantize.
pub struct Dequantize;

impl Suite for Dequantize {
    type Op = dequantize::Op;
    type Case = Case;

    fn grid() -> Vec<Case> {
        grid()
    }

    fn strategy() -> BoxedStrategy<Case> {
        strategy()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "reference", run: decoded_reference },
            Check { name: "any_bytes", run: any_bytes },
            Check { name: "cuts", run: decoded_cuts },
            Check { name: "isolation", run: decoded_isolation },
        ]
    }
}

/// Packed bytes of `x`. The output lies between guard bytes; it is made twice over different poison, so that a byte
/// left unwritten shows.
fn encode(exec: &Exec<quantize::Op>, case: &Case, x: &[f32]) -> Result<Vec<u8>, Failure> {
    let (dtype, n) = (case.dtype.dtype(), case.n());
    let gap = if case.layout == Layout::Gaps { dtype.block() } else { 0 };
    let y_row = n + gap;
    let (row_bytes, step) = (dtype.bytes(n).expect("whole"), dtype.bytes(y_row).expect("whole"));
    let (before, after) = zones(64);
    let guard = before + case.layout.offset();
    // The last row ends the array.
    let length = if case.rows == 0 { 0 } else { (case.rows - 1) * step + row_bytes };
    let input = Input::new(x, [case.rows, n], case.layout);
    let mut results = Vec::new();
    for poison in [0x5a, 0xa5u8] {
        let end = guard + length;
        let mut buffer = Guarded::filled(end + after, poison);
        let y = &mut buffer[guard..end];
        quantize::run(quantize::Args { y, dtype, y_row: Some(y_row), x: input.view() }, exec)?;
        let inside = |i: usize| i >= guard && i < end && (i - guard) % step.max(1) < row_bytes;
        if let Some(i) = (0..buffer.len()).find(|&i| !inside(i) && buffer[i] != poison) {
            return Err(Failure::new(format!("y: wrote outside the rows, at byte {}", i as i64 - guard as i64)));
        }
        let rows = (0..case.rows).flat_map(|r| buffer[guard + r * step..][..row_bytes].to_vec());
        results.push(rows.collect::<Vec<u8>>());
    }
    same_bytes("y: some byte was left unwritten", &results[0], &results[1])?;
    Ok(results.swap_remove(0))
}

fn same_bytes(what: &str, got: &[u8], want: &[u8]) -> Result<(), Failure> {
    match got.iter().zip(want).position(|(g, w)| g != w) {
        None if got.len() == want.len() => Ok(()),
        at => Err(Failure::new(format!("{what}: bytes differ, first at {at:?}"))),
    }
}

/// Rows of different spread, with zeros, a constant block and one-sided blocks among them; far from f16's limits.
fn values(case: &Case, seed: u64) -> Vec<f32> {
    let mut rng = rng(seed);
    let block = case.dtype.dtype().block();
    let mut x = Vec::with_capacity(case.rows * case.n());
    for b in 0..case.rows * case.blocks {
        let spread = 2f32.powi(rng.random_range(0..4));
        let kind = rng.random_range(0..8);
        for i in 0..block {
            let u: f32 = rng.random_range(-1.0..1.0);
            x.push(match kind {
                0 => u.abs() * spread + 1.0,
                1 => -u.abs() * spread - 1.0,
                2 => u * u * u * u * u * spread,
                3 if (b + i) % 3 > 0 => 0.0,
                4 => spread,
                _ => u * spread,
            });
        }
    }
    x
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Decoded again, plain types and simple blocks stay within half a step of each element; where scales are searched, a
/// block's squared error is at most that of the plain scheme.
fn round_trip(variant: &Variant<quantize::Op>, case: &Case, seed: u64) -> Outcome {
    let x = values(case, seed);
    let dtype = case.dtype.dtype();
    let back = reference::dequantize(dtype, &encode(&Exec::variant(*variant), case, &x)?);
    if case.dtype.is_searched() {
        for (b, (x, back)) in x.chunks(dtype.block()).zip(back.chunks(dtype.block())).enumerate() {
            let error: f64 = x.iter().zip(back).map(|(&x, y)| (f64::from(x) - y).powi(2)).sum();
            let largest = x.iter().fold(0.0f64, |a, &x| a.max(f64::from(x).abs()));
            // The kernel ranks its candidates in f32: each of 256 terms may be off by a rounding of its element.
            let plain = reference::plain_error(dtype, x);
            let slack = 2.0 * 16.0 * plain.sqrt() * 4.0 * U32 * largest + 256.0 * (4.0 * U32 * largest).powi(2);
            let within = error <= plain + slack;
            if !within {
                return Err(Failure::new(format!(
                    "block {b}: squared error {error:e}, the plain scheme has {plain:e}"
                )));
            }
        }
        return Ok(Some(Metrics::default()));
    }
    // f16 has 11 significant bits, bf16 8. A scale stored in f16 is off by 2^-11 of itself.
    let bounds = x.chunks(dtype.block()).flat_map(|block| {
        let largest = block.iter().fold(0.0f64, |a, &x| a.max(f64::from(x).abs()));
        let scaled = move |steps: f64, worst: f64| largest / steps * (worst + steps * (2f64.powi(-11) + 4.0 * U32));
        block.iter().map(move |&x| match case.dtype {
            Type::F16 => f64::from(x).abs() * 2f64.powi(-11) + 2f64.powi(-25),
            Type::Bf16 => f64::from(x).abs() * 2f64.powi(-8),
            Type::Q8 => scaled(127.0, 0.5),
            // levels -8 .. 7: the far end of the other sign is a whole step away
            Type::Q4 => scaled(8.0, 1.0),
            Type::Q50 => scaled(16.0, 1.0),
            // the range is up to twice the largest element; the minimum is rounded to f16 as well
            Type::Q41 => scaled(7.5, 0.5) + largest * 2f64.powi(-11),
            Type::Q51 => scaled(15.5, 0.5) + largest * 2f64.powi(-11),
            // the largest lies at 4 to 8 times the scale: above 6 up to 2 are cut off, from 4 to 6 half a step is 1
            Type::Mxfp4 => largest / 4.0 * (1.0 + 4.0 * U32),
            _ => 0.0,
        })
    });
    let back32: Vec<f32> = back.iter().map(|&b| b as f32).collect();
    compare("decoded", &back32, &wide(&x), &bounds.collect::<Vec<_>>(), case.n()).map(Some)
}

/// What was decoded encodes to the same bytes. The search of IQ4_NL may find another scale for the same values; that
/// of the super-blocks may find another fit.
fn idempotent(variant: &Variant<quantize::Op>, case: &Case, seed: u64) -> Outcome {
    if case.dtype.is_searched() && case.dtype != Type::Iq4Nl {
        return Ok(None);
    }
    let exec = Exec::variant(*variant);
    let decoded = |bytes: &[u8]| -> Vec<f32> {
        reference::dequantize(case.dtype.dtype(), bytes).iter().map(|&v| v as f32).collect()
    };
    let once = encode(&exec, case, &values(case, seed))?;
    let twice = encode(&exec, case, &decoded(&once))?;
    if case.dtype == Type::Iq4Nl {
        bitwise("encoded twice", &decoded(&twice), &decoded(&once))?;
    } else {
        same_bytes("encoded twice", &twice, &once)?;
    }
    Ok(Some(Metrics::default()))
}

/// Scaling x by a power of two scales what is decoded, exactly.
fn scaling(variant: &Variant<quantize::Op>, case: &Case, seed: u64) -> Outcome {
    let mut x = values(case, seed);
    let exec = Exec::variant(*variant);
    // Scales far enough from f16's subnormals keep their bits when multiplied.
    x.iter_mut().for_each(|x| *x *= 256.0);
    let decode = |x: &[f32]| -> Result<Vec<f32>, Failure> {
        let bytes = encode(&exec, case, x)?;
        Ok(reference::dequantize(case.dtype.dtype(), &bytes).iter().map(|&v| v as f32).collect())
    };
    let want: Vec<f32> = decode(&x)?.iter().map(|y| y * 8.0).collect();
    x.iter_mut().for_each(|x| *x *= 8.0);
    let got = decode(&x)?;
    bitwise("8 x", &got, &want)?;
    Ok(Some(Metrics::default()))
}

/// Zeros decode to zeros; a NaN or an infinity leaves nothing finite in its block and does not leave it; what
/// exceeds the range of the scale comes out as no finite number.
fn special_values(variant: &Variant<quantize::Op>, case: &Case, seed: u64) -> Outcome {
    let total = case.rows * case.blocks;
    if total == 0 {
        return Ok(None);
    }
    let dtype = case.dtype.dtype();
    let exec = Exec::variant(*variant);
    let back = |x: &[f32]| Ok::<_, Failure>(reference::dequantize(dtype, &encode(&exec, case, x)?));
    if back(&vec![0.0; case.rows * case.n()])?.iter().any(|&y| y != 0.0) {
        return Err(Failure::new("zeros: decoded to something else"));
    }
    let mut x = values(case, seed);
    let want = back(&x)?;
    let (bad, within) = (seed as usize % total, (seed / 7) as usize % dtype.block());
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -f32::MAX, f32::from_bits(0x7f80_0001)] {
        x[bad * dtype.block() + within] = value;
        if value.is_finite() && case.dtype.is_wide() && value.abs() == f32::MAX {
            continue;
        }
        for (i, (got, want)) in back(&x)?.iter().zip(&want).enumerate() {
            let right = if case.block_of(i) == bad { !got.is_finite() } else { got == want };
            if !right {
                return Err(Failure::new(format!("{value} in block {bad}: element {i} decodes to {got}")));
            }
        }
    }
    Ok(Some(Metrics::default()))
}

/// Values so small that the scale underflows decode to zero; f32, bf16 and MXFP4 have the range, and keep them small.
fn tiny_values(variant: &Variant<quantize::Op>, case: &Case, seed: u64) -> Outcome {
    // Subnormal: a range of inputs. f16, and with it every scale, ends at 2^-24.
    let x: Vec<f32> = values(case, seed).iter().map(|x| x * f32::MIN_POSITIVE / 512.0).collect();
    let back = reference::dequantize(case.dtype.dtype(), &encode(&Exec::variant(*variant), case, &x)?);
    let keeps = case.dtype.is_wide();
    let right = |y: &f64| if keeps { y.abs() < f64::from(f32::MIN_POSITIVE) } else { *y == 0.0 };
    match back.iter().find(|y| !right(y)) {
        None => Ok(Some(Metrics::default())),
        Some(y) => Err(Failure::new(format!("subnormal values decode to {y}"))),
    }
}

/// Any cut over any number of parts and threads, and a row alone, give the same bytes.
fn encoded_cuts(variant: &Variant<quantize::Op>, case: &Case, seed: u64) -> Outcome {
    let x = values(case, seed);
    let whole = encode(&Exec::variant(*variant).parts(1), case, &x)?;
    everywhere(variant, |exec| same_bytes("cut", &encode(&exec, case, &x)?, &whole))?;
    let one = Case { rows: 1, ..case.clone() };
    let row_bytes = whole.len() / case.rows.max(1);
    for row in 0..case.rows {
        let alone = encode(&Exec::variant(*variant), &one, &x[row * case.n()..][..case.n()])?;
        same_bytes("a row alone", &alone, &whole[row * row_bytes..][..row_bytes])?;
    }
    Ok(Some(Metrics::default()))
}

/// The suite of quantize.
pub struct Quantize;

impl Suite for Quantize {
    type Op = quantize::Op;
    type Case = Case;

    fn grid() -> Vec<Case> {
        grid()
    }

    fn strategy() -> BoxedStrategy<Case> {
        strategy()
    }

    fn checks() -> Vec<Check<Self>> {
        vec![
            Check { name: "round_trip", run: round_trip },
            Check { name: "idempotent", run: idempotent },
            Check { name: "scaling", run: scaling },
            Check { name: "special_values", run: special_values },
            Check { name: "tiny_values", run: tiny_values },
            Check { name: "cuts", run: encoded_cuts },
        ]
    }
}
