/* 16 RT rows of w times 8 MT rows of x on the tensor cores of one warp, for matmul and moe. w lies at any address and
   is staged 256 columns (a slice) at a time through the warp's own shared memory; two slices are on their way at once.

   The order of every sum depends on K alone: part p of q3n_tile_parts(K) is the slices p, p + parts, ..., blocks in
   order within them, and the parts are added in order. So any RT, MT and any place of a row in a tile give the same
   bits. Lanes have y[r][t][i] as mma.cuh says: row 16 r + lane / 4 + i / 2 * 8 of w, row 8 t + lane % 4 * 2 + i % 2
   of x. */
#ifndef Q3N_MATMUL_TILE_CUH
#define Q3N_MATMUL_TILE_CUH

#include "../cuda/mma.cuh"
#include "../quant/quant.cuh"

/* ROLLED: loops over a slice stay loops, for few registers and small instances. */
#if defined(__CUDACC__)
#define Q3N_UNROLL_SLICE _Pragma("unroll ROLLED ? 1 : 16")
#define Q3N_UNROLL_BY_4 _Pragma("unroll 4")
#define Q3N_NOINLINE __noinline__
#else
#define Q3N_UNROLL_SLICE
#define Q3N_UNROLL_BY_4
#define Q3N_NOINLINE
#endif

/* In place of a dtype: any, told when it runs; of block types. */
constexpr int Q3N_TILE_ANY = -1;

constexpr int Q3N_TILE_WARPS = 4; /* of a block */
constexpr int Q3N_TILE_SLICE = 256;

/* Rows of w. Those past `count` are computed from the last one: nobody should store them. */
struct q3n_tile_weights {
  const uint8_t *rows; /* the first one; with r16 the group of 16 that starts with it */
  int64_t row_bytes;   /* from row to row */
  int count;
  q3n_dtype dtype; /* without Q3N_R16 */
  bool r16;
};

template <int DT> Q3N_DEVICE q3n_dtype q3n_tile_dtype(const q3n_tile_weights &w) {
  return DT == Q3N_TILE_ANY ? w.dtype : (q3n_dtype)(DT == Q3N_TILE_ANY ? 0 : DT);
}

static __host__ __device__ __forceinline__ constexpr int64_t q3n_tile_slices(int64_t K) {
  return (K + Q3N_TILE_SLICE - 1) / Q3N_TILE_SLICE;
}

/* Warps that share a sum over K columns: 1, 2 or 4. */
static __host__ __device__ __forceinline__ constexpr int q3n_tile_parts(int64_t K) {
  return q3n_tile_slices(K) >= 4 ? 4 : q3n_tile_slices(K) >= 2 ? 2 : 1;
}

/* Bytes of one row of a slice; words from row to row in shared memory: up to 15 bytes more, and an odd multiple of 16
   bytes, so that eight rows lie in different banks. */
static __host__ __device__ __forceinline__ constexpr int q3n_slice_bytes(q3n_dtype t) {
  return Q3N_TILE_SLICE / q3n_block_columns(t) * q3n_block_bytes(t);
}

static __host__ __device__ __forceinline__ constexpr int q3n_stage_row(int dtype) {
  return dtype == Q3N_F32 || dtype == Q3N_F16 || dtype == Q3N_BF16
             ? 0
             : (q3n_slice_bytes(dtype == Q3N_TILE_ANY ? Q3N_Q8_0 : (q3n_dtype)dtype) + 30) / 16 / 2 * 8 + 4;
}

/* Words of shared memory that a warp needs. Plain types are not staged. */
static __host__ __device__ __forceinline__ constexpr int q3n_tile_words(int dtype, int RT) {
  return 2 * 16 * RT * q3n_stage_row(dtype);
}

/* 16 bytes from `from`, of which those in begin .. end are there; `from` is aligned. */
Q3N_DEVICE void q3n_stage_edge(q3n_shared<uint32_t> to, const uint8_t *from, const uint8_t *begin, const uint8_t *end) {
  for (int i = 0; i < 4; i++) {
    uint32_t word = 0;
    for (int b = 0; b < 4; b++) {
      const uint8_t *p = from + 4 * i + b;
      if (p >= begin && p < end) word |= (uint32_t)*p << 8 * b;
    }
    to[i] = word;
  }
}

/* Starts to bring slice `slice` of the rows, whose first byte lies at the same place in 16 bytes as in memory. */
template <int DT, int RT>
Q3N_DEVICE void q3n_stage(q3n_shared<uint32_t> to, const q3n_tile_weights &w, int64_t K, int64_t slice) {
  constexpr int ROW = q3n_stage_row(DT), CHUNKS = ROW / 4;
  const q3n_dtype t = q3n_tile_dtype<DT>(w);
  const int lane = (int)(threadIdx.x % 32), bytes = q3n_block_bytes(t), columns = q3n_block_columns(t);
  const int64_t left = K - slice * Q3N_TILE_SLICE;
  const int blocks = (int)(left < Q3N_TILE_SLICE ? left : Q3N_TILE_SLICE) / columns;
  if (w.r16) {
    /* interleaved rows are put in order, byte by byte */
    for (int i = lane; i < 16 * RT * ROW; i += 32) {
      const int row = i / ROW, first = i % ROW * 4;
      if (row >= w.count || first >= blocks * bytes) continue;
      const uint8_t *group = w.rows + row / 16 * 16 * w.row_bytes + slice * q3n_slice_bytes(t) * 16;
      uint32_t word = 0;
      for (int b = 0; b < 4 && first + b < blocks * bytes; b++) {
        const int block = (first + b) / bytes, at = (first + b) % bytes;
        word |= (uint32_t)group[block * bytes * 16 + q3n_group_byte(t, at, row % 16)] << 8 * b;
      }
      to[i] = word;
    }
    return;
  }
  for (int i = lane; i < 16 * RT * CHUNKS; i += 32) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    if (row >= w.count) continue;
    const uint8_t *begin = w.rows + row * w.row_bytes + slice * q3n_slice_bytes(t), *end = begin + blocks * bytes;
    const uint8_t *from = begin - (uintptr_t)begin % 16 + 16 * chunk;
    if (from >= end) continue;
    const q3n_shared<uint32_t> there = to + (row * ROW + 4 * chunk);
    if (from >= begin && from + 16 <= end)
      q3n_copy_async16(there, (const uint32_t *)from);
    else
      q3n_stage_edge(there, from, begin, end);
  }
}

