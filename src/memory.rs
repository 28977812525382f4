//! Where arrays lie: in the CPU's memory, or in that of a device (features `cuda`, `cuda-host`). Arguments of operators
//! take either, and the same checks hold for both: `run` computes at once on the CPU, `queue` on a device.

use crate::view::{View, ViewMut};
use crate::{DType, Error, Weight};
use std::fmt::Debug;

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// A kind of memory: [`Cpu`], or `device::Cuda`.
pub trait Memory: sealed::Sealed + Copy + Debug + 'static {
    /// Tells one such memory from another.
    type Id: Copy + PartialEq + Debug + Send + Sync;
    /// Indices that are read, by the checks of a call too.
    type Indices<'a>: Copy + Debug;
    /// Values that are owned.
    type Vec<T: Element>: Debug;

    /// As the CPU reads them.
    #[doc(hidden)]
    fn indices<'a>(indices: &Self::Indices<'a>) -> &'a [i64];
    /// Where they lie.
    #[doc(hidden)]
    fn indices_id(indices: &Self::Indices<'_>) -> Self::Id;
    /// All of it.
    #[doc(hidden)]
    fn whole<T: Element>(values: &Self::Vec<T>) -> View<'_, 1, T, Self>;
}

/// What arrays hold: plain numbers or blocks of them, of which every bit pattern is one.
pub trait Element: Copy + Debug + Send + Sync + sealed::Sealed + 'static {}

macro_rules! elements {
    ($($t:ty),*) => { $(impl sealed::Sealed for $t {} impl Element for $t {})* };
}
elements!(f32, i32, i64, u8, u16, u32, half::f16, half::bf16, crate::attention::Q8_0);

/// Floats that an operator may be generic over: f32, `half::bf16` and `half::f16`.
pub trait Float: Element {
    /// The type, as a value.
    const DTYPE: DType;
}

impl Float for f32 {
    const DTYPE: DType = DType::F32;
}
impl Float for half::bf16 {
    const DTYPE: DType = DType::BF16;
}
impl Float for half::f16 {
    const DTYPE: DType = DType::F16;
}

/// The CPU's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpu;

impl sealed::Sealed for Cpu {}
impl Memory for Cpu {
    type Id = ();
    type Indices<'a> = &'a [i64];
    type Vec<T: Element> = Vec<T>;

    fn indices<'a>(indices: &Self::Indices<'a>) -> &'a [i64] {
        indices
    }

    fn indices_id(_: &Self::Indices<'_>) {}

    fn whole<T: Element>(values: &Vec<T>) -> View<'_, 1, T> {
        values.as_slice().into()
    }
}

/// Bytes that an argument reaches over.
#[cfg_attr(not(any(feature = "cuda", feature = "cuda-host")), allow(dead_code))]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extent {
    pub at: usize,
    pub bytes: usize,
    pub written: bool,
}

/// No call has more arguments that point somewhere.
const ARGUMENTS: usize = 16;

/// Takes the addresses of a call's arguments and notes where they lie: one memory, or the call is refused.
pub(crate) struct Addresses<M: Memory = Cpu> {
    id: Option<M::Id>,
    differ: bool,
    extents: [Extent; ARGUMENTS],
    count: usize,
}

impl<M: Memory> Addresses<M> {
    pub fn new() -> Self {
        Addresses {
            id: None,
            differ: false,
            extents: [Extent { at: 0, bytes: 0, written: false }; ARGUMENTS],
            count: 0,
        }
    }

    fn note(&mut self, at: usize, bytes: usize, written: bool, id: M::Id) {
        self.differ |= *self.id.get_or_insert(id) != id;
        self.extents[self.count] = Extent { at, bytes, written };
        self.count += 1;
    }

    pub fn read<const R: usize, T>(&mut self, view: &View<R, T, M>) -> *const T {
        self.note(view.as_ptr() as usize, view.bytes(), false, view.id());
        view.as_ptr()
    }

    /// NULL for `None`.
    pub fn read_some<const R: usize, T>(&mut self, view: &Option<View<R, T, M>>) -> *const T {
        view.as_ref().map_or(std::ptr::null(), |view| self.read(view))
    }

    pub fn write<const R: usize, T>(&mut self, view: &mut ViewMut<R, T, M>) -> *mut T {
        self.note(view.as_mut_ptr() as usize, view.bytes(), true, view.id());
        view.as_mut_ptr()
    }

    /// NULL for `None`.
    pub fn write_some<const R: usize, T>(&mut self, view: &mut Option<ViewMut<R, T, M>>) -> *mut T {
        view.as_mut().map_or(std::ptr::null_mut(), |view| self.write(view))
    }

    pub fn weight<const R: usize>(&mut self, weight: &Weight<R, M>) -> *const std::ffi::c_void {
        self.note(weight.as_ptr() as usize, weight.bytes(), false, weight.id());
        weight.as_ptr()
    }

    /// Indices where the CPU has them, for the checks, if there are as many as expected. NULL for `None`.
    pub fn indices(
        &mut self,
        arg: &'static str,
        indices: &Option<M::Indices<'_>>,
        expected: usize,
    ) -> Result<*const i64, Error> {
        let Some(indices) = indices else { return Ok(std::ptr::null()) };
        let values = M::indices(indices);
        crate::view::expect(arg, [values.len()], [expected])?;
        self.note(values.as_ptr() as usize, size_of_val(values), false, M::indices_id(indices));
        Ok(values.as_ptr())
    }

    /// The memory of all of them, `None` where there was none.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub fn one(&self) -> Result<Option<M::Id>, Error> {
        match self.differ {
            true => Err(Error::argument("args", "lie on more than one device")),
            false => Ok(self.id),
        }
    }

    /// What they reach over.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    pub fn extents(&self) -> &[Extent] {
        &self.extents[..self.count]
    }
}
