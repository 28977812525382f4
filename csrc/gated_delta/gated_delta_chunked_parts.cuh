/* What the chunk kernels share: how a head's rows and a sequence's segments are given to blocks, the numbers of a chunk
   (decays, norms, A and P), the state in registers, and the two ways around the products: token by token, and a whole
   segment by its transfer matrix. Everything a warp owns lies across its lanes transposed, value channels down and
   tokens or key channels across: 16 rows of the state stay in its registers, as the sums of products, over all chunks.

   FORM is f32_form (gated_delta_chunked_f32.cuh) or bf16_form: how keys and queries lie in shared memory, and the
   products. README.md has the derivation and the floors. */
#ifndef Q3N_GATED_DELTA_CHUNKED_PARTS_CUH
#define Q3N_GATED_DELTA_CHUNKED_PARTS_CUH

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

/* Decays make factors so small that tf32, which has no more digits there than its exponent leaves, would lose them: A,
   P, the state and u on its way into the state are multiplied by this. What then overflows is seen, and goes token by
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

/* What a block has to do: rows of a sequence's head, over its segments from `first` on up to `last`. */
struct job {
  head at;
  int64_t item;
  int64_t pair;   /* the sequence's number times heads, plus the head's */
  int64_t length; /* tokens of a segment */
  int first, last;
  int tile;   /* of 16 rows, the first warp's; those of L and M stand one behind the other */
  bool inner; /* rows of L and M: no outputs */
  bool ends;  /* with the sequence's last token */
};

/* The numbers of a chunk, which the warps of a block share. */
struct numbers {
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
  q3n_shared<job> now;             /* here rather than in registers, of which there are few */
};

/* With keys and queries as they come, [C] rows of KP. */
template <class TOKENS> struct shared_chunk : numbers {
  TOKENS k, q;
};

/* What the rows of a warp are: value channels first .. first + ROWS of `count`, or rows of a segment's transfer matrix,
   which start as those of the identity and to which no values are written. */
struct rows {
  int first, count;
  bool transfer;
};

__host__ __device__ __forceinline__ int64_t tiles_of(int64_t channels) { return (channels + ROWS - 1) / ROWS; }

/* Those of this thread's warp: found anew where they are asked for, as registers are few. */
__device__ __forceinline__ rows find_rows(const q3n_gated_delta_args &a, const job &j) {
  const int tile = j.tile + (int)(threadIdx.x / 32), values = (int)tiles_of(a.V);
  const bool transfer = j.inner && tile >= values;
  return {(transfer ? tile - values : tile) * ROWS, (int)(transfer ? a.K : a.V), transfer};
}

