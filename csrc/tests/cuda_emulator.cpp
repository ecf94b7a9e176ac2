#include "tests/cuda_emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#ifndef __x86_64__
#error "the CUDA emulator changes over between fibers in x86-64 assembly"
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

// Keeps the registers that a call must keep, and continues on the other stack. A system call for each change
// (swapcontext makes one) would be most of a kernel's time.
extern "C" void ge_fiber_switch(void** save, void* load);
asm(R"(
.text
.type ge_fiber_switch, @function
ge_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ge_fiber_switch, .-ge_fiber_switch
)");

namespace cuda_emulator {
namespace {

constexpr std::size_t kStack = 256 * 1024;  // touched pages only are there
constexpr unsigned kWarp = 32;

enum class State { fresh, ready, in_collective, at_barrier, done };

struct Thread {
  State state;
  char* stack;
  void* top;  // of the stack, while another thread runs
  // of the collective that it waits in
  const char* collective;
  unsigned mask;
  void* payload;
  Finish finish;
};

std::mutex one_launch;
const char* kernel;
void (*body)(void*);
void* body_context;
std::vector<Thread> threads;
unsigned current;
unsigned at_barrier;  // threads
unsigned launches;    // so far
void* scheduler_top;
std::vector<char*> free_stacks;
std::vector<char> shared;
std::string failure;

std::string place(unsigned thread) {
  std::string text = "thread " + std::to_string(thread) + " of block " + std::to_string(blockIdx.x);
  if (gridDim.y > 1) text.append(",").append(std::to_string(blockIdx.y));
  return text;
}

void leave() { ge_fiber_switch(&threads[current].top, scheduler_top); }

// The block ends here: its other fibers are dropped.
[[noreturn]] void fail(const std::string& what) {
  failure = std::string("CUDA emulator: ") + kernel + ", " + place(current) + ": " + what;
  leave();
  std::abort();  // nobody comes back to a failed fiber
}

void fiber() {
  body(body_context);
  threads[current].state = State::done;
  leave();
}

char* new_stack() {
  if (!free_stacks.empty()) {
    char* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

void resume(unsigned i) {
  Thread& t = threads[i];
  if (t.state == State::fresh) {
    t.stack = new_stack();
    // as ge_fiber_switch leaves it: six registers, where to go on, and the place of fiber's return address
    void** top = reinterpret_cast<void**>(t.stack + kStack) - 8;
    for (int k = 0; k < 8; ++k) top[k] = nullptr;
    top[6] = reinterpret_cast<void*>(&fiber);
    t.top = top;
  }
  t.state = State::ready;
  current = i;
  threadIdx.x = i;  // blocks have one dimension
  ge_fiber_switch(&scheduler_top, t.top);
  if (t.state == State::done) {
    free_stacks.push_back(t.stack);
    t.stack = nullptr;
  }
}

std::string lanes_of(unsigned mask) {
  std::string text;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) text += (text.empty() ? "" : ", ") + std::to_string(lane);
  }
  return text;
}

// Nobody can go on: says who waits for whom.
std::string deadlock() {
  for (unsigned i = 0; i < threads.size(); ++i) {
    const Thread& t = threads[i];
    if (t.state != State::in_collective) continue;
    unsigned missing = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const Thread& other = threads[i / kWarp * kWarp + lane];
      if ((t.mask >> lane & 1) && other.state != State::in_collective) missing |= 1u << lane;
    }
    return place(i) + " waits in " + t.collective + " for lanes " + lanes_of(missing) + " that never come";
  }
  return "__syncthreads() is reached by " + std::to_string(at_barrier) + " of " + std::to_string(threads.size()) +
         " threads of block " + std::to_string(blockIdx.x);
}

// Runs the threads of a warp until each is done or at a barrier; false where none could go on.
bool run_warp(unsigned first, bool backwards) {
  bool moved = false;
  for (bool progress = true; progress;) {
    progress = false;
    for (unsigned k = 0; k < kWarp; ++k) {
      const unsigned i = first + (backwards ? kWarp - 1 - k : k);
      if (threads[i].state != State::fresh && threads[i].state != State::ready) continue;
      resume(i);
      progress = moved = true;
      if (!failure.empty()) return true;
    }
  }
  return moved;
}

void run_block() {
  const auto size = static_cast<unsigned>(threads.size());
  const bool backwards = (launches + blockIdx.x) % 2 == 1;
  memset(shared.data(), 0xFF, shared.size());
  for (Thread& t : threads) t = Thread{};
  at_barrier = 0;
  for (;;) {
    bool progress = false;
    for (unsigned first = 0; first < size; first += kWarp) {
      progress |= run_warp(backwards ? size - kWarp - first : first, backwards);
      if (!failure.empty()) return;
    }
    if (std::all_of(threads.begin(), threads.end(), [](const Thread& t) { return t.state == State::done; })) return;
    if (at_barrier == size) {
      for (Thread& t : threads) t.state = State::ready;
      at_barrier = 0;
    } else if (!progress) {
      failure = std::string("CUDA emulator: ") + kernel + ": " + deadlock();
      return;
    }
  }
}

}  // namespace

