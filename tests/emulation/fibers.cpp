// Runs CUDA's threads as fibers of one thread: a warp at a time, as far as it comes, in an order that is chosen.
//
// A launch fails where threads that have to meet do not, where it asks for what the device has not, and where a block
// writes beyond its shared memory, which holds NaN at the start. Under ThreadSanitizer (the kernels compiled with it,
// this file without) each fiber is a thread to it and only barriers order them: it sees every race, whatever the order.
#include "cuda_runtime.h"

#include <ucontext.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_destroy_fiber(void*);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
}

dim3 threadIdx, blockIdx, gridDim;

namespace emulation {
namespace {

constexpr unsigned lanes = 32;
constexpr size_t stack_bytes = 64 << 10, margin = 1024;
constexpr unsigned char poison = 0xff;

enum class At { ready, warp, block, cluster, end };

// Where a fiber, or the scheduler, goes on; switching by the compiler's own jumps takes no system call.
struct Point {
  void* words[5];
};

struct Fiber {
  Point point;
  bool started = false;
  std::unique_ptr<char[]> stack;
  void* sanitized = nullptr;
  unsigned thread, rank;
  At at = At::ready;
  int line = 0, word = 0;
  float value = 0.f, given = 0.f;
};

// What the fibers of a barrier hand to each other, by turns: who left one barrier may come to the next one before
// another has left.
struct Meeting {
  char turns[2];
  unsigned turn = 0;
  void* place() { return &turns[turn % 2]; }
};

struct Cluster {
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<unsigned char[]>> memory;
  std::vector<Meeting> blocks;
  Meeting all;
};

struct Device {
  int major = 9, shared = 232448;
  unsigned order = 0;
  size_t largest = 0;
};

Device device;
std::string failure;
Cluster* cluster;
Fiber* running;
Point scheduler;
void* scheduler_sanitized;
const std::function<void()>* body;
char launched, finished;

void acquire(void* place) {
  if (__tsan_acquire) __tsan_acquire(place);
}
void release(void* place) {
  if (__tsan_release) __tsan_release(place);
}
void switch_to(void* fiber) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber, 1);  // 1: the switch orders nothing
}

void start() {
  acquire(&launched);
  (*body)();
  release(&finished);
  running->at = At::end;
  switch_to(scheduler_sanitized);
  __builtin_longjmp(scheduler.words, 1);
}

__attribute__((noinline)) void pause(At at, int line) {
  running->at = at;
  running->line = line;
  switch_to(scheduler_sanitized);
  if (!__builtin_setjmp(running->point.words)) __builtin_longjmp(scheduler.words, 1);
}

__attribute__((noinline)) void resume(Fiber& fiber, unsigned index, unsigned blocks) {
  running = &fiber;
  threadIdx = dim3(fiber.thread);
  blockIdx = dim3(index * blocks + fiber.rank);
  switch_to(fiber.sanitized);
  if (__builtin_setjmp(scheduler.words)) return;
  if (running->started) __builtin_longjmp(running->point.words, 1);
  running->started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = running->stack.get();
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, start, 0);
  setcontext(&context);
}

bool together(Fiber* first, size_t count, At at) {
  for (size_t k = 0; k < count; ++k)
    if (first[k].at != at || first[k].line != first->line) return false;
  return true;
}

// Lets the warp go on if all of it has come to an exchange.
bool pass_warp(Fiber* warp, size_t count) {
  if (!together(warp, count, At::warp)) return false;
  for (size_t lane = 0; lane < count; ++lane) {
    const size_t from = lane ^ warp[lane].word;
    warp[lane].given = warp[from < count ? from : lane].value;
    warp[lane].at = At::ready;
  }
  return true;
}

bool pass_barrier(Fiber* first, size_t count, At at, Meeting& meeting) {
  if (!together(first, count, at)) return false;
  int any = 0;
  for (size_t k = 0; k < count; ++k) any |= first[k].word;
  for (size_t k = 0; k < count; ++k) first[k].word = any, first[k].at = At::ready;
  ++meeting.turn;
  return true;
}

std::string where(const Fiber& fiber) {
  const char* names[] = {"runs", "is at a warp's exchange", "is at a barrier of the block",
                         "is at a barrier of the cluster", "has ended"};
  return "thread " + std::to_string(fiber.thread) + " of block " + std::to_string(fiber.rank) + " " +
         names[static_cast<int>(fiber.at)] + ", line " + std::to_string(fiber.line);
}

