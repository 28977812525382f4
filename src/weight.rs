//! Weights in any [`DType`]: bytes with a shape and a stride an axis.

use crate::memory::{Cpu, Memory};
use crate::view::{expect, packed};
use crate::{DType, Error, View};
use std::fmt::{Debug, Formatter};
use std::marker::PhantomData;

/// A read-only view of `R` axes over the bytes of a tensor; the innermost axis is contiguous. Strides count elements,
/// as those of [`View`](crate::View). The bytes may start at any address.
pub struct Weight<'a, const R: usize, M: Memory = Cpu> {
    at: *const u8,
    dtype: DType,
    shape: [usize; R],
    strides: [usize; R],
    bytes: usize,
    id: M::Id,
    life: PhantomData<&'a [u8]>,
}

impl<const R: usize, M: Memory> Clone for Weight<'_, R, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<const R: usize, M: Memory> Copy for Weight<'_, R, M> {}

// SAFETY: a weight is used as the bytes it was made from.
unsafe impl<const R: usize, M: Memory> Send for Weight<'_, R, M> {}
// SAFETY: as above.
unsafe impl<const R: usize, M: Memory> Sync for Weight<'_, R, M> {}

impl<const R: usize, M: Memory> Debug for Weight<'_, R, M> {
    fn fmt(&self, f: &mut Formatter) -> std::fmt::Result {
        write!(f, "Weight {{ dtype: {}, shape: {:?}, strides: {:?} }}", self.dtype, self.shape, self.strides)
    }
}

impl<'a, const R: usize> Weight<'a, R> {
    /// A packed row-major view of the front of `data`.
    pub fn new(data: &'a [u8], dtype: DType, shape: [usize; R]) -> Result<Self, Error> {
        Self::strided(data, dtype, shape, packed(shape))
    }

    /// A view with its own strides, in elements. Errors: a row length or a stride that is no multiple of the dtype's
    /// block, an innermost stride other than 1, bytes that end too early.
    pub fn strided(data: &'a [u8], dtype: DType, shape: [usize; R], strides: [usize; R]) -> Result<Self, Error> {
        // SAFETY: the slice itself.
        unsafe { Weight::over(data.as_ptr(), data.len(), dtype, shape, strides, ()) }
    }
}

impl<const R: usize, M: Memory> Weight<'_, R, M> {
    /// A view of `len` bytes.
    ///
    /// # Safety
    /// There are as many at `at`, in the memory `id`, for the life of the view, and nobody writes them.
    pub(crate) unsafe fn over(
        at: *const u8,
        len: usize,
        dtype: DType,
        shape: [usize; R],
        strides: [usize; R],
        id: M::Id,
    ) -> Result<Self, Error> {
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
            Some(bytes) if bytes <= len => Ok(Weight { at, dtype, shape, strides, bytes, id, life: PhantomData }),
            bytes => Err(Error::argument(
                "data",
                format!(
                    "{dtype} of shape {shape:?} and strides {strides:?} needs {} bytes, there are {len}",
                    bytes.map_or("too many".into(), |b| b.to_string()),
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
        self.at.cast()
    }

    pub(crate) fn id(&self) -> M::Id {
        self.id
    }

    /// Bytes it reaches over.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Error naming `arg` unless the shape is `expected`.
    pub(crate) fn expect(&self, arg: &'static str, expected: [usize; R]) -> Result<(), Error> {
        expect(arg, self.shape, expected)
    }
}

impl<'a, const R: usize, M: Memory> From<View<'a, R, f32, M>> for Weight<'a, R, M> {
    fn from(view: View<'a, R, f32, M>) -> Self {
        Weight {
            at: view.as_ptr().cast(),
            dtype: DType::F32,
            shape: view.shape(),
            strides: std::array::from_fn(|i| view.stride(i) as usize),
            bytes: view.bytes(),
            id: view.id(),
            life: PhantomData,
        }
    }
}

impl<'a> Weight<'a, 3> {
    /// Gate and up of a merged packed tensor `[E][2F][D]`, gate first.
    pub fn split_gate_up(data: &'a [u8], dtype: DType, [e, f, d]: [usize; 3]) -> Result<(Self, Self), Error> {
        Weight::new(data, dtype, [e, f.saturating_mul(2), d])?.halves()
    }
}

impl<M: Memory> Weight<'_, 3, M> {
    /// Gate and up of a merged tensor `[E][2F][D]`, gate first. Error: an odd number of rows.
    pub fn halves(self) -> Result<(Self, Self), Error> {
        let [e, rows, d] = self.shape;
        if rows % 2 != 0 {
            return Err(Error::argument("gate_up", format!("{rows} rows an expert, expected an even number")));
        }
        // Rows are whole blocks and lie inside the tensor; an empty one has nothing to skip.
        let skip = if self.shape.contains(&0) { Some(0) } else { self.dtype.bytes(rows / 2 * self.strides[1]) };
        let skip = skip.unwrap_or(0);
        let gate = Weight { shape: [e, rows / 2, d], bytes: self.bytes - skip, ..self };
        Ok((gate, Weight { at: self.at.wrapping_add(skip), ..gate }))
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
