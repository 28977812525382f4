/* The router, then the grouping.

   The router: a warp a token. The next best expert is the maximum over those that come after the last one in the order
   (logit down, index up), so nothing is stored between the passes over the logits, which the L1 cache holds.

   Grouping: a warp has a run of pairs, and counts its experts; sums over runs and experts give each run the places
   of its pairs; then the warp goes through its run again. Equal experts among 32 pairs find each other by a match, so a
   run is placed in its order. Few pairs are one block's, with everything in shared memory. */
#include "../cuda/reduce.cuh"

extern "C" {
#include "moe.h"
}

namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int64_t NONE = INT64_MAX;
constexpr unsigned ALL = 0xffffffffu;

/* As in moe_scalar.c: exponentials are added as integers, which has one result in any order. */
constexpr float UNIT = 140737488355328.0f; /* 2^47 */

__device__ __forceinline__ float unnormalized(float logit, float max) {
  return logit == max ? 1.0f : expf(logit - max);
}

struct choice {
  float logit;
  int expert; /* -1: none */
};

__device__ __forceinline__ bool before(choice a, choice b) {
  if (a.expert < 0 || b.expert < 0) return b.expert < 0 && a.expert >= 0;
  return a.logit > b.logit || (a.logit == b.logit && a.expert < b.expert);
}

/* The first in the order of those behind `last`. */
__device__ __forceinline__ choice next(const float *logits, int E, choice last, int lane) {
  choice best = {0.0f, -1};
  for (int e = lane; e < E; e += 32) {
    const choice here = {logits[e], e};
    if ((last.expert < 0 || before(last, here)) && before(here, best)) best = here;
  }
  for (int by = 16; by > 0; by /= 2) {
    const choice other = {__shfl_xor_sync(ALL, best.logit, by), __shfl_xor_sync(ALL, best.expert, by)};
    if (before(other, best)) best = other;
  }
  return best;
}

__global__ void __launch_bounds__(THREADS) route(q3n_moe_route_args a) {
  const int64_t t = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  const int lane = (int)(threadIdx.x % 32), E = (int)a.E, top_k = (int)a.top_k;
  if (t >= a.T) return; /* a whole warp */
  const float *logits = a.logits + t * a.logits_t;
  int32_t *ids = a.ids + t * a.top_k;
  float *weights = a.weights + t * a.top_k;

  int bad = 0;
  for (int e = lane; e < E; e += 32) bad |= logits[e] != logits[e];
  if (__any_sync(ALL, bad)) {
    if (lane == 0 && a.bad_token) atomicMin((long long *)a.bad_token, (long long)t);
    /* What is queued behind this call runs all the same: it must find experts that there are. */
    for (int c = lane; c < top_k; c += 32) {
      ids[c] = c;
      weights[c] = __int_as_float(0x7fc00000);
    }
    return;
  }

  choice chosen = next(logits, E, {0.0f, -1}, lane);
  const float max = chosen.logit;
  uint64_t units = 0;
  for (int e = lane; e < E; e += 32) units += (uint64_t)(unnormalized(logits[e], max) * UNIT);
  const double total = (double)q3n_warp_sum(units) / (double)UNIT;

  double sum = 0.0;
  for (int c = 0; c < top_k; c++) {
    if (c > 0) chosen = next(logits, E, chosen, lane);
    const float weight = (float)((double)unnormalized(chosen.logit, max) / total);
    sum += (double)weight;
    if (lane == 0) {
      ids[c] = chosen.expert;
      weights[c] = weight;
    }
  }
  if (!a.normalize) return;
  __syncwarp();
  for (int c = lane; c < top_k; c += 32) weights[c] = (float)((double)weights[c] / sum);
}

/* Threads where one block groups; up to how many pairs, and counts in its shared memory. */
constexpr int ALONE = 512;
constexpr int64_t ALONE_PAIRS = 1024, ALONE_COUNTS = 8192;
/* Where many do: pairs of a run at least, counts of all runs at most, experts of which a warp keeps counts. */
constexpr int64_t RUN = 256, COUNTS = (int64_t)1 << 20;
constexpr int EXPERTS = 2048, SCAN = 1024;

/* Pairs from .. to - 1 in their order, 32 at a time, of the experts first .. first + n - 1: each is given to `place`
   with its expert and the expert's count before it, and raises the count. The lowest pair of this lane with an id that
   is none, whatever n. */
