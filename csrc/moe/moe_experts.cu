/* Up and down over the tiles of ../matmul/tile.cuh: 16 rows of an expert times up to 8 or 32 of its pairs. A tile gives
   the same bits whatever else is in it, so all forms of a call agree:

   up, few tokens     a block a pair and rows; the first of every eight pairs of an expert takes them all
   up, many tokens    one block lists the tiles of all experts, then a block a tile and rows
   down, few tokens   a block a token and 16 rows; its warps have the choices, and one thread a row adds them in order
   down, many tokens  tiles of the list to scratch, then a thread an element of y adds its choices in order

   Gate and up are met by warps of one block, where one instance of the kernel has both types. */
#include "../cuda/reduce.cuh"
#include "../matmul/tile.cuh"

extern "C" {
#include "moe.h"
}

namespace {

/* Tokens, experts and choices up to which there are few: experts are found by looking at all. */
constexpr int64_t FEW_TOKENS = 8, FEW_EXPERTS = 4096;
constexpr int FEW_CHOICES = 64;
/* Warps of a block that has a token's choices, and their shared memory at most. */
constexpr int CHOICE_WARPS = 16;
constexpr int64_t CHOICE_BYTES = 80 * 1024;
/* That many threads leave 128 registers each, which is too few for f32 x of these types. */
constexpr int choice_warps(int dtype, bool q8) {
  return (dtype == Q3N_Q5_K || dtype == Q3N_Q6_K) && !q8 ? 12 : CHOICE_WARPS;
}
/* Scratch for the dots of down, at most but for one tile of rows. */
constexpr int64_t DOTS_BYTES = (int64_t)64 << 20;
constexpr int THREADS = 128, LIST_THREADS = 1024;

/* Of [E][rows][K] weights. */
struct matrix {
  const uint8_t *base;
  int64_t expert_bytes, row_bytes;
  q3n_dtype dtype; /* without Q3N_R16 */
  bool r16;
};

/* What a tile's dots become. */
enum form {
  GATE_AND_UP, /* out = silu(of matrix 0) * of matrix 1 */
  GATE,        /* out = dot */
  UP,          /* out = silu(out) * dot */
  DOTS,        /* out = dot */
  CHOICES      /* a token's sum over its choices */
};

struct plan {
  form kind;
  matrix m[2];
  const uint8_t *act; /* rows of a token, or of a pair */
  int64_t act_bytes, act_pairs; /* bytes from row to row; pairs that share one */
  float *out;
  int64_t out_row;              /* from pair to pair, or from token to token */
  const int64_t *order, *offsets;
  const int64_t *tiles; /* their number, then from the eighth on expert and first place in order; NULL: few */
  const float *weights;
  int32_t accumulate;
  int warps;
  int64_t E, top_k, K;
  int64_t first, end, row_blocks; /* rows first .. end - 1, by as many blocks */
  int64_t blocks;                 /* few: pairs or tokens, which have so many each */
};

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

__device__ __forceinline__ q3n_tile_weights rows_of(const matrix &m, int64_t e, int64_t row, int64_t end) {
  const int count = row >= end ? 0 : end - row < 16 ? (int)(end - row) : 16;
  return {count ? m.base + e * m.expert_bytes + row * m.row_bytes : m.base, m.row_bytes, count, m.dtype, m.r16};
}

/* Rows of activations that a tile meets, by their bytes from the first one on. */
struct act_rows {
  const uint8_t *base;
  q3n_shared<int64_t> at;
  int n;
  __device__ __forceinline__ const uint8_t *operator()(int j) const { return j < n ? base + (int64_t)at[j] : nullptr; }
};

/* Few tokens: the expert of place `place` in order, or -1, in `found`. */
__device__ __forceinline__ void find_expert(const plan &a, int64_t place, q3n_shared<int> found) {
  if (threadIdx.x == 0) found[0] = -1;
  __syncthreads();
  for (int64_t e = threadIdx.x; e < a.E; e += 32 * a.warps)
    if (a.offsets[e] <= place && place < a.offsets[e + 1]) found[0] = (int)e;
  __syncthreads();
}

/* Those of a token's choices. */
__device__ __forceinline__ void find_choices(const plan &a, int64_t t, q3n_shared<int> found) {
  for (int64_t c = threadIdx.x; c < a.top_k; c += 32 * a.warps) found[c] = -1;
  __syncthreads();
  for (int64_t e = threadIdx.x; e < a.E; e += 32 * a.warps)
    for (int64_t i = a.offsets[e]; i < a.offsets[e + 1]; i++) {
      const int64_t c = a.order[i] - t * a.top_k;
      if (c >= 0 && c < a.top_k) found[c] = (int)e;
    }
  __syncthreads();
}

/* A tile of the list, or the one that starts at place `tile` in order; n = 0: there is none. */
struct pairs_of {
  int64_t e, from;
  int n;
};

template <int SIZE>
__device__ __forceinline__ pairs_of find_pairs(const plan &a, int64_t tile, q3n_shared<int> found) {
  pairs_of at = {0, tile, 0};
  if (a.tiles) {
    at.e = a.tiles[8 + 2 * tile], at.from = a.tiles[9 + 2 * tile];
  } else {
    find_expert(a, tile, found);
    at.e = (int)found[0];
    if (at.e < 0 || (tile - a.offsets[at.e]) % SIZE != 0) return at;
  }
  const int64_t left = a.offsets[at.e + 1] - at.from;
  at.n = (int)(left < SIZE ? left : SIZE);
  return at;
}

/* Where pairs lie and what they meet, for all threads behind the next barrier. */
__device__ __forceinline__ void find_rows(const plan &a, int64_t from, int n, bool sorted, q3n_shared<int64_t> pair_of,
                                          q3n_shared<int64_t> row_of) {
  if ((int)threadIdx.x >= n) return;
  const int64_t pair = sorted ? a.order[from + threadIdx.x] : from + threadIdx.x;
  pair_of[threadIdx.x] = pair;
  row_of[threadIdx.x] = pair / a.act_pairs * a.act_bytes;
}

/* Infinities that the tile lost in products of parts. */
template <bool Q8, int MT>
__device__ __forceinline__ void check(float (&y)[1][MT][4], const q3n_tile_weights &w, const act_rows &x, int64_t K) {
  const int lane = (int)(threadIdx.x % 32);
  Q3N_UNROLL
  for (int i = 0; i < 4 * MT; i++) {
    const int r = lane / 4 + i % 4 / 2 * 8, j = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float &value = y[0][i / 4][i % 4];
    if (r < w.count && j < x.n) value = q3n_tile_checked<Q8>(value, w, r, x(j), K);
  }
}

/* Dots of rows row .. row + 15 to where their pairs have them; `up` of matrix 1, COUNT * 32 of them. */
template <int MT>
__device__ __forceinline__ void finish(const plan &a, const float (&y)[1][MT][4], q3n_shared<float> up, int64_t row,
                                       int n, q3n_shared<int64_t> pair_of) {
  const int lane = (int)(threadIdx.x % 32);
  Q3N_UNROLL
  for (int i = 0; i < 4 * MT; i++) {
    const int64_t r = row + lane / 4 + i % 4 / 2 * 8;
    const int j = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (r >= a.end || j >= n) continue;
    float *to = a.out + (int64_t)pair_of[j] * a.out_row + (r - a.first);
    float value = y[0][i / 4][i % 4];
    if (a.kind == GATE_AND_UP) value = silu(value) * up[i * 32 + lane];
    if (a.kind == UP) value = silu(*to) * value;
    *to = value;
  }
}

template <int MT>
__device__ __forceinline__ void put(const float (&y)[1][MT][4], q3n_shared<float> to) {
  Q3N_UNROLL
  for (int i = 0; i < 4 * MT; i++) to[i * 32 + (int)(threadIdx.x % 32)] = y[0][i / 4][i % 4];
}

/* Tiles of up to 8 pairs, or a token's choices; warps share K. */
template <int DT, bool Q8> __global__ void __launch_bounds__(32 * choice_warps(DT, Q8), 1) few(plan a) {
  Q3N_SHARED_DYNAMIC(uint32_t, words, 0, a.warps * q3n_tile_words(DT, 1));
  Q3N_SHARED(float, floats, CHOICE_WARPS * 4 * 32);
  Q3N_SHARED(float, dots, CHOICE_WARPS * 16);
  Q3N_SHARED(int, found, FEW_CHOICES);
  Q3N_SHARED(int64_t, pair_of, CHOICE_WARPS);
  Q3N_SHARED(int64_t, row_of, CHOICE_WARPS);
  const bool by_choice = a.kind == CHOICES;
  const int thread = (int)threadIdx.x, lane = thread % 32, warp = thread / 32, parts = q3n_tile_parts(a.K);
  const int part = warp % parts, which = by_choice ? 0 : warp / Q3N_TILE_WARPS, batch = a.warps / parts;
  const int mine = (by_choice ? warp : warp % Q3N_TILE_WARPS) / parts; /* choice, or 16 rows */
  const int64_t block_rows = by_choice ? 16 : Q3N_TILE_WARPS / parts * 16;
  const int64_t tiles = a.tiles ? a.tiles[0] : a.blocks;
  int first_choice = 0;
  float sum = 0.0f; /* over choices, of row `thread` */

  for (int64_t item = blockIdx.x; item < tiles * a.row_blocks;) {
    const int64_t tile = item / a.row_blocks, first = a.first + item % a.row_blocks * block_rows;
    const int64_t row = by_choice ? first : first + mine * 16;
    pairs_of at;
    if (by_choice) {
      if (first_choice == 0) find_choices(a, tile, found);
      const int left = (int)a.top_k - first_choice;
      at = {-1, tile * a.top_k + first_choice, left < batch ? left : batch};
    } else {
      at = find_pairs<8>(a, tile, found);
      if (at.n == 0) return; /* every place has its block */
    }
    __syncthreads();
    find_rows(a, at.from, at.n, !by_choice, pair_of, row_of);
    __syncthreads();

    act_rows x = {a.act, row_of, at.n};
    if (by_choice) {
      if (mine < at.n) at.e = (int)found[first_choice + mine];
      x.at += mine, x.n = 1;
    }
    const bool work = at.e >= 0 && row < a.end;
    float y[1][1][4];
    q3n_tile_zero(y);
    const q3n_tile_weights w = rows_of(a.m[which], work ? at.e : 0, row, a.end);
    if (work) q3n_tile_part<DT, Q8, 1, 1>(y, words + warp * q3n_tile_words(DT, 1), w, x, a.K, part);
    q3n_tile_sum<1, 1>(y, floats, part, parts);
    if (work && part == 0) check<Q8, 1>(y, w, x, a.K);

    if (by_choice) {
      if (work && part == 0 && lane % 4 == 0) {
        dots[mine * 16 + lane / 4] = y[0][0][0];
        dots[mine * 16 + lane / 4 + 8] = y[0][0][2];
      }
      __syncthreads();
      for (int i = 0; i < at.n && thread < 16; i++)
        if (found[first_choice + i] >= 0)
          sum = __fmaf_rn(a.weights ? a.weights[at.from + i] : 1.0f, dots[i * 16 + thread], sum);
      first_choice += batch;
      if (first_choice < a.top_k) continue;
      if (thread < 16 && row + thread < a.end) {
        float *to = a.out + tile * a.out_row + row + thread;
        *to = a.accumulate ? *to + sum : sum;
      }
      first_choice = 0;
      sum = 0.0f;
    } else {
      if (a.kind == GATE_AND_UP) {
        __syncthreads();
        if (which == 1) put<1>(y, floats + warp * 128);
        __syncthreads();
      }
      if (which == 0 && part == 0) finish<1>(a, y, floats + (warp + Q3N_TILE_WARPS) * 128, row, at.n, pair_of);
    }
    item += gridDim.x;
  }
}

/* Tiles of up to 32 pairs: every warp has 16 rows and all of K. */
constexpr int MANY = 4, MANY_PAIRS = 8 * MANY;

template <int DT, bool Q8> __global__ void __launch_bounds__(32 * Q3N_TILE_WARPS, 2) many(plan a) {
  constexpr int COUNT = 4 * MANY * 32;
  Q3N_SHARED_DYNAMIC(uint32_t, words, 0, q3n_block_words(DT, Q8, 1, MANY));
  Q3N_SHARED(float, floats, q3n_tile_sum_floats(1, MANY));
  Q3N_SHARED(int, found, 1);
  Q3N_SHARED(int64_t, pair_of, MANY_PAIRS);
  Q3N_SHARED(int64_t, row_of, MANY_PAIRS);
  const int warp = (int)(threadIdx.x / 32), warps = Q3N_TILE_WARPS / (a.kind == GATE_AND_UP ? 2 : 1); /* of a matrix */
  const int64_t tiles = a.tiles[0];
  for (int64_t item = blockIdx.x; item < tiles * a.row_blocks; item += gridDim.x) {
    const pairs_of at = find_pairs<MANY_PAIRS>(a, item / a.row_blocks, found);
    __syncthreads();
    find_rows(a, at.from, at.n, true, pair_of, row_of);
    __syncthreads();
    const int64_t row = a.first + (item % a.row_blocks * warps + warp % warps) * 16;
    const q3n_tile_weights w = rows_of(a.m[warp / warps], at.e, row, a.end);
    const act_rows x = {a.act, row_of, at.n};
    float y[1][MANY][4];
    q3n_tile_block<DT, Q8, 1, MANY>(y, words, floats, w, x, a.K);
    check<Q8, MANY>(y, w, x, a.K);
    if (a.kind == GATE_AND_UP) {
      __syncthreads();
      if (warp >= warps) put<MANY>(y, floats + warp * COUNT);
      __syncthreads();
    }
    if (warp >= warps || row >= a.end) continue;
    finish<MANY>(a, y, floats + (warp + warps) % Q3N_TILE_WARPS * COUNT, row, at.n, pair_of);
  }
}

/* The tiles of up to `size` pairs, expert by expert. One block. */
__global__ void __launch_bounds__(LIST_THREADS) list_tiles(int64_t *tiles, const int64_t *offsets, int64_t E,
                                                          int size) {
  Q3N_SHARED(int64_t, part, 32);
  int64_t start = 0, all;
  for (int64_t first = 0; first < E; first += LIST_THREADS) {
    const int64_t e = first + threadIdx.x;
    const int64_t from = e < E ? offsets[e] : 0, to = e < E ? offsets[e + 1] : 0;
    int64_t *next = tiles + 8 + 2 * (start + q3n_block_below((to - from + size - 1) / size, part, all));
    for (int64_t i = from; i < to; i += size, next += 2) next[0] = e, next[1] = i;
    start += all;
  }
  if (threadIdx.x == 0) tiles[0] = start;
}

/* y of rows first .. end - 1 from dots, [T * top_k][end - first]. */
__global__ void __launch_bounds__(THREADS) combine(q3n_moe_down_args a, const float *dots, int64_t first, int64_t end) {
  const int64_t rows = end - first, step = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < a.T * rows; i += step) {
    const int64_t t = i / rows, r = i % rows;
    float sum = 0.0f;
    for (int64_t pair = t * a.top_k; pair < (t + 1) * a.top_k; pair++)
      sum = __fmaf_rn(a.weights ? a.weights[pair] : 1.0f, dots[pair * rows + r], sum);
    float *y = a.y + t * a.y_t + first + r;
    *y = a.accumulate ? *y + sum : sum;
  }
}

