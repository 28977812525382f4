//! Strided views: a slice with a shape and a stride an axis, proven to lie inside the slice when they are made.

use crate::memory::{Cpu, Memory};
use crate::status::Error;
use std::fmt::{Debug, Formatter};
use std::marker::PhantomData;

/// A read-only view of `R` axes over a slice; the innermost axis is contiguous, strides count elements. On a device it is a
/// view of a buffer ([`Memory`]).
pub struct View<'a, const R: usize, T = f32, M: Memory = Cpu> {
    at: *const T,
    len: usize,
    shape: [usize; R],
    strides: [usize; R],
    id: M::Id,
    life: PhantomData<&'a [T]>,
}

/// A writable view of `R` axes over a slice, as [`View`].
pub struct ViewMut<'a, const R: usize, T = f32, M: Memory = Cpu> {
    at: *mut T,
    len: usize,
    shape: [usize; R],
    strides: [usize; R],
    id: M::Id,
    life: PhantomData<&'a mut [T]>,
}

impl<const R: usize, T, M: Memory> Clone for View<'_, R, T, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<const R: usize, T, M: Memory> Copy for View<'_, R, T, M> {}

// SAFETY: a view is used as the slice it was made from.
unsafe impl<const R: usize, T: Sync, M: Memory> Send for View<'_, R, T, M> {}
// SAFETY: as above.
unsafe impl<const R: usize, T: Sync, M: Memory> Sync for View<'_, R, T, M> {}
// SAFETY: as above.
unsafe impl<const R: usize, T: Send, M: Memory> Send for ViewMut<'_, R, T, M> {}
// SAFETY: as above; a shared one gives no way to its elements.
unsafe impl<const R: usize, T: Sync, M: Memory> Sync for ViewMut<'_, R, T, M> {}

impl<const R: usize, T, M: Memory> Debug for View<'_, R, T, M> {
    fn fmt(&self, f: &mut Formatter) -> std::fmt::Result {
        write!(f, "View {{ shape: {:?}, strides: {:?} }}", self.shape, self.strides)
    }
}
impl<const R: usize, T, M: Memory> Debug for ViewMut<'_, R, T, M> {
    fn fmt(&self, f: &mut Formatter) -> std::fmt::Result {
        write!(f, "ViewMut {{ shape: {:?}, strides: {:?} }}", self.shape, self.strides)
    }
}

/// Row-major strides of `shape`.
pub(crate) fn packed<const R: usize>(shape: [usize; R]) -> [usize; R] {
    let mut strides = [1usize; R];
    for i in (0..R.saturating_sub(1)).rev() {
        strides[i] = strides[i + 1].saturating_mul(shape[i + 1].max(1));
    }
    strides
}

/// Whether elements of that shape and strides lie one after the other.
fn gapless<const R: usize>(shape: [usize; R], strides: [usize; R]) -> bool {
    shape.contains(&0) || (0..R).all(|i| shape[i] <= 1 || strides[i] == packed(shape)[i])
}

/// Elements that a view reaches over, if a number can hold them.
pub(crate) fn reach<const R: usize>(shape: [usize; R], strides: [usize; R]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().zip(strides).try_fold(1usize, |n, (&size, stride)| n.checked_add((size - 1).checked_mul(stride)?))
}

/// `Ok` where every index of the view lies below `len` and its innermost axis is contiguous.
pub(crate) fn fits<const R: usize>(len: usize, shape: [usize; R], strides: [usize; R]) -> Result<(), Error> {
    if R > 0 && shape[R - 1] > 1 && strides[R - 1] != 1 {
        return Err(Error::argument("strides", format!("innermost stride is {}, expected 1", strides[R - 1])));
    }
    match reach(shape, strides) {
        Some(n) if n <= len => Ok(()),
        n => Err(Error::Length {
            shape: shape.to_vec(),
            strides: strides.to_vec(),
            needed: n.unwrap_or(usize::MAX),
            len,
        }),
    }
}

impl<'a, const R: usize, T> View<'a, R, T> {
    /// A packed row-major view of the front of `data`.
    pub fn new(data: &'a [T], shape: [usize; R]) -> Result<Self, Error> {
        Self::strided(data, shape, packed(shape))
    }

    /// A view with its own strides, in elements. Stride 0 repeats an axis.
    pub fn strided(data: &'a [T], shape: [usize; R], strides: [usize; R]) -> Result<Self, Error> {
        // SAFETY: the slice itself.
        unsafe { View::over(data.as_ptr(), data.len(), shape, strides, ()) }
    }
}

impl<'a, T> From<&'a [T]> for View<'a, 1, T> {
    fn from(data: &'a [T]) -> Self {
        View { at: data.as_ptr(), len: data.len(), shape: [data.len()], strides: [1], id: (), life: PhantomData }
    }
}

