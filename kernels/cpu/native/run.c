/* Contexts, and lists of operators run as jobs of a team. */
#include "run.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* setup.py leaves out what the compiler cannot make. */
#ifdef OV_HAVE_AVX2
extern const OvKernels ov_kernels_avx2;
#endif
#ifdef OV_HAVE_AVXVNNI
extern const OvKernels ov_kernels_avxvnni;
#endif
#ifdef OV_HAVE_AVX512
extern const OvKernels ov_kernels_avx512;
#endif
#ifdef OV_HAVE_AMX
extern const OvKernels ov_kernels_amx;
#endif

enum { OV_NUM_ISAS = 4 };

static const OvKernels *const KNOWN[] = {
#ifdef OV_HAVE_AVX2
    [0] = &ov_kernels_avx2,
#endif
#ifdef OV_HAVE_AVXVNNI
    [1] = &ov_kernels_avxvnni,
#endif
#ifdef OV_HAVE_AVX512
    [2] = &ov_kernels_avx512,
#endif
#ifdef OV_HAVE_AMX
    [3] = &ov_kernels_amx,
#endif
    [OV_NUM_ISAS] = NULL,
};

/* A list of operators as phases, the skipped ones left out. */
typedef struct {
    OvJob job;
    const OvContext *context;
    const OvOp *ops;
    int64_t num_ops;
    const OvStep *step;
    int64_t op;
    int phase;
    unsigned skipped; /* of the operator `op` */
} RunJob;

struct OvContext {
    const OvKernels *kernels;
    OvType type;
    OvTeam *team;
    OvRegion *region; /* for matrices */
    pthread_mutex_t lock; /* held while a list runs */
    RunJob run;
    bool runs; /* the team has something to do */
    _Atomic uintptr_t starter; /* the thread between ov_start and ov_finish, 0 if there is none */
    size_t scratch_bytes, shared_bytes;
    void *memory; /* of all threads' scratch, then what they share */
};

unsigned ov_supported(void) {
    unsigned compiled = 0;
    for (int i = 0; i < OV_NUM_ISAS; i++) compiled |= (unsigned)(KNOWN[i] != NULL) << i;
    return compiled & ov_cpu_supports();
}

static const OvKernels *find_kernels(const char *isa) {
    unsigned supported = ov_supported();
    for (int i = OV_NUM_ISAS - 1; i >= 0; i--) {
        bool wanted = isa == NULL || isa[0] == 0 || (KNOWN[i] != NULL && strcmp(isa, KNOWN[i]->name) == 0);
        if (wanted && (supported >> i & 1)) return KNOWN[i];
    }
    return NULL;
}

static OvPlan plan_of(const OvContext *context, const OvOp *op, const OvStep *step) {
    OvPlan plan = {0};
    OvPlanner planner = context->kernels->plans[op->kind];
    if (planner != NULL) planner(op, step, context->type, ov_team_size(context->team), &plan);
    return plan;
}

/* Moves to the first phase at or after (op, phase) that has something to do. */
static bool settle(RunJob *run) {
    for (; run->op < run->num_ops; run->op++, run->phase = 0) {
        const OvOp *op = &run->ops[run->op];
        if (run->phase == 0) run->skipped = plan_of(run->context, op, run->step).skipped;
        const OvPhase *phases = run->context->kernels->phases[op->kind];
        for (; run->phase < OV_MAX_PHASES && phases[run->phase] != NULL; run->phase++)
            if (!(run->skipped >> run->phase & 1)) return true;
    }
    return false;
}

static bool advance(OvJob *job) {
    RunJob *run = (RunJob *)job;
    run->phase++;
    return settle(run);
}

static const OvOp *product_after(const RunJob *run) {
    for (int64_t i = run->op + 1; i < run->num_ops; i++)
        if (run->ops[i].kind == OV_LINEAR) return &run->ops[i];
    return NULL;
}

static void work(OvJob *job, OvWorker *worker) {
    RunJob *run = (RunJob *)job;
    const OvOp *op = &run->ops[run->op];
    if (op->kind == OV_LINEAR) worker->ahead = product_after(run);
    run->context->kernels->phases[op->kind][run->phase](op, run->step, worker);
}

