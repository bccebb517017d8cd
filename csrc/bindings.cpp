// Python's door to the kernels: integers and pointers only, no torch.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "exchange/exchange.h"

namespace py = pybind11;

namespace dualpipe {

void check_cuda(int code, const char* call) {
  if (code == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(code);
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

DeviceGuard::DeviceGuard(int device) : previous_(device) {
  check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ != device) check_cuda(cudaSetDevice(device), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() {
  int current = previous_;
  cudaGetDevice(&current);
  if (current != previous_) cudaSetDevice(previous_);
}

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Exchange make_exchange(int rank, int ranks, int device, int hidden, int element_bytes, int experts,
                       int topk, int max_tokens, int max_rows, bool unique, double timeout,
                       uintptr_t fault, const std::vector<uintptr_t>& peers) {
  Exchange ex{};
  ex.rank = rank;
  ex.ranks = ranks;
  ex.device = device;
  ex.hidden = hidden;
  ex.element_bytes = element_bytes;
  ex.experts = experts;
  ex.topk = topk;
  ex.max_tokens = max_tokens;
  ex.max_rows = max_rows;
  ex.unique = unique;
  ex.timeout_ns = static_cast<int64_t>(timeout * 1e9);
  ex.fault = pointer<Fault>(fault);
  if (peers.size() > kMaxRanks) throw std::invalid_argument("more than 8 peers");
  std::transform(peers.begin(), peers.end(), ex.peer, [](uintptr_t p) { return pointer<char>(p); });
  return ex;
}

// name -> (first element, elements) of the plan's parts that Python reads.
py::dict plan_parts(const Exchange& ex) {
  const PlanLayout layout(ex);
  const int64_t slots = static_cast<int64_t>(ex.ranks) * ex.max_tokens * ex.topk_stride();
  const int64_t sent = static_cast<int64_t>(ex.max_tokens) * ex.rank_stride();
  py::dict parts;
  parts["slots"] = py::make_tuple(layout.slots, slots);
  parts["expert_offsets"] = py::make_tuple(layout.expert_offsets, ex.local_experts() + 1);
  parts["tokens_per_expert"] = py::make_tuple(layout.tokens_per_expert, ex.local_experts());
  parts["send_rows"] = py::make_tuple(layout.send_rows, sent);
  parts["expert_rows"] = py::make_tuple(layout.expert_rows, slots);
  parts["unique_counts"] = py::make_tuple(layout.arrival_counts, ex.ranks);
  return parts;
}

// name -> (first byte, bytes) of a channel's boxes in this rank's symmetric buffer.
py::dict channel_parts(const Exchange& ex, int channel) {
  const SymmetricLayout layout(ex);
  const int64_t base = layout.channel + layout.channel_stride * channel;
  const int64_t rows = static_cast<int64_t>(ex.ranks) * ex.max_tokens;
  py::dict parts;
  parts["inbox"] = py::make_tuple(base + layout.inbox, rows * ex.row_bytes());
  parts["inbox_weight"] = py::make_tuple(base + layout.inbox_weight, rows * ex.topk_stride() * 4);
  parts["inbox_scale"] = py::make_tuple(base + layout.inbox_scale, rows * ex.scale_stride() * 4);
  parts["outbox"] = py::make_tuple(base + layout.outbox, rows * ex.row_bytes());
  parts["outbox_weight"] = py::make_tuple(base + layout.outbox_weight, rows * ex.topk_stride() * 4);
  return parts;
}

std::vector<void*> pointers(const std::vector<uintptr_t>& addresses) {
  std::vector<void*> result(addresses.size());
  std::transform(addresses.begin(), addresses.end(), result.begin(), pointer<void>);
  return result;
}

Link make_link(int device, int peer, bool sends, uintptr_t theirs, uintptr_t mine, uintptr_t abort,
               uintptr_t fault, double timeout) {
  return {device,
          peer,
          sends,
          pointer<uint64_t>(theirs),
          pointer<uint64_t>(mine),
          pointer<uint64_t>(abort),
          pointer<LinkFault>(fault),
          static_cast<int64_t>(timeout * 1e9)};
}

// (to, from, bytes) of a copy
using Copy = std::tuple<uintptr_t, uintptr_t, int64_t>;

void move_item(const Link& link, uint64_t expected, const std::vector<Copy>& copies,
               uint64_t sequence, uintptr_t stream) {
  std::vector<LinkCopy> found(copies.size());
  std::transform(copies.begin(), copies.end(), found.begin(), [](const Copy& copy) {
    const auto& [to, from, bytes] = copy;
    return LinkCopy{pointer<void>(to), pointer<void>(from), bytes};
  });
  launch_link(link, {expected, found.data(), static_cast<int>(found.size()), sequence,
                     pointer<void>(stream)});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "SM-partitioned all-to-all kernels of dualpipe_ext; pointers and sizes as integers.";
  m.attr("MAX_RANKS") = kMaxRanks;
  m.attr("MAX_TOPK") = kMaxTopk;
  m.attr("MAX_LOCAL_EXPERTS") = kMaxLocalExperts;
  m.attr("ROW_ALIGNMENT") = kRowAlignment;
  // In the order of the enums, in words.
  m.attr("OPERATIONS") =
      py::make_tuple(py::make_tuple("plan", "forward"), py::make_tuple("dispatch", "forward"),
                     py::make_tuple("dispatch", "backward"), py::make_tuple("combine", "forward"),
                     py::make_tuple("combine", "backward"));
  static_assert(kPlan == 0 && kDispatchForward == 1 && kDispatchBackward == 2 &&
                kCombineForward == 3 && kCombineBackward == 4 && kOperations == 5);
  py::dict phases;
  phases[py::int_(static_cast<int>(kBuffersFree))] = "waiting for it to finish the call before";
  phases[py::int_(static_cast<int>(kDataReady))] = "waiting for its data";
  phases[py::int_(static_cast<int>(kArrived))] = "waiting for it to begin the call";
  m.attr("PHASES") = phases;
  m.attr("FAULT_ROWS_NEEDED") = offsetof(Fault, rows_needed) / sizeof(int64_t);
  m.attr("FAULT_BAD_INDEX") = offsetof(Fault, bad_index) / sizeof(int64_t);
  m.attr("HEADER_WORDS") = static_cast<int>(PlanLayout::kHeader);
  m.attr("FAULT_WORDS") = sizeof(Fault) / sizeof(int64_t);
  m.attr("LINK_FAULT_WORDS") = sizeof(LinkFault) / sizeof(int64_t);

  py::class_<Link>(m, "Link")
      .def(py::init(&make_link), py::kw_only(), py::arg("device"), py::arg("peer"),
           py::arg("sends"), py::arg("theirs"), py::arg("mine"), py::arg("abort"), py::arg("fault"),
           py::arg("timeout"))
      .def("move", &move_item);

  py::class_<Exchange>(m, "Exchange")
      .def(py::init(&make_exchange), py::kw_only(), py::arg("rank"), py::arg("ranks"),
           py::arg("device"), py::arg("hidden"), py::arg("element_bytes"), py::arg("experts"),
           py::arg("topk"), py::arg("max_tokens"), py::arg("max_rows"), py::arg("unique"),
           py::arg("timeout"), py::arg("fault"), py::arg("peers"))
      .def_property_readonly("symmetric_bytes",
                             [](const Exchange& ex) { return SymmetricLayout(ex).bytes; })
      .def_property_readonly("plan_elements",
                             [](const Exchange& ex) { return PlanLayout(ex).elements; })
      .def("plan_parts", &plan_parts)
      .def("channel_parts", &channel_parts)
      .def("plan",
           [](const Exchange& ex, uintptr_t topk_idx, int tokens, uintptr_t plan, uintptr_t header,
              int sms, uintptr_t stream) {
             launch_plan(ex, {pointer<int32_t>(topk_idx), tokens, pointer<int32_t>(plan),
                              pointer<int32_t>(header), sms, pointer<void>(stream)});
           })
      .def("stage",
           [](const Exchange& ex, int channel, uintptr_t x, uintptr_t topk_weight, int tokens,
              uintptr_t stream) {
             DispatchArgs args{};
             args.channel = channel;
             args.x = pointer<void>(x);
             args.topk_weight = pointer<float>(topk_weight);
             args.tokens = tokens;
             args.stream = pointer<void>(stream);
             launch_stage(ex, args);
           })
      .def("dispatch",
           [](const Exchange& ex, int channel, uintptr_t x, uintptr_t topk_weight, int tokens,
              uintptr_t plan, uintptr_t rows, uintptr_t row_weight, int sms, uintptr_t stream) {
             launch_dispatch(ex, {channel, pointer<void>(x), pointer<float>(topk_weight), tokens,
                                  pointer<int32_t>(plan), pointer<void>(rows),
                                  pointer<float>(row_weight), sms, pointer<void>(stream)});
           })
      .def("push",
           [](const Exchange& ex, int channel, uintptr_t x, uintptr_t topk_weight, bool fp8,
              bool pack, int tokens, uintptr_t plan, int sms, uintptr_t stream) {
             launch_push(ex, {channel, pointer<void>(x), pointer<float>(topk_weight), fp8, pack,
                              tokens, pointer<int32_t>(plan), sms, pointer<void>(stream)});
           })
      .def("pull",
           [](const Exchange& ex, int channel, uintptr_t topk_idx, int tokens, uintptr_t plan,
              uintptr_t y, uintptr_t topk_weight, int sms, uintptr_t stream) {
             launch_pull(
                 ex, {channel, pointer<int32_t>(topk_idx), tokens, pointer<int32_t>(plan),
                      pointer<void>(y), pointer<float>(topk_weight), sms, pointer<void>(stream)});
           })
      .def("copy",
           [](const Exchange& ex, int channel, bool combine, bool weights, bool fp8,
              const std::vector<int64_t>& rows, const std::vector<uintptr_t>& copy_streams,
              const std::vector<uintptr_t>& events, uintptr_t stream) {
             const auto streams = pointers(copy_streams), ours = pointers(events);
             launch_copy(ex, {channel, combine, weights, fp8, rows.data(), streams.data(),
                              ours.data(), pointer<void>(stream)});
           })
      .def("wait_outbox",
           [](const Exchange& ex, int channel, uintptr_t stream) {
             launch_wait_outbox(ex, channel, pointer<void>(stream));
           })
      .def("push_ceiling",
           [](const Exchange& ex, uintptr_t x, int tokens, int rows, int sms, uintptr_t stream) {
             launch_push_ceiling(ex, pointer<void>(x), tokens, rows, sms, pointer<void>(stream));
           })
      .def("combine", [](const Exchange& ex, int channel, uintptr_t rows, uintptr_t row_weight,
                         uintptr_t topk_idx, int tokens, uintptr_t plan, uintptr_t y,
                         uintptr_t topk_weight, int sms, uintptr_t stream) {
        launch_combine(
            ex, {channel, pointer<void>(rows), pointer<float>(row_weight),
                 pointer<int32_t>(topk_idx), tokens, pointer<int32_t>(plan), pointer<void>(y),
                 pointer<float>(topk_weight), sms, pointer<void>(stream)});
      });
}

}  // namespace dualpipe
