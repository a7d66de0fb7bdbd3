// The scheduler: threads of a block are fibers on the stack of nobody else.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// ---------------------------------------------------------------------------- fibers

#ifdef __x86_64__
// Saves the registers that a function must keep, stores the stack pointer to *save, and continues
// where `load` was saved. swapcontext would do, with a system call each time.
extern "C" void fastpie_switch_stack(void** save, void* load);
asm(R"(
.text
.globl fastpie_switch_stack
.hidden fastpie_switch_stack
.type fastpie_switch_stack, @function
fastpie_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastpie_switch_stack, .-fastpie_switch_stack
)");
#endif

namespace cuda_emulator {

alignas(1024) unsigned char dynamic_shared[kMaxShared];

namespace {

constexpr std::size_t kStack = 256 * 1024;
constexpr std::size_t kPage = 64 * 1024;  // a multiple of every page size
constexpr unsigned kMaxThreads = 1024;

#ifndef __SANITIZE_ADDRESS__
void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
void __asan_poison_memory_region(const volatile void*, std::size_t) {}
void __asan_unpoison_memory_region(const volatile void*, std::size_t) {}
#endif

struct Fiber {
  unsigned char* stack = nullptr;  // lowest address; null for the scheduler's own
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#ifdef __x86_64__
  void* saved = nullptr;
#else
  ucontext_t saved;
#endif
};

void switch_to(Fiber* from, Fiber* to) {
  __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->stack_bytes);
#ifdef __x86_64__
  fastpie_switch_stack(&from->saved, to->saved);
#else
  swapcontext(&from->saved, &to->saved);
#endif
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
}

// `to` starts with `entry`, which never returns.
void prepare(Fiber* to, void (*entry)()) {
  to->fake_stack = nullptr;
  if (to->stack == nullptr) {
    void* const memory = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
      std::perror("cuda_emulator: stacks");
      std::abort();
    }
    to->stack = static_cast<unsigned char*>(memory) + kPage;  // below it a page to fault on
    to->stack_bytes = kStack;
  }
#ifdef __x86_64__
  // Six registers, the address to return to, and one word so that the stack is aligned as after a
  // call.
  void** top = reinterpret_cast<void**>(to->stack + kStack) - 8;
  std::fill_n(top, 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);
  to->saved = top;
#else
  getcontext(&to->saved);
  to->saved.uc_stack.ss_sp = to->stack;
  to->saved.uc_stack.ss_size = kStack;
  to->saved.uc_link = nullptr;
  makecontext(&to->saved, entry, 0);
#endif
}

// ---------------------------------------------------------------------------- threads

struct Copy {
  void* destination;
  const void* source;
  std::size_t bytes, source_bytes;
};

enum class State { kReady, kBarrier, kCollective, kReturned };

struct Thread {
  Fiber* fiber;
  uint3 index;
  unsigned number;
  State state;
  const char* what;  // it waits for
  unsigned mask;
  void* operand;
  Finish finish;
  bool aligned;
  int value;  // of the barrier: what it brings, then the sum
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open_group;
  std::vector<std::size_t> unfenced;  // places in `unfenced_by`
};

struct Warp {
  unsigned live;     // lanes that have not returned
  unsigned waiting;  // lanes that wait in a collective
  std::shared_ptr<void> state;
};

std::mutex one_launch;
Fiber scheduler;
std::deque<Fiber> fibers;     // their stacks are kept for the next launch
std::vector<Thread> threads;  // of the block
std::vector<Warp> warps;
Thread* current;
std::vector<unsigned> ready;
unsigned returned, at_barrier;
const std::function<void()>* body;
std::string failure;
bool failed;
std::vector<void*> shared_seen;
// For each 16 bytes of dynamic shared memory: the thread, counted from 1, whose copy lies there
// without a fence since then.
std::array<unsigned, kMaxShared / 16> unfenced_by;
std::uint64_t random_state;

std::uint64_t random_below(std::uint64_t limit) {  // splitmix64
  std::uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (z ^ (z >> 31)) % limit;
}

std::uint64_t seed() {
  const char* const text = std::getenv("FASTPIE_EMULATOR_SEED");
  return text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
}

void make_ready(Thread* thread) {
  thread->state = State::kReady;
  ready.push_back(thread->number);
}