void launch(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes, void (*thread)(void*), void* context) {
  constexpr std::size_t kMostShared = 227 * 1024;
  const std::lock_guard lock(one_launch);
  if (block.x == 0 || block.x > 1024 || block.x % kWarp != 0 || block.y != 1 || block.z != 1) {
    throw std::runtime_error(std::string("CUDA emulator: ") + name + ": a block of " + std::to_string(block.x) +
                             " threads; it must be a multiple of 32 up to 1024");
  }
  if (shared_bytes > kMostShared) {
    throw std::runtime_error(std::string("CUDA emulator: ") + name + ": " + std::to_string(shared_bytes) +
                             " bytes of shared memory");
  }
  kernel = name;
  body = thread;
  body_context = context;
  blockDim = block;
  gridDim = grid;
  threads.assign(block.x, {});
  shared.assign(shared_bytes + 1024, 0);
  failure.clear();
  ++launches;
  for (uint64_t left = uint64_t{1} * grid.x * grid.y * grid.z; left > 0; --left) {
    const uint64_t index = left - 1;
    blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                static_cast<unsigned>(index / grid.x / grid.y)};
    run_block();
    if (failure.empty()) continue;
    for (Thread& t : threads) {
      if (t.stack) munmap(t.stack, kStack);  // not to be used again: its frames were never left
    }
    throw std::runtime_error(failure);
  }
}

void* dynamic_shared() {
  const auto address = reinterpret_cast<std::uintptr_t>(shared.data());
  return reinterpret_cast<void*>((address + 1023) / 1024 * 1024);
}

void require_aligned(const void* p, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(p) % bytes != 0)
    fail("an access of " + std::to_string(bytes) + " bytes is not aligned");
}

void block_barrier() {
  threads[current].state = State::at_barrier;
  ++at_barrier;
  leave();
}

void warp_collective(const char* name, unsigned mask, void* payload, Finish finish) {
  const unsigned lane = current % kWarp;
  Thread* warp = &threads[current - lane];
  if (!(mask >> lane & 1)) fail(std::string(name) + " is called by a lane outside its mask");
  warp[lane].collective = name;
  warp[lane].mask = mask;
  warp[lane].payload = payload;
  warp[lane].finish = finish;
  warp[lane].state = State::in_collective;
  void* payloads[kWarp] = {};
  bool complete = true;
  for (unsigned other = 0; other < kWarp; ++other) {
    if (!(mask >> other & 1)) continue;
    const Thread& t = warp[other];
    const bool waits = t.state == State::in_collective, same = waits && t.finish == finish && t.mask == mask;
    if (waits && !same && (t.mask >> lane & 1)) {  // it waits for this lane, which is elsewhere
      fail(std::string(name) + " meets lane " + std::to_string(other) + " in " + t.collective +
           (t.mask != mask ? " with another mask" : ""));
    }
    complete = complete && same;
    payloads[other] = t.payload;
  }
  if (!complete) return leave();
  finish(payloads, mask);
  for (unsigned other = 0; other < kWarp; ++other) {
    if (mask >> other & 1) warp[other].state = State::ready;
  }
}

}  // namespace cuda_emulator
