/* One team of threads that works through the phases of a job together. See team.c for how a phase ends. */
#ifndef OCTAVO_TEAM_H
#define OCTAVO_TEAM_H

#include <stdbool.h>

#include "octavo_cpu.h"

#define OV_MAX_THREADS 1024

/* A job is a sequence of phases. `work` does the current one (any number of threads at once); `advance` moves to the
   next and says whether there is one (one thread, while no other works); `enter` and `leave` may be NULL. */
typedef struct OvJob OvJob;
struct OvJob {
    void (*work)(OvJob *, OvWorker *);
    bool (*advance)(OvJob *);
};

typedef struct OvTeam OvTeam;

/* num_threads includes the caller of ov_team_join. thread_enter (or NULL) runs once in each thread made here.
   NULL: no memory, or the system gave no thread. */
OvTeam *ov_team_create(int num_threads, void (*thread_enter)(void));
void ov_team_destroy(OvTeam *);

/* Runs the job to its end. One caller at a time. */
void ov_team_run(OvTeam *, OvJob *);

/* The same in two parts: the other threads begin at once, the caller when it joins them; then it stays to the end. Every
   job that was started must be joined, by the same thread. */
void ov_team_start(OvTeam *, OvJob *);
void ov_team_join(OvTeam *);

/* The workers, the caller's first: run.c gives them scratch between jobs. [num_threads] */
OvWorker *ov_team_worker(OvTeam *, int index);
int ov_team_size(const OvTeam *);

#endif