void release_barrier() {
  int sum = 0;
  for (const Thread& thread : threads) sum += thread.state == State::kBarrier ? thread.value : 0;
  for (Thread& thread : threads) {
    if (thread.state != State::kBarrier) continue;
    thread.value = sum;
    make_ready(&thread);
  }
  at_barrier = 0;
}

// Finishes the collective that `thread` waits for if nobody is missing.
bool try_to_finish(const Thread& thread) {
  Warp* const warp = &warps[thread.number / kWarp];
  Thread* const first = &threads[thread.number / kWarp * kWarp];
  const unsigned wanted = thread.aligned ? thread.mask : thread.mask & warp->live;
  if ((warp->waiting & wanted) != wanted) return false;
  void* operands[kWarp] = {};
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((wanted >> i & 1) == 0) continue;
    if (first[i].mask != thread.mask || first[i].finish != thread.finish) return false;
    operands[i] = first[i].operand;
  }
  thread.finish(operands, wanted);
  warp->waiting &= ~wanted;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (wanted >> i & 1) make_ready(&first[i]);
  }
  return true;
}

void yield() { switch_to(current->fiber, &scheduler); }

void run_thread() {
  const void* stack = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &scheduler.stack_bytes);
  scheduler.stack = static_cast<unsigned char*>(const_cast<void*>(stack));
  (*body)();
  current->state = State::kReturned;
  ++returned;
  warps[current->number / kWarp].live &= ~(1u << lane());
  if (at_barrier > 0 && at_barrier + returned == threads.size()) release_barrier();
  const unsigned first = current->number / kWarp * kWarp;
  for (unsigned i = first; i < first + kWarp && i < threads.size(); ++i) {
    if (threads[i].state == State::kCollective) try_to_finish(threads[i]);
  }
  yield();
  std::abort();  // nobody resumes a thread that has returned
}

std::string describe() {
  std::string text = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
                     ", " + std::to_string(blockIdx.z) + "): no thread can go on.";
  std::vector<bool> told(threads.size());
  for (std::size_t i = 0; i < threads.size(); ++i) {
    if (told[i]) continue;
    const auto same = [&](const Thread& t) {
      return t.state == threads[i].state &&
             (t.state == State::kReturned || std::strcmp(t.what, threads[i].what) == 0);
    };
    unsigned count = 0;
    for (std::size_t j = i; j < threads.size(); ++j) {
      if (same(threads[j])) {
        told[j] = true;
        ++count;
      }
    }
    text += " " + std::to_string(count) + " threads (the first is " + std::to_string(i) + ") ";
    text += threads[i].state == State::kReturned ? "have returned."
                                                 : std::string("wait at ") + threads[i].what + ".";
  }
  return text;
}

void run_block() {
  shared_seen.clear();
  ready.clear();
  returned = at_barrier = 0;
  unfenced_by.fill(0);
  for (Warp& warp : warps) warp = {};
  for (Thread& thread : threads) {
    warps[thread.number / kWarp].live |= 1u << thread.number % kWarp;
    prepare(thread.fiber, run_thread);
    thread.groups.clear();
    thread.open_group.clear();
    thread.unfenced.clear();
    make_ready(&thread);
  }
  while (!ready.empty() && !failed) {
    const std::size_t pick = random_below(ready.size());
    std::swap(ready[pick], ready.back());
    current = &threads[ready.back()];
    ready.pop_back();
    threadIdx = current->index;
    switch_to(&scheduler, current->fiber);
  }
  if (returned != threads.size() && !failed) {
    failure = describe();
    failed = true;
  }
  if (failed) {  // frames were left behind
    for (Thread& thread : threads) __asan_unpoison_memory_region(thread.fiber->stack, kStack);
  }
}

}  // namespace

// ---------------------------------------------------------------------------- what threads call

unsigned lane() { return current->number % kWarp; }

unsigned warp_number() { return current->number / kWarp; }

std::shared_ptr<void>& warp_state(unsigned warp) { return warps[warp].state; }

void fail(const char* message) {
  failure = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
            std::to_string(blockIdx.z) + "), thread " + std::to_string(current->number) + ": " +
            message;
  failed = true;
  yield();
  std::abort();
}

