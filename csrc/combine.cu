// Combine: sum every token's rows on the experts' side in fp32, push one partial sum a (token,
// rank) over the link, and sum the partials at home.
//
// Both halves are the same work, a sum of rows, and run interleaved in one kernel: a warp pushes
// the partials of one token index to every other rank, then sums its own token of kLag indices ago,
// whose partials have arrived meanwhile. A rank's own experts need no partial: their rows are
// summed at home. The bulk copy engine loads the rows ahead into shared memory and stores the sums.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "barrier.cuh"

namespace dualpipe {
namespace {

// An SM reads 52 GB/s: at 2 µs of latency that needs 104 KB in flight. A row of 14,336 B moves in
// 4 pieces of 3,584 B; 220 KB hold 10 warps × (4 stages + 2 sums on their way out) × 3,584 B.
constexpr int kMaxWarps = 12;
constexpr int kMaxStages = 8;
constexpr int kMinStages = 4;
constexpr int kSums = 2;
constexpr int kVectors = 8;                    // 16-byte vectors of a piece in one lane
constexpr int kMaxPiece = 32 * 16 * kVectors;  // 4 KB
constexpr int kSharedBytes = 220 * 1024;
constexpr int kLag = 2;  // token indices between a push and the sum at home
constexpr int kFlagDelay =
    2;  // stores that follow a partial's last piece before its flag is raised
constexpr uint32_t kAllLanes = 0xffffffff;

struct Shape {
  int pieces, piece_bytes;  // a row moves in equal pieces, the last one may be shorter
  int stages, warps;
};

Shape shape_of(const Exchange& ex) {
  Shape shape;
  shape.pieces = (ex.row_bytes() + kMaxPiece - 1) / kMaxPiece;
  // Shared memory aligned like the rows: 128 bytes keep the copy engine at full speed.
  shape.piece_bytes = align_up((ex.row_bytes() + shape.pieces - 1) / shape.pieces);
  const int total = kSharedBytes / shape.piece_bytes;
  shape.warps = std::min(kMaxWarps, total / (kMinStages + kSums));
  shape.stages = std::min(kMaxStages, total / shape.warps - kSums);
  return shape;
}

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
  uint64_t loaded[kMaxStages];  // mbarriers
  Load loads[kMaxStages];
};

// One warp's ring: pieces are loaded ahead, added up in order, and their sums stored.
template <typename Element>
class SumRing {
 public:
  __device__ SumRing(const Shape& shape, char* stages, WarpState& state, uint64_t epoch)
      : shape_(shape), stages_(stages), state_(state), epoch_(epoch) {
    if (lane() == 0) {
      for (int s = 0; s < shape.stages; ++s) mbarrier_init(&state.loaded[s], 1);
      fence_mbarrier_init();
    }
    __syncwarp();
    clear();
  }

  // Load a piece ahead; add up the oldest one first if the ring is full.
  __device__ void issue(const char* source, const Load& load) {
    if (issued_ - added_ == shape_.stages) add_oldest();
    const int stage = issued_++ % shape_.stages;
    __syncwarp();  // every lane has read what the stage held
    if (lane() == 0) {
      state_.loads[stage] = load;
      mbarrier_expect_bytes(&state_.loaded[stage], load.bytes);
      bulk_load(stages_ + stage * shape_.piece_bytes, source, load.bytes, &state_.loaded[stage]);
    }
  }

  // Finish everything issued, and raise the last flag.
  __device__ void drain() {
    while (added_ < issued_) add_oldest();
    bulk_wait_all();
    raise_flag();
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) sum_.clear(i);
  }

