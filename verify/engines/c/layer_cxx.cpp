// The header and the library from C++: a delta rule over std::thread, judged by a double loop.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "q3n.h"

namespace {

struct free_deleter {
  void operator()(void *p) const { std::free(p); }
};

void run(const q3n_gated_delta_args &args, int threads) {
  if (q3n_status status = q3n_gated_delta_check(&args)) throw std::runtime_error(q3n_status_string(status));
  const q3n_gated_delta_variant *variant = q3n_gated_delta_best(&args);
  const int64_t items = variant->items(&args), bytes = (variant->scratch_bytes(&args) + 63) / 64 * 64;
  std::vector<q3n_status> status(static_cast<size_t>(threads));
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; i++)
    pool.emplace_back([&, i] {
      std::unique_ptr<void, free_deleter> scratch(bytes ? std::aligned_alloc(64, static_cast<size_t>(bytes)) : nullptr);
      status[static_cast<size_t>(i)] = q3n_gated_delta_run(variant, &args, items * i / threads,
                                                           items * (i + 1) / threads, scratch.get(), bytes);
    });
  for (auto &thread : pool) thread.join();
  for (q3n_status s : status)
    if (s) throw std::runtime_error(q3n_status_string(s));
}

}  // namespace

int main() try {
  constexpr int64_t T = 70, H = 3, K = 32, V = 16;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  auto drawn = [&](int64_t n) {
    std::vector<float> x(static_cast<size_t>(n));
    for (float &e : x) e = normal(random);
    return x;
  };
  auto q = drawn(T * H * K), k = drawn(T * H * K), v = drawn(T * H * V), g = drawn(T * H), beta = drawn(T * H);
  for (float &e : g) e = -std::abs(e) * 0.1f;
  for (float &e : beta) e = 1.0f / (1.0f + std::exp(-e));
  std::vector<float> o(T * H * V), state(H * V * K);

  q3n_gated_delta_args args = {};
  args.struct_bytes = sizeof args;
  args.o = o.data(), args.state_out = state.data();
  args.q = q.data(), args.k = k.data(), args.v = v.data(), args.g = g.data(), args.beta = beta.data();
  args.gate = Q3N_GATE_SCALAR, args.qk_l2norm = 1, args.qk_l2norm_eps = 1e-6f, args.scale = 1.0f / std::sqrt(float(K));
  args.o_t = args.v_t = H * V, args.o_h = args.v_h = V;
  args.q_t = args.k_t = H * K, args.q_h = args.k_h = K;
  args.g_t = args.beta_t = H, args.g_h = args.beta_h = 1;
  args.state_slot = H * V * K, args.state_h = V * K, args.state_v = K;
  args.slots = args.B = 1, args.T = T, args.HK = args.HV = H, args.K = K, args.V = V;
  run(args, 2);

  double worst = 0;
  for (int64_t h = 0; h < H; h++) {
    std::vector<double> s(V * K);
    for (int64_t t = 0; t < T; t++) {
      const float *qt = &q[(t * H + h) * K], *kt = &k[(t * H + h) * K];
      double nq = 1e-6, nk = 1e-6, square = 0, error = 0;
      for (int64_t i = 0; i < K; i++) nq += double(qt[i]) * qt[i], nk += double(kt[i]) * kt[i];
      const double decay = std::exp(double(g[t * H + h])), fq = 1 / std::sqrt(nq * K), fk = 1 / std::sqrt(nk);
      for (int64_t j = 0; j < V; j++) {
        double sk = 0, sq = 0;
        for (int64_t i = 0; i < K; i++) sk += (s[j * K + i] *= decay) * kt[i] * fk;
        const double u = beta[t * H + h] * (v[(t * H + h) * V + j] - sk);
        for (int64_t i = 0; i < K; i++) sq += (s[j * K + i] += u * kt[i] * fk) * qt[i] * fq;
        const double off = o[(t * H + h) * V + j] - sq;
        square += sq * sq, error += off * off;
      }
      const double row = std::sqrt(error / square);
      if (!(row <= worst)) worst = row;
    }
  }
  std::printf("C++: gated_delta, worst row error %.1e\n", worst);

  args.k_t = -1;
  try {
    run(args, 2);
    return 1;
  } catch (const std::runtime_error &e) {
    std::printf("C++: a negative stride throws \"%s\"\n", e.what());
  }
  return !(worst <= 1e-5);
} catch (const std::exception &e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
