//! Experts in the CPU's memory, computed on a device: copied there for the ubatches that have enough tokens for them.

use crate::config::MoeConfig;

/// When experts that lie in the CPU's memory are copied to the device and computed there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum When {
    /// Where that is reckoned to take less time than the CPU's own products.
    #[default]
    Auto,
    /// Never: the CPU computes them.
    Never,
    /// For every ubatch.
    Always,
}

/// How experts that lie in the CPU's memory are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Streaming {
    /// On the device, or by the CPU.
    pub when: When,
    /// Copy the experts that a ubatch chose, not all of the layer's.
    pub only_active: bool,
}

impl Default for Streaming {
    fn default() -> Self {
        Streaming::DEFAULT
    }
}

/// Operations that a CPU does while the link to the device takes a byte: 2·10¹² a second, six cores with 8-bit products,
/// and 16·10⁹ bytes. Reckoned, not measured on a GPU.
const OPS_PER_BYTE: f64 = 125.0;

impl Streaming {
    /// Where it pays, and only what was chosen.
    pub const DEFAULT: Streaming = Streaming { when: When::Auto, only_active: true };

    /// Experts that a ubatch of so many tokens needs room for on the device; 0: the CPU computes them. Sizes decide, not
    /// what the tokens chose, so that the memory it takes is known before.
    pub fn staged(&self, moe: &MoeConfig, hidden: usize, expert_bytes: u64, tokens: usize) -> usize {
        let pairs = tokens.saturating_mul(moe.top_k);
        // A ubatch that pays chooses nearly all of them.
        let ops = 2.0 * pairs as f64 * 3.0 * (moe.ff * hidden) as f64;
        let bytes = moe.experts as f64 * expert_bytes as f64;
        let streams = match self.when {
            When::Auto => ops >= OPS_PER_BYTE * bytes,
            When::Never => false,
            When::Always => true,
        };
        match (streams, self.only_active) {
            (false, _) => 0,
            (true, true) => pairs.min(moe.experts),
            (true, false) => moe.experts,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the 80B-A3B in Q4_K: a layer's experts are 906 MB, and a token is 63 million operations.
    #[test]
    fn long_ubatches_stream_and_tokens_do_not() {
        let moe = MoeConfig { experts: 512, top_k: 10, ff: 512, shared_ff: 512, normalize: true };
        let staged = |streaming: Streaming, tokens| streaming.staged(&moe, 2048, 3 * 512 * 2048 / 256 * 144, tokens);
        let auto = Streaming::default();
        assert_eq!([1, 512, 1024, 2048, 8192].map(|t| staged(auto, t)), [0, 0, 0, 512, 512]);
        assert_eq!([1, 20, 512].map(|t| staged(Streaming { when: When::Always, ..auto }, t)), [10, 200, 512]);
        assert_eq!([1, 8192].map(|t| staged(Streaming { when: When::Always, only_active: false }, t)), [512, 512]);
        assert_eq!([1, 8192].map(|t| staged(Streaming { when: When::Never, ..auto }, t)), [0, 0]);
    }
}
