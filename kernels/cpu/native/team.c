/* A team of threads, made for machines whose cores are shared with other processes: nobody ever waits for a thread
 * that the system has not scheduled, unless that thread holds an unfinished item.
 *
 * A phase is open until its items are done. A thread enters it, takes items until none is left, and leaves. All items
 * are taken once any thread leaves, so the phase is done when, after that, nobody is inside: the last to leave closes
 * it, moves the job on and opens the next phase. A thread that comes late finds a later phase and joins that one.
 *
 * All of it is one word:   bits 0-11 threads inside | bit 12 closed | bit 13 idle, no job | bits 14-31 phase number
 *
 * The number only tells a thread that has left a phase from one that follows; that it wraps does no harm.
 *
 * After a fork the child has no threads but the caller's, and everything still works, on that one alone: there is
 * nothing to wait for. Only a fork in the middle of a run, another thread's or one that was not joined yet, leaves a team
 * that must not be used. */
#define _GNU_SOURCE
#include "team.h"

#include <immintrin.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define INSIDE 0xfffu
#define CLOSED 0x1000u
#define IDLE 0x2000u
#define PHASE_UNIT 0x4000u
#define PHASE_MASK (~(PHASE_UNIT - 1))

/* A thread without work first waits with `pause` (about 50 us on Intel, a third of that on AMD), then offers its core
 * to whoever is ready to run in this system, and only after this many nanoseconds sleeps. In a virtual machine with
 * busy neighbours sleeping after 50 us instead made steps take 1.03 to 1.07 times as long, and against threads that never
 * slept 1.3 to 1.5 times while much time was stolen: presumably a virtual core that sleeps is given away. */
#define SPINS 1100
#define PATIENCE 20000000

