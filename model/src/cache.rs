//! The keys or the values of a layer, in one of the types that attention reads.

use crate::config::Config;
use crate::error::Error;
use half::vec::HalfBitsVecExt;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use qwen3next_kernels::attention::{Kv, Q8_0};
#[cfg(feature = "device")]
use qwen3next_kernels::device::{Buffer, Cuda, Device};
#[cfg(feature = "device")]
use qwen3next_kernels::layer::kv_store;
use qwen3next_kernels::quant::quantize;
use qwen3next_kernels::{DType, Exec, View};
use std::ops::Range;

/// Types of the KV caches: f32 (exact), f16, bf16, or q8_0 (blocks of 32 channels).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheTypes {
    /// Of the keys.
    pub k: DType,
    /// Of the values: attention wants that of the keys.
    pub v: DType,
}

impl Default for CacheTypes {
    fn default() -> Self {
        CacheTypes { k: DType::F32, v: DType::F32 }
    }
}

impl CacheTypes {
    /// What a cache may be of.
    pub const ALL: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::Q8_0];

    /// Caches of this model can be of these types.
    pub(crate) fn expect(self, config: &Config) -> Result<(), Error> {
        let d = config.attention.head_dim;
        if let Some(other) = [self.k, self.v].into_iter().find(|t| !Self::ALL.contains(t)) {
            return Err(Error::argument("cache type", format!("is {other}, expected f32, f16, bf16 or q8_0")));
        }
        if self.k != self.v {
            let why = format!("is {} for keys and {} for values, expected one type for both", self.k, self.v);
            return Err(Error::argument("cache type", why));
        }
        if self.k == DType::Q8_0 && d % 32 != 0 {
            let why = format!("q8_0 holds blocks of 32 channels, the model's heads have {d}");
            return Err(Error::argument("cache type", why));
        }
        Ok(())
    }

    /// Bytes that one token takes in all layers; `None` where the model's caches cannot be of these types.
    pub fn bytes_per_token(self, config: &Config) -> Option<usize> {
        self.expect(config).ok()?;
        self.k.bytes(config.kv_elements())
    }
}

/// The keys or the values of all slots, where the layer lies.
#[derive(Debug)]
pub(crate) enum Cache {
    Cpu(Rows),
    #[cfg(feature = "device")]
    Cuda(DeviceRows),
}

impl Cache {
    /// A copy of some elements.
    pub(crate) fn part(&self, range: Range<usize>) -> Result<Rows, Error> {
        match self {
            Cache::Cpu(rows) => Ok(rows.part(range)),
            #[cfg(feature = "device")]
            Cache::Cuda(rows) => rows.part(range),
        }
    }

    /// Puts back what [`Cache::part`] gave; the types have been compared.
    pub(crate) fn put(&mut self, at: usize, part: &Rows) -> Result<(), Error> {
        match self {
            Cache::Cpu(rows) => {
                rows.put(at, part);
                Ok(())
            }
            #[cfg(feature = "device")]
            Cache::Cuda(rows) => rows.put(at, part),
        }
    }

    /// Of the type of these.
    pub(crate) fn same_type(&self, part: &Rows) -> bool {
        match self {
            Cache::Cpu(rows) => rows.same_type(part),
            #[cfg(feature = "device")]
            Cache::Cuda(rows) => rows.dtype() == part.dtype(),
        }
    }

    /// Bytes of so many elements.
    pub(crate) fn bytes(&self, elements: usize) -> usize {
        match self {
            Cache::Cpu(rows) => rows.bytes(elements),
            #[cfg(feature = "device")]
            Cache::Cuda(rows) => rows.dtype().bytes(elements).unwrap_or(usize::MAX),
        }
    }

    /// Hands over some elements as little-endian bytes, part by part.
    pub(crate) fn save(
        &self,
        range: Range<usize>,
        to: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match self {
            Cache::Cpu(rows) => rows.save(range, to),
            #[cfg(feature = "device")]
            Cache::Cuda(rows) => rows.part(range)?.save_all(to),
        }
    }

