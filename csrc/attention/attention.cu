/* Flash attention on tensor cores, one arithmetic for prefill and decode. A block of threads has up to 64 rows (queries
   times the heads of a KV head) and meets 64 keys at a time:

     scores   warp w multiplies all rows with keys 16 w .. 16 w + 15      -> `score` in shared memory
     softmax  8 lanes a row: maximum, weights, sum                       -> `weight`, laid out as the fragments of A
     values   warp w adds channels 64 w .. 64 w + 63 of all rows         -> registers

   so every element of K and V is read and converted once a block, from global memory to the fragments of B; no copy of
   them lies in shared memory. Keys go by segments of 256, counted from kv_begin. A segment's sums are complete before
   they are folded into the row's total, in the order of the segments: by the block itself (`parts` is NULL; the total
   lies in o meanwhile) or by a second kernel, from scratch. Both do the same arithmetic, and a row's does not depend on
   the rows beside it: a query gives the same bits in every batch and split. README.md has the precision and the floors. */
#include "../cuda/mma.cuh"
#include "../cuda/reduce.cuh"

extern "C" {
#include "../base/check.h"
#include "attention.h"
}

namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS, KEYS = 64, SEGMENT = 256;
constexpr int SCORE_ROW = KEYS + 8; /* rows 8 banks apart */
constexpr unsigned ALL = 0xffffffffu;

__device__ __forceinline__ bool finite(float x) { return ((unsigned)__float_as_int(x) & 0x7f800000u) != 0x7f800000u; }

/* Eight neighbouring channels of a key or value as they lie in the cache. */
template <q3n_dtype KV> struct octet {
  uint4 x; /* 16-bit floats */
};
template <> struct octet<Q3N_F32> {
  float4 low, high;
};
template <> struct octet<Q3N_Q8_0> {
  uint32_t q[2];
  float d;
};

#if defined(__CUDACC__)
__device__ __forceinline__ float f16_value(unsigned bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((unsigned short)bits));
  return x;
}
#else
inline float f16_value(unsigned bits) { return q3n_f16_to_f32((uint16_t)bits); }
#endif

__device__ __forceinline__ float bf16_value(unsigned bits) { return __int_as_float((int)(bits << 16)); }

__device__ __forceinline__ unsigned read_u16(const uint8_t *p, bool even) {
  return even ? (unsigned)*reinterpret_cast<const uint16_t *>(p) : (unsigned)p[0] | (unsigned)p[1] << 8;
}

/* Channels c .. c + 7 of the row that starts `at` elements into the cache; those from D on are 0. VECTOR-like: `vector`
   says that octets are aligned to 16 bytes and whole (q8_0: to 2 bytes). */
template <q3n_dtype KV>
__device__ __forceinline__ octet<KV> read(const void *cache, int64_t at, int64_t c, int64_t D, bool vector) {
  octet<KV> v;
  if constexpr (KV == Q3N_F32) {
    const float *p = static_cast<const float *>(cache) + at + c;
    v.low = v.high = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (c < D) {
      if (vector) {
        v.low = q3n_load<float4>(p);
        v.high = q3n_load<float4>(p + 4);
      } else {
        v.low.x = p[0];
        if (c + 1 < D) v.low.y = p[1];
        if (c + 2 < D) v.low.z = p[2];
        if (c + 3 < D) v.low.w = p[3];
        if (c + 4 < D) v.high.x = p[4];
        if (c + 5 < D) v.high.y = p[5];
        if (c + 6 < D) v.high.z = p[6];
        if (c + 7 < D) v.high.w = p[7];
      }
    }
  } else if constexpr (KV == Q3N_Q8_0) {
    v.q[0] = v.q[1] = 0;
    v.d = 0.0f;
    if (c < D) {
      const uint8_t *block = static_cast<const uint8_t *>(cache) + (at + c) / 32 * 34, *q = block + 2 + c % 32;
      v.d = f16_value(read_u16(block, vector));
      v.q[0] = read_u16(q, vector) | read_u16(q + 2, vector) << 16;
      v.q[1] = read_u16(q + 4, vector) | read_u16(q + 6, vector) << 16;
    }
  } else {
    const uint16_t *p = static_cast<const uint16_t *>(cache) + at + c;
    v.x = make_uint4(0, 0, 0, 0);
    if (c < D) {
      if (vector) {
        v.x = q3n_load<uint4>(p);
      } else {
        const unsigned past = 0;
        v.x.x = (unsigned)p[0] | (c + 1 < D ? (unsigned)p[1] : past) << 16;
        v.x.y = (c + 2 < D ? (unsigned)p[2] : past) | (c + 3 < D ? (unsigned)p[3] : past) << 16;
        v.x.z = (c + 4 < D ? (unsigned)p[4] : past) | (c + 5 < D ? (unsigned)p[5] : past) << 16;
        v.x.w = (c + 6 < D ? (unsigned)p[6] : past) | (c + 7 < D ? (unsigned)p[7] : past) << 16;
      }
    }
  }
  return v;
}

