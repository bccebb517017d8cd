// The plan: from everybody's routing to a row for each (source rank, token, k), deterministically.
//
// Rows are ordered by (expert, source rank, token, k). Two launches, no grid-wide barrier:
//   gather_and_count  every rank pushes its routing to all, then counts each chunk of 128 tokens
//   assign            every chunk sums the counts before it and ranks its own routes by ballots
// Example with L = 2, K = 1, two ranks that route [0, 1, 0] and [1, 0]: expert 0 gets
// (rank 0, token 0), (rank 0, token 2), (rank 1, token 1) as rows 0 to 2, expert 1 starts at row
// 128.
#include <cuda_runtime.h>

#include "barrier.cuh"

namespace dualpipe {
namespace {

constexpr int kCountThreads = 512;
constexpr int kAssignThreads = 1024;
constexpr uint32_t kAllLanes = 0xffffffff;

struct Plan {
  int32_t *slots, *token_ranks, *arrivals, *arrival_counts, *source_tokens;
  int32_t *expert_offsets, *tokens_per_expert, *header, *chunk_counts;

  __device__ Plan(const Exchange& ex, int32_t* base) {
    const PlanLayout layout(ex);
    slots = base + layout.slots;
    token_ranks = base + layout.token_ranks;
    arrivals = base + layout.arrivals;
    arrival_counts = base + layout.arrival_counts;
    source_tokens = base + layout.source_tokens;
    expert_offsets = base + layout.expert_offsets;
    tokens_per_expert = base + layout.tokens_per_expert;
    header = base + layout.header;
    chunk_counts = base + layout.chunk_counts;
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

// Chunk `chunk` of source `source`: rows for each local expert, arriving tokens, first bad entry.
__device__ void count_chunk(const Exchange& ex, const Plan& plan, int source, int chunk,
                            int32_t* counts) {
  const int local_experts = ex.local_experts(), first_expert = ex.rank * local_experts;
  const int bins = local_experts + 2;
  const int32_t* routing = routing_of(ex, ex.rank, source);
  const int tokens = *reinterpret_cast<volatile int32_t*>(const_cast<int32_t*>(routing));
  const int begin = chunk * kPlanChunk, end = min(begin + kPlanChunk, tokens);
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
    counts[bin] = bin == bins - 1 ? INT32_MAX : 0;
  }
  __syncthreads();
  for (int t = begin + threadIdx.x; t < end; t += blockDim.x) {
    uint32_t ranks = 0;
    for (int k = 0; k < ex.topk; ++k) {
      const int expert = __ldcg(routing + 4 + t * ex.topk + k);
      if (expert < -1 || expert >= ex.experts) {
        atomicMin(&counts[bins - 1], t * ex.topk + k);
      } else if (expert >= 0) {
        ranks |= 1u << (expert / local_experts);
        const int local = expert - first_expert;
        if (local >= 0 && local < local_experts) atomicAdd(&counts[local], 1);
      }
    }
    plan.token_ranks[source * ex.max_tokens + t] = ranks;
    if (ranks >> ex.rank & 1) atomicAdd(&counts[local_experts], 1);
  }
  __syncthreads();
  int32_t* target = plan.chunk_counts + (source * ex.plan_chunks() + chunk) * bins;
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) target[bin] = counts[bin];
  if (chunk == 0 && threadIdx.x == 0) plan.source_tokens[source] = tokens;
  __syncthreads();
}

__global__ void __launch_bounds__(kCountThreads)
    gather_and_count(const __grid_constant__ Exchange ex, const __grid_constant__ PlanArgs args) {
  __shared__ int32_t counts[kMaxLocalExperts + 2];
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

  const Plan plan(ex, args.plan);
  const int chunks = ex.plan_chunks();
  int waited_for = -1;
  for (int i = blockIdx.x; i < ex.ranks * chunks; i += gridDim.x) {
    const int source = (ex.rank + i / chunks) % ex.ranks;
    if (source != waited_for) {
      __syncthreads();
      if (threadIdx.x == 0) {
        ok = wait_for(ex, &mine->ready[source], epoch, kPlan, kDataReady, source);
      }
      __syncthreads();
      if (!ok) return;
      waited_for = source;
    }
    count_chunk(ex, plan, source, i % chunks, counts);
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

// CTA 0: what the host and the GEMMs read.
__device__ void write_summary(const Exchange& ex, const Plan& plan, const int32_t* totals,
                              const int32_t* offsets) {
  const int local_experts = ex.local_experts(), bins = local_experts + 2;
  const int chunks = ex.plan_chunks(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int e = threadIdx.x; e <= local_experts; e += blockDim.x) {
    plan.expert_offsets[e] = offsets[e];
    if (e < local_experts) plan.tokens_per_expert[e] = totals[e];
  }
  if (warp < ex.ranks) {
    int arrivals = 0;
    for (int c = lane; c < chunks; c += 32) {
      arrivals += plan.chunk_counts[(warp * chunks + c) * bins + local_experts];
    }
    arrivals = __reduce_add_sync(kAllLanes, arrivals);
    if (lane == 0) plan.arrival_counts[warp] = arrivals;
  }
  if (warp == kMaxRanks) {
    int first_bad = INT32_MAX;
    for (int i = lane; i < ex.ranks * chunks && first_bad == INT32_MAX; i += 32) {
      if (plan.chunk_counts[i * bins + bins - 1] != INT32_MAX) first_bad = i;
    }
    first_bad = __reduce_min_sync(kAllLanes, first_bad);
    if (lane == 0) {
      plan.header[0] = offsets[local_experts];
      plan.header[1] = first_bad != INT32_MAX;
      if (first_bad != INT32_MAX) {
        const int source = first_bad / chunks;
        const int entry = plan.chunk_counts[first_bad * bins + bins - 1];
        plan.header[2] = source;
        plan.header[3] = entry / ex.topk;
        plan.header[4] = entry % ex.topk;
        plan.header[5] = routing_of(ex, ex.rank, source)[4 + entry];
      }
    }
  }
}

// Totals of all chunks, and of those before chunk `first`, for every expert.
__device__ void sum_chunks(const Exchange& ex, const Plan& plan, int first, int32_t* totals,
                           int32_t* before) {
  const int local_experts = ex.local_experts(), bins = local_experts + 2;
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
        const int rows = plan.chunk_counts[c * bins + e];
        total += rows;
        if (c < first) earlier += rows;
      }
      atomicAdd(&totals[e], total);
      atomicAdd(&before[e], earlier);
    }
  }
  __syncthreads();
}

// One warp an expert walks the chunk's routes 32 at a time; the ballot ranks them.
__device__ void rank_routes(const int16_t* local_expert, int routes, int local_experts,
                            const int32_t* offsets, int32_t* before, int32_t* slots) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int e = warp; e < local_experts; e += warps) {
    int next = offsets[e] + before[e];
    const int first_row = next;
    for (int first = 0; first < routes; first += 32) {
      const int route = first + lane;
      const bool match = route < routes && local_expert[route] == e;
      const uint32_t matches = __ballot_sync(kAllLanes, match);
      if (match) slots[route] = next + __popc(matches & ((1u << lane) - 1));
      next += __popc(matches);
    }
    if (lane == 0) before[e] += next - first_row;
  }
}

