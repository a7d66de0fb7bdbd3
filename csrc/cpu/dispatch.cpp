// Chooses the instruction set at run time and forwards each operation to its kernel.
#include <cstdlib>
#include <cstring>

#include "fastpie/disagreement.h"
#include "fastpie/embedding_disagreement.h"
#include "fastpie/masked_conv.h"
#include "fastpie/max_pool.h"
#include "fastpie/null.h"
#include "fastpie/pack_mask.h"
#include "fastpie/relayout.h"
#include "fastpie/segmentation_disagreement.h"
#include "isa.h"

namespace fastpie::cpu {

// Every operation: a new one is a line here.
#define FASTPIE_FOR_EACH_KERNEL(X)                             \
  X(null, NullArgs)                                            \
  X(disagreement, DisagreementArgs)                            \
  X(embedding_disagreement, EmbeddingDisagreementArgs)         \
  X(masked_conv, MaskedConvArgs)                               \
  X(masked_conv_chain, MaskedConvChainArgs)                    \
  X(masked_conv_weight_gradient, MaskedConvWeightGradientArgs) \
  X(max_pool, MaxPoolArgs)                                     \
  X(pack_mask, PackMaskArgs)                                   \
  X(relayout, RelayoutArgs)                                    \
  X(segmentation_disagreement, SegmentationDisagreementArgs)

#define FASTPIE_DECLARE_KERNEL(name, Args) Status name(const Args& args, int threads);
#define FASTPIE_DECLARE_KERNELS(isa)              \
  namespace isa {                                 \
  FASTPIE_FOR_EACH_KERNEL(FASTPIE_DECLARE_KERNEL) \
  }
FASTPIE_DECLARE_KERNELS(baseline)
#ifdef FASTPIE_X86_KERNELS
FASTPIE_DECLARE_KERNELS(avx2)
FASTPIE_DECLARE_KERNELS(avx512)
FASTPIE_DECLARE_KERNELS(avx512_bf16)
#define FASTPIE_KERNEL_TABLE(name) {&baseline::name, &avx2::name, &avx512::name, &avx512_bf16::name}
#else
#define FASTPIE_KERNEL_TABLE(name) {&baseline::name, nullptr, nullptr, nullptr}
#endif

namespace {

constexpr Isa kBestFirst[kIsaCount] = {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kBaseline};

template <typename Args>
Status run(Status (*const (&table)[kIsaCount])(const Args&, int), const Args& args, int threads) {
  Isa isa;
  const Status status = active_isa(&isa);
  return status.ok() ? table[static_cast<int>(isa)](args, threads) : status;
}

}  // namespace

const char* isa_name(Isa isa) {
  static const char* const names[kIsaCount] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(isa)];
}

bool isa_compiled(Isa isa) {
#ifdef FASTPIE_X86_KERNELS
  (void)isa;
  return true;
#else
  return isa == Isa::kBaseline;
#endif
}

bool isa_supported(Isa isa) {
  if (isa == Isa::kBaseline) return true;
#ifdef FASTPIE_X86_KERNELS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return isa == Isa::kAvx512 ? avx512 : avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Status active_isa(Isa* isa) {
  const char* wanted = std::getenv("FASTPIE_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    for (const Isa candidate : kBestFirst) {
      if (!isa_compiled(candidate) || !isa_supported(candidate)) continue;
      *isa = candidate;
      return {};
    }
  }
  if (std::strcmp(wanted, "default") == 0) wanted = "baseline";
  for (const Isa candidate : kBestFirst) {
    if (std::strcmp(wanted, isa_name(candidate)) != 0) continue;
    if (!isa_compiled(candidate) || !isa_supported(candidate)) {
      return {
          "FASTPIE_CPU_CAPABILITY names an instruction set that this processor or this build does "
          "not have; unset it, or see `fastpie doctor` for those that it has"};
    }
    *isa = candidate;
    return {};
  }
  return {
      "Expected FASTPIE_CPU_CAPABILITY to be one of baseline, default, avx2, avx512, avx512_bf16"};
}

#define FASTPIE_FORWARD(name, Args)                                                           \
  Status name(const Args& args, int threads) {                                                \
    static constexpr Status (*const kTable[])(const Args&, int) = FASTPIE_KERNEL_TABLE(name); \
    return run(kTable, args, threads);                                                        \
  }
FASTPIE_FOR_EACH_KERNEL(FASTPIE_FORWARD)

}  // namespace fastpie::cpu
