//! CUDA devices, streams and buffers: GPUs on `cust` (feature `cuda`), and the host executor, which runs the kernels on the
//! CPU and watches them (feature `cuda-host`).
//!
//! A [`Buffer`] lies in a device's memory; the function `queue` of an operator takes views of buffers in the arguments that
//! `run` takes views of slices in, checks them alike and queues the work on a [`Stream`]. A view that is written borrows its
//! buffer mutably, so that no safe call can alias it. A call returns before its work is done; copies to and from the CPU
//! wait for all work queued before, on any stream, and so does freeing. Work on different streams is in no order: a buffer
//! that one stream writes and another uses needs a [`Stream::wait`] in between, or holds one of the values. What is queued
//! again and again goes faster through [`Stream::repeat`].
//!
//! ```no_run
//! # fn main() -> Result<(), qwen3next_kernels::Error> {
//! use qwen3next_kernels::{device::Device, norm};
//! let device = Device::open(0)?; // Device::executor(): the same without a GPU
//! let (stream, x) = (device.stream()?, device.upload(&[1.0f32; 4096])?);
//! let mut y = device.zeros::<f32>(4096)?;
//! norm::queue(
//!     norm::Args {
//!         y: y.view_mut([2, 1, 2048])?,
//!         x: Some(x.view([2, 1, 2048])?),
//!         kind: norm::Kind::L2,
//!         eps: 1e-6,
//!     },
//!     &stream,
//! )?;
//! let y: Vec<f32> = y.download()?;
//! # Ok(())
//! # }
//! ```

use crate::memory::{sealed, Addresses, Element, Memory};
use crate::operator::{Kernel, Operator};
use crate::view::{packed, View, ViewMut};
use crate::{DType, Error, Weight};
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};

mod graph;
mod landing;
mod room;
mod timing;
pub use graph::Graph;
pub use landing::Landing;
#[doc(hidden)]
pub use timing::{Limits, Times};

/// The memory of devices, as a parameter of views and arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cuda;

/// A read-only view of `R` axes of a [`Buffer`].
pub type DeviceView<'a, const R: usize, T = f32> = View<'a, R, T, Cuda>;
/// A writable view of `R` axes of a [`Buffer`].
pub type DeviceViewMut<'a, const R: usize, T = f32> = ViewMut<'a, R, T, Cuda>;

impl sealed::Sealed for Cuda {}
impl Memory for Cuda {
    type Id = usize;
    type Indices<'a> = &'a Indices;
    type Vec<T: Element> = Buffer<T>;

    fn indices<'a>(indices: &Self::Indices<'a>) -> &'a [i64] {
        &indices.host
    }

    fn indices_id(indices: &Self::Indices<'_>) -> usize {
        indices.device.id()
    }

    fn whole<T: Element>(values: &Buffer<T>) -> DeviceView<'_, 1, T> {
        values.view([values.len()]).expect("a buffer holds itself")
    }
}

/// A CUDA device, ready for work. Clones are the same device.
#[derive(Debug, Clone)]
pub struct Device(Place, Arc<room::Account>);

#[derive(Debug, Clone)]
enum Place {
    #[cfg(feature = "cuda")]
    Gpu(Arc<cust::context::Context>),
    #[cfg(feature = "cuda-host")]
    Executor,
}

#[cfg(feature = "cuda")]
fn cuda<T>(what: &'static str, result: Result<T, cust::error::CudaError>) -> Result<T, Error> {
    result.map_err(|e| Error::Device { operator: what, report: e.to_string() })
}

#[cfg(feature = "cuda")]
impl Device {
    /// How many GPUs there are. Error: no driver, in words.
    pub fn count() -> Result<u32, Error> {
        // SAFETY: NULL, or a NUL-terminated text that is not freed.
        let missing = unsafe { crate::ffi::q3n_cuda_driver_missing() };
        if !missing.is_null() {
            // SAFETY: not NULL, so as above.
            let text = unsafe { std::ffi::CStr::from_ptr(missing) };
            return Err(Error::argument("device", text.to_string_lossy()));
        }
        cuda("device", cust::init(cust::CudaFlags::empty()))?;
        cuda("device", cust::device::Device::num_devices())
    }

    /// The GPU of that number, from 0.
    pub fn open(number: u32) -> Result<Device, Error> {
        let count = Device::count()?;
        if number >= count {
            return Err(Error::argument("device", format!("number {number} of {count}")));
        }
        let device = cuda("device", cust::device::Device::get_device(number))?;
        let context = cuda("device", cust::context::Context::new(device))?;
        Ok(Device(Place::Gpu(Arc::new(context)), Default::default()))
    }
}

