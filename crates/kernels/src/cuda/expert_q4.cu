// One expert for a few tokens, weights as plain 4-bit codes (or the 4-bit base of a nested code), groups of 32.
//
// Contract. Weights lie as crates/quant/src/layout.rs says: a tile is 16 rows x 64 columns, 512 bytes of codes, then the
// f16 scales of its two groups; the last tile of a row block holds one step of 32 columns when their number is odd.
// Planes are 16-byte aligned. `turns` is 1, or 2 where gate and up take turns tile by tile; `second` is 1 for the matrix
// whose tiles come second. Activations come as in crates/kernels/src/cpu/activations.rs: per token and step of 32, 8
// words of four int8, one f32 scale, one f32 sum.
//   expert_gate_up_q4: grid (inner steps, tokens), 128 threads. Writes the quantized middle, silu(gate x) * (up x).
//   expert_down_q4:    grid (row blocks of hidden, tokens), 32 threads. Writes y [tokens, hidden].
// Law: every integer is the CPU's, and every float is computed by the same operations in the same order as
// crates/kernels/src/cpu/reference.rs (fused multiply-adds where it has them, none elsewhere: compile with contraction
// off): the results are equal bit for bit.
//
// First version: a warp walks the tiles of a row block, 16 bytes a lane. No splitting of k over warps, no batching of
// experts into one launch.

typedef unsigned char u8;
typedef unsigned int u32;

