//! Y = X Wᵀ with quantised W (`csrc/matmul/matmul.h`).
