// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_clusterkv project
//
// What every launcher needs: the tensor's device and stream, dispatch on the KV
// cache's dtype, launches with checks that name the op. Host code only.
//
// A .cuh (device code, no torch headers) comes first in a .cu, then this file. For
// a tensor `kv_cache`:
//
//   const LaunchContext context("index_pages", kv_cache);
//   CLUSTERKV_DISPATCH_CUDA_DTYPE(kv_cache.scalar_type(), "index_pages",
//     context.launch_pdl(my_kernel<scalar_t>, grid, block, smem_bytes, params));
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "../params.h"

// Runs the statements with `scalar_t` bound to the CUDA type of the KV cache's
// elements. CUDA kernels take 16-bit caches; fp32 is for CPUs.
#define CLUSTERKV_DISPATCH_CUDA_DTYPE(DTYPE, OP, ...)                                         \
  do {                                                                                        \
    const torch::headeronly::ScalarType dispatch_dtype = (DTYPE);                             \
    if (dispatch_dtype == torch::headeronly::ScalarType::BFloat16) {                          \
      using scalar_t = __nv_bfloat16;                                                         \
      __VA_ARGS__;                                                                            \
    } else if (dispatch_dtype == torch::headeronly::ScalarType::Half) {                       \
      using scalar_t = __half;                                                                \
      __VA_ARGS__;                                                                            \
    } else {                                                                                  \
      STD_TORCH_CHECK(false, OP, ": kv_cache must have dtype BFloat16 or Half on CUDA, got ", \
                      torch::headeronly::toString(dispatch_dtype));                           \
    }                                                                                         \
  } while (false)

namespace clusterkv::cuda {

// Kernels copy 16 bytes at a time, or as many as said: pointers and strides must be
// multiples of that.
inline void check_aligned(const char* op, const char* name, const void* pointer,
                          std::initializer_list<int64_t> strides, int bytes = 16) {
  bool aligned = reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  for (const int64_t stride : strides) aligned = aligned && stride % 8 == 0;
  STD_TORCH_CHECK(aligned, op, ": ", name, " must be aligned to ", bytes,
                  " bytes, each row of it too, on CUDA");
}

// The same of the indexes, whose strides are in bytes: even ones, as checks.h has seen to. Kernels
// multiply the block stride as a 32-bit number.
inline void check_index_aligned(const char* op, const SemanticPages& pages) {
  check_aligned(op, "index", pages.index,
                {pages.index_block_stride / 2, pages.index_head_stride / 2});
  STD_TORCH_CHECK(pages.index_block_stride < int64_t{1} << 31, op,
                  ": index.stride(0) must be below 2^31 on CUDA, got ", pages.index_block_stride);
}

// Makes the tensor's device current for its lifetime, and launches on the stream
// that torch has current there.
class LaunchContext {
 public:
  LaunchContext(const char* op, const torch::stable::Tensor& tensor)
      : op_(op), device_(tensor.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream) == AOTI_TORCH_SUCCESS, op_,
                    ": torch has no current CUDA stream on device ", device_);
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // not sticky: the next launch must not report it again
    STD_TORCH_CHECK(false, op_, ": CUDA error on device ", device_, ": ",
                    cudaGetErrorString(error));
  }

  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device_));
    return value;
  }

  int num_multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // Compute capability as 10 * major + minor.
  int capability() const {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
           attribute(cudaDevAttrComputeCapabilityMinor);
  }
  int max_smem_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  // Launches the kernel behind whatever is on the stream.
  template <typename... Params, typename... Args>
  void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes,
              Args... args) const {
    launch_with(kernel, grid, block, smem_bytes, false, args...);
  }

  // As launch, but where the device can (compute capability 9.0), the kernel starts
  // while its predecessor finishes. It must call wait_for_previous_kernel() before it
  // touches memory that its predecessor writes or still reads. What the kernels before
  // that one wrote is there if the predecessor's start_next_kernel() follows its wait.
  template <typename... Params, typename... Args>
  void launch_pdl(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes,
                  Args... args) const {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
    // PTX of an older architecture, compiled when loaded, has no wait.
    const bool waits = capability() >= 90 && attributes.ptxVersion >= 90;
    launch_with(kernel, grid, block, smem_bytes, waits, args...);
  }

 private:
  template <typename... Params, typename... Args>
  void launch_with(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes,
                   bool overlap, Args... args) const {
    if (smem_bytes > 32 * 1024) {  // with static shared memory, beyond what every kernel may have
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(smem_bytes)));
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = overlap ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
  }

  const char* op_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace clusterkv::cuda