/* Strides that are never taken may be anything. */
matrix matrix_of(const void *base, q3n_dtype dtype, int64_t E, int64_t expert, int64_t rows, int64_t row) {
  const q3n_dtype t = (q3n_dtype)((int)dtype & ~Q3N_R16);
  const int64_t columns = q3n_block_columns(t), bytes = q3n_block_bytes(t);
  return {(const uint8_t *)base, E > 1 ? expert / columns * bytes : 0, rows > 1 ? row / columns * bytes : 0, t,
          ((int)dtype & Q3N_R16) != 0};
}

int64_t act_row_bytes(q3n_dtype dtype, int64_t elements) {
  if (dtype == Q3N_F32) return 4 * elements;
  return dtype == Q3N_Q8_X256 ? elements / 256 * Q3N_Q8_X256_BYTES : elements / 32 * Q3N_Q8_X32_BYTES;
}

bool is_few(int64_t T, int64_t E, int64_t top_k) {
  return T <= FEW_TOKENS && E <= FEW_EXPERTS && top_k <= FEW_CHOICES;
}

int64_t list_bytes(int64_t pairs, int64_t E) {
  return (64 + 16 * (pairs / 8 + (E < pairs ? E : pairs)) + 63) / 64 * 64;
}

/* Rows of down whose dots lie in scratch at a time. */
int64_t dots_rows(const q3n_moe_down_args *a) {
  const int64_t row = a->T * a->top_k * 4, rows = DOTS_BYTES / (row ? row : 1) / 64 * 64;
  return rows < 64 ? 64 : rows < a->D ? rows : a->D;
}

