//! Copies to the CPU that do not wait for work queued behind them.

use super::{Buffer, Bytes, Device, Place, Queue, Stream};
use crate::memory::Element;
use crate::Error;
use std::marker::PhantomData;

/// Memory of the CPU, page-locked for a GPU, that a stream copies values to. A warm one does not allocate.
#[derive(Debug)]
pub struct Landing<T: Element> {
    /// `None` while it is dropped.
    memory: Option<Locked>,
    len: usize,
    device: Device,
    holds: PhantomData<T>,
}

#[derive(Debug)]
enum Locked {
    #[cfg(feature = "cuda")]
    Gpu { bytes: cust::memory::LockedBuffer<u8>, arrived: cust::event::Event },
    /// As words, for the alignment.
    #[cfg(feature = "cuda-host")]
    Executor(Vec<u64>),
}

impl Locked {
    fn new(device: &Device, bytes: usize) -> Result<Locked, Error> {
        device.enter()?;
        match &device.0 {
            #[cfg(feature = "cuda")]
            Place::Gpu(_) => {
                // SAFETY: every bit pattern is a u8; nobody reads them before a copy has written them.
                let bytes = super::cuda("landing", unsafe { cust::memory::LockedBuffer::uninitialized(bytes) })?;
                let flags = cust::event::EventFlags::DISABLE_TIMING;
                Ok(Locked::Gpu { bytes, arrived: super::cuda("landing", cust::event::Event::new(flags))? })
            }
            #[cfg(feature = "cuda-host")]
            Place::Executor => Ok(Locked::Executor(vec![0; bytes.div_ceil(8)])),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            #[cfg(feature = "cuda")]
            Locked::Gpu { bytes, .. } => bytes.as_slice().len(),
            #[cfg(feature = "cuda-host")]
            Locked::Executor(words) => 8 * words.len(),
        }
    }

    /// Returns when the latest copy is done.
    fn wait(&self) -> Result<*const u8, Error> {
        match self {
            #[cfg(feature = "cuda")]
            Locked::Gpu { bytes, arrived } => {
                super::cuda("landing", arrived.synchronize())?;
                Ok(bytes.as_slice().as_ptr())
            }
            #[cfg(feature = "cuda-host")]
            Locked::Executor(words) => Ok(words.as_ptr().cast()),
        }
    }
}

impl<T: Element> Landing<T> {
    /// No values yet.
    pub fn on(device: &Device) -> Result<Self, Error> {
        Ok(Landing { memory: Some(Locked::new(device, 0)?), len: 0, device: device.clone(), holds: PhantomData })
    }

    /// The values of the latest copy, once it is done: work queued after it may still run.
    pub fn wait(&self) -> Result<&[T], Error> {
        self.device.enter()?;
        let at = self.memory().wait()?;
        match self.len {
            0 => Ok(&[]),
            // SAFETY: a copy of so many values has ended there, any bits are an element, and the memory is aligned for
            // all of them.
            len => Ok(unsafe { std::slice::from_raw_parts(at.cast(), len) }),
        }
    }

    fn memory(&self) -> &Locked {
        self.memory.as_ref().expect("there until it is dropped")
    }
}

impl Stream {
    /// Queues a copy of the first `count` values of `from`. Until it is done, that buffer may be written by work queued on
    /// this stream alone. Allocates where these are more than ever before.
    pub fn land<T: Element>(&self, from: &Buffer<T>, count: usize, to: &mut Landing<T>) -> Result<(), Error> {
        if count > from.len() {
            return Err(Error::argument("count", format!("{count} values, there are {}", from.len())));
        }
        if [from.device.id(), to.device.id()] != [self.device.id(); 2] {
            return Err(Error::argument("stream", "is not of the device that the arguments lie on"));
        }
        // The latest copy into this memory must be done before it goes, or gets another.
        to.wait()?;
        to.len = 0;
        let bytes = count * size_of::<T>();
        if to.memory().bytes() < bytes {
            to.memory = Some(Locked::new(&to.device, bytes)?);
        }
        if bytes == 0 {
            return Ok(());
        }
        match (self.inner(), from.memory(), to.memory.as_mut().expect("there until it is dropped")) {
            #[cfg(feature = "cuda")]
            (Queue::Gpu(stream), Bytes::Gpu(from), Locked::Gpu { bytes: memory, arrived }) => {
                use cust::memory::AsyncCopyDestination;
                let target = &mut memory.as_mut_slice()[..bytes];
                // SAFETY: both hold so many bytes; `to` outlives the copy, which its `drop` and the next copy wait for,
                // and freeing `from` waits for all work.
                super::cuda("landing", unsafe { from.index(0..bytes).async_copy_to(target, stream) })?;
                super::cuda("landing", arrived.record(stream))?;
            }
            #[cfg(feature = "cuda-host")]
            (Queue::Executor, Bytes::Executor(from), Locked::Executor(words)) => {
                // SAFETY: both hold so many bytes, and they are different memory.
                unsafe { words.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(from.at, bytes) }
            }
            #[cfg(all(feature = "cuda", feature = "cuda-host"))]
            _ => unreachable!("the devices are the same"),
        }
        to.len = count;
        Ok(())
    }
}

impl<T: Element> Drop for Landing<T> {
    fn drop(&mut self) {
        // A context that can't be entered any more took its memory with it.
        if self.device.enter().is_err() || self.memory().wait().is_err() {
            std::mem::forget(self.memory.take());
        }
    }
}
