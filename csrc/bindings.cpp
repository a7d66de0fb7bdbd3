// pybind11 module fastpie._C: checks and hand-over, no arithmetic.
//
// Tensors arrive as addresses and sizes (torch's data_ptr()); the Python operators in
// python/fastpie/ops have checked shapes, dtypes and devices. A failed Status becomes a
// RuntimeError that the operator turns into a FastpieError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "fastpie/disagreement.h"
#include "fastpie/null.h"
#ifdef FASTPIE_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace fastpie;

namespace {

void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message);
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A binding takes addresses and sizes, releases the lock of the interpreter (the kernel touches no
// Python object) and hands over; what the operator has not checked is checked here.
void null_cpu(std::uintptr_t input, std::uintptr_t output, std::int64_t count, int threads) {
  py::gil_scoped_release release;
  check(cpu::null({pointer<const float>(input), pointer<float>(output), count}, threads));
}

DisagreementArgs disagreement_args(std::uintptr_t dense, std::uintptr_t pruned,
                                   std::uintptr_t labels, std::uintptr_t out, int dtype, int task,
                                   std::int64_t levels, std::int64_t rows, std::int64_t classes,
                                   std::int64_t dense_row_stride, std::int64_t pruned_level_stride,
                                   std::int64_t pruned_row_stride) {
  if (dtype < 0 || dtype > 2) throw std::invalid_argument("Expected dtype to be 0, 1 or 2");
  if (task < 0 || task > 1) throw std::invalid_argument("Expected task to be 0 or 1");
  if (levels < 0 || rows < 0 || classes < 1) throw std::invalid_argument("Expected classes >= 1");
  DisagreementArgs args{};
  args.dense = pointer<const void>(dense);
  args.pruned = pointer<const void>(pruned);
  args.dtype = static_cast<DType>(dtype);
  args.task = static_cast<Task>(task);
  if (args.task == Task::kMulticlass) {
    args.labels = pointer<const std::int64_t>(labels);
  } else {
    args.targets = pointer<const float>(labels);
  }
  args.out = pointer<float>(out);
  args.levels = levels;
  args.rows = rows;
  args.classes = classes;
  args.dense_row_stride = dense_row_stride;
  args.pruned_level_stride = pruned_level_stride;
  args.pruned_row_stride = pruned_row_stride;
  return args;
}

void disagreement_cpu(std::uintptr_t dense, std::uintptr_t pruned, std::uintptr_t labels,
                      std::uintptr_t out, int dtype, int task, std::int64_t levels,
                      std::int64_t rows, std::int64_t classes, std::int64_t dense_row_stride,
                      std::int64_t pruned_level_stride, std::int64_t pruned_row_stride,
                      int threads) {
  const DisagreementArgs args =
      disagreement_args(dense, pruned, labels, out, dtype, task, levels, rows, classes,
                        dense_row_stride, pruned_level_stride, pruned_row_stride);
  py::gil_scoped_release release;
  check(cpu::disagreement(args, threads));
}

std::string cpu_capability() {
  cpu::Isa isa;
  check(cpu::active_isa(&isa));
  return cpu::isa_name(isa);
}

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (const cpu::Isa isa : {cpu::Isa::kBaseline, cpu::Isa::kAvx2, cpu::Isa::kAvx512}) {
    if (cpu::isa_compiled(isa) && cpu::isa_supported(isa)) names.emplace_back(cpu::isa_name(isa));
  }
  return names;
}

#ifdef FASTPIE_WITH_CUDA
void null_cuda(std::uintptr_t input, std::uintptr_t output, std::int64_t count,
               std::uintptr_t stream) {
  py::gil_scoped_release release;
  check(cuda::null({pointer<const float>(input), pointer<float>(output), count},
                   pointer<void>(stream)));
}

void disagreement_cuda(std::uintptr_t dense, std::uintptr_t pruned, std::uintptr_t labels,
                       std::uintptr_t out, int dtype, int task, std::int64_t levels,
                       std::int64_t rows, std::int64_t classes, std::int64_t dense_row_stride,
                       std::int64_t pruned_level_stride, std::int64_t pruned_row_stride,
                       std::uintptr_t stream) {
  const DisagreementArgs args =
      disagreement_args(dense, pruned, labels, out, dtype, task, levels, rows, classes,
                        dense_row_stride, pruned_level_stride, pruned_row_stride);
  py::gil_scoped_release release;
  check(cuda::disagreement(args, pointer<void>(stream)));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of fastpie. Private: call them through fastpie.ops.";
  m.def("cpu_capability", &cpu_capability, "The instruction set in use.");
  m.def("cpu_capabilities", &cpu_capabilities, "The instruction sets that can be used here.");
  m.def("has_openmp_runtime", &cpu::has_openmp_runtime);
  m.def("null_cpu", &null_cpu);
  m.def("disagreement_cpu", &disagreement_cpu);
#ifdef FASTPIE_WITH_CUDA
  m.attr("cuda_architectures") = FASTPIE_CUDA_ARCHITECTURES;
  m.attr("cuda_version") = cuda::toolkit_version();
  m.attr("cuda_max_classes") = cuda::kMaxClasses;
  m.def("cuda_unusable_reason", &cuda::unusable_reason,
        "Empty where a CUDA device can run these kernels, else why not.");
  m.def("null_cuda", &null_cuda);
  m.def("disagreement_cuda", &disagreement_cuda);
#else
  m.attr("cuda_architectures") = py::none();
#endif
}
