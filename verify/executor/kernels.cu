/* Kernels that the host executor is judged by: right ones, which must run clean and give the right numbers, and ones
   with a mistake planted, which must be found, in these words. tests/executor.rs runs them all. */
#include "base/half.h"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"

namespace {

/* ---- right */

__global__ void sum_blocks(int64_t *out, const int *x) {
  Q3N_SHARED(int64_t, part, 32);
  const int64_t mine = x[blockIdx.x * blockDim.x + threadIdx.x];
  const int64_t sum = q3n_block_sum(mine, part), twice = q3n_block_sum(2 * mine, part);
  if (threadIdx.x == 0) out[blockIdx.x] = sum + twice;
}

bool block_sum(q3n_status *status) {
  int x[3 * 256];
  int64_t out[3], want[3] = {};
  for (int i = 0; i < 3 * 256; i++) want[i / 256] += 3 * (x[i] = i * i % 1001 - 500);
  *status = Q3N_LAUNCH(sum_blocks, (out, x), 3, 256, 0, nullptr);
  return memcmp(out, want, sizeof out) == 0;
}

__global__ void transpose_tile(float *y, const float *x, int rows, int columns) {
  Q3N_SHARED(float, tile, 32 * 33);
  const int r = (int)(blockIdx.y * 32 + threadIdx.y), c = (int)(blockIdx.x * 32 + threadIdx.x);
  if (r < rows && c < columns) tile[threadIdx.y * 33 + threadIdx.x] = x[r * columns + c];
  __syncthreads();
  const int to_r = (int)(blockIdx.x * 32 + threadIdx.y), to_c = (int)(blockIdx.y * 32 + threadIdx.x);
  if (to_r < columns && to_c < rows) y[to_r * rows + to_c] = tile[threadIdx.x * 33 + threadIdx.y];
}

bool transpose(q3n_status *status) {
  float x[70 * 45], y[45 * 70] = {};
  for (int i = 0; i < 70 * 45; i++) x[i] = (float)i;
  *status = Q3N_LAUNCH(transpose_tile, (y, x, 70, 45), q3n_dims(2, 3), q3n_dims(32, 32), 0, nullptr);
  bool good = true;
  for (int i = 0; i < 70 * 45; i++) good &= y[i % 45 * 70 + i / 45] == x[i];
  return good;
}

/* Inclusive: within warps by shuffles, then the warps' totals. */
__global__ void scan_block(int *y, const int *x) {
  Q3N_SHARED(int, total, 32);
  const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
  int sum = x[threadIdx.x];
  for (int by = 1; by < 32; by *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, sum, by);
    if (lane >= by) sum += below;
  }
  if (lane == 31) total[warp] = sum;
  __syncthreads();
  for (int i = 0; i < warp; i++) sum += total[i];
  y[threadIdx.x] = sum;
}

bool scan(q3n_status *status) {
  int x[512], y[512], sum = 0;
  for (int i = 0; i < 512; i++) x[i] = i * 37 % 101;
  *status = Q3N_LAUNCH(scan_block, (y, x), 1, 512, 0, nullptr);
  bool good = true;
  for (int i = 0; i < 512; i++) good &= y[i] == (sum += x[i]);
  return good;
}

