// The plan: from all ranks' routing to a row for each (source rank, token, k), deterministically.
//
// Rows are ordered by (expert, source rank, token, k). Two launches, no grid-wide barrier:
//   gather_and_count  every rank pushes its routing to all, then counts each chunk of 128 tokens
//   assign            every chunk sums the counts before it and ranks its own routes
// Example with L = 2, K = 1, two ranks that route [0, 1, 0] and [1, 0]: expert 0 gets
// (rank 0, token 0), (rank 0, token 2), (rank 1, token 1) as rows 0 to 2, expert 1 starts at row
// 128.
#include <cuda_runtime.h>

#include "common/barrier.cuh"

namespace dualpipe {
namespace {

constexpr int kCountGroups = 8;  // chunks that a CTA counts at a time, a thread a token
constexpr int kCountThreads = kCountGroups * kPlanChunk;
constexpr int kRoutesAhead = 8;  // loads in flight a thread
constexpr int kAssignThreads = 1024;
constexpr int kAssignBytes = 96 * 1024;  // a batch of chunks in shared memory
constexpr uint32_t kAllLanes = 0xffffffff;

struct Plan {
  int32_t *slots, *token_ranks, *arrivals, *expert_rows, *send_rows, *arrival_counts;
  int32_t *source_tokens, *expert_offsets, *tokens_per_expert, *chunk_counts;
  int bins;

