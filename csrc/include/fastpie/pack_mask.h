// pack_mask: one bit for each weight of a mask, in the order that the kernels on channels-last
// tensors read it (masked_conv_nhwc.h).
//
//   codes  uint8 [filters, channels, taps] contiguous, a weight's order in torch: the index of the
//          level of a ladder that removes the weight. A weight is kept at `level` where
//          code > level; a bool mask is codes of 0 and 1, kept at level 0
//   words  uint32 [filters, taps, ceil(channels / 32)] contiguous: bit c % 32 of word c / 32 is set
//          where the weight of channel c is kept; bits beyond `channels` are 0. Every word is
//          written; overlaps no input
//   level  in [0, 255]
//
// A size of 0 does nothing.
#pragma once

#include <cstdint>

#include "fastpie/status.h"

namespace fastpie {

struct PackMaskArgs {
  const std::uint8_t* codes;
  std::uint32_t* words;
  std::int64_t filters;
  std::int64_t channels;
  std::int64_t taps;
  std::int32_t level;
};

namespace cpu {
Status pack_mask(const PackMaskArgs& args, int threads);
}
namespace cuda {
Status pack_mask(const PackMaskArgs& args, void* stream);
}

}  // namespace fastpie
