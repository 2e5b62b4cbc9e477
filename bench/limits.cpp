// What this machine can do at most, as one line of JSON: reading memory, and multiply-adds that wait for nothing.
// Made and run by limits.py: limits THREADS BYTES. Each figure is the best of several short tries. As a library it has the
// loop that reads, for memory of the caller.
//
// int8:   products of two bytes summed in 32 bits.
// narrow: products of a byte and a value of four bits, summed in 16 bits as long as they fit; the same as int8 where
//         the processor has an instruction for whole dot products (VNNI).
// wide:   products of two words of 16 bits summed in 32 bits.
// tiles:  products of bfloat16 in tiles of 16 rows, summed in float32 (AMX).

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES
#endif

template <class Work> double best_s(int tries, Work work) {
    double best = 1e30;
    for (int i = 0; i < tries; ++i) {
        auto start = std::chrono::steady_clock::now();
        work();
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}

// Large pages where they can be had, or small ones, as those of a mapped file in most file systems: then the finding of pages is measured too.
std::unique_ptr<uint64_t, decltype(&std::free)> memory_of(size_t bytes, bool small_pages) {
    const size_t large = size_t(2) << 20;
    void *at = std::aligned_alloc(large, (bytes + large - 1) / large * large);
    if (at == nullptr) std::exit(1);
#if defined(MADV_HUGEPAGE)
    madvise(at, bytes, small_pages ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
#else
    (void)small_pages;
#endif
    return {(uint64_t *)at, &std::free};
}

// A function of its own: inside a lambda GCC keeps the sum in memory.
extern "C" uint64_t sum_of(const uint64_t *word, int64_t words, int threads) {
    uint64_t sum = 0;
#pragma omp parallel for simd num_threads(threads) schedule(static) reduction(+ : sum)
    for (int64_t i = 0; i < words; ++i) sum += word[i];
    return sum;
}

double read_bytes_per_s(int threads, size_t bytes, bool small_pages) {
    const int64_t words = int64_t(bytes / 8);
    const auto data = memory_of(bytes, small_pages);
    uint64_t *const word = data.get();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < words; ++i) word[i] = uint64_t(i);
    volatile uint64_t kept = 0;
    const double seconds = best_s(5, [&] { kept = kept + sum_of(word, words, threads); });
    return double(words) * 8 / seconds;
}

const int64_t ROUNDS = 4000000;
const int CHAINS = 12;  // independent sums, enough to hide the latency of an instruction

// `step` is the body of a loop over CHAINS sums; `use(x)` makes the compiler take x for changed.
#if defined(__x86_64__)
#define use(x) asm volatile("" : "+x"(x))
#endif

#if defined(__AVX512F__)
typedef __m512 Floats;
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
#define HAS_FLOATS
#elif defined(__AVX2__) && defined(__FMA__)
typedef __m256 Floats;
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#define HAS_FLOATS
#endif

double float_work() {
#ifdef HAS_FLOATS
    Floats sums[CHAINS] = {}, a = {}, b = {};
    use(b);
    for (int64_t i = 0; i < ROUNDS; ++i)
        for (int c = 0; c < CHAINS; ++c) { use(a); sums[c] = multiply_add(a, b, sums[c]); }
    for (auto &sum : sums) use(sum);
    return 2.0 * sizeof(Floats) / 4 * CHAINS * ROUNDS;
#else
    return 0;
#endif
}

double int8_work() {
#if defined(__AVX512VNNI__)
    __m512i sums[CHAINS] = {}, a = {}, b = {};
    use(b);
    for (int64_t i = 0; i < ROUNDS; ++i)
        for (int c = 0; c < CHAINS; ++c) { use(a); sums[c] = _mm512_dpbusd_epi32(sums[c], a, b); }
    for (auto &sum : sums) use(sum);
    return 2.0 * 64 * CHAINS * ROUNDS;
#elif defined(__AVX2__)
    __m256i sums[CHAINS] = {}, a = {}, b = {}, ones = _mm256_set1_epi16(1);
    use(b);
    use(ones);
    for (int64_t i = 0; i < ROUNDS; ++i)
        for (int c = 0; c < CHAINS; ++c) {
            use(a);
            sums[c] = _mm256_add_epi32(sums[c], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
        }
    for (auto &sum : sums) use(sum);
    return 2.0 * 32 * CHAINS * ROUNDS;
#else
    return 0;
#endif
}

double narrow_work() {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    const int held = 8;  // 8 sums of two products of at most 15 * 127 fit in 16 bits
    __m256i sum = {}, a = {}, b = {}, ones = _mm256_set1_epi16(1);
    use(b);
    use(ones);
    for (int64_t i = 0; i < ROUNDS / held; ++i)
        for (int c = 0; c < CHAINS; c += 4) {
            __m256i shorts[4] = {};
#pragma GCC unroll 8
            for (int k = 0; k < held; ++k)
#pragma GCC unroll 4
                for (auto &each : shorts) { use(a); each = _mm256_add_epi16(each, _mm256_maddubs_epi16(a, b)); }
#pragma GCC unroll 4
            for (auto &each : shorts) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(each, ones));
        }
    use(sum);
    return 2.0 * 32 * CHAINS * (ROUNDS / held) * held;
#else
    return int8_work();
#endif
}

double wide_work() {
#if defined(__AVX2__)
    __m256i sums[CHAINS] = {}, a = {}, b = {};
    use(b);
    for (int64_t i = 0; i < ROUNDS; ++i)
        for (int c = 0; c < CHAINS; ++c) { use(a); sums[c] = _mm256_add_epi32(sums[c], _mm256_madd_epi16(a, b)); }
    for (auto &sum : sums) use(sum);
    return 2.0 * 16 * CHAINS * ROUNDS;
#else
    return 0;
#endif
}

// Four sums of tiles, as many as two tiles of each factor give.
double tiles_work() {
#ifdef HAS_TILES
    struct alignas(64) { uint8_t palette = 1, rest[15] = {}; uint16_t row_bytes[16] = {}; uint8_t rows[16] = {}; } settings;
    for (int tile = 0; tile < 8; ++tile) { settings.row_bytes[tile] = 64; settings.rows[tile] = 16; }
    asm volatile("" : : "r"(&settings) : "memory");  // GCC believes that the next one reads eight bytes
    _tile_loadconfig(&settings);
    for (int64_t i = 0; i < ROUNDS / 16; ++i) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return 2.0 * 16 * 16 * 32 * 4 * (ROUNDS / 16);
#else
    return 0;
#endif
}

// Linux keeps tiles for those processes only that ask.
bool tiles_granted() {
#ifdef HAS_TILES
    const int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

double per_s(int threads, double (*work)()) {
    double done = 0;
    double seconds = best_s(5, [&] {
        double sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
        sum += work();
        done = sum;
    });
    return done / seconds;
}

int main(int, char **argv) {
    const int threads = std::atoi(argv[1]);
    const size_t bytes = std::strtoull(argv[2], nullptr, 10);
    std::printf("{\"read\": %.6g, ", read_bytes_per_s(threads, bytes, false));
    std::printf("\"mapped\": %.6g, ", read_bytes_per_s(threads, bytes, true));
    std::printf("\"fp32\": %.6g, ", per_s(threads, float_work));
    std::printf("\"int8\": %.6g, ", per_s(threads, int8_work));
    std::printf("\"narrow\": %.6g, ", per_s(threads, narrow_work));
    std::printf("\"wide\": %.6g, ", per_s(threads, wide_work));
    std::printf("\"tiles\": %.6g}\n", tiles_granted() ? per_s(threads, tiles_work) : 0.0);
}