template <class P>
__device__ __forceinline__ int64_t walk(const q3n_moe_group_args &a, int64_t from, int64_t to, int first, int n,
                                        q3n_shared<uint32_t> counts, const P &place) {
  const int lane = (int)(threadIdx.x % 32);
  int64_t bad = NONE;
  int next = from + lane < to ? a.ids[from + lane] : first;
  for (int64_t at = from; at < to; at += 32) {
    const int64_t pair = at + lane;
    const int id = next;
    next = pair + 32 < to ? a.ids[pair + 32] : first;
    if (pair < to && (id < 0 || id >= a.E) && bad == NONE) bad = pair;
    const bool mine = pair < to && id >= first && id < first + n;
    const unsigned same = __match_any_sync(ALL, mine ? id : -1), below = same & ((1u << lane) - 1u);
    uint32_t count = 0;
    if (mine) {
      count = counts[id - first];
      place(id, count + (uint32_t)__popc(below), pair);
    }
    __syncwarp();
    if (mine && below == 0) counts[id - first] = count + (uint32_t)__popc(same);
    __syncwarp();
  }
  return bad;
}

__device__ __forceinline__ int64_t warp_lowest(int64_t x) {
  for (int by = 16; by > 0; by /= 2) {
    const int64_t other = __shfl_xor_sync(ALL, x, by);
    if (other < x) x = other;
  }
  return x;
}

/* Everything by one block; `runs` of its warps have a run. */
__global__ void __launch_bounds__(ALONE) group_alone(q3n_moe_group_args a, int runs, int64_t *report) {
  const int E = (int)a.E, warp = (int)(threadIdx.x / 32), lane = (int)(threadIdx.x % 32);
  Q3N_SHARED_DYNAMIC(uint32_t, counts, 0, runs * E);
  Q3N_SHARED(int64_t, part, 32);
  const int64_t pairs = a.T * a.top_k, run = (pairs + runs - 1) / runs, from = warp * run;
  const int64_t to = from + run < pairs ? from + run : pairs;
  const q3n_shared<uint32_t> own = counts + (warp < runs ? warp : 0) * E;

  for (int i = (int)threadIdx.x; i < runs * E; i += ALONE) counts[i] = 0u;
  __syncthreads();
  int64_t bad = NONE;
  if (warp < runs) bad = walk(a, from, to, 0, E, own, [](int, uint32_t, int64_t) {});
  bad = warp_lowest(bad);
  if (lane == 0) part[warp] = bad;
  __syncthreads();
  bad = part[lane % (ALONE / 32)];
  bad = warp_lowest(bad);
  if (threadIdx.x == 0) *report = bad;
  if (bad != NONE) return;

  int64_t start = 0, all;
  for (int first = 0; first < E; first += ALONE) {
    const int e = first + (int)threadIdx.x;
    int64_t count = 0;
    for (int r = 0; e < E && r < runs; r++) count += (int64_t)(uint32_t)counts[r * E + e];
    int64_t place = start + q3n_block_below(count, part, all);
    if (e < E) a.offsets[e] = place;
    for (int r = 0; e < E && r < runs; r++) {
      const uint32_t here = counts[r * E + e];
      counts[r * E + e] = (uint32_t)place;
      place += (int64_t)here;
    }
    start += all;
  }
  if (threadIdx.x == 0) a.offsets[E] = start;
  __syncthreads();
  if (warp < runs) walk(a, from, to, 0, E, own, [&](int, uint32_t place, int64_t pair) { a.order[place] = pair; });
}

/* Counts of the experts blockIdx.y * EXPERTS on, in `counts` of the block. */
struct run_of_pairs {
  int64_t index, from, to;
  int first, n;
};

__device__ __forceinline__ run_of_pairs find_run(const q3n_moe_group_args &a, int64_t runs) {
  const int64_t pairs = a.T * a.top_k, run = (pairs + runs - 1) / runs;
  run_of_pairs x;
  x.index = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  x.from = x.index * run;
  x.to = x.from + run < pairs ? x.from + run : pairs;
  x.first = (int)blockIdx.y * EXPERTS;
  x.n = a.E - x.first < EXPERTS ? (int)a.E - x.first : EXPERTS;
  return x;
}

/* rows: [runs][E], pairs of an expert in a run. bad: [runs]. */
__global__ void __launch_bounds__(THREADS) group_count(q3n_moe_group_args a, int64_t runs, int64_t *bad,
                                                      int64_t *rows) {
  Q3N_SHARED(uint32_t, counts, WARPS * EXPERTS);
  const q3n_shared<uint32_t> own = counts + (int)(threadIdx.x / 32) * EXPERTS;
  const int lane = (int)(threadIdx.x % 32);
  const run_of_pairs x = find_run(a, runs);
  if (x.index >= runs) return; /* a whole warp */
  for (int i = lane; i < x.n; i += 32) own[i] = 0u;
  __syncwarp();
  const int64_t lowest = warp_lowest(walk(a, x.from, x.to, x.first, x.n, own, [](int, uint32_t, int64_t) {}));
  if (lane == 0 && blockIdx.y == 0) bad[x.index] = lowest;
  for (int i = lane; i < x.n; i += 32) rows[x.index * a.E + x.first + i] = (int64_t)(uint32_t)own[i];
}

