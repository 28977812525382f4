//! Flash attention with grouped heads, and the merge of its parts (`csrc/attention/attention.h`).
