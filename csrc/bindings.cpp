// pybind11 module fastpie._C: checks and hand-over, no arithmetic.
//
// Tensors arrive as addresses and sizes (torch's data_ptr()); the Python operators in
// python/fastpie/ops have checked shapes, dtypes and devices. A failed Status becomes a
// RuntimeError that the operator turns into a FastpieError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "fastpie/alias_table.h"
#include "fastpie/disagreement.h"
#include "fastpie/embedding_disagreement.h"
#include "fastpie/magnitude_levels.h"
#include "fastpie/masked_conv.h"
#include "fastpie/masked_conv_nhwc.h"
#include "fastpie/max_pool.h"
#include "fastpie/normalize_uint8.h"
#include "fastpie/null.h"
#include "fastpie/pack_mask.h"
#include "fastpie/relayout.h"
#include "fastpie/segmentation_disagreement.h"
#include "fastpie/sparse24.h"
#include "fastpie/top_k.h"
#ifdef FASTPIE_WITH_CUDA
#include "cuda/device.h"
#endif
#ifdef FASTPIE_EMULATE_CUDA
#include "faults.h"  // of tests/csrc/cuda_emulator
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

DType dtype_of(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("Expected dtype to be 0, 1 or 2");
  return static_cast<DType>(code);
}

template <std::size_t kCount>
void copy_strides(const std::array<std::int64_t, kCount>& from, std::int64_t (&to)[kCount]) {
  for (std::size_t i = 0; i < kCount; ++i) to[i] = from[i];
}

// `sizes` are levels, images, classes, pixels.
SegmentationDisagreementArgs segmentation_disagreement_args(
    std::uintptr_t dense, const std::array<std::int64_t, 3>& dense_strides, std::uintptr_t pruned,
    const std::array<std::int64_t, 4>& pruned_strides, std::uintptr_t partials, std::uintptr_t out,
    int dtype, const std::array<std::int64_t, 4>& sizes) {
  if (sizes[0] < 0 || sizes[1] < 0 || sizes[2] < 1 || sizes[3] < 0) {
    throw std::invalid_argument("Expected classes >= 1 and no negative size");
  }
  SegmentationDisagreementArgs args{};
  args.dense = pointer<const void>(dense);
  args.pruned = pointer<const void>(pruned);
  args.partials = pointer<IouPartial>(partials);
  args.out = pointer<float>(out);
  args.dtype = dtype_of(dtype);
  args.levels = sizes[0];
  args.images = sizes[1];
  args.classes = sizes[2];
  args.pixels = sizes[3];
  copy_strides(dense_strides, args.dense_strides);
  copy_strides(pruned_strides, args.pruned_strides);
  return args;
}

// Bytes of `partials`.
std::int64_t segmentation_disagreement_workspace(std::int64_t levels, std::int64_t images,
                                                 std::int64_t pixels) {
  return static_cast<std::int64_t>(sizeof(IouPartial)) * levels * images * iou_chunks(pixels);
}

void segmentation_disagreement_cpu(std::uintptr_t dense,
                                   const std::array<std::int64_t, 3>& dense_strides,
                                   std::uintptr_t pruned,
                                   const std::array<std::int64_t, 4>& pruned_strides,
                                   std::uintptr_t partials, std::uintptr_t out, int dtype,
                                   const std::array<std::int64_t, 4>& sizes, int threads) {
  const auto args = segmentation_disagreement_args(dense, dense_strides, pruned, pruned_strides,
                                                   partials, out, dtype, sizes);
  py::gil_scoped_release release;
  check(cpu::segmentation_disagreement(args, threads));
}

// `sizes` are levels, rows, size.
EmbeddingDisagreementArgs embedding_disagreement_args(
    std::uintptr_t dense, const std::array<std::int64_t, 2>& dense_strides, std::uintptr_t pruned,
    const std::array<std::int64_t, 3>& pruned_strides, std::uintptr_t out, int dtype,
    const std::array<std::int64_t, 3>& sizes) {
  if (sizes[0] < 0 || sizes[1] < 0 || sizes[2] < 0) {
    throw std::invalid_argument("Expected no negative size");
  }
  EmbeddingDisagreementArgs args{};
  args.dense = pointer<const void>(dense);
  args.pruned = pointer<const void>(pruned);
  args.out = pointer<float>(out);
  args.dtype = dtype_of(dtype);
  args.levels = sizes[0];
  args.rows = sizes[1];
  args.size = sizes[2];
  copy_strides(dense_strides, args.dense_strides);
  copy_strides(pruned_strides, args.pruned_strides);
  return args;
}

