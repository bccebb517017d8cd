// Moving rows: one warp's ring of stages in shared memory, through which each row is loaded once by
// the bulk copy engine and stored to all the places it goes to.
#pragma once

#include "common/barrier.cuh"

namespace dualpipe {

// One SM needs about 140 KB in flight to keep 50 GB/s over the link. Rows of 14,336 B fill
// 5 warps × 3 stages × 14 KB = 215 KB, of which two stages load while one stores.
constexpr int kRingMaxWarps = 8;
constexpr int kRingMaxStages = 16;
constexpr int kRingMinStages = 3;
constexpr int kRingMaxPiece = 16384;
constexpr int kRingSharedBytes = 220 * 1024;

struct RingShape {
  int row_bytes;
  int pieces, piece_bytes;        // a row moves in equal pieces, the last one may be shorter
  int index_bytes, weight_bytes;  // what travels into the stage behind a piece
  int stage_bytes, stages, warps;

  RingShape(const Exchange& ex, int index_ints) {
    const auto smaller = [](int a, int b) { return a < b ? a : b; };
    row_bytes = ex.row_bytes();
    pieces = (row_bytes + kRingMaxPiece - 1) / kRingMaxPiece;
    piece_bytes = align_up((row_bytes + pieces - 1) / pieces);
    index_bytes = index_ints * 4;
    weight_bytes = ex.topk_stride() * 4;
    // Stages start at 128 bytes like the rows: off that, stores from shared memory run at half
    // their speed.
    stage_bytes = align_up(piece_bytes + index_bytes + weight_bytes + 16);
    const int total = kRingSharedBytes / stage_bytes;
    warps = smaller(kRingMaxWarps, total / kRingMinStages);
    stages = smaller(kRingMaxStages, total / warps);
  }
  int shared_bytes() const { return warps * stages * stage_bytes; }
};

// `Fanout` says where a row goes: bool ready(), before the first store; char* row(lane, indices),
// the lane's target or null; void weights(lane, indices, weights), once a row for such a lane.
template <typename Fanout>
class RowRing {
 public:
  __device__ RowRing(const RingShape& shape, Fanout& fanout, char* stages, uint64_t* barriers)
      : shape_(shape), fanout_(fanout), stages_(stages), barriers_(barriers) {
    if (lane() == 0) {
      for (int s = 0; s < shape.stages; ++s) mbarrier_init(&barriers[s], 1);
      fence_mbarrier_init();
    }
    __syncwarp();
  }

  // Start loading piece `piece` of `row`, with its indices and, unless null, its weights. Stores
  // the oldest piece first if the ring is full. Returns false if the targets never became ready.
  __device__ bool issue(const char* row, const int32_t* indices, const float* weights, int piece) {
    if (issued_ - consumed_ == shape_.stages - 1 && !consume()) return false;
    // The stage's last stores have read it once at most the latest group still reads.
    bulk_wait_read<1>();
    __syncwarp();
    const int slot = issued_++ % shape_.stages;
    if (lane() != 0) return true;
    char* data = stages_ + slot * shape_.stage_bytes;
    *piece_of(data) = weights ? piece : piece | kNoWeights;
    mbarrier_expect_bytes(&barriers_[slot], bytes_of(piece) + shape_.index_bytes +
                                                (weights ? shape_.weight_bytes : 0));
    bulk_load(data, row + piece * shape_.piece_bytes, bytes_of(piece), &barriers_[slot]);
    bulk_load(indices_of(data), indices, shape_.index_bytes, &barriers_[slot]);
    if (weights) bulk_load(weights_of(data), weights, shape_.weight_bytes, &barriers_[slot]);
    return true;
  }

  // Store what is left, and wait until everything has arrived.
  __device__ bool drain() {
    bool ok = true;
    while (ok && consumed_ < issued_) ok = consume();
    for (; consumed_ < issued_; ++consumed_) {  // no load may outlive the CTA
      mbarrier_wait(&barriers_[consumed_ % shape_.stages], consumed_ / shape_.stages & 1);
    }
    bulk_wait_all();
    return ok;
  }

 private:
  static constexpr int kNoWeights = 1 << 30;

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ int bytes_of(int piece) const {
    return min(shape_.piece_bytes, shape_.row_bytes - piece * shape_.piece_bytes);
  }
  __device__ int32_t* indices_of(char* data) const {
    return reinterpret_cast<int32_t*>(data + shape_.piece_bytes);
  }
  __device__ float* weights_of(char* data) const {
    return reinterpret_cast<float*>(data + shape_.piece_bytes + shape_.index_bytes);
  }
  __device__ int* piece_of(char* data) const {
    return reinterpret_cast<int*>(data + shape_.piece_bytes + shape_.index_bytes +
                                  shape_.weight_bytes);
  }

  // Wait for the oldest piece and store it to each of its places, a lane a place.
  __device__ bool consume() {
    if (consumed_ == 0 && !fanout_.ready()) return false;
    const int slot = consumed_ % shape_.stages;
    char* data = stages_ + slot * shape_.stage_bytes;
    __syncwarp();
    mbarrier_wait(&barriers_[slot], consumed_ / shape_.stages & 1);
    const int word = *piece_of(data), piece = word & ~kNoWeights;
    char* target = fanout_.row(lane(), indices_of(data));
    if (target) {
      bulk_store(target + piece * shape_.piece_bytes, data, bytes_of(piece));
      if (word == 0) fanout_.weights(lane(), indices_of(data), weights_of(data));
    }
    bulk_commit();
    ++consumed_;
    return true;
  }

  const RingShape& shape_;
  Fanout& fanout_;
  char* stages_;
  uint64_t* barriers_;
  uint32_t issued_ = 0, consumed_ = 0;
};

}  // namespace dualpipe
