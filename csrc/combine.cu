// Combine: sum every token's rows on the experts' side in fp32, push one partial sum a (token,
// rank) over the link, and sum the partials at home.
//
// Both halves run in one kernel and overlap: the push of a tile of tokens is followed by the sum of
// the tile before it, whose partials have arrived meanwhile. Each CTA holds four teams of six
// warps with barriers of their own, so that one team's wait leaves the SM to the others. A rank's
// own experts need no partial: their rows are summed at home in fp32.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "barrier.cuh"

namespace dualpipe {
namespace {

constexpr int kTeams = 4;
constexpr int kTeamWarps = 6;
constexpr int kTeamThreads = kTeamWarps * 32;
constexpr int kVectors = 4;                      // 16-byte loads a lane has in flight for one row
constexpr int kPieceBytes = 32 * 16 * kVectors;  // 2 KB of a row for one warp
constexpr int kLag = 1;                          // tiles between a push and the sum of its tile
constexpr uint32_t kAllLanes = 0xffffffff;

// kVectors × 16 bytes of a row a lane, summed in fp32.
template <typename Element>
struct Sum;

template <>
struct Sum<float> {
  float4 value[kVectors];
  __device__ void add(int i, uint4 raw) {
    value[i].x += __uint_as_float(raw.x);
    value[i].y += __uint_as_float(raw.y);
    value[i].z += __uint_as_float(raw.z);
    value[i].w += __uint_as_float(raw.w);
  }
  __device__ void clear(int i) { value[i] = make_float4(0, 0, 0, 0); }
  __device__ uint4 packed(int i) const {
    return make_uint4(__float_as_uint(value[i].x), __float_as_uint(value[i].y),
                      __float_as_uint(value[i].z), __float_as_uint(value[i].w));
  }
};

template <>
struct Sum<__nv_bfloat16> {
  float2 value[kVectors][4];
  // A bf16 is the upper half of its fp32.
  __device__ static void add_pair(float2& sum, uint32_t pair) {
    sum.x += __uint_as_float(pair << 16);
    sum.y += __uint_as_float(pair & 0xffff0000u);
  }
  __device__ static uint32_t pack_pair(float2 sum) {
    const __nv_bfloat162 pair = __float22bfloat162_rn(sum);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  __device__ void add(int i, uint4 raw) {
    add_pair(value[i][0], raw.x);
    add_pair(value[i][1], raw.y);
    add_pair(value[i][2], raw.z);
    add_pair(value[i][3], raw.w);
  }
  __device__ void clear(int i) {
    for (int j = 0; j < 4; ++j) value[i][j] = make_float2(0, 0);
  }
  __device__ uint4 packed(int i) const {
    return make_uint4(pack_pair(value[i][0]), pack_pair(value[i][1]), pack_pair(value[i][2]),
                      pack_pair(value[i][3]));
  }
};

// A warp's piece of a row: `bytes` from `offset`, lane-interleaved 16-byte vectors.
template <typename Element>
class Piece {
 public:
  __device__ Piece(int offset, int row_bytes)
      : first_(offset + static_cast<int>(threadIdx.x % 32) * 16), row_bytes_(row_bytes) {
    for (int i = 0; i < kVectors; ++i) sum_.clear(i);
  }

  __device__ void add(const char* row) {
    uint4 raw[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      raw[i] = inside(i) ? load_streaming(row + at(i)) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) sum_.add(i, raw[i]);
  }

  __device__ void store(char* row) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (inside(i)) store_16(row + at(i), sum_.packed(i));
    }
  }

 private:
  __device__ int at(int i) const { return first_ + i * 32 * 16; }
  __device__ bool inside(int i) const { return at(i) < row_bytes_; }

  Sum<Element> sum_;
  int first_, row_bytes_;
};

// One team's view of the operation.
template <typename Element>
class Team {
 public:
  __device__ Team(const Exchange& ex, const CombineArgs& args)
      : ex_(ex),
        args_(args),
        team_(threadIdx.x / kTeamThreads),
        warp_(threadIdx.x % kTeamThreads / 32),
        lane_(threadIdx.x % 32),
        pieces_((ex.row_bytes() + kPieceBytes - 1) / kPieceBytes) {
    const SymmetricLayout layout(ex);
    const int64_t channel = layout.channel + layout.channel_stride * args.channel;
    partials_at_ = channel + layout.partial;
    partial_weights_at_ = channel + layout.partial_weight;
    flags_at_ = channel + layout.tile_ready;
    const PlanLayout plan(ex);
    slots_ = args.plan + plan.slots;
    token_ranks_ = args.plan + plan.token_ranks;
    source_tokens_ = args.plan + plan.source_tokens;
  }