/* Row `row` of a staged slice. */
template <int DT>
Q3N_DEVICE q3n_shared_block q3n_staged_row(q3n_shared<uint32_t> stage, const q3n_tile_weights &w, int64_t slice,
                                           int row) {
  const q3n_dtype t = q3n_tile_dtype<DT>(w);
  if (row >= w.count) row = w.count - 1;
  const uint8_t *begin = w.rows + row * w.row_bytes + slice * q3n_slice_bytes(t);
  return {stage + row * q3n_stage_row(DT), w.r16 ? 0 : (int)((uintptr_t)begin % 16)};
}

/* With any dtype these are called, not copied to every place. */
static __device__ Q3N_NOINLINE uint32_t q3n_any_quad(q3n_dtype t, q3n_shared_block b, int j, int in16) {
  return q3n_quad(t, b, j, in16);
}
static __device__ Q3N_NOINLINE int q3n_any_scale(q3n_dtype t, q3n_shared_block b, int j) {
  return q3n_scale16(t, b, j);
}
static __device__ Q3N_NOINLINE int q3n_any_min(q3n_dtype t, q3n_shared_block b, int j) { return q3n_min16(t, b, j); }
static __device__ Q3N_NOINLINE float q3n_any_d(q3n_dtype t, q3n_shared_block b) { return q3n_block_d(t, b); }
static __device__ Q3N_NOINLINE float q3n_any_dmin(q3n_dtype t, q3n_shared_block b) { return q3n_block_dmin(t, b); }

template <int DT> Q3N_DEVICE uint32_t q3n_tile_quad(q3n_dtype t, const q3n_shared_block &b, int j, int in16) {
  return DT == Q3N_TILE_ANY ? q3n_any_quad(t, b, j, in16) : q3n_quad(t, b, j, in16);
}
template <int DT> Q3N_DEVICE int q3n_tile_scale(q3n_dtype t, const q3n_shared_block &b, int j) {
  return DT == Q3N_TILE_ANY ? q3n_any_scale(t, b, j) : q3n_scale16(t, b, j);
}
template <int DT> Q3N_DEVICE int q3n_tile_min(q3n_dtype t, const q3n_shared_block &b, int j) {
  return DT == Q3N_TILE_ANY ? q3n_any_min(t, b, j) : q3n_min16(t, b, j);
}
template <int DT> Q3N_DEVICE float q3n_tile_d(q3n_dtype t, const q3n_shared_block &b) {
  return DT == Q3N_TILE_ANY ? q3n_any_d(t, b) : q3n_block_d(t, b);
}
template <int DT> Q3N_DEVICE float q3n_tile_dmin(q3n_dtype t, const q3n_shared_block &b) {
  return DT == Q3N_TILE_ANY ? q3n_any_dmin(t, b) : q3n_block_dmin(t, b);
}

Q3N_DEVICE q3n_shared_block q3n_next_block(const q3n_shared_block &b, int bytes) { return {b.words, b.first + bytes}; }

/* x = the sum of three bf16, exactly but for subnormals; infinities and NaN are in the first. */
Q3N_DEVICE void q3n_split(float x, float &high, float &middle, float &low) {
  const bool finite = fabsf(x) < __uint_as_float(0x7f800000u);
  high = x != x ? __uint_as_float(0x7fc00000u) : __uint_as_float(__float_as_uint(x) & 0xffff0000u);
  const float rest = finite ? x - high : 0.0f;
  middle = __uint_as_float(__float_as_uint(rest) & 0xffff0000u);
  low = rest - middle;
}

/* The upper halves of two floats. */
Q3N_DEVICE uint32_t q3n_pack_upper(float low, float high) {
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}

/* Four values as two registers in each of three bf16 planes. */
Q3N_DEVICE void q3n_split4(float4 v, uint32_t (&plane)[3][2]) {
  const float x[4] = {v.x, v.y, v.z, v.w};
  float part[3][4];
  Q3N_UNROLL
  for (int i = 0; i < 4; i++) q3n_split(x[i], part[0][i], part[1][i], part[2][i]);
  Q3N_UNROLL
  for (int p = 0; p < 3; p++) {
    plane[p][0] = q3n_pack_upper(part[p][0], part[p][1]);
    plane[p][1] = q3n_pack_upper(part[p][2], part[p][3]);
  }
}

