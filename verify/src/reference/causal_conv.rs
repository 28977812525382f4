//! Causal conv.
