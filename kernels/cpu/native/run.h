/* The library's face: what Python calls. Everything returns 0 or one of OvStatus. */
#ifndef OCTAVO_RUN_H
#define OCTAVO_RUN_H

#include "arena.h"
#include "octavo_cpu.h"
#include "team.h"

typedef enum {
    OV_OK = 0,
    OV_UNSUPPORTED_ISA,  /* this CPU, its system or this build has no such instruction set */
    OV_NO_MEMORY,        /* or no threads */
    OV_UNKNOWN_OPERATOR, /* the list holds a kind that this instruction set has no code for; nothing was run */
    OV_BAD_ARGUMENT,
} OvStatus;

typedef struct OvContext OvContext;

typedef struct {
    const char *isa; /* "avx2" | "avxvnni" | "avx512" | "amx" */
    int32_t num_threads;
    int32_t type;          /* OvType */
    int64_t scratch_bytes; /* held for all threads together, the shared part included */
} OvInfo;

/* Which instruction sets work here: bit 0 avx2, 1 avxvnni, 2 avx512, 3 amx. */
OV_EXPORT unsigned ov_supported(void);

/* isa NULL or "": the best. num_threads counts the thread that will call ov_run or ov_finish. */
OV_EXPORT int ov_create(const char *isa, int num_threads, int type, OvContext **out);
OV_EXPORT void ov_destroy(OvContext *);
OV_EXPORT void ov_info(const OvContext *, OvInfo *out);

/* Runs the operators in order. From any thread; callers at the same time wait for one another. */
OV_EXPORT int ov_run(OvContext *, const OvOp *ops, int64_t num_ops, const OvStep *step);

/* The same in two parts: the other threads begin at once, the caller works along from ov_finish on. What the arguments
   point to must stay as it is until then. After OV_OK the same thread must call ov_finish, and start nothing before; from
   any other thread, or a second time, ov_finish does nothing. */
OV_EXPORT int ov_start(OvContext *, const OvOp *ops, int64_t num_ops, const OvStep *step);
OV_EXPORT void ov_finish(OvContext *);

/* The team, for other work than operators (packing). The lock must be held around ov_team_run. */
OvTeam *ov_context_team(OvContext *);
void ov_context_lock(OvContext *);
void ov_context_unlock(OvContext *);

/* Where the next matrix goes; under the lock. */
OvRegion **ov_context_region(OvContext *);

/* cpu_features.c */
unsigned ov_cpu_supports(void);

#endif
