/* Flash attention on tensor cores, one arithmetic for prefill and decode. A block of threads has 16, 32 or 64 rows
   (queries times the heads of a KV head) and meets 64 keys at a time:

     scores   warp w multiplies all rows with keys 16 w .. 16 w + 15      -> `score` in shared memory
     softmax  8 lanes a row: maximum, weights, sum                       -> `weight`, laid out as the fragments of A
     values   warp w adds channels 64 w .. 64 w + 63 of all rows         -> registers

   so every element of K and V is read and converted once a block, from global memory to the fragments of B; no copy of
   them lies in shared memory. Keys go by segments of 256, counted from kv_begin. A segment's sums are complete before
   they are folded into the row's total, in the order of the segments: by the block itself (the total lies in o
   meanwhile) or, split, by a second kernel from scratch. Both do the same arithmetic, and a row's does not depend on
   those beside it: a query gives the same bits in every batch and split. README.md has the precision and the floors. */
#include "../cuda/half.cuh"
#include "../cuda/mma.cuh"
#include "../cuda/reduce.cuh"

extern "C" {
#include "../base/check.h"
#include "attention.h"
}

namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS, KEYS = 64, SEGMENT = 256;
constexpr unsigned ALL = 0xffffffffu;

__device__ __forceinline__ uint32_t bits(float x) { return (uint32_t)__float_as_int(x); }
__device__ __forceinline__ float value(uint32_t u) { return __int_as_float((int)u); }
__device__ __forceinline__ bool finite(float x) { return (bits(x) & 0x7f800000u) != 0x7f800000u; }

/* How products are made of a cache of type KV. 16-bit floats are B as they lie, and A is two (f16) or three (bf16)
   terms of theirs; otherwise both sides are tf32, A two terms, split where it is read, B the terms of a value. */
template <q3n_dtype KV> constexpr bool PAIRS = KV == Q3N_F16 || KV == Q3N_BF16;
/* Terms of A as stored; floats are split later. */
template <q3n_dtype KV> constexpr int A_TERMS = KV == Q3N_F16 ? 2 : KV == Q3N_BF16 ? 3 : 1;
/* Terms of a value: 11 bits each. A key's third adds nothing that q's two would not have lost. */
template <q3n_dtype KV> constexpr int V_TERMS = KV == Q3N_F32 ? 3 : KV == Q3N_Q8_0 ? 2 : 1;
/* Products take 16 or 8 of what is summed over, so many steps 32 channels. */
template <q3n_dtype KV> constexpr int DEPTH = PAIRS<KV> ? 16 : 8;
/* Words that 16 rows by 32 columns of A take. */
template <q3n_dtype KV> constexpr int A_WORDS = 16 * 32 / (PAIRS<KV> ? 2 : 1) * A_TERMS<KV>;
/* f16 ends at 2^-24: weights are taken times this, queries times a power of 2 that brings the row's largest near it. */
constexpr float F16_SCALE = 16384.0f;

/* Where the score of a row and key lies: four neighbouring rows have eight keys in different banks. */
__device__ __forceinline__ int score_at(int row, int key) { return row * KEYS + (key ^ row % 4 * 8); }

/* Eight neighbouring channels of a key or value as they lie in the cache. */
template <q3n_dtype KV> struct octet {
  uint32_t w[4]; /* 16-bit floats */
};
template <> struct octet<Q3N_F32> {
  float x[8];
};
template <> struct octet<Q3N_Q8_0> {
  uint32_t q[2];
  float d;
};

__device__ __forceinline__ uint32_t read_u16(const uint8_t *p, bool even) {
  return even ? (uint32_t)*reinterpret_cast<const uint16_t *>(p) : (uint32_t)p[0] | (uint32_t)p[1] << 8;
}

/* Channels c .. c + 7 of the row that starts `at` elements into the cache; those from D on are 0, all are where it is
   not `there`. VECTOR: octets are aligned to 16 bytes and whole (q8_0: to 2 bytes). */
template <q3n_dtype KV, bool VECTOR>
__device__ __forceinline__ octet<KV> read(const void *cache, int64_t at, int64_t c, int64_t D, bool there) {
  octet<KV> v = {};
  if (!there || c >= D) return v;
  if constexpr (KV == Q3N_F32) {
    const float *p = static_cast<const float *>(cache) + at + c;
    if (VECTOR) {
      const float4 low = q3n_load<float4>(p), high = q3n_load<float4>(p + 4);
      v.x[0] = low.x, v.x[1] = low.y, v.x[2] = low.z, v.x[3] = low.w;
      v.x[4] = high.x, v.x[5] = high.y, v.x[6] = high.z, v.x[7] = high.w;
    } else {
      Q3N_UNROLL
      for (int i = 0; i < 8; i++)
        if (c + i < D) v.x[i] = p[i];
    }
  } else if constexpr (KV == Q3N_Q8_0) {
    const uint8_t *block = static_cast<const uint8_t *>(cache) + (at + c) / 32 * 34, *q = block + 2 + c % 32;
    v.d = q3n_half_float(read_u16(block, VECTOR));
    v.q[0] = read_u16(q, VECTOR) | read_u16(q + 2, VECTOR) << 16;
    v.q[1] = read_u16(q + 4, VECTOR) | read_u16(q + 6, VECTOR) << 16;
  } else {
    const uint16_t *p = static_cast<const uint16_t *>(cache) + at + c;
    if (VECTOR) {
      const uint4 w = q3n_load<uint4>(p);
      v.w[0] = w.x, v.w[1] = w.y, v.w[2] = w.z, v.w[3] = w.w;
    } else {
      Q3N_UNROLL
      for (int i = 0; i < 8; i++)
        if (c + i < D) v.w[i / 2] |= (uint32_t)p[i] << 16 * (i % 2);
    }
  }
  return v;
}

template <q3n_dtype KV> __device__ __forceinline__ float element(const octet<KV> &v, int i) {
  if constexpr (KV == Q3N_F32) {
    return v.x[i];
  } else if constexpr (KV == Q3N_Q8_0) {
    return v.d * (float)(int8_t)(v.q[i / 4] >> 8 * (i % 4) & 255u);
  } else {
    const uint32_t u = v.w[i / 2] >> 16 * (i % 2) & 0xffffu;
    return KV == Q3N_F16 ? q3n_half_float(u) : value(u << 16);
  }
}

/* Whether any of the eight is infinite or NaN. */
template <q3n_dtype KV> __device__ __forceinline__ bool special(const octet<KV> &v) {
  if constexpr (KV == Q3N_F32) {
    uint32_t largest = 0;
    Q3N_UNROLL
    for (int i = 0; i < 8; i++) {
      const uint32_t size = bits(v.x[i]) & 0x7fffffffu;
      largest = size > largest ? size : largest;
    }
    return largest >= 0x7f800000u;
  } else if constexpr (KV == Q3N_Q8_0) {
    return !finite(v.d);
  } else {
    /* an exponent of all ones plus one carries into the sign */
    constexpr uint32_t ones = KV == Q3N_F16 ? 0x7c007c00u : 0x7f807f80u;
    constexpr uint32_t one = KV == Q3N_F16 ? 0x04000400u : 0x00800080u;
    uint32_t carry = 0;
    Q3N_UNROLL
    for (int i = 0; i < 4; i++) carry |= (v.w[i] & ones) + one;
    return (carry & 0x80008000u) != 0;
  }
}