template <int DT, bool Q8> q3n_status launch(plan a, int64_t tiles, int size, q3n_stream stream) {
  const int parts = q3n_tile_parts(a.K), words = q3n_tile_words(DT, 1), matrices = a.kind == GATE_AND_UP ? 2 : 1;
  const int64_t rows = a.kind == CHOICES ? 16 : 16 * Q3N_TILE_WARPS / (size > 8 ? matrices : parts);
  a.blocks = tiles;
  a.row_blocks = (a.end - a.first + rows - 1) / rows;
  const int64_t blocks = tiles * a.row_blocks, grid = blocks < INT32_MAX ? blocks : INT32_MAX;
  if (size > 8)
    return Q3N_LAUNCH((many<DT, Q8>), (a), grid, 32 * Q3N_TILE_WARPS, 4 * q3n_block_words(DT, Q8, 1, MANY), stream);
  a.warps = matrices * Q3N_TILE_WARPS;
  if (a.kind == CHOICES) {
    int64_t most = words ? CHOICE_BYTES / (4 * words) : CHOICE_WARPS;
    if (most > choice_warps(DT, Q8)) most = choice_warps(DT, Q8);
    const int64_t wanted = (a.top_k < 1 ? 1 : a.top_k) * parts;
    a.warps = (int)((wanted < most ? wanted : most) / parts * parts);
  }
  return Q3N_LAUNCH((few<DT, Q8>), (a), grid, 32 * a.warps, 4 * words * a.warps, stream);
}

