//! What this machine can do at most, measured when asked: memory read, f32 multiply-add, bf16 and int8 dot products, on
//! any number of threads. Times of operators and of the model are set against these.

use qwen3next_kernels::{ffi, Isa};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{c_void, CStr};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Barrier, OnceLock};
use std::time::{Duration, Instant};

/// What a peak counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unit {
    /// Bytes read.
    Read,
    /// f32 operations, a product and a sum being two.
    F32,
    /// Operations of bf16 dot products.
    Bf16,
    /// Operations of int8 dot products.
    Int8,
}

impl Unit {
    /// Every unit.
    pub const ALL: [Unit; 4] = [Unit::Read, Unit::F32, Unit::Bf16, Unit::Int8];

    /// `read`, `f32`, `bf16` or `int8`.
    pub fn name(self) -> &'static str {
        // SAFETY: q3n_peak_kind_name returns a static ASCII string for every value.
        unsafe { CStr::from_ptr(ffi::q3n_peak_kind_name(self.raw())) }.to_str().unwrap_or("")
    }

    fn raw(self) -> ffi::q3n_peak_kind {
        match self {
            Unit::Read => ffi::Q3N_PEAK_READ,
            Unit::F32 => ffi::Q3N_PEAK_F32,
            Unit::Bf16 => ffi::Q3N_PEAK_BF16,
            Unit::Int8 => ffi::Q3N_PEAK_INT8,
        }
    }
}

/// A kernel that finds a peak.
#[derive(Debug, Clone, Copy)]
struct Kernel {
    name: &'static str,
    /// Bytes of a step, or operations of a round.
    work: usize,
    run: unsafe extern "C" fn(*const c_void, i64) -> u32,
}

impl Kernel {
    /// The first of the list that the CPU and the ISA mask offer.
    fn of(unit: Unit) -> Option<Kernel> {
        // SAFETY: _at is asked only for indices below the count; entries are complete and never freed.
        let mut all = (0..unsafe { ffi::q3n_peak_count() }).map(|i| unsafe { &*ffi::q3n_peak_at(i) });
        let entry = all
            .find(|k| k.kind == unit.raw() && Isa::all().nth(k.isa as usize).is_some_and(|isa: Isa| isa.available()))?;
        // SAFETY: the name is a static ASCII string.
        let name = unsafe { CStr::from_ptr(entry.name) }.to_str().unwrap_or("");
        Some(Kernel { name, work: entry.work as usize, run: entry.run? })
    }

    /// n rounds over `data`, which is long enough for them: a multiple of the step for reads.
    fn run(&self, data: &[Line], n: usize) {
        // SAFETY: the entry's ISA is available, `data` is 64-byte aligned; callers below pass the bytes it will read.
        std::hint::black_box(unsafe { (self.run)(data.as_ptr().cast(), n as i64) });
    }
}

#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Line([u8; 64]);

/// Bytes whose float, bf16 and int8 values are all small: sums of their products stay finite.
const OPERAND: [u8; 4] = [0x01, 0x3c, 0x01, 0x3c];

const OPERANDS: usize = ffi::Q3N_PEAK_OPERANDS as usize;

/// A sample is at least this long, where the work can be repeated.
const SAMPLE: Duration = Duration::from_millis(1);

/// Samples of a peak, the best of which counts.
const SAMPLES: usize = 32;

/// Parts of a thread's share of memory, one a sample.
const PARTS: usize = 8;

/// Peaks of this machine; each is measured when first asked for.
#[derive(Debug, Default)]
pub struct Peaks {
    buffer: OnceLock<Vec<Line>>,
    known: RefCell<BTreeMap<(Unit, usize, usize), f64>>,
}

impl Peaks {
    /// Nothing measured yet.
    pub fn new() -> Peaks {
        Peaks::default()
    }

    /// Units a second on so many threads; `None` where the CPU has no such
    /// instructions. Reads are of memory far beyond the last cache.
    pub fn rate(&self, unit: Unit, threads: usize) -> Option<f64> {
        match unit {
            Unit::Read => Some(self.read(buffer_bytes(), threads)),
            _ => {
                let kernel = Kernel::of(unit)?;
                Some(self.known(unit, threads, 0, || arithmetic(&kernel, threads)))
            }
        }
    }