void embedding_disagreement_cpu(std::uintptr_t dense,
                                const std::array<std::int64_t, 2>& dense_strides,
                                std::uintptr_t pruned,
                                const std::array<std::int64_t, 3>& pruned_strides,
                                std::uintptr_t out, int dtype,
                                const std::array<std::int64_t, 3>& sizes, int threads) {
  const auto args =
      embedding_disagreement_args(dense, dense_strides, pruned, pruned_strides, out, dtype, sizes);
  py::gil_scoped_release release;
  check(cpu::embedding_disagreement(args, threads));
}

Activation activation_of(int kind, float slope) {
  if (kind < 0 || kind >= Activation::kKinds) throw std::invalid_argument("Unknown activation");
  return {static_cast<Activation::Kind>(kind), slope};
}

// (entries, rows, chunk_channels, chunks, blocks), as `pack_masked_conv` made them.
using PackedWeights =
    std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t>;
// (address, elements from group to group, elements from channel to channel).
using Activations = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;
// (tiles, tile_count, valid), see python/fastpie/ops/positions.py.
using Tiles = std::tuple<std::uintptr_t, std::int64_t, std::uintptr_t>;

MaskedConvArgs masked_conv_args(const PackedWeights& weights, const Activations& input,
                                const Activations& output, const Tiles& tiles, int dtype,
                                std::int64_t groups) {
  MaskedConvArgs args{};
  args.entries = pointer<const MaskedEntry>(std::get<0>(weights));
  args.rows = pointer<const MaskedRow>(std::get<1>(weights));
  args.chunk_channels = pointer<const std::int64_t>(std::get<2>(weights));
  args.chunks = std::get<3>(weights);
  args.blocks = std::get<4>(weights);
  args.input = pointer<const void>(std::get<0>(input));
  args.input_group = std::get<1>(input);
  args.output = pointer<void>(std::get<0>(output));
  args.output_group = std::get<1>(output);
  args.output_channel = std::get<2>(output);
  args.tiles = pointer<const MaskedTile>(std::get<0>(tiles));
  args.tile_count = std::get<1>(tiles);
  args.valid = pointer<const std::uint32_t>(std::get<2>(tiles));
  args.dtype = dtype_of(dtype);
  args.groups = groups;
  return args;
}

void masked_conv_cpu(const PackedWeights& weights, std::uintptr_t bias, const Activations& input,
                     const Activations& output, const Activations& residual, const Tiles& tiles,
                     int dtype, std::int64_t groups, int activation, float slope, int threads) {
  MaskedConvArgs args = masked_conv_args(weights, input, output, tiles, dtype, groups);
  args.bias = pointer<const float>(bias);
  args.residual = pointer<const void>(std::get<0>(residual));
  args.residual_group = std::get<1>(residual);
  args.residual_channel = std::get<2>(residual);
  args.activation = activation_of(activation, slope);
  py::gil_scoped_release release;
  check(cpu::masked_conv(args, threads));
}

// (weights, bias, input, output, residual, activation, slope) of each layer.
using ChainLayer =
    std::tuple<PackedWeights, std::uintptr_t, Activations, Activations, Activations, int, float>;

void masked_conv_chain_cpu(const std::vector<ChainLayer>& layers,
                           const std::vector<std::int64_t>& lags, const Tiles& tiles, int dtype,
                           std::int64_t groups, int threads) {
  if (layers.size() != lags.size()) throw std::invalid_argument("Expected one lag for each layer");
  std::vector<MaskedConvArgs> all;
  all.reserve(layers.size());
  for (const auto& [weights, bias, input, output, residual, activation, slope] : layers) {
    MaskedConvArgs args = masked_conv_args(weights, input, output, tiles, dtype, groups);
    args.bias = pointer<const float>(bias);
    args.residual = pointer<const void>(std::get<0>(residual));
    args.residual_group = std::get<1>(residual);
    args.residual_channel = std::get<2>(residual);
    args.activation = activation_of(activation, slope);
    all.push_back(args);
  }
  for (const std::int64_t lag : lags) {
    if (lag < 0) throw std::invalid_argument("Expected lags >= 0");
  }
  py::gil_scoped_release release;
  check(cpu::masked_conv_chain({all.data(), lags.data(), static_cast<std::int64_t>(all.size())},
                               threads));
}