__device__ __forceinline__ float value_of(const q3n_gated_delta_args &a, const head &at, int64_t t, const rows &r,
                                          int v) {
  return !r.transfer && v < r.count ? q3n_element(at.v, t * a.v_t + v, a.dtype) : 0.0f;
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
__device__ __forceinline__ void find_decays(gates x, const numbers &ch) {
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

/* 8 lanes a row. Without queries there are no norms of them. */
template <class FORM>
__device__ __forceinline__ void find_norms(const q3n_gated_delta_args &a, int n, bool queries,
                                           const shared_chunk<typename FORM::tokens> &ch) {
  const int member = (int)(threadIdx.x % 8);
  for (int row = (int)(threadIdx.x / 8); row < (queries ? 2 * C : C); row += (int)(blockDim.x / 8)) {
    const int i = row % C;
    float norm = 1.0f;
    if (a.qk_l2norm) {
      const float sum = q3n_warp_sum((row < C ? ch.k : ch.q).squares(i, member), 8);
      if (i < n) norm = 1.0f / sqrtf(sum + a.qk_l2norm_eps);
    }
    if (member == 0 && row < C) ch.key[i] = norm;
    if (member == 0 && row >= C) ch.query[i] = norm * a.scale;
  }
}

/* Decays over whole diagonal blocks join those within. */
__device__ __forceinline__ double over_blocks(const numbers &ch, int from, int to) {
  double x = 1.0;
  for (int b = from; b < to; b++) x *= (double)ch.since[b * BLOCK + BLOCK - 1];
  return x;
}

__device__ __forceinline__ void find_ends(const numbers &ch) {
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
template <class FORM>
__device__ __forceinline__ void find_scores(int n, bool queries, const shared_chunk<typename FORM::tokens> &ch) {
  const int lane = (int)(threadIdx.x % 32), warps = (int)(blockDim.x / 32), group = lane / 4, member = lane % 4;
  for (int tile = (int)(threadIdx.x / 32); tile < 20; tile += warps) {
    const int b = tile < 2 ? 0 : tile < 6 ? 1 : tile < 12 ? 2 : 3, i0 = b * BLOCK, j0 = (tile - b * (b + 1)) * 8;
    if (i0 >= n) break;
    float kk[4], qk[4];
    FORM::scores(ch, i0, j0, queries, kk, qk);
    Q3N_UNROLL
    for (int r = 0; r < 2; r++) {
      const int i = i0 + group + 8 * r;
      const float beta = ch.beta[i], ki = ch.key[i];
      float qi = 0.0f;
      if (queries) qi = ch.query[i];
      const double reach = (double)ch.since[i] * over_blocks(ch, j0 / BLOCK + 1, b);
      float a[2] = {0.0f, 0.0f}, p[2] = {0.0f, 0.0f};
      Q3N_UNROLL
      for (int m = 0; m < 2; m++) {
        const int j = j0 + 2 * member + m, x = 2 * r + m;
        if (j > i) continue;
        const float key = ch.key[j];
        const float decay = j0 >= i0 ? (float)ch.near[(i - j) * C + j] : (float)(reach * (double)ch.until[j]);
        const float product = qk[x] * (qi * key);
        if (j == i) {
          ch.self[i] = product;
        } else {
          a[m] = kk[x] * (ki * key) * (beta * decay * SCALE);
          p[m] = product * (decay * SCALE);
          if (!small(a[m])) atomicMin(&ch.bad[0], i);
        }
      }
      q3n_store(ch.a + q3n_place(i, j0 / 8, 2 * member, C), make_float2(a[0], a[1]));
      if (queries) q3n_store(ch.p + q3n_place(i, j0 / 8, 2 * member, C), make_float2(p[0], p[1]));
    }
  }
}

/* The channels 8 i + 2 member and one more of two state rows, as sums of products lie. */
template <int KP> struct rows_of_state {
  float x[KP / 8][4];
};

template <int KP>
__device__ __forceinline__ void load_state(rows_of_state<KP> &s, const float *from, int64_t stride, const rows &row,
                                           const q3n_gated_delta_args &a, bool vectors) {
  const int group = (int)(threadIdx.x % 32) / 4, member = (int)(threadIdx.x % 4);
  Q3N_UNROLL
  for (int i = 0; i < KP / 8; i++)
    Q3N_UNROLL
    for (int r = 0; r < 2; r++) {
      const int c = 8 * i + 2 * member;
      const int v = row.first + group + 8 * r;
      float2 pair = make_float2(0.0f, 0.0f);
      if (from && v < row.count) {
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
__device__ __forceinline__ void store_state(const rows_of_state<KP> &s, float *to, int64_t stride, const rows &row,
                                            const q3n_gated_delta_args &a, bool vectors) {
  const int group = (int)(threadIdx.x % 32) / 4, member = (int)(threadIdx.x % 4);
  Q3N_UNROLL
  for (int i = 0; i < KP / 8; i++)
    Q3N_UNROLL
    for (int r = 0; r < 2; r++) {
      const int c = 8 * i + 2 * member;
      const int v = row.first + group + 8 * r;
      if (v >= row.count) continue;
      float *at = to + v * stride + c;
      if (vectors && c < a.K) {
        q3n_store(at, make_float2(s.x[i][2 * r], s.x[i][2 * r + 1]));
      } else {
        if (c < a.K) at[0] = s.x[i][2 * r];
        if (c + 1 < a.K) at[1] = s.x[i][2 * r + 1];
      }
    }
}

/* Rows of the identity. */
template <int KP> __device__ __forceinline__ void start_transfer(rows_of_state<KP> &s, const rows &row) {
  const int group = (int)(threadIdx.x % 32) / 4, member = (int)(threadIdx.x % 4);
  Q3N_UNROLL
  for (int i = 0; i < KP / 8; i++)
    Q3N_UNROLL
    for (int x = 0; x < 4; x++) {
      const int v = row.first + group + x / 2 * 8;
      s.x[i][x] = v < row.count && v == 8 * i + 2 * member + x % 2 ? 1.0f : 0.0f;
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

/* Tokens 0 .. n of the chunk by the recurrence, with o from `first` on and snapshots, if they are wanted. */
template <class FORM>
__device__ __forceinline__ void one_by_one(rows_of_state<FORM::KP> &s, const q3n_gated_delta_args &a, int64_t t0, int n,
                                           int first, bool queries,
                                           const shared_chunk<typename FORM::tokens> &ch, bool state_vectors) {
  constexpr int KP = FORM::KP;
  const head at = ((job)ch.now[0]).at;
  const rows row = find_rows(a, ch.now[0]);
  const int group = (int)(threadIdx.x % 32) / 4, member = (int)(threadIdx.x % 4);
  for (int t = 0; t < n; t++) {
    const float decay = ch.decay[t], beta = ch.beta[t], key = ch.key[t];
    float query = 0.0f;
    if (queries) query = ch.query[t];
    float dot[2] = {0.0f, 0.0f}, out[2] = {0.0f, 0.0f}, u[2];
    Q3N_UNROLL
    for (int i = 0; i < KP / 8; i++) {
      const float2 k = ch.k.pair(t, i, 2 * member);
      Q3N_UNROLL
      for (int r = 0; r < 2; r++) {
        s.x[i][2 * r] *= decay, s.x[i][2 * r + 1] *= decay;
        dot[r] = __fmaf_rn(s.x[i][2 * r + 1], k.y * key, __fmaf_rn(s.x[i][2 * r], k.x * key, dot[r]));
      }
    }
    Q3N_UNROLL
    for (int r = 0; r < 2; r++) {
      const int v = row.first + group + 8 * r;
      u[r] = beta * (value_of(a, at, t0 + t, row, v) - q3n_warp_sum(dot[r], 4));
    }
    Q3N_UNROLL
    for (int i = 0; i < KP / 8; i++) {
      const float2 k = ch.k.pair(t, i, 2 * member);
      float2 q = make_float2(0.0f, 0.0f);
      if (queries) q = ch.q.pair(t, i, 2 * member);
      Q3N_UNROLL
      for (int r = 0; r < 2; r++) {
        s.x[i][2 * r] = __fmaf_rn(u[r], k.x * key, s.x[i][2 * r]);
        s.x[i][2 * r + 1] = __fmaf_rn(u[r], k.y * key, s.x[i][2 * r + 1]);
        out[r] = __fmaf_rn(s.x[i][2 * r + 1], q.y * query, __fmaf_rn(s.x[i][2 * r], q.x * query, out[r]));
      }
    }
    Q3N_UNROLL
    for (int r = 0; r < 2; r++) {
      const int v = row.first + group + 8 * r;
      const float o = q3n_warp_sum(out[r], 4);
      if (queries && member == 0 && t >= first && v < row.count)
        q3n_set_element(at.o, (t0 + t) * a.o_t + v, a.dtype, o);
    }
    if (queries && at.snapshots)
      store_state<KP>(s, at.snapshots + (t0 + t) * a.snap_t, a.snap_v, row, a, state_vectors);
  }
}

/* The states after each token of the chunk, from the one before it and u, which lies as the lanes had it:
   [C / 8][32][4]. */
template <class FORM>
__device__ __forceinline__ void replay(rows_of_state<FORM::KP> s, const q3n_gated_delta_args &a, int64_t t0, int n,
                                       const shared_chunk<typename FORM::tokens> &ch, q3n_shared<float> u,
                                       bool state_vectors) {
  constexpr int KP = FORM::KP;
  const head at = ((job)ch.now[0]).at;
  const rows row = find_rows(a, ch.now[0]);
  const int group = (int)(threadIdx.x % 32) / 4, member = (int)(threadIdx.x % 4);
  __syncwarp(); /* u lies with the lanes that made it */
  for (int t = 0; t < n; t++) {
    const float4 v = q3n_load<float4>(u + (t / 8 * 32 + group * 4 + t % 8 / 2) * 4);
    const float low = t % 2 ? v.y : v.x, high = t % 2 ? v.w : v.z, decay = ch.decay[t], key = ch.key[t];
    Q3N_UNROLL
    for (int i = 0; i < KP / 8; i++) {
      const float2 k = ch.k.pair(t, i, 2 * member);
      s.x[i][0] = __fmaf_rn(low, k.x * key, decay * s.x[i][0]);
      s.x[i][1] = __fmaf_rn(low, k.y * key, decay * s.x[i][1]);
      s.x[i][2] = __fmaf_rn(high, k.x * key, decay * s.x[i][2]);
      s.x[i][3] = __fmaf_rn(high, k.y * key, decay * s.x[i][3]);
    }
    store_state<KP>(s, at.snapshots + (t0 + t) * a.snap_t, a.snap_v, row, a, state_vectors);
  }
}

/* Adds a left factor, exactly in three parts, times 8 rows of numbers that `right` gives in pairs, to all channels. */
template <int KP, class RIGHT>
__device__ __forceinline__ void add_whole(rows_of_state<KP> &sums, const float (&x)[4], const RIGHT &right) {
  const q3n_left factor = q3n_split_left(x);
  uint32_t least[4];
  Q3N_UNROLL
  for (int i = 0; i < 4; i++) {
    const float low = __int_as_float((int)factor.low[i]), taken = __int_as_float((int)(factor.low[i] & 0xffffe000u));
    least[i] = (uint32_t)__float_as_int(low - taken);
  }
  Q3N_UNROLL
  for (int c = 0; c < KP / 8; c++) {
    const q3n_right other = q3n_split_right(right(c));
    q3n_mma_tf32(sums.x[c], factor.high, other.high, sums.x[c]);
    q3n_mma_tf32(sums.x[c], factor.high, other.low, sums.x[c]);
    q3n_mma_tf32(sums.x[c], factor.low, other.high, sums.x[c]);
    q3n_mma_tf32(sums.x[c], least, other.high, sums.x[c]);
  }
}

template <int KP> __device__ __forceinline__ void clear(rows_of_state<KP> &s) {
  Q3N_UNROLL
  for (int c = 0; c < KP / 8; c++)
    Q3N_UNROLL
    for (int x = 0; x < 4; x++) s.x[c][x] = 0.0f;
}

/* Whether a row that was finite is not any more. */
template <int KP> __device__ __forceinline__ bool overflows(const rows_of_state<KP> &s, const bool (&live)[2]) {
  bool over = false;
  Q3N_UNROLL
  for (int c = 0; c < KP / 8; c++)
    Q3N_UNROLL
    for (int x = 0; x < 4; x++) over |= live[x / 2] && !small(s.x[c][x]);
  return __any_sync(ALL, over);
}

/* S <- S and the chunk's decay, plus what was written. */
template <int KP>
__device__ __forceinline__ void take(rows_of_state<KP> &s, const rows_of_state<KP> &written, const numbers &ch) {
  const float gain = ch.gain[0], rest = ch.gain[1];
  Q3N_UNROLL
  for (int c = 0; c < KP / 8; c++)
    Q3N_UNROLL
    for (int x = 0; x < 4; x++)
      s.x[c][x] = __fmaf_rn(gain, s.x[c][x], __fmaf_rn(rest, s.x[c][x], written.x[c][x] * UNSCALE));
}

} /* namespace */

#endif