/* C[16][8] = A[16][64] B[8][64]^T, both tiles fetched in the background, two stages. */
__global__ void matmul_tile(float *c, const uint16_t *a, const uint16_t *b) {
  Q3N_SHARED_DYNAMIC(uint16_t, sa, 0, 2 * 16 * 16);
  Q3N_SHARED_DYNAMIC(uint16_t, sb, 2 * 16 * 16 * 2, 2 * 8 * 16);
  const int lane = (int)threadIdx.x, group = lane / 4, member = lane % 4;
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int step = 0; step <= 4; step++) {
    if (step < 4) {
      const int stage = step % 2;
      q3n_copy_async16(sa + stage * 256 + lane * 8, a + lane / 2 * 64 + step * 16 + lane % 2 * 8);
      if (lane < 16) q3n_copy_async16(sb + stage * 128 + lane * 8, b + lane / 2 * 64 + step * 16 + lane % 2 * 8);
    }
    q3n_copy_commit();
    if (step == 0) continue;
    q3n_copy_wait<1>();
    __syncthreads();
    const q3n_shared<uint16_t> ta = sa + (step - 1) % 2 * 256, tb = sb + (step - 1) % 2 * 128;
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; i++) fa[i] = q3n_load<uint32_t>(ta + (group + i % 2 * 8) * 16 + 2 * member + i / 2 * 8);
    for (int i = 0; i < 2; i++) fb[i] = q3n_load<uint32_t>(tb + group * 16 + 2 * member + i * 8);
    q3n_mma_bf16(sum, fa, fb, sum);
    __syncthreads();
  }
  for (int i = 0; i < 4; i++) c[(group + i / 2 * 8) * 8 + 2 * member + i % 2] = sum[i];
}

bool matmul(q3n_status *status) {
  alignas(16) uint16_t a[16 * 64], b[8 * 64];
  float c[16 * 8];
  /* small whole numbers: every order of additions is exact */
  for (int i = 0; i < 16 * 64; i++) a[i] = q3n_f32_to_bf16((float)(i * 7 % 23 - 11));
  for (int i = 0; i < 8 * 64; i++) b[i] = q3n_f32_to_bf16((float)(i * 5 % 19 - 9));
  *status = Q3N_LAUNCH(matmul_tile, (c, a, b), 1, 32, 2 * (16 + 8) * 16 * 2, nullptr);
  bool good = true;
  for (int r = 0; r < 16; r++)
    for (int n = 0; n < 8; n++) {
      float want = 0.0f;
      for (int k = 0; k < 64; k++) want += q3n_bf16_to_f32(a[r * 64 + k]) * q3n_bf16_to_f32(b[n * 64 + k]);
      good &= c[r * 8 + n] == want;
    }
  return good;
}

__global__ void warp_exchange(int *out) {
  Q3N_SHARED(int, box, 64);
  const int lane = (int)threadIdx.x % 32, base = (int)threadIdx.x / 32 * 32;
  box[base + lane] = lane;
  __syncwarp();
  const int left = box[base + (lane + 31) % 32];
  __syncwarp();
  box[base + lane] = 100 * left; /* ordered after all reads of the warp */
  __syncwarp();
  int got = box[base + (lane + 1) % 32];
  if (lane < 8) got += __shfl_xor_sync(0xffu, lane, 4); /* a part of a warp alone */
  const unsigned odd = __ballot_sync(0xffffffffu, lane % 2);
  const int bytes = __dp4a(0x01ff7f80, 0x02ff7f80, 3); /* 1, -1, 127, -128 by 2, -1, 127, -128 */
  const bool matched = __match_any_sync(0xffffffffu, lane / 3) == (7u << lane / 3 * 3);
  const bool right = matched && odd == 0xaaaaaaaau && bytes == 3 + 2 + 1 + 127 * 127 + 128 * 128;
  out[threadIdx.x] = got + (right && __any_sync(0xffffffffu, lane == 3) && !__all_sync(0xffffffffu, lane));
}

bool exchange(q3n_status *status) {
  int out[64];
  *status = Q3N_LAUNCH(warp_exchange, (out), 1, 64, 0, nullptr);
  bool good = true;
  for (int i = 0; i < 64; i++) good &= out[i] == 100 * (i % 32) + 1 + (i % 32 < 8 ? (i % 32) ^ 4 : 0);
  return good;
}

__global__ void count_bytes(int *out, const uint8_t *x) {
  Q3N_SHARED(int, count, 256);
  count[threadIdx.x] = 0;
  __syncthreads();
  for (unsigned i = 0; i < 8; i++) atomicAdd(&count[x[threadIdx.x * 8 + i]], 1);
  __syncthreads();
  atomicAdd(out + threadIdx.x, (int)count[threadIdx.x]);
}

