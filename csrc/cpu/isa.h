// The instruction sets that the CPU kernels are compiled for, and the choice among them.
//
// Every kernel source in this folder is compiled once per instruction set, with FASTPIE_ISA set to
// `baseline`, `avx2`, `avx512` or
// `avx512_bf16`; what it defines lies in namespace fastpie::cpu::FASTPIE_ISA. Such
// a source must not instantiate a template or inline function of the standard library: the linker
// keeps one copy of those for the whole program, and it could keep the one compiled for AVX-512.
// tests/csrc/test_symbols.py reads the object files for this.
#pragma once

#include "fastpie/status.h"

namespace fastpie::cpu {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
constexpr int kIsaCount = 4;

const char* isa_name(Isa isa);
bool isa_compiled(Isa isa);
bool isa_supported(Isa isa);  // by this processor and its operating system

// The best supported set, or the one that FASTPIE_CPU_CAPABILITY names (baseline, default, avx2,
// avx512, avx512_bf16). Read at every call, so that a test can force each set in one process.
Status active_isa(Isa* isa);

}  // namespace fastpie::cpu