/* Four signed bytes as bf16: 2^23 + 128 + q is a float that holds it in its lowest byte. */
Q3N_DEVICE void q3n_bytes_bf16(uint32_t q, uint32_t &low, uint32_t &high) {
  const uint32_t moved = q ^ 0x80808080u;
  float x[4];
  Q3N_UNROLL
  for (unsigned i = 0; i < 4; i++) x[i] = __uint_as_float(__byte_perm(moved, 0x4b000000u, 0x7440u + i)) - 8388736.0f;
  low = q3n_pack_upper(x[0], x[1]);
  high = q3n_pack_upper(x[2], x[3]);
}

/* Columns i .. i + 3 of a row of x of K, NULL for none; those past K are 0. */
Q3N_DEVICE float4 q3n_tile_x4(const uint8_t *row, int64_t i, int64_t K) {
  const float *x = (const float *)row + i;
  if (!row || i >= K) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (i + 4 <= K && (uintptr_t)x % 16 == 0) return q3n_load<float4>(x);
  return make_float4(x[0], i + 1 < K ? x[1] : 0.0f, i + 2 < K ? x[2] : 0.0f, i + 3 < K ? x[3] : 0.0f);
}

/* Both kinds of 8-bit activations have 320 bytes for a slice. */
constexpr int Q3N_TILE_X_BYTES = Q3N_Q8_X256_BYTES;
static_assert(Q3N_TILE_SLICE / 32 * Q3N_Q8_X32_BYTES == Q3N_TILE_X_BYTES, "");

/* A slice of rows of x where they lie. Bytes, or columns, count from its start. */
template <class X> struct q3n_x_direct {
  const X &x;
  int64_t slice, K;
  __device__ __forceinline__ uint32_t word(int j, int at) const {
    const uint8_t *row = x(j);
    return row ? q3n_load<uint32_t>(row + slice * Q3N_TILE_X_BYTES + at) : 0;
  }
  __device__ __forceinline__ void planes(int j, int column, uint32_t (&plane)[3][2]) const {
    q3n_split4(q3n_tile_x4(x(j), slice * Q3N_TILE_SLICE + column, K), plane);
  }
};

/* The same in shared memory: rows of 84 words of 8-bit activations, or of 136 words of every bf16 plane, so that eight
   rows lie in different banks. */
constexpr int Q3N_STAGED_X8 = 84, Q3N_STAGED_PLANE = 136;

template <int MT> struct q3n_x_staged {
  q3n_shared<uint32_t> words;
  __device__ __forceinline__ uint32_t word(int j, int at) const {
    const uint32_t w = words[j * Q3N_STAGED_X8 + at / 4];
    return w;
  }
  __device__ __forceinline__ void planes(int j, int column, uint32_t (&plane)[3][2]) const {
    Q3N_UNROLL
    for (int p = 0; p < 3; p++) {
      const uint2 both = q3n_load<uint2>(words + ((p * 8 * MT + j) * Q3N_STAGED_PLANE + column / 2));
      plane[p][0] = both.x, plane[p][1] = both.y;
    }
  }
};

/* y += for one slice of super-blocks and 8-bit activations: integers over the block, then (d S - dmin M) d_x, of which
   d S is not rounded: what cancels in w cancels here. */
