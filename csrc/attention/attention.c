#include "attention.h"

#include "../base/check.h"
#include "attention_tile.h"

/* What may not be overlapped, or may not overlap: a byte range and its name. */
typedef struct {
  const void *at;
  int64_t bytes;
  q3n_arg arg;
} span;

static q3n_status no_overlap(const span *out, int outs, const span *in, int ins) {
  for (int i = 0; i < outs; i++) {
    for (int j = 0; j < ins; j++)
      if (q3n_overlap(out[i].at, out[i].bytes, in[j].at, in[j].bytes)) return q3n_fail(Q3N_ALIAS, out[i].arg);
    for (int j = 0; j < i; j++)
      if (q3n_overlap(out[i].at, out[i].bytes, out[j].at, out[j].bytes)) return q3n_fail(Q3N_ALIAS, out[i].arg);
  }
  return Q3N_OK;
}

/* The index arrays, so that no kernel can be led outside the cache or the queries. */
static q3n_status check_sequences(const q3n_attention_args *a) {
  if (a->cu_seqlens) {
    Q3N_REFUSE(a->cu_seqlens[0] != 0 || a->cu_seqlens[a->B] != a->T, VALUE, CU_SEQLENS);
    for (int64_t b = 0; b < a->B; b++) Q3N_REFUSE(a->cu_seqlens[b + 1] < a->cu_seqlens[b], VALUE, CU_SEQLENS);
  }
  Q3N_REFUSE(!a->slot && a->B > a->slots, SIZE, SLOTS);
  for (int64_t b = 0; a->slot && b < a->B; b++) Q3N_REFUSE(a->slot[b] < 0 || a->slot[b] >= a->slots, VALUE, SLOTS);
  for (int64_t b = 0; a->kv_len && b < a->B; b++) Q3N_REFUSE(a->kv_len[b] < 0 || a->kv_len[b] > a->S, VALUE, KV_LEN);
  if (!a->causal || (!a->kv_len && !a->cu_seqlens)) {
    Q3N_REFUSE(a->causal && a->B > 0 && a->T > a->S, VALUE, KV_LEN);
    return Q3N_OK;
  }
  for (int64_t b = 0; b < a->B; b++) {
    const int64_t n = a->cu_seqlens ? a->cu_seqlens[b + 1] - a->cu_seqlens[b] : a->T;
    Q3N_REFUSE((a->kv_len ? a->kv_len[b] : a->S) < n, VALUE, KV_LEN);
  }
  return Q3N_OK;
}

