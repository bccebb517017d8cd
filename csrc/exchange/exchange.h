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
enum Phase { kBuffersFree = 1, kDataReady = 2, kArrived = 3 };

// What kernels report to the host; lives in pinned host memory.
struct Fault {
  int64_t raised;  // by the first wait that gives up
  int64_t operation, phase, peer;
  int64_t expected, seen;
  int64_t rows_needed;                                       // the most, if above max_rows
  int64_t bad_index, bad_rank, bad_token, bad_k, bad_value;  // of a plan under max_rows
};

// One operation's signals in a rank's symmetric buffer. Flags hold epochs, so nothing is ever
// reset.
struct Signals {
  uint64_t ready[kMaxRanks];  // [source] raised by that rank: its data can be read
  // [source] raised by that rank. Pulled data: it no longer reads mine, raised at the end. Pushed
  // data: it has begun this epoch, so its inbox is free, raised at the start.
  uint64_t done[kMaxRanks];
  uint64_t epoch;    // local: operations finished
  uint32_t arrived;  // local: CTAs or warps finished in this operation
  uint32_t padding[13];
};

struct Exchange {
  int rank, ranks, device;
  int hidden, element_bytes;  // bf16 2, fp32 4
  int experts, topk, max_tokens;
  int max_rows;  // R may not exceed it; 0: the host sizes what receives the rows
  int unique;    // the form: 1 if rows cross as unique rows a rank, 0 in expert order
  int64_t timeout_ns;
  Fault* fault;
  char* peer[kMaxRanks];  // every rank's symmetric buffer, mapped here

  DUALPIPE_HD int local_experts() const { return experts / ranks; }
  DUALPIPE_HD int row_bytes() const { return hidden * element_bytes; }
  // K padded to 16 bytes, so that the bulk copy engine can fetch a token's routes.
  DUALPIPE_HD int topk_stride() const { return (topk + 3) / 4 * 4; }
  DUALPIPE_HD int rank_stride() const { return (ranks + 3) / 4 * 4; }
  // fp32 scales of an fp8 row, one for 128 columns, padded to 16 bytes.
  DUALPIPE_HD int scale_stride() const { return ((hidden + 127) / 128 + 3) / 4 * 4; }
  // Partial sums that other ranks can send for one token.
  DUALPIPE_HD int partials() const { return topk < ranks - 1 ? topk : ranks - 1; }
  DUALPIPE_HD int plan_chunks() const { return (max_tokens + kPlanChunk - 1) / kPlanChunk; }
};

