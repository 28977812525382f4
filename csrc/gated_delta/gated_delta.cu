/* The recurrence, for decoding (T = 1 .. 8) and any other T: a state row lies across the lanes of a group and stays in
   registers over all tokens. With K = 128 a group is 8 lanes, a warp has 4 rows, a block 16: V = 128 makes 8 blocks a
   head. README.md has the floors. */
#include "../cuda/reduce.cuh"
#include "gated_delta_parts.cuh"

namespace {

constexpr int THREADS = 128;

/* The channels of a lane: four neighbours, LANES * 4 further four more, N times. Those past K are 0.
   WHOLE: there are none, and every row of q, k, g and states is aligned to 16 bytes. Which lane has which channel does
   not depend on it: the same bits from any layout. */
template <int LANES, int N, bool WHOLE>
__device__ __forceinline__ void load(float (&x)[4 * N], const float *row, int lane, int64_t K) {
  Q3N_UNROLL
  for (int n = 0; n < N; n++) {
    const int64_t c = 4 * (lane + n * LANES);
    if (WHOLE) {
      const float4 v = q3n_load<float4>(row + c);
      x[4 * n] = v.x, x[4 * n + 1] = v.y, x[4 * n + 2] = v.z, x[4 * n + 3] = v.w;
    } else {
      Q3N_UNROLL
      for (int i = 0; i < 4; i++) x[4 * n + i] = c + i < K ? row[c + i] : 0.0f;
    }
  }
}

template <int LANES, int N, bool WHOLE>
__device__ __forceinline__ void store(float *row, const float (&x)[4 * N], int lane, int64_t K) {
  Q3N_UNROLL
  for (int n = 0; n < N; n++) {
    const int64_t c = 4 * (lane + n * LANES);
    if (WHOLE) {
      q3n_store(row + c, make_float4(x[4 * n], x[4 * n + 1], x[4 * n + 2], x[4 * n + 3]));
    } else {
      Q3N_UNROLL
      for (int i = 0; i < 4; i++)
        if (c + i < K) row[c + i] = x[4 * n + i];
    }
  }
}

template <int LANES, int N> __device__ __forceinline__ float dot(const float (&x)[4 * N], const float (&y)[4 * N]) {
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  Q3N_UNROLL
  for (int c = 0; c < 4 * N; c++) part[c % 4] = __fmaf_rn(x[c], y[c], part[c % 4]);
  return q3n_warp_sum((part[0] + part[1]) + (part[2] + part[3]), LANES);
}

/* The same of q or k, `first` elements into an array of dtype. */
template <int LANES, int N, bool WHOLE>
__device__ __forceinline__ void load_token(float (&x)[4 * N], const void *array, int64_t first, q3n_dtype dtype,
                                           int lane, int64_t K) {
  Q3N_UNROLL
  for (int n = 0; n < N; n++) {
    const int64_t c = 4 * (lane + n * LANES);
    if (WHOLE) {
      const float4 v = q3n_four(array, first + c, dtype);
      x[4 * n] = v.x, x[4 * n + 1] = v.y, x[4 * n + 2] = v.z, x[4 * n + 3] = v.w;
    } else {
      Q3N_UNROLL
      for (int i = 0; i < 4; i++) x[4 * n + i] = c + i < K ? q3n_element(array, first + c + i, dtype) : 0.0f;
    }
  }
}

/* What a lane reads of a token; g[0] is the scalar gate's. */
template <int N, bool CHANNEL> struct token {
  float k[4 * N], q[4 * N], g[CHANNEL ? 4 * N : 1], v, beta;
};

template <int LANES, int N, bool CHANNEL, bool WHOLE>
__device__ __forceinline__ void read(token<N, CHANNEL> &x, const q3n_gated_delta_args &a, const head &at, int64_t t,
                                     int64_t row, int lane) {
  load_token<LANES, N, WHOLE>(x.k, at.k, t * a.k_t, a.dtype, lane, a.K);
  load_token<LANES, N, WHOLE>(x.q, at.q, t * a.q_t, a.dtype, lane, a.K);
  if constexpr (CHANNEL)
    load<LANES, N, WHOLE>(x.g, at.g + t * a.g_t, lane, a.K);
  else
    x.g[0] = at.g ? at.g[t * a.g_t] : 0.0f;
  x.v = row < a.V ? q3n_element(at.v, t * a.v_t + row, a.dtype) : 0.0f;
  x.beta = at.beta[t * a.beta_t];
}

/* One block: THREADS / LANES rows of one head. */
template <int LANES, int N, bool CHANNEL, bool WHOLE>
__global__ void __launch_bounds__(THREADS) recurrent(q3n_gated_delta_args a, int64_t blocks_per_head, int64_t items) {
  constexpr int ROWS = THREADS / LANES;
  const int lane = (int)(threadIdx.x % LANES);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t which = item / blocks_per_head;
    const head at = find_head(a, which / a.HV, which % a.HV);
    /* Rows past V take part in the sums of their warp and store nothing. */
    const int64_t row = item % blocks_per_head * ROWS + threadIdx.x / LANES;
    const bool mine = row < a.V;

    float s[4 * N];
    if (mine && at.state_in) {
      load<LANES, N, WHOLE>(s, at.state_in + row * a.state_v, lane, a.K);
    } else {
      Q3N_UNROLL
      for (int c = 0; c < 4 * N; c++) s[c] = 0.0f;
    }

    /* The next token is fetched while this one is worked on, where registers suffice. */
    constexpr bool AHEAD = N <= 4;
    token<N, CHANNEL> next;
    if (AHEAD && at.T > 0) read<LANES, N, CHANNEL, WHOLE>(next, a, at, 0, row, lane);
    for (int64_t t = 0; t < at.T; t++) {
      if (!AHEAD) read<LANES, N, CHANNEL, WHOLE>(next, a, at, t, row, lane);
      token<N, CHANNEL> now = next;
      if (AHEAD && t + 1 < at.T) read<LANES, N, CHANNEL, WHOLE>(next, a, at, t + 1, row, lane);

      float k_norm = 1.0f, q_norm = 1.0f;
      if (a.qk_l2norm) {
        k_norm = 1.0f / sqrtf(dot<LANES, N>(now.k, now.k) + a.qk_l2norm_eps);
        q_norm = 1.0f / sqrtf(dot<LANES, N>(now.q, now.q) + a.qk_l2norm_eps);
      }
      const float scalar = CHANNEL ? 1.0f : expf(now.g[0]);
      Q3N_UNROLL
      for (int c = 0; c < 4 * N; c++) {
        now.k[c] = now.k[c] * k_norm;
        now.q[c] = now.q[c] * q_norm * a.scale;
        s[c] *= CHANNEL ? expf(now.g[CHANNEL ? c : 0]) : scalar;
      }
      const float u = now.beta * (now.v - dot<LANES, N>(s, now.k));
      /* past K a u that is infinite would leave NaN */
      Q3N_UNROLL
      for (int c = 0; c < 4 * N; c++)
        if (WHOLE || 4 * (lane + c / 4 * LANES) + c % 4 < a.K) s[c] = __fmaf_rn(u, now.k[c], s[c]);
      const float o = dot<LANES, N>(s, now.q);
      if (mine && lane == 0) q3n_set_element(at.o, t * a.o_t + row, a.dtype, o);
      if (mine && at.snapshots)
        store<LANES, N, WHOLE>(at.snapshots + t * a.snap_t + row * a.snap_v, s, lane, a.K);
    }
    if (mine && at.state_out) store<LANES, N, WHOLE>(at.state_out + row * a.state_v, s, lane, a.K);
  }
}