  __device__ Plan(const Exchange& ex, int32_t* base) {
    const PlanLayout layout(ex);
    slots = base + layout.slots;
    token_ranks = base + layout.token_ranks;
    arrivals = base + layout.arrivals;
    expert_rows = base + layout.expert_rows;
    send_rows = base + layout.send_rows;
    arrival_counts = base + layout.arrival_counts;
    source_tokens = base + layout.source_tokens;
    expert_offsets = base + layout.expert_offsets;
    tokens_per_expert = base + layout.tokens_per_expert;
    chunk_counts = base + layout.chunk_counts;
    bins = PlanLayout::bins(ex);
  }
};

// Source rank p's routing as it arrived here: [4 words, the first is T][T·K indices].
__device__ int32_t* routing_of(const Exchange& ex, int owner, int source) {
  const SymmetricLayout layout(ex);
  return reinterpret_cast<int32_t*>(ex.peer[owner] + layout.routing +
                                    layout.routing_stride * source);
}

__device__ void push_routing(const Exchange& ex, const PlanArgs& args) {
  const int routes = args.tokens * ex.topk;
  const bool wide = reinterpret_cast<uintptr_t>(args.topk_idx) % 16 == 0;
  const int vectors = wide ? routes / 4 : 0;
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  const int threads = gridDim.x * blockDim.x;
  for (int i = 0; i < ex.ranks; ++i) {
    int32_t* target = routing_of(ex, (ex.rank + i) % ex.ranks, ex.rank);
    if (thread == 0) target[0] = args.tokens;
    for (int v = thread; v < vectors; v += threads) {
      store_16(target + 4 + v * 4, reinterpret_cast<const uint4*>(args.topk_idx)[v]);
    }
    for (int r = vectors * 4 + thread; r < routes; r += threads) target[4 + r] = args.topk_idx[r];
  }
}

// One thread counts its token: the ranks it goes to, and into `counts` [bins] of its chunk.
__device__ void count_token(const Exchange& ex, const Plan& plan, int source, int token,
                            int32_t* counts) {
  const int local_experts = ex.local_experts(), first_expert = ex.rank * local_experts;
  const int32_t* routes = routing_of(ex, ex.rank, source) + 4 + token * ex.topk;
  uint32_t ranks = 0;
  for (int first = 0; first < ex.topk; first += kRoutesAhead) {
    int32_t experts[kRoutesAhead];
#pragma unroll
    for (int i = 0; i < kRoutesAhead; ++i) {
      experts[i] = first + i < ex.topk ? __ldcg(routes + first + i) : -1;
    }
#pragma unroll
    for (int i = 0; i < kRoutesAhead; ++i) {
      const int expert = experts[i];
      if (expert < -1 || expert >= ex.experts) {
        atomicMin(&counts[plan.bins - 1], token * ex.topk + first + i);
      } else if (expert >= 0) {
        ranks |= 1u << (expert / local_experts);
        const int local = expert - first_expert;
        if (local >= 0 && local < local_experts) atomicAdd(&counts[local], 1);
      }
    }
  }
  plan.token_ranks[source * ex.max_tokens + token] = ranks;
  for (uint32_t left = ranks; left != 0; left &= left - 1) {
    atomicAdd(&counts[local_experts + __ffs(left) - 1], 1);
  }
}

__global__ void __launch_bounds__(kCountThreads)
    gather_and_count(const __grid_constant__ Exchange ex, const __grid_constant__ PlanArgs args) {
  __shared__ int32_t counts[kCountGroups][kMaxLocalExperts + kMaxRanks + 1];
  __shared__ bool ok, last;
  const uint64_t epoch = current_epoch(ex, kPlan);
  const bool first_warp = threadIdx.x < 32;
  if (first_warp) {
    const bool free = wait_all_done(ex, kPlan, epoch);
    if (threadIdx.x == 0) ok = free;
  }
  __syncthreads();
  if (!ok) return;

  push_routing(ex, args);
  __syncthreads();
  Signals* mine = signals_of(ex, ex.rank, kPlan);
  if (threadIdx.x == 0) {
    __threadfence_system();
    last = add_acq_rel_gpu(&mine->arrived, 1) == gridDim.x - 1;
    if (last) mine->arrived = 0;
  }
  __syncthreads();
  if (last && first_warp) signal_ready(ex, kPlan, epoch);

  // Several chunks at a time, a thread a token; this rank's own come first.
  const Plan plan(ex, args.plan);
  const int chunks = ex.plan_chunks(), all = ex.ranks * chunks;
  const int group = threadIdx.x / kPlanChunk, member = threadIdx.x % kPlanChunk;
  for (int base = blockIdx.x * kCountGroups; base < all; base += gridDim.x * kCountGroups) {
    const int i = base + group;
    const int source = (ex.rank + i / chunks) % ex.ranks, chunk = i % chunks;
    bool ready = true;
    if (member == 0 && i < all) {
      ready = wait_for(ex, &mine->ready[source], epoch, kPlan, kDataReady, source);
    }
    if (!__syncthreads_and(ready)) return;
    for (int bin = member; bin < plan.bins; bin += kPlanChunk) {
      counts[group][bin] = bin == plan.bins - 1 ? INT32_MAX : 0;
    }
    const int tokens = i < all ? __ldcg(routing_of(ex, ex.rank, source)) : 0;
    __syncthreads();
    const int token = chunk * kPlanChunk + member;
    if (token < tokens) count_token(ex, plan, source, token, counts[group]);
    __syncthreads();
    if (i < all) {
      int32_t* target = plan.chunk_counts + (source * chunks + chunk) * plan.bins;
      for (int bin = member; bin < plan.bins; bin += kPlanChunk) target[bin] = counts[group][bin];
      if (chunk == 0 && member == 0) plan.source_tokens[source] = tokens;
    }
  }
}

// Exclusive prefix over the experts' padded sizes, by one warp. offsets has L + 1 entries.
__device__ void scan_offsets(const int32_t* totals, int32_t* offsets, int local_experts) {
  const int lane = threadIdx.x % 32;
  int running = 0;
  for (int first = 0; first < local_experts; first += 32) {
    const int expert = first + lane;
    const int rows = expert < local_experts ? totals[expert] : 0;
    int inclusive = (rows + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
    const int padded = inclusive;
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, inclusive, step);
      if (lane >= step) inclusive += before;
    }
    if (expert < local_experts) offsets[expert] = running + inclusive - padded;
    running += __shfl_sync(kAllLanes, inclusive, 31);
  }
  if (lane == 0) offsets[local_experts] = running;
}

// CTA 0: what the host and the GEMMs read. Rows past max_rows are cut off, and reported.
__device__ void write_summary(const Exchange& ex, const Plan& plan, volatile int32_t* header,
                              const int32_t* totals, const int32_t* offsets) {
  const int local_experts = ex.local_experts(), bins = plan.bins;
  const int chunks = ex.plan_chunks(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int limit = ex.max_rows > 0 ? ex.max_rows : INT32_MAX;
  for (int e = threadIdx.x; e <= local_experts; e += blockDim.x) {
    plan.expert_offsets[e] = min(offsets[e], limit);
    if (e < local_experts) {
      plan.tokens_per_expert[e] = min(totals[e], max(0, limit - offsets[e]));
    }
  }
  if (warp < ex.ranks) {  // tokens that come from this rank, and tokens that go to it
    int received = 0, sent = 0;
    for (int c = lane; c < chunks; c += 32) {
      received += plan.chunk_counts[(warp * chunks + c) * bins + local_experts + ex.rank];
      sent += plan.chunk_counts[(ex.rank * chunks + c) * bins + local_experts + warp];
    }
    received = __reduce_add_sync(kAllLanes, received);
    sent = __reduce_add_sync(kAllLanes, sent);
    if (lane == 0) {
      plan.arrival_counts[warp] = received;
      header[6 + warp] = sent;
      header[6 + kMaxRanks + warp] = received;
    }
  }
  if (warp == kMaxRanks) {
    int first_bad = INT32_MAX;
    for (int i = lane; i < ex.ranks * chunks && first_bad == INT32_MAX; i += 32) {
      if (plan.chunk_counts[i * bins + bins - 1] != INT32_MAX) first_bad = i;
    }
    first_bad = __reduce_min_sync(kAllLanes, first_bad);
    if (lane == 0) {
      const int rows = offsets[local_experts];
      header[0] = rows;
      header[1] = first_bad != INT32_MAX;
      volatile Fault* fault = ex.fault;
      if (rows > limit && fault->rows_needed < rows) fault->rows_needed = rows;
      if (first_bad != INT32_MAX) {
        const int source = first_bad / chunks;
        const int entry = plan.chunk_counts[first_bad * bins + bins - 1];
        const int value = routing_of(ex, ex.rank, source)[4 + entry];
        header[2] = source;
        header[3] = entry / ex.topk;
        header[4] = entry % ex.topk;
        header[5] = value;
        if (ex.max_rows > 0) {  // then the header is not read
          fault->bad_rank = source;
          fault->bad_token = entry / ex.topk;
          fault->bad_k = entry % ex.topk;
          fault->bad_value = value;
          __threadfence_system();
          fault->bad_index = 1;
        }
      }
    }
  }
}

// Totals of all chunks, and of those before chunk `first`, for every expert.
__device__ void sum_chunks(const Exchange& ex, const Plan& plan, int first, int32_t* totals,
                           int32_t* before) {
  const int local_experts = ex.local_experts();
  const int chunks = ex.ranks * ex.plan_chunks();
  for (int e = threadIdx.x; e < local_experts; e += blockDim.x) totals[e] = before[e] = 0;
  __syncthreads();
  // Several threads an expert, each over a stripe of chunks: the loads are what takes the time.
  const int stripes = max(1, static_cast<int>(blockDim.x) / local_experts);
  const int expert = threadIdx.x % local_experts, stripe = threadIdx.x / local_experts;
  if (stripe < stripes) {
    for (int e = expert; e < local_experts; e += blockDim.x) {
      int total = 0, earlier = 0;
#pragma unroll 4
      for (int c = stripe; c < chunks; c += stripes) {
        const int rows = plan.chunk_counts[c * plan.bins + e];
        total += rows;
        if (c < first) earlier += rows;
      }
      atomicAdd(&totals[e], total);
      atomicAdd(&before[e], earlier);
    }
  }
  __syncthreads();
}

// A chunk's tokens in segments of 32, each of them ranked by one warp.
constexpr int kSegments = kPlanChunk / 32;

// A batch of chunks in shared memory.
struct Batch {
  int chunks;        // that it has room for
  int32_t* first;    // [chunks][kSegments][L] rows of each expert, then the first of them
  int32_t* arrival;  // [chunks][kPlanChunk] a token's place in the arrivals, or −1
  int16_t* experts;  // [chunks][kPlanChunk * K] local expert, or −1
  int16_t* rank;     // [chunks][kPlanChunk * K] among the segment's routes to the same expert

  DUALPIPE_HD static int chunk_bytes(const Exchange& ex) {
    return kSegments * ex.local_experts() * 4 + kPlanChunk * (ex.topk * 4 + 4);
  }
  __device__ Batch(const Exchange& ex, char* shared) {
    chunks = kAssignBytes / chunk_bytes(ex);
    first = reinterpret_cast<int32_t*>(shared);
    arrival = first + chunks * kSegments * ex.local_experts();
    experts = reinterpret_cast<int16_t*>(arrival + chunks * kPlanChunk);
    rank = experts + chunks * kPlanChunk * ex.topk;
  }
};

// One warp ranks a segment's routes, 32 at a time in (token, k) order, among those to the same
// expert, and counts them.
__device__ void rank_segment(const int16_t* experts, int routes, int32_t* counts, int16_t* ranks) {
  const int lane = threadIdx.x % 32;
  for (int route = lane; route < routes; route += 32) {
    const int expert = experts[route];
    const uint32_t same = __match_any_sync(kAllLanes, expert);
    const uint32_t earlier = same & ((1u << lane) - 1);
    const int before = expert >= 0 ? counts[expert] : 0;
    ranks[route] = static_cast<int16_t>(before + __popc(earlier));
    __syncwarp();
    if (expert >= 0 && earlier == 0) counts[expert] = before + __popc(same);
    __syncwarp();
  }
}

// One warp numbers a chunk's tokens that go to rank `target`, behind those of the source's earlier
// chunks: write(token of the chunk, its number, or −1 if it does not go there).
template <typename Write>
__device__ void number_tokens(const Exchange& ex, const Plan& plan, int source, int chunk,
                              int target, int tokens, const Write& write) {
  const int lane = threadIdx.x % 32;
  uint32_t ranks[kPlanChunk / 32];
#pragma unroll
  for (int i = 0; i < kPlanChunk / 32; ++i) {
    const int t = i * 32 + lane;
    ranks[i] = t < tokens ? plan.token_ranks[source * ex.max_tokens + chunk * kPlanChunk + t] : 0;
  }
  const int32_t* counts =
      plan.chunk_counts + source * ex.plan_chunks() * plan.bins + ex.local_experts() + target;
  int next = 0;
  for (int c = lane; c < chunk; c += 32) next += counts[c * plan.bins];
  next = __reduce_add_sync(kAllLanes, next);
#pragma unroll
  for (int i = 0; i < kPlanChunk / 32; ++i) {
    const bool goes = (ranks[i] >> target & 1) != 0;
    const uint32_t matches = __ballot_sync(kAllLanes, goes);
    if (i * 32 + lane < tokens) {
      write(i * 32 + lane, goes ? next + __popc(matches & ((1u << lane) - 1)) : -1);
    }
    next += __popc(matches);
  }
}

// Give the routes of chunks [first, first + count) their rows. `before` counts each expert's rows
// in earlier chunks, and is advanced.
__device__ void assign_batch(const Exchange& ex, const Plan& plan, const Batch& batch, int first,
                             int count, const int32_t* offsets, int32_t* before) {
  const int local_experts = ex.local_experts(), first_expert = ex.rank * local_experts;
  const int stride = ex.topk_stride(), chunks_per_rank = ex.plan_chunks();
  const int chunk_routes = kPlanChunk * ex.topk;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const auto tokens_of = [&](int i) {
    const int begin = (first + i) % chunks_per_rank * kPlanChunk;
    return max(0, min(kPlanChunk, plan.source_tokens[(first + i) / chunks_per_rank] - begin));
  };

  const int group = threadIdx.x / kPlanChunk, groups = blockDim.x / kPlanChunk;
  const int member = threadIdx.x % kPlanChunk;
  for (int i = group; i < count; i += groups) {
    const int begin = (first + i) % chunks_per_rank * kPlanChunk;
    const int32_t* routing = routing_of(ex, ex.rank, (first + i) / chunks_per_rank) + 4;
    const int routes = tokens_of(i) * ex.topk;
#pragma unroll 8
    for (int r = member; r < chunk_routes; r += kPlanChunk) {
      const int local = r < routes ? __ldcg(routing + begin * ex.topk + r) - first_expert : -1;
      batch.experts[i * chunk_routes + r] = local >= 0 && local < local_experts ? local : -1;
    }
  }
  for (int n = threadIdx.x; n < count * kSegments * local_experts; n += blockDim.x) {
    batch.first[n] = 0;
  }
  __syncthreads();

  // A warp takes a segment of a chunk at a time, or its arrivals, or the tokens it sends to a rank.
  const int units = kSegments + 1 + ex.ranks;
  for (int unit = warp; unit < count * units; unit += warps) {
    const int i = unit / units, which = unit % units;
    const int source = (first + i) / chunks_per_rank, chunk = (first + i) % chunks_per_rank;
    const int tokens = tokens_of(i), begin = chunk * kPlanChunk;
    if (which < kSegments) {
      const int segment = i * kSegments + which, routes = 32 * ex.topk;
      rank_segment(batch.experts + segment * routes, routes, batch.first + segment * local_experts,
                   batch.rank + segment * routes);
    } else if (which == kSegments) {
      int32_t* arrivals = plan.arrivals + source * ex.max_tokens;
      number_tokens(ex, plan, source, chunk, ex.rank, tokens, [&](int t, int number) {
        batch.arrival[i * kPlanChunk + t] = number;
        if (number >= 0) arrivals[number] = begin + t;
      });
    } else if (source == ex.rank) {
      const int target = which - kSegments - 1;
      number_tokens(ex, plan, source, chunk, target, tokens, [&](int t, int number) {
        plan.send_rows[(begin + t) * ex.rank_stride() + target] = number;
      });
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < local_experts; e += blockDim.x) {
    int next = offsets[e] + before[e];
    for (int segment = 0; segment < count * kSegments; ++segment) {
      const int rows = batch.first[segment * local_experts + e];
      batch.first[segment * local_experts + e] = next;
      next += rows;
    }
    before[e] = next - offsets[e];
  }
  __syncthreads();

  // A thread a token, in units of 16 bytes.
  const int limit = ex.max_rows > 0 ? ex.max_rows : INT32_MAX;
  for (int i = group; i < count; i += groups) {
    const int64_t source_row = static_cast<int64_t>((first + i) / chunks_per_rank) * ex.max_tokens;
    const int token = (first + i) % chunks_per_rank * kPlanChunk + member;
    if (token >= ex.max_tokens) continue;
    const bool sent = member < tokens_of(i);
    const int arrival = sent ? batch.arrival[i * kPlanChunk + member] : -1;
    const int16_t* ranks = batch.rank + i * chunk_routes + member * ex.topk;
    const int16_t* experts = batch.experts + i * chunk_routes + member * ex.topk;
    const int32_t* firsts = batch.first + (i * kSegments + member / 32) * local_experts;
    for (int first_k = 0; first_k < stride; first_k += 4) {
      int32_t row[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = first_k + j, expert = sent && k < ex.topk ? experts[k] : -1;
        row[j] = expert >= 0 ? firsts[expert] + ranks[k] : -1;
        if (row[j] >= limit) row[j] = -1;
      }
      const uint4 rows = make_uint4(row[0], row[1], row[2], row[3]);
      store_16(plan.slots + (source_row + token) * stride + first_k, rows);
      if (arrival >= 0) {
        store_16(plan.expert_rows + (source_row + arrival) * stride + first_k, rows);
      }
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kAssignThreads, 1)
    assign(const __grid_constant__ Exchange ex, const __grid_constant__ PlanArgs args) {
  extern __shared__ __align__(16) char shared[];
  __shared__ int32_t totals[kMaxLocalExperts], before[kMaxLocalExperts];
  __shared__ int32_t offsets[kMaxLocalExperts + 1];
  if (__syncthreads_or(aborted(ex))) return;
  const uint64_t epoch = current_epoch(ex, kPlan);
  const Plan plan(ex, args.plan);
  const int chunks = ex.ranks * ex.plan_chunks();
  const int first = static_cast<int64_t>(blockIdx.x) * chunks / gridDim.x;
  const int last = static_cast<int64_t>(blockIdx.x + 1) * chunks / gridDim.x;

  sum_chunks(ex, plan, first, totals, before);
  if (threadIdx.x < 32) scan_offsets(totals, offsets, ex.local_experts());
  __syncthreads();
  if (blockIdx.x == 0) write_summary(ex, plan, args.header, totals, offsets);

  const Batch batch(ex, shared);
  for (int i = first; i < last; i += batch.chunks) {
    assign_batch(ex, plan, batch, i, min(batch.chunks, last - i), offsets, before);
  }
  __syncthreads();
  if (threadIdx.x == 0) finish_operation(ex, kPlan, epoch, gridDim.x);
}

}  // namespace

void launch_plan(const Exchange& ex, const PlanArgs& args) {
  const DeviceGuard guard(ex.device);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  gather_and_count<<<args.sms, kCountThreads, 0, stream>>>(ex, args);
  check_cuda(cudaGetLastError(), "gather_and_count");
  check_cuda(
      cudaFuncSetAttribute(assign, cudaFuncAttributeMaxDynamicSharedMemorySize, kAssignBytes),
      "cudaFuncSetAttribute");
  assign<<<args.sms, kAssignThreads, kAssignBytes, stream>>>(ex, args);
  check_cuda(cudaGetLastError(), "assign");
}

}  // namespace dualpipe
