// Threads for kernels. The number of threads always comes from the caller, who asks torch for it.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
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

}  // namespace objslot
