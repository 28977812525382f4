/* How the four steps are cut into work items, and their scratch. */
#ifndef Q3N_MOE_BLOCK_H
#define Q3N_MOE_BLOCK_H

#include "../base/check.h"
#include "../matmul/matmul_block.h"
#include "moe.h"

/* Rows of an expert that one item of the scalar up or down holds as f32. */
enum { Q3N_MOE_ROWS = 4 };

/* Rows of D that one item of a tiled down takes, two tiles: its share of an expert is a longer run of memory. */
enum { Q3N_MOE_DOWN_ROWS = 2 * Q3N_TILE_ROWS };

/* Scratch of one item of up: its rows of gate, then of up, then decoded rows of x. Of down: its rows, decoded rows of
   h, then the dots, [T * top_k] rows of as many as the item has rows. */
static inline int64_t q3n_moe_rows_bytes(int64_t rows, int64_t cols) {
  return q3n_align(rows * cols * (int64_t)sizeof(float));
}

int64_t q3n_moe_route_items(const q3n_moe_route_args *a);
int64_t q3n_moe_route_no_scratch(const q3n_moe_route_args *a);
int64_t q3n_moe_group_items(const q3n_moe_group_args *a);
int64_t q3n_moe_group_no_scratch(const q3n_moe_group_args *a);
int64_t q3n_moe_up_items(const q3n_moe_up_args *a);
int64_t q3n_moe_up_scratch(const q3n_moe_up_args *a);
int64_t q3n_moe_down_items(const q3n_moe_down_args *a);
int64_t q3n_moe_down_scratch(const q3n_moe_down_args *a);
int64_t q3n_moe_up_tile_items(const q3n_moe_up_args *a);
int64_t q3n_moe_up_tile_scratch(const q3n_moe_up_args *a);
int64_t q3n_moe_down_tile_items(const q3n_moe_down_args *a);
int64_t q3n_moe_down_tile_scratch(const q3n_moe_down_args *a);

#endif
