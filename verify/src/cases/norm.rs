//! Norm.