    /// Name of the kernel that finds a unit's peak.
    pub fn kernel(&self, unit: Unit) -> Option<&'static str> {
        Kernel::of(unit).map(|k| k.name)
    }

    /// Bytes a second of reading the same `bytes` again and again on so many threads: from a cache where they fit one.
    pub fn read(&self, bytes: usize, threads: usize) -> f64 {
        let Some(kernel) = Kernel::of(Unit::Read) else { return f64::NAN };
        // Rounded so that calls of about the same size share a measurement.
        let bytes = bytes.clamp(threads * kernel.work * 8, buffer_bytes()).next_power_of_two().min(buffer_bytes());
        self.known(Unit::Read, threads, bytes, || {
            let lines = self.buffer.get_or_init(|| vec![Line([1; 64]); buffer_bytes() / size_of::<Line>()]);
            // A pass over memory goes in parts: a short sample is more likely to find the machine undisturbed.
            let parts = if bytes > 2 * last_cache() { PARTS } else { 1 };
            let steps = bytes / threads / parts / kernel.work;
            let part = (steps * kernel.work / size_of::<Line>()).max(1);
            let next: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            let pass = |thread: usize, times: usize| {
                for _ in 0..times {
                    let at = (thread * parts + next[thread].fetch_add(1, Relaxed) % parts) * part;
                    if let Some(lines) = lines.get(at..at + part) {
                        kernel.run(lines, steps);
                    }
                }
            };
            best(threads, (steps * kernel.work * threads) as f64, pass)
        })
    }

    fn known(&self, unit: Unit, threads: usize, bytes: usize, measure: impl FnOnce() -> f64) -> f64 {
        let key = (unit, threads, bytes);
        if let Some(&rate) = self.known.borrow().get(&key) {
            return rate;
        }
        let rate = measure();
        self.known.borrow_mut().insert(key, rate);
        rate
    }

    /// How near a call came to what bounds it: `ops` of a unit and `bytes` in `seconds`, on so many threads. The roof is
    /// the one whose share of the time is larger.
    pub fn roof(&self, unit: Unit, ops: f64, bytes: f64, seconds: f64, threads: usize) -> Roof {
        // Without instructions of its own a unit is computed in f32.
        let unit = if self.rate(unit, threads).is_some() { unit } else { Unit::F32 };
        let arithmetic = ops / self.rate(unit, threads).unwrap_or(f64::NAN) / seconds;
        let reading = bytes / self.read(bytes as usize, threads) / seconds;
        let memory = if bytes as usize > last_cache() { "memory" } else { "cache" };
        match reading > arithmetic {
            true => Roof { name: memory, fraction: reading },
            false => Roof { name: unit.name(), fraction: arithmetic },
        }
    }
}

/// The nearer of the two bounds of a call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Roof {
    /// `memory`, `cache` (reads that fit one), or the name of an arithmetic unit.
    pub name: &'static str,
    /// 1: as fast as this machine can.
    pub fraction: f64,
}

/// The best rate over some samples of `work` units by `call(thread, times)` on every thread at once.
fn best(threads: usize, work: f64, call: impl Fn(usize, usize) + Sync) -> f64 {
    let once = |times: usize| {
        let barrier = Barrier::new(threads);
        let one = |thread: usize| {
            barrier.wait();
            let begin = Instant::now();
            call(thread, times);
            (begin, Instant::now())
        };
        let spans: Vec<(Instant, Instant)> = if threads == 1 {
            vec![one(0)]
        } else {
            std::thread::scope(|scope| {
                let one = &one;
                let running: Vec<_> = (0..threads).map(|thread| scope.spawn(move || one(thread))).collect();
                running.into_iter().map(|t| t.join().unwrap_or_else(|e| std::panic::resume_unwind(e))).collect()
            })
        };
        let begin = spans.iter().map(|s| s.0).min();
        let end = spans.iter().map(|s| s.1).max();
        begin.zip(end).map_or(0.0, |(begin, end)| (end - begin).as_secs_f64()).max(1e-9)
    };
    // How much fills a sample is told by one thread, at its fastest: an interrupted call would make samples too small.
    let alone = |times: usize| {
        let one = |_| {
            let begin = Instant::now();
            call(0, times);
            begin.elapsed().as_secs_f64().max(1e-9)
        };
        (0..3).map(one).fold(f64::INFINITY, f64::min)
    };
    let mut times = 1;
    let mut seconds = alone(times);
    while seconds < SAMPLE.as_secs_f64() && times < 1 << 40 {
        times = (times as f64 * (1.3 * SAMPLE.as_secs_f64() / seconds).clamp(2.0, 1000.0)) as usize;
        seconds = alone(times);
    }
    (0..SAMPLES).map(|_| work * times as f64 / once(times)).fold(0.0, f64::max)
}

fn arithmetic(kernel: &Kernel, threads: usize) -> f64 {
    let mut line = Line([0; 64]);
    line.0.chunks_exact_mut(OPERAND.len()).for_each(|four| four.copy_from_slice(&OPERAND));
    let operands = [line; OPERANDS / size_of::<Line>()];
    best(threads, (kernel.work * threads * 100) as f64, |_, times| kernel.run(&operands, 100 * times))
}

/// Bytes of the largest cache, as far as the system tells.
pub fn last_cache() -> usize {
    static SIZE: OnceLock<usize> = OnceLock::new();
    *SIZE.get_or_init(|| {
        let size = |i: usize| {
            let text = std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{i}/size")).ok()?;
            Some(text.trim().strip_suffix('K')?.parse::<usize>().ok()? << 10)
        };
        (0..8).filter_map(size).max().unwrap_or(32 << 20)
    })
}

/// Bytes that a read of memory goes over.
pub fn buffer_bytes() -> usize {
    (8 * last_cache()).next_power_of_two().clamp(1 << 28, 1 << 30)
}

/// Processes that ran on average in the last minute, where the system tells. With other work beside them peaks and times
/// come out too low.
pub fn load() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_reads_and_multiplies() {
        let peaks = Peaks::new();
        for unit in Unit::ALL {
            if let Some(rate) = peaks.rate(unit, 1) {
                assert!(rate > 1e7 && rate < 1e15, "{}: {rate}", unit.name());
                assert_eq!(peaks.rate(unit, 1), Some(rate), "measured twice");
            } else {
                assert_eq!(unit, Unit::Bf16, "no kernel");
            }
        }
    }

    #[test]
    fn the_nearer_roof_is_named() {
        let peaks = Peaks::new();
        let (read, f32) = (peaks.read(1 << 30, 1), peaks.rate(Unit::F32, 1).unwrap());
        let far = peaks.roof(Unit::F32, 1.0, read, 2.0, 1);
        assert_eq!(far.name, "memory");
        let near = peaks.roof(Unit::F32, f32, 64.0, 4.0, 1);
        assert_eq!(near, Roof { name: "f32", fraction: 0.25 });
    }
}
