#include "operator.h"

int32_t q3n_abi_version(void) { return Q3N_ABI_VERSION; }
