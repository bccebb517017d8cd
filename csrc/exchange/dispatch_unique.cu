// Dispatch of unique rows: every rank pushes its tokens into the inboxes of the ranks they go to,
// where compute kernels expand them into expert order. Or it packs them for the copy
// engines.
//
// A row is read once, where it lies, and stored from shared memory to every rank: 8 SMs fill the
// link. As fp8 it is quantised on the way, 1 × 128 columns a scale (DeepSeek-V3 report, section
// 3.3.2). An operation begins when the peers have begun it, which tells that their inboxes are
// free, and ends when all data has arrived here.
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "common/row_ring.cuh"

namespace dualpipe {
namespace {

constexpr uint32_t kAllLanes = 0xffffffff;

// Where rows for each rank go: into this rank's part of their inboxes, or, to be packed, into their
// part of its outbox.
struct Targets {
  const Exchange& ex;
  SymmetricLayout layout;
  int channel;
  bool pack;

  __device__ Targets(const Exchange& exchange, int channel, bool pack)
      : ex(exchange), layout(exchange), channel(channel), pack(pack) {}

  __device__ char* row(int rank, int row, int row_bytes) const {
    return at(rank, row, pack ? layout.outbox : layout.inbox, row_bytes);
  }
  __device__ float* weights(int rank, int row) const {
    return reinterpret_cast<float*>(
        at(rank, row, pack ? layout.outbox_weight : layout.inbox_weight, ex.topk_stride() * 4));
  }
  __device__ float* scales(int rank, int row) const {
    return reinterpret_cast<float*>(
        at(rank, row, pack ? layout.outbox_scale : layout.inbox_scale, ex.scale_stride() * 4));
  }

 private:
  __device__ char* at(int rank, int row, int64_t box, int row_bytes) const {
    const int64_t place = static_cast<int64_t>(pack ? rank : ex.rank) * ex.max_tokens + row;
    return channel_of(ex, layout, pack ? ex.rank : rank, channel) + box + place * row_bytes;
  }
};

// Call with all threads, once this CTA's stores have arrived: the last CTA tells every rank, and
// waits for the data of all of them.
__device__ void finish_push(const Exchange& ex, int operation, uint64_t epoch) {
  __shared__ bool last;
  Signals* mine = signals_of(ex, ex.rank, operation);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    last = add_acq_rel_gpu(&mine->arrived, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x >= 32) return;
  signal_ready(ex, operation, epoch);
  const int lane = threadIdx.x;
  if (lane < ex.ranks) {
    wait_for(ex, &mine->ready[lane], epoch, operation, kDataReady, lane);
  }
  __syncwarp();
  if (lane == 0) {
    mine->arrived = 0;
    mine->epoch = epoch;
  }
}

// A row goes to every rank that has an expert of its token; lane q serves rank q.
struct Ranks {
  const Exchange& ex;
  const Targets targets;
  int operation;
  uint64_t epoch;

  __device__ bool ready() const { return targets.pack || wait_begun(ex, operation, epoch); }
  __device__ char* row(int lane, const int32_t* rows) const {
    const int row = lane < ex.ranks ? rows[lane] : -1;
    return row < 0 ? nullptr : targets.row(lane, row, ex.row_bytes());
  }
  __device__ void weights(int lane, const int32_t* rows, const float* weights) const {
    bulk_store(targets.weights(lane, rows[lane]), weights, ex.topk_stride() * 4);
  }
};

__global__ void __launch_bounds__(kRingMaxWarps * 32, 1)
    push_rows(const __grid_constant__ Exchange ex, const __grid_constant__ PushArgs args,
              const __grid_constant__ RingShape shape) {
  extern __shared__ __align__(128) char stages[];
  __shared__ uint64_t barriers[kRingMaxWarps * kRingMaxStages];
  __shared__ int next;
  const int operation = kDispatchForward + args.channel;
  const uint64_t epoch = current_epoch(ex, operation);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) next = 0;
  if (__syncthreads_or(aborted(ex))) return;
  if (blockIdx.x == 0 && warp == 0 && !args.pack) signal_begun(ex, operation, epoch);