template <int LANES, int N> q3n_status launch(const q3n_gated_delta_args *a, bool aligned, q3n_stream stream) {
  const bool whole = aligned && a->K == 4 * N * LANES;
  const int64_t rows = THREADS / LANES, per_head = (a->V + rows - 1) / rows, items = a->B * a->HV * per_head;
  const int64_t grid = items < INT32_MAX ? items : INT32_MAX;
  if (a->gate == Q3N_GATE_CHANNEL)
    return whole ? Q3N_LAUNCH((recurrent<LANES, N, true, true>), (*a, per_head, items), grid, THREADS, 0, stream)
                  : Q3N_LAUNCH((recurrent<LANES, N, true, false>), (*a, per_head, items), grid, THREADS, 0, stream);
  return whole ? Q3N_LAUNCH((recurrent<LANES, N, false, true>), (*a, per_head, items), grid, THREADS, 0, stream)
                : Q3N_LAUNCH((recurrent<LANES, N, false, false>), (*a, per_head, items), grid, THREADS, 0, stream);
}

} /* namespace */

Q3N_CUDA_SCRATCH(gated_delta, gated_delta_recurrent) {
  (void)a;
  return 0;
}

Q3N_CUDA_OPERATOR(gated_delta, gated_delta_recurrent) {
  (void)scratch;
  const bool vectors = tokens_aligned(a, 4) &&
                      (a->gate != Q3N_GATE_CHANNEL || aligned(a->g, a->g_b, a->g_t, a->g_h, 0)) &&
                      aligned(a->state_in, a->state_slot, a->state_h, a->state_v, 0) &&
                      aligned(a->state_out, a->state_slot, a->state_h, a->state_v, 0) &&
                      aligned(a->snapshots, a->snap_b, a->snap_t, a->snap_h, a->snap_v);
  if (a->K <= 32) return launch<8, 1>(a, vectors, stream);
  if (a->K <= 64) return launch<8, 2>(a, vectors, stream);
  if (a->K <= 128) return launch<8, 4>(a, vectors, stream);
  if (a->K <= 256) return launch<32, 2>(a, vectors, stream);
  return launch<32, 8>(a, vectors, stream);
}
