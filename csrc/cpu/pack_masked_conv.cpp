// Packing of masked weights. Bound by reading the weights once: no instruction set of its own.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fastpie/masked_conv.h"

namespace fastpie {
namespace {

// Calls visit(channel, tap, index of the weight) for the kept weights of one row, ascending.
template <typename Visit>
void for_each_kept(const PackMaskedConvArgs& args, std::int64_t group, std::int64_t row,
                   std::int64_t first, std::int64_t last, const Visit& visit) {
  for (std::int64_t c = first; c < last; ++c) {
    const std::int64_t base =
        group * args.group_stride + row * args.row_stride + c * args.channel_stride;
    for (std::int64_t t = 0; t < args.taps; ++t) {
      const std::int64_t index = base + args.tap_index[t];
      if (args.keep[index]) visit(c, t, index);
    }
  }
}

float round_to_bf16(float value) {
  if (std::isnan(value)) return value;
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace

std::int64_t masked_conv_blocks(const PackMaskedConvArgs& args) {
  return std::max<std::int64_t>(1, (args.channels + args.block_channels - 1) / args.block_channels);
}

std::int64_t count_masked_conv(const PackMaskedConvArgs& args) {
  std::int64_t count = 0;
  for (std::int64_t g = 0; g < args.groups; ++g) {
    for (std::int64_t r = 0; r < args.rows; ++r) {
      for_each_kept(args, g, r, 0, args.channels,
                    [&](std::int64_t, std::int64_t, std::int64_t) { ++count; });
    }
  }
  return count;
}

Status pack_masked_conv(const PackMaskedConvArgs& args, MaskedEntry* entries, MaskedRow* rows,
                        std::int64_t* order) {
  const std::int64_t blocks = masked_conv_blocks(args);
  std::int64_t next = 0;
  for (std::int64_t chunk = 0; chunk < args.chunks; ++chunk) {
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t from = block * args.block_channels;
      const std::int64_t to = std::min(from + args.block_channels, args.channels);
      MaskedRow* const begin = rows;
      for (std::int64_t c = args.chunk_channels[chunk]; c < args.chunk_channels[chunk + 1]; ++c) {
        std::int64_t count = 0;
        for_each_kept(args, c / args.rows, c % args.rows, from, to,
                      [&](std::int64_t, std::int64_t, std::int64_t) { ++count; });
        *rows++ = {static_cast<std::int32_t>(c), static_cast<std::int32_t>(count), 0};
      }
      std::stable_sort(begin, rows,
                       [](const MaskedRow& a, const MaskedRow& b) { return a.count < b.count; });
      bool fits = true;
      for (MaskedRow* row = begin; row < rows; ++row) {
        row->begin = next;
        const std::int64_t group = row->channel / args.rows;
        const float scale = args.row_scale == nullptr ? 1.0f : args.row_scale[row->channel];
        for_each_kept(args, group, row->channel % args.rows, from, to,
                      [&](std::int64_t c, std::int64_t tap, std::int64_t index) {
                        const std::int64_t offset =
                            (group * args.channels + c) * args.plane + args.tap_offset[tap];
                        fits = fits && offset >= INT32_MIN && offset <= INT32_MAX;
                        const float value = args.weight[index] * scale;
                        entries[next] = {args.round_to_bf16 ? round_to_bf16(value) : value,
                                         static_cast<std::int32_t>(offset)};
                        if (order != nullptr) order[next] = index;
                        ++next;
                      });
      }
      if (!fits) return {"Expected the activations of a group of images to have < 2^31 elements"};
    }
  }
  return {};
}

}  // namespace fastpie
