/* 16 RT rows of w times 8 MT rows of x on the tensor cores of one warp, for matmul and moe. w lies at any address and is
   staged 256 columns (a slice) at a time through the warp's own shared memory; two slices are on their way at once.

   The order of every sum depends on K alone: warp `part` of q3n_tile_parts(K) takes slices part, part + parts, ..., blocks
   in order within them, and q3n_tile_sum adds the parts in order. So any RT, MT and any place of a row in a tile give the
   same bits. Lanes have y[r][t][i] as mma.cuh says: row 16 r + lane / 4 + i / 2 * 8 of w, row 8 t + lane % 4 * 2 + i % 2
   of x. */
#ifndef Q3N_MATMUL_TILE_CUH
#define Q3N_MATMUL_TILE_CUH

#include "../cuda/mma.cuh"
#include "../quant/quant.cuh"

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
Q3N_DEVICE q3n_shared_block q3n_staged_row(q3n_shared<uint32_t> stage, const q3n_tile_weights &w, int64_t slice, int row) {
  const q3n_dtype t = q3n_tile_dtype<DT>(w);
  if (row >= w.count) row = w.count - 1;
  const uint8_t *begin = w.rows + row * w.row_bytes + slice * q3n_slice_bytes(t);
  return {stage + row * q3n_stage_row(DT), w.r16 ? 0 : (int)((uintptr_t)begin % 16)};
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
  for (int i = 0; i < 4; i++) x[i] = __uint_as_float(__byte_perm(moved, 0x4b000000u, 0x7440u + (unsigned)i)) - 8388736.0f;
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

/* A word of a row of 8-bit activations. */
Q3N_DEVICE uint32_t q3n_tile_word(const uint8_t *row, int64_t at) { return row ? q3n_load<uint32_t>(row + at) : 0; }
Q3N_DEVICE float q3n_tile_float(const uint8_t *row, int64_t at) { return row ? q3n_load<float>(row + at) : 0.0f; }

/* y += for one slice of super-blocks and 8-bit activations: integers over the block, then d_w d_x. */
template <int DT, int RT, int MT, class X>
Q3N_DEVICE void q3n_slice_x256(float (&y)[RT][MT][4], q3n_shared<uint32_t> stage, const q3n_tile_weights &w, const X &x,
                               int64_t slice) {
  const q3n_dtype t = q3n_tile_dtype<DT>(w);
  const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4;
  const int64_t at = slice * Q3N_Q8_X256_BYTES;
  const bool by16 = q3n_scale_columns(t) == 16;
  q3n_shared_block b[RT][2];
  uint32_t s[RT][2][4], m[RT][2][4];
  Q3N_UNROLL
  for (int r = 0; r < RT; r++) {
    Q3N_UNROLL
    for (int half = 0; half < 2; half++) {
      b[r][half] = q3n_staged_row<DT>(stage, w, slice, 16 * r + group + 8 * half);
      q3n_scales(t, b[r][half], s[r][half], m[r][half]);
    }
  }

  int sum[RT][MT][4];
  Q3N_UNROLL
  for (int r = 0; r < RT; r++) {
    Q3N_UNROLL
    for (int c = 0; c < MT * 4; c++) sum[r][c / 4][c % 4] = 0;
  }
  Q3N_UNROLL
  for (int j = 0; j < 8; j++) {
    uint32_t a[RT][4];
    Q3N_UNROLL
    for (int r = 0; r < RT; r++) {
      Q3N_UNROLL
      for (int i = 0; i < 4; i++) a[r][i] = q3n_quad(t, b[r][i % 2], 2 * j + i / 2, 4 * member);
    }
    Q3N_UNROLL
    for (int n = 0; n < MT; n++) {
      const uint8_t *row = x(8 * n + group);
      const uint32_t q[2] = {q3n_tile_word(row, at + 32 * j + 4 * member),
                             q3n_tile_word(row, at + 32 * j + 16 + 4 * member)};
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
            for (int i = 0; i < 4; i++) sum[r][n][i] += q3n_signed_byte(s[r][i / 2][j / 2], j % 2 * 2 + k) * c[i];
          }
        } else {
          q3n_mma_s8(c, a[r], q, zero);
          Q3N_UNROLL
          for (int i = 0; i < 4; i++) sum[r][n][i] += q3n_signed_byte(s[r][i / 2][j / 4], j % 4) * c[i];
        }
      }
    }
  }

  Q3N_UNROLL
  for (int n = 0; n < MT; n++) {
    Q3N_UNROLL
    for (int k = 0; k < 2; k++) {
      const uint8_t *row = x(8 * n + 2 * member + k);
      const float d = q3n_tile_float(row, at + Q3N_Q8_X256_D);
      Q3N_UNROLL
      for (int r = 0; r < RT; r++) {
        Q3N_UNROLL
        for (int half = 0; half < 2; half++) {
          float &to = y[r][n][2 * half + k];
          to = __fmaf_rn((float)sum[r][n][2 * half + k], q3n_block_d(t, b[r][half]) * d, to);
        }
      }
      if (!q3n_has_min(t)) continue;
      int low[RT][2];
      Q3N_UNROLL
      for (int r = 0; r < RT; r++) low[r][0] = low[r][1] = 0;
      Q3N_UNROLL
      for (int i = 0; i < (by16 ? 16 : 8); i += 2) {
        /* two sums, of i and i + 2 or of i - 1 and i + 1 */
        const uint32_t pair = q3n_tile_word(row, at + (by16 ? Q3N_Q8_X256_SUM16 : Q3N_Q8_X256_SUM32) + 2 * i);
        const int first = (int)(int16_t)pair, second = (int)(int16_t)(pair >> 16);
        const int j = i % 4 ? i - 1 : i;
        Q3N_UNROLL
        for (int r = 0; r < RT; r++) {
          Q3N_UNROLL
          for (int half = 0; half < 2; half++)
            low[r][half] += q3n_signed_byte(m[r][half][j / 4], j % 4) * first +
                            q3n_signed_byte(m[r][half][j / 4], j % 4 + 2) * second;
        }
      }
      Q3N_UNROLL
      for (int r = 0; r < RT; r++) {
        Q3N_UNROLL
        for (int half = 0; half < 2; half++) {
          float &to = y[r][n][2 * half + k];
          to = __fmaf_rn((float)low[r][half], -(q3n_block_dmin(t, b[r][half]) * d), to);
        }
      }
    }
  }
}