template <int DT, int RT, int MT, class S>
Q3N_DEVICE void q3n_slice_x256(float (&y)[RT][MT][4], q3n_shared<uint32_t> stage, const q3n_tile_weights &w, const S &x,
                               int64_t slice) {
  constexpr bool ROLLED = DT == Q3N_TILE_ANY;
  const q3n_dtype t = q3n_tile_dtype<DT>(w);
  const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4;
  const bool by16 = q3n_scale_columns(t) == 16;
  q3n_shared_block b[RT][2];
  uint32_t s[RT][2][4], m[RT][2][4];
  Q3N_UNROLL
  for (int r = 0; r < RT; r++) {
    Q3N_UNROLL
    for (int half = 0; half < 2; half++) {
      b[r][half] = q3n_staged_row<DT>(stage, w, slice, 16 * r + group + 8 * half);
      if (!ROLLED) q3n_scales(t, b[r][half], s[r][half], m[r][half]);
    }
  }

  int sum[RT][MT][4];
  Q3N_UNROLL
  for (int r = 0; r < RT; r++) {
    Q3N_UNROLL
    for (int c = 0; c < MT * 4; c++) sum[r][c / 4][c % 4] = 0;
  }
  Q3N_UNROLL_SLICE
  for (int j = 0; j < 8; j++) {
    uint32_t a[RT][4];
    int scale[RT][2][2];
    Q3N_UNROLL
    for (int r = 0; r < RT; r++) {
      Q3N_UNROLL
      for (int i = 0; i < 4; i++) {
        a[r][i] = q3n_tile_quad<DT>(t, b[r][i % 2], 2 * j + i / 2, 4 * member);
        scale[r][i % 2][i / 2] = ROLLED ? q3n_tile_scale<DT>(t, b[r][i % 2], 2 * j + i / 2)
                                 : by16             ? q3n_signed_byte(s[r][i % 2][j / 2], j % 2 * 2 + i / 2)
                                                    : q3n_signed_byte(s[r][i % 2][j / 4], j % 4);
      }
    }
    Q3N_UNROLL
    for (int n = 0; n < MT; n++) {
      const uint32_t q[2] = {x.word(8 * n + group, 32 * j + 4 * member),
                             x.word(8 * n + group, 32 * j + 16 + 4 * member)};
      const int zero[4] = {0, 0, 0, 0};
      int c[4];
      Q3N_UNROLL
      for (int r = 0; r < RT; r++) {
        if (by16) {
          Q3N_UNROLL
          for (int k = 0; k < 2; k++) {
            const uint32_t a16[2] = {a[r][2 * k], a[r][2 * k + 1]}, q16[1] = {q[k]};
            q3n_mma_s8(c, a16, q16, zero);
            Q3N_UNROLL
            for (int i = 0; i < 4; i++) sum[r][n][i] += scale[r][i / 2][k] * c[i];
          }
        } else {
          q3n_mma_s8(c, a[r], q, zero);
          Q3N_UNROLL
          for (int i = 0; i < 4; i++) sum[r][n][i] += scale[r][i / 2][0] * c[i];
        }
      }
    }
  }

  Q3N_UNROLL
  for (int n = 0; n < MT; n++) {
    Q3N_UNROLL
    for (int k = 0; k < 2; k++) {
      const int row = 8 * n + 2 * member + k;
      const float d = __uint_as_float(x.word(row, Q3N_Q8_X256_D));
      int low[RT][2];
      Q3N_UNROLL
      for (int r = 0; r < RT; r++) low[r][0] = low[r][1] = 0;
      Q3N_UNROLL_SLICE
      for (int i = 0; i < (by16 ? 16 : 8) && q3n_has_min(t); i += 2) {
        /* two sums, of j and j + 2 */
        const uint32_t pair = x.word(row, (by16 ? Q3N_Q8_X256_SUM16 : Q3N_Q8_X256_SUM32) + 2 * i);
        const int first = (int)(int16_t)pair, second = (int)(int16_t)(pair >> 16);
        const int j = i % 4 ? i - 1 : i, step = by16 ? 1 : 2;
        Q3N_UNROLL
        for (int r = 0; r < RT; r++) {
          Q3N_UNROLL
          for (int half = 0; half < 2; half++)
            low[r][half] += ROLLED ? q3n_tile_min<DT>(t, b[r][half], step * j) * first +
                                         q3n_tile_min<DT>(t, b[r][half], step * (j + 2)) * second
                                   : q3n_signed_byte(m[r][half][j / 4], j % 4) * first +
                                         q3n_signed_byte(m[r][half][j / 4], j % 4 + 2) * second;
        }
      }
      Q3N_UNROLL
      for (int r = 0; r < RT; r++) {
        Q3N_UNROLL
        for (int half = 0; half < 2; half++) {
          float &to = y[r][n][2 * half + k];
          const float whole = (float)sum[r][n][2 * half + k], scale = q3n_tile_d<DT>(t, b[r][half]);
          if (q3n_has_min(t)) {
            const float minima = q3n_tile_dmin<DT>(t, b[r][half]) * (float)low[r][half];
            to = __fmaf_rn(__fmaf_rn(whole, scale, -minima), d, to);
          } else {
            to = __fmaf_rn(whole, scale * d, to);
          }
        }
      }
    }
  }
}

/* The same of blocks of 32, `blocks` of them. */
template <int DT, int RT, int MT, class S>
Q3N_DEVICE void q3n_slice_x32(float (&y)[RT][MT][4], q3n_shared<uint32_t> stage, const q3n_tile_weights &w, const S &x,
                              int64_t slice, int blocks) {
  const q3n_dtype t = q3n_tile_dtype<DT>(w);
  const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4;
  q3n_shared_block b[RT][2];
  Q3N_UNROLL
  for (int r = 0; r < RT; r++) {
    b[r][0] = q3n_staged_row<DT>(stage, w, slice, 16 * r + group);
    b[r][1] = q3n_staged_row<DT>(stage, w, slice, 16 * r + group + 8);
  }
  for (int j = 0; j < blocks; j++) {
    const int at = j * Q3N_Q8_X32_BYTES;
    uint32_t a[RT][4];
    float d[RT][2], m[RT][2];
    Q3N_UNROLL
    for (int r = 0; r < RT; r++) {
      Q3N_UNROLL
      for (int i = 0; i < 4; i++) a[r][i] = q3n_tile_quad<DT>(t, b[r][i % 2], i / 2, 4 * member);
      Q3N_UNROLL
      for (int half = 0; half < 2; half++) {
        d[r][half] = q3n_tile_d<DT>(t, b[r][half]), m[r][half] = q3n_tile_dmin<DT>(t, b[r][half]);
        b[r][half] = q3n_next_block(b[r][half], q3n_block_bytes(t));
      }
    }
    Q3N_UNROLL
    for (int n = 0; n < MT; n++) {
      const uint32_t q[2] = {x.word(8 * n + group, at + Q3N_Q8_X32_Q + 4 * member),
                             x.word(8 * n + group, at + Q3N_Q8_X32_Q + 16 + 4 * member)};
      float dx[2];
      int sum[2];
      Q3N_UNROLL
      for (int k = 0; k < 2; k++) {
        dx[k] = __uint_as_float(x.word(8 * n + 2 * member + k, at));
        sum[k] = q3n_has_min(t) ? (int)x.word(8 * n + 2 * member + k, at + Q3N_Q8_X32_SUM) : 0;
      }
      const int zero[4] = {0, 0, 0, 0};
      int c[4];
      Q3N_UNROLL
      for (int r = 0; r < RT; r++) {
        q3n_mma_s8(c, a[r], q, zero);
        Q3N_UNROLL
        for (int i = 0; i < 4; i++) {
          float &to = y[r][n][i];
          const float whole = (float)c[i], scale = d[r][i / 2];
          if (q3n_has_min(t))
            to = __fmaf_rn(__fmaf_rn(whole, scale, -(m[r][i / 2] * (float)sum[i % 2])), dx[i % 2], to);
          else
            to = __fmaf_rn(whole, scale * dx[i % 2], to);
        }
      }
    }
  }
}

