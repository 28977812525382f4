//! Moe.