/* The same of blocks of 32, `blocks` of them. */
template <int DT, int RT, int MT, class X>
Q3N_DEVICE void q3n_slice_x32(float (&y)[RT][MT][4], q3n_shared<uint32_t> stage, const q3n_tile_weights &w, const X &x,
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
    const int64_t at = (slice * (Q3N_TILE_SLICE / 32) + j) * Q3N_Q8_X32_BYTES;
    uint32_t a[RT][4];
    float d[RT][2], m[RT][2];
    Q3N_UNROLL
    for (int r = 0; r < RT; r++) {
      Q3N_UNROLL
      for (int i = 0; i < 4; i++) a[r][i] = q3n_quad(t, b[r][i % 2], i / 2, 4 * member);
      Q3N_UNROLL
      for (int half = 0; half < 2; half++) {
        d[r][half] = q3n_block_d(t, b[r][half]), m[r][half] = q3n_block_dmin(t, b[r][half]);
        b[r][half] = q3n_next_block(b[r][half], q3n_block_bytes(t));
      }
    }
    Q3N_UNROLL
    for (int n = 0; n < MT; n++) {
      const uint8_t *row = x(8 * n + group);
      const uint32_t q[2] = {q3n_tile_word(row, at + Q3N_Q8_X32_Q + 4 * member),
                             q3n_tile_word(row, at + Q3N_Q8_X32_Q + 16 + 4 * member)};
      float dx[2];
      int sum[2];
      Q3N_UNROLL
      for (int k = 0; k < 2; k++) {
        const uint8_t *column = x(8 * n + 2 * member + k);
        dx[k] = q3n_tile_float(column, at);
        sum[k] = q3n_has_min(t) ? (int)q3n_tile_word(column, at + Q3N_Q8_X32_SUM) : 0;
      }
      const int zero[4] = {0, 0, 0, 0};
      int c[4];
      Q3N_UNROLL
      for (int r = 0; r < RT; r++) {
        q3n_mma_s8(c, a[r], q, zero);
        Q3N_UNROLL
        for (int i = 0; i < 4; i++) {
          float &to = y[r][n][i];
          to = __fmaf_rn((float)c[i], d[r][i / 2] * dx[i % 2], to);
          if (q3n_has_min(t)) to = __fmaf_rn((float)sum[i % 2], -(m[r][i / 2] * dx[i % 2]), to);
        }
      }
    }
  }
}

