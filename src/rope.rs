//! Partial rotary embedding (`csrc/rope/rope.h`).
