// Runs a CUDA kernel on the CPU: see README.md beside this file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Those of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_emulator {

constexpr unsigned kWarp = 32;
constexpr std::size_t kMaxShared = 227 * 1024;      // of compute capability 9.0
constexpr std::size_t kSmallestShared = 99 * 1024;  // of 8.6, 8.9 and 12.0
constexpr std::size_t kDefaultShared = 48 * 1024;
constexpr unsigned char kPoison = 0xff;  // NaN as a float of any width

// The dynamic shared memory of the block that runs.
extern unsigned char dynamic_shared[];

// A thread has come to the declaration of a __shared__ variable: the first one of a block fills it
// with poison.
void shared_variable(void* address, std::size_t bytes);

// Runs `body` for every thread of the grid. Returns a text that stays valid until the next failure,
// or null on success.
const char* launch(const dim3& grid, const dim3& block, std::size_t shared,
                   const std::function<void()>& body);

unsigned lane();         // of the thread that runs
unsigned warp_number();  // its warp's

// What an instruction keeps about a warp of the block that runs; null when the block begins.
std::shared_ptr<void>& warp_state(unsigned warp);

// The thread that runs waits for all other lanes of `mask` to call this with the same `what` and
// `mask`; the last one calls `finish` with the operands of all. Lanes that have returned from the
// kernel are not waited for, and their operand is null; where `aligned`, they are an error.
using Finish = void (*)(void* const operands[kWarp], unsigned mask);
void collective(const char* what, unsigned mask, void* operand, Finish finish,
                bool aligned = false);

// __syncthreads and its relatives: waits for the block, gives the sum of all `value`s.
int barrier(const char* what, int value);

// The thread that runs cannot go on: the launch fails with `message`.
[[noreturn]] void fail(const char* message);

// cp.async. `bytes` are written, of which the first `source_bytes` are copied; the others are 0.
void copy_async(void* destination, const void* source, std::size_t bytes, std::size_t source_bytes);
void copy_commit();
void copy_wait(unsigned pending_groups);

// Tensor cores that read shared memory themselves see what a thread's copies have brought, from its
// next fence on.
void fence_for_products();
bool is_fenced_for_products(std::size_t shared_address);
std::size_t shared_address(const void* shared);  // offset in the dynamic shared memory

}  // namespace cuda_emulator