// The cluster's blocks from start to end; false where its threads wait for each other in vain.
bool run(Cluster& mine, unsigned index, unsigned blocks, unsigned threads, size_t shared, std::mt19937& random) {
  cluster = &mine;
  mine.fibers.resize(blocks * threads);
  mine.blocks.resize(blocks);
  for (unsigned rank = 0; rank < blocks; ++rank) {
    mine.memory.emplace_back(new unsigned char[shared + margin]);
    std::memset(mine.memory.back().get(), poison, shared + margin);
  }
  for (unsigned k = 0; k < mine.fibers.size(); ++k) {
    Fiber& fiber = mine.fibers[k];
    fiber.thread = k % threads;
    fiber.rank = k / threads;
    fiber.stack.reset(new char[stack_bytes]);
    if (__tsan_create_fiber) fiber.sanitized = __tsan_create_fiber(0);
  }
  // Warps, and the lanes of each, in the order that is asked for.
  const unsigned warps = static_cast<unsigned>(mine.fibers.size()) / lanes;
  std::vector<unsigned> order(warps), lane_order(lanes);
  std::iota(order.begin(), order.end(), 0u);
  std::iota(lane_order.begin(), lane_order.end(), 0u);
  if (device.order == 1) std::reverse(order.begin(), order.end()), std::reverse(lane_order.begin(), lane_order.end());
  for (bool moved = true; moved;) {
    moved = false;
    if (device.order > 1) {
      std::shuffle(order.begin(), order.end(), random);
      std::shuffle(lane_order.begin(), lane_order.end(), random);
    }
    for (unsigned warp : order) {
      Fiber* first = &mine.fibers[warp * lanes];
      do {
        for (unsigned lane : lane_order)
          if (first[lane].at == At::ready) resume(first[lane], index, blocks), moved = true;
      } while (pass_warp(first, lanes));
    }
    for (unsigned rank = 0; rank < blocks; ++rank)
      moved |= pass_barrier(&mine.fibers[rank * threads], threads, At::block, mine.blocks[rank]);
    moved |= pass_barrier(mine.fibers.data(), mine.fibers.size(), At::cluster, mine.all);
  }
  const Fiber* stuck = nullptr;
  for (const Fiber& fiber : mine.fibers) {
    if (fiber.at != At::end && !stuck) stuck = &fiber;
    if (fiber.sanitized) __tsan_destroy_fiber(fiber.sanitized);
  }
  if (stuck) {
    failure = "threads do not meet: " + where(*stuck);
    for (const Fiber& fiber : mine.fibers)
      if (fiber.at != stuck->at || fiber.line != stuck->line) {
        failure += "; " + where(fiber);
        break;
      }
    return false;
  }
  for (unsigned rank = 0; rank < blocks; ++rank)
    for (size_t k = shared; k < shared + margin; ++k)
      if (mine.memory[rank][k] != poison) return failure = "a block wrote beyond its shared memory", false;
  return true;
}

}  // namespace

int wait_for_block(int line, int predicate) {
  Fiber* self = running;
  Meeting& meeting = cluster->blocks[self->rank];
  void* place = meeting.place();
  self->word = predicate;
  release(place);
  pause(At::block, line);
  acquire(place);
  return self->word;
}

void wait_for_cluster() {
  void* place = cluster->all.place();
  running->word = 0;
  release(place);
  pause(At::cluster, 0);
  acquire(place);
}

float exchange(int line, float value, int distance) {
  Fiber* self = running;
  self->value = value;
  self->word = distance;
  pause(At::warp, line);
  return self->given;
}

unsigned char* shared_memory() { return cluster->memory[running->rank].get(); }

void* address_in(const void* address, unsigned rank) {
  return cluster->memory[rank].get() + (static_cast<const unsigned char*>(address) - shared_memory());
}

size_t& allowed_shared(const void* kernel) {
  static std::map<const void*, size_t> allowed;
  return allowed.try_emplace(kernel, 48 << 10).first->second;
}

cudaError_t launch(const cudaLaunchConfig_t& config, size_t most_shared, int architecture,
                   const std::function<void()>& thread) {
  const unsigned blocks = config.numAttrs ? config.attrs[0].val.clusterDim.x : 1, threads = config.blockDim.x;
  const unsigned grid = config.gridDim.x;
  const auto refused = [&](const char* why) { return failure = why, cudaErrorInvalidValue; };
  if (!grid || !blocks || grid % blocks) return refused("the grid does not divide into clusters");
  if (blocks > 1 && (device.major < 9 || architecture < 900)) return refused("clusters where there are none");
  if (blocks > 8) return refused("a cluster of more than 8 blocks");
  if (!threads || threads > 1024 || threads % lanes) return refused("threads of a block out of range");
  if (config.dynamicSmemBytes > most_shared) return refused("more shared memory than the kernel was allowed");
  if (architecture / 100 > device.major) return refused("no code for this device");
  std::mt19937 random(device.order);
  device.largest = std::max(device.largest, static_cast<size_t>(blocks));
  gridDim = config.gridDim;
  body = &thread;
  if (__tsan_get_current_fiber) scheduler_sanitized = __tsan_get_current_fiber();
  release(&launched);
  // Clusters end together, for the sanitizer must not think that one is done before the next one starts.
  std::vector<Cluster> clusters(grid / blocks);
  bool done = true;
  for (unsigned index = 0; done && index < clusters.size(); ++index)
    done = run(clusters[index], index, blocks, threads, config.dynamicSmemBytes, random);
  acquire(&finished);
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulation

cudaError_t cudaGetDevice(int* index) { return *index = 0, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? emulation::device.major : emulation::device.shared;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : emulation::failure.empty() ? "invalid argument" : emulation::failure.c_str();
}

// Chooses the device and the order in which warps run: 0 upwards, 1 downwards, more: drawn by this seed.
extern "C" void emulate(int major, int shared, unsigned order) {
  emulation::device = {};
  emulation::device.major = major;
  emulation::device.shared = shared;
  emulation::device.order = order;
}

// The largest cluster launched since.
extern "C" long emulated_cluster() { return static_cast<long>(emulation::device.largest); }
