//! Ctrl-C: while a text is written it ends that text, otherwise the program.

use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

const OFF: u8 = 0;
const ARMED: u8 = 1;
const CAUGHT: u8 = 2;

static STATE: AtomicU8 = AtomicU8::new(OFF);

/// From the signal handler: true where the work in progress will stop by itself. A second interrupt is not held back.
pub fn catch() -> bool {
    STATE.compare_exchange(ARMED, CAUGHT, SeqCst, SeqCst).is_ok()
}

/// While this lives an interrupt is only remembered.
pub struct Guard(());

impl Guard {
    /// Forgets earlier interrupts.
    pub fn new() -> Guard {
        STATE.store(ARMED, SeqCst);
        Guard(())
    }

    /// An interrupt came.
    pub fn caught(&self) -> bool {
        STATE.load(SeqCst) == CAUGHT
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        STATE.store(OFF, SeqCst);
    }
}
