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
  bool kept_;
};

// Asks for huge pages behind a large output that is about to be written for the first time; they cost a
// fifth.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace objslot