impl Device {
    /// The host executor: memory of the CPU, kernels that run within the call that queues them. A mistake that it finds
    /// in a kernel is that call's error. Every call makes a device of its own.
    #[cfg(feature = "cuda-host")]
    pub fn executor() -> Device {
        Device(Place::Executor, Default::default())
    }

    /// Its name, as the driver gives it.
    pub fn name(&self) -> Result<String, Error> {
        self.enter()?;
        match &self.0 {
            #[cfg(feature = "cuda")]
            Place::Gpu(_) => cuda("device", cust::context::CurrentContext::get_device().and_then(|d| d.name())),
            #[cfg(feature = "cuda-host")]
            Place::Executor => Ok("host executor".into()),
        }
    }

    /// What drives it, with the CUDA version that the driver is for.
    pub fn driver(&self) -> Result<String, Error> {
        match &self.0 {
            #[cfg(feature = "cuda")]
            Place::Gpu(_) => {
                let version = cuda("device", cust::CudaApiVersion::get())?;
                Ok(format!("driver for CUDA {}.{}", version.major(), version.minor()))
            }
            #[cfg(feature = "cuda-host")]
            Place::Executor => Ok("no driver".into()),
        }
    }

    /// A new stream.
    pub fn stream(&self) -> Result<Stream, Error> {
        self.enter()?;
        let inner = match &self.0 {
            #[cfg(feature = "cuda")]
            Place::Gpu(_) => {
                // DEFAULT: copies, which use the default stream, wait for its work.
                let flags = cust::stream::StreamFlags::DEFAULT;
                Queue::Gpu(cuda("stream", cust::stream::Stream::new(flags, None))?)
            }
            #[cfg(feature = "cuda-host")]
            Place::Executor => Queue::Executor,
        };
        Ok(Stream {
            inner: Some(inner),
            scratch: Mutex::new(self.zeros(0)?),
            holding: graph::Holding::default(),
            device: self.clone(),
        })
    }

    /// A buffer with these values.
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<Buffer<T>, Error> {
        let mut buffer = self.allocate(values.len())?;
        buffer.write(values)?;
        Ok(buffer)
    }

    /// A buffer of `len` elements whose bits are 0.
    pub fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<T>, Error> {
        let mut buffer = self.allocate(len)?;
        buffer.memory_mut().zero()?;
        Ok(buffer)
    }

    /// Indices for operators: positions, pool entries, starts of sequences.
    pub fn indices(&self, values: &[i64]) -> Result<Indices, Error> {
        let mut indices = Indices { host: Vec::new(), memory: None, first: 0, device: self.clone() };
        indices.replace(values)?;
        Ok(indices)
    }

    /// With free contents: for those who fill it next.
    fn allocate<T: Element>(&self, len: usize) -> Result<Buffer<T>, Error> {
        self.enter()?;
        let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= isize::MAX as usize);
        let Some(bytes) = bytes else {
            return Err(Error::argument("len", format!("{len} elements are more than memory can hold")));
        };
        let counted = room::Counted::new(&self.1, bytes as u64)?;
        let memory = match &self.0 {
            #[cfg(feature = "cuda")]
            // SAFETY: every bit pattern is a u8; nobody reads them before they are written.
            Place::Gpu(_) => Bytes::Gpu(cuda("buffer", unsafe { cust::memory::DeviceBuffer::uninitialized(bytes) })?),
            #[cfg(feature = "cuda-host")]
            Place::Executor => Bytes::Executor(HostBytes::new(bytes)?),
        };
        Ok(Buffer { memory: Some(memory), len, device: self.clone(), _counted: counted, holds: PhantomData })
    }

    /// Makes the device's context that of this thread.
    fn enter(&self) -> Result<(), Error> {
        match &self.0 {
            #[cfg(feature = "cuda")]
            Place::Gpu(context) => cuda("device", cust::context::CurrentContext::set_current(&**context)),
            #[cfg(feature = "cuda-host")]
            Place::Executor => Ok(()),
        }
    }

    /// The same for clones alone.
    fn id(&self) -> usize {
        Arc::as_ptr(&self.1) as usize
    }
}

#[derive(Debug)]
enum Queue {
    #[cfg(feature = "cuda")]
    Gpu(cust::stream::Stream),
    #[cfg(feature = "cuda-host")]
    Executor,
}

