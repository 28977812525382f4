//! What is running, told when a kernel dies of a signal: the handler prints the command that repeats it, then the
//! process dies as it would have.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};

/// Longest line that is kept.
const MOST: usize = 1024;
/// Suites that may run at the same time and still be told.
const LINES: usize = 32;

/// A line in static memory, which a signal handler may read at any time.
struct Line {
    taken: AtomicBool,
    len: AtomicUsize,
    text: [AtomicU8; MOST],
}

static RUNNING: [Line; LINES] = [const {
    Line { taken: AtomicBool::new(false), len: AtomicUsize::new(0), text: [const { AtomicU8::new(0) }; MOST] }
}; LINES];

/// Something that runs in this process; forgotten when dropped.
pub struct Running(Option<&'static Line>);

/// Announces that something runs, and installs the handler.
pub fn enter() -> Running {
    install();
    let free = |line: &&Line| !line.taken.swap(true, Ordering::AcqRel);
    Running(RUNNING.iter().find(free))
}

impl Running {
    /// Sets the command that repeats what runs from now on.
    pub fn is(&self, command: &str) {
        let Some(line) = self.0 else { return };
        line.len.store(0, Ordering::Release);
        for (to, &from) in line.text.iter().zip(command.as_bytes()) {
            to.store(from, Ordering::Relaxed);
        }
        line.len.store(command.len().min(MOST), Ordering::Release);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(line) = self.0 {
            line.len.store(0, Ordering::Release);
            line.taken.store(false, Ordering::Release);
        }
    }
}

#[cfg(unix)]
fn install() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        for (signal, _) in SIGNALS {
            // SAFETY: a zeroed sigaction is a valid one; the handler makes only async-signal-safe calls. The default
            // action is back before it runs, and it runs on the alternate stack that Rust gives its threads.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = died as extern "C" fn(libc::c_int) as usize;
                action.sa_flags = libc::SA_RESETHAND | libc::SA_ONSTACK;
                libc::sigaction(signal, &action, std::ptr::null_mut());
            }
        }
    });
}

#[cfg(not(unix))]
fn install() {}

#[cfg(unix)]
const SIGNALS: [(libc::c_int, &[u8]); 4] = [
    (libc::SIGSEGV, b"SIGSEGV (memory that is not the kernel's)"),
    (libc::SIGBUS, b"SIGBUS (memory that is not the kernel's)"),
    (libc::SIGILL, b"SIGILL (an instruction that this CPU lacks)"),
    (libc::SIGFPE, b"SIGFPE (an integer division by zero)"),
];

#[cfg(unix)]
extern "C" fn died(signal: libc::c_int) {
    fn print(text: &[u8]) {
        // SAFETY: write is async-signal-safe and reads only the slice.
        unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
    }
    print(b"\ndied of ");
    if let Some((_, name)) = SIGNALS.iter().find(|(number, _)| *number == signal) {
        print(name);
    }
    print(b" in\n");
    for line in &RUNNING {
        let len = line.len.load(Ordering::Acquire).min(MOST);
        if len > 0 {
            let mut text = [0; MOST];
            for (to, from) in text.iter_mut().zip(&line.text) {
                *to = from.load(Ordering::Relaxed);
            }
            print(b"  ");
            print(text.get(..len).unwrap_or_default());
            print(b"\n");
        }
    }
    // SAFETY: the signal is blocked while its handler runs and kills the process, by default action, right after it.
    unsafe { libc::raise(signal) };
}