int barrier(const char* what, int value) {
  current->state = State::kBarrier;
  current->what = what;
  current->value = value;
  ++at_barrier;
  if (at_barrier + returned == threads.size()) release_barrier();
  yield();
  return current->value;
}

void collective(const char* what, unsigned mask, void* operand, Finish finish, bool aligned) {
  if ((mask >> lane() & 1) == 0) fail("the lane is not in the mask of its own collective");
  current->state = State::kCollective;
  current->what = what;
  current->mask = mask;
  current->operand = operand;
  current->finish = finish;
  current->aligned = aligned;
  warps[current->number / kWarp].waiting |= 1u << lane();
  try_to_finish(*current);
  yield();
}

void shared_variable(void* address, std::size_t bytes) {
  if (std::find(shared_seen.begin(), shared_seen.end(), address) != shared_seen.end()) return;
  shared_seen.push_back(address);
  std::memset(address, kPoison, bytes);
}

void copy_async(void* destination, const void* source, std::size_t bytes,
                std::size_t source_bytes) {
  if (reinterpret_cast<std::uintptr_t>(destination) % bytes != 0 ||
      (source_bytes != 0 && reinterpret_cast<std::uintptr_t>(source) % bytes != 0)) {
    fail("cp.async of addresses that are not aligned to its size");
  }
  if (source_bytes > bytes) fail("cp.async of more bytes than its size");
  std::memset(destination, kPoison, bytes);  // undefined until it was waited for
  current->open_group.push_back({destination, source, bytes, source_bytes});
}

void copy_commit() {
  current->groups.push_back(std::move(current->open_group));
  current->open_group.clear();
}

void copy_wait(unsigned pending_groups) {
  while (current->groups.size() > pending_groups) {
    for (const Copy& copy : current->groups.front()) {
      unsigned char* const to = static_cast<unsigned char*>(copy.destination);
      if (copy.source_bytes != 0) std::memcpy(to, copy.source, copy.source_bytes);
      std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
      if (to < dynamic_shared || to >= dynamic_shared + kMaxShared) continue;
      const std::size_t place = shared_address(to) / 16;
      unfenced_by[place] = current->number + 1;
      current->unfenced.push_back(place);
    }
    current->groups.pop_front();
  }
}

void fence_for_products() {
  for (const std::size_t place : current->unfenced) {
    if (unfenced_by[place] == current->number + 1) unfenced_by[place] = 0;
  }
  current->unfenced.clear();
}

bool is_fenced_for_products(std::size_t shared_address) {
  return unfenced_by[shared_address / 16] == 0;
}

std::size_t shared_address(const void* shared) {
  return static_cast<std::size_t>(static_cast<const unsigned char*>(shared) - dynamic_shared);
}

// ---------------------------------------------------------------------------- launches

const char* launch(const dim3& grid, const dim3& block, std::size_t shared,
                   const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  const unsigned count = block.x * block.y * block.z;
  if (blocks == 0 || count == 0 || count > kMaxThreads || block.z > 64 || grid.y > 65535 ||
      grid.z > 65535 || grid.x > 0x7fffffffu) {
    failure = "a grid or block of invalid size";
    return failure.c_str();
  }
  if (fibers.size() < count) fibers.resize(count);
  threads.resize(count);
  warps.resize((count + kWarp - 1) / kWarp);
  gridDim = grid;
  blockDim = block;
  for (unsigned i = 0; i < count; ++i) {
    threads[i].fiber = &fibers[i];
    threads[i].number = i;
    threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  body = &kernel;
  failed = false;
  random_state = seed();
  std::uint64_t step = random_below(blocks) + 1;  // blocks in the order of a random progression
  while (std::gcd(step, blocks) != 1) ++step;
  std::uint64_t at = random_below(blocks);
  for (std::uint64_t i = 0; i < blocks && !failed; ++i, at = (at + step) % blocks) {
    blockIdx = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                static_cast<unsigned>(at / grid.x / grid.y)};
    __asan_unpoison_memory_region(dynamic_shared, kMaxShared);
    std::memset(dynamic_shared, kPoison, shared);
    __asan_poison_memory_region(dynamic_shared + shared, kMaxShared - shared);
    run_block();
  }
  __asan_unpoison_memory_region(dynamic_shared, kMaxShared);
  return failed ? failure.c_str() : nullptr;
}

}  // namespace cuda_emulator