/* rows: to pairs of an expert in earlier runs. One block. */
__global__ void __launch_bounds__(SCAN) group_scan(q3n_moe_group_args a, int64_t runs, const int64_t *bad,
                                                  int64_t *rows, int64_t *report) {
  Q3N_SHARED(int64_t, part, 32);
  int64_t lowest = NONE;
  for (int64_t r = threadIdx.x; r < runs; r += SCAN)
    if (bad[r] < lowest) lowest = bad[r];
  lowest = warp_lowest(lowest);
  if (threadIdx.x % 32 == 0) part[(int)(threadIdx.x / 32)] = lowest;
  __syncthreads();
  lowest = part[(int)(threadIdx.x % 32)];
  lowest = warp_lowest(lowest);
  if (threadIdx.x == 0) *report = lowest;
  if (lowest != NONE) return;

  int64_t start = 0, all;
  for (int64_t first = 0; first < a.E; first += SCAN) {
    const int64_t e = first + threadIdx.x;
    int64_t count = 0;
    if (e < a.E)
      for (int64_t r = 0; r < runs; r++) {
        const int64_t here = rows[r * a.E + e];
        rows[r * a.E + e] = count;
        count += here;
      }
    const int64_t below = q3n_block_below(count, part, all);
    if (e < a.E) a.offsets[e] = start + below;
    start += all;
  }
  if (threadIdx.x == 0) a.offsets[a.E] = start;
}

__global__ void __launch_bounds__(THREADS) group_place(q3n_moe_group_args a, int64_t runs, const int64_t *rows,
                                                      const int64_t *report) {
  Q3N_SHARED(uint32_t, counts, WARPS * EXPERTS);
  const q3n_shared<uint32_t> own = counts + (int)(threadIdx.x / 32) * EXPERTS;
  const run_of_pairs x = find_run(a, runs);
  if (x.index >= runs || *report != NONE) return; /* a whole warp */
  for (int i = (int)(threadIdx.x % 32); i < x.n; i += 32) own[i] = 0u;
  __syncwarp();
  const int64_t *earlier = rows + x.index * a.E;
  walk(a, x.from, x.to, x.first, x.n, own, [&](int e, uint32_t rank, int64_t pair) {
    a.order[a.offsets[e] + earlier[e] + (int64_t)rank] = pair;
  });
}

/* Runs of many blocks; 0: one block does it. */
int64_t group_runs(const q3n_moe_group_args *a) {
  const int64_t pairs = a->T * a->top_k;
  if (pairs <= ALONE_PAIRS && a->E <= ALONE_COUNTS) return 0;
  const int64_t by_pairs = pairs / RUN, by_counts = COUNTS / (a->E > 1024 ? a->E : 1024);
  return by_pairs < 1 ? 1 : by_pairs < by_counts ? by_pairs : by_counts;
}

} /* namespace */

Q3N_CUDA_SCRATCH(moe_group, moe_group) {
  const int64_t runs = group_runs(a);
  return 64 + 8 * runs * (1 + a->E);
}

Q3N_CUDA_OPERATOR(moe_group, moe_group) {
  int64_t *const report = (int64_t *)scratch, *const bad = report + 8;
  const int64_t runs = group_runs(a);
  q3n_status status;
  if (runs == 0) {
    const int64_t pairs = a->T * a->top_k, by_counts = a->E ? ALONE_COUNTS / a->E : ALONE / 32;
    int64_t warps = (pairs + 63) / 64;
    if (warps > by_counts) warps = by_counts;
    if (warps > ALONE / 32) warps = ALONE / 32;
    if (warps < 1) warps = 1;
    status = Q3N_LAUNCH(group_alone, (*a, (int)warps, report), 1, ALONE, warps * a->E * 4, stream);
  } else {
    int64_t *const rows = bad + runs;
    const q3n_dims grid((runs + WARPS - 1) / WARPS, a->E ? (a->E + EXPERTS - 1) / EXPERTS : 1);
    status = Q3N_LAUNCH(group_count, (*a, runs, bad, rows), grid, THREADS, 0, stream);
    if (status == Q3N_OK) status = Q3N_LAUNCH(group_scan, (*a, runs, bad, rows, report), 1, SCAN, 0, stream);
    if (status == Q3N_OK) status = Q3N_LAUNCH(group_place, (*a, runs, rows, report), grid, THREADS, 0, stream);
  }
#if !defined(__CUDACC__)
  /* the executor is done with it: this variant can say what a device leaves in scratch */
  if (status == Q3N_OK && *report != NONE) status = q3n_fail(Q3N_VALUE, Q3N_ARG_IDS);
#endif
  return status;
}

Q3N_CUDA_SCRATCH(moe_route, moe_route) {
  (void)a;
  return 0;
}

Q3N_CUDA_OPERATOR(moe_route, moe_route) {
  (void)scratch;
  return Q3N_LAUNCH(route, (*a), (a->T + WARPS - 1) / WARPS, THREADS, 0, stream);
}