    /// Fills some elements with what [`Cache::save`] gave.
    pub(crate) fn load(
        &mut self,
        range: Range<usize>,
        from: &mut dyn FnMut(&mut [u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match self {
            Cache::Cpu(rows) => rows.load(range, from),
            #[cfg(feature = "device")]
            Cache::Cuda(rows) => {
                let mut part = Rows::zeros(rows.dtype(), range.len())?;
                part.load(0..range.len(), from)?;
                rows.put(range.start, &part)
            }
        }
    }
}

/// [`Rows`] in a device's memory.
#[cfg(feature = "device")]
#[derive(Debug)]
pub(crate) enum DeviceRows {
    F32(Buffer<f32>),
    F16(Buffer<f16>),
    BF16(Buffer<bf16>),
    Q8_0(Buffer<Q8_0>),
}

#[cfg(feature = "device")]
impl DeviceRows {
    /// `n` zeros, a whole number of blocks.
    pub(crate) fn zeros(device: &Device, dtype: DType, n: usize) -> Result<DeviceRows, Error> {
        Ok(match dtype {
            DType::F16 => DeviceRows::F16(device.zeros(n)?),
            DType::BF16 => DeviceRows::BF16(device.zeros(n)?),
            DType::Q8_0 => DeviceRows::Q8_0(device.zeros(n / 32)?),
            _ => DeviceRows::F32(device.zeros(n)?),
        })
    }

    fn dtype(&self) -> DType {
        match self {
            DeviceRows::F32(_) => DType::F32,
            DeviceRows::F16(_) => DType::F16,
            DeviceRows::BF16(_) => DType::BF16,
            DeviceRows::Q8_0(_) => DType::Q8_0,
        }
    }

    /// Elements.
    pub(crate) fn len(&self) -> usize {
        match self {
            DeviceRows::F32(x) => x.len(),
            DeviceRows::F16(x) => x.len(),
            DeviceRows::BF16(x) => x.len(),
            DeviceRows::Q8_0(x) => 32 * x.len(),
        }
    }

    fn part(&self, range: Range<usize>) -> Result<Rows, Error> {
        Ok(match self {
            DeviceRows::F32(x) => Rows::F32(x.download_at(range.start, range.len())?),
            DeviceRows::F16(x) => Rows::F16(x.download_at(range.start, range.len())?),
            DeviceRows::BF16(x) => Rows::BF16(x.download_at(range.start, range.len())?),
            DeviceRows::Q8_0(x) => Rows::Q8_0(x.download_at(range.start / 32, range.len() / 32)?),
        })
    }

    fn put(&mut self, at: usize, part: &Rows) -> Result<(), Error> {
        match (self, part) {
            (DeviceRows::F32(x), Rows::F32(part)) => x.write_at(at, part)?,
            (DeviceRows::F16(x), Rows::F16(part)) => x.write_at(at, part)?,
            (DeviceRows::BF16(x), Rows::BF16(part)) => x.write_at(at, part)?,
            (DeviceRows::Q8_0(x), Rows::Q8_0(part)) => x.write_at(at / 32, part)?,
            _ => unreachable!("types were compared"),
        }
        Ok(())
    }

    /// As rows are stored, `[slots][S][HKV·D]`.
    pub(crate) fn store(&mut self, [slots, s, n]: [usize; 3]) -> Result<kv_store::Cache<'_, Cuda>, Error> {
        let shape = [slots, s, n];
        Ok(match self {
            DeviceRows::F32(x) => kv_store::Cache::F32(x.view_mut(shape)?),
            DeviceRows::F16(x) => kv_store::Cache::F16(x.view_mut(shape)?),
            DeviceRows::BF16(x) => kv_store::Cache::BF16(x.view_mut(shape)?),
            DeviceRows::Q8_0(x) => kv_store::Cache::Q8_0(x.view_mut([slots, s, n / 32])?),
        })
    }

    /// As attention takes them, `[slots][S][HKV][D]`.
    pub(crate) fn view(&self, [slots, s, hkv, d]: [usize; 4]) -> Result<Kv<'_, Cuda>, Error> {
        let shape = [slots, s, hkv, d];
        Ok(match self {
            DeviceRows::F32(x) => Kv::F32(x.view(shape)?),
            DeviceRows::F16(x) => Kv::F16(x.view(shape)?),
            DeviceRows::BF16(x) => Kv::BF16(x.view(shape)?),
            DeviceRows::Q8_0(x) => Kv::Q8_0(x.view([slots, s, hkv, d / 32])?),
        })
    }
}

/// Elements one after the other.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Rows {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    Q8_0(Vec<Q8_0>),
}

impl Rows {
    /// `n` zeros, a whole number of blocks. Fresh zero pages: a long context takes memory as it fills, not at once.
    pub(crate) fn zeros(dtype: DType, n: usize) -> Result<Rows, Error> {
        fn room<T>(n: usize) -> Result<(), Error> {
            Vec::<T>::new().try_reserve_exact(n).map_err(|_| {
                let bytes = n.saturating_mul(size_of::<T>());
                Error::argument("context", format!("no memory for {bytes} bytes of cache in one layer"))
            })
        }
        Ok(match dtype {
            DType::F16 => {
                room::<u16>(n)?;
                Rows::F16(vec![0u16; n].reinterpret_into())
            }
            DType::BF16 => {
                room::<u16>(n)?;
                Rows::BF16(vec![0u16; n].reinterpret_into())
            }
            DType::Q8_0 => {
                room::<Q8_0>(n / 32)?;
                Rows::Q8_0(vec![[0; 34]; n / 32])
            }
            _ => {
                room::<f32>(n)?;
                Rows::F32(vec![0.0; n])
            }
        })
    }