/* 0 in the place of what is not finite. */
template <q3n_dtype KV> __device__ __forceinline__ void clean(octet<KV> &v) {
  if constexpr (KV == Q3N_F32) {
    Q3N_UNROLL
    for (int i = 0; i < 8; i++)
      if (!finite(v.x[i])) v.x[i] = 0.0f;
  } else if constexpr (KV == Q3N_Q8_0) {
    v.q[0] = v.q[1] = 0;
    v.d = 0.0f;
  } else {
    Q3N_UNROLL
    for (int i = 0; i < 8; i++)
      if (!finite(element<KV>(v, i))) v.w[i / 2] &= 0xffffu << 16 * (1 - i % 2);
  }
}

/* The two halves of terms of A, `low` in the lower half of a word. What does not fit the type leaves no finite sum. */
template <q3n_dtype KV>
__device__ __forceinline__ void split_pair(uint32_t (&term)[A_TERMS<KV>], float low, float high) {
  Q3N_UNROLL
  for (int i = 0; i < A_TERMS<KV>; i++) {
    const uint32_t u = KV == Q3N_F16 ? q3n_pack_f16(low, high) : q3n_pack_bf16(low, high);
    low -= KV == Q3N_F16 ? q3n_half_float(u & 0xffffu) : value(u << 16);
    high -= KV == Q3N_F16 ? q3n_half_float(u >> 16) : value(u & 0xffff0000u);
    term[i] = u;
  }
}

/* The terms of A from shared memory, the largest first. `terms` of floats are two. */
template <q3n_dtype KV> struct fragment_a {
  static constexpr int TERMS = PAIRS<KV> ? A_TERMS<KV> : 2;
  uint32_t term[TERMS][4];
  __device__ __forceinline__ void read(q3n_shared<uint32_t> from) {
    Q3N_UNROLL
    for (int i = 0; i < A_TERMS<KV>; i++) {
      const uint4 w = q3n_load<uint4>(from + 128 * i);
      if constexpr (PAIRS<KV>) {
        term[i][0] = w.x, term[i][1] = w.y, term[i][2] = w.z, term[i][3] = w.w;
      } else {
        q3n_split_tf32(value(w.x), term[0][0], term[1][0]);
        q3n_split_tf32(value(w.y), term[0][1], term[1][1]);
        q3n_split_tf32(value(w.z), term[0][2], term[1][2]);
        q3n_split_tf32(value(w.w), term[0][3], term[1][3]);
      }
    }
  }
};

template <q3n_dtype KV>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&x)[4], const uint32_t (&y)[2]) {
  if constexpr (KV == Q3N_F16)
    q3n_mma_f16(sum, x, y, sum);
  else if constexpr (KV == Q3N_BF16)
    q3n_mma_bf16(sum, x, y, sum);
  else
    q3n_mma_tf32(sum, x, y, sum);
}

/* One element, for the rare sums that are made again. */
template <q3n_dtype KV> __device__ __forceinline__ float element_at(const void *cache, int64_t at) {
  if constexpr (KV == Q3N_Q8_0) {
    const uint8_t *block = static_cast<const uint8_t *>(cache) + at / 32 * 34;
    return q3n_half_float(read_u16(block, false)) * (float)(int8_t)block[2 + at % 32];
  } else if constexpr (KV == Q3N_F32) {
    return static_cast<const float *>(cache)[at];
  } else {
    const uint32_t u = static_cast<const uint16_t *>(cache)[at];
    return KV == Q3N_F16 ? q3n_half_float(u) : value(u << 16);
  }
}

/* A row's softmax over some keys: the largest score, the sum of exp(score - max). Nothing seen: -inf and 0. A NaN score
   is left out of the maximum and makes the sum NaN. */
struct alignas(8) softmax {
  float max, sum;
};

/* Takes `x` in: its sums count `take`, those before `keep`. False where there is nothing to take. */
__device__ __forceinline__ bool fold(softmax &total, softmax x, float &keep, float &take) {
  if (x.sum == 0.0f) return false;
  const float max = x.max > total.max ? x.max : total.max;
  keep = total.max == -INFINITY ? 0.0f : expf(total.max - max);
  take = x.max == -INFINITY ? 0.0f : expf(x.max - max);
  total.sum = __fmaf_rn(x.sum, take, total.sum * keep);
  total.max = max;
  return true;
}

/* The sink; returns the factor that the sums of values take. */
__device__ __forceinline__ float add_sink(softmax &total, float sink) {
  if (sink == -INFINITY) return 1.0f;
  float rescale = 1.0f;
  if (sink > total.max) {
    rescale = total.max == -INFINITY ? 0.0f : expf(total.max - sink);
    total.max = sink;
  }
  total.sum = total.sum * rescale + expf(sink - total.max);
  return rescale;
}

__device__ __forceinline__ float log_sum(softmax total) {
  return total.sum == 0.0f ? -INFINITY : total.max + logf(total.sum);
}

