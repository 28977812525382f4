//! Router, grouping and expert feed-forward (`csrc/moe/moe.h`).