  Ranks ranks{ex, Targets(ex, args.channel, args.pack), operation, epoch};
  RowRing<Ranks> ring(shape, ranks, stages + warp * shape.stages * shape.stage_bytes,
                      barriers + warp * kRingMaxStages);
  const int32_t* send_rows = args.plan + PlanLayout(ex).send_rows;
  const int units = args.tokens * shape.pieces;
  bool ok = true;
  while (ok) {
    const int taken = __shfl_sync(kAllLanes, lane == 0 ? atomicAdd(&next, 1) : 0, 0);
    const int unit = taken * gridDim.x + blockIdx.x;
    if (unit >= units) break;
    const int64_t token = unit / shape.pieces;
    ok = ring.issue(static_cast<const char*>(args.x) + token * shape.row_bytes,
                    send_rows + token * ex.rank_stride(),
                    args.topk_weight ? args.topk_weight + token * ex.topk_stride() : nullptr,
                    unit - static_cast<int>(token) * shape.pieces);
  }
  ok = ring.drain() && ok;
  fence_proxy_async_global();
  if (__syncthreads_and(ok) && !args.pack) finish_push(ex, operation, epoch);
}

// Quantising: 16 warps × 2 × (4 KB of bf16 + 2 KB of fp8 with scales) = 200 KB. Rows of 7168 are
// three pieces and a half, all of whole groups.
constexpr int kQuantWarps = 16;
constexpr int kQuantColumns = 2048;
constexpr int kQuantGroup = 1024;  // columns that a warp quantises at once
constexpr int kBlock = 128;        // columns that share a scale
constexpr float kLargest = 448.0f;
constexpr float kSmallestMaximum = 1e-4f;

struct QuantShape {
  int pieces, columns;  // of a piece; the last one may have fewer
  int in_bytes, out_bytes;

  explicit QuantShape(const Exchange& ex) {
    const int groups = (ex.hidden + kQuantGroup - 1) / kQuantGroup * kQuantGroup;
    columns = groups < kQuantColumns ? groups : kQuantColumns;
    pieces = (ex.hidden + columns - 1) / columns;
    in_bytes = columns * 2;
    out_bytes = columns + static_cast<int>(align_up(columns / kBlock * 4));
  }
  DUALPIPE_HD int warp_bytes() const { return 2 * (in_bytes + out_bytes); }
};

// The largest size of the eight bf16 in a vector.
__device__ __forceinline__ float largest_size(const uint4& raw) {
  const auto pair = [](const uint32_t& word) {
    return *reinterpret_cast<const __nv_bfloat162*>(&word);
  };
  const __nv_bfloat162 low = __hmax2(__habs2(pair(raw.x)), __habs2(pair(raw.y)));
  const __nv_bfloat162 high = __hmax2(__habs2(pair(raw.z)), __habs2(pair(raw.w)));
  const float2 largest = __bfloat1622float2(__hmax2(low, high));
  return fmaxf(largest.x, largest.y);
}

// Eight bf16 to fp8.
__device__ __forceinline__ uint2 to_fp8(const uint4& raw, float factor) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 scaled = make_float2(__fmul_rn(__uint_as_float(words[i] << 16), factor),
                                      __fmul_rn(__uint_as_float(words[i] & 0xffff0000u), factor));
    pairs[i] = __nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, __NV_E4M3);
  }
  return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

// Quantise up to 1024 bf16 into fp8 and their scales. A half warp has 128 columns at a time, 8 a
// lane, and four such at once: their maxima meet in one butterfly, which leaves each quarter of the
// half warp with one of them, so that a single division serves all four. Without the bounds checks
// the four interleave.
template <bool kFull>
__device__ __forceinline__ void quantize_group(const char* in, char* out, float* scales,
                                               int columns) {
  const int lane = threadIdx.x % 32;
  const bool upper = lane & 8, odd = lane & 4;
  uint4 raw[4];
  float maximum[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = i * 256 + lane * 8;
    raw[i] = make_uint4(0, 0, 0, 0);
    if (kFull || column < columns) raw[i] = *reinterpret_cast<const uint4*>(in + column * 2);
    maximum[i] = largest_size(raw[i]);
  }
  float kept[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float given = __shfl_xor_sync(kAllLanes, upper ? maximum[i] : maximum[2 + i], 8);
    kept[i] = fmaxf(upper ? maximum[2 + i] : maximum[i], given);
  }
  float mine =
      fmaxf(odd ? kept[1] : kept[0], __shfl_xor_sync(kAllLanes, odd ? kept[0] : kept[1], 4));
  mine = fmaxf(mine, __shfl_xor_sync(kAllLanes, mine, 2));
  mine = fmaxf(mine, __shfl_xor_sync(kAllLanes, mine, 1));
  mine = fmaxf(mine, kSmallestMaximum);
  const float factor = __fdiv_rn(kLargest, mine);
  const int block = (upper ? 4 : 0) + (odd ? 2 : 0) + lane / 16;
  if (lane % 4 == 0 && (kFull || block * kBlock < columns)) {
    scales[block] = __fdiv_rn(mine, kLargest);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = i * 256 + lane * 8;
    const uint2 packed = to_fp8(raw[i], __shfl_sync(kAllLanes, factor, (lane & 16) | i << 2));
    if (kFull || column < columns) *reinterpret_cast<uint2*>(out + column) = packed;
  }
}