/* Block types and f32 activations: integers of w times three bf16 that x is the sum of, then scale and minimum, rounded
   as in decoding. */
template <int DT, int RT, int MT, class S>
Q3N_DEVICE void q3n_slice_f32(float (&y)[RT][MT][4], q3n_shared<uint32_t> stage, const q3n_tile_weights &w, const S &x,
                              int64_t slice, int columns) {
  constexpr bool ROLLED = DT == Q3N_TILE_ANY || MT > 1;
  const q3n_dtype t = q3n_tile_dtype<DT>(w);
  const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4;
  const bool super = q3n_block_columns(t) == 256;
  const int chunks = q3n_scale_columns(t) / 16; /* of 16 columns, with one scale */
  const uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
  q3n_shared_block b[RT][2];
  uint32_t s[RT][2][4], m[RT][2][4];
  Q3N_UNROLL
  for (int r = 0; r < RT; r++) {
    Q3N_UNROLL
    for (int half = 0; half < 2; half++) {
      b[r][half] = q3n_staged_row<DT>(stage, w, slice, 16 * r + group + 8 * half);
      if (super && !ROLLED) q3n_scales(t, b[r][half], s[r][half], m[r][half]);
    }
  }
  Q3N_UNROLL_SLICE
  for (int j = 0; j < Q3N_TILE_SLICE; j += 16 * chunks) {
    if (!super && j >= columns) break;
    uint32_t a[RT][2][4];
    float scale[RT][2], min[RT][2];
    Q3N_UNROLL
    for (int r = 0; r < RT; r++) {
      Q3N_UNROLL
      for (int half = 0; half < 2; half++) {
        const q3n_shared_block &here = b[r][half];
        Q3N_UNROLL
        for (int k = 0; k < 2; k++)
          if (k < chunks)
            q3n_bytes_bf16(q3n_tile_quad<DT>(t, here, super ? j / 16 + k : k, 4 * member), a[r][k][half],
                           a[r][k][2 + half]);
        const int i = j / (16 * chunks);
        scale[r][half] = q3n_tile_d<DT>(t, here), min[r][half] = q3n_tile_dmin<DT>(t, here);
        if (super)
          scale[r][half] *= (float)(ROLLED ? q3n_tile_scale<DT>(t, here, j / 16)
                                                       : q3n_signed_byte(s[r][half][i / 4], i % 4));
        if (super && q3n_has_min(t))
          min[r][half] *= (float)(ROLLED ? q3n_tile_min<DT>(t, here, j / 16)
                                                     : q3n_signed_byte(m[r][half][i / 4], i % 4));
        if (!super) b[r][half] = q3n_next_block(here, q3n_block_bytes(t));
      }
    }
    Q3N_UNROLL
    for (int n = 0; n < MT; n++) {
      uint32_t q[2][3][2];
      Q3N_UNROLL
      for (int k = 0; k < 2; k++)
        if (k < chunks) x.planes(8 * n + group, j + 16 * k + 4 * member, q[k]);
      float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      Q3N_UNROLL
      for (int p = 2; p >= 0 && q3n_has_min(t); p--) {
        Q3N_UNROLL
        for (int k = 0; k < 2; k++)
          if (k < chunks) q3n_mma_bf16(total, ones, q[k][p], total);
      }
      Q3N_UNROLL
      for (int r = 0; r < RT; r++) {
        float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        Q3N_UNROLL
        for (int p = 2; p >= 0; p--) {
          Q3N_UNROLL
          for (int k = 0; k < 2; k++)
            if (k < chunks) q3n_mma_bf16(c, a[r][k], q[k][p], c);
        }
        Q3N_UNROLL
        for (int i = 0; i < 4; i++) {
          float value = scale[r][i / 2] * c[i];
          if (q3n_has_min(t)) value -= min[r][i / 2] * total[i];
          y[r][n][i] += value;
        }
      }
    }
  }
}

