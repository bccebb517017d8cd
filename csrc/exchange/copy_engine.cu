// Unique rows by copy engine: no SM while data is in flight.
//
// One warp tells the peers that this rank's inbox is free, each copy waits for that of its target,
// and tells the target when it is through. Waits are kernels of one warp, because those of the
// driver (cuStreamWaitValue) are not bounded.
#include <cuda_runtime.h>

#include "common/barrier.cuh"

namespace dualpipe {
namespace {

__global__ void begin_copy(const __grid_constant__ Exchange ex, int operation) {
  if (!aborted(ex)) signal_begun(ex, operation, current_epoch(ex, operation));
}

__global__ void wait_target(const __grid_constant__ Exchange ex, int operation, int target) {
  const uint64_t epoch = current_epoch(ex, operation);
  if (target != ex.rank) {
    wait_for(ex, &signals_of(ex, ex.rank, operation)->done[target], epoch, operation, kArrived,
             target);
  }
}

__global__ void tell_target(const __grid_constant__ Exchange ex, int operation, int target) {
  if (load_volatile(abort_flag(ex)) != 0) return;
  __threadfence_system();
  store_release_system(&signals_of(ex, target, operation)->ready[ex.rank],
                       current_epoch(ex, operation));
}

__global__ void finish_copy(const __grid_constant__ Exchange ex, int operation) {
  Signals* mine = signals_of(ex, ex.rank, operation);
  const uint64_t epoch = current_epoch(ex, operation);
  if (!aborted(ex) && threadIdx.x < ex.ranks) {
    wait_for(ex, &mine->ready[threadIdx.x], epoch, operation, kDataReady, threadIdx.x);
  }
  __syncwarp();
  if (threadIdx.x == 0) mine->epoch = epoch;
}

}  // namespace

void launch_copy(const Exchange& ex, const CopyArgs& args) {
  const DeviceGuard guard(ex.device);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const auto event = [&](int i) { return static_cast<cudaEvent_t>(args.events[i]); };
  const int operation = (args.combine ? kCombineForward : kDispatchForward) + args.channel;
  const SymmetricLayout layout(ex);
  const int64_t channel = layout.channel + layout.channel_stride * args.channel;
  begin_copy<<<1, 32, 0, stream>>>(ex, operation);
  check_cuda(cudaGetLastError(), "begin_copy");
  check_cuda(cudaEventRecord(event(ex.ranks), stream), "cudaEventRecord");
  // All ranks send to their i-th neighbour at a time: four GPUs take 448 us so, and 693 where every
  // peer has a stream of its own. What stays here has one.
  for (int i = 1; i <= ex.ranks; ++i) {
    const int target = (ex.rank + i) % ex.ranks;
    const auto copies = static_cast<cudaStream_t>(args.copy_streams[i == ex.ranks]);
    const int64_t mine = static_cast<int64_t>(ex.rank) * ex.max_tokens;
    const int64_t theirs = static_cast<int64_t>(target) * ex.max_tokens;
    const auto move = [&](int64_t inbox, int64_t outbox, int64_t row_bytes) {
      check_cuda(cudaMemcpyAsync(ex.peer[target] + channel + inbox + mine * row_bytes,
                                 ex.peer[ex.rank] + channel + outbox + theirs * row_bytes,
                                 args.rows[target] * row_bytes, cudaMemcpyDeviceToDevice, copies),
                 "copy to a peer's inbox");
    };
    check_cuda(cudaStreamWaitEvent(copies, event(ex.ranks)), "cudaStreamWaitEvent");
    wait_target<<<1, 1, 0, copies>>>(ex, operation, target);
    check_cuda(cudaGetLastError(), "wait_target");
    move(layout.inbox, layout.outbox, args.fp8 ? ex.hidden : ex.row_bytes());
    if (args.weights) move(layout.inbox_weight, layout.outbox_weight, ex.topk_stride() * 4);
    if (args.fp8) move(layout.inbox_scale, layout.outbox_scale, ex.scale_stride() * 4);
    tell_target<<<1, 1, 0, copies>>>(ex, operation, target);
    check_cuda(cudaGetLastError(), "tell_target");
    check_cuda(cudaEventRecord(event(target), copies), "cudaEventRecord");
    check_cuda(cudaStreamWaitEvent(stream, event(target)), "cudaStreamWaitEvent");
  }
  finish_copy<<<1, 32, 0, stream>>>(ex, operation);
  check_cuda(cudaGetLastError(), "finish_copy");
}

}  // namespace dualpipe