__device__ void quantize(const char* in, char* out, float* scales, int columns) {
  int first = 0;
  for (; first + kQuantGroup <= columns; first += kQuantGroup) {
    quantize_group<true>(in + first * 2, out + first, scales + first / kBlock, kQuantGroup);
  }
  if (first < columns) {
    quantize_group<false>(in + first * 2, out + first, scales + first / kBlock, columns - first);
  }
}

__global__ void __launch_bounds__(kQuantWarps * 32, 1)
    push_fp8(const __grid_constant__ Exchange ex, const __grid_constant__ PushArgs args,
             const __grid_constant__ QuantShape shape) {
  extern __shared__ __align__(128) char buffers[];
  __shared__ uint64_t barriers[kQuantWarps][2];
  __shared__ int next;
  const int operation = kDispatchForward + args.channel;
  const uint64_t epoch = current_epoch(ex, operation);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) next = 0;
  if (__syncthreads_or(aborted(ex))) return;
  if (blockIdx.x == 0 && warp == 0 && !args.pack) signal_begun(ex, operation, epoch);

  if (lane == 0) {
    for (uint64_t& barrier : barriers[warp]) mbarrier_init(&barrier, 1);
    fence_mbarrier_init();
  }
  __syncwarp();
  char* mine = buffers + warp * shape.warp_bytes();
  const auto in = [&](uint32_t n) { return mine + n % 2 * shape.in_bytes; };
  const auto out = [&](uint32_t n) { return mine + 2 * shape.in_bytes + n % 2 * shape.out_bytes; };
  const Targets targets(ex, args.channel, args.pack);
  const int32_t* send_rows = args.plan + PlanLayout(ex).send_rows;
  const int units = args.tokens * shape.pieces;

  // The next piece is fetched, with lane q's place in rank q's inbox, while this one is quantised.
  struct Piece {
    int token, column, columns;  // columns 0: there is none
    int row;
  };
  uint32_t fetched = 0;
  const auto fetch = [&] {
    const int taken = __shfl_sync(kAllLanes, lane == 0 ? atomicAdd(&next, 1) : 0, 0);
    const int unit = taken * gridDim.x + blockIdx.x;
    Piece piece{0, 0, 0, -1};
    if (unit >= units) return piece;
    piece.token = unit / shape.pieces;
    piece.column = (unit - piece.token * shape.pieces) * shape.columns;
    piece.columns = min(shape.columns, ex.hidden - piece.column);
    if (lane == 0) {
      const char* row =
          static_cast<const char*>(args.x) + static_cast<int64_t>(piece.token) * ex.row_bytes();
      uint64_t* barrier = &barriers[warp][fetched % 2];
      mbarrier_expect_bytes(barrier, piece.columns * 2);
      bulk_load(in(fetched), row + piece.column * 2, piece.columns * 2, barrier);
    }
    if (lane < ex.ranks) piece.row = send_rows[piece.token * ex.rank_stride() + lane];
    ++fetched;
    return piece;
  };

  Piece piece = fetch();
  const bool ok = args.pack || wait_begun(ex, operation, epoch);
  // No load may outlive the CTA.
  if (!ok && piece.columns > 0) mbarrier_wait(&barriers[warp][0], 0);
  for (uint32_t n = 0; ok && piece.columns > 0; ++n) {
    const Piece ahead = fetch();
    bulk_wait_read<1>();  // the stores of two pieces ago have left this buffer
    __syncwarp();
    mbarrier_wait(&barriers[warp][n % 2], n / 2 & 1);
    char* data = out(n);
    float* scales = reinterpret_cast<float*>(data + shape.columns);
    quantize(in(n), data, scales, piece.columns);
    fence_proxy_async_shared();
    __syncwarp();
    if (piece.row >= 0) {
      bulk_store(targets.row(lane, piece.row, ex.hidden) + piece.column, data, piece.columns);
    }
    bulk_commit();
    // The small rest by ordinary stores: its sizes need not be multiples of 16 bytes.
    for (uint32_t left = __ballot_sync(kAllLanes, piece.row >= 0); left != 0; left &= left - 1) {
      const int rank = __ffs(left) - 1;
      const int there = __shfl_sync(kAllLanes, piece.row, rank);
      if (lane * kBlock < piece.columns) {
        targets.scales(rank, there)[piece.column / kBlock + lane] = scales[lane];
      }
      if (args.topk_weight && piece.column == 0 && lane < ex.topk) {
        targets.weights(rank, there)[lane] =
            args.topk_weight[static_cast<int64_t>(piece.token) * ex.topk_stride() + lane];
      }
    }
    __syncwarp();
    piece = ahead;
  }
  bulk_wait_all();
  fence_proxy_async_global();
  __threadfence_system();
  if (__syncthreads_and(ok) && !args.pack) finish_push(ex, operation, epoch);
}

