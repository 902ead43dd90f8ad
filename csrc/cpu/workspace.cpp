#include "objslot/workspace.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __unix__
#include <pthread.h>
#endif

namespace objslot {

namespace {

constexpr int64_t page = 4096;
constexpr int64_t huge_page = int64_t{2} << 20;
constexpr int64_t most_kept = int64_t{64} << 20;

void* allocate(int64_t bytes) {
  const int64_t unit = bytes < huge_page ? page : huge_page;
  const int64_t size = (bytes + unit - 1) / unit * unit;
  void* data = std::aligned_alloc(unit, size);
  if (!data) throw std::bad_alloc();
  prefer_huge_pages(data, size);
  return data;
}

struct Kept {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Kept() { std::free(data); }
};
thread_local Kept kept;

// The results given back, the latest last.
struct Block {
  void* data;
  int64_t bytes;
};
struct Results {
  std::mutex mutex;
  std::vector<Block> blocks;
  int64_t bytes = 0;
};
constexpr int64_t most_results = int64_t{128} << 20;

Results& results();
void lock_results() { results().mutex.lock(); }
void unlock_results() { results().mutex.unlock(); }

// Never destroyed: tensors may outlive every static object.
Results& results() {
  static Results* const all = [] {
#ifdef __unix__
    // Tensors are freed by threads of all kinds: a process forked amid that would wait for this lock for ever.
    pthread_atfork(lock_results, unlock_results, unlock_results);
#endif
    return new Results;
  }();
  return *all;
}

}  // namespace

Workspace::Workspace(int64_t bytes) : kept_(bytes <= most_kept) {
  if (!kept_) {
    data_ = allocate(bytes);
    return;
  }
  if (kept.bytes < bytes) {
    std::free(kept.data);
    kept = {};
    kept.data = allocate(bytes);
    kept.bytes = bytes;
  }
  data_ = kept.data;
}

Workspace::~Workspace() {
  if (!kept_) std::free(data_);
}

void* take_result(int64_t bytes) {
  Results& all = results();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    for (auto block = all.blocks.rbegin(); block != all.blocks.rend(); ++block) {
      if (block->bytes != bytes) continue;
      void* const data = block->data;
      all.blocks.erase(std::next(block).base());
      all.bytes -= bytes;
      return data;
    }
  }
  return allocate(bytes);
}

void give_result(void* data, int64_t bytes) {
  Results& all = results();
  std::vector<Block> leaving;
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.blocks.push_back({data, bytes});
    all.bytes += bytes;
    while (all.bytes > most_results) {
      leaving.push_back(all.blocks.front());
      all.bytes -= all.blocks.front().bytes;
      all.blocks.erase(all.blocks.begin());
    }
  }
  for (const Block& block : leaving) std::free(block.data);
}

void release_results() {
  Results& all = results();
  std::vector<Block> leaving;
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    leaving.swap(all.blocks);
    all.bytes = 0;
  }
  for (const Block& block : leaving) std::free(block.data);
}

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  // A refusal only costs time.
  if (begin < end && bytes >= huge_page) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace objslot
