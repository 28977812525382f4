//! The gated delta rule (`csrc/gated_delta/gated_delta.h`).