template <int DT> q3n_status launch_type(const plan &a, bool q8, int64_t tiles, int size, q3n_stream stream) {
  return q8 ? launch<DT, true>(a, tiles, size, stream) : launch<DT, false>(a, tiles, size, stream);
}

/* The instance that has a dtype. */
int instance(q3n_dtype t) {
  switch (t) {
    case Q3N_F32:
    case Q3N_F16:
    case Q3N_BF16:
    case Q3N_Q4_K:
    case Q3N_Q5_K:
    case Q3N_Q6_K:
    case Q3N_Q8_0: return t;
    default: return Q3N_TILE_ANY;
  }
}

/* Pairs of a tile where there are many tokens: 32 where experts have some and the block fits. */
int tile_pairs(const plan &a, bool q8, int64_t pairs) {
  const int64_t own = 4 * q3n_tile_sum_floats(1, MANY) + 1024;
  for (const matrix &m : a.m)
    if (m.base && 4 * q3n_block_words(instance(m.dtype), q8, 1, MANY) + own > q3n_shared_limit()) return 8;
  return pairs < 8 * a.E ? 8 : MANY_PAIRS;
}

/* `tiles` blocks of up to `size` pairs, or of a token. */
q3n_status launch_experts(const plan &a, bool q8, int64_t tiles, int size, q3n_stream stream) {
  switch (instance(a.m[0].dtype)) {
    case Q3N_F32: return launch<Q3N_F32, false>(a, tiles, size, stream);
    case Q3N_F16: return launch<Q3N_F16, false>(a, tiles, size, stream);
    case Q3N_BF16: return launch<Q3N_BF16, false>(a, tiles, size, stream);
    case Q3N_Q4_K: return launch_type<Q3N_Q4_K>(a, q8, tiles, size, stream);
    case Q3N_Q5_K: return launch_type<Q3N_Q5_K>(a, q8, tiles, size, stream);
    case Q3N_Q6_K: return launch_type<Q3N_Q6_K>(a, q8, tiles, size, stream);
    case Q3N_Q8_0: return launch_type<Q3N_Q8_0>(a, q8, tiles, size, stream);
    default: return launch_type<Q3N_TILE_ANY>(a, q8, tiles, size, stream);
  }
}

} /* namespace */

