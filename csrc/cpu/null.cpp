// CPU kernel of `null`. One source, compiled once per instruction set (see isa.h).
#include "fastpie/null.h"

#include "parallel.h"

namespace fastpie::cpu::FASTPIE_ISA {
namespace {

void copy_range(std::int64_t begin, std::int64_t end, void* context) {
  const auto& args = *static_cast<const NullArgs*>(context);
  for (std::int64_t i = begin; i < end; ++i) args.output[i] = args.input[i];
}

}  // namespace

Status null(const NullArgs& args, int threads) {
  // 16 Ki values, 64 KiB: enough work to be worth waking a thread for.
  parallel_for(args.count, 16384, threads, &copy_range, const_cast<NullArgs*>(&args));
  return {};
}

}  // namespace fastpie::cpu::FASTPIE_ISA