/* Block types and f32 activations: integers of w times three bf16 that x is the sum of, then scale and minimum, rounded
   as in decoding; `chunks` times 16 columns. */
template <int DT, int RT, int MT, class X>
Q3N_DEVICE void q3n_slice_f32(float (&y)[RT][MT][4], q3n_shared<uint32_t> stage, const q3n_tile_weights &w, const X &x,
                              int64_t slice, int columns, int64_t K) {
  const q3n_dtype t = q3n_tile_dtype<DT>(w);
  const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4;
  const bool super = q3n_block_columns(t) == 256;
  const int chunks = q3n_scale_columns(t) / 16; /* of 16 columns, with one scale */
  const uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
  const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  q3n_shared_block b[RT][2];
  uint32_t s[RT][2][4], m[RT][2][4];
  Q3N_UNROLL
  for (int r = 0; r < RT; r++) {
    Q3N_UNROLL
    for (int half = 0; half < 2; half++) {
      b[r][half] = q3n_staged_row<DT>(stage, w, slice, 16 * r + group + 8 * half);
      if (super) q3n_scales(t, b[r][half], s[r][half], m[r][half]);
    }
  }
  Q3N_UNROLL
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
            q3n_bytes_bf16(q3n_quad(t, here, super ? j / 16 + k : k, 4 * member), a[r][k][half], a[r][k][2 + half]);
        const int i = j / (16 * chunks);
        scale[r][half] = q3n_block_d(t, here), min[r][half] = q3n_block_dmin(t, here);
        if (super) scale[r][half] *= (float)q3n_signed_byte(s[r][half][i / 4], i % 4);
        if (super && q3n_has_min(t)) min[r][half] *= (float)q3n_signed_byte(m[r][half][i / 4], i % 4);
        if (!super) b[r][half] = q3n_next_block(here, q3n_block_bytes(t));
      }
    }
    Q3N_UNROLL
    for (int n = 0; n < MT; n++) {
      const uint8_t *row = x(8 * n + group);
      uint32_t q[2][3][2];
      Q3N_UNROLL
      for (int k = 0; k < 2; k++)
        if (k < chunks)
          q3n_split4(q3n_tile_x4(row, slice * Q3N_TILE_SLICE + j + 16 * k + 4 * member, K), q[k]);
      float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      Q3N_UNROLL
      for (int p = 2; p >= 0 && q3n_has_min(t); p--) {
        Q3N_UNROLL
        for (int k = 0; k < 2; k++)
          if (k < chunks) q3n_mma_bf16(total, ones, q[k][p], total);
      }
      Q3N_UNROLL
      for (int r = 0; r < RT; r++) {
        float c[4] = {zero[0], zero[1], zero[2], zero[3]};
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

/* Plain types: w is one (bf16), two (f16) or three (f32) bf16 as well; straight from global memory. */
template <int DT, int RT, int MT, class X>
Q3N_DEVICE void q3n_slice_plain(float (&y)[RT][MT][4], const q3n_tile_weights &w, const X &x, int64_t first, int64_t K) {
  constexpr q3n_dtype T = (q3n_dtype)DT;
  constexpr int PLANES = T == Q3N_BF16 ? 1 : T == Q3N_F16 ? 2 : 3;
  const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4;
  const int64_t end = first + Q3N_TILE_SLICE < K ? first + Q3N_TILE_SLICE : K;
  for (int64_t j = first; j < end; j += 16) {
    uint32_t a[RT][3][4];
    Q3N_UNROLL
    for (int r = 0; r < RT; r++) {
      Q3N_UNROLL
      for (int half = 0; half < 2; half++) {
        int row = 16 * r + group + 8 * half;
        if (row >= w.count) row = w.count - 1;
        uint32_t plane[3][2];
        q3n_split4(q3n_row_values4(T, w.rows + row * w.row_bytes, j + 4 * member, K), plane);
        Q3N_UNROLL
        for (int p = 0; p < PLANES; p++) a[r][p][half] = plane[p][0], a[r][p][2 + half] = plane[p][1];
      }
    }
    Q3N_UNROLL
    for (int n = 0; n < MT; n++) {
      uint32_t q[3][2];
      q3n_split4(q3n_tile_x4(x(8 * n + group), j + 4 * member, K), q);
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

/* The sums of warp `part`. x(j) is row j of x, NULL for none; `words` is its q3n_tile_words of shared memory. */
template <int DT, bool Q8, int RT, int MT, class X>
Q3N_DEVICE void q3n_tile_part(float (&y)[RT][MT][4], q3n_shared<uint32_t> words, const q3n_tile_weights &w, const X &x,
                              int64_t K, int part) {
  Q3N_UNROLL
  for (int r = 0; r < RT; r++) {
    Q3N_UNROLL
    for (int c = 0; c < MT * 4; c++) y[r][c / 4][c % 4] = 0.0f;
  }
  const int64_t parts = q3n_tile_parts(K), slices = q3n_tile_slices(K);
  if constexpr (q3n_stage_row(DT) == 0) {
    for (int64_t slice = part; slice < slices; slice += parts)
      q3n_slice_plain<DT, RT, MT>(y, w, x, slice * Q3N_TILE_SLICE, K);
    return;
  } else {
    const q3n_dtype t = q3n_tile_dtype<DT>(w);
    constexpr int STAGE = q3n_tile_words(DT, RT) / 2;
    int buffer = 0;
    if (part < slices) q3n_stage<DT, RT>(words, w, K, part);
    q3n_copy_commit();
    for (int64_t slice = part; slice < slices; slice += parts) {
      if (slice + parts < slices) q3n_stage<DT, RT>(words + (buffer ^ 1) * STAGE, w, K, slice + parts);
      q3n_copy_commit();
      q3n_copy_wait<1>();
      __syncwarp();
      const q3n_shared<uint32_t> stage = words + buffer * STAGE;
      const int64_t left = K - slice * Q3N_TILE_SLICE;
      const int columns = (int)(left < Q3N_TILE_SLICE ? left : Q3N_TILE_SLICE);
      if constexpr (!Q8)
        q3n_slice_f32<DT, RT, MT>(y, stage, w, x, slice, columns, K);
      else if (q3n_block_columns(t) == 256)
        q3n_slice_x256<DT, RT, MT>(y, stage, w, x, slice);
      else
        q3n_slice_x32<DT, RT, MT>(y, stage, w, x, slice, columns / 32);
      __syncwarp();
      buffer ^= 1;
    }
  }
}

/* Floats of shared memory of a block for q3n_tile_sum. */
static __host__ __device__ __forceinline__ constexpr int q3n_tile_sum_floats(int RT, int MT) {
  return Q3N_TILE_WARPS * RT * MT * 4 * 32;
}

/* Adds the parts of warps part, part + 1, ... of `parts` neighbours; part 0 has the result. All threads of the block. */
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

#endif
