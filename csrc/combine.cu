// Combine: sum every token's rows on the experts' side in fp32, push one partial sum a (token,
// rank) over the link, and sum the partials at home.
//
// Both halves are the same work, a sum of rows, and run interleaved in one kernel: a warp pushes
// the partials of one token index to every other rank, then sums its own token of kLag indices ago,
// whose partials have arrived meanwhile. A rank's own experts need no partial: their rows are
// summed at home. The bulk copy engine loads the rows ahead into shared memory and stores the sums.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "barrier.cuh"

namespace dualpipe {
namespace {

// An SM reads 52 GB/s: at 2 µs of latency that needs 104 KB in flight. 192 KB hold
// 16 warps × (4 stages + 2 sums on their way out) × 2 KB. Adding up takes an estimated 45
// instructions for 512 bytes of the 80 that an SM can issue meanwhile, so many warps matter more
// than large pieces.
constexpr int kWarps = 16;
constexpr int kStages = 4;
constexpr int kSums = 2;
constexpr int kVectors = 4;                 // 16-byte vectors of a piece in one lane
constexpr int kPiece = 32 * 16 * kVectors;  // 2 KB; the last piece of a row may be shorter
constexpr int kWarpBytes = (kStages + kSums) * kPiece;
constexpr int kLag = 2;  // token indices between a push and the sum at home
// A flag costs a fence, by estimate 2 µs: several share one, some stores after their own, so that
// these have arrived by then.
constexpr int kFlagBatch = 3;
constexpr int kFlagDelay = 2;
constexpr uint32_t kAllLanes = 0xffffffff;

// kVectors × 16 bytes a lane, summed in fp32.
template <typename Element>
struct Sum;

template <>
struct Sum<float> {
  float4 value[kVectors];
  __device__ void clear(int i) { value[i] = make_float4(0, 0, 0, 0); }
  __device__ void add(int i, uint4 raw) {
    value[i].x += __uint_as_float(raw.x);
    value[i].y += __uint_as_float(raw.y);
    value[i].z += __uint_as_float(raw.z);
    value[i].w += __uint_as_float(raw.w);
  }
  __device__ uint4 packed(int i) const {
    return make_uint4(__float_as_uint(value[i].x), __float_as_uint(value[i].y),
                      __float_as_uint(value[i].z), __float_as_uint(value[i].w));
  }
};

template <>
struct Sum<__nv_bfloat16> {
  float2 value[kVectors][4];
  __device__ void clear(int i) {
    for (int j = 0; j < 4; ++j) value[i][j] = make_float2(0, 0);
  }
  __device__ void add(int i, uint4 raw) {
    add_pair(value[i][0], raw.x);
    add_pair(value[i][1], raw.y);
    add_pair(value[i][2], raw.z);
    add_pair(value[i][3], raw.w);
  }
  __device__ uint4 packed(int i) const {
    return make_uint4(pack_pair(value[i][0]), pack_pair(value[i][1]), pack_pair(value[i][2]),
                      pack_pair(value[i][3]));
  }
  // A bf16 is the upper half of its fp32.
  __device__ static void add_pair(float2& sum, uint32_t pair) {
    sum.x += __uint_as_float(pair << 16);
    sum.y += __uint_as_float(pair & 0xffff0000u);
  }
  __device__ static uint32_t pack_pair(float2 sum) {
    const __nv_bfloat162 pair = __float22bfloat162_rn(sum);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

// What to do with a loaded piece; one a stage, in shared memory.
struct Load {
  char* target;    // where the finished sum goes, null while more pieces follow
  uint64_t* flag;  // raised once the sum has arrived there, or null
  int bytes;
};

struct alignas(16) WarpState {
  uint64_t loaded[kStages];  // mbarriers
  Load loads[kStages];
};

// One warp's ring: pieces are loaded ahead, added up in order, and their sums stored.
template <typename Element>
class SumRing {
 public:
  __device__ SumRing(char* stages, WarpState& state, uint64_t epoch)
      : stages_(stages), state_(state), epoch_(epoch) {
    if (lane() == 0) {
      for (int s = 0; s < kStages; ++s) mbarrier_init(&state.loaded[s], 1);
      fence_mbarrier_init();
    }
    __syncwarp();
    clear();
  }

  // Load a piece ahead; add up the oldest one first if the ring is full.
  __device__ void issue(const char* source, const Load& load) {
    if (issued_ - added_ == kStages) add_oldest();
    const int stage = issued_++ % kStages;
    __syncwarp();  // every lane has read what the stage held
    if (lane() == 0) {
      state_.loads[stage] = load;
      mbarrier_expect_bytes(&state_.loaded[stage], load.bytes);
      bulk_load(stages_ + stage * kPiece, source, load.bytes, &state_.loaded[stage]);
    }
  }

  // Finish everything issued, and raise all flags.
  __device__ void drain() {
    while (added_ < issued_) add_oldest();
    raise_flags(true);
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static uint4* vector_of(char* data, int i) {
    return reinterpret_cast<uint4*>(data + i * 512);
  }
  __device__ static const uint4* vector_of(const char* data, int i) {
    return reinterpret_cast<const uint4*>(data + i * 512);
  }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) sum_.clear(i);
  }

  __device__ void add_oldest() {
    const int stage = added_ % kStages;
    __syncwarp();
    mbarrier_wait(&state_.loaded[stage], added_ / kStages & 1);
    ++added_;
    const Load load = state_.loads[stage];
    const char* data = stages_ + stage * kPiece + lane() * 16;
    if (load.bytes == kPiece) {  // without bounds checks the loads overlap
      uint4 raw[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) raw[i] = *vector_of(data, i);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) sum_.add(i, raw[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (lane() * 16 + i * 512 < load.bytes) sum_.add(i, *vector_of(data, i));
      }
    }
    if (load.target) store_sum(load);
  }

  __device__ void store_sum(const Load& load) {
    // The store of kSums pieces ago has left this buffer.
    bulk_wait_read<kSums - 1>();
    __syncwarp();
    char* sum = stages_ + (kStages + stored_++ % kSums) * kPiece;
    // Lanes past the end write into the buffer's unused part.
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      *vector_of(sum + lane() * 16, i) = sum_.packed(i);
    }
    clear();
    fence_proxy_async_shared();
    __syncwarp();
    if (lane() == 0) {
      bulk_store(load.target, sum, load.bytes);
      bulk_commit();
    }
    if (load.flag) {
      if (lane() == flags_++) flag_ = load.flag;
      flagged_at_ = stored_;
    }
    // Enough flags to pay for a fence, and their stores old enough to have arrived.
    const bool ripe = flags_ >= kFlagBatch && stored_ - flagged_at_ >= kFlagDelay;
    if (ripe || flags_ == 32) {
      raise_flags(flags_ == 32);
    }
  }

