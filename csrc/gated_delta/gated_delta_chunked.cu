/* The chunk form for prefill, the equations of gated_delta_chunked_scalar.c on tensor cores. A block is up to 8 warps,
   which share the chunk's keys and queries, fetched while the chunk before it is worked on, and their products A and P.

   A single long sequence leaves most of a GPU without work. gated_delta_segmented cuts it: what tokens do to a state is
   S <- S M + L, for every row of S by itself. A first pass finds the M and L of all inner segments at once, as rows of
   a state that starts as the identity and is written no values, and as one that starts as zeros; and runs the first
   segment. In the second pass a block goes from the first segment's end through the M and L before its own segment. */
#include "gated_delta_chunked_bf16.cuh"
#include "gated_delta_chunked_f32.cuh"

namespace {

/* How sequences are cut, and what this launch does of it. */
struct plan {
  enum { WHOLE, TRANSFERS, REST } pass;
  int segments;   /* at most, of a sequence */
  float *scratch; /* for every sequence and head: the first segment's end [V][K], the L [V][K], the M [K][K] */
};

/* Blocks of a head in a launch, of `warps` each. */
__host__ __device__ __forceinline__ int64_t value_blocks(const q3n_gated_delta_args &a, int64_t warps) {
  return (tiles_of(a.V) + warps - 1) / warps;
}
__host__ __device__ __forceinline__ int64_t transfer_blocks(const q3n_gated_delta_args &a, int64_t warps) {
  return (tiles_of(a.V) + tiles_of(a.K) + warps - 1) / warps;
}
__host__ __device__ __forceinline__ int64_t blocks_of(const q3n_gated_delta_args &a, const plan &p, int64_t warps) {
  const int64_t values = value_blocks(a, warps), inner = p.segments - 2;
  return p.pass == plan::WHOLE       ? values
         : p.pass == plan::TRANSFERS ? values + (inner > 0 ? inner : 0) * transfer_blocks(a, warps)
                                     : values * (p.segments - 1);
}

/* Floats of scratch of a sequence and head. */
__host__ __device__ __forceinline__ int64_t scratch_floats(const q3n_gated_delta_args &a, int segments) {
  return segments < 2 ? 0 : (segments - 1) * a.V * a.K + (segments - 2) * a.K * a.K;
}

/* Where state after the first segment, or L, and M of a segment lie. */
__device__ __forceinline__ float *local_of(const q3n_gated_delta_args &a, const plan &p, int64_t pair, int segment) {
  return p.scratch + pair * scratch_floats(a, p.segments) + segment * a.V * a.K;
}
__device__ __forceinline__ float *transfer_of(const q3n_gated_delta_args &a, const plan &p, int64_t pair, int segment) {
  return local_of(a, p, pair, p.segments - 1) + (segment - 1) * a.K * a.K;
}

/* Tokens of a segment of a sequence of T: whole chunks. */
__device__ __forceinline__ int64_t segment_tokens(int64_t T, int segments) {
  const int64_t chunks = (T + C - 1) / C;
  return (chunks + segments - 1) / segments * C;
}

__device__ __forceinline__ int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

__device__ __forceinline__ int64_t end_of(const job &j, int segment) {
  return least((segment + 1) * j.length, j.at.T);
}

/* M into shared memory, zeros past K. The block takes part; a barrier goes before and after. */
template <int KP, class T>
__device__ __forceinline__ void fetch_transfer(const q3n_gated_delta_args &a, const float *m, q3n_shared<T> to) {
  for (int i = (int)threadIdx.x; i < KP * KP / 4; i += (int)blockDim.x) {
    const int row = i / (KP / 4), c = i % (KP / 4) * 4;
    const q3n_shared<T> at = to + q3n_place(row, c / 8, c % 8, KP);
    const T *from = (const T *)(const void *)m + row * a.K + c;
    if (row < a.K && c < a.K && a.K % 4 == 0) {
      q3n_copy_async16(at, from);
    } else {
      Q3N_UNROLL
      for (int j = 0; j < 4; j++) at[j] = row < a.K && c + j < a.K ? from[j] : (T)0;
    }
  }
  q3n_copy_commit();
  q3n_copy_wait<0>();
}

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(uint32_t x) { return __uint_as_float(x); }

/* S M + L. */
template <int KP, class T>
__device__ __forceinline__ void cross(rows_of_state<KP> &after, rows_of_state<KP> &s, const q3n_gated_delta_args &a,
                                      q3n_shared<T> m, const float *local, const rows &row) {
  const int lane = (int)(threadIdx.x % 32), group = lane / 4, member = lane % 4;
  clear(after);
  /* S goes round once, so that one piece of code takes its columns in turn. */
  Q3N_ROLL
  for (int j = 0; j < KP / 8; j++) {
    float first[4], x[4];
    Q3N_UNROLL
    for (int i = 0; i < 4; i++) first[i] = s.x[0][i], x[i] = first[i] * SCALE;
    Q3N_UNROLL
    for (int c = 0; c + 1 < KP / 8; c++)
      Q3N_UNROLL
      for (int i = 0; i < 4; i++) s.x[c][i] = s.x[c + 1][i];
    Q3N_UNROLL
    for (int i = 0; i < 4; i++) s.x[KP / 8 - 1][i] = first[i];
    const int k = 8 * j + 2 * member;
    add_whole<KP>(after, x, [&](int c) {
      return make_float2(number((T)m[q3n_place(k, c, group, KP)]) * SCALE,
                         number((T)m[q3n_place(k + 1, c, group, KP)]) * SCALE);
    });
  }
  Q3N_UNROLL
  for (int c = 0; c < KP / 8; c++)
    Q3N_UNROLL
    for (int x = 0; x < 4; x++) {
      const int k = 8 * c + 2 * member + x % 2, v = row.first + group + x / 2 * 8;
      const float l = v < row.count && k < a.K ? local[v * a.K + k] : 0.0f;
      after.x[c][x] = __fmaf_rn(after.x[c][x] * UNSCALE, UNSCALE, l);
    }
}

__device__ __forceinline__ job find_job(const q3n_gated_delta_args &a, const plan &p, int64_t item, int warps) {
  const int64_t per_pair = blocks_of(a, p, warps), values = value_blocks(a, warps), part = item % per_pair;
  job j = {};
  j.item = item;
  j.pair = item / per_pair;
  j.at = find_head(a, j.pair / a.HV, j.pair % a.HV);
  j.length = p.pass == plan::WHOLE ? j.at.T : segment_tokens(j.at.T, p.segments);
  j.inner = p.pass == plan::TRANSFERS && part >= values;
  const int64_t later = j.inner ? part - values : part, each = j.inner ? transfer_blocks(a, warps) : values;
  j.tile = (int)(later % each) * warps;
  j.last = (int)(later / each) + (p.pass == plan::REST || j.inner);
  j.first = p.pass == plan::REST ? 1 : j.last;
  j.ends = (j.last + 1) * j.length >= j.at.T;
  return j;
}

/* A segment past the sequence's end, and the L and M of the last one. */
__device__ __forceinline__ bool unneeded(const job &j) {
  return j.last > 0 && (j.last * j.length >= j.at.T || (j.inner && j.ends));
}

/* One block: ROWS rows a warp of one head and segment. Asked for one block, ptxas finds registers for the small sizes,
   and not asked, for the large one; else it spills. */
template <class FORM>
__global__ void __launch_bounds__(WARPS * 32, FORM::KP < 128)
    chunked(q3n_gated_delta_args a, plan p, int64_t items, bool token_vectors, bool state_vectors) {
  constexpr int KP = FORM::KP;
  constexpr int64_t MATRICES = 4 * FORM::STAGE * sizeof(typename FORM::element);
  const int warps = (int)(blockDim.x / 32), warp = (int)(threadIdx.x / 32);
  Q3N_SHARED_DYNAMIC(typename FORM::element, tokens, 0, 4 * FORM::STAGE); /* keys and queries of a chunk and the next */
  Q3N_SHARED_DYNAMIC(float, matrix_a, MATRICES, C * C);
  Q3N_SHARED_DYNAMIC(float, matrix_p, MATRICES + C * C * 4, C * C);
  Q3N_SHARED_DYNAMIC(float, all_u, MATRICES + 2 * C * C * 4, warps * FORM::U);
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
  Q3N_SHARED(job, task, 1);
  typename FORM::chunk ch = {{matrix_a, matrix_p, self, decay, beta, key, query, start, end, near, since, until, gain,
                              bad, task},
                             {tokens},
                             {tokens}};
  const q3n_shared<float> u = all_u + warp * FORM::U;

  for (int64_t item = blockIdx.x; item < items; item = ((job)task[0]).item + gridDim.x) {
    __syncthreads(); /* the item before is done with */
    if (threadIdx.x == 0) task[0] = find_job(a, p, item, warps);
    __syncthreads();
    if (unneeded(task[0])) continue;

    const rows row = find_rows(a, task[0]);
    rows_of_state<KP> s;
    bool live[2];
    if (row.transfer)
      start_transfer<KP>(s, row);
    else if (p.pass == plan::REST)
      load_state<KP>(s, local_of(a, p, ((job)task[0]).pair, 0), a.K, row, a, a.K % 4 == 0);
    else
      load_state<KP>(s, ((job)task[0]).inner ? nullptr : ((job)task[0]).at.state_in, a.state_v, row, a, state_vectors);
    find_live<KP>(live, s);

    for (int segment = ((job)task[0]).first; segment <= ((job)task[0]).last; segment++) {
      __syncthreads(); /* the segment before is done with */
      if (segment < ((job)task[0]).last) {
        if (threadIdx.x == 0) bad[0] = C;
        fetch_transfer<KP>(a, transfer_of(a, p, ((job)task[0]).pair, segment), tokens);
        __syncthreads();
        rows_of_state<KP> after;
        cross<KP>(after, s, a, tokens, local_of(a, p, ((job)task[0]).pair, segment), find_rows(a, task[0]));
        if (overflows(after, live)) atomicMin(&bad[0], 0);
        __syncthreads();
        if ((int)bad[0] == C) {
          s = after;
          continue;
        }
        __syncthreads(); /* what is not finite, M or the product, goes through the segment chunk by chunk */
      }
      const bool queries = segment == ((job)task[0]).last && !((job)task[0]).inner;
      int64_t t0 = segment * ((job)task[0]).length;
      const auto left = [&] { return end_of(task[0], segment) - t0; };
      gates next = {0.0f, 0.0f};
      if (left() > 0) {
        const int n = (int)least(left(), C);
        FORM::fetch(a, ((job)task[0]).at, t0, n, queries, token_vectors, tokens);
        next = read_gates(a, ((job)task[0]).at, t0, n);
      }
      for (int stage = 0; left() > 0; t0 += C, stage = 1 - stage) {
        const int n = (int)least(left(), C);
        ch.k = {tokens + stage * 2 * FORM::STAGE};
        ch.q = {tokens + (stage * 2 + 1) * FORM::STAGE};
        q3n_copy_wait<0>();
        __syncthreads();
        if (threadIdx.x == 0) bad[0] = C;
        const gates now = next;
        if (left() > C) {
          const int then = (int)least(left() - C, C);
          FORM::fetch(a, ((job)task[0]).at, t0 + C, then, queries, token_vectors,
                      tokens + (1 - stage) * 2 * FORM::STAGE);
          next = read_gates(a, ((job)task[0]).at, t0 + C, then);
        }
        find_decays(now, ch);
        find_norms<FORM>(a, n, queries, ch);
        __syncthreads();
        if (n < TAIL) {
          one_by_one<FORM>(s, a, t0, n, 0, queries, ch, state_vectors);
          continue;
        }
        find_ends(ch);
        find_scores<FORM>(n, queries, ch);
        __syncthreads();
        FORM::run(s, a, t0, n, queries, ch, u, live, state_vectors);
      }
    }
    const rows mine = find_rows(a, task[0]);
    if (((job)task[0]).ends) {
      float *const to = ((job)task[0]).at.state_out;
      if (to) store_state<KP>(s, to, a.state_v, mine, a, state_vectors);
    } else if (p.pass == plan::TRANSFERS) {
      const int64_t pair = ((job)task[0]).pair;
      const int last = ((job)task[0]).last;
      float *const to = mine.transfer ? transfer_of(a, p, pair, last) : local_of(a, p, pair, last);
      store_state<KP>(s, to, a.K, mine, a, a.K % 4 == 0);
    }
  }
}

/* Bytes of dynamic shared memory, and about those of what is not dynamic. */
template <class FORM> constexpr int64_t shared_bytes(int64_t warps) {
  return 4 * FORM::STAGE * (int64_t)sizeof(typename FORM::element) + (2 * C * C + warps * FORM::U) * 4;
}
constexpr int64_t SMALL_ARRAYS = 8192;

/* Warps of a block: 8, or 4 where that leaves half of the multiprocessors without a block; `wide` blocks have 8. Which
   warp has a row changes no bit. */
int64_t warps_of(const q3n_gated_delta_args *a, int64_t wide, int64_t multiprocessors) {
  const int64_t tiles = tiles_of(a->V);
  if (tiles < 2) return 2; /* a thread for every token of a chunk */
  const int64_t most = 2 * wide <= multiprocessors ? WARPS / 2 : WARPS;
  return tiles < most ? tiles : most;
}

template <class FORM> q3n_status launch(const q3n_gated_delta_args *a, const plan &p, q3n_stream stream) {
  const bool token_vectors = a->K % FORM::VECTOR == 0 && tokens_aligned(a, FORM::VECTOR);
  const bool state_vectors = a->K % 4 == 0 && aligned(a->state_in, a->state_slot, a->state_h, a->state_v, 0) &&
                             aligned(a->state_out, a->state_slot, a->state_h, a->state_v, 0) &&
                             aligned(a->snapshots, a->snap_b, a->snap_t, a->snap_h, a->snap_v);
  const int64_t pairs = a->B * a->HV;
  const int64_t warps = warps_of(a, pairs * blocks_of(*a, p, WARPS), q3n_multiprocessors());
  const int64_t items = pairs * blocks_of(*a, p, warps);
  return Q3N_LAUNCH(chunked<FORM>, (*a, p, items, token_vectors, state_vectors), items < INT32_MAX ? items : INT32_MAX,
                    warps * 32, shared_bytes<FORM>(warps), stream);
}

template <class FORM> bool fits() { return shared_bytes<FORM>(WARPS) + SMALL_ARRAYS <= q3n_shared_limit(); }

/* f(form) with the form that takes these args, or `none` where none does: channel gates, other sizes, GPUs with little
   shared memory. */
template <class R, class F> R with_form(const q3n_gated_delta_args *a, R none, const F &f) {
  if (a->gate == Q3N_GATE_CHANNEL || a->K < 16 || a->K > 128) return none;
  if (a->dtype == Q3N_BF16) {
    if (a->K <= 32 && fits<bf16_form<32>>()) return f(bf16_form<32>());
    if (a->K <= 64 && fits<bf16_form<64>>()) return f(bf16_form<64>());
    if (fits<bf16_form<128>>()) return f(bf16_form<128>());
  }
  if (a->K <= 32) return fits<f32_form<32>>() ? f(f32_form<32>()) : none;
  if (a->K <= 64) return fits<f32_form<64>>() ? f(f32_form<64>()) : none;
  return fits<f32_form<128>>() ? f(f32_form<128>()) : none;
}

/* What a block of so many warps takes for a chunk, with o or without: by the count of products, in thirds of those that
   one warp does with o. Fewer than 4 warps leave tensor cores idle. */
int64_t with_o(int64_t warps) { return 3 * (warps < 4 ? 4 : warps) + 4; }
int64_t without_o(int64_t warps) { return 2 * (warps < 4 ? 4 : warps) + 2; }

/* The time of a launch, in those units for each chunk of a segment. */
int64_t reckon(const q3n_gated_delta_args *a, int64_t pairs, const plan &p, int64_t multiprocessors) {
  const int64_t warps = warps_of(a, pairs * blocks_of(*a, p, WARPS), multiprocessors);
  const int64_t waves = (pairs * blocks_of(*a, p, warps) + multiprocessors - 1) / multiprocessors;
  const bool mixed = p.pass == plan::TRANSFERS && p.segments > 2 && waves > 1;
  return waves * (mixed ? (with_o(warps) + without_o(warps)) / 2 : with_o(warps));
}

int64_t reckon_segments(const q3n_gated_delta_args *a, int64_t pairs, int64_t chunks, int segments,
                        int64_t multiprocessors) {
  const int64_t each = (chunks + segments - 1) / segments, crossing = 2 * WARPS;
  return each * (reckon(a, pairs, {plan::TRANSFERS, segments, nullptr}, multiprocessors) +
                 reckon(a, pairs, {plan::REST, segments, nullptr}, multiprocessors)) +
         (segments - 2) * crossing;
}

/* Segments of a long sequence: what is best for one alone, so that its bits don't depend on those beside it. */
int segments_of(const q3n_gated_delta_args *a) {
  const int MOST = 16, LONG = 1024; /* chunks */
  const int64_t multiprocessors = q3n_multiprocessors();
  const auto time = [&](int n) { return reckon_segments(a, a->HV, LONG, n, multiprocessors); };
  int best = 2;
  for (int n = 3; n <= MOST; n++)
    if (time(n) < time(best)) best = n;
  return best;
}

int64_t segmented_bytes(const q3n_gated_delta_args *a) {
  int64_t bytes;
  const bool over = __builtin_mul_overflow(a->B * a->HV, scratch_floats(*a, segments_of(a)) * 4, &bytes);
  return over ? INT64_MAX : bytes;
}

} /* namespace */

