// The part of the OpenMP runtime that the kernels use, on threads that ThreadSanitizer sees begin and end.
#include <thread>
#include <vector>

namespace {
thread_local int number = 0, size = 1;
}

extern "C" {

int omp_get_thread_num() { return number; }

int omp_get_num_threads() { return size; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  const int team = threads > 0 ? static_cast<int>(threads) : 1;
  const auto run = [=](int worker) {
    number = worker;
    size = team;
    body(data);
    number = 0;
    size = 1;
  };
  for (int worker = 1; worker < team; ++worker) others.emplace_back(run, worker);
  run(0);
  for (std::thread& other : others) other.join();
}

}  // extern "C"
