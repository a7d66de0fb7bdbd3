#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>

namespace fastpie::cpu {
namespace {

// libgomp's entry point, also exported by Intel's and LLVM's runtimes on Linux. It is looked up
// rather than linked: linking would bring a second OpenMP runtime beside torch's, with a second
// pool of threads.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_gomp_parallel() {
  static const auto entry = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return entry;
}

using ThreadNumber = int (*)();

int thread_number() {
  static const auto entry =
      reinterpret_cast<ThreadNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  return entry == nullptr ? 0 : entry();
}

struct Job {
  std::int64_t count;
  std::int64_t grain;
  RangeBody body;
  void* context;
  std::atomic<std::int64_t> next{0};
};

void work(void* data) {
  auto& job = *static_cast<Job*>(data);
  for (;;) {
    const std::int64_t begin = job.next.fetch_add(job.grain, std::memory_order_relaxed);
    if (begin >= job.count) return;
    job.body(begin, std::min(begin + job.grain, job.count), job.context);
  }
}

// A counter on a cache line of its own.
struct alignas(64) Share {
  std::atomic<std::int64_t> next{0};
  std::int64_t end = 0;
};

constexpr int kMaxShares = 256;

struct SharedJob {
  Share shares[kMaxShares];
  int count;
  RangeBody body;
  void* context;
};

void work_on_shares(void* data) {
  auto& job = *static_cast<SharedJob*>(data);
  const int own = thread_number();
  for (int i = 0; i < job.count; ++i) {
    Share& share = job.shares[(own + i) % job.count];
    for (;;) {
      const std::int64_t index = share.next.fetch_add(1, std::memory_order_relaxed);
      if (index >= share.end) break;
      job.body(index, index + 1, job.context);
    }
  }
}

}  // namespace

bool has_openmp_runtime() { return find_gomp_parallel() != nullptr; }

void parallel_for(std::int64_t count, std::int64_t grain, int threads, RangeBody body,
                  void* context) {
  if (count <= 0) return;
  grain = std::max<std::int64_t>(grain, 1);
  const std::int64_t blocks = (count + grain - 1) / grain;
  const auto wanted = static_cast<unsigned>(std::min<std::int64_t>(std::max(threads, 1), blocks));
  Job job{count, grain, body, context};
  const GompParallel gomp_parallel = find_gomp_parallel();
  if (wanted == 1 || gomp_parallel == nullptr) {
    work(&job);
  } else {
    gomp_parallel(&work, &job, wanted, 0);
  }
}

void parallel_ranges(std::int64_t count, int threads, RangeBody body, void* context) {
  if (count <= 0) return;
  const GompParallel gomp_parallel = find_gomp_parallel();
  const std::int64_t wanted = std::min<std::int64_t>({std::max(threads, 1), count, kMaxShares});
  if (wanted == 1 || gomp_parallel == nullptr) {
    body(0, count, context);
    return;
  }
  SharedJob job;
  job.count = static_cast<int>(wanted);
  job.body = body;
  job.context = context;
  for (std::int64_t t = 0; t < wanted; ++t) {
    job.shares[t].next.store(count * t / wanted, std::memory_order_relaxed);
    job.shares[t].end = count * (t + 1) / wanted;
  }
  gomp_parallel(&work_on_shares, &job, static_cast<unsigned>(wanted), 0);
}

}  // namespace fastpie::cpu
