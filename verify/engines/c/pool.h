/* An engine's own threads: a fixed pool that runs one job at a time, part 0 on the caller. The kernels never see it; they
   get ranges of work items. Scratch belongs to the pool too: one piece a part, grown between jobs. */
#ifndef POOL_H
#define POOL_H

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#include "q3n.h"

#define POOL_MAX 64

typedef struct pool {
  int parts;
  pthread_t thread[POOL_MAX];
  pthread_mutex_t lock;
  pthread_cond_t start, done;
  void (*job)(void *data, int part, int parts);
  void *data;
  uint64_t round;
  int running, quit;
  void *scratch[POOL_MAX];
  int64_t scratch_bytes[POOL_MAX];
} pool;

typedef struct pool_worker {
  pool *p;
  int part;
} pool_worker;

static void *pool_work(void *data) {
  pool_worker me = *(pool_worker *)data;
  free(data);
  pool *p = me.p;
  pthread_mutex_lock(&p->lock);
  for (uint64_t seen = 0;;) {
    while (p->round == seen && !p->quit) pthread_cond_wait(&p->start, &p->lock);
    if (p->quit) break;
    seen = p->round;
    pthread_mutex_unlock(&p->lock);
    p->job(p->data, me.part, p->parts);
    pthread_mutex_lock(&p->lock);
    if (--p->running == 0) pthread_cond_signal(&p->done);
  }
  pthread_mutex_unlock(&p->lock);
  return NULL;
}

/* 1 where all threads started. */
static int pool_open(pool *p, int parts) {
  *p = (pool){.parts = 1};
  pthread_mutex_init(&p->lock, NULL);
  pthread_cond_init(&p->start, NULL);
  pthread_cond_init(&p->done, NULL);
  for (int i = 1; i < parts && i < POOL_MAX; i++) {
    pool_worker *w = malloc(sizeof *w);
    if (!w) return 0;
    *w = (pool_worker){p, i};
    if (pthread_create(&p->thread[i], NULL, pool_work, w)) {
      free(w);
      return 0;
    }
    p->parts = i + 1;
  }
  return 1;
}

static void pool_close(pool *p) {
  pthread_mutex_lock(&p->lock);
  p->quit = 1;
  pthread_cond_broadcast(&p->start);
  pthread_mutex_unlock(&p->lock);
  for (int i = 1; i < p->parts; i++) pthread_join(p->thread[i], NULL);
  for (int i = 0; i < p->parts; i++) free(p->scratch[i]);
}

static void pool_run(pool *p, void (*job)(void *, int, int), void *data) {
  pthread_mutex_lock(&p->lock);
  p->job = job;
  p->data = data;
  p->running = p->parts - 1;
  p->round++;
  pthread_cond_broadcast(&p->start);
  pthread_mutex_unlock(&p->lock);
  job(data, 0, p->parts);
  pthread_mutex_lock(&p->lock);
  while (p->running) pthread_cond_wait(&p->done, &p->lock);
  pthread_mutex_unlock(&p->lock);
}

/* Scratch of at least `bytes` for every part; 0 where memory ran out. */
static int pool_scratch(pool *p, int64_t bytes) {
  for (int i = 0; i < p->parts; i++)
    if (p->scratch_bytes[i] < bytes) {
      free(p->scratch[i]);
      const size_t rounded = ((size_t)bytes + Q3N_SCRATCH_ALIGN - 1) / Q3N_SCRATCH_ALIGN * Q3N_SCRATCH_ALIGN;
      p->scratch[i] = aligned_alloc(Q3N_SCRATCH_ALIGN, rounded);
      p->scratch_bytes[i] = p->scratch[i] ? (int64_t)rounded : 0;
      if (!p->scratch[i]) return 0;
    }
  return 1;
}

/* Defines pool_<op>(pool, args): checks, picks a variant, cuts its items over the pool. The status of the first part that
   failed. */
#define POOL_OPERATOR(op)                                                                                       \
  typedef struct pool_##op##_call {                                                                             \
    pool *p;                                                                                                    \
    const q3n_##op##_args *args;                                                                                \
    const q3n_##op##_variant *variant;                                                                          \
    int64_t items;                                                                                              \
    q3n_status status[POOL_MAX];                                                                                \
  } pool_##op##_call;                                                                                           \
  static void pool_##op##_part(void *data, int part, int parts) {                                               \
    pool_##op##_call *c = data;                                                                                 \
    c->status[part] = q3n_##op##_run(c->variant, c->args, c->items * part / parts, c->items * (part + 1) / parts, \
                                     c->p->scratch[part], c->p->scratch_bytes[part]);                           \
  }                                                                                                             \
  static q3n_status pool_##op(pool *p, const q3n_##op##_args *args) {                                           \
    pool_##op##_call c = {.p = p, .args = args};                                                                \
    q3n_status status = q3n_##op##_check(args);                                                                 \
    if (status != Q3N_OK) return status;                                                                        \
    c.variant = q3n_##op##_best(args);                                                                          \
    c.items = c.variant->items(args);                                                                           \
    if (!pool_scratch(p, c.variant->scratch_bytes(args))) return q3n_fail(Q3N_SCRATCH, Q3N_ARG_SCRATCH);        \
    pool_run(p, pool_##op##_part, &c);                                                                          \
    for (int i = 0; i < p->parts && status == Q3N_OK; i++) status = c.status[i];                                \
    return status;                                                                                              \
  }

#endif
