// Waiting for other ranks: every wait is bounded, and reports who did not come.
#pragma once

#include "common/ptx.cuh"
#include "exchange/exchange.h"

namespace dualpipe {

__device__ __forceinline__ Signals* signals_of(const Exchange& ex, int owner, int operation) {
  return reinterpret_cast<Signals*>(ex.peer[owner]) + operation;
}

__device__ __forceinline__ uint64_t* abort_flag(const Exchange& ex) {
  return reinterpret_cast<uint64_t*>(ex.peer[ex.rank] + SymmetricLayout(ex).abort);
}

// Once a wait has given up, later kernels must neither wait again nor touch half-written data.
// The same for all lanes of the calling warp.
__device__ __forceinline__ bool aborted(const Exchange& ex) {
  return __any_sync(0xffffffff, load_volatile(abort_flag(ex)) != 0);
}

// Where a part of a channel lies in a rank's symmetric buffer.
__device__ __forceinline__ char* channel_of(const Exchange& ex, const SymmetricLayout& layout,
                                            int owner, int channel) {
  return ex.peer[owner] + layout.channel + layout.channel_stride * channel;
}

// The epoch of the operation now running; every CTA reads it before the last one can raise it.
__device__ __forceinline__ uint64_t current_epoch(const Exchange& ex, int operation) {
  return load_volatile(&signals_of(ex, ex.rank, operation)->epoch) + 1;
}

static __device__ __noinline__ void report_fault(const Exchange& ex, int operation, int phase,
                                                 int peer, uint64_t expected, uint64_t seen) {
  auto* claim = reinterpret_cast<unsigned long long*>(abort_flag(ex));
  if (atomicCAS(claim, 0ull, 1ull) != 0ull) return;
  volatile Fault* fault = ex.fault;
  fault->operation = operation;
  fault->phase = phase;
  fault->peer = peer;
  fault->expected = static_cast<int64_t>(expected);
  fault->seen = static_cast<int64_t>(seen);
  __threadfence_system();
  fault->raised = 1;
}

// Wait until *flag >= expected. Returns false after ex.timeout_ns, or when another wait gave up.
__device__ __forceinline__ bool wait_for(const Exchange& ex, const uint64_t* flag,
                                         uint64_t expected, int operation, int phase, int peer) {
  uint64_t seen = load_acquire_system(flag);
  if (seen >= expected) return true;
  const uint64_t start = global_nanoseconds();
  for (uint32_t polls = 1;; ++polls) {
    seen = load_acquire_system(flag);
    if (seen >= expected) return true;
    if (polls % 256 == 0) {
      if (load_volatile(abort_flag(ex)) != 0) return false;
      if (global_nanoseconds() - start > static_cast<uint64_t>(ex.timeout_ns)) {
        report_fault(ex, operation, phase, peer, expected, seen);
        return false;
      }
    }
  }
}

// Lane p of a warp waits until rank p is done with what the previous epoch handed over.
__device__ __forceinline__ bool wait_all_done(const Exchange& ex, int operation, uint64_t epoch) {
  const int lane = threadIdx.x % 32;
  bool ok = !aborted(ex);
  if (ok && lane < ex.ranks && lane != ex.rank) {
    ok = wait_for(ex, &signals_of(ex, ex.rank, operation)->done[lane], epoch - 1, operation,
                  kBuffersFree, lane);
  }
  return __all_sync(0xffffffff, ok);
}

// Call with one whole warp: lane p tells rank p.
__device__ __forceinline__ void signal_ready(const Exchange& ex, int operation, uint64_t epoch) {
  const int lane = threadIdx.x % 32;
  if (lane < ex.ranks) {
    __threadfence_system();
    store_release_system(&signals_of(ex, lane, operation)->ready[ex.rank], epoch);
  }
}

// Wait, with one whole warp, until every rank has begun this epoch.
__device__ __forceinline__ bool wait_begun(const Exchange& ex, int operation, uint64_t epoch) {
  const int lane = threadIdx.x % 32;
  bool ok = true;
  if (lane < ex.ranks && lane != ex.rank) {
    ok = wait_for(ex, &signals_of(ex, ex.rank, operation)->done[lane], epoch, operation, kArrived,
                  lane);
  }
  return __all_sync(0xffffffff, ok);
}

// Tell, with one whole warp, every rank that this one has begun the epoch.
__device__ __forceinline__ void signal_begun(const Exchange& ex, int operation, uint64_t epoch) {
  const int lane = threadIdx.x % 32;
  if (lane < ex.ranks && lane != ex.rank) {
    __threadfence_system();
    store_release_system(&signals_of(ex, lane, operation)->done[ex.rank], epoch);
  }
}

// Call with one thread once its group's work is complete: the last of `groups` ends the operation
// and tells every rank that this one no longer needs its data.
__device__ __forceinline__ void finish_operation(const Exchange& ex, int operation, uint64_t epoch,
                                                 uint32_t groups) {
  Signals* mine = signals_of(ex, ex.rank, operation);
  if (add_acq_rel_gpu(&mine->arrived, 1) != groups - 1) return;
  mine->arrived = 0;
  mine->epoch = epoch;
  __threadfence_system();
  for (int p = 0; p < ex.ranks; ++p) {
    if (p != ex.rank) store_release_system(&signals_of(ex, p, operation)->done[ex.rank], epoch);
  }
}

}  // namespace dualpipe
