// Combine of unique rows: every rank pulls the sums that the others have put into their outboxes,
// and adds up those of a token in rank order.
//
// A rank reads the outboxes once they are ready, and tells their owners when it no longer does.
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "common/sum_ring.cuh"

namespace dualpipe {
namespace {

constexpr uint32_t kAllLanes = 0xffffffff;

// This rank's tokens in the outboxes of all ranks.
class Outboxes {
 public:
  __device__ Outboxes(const Exchange& ex, const PullArgs& args)
      : ex_(ex), args_(args), layout_(ex), send_rows_(args.plan + PlanLayout(ex).send_rows) {}

  // Lane q: where rank q's sum of the token lies, null if it has none.
  __device__ const char* row(int64_t token) const {
    const int place = lane() < ex_.ranks ? send_rows_[token * ex_.rank_stride() + lane()] : -1;
    if (place < 0) return nullptr;
    return channel_of(ex_, layout_, lane(), args_.channel) + layout_.outbox +
           row_of(place) * ex_.row_bytes();
  }

  // Lane k: where the scalar of the token's route k lies, null if the route was dropped.
  __device__ const float* weight(int64_t token) const {
    if (lane() >= ex_.topk) return nullptr;
    const int expert = args_.topk_idx[token * ex_.topk + lane()];
    if (expert < 0 || expert >= ex_.experts) return nullptr;
    const int rank = expert / ex_.local_experts();
    const int place = send_rows_[token * ex_.rank_stride() + rank];
    return reinterpret_cast<const float*>(channel_of(ex_, layout_, rank, args_.channel) +
                                          layout_.outbox_weight) +
           row_of(place) * ex_.topk_stride() + lane();
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ int64_t row_of(int place) const {
    return static_cast<int64_t>(ex_.rank) * ex_.max_tokens + place;
  }

  const Exchange& ex_;
  const PullArgs& args_;
  const SymmetricLayout layout_;
  const int32_t* send_rows_;
};

template <typename Element>
__device__ __forceinline__ void sum_token(const Exchange& ex, const char* row, char* target,
                                          SumRing<Element>& ring) {
  const uint32_t ranks = __ballot_sync(kAllLanes, row != nullptr);
  if (ranks == 0) {
    for (int i = threadIdx.x % 32 * 16; i < ex.row_bytes(); i += 512) {
      store_16(target + i, make_uint4(0, 0, 0, 0));
    }
  }
  for (int offset = 0; ranks != 0 && offset < ex.row_bytes(); offset += kPiece) {
    const int bytes = min(kPiece, ex.row_bytes() - offset);
    for (uint32_t left = ranks; left != 0; left &= left - 1) {
      const auto source = reinterpret_cast<const char*>(
          __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(row), __ffs(left) - 1));
      const bool complete = (left & (left - 1)) == 0;
      ring.issue(source + offset, {complete ? target + offset : nullptr, nullptr, bytes});
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(kSumWarps * 32, 1)
    pull_and_sum(const __grid_constant__ Exchange ex, const __grid_constant__ PullArgs args) {
  extern __shared__ __align__(128) char stages[];
  __shared__ SumState states[kSumWarps];
  __shared__ int next;
  const int operation = kCombineForward + args.channel;
  const uint64_t epoch = current_epoch(ex, operation);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) next = 0;
  if (__syncthreads_or(aborted(ex))) return;
  if (blockIdx.x == 0 && warp == 0) signal_ready(ex, operation, epoch);
  bool ok = true;
  if (lane < ex.ranks) {
    ok = wait_for(ex, &signals_of(ex, ex.rank, operation)->ready[lane], epoch, operation,
                  kDataReady, lane);
  }
  fence_proxy_async_global();
  if (!__syncthreads_and(ok)) return;

  SumRing<Element> ring(stages + warp * kSumWarpBytes, states[warp], epoch);
  const Outboxes outboxes(ex, args);
  // The addresses of the next token, and its scalars, are fetched while this one is summed.
  const auto take = [&] {
    const int taken = __shfl_sync(kAllLanes, lane == 0 ? atomicAdd(&next, 1) : 0, 0);
    return static_cast<int64_t>(taken) * gridDim.x + blockIdx.x;
  };
  int64_t token = take();
  const char* row = token < args.tokens ? outboxes.row(token) : nullptr;
  while (token < args.tokens) {
    const int64_t ahead = take();
    const char* row_ahead = ahead < args.tokens ? outboxes.row(ahead) : nullptr;
    float weight = 0.0f;
    if (args.topk_weight) {
      const float* source = outboxes.weight(token);
      if (source) weight = __ldcg(source);
    }
    sum_token(ex, row, static_cast<char*>(args.y) + token * ex.row_bytes(), ring);
    if (args.topk_weight && lane < ex.topk) args.topk_weight[token * ex.topk + lane] = weight;
    token = ahead;
    row = row_ahead;
  }
  ring.drain();
  __syncthreads();
  if (threadIdx.x == 0) finish_operation(ex, operation, epoch, gridDim.x);
}

// Before this rank writes its outbox, all ranks must have pulled the last sums.
__global__ void wait_outbox(const __grid_constant__ Exchange ex, int operation) {
  wait_all_done(ex, operation, current_epoch(ex, operation));
}

template <typename Element>
void launch(const Exchange& ex, const PullArgs& args) {
  launch_on_sms("pull_and_sum", pull_and_sum<Element>, args.sms, kSumWarps * 32,
                kSumWarps * kSumWarpBytes, args.stream, ex, args);
}

}  // namespace

void launch_pull(const Exchange& ex, const PullArgs& args) {
  const DeviceGuard guard(ex.device);
  if (ex.element_bytes == 4) {
    launch<float>(ex, args);
  } else {
    launch<__nv_bfloat16>(ex, args);
  }
}

void launch_wait_outbox(const Exchange& ex, int channel, void* stream) {
  const DeviceGuard guard(ex.device);
  wait_outbox<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(ex, kCombineForward + channel);
  check_cuda(cudaGetLastError(), "wait_outbox");
}

}  // namespace dualpipe
