// The exported functions: each runs the kernels of the instruction set that it is told.
#include "isa.h"

#ifdef PUMICE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

const Kernels& kernels(int32_t isa) {
#ifdef PUMICE_AMX
    if (isa == AMX) return AMX_KERNELS;
#endif
#ifdef PUMICE_X86
    if (isa == AVX512) return AVX512_KERNELS;
    if (isa == AVX2) return AVX2_KERNELS;
#endif
    (void)isa;
    return PORTABLE_KERNELS;
}

#ifdef PUMICE_X86
// Whether the CPU multiplies tiles of bytes and of bfloat16, and Linux keeps their registers for the threads of this process:
// they are many bytes, so it does that for those only that ask (Documentation/arch/x86/xstate.rst).
bool has_tiles() {
#ifdef PUMICE_AMX
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("avx512bf16") &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}
#endif

}  // namespace

// The best instruction set of this CPU that there are kernels for. Asks Linux for tile registers, for this process.
PUMICE_EXPORT int32_t pumice_best_isa() {
#ifdef PUMICE_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    if (avx2 && avx512 && has_tiles()) return AMX;
    if (avx2 && avx512) return AVX512;
    if (avx2) return AVX2;
#endif
    return PORTABLE;
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