void masked_conv_weight_gradient_cpu(const PackedWeights& weights, const Activations& input,
                                     const Activations& output_gradient, const Tiles& tiles,
                                     std::int64_t groups, std::uintptr_t gradient, int threads) {
  MaskedConvWeightGradientArgs args{};
  args.forward = masked_conv_args(weights, input, output_gradient, tiles, 0, groups);
  args.output_gradient = pointer<const float>(std::get<0>(output_gradient));
  args.gradient = pointer<float>(gradient);
  py::gil_scoped_release release;
  check(cpu::masked_conv_weight_gradient(args, threads));
}

// sizes: (groups, rows, channels, taps); strides of the weight: (group, row, channel).
PackMaskedConvArgs pack_args(
    std::uintptr_t weight, std::uintptr_t keep, std::uintptr_t row_scale,
    const std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>& sizes,
    const std::tuple<std::int64_t, std::int64_t, std::int64_t>& strides, std::uintptr_t tap_index,
    std::uintptr_t tap_offset, std::int64_t plane, std::int64_t block_channels,
    std::uintptr_t chunk_channels, std::int64_t chunks, bool round_to_bf16) {
  if (block_channels < 1) throw std::invalid_argument("Expected block_channels >= 1");
  PackMaskedConvArgs args{};
  args.weight = pointer<const float>(weight);
  args.keep = pointer<const bool>(keep);
  args.row_scale = pointer<const float>(row_scale);
  std::tie(args.groups, args.rows, args.channels, args.taps) = sizes;
  std::tie(args.group_stride, args.row_stride, args.channel_stride) = strides;
  args.tap_index = pointer<const std::int64_t>(tap_index);
  args.tap_offset = pointer<const std::int64_t>(tap_offset);
  args.plane = plane;
  args.block_channels = block_channels;
  args.chunk_channels = pointer<const std::int64_t>(chunk_channels);
  args.chunks = chunks;
  args.round_to_bf16 = round_to_bf16;
  return args;
}

template <typename... Args>
std::pair<std::int64_t, std::int64_t> count_masked_conv_cpu(Args... values) {
  const PackMaskedConvArgs args = pack_args(values...);
  py::gil_scoped_release release;
  return {count_masked_conv(args), masked_conv_blocks(args)};
}

template <typename... Args>
void pack_masked_conv_cpu(std::uintptr_t entries, std::uintptr_t rows, std::uintptr_t order,
                          Args... values) {
  const PackMaskedConvArgs args = pack_args(values...);
  py::gil_scoped_release release;
  check(pack_masked_conv(args, pointer<MaskedEntry>(entries), pointer<MaskedRow>(rows),
                         pointer<std::int64_t>(order)));
}

template <typename... Args>
void define_packing(py::module_& m, PackMaskedConvArgs (*)(Args...)) {
  m.def("count_masked_conv", &count_masked_conv_cpu<std::decay_t<Args>...>);
  m.def("pack_masked_conv", &pack_masked_conv_cpu<std::decay_t<Args>...>);
}

PackSparse24Args sparse24_args(std::uintptr_t keep, std::int64_t filters, std::int64_t columns,
                               std::int64_t rows) {
  if (filters < 0 || columns < 0) throw std::invalid_argument("Expected sizes >= 0");
  return {pointer<const bool>(keep), filters, columns, rows};
}

void count_sparse24_cpu(std::uintptr_t keep, std::int64_t filters, std::int64_t columns,
                        std::int64_t rows, std::uintptr_t tiles, int threads) {
  const PackSparse24Args args = sparse24_args(keep, filters, columns, rows);
  py::gil_scoped_release release;
  check(count_sparse24(args, pointer<Sparse24Tile>(tiles), threads));
}

void pack_sparse24_cpu(std::uintptr_t keep, std::int64_t filters, std::int64_t columns,
                       std::int64_t rows, std::uintptr_t step_begin, std::uintptr_t copy_begin,
                       std::uintptr_t order, std::uintptr_t metadata, std::uintptr_t copies,
                       int threads) {
  const PackSparse24Args args = sparse24_args(keep, filters, columns, rows);
  py::gil_scoped_release release;
  check(pack_sparse24(args, pointer<const std::int64_t>(step_begin),
                      pointer<const std::int64_t>(copy_begin), pointer<std::int32_t>(order),
                      pointer<std::uint32_t>(metadata), pointer<Sparse24Copy>(copies), threads));
}

