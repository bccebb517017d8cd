// Launching a communication kernel: one CTA an SM, in pairs.
#pragma once

#include <cuda_runtime.h>

#include "exchange/exchange.h"

namespace dualpipe {

// `sms` CTAs with `shared_bytes` of dynamic shared memory each, so many that no two share an SM. An
// even number goes out as clusters of two, which fill pairs of SMs: beside single CTAs a GEMM whose
// clusters need whole pairs strands one SM for each of ours (six torch._grouped_mm of E16 T16384
// K7168 N2048 beside a dispatch on 2, 4, 8, 16 SMs: 3.89, 3.91, 4.39, 4.51 ms; single
// CTAs 4.72, 4.00, 4.39, 4.81).
template <typename... Parameters, typename... Arguments>
void launch_on_sms(const char* name, void (*kernel)(Parameters...), int sms, int threads,
                   int shared_bytes, void* stream, const Arguments&... arguments) {
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
             "cudaFuncSetAttribute");
  cudaLaunchAttribute pairs{};
  pairs.id = cudaLaunchAttributeClusterDimension;
  pairs.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = sms;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &pairs;
  config.numAttrs = sms % 2 == 0 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace dualpipe