  __device__ void meet() const { named_barrier(1 + team_, kTeamThreads); }
  __device__ bool meet_all(bool yes) const {
    return named_barrier_all(1 + team_, kTeamThreads, yes);
  }

  // Sum and send what this rank's experts have for the tile's tokens of every other rank.
  __device__ void push(int tile, uint64_t epoch) const {
    const int first = tile * kCombineTile;
    const int units = (ex_.ranks - 1) * kCombineTile * pieces_;
    for (int unit = warp_; unit < units; unit += kTeamWarps) {
      const int token_of_rank = unit / pieces_;
      const int owner = (ex_.rank + 1 + token_of_rank / kCombineTile) % ex_.ranks;
      const int token = first + token_of_rank % kCombineTile;
      if (token < source_tokens_[owner]) push_piece(owner, token, unit % pieces_);
    }
    meet();
    // Lane p tells rank p, if any of the tile's tokens came from there.
    if (warp_ == 0 && lane_ < ex_.ranks && lane_ != ex_.rank &&
        (ranks_of_tile(lane_, tile) >> ex_.rank & 1)) {
      __threadfence_system();
      store_release_system(tile_flag(lane_, ex_.rank, tile), epoch);
    }
  }

  // Wait for the tile's partials. False, for the whole team, if some rank never sent them.
  __device__ bool wait_for_partials(int tile, uint64_t epoch) const {
    bool arrived = true;
    if (warp_ == 0 && lane_ < ex_.ranks && lane_ != ex_.rank &&
        (ranks_of_tile(ex_.rank, tile) >> lane_ & 1)) {
      arrived = wait_for(ex_, tile_flag(ex_.rank, lane_, tile), epoch,
                         kCombineForward + args_.channel, kDataReady, lane_);
    }
    return meet_all(arrived);
  }

  // Sum the tile's own tokens: rows of local experts, then the partials in rank order.
  __device__ void reduce(int tile) const {
    for (int unit = warp_; unit < kCombineTile * pieces_; unit += kTeamWarps) {
      const int token = tile * kCombineTile + unit / pieces_;
      if (token < args_.tokens) reduce_piece(token, unit % pieces_);
    }
  }

  __device__ int team() const { return team_; }
  __device__ bool leader() const { return warp_ == 0 && lane_ == 0; }

 private:
  __device__ char* partial_row(int owner, int token, int index) const {
    return ex_.peer[owner] + partials_at_ +
           (static_cast<int64_t>(token) * ex_.partials() + index) * ex_.row_bytes();
  }
  __device__ float* partial_weight(int owner, int token) const {
    return reinterpret_cast<float*>(ex_.peer[owner] + partial_weights_at_) +
           static_cast<int64_t>(token) * ex_.topk;
  }
  __device__ uint64_t* tile_flag(int owner, int source, int tile) const {
    return reinterpret_cast<uint64_t*>(ex_.peer[owner] + flags_at_) +
           static_cast<int64_t>(source) * ex_.combine_tiles() + tile;
  }
  __device__ const char* row(int64_t index) const {
    return static_cast<const char*>(args_.rows) + index * ex_.row_bytes();
  }
  // Lane k: the row here of route k, or −1.
  __device__ int slot_of_lane(int source, int token) const {
    const int64_t at = (static_cast<int64_t>(source) * ex_.max_tokens + token) * ex_.topk_stride();
    return lane_ < ex_.topk ? slots_[at + lane_] : -1;
  }
  __device__ uint32_t ranks_of(int source, int token) const {
    return token_ranks_[source * ex_.max_tokens + token];
  }
  __device__ uint32_t ranks_of_tile(int source, int tile) const {
    const int end = min((tile + 1) * kCombineTile, source_tokens_[source]);
    uint32_t ranks = 0;
    for (int t = tile * kCombineTile; t < end; ++t) ranks |= ranks_of(source, t);
    return ranks;
  }