  // Lane i raises the i-th flag once the stores up to its own have completed.
  __device__ void raise_flags(bool at_once) {
    if (lane() == 0) {
      at_once ? bulk_wait_all() : bulk_wait<kFlagDelay>();
      fence_proxy_async_global();
    }
    __syncwarp();
    if (flag_) store_release_system(flag_, epoch_);
    flag_ = nullptr;
    flags_ = 0;
  }

  char* stages_;
  WarpState& state_;
  const uint64_t epoch_;
  Sum<Element> sum_;
  uint64_t* flag_ = nullptr;  // lane i: the i-th to be raised
  int flags_ = 0;
  uint32_t flagged_at_ = 0, issued_ = 0, added_ = 0, stored_ = 0;
};

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
  __device__ bool prepare_push(int owner, int token, Task& task) const {
    if (token >= source_tokens_[owner]) return false;
    find_local_rows(owner, token, task);
    if (task.local_lanes == 0) return false;
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
__global__ void __launch_bounds__(kWarps * 32, 1)
    push_and_sum(const __grid_constant__ Exchange ex, const __grid_constant__ CombineArgs args) {
  extern __shared__ __align__(128) char stages[];
  __shared__ WarpState states[kWarps];
  const int operation = kCombineForward + args.channel;
  const uint64_t epoch = current_epoch(ex, operation);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (!wait_all_done(ex, operation, epoch)) return;

  SumRing<Element> ring(stages + warp * kWarpBytes, states[warp], epoch);
  const Tasks tasks(ex, args);
  const int workers = kWarps * gridDim.x, worker = warp * gridDim.x + blockIdx.x;
  const int end = tasks.most_tokens() + kLag * workers;
  // In turn, one token index after the other: a push to each other rank, then a sum at home.
  bool ok = true, finished = false;
  for (int step = 0; ok && !finished; ++step) {
    const int token = worker + step / ex.ranks * workers;
    const int owner = (ex.rank + 1 + step % ex.ranks) % ex.ranks;
    const int home = token - kLag * workers;
    const bool at_home = owner == ex.rank;
    finished = token >= end;

    Task task;
    const bool some = !finished && (at_home ? tasks.prepare_home(home, task)
                                            : tasks.prepare_push(owner, token, task));
    const uint64_t* flag = some && at_home ? tasks.awaited_flag(home) : nullptr;
    bool ready = !flag || load_acquire_system(flag) >= epoch;
    // A warp that has to wait first completes all it has begun, and every rank pushes in rising
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
  if (ok && lane == 0) finish_operation(ex, operation, epoch, workers);
}

template <typename Element>
void launch(const Exchange& ex, const CombineArgs& args) {
  constexpr int shared_bytes = kWarps * kWarpBytes;
  check_cuda(cudaFuncSetAttribute(push_and_sum<Element>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
             "cudaFuncSetAttribute");
  push_and_sum<Element>
      <<<args.sms, kWarps * 32, shared_bytes, static_cast<cudaStream_t>(args.stream)>>>(ex, args);
  check_cuda(cudaGetLastError(), "push_and_sum");
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