template <q3n_dtype KV> __device__ __forceinline__ octet<KV> nothing() { return read<KV>(nullptr, 0, 0, 0, false); }

template <q3n_dtype KV> __device__ __forceinline__ void convert(float (&x)[8], const octet<KV> &v) {
  if constexpr (KV == Q3N_F32) {
    x[0] = v.low.x, x[1] = v.low.y, x[2] = v.low.z, x[3] = v.low.w;
    x[4] = v.high.x, x[5] = v.high.y, x[6] = v.high.z, x[7] = v.high.w;
  } else if constexpr (KV == Q3N_Q8_0) {
    Q3N_UNROLL
    for (int i = 0; i < 8; i++) x[i] = v.d * (float)(int8_t)(v.q[i / 4] >> 8 * (i % 4) & 255u);
  } else {
    const unsigned w[4] = {v.x.x, v.x.y, v.x.z, v.x.w};
    Q3N_UNROLL
    for (int i = 0; i < 8; i++) {
      const unsigned bits = i % 2 ? w[i / 2] >> 16 : w[i / 2] & 0xffffu;
      x[i] = KV == Q3N_F16 ? f16_value(bits) : bf16_value(bits);
    }
  }
}

/* Whether any of the eight is infinite or NaN. */
template <q3n_dtype KV> __device__ __forceinline__ bool special(const octet<KV> &v) {
  if constexpr (KV == Q3N_F32) {
    const bool low = finite(v.low.x) && finite(v.low.y) && finite(v.low.z) && finite(v.low.w);
    return !(low && finite(v.high.x) && finite(v.high.y) && finite(v.high.z) && finite(v.high.w));
  } else if constexpr (KV == Q3N_Q8_0) {
    return !finite(v.d);
  } else {
    /* an exponent of all ones plus one carries into the sign */
    constexpr unsigned exponent = KV == Q3N_F16 ? 0x7c007c00u : 0x7f807f80u, one = KV == Q3N_F16 ? 0x04000400u : 0x00800080u;
    const unsigned carry = ((v.x.x & exponent) + one) | ((v.x.y & exponent) + one) | ((v.x.z & exponent) + one) |
                           ((v.x.w & exponent) + one);
    return (carry & 0x80008000u) != 0;
  }
}

/* One element, for the rare sums that are made again. */
template <q3n_dtype KV> __device__ __forceinline__ float element(const void *cache, int64_t at) {
  if constexpr (KV == Q3N_F32) return static_cast<const float *>(cache)[at];
  if constexpr (KV == Q3N_F16) return f16_value(static_cast<const uint16_t *>(cache)[at]);
  if constexpr (KV == Q3N_BF16) return bf16_value(static_cast<const uint16_t *>(cache)[at]);
  const uint8_t *block = static_cast<const uint8_t *>(cache) + at / 32 * 34;
  return f16_value(read_u16(block, false)) * (float)(int8_t)block[2 + at % 32];
}

/* f16 and bf16 are tf32 numbers as they are, a q8_0 value is the sum of two, an f32 of three. */
template <q3n_dtype KV> constexpr int TERMS = KV == Q3N_F32 ? 3 : KV == Q3N_Q8_0 ? 2 : 1;

/* A row's softmax over some keys: the largest score, the sum of exp(score - max). Nothing seen: -inf and 0. A NaN score
   is left out of the maximum and makes the sum NaN. */