  __device__ void add_oldest() {
    const int stage = added_ % shape_.stages;
    __syncwarp();
    mbarrier_wait(&state_.loaded[stage], added_ / shape_.stages & 1);
    ++added_;
    const Load load = state_.loads[stage];
    const char* data = stages_ + stage * shape_.piece_bytes + lane() * 16;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (lane() * 16 + i * 512 < load.bytes) {
        sum_.add(i, *reinterpret_cast<const uint4*>(data + i * 512));
      }
    }
    if (load.target) store_sum(load);
  }

  __device__ void store_sum(const Load& load) {
    // The store of kSums pieces ago has left this buffer.
    bulk_wait_read<kSums - 1>();
    __syncwarp();
    char* sum = stages_ + (shape_.stages + stored_++ % kSums) * shape_.piece_bytes;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (lane() * 16 + i * 512 < load.bytes) {
        *reinterpret_cast<uint4*>(sum + lane() * 16 + i * 512) = sum_.packed(i);
      }
    }
    clear();
    fence_proxy_async();
    __syncwarp();
    if (lane() != 0) return;
    bulk_store(load.target, sum, load.bytes);
    bulk_commit();
    if (flag_ && stored_ - flagged_at_ >= kFlagDelay) {
      bulk_wait<kFlagDelay>();
      raise_flag();
    }
    if (load.flag) {
      // Rows are at least one piece, so at most one flag waits: a delayed one was raised above,
      // or is raised now.
      if (flag_) {
        bulk_wait<1>();
        raise_flag();
      }
      flag_ = load.flag;
      flagged_at_ = stored_;
    }
  }

  // Only in lane 0, after the stores before the flag have completed.
  __device__ void raise_flag() {
    if (lane() != 0 || !flag_) return;
    fence_proxy_async();
    store_release_system(flag_, epoch_);
    flag_ = nullptr;
  }

  const Shape& shape_;
  char* stages_;
  WarpState& state_;
  const uint64_t epoch_;
  Sum<Element> sum_;
  uint64_t* flag_ = nullptr;  // of the latest partial, once it has arrived
  uint32_t flagged_at_ = 0, issued_ = 0, added_ = 0, stored_ = 0;
};

