// Dispatch: every rank pulls the tokens routed to it and writes them in expert order.
//
// A row crosses the link once for each rank it goes to: it is loaded into shared memory by the bulk
// copy engine and stored from there to all its rows. Pulling needs the tokens in peer memory; the
// copy engine puts them there first (4096 × 14,336 B in about 30 µs), and the rank's own tokens are
// read where they lie.
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "common/row_ring.cuh"

namespace dualpipe {
namespace {

constexpr uint32_t kAllLanes = 0xffffffff;

// A row goes to every slot that its token has here; lane k serves route k.
struct Slots {
  const Exchange& ex;
  const DispatchArgs& args;

  __device__ bool ready() const { return true; }
  __device__ char* row(int lane, const int32_t* slots) const {
    const int64_t slot = lane < ex.topk ? slots[lane] : -1;
    return slot < 0 ? nullptr : static_cast<char*>(args.rows) + slot * ex.row_bytes();
  }
  __device__ void weights(int lane, const int32_t* slots, const float* weights) const {
    args.row_weight[slots[lane]] = weights[lane];
  }
};

// Zero the rows between an expert's last and the next expert's first, shared over all warps.
__device__ void zero_padding(const Exchange& ex, const DispatchArgs& args, int worker,
                             int workers) {
  const PlanLayout layout(ex);
  const int32_t* offsets = args.plan + layout.expert_offsets;
  const int32_t* tokens = args.plan + layout.tokens_per_expert;
  const int lane = threadIdx.x % 32;
  int skipped = 0;  // padding rows of earlier experts: the next warp in turn takes the first
  for (int e = 0; e < ex.local_experts(); ++e) {
    const int begin = offsets[e] + tokens[e], end = offsets[e + 1];
    const int turn = (worker - skipped % workers + workers) % workers;
    for (int row = begin + turn; row < end; row += workers) {
      char* target = static_cast<char*>(args.rows) + static_cast<int64_t>(row) * ex.row_bytes();
      for (int i = lane * 16; i < ex.row_bytes(); i += 32 * 16) {
        store_16(target + i, make_uint4(0, 0, 0, 0));
      }
      if (args.row_weight && lane == 0) args.row_weight[row] = 0.0f;
    }
    skipped += end - begin;
  }
}

// Pull every token that comes here. Workers share each source's list evenly, whatever its length,
// and start at different sources, so that all links are busy from the first row on.
// Returns false if a source never became ready.
__device__ bool pull(const Exchange& ex, const DispatchArgs& args, const RingShape& shape,
                     RowRing<Slots>& ring, int worker, int workers, uint64_t epoch) {
  const SymmetricLayout symmetric(ex);
  const PlanLayout layout(ex);
  const int operation = kDispatchForward + args.channel;
  const int lane = threadIdx.x % 32;
  const int32_t* arrivals = args.plan + layout.arrivals;
  const int32_t* slots = args.plan + layout.slots;
  const int units_of_lane =
      lane < ex.ranks ? args.plan[layout.arrival_counts + lane] * shape.pieces : 0;
  const int longest = __reduce_max_sync(kAllLanes, units_of_lane);
  const Signals* mine = signals_of(ex, ex.rank, operation);
  uint32_t ready = 1u << ex.rank;

  const int turns = longest > worker ? (longest - worker - 1) / workers + 1 : 0;
  for (int first = 0; first < turns * ex.ranks; first += 32) {
    // Lane l looks up the l-th next unit, so that the load of the token index is paid once in 32.
    const int n = first + lane;
    const int source = (n + worker + ex.rank) % ex.ranks;
    const int unit = worker + n / ex.ranks * workers;
    const int units = __shfl_sync(kAllLanes, units_of_lane, source);
    const bool valid = n < turns * ex.ranks && unit < units;
    const int piece = unit % shape.pieces;
    const int token = valid ? arrivals[source * ex.max_tokens + unit / shape.pieces] : 0;
    for (uint32_t left = __ballot_sync(kAllLanes, valid); left != 0; left &= left - 1) {
      const int from = __ffs(left) - 1;
      const int p = __shfl_sync(kAllLanes, source, from);
      const int t = __shfl_sync(kAllLanes, token, from);
      if (!(ready >> p & 1)) {
        bool ok = true;
        if (lane == 0) {
          ok = wait_for(ex, &mine->ready[p], epoch, operation, kDataReady, p);
          fence_proxy_async_global();
        }
        if (!__shfl_sync(kAllLanes, ok, 0)) return false;
        ready |= 1u << p;
      }
      const char* x = p == ex.rank ? static_cast<const char*>(args.x)
                                   : channel_of(ex, symmetric, p, args.channel) + symmetric.x;
      const float* weights = nullptr;
      if (args.row_weight) {
        weights = reinterpret_cast<const float*>(channel_of(ex, symmetric, p, args.channel) +
                                                 symmetric.weight) +
                  static_cast<int64_t>(t) * ex.topk_stride();
      }
      ring.issue(x + static_cast<int64_t>(t) * ex.row_bytes(),
                 slots + (static_cast<int64_t>(p) * ex.max_tokens + t) * ex.topk_stride(), weights,
                 __shfl_sync(kAllLanes, piece, from));
    }
  }
  return true;
}

__global__ void __launch_bounds__(kRingMaxWarps * 32, 1)
    pull_rows(const __grid_constant__ Exchange ex, const __grid_constant__ DispatchArgs args,
              const __grid_constant__ RingShape shape) {
  extern __shared__ __align__(128) char stages[];
  __shared__ uint64_t barriers[kRingMaxWarps * kRingMaxStages];
  const int operation = kDispatchForward + args.channel;
  const uint64_t epoch = current_epoch(ex, operation);
  const int warp = threadIdx.x / 32;
  if (__syncthreads_or(aborted(ex))) return;
  if (blockIdx.x == 0 && warp == 0) signal_ready(ex, operation, epoch);

  const int worker = warp * gridDim.x + blockIdx.x, workers = shape.warps * gridDim.x;
  zero_padding(ex, args, worker, workers);
  Slots slots{ex, args};
  RowRing<Slots> ring(shape, slots, stages + warp * shape.stages * shape.stage_bytes,
                      barriers + warp * kRingMaxStages);
  const bool complete = pull(ex, args, shape, ring, worker, workers, epoch);
  ring.drain();
  if (__syncthreads_and(complete) && threadIdx.x == 0) {
    finish_operation(ex, operation, epoch, gridDim.x);
  }
}

// Before this rank overwrites its tokens in peer memory, all ranks must have pulled the last ones.
__global__ void wait_until_free(const __grid_constant__ Exchange ex, int operation) {
  wait_all_done(ex, operation, current_epoch(ex, operation));
}

}  // namespace

void launch_stage(const Exchange& ex, const DispatchArgs& args) {
  if (args.tokens == 0) return;
  const DeviceGuard guard(ex.device);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const SymmetricLayout layout(ex);
  char* mine = ex.peer[ex.rank] + layout.channel + layout.channel_stride * args.channel;
  if (ex.ranks > 1) {
    wait_until_free<<<1, 32, 0, stream>>>(ex, kDispatchForward + args.channel);
    check_cuda(cudaGetLastError(), "wait_until_free");
    check_cuda(
        cudaMemcpyAsync(mine + layout.x, args.x, static_cast<size_t>(args.tokens) * ex.row_bytes(),
                        cudaMemcpyDeviceToDevice, stream),
        "copy of x to peer memory");
  }
  if (args.topk_weight) {
    check_cuda(
        cudaMemcpy2DAsync(mine + layout.weight, ex.topk_stride() * 4, args.topk_weight, ex.topk * 4,
                          ex.topk * 4, args.tokens, cudaMemcpyDeviceToDevice, stream),
        "copy of topk_weight to peer memory");
  }
}

void launch_dispatch(const Exchange& ex, const DispatchArgs& args) {
  const DeviceGuard guard(ex.device);
  const RingShape shape(ex, ex.topk_stride());
  launch_on_sms("pull_rows", pull_rows, args.sms, shape.warps * 32, shape.shared_bytes(),
                args.stream, ex, args, shape);
}

}  // namespace dualpipe
