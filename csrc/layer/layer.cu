/* A thread has four neighbouring values (kv_store: eight), so that its loads and stores are of 16 bytes where rows are
   aligned to them; a row's gate has a block. */
#include "../cuda/reduce.cuh"
#include "../quant/quant.cuh"

extern "C" {
#include "layer.h"
}

namespace {

constexpr int THREADS = 128;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* Four values from i on; those past N are 0. VECTOR: all there, and aligned. */
template <bool VECTOR> __device__ __forceinline__ float4 load4(const float *row, int64_t i, int64_t N) {
  if (VECTOR) return q3n_load<float4>(row + i);
  return make_float4(i < N ? row[i] : 0.0f, i + 1 < N ? row[i + 1] : 0.0f, i + 2 < N ? row[i + 2] : 0.0f,
                     i + 3 < N ? row[i + 3] : 0.0f);
}

template <bool VECTOR> __device__ __forceinline__ void store4(float *row, int64_t i, int64_t N, float4 v) {
  if (VECTOR) {
    q3n_store(row + i, v);
    return;
  }
  if (i < N) row[i] = v.x;
  if (i + 1 < N) row[i + 1] = v.y;
  if (i + 2 < N) row[i + 2] = v.z;
  if (i + 3 < N) row[i + 3] = v.w;
}

/* VECTOR_TABLE: the table is f32 and aligned like y. */
template <bool VECTOR, bool VECTOR_TABLE>
__global__ void __launch_bounds__(THREADS) gather(q3n_gather_args a, int64_t quads) {
  const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (at >= a.T * quads) return;
  const int64_t t = at / quads, i = at % quads * 4, first = a.ids[t] * a.table_row;
  float4 v;
  if (VECTOR_TABLE) {
    v = q3n_load<float4>((const float *)a.table + first + i);
  } else {
    const int columns = q3n_block_columns(a.dtype);
    v = q3n_row_values4(a.dtype, (const uint8_t *)a.table + first / columns * q3n_block_bytes(a.dtype), i, a.N);
  }
  store4<VECTOR>(a.y + t * a.y_t, i, a.N, v);
}

template <bool VECTOR> __global__ void __launch_bounds__(THREADS) add(q3n_add_args a, int64_t quads) {
  const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (at >= a.T * quads) return;
  const int64_t t = at / quads, i = at % quads * 4;
  float *row = a.y + t * a.y_t;
  const float4 y = load4<VECTOR>(row, i, a.N), x = load4<VECTOR>(a.x + t * a.x_t, i, a.N);
  store4<VECTOR>(row, i, a.N, make_float4(y.x + x.x, y.y + x.y, y.z + x.z, y.w + x.w));
}

__global__ void __launch_bounds__(THREADS) delta_gates(q3n_delta_gates_args a) {
  const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (at >= a.T * a.HV) return;
  const int64_t t = at / a.HV, h = at % a.HV, r = a.HV / a.HK;
  const float *b = a.ba + t * a.ba_t + h / r * 2 * r + h % r;
  const float x = b[r] + a.dt_bias[h];
  a.beta[t * a.beta_t + h] = sigmoid(b[0]);
  a.g[t * a.g_t + h] = a.a[h] * (x > 20.0f ? x : log1pf(expf(x)));
}

/* The sequence of token t, by halving: empty ones share their start with the next. */
__device__ __forceinline__ int64_t sequence_of(const int64_t *cu_seqlens, int64_t B, int64_t t) {
  int64_t low = 0, high = B;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (cu_seqlens[middle] <= t) low = middle;
    else high = middle;
  }
  return low;
}

/* Four bytes at any address. */
__device__ __forceinline__ void store_word(uint8_t *p, uint32_t word) {
  if ((uintptr_t)p % 4 == 0) {
    q3n_store(p, word);
  } else if ((uintptr_t)p % 2 == 0) {
    q3n_store(p, (uint16_t)word);
    q3n_store(p + 2, (uint16_t)(word >> 16));
  } else {
    Q3N_UNROLL
    for (int i = 0; i < 4; i++) p[i] = (uint8_t)(word >> 8 * i);
  }
}

