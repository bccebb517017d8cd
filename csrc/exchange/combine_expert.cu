// Combine: sum every token's rows on the experts' side in fp32, push one partial sum a (token,
// rank) over the link, and sum the partials at home.
//
// Both halves are the same work, a sum of rows, and run interleaved in one kernel: a warp pushes
// the partials of one token index to every other rank, then sums its own token of kLag indices ago,
// whose partials have arrived meanwhile. A rank's own experts need no partial: their rows are
// summed at home. The bulk copy engine loads the rows ahead into shared memory and stores the sums.
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "common/sum_ring.cuh"

namespace dualpipe {
namespace {

// Token indices of a CTA between their pushes and the sum at home.
constexpr int kLag = 32;
constexpr uint32_t kAllLanes = 0xffffffff;

// A sum of rows: local experts' rows first, then partials in rank order.
struct Task {
  int slot;              // in lane k: the row here of route k, or −1
  uint32_t local_lanes;  // the lanes that hold one
  const char* partials;  // the first of num_partials rows
  int num_partials;
  char* target;
  uint64_t* flag;  // raised once the sum is there, or null
};

// The tasks of a combine, as one warp sees them.
class Tasks {
 public:
  __device__ Tasks(const Exchange& ex, const CombineArgs& args) : ex_(ex), args_(args) {
    const SymmetricLayout layout(ex);
    const int64_t channel = layout.channel + layout.channel_stride * args.channel;
    partials_at_ = channel + layout.partial;
    partial_weights_at_ = channel + layout.partial_weight;
    flags_at_ = channel + layout.partial_ready;
    const PlanLayout plan(ex);
    slots_ = args.plan + plan.slots;
    token_ranks_ = args.plan + plan.token_ranks;
    source_tokens_ = args.plan + plan.source_tokens;
  }

  __device__ int most_tokens() const {
    int most = 0;
    for (int p = 0; p < ex_.ranks; ++p) most = max(most, source_tokens_[p]);
    return most;
  }

  // What this rank's experts have for another rank's token; false if nothing.
  __device__ bool prepare_push(int owner, int token, uint64_t epoch, Task& task) const {
    if (token >= source_tokens_[owner]) return false;
    if (!(token_ranks_[owner * ex_.max_tokens + token] >> ex_.rank & 1)) return false;
    find_local_rows(owner, token, task);
    if (task.local_lanes == 0) {  // beyond max_rows: reported, and not to be waited for
      if (lane() == 0) store_release_system(partial_flag(owner, ex_.rank, token), epoch);
      return false;
    }
    // The partial's place: how many other ranks below this one also serve the token.
    const uint32_t others = other_ranks_of(owner, token);
    const int index = __popc(others & ((1u << ex_.rank) - 1));
    task.num_partials = 0;
    task.target = partial_row(owner, token, index);
    task.flag = partial_flag(owner, ex_.rank, token);
    if (args_.row_weight && task.slot >= 0) {
      partial_weight(owner, token)[lane()] = args_.row_weight[task.slot];
    }
    return true;
  }

  // The sum of this rank's own token; false if it has no route.
  __device__ bool prepare_home(int token, Task& task) const {
    if (token < 0 || token >= args_.tokens) return false;
    find_local_rows(ex_.rank, token, task);
    task.partials = partial_row(ex_.rank, token, 0);
    task.num_partials = __popc(other_ranks_of(ex_.rank, token));
    task.target = static_cast<char*>(args_.y) + static_cast<int64_t>(token) * ex_.row_bytes();
    task.flag = nullptr;
    if (task.local_lanes != 0 || task.num_partials != 0) return true;
    for (int i = lane() * 16; i < ex_.row_bytes(); i += 512) {
      store_16(task.target + i, make_uint4(0, 0, 0, 0));
    }
    if (args_.topk_weight && lane() < ex_.topk) return_weight(token, task.slot);
    return false;
  }

  // Lane p: the flag of rank p's partial of this rank's token, null if none is to come.
  __device__ const uint64_t* awaited_flag(int token) const {
    const bool expected = other_ranks_of(ex_.rank, token) >> lane() & 1;
    return expected ? partial_flag(ex_.rank, lane(), token) : nullptr;
  }

