/* How attention is cut into work items: (sequence, block of queries, KV head). The query heads of a KV head stay
   together, so that a block of keys is loaded once for all of them. */
#ifndef Q3N_ATTENTION_TILE_H
#define Q3N_ATTENTION_TILE_H

#include "attention.h"

enum { Q3N_ATTENTION_QUERIES = 16, Q3N_ATTENTION_KEYS = 32 };

/* One item: queries first .. first + queries of sequence b, and the heads of KV head hkv. */
typedef struct q3n_attention_tile {
  int64_t b, hkv;
  int64_t row, packed;   /* where the sequence lies: index for the *_b strides, first token for the *_t strides */
  int64_t n, kv_len;     /* queries and keys of the whole sequence */
  int64_t first, queries;
} q3n_attention_tile;

int64_t q3n_attention_items(const q3n_attention_args *a);
int64_t q3n_attention_scratch(const q3n_attention_args *a);
int64_t q3n_attention_avx2_scratch(const q3n_attention_args *a);
int64_t q3n_attention_avx512_scratch(const q3n_attention_args *a);
int64_t q3n_attention_merge_items(const q3n_attention_merge_args *a);
int64_t q3n_attention_merge_no_scratch(const q3n_attention_merge_args *a);

/* Tile number `item`. */
static inline q3n_attention_tile q3n_attention_tile_at(const q3n_attention_args *a, int64_t item) {
  q3n_attention_tile tile = {0, item % a->HKV, 0, 0, a->T, 0, 0, 0};
  int64_t block = item / a->HKV, blocks = (a->T + Q3N_ATTENTION_QUERIES - 1) / Q3N_ATTENTION_QUERIES;
  if (a->cu_seqlens) {
    for (;; tile.b++) {
      tile.n = a->cu_seqlens[tile.b + 1] - a->cu_seqlens[tile.b];
      blocks = (tile.n + Q3N_ATTENTION_QUERIES - 1) / Q3N_ATTENTION_QUERIES;
      if (block < blocks) break;
      block -= blocks;
    }
    tile.packed = a->cu_seqlens[tile.b];
  } else {
    tile.b = tile.row = block / blocks;
    block %= blocks;
  }
  /* Early and late blocks in turn: under a causal mask late ones cost more, and ranges of items should cost the same. */
  block = block % 2 ? blocks - 1 - block / 2 : block / 2;
  tile.first = block * Q3N_ATTENTION_QUERIES;
  tile.queries = tile.n - tile.first < Q3N_ATTENTION_QUERIES ? tile.n - tile.first : Q3N_ATTENTION_QUERIES;
  tile.kv_len = a->kv_len ? a->kv_len[tile.b] : a->S;
  return tile;
}

/* One past the last key that query i of the tile's sequence may see; the first is kv_begin. */
static inline int64_t q3n_attention_visible_end(const q3n_attention_args *a, const q3n_attention_tile *tile, int64_t i) {
  int64_t end = a->causal ? tile->kv_len - tile->n + i + 1 : tile->kv_len;
  return end < a->kv_end ? end : a->kv_end;
}

#endif