q3n_status q3n_attention_check(const q3n_attention_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  Q3N_REFUSE(a->slots < 0, SIZE, SLOTS);
  Q3N_REFUSE(a->B < 0, SIZE, B);
  Q3N_REFUSE(a->T < 0, SIZE, T);
  Q3N_REFUSE(a->S < 0, SIZE, S);
  Q3N_REFUSE(a->HKV < 0 || (a->HKV == 0 && a->HQ > 0), SIZE, HK);
  Q3N_REFUSE(a->HQ < 0 || (a->HKV > 0 && a->HQ % a->HKV), SIZE, HQ);
  Q3N_REFUSE(a->D < 1 || a->D > 512, SIZE, D);
  const int q8 = a->kv_dtype == Q3N_Q8_0;
  Q3N_REFUSE(!q8 && a->kv_dtype != Q3N_F32 && a->kv_dtype != Q3N_F16 && a->kv_dtype != Q3N_BF16, DTYPE, DTYPE);
  Q3N_REFUSE(q8 && a->D % 32, SIZE, D);
  Q3N_REFUSE(a->kv_begin < 0 || a->kv_begin > a->S, VALUE, KV_BEGIN);
  Q3N_REFUSE(a->kv_end < a->kv_begin || a->kv_end > a->S, VALUE, KV_END);
  const q3n_status sequences = check_sequences(a);
  if (sequences != Q3N_OK) return sequences;

  /* Packed sequences are one row. */
  const int64_t rows = a->cu_seqlens ? (a->B ? 1 : 0) : a->B;
  const q3n_axis o[] = {{rows, a->o_b}, {a->T, a->o_t}, {a->HQ, a->o_h}, {a->D, 1}};
  const q3n_axis lse[] = {{rows, a->lse_b}, {a->T, a->lse_t}, {a->HQ, 1}};
  const q3n_axis q[] = {{rows, a->q_b}, {a->T, a->q_t}, {a->HQ, a->q_h}, {a->D, 1}};
  const q3n_axis k[] = {{a->slots, a->k_slot}, {a->S, a->k_s}, {a->HKV, a->k_h}, {a->D, 1}};
  const q3n_axis v[] = {{a->slots, a->v_slot}, {a->S, a->v_s}, {a->HKV, a->v_h}, {a->D, 1}};
  const q3n_axis gate[] = {{rows, a->gate_b}, {a->T, a->gate_t}, {a->HQ, a->gate_h}, {a->D, 1}};
  const q3n_axis mask[] = {{rows, a->mask_b}, {a->T, a->mask_t}, {a->S, 1}};
  const int64_t no = q3n_extent(o, 4), nlse = a->lse ? q3n_extent(lse, 3) : 0, nq = q3n_extent(q, 4);
  const int64_t nk = q3n_extent(k, 4), nv = q3n_extent(v, 4);
  const int64_t ngate = a->gate ? q3n_extent(gate, 4) : 0, nmask = a->mask ? q3n_extent(mask, 3) : 0;
  Q3N_REFUSE(no < 0 || !q3n_disjoint(o, 4), STRIDE, O);
  Q3N_REFUSE(a->lse && (nlse < 0 || !q3n_disjoint(lse, 3)), STRIDE, LSE);
  Q3N_REFUSE(nq < 0, STRIDE, Q);
  Q3N_REFUSE(nk < 0 || (q8 && (a->k_slot % 32 || a->k_s % 32 || a->k_h % 32)), STRIDE, KEY);
  Q3N_REFUSE(nv < 0 || (q8 && (a->v_slot % 32 || a->v_s % 32 || a->v_h % 32)), STRIDE, VAL);
  Q3N_REFUSE(ngate < 0, STRIDE, GATE);
  Q3N_REFUSE(nmask < 0, STRIDE, MASK);
  if (no == 0) return Q3N_OK;

  Q3N_REFUSE(!a->o, NULL, O);
  Q3N_REFUSE(!a->q, NULL, Q);
  Q3N_REFUSE(nk > 0 && !a->k, NULL, KEY);
  Q3N_REFUSE(nv > 0 && !a->v, NULL, VAL);
  const span out[] = {{a->o, no * 4, Q3N_ARG_O}, {a->lse, nlse * 4, Q3N_ARG_LSE}};
  const span in[] = {{a->q, nq * 4, Q3N_ARG_Q},
                     {a->k, q3n_dtype_bytes(a->kv_dtype, nk), Q3N_ARG_KEY},
                     {a->v, q3n_dtype_bytes(a->kv_dtype, nv), Q3N_ARG_VAL},
                     {a->gate, ngate * 4, Q3N_ARG_GATE},
                     {a->mask, nmask * 4, Q3N_ARG_MASK},
                     {a->sinks, a->sinks ? a->HQ * 4 : 0, Q3N_ARG_SINKS}};
  return no_overlap(out, 2, in, 6);
}

int64_t q3n_attention_items(const q3n_attention_args *a) {
  if (a->HQ == 0) return 0;
  int64_t blocks = 0;
  if (!a->cu_seqlens) blocks = a->B * q3n_ceil_div(a->T, Q3N_ATTENTION_QUERIES);
  for (int64_t b = 0; a->cu_seqlens && b < a->B; b++)
    blocks += q3n_ceil_div(a->cu_seqlens[b + 1] - a->cu_seqlens[b], Q3N_ATTENTION_QUERIES);
  return blocks * a->HKV;
}

