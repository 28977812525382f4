/* What a compiler makes of plain loops: it may vectorise them for the least CPU of the architecture. */
#include <string.h>

#include "peak.h"

uint32_t q3n_peak_read_scalar(const void *data, int64_t n);
uint32_t q3n_peak_f32_scalar(const void *data, int64_t n);
uint32_t q3n_peak_int8_scalar(const void *data, int64_t n);

uint32_t q3n_peak_read_scalar(const void *data, int64_t n) {
  const unsigned char *p = data;
  uint64_t sum[16] = {0}, all = 0;
  for (int64_t i = 0; i < 4 * n; i++, p += sizeof sum) {
    uint64_t x[16];
    memcpy(x, p, sizeof x);
    for (int j = 0; j < 16; j++) sum[j] += x[j];
  }
  for (int j = 0; j < 16; j++) all += sum[j];
  return (uint32_t)(all ^ all >> 32);
}

uint32_t q3n_peak_f32_scalar(const void *data, int64_t n) {
  float a[32], sum[32], all = 0.0f;
  memcpy(a, data, sizeof a);
  for (int j = 0; j < 32; j++) sum[j] = a[j];
  /* sums stay near 2 a: no overflow, no subnormals */
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < 32; j++) sum[j] = sum[j] * 0.5f + a[0];
  for (int j = 0; j < 32; j++) all += sum[j];
  uint32_t bits;
  memcpy(&bits, &all, sizeof bits);
  return bits;
}

uint32_t q3n_peak_int8_scalar(const void *data, int64_t n) {
  const signed char *x = data;
  uint32_t all = 0;
  for (int64_t i = 0; i < n; i++) {
    /* the place moves, so that no round can be taken from another */
    const signed char *a = x + i % 256, *b = x + 512 - i % 256;
    int32_t sum = 0;
    for (int j = 0; j < 512; j++) sum += a[j] * b[j];
    all += (uint32_t)sum;
  }
  return all;
}