/* Four values of a plain type as they lie, and as bf16: one (bf16), two (f16) or three (f32) planes. */
template <int DT> struct q3n_plain4 {
  static constexpr int PLANES = DT == Q3N_BF16 ? 1 : DT == Q3N_F16 ? 2 : 3;
  uint32_t raw[DT == Q3N_F32 ? 4 : 2];

  /* Aligned to all four. */
  __device__ __forceinline__ void load(const uint8_t *p) {
    if constexpr (DT == Q3N_F32) {
      const uint4 v = q3n_load<uint4>(p);
      raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
    } else {
      const uint2 v = q3n_load<uint2>(p);
      raw[0] = v.x, raw[1] = v.y;
    }
  }
  /* At any address; those past N are 0. */
  __device__ __forceinline__ void gather(const uint8_t *row, int64_t i, int64_t N) {
    constexpr int SIZE = DT == Q3N_F32 ? 4 : 2;
    uint32_t x[4];
    Q3N_UNROLL
    for (int c = 0; c < 4; c++)
      x[c] = i + c >= N ? 0 : SIZE == 4 ? q3n_word_at(row + SIZE * (i + c)) : q3n_half_at(row + SIZE * (i + c));
    if constexpr (SIZE == 4)
      raw[0] = x[0], raw[1] = x[1], raw[2] = x[2], raw[3] = x[3];
    else
      raw[0] = x[0] | x[1] << 16, raw[1] = x[2] | x[3] << 16;
  }
  /* Registers `half` and 2 + half of A. */
  __device__ __forceinline__ void planes(uint32_t (&a)[PLANES][4], int half) const {
    if constexpr (DT == Q3N_BF16) {
      a[0][half] = raw[0], a[0][2 + half] = raw[1];
    } else {
      float4 v;
      if constexpr (DT == Q3N_F32)
        v = make_float4(__uint_as_float(raw[0]), __uint_as_float(raw[1]), __uint_as_float(raw[2]),
                        __uint_as_float(raw[3]));
      else
        v = make_float4(q3n_half_float(raw[0] & 0xffffu), q3n_half_float(raw[0] >> 16),
                        q3n_half_float(raw[1] & 0xffffu), q3n_half_float(raw[1] >> 16));
      uint32_t plane[3][2];
      q3n_split4(v, plane);
      Q3N_UNROLL
      for (int p = 0; p < PLANES; p++) a[p][half] = plane[p][0], a[p][2 + half] = plane[p][1];
    }
  }
};

/* Plain types, straight from global memory: 64 columns of all rows are on their way together. */
template <int DT, int RT, int MT, class S>
Q3N_DEVICE void q3n_slice_plain(float (&y)[RT][MT][4], const q3n_tile_weights &w, const S &x, int64_t slice,
                                int64_t K) {
  constexpr int SIZE = DT == Q3N_F32 ? 4 : 2, PLANES = q3n_plain4<DT>::PLANES, AHEAD = 4;
  const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4;
  const int64_t first = slice * Q3N_TILE_SLICE;
  const int columns = (int)(K - first < Q3N_TILE_SLICE ? K - first : Q3N_TILE_SLICE);
  const bool aligned = ((uintptr_t)w.rows | (uintptr_t)w.row_bytes) % (4 * SIZE) == 0;
  for (int j = 0; j < columns; j += 16 * AHEAD) {
    q3n_plain4<DT> ahead[AHEAD][RT][2];
    const bool vectors = aligned && j + 16 * AHEAD <= columns;
    Q3N_UNROLL
    for (int i = 0; i < AHEAD * RT * 2; i++) {
      const int chunk = i / (RT * 2), r = i / 2 % RT, half = i % 2;
      int row = 16 * r + group + 8 * half;
      if (row >= w.count) row = w.count - 1;
      const uint8_t *from = w.rows + row * w.row_bytes;
      const int64_t column = first + j + 16 * chunk + 4 * member;
      if (vectors)
        ahead[chunk][r][half].load(from + column * SIZE);
      else
        ahead[chunk][r][half].gather(from, column, K);
    }
    Q3N_UNROLL
    for (int chunk = 0; chunk < AHEAD; chunk++) {
      if (j + 16 * chunk >= columns) break;
      uint32_t a[RT][PLANES][4];
      Q3N_UNROLL
      for (int r = 0; r < RT; r++) {
        ahead[chunk][r][0].planes(a[r], 0);
        ahead[chunk][r][1].planes(a[r], 1);
      }
      Q3N_UNROLL
      for (int n = 0; n < MT; n++) {
        uint32_t q[3][2];
        x.planes(8 * n + group, j + 16 * chunk + 4 * member, q);
        /* the smallest products first */
        Q3N_UNROLL
        for (int p = PLANES + 1; p >= 0; p--) {
          Q3N_UNROLL
          for (int k = 0; k < PLANES; k++) {
            if (p - k < 0 || p - k > 2) continue;
            Q3N_UNROLL
            for (int r = 0; r < RT; r++) q3n_mma_bf16(y[r][n], a[r][k], q[p - k], y[r][n]);
          }
        }
      }
    }
  }
}

/* y += slice `slice` of a warp's rows. */
template <int DT, bool Q8, int RT, int MT, class S>
Q3N_DEVICE void q3n_slice(float (&y)[RT][MT][4], q3n_shared<uint32_t> stage, const q3n_tile_weights &w, const S &x,
                          int64_t slice, int64_t K) {
  const int64_t left = K - slice * Q3N_TILE_SLICE;
  const int columns = (int)(left < Q3N_TILE_SLICE ? left : Q3N_TILE_SLICE);
  if constexpr (q3n_stage_row(DT) == 0)
    q3n_slice_plain<DT, RT, MT>(y, w, x, slice, K);
  else if constexpr (!Q8)
    q3n_slice_f32<DT, RT, MT>(y, stage, w, x, slice, columns);
  else if (q3n_block_columns(q3n_tile_dtype<DT>(w)) == 256)
    q3n_slice_x256<DT, RT, MT>(y, stage, w, x, slice);
  else
    q3n_slice_x32<DT, RT, MT>(y, stage, w, x, slice, columns / 32);
}

