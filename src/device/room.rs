//! How much of a device's memory buffers hold, and how much there is left.

use super::{Device, Place};
use crate::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// Bytes of the live buffers of a device and its clones.
#[derive(Debug)]
pub(super) struct Account {
    live: AtomicU64,
    /// Of the host executor, which would have the whole machine's memory.
    limit: u64,
}

impl Default for Account {
    fn default() -> Self {
        Account { live: AtomicU64::new(0), limit: u64::MAX }
    }
}

/// Bytes that count as long as this lives.
#[derive(Debug)]
pub(super) struct Counted {
    account: Arc<Account>,
    bytes: u64,
}

impl Counted {
    /// Error: these bytes are more than the limit leaves.
    pub fn new(account: &Arc<Account>, bytes: u64) -> Result<Counted, Error> {
        let add = |live: u64| live.checked_add(bytes).filter(|&sum| sum <= account.limit);
        match account.live.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add) {
            Ok(_) => Ok(Counted { account: account.clone(), bytes }),
            Err(live) => {
                let report = format!("out of memory: {bytes} bytes, {} are free", account.limit - live);
                Err(Error::Device { operator: "buffer", report })
            }
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.account.live.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Device {
    /// The host executor with so many bytes of memory: what happens where there is too little.
    #[cfg(feature = "cuda-host")]
    pub fn executor_with(bytes: u64) -> Device {
        Device(Place::Executor, Arc::new(Account { live: AtomicU64::new(0), limit: bytes }))
    }

    /// Bytes of all buffers that live on it, those of its streams among them.
    pub fn allocated(&self) -> u64 {
        self.1.live.load(Ordering::Relaxed)
    }

    /// Bytes that are free; `u64::MAX` where nothing limits them. Other programs take from a GPU's too.
    pub fn free_memory(&self) -> Result<u64, Error> {
        match &self.0 {
            #[cfg(feature = "cuda")]
            Place::Gpu(_) => {
                self.enter()?;
                super::cuda("device", cust::memory::mem_get_info()).map(|(free, _)| free as u64)
            }
            #[cfg(feature = "cuda-host")]
            Place::Executor => Ok(match self.1.limit {
                u64::MAX => u64::MAX,
                limit => limit - self.allocated(),
            }),
        }
    }
}
