/* The chunk form in f32: every factor is split into two tf32 numbers, a product of matrices is three. As columns of
   sums become columns of a left factor by renaming tokens, u and S go from product to product without a shuffle.

   A value that is not finite must not meet the zeros above the diagonals. So a warp watches u, block of 16 tokens by
   block: from the first token on whose u is not finite it takes the rest of the chunk token by token, as it takes
   fewer than 8 tokens. */
#ifndef Q3N_GATED_DELTA_CHUNKED_F32_CUH
#define Q3N_GATED_DELTA_CHUNKED_F32_CUH

#include "gated_delta_chunked_parts.cuh"

namespace {

/* Rows of keys or queries in f32, whatever they are in memory. */
template <int KP> struct f32_tokens {
  q3n_shared<float> x; /* [C][KP], placed by q3n_place */

  __device__ __forceinline__ float2 pair(int row, int eight, int one) const {
    return q3n_load<float2>(x + q3n_place(row, eight, one, KP));
  }
  /* Of an eighth of the row. */
  __device__ __forceinline__ float squares(int row, int member) const {
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    Q3N_UNROLL
    for (int c = 0; c < KP / 8; c += 4) {
      const float4 v = q3n_load<float4>(x + q3n_place(row, c + member / 2, member % 2 * 4, KP));
      part[0] = __fmaf_rn(v.x, v.x, part[0]), part[1] = __fmaf_rn(v.y, v.y, part[1]);
      part[2] = __fmaf_rn(v.z, v.z, part[2]), part[3] = __fmaf_rn(v.w, v.w, part[3]);
    }
    return (part[0] + part[1]) + (part[2] + part[3]);
  }
};

/* Columns of a product of u and A or P: b is a row's place in the matrix, transposed by how it is read. */
__device__ __forceinline__ q3n_right matrix(q3n_shared<float> x, int i, int j) {
  const int lane = (int)(threadIdx.x % 32);
  return q3n_split_right(q3n_load<float2>(x + q3n_place(i + lane / 4, j / 8, 2 * (lane % 4), C)));
}

/* u and o of the tokens of block b. Returns how many of its tokens are good: o, where queries are there, is stored for
   those, and u of the others is 0. */
template <int KP>
__device__ __forceinline__ int run_block(const rows_of_state<KP> &s, const q3n_gated_delta_args &a, int64_t t0, int n,
                                         int b, bool queries, const shared_chunk<f32_tokens<KP>> &ch,
                                         q3n_shared<float> u, const bool (&live)[2]) {
  const head at = ((job)ch.now[0]).at;
  const rows row = find_rows(a, ch.now[0]);
  const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4, i0 = b * BLOCK;
  float w[2][4], o[2][4]; /* tokens i0 + 8 h + 2 member + x % 2, rows group + x / 2 * 8 */
  Q3N_UNROLL
  for (int h = 0; h < 2; h++)
    Q3N_UNROLL
    for (int x = 0; x < 4; x++) {
      const int t = i0 + 8 * h + 2 * member + x % 2;
      w[h][x] = t < n ? value_of(a, at, t0 + t, row, row.first + group + x / 2 * 8) : 0.0f;
    }

  {
    q3n_sums k[2], q[2];
    Q3N_UNROLL
    for (int h = 0; h < 2; h++) q3n_clear(k[h]), q3n_clear(q[h]);
    Q3N_UNROLL
    for (int c = 0; c < KP / 8; c++) {
      float x[4];
      Q3N_UNROLL
      for (int i = 0; i < 4; i++) x[i] = anew(s.x[c][i]) * SCALE;
      const q3n_left state = q3n_split_left(x);
      Q3N_UNROLL
      for (int h = 0; h < 2; h++) {
        q3n_add_product(k[h], state, q3n_split_right(ch.k.pair(i0 + 8 * h + group, c, 2 * member)));
        if (queries) q3n_add_product(q[h], state, q3n_split_right(ch.q.pair(i0 + 8 * h + group, c, 2 * member)));
      }
    }
    Q3N_UNROLL
    for (int h = 0; h < 2; h++)
      Q3N_UNROLL
      for (int x = 0; x < 4; x++) {
        const int t = i0 + 8 * h + 2 * member + x % 2;
        const float start = ch.start[t], beta = ch.beta[t];
        const float sk = (k[h].large[x] + k[h].rest[x]) * UNSCALE, sq = (q[h].large[x] + q[h].rest[x]) * UNSCALE;
        w[h][x] = beta * __fmaf_rn(-start, sk * (float)ch.key[t], w[h][x]);
        o[h][x] = 0.0f;
        if (queries) o[h][x] = start * (sq * (float)ch.query[t]);
      }
  }

  /* The first token where a row that was finite is not any more. */
  int good = BLOCK;
  const auto watch = [&](const float(&x)[2][4], int from) {
    int first = from;
    Q3N_UNROLL
    for (int h = 0; h < 2; h++)
      Q3N_UNROLL
      for (int i = 0; i < 4; i++) {
        const int t = 8 * h + 2 * member + i % 2;
        if (live[i / 2] && !small(x[h][i]) && t < first) first = t;
      }
    if (!__any_sync(ALL, first < BLOCK)) return from;
    Q3N_UNROLL
    for (int by = 16; by > 0; by /= 2) {
      const int other = __shfl_xor_sync(ALL, first, by);
      if (other < first) first = other;
    }
    return first;
  };
  const auto keep = [&](float(&x)[2][4]) {
    Q3N_UNROLL
    for (int h = 0; h < 2; h++)
      Q3N_UNROLL
      for (int i = 0; i < 4; i++)
        if (8 * h + 2 * member + i % 2 >= good) x[h][i] = 0.0f;
  };
  const int bad = (int)ch.bad[0] - i0;
  good = watch(w, bad < BLOCK ? bad : BLOCK);

  q3n_sums au[2], pu[2];
  Q3N_UNROLL
  for (int h = 0; h < 2; h++) q3n_clear(au[h]), q3n_clear(pu[h]);
  for (int j = 0; j < i0; j += 8) {
    const float4 v = q3n_load<float4>(u + (j / 8 * 32 + lane) * 4);
    const float before[4] = {v.x, v.y, v.z, v.w};
    const q3n_left factor = q3n_split_left(before);
    Q3N_UNROLL
    for (int h = 0; h < 2; h++) {
      q3n_add_product(au[h], factor, matrix(ch.a, i0 + 8 * h, j));
      if (queries) q3n_add_product(pu[h], factor, matrix(ch.p, i0 + 8 * h, j));
    }
  }
  Q3N_UNROLL
  for (int h = 0; h < 2; h++) {
    Q3N_UNROLL
    for (int x = 0; x < 4; x++) w[h][x] = __fmaf_rn(-UNSCALE, au[h].large[x] + au[h].rest[x], w[h][x]);
    q3n_clear(au[h]);
  }
  if (good < BLOCK) keep(w);
  Q3N_UNROLL
  for (int j = 0; j < 2; j++) {
    const q3n_left factor = q3n_split_left(w[j]);
    Q3N_UNROLL
    for (int h = j; h < 2; h++) q3n_add_product(au[h], factor, matrix(ch.a, i0 + 8 * h, i0 + 8 * j));
  }
  Q3N_UNROLL
  for (int h = 0; h < 2; h++)
    Q3N_UNROLL
    for (int x = 0; x < 4; x++) w[h][x] = __fmaf_rn(UNSCALE, au[h].large[x] + au[h].rest[x], w[h][x]);
  if (good < BLOCK) keep(w);
  good = watch(w, good);
  if (good < BLOCK) keep(w);

  Q3N_UNROLL
  for (int j = 0; j < 2; j++) {
    q3n_store(u + ((i0 / 8 + j) * 32 + lane) * 4, make_float4(w[j][0], w[j][1], w[j][2], w[j][3]));
    if (!queries) continue;
    const q3n_left factor = q3n_split_left(w[j]);
    Q3N_UNROLL
    for (int h = j; h < 2; h++) q3n_add_product(pu[h], factor, matrix(ch.p, i0 + 8 * h, i0 + 8 * j));
  }
  if (!queries) return good;
  Q3N_UNROLL
  for (int h = 0; h < 2; h++)
    Q3N_UNROLL
    for (int x = 0; x < 4; x++) {
      const float near = __fmaf_rn((float)ch.self[i0 + 8 * h + 2 * member + x % 2], w[h][x], o[h][x]);
      o[h][x] = __fmaf_rn(UNSCALE, pu[h].large[x] + pu[h].rest[x], near);
    }
  good = watch(o, good);
  Q3N_UNROLL
  for (int h = 0; h < 2; h++)
    Q3N_UNROLL
    for (int x = 0; x < 4; x++) {
      const int i = 8 * h + 2 * member + x % 2;
      const int v = row.first + group + x / 2 * 8;
      if (i < good && i0 + i < n && v < row.count) q3n_set_element(at.o, (t0 + i0 + i) * a.o_t + v, a.dtype, o[h][x]);
    }
  return good;
}

template <int WIDTH> struct f32_form {
  static constexpr int KP = WIDTH;
  static constexpr int STAGE = C * KP;    /* elements of a chunk's keys */
  static constexpr int U = C * ROWS;      /* floats that a warp works in */
  static constexpr int VECTOR = 4;        /* channels of a copy in the background */
  using element = float;
  using tokens = f32_tokens<KP>;
  using chunk = shared_chunk<tokens>;

  /* q, if wanted, and k of the tokens t0 .. t0 + n, zeros past n and K. f32 comes in the background. */
  static __device__ __forceinline__ void fetch(const q3n_gated_delta_args &a, const head &at, int64_t t0, int n,
                                               bool queries, bool vectors, q3n_shared<float> k) {
    for (int i = (int)threadIdx.x; i < (queries ? 2 : 1) * STAGE / 4; i += (int)blockDim.x) {
      const int which = i / (STAGE / 4), row = i / (KP / 4) % C, c = i % (KP / 4) * 4;
      const void *array = which ? at.q : at.k;
      const int64_t first = (t0 + row) * (which ? a.q_t : a.k_t) + c;
      const q3n_shared<float> to = k + which * STAGE + q3n_place(row, c / 8, c % 8, KP);
      if (row < n && c < a.K && vectors && a.dtype == Q3N_F32) {
        q3n_copy_async16(to, (const float *)array + first);
      } else if (row < n && c < a.K && vectors) {
        q3n_store(to, q3n_four(array, first, a.dtype));
      } else {
        float x[4];
        Q3N_UNROLL
        for (int j = 0; j < 4; j++) x[j] = row < n && c + j < a.K ? q3n_element(array, first + j, a.dtype) : 0.0f;
        q3n_store(to, make_float4(x[0], x[1], x[2], x[3]));
      }
    }
    q3n_copy_commit();
  }

  static __device__ __forceinline__ void scores(const chunk &ch, int i0, int j0, bool queries, float (&kk)[4],
                                                float (&qk)[4]) {
    const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4;
    q3n_sums keys, mixed;
    q3n_clear(keys), q3n_clear(mixed);
    Q3N_UNROLL
    for (int c = 0; c < KP / 8; c++) {
      const q3n_right key = q3n_split_right(ch.k.pair(j0 + group, c, 2 * member));
      const auto left = [&](const tokens &x) {
        return q3n_split_rows(x.pair(i0 + group, c, 2 * member), x.pair(i0 + group + 8, c, 2 * member));
      };
      q3n_add_product(keys, left(ch.k), key);
      if (queries) q3n_add_product(mixed, left(ch.q), key);
    }
    Q3N_UNROLL
    for (int x = 0; x < 4; x++) kk[x] = keys.large[x] + keys.rest[x], qk[x] = mixed.large[x] + mixed.rest[x];
  }

  /* S <- S and the chunk's decay, plus u times the keys decayed to its end. u is taken whole: with keys of ones and
     zeros the state holds the very values. false, and nothing done, where a sum overflows. */
  static __device__ __forceinline__ bool advance(rows_of_state<KP> &s, int n, const chunk &ch, q3n_shared<float> u,
                                                 const bool (&live)[2]) {
    const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4;
    rows_of_state<KP> written;
    clear(written);
    for (int j = 0; j < n; j += 8) {
      const int t = j + 2 * member;
      const float4 v = q3n_load<float4>(u + (j / 8 * 32 + lane) * 4);
      const float even = (float)ch.end[t] * SCALE * (float)ch.key[t];
      const float odd = (float)ch.end[t + 1] * SCALE * (float)ch.key[t + 1];
      const float x[4] = {v.x * even, v.y * odd, v.z * even, v.w * odd};
      add_whole<KP>(written, x, [&](int c) {
        return make_float2(ch.k.x[q3n_place(t, c, group, KP)], ch.k.x[q3n_place(t + 1, c, group, KP)]);
      });
    }
    if (overflows(written, live)) return false;
    take(s, written, ch);
    return true;
  }

  /* A chunk of n tokens, from when A and P are there. */
  static __device__ __forceinline__ void run(rows_of_state<KP> &s, const q3n_gated_delta_args &a, int64_t t0, int n,
                                             bool queries, const chunk &ch, q3n_shared<float> u,
                                             bool (&live)[2], bool state_vectors) {
    q3n_invert_diagonal(n, SCALE, ch.a);
    __syncthreads();
    int done = 0;
    for (int b = 0; b * BLOCK < n && done == b * BLOCK; b++)
      done += run_block<KP>(s, a, t0, n, b, queries, ch, u, live);
    if (done >= n && queries && ((job)ch.now[0]).at.snapshots) replay<f32_form>(s, a, t0, n, ch, u, state_vectors);
    if (done < n || !advance(s, n, ch, u, live)) {
      one_by_one<f32_form>(s, a, t0, n, done, queries, ch, state_vectors);
      find_live<KP>(live, s);
    }
  }
};

} /* namespace */

#endif