template <int RT, int MT> Q3N_DEVICE void q3n_tile_zero(float (&y)[RT][MT][4]) {
  Q3N_UNROLL
  for (int i = 0; i < RT * MT * 4; i++) y[i / (MT * 4)][i / 4 % MT][i % 4] = 0.0f;
}

/* For few rows of x: the sums of part `part`, by one warp. x(j) is row j of x, NULL for none; `words` is the warp's
   q3n_tile_words of shared memory. */
template <int DT, bool Q8, int RT, int MT, class X>
Q3N_DEVICE void q3n_tile_part(float (&y)[RT][MT][4], q3n_shared<uint32_t> words, const q3n_tile_weights &w, const X &x,
                              int64_t K, int part) {
  constexpr bool STAGED = q3n_stage_row(DT) > 0;
  constexpr int STAGE = q3n_tile_words(DT, RT) / 2;
  q3n_tile_zero(y);
  const int64_t parts = q3n_tile_parts(K), slices = q3n_tile_slices(K);
  int buffer = 0;
  if constexpr (STAGED)
    if (part < slices) q3n_stage<DT, RT>(words, w, K, part);
  q3n_copy_commit();
  for (int64_t slice = part; slice < slices; slice += parts) {
    if constexpr (STAGED)
      if (slice + parts < slices) q3n_stage<DT, RT>(words + (buffer ^ 1) * STAGE, w, K, slice + parts);
    q3n_copy_commit();
    q3n_copy_wait<1>();
    __syncwarp();
    q3n_slice<DT, Q8, RT, MT>(y, words + buffer * STAGE, w, q3n_x_direct<X>{x, slice, K}, slice, K);
    __syncwarp();
    buffer ^= 1;
  }
}

/* Floats of shared memory of a block for q3n_tile_sum and q3n_tile_block. */
static __host__ __device__ __forceinline__ constexpr int q3n_tile_sum_floats(int RT, int MT) {
  return Q3N_TILE_WARPS * RT * MT * 4 * 32;
}

/* Adds the parts of `parts` neighbouring warps; the one with part 0 has the result. All threads of the block. */
template <int RT, int MT>
Q3N_DEVICE void q3n_tile_sum(float (&y)[RT][MT][4], q3n_shared<float> floats, int part, int parts) {
  constexpr int COUNT = RT * MT * 4;
  if (parts == 1) return;
  const int lane = (int)(threadIdx.x % 32), warp = (int)(threadIdx.x / 32);
  __syncthreads();
  Q3N_UNROLL
  for (int i = 0; i < COUNT; i++)
    if (part > 0) floats[(warp * COUNT + i) * 32 + lane] = y[i / (MT * 4)][i / 4 % MT][i % 4];
  __syncthreads();
  if (part > 0) return;
  for (int p = 1; p < parts; p++) {
    Q3N_UNROLL
    for (int i = 0; i < COUNT; i++) y[i / (MT * 4)][i / 4 % MT][i % 4] += floats[((warp + p) * COUNT + i) * 32 + lane];
  }
}

/* A row of w times a row of f32 x, one product after the other; with `in_group` >= 0 it is that row of the group at w.
   For what came out infinite or NaN of the planes, where infinity times 0 appears, or of a sum of integers times x that
   is past the largest float before its scale. */
static __device__ Q3N_NOINLINE float q3n_tile_plain(q3n_dtype t, const uint8_t *w, int in_group, const float *x,
                                                    int64_t K) {
  const int columns = q3n_block_columns(t), bytes = q3n_block_bytes(t);
  float sum = 0.0f;
  for (int64_t k = 0; k < K; k += 4) {
    const float4 v = in_group < 0 ? q3n_row_values4(t, w, k, K)
                                  : q3n_values4(t, q3n_group_block{w + k / columns * bytes * 16, t, in_group},
                                                (int)(k % columns));
    sum = __fmaf_rn(v.x, x[k], sum);
    if (k + 1 < K) sum = __fmaf_rn(v.y, x[k + 1], sum);
    if (k + 2 < K) sum = __fmaf_rn(v.z, x[k + 2], sum);
    if (k + 3 < K) sum = __fmaf_rn(v.w, x[k + 3], sum);
  }
  return sum;
}

/* y, or where it is not finite and x is f32, what q3n_tile_plain makes of row `row` of w and `x`. */
template <bool Q8>
Q3N_DEVICE float q3n_tile_checked(float y, const q3n_tile_weights &w, int row, const uint8_t *x, int64_t K) {
  if (Q8 || fabsf(y) < __uint_as_float(0x7f800000u)) return y;
  return q3n_tile_plain(w.dtype, w.rows + (w.r16 ? row / 16 * 16 : row) * w.row_bytes, w.r16 ? row % 16 : -1,
                        (const float *)x, K);
}

/* Words of shared memory of a block for q3n_tile_block: two slices of 8-bit x or one of bf16 planes, then the warps'
   own. */
static __host__ __device__ __forceinline__ constexpr int q3n_block_x_words(bool Q8, int MT) {
  return 8 * MT * (Q8 ? 2 * Q3N_STAGED_X8 : 3 * Q3N_STAGED_PLANE);
}

static __host__ __device__ __forceinline__ constexpr int q3n_block_words(int dtype, bool Q8, int RT, int MT) {
  return q3n_block_x_words(Q8, MT) + Q3N_TILE_WARPS * q3n_tile_words(dtype, RT);
}

