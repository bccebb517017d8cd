// Dispatch: every rank pulls the tokens routed to it and writes them in expert order.
//
// A row crosses the link once for each rank it goes to: it is loaded into shared memory by the bulk
// copy engine and stored from there to all its rows. Pulling needs the tokens in peer memory; the
// copy engine puts them there first (4096 × 14,336 B in about 30 µs), and the rank's own tokens are
// read where they lie.
#include <cuda_runtime.h>

#include <algorithm>

#include "barrier.cuh"

namespace dualpipe {
namespace {

// One SM needs about 140 KB in flight to keep 50 GB/s over the link. Rows of 14,336 B fill
// 5 warps × 3 stages × 14 KB = 215 KB, of which two stages load while one stores.
constexpr int kMaxWarps = 8;
constexpr int kMaxStages = 16;
constexpr int kMinStages = 3;
constexpr int kMaxPiece = 16384;
constexpr int kSharedBytes = 220 * 1024;
constexpr uint32_t kAllLanes = 0xffffffff;

struct Shape {
  int pieces, piece_bytes;  // a row moves in equal pieces, the last one may be shorter
  int stage_bytes, stages, warps;
};

Shape shape_of(const Exchange& ex) {
  Shape shape;
  shape.pieces = (ex.row_bytes() + kMaxPiece - 1) / kMaxPiece;
  shape.piece_bytes = align_up((ex.row_bytes() + shape.pieces - 1) / shape.pieces);
  // Behind the piece: the token's slots, its weights, and which piece it is. Stages start at
  // 128 bytes like the rows: off that, stores from shared memory run at half their speed.
  shape.stage_bytes = align_up(shape.piece_bytes + 2 * ex.topk_stride() * 4 + 16);
  const int total = kSharedBytes / shape.stage_bytes;
  shape.warps = std::min(kMaxWarps, total / kMinStages);
  shape.stages = std::min(kMaxStages, total / shape.warps);
  return shape;
}

// One warp's ring of stages: pieces are loaded ahead, then stored to all their rows in order.
class Ring {
 public:
  __device__ Ring(const Exchange& ex, const DispatchArgs& args, const Shape& shape, char* stages,
                  uint64_t* barriers)
      : ex_(ex), args_(args), shape_(shape), stages_(stages), barriers_(barriers) {
    slots_ = args.plan + PlanLayout(ex).slots;
  }

  // Start loading piece `piece` of the token at row `token` of x and weights, whose slots are row
  // `plan_row` of the plan. Stores the oldest piece first if the ring is full.
  __device__ void issue(const char* x, const char* weights, int token, int64_t plan_row,
                        int piece) {
    if (issued_ - consumed_ == shape_.stages - 1) consume();
    // The stage's last stores have read it once at most the latest group still reads.
    bulk_wait_read<1>();
    __syncwarp();
    const int slot = issued_++ % shape_.stages;
    if (lane() != 0) return;
    char* data = stages_ + slot * shape_.stage_bytes;
    const int offset = piece * shape_.piece_bytes, bytes = piece_bytes(piece);
    const int route_bytes = ex_.topk_stride() * 4;
    *piece_of(data) = piece;
    mbarrier_expect_bytes(&barriers_[slot], bytes + route_bytes * (weights ? 2 : 1));
    bulk_load(data, x + static_cast<int64_t>(token) * ex_.row_bytes() + offset, bytes,
              &barriers_[slot]);
    bulk_load(slots_of(data), slots_ + plan_row * ex_.topk_stride(), route_bytes, &barriers_[slot]);
    if (weights) {
      bulk_load(weights_of(data), weights + static_cast<int64_t>(token) * route_bytes, route_bytes,
                &barriers_[slot]);
    }
  }

