/* Products of f32 matrices on tensor cores: a factor is split into two tf32 numbers, a product is three, off by 2^-21
   at most. Fragments as in mma.cuh. */
#ifndef Q3N_CUDA_TF32_CUH
#define Q3N_CUDA_TF32_CUH

#include "mma.cuh"

/* Column 8 eight + one of a row of `width` numbers in shared memory. Eights change places within fours so that rows
   0 .. 3 and rows 0, 2, 4, 6 from any multiple of 4 or 8 on lie in different banks. */
static __device__ __forceinline__ int q3n_place(int row, int eight, int one, int width) {
  return row * width + eight / 4 * 32 + (eight % 4 ^ ((row ^ row / 4) & 3)) * 8 + one;
}

struct q3n_left {
  uint32_t high[4], low[4];
};
struct q3n_right {
  uint32_t high[2], low[2];
};

/* x holds sums: rows group (0, 1) and group + 8, columns 2 member and 2 member + 1, which become the factor's columns
   member and member + 4. */
static __device__ __forceinline__ q3n_left q3n_split_left(const float (&x)[4]) {
  q3n_left y;
  Q3N_UNROLL
  for (int i = 0; i < 4; i++) q3n_split_tf32(x[i / 2 + i % 2 * 2], y.high[i], y.low[i]);
  return y;
}

/* The same for two neighbouring elements of rows group and group + 8 of a matrix. */
static __device__ __forceinline__ q3n_left q3n_split_rows(float2 first, float2 second) {
  const float x[4] = {first.x, first.y, second.x, second.y};
  return q3n_split_left(x);
}

static __device__ __forceinline__ q3n_right q3n_split_right(float2 x) {
  q3n_right y;
  q3n_split_tf32(x.x, y.high[0], y.low[0]);
  q3n_split_tf32(x.y, y.high[1], y.low[1]);
  return y;
}

/* Sums, those of the small products apart: two chains, and the large ones are rounded once in all. */
struct q3n_sums {
  float large[4], rest[4];
};

static __device__ __forceinline__ void q3n_clear(q3n_sums &x) {
  Q3N_UNROLL
  for (int i = 0; i < 4; i++) x.large[i] = x.rest[i] = 0.0f;
}

static __device__ __forceinline__ void q3n_add_product(q3n_sums &x, const q3n_left &a, const q3n_right &b) {
  q3n_mma_tf32(x.large, a.high, b.high, x.large);
  q3n_mma_tf32(x.rest, a.high, b.low, x.rest);
  q3n_mma_tf32(x.rest, a.low, b.high, x.rest);
}

/* l: n rows of 64 numbers placed by q3n_place, an n x n matrix times `scale`, strictly lower triangular. Its 16 x 16 blocks
   on the diagonal become (1 + block)^-1 - 1 by substitution, a lane a column. The whole block of threads takes part; a
   barrier goes before and after. */
static __device__ __forceinline__ void q3n_invert_diagonal(int n, float scale, q3n_shared<float> l) {
  const int lane = (int)(threadIdx.x % 32), column = lane % 16;
  for (int pair = (int)(threadIdx.x / 32); 32 * pair < n; pair += (int)(blockDim.x / 32)) {
    const int first = 32 * pair + lane / 16 * 16;
    const bool mine = first < n;
    float x[16];
    Q3N_UNROLL
    for (int i = 0; i < 16; i++) {
      float part[2] = {0.0f, 0.0f};
      Q3N_UNROLL
      for (int j = 0; j < i; j += 4) {
        float row[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (mine) {
          const float4 v = q3n_load<float4>(l + q3n_place(first + i, (first + j) / 8, j % 8, 64));
          row[0] = v.x / scale, row[1] = v.y / scale, row[2] = v.z / scale, row[3] = v.w / scale;
        }
        Q3N_UNROLL
        for (int m = 0; m < 4; m++)
          if (j + m < i)
            part[m % 2] = column == j + m ? part[m % 2] + row[m] : __fmaf_rn(row[m], x[j + m], part[m % 2]);
      }
      x[i] = i > column ? -(part[0] + part[1]) : 0.0f;
    }
    __syncwarp();
    for (int i = 0; i < 16; i++)
      if (mine) l[q3n_place(first + i, (first + column) / 8, column % 8, 64)] = x[i] * scale;
  }
}

#endif
