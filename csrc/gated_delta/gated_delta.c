#include "gated_delta.h"

#include <string.h>

#include "../base/check.h"
#include "gated_delta_parts.h"

/* An array and the bytes it spans, for the alias checks. */
typedef struct span {
  const void *at;
  int64_t bytes;
} span;

static int meets_any(span x, const span *others, int n) {
  for (int i = 0; i < n; i++)
    if (x.at && others[i].at && q3n_overlap(x.at, x.bytes, others[i].at, others[i].bytes)) return 1;
  return 0;
}

/* 1 where every slot lies in the pool. NULL stands for 0 .. B-1. */
static int slots_in_pool(const int64_t *slot, int64_t B, int64_t slots) {
  if (!slot) return B <= slots;
  for (int64_t b = 0; b < B; b++)
    if (slot[b] < 0 || slot[b] >= slots) return 0;
  return 1;
}

static q3n_status check_sequences(const q3n_gated_delta_args *a) {
  if (a->cu_seqlens) {
    Q3N_REFUSE(a->cu_seqlens[0] != 0 || a->cu_seqlens[a->B] != a->T, VALUE, CU_SEQLENS);
    for (int64_t b = 0; b < a->B; b++) Q3N_REFUSE(a->cu_seqlens[b + 1] < a->cu_seqlens[b], VALUE, CU_SEQLENS);
  }
  if (a->state_in) Q3N_REFUSE(!slots_in_pool(a->slot_in, a->B, a->slots), VALUE, SLOT_IN);
  if (!a->state_out) return Q3N_OK;
  Q3N_REFUSE(!slots_in_pool(a->slot_out, a->B, a->slots), VALUE, SLOT_OUT);
  if (a->slot_out)
    for (int64_t b = 1; b < a->B; b++)
      for (int64_t other = 0; other < b; other++) Q3N_REFUSE(a->slot_out[b] == a->slot_out[other], VALUE, SLOT_OUT);
  return Q3N_OK;
}

/* 1 where every sequence ends in the slot that it starts from. */
static int same_slots(const q3n_gated_delta_args *a) {
  for (int64_t b = 0; b < a->B; b++)
    if ((a->slot_in ? a->slot_in[b] : b) != (a->slot_out ? a->slot_out[b] : b)) return 0;
  return 1;
}