Q3N_CUDA_SCRATCH(gated_delta, gated_delta_chunked) {
  (void)a;
  return 0;
}

Q3N_CUDA_OPERATOR(gated_delta, gated_delta_chunked) {
  const q3n_status none = -1;
  const q3n_status status =
      with_form(a, none, [&](auto form) { return launch<decltype(form)>(a, {plan::WHOLE, 1, nullptr}, stream); });
  return status == none ? Q3N_CUDA_CALL(gated_delta_recurrent, a, scratch, stream) : status;
}

Q3N_CUDA_SCRATCH(gated_delta, gated_delta_segmented) {
  return with_form(a, false, [](auto) { return true; }) ? segmented_bytes(a) : 0;
}

Q3N_CUDA_OPERATOR(gated_delta, gated_delta_segmented) {
  const q3n_status none = -1;
  const q3n_status status = with_form(a, none, [&](auto form) {
    plan p = {plan::TRANSFERS, segments_of(a), (float *)scratch};
    const q3n_status first = launch<decltype(form)>(a, p, stream);
    p.pass = plan::REST;
    return first == Q3N_OK ? launch<decltype(form)>(a, p, stream) : first;
  });
  return status == none ? Q3N_CUDA_CALL(gated_delta_recurrent, a, scratch, stream) : status;
}

