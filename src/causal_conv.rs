//! Depthwise causal convolution with state (`csrc/causal_conv/causal_conv.h`).
