// Python's door to the kernels: integers and pointers only, no torch.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "exchange.h"

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
                       int topk, int max_tokens, double timeout, uintptr_t fault,
                       const std::vector<uintptr_t>& peers) {
  Exchange ex{};
  ex.rank = rank;
  ex.ranks = ranks;
  ex.device = device;
  ex.hidden = hidden;
  ex.element_bytes = element_bytes;
  ex.experts = experts;
  ex.topk = topk;
  ex.max_tokens = max_tokens;
  ex.timeout_ns = static_cast<int64_t>(timeout * 1e9);
  ex.fault = pointer<Fault>(fault);
  if (peers.size() > kMaxRanks) throw std::invalid_argument("more than 8 peers");
  std::transform(peers.begin(), peers.end(), ex.peer, [](uintptr_t p) { return pointer<char>(p); });
  return ex;
}

// name -> (first element, elements) of the parts that Python reads.
py::dict plan_parts(const Exchange& ex) {
  const PlanLayout layout(ex);
  const int64_t slots = static_cast<int64_t>(ex.ranks) * ex.max_tokens * ex.topk_stride();
  py::dict parts;
  parts["slots"] = py::make_tuple(layout.slots, slots);
  parts["expert_offsets"] = py::make_tuple(layout.expert_offsets, ex.local_experts() + 1);
  parts["tokens_per_expert"] = py::make_tuple(layout.tokens_per_expert, ex.local_experts());
  parts["header"] = py::make_tuple(layout.header, 6);
  return parts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "SM-partitioned all-to-all kernels of dualpipe_ext; pointers and sizes as integers.";
  m.attr("FAULT_WORDS") = sizeof(Fault) / sizeof(int64_t);

  py::class_<Exchange>(m, "Exchange")
      .def(py::init(&make_exchange), py::kw_only(), py::arg("rank"), py::arg("ranks"),
           py::arg("device"), py::arg("hidden"), py::arg("element_bytes"), py::arg("experts"),
           py::arg("topk"), py::arg("max_tokens"), py::arg("timeout"), py::arg("fault"),
           py::arg("peers"))
      .def_property_readonly("symmetric_bytes",
                             [](const Exchange& ex) { return SymmetricLayout(ex).bytes; })
      .def_property_readonly("plan_elements",
                             [](const Exchange& ex) { return PlanLayout(ex).elements; })
      .def("plan_parts", &plan_parts)
      .def("plan",
           [](const Exchange& ex, uintptr_t topk_idx, int tokens, uintptr_t plan, int sms,
              uintptr_t stream) {
             launch_plan(ex, {pointer<int32_t>(topk_idx), tokens, pointer<int32_t>(plan), sms,
                              pointer<void>(stream)});
           })
      .def("dispatch",
           [](const Exchange& ex, int channel, uintptr_t x, uintptr_t topk_weight, int tokens,
              uintptr_t plan, uintptr_t rows, uintptr_t row_weight, int sms, uintptr_t stream) {
             launch_dispatch(ex, {channel, pointer<void>(x), pointer<float>(topk_weight), tokens,
                                  pointer<int32_t>(plan), pointer<void>(rows),
                                  pointer<float>(row_weight), sms, pointer<void>(stream)});
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
