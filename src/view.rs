//! Strided views: a slice with a shape and a stride an axis, proven to lie inside the slice when they are made.

use crate::status::Error;

/// A read-only view of `R` axes over a slice; the innermost axis is contiguous, strides count elements.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, const R: usize, T = f32> {
    data: &'a [T],
    shape: [usize; R],
    strides: [usize; R],
}

/// A writable view of `R` axes over a slice, as [`View`].
#[derive(Debug)]
pub struct ViewMut<'a, const R: usize, T = f32> {
    data: &'a mut [T],
    shape: [usize; R],
    strides: [usize; R],
}

/// Row-major strides of `shape`.
pub(crate) fn packed<const R: usize>(shape: [usize; R]) -> [usize; R] {
    let mut strides = [1usize; R];
    for i in (0..R.saturating_sub(1)).rev() {
        strides[i] = strides[i + 1].saturating_mul(shape[i + 1].max(1));
    }
    strides
}

/// `Ok` where every index of the view lies below `len` and its innermost axis is contiguous.
pub(crate) fn fits<const R: usize>(len: usize, shape: [usize; R], strides: [usize; R]) -> Result<(), Error> {
    if R > 0 && shape[R - 1] > 1 && strides[R - 1] != 1 {
        return Err(Error::argument("strides", format!("innermost stride is {}, expected 1", strides[R - 1])));
    }
    let needed = if shape.contains(&0) {
        Some(0)
    } else {
        shape.iter().zip(strides).try_fold(1usize, |n, (&size, stride)| n.checked_add((size - 1).checked_mul(stride)?))
    };
    match needed {
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
        fits(data.len(), shape, strides)?;
        Ok(View { data, shape, strides })
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> [usize; R] {
        self.shape
    }

    /// Stride of axis `i`, as the C side takes it.
    pub(crate) fn stride(&self, i: usize) -> i64 {
        self.strides[i] as i64
    }

    pub(crate) fn as_ptr(&self) -> *const T {
        self.data.as_ptr()
    }

    /// Error naming `arg` unless the shape is `expected`.
    pub(crate) fn expect(&self, arg: &'static str, expected: [usize; R]) -> Result<(), Error> {
        expect(arg, self.shape, expected)
    }

    /// Another view of the same slice, from element `offset` on.
    pub(crate) fn part<const Q: usize>(
        &self,
        offset: usize,
        shape: [usize; Q],
        strides: [usize; Q],
    ) -> Result<View<'a, Q, T>, Error> {
        View::strided(self.data.get(offset..).unwrap_or(&[]), shape, strides)
    }
}

impl<'a, const R: usize, T> ViewMut<'a, R, T> {
    /// A packed row-major view of the front of `data`.
    pub fn new(data: &'a mut [T], shape: [usize; R]) -> Result<Self, Error> {
        Self::strided(data, shape, packed(shape))
    }

    /// A view with its own strides, in elements. The C check refuses strides that let two elements share memory.
    pub fn strided(data: &'a mut [T], shape: [usize; R], strides: [usize; R]) -> Result<Self, Error> {
        fits(data.len(), shape, strides)?;
        Ok(ViewMut { data, shape, strides })
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> [usize; R] {
        self.shape
    }

    pub(crate) fn stride(&self, i: usize) -> i64 {
        self.strides[i] as i64
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut T {
        self.data.as_mut_ptr()
    }

    /// Error naming `arg` unless the shape is `expected`.
    pub(crate) fn expect(&self, arg: &'static str, expected: [usize; R]) -> Result<(), Error> {
        expect(arg, self.shape, expected)
    }

    /// Another view of the same slice, from element `offset` on.
    pub(crate) fn part<const Q: usize>(
        &mut self,
        offset: usize,
        shape: [usize; Q],
        strides: [usize; Q],
    ) -> Result<ViewMut<'_, Q, T>, Error> {
        ViewMut::strided(self.data.get_mut(offset..).unwrap_or(&mut []), shape, strides)
    }
}

pub(crate) fn expect<const R: usize>(arg: &'static str, got: [usize; R], expected: [usize; R]) -> Result<(), Error> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape { arg, got: got.to_vec(), expected: expected.to_vec() })
}

/// Where a view lies and how, on the CPU or a device, without its life: what the C side takes. Nobody reads through it.
#[derive(Clone, Copy)]
pub(crate) struct Array<const R: usize> {
    pub at: *mut f32,
    pub shape: [usize; R],
    pub strides: [i64; R],
}

impl<const R: usize> Array<R> {
    /// Error naming `arg` unless the shape is `expected`.
    pub fn expect(&self, arg: &'static str, expected: [usize; R]) -> Result<(), Error> {
        expect(arg, self.shape, expected)
    }
}

impl<const R: usize> From<&View<'_, R>> for Array<R> {
    fn from(view: &View<R>) -> Self {
        Array { at: view.as_ptr().cast_mut(), shape: view.shape, strides: view.strides.map(|s| s as i64) }
    }
}

impl<const R: usize> From<&mut ViewMut<'_, R>> for Array<R> {
    fn from(view: &mut ViewMut<R>) -> Self {
        Array { at: view.as_mut_ptr(), shape: view.shape, strides: view.strides.map(|s| s as i64) }
    }
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
