// One way to use the cores: the OpenMP runtime that torch has already loaded.
#pragma once

#include <cstdint>

namespace fastpie::cpu {

// Calls body(begin, end, context) over [0, count) in blocks of at most `grain`, on at most
// `threads` threads. Blocks are handed out as threads become free, so `body` must not depend on
// which thread runs it. Without an OpenMP runtime in the process it runs on the calling thread.
using RangeBody = void (*)(std::int64_t begin, std::int64_t end, void* context);
void parallel_for(std::int64_t count, std::int64_t grain, int threads, RangeBody body,
                  void* context);

// The same in shares: thread t begins with the t-th of `threads` equal ranges of [0, count), one
// index at a time, and then takes what the others have left. Called again with the same count, a
// thread meets the same indices, and its cache holds what it wrote for them.
void parallel_ranges(std::int64_t count, int threads, RangeBody body, void* context);

// Whether an OpenMP runtime was found in the process.
bool has_openmp_runtime();

}  // namespace fastpie::cpu