/* Eight values of a block of 32 that four neighbouring lanes share, as quantize has them. */
__device__ __forceinline__ void store_q8(uint8_t *block, const float (&x)[8], int member, bool mine) {
  float most = 0.0f;
  bool finite = true;
  Q3N_UNROLL
  for (int c = 0; c < 8; c++) {
    const float size = fabsf(x[c]);
    finite = finite && size < __uint_as_float(0x7f800000u);
    most = size > most ? size : most;
  }
  most = q3n_warp_max(finite ? most : __uint_as_float(0x7fc00000u), 4);
  if (!mine) return;

  const bool number = most == most;
  const float d = most / 127.0f, r = 1.0f / d, inverse = fabsf(r) < __uint_as_float(0x7f800000u) ? r : 0.0f;
  uint32_t q[2] = {0, 0};
  Q3N_UNROLL
  for (int c = 0; c < 8; c++)
    if (number) q[c / 4] |= ((uint32_t)(int)roundf(x[c] * inverse) & 0xffu) << c % 4 * 8;
  store_word(block + 2 + 8 * member, q[0]);
  store_word(block + 6 + 8 * member, q[1]);
  if (member == 0) {
    const uint32_t scale = number ? q3n_float_half(d) : 0x7e00u;
    block[0] = (uint8_t)scale;
    block[1] = (uint8_t)(scale >> 8);
  }
}

/* VECTOR: rows of x and of the cache are aligned to 16 bytes, and N is a multiple of 8; for Q8_0, those of x. */
template <q3n_dtype TYPE, bool VECTOR>
__global__ void __launch_bounds__(THREADS) kv_store(q3n_kv_store_args a, int64_t octets) {
  const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  const bool mine = at < a.T * octets;
  if (TYPE != Q3N_Q8_0 && !mine) return;
  const int64_t t = mine ? at / octets : 0, i = mine ? at % octets * 8 : 0;
  const int64_t first = a.slot[sequence_of(a.cu_seqlens, a.B, t)] * a.cache_slot + a.pos[t] * a.cache_s;
  const float *row = a.x + t * a.x_t;
  const float4 low = load4<VECTOR>(row, i, a.N), high = load4<VECTOR>(row, i + 4, a.N);
  [[maybe_unused]] const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if constexpr (TYPE == Q3N_F32) {
    float *y = (float *)a.cache + first;
    store4<VECTOR>(y, i, a.N, low);
    store4<VECTOR>(y, i + 4, a.N, high);
  } else if constexpr (TYPE == Q3N_Q8_0) {
    store_q8((uint8_t *)a.cache + (first + i) / 32 * 34, x, (int)(threadIdx.x % 4), mine);
  } else {
    uint16_t *y = (uint16_t *)a.cache + first + i;
    uint32_t h[8];
    Q3N_UNROLL
    for (int c = 0; c < 8; c++) h[c] = TYPE == Q3N_F16 ? q3n_float_half(x[c]) : q3n_float_bf16(x[c]);
    if constexpr (VECTOR) {
      q3n_store(y, make_uint4(h[0] | h[1] << 16, h[2] | h[3] << 16, h[4] | h[5] << 16, h[6] | h[7] << 16));
    } else {
      Q3N_UNROLL
      for (int c = 0; c < 8; c++)
        if (i + c < a.N) y[c] = (uint16_t)h[c];
    }
  }
}

/* Which thread adds which products does not depend on VECTOR: the same bits from any layout. */
template <bool VECTOR> __global__ void __launch_bounds__(THREADS) row_gate(q3n_row_gate_args a) {
  Q3N_SHARED(double, part, 32);
  const int64_t t = blockIdx.x;
  const float *row = a.x + t * a.x_t;
  double sum = 0.0;
  for (int64_t d = 4 * threadIdx.x; d < a.D; d += 4 * THREADS) {
    const float4 x = load4<VECTOR>(row, d, a.D), w = load4<VECTOR>(a.w, d, a.D);
    sum += ((double)x.x * w.x + (double)x.y * w.y) + ((double)x.z * w.z + (double)x.w * w.w);
  }
  sum = q3n_block_sum(sum, part);
  if (threadIdx.x == 0) a.y[t] = sigmoid((float)sum);
}

