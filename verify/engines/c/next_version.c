/* Stands for csrc/base/operator.c in a library of the next ABI version (CMakeLists.txt). */
#include "base/operator.h"

int32_t q3n_abi_version(void) { return Q3N_ABI_VERSION + 1; }
