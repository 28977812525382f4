/* The chunk form for prefill, the equations of gated_delta_chunked_scalar.c on tensor cores: every f32 factor is split
   into two tf32 numbers, a product of matrices is three. Everything a warp owns lies across its lanes transposed, value
   channels down and tokens or key channels across: 16 rows of the state stay in its registers over all chunks, as the
   sums of products; and as columns of sums become columns of a left factor by renaming tokens, u and S go from product
   to product without a shuffle. A block is up to 8 such warps, which share the chunk's keys and queries, fetched while
   the chunk before it is worked on, and their products A and P.

   A value that is not finite must not meet the zeros above the diagonals. So a warp watches u, block of 16 tokens by
   block: from the first token on whose u is not finite it takes the rest of the chunk token by token, as it takes
   fewer than 8 tokens. README.md has the floors. */
#include "../cuda/reduce.cuh"
#include "../cuda/tf32.cuh"
#include "gated_delta_parts.cuh"

namespace {

constexpr int C = 64;          /* tokens of a chunk */
constexpr int BLOCK = 16;      /* of a diagonal block */
constexpr int ROWS = 16;       /* value channels of a warp */
constexpr int WARPS = 8;       /* at most */
constexpr int TAIL = 8;        /* fewer tokens go one by one */
constexpr unsigned ALL = 0xffffffffu;

/* Decays make factors so small that tf32, which has no more digits there than its exponent leaves, would lose them: A, P,
   the state and u on its way into the state are multiplied by this. What then overflows is seen, and goes token by
   token. */
constexpr float SCALE = 4294967296.0f, UNSCALE = 1.0f / SCALE;

__device__ __forceinline__ bool small(float x) { return fabsf(x) < 3.3e38f; } /* false for NaN */

/* x, in a way that forbids to keep what is made of it: the state's parts would not fit into the registers. */
__device__ __forceinline__ float anew(float x) {
#if defined(__CUDACC__)
  asm volatile("" : "+f"(x));
#endif
  return x;
}

/* What all warps of a block share of a chunk. */
struct shared_chunk {
  q3n_shared<float> k, q;          /* [C][KP] as they come */
  q3n_shared<float> a, p;          /* [C][C] A and P below the diagonal, zeros above; A's diagonal blocks hold
                                      (I + A)^-1 - I */
  q3n_shared<float> self;          /* [C] P_ii */
  q3n_shared<float> decay, beta;   /* [C] exp(g), beta: 1 and 0 past the end */
  q3n_shared<float> key, query;    /* [C] what a key and a query are to be multiplied by: norms, scale */
  q3n_shared<float> start, end;    /* [C] decay from the chunk's start, and on to its end */
  q3n_shared<float> near;          /* [BLOCK][C] decay to so many tokens later in the diagonal block */
  q3n_shared<double> since, until; /* [C] decay from the start of the diagonal block, and on to its end */
  q3n_shared<float> gain;          /* [2] decay over the chunk, and what its rounding left over */
  q3n_shared<int> bad;             /* first row of A that is not finite */
  q3n_shared<head> at;             /* here rather than in registers, of which there are few */
};

/* q and k of the tokens t0 .. t0 + n, zeros past n and K. f32 comes in the background. */
template <int KP>
__device__ __forceinline__ void fetch(const q3n_gated_delta_args &a, const head &at, int64_t t0, int n, bool vectors,
                                      q3n_shared<float> k, q3n_shared<float> q) {
  for (int i = (int)threadIdx.x; i < 2 * C * KP / 4; i += (int)blockDim.x) {
    const int which = i / (C * KP / 4), row = i / (KP / 4) % C, c = i % (KP / 4) * 4;
    const void *array = which ? at.q : at.k;
    const int64_t first = (t0 + row) * (which ? a.q_t : a.k_t) + c;
    const q3n_shared<float> to = (which ? q : k) + q3n_place(row, c / 8, c % 8, KP);
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

/* Gates of a token as they were read: threads 0 .. C have one each. */
struct gates {
  float g, beta;
};

__device__ __forceinline__ gates read_gates(const q3n_gated_delta_args &a, const head &at, int64_t t0, int n) {
  const int i = (int)threadIdx.x;
  gates x = {0.0f, 0.0f};
  if (i < n && at.g) x.g = at.g[(t0 + i) * a.g_t];
  if (i < n) x.beta = at.beta[(t0 + i) * a.beta_t];
  return x;
}

/* Every decay is a product of factors up to 1, in double: no quotient, and none that cancels. A diagonal block is 16
   lanes. */
__device__ __forceinline__ void find_decays(gates x, const shared_chunk &ch) {
  const int i = (int)threadIdx.x, r = i % BLOCK;
  if (i / 32 >= C / 32) return;
  const float e = expf(x.g);
  double since = (double)e, until = 1.0;
  Q3N_UNROLL
  for (int by = 1; by < BLOCK; by *= 2) {
    const double before = __shfl_up_sync(ALL, since, by, BLOCK);
    if (r >= by) since *= before;
  }
  Q3N_UNROLL
  for (int d = 0; d < BLOCK; d++) {
    const float later = __shfl_down_sync(ALL, e, d, BLOCK);
    if (d > 0 && r + d < BLOCK) until *= (double)later;
    ch.near[d * C + i] = (float)until;
  }
  ch.decay[i] = e;
  ch.beta[i] = x.beta;
  ch.since[i] = since;
  ch.until[i] = until;
}

/* 8 lanes a row. */
template <int KP>
__device__ __forceinline__ void find_norms(const q3n_gated_delta_args &a, int n, const shared_chunk &ch) {
  const int member = (int)(threadIdx.x % 8);
  for (int row = (int)(threadIdx.x / 8); row < 2 * C; row += (int)(blockDim.x / 8)) {
    const int i = row % C;
    float norm = 1.0f;
    if (a.qk_l2norm) {
      const q3n_shared<float> from = row < C ? ch.k : ch.q;
      float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      Q3N_UNROLL
      for (int c = 0; c < KP / 8; c += 4) {
        const float4 x = q3n_load<float4>(from + q3n_place(i, c + member / 2, member % 2 * 4, KP));
        part[0] = __fmaf_rn(x.x, x.x, part[0]), part[1] = __fmaf_rn(x.y, x.y, part[1]);
        part[2] = __fmaf_rn(x.z, x.z, part[2]), part[3] = __fmaf_rn(x.w, x.w, part[3]);
      }
      const float sum = q3n_warp_sum((part[0] + part[1]) + (part[2] + part[3]), 8);
      if (i < n) norm = 1.0f / sqrtf(sum + a.qk_l2norm_eps);
    }
    if (member == 0 && row < C) ch.key[i] = norm;
    if (member == 0 && row >= C) ch.query[i] = norm * a.scale;
  }
}

/* Decays over whole diagonal blocks join those within. */
__device__ __forceinline__ double over_blocks(const shared_chunk &ch, int from, int to) {
  double x = 1.0;
  for (int b = from; b < to; b++) x *= (double)ch.since[b * BLOCK + BLOCK - 1];
  return x;
}

__device__ __forceinline__ void find_ends(const shared_chunk &ch) {
  for (int i = (int)threadIdx.x; i < C; i += (int)blockDim.x) {
    ch.start[i] = (float)((double)ch.since[i] * over_blocks(ch, 0, i / BLOCK));
    ch.end[i] = (float)((double)ch.until[i] * over_blocks(ch, i / BLOCK + 1, C / BLOCK));
  }
  if (threadIdx.x == 0) {
    const double gain = over_blocks(ch, 0, C / BLOCK);
    ch.gain[0] = (float)gain;
    ch.gain[1] = (float)(gain - (double)(float)gain);
  }
}

/* A and P: tiles of 16 x 8 on and below the diagonal, warp by warp. */
template <int KP> __device__ __forceinline__ void find_scores(int n, const shared_chunk &ch) {
  const int lane = (int)(threadIdx.x % 32), warps = (int)(blockDim.x / 32), group = lane / 4, member = lane % 4;
  for (int tile = (int)(threadIdx.x / 32); tile < 20; tile += warps) {
    const int b = tile < 2 ? 0 : tile < 6 ? 1 : tile < 12 ? 2 : 3, i0 = b * BLOCK, j0 = (tile - b * (b + 1)) * 8;
    if (i0 >= n) break;
    q3n_sums kk, qk;
    q3n_clear(kk), q3n_clear(qk);
    Q3N_UNROLL
    for (int c = 0; c < KP / 8; c++) {
      const q3n_right key = q3n_split_right(q3n_load<float2>(ch.k + q3n_place(j0 + group, c, 2 * member, KP)));
      const int from = q3n_place(i0 + group, c, 2 * member, KP), below = q3n_place(i0 + group + 8, c, 2 * member, KP);
      q3n_add_product(kk, q3n_split_rows(q3n_load<float2>(ch.k + from), q3n_load<float2>(ch.k + below)), key);
      q3n_add_product(qk, q3n_split_rows(q3n_load<float2>(ch.q + from), q3n_load<float2>(ch.q + below)), key);
    }
    Q3N_UNROLL
    for (int r = 0; r < 2; r++) {
      const int i = i0 + group + 8 * r;
      const float beta = ch.beta[i], ki = ch.key[i], qi = ch.query[i];
      const double reach = (double)ch.since[i] * over_blocks(ch, j0 / BLOCK + 1, b);
      float a[2] = {0.0f, 0.0f}, p[2] = {0.0f, 0.0f};
      Q3N_UNROLL
      for (int m = 0; m < 2; m++) {
        const int j = j0 + 2 * member + m, x = 2 * r + m;
        if (j > i) continue;
        const float key = ch.key[j];
        const float decay = j0 >= i0 ? (float)ch.near[(i - j) * C + j] : (float)(reach * (double)ch.until[j]);
        const float product = (qk.large[x] + qk.rest[x]) * (qi * key);
        if (j == i) {
          ch.self[i] = product;
        } else {
          a[m] = (kk.large[x] + kk.rest[x]) * (ki * key) * (beta * decay * SCALE);
          p[m] = product * (decay * SCALE);
          if (!small(a[m])) atomicMin(&ch.bad[0], i);
        }
      }
      q3n_store(ch.a + q3n_place(i, j0 / 8, 2 * member, C), make_float2(a[0], a[1]));
      q3n_store(ch.p + q3n_place(i, j0 / 8, 2 * member, C), make_float2(p[0], p[1]));
    }
  }
}

/* The channels 8 i + 2 member and one more of two state rows, as sums of products lie. */
template <int KP> struct rows_of_state {
  float x[KP / 8][4];
};

template <int KP>
__device__ __forceinline__ void load_state(rows_of_state<KP> &s, const float *from, int64_t stride, int row,
                                           const q3n_gated_delta_args &a, bool vectors) {
  const int group = (int)(threadIdx.x % 32) / 4, member = (int)(threadIdx.x % 4);
  Q3N_UNROLL
  for (int i = 0; i < KP / 8; i++)
    Q3N_UNROLL
    for (int r = 0; r < 2; r++) {
      const int c = 8 * i + 2 * member;
      const int v = row + group + 8 * r;
      float2 pair = make_float2(0.0f, 0.0f);
      if (from && v < a.V) {
        const float *at = from + v * stride + c;
        if (vectors && c < a.K) {
          pair = q3n_load<float2>(at);
        } else {
          if (c < a.K) pair.x = at[0];
          if (c + 1 < a.K) pair.y = at[1];
        }
      }
      s.x[i][2 * r] = pair.x, s.x[i][2 * r + 1] = pair.y;
    }
}

template <int KP>
__device__ __forceinline__ void store_state(const rows_of_state<KP> &s, float *to, int64_t stride, int row,
                                            const q3n_gated_delta_args &a, bool vectors) {
  const int group = (int)(threadIdx.x % 32) / 4, member = (int)(threadIdx.x % 4);
  Q3N_UNROLL
  for (int i = 0; i < KP / 8; i++)
    Q3N_UNROLL
    for (int r = 0; r < 2; r++) {
      const int c = 8 * i + 2 * member;
      const int v = row + group + 8 * r;
      if (v >= a.V) continue;
      float *at = to + v * stride + c;
      if (vectors && c < a.K) {
        q3n_store(at, make_float2(s.x[i][2 * r], s.x[i][2 * r + 1]));
      } else {
        if (c < a.K) at[0] = s.x[i][2 * r];
        if (c + 1 < a.K) at[1] = s.x[i][2 * r + 1];
      }
    }
}

/* Whether a row of the state is finite, for this lane's two rows: what is not stays so, and is no reason to leave the
   tensor cores. */
template <int KP> __device__ __forceinline__ void find_live(bool (&live)[2], const rows_of_state<KP> &s) {
  Q3N_UNROLL
  for (int r = 0; r < 2; r++) {
    int dead = 0;
    Q3N_UNROLL
    for (int i = 0; i < KP / 8; i++)
      if (!small(s.x[i][2 * r]) || !small(s.x[i][2 * r + 1])) dead = 1;
    dead |= __shfl_xor_sync(ALL, dead, 1);
    dead |= __shfl_xor_sync(ALL, dead, 2);
    live[r] = !dead;
  }
}

/* Tokens 0 .. n of the chunk by the recurrence, with o and snapshots from `first` on. */
template <int KP>
__device__ __forceinline__ void one_by_one(rows_of_state<KP> &s, const q3n_gated_delta_args &a, int64_t t0, int n,
                                           int first, int row, const shared_chunk &ch, bool state_vectors) {
  const head at = ch.at[0];
  const int group = (int)(threadIdx.x % 32) / 4, member = (int)(threadIdx.x % 4);
  for (int t = 0; t < n; t++) {
    const float decay = ch.decay[t], beta = ch.beta[t], key = ch.key[t], query = ch.query[t];
    float dot[2] = {0.0f, 0.0f}, out[2] = {0.0f, 0.0f}, u[2];
    Q3N_UNROLL
    for (int i = 0; i < KP / 8; i++) {
      const float2 k = q3n_load<float2>(ch.k + q3n_place(t, i, 2 * member, KP));
      Q3N_UNROLL
      for (int r = 0; r < 2; r++) {
        s.x[i][2 * r] *= decay, s.x[i][2 * r + 1] *= decay;
        dot[r] = __fmaf_rn(s.x[i][2 * r + 1], k.y * key, __fmaf_rn(s.x[i][2 * r], k.x * key, dot[r]));
      }
    }
    Q3N_UNROLL
    for (int r = 0; r < 2; r++) {
      const int v = row + group + 8 * r;
      u[r] = beta * ((v < a.V ? q3n_element(at.v, (t0 + t) * a.v_t + v, a.dtype) : 0.0f) - q3n_warp_sum(dot[r], 4));
    }
    Q3N_UNROLL
    for (int i = 0; i < KP / 8; i++) {
      const float2 k = q3n_load<float2>(ch.k + q3n_place(t, i, 2 * member, KP));
      const float2 q = q3n_load<float2>(ch.q + q3n_place(t, i, 2 * member, KP));
      Q3N_UNROLL
      for (int r = 0; r < 2; r++) {
        s.x[i][2 * r] = __fmaf_rn(u[r], k.x * key, s.x[i][2 * r]);
        s.x[i][2 * r + 1] = __fmaf_rn(u[r], k.y * key, s.x[i][2 * r + 1]);
        out[r] = __fmaf_rn(s.x[i][2 * r + 1], q.y * query, __fmaf_rn(s.x[i][2 * r], q.x * query, out[r]));
      }
    }
    Q3N_UNROLL
    for (int r = 0; r < 2; r++) {
      const int v = row + group + 8 * r;
      const float o = q3n_warp_sum(out[r], 4);
      if (member == 0 && t >= first && v < a.V) q3n_set_element(at.o, (t0 + t) * a.o_t + v, a.dtype, o);
    }
    if (at.snapshots)
      store_state<KP>(s, at.snapshots + (t0 + t) * a.snap_t, a.snap_v, row, a, state_vectors);
  }
}

/* The states after each token of the chunk, from the one before it and u. */
template <int KP>
__device__ __forceinline__ void replay(rows_of_state<KP> s, const q3n_gated_delta_args &a, int64_t t0, int n,
                                       int row, const shared_chunk &ch, q3n_shared<float> u, bool state_vectors) {
  const head at = ch.at[0];
  const int group = (int)(threadIdx.x % 32) / 4, member = (int)(threadIdx.x % 4);
  __syncwarp(); /* u lies with the lanes that made it */
  for (int t = 0; t < n; t++) {
    const float4 v = q3n_load<float4>(u + (t / 8 * 32 + group * 4 + t % 8 / 2) * 4);
    const float low = t % 2 ? v.y : v.x, high = t % 2 ? v.w : v.z, decay = ch.decay[t], key = ch.key[t];
    Q3N_UNROLL
    for (int i = 0; i < KP / 8; i++) {
      const float2 k = q3n_load<float2>(ch.k + q3n_place(t, i, 2 * member, KP));
      s.x[i][0] = __fmaf_rn(low, k.x * key, decay * s.x[i][0]);
      s.x[i][1] = __fmaf_rn(low, k.y * key, decay * s.x[i][1]);
      s.x[i][2] = __fmaf_rn(high, k.x * key, decay * s.x[i][2]);
      s.x[i][3] = __fmaf_rn(high, k.y * key, decay * s.x[i][3]);
    }
    store_state<KP>(s, at.snapshots + (t0 + t) * a.snap_t, a.snap_v, row, a, state_vectors);
  }
}

/* Columns of a product of u and A or P: b is a row's place in the matrix, transposed by how it is read. */
__device__ __forceinline__ q3n_right matrix(q3n_shared<float> x, int i, int j) {
  const int lane = (int)(threadIdx.x % 32);
  return q3n_split_right(q3n_load<float2>(x + q3n_place(i + lane / 4, j / 8, 2 * (lane % 4), C)));
}

/* u and o of the tokens of block b. Returns how many of its tokens are good: o is stored for those, and u of the others
   is 0. */
template <int KP>
__device__ __forceinline__ int run_block(const rows_of_state<KP> &s, const q3n_gated_delta_args &a, int64_t t0, int n,
                                         int b, int row, const shared_chunk &ch, q3n_shared<float> u,
                                         const bool (&live)[2]) {
  const head at = ch.at[0];
  const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4, i0 = b * BLOCK;
  float w[2][4], o[2][4]; /* tokens i0 + 8 h + 2 member + x % 2, rows group + x / 2 * 8 */
  Q3N_UNROLL
  for (int h = 0; h < 2; h++)
    Q3N_UNROLL
    for (int x = 0; x < 4; x++) {
      const int t = i0 + 8 * h + 2 * member + x % 2;
      const int v = row + group + x / 2 * 8;
      w[h][x] = t < n && v < a.V ? q3n_element(at.v, (t0 + t) * a.v_t + v, a.dtype) : 0.0f;
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
        const int from = q3n_place(i0 + 8 * h + group, c, 2 * member, KP);
        q3n_add_product(k[h], state, q3n_split_right(q3n_load<float2>(ch.k + from)));
        q3n_add_product(q[h], state, q3n_split_right(q3n_load<float2>(ch.q + from)));
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
        o[h][x] = start * (sq * (float)ch.query[t]);
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
      q3n_add_product(pu[h], factor, matrix(ch.p, i0 + 8 * h, j));
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
    const q3n_left factor = q3n_split_left(w[j]);
    Q3N_UNROLL
    for (int h = j; h < 2; h++) q3n_add_product(pu[h], factor, matrix(ch.p, i0 + 8 * h, i0 + 8 * j));
  }
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
      const int v = row + group + x / 2 * 8;
      if (i < good && i0 + i < n && v < a.V) q3n_set_element(at.o, (t0 + i0 + i) * a.o_t + v, a.dtype, o[h][x]);
    }
  return good;
}

/* S <- S and the chunk's decay, plus u times the keys decayed to its end. u is taken whole, in three parts: with keys
   of ones and zeros the state holds the very values. false, and nothing done, where a sum overflows. */
template <int KP>
__device__ __forceinline__ bool advance(rows_of_state<KP> &s, int n, const shared_chunk &ch, q3n_shared<float> u,
                                        const bool (&live)[2]) {
  const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4;
  rows_of_state<KP> written;
  Q3N_UNROLL
  for (int c = 0; c < KP / 8; c++)
    Q3N_UNROLL
    for (int x = 0; x < 4; x++) written.x[c][x] = 0.0f;
  for (int j = 0; j < n; j += 8) {
    const int t = j + 2 * member;
    const float4 v = q3n_load<float4>(u + (j / 8 * 32 + lane) * 4);
    const float even = (float)ch.end[t] * SCALE * (float)ch.key[t];
    const float odd = (float)ch.end[t + 1] * SCALE * (float)ch.key[t + 1];
    const float x[4] = {v.x * even, v.y * odd, v.z * even, v.w * odd};
    const q3n_left factor = q3n_split_left(x);
    uint32_t least[4];
    Q3N_UNROLL
    for (int i = 0; i < 4; i++) {
      const float low = __int_as_float((int)factor.low[i]), taken = __int_as_float((int)(factor.low[i] & 0xffffe000u));
      least[i] = (uint32_t)__float_as_int(low - taken);
    }
    Q3N_UNROLL
    for (int c = 0; c < KP / 8; c++) {
      const float2 pair = make_float2(ch.k[q3n_place(t, c, group, KP)], ch.k[q3n_place(t + 1, c, group, KP)]);
      const q3n_right keys = q3n_split_right(pair);
      q3n_mma_tf32(written.x[c], factor.high, keys.high, written.x[c]);
      q3n_mma_tf32(written.x[c], factor.high, keys.low, written.x[c]);
      q3n_mma_tf32(written.x[c], factor.low, keys.high, written.x[c]);
      q3n_mma_tf32(written.x[c], least, keys.high, written.x[c]);
    }
  }
  bool over = false;
  Q3N_UNROLL
  for (int c = 0; c < KP / 8; c++)
    Q3N_UNROLL
    for (int x = 0; x < 4; x++) over |= live[x / 2] && !small(written.x[c][x]);
  if (__any_sync(ALL, over)) return false;
  const float gain = ch.gain[0], rest = ch.gain[1];
  Q3N_UNROLL
  for (int c = 0; c < KP / 8; c++)
    Q3N_UNROLL
    for (int x = 0; x < 4; x++)
      s.x[c][x] = __fmaf_rn(gain, s.x[c][x], __fmaf_rn(rest, s.x[c][x], written.x[c][x] * UNSCALE));
  return true;
}

/* One block: ROWS rows a warp of one head. Asked for one block, ptxas finds registers for the small sizes, and not asked,
   for the large one; else it spills. */
template <int KP>
__global__ void __launch_bounds__(WARPS * 32, KP < 128)
    chunked(q3n_gated_delta_args a, int64_t blocks_per_head, int64_t items, bool token_vectors, bool state_vectors) {
  const int warps = (int)(blockDim.x / 32), warp = (int)(threadIdx.x / 32);
  constexpr int64_t TOKENS = 4 * C * KP;
  Q3N_SHARED_DYNAMIC(float, tokens, 0, TOKENS); /* [2][2][C][KP] keys and queries of this chunk and the next */
  Q3N_SHARED_DYNAMIC(float, matrix_a, TOKENS * 4, C * C);
  Q3N_SHARED_DYNAMIC(float, matrix_p, (TOKENS + C * C) * 4, C * C);
  Q3N_SHARED_DYNAMIC(float, all_u, (TOKENS + 2 * C * C) * 4, warps * C * ROWS);
  Q3N_SHARED(float, self, C);
  Q3N_SHARED(float, decay, C);
  Q3N_SHARED(float, beta, C);
  Q3N_SHARED(float, key, C);
  Q3N_SHARED(float, query, C);
  Q3N_SHARED(float, start, C);
  Q3N_SHARED(float, end, C);
  Q3N_SHARED(float, near, BLOCK * C);
  Q3N_SHARED(double, since, C);
  Q3N_SHARED(double, until, C);
  Q3N_SHARED(float, gain, 2);
  Q3N_SHARED(int, bad, 1);
  Q3N_SHARED(head, where, 1);
  shared_chunk ch = {tokens, tokens, matrix_a, matrix_p, self, decay,      beta,       key,  query,
                     start,  end,    near,     since, until, gain, bad, where};
  const q3n_shared<float> u = all_u + warp * C * ROWS;

  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t which = item / blocks_per_head;
    __syncthreads(); /* the item before is done with */
    if (threadIdx.x == 0) where[0] = find_head(a, which / a.HV, which % a.HV);
    __syncthreads();
    const int64_t T = ((head)where[0]).T;
    const int row = ((int)(item % blocks_per_head) * warps + warp) * ROWS; /* rows past V are zeros, and not stored */

    rows_of_state<KP> s;
    bool live[2];
    load_state<KP>(s, ((head)where[0]).state_in, a.state_v, row, a, state_vectors);
    find_live<KP>(live, s);
    gates next = {0.0f, 0.0f};
    if (T > 0) {
      const int n = (int)(T < C ? T : C);
      fetch<KP>(a, where[0], 0, n, token_vectors, tokens, tokens + C * KP);
      next = read_gates(a, where[0], 0, n);
    }
    for (int64_t t0 = 0; t0 < T; t0 += C) {
      const int n = (int)(T - t0 < C ? T - t0 : C), stage = (int)(t0 / C % 2);
      ch.k = tokens + stage * 2 * C * KP;
      ch.q = ch.k + C * KP;
      q3n_copy_wait<0>();
      __syncthreads();
      if (threadIdx.x == 0) bad[0] = C;
      const gates now = next;
      if (t0 + C < T) {
        const int then = (int)(T - t0 - C < C ? T - t0 - C : C);
        const q3n_shared<float> to = tokens + (1 - stage) * 2 * C * KP;
        fetch<KP>(a, where[0], t0 + C, then, token_vectors, to, to + C * KP);
        next = read_gates(a, where[0], t0 + C, then);
      }
      find_decays(now, ch);
      find_norms<KP>(a, n, ch);
      __syncthreads();
      if (n < TAIL) {
        one_by_one<KP>(s, a, t0, n, 0, row, ch, state_vectors);
        continue;
      }
      find_ends(ch);
      find_scores<KP>(n, ch);
      __syncthreads();
      q3n_invert_diagonal(n, SCALE, ch.a);
      __syncthreads();

      int done = 0;
      for (int b = 0; b * BLOCK < n && done == b * BLOCK; b++)
        done += run_block<KP>(s, a, t0, n, b, row, ch, u, live);
      if (done >= n && ((head)where[0]).snapshots) replay<KP>(s, a, t0, n, row, ch, u, state_vectors);
      if (done < n || !advance<KP>(s, n, ch, u, live)) {
        one_by_one<KP>(s, a, t0, n, done, row, ch, state_vectors);
        find_live<KP>(live, s);
      }
    }
    if (((head)where[0]).state_out) store_state<KP>(s, ((head)where[0]).state_out, a.state_v, row, a, state_vectors);
  }
}

/* Floats of dynamic shared memory, and about the bytes of what is not dynamic. */
constexpr int64_t shared_floats(int64_t KP, int64_t warps) { return 4 * C * KP + 2 * C * C + warps * C * ROWS; }
constexpr int64_t SMALL_ARRAYS = 8192;

/* Warps of a block: 8, or 4 where that leaves half of the multiprocessors without a block. Which warp has a row
   changes no bit. */
int64_t warps_of(const q3n_gated_delta_args *a) {
  const int64_t tiles = (a->V + ROWS - 1) / ROWS;
  if (tiles < 2) return 2; /* a thread for every token of a chunk */
  const int64_t wide = a->B * a->HV * ((tiles + WARPS - 1) / WARPS);
  const int64_t most = 2 * wide <= q3n_multiprocessors() ? WARPS / 2 : WARPS;
  return tiles < most ? tiles : most;
}

template <int KP> q3n_status launch(const q3n_gated_delta_args *a, q3n_stream stream) {
  const bool token_vectors = a->K % 4 == 0 && tokens_aligned(a, 4);
  const bool state_vectors = a->K % 4 == 0 && aligned(a->state_in, a->state_slot, a->state_h, a->state_v, 0) &&
                             aligned(a->state_out, a->state_slot, a->state_h, a->state_v, 0) &&
                             aligned(a->snapshots, a->snap_b, a->snap_t, a->snap_h, a->snap_v);
  const int64_t warps = warps_of(a), rows = warps * ROWS, per_head = (a->V + rows - 1) / rows;
  const int64_t items = a->B * a->HV * per_head;
  return Q3N_LAUNCH(chunked<KP>, (*a, per_head, items, token_vectors, state_vectors),
                    items < INT32_MAX ? items : INT32_MAX, warps * 32, shared_floats(KP, warps) * 4, stream);
}

/* Channel gates and other sizes go token by token, and all on GPUs with little shared memory. */
bool fits(const q3n_gated_delta_args *a) {
  const int64_t KP = a->K <= 32 ? 32 : a->K <= 64 ? 64 : 128;
  return a->gate != Q3N_GATE_CHANNEL && a->K >= 16 && a->K <= 128 &&
         shared_floats(KP, warps_of(a)) * 4 + SMALL_ARRAYS <= q3n_shared_limit();
}

} /* namespace */

Q3N_CUDA_SCRATCH(gated_delta, gated_delta_chunked) {
  (void)a;
  return 0;
}

Q3N_CUDA_OPERATOR(gated_delta, gated_delta_chunked) {
  if (!fits(a)) return Q3N_CUDA_CALL(gated_delta_recurrent, a, scratch, stream);
  if (a->K <= 32) return launch<32>(a, stream);
  if (a->K <= 64) return launch<64>(a, stream);
  return launch<128>(a, stream);
}

Q3N_CUDA_SCRATCH(gated_delta, gated_delta) {
  (void)a;
  return 0;
}

/* Of packed sequences only the total is known here: their mean decides. */
Q3N_CUDA_OPERATOR(gated_delta, gated_delta) {
  const int64_t tokens = a->cu_seqlens && a->B > 0 ? a->T / a->B : a->T;
  if (tokens < C) return Q3N_CUDA_CALL(gated_delta_recurrent, a, scratch, stream);
  return Q3N_CUDA_CALL(gated_delta_chunked, a, scratch, stream);
}
