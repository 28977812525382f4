//! Rope.
