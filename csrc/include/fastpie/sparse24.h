// sparse24: the kept weights of a layer packed for sparse tensor cores, without loss, and the
// convolution with them.
//
// A weight is read as a matrix [filters, columns], columns = taps * channels with channels fastest
// (weight[k, tap, c] of masked_conv_nhwc.h). Sparse tensor cores read at most two of four
// neighbouring columns (a group) of a row. Where more are kept, one or two of them are *spilled*:
// the columns are followed by extra ones, chosen for each tile of `rows` filters, that repeat a
// column of the tile; a spilled weight is stored in the extra column that repeats its own, and
// there, too, at most two weights of a row lie in each group of four. So for every row
//
//   sum over kept c of weight[c] * input[c] = sum over slots j of value[j] * input[column(j)]
//
// with the same products, whatever the mask: a dense weight doubles the columns, a mask without an
// overfull group adds none.
//
// Which columns: two columns of a group serve every row, since a row with three kept misses but one
// of them; one serves where it is kept in every overfull row and no row keeps all four. The packing
// takes that least number in each group and fills groups of extra columns with the first that fit.
//
// Packing goes by the mask: a kept weight of value 0 is kept, and the places do not depend on the
// values. Removed weights are not read, be they NaN.
//
// The layout is what `mma.sp::ordered_metadata.sync.aligned.m16n8k32` of 16-bit types reads (PTX
// ISA, "Matrix fragments for sparse mma.m16n8k32"). A tile is a sequence of steps of 32 columns:
// those of the weight, the last step filled up with empty columns, then the extra ones. Step s
// (counted over all tiles) holds
//
//   values    [step][rows / 16][32 lanes][8]  the eight elements of operand A of each lane. Element
//             i of lane 4 * g + t belongs to row 16 * block + g + 8 * (i / 2 % 2) and to the group
//             of columns t + 4 * (i / 4) of the step; i % 2 is the first or second of the two
//             columns of that group. 0 in places that no weight takes
//   order     as values: index of the weight, row * columns + column, or -1
//   metadata  [step][rows / 32][32 lanes] one word per lane for two blocks of 16 rows: lanes with
//             t = 0, 1 hold block 2 * pair (sparsity selector 0), lanes with t = 2, 3 block
//             2 * pair + 1 (selector 1). Bits 0 to 15 are of row g, bits 16 to 31 of row g + 8;
//             t % 2 = 0 holds columns 0 to 15 of the step, 1 columns 16 to 31; there bits 4h to
//             4h + 3 are group h: two bits for the place of the first column in the group and two
//             for the second, the first below the second
//   copies    [extra columns] which column each extra one repeats, tile by tile, ascending. Places
//             that are not named are empty columns, which count as zero
//
// A kernel that walks through the columns in order can fill the extra steps on the way and needs to
// hold two of them: once a column has gone to one step, none goes to those before its predecessor.
#pragma once

#include <cstdint>

#include "fastpie/activation.h"
#include "fastpie/status.h"

namespace fastpie {

constexpr std::int64_t kSparse24Step = 32;  // columns

inline std::int64_t sparse24_main_steps(std::int64_t columns) {
  return (columns + kSparse24Step - 1) / kSparse24Step;
}

struct PackSparse24Args {
  const bool* keep;  // [filters, columns] contiguous; filters * columns < 2^31
  std::int64_t filters;
  std::int64_t columns;
  std::int64_t rows;  // of a tile: a multiple of 32, at most 256. The last tile has empty rows
};

struct Sparse24Tile {
  std::int64_t steps;
  std::int64_t overfull;  // pairs of a row and a group with more than two kept weights
  std::int64_t spilled;   // weights in extra columns
  std::int64_t extra;     // extra columns that are not empty
};

struct Sparse24Copy {
  std::int32_t column;
  std::int32_t slot;  // counted from the first extra column of the tile
};

// What each of the ceil(filters / rows) tiles needs.
Status count_sparse24(const PackSparse24Args& args, Sparse24Tile* tiles, int threads);

// `step_begin` and `copy_begin` [tiles + 1]: the first step and copy of each tile and the end, sums
// of what count_sparse24 gave.
Status pack_sparse24(const PackSparse24Args& args, const std::int64_t* step_begin,
                     const std::int64_t* copy_begin, std::int32_t* order, std::uint32_t* metadata,
                     Sparse24Copy* copies, int threads);

// sparse24_conv: the pruned model's convolution with a weight so packed, on channels-last tensors;
// what masked_conv_nhwc.h says of one model and one group, argument for argument:
//
//   output[n, p, k] = activate(scale[k] * sum over taps t and channels c of
//                                  weight[k, t, c] * mask[k, t, c]
//                                  * input[n, p * stride - padding + t * dilation, c]
//                              + bias[k] + residual[n, p, k])
//
// The sum is fp32. Unlike there, an input that is not finite shows where a removed weight happens
// to share its place with a value 0, and not where it does not.
//
// Limits: bf16 and fp16; channels a multiple of 32, so that a step lies within one tap; tiles of 64
// or 128 rows; at most 256 taps; fewer than 2^31 elements in an image. `input`, `values`
// and `metadata` are aligned to 16 bytes.
struct Sparse24ConvArgs {
  const void* input;   // [images, input_size, channels] contiguous
  const void* values;  // [steps, rows / 16, 32, 8] and so on, see above
  const std::uint32_t* metadata;
  const Sparse24Copy* copies;
  const std::int64_t* step_begin;  // [ceil(filters / rows) + 1], where the kernel can read it
  const std::int64_t* copy_begin;  // likewise
  const float* scale;              // [filters], or null: 1
  const float* bias;               // [filters], or null: 0
  const void* residual;            // as output, or null
  void* output;                    // [images, output_size, filters] contiguous; overlaps no input
  DType dtype;
  std::int64_t images;
  std::int64_t channels;
  std::int64_t filters;
  std::int64_t rows;
  std::int64_t tile_pixels;  // 64 or 128 pixels of the output in a block; 0: a default
  std::int64_t input_size[3];
  std::int64_t output_size[3];
  std::int64_t kernel[3];
  std::int64_t stride[3];
  std::int64_t padding[3];  // before; what lies behind follows from output_size
  std::int64_t dilation[3];
  Activation activation;
};

namespace cuda {
Status sparse24_conv(const Sparse24ConvArgs& args, void* stream);
}

}  // namespace fastpie