bool atomics(q3n_status *status) {
  uint8_t x[2048];
  int out[256] = {}, want[256] = {};
  for (int i = 0; i < 2048; i++) want[x[i] = (uint8_t)(i * i % 251)] += 2;
  *status = Q3N_LAUNCH(count_bytes, (out, x), 2, 256, 0, nullptr);
  return memcmp(out, want, sizeof out) == 0;
}

/* ---- with a mistake. Blocks of 64 threads: two warps. */

__global__ void reads_the_neighbour(float *out) {
  Q3N_SHARED(float, tile, 64);
  tile[threadIdx.x] = 1.0f;
  out[threadIdx.x] = tile[threadIdx.x ^ 1]; /* where is the barrier? */
}

__global__ void reads_the_other_warp(float *out) {
  Q3N_SHARED(float, tile, 64);
  tile[threadIdx.x] = 1.0f;
  __syncwarp(); /* of one's own warp */
  out[threadIdx.x] = tile[threadIdx.x ^ 32];
}

__global__ void overwrites_what_others_read(float *out) {
  Q3N_SHARED(float, tile, 64);
  tile[threadIdx.x] = 1.0f;
  __syncthreads();
  const float all = tile[0] + tile[63];
  tile[threadIdx.x] = all; /* where is the barrier? */
  out[threadIdx.x] = all;
}

__global__ void writes_one_word(float *out) {
  Q3N_SHARED(float, tile, 1);
  tile[0] = (float)threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = tile[0];
}

__global__ void updates_without_atomics(float *out) {
  Q3N_SHARED(int, count, 1);
  if (threadIdx.x == 0) count[0] = 0;
  __syncthreads();
  count[0] += 1;
  __syncthreads();
  out[threadIdx.x] = (float)(int)count[0];
}

__global__ void parts_at_barriers(float *out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1.0f;
  } else {
    out[threadIdx.x] = 2.0f;
    __syncthreads();
  }
}

__global__ void returns_before_the_barrier(float *out) {
  out[threadIdx.x] = 1.0f;
  if (threadIdx.x >= 50) return;
  __syncthreads();
}

__global__ void reads_past_the_end(float *out) {
  Q3N_SHARED(float, tile, 64);
  Q3N_SHARED(float, behind, 64);
  tile[threadIdx.x] = behind[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + 1] + behind[0];
}

__global__ void writes_before_the_start(float *out) {
  Q3N_SHARED(float, tile, 64);
  const q3n_shared<float> middle = tile + 32;
  middle[(int)threadIdx.x - 33] = 1.0f;
  out[threadIdx.x] = 0.0f;
}