// One warp lists the chunk's tokens that come here, behind those of the source's earlier chunks.
__device__ void list_arrivals(const Exchange& ex, const Plan& plan, int source, int chunk,
                              int begin, int end) {
  const int lane = threadIdx.x % 32;
  const int local_experts = ex.local_experts(), bins = local_experts + 2;
  const int32_t* counts = plan.chunk_counts + source * ex.plan_chunks() * bins + local_experts;
  int next = 0;
  for (int c = lane; c < chunk; c += 32) next += counts[c * bins];
  next = __reduce_add_sync(kAllLanes, next);
  int32_t* arrivals = plan.arrivals + source * ex.max_tokens;
  for (int first = begin; first < end; first += 32) {
    const int t = first + lane;
    const bool here = t < end && (plan.token_ranks[source * ex.max_tokens + t] >> ex.rank & 1) != 0;
    const uint32_t matches = __ballot_sync(kAllLanes, here);
    if (here) arrivals[next + __popc(matches & ((1u << lane) - 1))] = t;
    next += __popc(matches);
  }
}

__global__ void __launch_bounds__(kAssignThreads, 1)
    assign(const __grid_constant__ Exchange ex, const __grid_constant__ PlanArgs args) {
  __shared__ int32_t totals[kMaxLocalExperts], before[kMaxLocalExperts];
  __shared__ int32_t offsets[kMaxLocalExperts + 1];
  __shared__ int16_t local_expert[kPlanChunk * kMaxTopk];
  __shared__ int32_t slots[kPlanChunk * kMaxTopk];
  if (__syncthreads_or(aborted(ex))) return;
  const uint64_t epoch = current_epoch(ex, kPlan);
  const Plan plan(ex, args.plan);
  const int local_experts = ex.local_experts(), stride = ex.topk_stride();
  const int chunks_per_rank = ex.plan_chunks(), chunks = ex.ranks * chunks_per_rank;
  const int first = static_cast<int64_t>(blockIdx.x) * chunks / gridDim.x;
  const int last = static_cast<int64_t>(blockIdx.x + 1) * chunks / gridDim.x;

  sum_chunks(ex, plan, first, totals, before);
  if (threadIdx.x < 32) scan_offsets(totals, offsets, local_experts);
  __syncthreads();
  if (blockIdx.x == 0) write_summary(ex, plan, totals, offsets);

  for (int i = first; i < last; ++i) {
    const int source = i / chunks_per_rank, chunk = i % chunks_per_rank;
    const int32_t* routing = routing_of(ex, ex.rank, source);
    const int begin = chunk * kPlanChunk;
    const int end = min(begin + kPlanChunk, plan.source_tokens[source]);
    const int routes = max(0, end - begin) * ex.topk;
    for (int r = threadIdx.x; r < routes; r += blockDim.x) {
      const int local = routing[4 + begin * ex.topk + r] - ex.rank * local_experts;
      local_expert[r] = local >= 0 && local < local_experts ? local : -1;
      slots[r] = -1;
    }
    __syncthreads();
    rank_routes(local_expert, routes, local_experts, offsets, before, slots);
    if (threadIdx.x / 32 == blockDim.x / 32 - 1) {
      list_arrivals(ex, plan, source, chunk, begin, end);
    }
    __syncthreads();
    const int capacity = min(kPlanChunk, ex.max_tokens - begin);
    int32_t* target = plan.slots + (static_cast<int64_t>(source) * ex.max_tokens + begin) * stride;
    for (int s = threadIdx.x; s < capacity * stride; s += blockDim.x) {
      const int t = s / stride, k = s % stride;
      const int route = t * ex.topk + k;
      target[s] = k < ex.topk && route < routes ? slots[route] : -1;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) finish_operation(ex, kPlan, epoch, gridDim.x);
}

}  // namespace

void launch_plan(const Exchange& ex, const PlanArgs& args) {
  const DeviceGuard guard(ex.device);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  gather_and_count<<<args.sms, kCountThreads, 0, stream>>>(ex, args);
  check_cuda(cudaGetLastError(), "gather_and_count");
  assign<<<args.sms, kAssignThreads, 0, stream>>>(ex, args);
  check_cuda(cudaGetLastError(), "assign");
}

}  // namespace dualpipe
