/* What attention needs to know ahead of a step, and copies of blocks. */
#include "attention.h"

#include <stdlib.h>
#include <string.h>

int ov_attention_supported(const OvAttention *spec) {
    return spec->num_kv_heads > 0 && spec->num_heads > 0 && spec->num_heads % spec->num_kv_heads == 0 &&
           spec->head_dim > 0 && spec->head_dim % 16 == 0 && spec->head_dim <= OV_MAX_HEAD_DIM &&
           spec->block_size > 0 && spec->block_size % OV_KEYS == 0 && OV_CHUNK % spec->block_size == 0 &&
           spec->window >= 0 && spec->scale > 0.0f && spec->soft_cap >= 0.0f;
}

int64_t ov_attention_workspace(const OvAttention *spec, int64_t max_kv_len, int64_t num_threads) {
    int64_t scratch = num_threads * OV_ATTENTION_SCRATCH;
    if (num_threads == 1) return scratch;
    int64_t group = spec->num_heads / spec->num_kv_heads, rows = group > OV_TILE ? group : OV_TILE;
    int64_t chunks = (max_kv_len + OV_CHUNK - 1) / OV_CHUNK;
    int64_t sequences = OV_SPLIT_SHARES * num_threads / spec->num_kv_heads + 1;
    int64_t split = sequences * spec->num_kv_heads * chunks * ov_partial_bytes(spec, rows);
    return scratch + (split < OV_MAX_SPLIT_BYTES ? split : OV_MAX_SPLIT_BYTES);
}

/* Copies within one layer whose targets are sources of none of them. */
static void copy_directly(char *layer, int64_t block_bytes, const int64_t *sources, const int64_t *targets, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        memmove(layer + targets[i] * block_bytes, layer + sources[i] * block_bytes, (size_t)block_bytes);
}

static int any_target_is_source(const int64_t *sources, const int64_t *targets, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++)
            if (targets[i] == sources[j]) return 1;
    return 0;
}

int ov_copy_blocks(void *pool, int64_t num_layers, int64_t layer_bytes, int64_t block_bytes, const int64_t *sources,
                   const int64_t *targets, int64_t n) {
    if (n <= 0) return 0;
    char *held = NULL;
    if (any_target_is_source(sources, targets, n)) {
        held = malloc((size_t)(n * block_bytes));
        if (held == NULL) return -1;
    }
    for (int64_t l = 0; l < num_layers; l++) {
        char *layer = (char *)pool + l * layer_bytes;
        if (held == NULL) {
            copy_directly(layer, block_bytes, sources, targets, n);
            continue;
        }
        for (int64_t i = 0; i < n; i++)
            memcpy(held + i * block_bytes, layer + sources[i] * block_bytes, (size_t)block_bytes);
        for (int64_t i = 0; i < n; i++)
            memcpy(layer + targets[i] * block_bytes, held + i * block_bytes, (size_t)block_bytes);
    }
    free(held);
    return 0;
}
