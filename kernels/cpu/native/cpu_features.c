/* Which of our instruction sets the CPU has and the operating system saves across context switches. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "run.h"

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_TILE_DATA 18

enum { EAX, EBX, ECX, EDX };

static bool has(const unsigned *leaf, int reg, int bit) { return (leaf[reg] >> bit) & 1; }

static bool read_leaf(unsigned leaf, unsigned subleaf, unsigned *out) {
    return __get_cpuid_count(leaf, subleaf, &out[EAX], &out[EBX], &out[ECX], &out[EDX]) != 0;
}

/* The state that the system saves: register sets by bit of XCR0. */
static uint64_t saved_state(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

/* Linux gives tile registers on request, to the whole process. */
static bool tiles_permitted(void) {
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILE_DATA) == 0;
}

unsigned ov_cpu_supports(void) {
    unsigned one[4], seven[4], seven_one[4] = {0};
    if (!read_leaf(1, 0, one) || !read_leaf(7, 0, seven)) return 0;
    if (seven[EAX] >= 1) read_leaf(7, 1, seven_one);
    const uint64_t ymm = 0x6, zmm = 0xe6, tiles = 0x60000;
    uint64_t saved = has(one, ECX, 27) ? saved_state() : 0;
    bool avx2 = (saved & ymm) == ymm && has(one, ECX, 12) && has(one, ECX, 29) && has(seven, EBX, 5);
    bool avxvnni = avx2 && has(seven_one, EAX, 4);
    /* F, DQ, BW, VL, VNNI, BF16 */
    bool avx512 = avx2 && (saved & zmm) == zmm && has(seven, EBX, 16) && has(seven, EBX, 17) && has(seven, EBX, 30) &&
                  has(seven, EBX, 31) && has(seven, ECX, 11) && has(seven_one, EAX, 5);
    /* BF16, TILE, INT8 */
    bool amx = avx512 && (saved & tiles) == tiles && has(seven, EDX, 22) && has(seven, EDX, 24) &&
               has(seven, EDX, 25) && tiles_permitted();
    return (unsigned)avx2 | (unsigned)avxvnni << 1 | (unsigned)avx512 << 2 | (unsigned)amx << 3;
}

int64_t ov_memory_streams(void) {
    static _Atomic int known;
    int streams = atomic_load_explicit(&known, memory_order_relaxed);
    if (streams == 0) {
        unsigned vendor[4] = {0};
        read_leaf(0, 0, vendor);
        const bool amd = vendor[EBX] == signature_AMD_ebx && vendor[ECX] == signature_AMD_ecx;
        streams = amd ? 1 : 8;
        atomic_store_explicit(&known, streams, memory_order_relaxed);
    }
    return streams;
}
