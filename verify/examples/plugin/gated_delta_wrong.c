/* The same kernel with a plausible bug: each token decays the state by the gate of the token before it. One token is
   right, and so is a constant gate. Here the variant is a table rather than a function:

     cc -O2 -fPIC -shared -Icsrc verify/examples/plugin/gated_delta_wrong.c -lm -o libwrong.so
     qwen3next verify --op gated_delta --plugin ./libwrong.so:late_decay */
#define TOKEN_OF_DECAY(t) ((t) > 0 ? (t) - 1 : 0)
#include "gated_delta.c"

const q3n_gated_delta_variant late_decay = {
    .name = "late_decay",
    .isa = Q3N_ISA_SCALAR,
    .items = my_gated_delta_items,
    .scratch_bytes = my_gated_delta_scratch_bytes,
    .run = my_gated_delta,
};
