// Memory to work in, and hints about memory.
#pragma once

#include <cstdint>

namespace objslot {

// Memory aligned to a page, kept by the calling thread from call to call unless it is very large: a fresh
// page costs ten times what writing it does. At most one object a thread at a time.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  int64_t bytes_;
  bool kept_;
};

// Asks for huge pages behind a large output that is about to be written for the first time; they cost a
// fifth.
void prefer_huge_pages(void* data, int64_t bytes);

// Memory of a large result, aligned to a page, from the results that were given back or else from the system:
// the pages of a fresh one take as long to come as the kernels to run. A few of the latest are kept; any thread
// may call both.
void* take_result(int64_t bytes);
void give_result(void* data, int64_t bytes);
// Hands the kept memory of results back to the system.
void release_results();

}  // namespace objslot