  __device__ void add_local_rows(Piece<Element>& piece, int slot) const {
    for (uint32_t left = __ballot_sync(kAllLanes, slot >= 0); left != 0; left &= left - 1) {
      piece.add(row(__shfl_sync(kAllLanes, slot, __ffs(left) - 1)));
    }
  }

  __device__ void push_piece(int owner, int token, int piece_index) const {
    const int slot = slot_of_lane(owner, token);
    if (!__any_sync(kAllLanes, slot >= 0)) return;
    // The partial's place: how many other ranks below this one also serve the token.
    const uint32_t others = ranks_of(owner, token) & ~(1u << owner);
    const int index = __popc(others & ((1u << ex_.rank) - 1));
    Piece<Element> piece(piece_index * kPieceBytes, ex_.row_bytes());
    add_local_rows(piece, slot);
    piece.store(partial_row(owner, token, index));
    if (args_.row_weight && piece_index == 0 && slot >= 0) {
      partial_weight(owner, token)[lane_] = args_.row_weight[slot];
    }
  }

  __device__ void reduce_piece(int token, int piece_index) const {
    const int slot = slot_of_lane(ex_.rank, token);
    const int partials = __popc(ranks_of(ex_.rank, token) & ~(1u << ex_.rank));
    Piece<Element> piece(piece_index * kPieceBytes, ex_.row_bytes());
    add_local_rows(piece, slot);
    for (int i = 0; i < partials; ++i) piece.add(partial_row(ex_.rank, token, i));
    piece.store(static_cast<char*>(args_.y) + static_cast<int64_t>(token) * ex_.row_bytes());
    if (args_.topk_weight && piece_index == 0 && lane_ < ex_.topk) {
      const int64_t at = static_cast<int64_t>(token) * ex_.topk + lane_;
      const int expert = args_.topk_idx[at];
      const bool dropped = expert < 0 || expert >= ex_.experts;
      args_.topk_weight[at] = slot >= 0 ? args_.row_weight[slot]
                              : dropped ? 0.0f
                                        : __ldcg(partial_weight(ex_.rank, token) + lane_);
    }
  }

  const Exchange& ex_;
  const CombineArgs& args_;
  const int team_, warp_, lane_, pieces_;
  int64_t partials_at_, partial_weights_at_, flags_at_;  // in every rank's symmetric buffer
  const int32_t *slots_, *token_ranks_, *source_tokens_;
};

template <typename Element>
__global__ void __launch_bounds__(kTeams* kTeamThreads, 1)
    push_and_sum(const __grid_constant__ Exchange ex, const __grid_constant__ CombineArgs args) {
  const int operation = kCombineForward + args.channel;
  const uint64_t epoch = current_epoch(ex, operation);
  const Team<Element> team(ex, args);
  const bool first_warp = threadIdx.x % kTeamThreads < 32;
  if (!team.meet_all(!first_warp || wait_all_done(ex, operation, epoch))) return;

  const int32_t* source_tokens = args.plan + PlanLayout(ex).source_tokens;
  int most_tokens = 0;
  for (int p = 0; p < ex.ranks; ++p) most_tokens = max(most_tokens, source_tokens[p]);
  const int tiles = (most_tokens + kCombineTile - 1) / kCombineTile;
  const int teams = gridDim.x * kTeams, first = team.team() * gridDim.x + blockIdx.x;
  // A team never waits for a tile that some rank pushes only after a tile this team still owes:
  // every rank pushes its tiles in rising order, ahead of the sums.
  for (int tile = first; tile < tiles + kLag * teams; tile += teams) {
    if (tile < tiles) team.push(tile, epoch);
    const int arrived = tile - kLag * teams;
    if (arrived >= 0 && arrived < tiles) {
      if (!team.wait_for_partials(arrived, epoch)) return;
      team.reduce(arrived);
    }
  }
  team.meet();
  if (team.leader()) finish_operation(ex, operation, epoch, teams);
}

}  // namespace

void launch_combine(const Exchange& ex, const CombineArgs& args) {
  const DeviceGuard guard(ex.device);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const int threads = kTeams * kTeamThreads;
  if (ex.element_bytes == 4) {
    push_and_sum<float><<<args.sms, threads, 0, stream>>>(ex, args);
  } else {
    push_and_sum<__nv_bfloat16><<<args.sms, threads, 0, stream>>>(ex, args);
  }
  check_cuda(cudaGetLastError(), "push_and_sum");
}

}  // namespace dualpipe
