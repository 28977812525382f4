/* Flash attention with grouped heads. Query head h reads KV head h / (HQ / HKV). For sequence b with kv_len[b] keys and
   n_b queries, query i may see key j where kv_begin <= j < min(kv_end, kv_len[b]) and, if causal, j <= kv_len[b] - n_b + i:

     s_j = scale q . k_j + mask_ij        p = softmax over the visible j and the head's sink, if any
     o   = sum p_j v_j                    lse = log(sum exp s_j)        o is then multiplied by sigmoid(gate), if any

   The empty softmax: where every visible score is -inf, or no key is visible, o is exactly 0 and lse is -inf (with a
   sink, the sink takes all the mass: o is 0 and lse the sink). A NaN score is not a masked one: it makes that row NaN.
   Memory is O(D) a row: scores are never stored for the whole length.

   Split over KV: run ranges kv_begin..kv_end into part_o, part_lse without sinks and gate, then q3n_attention_merge.
   Work items of both are rows (sequence, query, head) grouped as each variant likes. */
#ifndef Q3N_ATTENTION_H
#define Q3N_ATTENTION_H

#include "../base/dtype.h"
#include "../base/operator.h"
#include "../cuda/cuda.h"

typedef struct q3n_attention_args {
  uint64_t struct_bytes; /* sizeof(q3n_attention_args) */
  float *o;              /* [B][T][HQ][D]; must not overlap an input */
  float *lse;            /* [B][T][HQ], without the factor from gate; NULL: not wanted */
  const float *q;        /* [B][T][HQ][D] */
  const void *k;         /* [slots][S][HKV][D] of kv_dtype */
  const void *v;         /* [slots][S][HKV][D] of kv_dtype */
  const float *gate;     /* [B][T][HQ][D] or NULL */
  const float *mask;     /* [B][T][S], added to the scores, -inf hides; NULL: none */
  const float *sinks;    /* [HQ] or NULL */
  const int64_t *slot;       /* [B], cache entry of sequence b; NULL: b */
  const int64_t *kv_len;     /* [B], 0 <= kv_len[b] <= S; NULL: S */
  const int64_t *cu_seqlens; /* [B+1] over the queries, as in gated_delta.h; NULL: T queries each */
  q3n_dtype kv_dtype;        /* F32, F16, BF16, or Q8_0 (then D and the K, V strides are multiples of 32) */
  int32_t causal;            /* needs kv_len[b] >= n_b */
  float scale;               /* customary: 1 / sqrt(D) */
  int64_t o_b, o_t, o_h;     /* strides in elements, >= 0; D is contiguous */
  int64_t lse_b, lse_t;      /* heads are contiguous */
  int64_t q_b, q_t, q_h;
  int64_t k_slot, k_s, k_h;
  int64_t v_slot, v_s, v_h;
  int64_t gate_b, gate_t, gate_h;
  int64_t mask_b, mask_t;    /* keys are contiguous; with cu_seqlens, mask_t steps over the packed queries */
  int64_t kv_begin, kv_end;  /* 0 <= kv_begin <= kv_end <= S; the whole cache is 0, S */
  int64_t slots, B, T, S, HQ, HKV, D; /* HQ a multiple of HKV; 1 <= D <= 512 */
} q3n_attention_args;

Q3N_DECLARE_OPERATOR(attention);
Q3N_DECLARE_CUDA(attention, attention);
Q3N_DECLARE_CUDA(attention, attention_whole);

/* The exact merge of partial results over disjoint key ranges, with sink and gate:
     m = max lse_p     o = sum_p exp(lse_p - m) o_p / (sum_p exp(lse_p - m) [+ exp(sink - m)]) * sigmoid(gate) */
typedef struct q3n_attention_merge_args {
  uint64_t struct_bytes;  /* sizeof(q3n_attention_merge_args) */
  float *o;               /* [T][HQ][D] */
  float *lse;             /* [T][HQ] or NULL */
  const float *part_o;    /* [parts][T][HQ][D], contiguous */
  const float *part_lse;  /* [parts][T][HQ], contiguous */
  const float *gate;      /* [T][HQ][D] or NULL */
  const float *sinks;     /* [HQ] or NULL */
  int64_t o_t, o_h;       /* strides in elements */
  int64_t lse_t;
  int64_t gate_t, gate_h;
  int64_t parts, T, HQ, D;
} q3n_attention_merge_args;

Q3N_DECLARE_OPERATOR(attention_merge);
Q3N_DECLARE_CUDA(attention_merge, attention_merge);

#endif