q3n_status q3n_gated_delta_check(const q3n_gated_delta_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  Q3N_REFUSE(a->slots < 0, SIZE, SLOTS);
  Q3N_REFUSE(a->B < 0 || a->B > INT64_MAX / 16, SIZE, B);
  Q3N_REFUSE(a->T < 0, SIZE, T);
  Q3N_REFUSE(a->HK < 0, SIZE, HK);
  Q3N_REFUSE(a->HV < 0 || (a->HK == 0 ? a->HV > 0 : a->HV % a->HK != 0), SIZE, HV);
  Q3N_REFUSE(a->K < 0 || a->K > 1024, SIZE, K);
  Q3N_REFUSE(a->V < 0 || a->V > 1024, SIZE, V);
  int64_t items;
  Q3N_REFUSE(__builtin_mul_overflow(a->B, a->HV, &items) || items > INT64_MAX / 1024, SIZE, B);
  Q3N_REFUSE(a->dtype != Q3N_F32 && a->dtype != Q3N_BF16 && a->dtype != Q3N_F16, DTYPE, DTYPE);
  Q3N_REFUSE((uint32_t)a->gate > Q3N_GATE_CHANNEL, VALUE, GATE);
  Q3N_REFUSE((uint32_t)a->head_map > Q3N_HEADS_TILED, VALUE, HEAD_MAP);
  Q3N_REFUSE(a->qk_l2norm && !(a->qk_l2norm_eps >= 0.0f), VALUE, EPS);
  Q3N_REFUSE(a->gate == Q3N_GATE_NONE && a->g, VALUE, G);
  Q3N_REFUSE(a->cu_seqlens && a->B == 0 && a->T != 0, VALUE, CU_SEQLENS);

  /* With cu_seqlens all tokens lie in one row. */
  const int64_t rows = a->cu_seqlens ? 1 : a->B;
  const int64_t row_stride = a->cu_seqlens ? 0 : 1;
  const int64_t gate_width = a->gate == Q3N_GATE_CHANNEL ? a->K : 1;
  const q3n_axis o[] = {{rows, a->o_b * row_stride}, {a->T, a->o_t}, {a->HV, a->o_h}, {a->V, 1}};
  const q3n_axis q[] = {{rows, a->q_b * row_stride}, {a->T, a->q_t}, {a->HK, a->q_h}, {a->K, 1}};
  const q3n_axis k[] = {{rows, a->k_b * row_stride}, {a->T, a->k_t}, {a->HK, a->k_h}, {a->K, 1}};
  const q3n_axis v[] = {{rows, a->v_b * row_stride}, {a->T, a->v_t}, {a->HV, a->v_h}, {a->V, 1}};
  const q3n_axis g[] = {{rows, a->g_b * row_stride}, {a->T, a->g_t}, {a->HV, a->g_h}, {gate_width, 1}};
  const q3n_axis beta[] = {{rows, a->beta_b * row_stride}, {a->T, a->beta_t}, {a->HV, a->beta_h}};
  const q3n_axis pool[] = {{a->slots, a->state_slot}, {a->HV, a->state_h}, {a->V, a->state_v}, {a->K, 1}};
  const q3n_axis snap[] = {
      {rows, a->snap_b * row_stride}, {a->T, a->snap_t}, {a->HV, a->snap_h}, {a->V, a->snap_v}, {a->K, 1}};
  const int64_t no = q3n_extent(o, 4), nq = q3n_extent(q, 4), nk = q3n_extent(k, 4), nv = q3n_extent(v, 4);
  const int64_t ng = a->gate == Q3N_GATE_NONE ? 0 : q3n_extent(g, 4), nbeta = q3n_extent(beta, 3);
  const int64_t npool = a->state_in || a->state_out ? q3n_extent(pool, 4) : 0;
  const int64_t nsnap = a->snapshots ? q3n_extent(snap, 5) : 0;
  Q3N_REFUSE(no < 0 || !q3n_disjoint(o, 4), STRIDE, O);
  Q3N_REFUSE(nq < 0, STRIDE, Q);
  Q3N_REFUSE(nk < 0, STRIDE, KEY);
  Q3N_REFUSE(nv < 0, STRIDE, VAL);
  Q3N_REFUSE(ng < 0, STRIDE, G);
  Q3N_REFUSE(nbeta < 0, STRIDE, BETA);
  Q3N_REFUSE(npool < 0 && !a->state_out, STRIDE, STATE_IN);
  Q3N_REFUSE(npool < 0 || (a->state_out && !q3n_disjoint(pool, 4)), STRIDE, STATE_OUT);
  Q3N_REFUSE(nsnap < 0 || (a->snapshots && !q3n_disjoint(snap, 5)), STRIDE, SNAPSHOTS);

  Q3N_REFUSE(no > 0 && !a->o, NULL, O);
  Q3N_REFUSE(nq > 0 && no > 0 && !a->q, NULL, Q);
  Q3N_REFUSE(nk > 0 && no > 0 && !a->k, NULL, KEY);
  Q3N_REFUSE(nv > 0 && !a->v, NULL, VAL);
  Q3N_REFUSE(ng > 0 && no > 0 && !a->g, NULL, G);
  Q3N_REFUSE(nbeta > 0 && no > 0 && !a->beta, NULL, BETA);
  q3n_status status = check_sequences(a);
  if (status != Q3N_OK) return status;

  const int64_t size = q3n_dtype_bytes(a->dtype, 1);
  const int64_t nslot = a->B * (int64_t)sizeof(int64_t);
  const span inputs[] = {{a->q, nq * size},     {a->k, nk * size},  {a->v, nv * size},
                         {a->g, ng * 4},        {a->beta, nbeta * 4}, {a->slot_in, nslot},
                         {a->slot_out, nslot},  {a->cu_seqlens, nslot + (int64_t)sizeof(int64_t)}};
  const span out = {a->o, no * size}, pool_in = {a->state_in, npool * 4}, pool_out = {a->state_out, npool * 4};
  const span states = {a->snapshots, nsnap * 4};
  const int in_place = a->state_in == a->state_out && same_slots(a);
  Q3N_REFUSE(meets_any(out, inputs, 8) || meets_any(out, &pool_in, 1), ALIAS, O);
  Q3N_REFUSE(meets_any(pool_out, inputs, 8) || meets_any(pool_out, &out, 1), ALIAS, STATE_OUT);
  Q3N_REFUSE(!in_place && meets_any(pool_out, &pool_in, 1), ALIAS, STATE_OUT);
  Q3N_REFUSE(meets_any(states, inputs, 8) || meets_any(states, &out, 1) || meets_any(states, &pool_in, 1) ||
                 meets_any(states, &pool_out, 1),
             ALIAS, SNAPSHOTS);
  return Q3N_OK;
}