/// A queue of work on a device, with the scratch that its kernels use one after the other.
#[derive(Debug)]
pub struct Stream {
    /// `None` while it is dropped.
    inner: Option<Queue>,
    scratch: Mutex<Buffer<u8>>,
    /// What it holds back while [`Stream::repeat`] runs.
    holding: graph::Holding,
    device: Device,
}

impl Stream {
    /// Returns when all its work is done; an error of any of it shows here.
    pub fn wait(&self) -> Result<(), Error> {
        self.device.enter()?;
        match self.inner() {
            #[cfg(feature = "cuda")]
            Queue::Gpu(stream) => cuda("stream", stream.synchronize()),
            #[cfg(feature = "cuda-host")]
            Queue::Executor => Ok(()),
        }
    }

    /// Its device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Where all that was queued so far really is, for what comes after it.
    fn inner(&self) -> &Queue {
        graph::release(&self.device);
        self.inner.as_ref().expect("there until it is dropped")
    }

    /// Where its kernels go.
    fn target(&self) -> graph::Target {
        self.inner.as_ref().expect("there until it is dropped").into()
    }

    /// Checks `raw`, whose index arrays are still the CPU's, has `place` put the device's in their stead, and queues the
    /// operator's first kernel.
    ///
    /// # Safety
    /// `at` noted all pointers in `raw`, which must be valid there for what the operator's header says.
    pub(crate) unsafe fn queue<O: Operator>(
        &self,
        mut raw: O::Raw,
        at: &Addresses<Cuda>,
        place: impl FnOnce(&mut O::Raw),
    ) -> Result<(), Error> {
        if at.one()?.is_some_and(|id| id != self.device.id()) {
            return Err(Error::argument("stream", "is not of the device that the arguments lie on"));
        }
        crate::status::check(O::NAME, O::check(&raw))?;
        place(&mut raw);
        // SAFETY: just checked, and placed.
        unsafe { self.launch::<O>(&raw, &O::KERNELS[0]) }
    }

    /// Queues a kernel. Allocates where it needs more scratch than any before; then it waits for those.
    ///
    /// # Safety
    /// `raw` passed the operator's check, and its pointers are this device's.
    pub(crate) unsafe fn launch<O: Operator>(
        &self,
        raw: &O::Raw,
        kernel: &'static Kernel<O::Raw>,
    ) -> Result<(), Error> {
        let target = self.target();
        self.device.enter()?;
        let bytes = graph::Call::<O>::scratch_bytes(raw, kernel, target)?;
        // What a kernel leaves there is gone when the next one of this stream runs. Locked until this one is queued: no
        // other thread's call moves it before.
        let mut scratch = graph::lock(&self.scratch);
        scratch.reserve(usize::try_from(bytes).unwrap_or(0))?;
        let mut call = graph::Call::<O> { raw: *raw, kernel, scratch: scratch.address().cast() };
        let mut holding = graph::lock(&self.holding);
        if let Some(held) = holding.as_mut() {
            call = match held.hold(call) {
                Ok(()) => return Ok(()),
                Err(call) => call,
            };
        }
        // SAFETY: the pointers are this device's, as the caller says, and it was entered.
        unsafe { graph::Queued::launch(&call, target) }
    }
}

impl Drop for Stream {
    // The executor's streams have nothing to drop.
    #[cfg_attr(not(feature = "cuda"), allow(clippy::forget_non_drop))]
    fn drop(&mut self) {
        // A context that can't be entered any more took its streams with it.
        if self.device.enter().is_err() {
            std::mem::forget(self.inner.take());
        }
    }
}

#[derive(Debug)]
enum Bytes {
    #[cfg(feature = "cuda")]
    Gpu(cust::memory::DeviceBuffer<u8>),
    #[cfg(feature = "cuda-host")]
    Executor(HostBytes),
}

impl Bytes {
    fn zero(&mut self) -> Result<(), Error> {
        match self {
            #[cfg(feature = "cuda")]
            Bytes::Gpu(memory) => cuda("buffer", memory.set_8(0)),
            #[cfg(feature = "cuda-host")]
            Bytes::Executor(memory) => {
                // SAFETY: the whole allocation.
                unsafe { memory.at.write_bytes(0, memory.layout.size()) };
                Ok(())
            }
        }
    }
}

/// Elements in a device's memory, from an address on that 256 divides.
#[derive(Debug)]
pub struct Buffer<T: Element> {
    /// `None` while it is dropped.
    memory: Option<Bytes>,
    len: usize,
    device: Device,
    _counted: room::Counted,
    holds: PhantomData<T>,
}