Q3N_CUDA_SCRATCH(moe_up, moe_up) {
  return is_few(a->T, a->E, a->top_k) ? 0 : list_bytes(a->T * a->top_k, a->E);
}

Q3N_CUDA_OPERATOR(moe_up, moe_up) {
  const int64_t pairs = a->T * a->top_k;
  if (pairs == 0 || a->F == 0) return Q3N_OK;
  const bool few = is_few(a->T, a->E, a->top_k), q8 = a->x_dtype != Q3N_F32;
  plan p = {};
  p.m[0] = matrix_of(a->gate, a->gate_dtype, a->E, a->gate_e, a->F, a->gate_f);
  p.m[1] = matrix_of(a->up, a->up_dtype, a->E, a->up_e, a->F, a->up_f);
  p.act = (const uint8_t *)a->x;
  p.act_bytes = a->T > 1 && a->D > 0 ? act_row_bytes(a->x_dtype, a->x_t) : 0;
  p.act_pairs = a->top_k;
  p.out = a->h;
  p.out_row = a->F;
  p.order = a->order;
  p.offsets = a->offsets;
  p.E = a->E, p.top_k = a->top_k, p.K = a->D;
  p.end = a->F;
  const int size = few ? 8 : tile_pairs(p, q8, pairs);
  int64_t tiles = pairs;
  if (!few) {
    p.tiles = (const int64_t *)scratch;
    tiles = pairs / size + (a->E < pairs ? a->E : pairs);
    const q3n_status status =
        Q3N_LAUNCH(list_tiles, ((int64_t *)scratch, a->offsets, a->E, size), 1, LIST_THREADS, 0, stream);
    if (status != Q3N_OK) return status;
  }
  p.kind = GATE_AND_UP;
  if (instance(p.m[0].dtype) == instance(p.m[1].dtype)) return launch_experts(p, q8, tiles, size, stream);
  p.kind = GATE;
  const q3n_status status = launch_experts(p, q8, tiles, size, stream);
  if (status != Q3N_OK) return status;
  p.kind = UP;
  p.m[0] = p.m[1];
  return launch_experts(p, q8, tiles, size, stream);
}

