// scratch.h -- memory for kernels. Every request that cannot be met throws std::bad_alloc.
//
//   Scratch          one block, freed by its destructor
//   thread_scratch   a block that the calling thread keeps between calls
//   Arena            one block, cut into arrays
//
// All memory is aligned to 64 bytes and not initialised.
//
// Exceptions in kernels. An exception must not leave code that OpenMP runs in a parallel region, or the program ends.
// at::parallel_for, by which parallel.h starts every kernel of the extension, catches what a thread's part throws. After the
// region it rethrows the first of these exceptions on the calling thread. Three rules follow:
//   - A kernel may throw. It holds memory in the classes below, so nothing leaks.
//   - No file opens a parallel region of its own.
//   - A program that runs kernels on threads of its own (kernel_bits) ends on an exception.
//
// The functions are defined in scratch.cpp: a kernel is compiled once per instruction set and shares no inline code.
// Torch-free.
#pragma once
#include <cstdint>

namespace grpo_engine {

class Scratch {
 public:
  Scratch();
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // At least so many bytes. A larger block replaces the old one, whose contents are lost; after a throw there is none.
  void* reserve(int64_t bytes);
  void* data() const;

 private:
  void* data_;
  int64_t bytes_;
};

// What the blocks of a thread are for. Two that are in use at the same time need two names.
enum class ScratchUse : int { gemm_a, gemm_b, gemm_c, gemm_before, logits_tile };

// Valid until the same thread requests the same use again.
void* thread_scratch_bytes(ScratchUse use, int64_t bytes);

namespace {  // each copy of a kernel has its own

template <typename T>
T* thread_scratch(ScratchUse use, int64_t count) {
  return static_cast<T*>(thread_scratch_bytes(use, count * static_cast<int64_t>(sizeof(T))));
}

// The sizes of all arrays are known before the first is taken.
class Arena {
 public:
  explicit Arena(int64_t bytes) : memory_(bytes), next_(static_cast<char*>(memory_.data())) {}

  template <typename T>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }
  template <typename T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return array;
  }

 private:
  Scratch memory_;
  char* next_;
};

}  // namespace
}  // namespace grpo_engine