impl<'a, const R: usize, T, M: Memory> View<'a, R, T, M> {
    /// A view of `len` elements.
    ///
    /// # Safety
    /// There are as many at `at`, in the memory `id`, for the life `'a`, and nobody writes them.
    pub(crate) unsafe fn over(
        at: *const T,
        len: usize,
        shape: [usize; R],
        strides: [usize; R],
        id: M::Id,
    ) -> Result<Self, Error> {
        fits(len, shape, strides)?;
        Ok(View { at, len, shape, strides, id, life: PhantomData })
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> [usize; R] {
        self.shape
    }

    /// Stride of axis `i`, as the C side takes it.
    pub(crate) fn stride(&self, i: usize) -> i64 {
        self.strides[i] as i64
    }

    /// Whether the elements lie one after the other.
    pub(crate) fn packed(&self) -> bool {
        gapless(self.shape, self.strides)
    }

    /// Those of the first `N` axes.
    pub(crate) fn outer<const N: usize>(&self) -> [i64; N] {
        std::array::from_fn(|i| self.stride(i))
    }

    pub(crate) fn as_ptr(&self) -> *const T {
        self.at
    }

    pub(crate) fn id(&self) -> M::Id {
        self.id
    }

    /// Bytes it reaches over.
    pub(crate) fn bytes(&self) -> usize {
        reach(self.shape, self.strides).map_or(0, |n| n * size_of::<T>())
    }

    /// Error naming `arg` unless the shape is `expected`.
    pub(crate) fn expect(&self, arg: &'static str, expected: [usize; R]) -> Result<(), Error> {
        expect(arg, self.shape, expected)
    }

    /// Another view of the same elements, from element `offset` on.
    pub(crate) fn part<const Q: usize>(
        &self,
        offset: usize,
        shape: [usize; Q],
        strides: [usize; Q],
    ) -> Result<View<'a, Q, T, M>, Error> {
        let offset = offset.min(self.len);
        // SAFETY: the rest of what this view is over; the address stays inside or at the end.
        unsafe { View::over(self.at.wrapping_add(offset), self.len - offset, shape, strides, self.id) }
    }
}

impl<'a, const R: usize, T> ViewMut<'a, R, T> {
    /// A packed row-major view of the front of `data`.
    pub fn new(data: &'a mut [T], shape: [usize; R]) -> Result<Self, Error> {
        Self::strided(data, shape, packed(shape))
    }

    /// A view with its own strides, in elements. The C check refuses strides that let two elements share memory.
    pub fn strided(data: &'a mut [T], shape: [usize; R], strides: [usize; R]) -> Result<Self, Error> {
        // SAFETY: the slice itself.
        unsafe { ViewMut::over(data.as_mut_ptr(), data.len(), shape, strides, ()) }
    }
}

impl<const R: usize, T, M: Memory> ViewMut<'_, R, T, M> {
    /// A view of `len` elements.
    ///
    /// # Safety
    /// There are as many at `at`, in the memory `id`, for the life of the view, and nobody else uses them.
    pub(crate) unsafe fn over(
        at: *mut T,
        len: usize,
        shape: [usize; R],
        strides: [usize; R],
        id: M::Id,
    ) -> Result<Self, Error> {
        fits(len, shape, strides)?;
        Ok(ViewMut { at, len, shape, strides, id, life: PhantomData })
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> [usize; R] {
        self.shape
    }

    pub(crate) fn stride(&self, i: usize) -> i64 {
        self.strides[i] as i64
    }

    /// Whether the elements lie one after the other.
    pub(crate) fn packed(&self) -> bool {
        gapless(self.shape, self.strides)
    }

    /// Those of the first `N` axes.
    pub(crate) fn outer<const N: usize>(&self) -> [i64; N] {
        std::array::from_fn(|i| self.stride(i))
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut T {
        self.at
    }

    pub(crate) fn id(&self) -> M::Id {
        self.id
    }

    /// Bytes it reaches over.
    pub(crate) fn bytes(&self) -> usize {
        reach(self.shape, self.strides).map_or(0, |n| n * size_of::<T>())
    }

    /// Error naming `arg` unless the shape is `expected`.
    pub(crate) fn expect(&self, arg: &'static str, expected: [usize; R]) -> Result<(), Error> {
        expect(arg, self.shape, expected)
    }

    /// Another view of the same elements, from element `offset` on.
    pub(crate) fn part<const Q: usize>(
        &mut self,
        offset: usize,
        shape: [usize; Q],
        strides: [usize; Q],
    ) -> Result<ViewMut<'_, Q, T, M>, Error> {
        let offset = offset.min(self.len);
        // SAFETY: the rest of what this view is over, borrowed as long; the address stays inside or at the end.
        unsafe { ViewMut::over(self.at.wrapping_add(offset), self.len - offset, shape, strides, self.id) }
    }
}

pub(crate) fn expect<const R: usize>(arg: &'static str, got: [usize; R], expected: [usize; R]) -> Result<(), Error> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape { arg, got: got.to_vec(), expected: expected.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_never_reaches_past_its_slice() {
        let data = [0f32; 12];
        assert!(View::new(&data, [3, 4]).is_ok());
        assert!(View::new(&data, [3, 5]).is_err());
        assert!(View::strided(&data, [3, 2], [5, 1]).is_ok());
        assert!(View::strided(&data, [3, 3], [5, 1]).is_err());
        assert!(View::strided(&data, [3, 2], [1, 2]).is_err());
        assert!(View::new(&data, [usize::MAX, usize::MAX]).is_err());
        assert!(View::new(&data, [0, usize::MAX]).is_ok());
    }
}
