/* How K and V lie in a block, and what attention needs of memory: shared by all instruction sets, and by Python.
 *
 * A layer of the pool is [num_blocks][K, V][num_kv_heads][block_size * head_dim] elements. How the last of these lies
 * is this library's own business:
 *
 *   K, bf16   [block_size / 16][head_dim / 2][16 keys][2]   pairs of dimensions beside each other, keys as columns
 *   K, fp32   [block_size / 16][head_dim][16 keys]
 *   V, bf16   [block_size / 2][head_dim][2]                 pairs of keys beside each other
 *   V, fp32   [block_size][head_dim]
 *
 * Sixteen keys of K and a pair of dimensions fill 64 bytes: a row of an AMX tile, a register of AVX-512. So scores of
 * sixteen keys come out in lanes, with no sum across lanes, and both products read memory in its order.
 */
#ifndef OCTAVO_ATTENTION_H
#define OCTAVO_ATTENTION_H

#include "octavo_cpu.h"

#define OV_CHUNK 256         /* keys: softmax is merged at multiples of this position, whoever computes what */
#define OV_KEYS 16           /* keys that lie beside each other in K */
#define OV_TILE 16           /* rows (query, head) computed together */
#define OV_MAX_HEAD_DIM 512
#define OV_ATTENTION_SCRATCH ((int64_t)1 << 17) /* bytes of a thread, at most */
#define OV_MAX_SPLIT_BYTES ((int64_t)1 << 24) /* partial results of one step; sequences beyond it are not split */

/* A sequence is split among threads when its chunks are more than one of so many shares of a thread's work. */
#define OV_SPLIT_SHARES 8

/* Partial result of a split sequence's rows over one chunk: each row's sum of values, then its maximum and its sum. */
static inline int64_t ov_partial_floats(const OvAttention *spec) { return spec->head_dim + 16; }
static inline int64_t ov_partial_bytes(const OvAttention *spec, int64_t rows) {
    return rows * ov_partial_floats(spec) * 4;
}

/* Elements from the start of a layer to K (which = 0) or V (1) of a block and head. */
static inline int64_t ov_kv_offset(const OvAttention *spec, int64_t block, int which, int64_t head) {
    return ((2 * block + which) * spec->num_kv_heads + head) * spec->block_size * spec->head_dim;
}

/* 1 if attention of this shape works here, else 0. */
OV_EXPORT int ov_attention_supported(const OvAttention *spec);

/* Bytes that a step's attention takes at most beside its operands, all threads together, for sequences of up to
   max_kv_len keys. */
OV_EXPORT int64_t ov_attention_workspace(const OvAttention *spec, int64_t max_kv_len, int64_t num_threads);

/* Copies blocks sources[i] to targets[i] in every layer. A block may be source of one copy and target of another: in a
   layer all reads come before any write. Targets are distinct. Returns 0, or -1 if there was no memory: then nothing
   has been written. */
OV_EXPORT int ov_copy_blocks(void *pool, int64_t num_layers, int64_t layer_bytes, int64_t block_bytes,
                             const int64_t *sources, const int64_t *targets, int64_t n);

#endif
