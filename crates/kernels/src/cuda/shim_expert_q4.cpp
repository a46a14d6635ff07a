// Runs expert_q4.cu on a case from standard input and writes the results to standard output, both little-endian.
// Input: u32 hidden, inner, tokens, turns, up_second; f32 zero points of gate, up, down, cell; then with a u32 length
// before each: gate plane (or the pair's), up plane, down plane, x codes, x scales, x sums.
// Output: middle codes, scales, sums; y.
#include "shim.h"
#include "expert_q4.cu"

static void take(void* at, size_t bytes) {
    if (std::fread(at, 1, bytes, stdin) != bytes) shim::fail("input ends early", 0);
}
template <class T> static T value() { T v; take(&v, sizeof v); return v; }
// 16-byte aligned, with a canary behind.
template <class T> struct Buffer {
    T* at; size_t count;
    explicit Buffer(size_t n) : count(n) {
        at = (T*)std::aligned_alloc(16, (n * sizeof(T) + 31) / 16 * 16);
        std::memset((void*)at, 0xa5, (n * sizeof(T) + 31) / 16 * 16);
    }
    void check() const {
        for (size_t i = 0; i < 16; i++)
            if (((unsigned char*)(at + count))[i] != 0xa5) shim::fail("a write behind a buffer", 0);
    }
    void put() const { check(); std::fwrite(at, sizeof(T), count, stdout); }
};
template <class T> static Buffer<T> input() {
    const uint32_t bytes = value<uint32_t>();
    Buffer<T> b(bytes / sizeof(T));
    take(b.at, bytes);
    return b;
}

int main() {
    const uint32_t hidden = value<uint32_t>(), inner = value<uint32_t>(), tokens = value<uint32_t>();
    const uint32_t turns = value<uint32_t>(), up_second = value<uint32_t>();
    const float gate_zero = value<float>(), up_zero = value<float>(), down_zero = value<float>(), cell = value<float>();
    auto gate = input<u8>(), up = input<u8>(), down = input<u8>();
    auto codes = input<u32>();
    auto scales = input<float>(), sums = input<float>();
    const uint32_t hidden_steps = (hidden + 31) / 32, inner_steps = (inner + 31) / 32;
    Buffer<u32> middle_codes(8 * inner_steps * tokens);
    Buffer<float> middle_scales(inner_steps * tokens), middle_sums(inner_steps * tokens), y(hidden * tokens);
    shim::launch({inner_steps, tokens, 1}, {128, 1, 1}, [&] {
        expert_gate_up_q4(gate.at, up.at, turns, up_second, gate_zero, up_zero, cell, hidden_steps, inner, codes.at,
                          scales.at, sums.at, middle_codes.at, middle_scales.at, middle_sums.at);
    });
    shim::launch({(hidden + 15) / 16, tokens, 1}, {32, 1, 1}, [&] {
        expert_down_q4(down.at, down_zero, cell, inner_steps, hidden, middle_codes.at, middle_scales.at,
                       middle_sums.at, y.at);
    });
    middle_codes.put(), middle_scales.put(), middle_sums.put(), y.put();
    return 0;
}