  // Lane k hands back the scalar of route k; its partial must have arrived.
  __device__ void return_weight(int token, int slot) const {
    const int64_t at = static_cast<int64_t>(token) * ex_.topk + lane();
    const int expert = args_.topk_idx[at];
    const bool dropped = expert < 0 || expert >= ex_.experts;
    args_.topk_weight[at] = slot >= 0 ? args_.row_weight[slot]
                            : dropped ? 0.0f
                                      : __ldcg(partial_weight(ex_.rank, token) + lane());
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ char* partial_row(int owner, int token, int index) const {
    return ex_.peer[owner] + partials_at_ +
           (static_cast<int64_t>(token) * ex_.partials() + index) * ex_.row_bytes();
  }
  __device__ float* partial_weight(int owner, int token) const {
    return reinterpret_cast<float*>(ex_.peer[owner] + partial_weights_at_) +
           static_cast<int64_t>(token) * ex_.topk;
  }
  __device__ uint64_t* partial_flag(int owner, int source, int token) const {
    return reinterpret_cast<uint64_t*>(ex_.peer[owner] + flags_at_) +
           static_cast<int64_t>(source) * ex_.max_tokens + token;
  }
  __device__ uint32_t other_ranks_of(int owner, int token) const {
    return token_ranks_[owner * ex_.max_tokens + token] & ~(1u << owner);
  }
  __device__ void find_local_rows(int source, int token, Task& task) const {
    const int64_t at = (static_cast<int64_t>(source) * ex_.max_tokens + token) * ex_.topk_stride();
    task.slot = lane() < ex_.topk ? slots_[at + lane()] : -1;
    task.local_lanes = __ballot_sync(kAllLanes, task.slot >= 0);
  }

  const Exchange& ex_;
  const CombineArgs& args_;
  int64_t partials_at_, partial_weights_at_, flags_at_;  // in every rank's symmetric buffer
  const int32_t *slots_, *token_ranks_, *source_tokens_;
};

template <typename Element>
__device__ __forceinline__ void run(const Exchange& ex, const CombineArgs& args, const Task& task,
                                    SumRing<Element>& ring) {
  const int sources = __popc(task.local_lanes) + task.num_partials;
  for (int offset = 0; offset < ex.row_bytes(); offset += kPiece) {
    const int bytes = min(kPiece, ex.row_bytes() - offset);
    uint32_t lanes = task.local_lanes;
    const char* partial = task.partials;
    for (int left = sources; left > 0; --left) {
      const char* source = partial;
      if (lanes != 0) {
        const int64_t row = __shfl_sync(kAllLanes, task.slot, __ffs(lanes) - 1);
        source = static_cast<const char*>(args.rows) + row * ex.row_bytes();
        lanes &= lanes - 1;
      } else {
        partial += ex.row_bytes();
      }
      const bool complete = left == 1;
      ring.issue(source + offset,
                 {complete ? task.target + offset : nullptr,
                  complete && offset + kPiece >= ex.row_bytes() ? task.flag : nullptr, bytes});
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(kSumWarps * 32, 1)
    push_and_sum(const __grid_constant__ Exchange ex, const __grid_constant__ CombineArgs args) {
  extern __shared__ __align__(128) char stages[];
  __shared__ SumState states[kSumWarps];
  __shared__ int next;
  const int operation = kCombineForward + args.channel;
  const uint64_t epoch = current_epoch(ex, operation);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) next = 0;
  __syncthreads();
  if (!wait_all_done(ex, operation, epoch)) return;

  SumRing<Element> ring(stages + warp * kSumWarpBytes, states[warp], epoch);
  const Tasks tasks(ex, args);
  const int end = tasks.most_tokens() + kLag * gridDim.x;
  // A CTA's warps take its tasks in turn, for one token index after the other: a push to each other
  // rank, then a sum at home. Their sizes vary by the routing, so a fixed share would leave some
  // warps working alone at the end.
  bool ok = true, finished = false;
  while (ok && !finished) {
    const int step = __shfl_sync(kAllLanes, lane == 0 ? atomicAdd(&next, 1) : 0, 0);
    const int token = blockIdx.x + step / ex.ranks * gridDim.x;
    const int owner = (ex.rank + 1 + step % ex.ranks) % ex.ranks;
    const int home = token - kLag * gridDim.x;
    const bool at_home = owner == ex.rank;
    finished = token >= end;

    Task task;
    const bool some = !finished && (at_home ? tasks.prepare_home(home, task)
                                            : tasks.prepare_push(owner, token, epoch, task));
    const uint64_t* flag = some && at_home ? tasks.awaited_flag(home) : nullptr;
    bool ready = !flag || load_acquire_system(flag) >= epoch;
    // A warp that has to wait first completes all it has begun, and every CTA pushes in rising
    // order, each index ahead of the sums of lower ones: the lowest sum that waits can proceed.
    if (finished || !__all_sync(kAllLanes, ready)) {
      ring.drain();
      __syncwarp();
      if (!ready) ready = wait_for(ex, flag, epoch, operation, kDataReady, lane);
      ok = __all_sync(kAllLanes, ready);
    }
    if (!ok || !some) continue;
    if (at_home) {
      fence_proxy_async_global();  // the partials were written by others, the copy engine reads
                                   // them
      __syncwarp();
      if (args.topk_weight && lane < ex.topk) tasks.return_weight(home, task.slot);
    }
    run(ex, args, task, ring);
  }
  if (ok && lane == 0) finish_operation(ex, operation, epoch, kSumWarps * gridDim.x);
}

template <typename Element>
void launch(const Exchange& ex, const CombineArgs& args) {
  launch_on_sms("push_and_sum", push_and_sum<Element>, args.sms, kSumWarps * 32,
                kSumWarps * kSumWarpBytes, args.stream, ex, args);
}

}  // namespace

void launch_combine(const Exchange& ex, const CombineArgs& args) {
  const DeviceGuard guard(ex.device);
  if (ex.element_bytes == 4) {
    launch<float>(ex, args);
  } else {
    launch<__nv_bfloat16>(ex, args);
  }
}

}  // namespace dualpipe