/* The rows' sums of values, maxima and sums of weights, and one block of keys and of values in float. */
int64_t q3n_attention_scratch(const q3n_attention_args *a) {
  if (a->B == 0 || a->HQ == 0 || a->T == 0) return 0; /* an empty o bounds no size */
  const int64_t queries = a->T < Q3N_ATTENTION_QUERIES ? a->T : Q3N_ATTENTION_QUERIES;
  const int64_t rows = queries * (a->HQ / a->HKV);
  return q3n_align(rows * a->D * 4) + 2 * q3n_align(rows * 4) + 2 * q3n_align(Q3N_ATTENTION_KEYS * a->D * 4);
}

q3n_status q3n_attention_merge_check(const q3n_attention_merge_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  Q3N_REFUSE(a->parts < 0, SIZE, PARTS);
  Q3N_REFUSE(a->T < 0, SIZE, T);
  Q3N_REFUSE(a->HQ < 0, SIZE, HQ);
  Q3N_REFUSE(a->D < 0, SIZE, D);

  const q3n_axis o[] = {{a->T, a->o_t}, {a->HQ, a->o_h}, {a->D, 1}};
  const q3n_axis lse[] = {{a->T, a->lse_t}, {a->HQ, 1}};
  const q3n_axis gate[] = {{a->T, a->gate_t}, {a->HQ, a->gate_h}, {a->D, 1}};
  const int64_t no = q3n_extent(o, 3), nlse = a->lse ? q3n_extent(lse, 2) : 0;
  const int64_t ngate = a->gate ? q3n_extent(gate, 3) : 0;
  Q3N_REFUSE(no < 0 || !q3n_disjoint(o, 3), STRIDE, O);
  Q3N_REFUSE(a->lse && (nlse < 0 || !q3n_disjoint(lse, 2)), STRIDE, LSE);
  Q3N_REFUSE(ngate < 0, STRIDE, GATE);
  if (no == 0) return Q3N_OK;

  int64_t rows = a->T * a->HQ, nlse_parts, no_parts;
  Q3N_REFUSE(__builtin_mul_overflow(a->parts, rows, &nlse_parts) ||
                 __builtin_mul_overflow(nlse_parts, a->D, &no_parts) || no_parts > INT64_MAX / 8,
             SIZE, PARTS);
  Q3N_REFUSE(!a->o, NULL, O);
  Q3N_REFUSE(a->parts > 0 && !a->part_o, NULL, PART_O);
  Q3N_REFUSE(a->parts > 0 && !a->part_lse, NULL, PART_LSE);
  const span out[] = {{a->o, no * 4, Q3N_ARG_O}, {a->lse, nlse * 4, Q3N_ARG_LSE}};
  const span in[] = {{a->part_o, no_parts * 4, Q3N_ARG_PART_O},
                     {a->part_lse, nlse_parts * 4, Q3N_ARG_PART_LSE},
                     {a->gate, ngate * 4, Q3N_ARG_GATE},
                     {a->sinks, a->sinks ? a->HQ * 4 : 0, Q3N_ARG_SINKS}};
  return no_overlap(out, 2, in, 4);
}

/* The elements of o do not overlap, so T * HQ is at most its extent. */
int64_t q3n_attention_merge_items(const q3n_attention_merge_args *a) { return a->D ? a->T * a->HQ : 0; }

int64_t q3n_attention_merge_no_scratch(const q3n_attention_merge_args *a) {
  (void)a;
  return 0;
}

#include "attention.inc"
Q3N_DEFINE_OPERATOR(attention, Q3N_ATTENTION_VARIANTS)
Q3N_DEFINE_BEST_FIRST(attention)
Q3N_DEFINE_OPERATOR(attention_merge, Q3N_ATTENTION_MERGE_VARIANTS)
Q3N_DEFINE_BEST_FIRST(attention_merge)