using Three = std::array<std::int64_t, 3>;
using Four = std::array<std::int64_t, 4>;

// Strides of (group, channel, slice, row).
void max_pool_cpu(std::uintptr_t input, const Four& input_strides, const Three& input_size,
                  std::uintptr_t output, const Four& output_strides, const Three& output_size,
                  const Three& kernel, const Three& stride, const Three& padding,
                  const Three& dilation, int dtype, std::int64_t groups, std::int64_t channels,
                  std::int64_t images, int threads) {
  MaxPoolArgs args{};
  args.input = pointer<const void>(input);
  args.output = pointer<void>(output);
  args.input_strides = {input_strides[0], input_strides[1], input_strides[2], input_strides[3]};
  args.output_strides = {output_strides[0], output_strides[1], output_strides[2],
                         output_strides[3]};
  for (int d = 0; d < 3; ++d) {
    if (kernel[d] < 1 || stride[d] < 1 || dilation[d] < 1 || padding[d] < 0) {
      throw std::invalid_argument("Expected a window with kernel, stride and dilation >= 1");
    }
    args.input_size[d] = input_size[d];
    args.output_size[d] = output_size[d];
    args.kernel[d] = kernel[d];
    args.stride[d] = stride[d];
    args.padding[d] = padding[d];
    args.dilation[d] = dilation[d];
  }
  args.dtype = dtype_of(dtype);
  args.groups = groups;
  args.channels = channels;
  args.images = images;
  py::gil_scoped_release release;
  check(cpu::max_pool(args, threads));
}

using Seven = std::array<std::int64_t, kRelayoutDims>;

void relayout_cpu(std::uintptr_t input, int input_dtype, const Seven& input_strides,
                  std::uintptr_t output, int output_dtype, const Seven& output_strides,
                  const Seven& sizes, std::uintptr_t scale, std::uintptr_t shift, int activation,
                  float slope, int threads) {
  RelayoutArgs args{};
  args.input = pointer<const void>(input);
  args.output = pointer<void>(output);
  args.input_dtype = dtype_of(input_dtype);
  args.output_dtype = dtype_of(output_dtype);
  for (int d = 0; d < kRelayoutDims; ++d) {
    args.sizes[d] = sizes[d];
    args.input_strides[d] = input_strides[d];
    args.output_strides[d] = output_strides[d];
  }
  args.scale = pointer<const float>(scale);
  args.shift = pointer<const float>(shift);
  args.activation = activation_of(activation, slope);
  py::gil_scoped_release release;
  check(cpu::relayout(args, threads));
}

// sizes: (filters, channels, taps).
PackMaskArgs pack_mask_args(std::uintptr_t codes, std::uintptr_t words, const Three& sizes,
                            int level) {
  if (level < 0 || level > 255) throw std::invalid_argument("Expected level in [0, 255]");
  return {pointer<const std::uint8_t>(codes),
          pointer<std::uint32_t>(words),
          sizes[0],
          sizes[1],
          sizes[2],
          level};
}

void pack_mask_cpu(std::uintptr_t codes, std::uintptr_t words, const Three& sizes, int level,
                   int threads) {
  const PackMaskArgs args = pack_mask_args(codes, words, sizes, level);
  py::gil_scoped_release release;
  check(cpu::pack_mask(args, threads));
}

void alias_table_cpu(std::uintptr_t weights, std::uintptr_t probability, std::uintptr_t alias,
                     std::int64_t count) {
  if (count < 0) throw std::invalid_argument("Expected count >= 0");
  py::gil_scoped_release release;
  check(alias_table({pointer<const double>(weights), pointer<double>(probability),
                     pointer<std::int64_t>(alias), count}));
}

std::string cpu_capability() {
  cpu::Isa isa;
  check(cpu::active_isa(&isa));
  return cpu::isa_name(isa);
}

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (const cpu::Isa isa :
       {cpu::Isa::kBaseline, cpu::Isa::kAvx2, cpu::Isa::kAvx512, cpu::Isa::kAvx512Bf16}) {
    if (cpu::isa_compiled(isa) && cpu::isa_supported(isa)) names.emplace_back(cpu::isa_name(isa));
  }
  return names;
}

