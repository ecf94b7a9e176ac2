// kv_write -- stores the keys and values of new tokens in the paged cache, in place.
//
//   key_pages  [page of slot[t], k, :, offset of slot[t]] = key[t,k,:]
//   value_pages[page of slot[t], k, offset of slot[t], :] = value[t,k,:]
//
// slot[t] = page index * page size + offset. -1 skips the token: padding, or a shared prompt that is in the cache already.
// Of two tokens with one slot the later wins. All slots are checked before the first write. On CUDA a slot outside the cache
// is skipped. Bits are copied unchanged, NaN included.
//
//   key, value [T, K, E]  rows contiguous, any stride over T         slot [T] int64
//   key_pages [num_pages, K, E, page]   value_pages [num_pages, K, page, E]   dtype of key
#pragma once
#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/dtype.h"
#include "ops/kv_pages.cuh"

namespace grpo_engine {

struct KvWriteArgs {
  DType dtype;
  int64_t T, num_pages;
  KvPageShape shape;
  int64_t key_stride, value_stride;  // elements from token to token
  const void* key;  // [T, K, E]
  const void* value;  // [T, K, E]
  const int64_t* slot;  // [T]
  void* key_pages;  // [num_pages, K, E, page]
  void* value_pages;  // [num_pages, K, page, E]
};

GE_CPU_KERNEL(kv_write, KvWriteArgs)  // items: kv heads, so that a slot has one writer

void kv_write_cuda(const KvWriteArgs&, CudaStream);

}  // namespace grpo_engine
