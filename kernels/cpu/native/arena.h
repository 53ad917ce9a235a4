/* Memory for matrices in pages of 2 MB where the system gives them: fewer misses of address translation. */
#ifndef OCTAVO_ARENA_H
#define OCTAVO_ARENA_H

#include <stddef.h>

/* A stretch of memory that several matrices share; it is freed when the last of them is. */
typedef struct OvRegion OvRegion;

/* num_bytes on a multiple of 64, from *current or, where that is full, from a new region that takes its place; *current
   starts as NULL. NULL: no memory. The region is held once more, for the caller. */
void *ov_region_take(OvRegion **current, size_t num_bytes, OvRegion **held);

/* The last to release a region frees it; NULL is none. */
void ov_region_release(OvRegion *);

#endif