#ifdef FASTPIE_WITH_CUDA
// sizes: (images, channels, filters, rows, tile_pixels); packed: (values, metadata, copies,
// step_begin, copy_begin); window: (kernel, stride, padding, dilation).
void sparse24_conv_cuda(std::uintptr_t input, const std::array<std::uintptr_t, 5>& packed,
                        std::uintptr_t scale, std::uintptr_t bias, std::uintptr_t residual,
                        std::uintptr_t output, int dtype, const std::array<std::int64_t, 5>& sizes,
                        const Three& input_size, const Three& output_size,
                        const std::array<Three, 4>& window, int activation, float slope,
                        std::uintptr_t stream) {
  Sparse24ConvArgs args{};
  args.input = pointer<const void>(input);
  args.values = pointer<const void>(packed[0]);
  args.metadata = pointer<const std::uint32_t>(packed[1]);
  args.copies = pointer<const Sparse24Copy>(packed[2]);
  args.step_begin = pointer<const std::int64_t>(packed[3]);
  args.copy_begin = pointer<const std::int64_t>(packed[4]);
  args.scale = pointer<const float>(scale);
  args.bias = pointer<const float>(bias);
  args.residual = pointer<const void>(residual);
  args.output = pointer<void>(output);
  args.dtype = dtype_of(dtype);
  args.images = sizes[0];
  args.channels = sizes[1];
  args.filters = sizes[2];
  args.rows = sizes[3];
  args.tile_pixels = sizes[4];
  for (int d = 0; d < 3; ++d) {
    if (window[0][d] < 1 || window[1][d] < 1 || window[2][d] < 0 || window[3][d] < 1) {
      throw std::invalid_argument("Expected a window with kernel, stride and dilation >= 1");
    }
    args.input_size[d] = input_size[d];
    args.output_size[d] = output_size[d];
    args.kernel[d] = window[0][d];
    args.stride[d] = window[1][d];
    args.padding[d] = window[2][d];
    args.dilation[d] = window[3][d];
  }
  args.activation = activation_of(activation, slope);
  py::gil_scoped_release release;
  check(cuda::sparse24_conv(args, pointer<void>(stream)));
}

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

void segmentation_disagreement_cuda(
    std::uintptr_t dense, const std::array<std::int64_t, 3>& dense_strides, std::uintptr_t pruned,
    const std::array<std::int64_t, 4>& pruned_strides, std::uintptr_t partials, std::uintptr_t out,
    int dtype, const std::array<std::int64_t, 4>& sizes, std::uintptr_t stream) {
  const auto args = segmentation_disagreement_args(dense, dense_strides, pruned, pruned_strides,
                                                   partials, out, dtype, sizes);
  py::gil_scoped_release release;
  check(cuda::segmentation_disagreement(args, pointer<void>(stream)));
}

void embedding_disagreement_cuda(std::uintptr_t dense,
                                 const std::array<std::int64_t, 2>& dense_strides,
                                 std::uintptr_t pruned,
                                 const std::array<std::int64_t, 3>& pruned_strides,
                                 std::uintptr_t out, int dtype,
                                 const std::array<std::int64_t, 3>& sizes, std::uintptr_t stream) {
  const auto args =
      embedding_disagreement_args(dense, dense_strides, pruned, pruned_strides, out, dtype, sizes);
  py::gil_scoped_release release;
  check(cuda::embedding_disagreement(args, pointer<void>(stream)));
}

void pack_mask_cuda(std::uintptr_t codes, std::uintptr_t words, const Three& sizes, int level,
                    std::uintptr_t stream) {
  const PackMaskArgs args = pack_mask_args(codes, words, sizes, level);
  py::gil_scoped_release release;
  check(cuda::pack_mask(args, pointer<void>(stream)));
}

