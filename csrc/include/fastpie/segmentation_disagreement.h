// segmentation_disagreement: hard and soft intersection over union (IoU) of the foreground that two
// segmentation models predict, image by image, in one pass over memory.
//
//   dense     [images, classes, pixels]          strides as in `dense_strides`
//   pruned    [levels, images, classes, pixels]  strides as in `pruned_strides`
//   partials  [levels, images, iou_chunks(pixels)], any content; overwritten
//   out       fp32 [kIouCount, levels, images] contiguous; every element is written
//
// Strides count elements and may be anything, 0 too; the last is the one from pixel to pixel, and 1
// is the fast one. With p the probabilities of the dense model and q those of the pruned one:
//
//   classes == 1   one probability a pixel, the sigmoid of the logit; foreground is a logit above 0
//   classes >= 2   softmax over the classes, of which class 0 is the background; a pixel belongs
//                  to the first of its largest logits
//   kIou           pixels that both give to the same foreground class, over the sum of what the
//                  classes cover in either model; 1 where both predict background alone
//   kIouSoft       sum of min(p, q) over sum of max(p, q), over all pixels and foreground classes
//                  (Ruzicka similarity); 1 where the sum of maxima is below kNoForeground
//
// An image with a NaN or +inf logit in either model, or (classes >= 2) a pixel of nothing but -inf,
// gives NaN in both; -inf is a class of probability zero. No pixels: 1.
//
// Accuracy: kIou is the rounded quotient of exact counts. kIouSoft has probabilities in fp32 and
// sums of them in fp64, on the GPU in fp32 over the 16 pixels of a thread and in fp64 from there:
// its relative error does not grow with the image. It is about 1e-7 for ordinary images and below
// 1e-5 at worst, where all foreground probabilities are near e^-87 and fp32 tells a logit's
// distance from the largest one to 87 * 2^-24. Equal models give exactly 1.
#pragma once

#include <cstdint>

#include "fastpie/status.h"

namespace fastpie {

// The order of the rows of `out`.
enum Iou : std::int32_t { kIou = 0, kIouSoft, kIouCount };

// A sum of foreground probabilities below this is none. Far above the smallest normal fp32 number
// and so where fp32 and fp64 still agree on which images have none.
constexpr double kNoForeground = 1e-30;

// What a chunk of pixels of one image adds at one level.
struct IouPartial {
  double soft_intersection;
  double soft_union;
  std::int32_t hard_intersection;
  std::int32_t hard_union;
  std::int32_t bad;  // not 0: the scores of the image are NaN
  std::int32_t padding;
};

// A chunk is what one thread of the CPU, or one block of the GPU, adds up at a time. It depends on
// neither, so that the sums do not. (static: kernels compiled for one instruction set share no
// inline function.)
constexpr std::int64_t kIouChunk = 4096;
static constexpr std::int64_t iou_chunks(std::int64_t pixels) {
  return (pixels + kIouChunk - 1) / kIouChunk;
}

struct SegmentationDisagreementArgs {
  const void* dense;
  const void* pruned;
  IouPartial* partials;
  float* out;
  DType dtype;
  std::int64_t levels;
  std::int64_t images;
  std::int64_t classes;
  std::int64_t pixels;
  std::int64_t dense_strides[3];   // image, class, pixel
  std::int64_t pruned_strides[4];  // level, image, class, pixel
};

namespace cpu {
Status segmentation_disagreement(const SegmentationDisagreementArgs& args, int threads);
}
namespace cuda {
Status segmentation_disagreement(const SegmentationDisagreementArgs& args, void* stream);
}

}  // namespace fastpie