DUALPIPE_HD int64_t align_up(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// The symmetric buffer, as offsets in bytes, the same on every rank:
//   signals | abort flag | routing [P][4 + T·K] | two channels
// A channel of an exchange in expert order holds x, weights, partials, flags; one of unique rows
// an inbox that other ranks write and an outbox that they read.
struct SymmetricLayout {
  int64_t signals, abort, routing, routing_stride;
  int64_t channel, channel_stride;  // the rest is relative to a channel's start
  // Unique rows, by the rank that the token belongs to: [P][T][H], [P][T][topk_stride] fp32,
  // [P][T][scale_stride] fp32 for fp8 rows, which lie one behind the other in the box.
  int64_t inbox, inbox_weight, inbox_scale, outbox, outbox_weight, outbox_scale;
  int64_t x, weight;                // what dispatch pulls: [T][H], [T][topk_stride] fp32
  int64_t partial, partial_weight;  // what combine receives: [T][partials][H], [T][K] fp32
  int64_t partial_ready;            // [P][T] uint64: the epoch of that rank's partial of a token
  int64_t bytes;

  DUALPIPE_HD explicit SymmetricLayout(const Exchange& ex) {
    const int64_t tokens = ex.max_tokens;
    // Alone, nothing is handed over; only the weights still need their padded stride.
    const int64_t handed = ex.ranks > 1 && !ex.unique ? tokens : 0;
    const int64_t boxed = ex.unique ? tokens * ex.ranks : 0;
    signals = 0;
    abort = align_up(sizeof(Signals) * kOperations);
    routing = abort + 128;
    routing_stride = align_up(16 + tokens * ex.topk * 4);
    channel = routing + routing_stride * ex.ranks;
    inbox = 0;
    inbox_weight = inbox + align_up(boxed * ex.row_bytes());
    inbox_scale = inbox_weight + align_up(boxed * ex.topk_stride() * 4);
    outbox = inbox_scale + align_up(boxed * ex.scale_stride() * 4);
    outbox_weight = outbox + align_up(boxed * ex.row_bytes());
    outbox_scale = outbox_weight + align_up(boxed * ex.topk_stride() * 4);
    x = outbox_scale + align_up(boxed * ex.scale_stride() * 4);
    weight = x + align_up(handed * ex.row_bytes());
    partial = weight + align_up((ex.unique ? 0 : tokens) * ex.topk_stride() * 4);
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
  int64_t expert_rows;        // [P][max_tokens][topk_stride] the slots of these, in this order
  int64_t send_rows;          // [max_tokens][rank_stride] place in the arrivals of each rank, or −1
  int64_t arrival_counts;     // [P]
  int64_t source_tokens;      // [P] T of each rank
  int64_t expert_offsets;     // [L + 1]
  int64_t tokens_per_expert;  // [L]
  int64_t chunk_counts;       // [P][chunks][bins]: rows an expert, tokens a rank, first bad entry
  int64_t elements;

  // What the host reads: R, the first bad index (found, rank, token, k, value), then the tokens
  // sent to each rank, and received from each.
  static constexpr int kHeader = 6 + 2 * kMaxRanks;
  DUALPIPE_HD static int bins(const Exchange& ex) { return ex.local_experts() + ex.ranks + 1; }

  DUALPIPE_HD explicit PlanLayout(const Exchange& ex) {
    const int64_t tokens = static_cast<int64_t>(ex.ranks) * ex.max_tokens;
    const int local_experts = ex.local_experts();
    slots = 0;
    token_ranks = align_up(slots + tokens * ex.topk_stride());
    arrivals = align_up(token_ranks + tokens);
    expert_rows = align_up(arrivals + tokens);
    send_rows = align_up(expert_rows + tokens * ex.topk_stride());
    arrival_counts = align_up(send_rows + static_cast<int64_t>(ex.max_tokens) * ex.rank_stride());
    source_tokens = align_up(arrival_counts + ex.ranks);
    expert_offsets = align_up(source_tokens + ex.ranks);
    tokens_per_expert = align_up(expert_offsets + local_experts + 1);
    chunk_counts = align_up(tokens_per_expert + local_experts);
    elements =
        align_up(chunk_counts + static_cast<int64_t>(ex.ranks) * ex.plan_chunks() * bins(ex));
  }
};

// Launchers: everything goes to `stream` (a cudaStream_t) and takes `sms` SMs at most.
struct PlanArgs {
  const int32_t* topk_idx;  // [T][K]
  int tokens;
  int32_t* plan;
  int32_t* header;  // [PlanLayout::kHeader], may be pinned host memory
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

// Unique rows: x to the inboxes of the ranks that it goes to, or to what of this rank's outbox is
// for them, from where copy engines take it.
struct PushArgs {
  int channel;
  const void* x;             // [T][H]
  const float* topk_weight;  // [T][topk_stride]; null without weights, or without tokens
  bool fp8;                  // quantise the bf16 rows
  bool pack;                 // into the outbox, without a word to the peers
  int tokens;
  const int32_t* plan;
  int sms;
  void* stream;
};

// Unique rows: the sums that every rank has put into its outbox, to their tokens.
struct PullArgs {
  int channel;
  const int32_t* topk_idx;  // [T][K]
  int tokens;
  const int32_t* plan;
  void* y;             // [T][H]
  float* topk_weight;  // [T][K] from the outboxes; null without weights, or without tokens
  int sms;
  void* stream;
};

// Unique rows by copy engine, from this rank's outbox to the inboxes.
struct CopyArgs {
  int channel;
  bool combine;               // this is a combine, else a dispatch
  bool weights, fp8;          // what travels
  const int64_t* rows;        // [P] how many for each rank; on the host, as the rest
  void* const* copy_streams;  // [2] to peers, and for what stays here
  void* const* events;        // [P + 1] of ours, to order the streams
  void* stream;
};

void launch_plan(const Exchange& ex, const PlanArgs& args);
// Puts x and the weights where peers can pull them; to be followed by the dispatch itself.
void launch_stage(const Exchange& ex, const DispatchArgs& args);
void launch_dispatch(const Exchange& ex, const DispatchArgs& args);
void launch_combine(const Exchange& ex, const CombineArgs& args);
void launch_push(const Exchange& ex, const PushArgs& args);
void launch_pull(const Exchange& ex, const PullArgs& args);
void launch_copy(const Exchange& ex, const CopyArgs& args);
// Before this rank writes its outbox: until all ranks have pulled what it held.
void launch_wait_outbox(const Exchange& ex, int channel, void* stream);
// What the link gives: `rows` rows of `x` [tokens][H] to the inbox of each other rank, no signals.
void launch_push_ceiling(const Exchange& ex, const void* x, int tokens, int rows, int sms,
                         void* stream);

// What a pipeline's links report to the host; lives in pinned host memory.
struct LinkFault {
  int64_t raised;  // by the first wait that gives up
  int64_t peer;
  int64_t sends;  // 1 if it waited for room at the peer, 0 if for the peer's data
  int64_t expected, seen;
};

// One way between two ranks of a pipeline, as one of its ends sees it. Flags hold the number of the
// latest item, counted from 1 over the life of the link, so nothing is ever reset.
struct Link {
  int device, peer;
  int sends;               // this end is the source
  const uint64_t* theirs;  // here, raised by the peer: items that it has sent, or taken
  uint64_t* mine;          // at the peer, raised by this end
  uint64_t* abort;         // here; set by the first wait of any link that gives up
  LinkFault* fault;
  int64_t timeout_ns;
};

struct LinkCopy {
  void* to;
  const void* from;
  int64_t bytes;
};

// One item, at one of its ends.
struct LinkArgs {
  uint64_t expected;     // of the peer's flag before the copies; 0 for no wait
  const LinkCopy* copy;  // on the host
  int copies;
  uint64_t sequence;  // of the item: this end's flag after the copies
  void* stream;
};

void launch_link(const Link& link, const LinkArgs& args);

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
