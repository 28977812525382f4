#include "causal_conv.h"

#include "../base/check.h"
#include "causal_conv_block.h"

/* Slots of one side: inside the pool, and for an output all different. */
static int slots_ok(const int64_t *slot, int64_t B, int64_t slots, int distinct) {
  if (!slot) return B <= slots;
  for (int64_t b = 0; b < B; b++) {
    if (slot[b] < 0 || slot[b] >= slots) return 0;
    for (int64_t c = 0; distinct && c < b; c++)
      if (slot[c] == slot[b]) return 0;
  }
  return 1;
}

q3n_status q3n_causal_conv_check(const q3n_causal_conv_args *a) {
  Q3N_REFUSE(!a, NULL, ARGS);
  Q3N_REFUSE(a->struct_bytes != sizeof *a, ABI, STRUCT_BYTES);
  Q3N_REFUSE(a->slots < 0, SIZE, SLOTS);
  Q3N_REFUSE(a->B < 0, SIZE, B);
  Q3N_REFUSE(a->T < 0, SIZE, T);
  Q3N_REFUSE(a->C < 0, SIZE, C);
  Q3N_REFUSE(a->width < 1 || a->width > Q3N_CAUSAL_CONV_MAX_WIDTH, SIZE, WIDTH);
  int64_t product;
  Q3N_REFUSE(__builtin_mul_overflow(a->B, a->C, &product), SIZE, B);
  if (a->cu_seqlens) {
    Q3N_REFUSE(a->cu_seqlens[0] != 0 || a->cu_seqlens[a->B] != a->T, VALUE, CU_SEQLENS);
    for (int64_t b = 0; b < a->B; b++) Q3N_REFUSE(a->cu_seqlens[b + 1] < a->cu_seqlens[b], VALUE, CU_SEQLENS);
  }

  /* Packed sequences are one row. */
  const int64_t rows = a->cu_seqlens ? (a->B ? 1 : 0) : a->B, window = a->width - 1;
  const q3n_axis y[] = {{rows, a->y_b}, {a->T, a->y_t}, {a->C, 1}};
  const q3n_axis x[] = {{rows, a->x_b}, {a->T, a->x_t}, {a->C, 1}};
  const q3n_axis w[] = {{a->C, a->w_c}, {a->width, 1}};
  const q3n_axis state[] = {{a->slots, a->state_slot}, {a->C, a->state_c}, {window, 1}};
  const q3n_axis snap[] = {{rows, a->snap_b}, {a->T, a->snap_t}, {a->C, a->snap_c}, {window, 1}};
  const int64_t ny = q3n_extent(y, 3), nx = q3n_extent(x, 3), nw = q3n_extent(w, 2);
  const int64_t nstate = a->state_in || a->state_out ? q3n_extent(state, 3) : 0;
  const int64_t nsnap = a->snapshots ? q3n_extent(snap, 4) : 0;
  Q3N_REFUSE(ny < 0 || !q3n_disjoint(y, 3), STRIDE, Y);
  Q3N_REFUSE(nx < 0, STRIDE, X);
  Q3N_REFUSE(nw < 0, STRIDE, W);
  Q3N_REFUSE(a->state_out && (nstate < 0 || !q3n_disjoint(state, 3)), STRIDE, STATE_OUT);
  Q3N_REFUSE(nstate < 0, STRIDE, STATE_IN);
  Q3N_REFUSE(a->snapshots && (nsnap < 0 || !q3n_disjoint(snap, 4)), STRIDE, SNAPSHOTS);
  Q3N_REFUSE(a->state_in && !slots_ok(a->slot_in, a->B, a->slots, 0), VALUE, SLOT_IN);
  Q3N_REFUSE(a->state_out && !slots_ok(a->slot_out, a->B, a->slots, 1), VALUE, SLOT_OUT);
  if (a->B == 0 || a->C == 0) return Q3N_OK;

  Q3N_REFUSE(ny > 0 && !a->y, NULL, Y);
  Q3N_REFUSE(ny > 0 && !a->x, NULL, X);
  Q3N_REFUSE(ny > 0 && !a->w, NULL, W);

  const struct {
    const void *at;
    int64_t bytes;
    q3n_arg arg;
  } out[] = {{a->y, ny * 4, Q3N_ARG_Y},
             {a->state_out, a->state_out ? nstate * 4 : 0, Q3N_ARG_STATE_OUT},
             {a->snapshots, nsnap * 4, Q3N_ARG_SNAPSHOTS}},
    in[] = {{a->x, nx * 4, Q3N_ARG_X}, {a->w, nw * 4, Q3N_ARG_W}, {a->bias, a->bias ? a->C * 4 : 0, Q3N_ARG_BIAS}};
  for (int i = 0; i < 3; i++) {
    for (int j = 0; j < 3; j++)
      if (q3n_overlap(out[i].at, out[i].bytes, in[j].at, in[j].bytes)) return q3n_fail(Q3N_ALIAS, out[i].arg);
    for (int j = 0; j < i; j++)
      if (q3n_overlap(out[i].at, out[i].bytes, out[j].at, out[j].bytes)) return q3n_fail(Q3N_ALIAS, out[i].arg);
  }
  if (!a->state_in) return Q3N_OK;
  Q3N_REFUSE(q3n_overlap(a->y, ny * 4, a->state_in, nstate * 4), ALIAS, Y);
  Q3N_REFUSE(q3n_overlap(a->snapshots, nsnap * 4, a->state_in, nstate * 4), ALIAS, SNAPSHOTS);
  if (a->state_out == a->state_in)
    for (int64_t b = 0; b < a->B; b++)
      Q3N_REFUSE((a->slot_in ? a->slot_in[b] : b) != (a->slot_out ? a->slot_out[b] : b), ALIAS, STATE_OUT);
  else
    Q3N_REFUSE(a->state_out && q3n_overlap(a->state_out, nstate * 4, a->state_in, nstate * 4), ALIAS, STATE_OUT);
  return Q3N_OK;
}

int64_t q3n_causal_conv_items(const q3n_causal_conv_args *a) {
  return a->B * q3n_ceil_div(a->C, Q3N_CAUSAL_CONV_CHANNELS);
}

int64_t q3n_causal_conv_no_scratch(const q3n_causal_conv_args *a) {
  (void)a;
  return 0;
}

#include "causal_conv.inc"
Q3N_DEFINE_OPERATOR(causal_conv, Q3N_CAUSAL_CONV_VARIANTS)
Q3N_DEFINE_BEST_FIRST(causal_conv)
