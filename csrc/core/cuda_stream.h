// cuda_stream.h -- the type of a CUDA stream, without the CUDA headers. So an op's contract can declare its launchers where
// there is no CUDA.
#pragma once

struct CUstream_st;

namespace grpo_engine {

using CudaStream = CUstream_st*;  // cudaStream_t

}  // namespace grpo_engine
