//! RMS norms, gated RMS norm, L2 norm (`csrc/norm/norm.h`).