    /// Elements.
    pub(crate) fn len(&self) -> usize {
        match self {
            Rows::F32(x) => x.len(),
            Rows::F16(x) => x.len(),
            Rows::BF16(x) => x.len(),
            Rows::Q8_0(x) => 32 * x.len(),
        }
    }

    /// Converts rows of `width` elements, which go in from element `at` on.
    pub(crate) fn write(&mut self, at: usize, rows: &[f32], width: usize) -> Result<(), Error> {
        let to = at..at + rows.len();
        match self {
            Rows::F32(x) => x[to].copy_from_slice(rows),
            Rows::F16(x) => x[to].convert_from_f32_slice(rows),
            Rows::BF16(x) => x[to].convert_from_f32_slice(rows),
            Rows::Q8_0(x) => {
                let args = quantize::Args {
                    y: x[blocks(&to)].as_flattened_mut(),
                    dtype: DType::Q8_0,
                    y_row: None,
                    x: View::new(rows, [rows.len() / width.max(1), width])?,
                };
                quantize::run(args, &Exec::default())?;
            }
        }
        Ok(())
    }

    /// A copy of some elements.
    pub(crate) fn part(&self, range: Range<usize>) -> Rows {
        match self {
            Rows::F32(x) => Rows::F32(x[range].to_vec()),
            Rows::F16(x) => Rows::F16(x[range].to_vec()),
            Rows::BF16(x) => Rows::BF16(x[range].to_vec()),
            Rows::Q8_0(x) => Rows::Q8_0(x[blocks(&range)].to_vec()),
        }
    }

    #[cfg(feature = "device")]
    fn dtype(&self) -> DType {
        match self {
            Rows::F32(_) => DType::F32,
            Rows::F16(_) => DType::F16,
            Rows::BF16(_) => DType::BF16,
            Rows::Q8_0(_) => DType::Q8_0,
        }
    }

    #[cfg(feature = "device")]
    fn save_all(&self, to: &mut dyn FnMut(&[u8]) -> Result<(), Error>) -> Result<(), Error> {
        self.save(0..self.len(), to)
    }

    /// Both are of one type.
    pub(crate) fn same_type(&self, other: &Rows) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    /// Puts back what [`Rows::part`] gave; the types have been compared.
    pub(crate) fn put(&mut self, at: usize, part: &Rows) {
        let to = at..at + part.len();
        match (self, part) {
            (Rows::F32(x), Rows::F32(part)) => x[to].copy_from_slice(part),
            (Rows::F16(x), Rows::F16(part)) => x[to].copy_from_slice(part),
            (Rows::BF16(x), Rows::BF16(part)) => x[to].copy_from_slice(part),
            (Rows::Q8_0(x), Rows::Q8_0(part)) => x[blocks(&to)].copy_from_slice(part),
            _ => unreachable!("types were compared"),
        }
    }

    /// Bytes of so many elements.
    pub(crate) fn bytes(&self, elements: usize) -> usize {
        match self {
            Rows::F32(_) => 4 * elements,
            Rows::F16(_) | Rows::BF16(_) => 2 * elements,
            Rows::Q8_0(_) => elements / 32 * 34,
        }
    }

    /// Hands over some elements as little-endian bytes, part by part.
    pub(crate) fn save(
        &self,
        range: Range<usize>,
        to: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match self {
            Rows::F32(x) => save_f32(&x[range], to),
            Rows::F16(x) => save_u16(x[range].reinterpret_cast(), to),
            Rows::BF16(x) => save_u16(x[range].reinterpret_cast(), to),
            Rows::Q8_0(x) => to(x[blocks(&range)].as_flattened()),
        }
    }

