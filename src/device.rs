//! CUDA devices, streams and buffers (feature `cuda`), on `cust`.
//!
//! A [`Buffer`] lies in a device's memory; operators take [`DeviceView`]s of buffers and queue their work on a
//! [`Stream`]. A view that is written borrows its buffer mutably, so that no safe call can alias it. A call returns
//! before its work is done; copies to and from the CPU wait for all work queued before, on any stream, and so does
//! freeing. Work on different streams is in no order: a buffer that one stream writes and another uses needs a
//! [`Stream::wait`] in between, or holds one of the values.
//!
//! ```no_run
//! # fn main() -> Result<(), qwen3next_kernels::Error> {
//! use qwen3next_kernels::{device::Device, norm};
//! let device = Device::open(0)?;
//! let (stream, x) = (device.stream()?, device.upload(&[1.0f32; 4096])?);
//! let mut y = device.zeros::<f32>(4096)?;
//! norm::cuda::run(
//!     norm::cuda::Args {
//!         y: y.view_mut([2, 1, 2048])?,
//!         x: Some(x.view([2, 1, 2048])?),
//!         kind: norm::cuda::Kind::L2,
//!         eps: 1e-6,
//!     },
//!     &stream,
//! )?;
//! let y: Vec<f32> = y.download()?;
//! # Ok(())
//! # }
//! ```

use crate::view::{expect, fits, packed, Array};
use crate::{ffi, Error};
use cust::context::{Context, ContextHandle, CurrentContext};
use cust::error::CudaError;
use cust::memory::{CopyDestination, DeviceBuffer, DeviceCopy};
use cust::stream::StreamFlags;
use std::marker::PhantomData;
use std::sync::Arc;

/// What a buffer may hold: numbers, of which every bit pattern is one.
pub trait Element: DeviceCopy + Copy + Default + sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

macro_rules! elements {
    ($($t:ty),*) => { $(impl sealed::Sealed for $t {} impl Element for $t {})* };
}
elements!(f32, i32, i64, u8, u16);

/// A CUDA device, ready for work. Clones share one context.
#[derive(Debug, Clone)]
pub struct Device(Arc<Context>);

fn cuda<T>(what: &'static str, result: Result<T, CudaError>) -> Result<T, Error> {
    result.map_err(|e| Error::Device { operator: what, report: e.to_string() })
}

impl Device {
    /// How many devices there are. Error: no driver, in words.
    pub fn count() -> Result<u32, Error> {
        // SAFETY: NULL, or a NUL-terminated text that is not freed.
        let missing = unsafe { ffi::q3n_cuda_driver_missing() };
        if !missing.is_null() {
            // SAFETY: not NULL, so as above.
            let text = unsafe { std::ffi::CStr::from_ptr(missing) };
            return Err(Error::argument("device", text.to_string_lossy()));
        }
        cuda("device", cust::init(cust::CudaFlags::empty()))?;
        cuda("device", cust::device::Device::num_devices())
    }

    /// The device of that number, from 0.
    pub fn open(number: u32) -> Result<Device, Error> {
        let count = Device::count()?;
        if number >= count {
            return Err(Error::argument("device", format!("number {number} of {count}")));
        }
        let device = cuda("device", cust::device::Device::get_device(number))?;
        Ok(Device(Arc::new(cuda("device", Context::new(device))?)))
    }

    /// Its name, as the driver gives it.
    pub fn name(&self) -> Result<String, Error> {
        self.enter()?;
        cuda("device", CurrentContext::get_device().and_then(|d| d.name()))
    }

    /// A new stream.
    pub fn stream(&self) -> Result<Stream, Error> {
        self.enter()?;
        // DEFAULT: copies, which use the default stream, wait for its work.
        let inner = cuda("stream", cust::stream::Stream::new(StreamFlags::DEFAULT, None))?;
        Ok(Stream { inner: Some(inner), device: self.clone() })
    }

    /// A buffer with these values.
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<Buffer<T>, Error> {
        self.enter()?;
        let memory = Some(cuda("buffer", DeviceBuffer::from_slice(values))?);
        Ok(Buffer { memory, device: self.clone() })
    }

    /// A buffer of `len` zeros.
    pub fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<T>, Error> {
        self.upload(&vec![T::default(); len])
    }

    /// Makes the device's context that of this thread.
    fn enter(&self) -> Result<(), Error> {
        cuda("device", CurrentContext::set_current(&*self.0))
    }

    fn is(&self, other: &Device) -> bool {
        self.0.get_inner() == other.0.get_inner()
    }
}

/// A queue of work on a device.
#[derive(Debug)]
pub struct Stream {
    /// `None` while it is dropped.
    inner: Option<cust::stream::Stream>,
    device: Device,
}

impl Stream {
    /// Returns when all its work is done; an error of any of it shows here.
    pub fn wait(&self) -> Result<(), Error> {
        self.device.enter()?;
        cuda("stream", self.inner().synchronize())
    }

    fn inner(&self) -> &cust::stream::Stream {
        self.inner.as_ref().expect("there until it is dropped")
    }

    /// Calls `launch` with the stream as C takes it, where all `views` lie on its device.
    pub(crate) fn launch(
        &self,
        operator: &'static str,
        views: &[Option<&Device>],
        launch: impl FnOnce(ffi::q3n_stream) -> i32,
    ) -> Result<(), Error> {
        if !views.iter().flatten().all(|device| device.is(&self.device)) {
            return Err(Error::argument("stream", "a view lies on another device"));
        }
        self.device.enter()?;
        let status = launch(self.inner().as_inner().cast());
        if status as u32 & 0xff == ffi::Q3N_DEVICE {
            // SAFETY: a NUL-terminated text that only this thread's next launch changes.
            let report = unsafe { std::ffi::CStr::from_ptr(ffi::q3n_cuda_report()) };
            return Err(Error::Device { operator, report: report.to_string_lossy().into_owned() });
        }
        crate::status::check(operator, status)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // A context that can't be entered any more took its streams with it.
        if self.device.enter().is_err() {
            std::mem::forget(self.inner.take());
        }
    }
}

