/* How the four steps are cut into work items, and their scratch. */
#ifndef Q3N_MOE_BLOCK_H
#define Q3N_MOE_BLOCK_H

#include "../base/check.h"
#include "moe.h"

/* Rows of an expert that one item of up or down holds as f32. */
enum { Q3N_MOE_ROWS = 4 };

/* Scratch of one item of up: its rows of gate, then of up. Of down: its rows, then [T * top_k][Q3N_MOE_ROWS] dots. */
static inline int64_t q3n_moe_rows_bytes(int64_t cols) {
  return q3n_align(Q3N_MOE_ROWS * cols * (int64_t)sizeof(float));
}

int64_t q3n_moe_route_items(const q3n_moe_route_args *a);
int64_t q3n_moe_route_no_scratch(const q3n_moe_route_args *a);
int64_t q3n_moe_group_items(const q3n_moe_group_args *a);
int64_t q3n_moe_group_no_scratch(const q3n_moe_group_args *a);
int64_t q3n_moe_up_items(const q3n_moe_up_args *a);
int64_t q3n_moe_up_scratch(const q3n_moe_up_args *a);
int64_t q3n_moe_down_items(const q3n_moe_down_args *a);
int64_t q3n_moe_down_scratch(const q3n_moe_down_args *a);

#endif