impl<T: Element> Buffer<T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Tells it from the other buffers that live, until its memory moves.
    pub fn id(&self) -> usize {
        self.address() as usize
    }

    /// Makes room for `len` elements where there are fewer; contents are free then, and after an error there are none.
    pub fn reserve(&mut self, len: usize) -> Result<(), Error> {
        if self.len < len {
            // The old ones go first: there may be no room for both.
            *self = self.device.allocate(0)?;
            *self = self.device.allocate(len)?;
        }
        Ok(())
    }

    /// Overwrites all of it, once the work queued so far is done.
    pub fn write(&mut self, values: &[T]) -> Result<(), Error> {
        if values.len() != self.len {
            return Err(Error::argument("values", format!("{} of them, expected {}", values.len(), self.len)));
        }
        self.write_at(0, values)
    }

    /// Overwrites the elements from `first` on, once the work queued so far is done.
    pub fn write_at(&mut self, first: usize, values: &[T]) -> Result<(), Error> {
        if first > self.len || values.len() > self.len - first {
            let why = format!("{} of them from {first} on, there are {}", values.len(), self.len);
            return Err(Error::argument("values", why));
        }
        if values.is_empty() {
            return Ok(());
        }
        graph::release(&self.device);
        self.device.enter()?;
        let (start, bytes) = (first * size_of::<T>(), size_of_val(values));
        // SAFETY: elements are plain bytes.
        let from = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), bytes) };
        match self.memory_mut() {
            #[cfg(feature = "cuda")]
            Bytes::Gpu(memory) => {
                use cust::memory::CopyDestination;
                cuda("buffer", memory.index(start..start + bytes).copy_from(from))
            }
            #[cfg(feature = "cuda-host")]
            // SAFETY: the range was compared with the length, and `values` is no part of a buffer.
            Bytes::Executor(memory) => unsafe {
                memory.at.add(start).copy_from_nonoverlapping(from.as_ptr(), bytes);
                Ok(())
            },
        }
    }

    /// The values, once the work queued so far is done.
    pub fn download(&self) -> Result<Vec<T>, Error> {
        self.download_at(0, self.len)
    }

    /// `count` values from `first` on, once the work queued so far is done.
    pub fn download_at(&self, first: usize, count: usize) -> Result<Vec<T>, Error> {
        if first > self.len || count > self.len - first {
            let why = format!("{count} of them from {first} on, there are {}", self.len);
            return Err(Error::argument("values", why));
        }
        graph::release(&self.device);
        self.device.enter()?;
        let (start, bytes) = (first * size_of::<T>(), count * size_of::<T>());
        let mut values = Vec::<T>::with_capacity(count);
        if bytes > 0 {
            match self.memory() {
                #[cfg(feature = "cuda")]
                Bytes::Gpu(memory) => {
                    use cust::memory::CopyDestination;
                    // SAFETY: the capacity just made; every bit pattern is a u8.
                    let to = unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), bytes) };
                    cuda("buffer", memory.index(start..start + bytes).copy_to(to))?;
                }
                #[cfg(feature = "cuda-host")]
                // SAFETY: the range was compared with the length, and the vector is no part of a buffer.
                Bytes::Executor(memory) => unsafe {
                    values.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(memory.at.add(start), bytes)
                },
            }
        }
        // SAFETY: all of them were just written, and any bits are an element.
        unsafe { values.set_len(count) };
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
        // SAFETY: the buffer's own elements, borrowed as long.
        unsafe { View::over(self.address(), self.len, shape, strides, self.device.id()) }
    }

    /// A view with strides in elements, from element `first` on.
    pub fn view_from<const R: usize>(
        &self,
        first: usize,
        shape: [usize; R],
        strides: [usize; R],
    ) -> Result<DeviceView<'_, R, T>, Error> {
        self.view([self.len])?.part(first, shape, strides)
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
        // SAFETY: the buffer's own elements, borrowed as long.
        unsafe { ViewMut::over(self.address(), self.len, shape, strides, self.device.id()) }
    }

    fn memory(&self) -> &Bytes {
        self.memory.as_ref().expect("there until it is dropped")
    }

    fn memory_mut(&mut self) -> &mut Bytes {
        self.memory.as_mut().expect("there until it is dropped")
    }

    fn address(&self) -> *mut T {
        match self.memory() {
            #[cfg(feature = "cuda")]
            Bytes::Gpu(memory) => memory.as_device_ptr().as_mut_ptr().cast(),
            #[cfg(feature = "cuda-host")]
            Bytes::Executor(memory) => memory.at.cast(),
        }
    }
}

