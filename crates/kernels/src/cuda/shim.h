// Runs a .cu text on the CPU, as C++: one fiber per CUDA thread, blocks one after another. Included before the text.
//
// `__syncthreads` and `__shfl_xor_sync` yield until all who must arrive have; when nobody can run, the process ends with
// the barrier's line. COTK_ORDER (0 forward, 1 backward, 2 shuffled) picks the order in which fibers run: a missing
// barrier then shows. Shared memory starts as NaN. Not covered: the memory model, occupancy, alignment of loads other
// than uint4's, which is checked.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>

struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

// Bounds of the section that holds all shared memory; the linker makes them.
extern "C" char __start_cotk_shared[], __stop_cotk_shared[];

namespace shim {
constexpr size_t STACK = 64 * 1024;
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
    const char* waits = nullptr;  // at which barrier, for the message
    int line = 0;
};
struct Warp { unsigned value[2][32]; unsigned arrived[2] = {0, 0}; unsigned generation = 0; };
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline unsigned current = 0, barrier_arrived = 0, barrier_generation = 0, progress = 0;
inline uint3 block_index, grid, block_size;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what, int line) {
    std::fprintf(stderr, "shim: %s at line %d\n", what, line);
    std::exit(2);
}
inline void yield() { swapcontext(&fibers[current].context, &scheduler); }
inline unsigned live() {
    unsigned n = 0;
    for (auto& f : fibers) n += !f.done;
    return n;
}
inline void sync_threads(int line) {
    Fiber& me = fibers[current];
    const unsigned mine = barrier_generation;
    barrier_arrived++;
    me.waits = "__syncthreads", me.line = line;
    while (mine == barrier_generation) {
        if (barrier_arrived >= live()) { barrier_arrived = 0; barrier_generation++; break; }
        yield();
    }
    me.waits = nullptr, progress++;
}
inline unsigned shuffle_xor(unsigned mask, unsigned value, unsigned lane_mask, int line) {
    if (mask != 0xffffffffu) fail("a shuffle of part of a warp", line);
    Fiber& me = fibers[current];
    const unsigned lane = current % 32, self = current;
    Warp& warp = warps[self / 32];
    const unsigned mine = warp.generation;
    warp.value[mine % 2][lane] = value;
    me.waits = "__shfl_xor_sync", me.line = line;
    if (++warp.arrived[mine % 2] == 32) { warp.arrived[mine % 2] = 0; warp.generation++; }
    while (warp.generation == mine) yield();
    me.waits = nullptr, progress++;
    return warp.value[mine % 2][lane ^ lane_mask];
}
inline void enter() {
    body();
    fibers[current].done = true;
    progress++;
    swapcontext(&fibers[current].context, &scheduler);
}
inline void launch(uint3 g, uint3 b, std::function<void()> kernel) {
    const char* text = std::getenv("COTK_ORDER");
    const int order = text ? std::atoi(text) : 0;
    grid = g, block_size = b, body = std::move(kernel);
    unsigned random = 12345;
    for (unsigned y = 0; y < g.y; y++) for (unsigned x = 0; x < g.x; x++) {
        block_index = {x, y, 0};
        std::memset(__start_cotk_shared, 0xff, __stop_cotk_shared - __start_cotk_shared);
        fibers.clear();
        fibers.resize(b.x);
        warps.assign((b.x + 31) / 32, Warp{});
        barrier_arrived = 0;
        for (auto& f : fibers) {
            f.stack.reset(new char[STACK]);
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.get();
            f.context.uc_stack.ss_size = STACK;
            f.context.uc_link = nullptr;
            makecontext(&f.context, enter, 0);
        }
        std::vector<unsigned> turn(b.x);
        for (unsigned i = 0; i < b.x; i++) turn[i] = order == 1 ? b.x - 1 - i : i;
        unsigned idle = 0;
        while (live() > 0) {
            if (order == 2) for (unsigned i = b.x - 1; i > 0; i--) {
                random = random * 1664525u + 1013904223u;
                std::swap(turn[i], turn[(random >> 8) % (i + 1)]);
            }
            const unsigned before = progress;
            for (unsigned i : turn) if (!fibers[i].done) { current = i; swapcontext(&scheduler, &fibers[i].context); }
            // Two rounds: the last to arrive may have run before those who wait.
            idle = progress == before ? idle + 1 : 0;
            if (idle > 2) for (auto& f : fibers) if (!f.done && f.waits) fail(f.waits, f.line);
        }
    }
}
}  // namespace shim

#define __global__
#define __shared__ static __attribute__((section("cotk_shared")))
#define COTK_DEVICE static inline
#define threadIdx (uint3{shim::current, 0, 0})
#define blockIdx (shim::block_index)
#define gridDim (shim::grid)
#define blockDim (shim::block_size)
#define __syncthreads() shim::sync_threads(__LINE__)
#define __shfl_xor_sync(mask, value, lane_mask) shim::shuffle_xor(mask, value, lane_mask, __LINE__)

COTK_DEVICE float as_float(unsigned x) { float f; std::memcpy(&f, &x, 4); return f; }
COTK_DEVICE unsigned as_bits(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
COTK_DEVICE float f16_to_f32(unsigned short h) {
    const unsigned sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 1023u;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp((float)fraction, -24);
    if (exponent == 31) return as_float(sign | 0x7f800000u | fraction << 13);
    return as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
COTK_DEVICE int dot4(unsigned a, unsigned b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(a >> 8 * i & 255) * (int)(signed char)(b >> 8 * i & 255);
    return c;
}