    /// Fills some elements with what [`Rows::save`] gave; `from` fills the bytes it gets.
    pub(crate) fn load(
        &mut self,
        range: Range<usize>,
        from: &mut dyn FnMut(&mut [u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match self {
            Rows::F32(x) => load_f32(&mut x[range], from),
            Rows::F16(x) => load_u16(x[range].reinterpret_cast_mut(), from),
            Rows::BF16(x) => load_u16(x[range].reinterpret_cast_mut(), from),
            Rows::Q8_0(x) => from(x[blocks(&range)].as_flattened_mut()),
        }
    }

    /// As attention takes them, `[slots][S][HKV][D]`.
    pub(crate) fn view(&self, [slots, s, hkv, d]: [usize; 4]) -> Result<Kv<'_>, Error> {
        let shape = [slots, s, hkv, d];
        Ok(match self {
            Rows::F32(x) => Kv::F32(View::new(x, shape)?),
            Rows::F16(x) => Kv::F16(View::new(x, shape)?),
            Rows::BF16(x) => Kv::BF16(View::new(x, shape)?),
            Rows::Q8_0(x) => Kv::Q8_0(View::new(x, [slots, s, hkv, d / 32])?),
        })
    }
}

fn blocks(elements: &Range<usize>) -> Range<usize> {
    elements.start / 32..elements.end / 32
}

/// Floats of all slots, where the layer lies.
#[derive(Debug)]
pub(crate) enum Floats {
    Cpu(Vec<f32>),
    #[cfg(feature = "device")]
    Cuda(Buffer<f32>),
}

impl Floats {
    /// Appends those of a slot of `size` to `to`.
    pub(crate) fn part(&self, slot: usize, size: usize, to: &mut Vec<f32>) -> Result<(), Error> {
        match self {
            Floats::Cpu(x) => to.extend_from_slice(&x[slot * size..(slot + 1) * size]),
            #[cfg(feature = "device")]
            Floats::Cuda(x) => to.extend_from_slice(&x.download_at(slot * size, size)?),
        }
        Ok(())
    }

    /// Overwrites those of a slot.
    pub(crate) fn put(&mut self, slot: usize, values: &[f32]) -> Result<(), Error> {
        let at = slot * values.len();
        match self {
            Floats::Cpu(x) => x[at..at + values.len()].copy_from_slice(values),
            #[cfg(feature = "device")]
            Floats::Cuda(x) => x.write_at(at, values)?,
        }
        Ok(())
    }

    /// Zeros for a slot of `size`.
    pub(crate) fn clear(&mut self, slot: usize, size: usize) -> Result<(), Error> {
        match self {
            Floats::Cpu(x) => x[slot * size..(slot + 1) * size].fill(0.0),
            #[cfg(feature = "device")]
            Floats::Cuda(x) => x.write_at(slot * size, &vec![0.0; size])?,
        }
        Ok(())
    }

    /// Hands over those of a slot as little-endian bytes, part by part.
    pub(crate) fn save(
        &self,
        slot: usize,
        size: usize,
        to: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match self {
            Floats::Cpu(x) => save_f32(&x[slot * size..(slot + 1) * size], to),
            #[cfg(feature = "device")]
            Floats::Cuda(x) => save_f32(&x.download_at(slot * size, size)?, to),
        }
    }

    /// The reverse of [`Floats::save`].
    pub(crate) fn load(
        &mut self,
        slot: usize,
        size: usize,
        from: &mut dyn FnMut(&mut [u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match self {
            Floats::Cpu(x) => load_f32(&mut x[slot * size..(slot + 1) * size], from),
            #[cfg(feature = "device")]
            Floats::Cuda(x) => {
                let mut values = vec![0.0; size];
                load_f32(&mut values, from)?;
                Ok(x.write_at(slot * size, &values)?)
            }
        }
    }
}

/// Values converted at a time.
const PART: usize = 16384;

/// Hands over little-endian bytes, part by part.
pub(crate) fn save_f32(values: &[f32], to: &mut dyn FnMut(&[u8]) -> Result<(), Error>) -> Result<(), Error> {
    let mut bytes = Vec::with_capacity(4 * PART);
    for part in values.chunks(PART) {
        bytes.clear();
        bytes.extend(part.iter().flat_map(|x| x.to_le_bytes()));
        to(&bytes)?;
    }
    Ok(())
}

/// The reverse of [`save_f32`].
pub(crate) fn load_f32(values: &mut [f32], from: &mut dyn FnMut(&mut [u8]) -> Result<(), Error>) -> Result<(), Error> {
    let mut bytes = vec![0; 4 * PART.min(values.len())];
    for part in values.chunks_mut(PART) {
        let bytes = &mut bytes[..4 * part.len()];
        from(bytes)?;
        for (x, b) in part.iter_mut().zip(bytes.chunks_exact(4)) {
            *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }
    }
    Ok(())
}

fn save_u16(values: &[u16], to: &mut dyn FnMut(&[u8]) -> Result<(), Error>) -> Result<(), Error> {
    let mut bytes = Vec::with_capacity(2 * PART);
    for part in values.chunks(PART) {
        bytes.clear();
        bytes.extend(part.iter().flat_map(|x| x.to_le_bytes()));
        to(&bytes)?;
    }
    Ok(())
}

fn load_u16(values: &mut [u16], from: &mut dyn FnMut(&mut [u8]) -> Result<(), Error>) -> Result<(), Error> {
    let mut bytes = vec![0; 2 * PART.min(values.len())];
    for part in values.chunks_mut(PART) {
        let bytes = &mut bytes[..2 * part.len()];
        from(bytes)?;
        for (x, b) in part.iter_mut().zip(bytes.chunks_exact(2)) {
            *x = u16::from_le_bytes([b[0], b[1]]);
        }
    }
    Ok(())
}
