/* How the operators of this room are cut into work items: one row each. */
#ifndef Q3N_LAYER_LAYER_ROWS_H
#define Q3N_LAYER_LAYER_ROWS_H

#include "layer.h"

int64_t q3n_gather_items(const q3n_gather_args *a);
int64_t q3n_gather_no_scratch(const q3n_gather_args *a);
int64_t q3n_add_items(const q3n_add_args *a);
int64_t q3n_add_no_scratch(const q3n_add_args *a);
int64_t q3n_delta_gates_items(const q3n_delta_gates_args *a);
int64_t q3n_delta_gates_no_scratch(const q3n_delta_gates_args *a);
int64_t q3n_kv_store_items(const q3n_kv_store_args *a);
int64_t q3n_kv_store_no_scratch(const q3n_kv_store_args *a);
int64_t q3n_row_gate_items(const q3n_row_gate_args *a);
int64_t q3n_row_gate_no_scratch(const q3n_row_gate_args *a);

#endif
