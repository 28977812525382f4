/* The chunk form for keys, queries and values in bf16, which are factors as they lie. What is f32 (the state, A, P, u)
   is two bf16 numbers, hi + lo, 2^-17 off at most: two products with a key or query, three where both sides are f32.
   Columns of two sums are the columns of a left factor: u and S go from product to product without a shuffle.

   As in the f32 form, from the first token on at which what was finite is not, a chunk goes token by token. */
#ifndef Q3N_GATED_DELTA_CHUNKED_BF16_CUH
#define Q3N_GATED_DELTA_CHUNKED_BF16_CUH

#include "gated_delta_chunked_parts.cuh"

namespace {

/* Rows of keys or queries, two channels a word. Eights of channels, 16 bytes, change places by rows, so that the same
   eight of eight rows lies in different banks. */
template <int KP> struct bf16_tokens {
  q3n_shared<uint32_t> x; /* [C][KP / 2] */

  static __device__ __forceinline__ int place(int row, int eight) {
    return row * (KP / 2) + (eight ^ (KP >= 64 ? row & 7 : row / 2 & 3)) * 4;
  }
  __device__ __forceinline__ uint32_t word(int row, int eight, int member) const {
    return x[place(row, eight) + member];
  }
  __device__ __forceinline__ float2 pair(int row, int eight, int one) const {
    const uint32_t u = word(row, eight, one / 2);
    return make_float2(q3n_bf16_float(u & 0xffffu), q3n_bf16_float(u >> 16));
  }
  /* Of an eighth of the row. */
  __device__ __forceinline__ float squares(int row, int member) const {
    float sum = 0.0f;
    for (int eight = member; eight < KP / 8; eight += 8) {
      Q3N_UNROLL
      for (int i = 0; i < 4; i++) {
        const float2 v = pair(row, eight, 2 * i);
        sum = __fmaf_rn(v.x, v.x, __fmaf_rn(v.y, v.y, sum));
      }
    }
    return sum;
  }
};

/* The lane, in a way that forbids to keep the addresses made of it from chunk to chunk: registers are few. */
__device__ __forceinline__ int lane_anew() {
  int lane = (int)(threadIdx.x % 32);
#if defined(__CUDACC__)
  asm volatile("" : "+r"(lane));
#endif
  return lane;
}

/* Two f32 numbers as hi + lo each. */
__device__ __forceinline__ void split(float x, float y, uint32_t &hi, uint32_t &lo) {
  hi = q3n_pack_bf16(x, y);
  lo = q3n_pack_bf16(x - q3n_bf16_float(hi & 0xffffu), y - q3n_bf16_float(hi >> 16));
}

struct left_factor {
  uint32_t hi[4], lo[4];
};
struct right_factor {
  uint32_t hi[2], lo[2];
};

/* Two neighbouring tiles of sums: their columns are the factor's 16. */
__device__ __forceinline__ left_factor split_left(const float (&x)[4], const float (&y)[4]) {
  left_factor f;
  split(x[0], x[1], f.hi[0], f.lo[0]);
  split(x[2], x[3], f.hi[1], f.lo[1]);
  split(y[0], y[1], f.hi[2], f.lo[2]);
  split(y[2], y[3], f.hi[3], f.lo[3]);
  return f;
}

/* Number i of the first or second of those tiles, as hi + lo have it. */
__device__ __forceinline__ float joined(const left_factor &f, int tile, int i) {
  const uint32_t hi = f.hi[2 * tile + i / 2], lo = f.lo[2 * tile + i / 2];
  return i % 2 ? q3n_bf16_float(hi >> 16) + q3n_bf16_float(lo >> 16)
               : q3n_bf16_float(hi & 0xffffu) + q3n_bf16_float(lo & 0xffffu);
}

/* Rows i .. i + 8 and columns j .. j + 16 of A or P, transposed. */
__device__ __forceinline__ right_factor split_matrix(q3n_shared<float> x, int i, int j, int lane) {
  right_factor f;
  Q3N_UNROLL
  for (int half = 0; half < 2; half++) {
    const float2 v = q3n_load<float2>(x + q3n_place(i + lane / 4, j / 8 + half, 2 * (lane % 4), C));
    split(v.x, v.y, f.hi[half], f.lo[half]);
  }
  return f;
}

__device__ __forceinline__ void add_product(float (&sums)[4], const left_factor &a, const uint32_t (&b)[2]) {
  q3n_mma_bf16(sums, a.lo, b, sums);
  q3n_mma_bf16(sums, a.hi, b, sums);
}

__device__ __forceinline__ void add_product(float (&sums)[4], const left_factor &a, const right_factor &b) {
  q3n_mma_bf16(sums, a.hi, b.lo, sums);
  add_product(sums, a, b.hi);
}

template <int WIDTH> struct bf16_form {
  static constexpr int KP = WIDTH;
  static constexpr int STAGE = C * KP / 2; /* elements of a chunk's keys */
  static constexpr int U = C * ROWS;       /* floats that a warp works in */
  static constexpr int VECTOR = 8;         /* channels of a copy in the background */
  using element = uint32_t;
  using tokens = bf16_tokens<KP>;
  using chunk = shared_chunk<tokens>;

  /* q, if wanted, and k of the tokens t0 .. t0 + n, zeros past n and K. */
  static __device__ __forceinline__ void fetch(const q3n_gated_delta_args &a, const head &at, int64_t t0, int n,
                                               bool queries, bool vectors, q3n_shared<uint32_t> k) {
    for (int i = (int)threadIdx.x; i < (queries ? 2 : 1) * C * KP / 8; i += (int)blockDim.x) {
      const int which = i / (C * KP / 8), row = i / (KP / 8) % C, c = i % (KP / 8) * 8;
      const uint16_t *from = (const uint16_t *)(which ? at.q : at.k) + (t0 + row) * (which ? a.q_t : a.k_t);
      const q3n_shared<uint32_t> to = k + which * STAGE + tokens::place(row, c / 8);
      if (row < n && c < a.K && vectors) {
        q3n_copy_async16(to, (const uint32_t *)(const void *)(from + c));
      } else {
        const auto channel = [&](int j) { return row < n && j < a.K ? (uint32_t)from[j] : 0u; };
        Q3N_UNROLL
        for (int j = 0; j < 4; j++) to[j] = channel(c + 2 * j) | channel(c + 2 * j + 1) << 16;
      }
    }
    q3n_copy_commit();
  }

  static __device__ __forceinline__ void scores(const chunk &ch, int i0, int j0, bool queries, float (&kk)[4],
                                                float (&qk)[4]) {
    const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4;
    Q3N_UNROLL
    for (int x = 0; x < 4; x++) kk[x] = qk[x] = 0.0f;
    Q3N_UNROLL
    for (int c = 0; c < KP / 8; c += 2) {
      const uint32_t key[2] = {ch.k.word(j0 + group, c, member), ch.k.word(j0 + group, c + 1, member)};
      const auto add = [&](const tokens &x, float(&sums)[4]) {
        const uint32_t left[4] = {x.word(i0 + group, c, member), x.word(i0 + group + 8, c, member),
                                  x.word(i0 + group, c + 1, member), x.word(i0 + group + 8, c + 1, member)};
        q3n_mma_bf16(sums, left, key, sums);
      };
      add(ch.k, kk);
      if (queries) add(ch.q, qk);
    }
  }

  /* Where sums lie: tokens 8 e + 2 member + x % 2, rows group + x / 2 * 8. */
  static __device__ __forceinline__ int token(int e, int x) {
    return 8 * e + 2 * (int)(threadIdx.x % 4) + x % 2;
  }
  static __device__ __forceinline__ int channel(const rows &row, int x) {
    return row.first + (int)(threadIdx.x % 32) / 4 + x / 2 * 8;
  }

  /* Addresses go from token to token: 32 of them would not fit into the registers. */
  static __device__ __forceinline__ void load_values(const q3n_gated_delta_args &a, int64_t t0, int n, const job &now,
                                                     float (&v)[C / 8][4]) {
    const rows row = find_rows(a, now);
    const uint16_t *from = (const uint16_t *)now.at.v + (t0 + token(0, 0)) * a.v_t + channel(row, 0);
    Q3N_UNROLL
    for (int e = 0; e < C / 8; e++) {
      Q3N_UNROLL
      for (int x = 0; x < 4; x++) {
        const bool there = !row.transfer && token(e, x) < n && channel(row, x) < row.count;
        v[e][x] = there ? q3n_bf16_float(from[x % 2 * a.v_t + x / 2 * 8]) : 0.0f;
      }
      from += 8 * a.v_t;
    }
  }

  /* o of the first n of 16 tokens from t0 on. */
  static __device__ __forceinline__ void store_outputs(const q3n_gated_delta_args &a, int64_t t0, int n,
                                                       const job &now, const float (&o)[2][4]) {
    const rows row = find_rows(a, now);
    uint16_t *const to = (uint16_t *)now.at.o + (t0 + token(0, 0)) * a.o_t + channel(row, 0);
    Q3N_UNROLL
    for (int h = 0; h < 2; h++)
      Q3N_UNROLL
      for (int x = 0; x < 4; x++)
        if (token(h, x) < n && channel(row, x) < row.count)
          to[(8 * h + x % 2) * a.o_t + x / 2 * 8] = (uint16_t)q3n_float_bf16(o[h][x]);
  }

  /* w and o, which hold 0, take S k and S q of all tokens. */
  static __device__ __forceinline__ void read_state(const rows_of_state<KP> &s, bool queries, const chunk &ch,
                                                    float (&w)[C / 8][4], float (&o)[C / 8][4]) {
    const int lane = lane_anew(), group = lane / 4, member = lane % 4;
    Q3N_UNROLL
    for (int c = 0; c < KP / 8; c += 2) {
      float x[2][4];
      Q3N_UNROLL
      for (int i = 0; i < 4; i++) x[0][i] = s.x[c][i] * SCALE, x[1][i] = s.x[c + 1][i] * SCALE;
      const left_factor state = split_left(x[0], x[1]);
      Q3N_UNROLL
      for (int e = 0; e < C / 8; e++) {
        const int t = 8 * e + group;
        const uint32_t key[2] = {ch.k.word(t, c, member), ch.k.word(t, c + 1, member)};
        add_product(w[e], state, key);
        if (!queries) continue;
        const uint32_t query[2] = {ch.q.word(t, c, member), ch.q.word(t, c + 1, member)};
        add_product(o[e], state, query);
      }
    }
  }

  /* `good`, or the first token before it at which a row is not finite any more: of two tiles of 8 tokens. */
  static __device__ __forceinline__ int watch(int good, const float (&x)[4], const float (&y)[4],
                                              const bool (&live)[2]) {
    const int member = (int)(threadIdx.x % 4);
    int first = good;
    Q3N_UNROLL
    for (int i = 3; i >= 0; i--) {
      const int t = 2 * member + i % 2;
      if (live[i / 2] && !small(y[i]) && t + 8 < first) first = t + 8;
      if (live[i / 2] && !small(x[i]) && t < first) first = t;
    }
    if (!__any_sync(ALL, first < good)) return good;
    Q3N_UNROLL
    for (int by = 16; by > 0; by /= 2) {
      const int other = __shfl_xor_sync(ALL, first, by);
      if (other < first) first = other;
    }
    return first;
  }

  /* u of the tokens from `good` on is 0: what is not finite there must not meet the zeros of A and P. */
  static __device__ __forceinline__ void keep(int good, float (&x)[4], float (&y)[4]) {
    if (good >= BLOCK) return;
    const int member = (int)(threadIdx.x % 4);
    Q3N_UNROLL
    for (int i = 0; i < 4; i++) {
      if (2 * member + i % 2 >= good) x[i] = 0.0f;
      if (2 * member + i % 2 + 8 >= good) y[i] = 0.0f;
    }
  }

  /* u from w, the right-hand sides, and o from S q, which lies in `kept`: 16 tokens after 16. Returns how many of n
     tokens are good: o is stored for those. */
  static __device__ __forceinline__ int solve(const q3n_gated_delta_args &a, int64_t t0, int n, bool queries,
                                              const chunk &ch, q3n_shared<float> kept, float (&w)[C / 8][4],
                                              left_factor (&u)[C / BLOCK], const bool (&live)[2]) {
    const int lane = lane_anew(), bad = ch.bad[0];
    int done = 0;
    Q3N_UNROLL
    for (int b = 0; b < C / BLOCK; b++) {
      const int i0 = b * BLOCK;
      if (i0 >= n || done < i0) break;
      float(&w0)[4] = w[2 * b], (&w1)[4] = w[2 * b + 1];
      const auto add = [&](const left_factor &factor, int j, float sign) {
        Q3N_UNROLL
        for (int h = 0; h < 2; h++) {
          float sums[4] = {};
          add_product(sums, factor, split_matrix(ch.a, i0 + 8 * h, j * BLOCK, lane));
          Q3N_UNROLL
          for (int x = 0; x < 4; x++) w[2 * b + h][x] = __fmaf_rn(sign, sums[x], w[2 * b + h][x]);
        }
      };
      Q3N_UNROLL
      for (int j = 0; j < b; j++) add(u[j], j, -UNSCALE);
      int good = watch(bad - i0 < BLOCK ? bad - i0 : BLOCK, w0, w1, live);
      keep(good, w0, w1);
      add(split_left(w0, w1), b, UNSCALE);
      good = watch(good, w0, w1, live);
      keep(good, w0, w1);
      u[b] = split_left(w0, w1);
      if (queries) {
        float o[2][4];
        Q3N_UNROLL
        for (int h = 0; h < 2; h++) {
          float sums[4] = {};
          Q3N_UNROLL
          for (int j = 0; j <= b; j++) add_product(sums, u[j], split_matrix(ch.p, i0 + 8 * h, j * BLOCK, lane));
          const float4 read = q3n_load<float4>(kept + ((2 * b + h) * 32 + lane) * 4);
          const float from_state[4] = {read.x, read.y, read.z, read.w};
          Q3N_UNROLL
          for (int x = 0; x < 4; x++) {
            const float self = ch.self[token(2 * b + h, x)];
            o[h][x] = __fmaf_rn(UNSCALE, sums[x], __fmaf_rn(self, w[2 * b + h][x], from_state[x]));
          }
        }
        good = watch(good, o[0], o[1], live);
        store_outputs(a, t0 + i0, n - i0 < good ? n - i0 : good, ch.now[0], o);
      }
      done += good;
    }
    return done;
  }

  /* u times the keys decayed to the chunk's end. */
  static __device__ __forceinline__ void write(rows_of_state<KP> &written, int n, const chunk &ch,
                                               const left_factor (&u)[C / BLOCK]) {
    const int lane = lane_anew(), member = lane % 4;
    clear(written);
    Q3N_UNROLL
    for (int b = 0; b < C / BLOCK; b++) {
      if (b * BLOCK >= n) break;
      float x[2][4];
      Q3N_UNROLL
      for (int h = 0; h < 2; h++)
        Q3N_UNROLL
        for (int i = 0; i < 4; i++) {
          const int t = b * BLOCK + 8 * h + 2 * member + i % 2;
          x[h][i] = joined(u[b], h, i) * ((float)ch.end[t] * SCALE * (float)ch.key[t]);
        }
      const left_factor factor = split_left(x[0], x[1]);
      Q3N_UNROLL
      for (int c = 0; c < KP / 8; c += 2) {
        uint32_t keys[4];
        q3n_load_transposed(keys, ch.k.x + tokens::place(b * BLOCK + lane % 16, c + lane / 16));
        add_product(written.x[c], factor, {keys[0], keys[1]});
        add_product(written.x[c + 1], factor, {keys[2], keys[3]});
      }
    }
  }

  /* A chunk of n tokens, from when A and P are there. */
  static __device__ __forceinline__ void run(rows_of_state<KP> &s, const q3n_gated_delta_args &a, int64_t t0, int n,
                                             bool queries, const chunk &ch, q3n_shared<float> kept,
                                             bool (&live)[2], bool state_vectors) {
    const int lane = (int)(threadIdx.x % 32);
    float v[C / 8][4], w[C / 8][4] = {}, o[C / 8][4] = {};
    load_values(a, t0, n, ch.now[0], v);
    q3n_invert_diagonal(n, SCALE, ch.a); /* by two warps: the others go on */
    read_state(s, queries, ch, w, o);
    Q3N_UNROLL
    for (int e = 0; e < C / 8; e++) {
      Q3N_UNROLL
      for (int x = 0; x < 4; x++) {
        const int t = token(e, x);
        const float start = ch.start[t], beta = ch.beta[t];
        w[e][x] = beta * __fmaf_rn(-start, w[e][x] * UNSCALE * (float)ch.key[t], v[e][x]);
        if (queries) o[e][x] = start * (o[e][x] * UNSCALE * (float)ch.query[t]);
      }
      q3n_store(kept + (e * 32 + lane) * 4, make_float4(o[e][0], o[e][1], o[e][2], o[e][3]));
    }
    __syncthreads(); /* the inverses are there; o lies with the lanes that made it */
    left_factor u[C / BLOCK] = {};
    const int done = solve(a, t0, n, queries, ch, kept, w, u, live);
    if (done >= n && queries && ((job)ch.now[0]).at.snapshots) {
      Q3N_UNROLL
      for (int e = 0; e < C / 8; e++)
        q3n_store(kept + (e * 32 + lane) * 4,
                  make_float4(joined(u[e / 2], e % 2, 0), joined(u[e / 2], e % 2, 1), joined(u[e / 2], e % 2, 2),
                              joined(u[e / 2], e % 2, 3)));
      replay<bf16_form>(s, a, t0, n, ch, kept, state_vectors);
    }
    if (done >= n) {
      rows_of_state<KP> written;
      write(written, n, ch, u);
      if (!overflows(written, live)) return take(s, written, ch);
    }
    one_by_one<bf16_form>(s, a, t0, n, done, queries, ch, state_vectors);
    find_live<KP>(live, s);
  }
};

} /* namespace */

#endif
