//! Weights in any [`DType`]: bytes with a shape and a stride an axis.

use crate::{DType, Error};

/// A read-only view of `R` axes over the bytes of a tensor; the innermost axis is contiguous. Strides count elements,
/// as those of [`View`](crate::View). The bytes may start at any address.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a, const R: usize> {
    data: &'a [u8],
    dtype: DType,
    shape: [usize; R],
    strides: [usize; R],
}

impl<'a, const R: usize> Weight<'a, R> {
    /// A packed row-major view of the front of `data`.
    pub fn new(data: &'a [u8], dtype: DType, shape: [usize; R]) -> Result<Self, Error> {
        let mut strides = [1usize; R];
        for i in (0..R.saturating_sub(1)).rev() {
            strides[i] = strides[i + 1].saturating_mul(shape[i + 1].max(1));
        }
        Self::strided(data, dtype, shape, strides)
    }

    /// A view with its own strides, in elements. Errors: a row length or a stride that is no multiple of the dtype's
    /// block, an innermost stride other than 1, bytes that end too early.
    pub fn strided(data: &'a [u8], dtype: DType, shape: [usize; R], strides: [usize; R]) -> Result<Self, Error> {
        let block = dtype.block();
        let (inner, inner_stride) = (shape[R - 1], strides[R - 1]);
        if inner > 1 && inner_stride != 1 {
            return Err(Error::argument("strides", format!("innermost stride is {inner_stride}, expected 1")));
        }
        let whole = |n: usize, what: &str| match n % block {
            0 => Ok(()),
            _ => Err(Error::argument("dtype", format!("{what} {n} is no multiple of {dtype}'s block of {block}"))),
        };
        whole(inner, "row length")?;
        for i in 0..R - 1 {
            if shape[i] > 1 && !shape.contains(&0) {
                whole(strides[i], "stride")?;
            }
        }
        let elements = if shape.contains(&0) {
            Some(0)
        } else {
            let outer = shape.iter().zip(strides).take(R - 1);
            outer.clone().try_fold(inner, |n, (&size, stride)| n.checked_add((size - 1).checked_mul(stride)?))
        };
        match elements.and_then(|n| dtype.bytes(n)) {
            Some(bytes) if bytes <= data.len() => Ok(Weight { data, dtype, shape, strides }),
            bytes => Err(Error::argument(
                "data",
                format!(
                    "{dtype} of shape {shape:?} and strides {strides:?} needs {} bytes, there are {}",
                    bytes.map_or("too many".into(), |b| b.to_string()),
                    data.len()
                ),
            )),
        }
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> [usize; R] {
        self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Stride of axis `i`, as the C side takes it.
    pub(crate) fn stride(&self, i: usize) -> i64 {
        self.strides[i] as i64
    }

    pub(crate) fn as_ptr(&self) -> *const std::ffi::c_void {
        self.data.as_ptr().cast()
    }

    /// Error naming `arg` unless the shape is `expected`.
    pub(crate) fn expect(&self, arg: &'static str, expected: [usize; R]) -> Result<(), Error> {
        if self.shape == expected {
            return Ok(());
        }
        Err(Error::Shape { arg, got: self.shape.to_vec(), expected: expected.to_vec() })
    }
}

impl<'a> Weight<'a, 3> {
    /// Gate and up of a merged packed tensor `[E][2F][D]`, gate first.
    pub fn split_gate_up(data: &'a [u8], dtype: DType, [e, f, d]: [usize; 3]) -> Result<(Self, Self), Error> {
        let expert = f.saturating_mul(2).saturating_mul(d);
        Weight::new(data, dtype, [e, f.saturating_mul(2), d])?;
        // f * d elements are whole blocks and inside the tensor just checked; an empty one has nothing to skip.
        let skip = if e == 0 { 0 } else { dtype.bytes(f * d).unwrap_or(0) };
        let half = |data| Weight::strided(data, dtype, [e, f, d], [expert, d, 1]);
        Ok((half(data)?, half(&data[skip..])?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_never_reaches_past_its_bytes() {
        let data = [0u8; 4 * 34];
        assert!(Weight::new(&data, DType::Q8_0, [2, 64]).is_ok());
        assert!(Weight::new(&data, DType::Q8_0, [2, 48]).is_err());
        assert!(Weight::new(&data, DType::Q8_0, [3, 64]).is_err());
        assert!(Weight::strided(&data, DType::Q8_0, [2, 32], [96, 1]).is_ok());
        assert!(Weight::strided(&data, DType::Q8_0, [2, 32], [128, 1]).is_err());
        assert!(Weight::strided(&data, DType::Q8_0, [2, 32], [48, 1]).is_err());
        assert!(Weight::new(&data, DType::F32, [usize::MAX, 2]).is_err());
        assert!(Weight::new(&data, DType::Q4_K, [0, 256]).is_ok());
        assert!(Weight::split_gate_up(&data, DType::Q8_0, [1, 2, 32]).is_ok());
        assert!(Weight::split_gate_up(&data, DType::Q8_0, [2, 2, 32]).is_err());
        assert!(Weight::split_gate_up(&data, DType::Q8_0, [0, 2, 32]).is_ok());
    }
}
