// masked_conv: convolution with the kept weights alone, on shifted views.
//
// Activations lie as positions: `plane` elements per channel, in which moving by one filter tap is
// one constant offset. A 1D, 2D or 3D convolution of any dilation is such a sum of shifted views
// where rows of pixels are followed by zeros (the halo); a stride takes the input apart into one
// plane per phase; several images may be interleaved, and a linear layer is the case of one pixel.
// Who calls chooses that geometry (python/fastpie/ops/positions.py) and this kernel sees only
//
//   output[g][row.channel][p] = activate(bias[row.channel]
//                                        + sum over entries of value * input[g][p + offset]
//                                        + residual[g][row.channel][p])
//
// for every position p of every tile; positions whose bit in `valid` is not set become +0, so that
// the halo of the output is zero again.
//
// Entries are packed by pack_masked_conv: rows are cut into `chunks` of consecutive channels (the
// unit that goes to a thread when there are few tiles) and, inside a chunk, into `blocks` of input
// channels whose part of a tile fits the L1 cache; inside a block rows are sorted by their number
// of entries, so that the length of the inner loop is predicted. Partial sums of a block are kept
// in the output.
#pragma once

#include <cstdint>

#include "fastpie/activation.h"
#include "fastpie/status.h"

namespace fastpie {

struct MaskedEntry {
  float value;
  std::int32_t offset;  // elements, from a position of the output to the one of the input
};

struct MaskedRow {
  std::int32_t channel;
  std::int32_t count;
  std::int64_t begin;  // first of its entries
};

struct MaskedTile {
  std::int32_t position;  // a multiple of the line (16 fp32, 32 bf16)
  std::int32_t lines;
};

struct MaskedConvArgs {
  const MaskedEntry* entries;
  const MaskedRow* rows;               // [chunks][blocks][channels of the chunk]
  const std::int64_t* chunk_channels;  // [chunks + 1] first output channel of each chunk
  std::int64_t chunks;
  std::int64_t blocks;  // 1 for bf16
  const float* bias;    // [channels] or null

  const void* input;     // position 0 of channel 0 of the first group
  void* output;          // must not overlap the others
  const void* residual;  // or null
  DType dtype;           // fp32 or bf16
  std::int64_t groups;   // of images
  std::int64_t input_group;
  std::int64_t output_group;
  std::int64_t output_channel;  // elements from one channel to the next
  std::int64_t residual_group;
  std::int64_t residual_channel;

  const MaskedTile* tiles;
  std::int64_t tile_count;
  const std::uint32_t* valid;  // [position / line], one bit per position, or null: all are valid
  Activation activation;
};

// masked_conv_chain: layers of one geometry, each reading what others before it wrote, tile by tile
// instead of layer by layer, so that a tile is read again while it is in the cache.
//
// In step s layer k computes tile s - lags[k], in the order of `layers`. A layer must lag behind
// the one it reads from by as many tiles as its views reach ahead. All layers have the same dtype,
// groups, tiles and valid bits, and one chunk. The result is that of calling masked_conv for one
// layer after another. Groups go to threads.
struct MaskedConvChainArgs {
  const MaskedConvArgs* layers;  // [count]
  const std::int64_t* lags;      // [count] >= 0
  std::int64_t count;
};

// masked_conv_weight_gradient: the gradient of each kept weight,
//
//   gradient[row.begin + i] += sum over g and positions of output_gradient[g][row.channel][p]
//                                                          * input[g][p + offset of entry i]
//
// fp32. Positions outside `valid` must be zero in output_gradient. Uses of the arguments as above:
// `output` is the output gradient, read only; blocks is 1; bias, residual, valid and activation are
// not used.
struct MaskedConvWeightGradientArgs {
  MaskedConvArgs forward;
  const float* output_gradient;
  float* gradient;  // [entries]
};

// Packing. The weight is read as [groups][rows][channels][taps] through strides, so that the same
// function packs a convolution and its transpose (the gradient of the input).
struct PackMaskedConvArgs {
  const float* weight;
  const bool* keep;        // same strides as the weight
  const float* row_scale;  // [groups * rows], a factor of each row (a folded BatchNorm), or null
  std::int64_t groups, rows, channels, taps;
  std::int64_t group_stride, row_stride, channel_stride;  // elements of `weight`
  const std::int64_t* tap_index;                          // [taps] elements of `weight`
  const std::int64_t* tap_offset;                         // [taps] elements of an activation
  std::int64_t plane;                                     // elements from channel to channel
  std::int64_t block_channels;                            // input channels of a group in a block
  const std::int64_t* chunk_channels;                     // [chunks + 1]
  std::int64_t chunks;
  bool round_to_bf16;
};

// Blocks that the packing has.
std::int64_t masked_conv_blocks(const PackMaskedConvArgs& args);
// Kept weights among those that the taps name: the length of `entries`.
std::int64_t count_masked_conv(const PackMaskedConvArgs& args);
// `entries` as counted, `rows` [chunks][blocks][channels of the chunk] = groups * rows * blocks,
// `order` [entries] or null: which element of `weight` each entry came from.
Status pack_masked_conv(const PackMaskedConvArgs& args, MaskedEntry* entries, MaskedRow* rows,
                        std::int64_t* order);

namespace cpu {
Status masked_conv(const MaskedConvArgs& args, int threads);
Status masked_conv_chain(const MaskedConvChainArgs& args, int threads);
Status masked_conv_weight_gradient(const MaskedConvWeightGradientArgs& args, int threads);
}  // namespace cpu

}  // namespace fastpie