/* Takes in the head's sink and returns what sums of values are multiplied by: 0 where the softmax is empty. */
__device__ __forceinline__ float norm_after_sink(softmax &total, const float *sinks, int64_t h) {
  const float rescale = sinks ? add_sink(total, sinks[h]) : 1.0f;
  return total.sum == 0.0f ? 0.0f : rescale / total.sum;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* What the segments of a split leave: [segments][rows of o][D], [segments][rows of o]. */
struct partial {
  float *o, *max, *sum;
  int64_t segments, rows;
};

/* Where the rows of a block lie. */
struct tile {
  int64_t b, row, packed; /* sequence, its index for the *_b strides, its first token for the *_t strides */
  int64_t n, kv_len;      /* its queries and keys */
  int64_t first;          /* row of the tile's first, of n * group */
};

/* Tile `i`; false where the sequences have fewer. */
__device__ __forceinline__ bool find_tile(tile &x, const q3n_attention_args &a, int64_t i, int64_t tiles, int64_t group,
                                          int rows) {
  x.row = x.packed = 0;
  x.n = a.T;
  if (a.cu_seqlens) {
    /* 32 sequences at a time */
    const int lane = (int)(threadIdx.x % 32);
    for (x.b = 0;; x.b += 32) {
      if (x.b >= a.B) return false;
      const int64_t b = x.b + lane;
      int64_t upto = b < a.B ? ((a.cu_seqlens[b + 1] - a.cu_seqlens[b]) * group + rows - 1) / rows : 0;
      const int64_t own = upto;
      Q3N_UNROLL
      for (int by = 1; by < 32; by *= 2) {
        const int64_t other = __shfl_up_sync(ALL, upto, by);
        if (lane >= by) upto += other;
      }
      const unsigned behind = __ballot_sync(ALL, i < upto);
      const int found = behind ? __ffs((int)behind) - 1 : 31;
      i -= __shfl_sync(ALL, behind ? upto - own : upto, found);
      if (!behind) continue;
      x.b += found;
      break;
    }
    x.packed = a.cu_seqlens[x.b];
    x.n = a.cu_seqlens[x.b + 1] - x.packed;
  } else {
    x.b = x.row = i / tiles;
    i %= tiles;
    /* under a causal mask the last ones take longest */
    i = tiles - 1 - i;
  }
  x.first = i * rows;
  x.kv_len = a.kv_len ? a.kv_len[x.b] : a.S;
  return true;
}

/* Keys from kv_begin on that query i may see. */
__device__ __forceinline__ int64_t visible(const q3n_attention_args &a, const tile &x, int64_t i) {
  int64_t end = a.causal ? x.kv_len - x.n + i + 1 : x.kv_len;
  if (end > a.kv_end) end = a.kv_end;
  return end > a.kv_begin ? end - a.kv_begin : 0;
}

/* Queries as fragments of A: lane (group, member) has octet `member` of a chunk of 32 channels, in the order in which
   the octets of keys are B. Column pairs of 16-bit terms are neighbours. */
template <q3n_dtype KV, int ROWS, bool VECTOR>
__device__ __forceinline__ void stage_queries(q3n_shared<uint32_t> query, q3n_shared<float> unscale,
                                              const q3n_attention_args &a, const tile &x, int64_t hkv, int64_t heads,
                                              int rows, int chunks) {
  if (KV == Q3N_F16) {
    /* a power of 2 a row: 8 lanes look for its largest */
    const int lane = (int)(threadIdx.x % 8);
    Q3N_ROLL
    for (int r = (int)(threadIdx.x / 8); r < (rows + 3) / 4 * 4; r += THREADS / 8) {
      const int64_t row = x.first + (r < rows ? r : 0), t = x.packed + row / heads, h = hkv * heads + row % heads;
      const int64_t at = x.row * a.q_b + t * a.q_t + h * a.q_h;
      int largest = 0;
      for (int64_t d = 8 * lane; d < a.D; d += 64) {
        const octet<Q3N_F32> v = read<Q3N_F32, VECTOR>(a.q, at, d, a.D, true);
        Q3N_UNROLL
        for (int j = 0; j < 8; j++) {
          const int size = __float_as_int(v.x[j]) & 0x7fffffff;
          largest = size > largest ? size : largest;
        }
      }
      Q3N_UNROLL
      for (int by = 4; by > 0; by /= 2) {
        const int other = __shfl_xor_sync(ALL, largest, by);
        largest = other > largest ? other : largest;
      }
      int exponent = (largest >> 23) - 127 - 14;
      if (exponent < -126) exponent = -126;
      if (lane == 0 && r < rows) unscale[r] = __int_as_float((exponent + 127) << 23);
    }
    __syncthreads();
  }
  for (int i = (int)threadIdx.x; i < ROWS * 4 * chunks; i += THREADS) {
    const int r = i / (4 * chunks), c = i % (4 * chunks) / 4, member = i % 4;
    const int64_t row = x.first + r, t = x.packed + row / heads, h = hkv * heads + row % heads;
    octet<Q3N_F32> v =
        read<Q3N_F32, VECTOR>(a.q, x.row * a.q_b + t * a.q_t + h * a.q_h, 32 * c + 8 * member, a.D, r < rows);
    if (KV == Q3N_F16 && r < rows) {
      const float scale = 1.0f / unscale[r];
      Q3N_UNROLL
      for (int j = 0; j < 8; j++) v.x[j] *= scale;
    }
    const q3n_shared<uint32_t> to =
        query + (r / 16 * chunks + c) * A_WORDS<KV> + (r % 8 * 4 + member) * 4 + r % 16 / 8;
    if constexpr (PAIRS<KV>) {
      Q3N_UNROLL
      for (int j = 0; j < 4; j++) {
        uint32_t term[A_TERMS<KV>];
        split_pair<KV>(term, v.x[2 * j], v.x[2 * j + 1]);
        Q3N_UNROLL
        for (int k = 0; k < A_TERMS<KV>; k++) to[(j / 2 * A_TERMS<KV> + k) * 128 + j % 2 * 2] = term[k];
      }
    } else {
      Q3N_UNROLL
      for (int j = 0; j < 8; j++) to[j / 2 * 128 + j % 2 * 2] = bits(v.x[j]);
    }
  }
}

/* B of step s of the 32 channels of which an octet is a lane's part; of floats two terms. */
template <q3n_dtype KV>
__device__ __forceinline__ void key_fragment(uint32_t (&large)[2], uint32_t (&small)[2], const octet<KV> &v, int s) {
  Q3N_UNROLL
  for (int j = 0; j < 2; j++) {
    if constexpr (PAIRS<KV>)
      large[j] = v.w[2 * s + j];
    else
      q3n_split_tf32(element<KV>(v, 2 * s + j), large[j], small[j]);
  }
}

/* Products q k of 16 keys and all rows: those of the terms of q with k, and of the largest with k's second. In tf32
   what is small is summed apart. */
template <q3n_dtype KV, int MT, bool VECTOR>
__device__ __forceinline__ void score_keys(q3n_shared<float> score, q3n_shared<uint32_t> query, const void *cache,
                                           int64_t first, int64_t second, bool there, bool there_too, int64_t D,
                                           int chunks, int tiles) {
  constexpr int AHEAD = !VECTOR ? 1 : PAIRS<KV> && MT == 1 ? 4 : 2, APART = PAIRS<KV> ? 1 : MT;
  const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4, warp = (int)(threadIdx.x / 32);
  float sum[MT][2][4] = {}, small[APART][2][4] = {};
  Q3N_ROLL
  for (int c0 = 0; c0 < chunks; c0 += AHEAD) {
    octet<KV> next[AHEAD][2];
    Q3N_UNROLL
    for (int i = 0; i < AHEAD; i++) {
      next[i][0] = read<KV, VECTOR>(cache, first, 32 * (c0 + i) + 8 * member, D, there);
      next[i][1] = read<KV, VECTOR>(cache, second, 32 * (c0 + i) + 8 * member, D, there_too);
    }
    Q3N_UNROLL
    for (int i = 0; i < AHEAD; i++) {
      if (c0 + i >= chunks) break;
      Q3N_UNROLL
      for (int s = 0; s < 32 / DEPTH<KV>; s++) {
        uint32_t k[2][2], rest[2][2];
        key_fragment<KV>(k[0], rest[0], next[i][0], s);
        key_fragment<KV>(k[1], rest[1], next[i][1], s);
        Q3N_UNROLL
        for (int m = 0; m < MT; m++) {
          if (m >= tiles) break;
          fragment_a<KV> q;
          q.read(query + (m * chunks + c0 + i) * A_WORDS<KV> + (s * A_TERMS<KV> * 32 + lane) * 4);
          Q3N_UNROLL
          for (int n = 0; n < 2; n++) {
            if constexpr (PAIRS<KV>) {
              Q3N_UNROLL
              for (int j = A_TERMS<KV> - 1; j >= 0; j--) multiply<KV>(sum[m][n], q.term[j], k[n]);
            } else {
              multiply<KV>(small[m][n], q.term[1], k[n]);
              multiply<KV>(small[m][n], q.term[0], rest[n]);
              multiply<KV>(sum[m][n], q.term[0], k[n]);
            }
          }
        }
      }
    }
  }
  Q3N_UNROLL
  for (int m = 0; m < MT; m++) {
    if (m >= tiles) break;
    Q3N_UNROLL
    for (int n = 0; n < 2; n++)
      Q3N_UNROLL
      for (int half = 0; half < 2; half++) {
        float2 x = make_float2(sum[m][n][2 * half], sum[m][n][2 * half + 1]);
        if constexpr (!PAIRS<KV>) {
          x.x += small[m][n][2 * half];
          x.y += small[m][n][2 * half + 1];
        }
        q3n_store(score + score_at(16 * m + group + 8 * half, 16 * warp + 8 * n + 2 * member), x);
      }
  }
}

/* The dot product in f32. */
template <q3n_dtype KV>
__device__ __forceinline__ float plain_score(const float *q, const void *cache, int64_t at, int64_t D) {
  float sum = 0.0f;
  Q3N_ROLL
  for (int64_t d = 0; d < D; d++) sum = __fmaf_rn(q[d], element_at<KV>(cache, at + d), sum);
  return sum;
}

/* The octets of values that a step of DEPTH keys takes from a lane. B has in rows 2 member and 2 member + 1 keys member
   and member + 8, in the two rows from 2 member + 8 on keys member + 4 and member + 12; in tf32, keys member and
   member + 4. Column `group` of product n is channel 8 group + n. */
template <q3n_dtype KV> constexpr int STEP_OCTETS = DEPTH<KV> / 4;

template <q3n_dtype KV>
__device__ __forceinline__ void value_fragment(uint32_t (&term)[V_TERMS<KV>][2], const octet<KV> (&v)[STEP_OCTETS<KV>],
                                               int n) {
  Q3N_UNROLL
  for (int j = 0; j < 2; j++) {
    if constexpr (PAIRS<KV>) {
      const uint32_t x = v[j].w[n / 2], y = v[j + 2].w[n / 2];
      term[0][j] = n % 2 ? x >> 16 | (y & 0xffff0000u) : (x & 0xffffu) | y << 16;
    } else {
      float x = element<KV>(v[j], n);
      Q3N_UNROLL
      for (int i = 0; i < V_TERMS<KV>; i++) {
        term[i][j] = bits(x) & 0xffffe000u; /* cut off: rounding could overflow */
        x -= value(term[i][j]);
      }
    }
  }
}

/* sum += weights values over one step. */
template <q3n_dtype KV, int MT>
__device__ __forceinline__ void add_values(float (&sum)[MT][8][4], q3n_shared<uint32_t> weight,
                                           const octet<KV> (&v)[STEP_OCTETS<KV>], int tile0, int tile_step, int tiles) {
  uint32_t term[8][V_TERMS<KV>][2];
  Q3N_UNROLL
  for (int n = 0; n < 8; n++) value_fragment<KV>(term[n], v, n);
  Q3N_UNROLL
  for (int m = 0; m < MT; m++) {
    if (tile0 + tile_step * m >= tiles) break;
    fragment_a<KV> p;
    p.read(weight + (tile0 + tile_step * m) * 2 * A_WORDS<KV>);
    Q3N_UNROLL
    for (int n = 0; n < 8; n++) {
      Q3N_UNROLL
      for (int i = fragment_a<KV>::TERMS - 1; i > 0; i--) multiply<KV>(sum[m][n], p.term[i], term[n][0]);
      Q3N_UNROLL
      for (int i = V_TERMS<KV> - 1; i >= 0; i--) multiply<KV>(sum[m][n], p.term[0], term[n][i]);
    }
  }
}

/* Values that are not finite were 0 in the products. Here the weights of keys that are seen count as 1, and they as 1
   (inf), 128 (-inf) or 16384 (NaN): sums over a step are exact and tell what the row gets. */
__device__ __forceinline__ float code(float v) {
  return finite(v) ? 0.0f : v != v ? 16384.0f : v > 0.0f ? 1.0f : 128.0f;
}

__device__ __forceinline__ float add_code(float sum, float count) {
  const int n = (int)count;
  if (n == 0) return sum;
  if (n >= 16384 || (n % 128 && n / 128)) return sum + value(0x7fc00000u);
  return sum + (n % 128 ? INFINITY : -INFINITY);
}

/* 1 for every weight but -0, the one of a hidden key. */
template <q3n_dtype KV> __device__ __forceinline__ uint32_t seen(uint32_t weight) {
  if constexpr (!PAIRS<KV>) return weight == 0x80000000u ? 0u : bits(1.0f);
  constexpr uint32_t one = KV == Q3N_F16 ? 0x3c00u : 0x3f80u;
  return ((weight & 0xffffu) == 0x8000u ? 0u : one) | (weight >> 16 == 0x8000u ? 0u : one << 16);
}

template <q3n_dtype KV, int MT>
__device__ __forceinline__ void add_special(float (&sum)[MT][8][4], q3n_shared<uint32_t> weight,
                                            const octet<KV> (&v)[STEP_OCTETS<KV>], int tile0, int tile_step,
                                            int tiles) {
  Q3N_UNROLL
  for (int m = 0; m < MT; m++) {
    if (tile0 + tile_step * m >= tiles) break;
    const uint4 w = q3n_load<uint4>(weight + (tile0 + tile_step * m) * 2 * A_WORDS<KV>);
    const uint32_t x[4] = {seen<KV>(w.x), seen<KV>(w.y), seen<KV>(w.z), seen<KV>(w.w)};
    Q3N_UNROLL
    for (int n = 0; n < 8; n++) {
      uint32_t y[2];
      Q3N_UNROLL
      for (int j = 0; j < 2; j++) {
        const float c = code(element<KV>(v[j], n));
        if constexpr (KV == Q3N_F16)
          y[j] = q3n_pack_f16(c, code(element<KV>(v[j + 2], n)));
        else if constexpr (KV == Q3N_BF16)
          y[j] = q3n_pack_bf16(c, code(element<KV>(v[j + 2], n)));
        else
          y[j] = bits(c);
      }
      float count[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      multiply<KV>(count, x, y);
      Q3N_UNROLL
      for (int i = 0; i < 4; i++) sum[m][n][i] = add_code(sum[m][n][i], count[i]);
    }
  }
}

/* The values of keys `key0` .. of a lane's step: its octets, of which those from `n` on are 0. */
template <q3n_dtype KV, bool VECTOR>
__device__ __forceinline__ void read_step(octet<KV> (&v)[STEP_OCTETS<KV>], const void *cache, int64_t at,
                                          int64_t stride, int key0, int n, int64_t c, int64_t D) {
  Q3N_UNROLL
  for (int j = 0; j < STEP_OCTETS<KV>; j++) {
    const int key = key0 + (int)(threadIdx.x % 4) + 4 * j;
    v[j] = read<KV, VECTOR>(cache, at + key * stride, c, D, key < n);
  }
}

/* Four channels of a row, `n` of them there. f: what the total that o holds and these are multiplied by to be added (a
   factor of these below 0: nothing to add), and what all is at last. */
template <bool VECTOR>
__device__ __forceinline__ void fold_out(float *o, float (&v)[4], float4 f, bool before, int64_t n) {
  const bool vector = VECTOR && n >= 4 && (uintptr_t)o % 16 == 0;
  float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (before && vector) {
    const float4 x = q3n_load<float4>(o);
    total[0] = x.x, total[1] = x.y, total[2] = x.z, total[3] = x.w;
  } else if (before) {
    Q3N_UNROLL
    for (int i = 0; i < 4; i++)
      if (i < n) total[i] = o[i];
  }
  Q3N_UNROLL
  for (int i = 0; i < 4; i++) v[i] = (f.y < 0.0f ? total[i] : __fmaf_rn(v[i], f.y, total[i] * f.x)) * f.z;
  if (vector) {
    q3n_store(o, make_float4(v[0], v[1], v[2], v[3]));
    return;
  }
  Q3N_UNROLL
  for (int i = 0; i < 4; i++)
    if (i < n) o[i] = v[i];
}

/* Blocks on a multiprocessor: as many as leave registers enough. */
template <q3n_dtype KV, int MT, int NG>
[[maybe_unused]] constexpr int RESIDENT = MT * NG > 1 && !(PAIRS<KV> && MT == 2) ? 2 : 3;

/* MT tiles of 16 rows; NG groups of 64 channels a warp. */
template <q3n_dtype KV, int MT, int NG, bool VECTOR>
__global__ void __launch_bounds__(THREADS, RESIDENT<KV, MT, NG>)
    attend(q3n_attention_args a, partial parts, int64_t tiles_each) {
  constexpr int ROWS = 16 * MT;
  const int chunks = (int)((a.D + 31) / 32);
  Q3N_SHARED_DYNAMIC(uint32_t, weight, 0, MT * 2 * A_WORDS<KV>);
  Q3N_SHARED_DYNAMIC(float, score, MT * 2 * A_WORDS<KV> * 4, ROWS * KEYS);
  Q3N_SHARED_DYNAMIC(uint32_t, query, (MT * 2 * A_WORDS<KV> + ROWS * KEYS) * 4, MT * chunks * A_WORDS<KV>);
  Q3N_SHARED(int64_t, end, ROWS);   /* keys a row sees */
  Q3N_SHARED(float, unscale, ROWS); /* a power of 2, by which q was divided */
  Q3N_SHARED(float, rescale, ROWS); /* what its sums take before this block of keys */
  Q3N_SHARED(float4, folded, ROWS); /* of `fold_out` */
  Q3N_SHARED(softmax, part, ROWS);  /* of the segment, of all before */
  Q3N_SHARED(softmax, total, ROWS);

  const int64_t heads = a.HQ / a.HKV, segments = parts.o ? parts.segments : 1;
  const int64_t item = blockIdx.x / segments, hkv = item % a.HKV;
  tile x;
  if (!find_tile(x, a, item / a.HKV, tiles_each, heads, ROWS)) return;
  const int64_t left = x.n * heads - x.first;
  const int rows = left < ROWS ? (int)left : ROWS, tiles = (rows + 15) / 16;
  const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4, warp = (int)(threadIdx.x / 32);

  const int64_t keys = visible(a, x, (x.first + rows - 1) / heads);
  int64_t segment = 0, last = keys > 0 ? (keys - 1) / SEGMENT : 0;
  if (parts.o) segment = last = blockIdx.x % segments;

  for (int r = (int)threadIdx.x; r < ROWS; r += THREADS) {
    end[r] = r < rows ? visible(a, x, (x.first + r) / heads) : 0;
    part[r] = total[r] = softmax{-INFINITY, 0.0f};
  }
  if (segment * SEGMENT < keys) stage_queries<KV, ROWS, VECTOR>(query, unscale, a, x, hkv, heads, rows, chunks);
  __syncthreads();

  /* Softmax: lane / 8 is the row of four a warp has of each tile of 16, lane % 8 the first of its keys. */
  const int mine = 4 * warp + lane / 8, first_key = lane % 8;
  /* Values: warps that share a group of channels take the tiles in turn. */
  const int wide = a.D > 128 ? 4 : a.D > 64 ? 2 : 1, tile0 = warp / wide, tile_step = WARPS / wide;
  const int channel = 64 * (warp % wide);
  const int64_t slot = a.slot ? a.slot[x.b] : x.b;
  const int64_t k_at = slot * a.k_slot + a.kv_begin * a.k_s + hkv * a.k_h;
  const int64_t v_at = slot * a.v_slot + a.kv_begin * a.v_s + hkv * a.v_h;

  Q3N_ROLL
  for (const int64_t begin = segment; segment <= last; segment++) {
    float sum[NG][MT][8][4] = {};
    const int64_t stop = keys < (segment + 1) * SEGMENT ? keys : (segment + 1) * SEGMENT;
    Q3N_ROLL
    for (int64_t j0 = segment * SEGMENT; j0 < stop; j0 += KEYS) {
      const int n = stop - j0 < KEYS ? (int)(stop - j0) : KEYS;

      if (16 * warp < n) {
        const int key = 16 * warp + group;
        const int64_t at = k_at + (j0 + key) * a.k_s;
        score_keys<KV, MT, VECTOR>(score, query, a.k, at, at + 8 * a.k_s, key < n, key + 8 < n, a.D, chunks, tiles);
      }
      __syncthreads();

      Q3N_ROLL
      for (int m = 0; m < tiles; m++) {
        const int r = 16 * m + mine;
        const int64_t row = x.first + r, t = x.packed + row / heads, seen = end[r] - j0;
        const float *mask = a.mask ? a.mask + x.row * a.mask_b + t * a.mask_t + a.kv_begin + j0 : nullptr;
        const softmax before = part[r];
        float s[KEYS / 8], max = -INFINITY, weights = 0.0f;
        int again = 0;
        Q3N_UNROLL
        for (int i = 0; i < KEYS / 8; i++) {
          const int key = first_key + 8 * i;
          s[i] = -INFINITY;
          if (key >= seen) continue;
          const float bias = mask ? mask[key] : 0.0f;
          if (mask && bias == -INFINITY) continue;
          float dot = score[score_at(r, key)];
          if (KV == Q3N_F16) dot *= unscale[r];
          if (!finite(dot)) again |= 1 << i;
          s[i] = a.scale * dot + bias;
        }
        /* Where terms of what is infinite, or too large for them, made a product NaN: in f32. */
        Q3N_ROLL
        for (int left = again; left; left &= left - 1) {
          const int key = first_key + 8 * (__ffs(left) - 1);
          const float *q = a.q + x.row * a.q_b + t * a.q_t + (hkv * heads + row % heads) * a.q_h;
          score[score_at(r, key)] =
              a.scale * plain_score<KV>(q, a.k, k_at + (j0 + key) * a.k_s, a.D) + (mask ? mask[key] : 0.0f);
        }
        Q3N_UNROLL
        for (int i = 0; i < KEYS / 8; i++)
          if (again >> i & 1) s[i] = score[score_at(r, first_key + 8 * i)];
        Q3N_UNROLL
        for (int i = 0; i < KEYS / 8; i++)
          if (s[i] > max) max = s[i];
        Q3N_UNROLL
        for (int by = 4; by > 0; by /= 2) {
          const float other = __shfl_xor_sync(ALL, max, by);
          if (other > max) max = other;
        }
        if (before.max > max) max = before.max;
        const float keep = before.max == -INFINITY ? 0.0f : expf(before.max - max);
        Q3N_UNROLL
        for (int i = 0; i < KEYS / 8; i++) {
          /* -0: hidden, which a weight that vanished is not */
          s[i] = s[i] == -INFINITY ? -0.0f : expf(s[i] - max);
          weights += s[i];
        }
        const q3n_shared<uint32_t> to = weight + m * 2 * A_WORDS<KV> + (r % 8 * 4 + first_key % 4) * 4 +
                                        first_key / 4 * 2 + r % 16 / 8;
        if constexpr (PAIRS<KV>) {
          Q3N_UNROLL
          for (int i = 0; i < KEYS / 16; i++) {
            constexpr float scale = KV == Q3N_F16 ? F16_SCALE : 1.0f;
            uint32_t term[A_TERMS<KV>];
            split_pair<KV>(term, s[2 * i] * scale, s[2 * i + 1] * scale);
            Q3N_UNROLL
            for (int k = 0; k < A_TERMS<KV>; k++) to[(i * A_TERMS<KV> + k) * 128] = term[k];
          }
        } else {
          Q3N_UNROLL
          for (int i = 0; i < KEYS / 8; i++) to[i * 128] = bits(s[i]);
        }
        weights = q3n_warp_sum(weights, 8);
        __syncwarp(); /* `before` is read */
        if (first_key == 0) {
          part[r] = softmax{max, __fmaf_rn(before.sum, keep, weights)};
          rescale[r] = keep;
        }
      }
      __syncthreads();

      Q3N_UNROLL
      for (int g = 0; g < NG; g++) {
        if (channel + 256 * g >= a.D) break;
        const int c = channel + 256 * g + 8 * group;
        const int64_t at = v_at + j0 * a.v_s;
        Q3N_UNROLL
        for (int m = 0; m < MT; m++) {
          if (tile0 + tile_step * m >= tiles) break;
          const int r = 16 * (tile0 + tile_step * m) + group;
          const float upper = rescale[r], lower = rescale[r + 8];
          Q3N_UNROLL
          for (int i = 0; i < 32; i++) sum[g][m][i / 4][i % 4] *= i % 4 < 2 ? upper : lower;
        }
        constexpr int AHEAD = VECTOR && MT == 1 && NG == 1 ? 2 : 1, STEP = DEPTH<KV>, WORDS = A_TERMS<KV> * 128;
        bool extra = false;
        Q3N_ROLL
        for (int key0 = 0; key0 < n; key0 += AHEAD * STEP) {
          octet<KV> next[AHEAD][STEP_OCTETS<KV>];
          Q3N_UNROLL
          for (int i = 0; i < AHEAD; i++)
            read_step<KV, VECTOR>(next[i], a.v, at, a.v_s, key0 + i * STEP, n, c, a.D);
          Q3N_UNROLL
          for (int i = 0; i < AHEAD; i++) {
            if (key0 + i * STEP >= n) break;
            Q3N_UNROLL
            for (int j = 0; j < STEP_OCTETS<KV>; j++)
              if (special<KV>(next[i][j])) {
                clean<KV>(next[i][j]);
                extra = true;
              }
            add_values<KV, MT>(sum[g], weight + (key0 / STEP + i) * WORDS + lane * 4, next[i], tile0, tile_step, tiles);
          }
        }
        if (!__any_sync(ALL, extra)) continue;
        Q3N_ROLL
        for (int key0 = 0; key0 < n; key0 += STEP) {
          octet<KV> v[STEP_OCTETS<KV>];
          read_step<KV, VECTOR>(v, a.v, at, a.v_s, key0, n, c, a.D);
          add_special<KV, MT>(sum[g], weight + key0 / STEP * WORDS + lane * 4, v, tile0, tile_step, tiles);
        }
      }
    }

    /* The segment's end. Lane 8 i of a warp has row i of its four. */
    Q3N_ROLL
    for (int r = mine; r < rows && first_key == 0; r += 16) {
      const int64_t row = x.first + r, t = x.packed + row / heads, h = hkv * heads + row % heads;
      const softmax here = part[r];
      float4 f = make_float4(0.0f, 1.0f, 1.0f, 0.0f);
      if (parts.o) {
        const int64_t to = segment * parts.rows + (x.row * a.T + t) * a.HQ + h;
        parts.max[to] = here.max;
        parts.sum[to] = here.sum;
      } else {
        softmax all = total[r];
        if (!fold(all, here, f.x, f.y)) f.y = -1.0f;
        total[r] = all;
        if (segment == last) {
          f.z = norm_after_sink(all, a.sinks, h);
          if (a.lse) a.lse[x.row * a.lse_b + t * a.lse_t + h] = log_sum(all);
        }
      }
      folded[r] = f;
      part[r] = softmax{-INFINITY, 0.0f};
    }
    if (parts.o && segment * SEGMENT >= keys) return;
    __syncthreads();

    /* A lane has 16 neighbouring channels of two rows of a tile. */
    const bool before = !parts.o && segment != begin;
    Q3N_UNROLL
    for (int m = 0; m < MT; m++)
      Q3N_UNROLL
      for (int half = 0; half < 2; half++) {
        const int r = 16 * (tile0 + tile_step * m) + group + 8 * half;
        if (r >= rows) continue;
        const int64_t row = x.first + r, t = x.packed + row / heads, h = hkv * heads + row % heads;
        float *o = a.o + x.row * a.o_b + t * a.o_t + h * a.o_h;
        if (parts.o) o = parts.o + (segment * parts.rows + (x.row * a.T + t) * a.HQ + h) * a.D;
        const float4 f = folded[r];
        Q3N_UNROLL
        for (int g = 0; g < NG; g++)
          Q3N_UNROLL
          for (int i = 0; i < 16; i += 4) {
            const int c = channel + 256 * g + 16 * member + i;
            if (c >= a.D) break;
            float v[4];
            Q3N_UNROLL
            for (int j = 0; j < 4; j++)
              v[j] = sum[g][m][(i + j) % 8][2 * half + i / 8] * (KV == Q3N_F16 ? 1.0f / F16_SCALE : 1.0f);
            fold_out<VECTOR>(o + c, v, f, before, a.D - c);
          }
      }
    if (!a.gate || parts.o || segment != last) continue;
    /* what this thread has stored */
    Q3N_ROLL
    for (int i = 0; i < NG * MT * 2 * 16; i++) {
      const int r = 16 * (tile0 + tile_step * (i / 32 % MT)) + group + i / 16 % 2 * 8;
      const int c = channel + 256 * (i / 32 / MT) + 16 * member + i % 16;
      if (r >= rows || c >= a.D) continue;
      const int64_t row = x.first + r, t = x.packed + row / heads, h = hkv * heads + row % heads;
      a.o[x.row * a.o_b + t * a.o_t + h * a.o_h + c] *=
          sigmoid(a.gate[x.row * a.gate_b + t * a.gate_t + h * a.gate_h + c]);
    }
  }
}

/* A merge of parts: of segments, or of the caller's parts, whose log-sum-exp stands for a maximum with a sum of 1. */
struct merge {
  float *o, *lse;
  const float *part_o, *part_max, *part_sum, *gate, *sinks; /* part_sum NULL: part_max is the log-sum-exp */
  int64_t o_b, o_t, o_h, lse_b, lse_t, gate_b, gate_t, gate_h;
  int64_t parts, rows, T, HQ, D;
};

/* A block has 32 channels of a row. What the sums so far count when a part comes follows from the maxima alone, so all
   factors are known before the sums are read, and these are read at once, 128 parts at a time. */
constexpr int MERGE_CHANNELS = 32;

__global__ void __launch_bounds__(THREADS) merge_rows(merge a, int64_t blocks_a_row) {
  Q3N_SHARED(float4, factor, THREADS); /* of a part: keep, take, its sum of weights */
  Q3N_SHARED(float, largest, WARPS);
  Q3N_SHARED(float, sums, THREADS * MERGE_CHANNELS);
  const int lane = (int)(threadIdx.x % 32), warp = (int)(threadIdx.x / 32);
  const int64_t row = blockIdx.x / blocks_a_row, c = blockIdx.x % blocks_a_row * MERGE_CHANNELS + lane;
  const bool mine = c < a.D;
  softmax total = {-INFINITY, 0.0f};
  float o = 0.0f;
  for (int64_t p0 = 0; p0 < a.parts; p0 += THREADS) {
    softmax part = {-INFINITY, 0.0f};
    if (p0 + threadIdx.x < a.parts) {
      const int64_t at = (p0 + threadIdx.x) * a.rows + row;
      part.max = a.part_max[at];
      if (a.part_sum) {
        part.sum = a.part_sum[at];
      } else if (part.max != part.max) {
        part.sum = part.max;
        part.max = -INFINITY;
      } else {
        part.sum = part.max == -INFINITY ? 0.0f : 1.0f;
      }
    }
    /* the maximum of the parts before */
    float upto = part.max;
    Q3N_UNROLL
    for (int by = 1; by < 32; by *= 2) {
      const float other = __shfl_up_sync(ALL, upto, by);
      if (lane >= by && other > upto) upto = other;
    }
    const float left = __shfl_up_sync(ALL, upto, 1);
    if (lane == 31) largest[warp] = upto;
    __syncthreads();
    softmax before = {total.max, 0.0f};
    for (int w = 0; w < warp; w++)
      if (largest[w] > before.max) before.max = largest[w];
    if (lane > 0 && left > before.max) before.max = left;
    for (int w = 0; w < WARPS; w++)
      if (largest[w] > total.max) total.max = largest[w];
    float4 f = make_float4(1.0f, 0.0f, part.sum, 0.0f);
    fold(before, part, f.x, f.y);
    factor[threadIdx.x] = f;
    __syncthreads();

    constexpr int AHEAD = 16;
    const int n = a.parts - p0 < THREADS ? (int)(a.parts - p0) : THREADS;
    const float *from = a.part_o + (p0 * a.rows + row) * a.D + c;
    Q3N_ROLL
    for (int p = warp; p < n; p += AHEAD * WARPS) {
      float v[AHEAD];
      Q3N_UNROLL
      for (int i = 0; i < AHEAD; i++) {
        const int at = p + i * WARPS;
        v[i] = 0.0f;
        if (!mine || at >= n) continue;
        const float4 g = factor[at];
        if (g.z != 0.0f) v[i] = from[at * a.rows * a.D]; /* an empty part has no sums */
      }
      Q3N_UNROLL
      for (int i = 0; i < AHEAD; i++)
        if (p + i * WARPS < n) sums[(p + i * WARPS) * MERGE_CHANNELS + lane] = v[i];
    }
    __syncthreads();
    for (int p = 0; p < n && warp == 0; p++) {
      const float4 g = factor[p];
      const float v = sums[p * MERGE_CHANNELS + lane];
      if (g.z == 0.0f) continue;
      total.sum = __fmaf_rn(g.z, g.y, total.sum * g.x);
      o = __fmaf_rn(v, g.y, o * g.x);
    }
  }
  if (warp != 0) return;
  const int64_t token = row / a.HQ, h = row % a.HQ, b = token / a.T, t = token % a.T;
  const float norm = norm_after_sink(total, a.sinks, h);
  if (mine) {
    float v = o * norm;
    if (a.gate) v *= sigmoid(a.gate[b * a.gate_b + t * a.gate_t + h * a.gate_h + c]);
    a.o[b * a.o_b + t * a.o_t + h * a.o_h + c] = v;
  }
  if (a.lse && c == 0) a.lse[b * a.lse_b + t * a.lse_t + h] = log_sum(total);
}

q3n_status launch_merge(const merge &a, q3n_stream stream) {
  const int64_t blocks = (a.D + MERGE_CHANNELS - 1) / MERGE_CHANNELS;
  return Q3N_LAUNCH(merge_rows, (a, blocks), a.rows * blocks, THREADS, 0, stream);
}

/* How a call is run. None of it changes a bit, and sizes alone decide what takes scratch. */
struct plan {
  int row_tiles;          /* tiles of 16 rows a block */
  int64_t tiles, blocks;  /* tiles of a sequence that is not packed; of all sequences and KV heads */
  int64_t segments, rows; /* of a split */
  bool split;
};

/* Blocks that fill a GPU of 132 multiprocessors twice, and the most that the parts of a split may take. */
constexpr int64_t MANY_BLOCKS = 264, PARTS_BYTES = (int64_t)512 << 20;

void cut_rows(plan &x, const q3n_attention_args *a, int row_tiles) {
  const int64_t heads = a->HQ / a->HKV, rows = 16 * row_tiles;
  x.row_tiles = row_tiles;
  x.tiles = q3n_ceil_div(a->T * heads, rows);
  x.blocks = (a->cu_seqlens ? a->T * heads / rows + a->B : a->B * x.tiles) * a->HKV;
}

plan make_plan(const q3n_attention_args *a, bool may_split) {
  plan x = {};
  if (a->B == 0 || a->T == 0 || a->HQ == 0) return x;
  const int64_t each = (a->cu_seqlens ? q3n_ceil_div(a->T, a->B) : a->T) * (a->HQ / a->HKV);
  cut_rows(x, a, a->D > 256 || each <= 16 ? 1 : a->kv_dtype == Q3N_F16 && each > 32 ? 4 : 2);
  x.segments = q3n_ceil_div(a->kv_end - a->kv_begin, SEGMENT);
  x.rows = (a->cu_seqlens ? 1 : a->B) * a->T * a->HQ;
  x.split = may_split && x.segments > 1 && x.blocks < MANY_BLOCKS &&
            x.segments <= PARTS_BYTES / 4 / x.rows / (a->D + 2);
  return x;
}

/* The parts' sums of values, maxima and sums of weights. */
int64_t scratch_bytes(const plan &x, int64_t D) {
  return x.split ? q3n_align(x.segments * x.rows * D * 4) + 2 * q3n_align(x.segments * x.rows * 4) : 0;
}

/* Rows start at multiples of 16 bytes and are whole octets. */
bool aligned(const void *p, int64_t bytes, int64_t D, int64_t s0, int64_t s1, int64_t s2) {
  return (uintptr_t)p % 16 == 0 && D % 8 == 0 && (s0 | s1 | s2) * bytes % 16 == 0;
}

template <q3n_dtype KV, int MT, int NG, bool VECTOR>
q3n_status launch_form(const q3n_attention_args *a, const plan &x, const partial &parts, q3n_stream stream) {
  const int64_t words = MT * (2 + (a->D + 31) / 32) * A_WORDS<KV> + 16 * MT * KEYS;
  return Q3N_LAUNCH((attend<KV, MT, NG, VECTOR>), (*a, parts, x.tiles), x.blocks * (parts.o ? parts.segments : 1),
                    THREADS, words * 4, stream);
}

template <q3n_dtype KV>
q3n_status launch_type(const q3n_attention_args *a, plan x, const partial &parts, q3n_stream stream) {
  constexpr int64_t bytes = KV == Q3N_F32 ? 4 : 2;
  const bool q = aligned(a->q, 4, a->D, a->q_b, a->q_t, a->q_h);
  const bool k = KV == Q3N_Q8_0 ? (uintptr_t)a->k % 2 == 0 : aligned(a->k, bytes, a->D, a->k_slot, a->k_s, a->k_h);
  const bool v = KV == Q3N_Q8_0 ? (uintptr_t)a->v % 2 == 0 : aligned(a->v, bytes, a->D, a->v_slot, a->v_s, a->v_h);
  if (!q || !k || !v) {
    cut_rows(x, a, 1);
    return launch_form<KV, 1, 2, false>(a, x, parts, stream);
  }
  if (a->D > 256) return launch_form<KV, 1, 2, true>(a, x, parts, stream);
  if (x.row_tiles == 1) return launch_form<KV, 1, 1, true>(a, x, parts, stream);
  if constexpr (KV == Q3N_F16)
    if (x.row_tiles == 4) return launch_form<KV, 4, 1, true>(a, x, parts, stream);
  return launch_form<KV, 2, 1, true>(a, x, parts, stream);
}

q3n_status launch(const q3n_attention_args *a, bool may_split, void *scratch, q3n_stream stream) {
  const plan x = make_plan(a, may_split);
  if (x.blocks == 0) return Q3N_OK;
  partial parts = {};
  if (x.split) {
    parts.o = (float *)scratch;
    parts.max = (float *)((char *)scratch + q3n_align(x.segments * x.rows * a->D * 4));
    parts.sum = (float *)((char *)parts.max + q3n_align(x.segments * x.rows * 4));
    parts.segments = x.segments;
    parts.rows = x.rows;
  }
  const q3n_status status = a->kv_dtype == Q3N_F32    ? launch_type<Q3N_F32>(a, x, parts, stream)
                            : a->kv_dtype == Q3N_F16  ? launch_type<Q3N_F16>(a, x, parts, stream)
                            : a->kv_dtype == Q3N_BF16 ? launch_type<Q3N_BF16>(a, x, parts, stream)
                                                      : launch_type<Q3N_Q8_0>(a, x, parts, stream);
  if (status != Q3N_OK || !x.split) return status;
  merge m = {};
  m.o = a->o, m.o_b = a->o_b, m.o_t = a->o_t, m.o_h = a->o_h;
  m.lse = a->lse, m.lse_b = a->lse_b, m.lse_t = a->lse_t;
  m.gate = a->gate, m.gate_b = a->gate_b, m.gate_t = a->gate_t, m.gate_h = a->gate_h;
  m.sinks = a->sinks;
  m.part_o = parts.o, m.part_max = parts.max, m.part_sum = parts.sum;
  m.parts = x.segments, m.rows = x.rows;
  m.T = a->T, m.HQ = a->HQ, m.D = a->D;
  return launch_merge(m, stream);
}

} /* namespace */

Q3N_CUDA_SCRATCH(attention, attention) { return scratch_bytes(make_plan(a, true), a->D); }

Q3N_CUDA_OPERATOR(attention, attention) { return launch(a, true, scratch, stream); }

Q3N_CUDA_SCRATCH(attention, attention_whole) {
  (void)a;
  return 0;
}

Q3N_CUDA_OPERATOR(attention, attention_whole) { return launch(a, false, scratch, stream); }

Q3N_CUDA_SCRATCH(attention_merge, attention_merge) {
  (void)a;
  return 0;
}

Q3N_CUDA_OPERATOR(attention_merge, attention_merge) {
  (void)scratch;
  if (a->D == 0 || a->T == 0 || a->HQ == 0) return Q3N_OK;
  merge m = {};
  m.o = a->o, m.o_t = a->o_t, m.o_h = a->o_h;
  m.lse = a->lse, m.lse_t = a->lse_t;
  m.gate = a->gate, m.gate_t = a->gate_t, m.gate_h = a->gate_h;
  m.sinks = a->sinks;
  m.part_o = a->part_o, m.part_max = a->part_lse;
  m.parts = a->parts, m.rows = a->T * a->HQ;
  m.T = a->T, m.HQ = a->HQ, m.D = a->D;
  return launch_merge(m, stream);
}