  __device__ void drain() {
    while (consumed_ < issued_) consume();
    bulk_wait_all();
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ int piece_bytes(int piece) const {
    return min(shape_.piece_bytes, ex_.row_bytes() - piece * shape_.piece_bytes);
  }
  __device__ int32_t* slots_of(char* data) const {
    return reinterpret_cast<int32_t*>(data + shape_.piece_bytes);
  }
  __device__ float* weights_of(char* data) const {
    return reinterpret_cast<float*>(slots_of(data) + ex_.topk_stride());
  }
  __device__ int* piece_of(char* data) const {
    return reinterpret_cast<int*>(weights_of(data) + ex_.topk_stride());
  }

  // Wait for the oldest piece and store it to each of its rows; lane k serves route k.
  __device__ void consume() {
    const int slot = consumed_ % shape_.stages;
    char* data = stages_ + slot * shape_.stage_bytes;
    __syncwarp();
    mbarrier_wait(&barriers_[slot], consumed_ / shape_.stages & 1);
    const int piece = *piece_of(data);
    const int64_t row = lane() < ex_.topk ? slots_of(data)[lane()] : -1;
    if (row >= 0) {
      bulk_store(
          static_cast<char*>(args_.rows) + row * ex_.row_bytes() + piece * shape_.piece_bytes, data,
          piece_bytes(piece));
      if (args_.row_weight && piece == 0) args_.row_weight[row] = weights_of(data)[lane()];
    }
    bulk_commit();
    ++consumed_;
  }

  const Exchange& ex_;
  const DispatchArgs& args_;
  const Shape& shape_;
  char* stages_;
  uint64_t* barriers_;
  const int32_t* slots_;
  uint32_t issued_ = 0, consumed_ = 0;
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
__device__ bool pull(const Exchange& ex, const DispatchArgs& args, const Shape& shape, Ring& ring,
                     int worker, int workers, uint64_t epoch) {
  const SymmetricLayout symmetric(ex);
  const PlanLayout layout(ex);
  const int operation = kDispatchForward + args.channel;
  const int lane = threadIdx.x % 32;
  const int32_t* arrivals = args.plan + layout.arrivals;
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
      const char* weights =
          args.row_weight ? channel_of(ex, symmetric, p, args.channel) + symmetric.weight : nullptr;
      ring.issue(x, weights, t, static_cast<int64_t>(p) * ex.max_tokens + t,
                 __shfl_sync(kAllLanes, piece, from));
    }
  }
  return true;
}

__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    pull_rows(const __grid_constant__ Exchange ex, const __grid_constant__ DispatchArgs args,
              const __grid_constant__ Shape shape) {
  extern __shared__ __align__(128) char stages[];
  __shared__ uint64_t barriers[kMaxWarps * kMaxStages];
  const int operation = kDispatchForward + args.channel;
  const uint64_t epoch = current_epoch(ex, operation);
  const int warp = threadIdx.x / 32;
  if (__syncthreads_or(aborted(ex))) return;
  if (blockIdx.x == 0 && warp == 0) signal_ready(ex, operation, epoch);

  uint64_t* my_barriers = barriers + warp * kMaxStages;
  if (threadIdx.x % 32 == 0) {
    for (int s = 0; s < shape.stages; ++s) mbarrier_init(&my_barriers[s], 1);
    fence_mbarrier_init();
  }
  __syncwarp();
  const int worker = warp * gridDim.x + blockIdx.x, workers = shape.warps * gridDim.x;
  zero_padding(ex, args, worker, workers);
  Ring ring(ex, args, shape, stages + warp * shape.stages * shape.stage_bytes, my_barriers);
  const bool complete = pull(ex, args, shape, ring, worker, workers, epoch);
  ring.drain();
  if (__syncthreads_and(complete) && threadIdx.x == 0) {
    finish_operation(ex, operation, epoch, gridDim.x);
  }
}

// Before this rank overwrites its tokens in peer memory, everybody must have pulled the last ones.
__global__ void wait_until_free(const __grid_constant__ Exchange ex, int operation) {
  wait_all_done(ex, operation, current_epoch(ex, operation));
}

// Put x and the weights where peers can pull them.
void stage_tokens(const Exchange& ex, const DispatchArgs& args, cudaStream_t stream) {
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

}  // namespace

void launch_dispatch(const Exchange& ex, const DispatchArgs& args) {
  const DeviceGuard guard(ex.device);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  if (args.tokens > 0) stage_tokens(ex, args, stream);
  const Shape shape = shape_of(ex);
  const int shared_bytes = shape.warps * shape.stages * shape.stage_bytes;
  check_cuda(
      cudaFuncSetAttribute(pull_rows, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
      "cudaFuncSetAttribute");
  pull_rows<<<args.sms, shape.warps * 32, shared_bytes, stream>>>(ex, args, shape);
  check_cuda(cudaGetLastError(), "pull_rows");
}

}  // namespace dualpipe
