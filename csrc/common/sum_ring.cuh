// Summing rows: one warp's ring of stages in shared memory, into which pieces are loaded ahead by
// the bulk copy engine, added up in fp32 in order, and their sums stored.
#pragma once

#include <cuda_bf16.h>

#include "common/barrier.cuh"

namespace dualpipe {

// An SM reads 52 GB/s: at 2 µs of latency that needs 104 KB in flight. 192 KB hold
// 16 warps × (4 stages + 2 sums on their way out) × 2 KB. Adding up takes an estimated 45
// instructions for 512 bytes of the 80 that an SM can issue meanwhile, so many warps matter more
// than large pieces.
constexpr int kSumWarps = 16;
constexpr int kStages = 4;
constexpr int kSums = 2;
constexpr int kVectors = 4;                 // 16-byte vectors of a piece in one lane
constexpr int kPiece = 32 * 16 * kVectors;  // 2 KB; the last piece of a row may be shorter
constexpr int kSumWarpBytes = (kStages + kSums) * kPiece;
// A flag costs a fence, by estimate 2 µs: several share one, some stores after their own, so that
// these have arrived by then.
constexpr int kFlagBatch = 3;
constexpr int kFlagDelay = 2;

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
struct SumLoad {
  char* target;    // where the finished sum goes, null while more pieces follow
  uint64_t* flag;  // raised once the sum has arrived there, or null
  int bytes;
};

struct alignas(16) SumState {
  uint64_t loaded[kStages];  // mbarriers
  SumLoad loads[kStages];
};

// One warp's ring: pieces are loaded ahead, added up in order, and their sums stored.
template <typename Element>
class SumRing {
 public:
  __device__ SumRing(char* stages, SumState& state, uint64_t epoch)
      : stages_(stages), state_(state), epoch_(epoch) {
    if (lane() == 0) {
      for (int s = 0; s < kStages; ++s) mbarrier_init(&state.loaded[s], 1);
      fence_mbarrier_init();
    }
    __syncwarp();
    clear();
  }

  // Load a piece ahead; add up the oldest one first if the ring is full.
  __device__ void issue(const char* source, const SumLoad& load) {
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
    const SumLoad load = state_.loads[stage];
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

  __device__ void store_sum(const SumLoad& load) {
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
  SumState& state_;
  const uint64_t epoch_;
  Sum<Element> sum_;
  uint64_t* flag_ = nullptr;  // lane i: the i-th to be raised
  int flags_ = 0;
  uint32_t flagged_at_ = 0, issued_ = 0, added_ = 0, stored_ = 0;
};

}  // namespace dualpipe
