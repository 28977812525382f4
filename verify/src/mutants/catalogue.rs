//! The list of mutants. build.rs reads it too: it applies the patches to copies of the kernels and compiles them.

/// A known bug, put back.
pub struct Mutant {
    /// Number in the catalogue, with a letter where a bug has more than one form.
    pub id: &'static str,
    /// What went wrong where it was met.
    pub bug: &'static str,
    /// How it is rebuilt.
    pub form: Form,
}

/// How a bug is rebuilt.
pub enum Form {
    /// In a copy of a variant's C code.
    Kernel {
        /// Operator.
        op: &'static str,
        /// Name of the variant whose place it takes.
        variant: &'static str,
        /// Changes of the text.
        patches: &'static [Patch],
    },
    /// In what a loader or the state hands to the forward pass: `super::model` has the change under this id.
    Model,
    /// Not rebuilt yet, and what it waits for.
    Pending(&'static str),
}

/// A change in a file under csrc.
pub struct Patch {
    /// Path below csrc.
    pub file: &'static str,
    /// Text that stands in it exactly once.
    pub find: &'static str,
    /// What stands there instead.
    pub replace: &'static str,
}

const fn at(file: &'static str, find: &'static str, replace: &'static str) -> Patch {
    Patch { file, find, replace }
}

const fn kernel(
    id: &'static str,
    bug: &'static str,
    op: &'static str,
    variant: &'static str,
    patches: &'static [Patch],
) -> Mutant {
    Mutant { id, bug, form: Form::Kernel { op, variant, patches } }
}

/// In a CUDA kernel, which the host executor runs.
const fn cuda(
    id: &'static str,
    bug: &'static str,
    op: &'static str,
    variant: &'static str,
    patches: &'static [Patch],
) -> Mutant {
    if cfg!(feature = "cuda-host") {
        kernel(id, bug, op, variant, patches)
    } else {
        pending(id, bug, "is in a CUDA kernel: build with the feature cuda-host")
    }
}

const fn model(id: &'static str, bug: &'static str) -> Mutant {
    Mutant { id, bug, form: Form::Model }
}

const fn pending(id: &'static str, bug: &'static str, why: &'static str) -> Mutant {
    Mutant { id, bug, form: Form::Pending(why) }
}

const PARTS: &str = "gated_delta/gated_delta_parts.h";
const HALF_CUDA: &str = "cuda/half.cuh";
const RECURRENT: &str = "gated_delta/gated_delta_scalar.c";
const UNFUSED: &str = "gated_delta/gated_delta_unfused.c";
const ATTENTION: &str = "attention/attention_scalar.c";
const CONV: &str = "causal_conv/causal_conv_scalar.c";
const NORM: &str = "norm/norm_scalar.c";
const ROPE: &str = "rope/rope_scalar.c";
const MOE: &str = "moe/moe_scalar.c";
const ATTENTION_CUDA: &str = "attention/attention.cu";
const NORM_CUDA: &str = "norm/norm.cu";
const SOLVE_CUDA: &str = "solve_tri/solve_tri.cu";
const DELTA_CUDA: &str = "gated_delta/gated_delta_parts.cuh";
const SEGMENTS_CUDA: &str = "gated_delta/gated_delta_chunked.cu";
const BF16_CUDA: &str = "gated_delta/gated_delta_chunked_bf16.cuh";
const EXPERTS_CUDA: &str = "moe/moe_experts.cu";

const INVERSE_NORM: &str = "1.0f / sqrtf(gd_dot(x, x, a->K) + a->qk_l2norm_eps)";
const NORM_FACTOR: &str = "1.0 / sqrt((a->kind == Q3N_NORM_L2 ? squares : squares / (double)a->D) + (double)a->eps);";
const EXP_G: &str = "expf(x->g[t * a->g_t]) : 1.0f";
const HALF: Patch =
    at(RECURRENT, "#include \"gated_delta_parts.h\"", "#include \"../base/half.h\"\n#include \"gated_delta_parts.h\"");
const CONV_SLOT: &str = "(a->slot_in ? a->slot_in[b] : b) * a->state_slot";

/// Every mutant, by number.
pub const CATALOGUE: &[Mutant] = &[
    kernel(
        "1a",
        "the L2 norm of q and k divides by max(√Σx², eps): eps belongs under the root",
        "gated_delta",
        "recurrent_scalar",
        &[at(PARTS, INVERSE_NORM, "1.0f / fmaxf(sqrtf(gd_dot(x, x, a->K)), a->qk_l2norm_eps)")],
    ),
    kernel(
        "1b",
        "the same in the norm operator",
        "norm",
        "scalar",
        &[at(
            NORM,
            NORM_FACTOR,
            "a->kind == Q3N_NORM_L2 ? 1.0 / fmax(sqrt(squares), (double)a->eps)
                                                     : 1.0 / sqrt(squares / (double)a->D + (double)a->eps);",
        )],
    ),
    kernel(
        "2a",
        "the L2 norm of q and k is an RMS norm over √K: eps is added to the mean, so K times too large",
        "gated_delta",
        "chunked16_scalar",
        &[at(
            PARTS,
            INVERSE_NORM,
            "1.0f / sqrtf(gd_dot(x, x, a->K) / (float)a->K + a->qk_l2norm_eps) / sqrtf((float)a->K)",
        )],
    ),
    kernel(
        "2b",
        "the same in the norm operator",
        "norm",
        "scalar",
        &[at(
            NORM,
            NORM_FACTOR,
            "1.0 / sqrt(squares / (double)a->D + (double)a->eps) /
                          (a->kind == Q3N_NORM_L2 ? sqrt((double)a->D) : 1.0);",
        )],
    ),
    kernel(
        "3",
        "q and k are RMS-normalised where the L2 norm is meant",
        "gated_delta",
        "chunked64_scalar",
        &[at(PARTS, INVERSE_NORM, "1.0f / sqrtf(gd_dot(x, x, a->K) / (float)a->K + a->qk_l2norm_eps)")],
    ),
    kernel(
        "4",
        "the flag of the in-kernel L2 norm is ignored",
        "gated_delta",
        "unfused_scalar",
        &[at(PARTS, "a->qk_l2norm ? 1.0f", "0 ? 1.0f")],
    ),
    kernel(
        "5",
        "g is taken as the decay itself, not as its logarithm",
        "gated_delta",
        "recurrent_scalar",
        &[at(PARTS, EXP_G, "x->g[t * a->g_t] : 1.0f")],
    ),
    model("6", "the loader takes ssm_a for A_log and exponentiates what already is −exp(A_log)"),
    kernel(
        "7",
        "a safe_exp that is 0 for arguments that are not below 0: wrong at a gate of exactly 1",
        "gated_delta",
        "chunked16_scalar",
        &[at(PARTS, EXP_G, "x->g[t * a->g_t] == 0.0f ? 0.0f : expf(x->g[t * a->g_t]) : 1.0f")],
    ),
    kernel(
        "8",
        "keys are not decayed to the end of the chunk from the second chunk on: right up to T = 64",
        "gated_delta",
        "unfused_scalar",
        &[at(
            UNFUSED,
            "      scores(K, &ch);",
            "      scores(K, &ch);
      for (int64_t i = 0; t0 > 0 && i < ch.n * K; i++) ch.k_end[i] = ch.k[i];",
        )],
    ),
    kernel(
        "9",
        "U takes the cumulative decay that belongs to W alone",
        "gated_delta",
        "unfused_scalar",
        &[at(
            UNFUSED,
            "ch->beta[i] * x->v[(t0 + i) * a->v_t + j]",
            "ch->beta[i] * ch->gamma[i * K] * x->v[(t0 + i) * a->v_t + j]",
        )],
    ),
    kernel(
        "10",
        "the decay at the end of a block is read at its last column, also where the block is partial",
        "gated_delta",
        "unfused_scalar",
        &[at(UNFUSED, "ch->gamma + (ch->n - 1) * K", "ch->gamma + (C - 1) * K")],
    ),
    kernel(
        "11",
        "blocks of the solve above the diagonal are not masked where n is no multiple of 64",
        "solve_tri",
        "scalar",
        &[at(
            "solve_tri/solve_tri_scalar.c",
            "      for (int64_t j = 0; j < i; j++) {\n",
            "      for (int64_t j = 0; j < a->n; j++) {
        if (j >= i && (a->n % 64 == 0 || j / 16 == i / 16)) continue;\n",
        )],
    ),
    kernel(
        "12",
        "without a gate the decay is whatever the buffer held",
        "gated_delta",
        "recurrent_scalar",
        &[at(
            PARTS,
            "  for (int64_t c = 0; c < a->K; c++) decay[c] = a->gate == Q3N_GATE_CHANNEL",
            "  for (int64_t c = 0; a->gate && c < a->K; c++) decay[c] = a->gate == Q3N_GATE_CHANNEL",
        )],
    ),
    kernel(
        "13",
        "β is rounded through bf16",
        "gated_delta",
        "recurrent_scalar",
        &[
            HALF,
            at(
                RECURRENT,
                "float beta = x.beta[t * a->beta_t]",
                "float beta = q3n_bf16_to_f32(q3n_f32_to_bf16(x.beta[t * a->beta_t]))",
            ),
        ],
    ),
    kernel(
        "14",
        "the state is stored as bf16 without anyone having asked",
        "gated_delta",
        "recurrent_scalar",
        &[
            HALF,
            at(
                RECURRENT,
                "    if (x.state_out) gd",
                "    for (int64_t i = 0; i < rows * K; i++) s[i] = q3n_bf16_to_f32(q3n_f32_to_bf16(s[i]));
    if (x.state_out) gd",
            ),
        ],
    ),
    kernel(
        "15a",
        "the bits of an f16 KV cache are read as bf16",
        "attention",
        "scalar",
        &[at("attention/attention_kv.h", "q3n_f16_to_f32(from[d])", "q3n_bf16_to_f32(from[d])")],
    ),
    kernel(
        "15b",
        "the bits of f16 weights are read as bf16",
        "dequantize",
        "scalar",
        &[at(
            "quant/quant_blocks.h",
            "q3n_f16_to_f32(q3n_load_u16(p + 2 * i))",
            "q3n_bf16_to_f32(q3n_load_u16(p + 2 * i))",
        )],
    ),
    cuda(
        "15c",
        "the same of queries, keys and values in a CUDA kernel",
        "gated_delta",
        "recurrent_cuda_host",
        &[at(HALF_CUDA, "return t == Q3N_BF16 ? q3n_bf16_float(h) : q3n_half_float(h);", "return q3n_bf16_float(h);")],
    ),
    cuda(
        "16a",
        "a barrier is missing between the table and those who read it",
        "rope",
        "cuda_host",
        &[at("rope/rope.cu", "  __syncthreads();\n", "")],
    ),
    cuda(
        "16b",
        "a barrier is missing: a panel is solved while warps still add to it",
        "solve_tri",
        "cuda_host",
        &[at(SOLVE_CUDA, "      __syncthreads();\n      if (warp == 0) {", "      if (warp == 0) {")],
    ),
    cuda(
        "16c",
        "a barrier is missing after the last use: the next round overwrites it",
        "solve_tri",
        "cuda_host",
        &[at(SOLVE_CUDA, "        }\n      }\n      __syncthreads();", "        }\n      }")],
    ),
    cuda(
        "16d",
        "a barrier is missing: values are added with weights that other warps still write",
        "attention",
        "cuda_host",
        &[at(
            ATTENTION_CUDA,
            "      __syncthreads();\n\n      Q3N_UNROLL\n      for (int g = 0;",
            "      Q3N_UNROLL\n      for (int g = 0;",
        )],
    ),
    kernel(
        "17a",
        "the offset of a state slot is computed in 32 bits",
        "gated_delta",
        "recurrent_scalar",
        &[
            at(PARTS, "a->state_in + slot_in * a->state_slot", "a->state_in + (int32_t)(slot_in * a->state_slot)"),
            at(PARTS, "a->state_out + slot_out * a->state_slot", "a->state_out + (int32_t)(slot_out * a->state_slot)"),
        ],
    ),
    kernel(
        "17b",
        "the same in the KV cache",
        "attention",
        "scalar",
        &[
            at(ATTENTION, "slot * a->k_slot + j0", "(int32_t)(slot * a->k_slot) + j0"),
            at(ATTENTION, "slot * a->v_slot + j0", "(int32_t)(slot * a->v_slot) + j0"),
        ],
    ),
    kernel(
        "17c",
        "the same in the pool of convolution windows",
        "causal_conv",
        "scalar",
        &[at(CONV, CONV_SLOT, "(int32_t)((a->slot_in ? a->slot_in[b] : b) * a->state_slot)")],
    ),
    cuda(
        "17d",
        "the same in a CUDA kernel",
        "gated_delta",
        "recurrent_cuda_host",
        &[
            at(
                DELTA_CUDA,
                "a.state_in + (a.slot_in ? a.slot_in[b] : b) * a.state_slot",
                "a.state_in + (int32_t)((a.slot_in ? a.slot_in[b] : b) * a.state_slot)",
            ),
            at(
                DELTA_CUDA,
                "a.state_out + (a.slot_out ? a.slot_out[b] : b) * a.state_slot",
                "a.state_out + (int32_t)((a.slot_out ? a.slot_out[b] : b) * a.state_slot)",
            ),
        ],
    ),
    cuda(
        "18",
        "a grid dimension exceeds 65,535",
        "norm",
        "cuda_host",
        &[
            at(NORM_CUDA, "blockIdx.x * (THREADS", "blockIdx.y * (THREADS"),
            at(
                NORM_CUDA,
                "(*a), blocks, THREADS, 0, stream)\n                :",
                "(*a), q3n_dims(1, blocks), THREADS, 0, stream)\n                :",
            ),
            at(NORM_CUDA, "(*a), blocks, THREADS, 0, stream);", "(*a), q3n_dims(1, blocks), THREADS, 0, stream);"),
        ],
    ),
    kernel(
        "19a",
        "a view's offset is ignored: β of every packed sequence is read from the first token on",
        "gated_delta",
        "chunked16_scalar",
        &[at(PARTS, "a->beta + row * a->beta_b + t * a->beta_t", "a->beta + row * a->beta_b")],
    ),
    kernel(
        "19b",
        "a view's offset is ignored: values are read from the start of the cache, not of the window",
        "attention",
        "scalar",
        &[at(ATTENTION, "slot * a->v_slot + j0 * a->v_s", "slot * a->v_slot + (j0 - a->kv_begin) * a->v_s")],
    ),
    kernel(
        "20a",
        "v is taken for packed, whatever its strides",
        "gated_delta",
        "recurrent_scalar",
        &[at(RECURRENT, "x.v + t * a->v_t", "x.v + t * a->HV * a->V")],
    ),
    kernel(
        "20b",
        "x is taken for packed, whatever its strides",
        "matmul",
        "scalar",
        &[at("matmul/matmul_scalar.c", "a->x_dtype, m * a->x_m,", "a->x_dtype, m * a->K,")],
    ),
    kernel(
        "21a",
        "rows without a visible key are left unwritten",
        "attention",
        "scalar",
        &[at(ATTENTION, "d < D; d++) o[d] = empty ? 0.0f :", "!empty && d < D; d++) o[d] =")],
    ),
    cuda(
        "21b",
        "the same in a CUDA kernel",
        "attention",
        "cuda_host",
        &[at(
            ATTENTION_CUDA,
            "float *o = a.o + x.row",
            "if (!parts.o && static_cast<softmax>(total[r]).sum == 0.0f) continue;\nfloat *o = a.o + x.row",
        )],
    ),
    kernel(
        "22a",
        "the last elements of a row are read as a whole vector, past its end, and masked by a product with 0",
        "norm",
        "scalar",
        &[at(
            NORM,
            "  for (; d < n; d++) part[d % 8] += (double)x[d] * (double)x[d];",
            "  for (; d < n; d += 8)
    for (int lane = 0; lane < 8; lane++) part[lane] += (d + lane < n) * (double)x[d + lane] * (double)x[d + lane];",
        )],
    ),
    kernel(
        "22b",
        "the same with a mask that selects: no result shows it",
        "norm",
        "scalar",
        &[at(
            NORM,
            "  for (; d < n; d++) part[d % 8] += (double)x[d] * (double)x[d];",
            "  for (; d < n; d += 8)
    for (int lane = 0; lane < 8; lane++) {
      const double loaded = (double)*(const volatile float *)(x + d + lane);
      part[lane] += d + lane < n ? loaded * loaded : 0.0;
    }",
        )],
    ),
    cuda(
        "22c",
        "a vector is read where the row ends within it",
        "norm",
        "cuda_host",
        &[at(
            NORM_CUDA,
            "d + 3 < D ? row[d + 3] : pad);",
            "d + 3 < D ? row[d + 3] : pad + 0.0f * *(const volatile float *)(row + d + 3));",
        )],
    ),
    kernel(
        "23",
        "the scratch asked for lacks a row a thread: right as long as a neighbour's lies unused behind it",
        "gated_delta",
        "chunked32_scalar",
        &[at("gated_delta/gated_delta.c", "+ 3 * C + 4 * a->K) * 4)", "+ 3 * C + 3 * a->K) * 4)")],
    ),
    kernel(
        "24a",
        "the maps of value heads to key heads are swapped",
        "gated_delta",
        "recurrent_scalar",
        &[at(PARTS, "a->head_map == Q3N_HEADS_GROUPED", "a->head_map == Q3N_HEADS_TILED")],
    ),
    model("24b", "the loader takes a model of grouped heads for one of tiled heads"),
    kernel(
        "25a",
        "1 is added to weights that hold it already",
        "norm",
        "scalar",
        &[at(NORM, "(1.0 + (double)a->w[d])", "(1.0 + (1.0 + (double)a->w[d]))")],
    ),
    model("25b", "the loader adds 1 to norm weights that the file holds with the 1"),
    kernel(
        "26a",
        "every window kept for a rollback is the one after the last token",
        "causal_conv",
        "scalar",
        &[at(CONV, "store_state(&s, t + 1, a->snapshots", "store_state(&s, T, a->snapshots")],
    ),
    model("26b", "a rollback takes back the recurrent states and leaves the convolution windows"),
    kernel(
        "27a",
        "two sequences of one batch start from one state",
        "gated_delta",
        "recurrent_scalar",
        &[at(PARTS, "slot_in = a->slot_in ? a->slot_in[b] : b", "slot_in = a->slot_in ? a->slot_in[b / 2 * 2] : b")],
    ),
    kernel(
        "27b",
        "two sequences of one batch start from one convolution window",
        "causal_conv",
        "scalar",
        &[at(CONV, CONV_SLOT, "(a->slot_in ? a->slot_in[b / 2 * 2] : b) * a->state_slot")],
    ),
    kernel(
        "28",
        "SiLU is applied twice",
        "causal_conv",
        "scalar",
        &[at(
            CONV,
            "      for (int64_t c = 0; c < width; c++) y[c] = a->silu",
            "      for (int64_t c = 0; a->silu && c < width; c++) acc[c] /= 1.0f + expf(-acc[c]);
      for (int64_t c = 0; c < width; c++) y[c] = a->silu",
        )],
    ),
    kernel(
        "29",
        "the gated norm takes the mean after the gate",
        "norm",
        "scalar",
        &[at(
            NORM,
            "    const double squares = sum_of_squares(x, a->D);",
            "    double squares = sum_of_squares(x, a->D);
    if (a->kind == Q3N_NORM_RMS_GATED) {
      const float *gate = a->z + t * a->z_t + h * a->z_h;
      squares = 0.0;
      for (int64_t d = 0; d < a->D; d++) squares += pow((double)x[d] * (double)silu(gate[d]), 2.0);
    }",
        )],
    ),
    kernel(
        "30a",
        "NaN becomes 0: a row counts as empty unless its sum is above 0",
        "attention",
        "scalar",
        &[at(ATTENTION, "empty = *row.sum == 0.0f", "empty = !(*row.sum > 0.0f)")],
    ),
    kernel(
        "30b",
        "NaN becomes a number: g passes through fminf",
        "gated_delta",
        "recurrent_scalar",
        &[at(PARTS, EXP_G, "expf(fminf(x->g[t * a->g_t], 0.0f)) : 1.0f")],
    ),
    kernel(
        "31",
        "the state is clamped to ±1e6",
        "gated_delta",
        "recurrent_scalar",
        &[at(
            RECURRENT,
            "      sq[p] += s[c + p] * q[c + p];",
            "      s[c + p] = s[c + p] > 1e6f ? 1e6f : s[c + p] < -1e6f ? -1e6f : s[c + p];
      sq[p] += s[c + p] * q[c + p];",
        )],
    ),
    kernel(
        "32a",
        "an expert that a token chose twice counts once: the second overwrites the first",
        "moe_down",
        "scalar",
        &[at(
            MOE,
            "dots[pair * Q3N_MOE_ROWS + r] =",
            "dots[pair * Q3N_MOE_ROWS + r] =
              i + 1 < to && a->order[i + 1] / a->top_k == pair / a->top_k ? 0.0f :",
        )],
    ),
    cuda(
        "32b",
        "the same in a CUDA kernel, which looks for the next expert once it has found a choice",
        "moe_down",
        "cuda_host",
        &[at(
            EXPERTS_CUDA,
            "if (c >= 0 && c < a.top_k) found[c] = (int)e;",
            "if (c >= 0 && c < a.top_k) { found[c] = (int)e; break; }",
        )],
    ),
    kernel(
        "33",
        "the weights of the chosen experts are not renormalised",
        "moe_route",
        "scalar",
        &[at(MOE, "    if (a->normalize)\n", "    if (0)\n")],
    ),
    kernel(
        "34",
        "rotary pairs are neighbours (2i, 2i + 1), not halves (i, i + R/2)",
        "rope",
        "scalar",
        &[
            at(ROPE, "first = x[i], second = x[i + half]", "first = x[2 * i], second = x[2 * i + 1]"),
            at(ROPE, "y[i] = first", "y[2 * i] = first"),
            at(ROPE, "y[i + half] = first", "y[2 * i + 1] = first"),
        ],
    ),
    kernel(
        "35",
        "the whole head is rotated, not its first R channels",
        "rope",
        "scalar",
        &[
            at(ROPE, "half = a->R / 2, tail = a->D - a->R", "half = a->D / 2, tail = a->D - 2 * half"),
            at(ROPE, "/ (double)a->R", "/ (double)(2 * half)"),
            at(ROPE, "memcpy(y + a->R, x + a->R,", "memcpy(y + 2 * half, x + 2 * half,"),
            at(
                "rope/rope.c",
                "q3n_align(a->R / 2 * 8) + q3n_align(a->R * 4)",
                "q3n_align(a->D * 4) + q3n_align(a->D * 4)",
            ),
        ],
    ),
    kernel(
        "36a",
        "the causal mask is off by one: a query does not see its own key",
        "attention",
        "scalar",
        &[at("attention/attention_tile.h", "tile->kv_len - tile->n + i + 1", "tile->kv_len - tile->n + i")],
    ),
    kernel(
        "36b",
        "the causal mask is off by one: a query sees the next key",
        "attention",
        "scalar",
        &[at("attention/attention_tile.h", "tile->kv_len - tile->n + i + 1", "tile->kv_len - tile->n + i + 2")],
    ),
    kernel(
        "37",
        "the running maximum starts anew with every block of keys, and what was summed is not rescaled",
        "attention",
        "scalar",
        &[at(
            ATTENTION,
            "  const float rescale = raise_max(row, max);",
            "  const float rescale = 1.0f;
  *row.max = max;",
        )],
    ),
    model("38", "the shared expert is added without its gate"),
    cuda(
        "39",
        "outputs of bf16 are cut off, not rounded to the nearest",
        "gated_delta",
        "recurrent_cuda_host",
        &[at(HALF_CUDA, "(u + 0x7fffu + (u >> 16 & 1u)) >> 16", "u >> 16")],
    ),
    cuda(
        "40a",
        "a sequence's segments: what is written in one is forgotten where a later one starts",
        "gated_delta",
        "segmented64_cuda_host",
        &[at(SEGMENTS_CUDA, "? local[v * a.K + k] : 0.0f;", "? 0.0f * local[v * a.K + k] : 0.0f;")],
    ),
    cuda(
        "40b",
        "bf16 factors of f32 numbers lose their second part",
        "gated_delta",
        "chunked64_cuda_host",
        &[at(
            BF16_CUDA,
            "lo = q3n_pack_bf16(x - q3n_bf16_float(hi & 0xffffu), y - q3n_bf16_float(hi >> 16));",
            "lo = 0u;",
        )],
    ),
];