namespace {

enum choice { RECURRENT, CHUNKED, SEGMENTED };

/* Of packed sequences only the total is known here: their mean decides. */
choice choose(const q3n_gated_delta_args *a) {
  const int64_t tokens = a->cu_seqlens && a->B > 0 ? a->T / a->B : a->T, chunks = (tokens + C - 1) / C;
  if (tokens < C || !with_form(a, false, [](auto) { return true; })) return RECURRENT;
  /* Many heads leave no multiprocessor idle, and few tokens are over before the launches are. */
  const int64_t pairs = a->B * a->HV, multiprocessors = q3n_multiprocessors();
  if (chunks < 16 || pairs > 2 * multiprocessors) return CHUNKED;
  const int64_t segments = reckon_segments(a, pairs, chunks, segments_of(a), multiprocessors);
  const int64_t whole = chunks * reckon(a, pairs, {plan::WHOLE, 1, nullptr}, multiprocessors);
  return 10 * segments < 9 * whole ? SEGMENTED : CHUNKED;
}

} /* namespace */

Q3N_CUDA_SCRATCH(gated_delta, gated_delta) { return choose(a) == SEGMENTED ? segmented_bytes(a) : 0; }

Q3N_CUDA_OPERATOR(gated_delta, gated_delta) {
  switch (choose(a)) {
    case RECURRENT: return Q3N_CUDA_CALL(gated_delta_recurrent, a, scratch, stream);
    case CHUNKED: return Q3N_CUDA_CALL(gated_delta_chunked, a, scratch, stream);
    default: return Q3N_CUDA_CALL(gated_delta_segmented, a, scratch, stream);
  }
}