Q3N_CUDA_SCRATCH(moe_down, moe_down) {
  const int64_t pairs = a->T * a->top_k;
  return is_few(a->T, a->E, a->top_k) ? 0 : list_bytes(pairs, a->E) + pairs * dots_rows(a) * 4;
}

Q3N_CUDA_OPERATOR(moe_down, moe_down) {
  const int64_t pairs = a->T * a->top_k;
  if (a->T == 0 || a->D == 0) return Q3N_OK;
  const bool few = is_few(a->T, a->E, a->top_k), q8 = a->h_dtype != Q3N_F32;
  plan p = {};
  p.m[0] = matrix_of(a->down, a->dtype, a->E, a->down_e, a->D, a->down_d);
  p.act = (const uint8_t *)a->h;
  p.act_bytes = act_row_bytes(a->h_dtype, a->F);
  p.act_pairs = 1;
  p.order = a->order;
  p.offsets = a->offsets;
  p.E = a->E, p.top_k = a->top_k, p.K = a->F;
  if (few) {
    p.kind = CHOICES;
    p.out = a->y, p.out_row = a->y_t;
    p.weights = a->weights;
    p.accumulate = a->accumulate;
    p.end = a->D;
    return launch_experts(p, q8, a->T, 8, stream);
  }

  const int size = tile_pairs(p, q8, pairs);
  const int64_t tiles = pairs / size + (a->E < pairs ? a->E : pairs), rows = dots_rows(a);
  int64_t *const list = (int64_t *)scratch;
  float *const dots = (float *)((uint8_t *)scratch + list_bytes(pairs, a->E));
  p.kind = DOTS;
  p.tiles = list;
  p.out = dots;
  q3n_status status = Q3N_LAUNCH(list_tiles, (list, a->offsets, a->E, size), 1, LIST_THREADS, 0, stream);
  for (int64_t first = 0; first < a->D && status == Q3N_OK; first += rows) {
    const int64_t end = first + rows < a->D ? first + rows : a->D;
    p.first = first, p.end = end;
    p.out_row = end - first;
    status = launch_experts(p, q8, tiles, size, stream);
    if (status != Q3N_OK) break;
    const int64_t blocks = (a->T * (end - first) + THREADS - 1) / THREADS;
    status = Q3N_LAUNCH(combine, (*a, dots, first, end), blocks < INT32_MAX ? blocks : INT32_MAX, THREADS, 0, stream);
  }
  return status;
}
