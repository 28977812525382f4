//! Block formats to and from f32 (`csrc/quant/quant.h`).
