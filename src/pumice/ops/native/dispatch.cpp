// The exported functions: each runs the kernels of the instruction set that it is told.
#include "isa.h"

#ifdef PUMICE_X86
#include <cpuid.h>
#endif

namespace {

const Kernels& kernels(int32_t isa) {
#ifdef PUMICE_X86
    if (isa == AVX512) return AVX512_KERNELS;
    if (isa == AVX2) return AVX2_KERNELS;
#endif
    (void)isa;
    return PORTABLE_KERNELS;
}

}  // namespace

// The best instruction set of this CPU that there are kernels for.
PUMICE_EXPORT int32_t pumice_best_isa() {
#ifdef PUMICE_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    if (avx2 && avx512) return AVX512;
    if (avx2) return AVX2;
#endif
    return PORTABLE;
}

// Whether the CPU multiplies tiles of bfloat16 (AMX), and the system keeps their registers for each process.
PUMICE_EXPORT int32_t pumice_bf16_tiles() {
#ifdef PUMICE_X86
    constexpr uint32_t AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, OSXSAVE = 1u << 27, TILES_KEPT = 3u << 17;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return 0;
    uint32_t kept, upper;
    __asm__ volatile("xgetbv" : "=a"(kept), "=d"(upper) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (d & AMX_BF16) && (d & AMX_TILE) && (kept & TILES_KEPT) == TILES_KEPT;
#else
    return 0;
#endif
}

PUMICE_EXPORT int64_t pumice_scratch_bytes(int32_t isa, int64_t m, int64_t k, int32_t threads) {
    return kernels(isa).scratch_bytes(m, k, threads);
}

PUMICE_EXPORT void pumice_matmul(int32_t isa, const Matrix* matrices, int32_t count, const float* x, int64_t x_stride,
                                 int64_t m, int64_t k, int32_t threads, uint8_t* scratch) {
    kernels(isa).matmul(matrices, count, x, x_stride, m, k, threads, scratch);
}

PUMICE_EXPORT void pumice_rms_norm(int32_t isa, const float* x, int64_t x_stride, const float* weight, float eps,
                                   int64_t rows, int64_t width, float* out, int32_t threads) {
    kernels(isa).rms_norm(x, x_stride, weight, eps, rows, width, out, threads);
}

PUMICE_EXPORT void pumice_gated(int32_t isa, const float* gate, const float* up, float slope, int64_t count, float* out,
                                int32_t threads) {
    kernels(isa).gated(gate, up, slope, count, out, threads);
}

PUMICE_EXPORT void pumice_rotate(int32_t isa, const float* x, const float* cosine, const float* sine, int64_t rows,
                                 int64_t heads, int64_t width, float* out, int32_t threads) {
    kernels(isa).rotate(x, cosine, sine, rows, heads, width, out, threads);
}

PUMICE_EXPORT void pumice_pack(int32_t isa, int32_t format, const float* x, int64_t blocks, uint8_t* out, int32_t threads) {
    kernels(isa).pack(format, x, blocks, out, threads);
}

PUMICE_EXPORT int64_t pumice_attention_floats(int32_t isa, const Attention* attention, int32_t threads) {
    return kernels(isa).attention_floats(*attention, threads);
}

PUMICE_EXPORT void pumice_attention(int32_t isa, const Attention* attention, int32_t threads, float* scratch) {
    kernels(isa).attention(*attention, threads, scratch);
}

PUMICE_EXPORT int64_t pumice_blocks_bytes(int32_t isa, const Pass* pass, int32_t threads) {
    return kernels(isa).blocks_bytes(*pass, threads);
}

PUMICE_EXPORT void pumice_blocks(int32_t isa, const Block* first, int32_t count, const Pass* pass, int32_t threads,
                                 uint8_t* memory) {
    kernels(isa).blocks(first, count, *pass, threads, memory);
}
