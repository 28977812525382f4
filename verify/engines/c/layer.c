/* A whole Gated DeltaNet layer of an engine written in C: projections, causal convolution, delta rule, gated norm,
   output projection, over the engine's own threads, for a prompt and then token by token with the states kept in
   place. The same layer in plain double loops judges it. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "pool.h"

POOL_OPERATOR(matmul)
POOL_OPERATOR(causal_conv)
POOL_OPERATOR(gated_delta)
POOL_OPERATOR(norm)

enum { D = 96, HK = 2, HV = 4, K = 64, V = 32, W = 4, T = 37, STEPS = 5 };
enum { QKV = 2 * HK * K + HV * V, Z = HV * V, ROW = QKV + Z }; /* a row of the projection: q, k, v, z */
static const float eps = 1e-6f;

typedef struct layer {
  float in[ROW][D], ba[2 * HV][D], conv[QKV][W], norm[V], out[D][HV * V];
  float a_log[HV], dt_bias[HV];
} layer;

typedef struct state {
  float conv[QKV][W - 1], s[HV][V][K];
} state;

static uint64_t seed = 20;
/* Uniform in -1..1; splitmix64. */
static float draw(void) {
  uint64_t z = (seed += 0x9e3779b97f4a7c15u);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return (float)((z ^ z >> 31) >> 40) * 0x1p-23f - 1.0f;
}
static void fill(float *x, size_t n, float scale) {
  for (size_t i = 0; i < n; i++) x[i] = scale * draw();
}

static void must(q3n_status status, const char *what) {
  if (status == Q3N_OK) return;
  fprintf(stderr, "%s: %s\n", what, q3n_status_string(status));
  exit(1);
}

static void project(pool *p, float *y, const float *x, const float *w, int64_t m, int64_t n, int64_t k) {
  q3n_matmul_args a = {.struct_bytes = sizeof a, .y = y, .x = x, .w = w, .dtype = Q3N_F32, .x_dtype = Q3N_F32,
                       .y_m = n, .x_m = k, .w_n = k, .M = m, .N = n, .K = k};
  must(pool_matmul(p, &a), "matmul");
}

/* y[n][D] = layer of x[n][D], n <= T; the state moves on. */
static void forward(pool *p, const layer *l, state *s, float *y, const float *x, int64_t n) {
  static float row[T][ROW], ba[T][2 * HV], qkv[T][QKV], g[T][HV], beta[T][HV], o[T][HV * V];
  project(p, row[0], x, l->in[0], n, ROW, D);
  project(p, ba[0], x, l->ba[0], n, 2 * HV, D);
  for (int64_t t = 0; t < n; t++)
    for (int h = 0; h < HV; h++) {
      beta[t][h] = 1.0f / (1.0f + expf(-ba[t][h]));
      g[t][h] = -expf(l->a_log[h]) * log1pf(expf(ba[t][HV + h] + l->dt_bias[h]));
    }
  /* The convolution reads the first QKV channels where the projection left them. */
  q3n_causal_conv_args conv = {.struct_bytes = sizeof conv, .y = qkv[0], .x = row[0], .w = l->conv[0], .silu = 1,
                               .state_in = s->conv[0], .state_out = s->conv[0], .y_t = QKV, .x_t = ROW, .w_c = W,
                               .state_c = W - 1, .state_slot = QKV * (W - 1), .slots = 1, .B = 1, .T = n, .C = QKV,
                               .width = W};
  must(pool_causal_conv(p, &conv), "causal_conv");
  q3n_gated_delta_args delta = {.struct_bytes = sizeof delta, .o = o[0], .state_in = s->s[0][0], .state_out = s->s[0][0],
                                .q = qkv[0], .k = qkv[0] + HK * K, .v = qkv[0] + 2 * HK * K, .g = g[0], .beta = beta[0],
                                .gate = Q3N_GATE_SCALAR, .head_map = Q3N_HEADS_GROUPED, .qk_l2norm = 1,
                                .qk_l2norm_eps = eps, .scale = 1.0f / sqrtf(K), .o_t = HV * V, .o_h = V, .q_t = QKV,
                                .q_h = K, .k_t = QKV, .k_h = K, .v_t = QKV, .v_h = V, .g_t = HV, .g_h = 1, .beta_t = HV,
                                .beta_h = 1, .state_slot = HV * V * K, .state_h = V * K, .state_v = K, .slots = 1,
                                .B = 1, .T = n, .HK = HK, .HV = HV, .K = K, .V = V};
  must(pool_gated_delta(p, &delta), "gated_delta");
  q3n_norm_args norm = {.struct_bytes = sizeof norm, .y = o[0], .x = o[0], .w = l->norm, .z = row[0] + QKV,
                        .kind = Q3N_NORM_RMS_GATED, .eps = eps, .y_t = HV * V, .y_h = V, .x_t = HV * V, .x_h = V,
                        .z_t = ROW, .z_h = V, .T = n, .H = HV, .D = V};
  must(pool_norm(p, &norm), "norm");
  project(p, y, o[0], l->out[0], n, D, HV * V);
}

