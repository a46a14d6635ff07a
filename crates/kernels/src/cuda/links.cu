// Reads device memory as fast as the device can and keeps nothing of it: what a kernel that streams weights can hope for.
//
// read_all: `count` words of 16 bytes at `words`, aligned to 16; any grid of one dimension. `out` has one word, which is
// written only if the folded sum is one value of 2^32: so that no compiler leaves the reads out.

extern "C" __global__ void read_all(const uint4 *words, unsigned long long count, unsigned *out)
{
    unsigned folded = 0;
    const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long at = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; at < count; at += step) {
        const uint4 word = words[at];
        folded ^= word.x ^ word.y ^ word.z ^ word.w;
    }
    if (folded == 0x5eed5eedu) {
        out[0] = folded;
    }
}