// sizes: (tensors, levels, elements, tiles).
void magnitude_levels_cuda(std::uintptr_t tensors, std::uintptr_t counts, const Four& sizes,
                           std::uintptr_t codes, std::uintptr_t nonfinite, int blocks,
                           std::uintptr_t workspace, std::uintptr_t stream) {
  if (sizes[1] < 1 || sizes[1] > kMagnitudeMaxLevels) {
    throw std::invalid_argument("Expected 1 to 255 levels");
  }
  if (blocks < 1) throw std::invalid_argument("Expected at least one block");
  MagnitudeLevelsArgs args{};
  args.tensors = pointer<const MagnitudeTensor>(tensors);
  args.tensor_count = sizes[0];
  args.counts = pointer<const std::int64_t>(counts);
  args.levels = static_cast<std::int32_t>(sizes[1]);
  args.elements = sizes[2];
  args.tiles = sizes[3];
  args.codes = pointer<std::uint8_t>(codes);
  args.nonfinite = pointer<std::int64_t>(nonfinite);
  args.blocks = blocks;
  args.workspace = pointer<void>(workspace);
  py::gil_scoped_release release;
  check(cuda::magnitude_levels(args, pointer<void>(stream)));
}

// strides: of (image, channel, pixel); sizes: (images, channels, pixels, padded channels).
void normalize_uint8_cuda(std::uintptr_t images, const Three& strides, std::uintptr_t mean,
                          std::uintptr_t std, std::uintptr_t output, int dtype, const Four& sizes,
                          std::uintptr_t stream) {
  NormalizeUint8Args args{};
  args.images = pointer<const std::uint8_t>(images);
  args.image_stride = strides[0];
  args.channel_stride = strides[1];
  args.pixel_stride = strides[2];
  args.mean = pointer<const float>(mean);
  args.std = pointer<const float>(std);
  args.output = pointer<void>(output);
  args.dtype = dtype_of(dtype);
  args.image_count = sizes[0];
  args.channels = sizes[1];
  args.pixels = sizes[2];
  args.padded = sizes[3];
  py::gil_scoped_release release;
  check(cuda::normalize_uint8(args, pointer<void>(stream)));
}

void top_k_update_cuda(std::uintptr_t values, std::uintptr_t ids, std::int64_t k,
                       std::uintptr_t scores, std::int64_t levels, std::int64_t count,
                       std::int64_t level_stride, std::uintptr_t new_ids, std::int64_t first_id,
                       std::uintptr_t stream) {
  TopKUpdateArgs args{};
  args.values = pointer<float>(values);
  args.ids = pointer<std::int64_t>(ids);
  args.scores = pointer<const float>(scores);
  args.new_ids = pointer<const std::int64_t>(new_ids);
  args.first_id = first_id;
  args.k = k;
  args.levels = levels;
  args.count = count;
  args.level_stride = level_stride;
  py::gil_scoped_release release;
  check(cuda::top_k_update(args, pointer<void>(stream)));
}

// (input, mask, scale, bias, residual, output) of one model.
using NhwcModel = std::array<std::uintptr_t, 6>;
// Of input, output, kernel, stride, padding and dilation.
using NhwcSizes = std::array<Three, 6>;

// counts: (images, channels of a group, filters, groups).
void masked_conv_nhwc_cuda(const std::vector<NhwcModel>& models, std::uintptr_t weight,
                           const Four& counts, const NhwcSizes& sizes, int dtype, int activation,
                           float slope, int tile, std::uintptr_t stream) {
  if (models.empty() || models.size() > 2) throw std::invalid_argument("Expected 1 or 2 models");
  MaskedConvNhwcArgs args{};
  for (const auto& [input, mask, scale, bias, residual, output] : models) {
    args.models[args.model_count++] = {
        pointer<const void>(input), pointer<const std::uint32_t>(mask), pointer<const float>(scale),
        pointer<const float>(bias), pointer<const void>(residual),      pointer<void>(output)};
  }
  args.weight = pointer<const void>(weight);
  args.images = counts[0];
  args.channels = counts[1];
  args.filters = counts[2];
  args.groups = counts[3];
  if (args.images < 0 || args.channels < 1 || args.filters < 0 || args.groups < 1 ||
      args.filters % args.groups != 0) {
    throw std::invalid_argument("Expected channels and groups >= 1, and filters in whole groups");
  }
  for (int d = 0; d < 3; ++d) {
    args.input_size[d] = sizes[0][d];
    args.output_size[d] = sizes[1][d];
    args.kernel[d] = sizes[2][d];
    args.stride[d] = sizes[3][d];
    args.padding[d] = sizes[4][d];
    args.dilation[d] = sizes[5][d];
    if (args.kernel[d] < 1 || args.stride[d] < 1 || args.dilation[d] < 1 || args.padding[d] < 0) {
      throw std::invalid_argument("Expected a window with kernel, stride and dilation >= 1");
    }
  }
  args.dtype = dtype_of(dtype);
  args.activation = activation_of(activation, slope);
  py::gil_scoped_release release;
  check(cuda::masked_conv_nhwc(args, tile, pointer<void>(stream)));
}

