/* Weights of 32, 16, 8 or 4 bits as vectors of floats. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

enum { FLOAT32, BFLOAT16, INT8, INT4, NF4 };
enum { GROUP = 32, BLOCK = 20 };        /* weights of 4 bits that share a scale and a minimum, and their bytes (int4.py) */
enum { NF4_GROUP = 64, NF4_BLOCK = 36 }; /* those that share a scale (nf4.py) */
#if defined(__AVX2__) && !defined(__AVX512F__)
enum { LANES = 8 }; /* floats in a vector */
#else
enum { LANES = 16 }; /* compilers split it where registers are shorter */
#endif

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float quarter __attribute__((vector_size(LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

/* `kind` and other parameters that are const are known where a function is inlined: each combination becomes code of its own */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 4")
#define UNROLL_ALL _Pragma("GCC unroll 32")

/* bytes of `n` weights of a row that begins at one of them; those of 4 bits come in whole groups */
INLINE size_t bytes_of(const int kind, long n) {
    if (kind == INT4) return (size_t)(n + GROUP - 1) / GROUP * BLOCK;
    if (kind == NF4) return (size_t)(n + NF4_GROUP - 1) / NF4_GROUP * NF4_BLOCK;
    return (size_t)n * (kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1);
}

/* LANES bytes, each as an integer of 32 bits */
INLINE ints widened(const char *p, const int is_signed) {
#if defined(__AVX512F__)
    const __m128i narrow = _mm_loadu_si128((const __m128i *)p);
    return (ints)(is_signed ? _mm512_cvtepi8_epi32(narrow) : _mm512_cvtepu8_epi32(narrow));
#elif defined(__AVX2__)
    const __m128i narrow = _mm_loadl_epi64((const __m128i *)p);
    return (ints)(is_signed ? _mm256_cvtepi8_epi32(narrow) : _mm256_cvtepu8_epi32(narrow));
#else /* widths that double are what processors have instructions for */
    const ints wide = __builtin_convertvector(__builtin_convertvector(*(const bytes *)p, shorts), ints);
    return is_signed ? wide : wide & 255;
#endif
}

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* scale and minimum of a group of 4-bit weights: two bfloat16, which are the upper halves of a float32 */
INLINE void ends_of(const char *block, float *scale, float *minimum) {
    uint32_t both;
    memcpy(&both, block, sizeof both);
    *scale = from_bits(both << 16), *minimum = from_bits(both & 0xffff0000u);
}

/* LANES weights of 4 bits from number i of a row, i a multiple of LANES */
INLINE floats load_int4(const char *row, long i) {
    const char *block = row + i / GROUP * BLOCK, *codes = block + 4 + i % (GROUP / 2);
    float scale, minimum;
    ends_of(block, &scale, &minimum);
    const ints both = widened(codes, 0) >> (int)(i % GROUP / (GROUP / 2) * 4);
#if defined(__AVX512F__) /* the sixteen weights that a group can have are a table, whose index is the lower four bits */
    const floats count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (floats)_mm512_permutexvar_ps((__m512i)both, (__m512)(count * scale + minimum));
#else
    return __builtin_convertvector(both & 15, floats) * scale + minimum;
#endif
}

/* what the 16 codes of NF4 stand for: quantiles of a normal distribution, set once by `set_nf4` */
static float nf4[16] __attribute__((aligned(64)));

void set_nf4(const float *levels) { memcpy(nf4, levels, sizeof nf4); }

INLINE float nf4_scale(const char *block) {
    float scale;
    memcpy(&scale, block, sizeof scale);
    return scale;
}

/* LANES weights of NF4 from number i of a row, i a multiple of LANES */
INLINE floats load_nf4(const char *row, long i) {
    const char *block = row + i / NF4_GROUP * NF4_BLOCK, *codes = block + 4 + i % NF4_GROUP / 2;
    const float scale = nf4_scale(block);
#if defined(__AVX512F__) /* both codes of a byte beside each other; an index is the lower four bits of what it is in */
    const __m128i both = _mm_loadl_epi64((const __m128i *)codes);
    const __m512i index = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_srli_epi16(both, 4), both));
    return (floats)_mm512_permutexvar_ps(index, (__m512)(*(const floats *)nf4 * scale));
#elif defined(__AVX2__) /* a table of eight for each half of the levels; the fourth bit says which */
    uint32_t four;
    memcpy(&four, codes, sizeof four);
    const __m128i both = _mm_cvtsi32_si128((int)four);
    const __m256i index = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_srli_epi16(both, 4), both));
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(nf4), index), high = _mm256_permutevar8x32_ps(_mm256_load_ps(nf4 + 8), index);
    return (floats)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28))) * scale;
#else
    floats weight;
    for (int lane = 0; lane < LANES; lane++) {
        const uint8_t both = (uint8_t)codes[lane / 2];
        weight[lane] = nf4[lane % 2 ? both & 15 : both >> 4] * scale;
    }
    return weight;
#endif
}

/* LANES weights from number i of a row, i a multiple of LANES, as floats; those of 8 bits without their scale */
INLINE floats load(const int kind, const char *row, long i) {
    if (kind == INT4) return load_int4(row, i);
    if (kind == NF4) return load_nf4(row, i);
    const char *p = row + bytes_of(kind, i);
    if (kind == FLOAT32) return *(const floats *)p;
    if (kind == BFLOAT16) return (floats)(__builtin_convertvector(*(const halves *)p, words) << 16);
    return __builtin_convertvector(widened(p, 1), floats);
}

/* weight number i of a row as float */
INLINE float load_one(const int kind, const char *row, long i) {
    if (kind == INT8) return (float)((const int8_t *)row)[i];
    if (kind == INT4) {
        const char *block = row + i / GROUP * BLOCK;
        float scale, minimum;
        ends_of(block, &scale, &minimum);
        const uint8_t both = (uint8_t)block[4 + i % (GROUP / 2)];
        return (float)(i % GROUP < GROUP / 2 ? both & 15 : both >> 4) * scale + minimum;
    }
    if (kind == NF4) {
        const char *block = row + i / NF4_GROUP * NF4_BLOCK;
        const uint8_t both = (uint8_t)block[4 + i % NF4_GROUP / 2];
        return nf4[i % 2 ? both & 15 : both >> 4] * nf4_scale(block);
    }
    uint32_t bits = 0; /* little endian: a bfloat16 is the upper half */
    memcpy((char *)&bits + (kind == BFLOAT16 ? 2 : 0), row + bytes_of(kind, i), bytes_of(kind, 1));
    return from_bits(bits);
}