/* A slice of 8-bit x to shared memory, by all threads; rows that are not there become 0. */
template <int MT, class X>
Q3N_DEVICE void q3n_stage_x8(q3n_shared<uint32_t> to, const X &x, int64_t slice, int bytes) {
  constexpr int CHUNKS = Q3N_TILE_X_BYTES / 16;
  for (int i = (int)threadIdx.x; i < 8 * MT * CHUNKS; i += 32 * Q3N_TILE_WARPS) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    if (16 * chunk >= bytes) continue;
    const uint8_t *from = x(row);
    if (from) from += slice * Q3N_TILE_X_BYTES + 16 * chunk;
    const q3n_shared<uint32_t> there = to + (row * Q3N_STAGED_X8 + 4 * chunk);
    if (from && (uintptr_t)from % 16 == 0 && 16 * chunk + 16 <= bytes) {
      q3n_copy_async16(there, (const uint32_t *)from);
    } else {
      for (int k = 0; k < 4; k++)
        if (16 * chunk + 4 * k < bytes) there[k] = from ? q3n_load<uint32_t>(from + 4 * k) : 0u;
    }
  }
}

/* A slice of f32 x as bf16 planes. */
template <int MT, class X>
Q3N_DEVICE void q3n_stage_planes(q3n_shared<uint32_t> to, const X &x, int64_t slice, int64_t K) {
  constexpr int QUADS = Q3N_TILE_SLICE / 4;
  Q3N_UNROLL_BY_4
  for (int i = (int)threadIdx.x; i < 8 * MT * QUADS; i += 32 * Q3N_TILE_WARPS) {
    const int row = i / QUADS, column = i % QUADS * 4;
    uint32_t plane[3][2];
    q3n_split4(q3n_tile_x4(x(row), slice * Q3N_TILE_SLICE + column, K), plane);
    Q3N_UNROLL
    for (int p = 0; p < 3; p++)
      q3n_store(to + ((p * 8 * MT + row) * Q3N_STAGED_PLANE + column / 2), make_uint2(plane[p][0], plane[p][1]));
  }
}

/* For many rows of x: every warp has rows of w of its own (count 0: none) and all of K, the block has one tile of x in
   shared memory. The parts come one after the other, so the sums are those of q3n_tile_part and q3n_tile_sum. All
   threads of the block. */
template <int DT, bool Q8, int RT, int MT, class X>
Q3N_DEVICE void q3n_tile_block(float (&y)[RT][MT][4], q3n_shared<uint32_t> words, q3n_shared<float> floats,
                               const q3n_tile_weights &w, const X &x, int64_t K) {
  constexpr bool STAGED = q3n_stage_row(DT) > 0;
  constexpr int STAGE = q3n_tile_words(DT, RT) / 2, COUNT = RT * MT * 4;
  const int lane = (int)(threadIdx.x % 32), warp = (int)(threadIdx.x / 32);
  const int64_t parts = q3n_tile_parts(K), slices = q3n_tile_slices(K);
  const q3n_shared<uint32_t> mine = words + (q3n_block_x_words(Q8, MT) + warp * 2 * STAGE);
  const q3n_shared<float> total = floats + (warp * COUNT * 32 + lane);
  const int block = STAGED ? q3n_block_columns(q3n_tile_dtype<DT>(w)) : 1;
  const auto fetch = [&](int64_t slice, int buffer) {
    if constexpr (STAGED)
      if (w.count > 0) q3n_stage<DT, RT>(mine + buffer * STAGE, w, K, slice);
    const int64_t left = K - slice * Q3N_TILE_SLICE;
    const int bytes = left >= Q3N_TILE_SLICE || block == 256 ? Q3N_TILE_X_BYTES : (int)left / 32 * Q3N_Q8_X32_BYTES;
    if (Q8) q3n_stage_x8<MT>(words + buffer * 8 * MT * Q3N_STAGED_X8, x, slice, bytes);
  };
  q3n_tile_zero(y);
  int buffer = 0;
  int64_t slice = 0;
  if (slices > 0) fetch(0, 0);
  q3n_copy_commit();
  for (int64_t i = 0; i < slices; i++) {
    const bool last = slice + parts >= slices; /* of its part */
    const int64_t next = last ? slice % parts + 1 : slice + parts;
    if (i + 1 < slices) fetch(next, buffer ^ 1);
    q3n_copy_commit();
    if (!Q8) q3n_stage_planes<MT>(words, x, slice, K);
    q3n_copy_wait<1>();
    __syncthreads();
    const q3n_x_staged<MT> staged = {words + (Q8 ? buffer * 8 * MT * Q3N_STAGED_X8 : 0)};
    if (w.count > 0) q3n_slice<DT, Q8, RT, MT>(y, mine + buffer * STAGE, w, staged, slice, K);
    if (last && i + 1 < slices) {
      Q3N_UNROLL
      for (int c = 0; c < COUNT; c++) {
        const float part = y[c / (MT * 4)][c / 4 % MT][c % 4];
        total[c * 32] = slice % parts == 0 ? part : total[c * 32] + part;
      }
      q3n_tile_zero(y);
    }
    __syncthreads();
    buffer ^= 1;
    slice = next;
  }
  if (parts == 1) return;
  Q3N_UNROLL
  for (int c = 0; c < COUNT; c++) {
    float &to = y[c / (MT * 4)][c / 4 % MT][c % 4];
    to = total[c * 32] + to;
  }
}

#endif