__global__ void wants_more_dynamic_memory(float *out) {
  Q3N_SHARED_DYNAMIC(float, tile, 64, 64);
  tile[threadIdx.x] = 1.0f;
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void lays_arrays_over_each_other(float *out) {
  Q3N_SHARED_DYNAMIC(float, first, 0, 64);
  Q3N_SHARED_DYNAMIC(float, second, 128, 32);
  first[threadIdx.x] = out[threadIdx.x];
  second[threadIdx.x % 32] = 1.0f;
}

__global__ void reads_what_nobody_wrote(float *out) {
  Q3N_SHARED(float, tile, 64);
  if (threadIdx.x != 5) tile[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

/* Block 1, which runs first, leaves its array behind. */
__global__ void reads_the_other_blocks_memory(float *out) {
  Q3N_SHARED(float, tile, 64);
  if (blockIdx.x == 1) tile[threadIdx.x] = 1.0f;
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void shuffles_with_the_gone(float *out) {
  if (threadIdx.x == 7) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void shuffles_with_those_at_a_barrier(float *out) {
  float x = 1.0f;
  if (threadIdx.x < 16) x = __shfl_xor_sync(0xffffffffu, x, 1);
  __syncthreads();
  out[threadIdx.x] = x;
}

__global__ void shuffles_from_outside_the_mask(float *out) {
  float x = 1.0f;
  if (threadIdx.x < 16) x = __shfl_sync(0xffffu, x, 20);
  out[threadIdx.x] = x;
}

__global__ void shuffles_without_itself(float *out) { out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0); }

__global__ void shuffles_past_each_other(float *out) {
  float x = 1.0f;
  if (threadIdx.x % 2)
    x = __shfl_xor_sync(0xffffffffu, x, 1);
  else
    x = __shfl_down_sync(0xffffffffu, x, 1);
  out[threadIdx.x] = x;
}

__global__ void loads_a_vector_askew(float *out) {
  Q3N_SHARED(float, tile, 68);
  tile[threadIdx.x] = 1.0f;
  if (threadIdx.x < 4) tile[64 + threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = q3n_load<float4>(tile + threadIdx.x / 4 * 4 + 1).x;
}

__global__ void loads_global_askew(float *out) { q3n_store(out + 1, make_float4(0.0f, 0.0f, 0.0f, 0.0f)); }

__global__ void does_not_wait_for_the_copy(float *out, const float *x) {
  Q3N_SHARED(float, tile, 256);
  q3n_copy_async16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x);
  q3n_copy_commit();
  q3n_copy_wait<1>(); /* the last group may still be under way */
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void waits_for_its_own_copy_alone(float *out, const float *x) {
  Q3N_SHARED(float, tile, 256);
  q3n_copy_async16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x);
  q3n_copy_commit();
  q3n_copy_wait<0>();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void takes_a_whole_stack(float *out) {
  volatile char much[100 * 1024];
  for (unsigned i = 0; i < sizeof much; i++) much[i] = (char)i;
  __syncthreads();
  out[threadIdx.x] = much[threadIdx.x];
}

__global__ void does_nothing(float *) {}

alignas(16) float memory[1024];

#define PLANTED(kernel)                                                          \
  [](q3n_status *status) {                                                       \
    *status = Q3N_LAUNCH(kernel, (memory), 2, 64, 256, nullptr);                 \
    return true;                                                                 \
  }
#define PLANTED_COPY(kernel)                                                     \
  [](q3n_status *status) {                                                       \
    *status = Q3N_LAUNCH(kernel, (memory, memory + 256), 1, 64, 0, nullptr);     \
    return true;                                                                 \
  }

bool grid_over_the_limit(q3n_status *status) {
  *status = Q3N_LAUNCH(does_nothing, (memory), q3n_dims(1, 65536), 64, 0, nullptr);
  return true;
}
bool block_over_the_limit(q3n_status *status) {
  *status = Q3N_LAUNCH(does_nothing, (memory), 1, q3n_dims(33, 32), 0, nullptr);
  return true;
}
bool no_blocks(q3n_status *status) {
  *status = Q3N_LAUNCH(reads_the_neighbour, (memory), q3n_dims(4, 0), 64, 0, nullptr);
  return true;
}

/* `found`: a part of the report; NULL for a right kernel. `refused`: the status where nothing is launched. */
struct judged {
  const char *name;
  bool (*run)(q3n_status *status);
  const char *found;
  q3n_status refused;
};

const judged cases[] = {
    {"block_sum", block_sum, nullptr, 0},
    {"transpose", transpose, nullptr, 0},
    {"scan", scan, nullptr, 0},
    {"matmul", matmul, nullptr, 0},
    {"exchange", exchange, nullptr, 0},
    {"atomics", atomics, nullptr, 0},
    {"no_blocks", no_blocks, nullptr, 0},
    {"grid_over_the_limit", grid_over_the_limit, nullptr, q3n_fail(Q3N_SIZE, Q3N_ARG_GRID)},
    {"block_over_the_limit", block_over_the_limit, nullptr, q3n_fail(Q3N_SIZE, Q3N_ARG_GRID)},
    {"reads_the_neighbour", PLANTED(reads_the_neighbour),
     "reads_the_neighbour: block (1,0,0), thread (0,0,0): uninitialised: tile[1] is read before any write", 0},
    {"reads_the_other_warp", PLANTED(reads_the_other_warp), "uninitialised: tile[63] is read before any write", 0},
    {"overwrites_what_others_read", PLANTED(overwrites_what_others_read),
     "race: tile[0] is read here and written by thread 0", 0},
    {"writes_one_word", PLANTED(writes_one_word), "race: tile[0] is written here and written by thread 0", 0},
    {"updates_without_atomics", PLANTED(updates_without_atomics),
     "race: count[0] is read here and written by thread 0", 0},
    {"parts_at_barriers", PLANTED(parts_at_barriers), "divergent barrier: thread 32 waits at", 0},
    {"returns_before_the_barrier", PLANTED(returns_before_the_barrier), "divergent barrier: thread 50 has returned", 0},
    {"reads_past_the_end", PLANTED(reads_past_the_end), "out of bounds: tile[64], it has 64 elements", 0},
    {"writes_before_the_start", PLANTED(writes_before_the_start), "out of bounds: tile[-1], it has 64 elements", 0},
    {"wants_more_dynamic_memory", PLANTED(wants_more_dynamic_memory),
     "shared memory: tile ends at byte 320, the launch gave 256", 0},
    {"lays_arrays_over_each_other", PLANTED(lays_arrays_over_each_other), "shared memory: second and first overlap", 0},
    {"reads_what_nobody_wrote", PLANTED(reads_what_nobody_wrote),
     "thread (5,0,0): uninitialised: tile[5] is read before any write", 0},
    {"reads_the_other_blocks_memory", PLANTED(reads_the_other_blocks_memory),
     "block (0,0,0), thread (0,0,0): uninitialised: tile[0]", 0},
    {"shuffles_with_the_gone", PLANTED(shuffles_with_the_gone),
     "the mask ffffffff names lane 7, which has returned", 0},
    {"shuffles_with_those_at_a_barrier", PLANTED(shuffles_with_those_at_a_barrier),
     "the mask ffffffff names lane 16, which waits at", 0},
    {"shuffles_from_outside_the_mask", PLANTED(shuffles_from_outside_the_mask),
     "lane 0 reads lane 20, which the mask 0000ffff does not name", 0},
    {"shuffles_without_itself", PLANTED(shuffles_without_itself),
     "lane 16 calls it with a mask 0000ffff without itself", 0},
    {"shuffles_past_each_other", PLANTED(shuffles_past_each_other), "warp operation: lane 0 waits at another one", 0},
    {"loads_a_vector_askew", PLANTED(loads_a_vector_askew), "misaligned: tile[1] is read as a vector of 4", 0},
    {"loads_global_askew", PLANTED(loads_global_askew), "misaligned: a vector of 16 bytes in global memory", 0},
    {"does_not_wait_for_the_copy", PLANTED_COPY(does_not_wait_for_the_copy),
     "uninitialised: tile[0] is read before any write", 0},
    {"waits_for_its_own_copy_alone", PLANTED_COPY(waits_for_its_own_copy_alone),
     "race: tile[1] is read here and written by thread 0", 0},
    {"takes_a_whole_stack", PLANTED(takes_a_whole_stack), "overflowed", 0},
};

} /* namespace */

extern "C" int64_t q3n_executor_count(void) { return (int64_t)(sizeof cases / sizeof cases[0]); }
extern "C" const char *q3n_executor_name(int64_t i) { return cases[i].name; }
extern "C" const char *q3n_executor_found(int64_t i) { return cases[i].found; }
extern "C" q3n_status q3n_executor_refused(int64_t i) { return cases[i].refused; }
/* 1 where the numbers are right; `status` is the launch's. */
extern "C" int32_t q3n_executor_run(int64_t i, q3n_status *status) { return cases[i].run(status); }