/// Elements in a device's memory.
#[derive(Debug)]
pub struct Buffer<T: Element> {
    /// `None` while it is dropped.
    memory: Option<DeviceBuffer<T>>,
    device: Device,
}

impl<T: Element> Buffer<T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.memory().len()
    }

    /// No elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Overwrites all of it, once the work queued so far is done.
    pub fn write(&mut self, values: &[T]) -> Result<(), Error> {
        if values.len() != self.len() {
            return Err(Error::argument("values", format!("{} of them, expected {}", values.len(), self.len())));
        }
        self.device.enter()?;
        cuda("buffer", self.memory.as_mut().expect("there until it is dropped").copy_from(values))
    }

    /// The values, once the work queued so far is done.
    pub fn download(&self) -> Result<Vec<T>, Error> {
        self.device.enter()?;
        let mut values = vec![T::default(); self.len()];
        cuda("buffer", self.memory().copy_to(&mut values[..]))?;
        Ok(values)
    }

    /// A packed view of its front.
    pub fn view<const R: usize>(&self, shape: [usize; R]) -> Result<DeviceView<'_, R, T>, Error> {
        self.view_strided(shape, packed(shape))
    }

    /// A view with strides in elements.
    pub fn view_strided<const R: usize>(
        &self,
        shape: [usize; R],
        strides: [usize; R],
    ) -> Result<DeviceView<'_, R, T>, Error> {
        fits(self.len(), shape, strides)?;
        Ok(DeviceView { at: self.address(), shape, strides, device: &self.device, life: PhantomData })
    }

    /// A packed writable view of its front.
    pub fn view_mut<const R: usize>(&mut self, shape: [usize; R]) -> Result<DeviceViewMut<'_, R, T>, Error> {
        self.view_mut_strided(shape, packed(shape))
    }

    /// A writable view with strides in elements.
    pub fn view_mut_strided<const R: usize>(
        &mut self,
        shape: [usize; R],
        strides: [usize; R],
    ) -> Result<DeviceViewMut<'_, R, T>, Error> {
        fits(self.len(), shape, strides)?;
        Ok(DeviceViewMut { at: self.address(), shape, strides, device: &self.device, life: PhantomData })
    }

    fn memory(&self) -> &DeviceBuffer<T> {
        self.memory.as_ref().expect("there until it is dropped")
    }

    fn address(&self) -> *mut T {
        self.memory().as_device_ptr().as_mut_ptr()
    }
}

impl<T: Element> Drop for Buffer<T> {
    fn drop(&mut self) {
        // A context that can't be entered any more took its memory with it.
        if self.device.enter().is_err() {
            std::mem::forget(self.memory.take());
        }
    }
}

impl Device {
    /// Indices for operators: positions, pool entries, starts of sequences.
    pub fn indices(&self, values: &[i64]) -> Result<Indices, Error> {
        Ok(Indices { host: values.into(), device: self.upload(values)? })
    }
}

/// Indices that a device reads, with the copy that the checks of a call read: they never change.
#[derive(Debug)]
pub struct Indices {
    host: Box<[i64]>,
    device: Buffer<i64>,
}

impl Indices {
    pub(crate) fn host(&self) -> &[i64] {
        &self.host
    }

    /// Address in the device's memory.
    pub(crate) fn at(&self) -> *const i64 {
        self.device.address()
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device.device
    }
}

macro_rules! device_view {
    ($(#[$doc:meta])* $name:ident, $pointer:ty) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name<'a, const R: usize, T: Element = f32> {
            at: *mut T,
            shape: [usize; R],
            strides: [usize; R],
            device: &'a Device,
            life: PhantomData<$pointer>,
        }

        impl<const R: usize, T: Element> $name<'_, R, T> {
            /// Sizes of the axes.
            pub fn shape(&self) -> [usize; R] {
                self.shape
            }

            /// Stride of axis `i`, as the C side takes it.
            pub(crate) fn stride(&self, i: usize) -> i64 {
                self.strides[i] as i64
            }

            /// Address in the device's memory: not to be read from here.
            pub(crate) fn at(&self) -> *mut T {
                self.at
            }

            pub(crate) fn device(&self) -> Option<&Device> {
                Some(self.device)
            }

        }

        impl<const R: usize> From<&$name<'_, R>> for Array<R> {
            fn from(view: &$name<R>) -> Self {
                Array { at: view.at, shape: view.shape, strides: view.strides.map(|s| s as i64) }
            }
        }
    };
}

device_view! {
    /// A read-only view of `R` axes of a [`Buffer`], as [`crate::View`].
    DeviceView, &'a Buffer<T>
}
device_view! {
    /// A writable view of `R` axes of a [`Buffer`], as [`crate::ViewMut`].
    DeviceViewMut, &'a mut Buffer<T>
}

impl<const R: usize, T: Element> DeviceView<'_, R, T> {
    /// Error naming `arg` unless the shape is `expected`.
    pub(crate) fn expect(&self, arg: &'static str, expected: [usize; R]) -> Result<(), Error> {
        expect(arg, self.shape, expected)
    }
}

impl<const R: usize, T: Element> Clone for DeviceView<'_, R, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<const R: usize, T: Element> Copy for DeviceView<'_, R, T> {}