// One warp's share of a combine.
template <typename Element>
class Combiner {
 public:
  __device__ Combiner(const Exchange& ex, const CombineArgs& args, const Shape& shape,
                      SumRing<Element>& ring, uint64_t epoch)
      : ex_(ex), args_(args), shape_(shape), ring_(ring), epoch_(epoch) {
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

  // Sum and send what this rank's experts have for token `token` of every other rank.
  __device__ void push(int token) {
    for (int i = 1; i < ex_.ranks; ++i) {
      const int owner = (ex_.rank + i) % ex_.ranks;
      if (token < source_tokens_[owner]) push_to(owner, token);
    }
  }

  // Sum this rank's own token: rows of local experts, then the partials in rank order.
  // False if a partial never came.
  __device__ bool sum_at_home(int token) {
    const int slot = slot_of_lane(ex_.rank, token);
    const uint32_t others = ranks_of(ex_.rank, token) & ~(1u << ex_.rank);
    if (!wait_for_partials(token, others)) return false;
    char* y = static_cast<char*>(args_.y) + static_cast<int64_t>(token) * ex_.row_bytes();
    const uint32_t local = __ballot_sync(kAllLanes, slot >= 0);
    if (local == 0 && others == 0) {
      for (int i = lane() * 16; i < ex_.row_bytes(); i += 512) {
        store_16(y + i, make_uint4(0, 0, 0, 0));
      }
    }
    const int partials = __popc(others);
    for (int piece = 0; piece < shape_.pieces; ++piece) {
      add_local_rows(slot, local, piece, partials == 0 ? y : nullptr, nullptr);
      for (int i = 0; i < partials; ++i) {
        add(partial_row(ex_.rank, token, i), piece, i == partials - 1 ? y : nullptr, nullptr);
      }
    }
    if (args_.topk_weight && lane() < ex_.topk) return_weight(token, slot);
    return true;
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
  // Lane k: the row here of route k, or −1.
  __device__ int slot_of_lane(int source, int token) const {
    const int64_t at = (static_cast<int64_t>(source) * ex_.max_tokens + token) * ex_.topk_stride();
    return lane() < ex_.topk ? slots_[at + lane()] : -1;
  }
  __device__ uint32_t ranks_of(int source, int token) const {
    return token_ranks_[source * ex_.max_tokens + token];
  }

  // Add a piece of `row`; with a target, the sum is complete and goes there.
  __device__ void add(const char* row, int piece, char* target, uint64_t* flag) {
    const int offset = piece * shape_.piece_bytes;
    const int bytes = min(shape_.piece_bytes, ex_.row_bytes() - offset);
    ring_.issue(row + offset, {target ? target + offset : nullptr, flag, bytes});
  }

  __device__ void add_local_rows(int slot, uint32_t lanes, int piece, char* target,
                                 uint64_t* flag) {
    while (lanes != 0) {
      const int64_t row = __shfl_sync(kAllLanes, slot, __ffs(lanes) - 1);
      lanes &= lanes - 1;
      const bool last = lanes == 0;
      add(static_cast<const char*>(args_.rows) + row * ex_.row_bytes(), piece,
          last ? target : nullptr, last ? flag : nullptr);
    }
  }

  __device__ void push_to(int owner, int token) {
    const int slot = slot_of_lane(owner, token);
    const uint32_t lanes = __ballot_sync(kAllLanes, slot >= 0);
    if (lanes == 0) return;
    // The partial's place: how many other ranks below this one also serve the token.
    const uint32_t others = ranks_of(owner, token) & ~(1u << owner);
    char* target = partial_row(owner, token, __popc(others & ((1u << ex_.rank) - 1)));
    if (args_.row_weight && slot >= 0) {
      partial_weight(owner, token)[lane()] = args_.row_weight[slot];
    }
    for (int piece = 0; piece < shape_.pieces; ++piece) {
      const bool last = piece == shape_.pieces - 1;
      add_local_rows(slot, lanes, piece, target,
                     last ? partial_flag(owner, ex_.rank, token) : nullptr);
    }
  }

  // A warp that has to wait first finishes all it has begun: others may be waiting for that.
  __device__ bool wait_for_partials(int token, uint32_t others) {
    const bool expected = others >> lane() & 1;
    const uint64_t* flag = expected ? partial_flag(ex_.rank, lane(), token) : nullptr;
    bool ok = !expected || load_acquire_system(flag) >= epoch_;
    if (!__all_sync(kAllLanes, ok)) {
      ring_.drain();
      __syncwarp();
      if (!ok) {
        ok = wait_for(ex_, flag, epoch_, kCombineForward + args_.channel, kDataReady, lane());
      }
    }
    fence_proxy_async();
    return __all_sync(kAllLanes, ok);
  }

  __device__ void return_weight(int token, int slot) const {
    const int64_t at = static_cast<int64_t>(token) * ex_.topk + lane();
    const int expert = args_.topk_idx[at];
    const bool dropped = expert < 0 || expert >= ex_.experts;
    args_.topk_weight[at] = slot >= 0 ? args_.row_weight[slot]
                            : dropped ? 0.0f
                                      : __ldcg(partial_weight(ex_.rank, token) + lane());
  }

  const Exchange& ex_;
  const CombineArgs& args_;
  const Shape& shape_;
  SumRing<Element>& ring_;
  const uint64_t epoch_;
  int64_t partials_at_, partial_weights_at_, flags_at_;  // in every rank's symmetric buffer
  const int32_t *slots_, *token_ranks_, *source_tokens_;
};

template <typename Element>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    push_and_sum(const __grid_constant__ Exchange ex, const __grid_constant__ CombineArgs args,
                 const __grid_constant__ Shape shape) {
  extern __shared__ __align__(128) char stages[];
  __shared__ WarpState states[kMaxWarps];
  const int operation = kCombineForward + args.channel;
  const uint64_t epoch = current_epoch(ex, operation);
  const int warp = threadIdx.x / 32;
  if (!wait_all_done(ex, operation, epoch)) return;

  SumRing<Element> ring(shape, stages + warp * (shape.stages + kSums) * shape.piece_bytes,
                        states[warp], epoch);
  Combiner<Element> combiner(ex, args, shape, ring, epoch);
  int most_tokens = 0;
  const int32_t* source_tokens = args.plan + PlanLayout(ex).source_tokens;
  for (int p = 0; p < ex.ranks; ++p) most_tokens = max(most_tokens, source_tokens[p]);
  const int workers = shape.warps * gridDim.x, worker = warp * gridDim.x + blockIdx.x;
  // Every rank pushes token indices in rising order, each ahead of the sums of lower ones, and
  // waits with nothing of its own outstanding: the lowest sum that waits can always proceed.
  bool ok = true;
  for (int token = worker; ok && token < most_tokens + kLag * workers; token += workers) {
    if (token < most_tokens) combiner.push(token);
    const int home = token - kLag * workers;
    if (home >= 0 && home < args.tokens) ok = combiner.sum_at_home(home);
  }
  ring.drain();
  __syncwarp();
  if (ok && threadIdx.x % 32 == 0) finish_operation(ex, operation, epoch, workers);
}

template <typename Element>
void launch(const Exchange& ex, const CombineArgs& args) {
  const Shape shape = shape_of(ex);
  const int shared_bytes = shape.warps * (shape.stages + kSums) * shape.piece_bytes;
  check_cuda(cudaFuncSetAttribute(push_and_sum<Element>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
             "cudaFuncSetAttribute");
  push_and_sum<Element>
      <<<args.sms, shape.warps * 32, shared_bytes, static_cast<cudaStream_t>(args.stream)>>>(
          ex, args, shape);
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