int64_t q3n_gated_delta_row_items(const q3n_gated_delta_args *a) {
  return a->B * a->HV * q3n_ceil_div(a->V, Q3N_GATED_DELTA_ROWS);
}

int64_t q3n_gated_delta_head_items(const q3n_gated_delta_args *a) { return a->V ? a->B * a->HV : 0; }

int64_t q3n_gated_delta_recurrent_scratch(const q3n_gated_delta_args *a) {
  return q3n_align((Q3N_GATED_DELTA_ROWS + 3) * a->K * 4);
}

/* The buffers named at the head of gated_delta_chunked_scalar.c, behind what its last tokens need. */
static int64_t chunked_scratch(const q3n_gated_delta_args *a, int64_t C) {
  const int64_t one_by_one = q3n_gated_delta_recurrent_scratch(a) + q3n_align(a->K * a->V * 4);
  return one_by_one + q3n_align((a->K * a->V + C * (4 * a->K + a->V) + 2 * C * C + 3 * C + 4 * a->K) * 4);
}

int64_t q3n_gated_delta_chunked16_scratch(const q3n_gated_delta_args *a) { return chunked_scratch(a, 16); }
int64_t q3n_gated_delta_chunked32_scratch(const q3n_gated_delta_args *a) { return chunked_scratch(a, 32); }
int64_t q3n_gated_delta_chunked64_scratch(const q3n_gated_delta_args *a) { return chunked_scratch(a, 64); }
int64_t q3n_gated_delta_chunked128_scratch(const q3n_gated_delta_args *a) { return chunked_scratch(a, 128); }

/* The buffers named at the head of gated_delta_unfused.c. */
int64_t q3n_gated_delta_unfused_scratch(const q3n_gated_delta_args *a) {
  const int64_t C = Q3N_GATED_DELTA_UNFUSED_CHUNK;
  return q3n_align((a->K * a->V + C * (6 * a->K + 2 * a->V) + 2 * C * C + C + 4 * a->K) * 4);
}

#include "gated_delta.inc"
Q3N_DEFINE_OPERATOR(gated_delta, Q3N_GATED_DELTA_VARIANTS)

/* Which variant for how many tokens in the longest sequence: the first row that applies and whose variant is available.
   Measured at HK 16, HV 32, K = V = 128, one thread, an AVX-512 server core, T = 1 .. 512 (README.md). The chunk forms
   themselves take fewer than Q3N_GATED_DELTA_TAIL tokens one by one, sequence by sequence, with the bits of the
   recurrence: a sequence's result does not depend on the sequences beside it. */
static const struct {
  int64_t below;
  const char *name;
} choice[] = {
    {Q3N_GATED_DELTA_TAIL, "recurrent_avx512"},
    {INT64_MAX, "chunked32_avx512"},
    {Q3N_GATED_DELTA_TAIL, "recurrent_avx2"},
    {INT64_MAX, "chunked32_avx2"},
    {INT64_MAX, "recurrent_neon"}, /* by its count of instructions, not by a measurement */
    {Q3N_GATED_DELTA_TAIL, "recurrent_scalar"},
    {INT64_MAX, "chunked16_scalar"},
};

const q3n_gated_delta_variant *q3n_gated_delta_best(const q3n_gated_delta_args *a) {
  int64_t tokens = a->cu_seqlens ? 0 : a->T;
  for (int64_t b = 0; a->cu_seqlens && b < a->B; b++) {
    const int64_t n = a->cu_seqlens[b + 1] - a->cu_seqlens[b];
    if (n > tokens) tokens = n;
  }
  for (size_t i = 0; i < sizeof choice / sizeof choice[0]; i++)
    for (int64_t j = 0; tokens < choice[i].below && j < q3n_gated_delta_variant_count(); j++) {
      const q3n_gated_delta_variant *v = q3n_gated_delta_variant_at(j);
      if (strcmp(v->name, choice[i].name) == 0 && q3n_isa_available(v->isa)) return v;
    }
  return q3n_gated_delta_variant_at(0);
}