struct softmax {
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

__device__ __forceinline__ float quotient(float x, float rescale, float sum) {
  return sum == 0.0f ? 0.0f : x * rescale / sum;
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
    for (x.b = 0; x.b < a.B; x.b++) {
      x.packed = a.cu_seqlens[x.b];
      x.n = a.cu_seqlens[x.b + 1] - x.packed;
      const int64_t count = (x.n * group + rows - 1) / rows;
      if (i < count) break;
      i -= count;
    }
    if (x.b == a.B) return false;
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

/* Queries as fragments of A: of chunk c of 32 channels, step s has in column `member` channel 8 member + 2 s, in column
   member + 4 the next one, as an octet of a key has them. */
template <int MT>
__device__ __forceinline__ void stage_queries(q3n_shared<float> query, const q3n_attention_args &a, const tile &x,
                                              int64_t hkv, int64_t group, int rows, int chunks, bool vector) {
  for (int i = (int)threadIdx.x; i < MT * 16 * 4 * chunks; i += THREADS) {
    const int r = i / (4 * chunks), at = i % (4 * chunks), c = at / 4, member = at % 4;
    float q[8];
    octet<Q3N_F32> v = nothing<Q3N_F32>();
    if (r < rows) {
      const int64_t row = x.first + r, t = x.packed + row / group, h = hkv * group + row % group;
      v = read<Q3N_F32>(a.q, x.row * a.q_b + t * a.q_t + h * a.q_h, 32 * c + 8 * member, a.D, vector);
    }
    convert<Q3N_F32>(q, v);
    Q3N_UNROLL
    for (int j = 0; j < 8; j++)
      query[(((r / 16 * chunks + c) * 4 + j / 2) * 32 + r % 8 * 4 + member) * 4 + j % 2 * 2 + r % 16 / 8] = q[j];
  }
}

/* Four values of A, each in two terms. */
__device__ __forceinline__ void load_split(uint32_t (&high)[4], uint32_t (&low)[4], q3n_shared<float> p) {
  const float4 x = q3n_load<float4>(p);
  q3n_split_tf32(x.x, high[0], low[0]);
  q3n_split_tf32(x.y, high[1], low[1]);
  q3n_split_tf32(x.z, high[2], low[2]);
  q3n_split_tf32(x.w, high[3], low[3]);
}

__device__ __forceinline__ uint32_t bits(float x) { return (uint32_t)__float_as_int(x); }

/* Scores of 16 keys for all rows, in f32 but for scale and mask: q k = (q' + q'') k, and where k has two terms too,
   q' k''. What is small is summed apart. */
template <q3n_dtype KV, int MT>
__device__ __forceinline__ void score_keys(q3n_shared<float> score, q3n_shared<float> query, const void *cache,
                                           const int64_t (&at)[2], const bool (&there)[2], int64_t D, int chunks,
                                           int tiles, bool vector) {
  constexpr int AHEAD = MT == 1 ? 4 : 2;
  const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4, warp = (int)(threadIdx.x / 32);
  float large[MT][2][4] = {}, small[MT][2][4] = {};
#if defined(__CUDACC__)
#pragma unroll 1
#endif
  for (int c0 = 0; c0 < chunks; c0 += AHEAD) {
    octet<KV> next[AHEAD][2];
    Q3N_UNROLL
    for (int i = 0; i < AHEAD; i++)
      Q3N_UNROLL
      for (int n = 0; n < 2; n++)
        next[i][n] = there[n] ? read<KV>(cache, at[n], 32 * (c0 + i) + 8 * member, D, vector) : nothing<KV>();
    Q3N_UNROLL
    for (int i = 0; i < AHEAD; i++) {
      const int c = c0 + i;
      if (c >= chunks) break;
      float k[2][8];
      convert<KV>(k[0], next[i][0]);
      convert<KV>(k[1], next[i][1]);
      Q3N_UNROLL
      for (int s = 0; s < 4; s++) {
        uint32_t high[2][2], low[2][2];
        Q3N_UNROLL
        for (int n = 0; n < 2; n++)
          Q3N_UNROLL
          for (int j = 0; j < 2; j++) {
            if (TERMS<KV> > 1)
              q3n_split_tf32(k[n][2 * s + j], high[n][j], low[n][j]);
            else
              high[n][j] = bits(k[n][2 * s + j]);
          }
        Q3N_UNROLL
        for (int m = 0; m < MT; m++) {
          if (m >= tiles) break;
          uint32_t q_high[4], q_low[4];
          load_split(q_high, q_low, query + (((m * chunks + c) * 4 + s) * 32 + lane) * 4);
          Q3N_UNROLL
          for (int n = 0; n < 2; n++) {
            q3n_mma_tf32(large[m][n], q_high, high[n], large[m][n]);
            q3n_mma_tf32(small[m][n], q_low, high[n], small[m][n]);
            if (TERMS<KV> > 1) q3n_mma_tf32(small[m][n], q_high, low[n], small[m][n]);
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
        const float *x = large[m][n] + 2 * half, *y = small[m][n] + 2 * half;
        q3n_store(score + (16 * m + group + 8 * half) * SCORE_ROW + 16 * warp + 8 * n + 2 * member,
                  make_float2(x[0] + y[0], x[1] + y[1]));
      }
  }
}

/* A score that is not finite may be one of a split infinity: again in f32, as the formula has it. */
template <q3n_dtype KV>
__device__ float plain_score(const float *q, const void *cache, int64_t at, int64_t D) {
  float sum = 0.0f;
  for (int64_t d = 0; d < D; d++) sum = __fmaf_rn(q[d], element<KV>(cache, at + d), sum);
  return sum;
}

/* Values that are not finite were 0 in the product. Here their keys' weights count as 1 where the key is seen, and they
   as 1 (inf), 128 (-inf), 16384 (NaN): sums over 8 keys are exact and tell what the row gets. */
__device__ __forceinline__ uint32_t code(float v) {
  return bits(finite(v) ? 0.0f : v != v ? 16384.0f : v > 0.0f ? 1.0f : 128.0f);
}

__device__ __forceinline__ float add_special(float sum, float count) {
  const int n = (int)count;
  if (n == 0) return sum;
  if (n >= 16384 || (n % 128 && n / 128)) return sum + __int_as_float(0x7fc00000);
  return sum + (n % 128 ? INFINITY : -INFINITY);
}

/* One step of 8 keys: sums += weights values, for the 64 channels of two octets. */
template <q3n_dtype KV, int MT>
__device__ __forceinline__ void add_values(float (&sum)[MT][8][4], q3n_shared<float> weight, const octet<KV> &first,
                                           const octet<KV> &second, int tile0, int tile_step, int tiles) {
  const bool extra = __any_sync(ALL, special<KV>(first) || special<KV>(second)) != 0;
  float v[2][8];
  convert<KV>(v[0], first);
  convert<KV>(v[1], second);
  uint32_t term[TERMS<KV>][8][2];
  Q3N_UNROLL
  for (int n = 0; n < 8; n++)
    Q3N_UNROLL
    for (int j = 0; j < 2; j++) {
      float x = v[j][n];
      if (extra && !finite(x)) x = 0.0f;
      Q3N_UNROLL
      for (int i = 0; i < TERMS<KV>; i++) {
        term[i][n][j] = TERMS<KV> == 1 ? bits(x) : bits(x) & 0xffffe000u; /* cut off: rounding could overflow */
        x -= __int_as_float((int)term[i][n][j]);
      }
    }
  Q3N_UNROLL
  for (int m = 0; m < MT; m++) {
    const int tile = tile0 + tile_step * m;
    if (tile >= tiles) break;
    const q3n_shared<float> at = weight + (tile * (KEYS / 8) * 32) * 4;
    uint32_t high[4], low[4];
    load_split(high, low, at);
    Q3N_UNROLL
    for (int n = 0; n < 8; n++) {
      q3n_mma_tf32(sum[m][n], low, term[0][n], sum[m][n]);
      Q3N_UNROLL
      for (int i = TERMS<KV> - 1; i >= 0; i--) q3n_mma_tf32(sum[m][n], high, term[i][n], sum[m][n]);
    }
    if (extra) {
      const float4 w = q3n_load<float4>(at);
      const uint32_t hidden = 0x80000000u, one = bits(1.0f);
      const uint32_t seen[4] = {bits(w.x) == hidden ? 0u : one, bits(w.y) == hidden ? 0u : one,
                                bits(w.z) == hidden ? 0u : one, bits(w.w) == hidden ? 0u : one};
      Q3N_UNROLL
      for (int n = 0; n < 8; n++) {
        const uint32_t codes[2] = {code(v[0][n]), code(v[1][n])};
        float count[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        q3n_mma_tf32(count, seen, codes, count);
        Q3N_UNROLL
        for (int i = 0; i < 4; i++) sum[m][n][i] = add_special(sum[m][n][i], count[i]);
      }
    }
  }
}

/* MT tiles of 16 rows; NG groups of 64 channels a warp. */
template <q3n_dtype KV, int MT, int NG>
__global__ void __launch_bounds__(THREADS)
    attend(q3n_attention_args a, partial parts, int64_t tiles_each, bool k_vector, bool v_vector, bool q_vector) {
  constexpr int ROWS = 16 * MT;
  const int chunks = (int)((a.D + 31) / 32);
  Q3N_SHARED_DYNAMIC(float, query, 0, ROWS * 32 * chunks);
  Q3N_SHARED_DYNAMIC(float, score, ROWS * 32 * chunks * 4, ROWS * SCORE_ROW);
  Q3N_SHARED_DYNAMIC(float, weight, (ROWS * 32 * chunks + ROWS * SCORE_ROW) * 4, ROWS * KEYS);
  Q3N_SHARED(int64_t, end, ROWS);     /* keys a row sees */
  Q3N_SHARED(float, rescale, ROWS);   /* what its sums take before this block of keys */
  Q3N_SHARED(float4, folded, ROWS);   /* of its total: keep, take, factor, sum; sum < 0: not yet the end */

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

  for (int r = (int)threadIdx.x; r < ROWS; r += THREADS)
    end[r] = r < rows ? visible(a, x, (x.first + r) / heads) : 0;
  if (segment * SEGMENT < keys) stage_queries<MT>(query, a, x, hkv, heads, rows, chunks, q_vector);
  __syncthreads();

  /* Softmax: lane / 8 is the row of four a warp has of each tile of 16, lane % 8 the first of its keys. */
  const int mine = 4 * warp + lane / 8, first_key = lane % 8;
  /* Values: warps that share a group of channels take the tiles in turn. */
  const int wide = a.D > 128 ? 4 : a.D > 64 ? 2 : 1, tile0 = warp / wide, tile_step = WARPS / wide;
  const int channel = 64 * (warp % wide);
  const int64_t slot = a.slot ? a.slot[x.b] : x.b;
  const int64_t k_at = slot * a.k_slot + a.kv_begin * a.k_s + hkv * a.k_h;
  const int64_t v_at = slot * a.v_slot + a.kv_begin * a.v_s + hkv * a.v_h;

  softmax total[MT];
  Q3N_UNROLL
  for (int m = 0; m < MT; m++) total[m] = {-INFINITY, 0.0f};

  for (const int64_t begin = segment; segment <= last; segment++) {
    softmax part[MT];
    float sum[NG][MT][8][4];
    Q3N_UNROLL
    for (int m = 0; m < MT; m++) part[m] = {-INFINITY, 0.0f};
    Q3N_UNROLL
    for (int g = 0; g < NG; g++)
      Q3N_UNROLL
      for (int m = 0; m < MT; m++)
        Q3N_UNROLL
        for (int i = 0; i < 32; i++) sum[g][m][i / 4][i % 4] = 0.0f;

    const int64_t stop = keys < (segment + 1) * SEGMENT ? keys : (segment + 1) * SEGMENT;
    for (int64_t j0 = segment * SEGMENT; j0 < stop; j0 += KEYS) {
      const int n = stop - j0 < KEYS ? (int)(stop - j0) : KEYS;

      if (16 * warp < n) {
        const int key = 16 * warp + group;
        const int64_t at[2] = {k_at + (j0 + key) * a.k_s, k_at + (j0 + key + 8) * a.k_s};
        const bool there[2] = {key < n, key + 8 < n};
        score_keys<KV, MT>(score, query, a.k, at, there, a.D, chunks, tiles, k_vector);
      }
      __syncthreads();

      for (int m = 0; m < tiles; m++) {
        const int r = 16 * m + mine;
        const int64_t row = x.first + r, seen = end[r] - j0;
        const int64_t t = x.packed + row / heads, h = hkv * heads + row % heads;
        const float *mask = a.mask ? a.mask + x.row * a.mask_b + t * a.mask_t + a.kv_begin + j0 : nullptr;
        for (int key = first_key; key < KEYS; key += 8) {
          float s = -INFINITY;
          if (key < seen && !(mask && mask[key] == -INFINITY)) {
            float dot = score[r * SCORE_ROW + key];
            if (!finite(dot))
              dot = plain_score<KV>(a.q + x.row * a.q_b + t * a.q_t + h * a.q_h, a.k, k_at + (j0 + key) * a.k_s, a.D);
            s = a.scale * dot + (mask ? mask[key] : 0.0f);
          }
          score[r * SCORE_ROW + key] = s;
        }
      }
      Q3N_UNROLL
      for (int m = 0; m < MT; m++) {
        if (m >= tiles) break;
        const int r = 16 * m + mine;
        float s[KEYS / 8], max = -INFINITY, weights = 0.0f;
        Q3N_UNROLL
        for (int i = 0; i < KEYS / 8; i++) {
          s[i] = score[r * SCORE_ROW + first_key + 8 * i];
          if (s[i] > max) max = s[i];
        }
        Q3N_UNROLL
        for (int by = 4; by > 0; by /= 2) {
          const float other = __shfl_xor_sync(ALL, max, by);
          if (other > max) max = other;
        }
        if (part[m].max > max) max = part[m].max;
        const float keep = part[m].max == -INFINITY ? 0.0f : expf(part[m].max - max);
        Q3N_UNROLL
        for (int i = 0; i < KEYS / 8; i++) {
          /* -0: hidden, which a weight that vanished is not */
          const float p = s[i] == -INFINITY ? -0.0f : expf(s[i] - max);
          weights += p;
          weight[((m * (KEYS / 8) + i) * 32 + r % 8 * 4 + first_key % 4) * 4 + first_key / 4 * 2 + r % 16 / 8] = p;
        }
        part[m].sum = __fmaf_rn(part[m].sum, keep, q3n_warp_sum(weights, 8));
        part[m].max = max;
        if (first_key == 0) rescale[r] = keep;
      }
      __syncthreads();

      Q3N_UNROLL
      for (int g = 0; g < NG; g++) {
        if (channel + 256 * g >= a.D) break;
        Q3N_UNROLL
        for (int m = 0; m < MT; m++) {
          const int r = 16 * (tile0 + tile_step * m) + group;
          if (tile0 + tile_step * m >= tiles) break;
          const float upper = rescale[r], lower = rescale[r + 8];
          Q3N_UNROLL
          for (int i = 0; i < 32; i++) sum[g][m][i / 4][i % 4] *= i % 4 < 2 ? upper : lower;
        }
        constexpr int AHEAD = MT == 1 ? 4 : 2;
#if defined(__CUDACC__)
#pragma unroll 1
#endif
        for (int s0 = 0; 8 * s0 < n; s0 += AHEAD) {
          octet<KV> next[AHEAD][2];
          Q3N_UNROLL
          for (int i = 0; i < AHEAD; i++)
            Q3N_UNROLL
            for (int j = 0; j < 2; j++) {
              const int key = 8 * (s0 + i) + member + 4 * j;
              next[i][j] = key < n ? read<KV>(a.v, v_at + (j0 + key) * a.v_s, channel + 256 * g + 8 * group, a.D, v_vector)
                                   : nothing<KV>();
            }
          Q3N_UNROLL
          for (int i = 0; i < AHEAD; i++) {
            if (8 * (s0 + i) >= n) break;
            add_values<KV, MT>(sum[g], weight + ((s0 + i) * 32 + lane) * 4, next[i][0], next[i][1], tile0, tile_step,
                               tiles);
          }
        }
      }
    }

    /* The segment's end. */
    Q3N_UNROLL
    for (int m = 0; m < MT; m++) {
      const int r = 16 * m + mine;
      if (first_key != 0 || r >= rows) continue;
      const int64_t row = x.first + r, t = x.packed + row / heads, h = hkv * heads + row % heads;
      if (parts.o) {
        const int64_t to = segment * parts.rows + (x.row * a.T + t) * a.HQ + h;
        parts.max[to] = part[m].max;
        parts.sum[to] = part[m].sum;
        continue;
      }
      float keep = 1.0f, take = 0.0f, factor = 1.0f;
      if (!fold(total[m], part[m], keep, take)) take = -1.0f; /* nothing to take */
      float left_sum = -1.0f;
      if (segment == last) {
        if (a.sinks) factor = add_sink(total[m], a.sinks[h]);
        left_sum = total[m].sum;
        if (a.lse) a.lse[x.row * a.lse_b + t * a.lse_t + h] = log_sum(total[m]);
      }
      folded[r] = make_float4(keep, take, factor, left_sum);
    }
    if (parts.o && segment * SEGMENT >= keys) return;
    __syncthreads();

    /* A lane has 16 neighbouring channels of two rows of a tile. */
    Q3N_UNROLL
    for (int g = 0; g < NG; g++)
      Q3N_UNROLL
      for (int m = 0; m < MT; m++)
        Q3N_UNROLL
        for (int half = 0; half < 2; half++) {
          const int r = 16 * (tile0 + tile_step * m) + group + 8 * half, c0 = channel + 256 * g + 16 * member;
          if (r >= rows) continue;
          const int64_t row = x.first + r, t = x.packed + row / heads, h = hkv * heads + row % heads;
          float *o = a.o + x.row * a.o_b + t * a.o_t + h * a.o_h;
          if (parts.o) o = parts.o + (segment * parts.rows + (x.row * a.T + t) * a.HQ + h) * a.D;
          const float *gate = a.gate ? a.gate + x.row * a.gate_b + t * a.gate_t + h * a.gate_h : nullptr;
          float4 f = make_float4(0.0f, 0.0f, 1.0f, 0.0f);
          if (!parts.o) f = folded[r];
          Q3N_UNROLL
          for (int i = 0; i < 16; i++) {
            if (c0 + i >= a.D) break;
            float v = sum[g][m][i % 8][2 * half + i / 8];
            if (!parts.o) {
              const float before = segment == begin ? 0.0f : o[c0 + i];
              v = f.y < 0.0f ? before : __fmaf_rn(v, f.y, before * f.x);
              if (segment == last) {
                v = quotient(v, f.z, f.w);
                if (gate) v *= sigmoid(gate[c0 + i]);
              }
            }
            o[c0 + i] = v;
          }
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

/* A block has 128 channels of a row. What the parts before a part count when it comes follows from the maximum over
   those, so all factors are known before the sums are read. */
__global__ void __launch_bounds__(THREADS) merge_rows(merge a, int64_t blocks_a_row) {
  Q3N_SHARED(float, keep, THREADS);
  Q3N_SHARED(float, take, THREADS);
  Q3N_SHARED(float, sums, THREADS);
  Q3N_SHARED(float, largest, WARPS);
  const int lane = (int)(threadIdx.x % 32), warp = (int)(threadIdx.x / 32);
  const int64_t row = blockIdx.x / blocks_a_row, c = blockIdx.x % blocks_a_row * THREADS + threadIdx.x;
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
    /* the maximum of the parts before, then with this one */
    float upto = part.max;
    Q3N_UNROLL
    for (int by = 1; by < 32; by *= 2) {
      const float other = __shfl_up_sync(ALL, upto, by);
      if (lane >= by && other > upto) upto = other;
    }
    const float left = __shfl_up_sync(ALL, upto, 1);
    softmax before = total;
    if (lane == 31) largest[warp] = upto;
    __syncthreads();
    for (int w = 0; w < warp; w++)
      if (largest[w] > before.max) before.max = largest[w];
    if (lane > 0 && left > before.max) before.max = left;
    float keep_mine = 1.0f, take_mine = 0.0f;
    fold(before, part, keep_mine, take_mine);
    keep[threadIdx.x] = keep_mine;
    take[threadIdx.x] = take_mine;
    sums[threadIdx.x] = part.sum;
    __syncthreads();

    constexpr int AHEAD = 8;
    const int n = a.parts - p0 < THREADS ? (int)(a.parts - p0) : THREADS;
    const float *from = a.part_o + (p0 * a.rows + row) * a.D + c;
    for (int p = 0; p < n; p += AHEAD) {
      float v[AHEAD];
      Q3N_UNROLL
      for (int i = 0; i < AHEAD; i++) {
        v[i] = 0.0f;
        if (mine && p + i < n && sums[p + i] != 0.0f) v[i] = from[(p + i) * a.rows * a.D];
      }
      Q3N_UNROLL
      for (int i = 0; i < AHEAD; i++) {
        if (p + i >= n) break;
        const float add = sums[p + i];
        if (add == 0.0f) continue;
        total.sum = __fmaf_rn(add, take[p + i], total.sum * keep[p + i]);
        o = __fmaf_rn(v[i], take[p + i], o * keep[p + i]);
      }
    }
    for (int w = 0; w < WARPS; w++)
      if (largest[w] > total.max) total.max = largest[w];
    __syncthreads();
  }
  const int64_t token = row / a.HQ, h = row % a.HQ, b = token / a.T, t = token % a.T;
  float factor = 1.0f;
  if (a.sinks) factor = add_sink(total, a.sinks[h]);
  if (mine) {
    float v = quotient(o, factor, total.sum);
    if (a.gate) v *= sigmoid(a.gate[b * a.gate_b + t * a.gate_t + h * a.gate_h + c]);
    a.o[b * a.o_b + t * a.o_t + h * a.o_h + c] = v;
  }
  if (a.lse && c == 0) a.lse[b * a.lse_b + t * a.lse_t + h] = log_sum(total);
}

q3n_status launch_merge(const merge &a, q3n_stream stream) {
  const int64_t blocks = (a.D + THREADS - 1) / THREADS;
  return Q3N_LAUNCH(merge_rows, (a, blocks), a.rows * blocks, THREADS, 0, stream);
}

/* How a call is run; sizes alone decide, and none of it changes a bit. */
struct plan {
  int row_tiles;            /* tiles of 16 rows a block */
  int64_t tiles, blocks;    /* tiles of a sequence that is not packed; of all sequences and KV heads */
  int64_t segments, rows;   /* of a split */
  bool split;
};

/* Blocks that fill a GPU of 132 multiprocessors twice, and the most that the parts of a split may take. */
constexpr int64_t MANY_BLOCKS = 264, PARTS_BYTES = (int64_t)512 << 20;

plan make_plan(const q3n_attention_args *a, bool may_split) {
  plan x = {};
  if (a->B == 0 || a->T == 0 || a->HQ == 0) return x;
  const int64_t heads = a->HQ / a->HKV, each = a->cu_seqlens ? q3n_ceil_div(a->T, a->B) : a->T;
  x.row_tiles = a->D > 256 ? 2 : each * heads <= 16 ? 1 : 4;
  const int64_t rows = 16 * x.row_tiles;
  x.tiles = q3n_ceil_div(a->T * heads, rows);
  x.blocks = (a->cu_seqlens ? a->T * heads / rows + a->B : a->B * x.tiles) * a->HKV;
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

template <q3n_dtype KV, int MT, int NG>
q3n_status launch_form(const q3n_attention_args *a, const plan &x, const partial &parts, bool k, bool v, bool q,
                       q3n_stream stream) {
  const int64_t rows = 16 * MT, shared = (rows * (a->D + 31) / 32 * 32 + rows * SCORE_ROW + rows * KEYS) * 4;
  return Q3N_LAUNCH((attend<KV, MT, NG>), (*a, parts, x.tiles, k, v, q), x.blocks * (parts.o ? parts.segments : 1), THREADS,
                    shared, stream);
}

template <q3n_dtype KV>
q3n_status launch_type(const q3n_attention_args *a, const plan &x, const partial &parts, q3n_stream stream) {
  constexpr int64_t bytes = KV == Q3N_F32 ? 4 : 2;
  const bool k = KV == Q3N_Q8_0 ? (uintptr_t)a->k % 2 == 0 : aligned(a->k, bytes, a->D, a->k_slot, a->k_s, a->k_h);
  const bool v = KV == Q3N_Q8_0 ? (uintptr_t)a->v % 2 == 0 : aligned(a->v, bytes, a->D, a->v_slot, a->v_s, a->v_h);
  const bool q = aligned(a->q, 4, a->D, a->q_b, a->q_t, a->q_h);
  if (x.row_tiles == 1) return launch_form<KV, 1, 1>(a, x, parts, k, v, q, stream);
  if (x.row_tiles == 2) return launch_form<KV, 2, 2>(a, x, parts, k, v, q, stream);
  return launch_form<KV, 4, 1>(a, x, parts, k, v, q, stream);
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
