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

int64_t whole_pages(int64_t bytes) {
  const int64_t unit = bytes < huge_page ? page : huge_page;
  return (bytes + unit - 1) / unit * unit;
}

// A sanitizer watches the heap alone.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)

// Mapped, not from the heap, which would keep what was given back: a workspace that grows leaves a hole behind.
void* allocate(int64_t bytes) {
  const int64_t size = whole_pages(bytes), spare = bytes < huge_page ? 0 : huge_page;
  void* const mapped = mmap(nullptr, size + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(mapped);
  const int64_t skipped = spare ? (huge_page - reinterpret_cast<uintptr_t>(begin) % huge_page) % huge_page : 0;
  if (skipped > 0) (void)munmap(begin, skipped);
  if (spare > skipped) (void)munmap(begin + skipped + size, spare - skipped);
  prefer_huge_pages(begin + skipped, size);
  return begin + skipped;
}
void release(void* data, int64_t bytes) {
  if (data) (void)munmap(data, whole_pages(bytes));
}

#else

void* allocate(int64_t bytes) {
  void* const data = std::aligned_alloc(bytes < huge_page ? page : huge_page, whole_pages(bytes));
  if (!data) throw std::bad_alloc();
  return data;
}
void release(void* data, int64_t) { std::free(data); }

#endif

struct Kept {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Kept() { release(data, bytes); }
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

Workspace::Workspace(int64_t bytes) : bytes_(bytes), kept_(bytes <= most_kept) {
  if (!kept_) {
    data_ = allocate(bytes);
    return;
  }
  if (kept.bytes < bytes) {
    release(kept.data, kept.bytes);
    kept = {};
    kept.data = allocate(bytes);
    kept.bytes = bytes;
  }
  data_ = kept.data;
}

Workspace::~Workspace() {
  if (!kept_) release(data_, bytes_);
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
  for (const Block& block : leaving) release(block.data, block.bytes);
}

void release_results() {
  Results& all = results();
  std::vector<Block> leaving;
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    leaving.swap(all.blocks);
    all.bytes = 0;
  }
  for (const Block& block : leaving) release(block.data, block.bytes);
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
