// rope -- rotary position embedding, the rotate_half form of the Hugging Face models, and its inverse.
//
//   f_i = 1 / theta^(2i/E)      a = position[t] * f_i      0 <= i < E/2, or f_i as given
//   y[t,h,i]       = x[t,h,i]       cos a - x[t,h,i + E/2] sin a
//   y[t,h,i + E/2] = x[t,h,i + E/2] cos a + x[t,h,i]       sin a
//
// f_i and a are rounded to float32, because published weights were trained with that rotation. cos and sin of that angle
// are taken in float64 and rounded once, so they hold at any position. Positions above 2^24 are themselves rounded to
// float32. For bfloat16 the arithmetic is float32. The gradient is the rotation by -a. A row depends on its own x and
// position alone. On CUDA a position below 0 makes its row NaN. Su et al. 2021, arXiv:2104.09864.
//
//   x [T, H, E]  rows contiguous, any stride over T; E even     y [T, H, E]  contiguous
//   position [T] int64, >= 0     frequency [E/2] float32: f_i of models that scale them, or none
#pragma once
#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/dtype.h"

namespace grpo_engine {

struct RopeArgs {
  DType dtype;
  int64_t T, H, E;
  int64_t x_stride;         // elements from x[t] to x[t+1]
  int64_t y_stride;         // likewise; y may be x itself
  bool inverse;             // rotate by -a
  const void* x;            // [T, H, E]
  void* y;                  // [T, H, E]
  double theta;             // CUDA only, which has no table; as the next
  const float* frequency;   // [E/2], or null: of theta
  const float* table;       // [rows, E]: cos of E/2 angles, then sin; CPU only, as first_position
  const int64_t* position;  // [T]; token t uses row position[t] - first_position
  int64_t first_position;   // position of row 0; -1: token t uses row t
};

GE_CPU_KERNEL(rope, RopeArgs)  // items: tokens

void rope_cuda(const RopeArgs&, CudaStream);

}  // namespace grpo_engine
