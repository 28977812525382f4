//! Work that a stream repeats. [`Stream::repeat`] holds back what is queued and compares it with what was queued the time
//! before, call by call: kernels, arguments, addresses, scratch. All the checks of the calls run each time, so a graph is
//! launched only for work that could be queued as it is. A copy, a free or a wait has the held calls queued first, whichever
//! thread it is on: nobody sees a difference but that of time.

use super::{Device, Queue, Stream};
use crate::operator::{Kernel, Operator};
use crate::Error;
use std::any::Any;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard};

/// What one [`Stream::repeat`] queued, and on a GPU the graph of it.
#[derive(Default)]
pub struct Graph {
    device: Option<Device>,
    calls: Vec<Box<dyn Queued>>,
    made: Option<Executable>,
    launches: u64,
}

impl Graph {
    /// How often its work was launched as a whole.
    pub fn launches(&self) -> u64 {
        self.launches
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let calls = self.calls.len();
        f.debug_struct("Graph").field("calls", &calls).field("launches", &self.launches).finish_non_exhaustive()
    }
}

impl Stream {
    /// Calls `work` and queues what it queues on this stream, as one launch of `graph` where that is the same, call by
    /// call, as the time before: the first time queues the calls, the second captures them, later ones launch what was
    /// captured. Contents of buffers and indices may differ from time to time. Where `work` copies to or from the CPU,
    /// frees a buffer or waits, what it has queued and will queue goes to the stream call by call. Within another
    /// `repeat` of this stream, `work` is a part of that one.
    ///
    /// Errors: those of `work`, and of its launches, which show here rather than where they were queued; memory that these
    /// were to fill holds any values. A capture that failed: the calls have been queued one by one.
    pub fn repeat<R, E: From<Error>>(&self, graph: &mut Graph, work: impl FnOnce() -> Result<R, E>) -> Result<R, E> {
        let Some(mut scope) = Scope::enter(self, graph) else { return work() };
        let done = work()?;
        scope.finish(true)?;
        Ok(done)
    }
}

/// Where kernels are queued.
#[derive(Clone, Copy)]
pub(super) enum Target {
    #[cfg(feature = "cuda")]
    Gpu(crate::ffi::q3n_stream),
    #[cfg(feature = "cuda-host")]
    Executor,
}

// SAFETY: the driver takes streams from every thread.
unsafe impl Send for Target {}

impl From<&Queue> for Target {
    fn from(queue: &Queue) -> Target {
        match queue {
            #[cfg(feature = "cuda")]
            Queue::Gpu(stream) => Target::Gpu(stream.as_inner().cast()),
            #[cfg(feature = "cuda-host")]
            Queue::Executor => Target::Executor,
        }
    }
}

/// A kernel with its arguments, which passed the operator's check, and its scratch.
pub(super) struct Call<O: Operator> {
    pub raw: O::Raw,
    pub kernel: &'static Kernel<O::Raw>,
    pub scratch: *mut c_void,
}

impl<O: Operator> Call<O> {
    /// Bytes of scratch that the kernel needs there.
    pub fn scratch_bytes(raw: &O::Raw, kernel: &Kernel<O::Raw>, target: Target) -> Result<i64, Error> {
        let bytes = match target {
            #[cfg(feature = "cuda")]
            Target::Gpu(_) => kernel.gpu.ok_or_else(missing::<O>)?.1,
            #[cfg(feature = "cuda-host")]
            Target::Executor => kernel.executor.ok_or_else(missing::<O>)?.2,
        };
        // SAFETY: `raw` passed the operator's check.
        Ok(unsafe { bytes(raw) })
    }
}

fn missing<O: Operator>() -> Error {
    Error::argument("stream", format!("{} has no kernel for its device", O::NAME))
}

/// A [`Call`] of any operator.
pub(super) trait Queued: Send + Sync {
    fn is(&self, other: &dyn Any) -> bool;

    /// # Safety
    /// The pointers of the call are those of live memory of the target's device, whose context is this thread's.
    unsafe fn launch(&self, target: Target) -> Result<(), Error>;
}

// SAFETY: what the pointers point to is touched in `launch` alone, whose caller answers for it.
unsafe impl<O: Operator> Send for Call<O> {}
// SAFETY: as above.
unsafe impl<O: Operator> Sync for Call<O> {}

impl<O: Operator> Queued for Call<O> {
    fn is(&self, other: &dyn Any) -> bool {
        let same = |other: &Self| (self.raw, self.scratch) == (other.raw, other.scratch);
        other.downcast_ref::<Self>().is_some_and(|other| self.kernel.name == other.kernel.name && same(other))
    }