using NhwcTile = std::array<int, 7>;

std::vector<NhwcTile> masked_conv_nhwc_tiles() {
  std::vector<NhwcTile> tiles;
  for (int i = 0; i < cuda::masked_conv_nhwc_tiles(); ++i) {
    const cuda::MaskedConvNhwcTile tile = cuda::masked_conv_nhwc_tile(i);
    tiles.push_back({tile.filters, tile.pixels, tile.depth, tile.warps, tile.stages,
                     tile.shared_bytes, tile.separate_shared_bytes});
  }
  return tiles;
}
#endif

#ifdef FASTPIE_EMULATE_CUDA
void cuda_fault(const std::string& kind, bool mistaken, std::uintptr_t input, std::uintptr_t output,
                std::int64_t count) {
  py::gil_scoped_release release;
  check(cuda::fault(
      {pointer<const std::uint32_t>(input), pointer<std::uint32_t>(output), count, mistaken}, kind,
      nullptr));
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
  m.def("embedding_disagreement_cpu", &embedding_disagreement_cpu);
  m.def("segmentation_disagreement_cpu", &segmentation_disagreement_cpu);
  m.def("segmentation_disagreement_workspace", &segmentation_disagreement_workspace);
  m.def("masked_conv_cpu", &masked_conv_cpu);
  m.def("masked_conv_chain_cpu", &masked_conv_chain_cpu);
  m.def("masked_conv_weight_gradient_cpu", &masked_conv_weight_gradient_cpu);
  define_packing(m, &pack_args);
  m.def("count_sparse24", &count_sparse24_cpu);
  m.def("pack_sparse24", &pack_sparse24_cpu);
  m.def("max_pool_cpu", &max_pool_cpu);
  m.def("pack_mask_cpu", &pack_mask_cpu);
  m.def("relayout_cpu", &relayout_cpu);
  m.def("alias_table_cpu", &alias_table_cpu);
#ifdef FASTPIE_WITH_CUDA
  m.attr("cuda_architectures") = FASTPIE_CUDA_ARCHITECTURES;
  m.attr("cuda_version") = cuda::toolkit_version();
  m.attr("cuda_max_classes") = cuda::kMaxClasses;
  m.def("cuda_unusable_reason", &cuda::unusable_reason,
        "Empty where a CUDA device can run these kernels, else why not.");
  m.def("null_cuda", &null_cuda);
  m.def("sparse24_conv_cuda", &sparse24_conv_cuda);
  m.def("disagreement_cuda", &disagreement_cuda);
  m.def("embedding_disagreement_cuda", &embedding_disagreement_cuda);
  m.def("segmentation_disagreement_cuda", &segmentation_disagreement_cuda);
  m.def("magnitude_levels_cuda", &magnitude_levels_cuda);
  m.def("magnitude_levels_workspace", &cuda::magnitude_levels_workspace);
  m.def("normalize_uint8_cuda", &normalize_uint8_cuda);
  m.def("top_k_update_cuda", &top_k_update_cuda);
  m.def("pack_mask_cuda", &pack_mask_cuda);
  m.attr("magnitude_tile") = kMagnitudeTile;
  m.def("masked_conv_nhwc_cuda", &masked_conv_nhwc_cuda);
  m.def("masked_conv_nhwc_tiles", &masked_conv_nhwc_tiles,
        "[filters, pixels, depth, warps, stages, bytes of shared memory for one input, and for "
        "two] of each tile that the current device has.");
#else
  m.attr("cuda_architectures") = py::none();
#endif
#ifdef FASTPIE_EMULATE_CUDA
  m.attr("cuda_emulated") = true;
#ifdef __SANITIZE_ADDRESS__
  m.attr("address_sanitizer") = true;
#else
  m.attr("address_sanitizer") = false;
#endif
  m.def("cuda_fault", &cuda_fault, "Kernels with mistakes that the emulator must find.");
#else
  m.attr("cuda_emulated") = false;
#endif
}
