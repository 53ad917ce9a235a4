#define _GNU_SOURCE
#include "arena.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#ifdef __SANITIZE_ADDRESS__ /* every matrix by itself, so that reading past one is seen */
#define PAGE ((size_t)64)
#define REGION ((size_t)0)
#else
#define PAGE ((size_t)2 << 20)
#define REGION (16 * PAGE) /* pages that nobody has touched cost nothing */
#endif

struct OvRegion {
    _Atomic int holders; /* whoever fills it, and its matrices */
    size_t used, size;
    char *memory;
};

static OvRegion *region_create(size_t num_bytes) {
    size_t size = num_bytes > REGION ? (num_bytes + PAGE - 1) / PAGE * PAGE : REGION;
    OvRegion *region = malloc(sizeof *region);
    char *memory = region != NULL ? aligned_alloc(PAGE, size) : NULL;
    if (memory == NULL) {
        free(region);
        return NULL;
    }
    madvise(memory, size, MADV_HUGEPAGE);
    *region = (OvRegion){.holders = 1, .size = size, .memory = memory};
    return region;
}

void *ov_region_take(OvRegion **current, size_t num_bytes, OvRegion **held) {
    num_bytes = (num_bytes + 63) / 64 * 64;
    if (*current == NULL || (*current)->size - (*current)->used < num_bytes) {
        OvRegion *region = region_create(num_bytes);
        if (region == NULL) return NULL;
        ov_region_release(*current);
        *current = region;
    }
    OvRegion *region = *held = *current;
    atomic_fetch_add(&region->holders, 1);
    void *at = region->memory + region->used;
    region->used += num_bytes;
    return at;
}

void ov_region_release(OvRegion *region) {
    if (region == NULL || atomic_fetch_sub(&region->holders, 1) != 1) return;
    free(region->memory);
    free(region);
}