    unsafe fn launch(&self, target: Target) -> Result<(), Error> {
        match target {
            #[cfg(feature = "cuda")]
            Target::Gpu(stream) => {
                let (launch, _) = self.kernel.gpu.ok_or_else(missing::<O>)?;
                // SAFETY: the args passed the operator's check; the pointers are the device's, as the caller says.
                let status = unsafe { launch(&self.raw, self.scratch, stream) };
                if status as u32 & 0xff == crate::ffi::Q3N_DEVICE {
                    // SAFETY: a NUL-terminated text that only this thread's next launch changes.
                    let report = unsafe { std::ffi::CStr::from_ptr(crate::ffi::q3n_cuda_report()) };
                    return Err(Error::Device { operator: O::NAME, report: report.to_string_lossy().into_owned() });
                }
                crate::status::check(O::NAME, status)
            }
            #[cfg(feature = "cuda-host")]
            Target::Executor => {
                let (items, run, _) = self.kernel.executor.ok_or_else(missing::<O>)?;
                // SAFETY: as above; the executor's memory is the CPU's.
                crate::status::check(O::NAME, unsafe { run(&self.raw, 0, items(&self.raw), self.scratch) })
            }
        }
    }
}

/// Calls that a stream holds back.
pub(super) struct Held {
    device: Device,
    target: Target,
    /// The first `count` have been queued; those behind them are the graph's, still to come.
    calls: Vec<Box<dyn Queued>>,
    count: usize,
    /// Some call is not the graph's.
    differs: bool,
    /// They could not wait, and this is how their launches went: what comes now goes straight to the stream.
    released: Option<Result<(), Error>>,
}

/// Of a stream: `None` where it holds nothing back.
pub(super) type Holding = Arc<Mutex<Option<Held>>>;

/// Of all streams that hold calls back now.
static HOLDING: Mutex<Vec<Holding>> = Mutex::new(Vec::new());

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Queues what streams of the device hold back: before memory is read, written or freed by anything but a queued call.
pub(super) fn release(device: &Device) {
    let all = lock(&HOLDING).clone();
    for holding in all {
        if let Some(held) = lock(&holding).as_mut().filter(|held| held.device.id() == device.id()) {
            held.release();
        }
    }
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Held").field("count", &self.count).finish_non_exhaustive()
    }
}

impl Held {
    /// Takes a call, unless it is to go straight to the stream.
    pub fn hold<O: Operator>(&mut self, call: Call<O>) -> Result<(), Call<O>> {
        if self.released.is_some() {
            return Err(call);
        }
        if !self.calls.get(self.count).is_some_and(|known| known.is(&call)) {
            self.differs = true;
            self.calls.truncate(self.count);
            self.calls.push(Box::new(call));
        }
        self.count += 1;
        Ok(())
    }

    fn release(&mut self) {
        if self.released.is_none() {
            self.released = Some(self.launch_each());
        }
    }

    fn launch_each(&self) -> Result<(), Error> {
        self.device.enter()?;
        // SAFETY: whoever frees memory of the device releases them before.
        self.calls[..self.count].iter().try_for_each(|call| unsafe { call.launch(self.target) })
    }

    /// Launches them as a whole where they are the graph's.
    fn launch(&mut self, graph: &mut Graph) -> Result<(), Error> {
        let same = !self.differs && self.count == self.calls.len();
        self.calls.truncate(self.count);
        if !same {
            graph.made = None;
            return self.launch_each();
        }
        if self.count == 0 {
            return Ok(());
        }
        let launched = self.launch_whole(graph);
        if launched.is_err() {
            // Their callers were told that they are queued.
            graph.made = None;
            self.launch_each()?;
        }
        launched
    }

    fn launch_whole(&self, graph: &mut Graph) -> Result<(), Error> {
        self.device.enter()?;
        if graph.made.is_none() {
            graph.made = Some(Executable::new(self)?);
        }
        graph.made.as_ref().expect("made just above").launch(self)?;
        graph.launches += 1;
        Ok(())
    }
}

/// While it lives, its stream holds back what is queued.
struct Scope<'a> {
    holding: &'a Holding,
    graph: &'a mut Graph,
}

