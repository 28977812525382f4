//! Quant.