// Rows one behind the other to every other rank in turn, one thread a warp.
__global__ void __launch_bounds__(kRingMaxWarps * 32, 1)
    push_ceiling(const __grid_constant__ Exchange ex, const char* x, int tokens, int rows,
                 const __grid_constant__ RingShape shape) {
  extern __shared__ __align__(128) char stages[];
  __shared__ uint64_t loaded[kRingMaxWarps * kRingMaxStages];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Targets targets(ex, 0, false);
  const int64_t units = static_cast<int64_t>(rows) * (ex.ranks - 1) * shape.pieces;
  const int64_t step = static_cast<int64_t>(shape.warps) * gridDim.x;
  const int64_t first = warp * gridDim.x + blockIdx.x;
  if (lane != 0) return;
  uint64_t* barriers = loaded + warp * kRingMaxStages;
  for (int s = 0; s < shape.stages; ++s) mbarrier_init(&barriers[s], 1);
  fence_mbarrier_init();
  const auto bytes_of = [&](int64_t unit) {
    return min(shape.piece_bytes,
               shape.row_bytes - static_cast<int>(unit % shape.pieces) * shape.piece_bytes);
  };
  const auto load = [&](int64_t n) {
    const int64_t unit = first + n * step;
    if (unit >= units) return;
    const int slot = n % shape.stages;
    const int64_t row = unit / shape.pieces / (ex.ranks - 1) % tokens;
    mbarrier_expect_bytes(&barriers[slot], bytes_of(unit));
    bulk_load(stages + (warp * shape.stages + slot) * shape.stage_bytes,
              x + row * shape.row_bytes + unit % shape.pieces * shape.piece_bytes, bytes_of(unit),
              &barriers[slot]);
  };
  for (int n = 0; n < shape.stages - 1; ++n) load(n);
  for (int64_t n = 0; first + n * step < units; ++n) {
    bulk_wait_read<1>();
    load(n + shape.stages - 1);
    const int64_t unit = first + n * step, row = unit / shape.pieces;
    const int slot = n % shape.stages;
    mbarrier_wait(&barriers[slot], n / shape.stages & 1);
    const int target = (ex.rank + 1 + row % (ex.ranks - 1)) % ex.ranks;
    bulk_store(targets.row(target, row / (ex.ranks - 1) % ex.max_tokens, shape.row_bytes) +
                   unit % shape.pieces * shape.piece_bytes,
               stages + (warp * shape.stages + slot) * shape.stage_bytes, bytes_of(unit));
    bulk_commit();
  }
  bulk_wait_all();
}

}  // namespace

void launch_push(const Exchange& ex, const PushArgs& args) {
  const DeviceGuard guard(ex.device);
  if (args.fp8) {
    const QuantShape shape(ex);
    launch_on_sms("push_fp8", push_fp8, args.sms, kQuantWarps * 32,
                  kQuantWarps * shape.warp_bytes(), args.stream, ex, args, shape);
  } else {
    const RingShape shape(ex, ex.rank_stride());
    launch_on_sms("push_rows", push_rows, args.sms, shape.warps * 32, shape.shared_bytes(),
                  args.stream, ex, args, shape);
  }
}

void launch_push_ceiling(const Exchange& ex, const void* x, int tokens, int rows, int sms,
                         void* stream) {
  const DeviceGuard guard(ex.device);
  const RingShape shape(ex, ex.rank_stride());
  launch_on_sms("push_ceiling", push_ceiling, sms, shape.warps * 32, shape.shared_bytes(), stream,
                ex, static_cast<const char*>(x), tokens, rows, shape);
}

}  // namespace dualpipe