impl Buffer<u8> {
    /// Its front as a packed weight.
    pub fn weight<const R: usize>(&self, dtype: DType, shape: [usize; R]) -> Result<Weight<'_, R, Cuda>, Error> {
        self.weight_strided(dtype, shape, packed(shape))
    }

    /// As a weight with strides in elements.
    pub fn weight_strided<const R: usize>(
        &self,
        dtype: DType,
        shape: [usize; R],
        strides: [usize; R],
    ) -> Result<Weight<'_, R, Cuda>, Error> {
        // SAFETY: the buffer's own bytes, borrowed as long.
        unsafe { Weight::over(self.address(), self.len, dtype, shape, strides, self.device.id()) }
    }
}

impl Buffer<f32> {
    /// Its front as a packed weight.
    pub fn weight<const R: usize>(&self, shape: [usize; R]) -> Result<Weight<'_, R, Cuda>, Error> {
        let (at, bytes) = (self.address().cast(), 4 * self.len);
        // SAFETY: the buffer's own elements, borrowed as long.
        unsafe { Weight::over(at, bytes, DType::F32, shape, packed(shape), self.device.id()) }
    }
}

impl<T: Element> Drop for Buffer<T> {
    fn drop(&mut self) {
        graph::release(&self.device);
        // A context that can't be entered any more took its memory with it.
        if self.device.enter().is_err() {
            std::mem::forget(self.memory.take());
        }
    }
}

/// What the executor has for a device's memory.
#[cfg(feature = "cuda-host")]
#[derive(Debug)]
struct HostBytes {
    at: *mut u8,
    layout: std::alloc::Layout,
}

// SAFETY: it owns its bytes, and nobody reaches them but through its buffer.
#[cfg(feature = "cuda-host")]
unsafe impl Send for HostBytes {}
// SAFETY: as above.
#[cfg(feature = "cuda-host")]
unsafe impl Sync for HostBytes {}

#[cfg(feature = "cuda-host")]
impl HostBytes {
    /// Filled with NaN, as floats.
    fn new(bytes: usize) -> Result<Self, Error> {
        let layout = std::alloc::Layout::from_size_align(bytes.max(1), 256)
            .map_err(|_| Error::argument("len", format!("{bytes} bytes are more than memory can hold")))?;
        // SAFETY: the size is not 0.
        let at = unsafe { std::alloc::alloc(layout) };
        if at.is_null() {
            return Err(Error::argument("len", format!("there is no memory for {bytes} bytes")));
        }
        // SAFETY: the allocation just made.
        unsafe { at.write_bytes(0xff, layout.size()) };
        Ok(HostBytes { at, layout })
    }
}

#[cfg(feature = "cuda-host")]
impl Drop for HostBytes {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { std::alloc::dealloc(self.at, self.layout) }
    }
}

/// Indices that a device reads, with the copy that the checks of a call read.
#[derive(Debug)]
pub struct Indices {
    host: Vec<i64>,
    /// Perhaps with others. `None`: there are none yet.
    memory: Option<Arc<Buffer<i64>>>,
    /// Where they start there.
    first: usize,
    device: Device,
}

/// Every array of indices starts at an address that 256 divides, as buffers do.
const INDICES_START: usize = 256 / size_of::<i64>();

impl Indices {
    /// Replaces them, once the work queued so far is done. Allocates where these are more than ever before.
    pub fn replace(&mut self, values: &[i64]) -> Result<(), Error> {
        Indices::replace_all([self], [values])
    }

    /// As [`Indices::replace`] of each, by one copy. After an error there are none.
    pub fn replace_all<const N: usize>(mut these: [&mut Indices; N], values: [&[i64]; N]) -> Result<(), Error> {
        let Some(device) = these.first().map(|indices| indices.device.clone()) else { return Ok(()) };
        if these.iter().any(|indices| indices.device.id() != device.id()) {
            return Err(Error::argument("indices", "lie on more than one device"));
        }
        let (mut memory, mut starts, mut all) = (None, [0; N], Vec::new());
        for ((indices, values), start) in these.iter_mut().zip(values).zip(&mut starts) {
            indices.host.clear();
            memory = indices.memory.take();
            *start = all.len();
            all.extend_from_slice(values);
            all.resize(all.len().next_multiple_of(INDICES_START), 0);
        }
        let mut memory = match memory {
            Some(memory) if Arc::strong_count(&memory) == 1 => memory,
            _ => Arc::new(device.allocate(all.len())?),
        };
        let buffer = Arc::get_mut(&mut memory).expect("the only one");
        buffer.reserve(all.len())?;
        buffer.write_at(0, &all)?;
        for ((indices, values), start) in these.iter_mut().zip(values).zip(starts) {
            indices.host.extend_from_slice(values);
            (indices.memory, indices.first) = (Some(memory.clone()), start);
        }
        Ok(())
    }

