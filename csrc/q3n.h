/* qwen3next-kernels: every operator of Qwen3-Next as plain C. Include this one header; everything public is q3n_*.

   A call in three lines:
     int64_t bytes = v->scratch_bytes(&args);            v = q3n_<op>_best(&args), or one by name from the table
     run q3n_<op>_run(v, &args, begin, end, scratch, bytes) over ranges of 0 .. v->items(&args), from your own threads
     a status other than 0 says what is wrong: q3n_status_string(status) */
#ifndef Q3N_H
#define Q3N_H

#ifdef __cplusplus
extern "C" {
#endif

#include "attention/attention.h"
#include "base/dtype.h"
#include "base/isa.h"
#include "base/operator.h"
#include "base/peak.h"
#include "base/status.h"
#include "causal_conv/causal_conv.h"
#include "cuda/cuda.h"
#include "gated_delta/gated_delta.h"
#include "layer/layer.h"
#include "matmul/matmul.h"
#include "moe/moe.h"
#include "norm/norm.h"
#include "quant/activations.h"
#include "quant/quant.h"
#include "quant/repack.h"
#include "rope/rope.h"
#include "solve_tri/solve_tri.h"

#ifdef __cplusplus
}
#endif

#endif