impl<'a> Scope<'a> {
    /// `None` where the stream does so already.
    fn enter(stream: &'a Stream, graph: &'a mut Graph) -> Option<Scope<'a>> {
        let mut held = lock(&stream.holding);
        if held.is_some() {
            return None;
        }
        if graph.device.as_ref().is_none_or(|d| d.id() != stream.device.id()) {
            *graph = Graph { device: Some(stream.device.clone()), launches: graph.launches, ..Graph::default() };
        }
        *held = Some(Held {
            device: stream.device.clone(),
            target: stream.target(),
            calls: std::mem::take(&mut graph.calls),
            count: 0,
            differs: false,
            released: None,
        });
        drop(held);
        lock(&HOLDING).push(stream.holding.clone());
        Some(Scope { holding: &stream.holding, graph })
    }

    /// Queues what is held back, as a whole if it is `complete`.
    fn finish(&mut self, complete: bool) -> Result<(), Error> {
        // Locked until they are launched: who frees memory waits here.
        let mut guard = lock(self.holding);
        let Some(mut held) = guard.take() else { return Ok(()) };
        if !complete {
            held.release();
        }
        let done = match held.released.take() {
            Some(launched) => {
                if held.differs {
                    self.graph.made = None;
                }
                launched
            }
            None => held.launch(self.graph),
        };
        self.graph.calls = held.calls;
        drop(guard);
        lock(&HOLDING).retain(|other| !Arc::ptr_eq(other, self.holding));
        done
    }
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        // Where `work` failed or panicked, which is what is told.
        let _ = self.finish(false);
    }
}

/// Calls as a whole.
enum Executable {
    #[cfg(feature = "cuda")]
    Gpu(gpu::Captured),
    #[cfg(feature = "cuda-host")]
    Executor,
}

impl Executable {
    fn new(held: &Held) -> Result<Executable, Error> {
        match held.target {
            #[cfg(feature = "cuda")]
            Target::Gpu(_) => Ok(Executable::Gpu(gpu::Captured::new(&held.calls, &held.device)?)),
            #[cfg(feature = "cuda-host")]
            Target::Executor => Ok(Executable::Executor),
        }
    }

    /// Launches what is `held`: the calls that it was made of, made anew.
    fn launch(&self, held: &Held) -> Result<(), Error> {
        match (self, held.target) {
            #[cfg(feature = "cuda")]
            // SAFETY: whoever frees memory of the device releases them before.
            (Executable::Gpu(captured), Target::Gpu(stream)) => unsafe { captured.launch(stream) },
            #[cfg(feature = "cuda-host")]
            _ => held.launch_each(),
        }
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::{Queued, Target};
    use crate::device::Device;
    use crate::Error;
    use cust::sys;
    use std::ptr::null_mut;

    fn done(status: sys::CUresult) -> Result<(), Error> {
        match status {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            other => Err(Error::Device { operator: "graph", report: format!("{other:?}") }),
        }
    }

    /// A graph that the driver has made ready to launch.
    pub struct Captured {
        made: sys::CUgraphExec,
        device: Device,
    }

    // SAFETY: the driver takes it from every thread; it is launched and destroyed by its owner alone.
    unsafe impl Send for Captured {}
    // SAFETY: as above.
    unsafe impl Sync for Captured {}

    impl Captured {
        /// Runs the launchers of `calls` on a stream that records.
        pub fn new(calls: &[Box<dyn Queued>], device: &Device) -> Result<Captured, Error> {
            // One that the default stream does not wait for: copies of other threads, which use that, may go on.
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            let (mut aside, mut graph, mut made) = (null_mut(), null_mut(), null_mut());
            // SAFETY: a stream of its own, which nothing runs on, a graph and what is made of it, each destroyed once;
            // while it records, launchers read their args and touch none of the memory that these point to.
            unsafe {
                done(sys::cuStreamCreate(&mut aside, flags))?;
                let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
                let captured = done(sys::cuStreamBeginCapture_v2(aside, mode)).and_then(|()| {
                    let queued = calls.iter().try_for_each(|call| call.launch(Target::Gpu(aside.cast())));
                    // Ends it whatever went wrong.
                    let ended = done(sys::cuStreamEndCapture(aside, &mut graph));
                    queued.and(ended)
                });
                let captured = captured.and_then(|()| done(sys::cuGraphInstantiateWithFlags(&mut made, graph, 0)));
                if !graph.is_null() {
                    sys::cuGraphDestroy(graph);
                }
                sys::cuStreamDestroy_v2(aside);
                captured.map(|()| Captured { made, device: device.clone() })
            }
        }

        /// # Safety
        /// The memory that the calls point to lives, and so does the stream.
        pub unsafe fn launch(&self, stream: crate::ffi::q3n_stream) -> Result<(), Error> {
            // SAFETY: as the caller says.
            done(unsafe { sys::cuGraphLaunch(self.made, stream.cast()) })
        }
    }

    impl Drop for Captured {
        fn drop(&mut self) {
            // A context that can't be entered any more took it along.
            if self.device.enter().is_ok() {
                // SAFETY: made by the driver, and dropped once; one that runs ends first.
                unsafe { sys::cuGraphExecDestroy(self.made) };
            }
        }
    }
}