struct OvTeam {
    _Alignas(64) _Atomic uint32_t state;
    _Atomic uint32_t sleepers;
    OvJob *job;
    _Alignas(64) _Atomic int64_t next;
    _Alignas(64) _Atomic bool stop;
    uint32_t left; /* the phase before the first of the job, for the caller */
    int size, num_started;
    pid_t pid; /* whose threads they are */
    void (*thread_enter)(void);
    pthread_t *threads;
    struct Member {
        OvWorker worker;
        OvTeam *team;
    } *members;
};

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void publish(OvTeam *team, uint32_t state) {
    atomic_store(&team->state, state);
    if (atomic_load(&team->sleepers) != 0) syscall(SYS_futex, &team->state, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* Whether a thread that left phase `left` has something to see in `state`. The caller wants to know of the end too. */
static bool concerns(uint32_t state, uint32_t left, bool caller) {
    if (state & IDLE) return caller;
    return !(state & CLOSED) && (state & PHASE_MASK) != left;
}

static bool over(OvTeam *team, uint32_t left, bool caller, uint32_t *state) {
    *state = atomic_load_explicit(&team->state, memory_order_acquire);
    return concerns(*state, left, caller) || atomic_load_explicit(&team->stop, memory_order_relaxed);
}

static uint32_t wait_for_phase(OvTeam *team, uint32_t left, bool caller) {
    for (;;) {
        uint32_t state;
        for (int spin = 0; spin < SPINS; spin++) {
            if (over(team, left, caller, &state)) return state;
            _mm_pause();
        }
        for (const int64_t end = now() + PATIENCE; now() < end; sched_yield())
            if (over(team, left, caller, &state)) return state;
        atomic_fetch_add(&team->sleepers, 1);
        state = atomic_load(&team->state);
        if (!concerns(state, left, caller) && !atomic_load(&team->stop)) sleep_while(&team->state, state);
        atomic_fetch_sub(&team->sleepers, 1);
    }
}

/* Works in the phase of `state` if it is still open. */
static bool enter(OvTeam *team, uint32_t state) {
    return atomic_compare_exchange_strong_explicit(
        &team->state, &state, state + 1, memory_order_acquire, memory_order_relaxed);
}

static void leave(OvTeam *team) {
    uint32_t state = atomic_load_explicit(&team->state, memory_order_relaxed);
    for (;;) {
        bool last = (state & INSIDE) == 1;
        uint32_t after = last ? ((state - 1) | CLOSED) : state - 1;
        if (!atomic_compare_exchange_weak_explicit(
                &team->state, &state, after, memory_order_acq_rel, memory_order_relaxed))
            continue;
        if (!last) return;
        uint32_t number = (state & PHASE_MASK) + PHASE_UNIT;
        bool more = team->job->advance(team->job);
        atomic_store_explicit(&team->next, 0, memory_order_relaxed);
        publish(team, more ? number : number | CLOSED | IDLE);
        return;
    }
}

static void *member_main(void *argument) {
    struct Member *member = argument;
    OvTeam *team = member->team;
    uint32_t left = PHASE_MASK; /* PHASE_MASK itself may be a phase's number: then this one is missed, no more */
    if (team->thread_enter != NULL) team->thread_enter();
    for (;;) {
        uint32_t state = wait_for_phase(team, left, false);
        if (atomic_load(&team->stop)) return NULL;
        if (!enter(team, state)) continue;
        team->job->work(team->job, &member->worker);
        left = state & PHASE_MASK;
        leave(team);
    }
}

static void run_alone(OvTeam *team) {
    do {
        atomic_store_explicit(&team->next, 0, memory_order_relaxed);
        team->job->work(team->job, &team->members[0].worker);
    } while (team->job->advance(team->job));
}

void ov_team_start(OvTeam *team, OvJob *job) {
    team->job = job;
    if (team->size == 1) return; /* the caller alone will do it all */
    team->left = atomic_load_explicit(&team->state, memory_order_acquire) & PHASE_MASK;
    atomic_store_explicit(&team->next, 0, memory_order_relaxed);
    publish(team, team->left + PHASE_UNIT);
}

void ov_team_join(OvTeam *team) {
    if (team->size == 1) {
        run_alone(team);
        return;
    }
    for (uint32_t left = team->left;;) {
        uint32_t state = wait_for_phase(team, left, true);
        if (state & IDLE) return;
        if (!enter(team, state)) continue;
        team->job->work(team->job, &team->members[0].worker);
        left = state & PHASE_MASK;
        leave(team);
    }
}

void ov_team_run(OvTeam *team, OvJob *job) {
    ov_team_start(team, job);
    ov_team_join(team);
}

OvWorker *ov_team_worker(OvTeam *team, int index) { return &team->members[index].worker; }

int ov_team_size(const OvTeam *team) { return team->size; }

OvTeam *ov_team_create(int num_threads, void (*thread_enter)(void)) {
    OvTeam *team = aligned_alloc(64, sizeof *team);
    if (team == NULL) return NULL;
    memset(team, 0, sizeof *team);
    atomic_store(&team->state, CLOSED | IDLE);
    team->size = num_threads;
    team->pid = getpid();
    team->thread_enter = thread_enter;
    team->threads = calloc((size_t)num_threads, sizeof *team->threads);
    team->members = calloc((size_t)num_threads, sizeof *team->members);
    bool failed = team->threads == NULL || team->members == NULL;
    for (int i = 0; i < num_threads && !failed; i++) {
        struct Member *member = &team->members[i];
        member->team = team;
        member->worker.index = i;
        member->worker.count = num_threads;
        member->worker.next = &team->next;
        if (i == 0) continue; /* the caller itself */
        failed = pthread_create(&team->threads[team->num_started], NULL, member_main, member) != 0;
        if (!failed) team->num_started++;
    }
    if (!failed) return team;
    ov_team_destroy(team);
    return NULL;
}

void ov_team_destroy(OvTeam *team) {
    if (team->pid == getpid()) { /* a child of fork has no such threads to join */
        atomic_store(&team->stop, true);
        publish(team, atomic_load(&team->state) + PHASE_UNIT);
        for (int i = 0; i < team->num_started; i++) pthread_join(team->threads[i], NULL);
    }
    free(team->threads);
    free(team->members);
    free(team);
}