/* The judge: the same in double, one token after the other, from the formulas. */
static double sigmoid(double a) { return 1.0 / (1.0 + exp(-a)); }
static double wc[QKV][W], ws[HV][V][K];
static void plain(const layer *l, double *y, const float *x) {
  double row[ROW], qkv[QKV], q[HK][K], k[HK][K], o[HV * V];
  for (int i = 0; i < ROW; i++) {
    row[i] = 0;
    for (int j = 0; j < D; j++) row[i] += (double)l->in[i][j] * x[j];
  }
  for (int c = 0; c < QKV; c++) {
    memmove(wc[c], wc[c] + 1, (W - 1) * sizeof(double));
    wc[c][W - 1] = row[c];
    double a = 0;
    for (int j = 0; j < W; j++) a += l->conv[c][j] * wc[c][j];
    qkv[c] = a * sigmoid(a);
  }
  for (int h = 0; h < HK; h++) {
    double nq = eps, nk = eps;
    for (int i = 0; i < K; i++) {
      q[h][i] = qkv[h * K + i], k[h][i] = qkv[(HK + h) * K + i];
      nq += q[h][i] * q[h][i], nk += k[h][i] * k[h][i];
    }
    for (int i = 0; i < K; i++) q[h][i] /= sqrt(nq) * sqrt(K), k[h][i] /= sqrt(nk);
  }
  for (int h = 0; h < HV; h++) {
    const int hk = h / (HV / HK);
    double b = 0, a = l->dt_bias[h], square = 0;
    for (int j = 0; j < D; j++) b += (double)l->ba[h][j] * x[j], a += (double)l->ba[HV + h][j] * x[j];
    const double decay = exp(-exp(l->a_log[h]) * log1p(exp(a))), beta = sigmoid(b);
    for (int v = 0; v < V; v++) {
      double sk = 0, sq = 0;
      for (int i = 0; i < K; i++) sk += (ws[h][v][i] *= decay) * k[hk][i];
      const double u = beta * (qkv[2 * HK * K + h * V + v] - sk);
      for (int i = 0; i < K; i++) sq += (ws[h][v][i] += u * k[hk][i]) * q[hk][i];
      o[h * V + v] = sq;
      square += sq * sq;
    }
    for (int v = 0; v < V; v++) {
      const double z = row[QKV + h * V + v];
      o[h * V + v] *= l->norm[v] / sqrt(square / V + eps) * z * sigmoid(z);
    }
  }
  for (int i = 0; i < D; i++) {
    y[i] = 0;
    for (int j = 0; j < HV * V; j++) y[i] += (double)l->out[i][j] * o[j];
  }
}

int main(void) {
  if (q3n_abi_version() != Q3N_ABI_VERSION) {
    fprintf(stderr, "header of ABI %d, library of ABI %d\n", Q3N_ABI_VERSION, q3n_abi_version());
    return 1;
  }
  static layer l;
  static state s, alone_state;
  static float x[T + STEPS][D], y[T + STEPS][D], alone[T + STEPS][D];
  fill(l.in[0], ROW * D, 0.2f);
  fill(l.ba[0], 2 * HV * D, 0.2f);
  fill(l.conv[0], QKV * W, 0.5f);
  fill(l.out[0], D * HV * V, 0.1f);
  for (int i = 0; i < V; i++) l.norm[i] = 1.0f + 0.2f * draw();
  for (int h = 0; h < HV; h++) l.a_log[h] = draw(), l.dt_bias[h] = draw();
  fill(x[0], (T + STEPS) * D, 1.0f);

  pool p, one;
  if (!pool_open(&p, 3) || !pool_open(&one, 1)) return fprintf(stderr, "no threads\n"), 1;
  forward(&p, &l, &s, y[0], x[0], T);
  for (int t = T; t < T + STEPS; t++) forward(&p, &l, &s, y[t], x[t], 1);
  forward(&one, &l, &alone_state, alone[0], x[0], T);
  for (int t = T; t < T + STEPS; t++) forward(&one, &l, &alone_state, alone[t], x[t], 1);
  pool_close(&p);
  pool_close(&one);
  const int same = !memcmp(y, alone, sizeof y) && !memcmp(&s, &alone_state, sizeof s);

  double worst = 0, ref[D];
  for (int t = 0; t < T + STEPS; t++) {
    double square = 0, error = 0;
    plain(&l, ref, x[t]);
    for (int i = 0; i < D; i++) {
      square += ref[i] * ref[i];
      error += (y[t][i] - ref[i]) * (y[t][i] - ref[i]);
    }
    const double row = sqrt(error / square);
    if (!(row <= worst)) worst = row;
  }
  printf("DeltaNet layer, %d tokens at once and %d alone: worst row error %.1e; 3 threads and 1 %s\n", T, STEPS, worst,
         same ? "agree bit for bit" : "DIFFER");
  /* 2^-24 a rounding, some hundred of them along the longest path, through norms that divide by small rows */
  return !(worst <= 1e-5) || !same;
}