    /// Address in the device's memory.
    pub(crate) fn at(&self) -> *const i64 {
        // Within the buffer, which holds all that were written with these.
        self.memory.as_ref().map_or(std::ptr::null(), |memory| memory.address().wrapping_add(self.first))
    }

    /// The same; NULL for `None`.
    pub(crate) fn some(indices: Option<&Self>) -> *const i64 {
        indices.map_or(std::ptr::null(), Indices::at)
    }
}

/// Bytes before and after a copied argument that nobody may write.
const ZONE: usize = 4096;
const GUARD: u8 = 0xa5;

/// Runs a CUDA kernel on a call whose arguments lie in the CPU's memory: they are copied to the device, and what was written
/// is copied back. For the suites. With `times` it is launched again and again in between, and timed.
///
/// # Safety
/// `raw` passed the operator's check and is valid on the CPU; `at` noted all its pointers.
pub(crate) unsafe fn run_staged<O: Operator>(
    stream: &Stream,
    kernel: &'static Kernel<O::Raw>,
    raw: &O::Raw,
    at: &Addresses,
    times: Option<&Times>,
) -> Result<(), Error> {
    let mut extents = at.extents().to_vec();
    extents.retain(|e| e.bytes > 0);
    extents.sort_by_key(|e| e.at);
    let mut ranges: Vec<crate::memory::Extent> = Vec::new();
    for e in extents {
        match ranges.last_mut() {
            Some(last) if e.at < last.at + last.bytes => {
                last.bytes = last.bytes.max(e.at + e.bytes - last.at);
                last.written |= e.written;
            }
            _ => ranges.push(e),
        }
    }
    // The copy's address keeps the argument's alignment. What is timed lies as in buffers.
    let skew = |range: &crate::memory::Extent| if times.is_some() { 0 } else { range.at % 256 };
    let mut copies = Vec::with_capacity(ranges.len());
    for range in &ranges {
        let skew = skew(range);
        let mut copy = stream.device.allocate::<u8>(ZONE + skew + range.bytes + ZONE)?;
        copy.write_at(0, &vec![GUARD; ZONE + skew])?;
        // SAFETY: the argument's own bytes.
        copy.write_at(ZONE + skew, unsafe { std::slice::from_raw_parts(range.at as *const u8, range.bytes) })?;
        copy.write_at(ZONE + skew + range.bytes, &[GUARD; ZONE])?;
        copies.push(copy);
    }
    let mut placed = *raw;
    // SAFETY: args are structs of words; a pointer of the caller's is in no other field.
    let words = unsafe {
        std::slice::from_raw_parts_mut(
            (&mut placed as *mut O::Raw).cast::<usize>(),
            size_of::<O::Raw>() / size_of::<usize>(),
        )
    };
    for word in words {
        if let Some(i) = ranges.iter().position(|r| (r.at..r.at + r.bytes).contains(word)) {
            *word = copies[i].address() as usize + ZONE + skew(&ranges[i]) + (*word - ranges[i].at);
        }
    }
    // SAFETY: checked by the caller; every pointer has been replaced by that of its copy.
    let launch = || unsafe { stream.launch::<O>(&placed, kernel) };
    match times {
        Some(times) => stream.time(times, launch)?,
        None => launch()?,
    }
    stream.wait()?;
    for (range, copy) in ranges.iter().zip(&copies) {
        let bytes = copy.download()?;
        let start = ZONE + skew(range);
        let (before, rest) = bytes.split_at(start);
        let (own, after) = rest.split_at(range.bytes);
        if before.iter().chain(after).any(|&byte| byte != GUARD) {
            return Err(Error::argument("args", format!("the kernel wrote outside an array of {} bytes", range.bytes)));
        }
        if range.written {
            // SAFETY: the argument's own bytes, which the call may write.
            unsafe { std::slice::from_raw_parts_mut(range.at as *mut u8, range.bytes) }.copy_from_slice(own);
        }
    }
    Ok(())
}
