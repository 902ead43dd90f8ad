// Threads for kernels. The number of threads always comes from the caller, who asks torch for it.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __unix__
#include <sched.h>
#endif

namespace objslot {

// Calls body(begin, end, worker) on contiguous shares of [0, count), one for each of at most `threads` workers.
// The shares depend on count and threads alone. One thread means no OpenMP region, which would hang in a
// forked child. The body must not throw.
template <class Body>
static inline void parallel_for(int64_t count, int threads, const Body& body) {
  const int64_t workers = threads < count ? threads : count;
#ifdef _OPENMP
  if (workers > 1) {
#pragma omp parallel num_threads(static_cast<int>(workers))
    {
      // The runtime may grant fewer threads than asked for: each takes every share that is then its own.
      for (int64_t worker = omp_get_thread_num(); worker < workers; worker += omp_get_num_threads())
        body(count * worker / workers, count * (worker + 1) / workers, static_cast<int>(worker));
    }
    return;
  }
#endif
  for (int64_t worker = 0; worker < workers; ++worker)
    body(count * worker / workers, count * (worker + 1) / workers, static_cast<int>(worker));
}

// Where the threads of a team meet.
struct Meeting {
  alignas(64) int arrived = 0;
  alignas(64) int round = 0;
};

// One of the `size` threads that work on the same problem.
struct Team {
  int worker = 0, size = 1;
  Meeting* meeting = nullptr;

  // Returns when every thread of the team has called it, and their writes are seen. Waits awake, for the sweeps
  // in between take microseconds, but yields to a thread that has no processor.
  __attribute__((always_inline)) inline void wait() const {
    if (size == 1) return;
    const int round = __atomic_load_n(&meeting->round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&meeting->round, round + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int turn = 0; __atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE) == round; ++turn) {
#ifdef __SSE2__
      __builtin_ia32_pause();
#endif
#ifdef __unix__
      if (turn > 2000) sched_yield();
#endif
    }
  }

  // This thread's share of [0, count).
  __attribute__((always_inline)) inline int64_t begin(int64_t count) const { return count * worker / size; }
  __attribute__((always_inline)) inline int64_t end(int64_t count) const { return count * (worker + 1) / size; }
};

// Calls body(team) on at most `threads` threads at once. One thread means no OpenMP region. The body must not
// throw.
template <class Body>
static inline void run_team(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
    Meeting meeting;
#pragma omp parallel num_threads(threads)
    body(Team{omp_get_thread_num(), omp_get_num_threads(), &meeting});
    return;
  }
#endif
  body(Team{});
}

}  // namespace objslot