static size_t rounded(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

/* Gives every thread its scratch; called while no job runs. Nothing is kept of what was in it. */
static int reserve(OvContext *context, size_t scratch_bytes, size_t shared_bytes) {
    if (scratch_bytes <= context->scratch_bytes && shared_bytes <= context->shared_bytes) return OV_OK;
    if (scratch_bytes < context->scratch_bytes) scratch_bytes = context->scratch_bytes;
    if (shared_bytes < context->shared_bytes) shared_bytes = context->shared_bytes;
    scratch_bytes = rounded(scratch_bytes);
    shared_bytes = rounded(shared_bytes);
    size_t count = (size_t)ov_team_size(context->team);
    char *memory = aligned_alloc(4096, count * scratch_bytes + shared_bytes);
    if (memory == NULL) return OV_NO_MEMORY;
    free(context->memory);
    context->memory = memory;
    context->scratch_bytes = scratch_bytes;
    context->shared_bytes = shared_bytes;
    for (size_t i = 0; i < count; i++) {
        OvWorker *worker = ov_team_worker(context->team, (int)i);
        worker->scratch = memory + i * scratch_bytes;
        worker->scratch_bytes = scratch_bytes;
        worker->shared = memory + count * scratch_bytes;
        worker->type = context->type;
    }
    return OV_OK;
}

/* Checks the list and makes room for the largest of its operators. */
static int prepare(OvContext *context, const OvOp *ops, int64_t num_ops, const OvStep *step) {
    size_t scratch_bytes = context->scratch_bytes, shared_bytes = context->shared_bytes;
    for (int64_t i = 0; i < num_ops; i++) {
        if (ops[i].kind < 0 || ops[i].kind >= OV_NUM_KINDS) return OV_UNKNOWN_OPERATOR;
        if (context->kernels->phases[ops[i].kind][0] == NULL) return OV_UNKNOWN_OPERATOR;
        OvPlan plan = plan_of(context, &ops[i], step);
        if (plan.scratch_bytes > scratch_bytes) scratch_bytes = plan.scratch_bytes;
        if (plan.shared_bytes > shared_bytes) shared_bytes = plan.shared_bytes;
    }
    return reserve(context, scratch_bytes, shared_bytes);
}

int ov_start(OvContext *context, const OvOp *ops, int64_t num_ops, const OvStep *step) {
    pthread_mutex_lock(&context->lock);
    int status = prepare(context, ops, num_ops, step);
    if (status != OV_OK) {
        pthread_mutex_unlock(&context->lock);
        return status;
    }
    context->run = (RunJob){{work, advance}, context, ops, num_ops, step, 0, 0, 0};
    context->runs = settle(&context->run);
    atomic_store(&context->starter, (uintptr_t)pthread_self());
    if (context->runs) ov_team_start(context->team, &context->run.job);
    return OV_OK;
}

void ov_finish(OvContext *context) {
    if (atomic_load(&context->starter) != (uintptr_t)pthread_self()) return;
    if (context->runs) {
        if (context->kernels->thread_enter != NULL) context->kernels->thread_enter();
        ov_team_join(context->team);
        if (context->kernels->thread_leave != NULL) context->kernels->thread_leave();
    }
    atomic_store(&context->starter, 0);
    pthread_mutex_unlock(&context->lock);
}

int ov_run(OvContext *context, const OvOp *ops, int64_t num_ops, const OvStep *step) {
    int status = ov_start(context, ops, num_ops, step);
    if (status == OV_OK) ov_finish(context);
    return status;
}

int ov_create(const char *isa, int num_threads, int type, OvContext **out) {
    *out = NULL;
    if (num_threads < 1 || num_threads > OV_MAX_THREADS || (type != OV_F32 && type != OV_BF16)) return OV_BAD_ARGUMENT;
    const OvKernels *kernels = find_kernels(isa);
    if (kernels == NULL) return OV_UNSUPPORTED_ISA;
    OvContext *context = calloc(1, sizeof *context);
    if (context == NULL) return OV_NO_MEMORY;
    context->kernels = kernels;
    context->type = (OvType)type;
    pthread_mutex_init(&context->lock, NULL);
    context->team = ov_team_create(num_threads, kernels->thread_enter);
    if (context->team == NULL || reserve(context, kernels->scratch_bytes + 64, 64) != OV_OK) {
        ov_destroy(context);
        return OV_NO_MEMORY;
    }
    *out = context;
    return OV_OK;
}

void ov_destroy(OvContext *context) {
    if (context == NULL) return;
    if (context->team != NULL) ov_team_destroy(context->team);
    pthread_mutex_destroy(&context->lock);
    ov_region_release(context->region);
    free(context->memory);
    free(context);
}

void ov_info(const OvContext *context, OvInfo *out) {
    out->isa = context->kernels->name;
    out->num_threads = ov_team_size(context->team);
    out->type = context->type;
    out->scratch_bytes =
        (int64_t)((size_t)out->num_threads * context->scratch_bytes + context->shared_bytes);
}

OvTeam *ov_context_team(OvContext *context) { return context->team; }
OvRegion **ov_context_region(OvContext *context) { return &context->region; }
void ov_context_lock(OvContext *context) { pthread_mutex_lock(&context->lock); }
void ov_context_unlock(OvContext *context) { pthread_mutex_unlock(&context->lock); }
