// What an exchange keeps over its life, and where its parts lie in memory. Host and device code.
//
// Letters as in the Python layer: T tokens, H hidden, K experts a token, E experts, P ranks,
// L = E / P local experts, R rows in expert order.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#define DUALPIPE_HD
#else
#define DUALPIPE_HD __host__ __device__ __forceinline__
#endif

namespace dualpipe {

constexpr int kMaxRanks = 8;
constexpr int kMaxTopk = 32;           // one route a lane
constexpr int kMaxLocalExperts = 512;  // prefix sums of the plan fit static shared memory
constexpr int kRowAlignment = 128;     // the grouped GEMM's M tile
constexpr int kPlanChunk = 128;        // tokens a CTA counts and ranks at a time

// The collective operations, each with signals and an epoch of its own.
enum Operation {
  kPlan,
  kDispatchForward,
  kDispatchBackward,
  kCombineForward,
  kCombineBackward,
  kOperations
};

// What a wait was for, in a fault report.
enum Phase { kBuffersFree = 1, kDataReady = 2 };

// Written once by the first wait that gives up, read by the host; lives in pinned host memory.
struct Fault {
  int64_t raised;
  int64_t operation, phase, peer;
  int64_t expected, seen;
};

// One operation's signals in a rank's symmetric buffer. Flags hold epochs, so nothing is ever
// reset.
struct Signals {
  uint64_t ready[kMaxRanks];  // [source] raised by that rank: its data can be read
  uint64_t done[kMaxRanks];   // [source] raised by that rank: it no longer needs my data or buffer
  uint64_t epoch;             // local: operations finished
  uint32_t arrived;           // local: CTAs or warps finished in this operation
  uint32_t padding[13];
};

struct Exchange {
  int rank, ranks, device;
  int hidden, element_bytes;  // bf16 2, fp32 4
  int experts, topk, max_tokens;
  int64_t timeout_ns;
  Fault* fault;
  char* peer[kMaxRanks];  // every rank's symmetric buffer, mapped here

  DUALPIPE_HD int local_experts() const { return experts / ranks; }
  DUALPIPE_HD int row_bytes() const { return hidden * element_bytes; }
  // K padded to 16 bytes, so that the bulk copy engine can fetch a token's routes.
  DUALPIPE_HD int topk_stride() const { return (topk + 3) / 4 * 4; }
  // Partial sums that other ranks can send for one token.
  DUALPIPE_HD int partials() const { return topk < ranks - 1 ? topk : ranks - 1; }
  DUALPIPE_HD int plan_chunks() const { return (max_tokens + kPlanChunk - 1) / kPlanChunk; }
};

DUALPIPE_HD int64_t align_up(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// The symmetric buffer, as offsets in bytes, the same on every rank:
//   signals | abort flag | routing [P][4 + T·K] | two channels of x, weights, partials, flags
struct SymmetricLayout {
  int64_t signals, abort, routing, routing_stride;
  int64_t channel, channel_stride;  // the rest is relative to a channel's start
  int64_t x, weight;                // what dispatch pulls: [T][H], [T][topk_stride] fp32
  int64_t partial, partial_weight;  // what combine receives: [T][partials][H], [T][K] fp32
  int64_t partial_ready;            // [P][T] uint64: the epoch of that rank's partial of a token
  int64_t bytes;

  DUALPIPE_HD explicit SymmetricLayout(const Exchange& ex) {
    const int64_t tokens = ex.max_tokens;
    // Alone, nothing is handed over; only the weights still need their padded stride.
    const int64_t handed = ex.ranks > 1 ? tokens : 0;
    signals = 0;
    abort = align_up(sizeof(Signals) * kOperations);
    routing = abort + 128;
    routing_stride = align_up(16 + tokens * ex.topk * 4);
    channel = routing + routing_stride * ex.ranks;
    x = 0;
    weight = x + align_up(handed * ex.row_bytes());
    partial = weight + align_up(tokens * ex.topk_stride() * 4);
    partial_weight = partial + align_up(handed * ex.partials() * ex.row_bytes());
    partial_ready = partial_weight + align_up(handed * ex.topk * 4);
    channel_stride = partial_ready + align_up(handed * ex.ranks * 8);
    bytes = channel + 2 * channel_stride;
  }
};

// The plan, as offsets in int32 elements of one tensor.
struct PlanLayout {
  int64_t slots;              // [P][max_tokens][topk_stride] row here, or −1
  int64_t token_ranks;        // [P][max_tokens] bit q: the token goes to rank q
  int64_t arrivals;           // [P][max_tokens] the tokens of a source that come here, compacted
  int64_t arrival_counts;     // [P]
  int64_t source_tokens;      // [P] T of each rank
  int64_t expert_offsets;     // [L + 1]
  int64_t tokens_per_expert;  // [L]
  int64_t header;             // R, then the first bad index: found, rank, token, k, value
  int64_t chunk_counts;       // [P][chunks][L + 2]: rows an expert, arrivals, first bad entry + 1
  int64_t elements;

  DUALPIPE_HD explicit PlanLayout(const Exchange& ex) {
    const int64_t tokens = static_cast<int64_t>(ex.ranks) * ex.max_tokens;
    const int local_experts = ex.local_experts();
    slots = 0;
    token_ranks = align_up(slots + tokens * ex.topk_stride());
    arrivals = align_up(token_ranks + tokens);
    arrival_counts = align_up(arrivals + tokens);
    source_tokens = align_up(arrival_counts + ex.ranks);
    expert_offsets = align_up(source_tokens + ex.ranks);
    tokens_per_expert = align_up(expert_offsets + local_experts + 1);
    header = align_up(tokens_per_expert + local_experts);
    chunk_counts = align_up(header + 6);
    elements = align_up(chunk_counts +
                        static_cast<int64_t>(ex.ranks) * ex.plan_chunks() * (local_experts + 2));
  }
};

// Launchers: everything goes to `stream` (a cudaStream_t) and takes `sms` SMs at most.
struct PlanArgs {
  const int32_t* topk_idx;  // [T][K]
  int tokens;
  int32_t* plan;
  int sms;
  void* stream;
};

struct DispatchArgs {
  int channel;
  const void* x;             // [T][H]
  const float* topk_weight;  // [T][K]; null without weights, or without tokens
  int tokens;
  const int32_t* plan;
  void* rows;         // [R][H]
  float* row_weight;  // [R]; null without weights, or without rows
  int sms;
  void* stream;
};

struct CombineArgs {
  int channel;
  const void* rows;         // [R][H]
  const float* row_weight;  // [R]; null without weights, or without rows
  const int32_t* topk_idx;  // [T][K]
  int tokens;
  const int32_t* plan;
  void* y;             // [T][H]
  float* topk_weight;  // [T][K]; null without weights, or without tokens
  int sms;
  void* stream;
};

void launch_plan(const Exchange& ex, const PlanArgs& args);
void launch_dispatch(const Exchange& ex, const DispatchArgs& args);
void launch_combine(const Exchange& ex, const CombineArgs& args);

// Throws std::runtime_error that names the call; nothing for cudaSuccess.
void check_cuda(int code, const char* call);

// Makes `device` current for the calling thread while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();

 private:
  int previous_;
};

}  // namespace dualpipe