#ifdef __CUDA_ARCH__
#define COTK_DEVICE static __device__ __forceinline__
COTK_DEVICE float f16_to_f32(unsigned short h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
// Four unsigned x four signed bytes, added to c.
COTK_DEVICE int dot4(u32 a, u32 b, int c) {
    int d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
COTK_DEVICE float as_float(u32 x) { return __uint_as_float(x); }
COTK_DEVICE u32 as_bits(float x) { return __float_as_uint(x); }
#endif

#define ALL_LANES 0xffffffffu

struct Matrix {
    const u8* plane;
    u32 turns;
    u32 second;
    u32 steps;
    float zero_point;
    float cell;
};

// y of row `4 * (lane % 4) + lane / 4 % 4` of a row block, for one token. All 32 lanes of the warp call it.
COTK_DEVICE float row_block(Matrix m, u32 block, const u32* codes, const float* scales, const float* sums, u32 lane) {
    const u32 step = lane / 16;      // of the tile
    const u32 line = lane / 4 % 4;   // of the step: 16 rows x 8 columns
    const u32 rows = lane % 4;       // four rows from 4 * rows
    const u32 block_bytes = m.steps * 288;
    float y = 0.0f;
    for (u32 first = 0; first < m.steps; first += 2) {
        const u32 here = m.steps - first < 2 ? 1 : 2;
        const u8* tile = m.plane + m.turns * (unsigned long long)block * block_bytes
            + m.turns * (unsigned long long)first * 288 + m.second * here * 288;
        u32 d0 = 0, d1 = 0, d2 = 0, d3 = 0;  // of the four rows; signed, kept as bits
        if (step < here) {
            const uint4 w = *(const uint4*)(tile + 16 * lane);
            const u32 low = codes[8 * (first + step) + 2 * line];
            const u32 high = codes[8 * (first + step) + 2 * line + 1];
            const u32 mask = 0x0f0f0f0fu;
            d0 = (u32)dot4(w.x & mask, low, dot4(w.x >> 4 & mask, high, 0));
            d1 = (u32)dot4(w.y & mask, low, dot4(w.y >> 4 & mask, high, 0));
            d2 = (u32)dot4(w.z & mask, low, dot4(w.z >> 4 & mask, high, 0));
            d3 = (u32)dot4(w.w & mask, low, dot4(w.w >> 4 & mask, high, 0));
        }
        // Sum over the four lines; each of their lanes keeps one row: row `line` of the four.
        const bool upper = line & 2;
        u32 keep0 = upper ? d2 : d0, keep1 = upper ? d3 : d1;
        const u32 give0 = upper ? d0 : d2, give1 = upper ? d1 : d3;
        keep0 += __shfl_xor_sync(ALL_LANES, give0, 8);
        keep1 += __shfl_xor_sync(ALL_LANES, give1, 8);
        const bool odd = line & 1;
        u32 mine = odd ? keep1 : keep0;
        mine += __shfl_xor_sync(ALL_LANES, odd ? keep0 : keep1, 4);
        const u32 other = __shfl_xor_sync(ALL_LANES, mine, 16);
        // Both halves of the warp add both steps, in order.
        const u8* tile_scales = tile + 256 * here;
        const u32 row = 4 * rows + line;
        for (u32 s = 0; s < here; s++) {
            const int d = (int)(s == step ? mine : other);
            const float scale = f16_to_f32(*(const unsigned short*)(tile_scales + 32 * s + 2 * row)) * m.cell;
            const float centred = fmaf(m.zero_point, -sums[first + s], (float)d);
            y = fmaf(centred, scale * scales[first + s], y);
        }
    }
    return y;
}

// As `swiglu.rs`.
COTK_DEVICE float exp_clamped(float x) {
    x = x > 87.0f ? 87.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float shifted = fmaf(x, 1.44269504f, 12582912.0f);
    const float n = shifted - 12582912.0f;
    float r = fmaf(n, -0.693359375f, x);
    r = fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691e-4f;
    p = fmaf(p, r, 1.3982e-3f);
    p = fmaf(p, r, 8.333452e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.6666665e-1f);
    p = fmaf(p, r, 5e-1f);
    p = fmaf(p, r * r, r) + 1.0f;
    return p * as_float((as_bits(shifted) - 0x4b400000u + 127u) << 23);
}

extern "C" __global__ void expert_gate_up_q4(
    const u8* gate, const u8* up, u32 turns, u32 up_second, float gate_zero_point, float up_zero_point, float cell,
    u32 hidden_steps, u32 inner, const u32* x_codes, const float* x_scales, const float* x_sums,
    u32* codes, float* scales, float* sums) {
    __shared__ float sides[64];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = blockIdx.y;
    const u32 inner_steps = gridDim.x;
    // Warps 0 and 1: the two row blocks of gate; 2 and 3: those of up.
    const u32 block = 2 * blockIdx.x + warp % 2;
    const bool is_up = warp >= 2;
    float y = 0.0f;
    if (block * 16 < inner) {
        const Matrix m = {is_up ? up : gate, turns, is_up ? up_second : 0, hidden_steps,
                          is_up ? up_zero_point : gate_zero_point, cell};
        const u32 at = token * hidden_steps;
        y = row_block(m, block, x_codes + 8 * at, x_scales + at, x_sums + at, lane);
    }
    if (lane < 16) sides[16 * warp + 4 * (lane % 4) + lane / 4] = y;
    __syncthreads();
    if (warp > 0) return;

    const float g = sides[lane];
    const float h = g / (1.0f + exp_clamped(-g)) * sides[32 + lane];
    // As `activations.rs`: of magnitudes, bit patterns sort as numbers do.
    u32 absmax = as_bits(h) & 0x7fffffffu;
    for (u32 m = 16; m > 0; m /= 2) {
        const u32 other = __shfl_xor_sync(ALL_LANES, absmax, m);
        absmax = other > absmax ? other : absmax;
    }
    const float scale = as_float(absmax) / 127.0f;
    const float inverse = 127.0f / as_float(absmax);
    const bool is_finite = absmax < 0x7f800000u;
    const bool is_zero = !(inverse <= 3.402823466e38f);
    const float rounded = h * inverse + 12582912.0f;
    u32 code = is_finite && !is_zero ? as_bits(rounded) - 0x4b400000u : 0;
    u32 sum = code;
    for (u32 m = 16; m > 0; m /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, m);
    code = (code & 0xff) << 8 * (lane % 4);
    code |= __shfl_xor_sync(ALL_LANES, code, 1);
    code |= __shfl_xor_sync(ALL_LANES, code, 2);
    const u32 at = token * inner_steps + blockIdx.x;
    if (lane % 4 == 0) codes[8 * at + lane / 4] = code;
    if (lane == 0) {
        scales[at] = !is_finite ? as_float(0x7fc00000u) : is_zero ? 0.0f : scale;
        sums[at] = (float)(int)sum;
    }
}

extern "C" __global__ void expert_down_q4(
    const u8* down, float zero_point, float cell, u32 inner_steps, u32 hidden, const u32* codes, const float* scales,
    const float* sums, float* y) {
    const u32 lane = threadIdx.x, block = blockIdx.x, token = blockIdx.y;
    const Matrix m = {down, 1, 0, inner_steps, zero_point, cell};
    const u32 at = token * inner_steps;
    const float value = row_block(m, block, codes + 8 * at, scales + at, sums + at, lane);
    const u32 row = 16 * block + 4 * (lane % 4) + lane / 4;
    if (lane < 16 && row < hidden) y[token * hidden + row] = value;
}
