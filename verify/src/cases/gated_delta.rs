//! Gated delta.