bool aligned(const void *p, int64_t stride_bytes) { return (uintptr_t)p % 16 == 0 && stride_bytes % 16 == 0; }

int64_t blocks_of(int64_t threads) { return (threads + THREADS - 1) / THREADS; }

template <q3n_dtype TYPE> q3n_status launch_store(const q3n_kv_store_args *a, bool vector, q3n_stream stream) {
  const int64_t octets = (a->N + 7) / 8, blocks = blocks_of(a->T * octets);
  return vector ? Q3N_LAUNCH((kv_store<TYPE, true>), (*a, octets), blocks, THREADS, 0, stream)
                : Q3N_LAUNCH((kv_store<TYPE, false>), (*a, octets), blocks, THREADS, 0, stream);
}

} /* namespace */

#define NO_SCRATCH(op)         \
  Q3N_CUDA_SCRATCH(op, op) {   \
    (void)a;                   \
    return 0;                  \
  }
NO_SCRATCH(gather)
NO_SCRATCH(add)
NO_SCRATCH(delta_gates)
NO_SCRATCH(kv_store)
NO_SCRATCH(row_gate)

Q3N_CUDA_OPERATOR(gather, gather) {
  (void)scratch;
  const int64_t quads = (a->N + 3) / 4, blocks = blocks_of(a->T * quads);
  const bool vector = a->N % 4 == 0 && aligned(a->y, 4 * a->y_t);
  if (vector && a->dtype == Q3N_F32 && aligned(a->table, 4 * a->table_row))
    return Q3N_LAUNCH((gather<true, true>), (*a, quads), blocks, THREADS, 0, stream);
  return vector ? Q3N_LAUNCH((gather<true, false>), (*a, quads), blocks, THREADS, 0, stream)
                : Q3N_LAUNCH((gather<false, false>), (*a, quads), blocks, THREADS, 0, stream);
}

Q3N_CUDA_OPERATOR(add, add) {
  (void)scratch;
  const int64_t quads = (a->N + 3) / 4, blocks = blocks_of(a->T * quads);
  const bool vector = a->N % 4 == 0 && aligned(a->y, 4 * a->y_t) && aligned(a->x, 4 * a->x_t);
  return vector ? Q3N_LAUNCH(add<true>, (*a, quads), blocks, THREADS, 0, stream)
                : Q3N_LAUNCH(add<false>, (*a, quads), blocks, THREADS, 0, stream);
}

Q3N_CUDA_OPERATOR(delta_gates, delta_gates) {
  (void)scratch;
  return Q3N_LAUNCH(delta_gates, (*a), blocks_of(a->T * a->HV), THREADS, 0, stream);
}

Q3N_CUDA_OPERATOR(kv_store, kv_store) {
  (void)scratch;
  const bool from = a->N % 8 == 0 && aligned(a->x, 4 * a->x_t);
  const int64_t bytes = a->dtype == Q3N_F32 ? 4 : 2;
  const bool vector = from && aligned(a->cache, bytes * a->cache_slot) && aligned(a->cache, bytes * a->cache_s);
  switch (a->dtype) {
    case Q3N_F16: return launch_store<Q3N_F16>(a, vector, stream);
    case Q3N_BF16: return launch_store<Q3N_BF16>(a, vector, stream);
    case Q3N_Q8_0: return launch_store<Q3N_Q8_0>(a, from, stream);
    default: return launch_store<Q3N_F32>(a, vector, stream);
  }
}

Q3N_CUDA_OPERATOR(row_gate, row_gate) {
  (void)scratch;
  const bool vector = a->D % 4 == 0 && aligned(a->x, 4 * a->x_t) && aligned(a->w, 0);
  return vector ? Q3N_LAUNCH(row_gate<true>, (*a), a->T, THREADS, 0, stream)
                : Q3N_LAUNCH(row_gate<false>, (*a), a->T, THREADS, 0, stream);
}
