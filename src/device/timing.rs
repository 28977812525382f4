//! Times of kernels: launches between two events of a stream, on arguments that lie on the device already.

#[cfg(feature = "cuda")]
use super::cuda;
use super::{Device, Graph, Queue, Stream};
use crate::Error;
use std::sync::Mutex;
use std::time::Instant;

/// How `Variant::staged_timed` times a call, and what its latest call took.
#[doc(hidden)]
#[derive(Debug)]
pub struct Times {
    samples: usize,
    cold: bool,
    nanoseconds: Mutex<Vec<f64>>,
    in_graph: Mutex<Option<f64>>,
}

impl Times {
    /// So many launches, of slow kernels fewer. `cold`: each finds the L2 cache full of something else.
    pub fn new(samples: usize, cold: bool) -> Times {
        Times { samples, cold, nanoseconds: Mutex::default(), in_graph: Mutex::default() }
    }

    /// Nanoseconds of every launch since they were last taken.
    pub fn take(&self) -> Vec<f64> {
        std::mem::take(&mut *self.nanoseconds.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Nanoseconds a launch of as many more that ran as one graph, one after the other; `None` of cold ones.
    pub fn take_in_graph(&self) -> Option<f64> {
        self.in_graph.lock().unwrap_or_else(|e| e.into_inner()).take()
    }
}

/// What times of a device are set against.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes a second of a copy within the device, what is read and what is written counted both.
    pub copy: f64,
    /// Nanoseconds between two events with nothing in between.
    pub empty: f64,
}

/// Seconds that the launches of a call may take in all, roughly.
const MOST: f64 = 2.0;

/// Beyond the L2 cache of any GPU.
#[cfg(feature = "cuda")]
const FLUSH: usize = 256 << 20;

/// Writes of `FLUSH` bytes that keep a GPU busy until the launches of a warm run are all queued: an event pair then spans
/// the kernel alone, not the CPU's queueing.
#[cfg(feature = "cuda")]
const HEAD_START: usize = 16;

/// Launches before the timed ones of a warm run.
#[cfg(feature = "cuda")]
const WARM_UPS: usize = 5;

const COPIES: usize = 10;

impl Stream {
    /// Times `launch`, which queues the same work on this stream again and again.
    pub(crate) fn time(&self, times: &Times, launch: impl Fn() -> Result<(), Error>) -> Result<(), Error> {
        // The first launch loads the kernel, the second tells how many there is time for.
        launch()?;
        self.wait()?;
        let begin = Instant::now();
        launch()?;
        self.wait()?;
        let once = begin.elapsed().as_secs_f64().max(1e-9);
        let samples = ((MOST / once) as usize).clamp(1, times.samples.max(1));
        // The graph's launches take a quarter of the time, three times over.
        let (mut graph, graphed) = (Graph::default(), samples.min((MOST / 4.0 / once) as usize).max(1));
        let mut whole = || self.repeat(&mut graph, || (0..graphed).try_for_each(|_| launch()));
        if !times.cold {
            // Queued, then captured.
            whole()?;
            whole()?;
        }
        let mut in_graph = Vec::new();
        let found = match self.inner() {
            #[cfg(feature = "cuda")]
            Queue::Gpu(stream) => {
                let mut other = memory(FLUSH)?;
                // SAFETY: nobody reads these bytes, and they are freed after the wait in `between_events`.
                let mut flush = || cuda("timing", unsafe { other.set_8_async(0, stream) });
                if !times.cold {
                    in_graph = between_events(stream, 1, || (0..HEAD_START).try_for_each(|_| flush()), &mut whole)?;
                    (0..HEAD_START).try_for_each(|_| flush())?;
                    (0..WARM_UPS).try_for_each(|_| launch())?;
                }
                between_events(stream, samples, || if times.cold { flush() } else { Ok(()) }, &launch)?
            }
            #[cfg(feature = "cuda-host")]
            Queue::Executor => {
                if !times.cold {
                    in_graph = between_instants(1, &mut whole)?;
                }
                between_instants(samples, &launch)?
            }
        };
        *times.in_graph.lock().unwrap_or_else(|e| e.into_inner()) = in_graph.first().map(|ns| ns / graphed as f64);
        *times.nanoseconds.lock().unwrap_or_else(|e| e.into_inner()) = found;
        Ok(())
    }
}

impl Device {
    /// Measures what times are set against.
    #[doc(hidden)]
    pub fn limits(&self) -> Result<Limits, Error> {
        let stream = self.stream()?;
        let (bytes, copies, empty) = match stream.inner() {
            #[cfg(feature = "cuda")]
            Queue::Gpu(gpu) => {
                use cust::memory::{AsyncCopyDestination, DeviceSlice};
                const BYTES: usize = 1 << 30;
                let (mut from, mut to) = (memory(BYTES)?, memory(BYTES)?);
                cuda("timing", from.set_8(1))?;
                // SAFETY: both live until the wait in `between_events`, and neither is used otherwise.
                let mut copy = || unsafe {
                    <DeviceSlice<u8> as AsyncCopyDestination<DeviceSlice<u8>>>::async_copy_from(&mut to, &from, gpu)
                };
                cuda("timing", copy())?;
                let copies = between_events(gpu, COPIES, || Ok(()), || cuda("timing", copy()))?;
                // After a copy, so that both events are queued before the first is reached.
                let empty = between_events(gpu, COPIES, || cuda("timing", copy()), || Ok(()))?;
                (BYTES, copies, empty)
            }
            #[cfg(feature = "cuda-host")]
            Queue::Executor => {
                const BYTES: usize = 16 << 20;
                let (from, mut to) = (vec![1u8; BYTES], vec![0u8; BYTES]);
                let mut copy = || {
                    to.copy_from_slice(std::hint::black_box(&from));
                    std::hint::black_box(&mut to);
                    Ok(())
                };
                copy()?;
                (BYTES, between_instants(COPIES, copy)?, between_instants(COPIES, || Ok(()))?)
            }
        };
        let least = |times: &[f64]| times.iter().copied().fold(f64::INFINITY, f64::min);
        let empty = {
            let mut sorted = empty;
            sorted.sort_by(f64::total_cmp);
            sorted[sorted.len() / 2]
        };
        Ok(Limits { copy: 2.0 * bytes as f64 / least(&copies) * 1e9, empty })
    }
}

#[cfg(feature = "cuda")]
fn memory(bytes: usize) -> Result<cust::memory::DeviceBuffer<u8>, Error> {
    // SAFETY: every bit pattern is a u8.
    cuda("timing", unsafe { cust::memory::DeviceBuffer::uninitialized(bytes) })
}

/// Nanoseconds that a stream spends on `call`, `before` not counted; returns when all is done.
#[cfg(feature = "cuda")]
fn between_events(
    stream: &cust::stream::Stream,
    samples: usize,
    mut before: impl FnMut() -> Result<(), Error>,
    mut call: impl FnMut() -> Result<(), Error>,
) -> Result<Vec<f64>, Error> {
    use cust::event::{Event, EventFlags};
    let event = |_| cuda("event", Event::new(EventFlags::DEFAULT));
    let events = (0..2 * samples).map(event).collect::<Result<Vec<_>, _>>()?;
    let queued = events.chunks_exact(2).try_for_each(|pair| {
        before()?;
        cuda("event", pair[0].record(stream))?;
        call()?;
        cuda("event", pair[1].record(stream))
    });
    // Callers free what the work uses, so this waits whatever went wrong.
    let done = cuda("stream", stream.synchronize());
    queued.and(done)?;
    let between = |pair: &[Event]| Ok(1e6 * f64::from(cuda("event", pair[1].elapsed_time_f32(&pair[0]))?));
    events.chunks_exact(2).map(between).collect()
}

/// Nanoseconds of calls that return when they are done.
#[cfg(feature = "cuda-host")]
fn between_instants(samples: usize, mut call: impl FnMut() -> Result<(), Error>) -> Result<Vec<f64>, Error> {
    let once = |_| {
        let begin = Instant::now();
        call()?;
        Ok(1e9 * begin.elapsed().as_secs_f64())
    };
    (0..samples).map(once).collect()
}
