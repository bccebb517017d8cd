// A pipeline's transfers by copy engine: no SM while data is in flight.
//
// Both ends of a link do the same: wait for the other's flag, copy, raise their own. Waits are
// kernels of one thread, because those of the driver (cuStreamWaitValue) are not bounded.
#include <cuda_runtime.h>

#include "common/ptx.cuh"
#include "exchange/exchange.h"

namespace dualpipe {
namespace {

__device__ __noinline__ void report_fault(const Link& link, uint64_t expected, uint64_t seen) {
  auto* claim = reinterpret_cast<unsigned long long*>(link.abort);
  if (atomicCAS(claim, 0ull, 1ull) != 0ull) return;
  volatile LinkFault* fault = link.fault;
  fault->peer = link.peer;
  fault->sends = link.sends;
  fault->expected = static_cast<int64_t>(expected);
  fault->seen = static_cast<int64_t>(seen);
  __threadfence_system();
  fault->raised = 1;
}

// Until the other end has raised its flag to `expected`, the time is over, or another wait of this
// rank has given up.
__global__ void wait_link(const __grid_constant__ Link link, uint64_t expected) {
  const uint64_t start = global_nanoseconds();
  for (uint32_t polls = 1;; ++polls) {
    const uint64_t seen = load_acquire_system(link.theirs);
    if (seen >= expected) return;
    if (polls % 256 == 0) {
      if (load_volatile(link.abort) != 0) return;
      if (global_nanoseconds() - start > static_cast<uint64_t>(link.timeout_ns)) {
        report_fault(link, expected, seen);
        return;
      }
    }
  }
}

// After a fault nothing that was copied is worth reading: the flag stays, and the peer times out.
__global__ void tell_link(const __grid_constant__ Link link, uint64_t sequence) {
  if (load_volatile(link.abort) != 0) return;
  __threadfence_system();
  store_release_system(link.mine, sequence);
}

}  // namespace

void launch_link(const Link& link, const LinkArgs& args) {
  const DeviceGuard guard(link.device);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  if (args.expected > 0) {
    wait_link<<<1, 1, 0, stream>>>(link, args.expected);
    check_cuda(cudaGetLastError(), "wait_link");
  }
  for (int i = 0; i < args.copies; ++i) {
    const LinkCopy& copy = args.copy[i];
    if (copy.bytes == 0) continue;
    check_cuda(cudaMemcpyAsync(copy.to, copy.from, copy.bytes, cudaMemcpyDeviceToDevice, stream),
               "copy to or from a link's slot");
  }
  tell_link<<<1, 1, 0, stream>>>(link, args.sequence);
  check_cuda(cudaGetLastError(), "tell_link");
}

}  // namespace dualpipe
