/* Products y = x W^T + b of few rows x, with weights of 32, 16, 8 or 4 bits, in float32.
 *
 * A decoding step multiplies one row of each sequence with every weight, so it is as fast as weights come from memory. Each
 * weight is read once, in order, and becomes a float in a register, while those that follow are fetched. Output
 * channels are divided among threads; how many there are changes no number.
 */
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
enum { AHEAD = 4096 }; /* bytes between float32 weights that are multiplied and those that are fetched; narrower ones come by themselves */
enum { SUMS = 2 };     /* running sums of one result: an addition takes four cycles, and two begin in each */
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

INLINE float sum_of(floats v) {
    quarter part[4], all;
    memcpy(part, &v, sizeof part);
    all = (part[0] + part[1]) + (part[2] + part[3]);
    float sum = 0.0f;
    UNROLL for (int i = 0; i < LANES / 4; i++) sum += all[i];
    return sum;
}

/* results (R) at y, y + stride, ... of R rows x (R, in) and one output channel w (in) */
INLINE void dots(const int kind, const int R, const float *x, const char *w, long in, float scale, float bias, float *y,
                 long stride) {
    floats sum[4][SUMS] = {{{0}}};
    long i = 0;
    for (; i + SUMS * LANES <= in; i += SUMS * LANES) {
        if (kind == FLOAT32)
            UNROLL for (size_t at = 0; at < SUMS * LANES * 4; at += 64) __builtin_prefetch(w + i * 4 + AHEAD + at, 0, 2);
        UNROLL for (int s = 0; s < SUMS; s++) {
            const long at = i + s * LANES;
            const floats weight = load(kind, w, at);
            UNROLL for (int r = 0; r < R; r++) sum[r][s] += *(const floats *)(x + r * in + at) * weight;
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        float dot = sum_of(sum[r][0] + sum[r][1]);
        for (long rest = i; rest < in; rest++) dot += x[r * in + rest] * load_one(kind, w, rest);
        y[r * stride] = dot * scale + bias;
    }
}

/* results (n) at y, y + stride, ... of n rows x (n, in) and one output channel; rows share its weights in registers by four */
INLINE void channel(const int kind, const float *x, const char *w, long n, long in, float scale, float bias, float *y,
                    long stride) {
    long row = 0;
    for (; row + 4 <= n; row += 4) dots(kind, 4, x + row * in, w, in, scale, bias, y + row * stride, stride);
    for (; row < n; row++) dots(kind, 1, x + row * in, w, in, scale, bias, y + row * stride, stride);
}

#if defined(__AVX512F__)
enum { TILE = 4 }; /* rows and channels: 16 sums in 32 registers, so that rows too are read from a cache a quarter as often */

/* results of four rows x (4, in) and four channels w (4, in) */
INLINE void tile(const int kind, const float *x, const char *w, long in, const float *scales, const float *bias, float *y,
                 long stride) {
    const size_t row_bytes = bytes_of(kind, in);
    const long end = in / LANES * LANES;
    floats sum[TILE][TILE] = {{{0}}};
    for (long i = 0; i < end; i += LANES) {
        floats weight[TILE];
        UNROLL for (int q = 0; q < TILE; q++) {
            const char *row = w + q * row_bytes;
            const size_t at = bytes_of(kind, i); /* of the next four channels, into the second cache: */
            if (kind >= INT4 ? i % (2 * GROUP) == 0 : at % 64 == 0) __builtin_prefetch(row + TILE * row_bytes + at, 0, 2);
            weight[q] = load(kind, row, i);
        }
        UNROLL for (int r = 0; r < TILE; r++) {
            const floats row = *(const floats *)(x + r * in + i);
            UNROLL for (int q = 0; q < TILE; q++) sum[r][q] += row * weight[q];
        }
    }
    UNROLL for (int r = 0; r < TILE; r++)
        UNROLL for (int q = 0; q < TILE; q++) {
            float dot = sum_of(sum[r][q]);
            for (long rest = end; rest < in; rest++) dot += x[r * in + rest] * load_one(kind, w + q * row_bytes, rest);
            y[r * stride + q] = dot * scales[q] + bias[q];
        }
}
#else
enum { TILE = 1 };
#endif

/* More than eight rows are turned into columns, sixteen rows side by side: (groups, in, 16). Then a vector holds one number of
 * each row, a weight multiplies all of them at once, and nothing is added across a vector. Weights become floats once for
 * all rows, a part of some channels at a time, in a cache. */
enum { ROWS = 8, SIDE = 16, GROUPS = 4, PART = 64 }; /* GROUPS of SIDE rows at most; weights of a channel that are floats at a time */
#if defined(__AVX512F__)
enum { ABREAST = 24 }; /* channels, with a sum of SIDE floats each: in 32 registers of 16 */
#else
enum { ABREAST = 6 }; /* in 16 registers of 8, or 32 of 4 */
#endif
typedef float side __attribute__((vector_size(4 * SIDE), aligned(4)));

/* floats of the columns of n rows */
long columns_memory(long n, long in) { return n > ROWS ? (n + SIDE - 1) / SIDE * SIDE * in : 0; }

/* columns of n rows x (n, in), from `first` up to `last` of each row, zeros for rows that a group lacks */
static void turn(const float *x, float *columns, long n, long in, long first, long last) {
    for (long row = 0; row < (n + SIDE - 1) / SIDE * SIDE; row++) {
        float *lane = columns + row / SIDE * in * SIDE + row % SIDE;
        for (long i = first; i < last; i++) lane[i * SIDE] = row < n ? x[row * in + i] : 0.0f;
    }
}

/* part (channels, PART): weights from number i of the channels w, w + row_bytes, ..., `count` of each, as floats */
INLINE void fill(const int kind, const char *w, long channels, long i, long count, float *part, size_t row_bytes) {
    for (long q = 0; q < channels; q++, w += row_bytes, part += PART) {
        long k = 0;
        for (; k + LANES <= count; k += LANES) *(floats *)(part + k) = load(kind, w, i + k);
        for (; k < count; k++) part[k] = load_one(kind, w, i + k);
    }
}

/* sums (ABREAST, SIDE) += columns (count, SIDE) times part (ABREAST, PART), for each column all channels. next: weights that
 * follow, fetched a line of each channel after another: as fast as others are multiplied, since at once is not in time */
static void add_part(const float *columns, const float *part, long count, const char *next, size_t row_bytes, float *sums) {
    const char *end = next + ABREAST * row_bytes;
    side sum[ABREAST] = {{0}};
    for (long k = 0; k < count; k++) {
        const side column = *(const side *)(columns + k * SIDE);
        UNROLL for (int i = 0; i < 2; i++) {
            __builtin_prefetch(next, 0, 2);
            next += row_bytes;
            if (next >= end) next -= ABREAST * row_bytes - 64;
        }
        UNROLL_ALL for (int q = 0; q < ABREAST; q++) sum[q] += column * part[q * PART + k];
    }
    UNROLL_ALL for (int q = 0; q < ABREAST; q++) *(side *)(sums + q * SIDE) += sum[q];
}

/* `channels` of n rows that are columns */
INLINE void channels_abreast(const int kind, const float *columns, const char *weight, const float *scales, const float *bias,
                             float *y, long n, long out, long in, long first, long last) {
    const size_t row_bytes = bytes_of(kind, in);
    float part[ABREAST * PART] __attribute__((aligned(64))) = {0}, sums[GROUPS][ABREAST * SIDE] __attribute__((aligned(64)));
    for (long o = first; o < last; o += ABREAST) {
        const long some = last - o < ABREAST ? last - o : ABREAST;
        const char *w = weight + o * row_bytes;
        memset(sums, 0, sizeof sums);
        for (long i = 0; i < in; i += PART) {
            const long count = in - i < PART ? in - i : PART;
            const char *next = i + PART < in ? w + bytes_of(kind, i + PART) : w + ABREAST * row_bytes;
            fill(kind, w, some, i, count, part, row_bytes);
            for (long group = 0; group * SIDE < n; group++)
                add_part(columns + (group * in + i) * SIDE, part, count, next, row_bytes, sums[group]);
        }
        for (long row = 0; row < n; row++)
            for (long q = 0; q < some; q++)
                y[row * out + o + q] = sums[row / SIDE][q * SIDE + row % SIDE] * (scales ? scales[o + q] : 1.0f) + (bias ? bias[o + q] : 0.0f);
    }
}

/* y (n, out) of x (n, in), or its columns for more than ROWS, and W (out, in) of the kind, for channels from `first` up to `last` */
INLINE void channels(const int kind, const float *x, const char *weight, const float *scales, const float *bias, float *y,
                     long n, long out, long in, long first, long last) {
    if (n > ROWS) {
        channels_abreast(kind, x, weight, scales, bias, y, n, out, in, first, last);
        return;
    }
    const size_t row_bytes = bytes_of(kind, in);
    long o = first;
#if defined(__AVX512F__)
    for (; o + TILE <= last && n >= TILE; o += TILE) {
        const char *w = weight + o * row_bytes;
        float factor[TILE], start[TILE];
        for (int q = 0; q < TILE; q++) factor[q] = scales ? scales[o + q] : 1.0f, start[q] = bias ? bias[o + q] : 0.0f;
        long row = 0;
        for (; row + TILE <= n; row += TILE) tile(kind, x + row * in, w, in, factor, start, y + row * out + o, out);
        for (int q = 0; q < TILE; q++)
            for (long rest = row; rest < n; rest++)
                dots(kind, 1, x + rest * in, w + q * row_bytes, in, factor[q], start[q], y + rest * out + o + q, out);
    }
#endif
    for (; o < last; o++)
        channel(kind, x, weight + o * row_bytes, n, in, scales ? scales[o] : 1.0f, bias ? bias[o] : 0.0f, y + o, out);
}

/* channels from `first` up to `last` of y (n, out) = x (n, in) W^T of the kind (x: columns for more than ROWS), times scales (out), plus bias (out), plus
 * more (n, out); each of the last three may be NULL */
static void some_channels(int kind, const float *x, const char *weight, const float *scales, const float *bias, const float *more,
                          float *y, long n, long out, long in, long first, long last) {
    if (kind == FLOAT32) channels(FLOAT32, x, weight, scales, bias, y, n, out, in, first, last);
    else if (kind == BFLOAT16) channels(BFLOAT16, x, weight, scales, bias, y, n, out, in, first, last);
    else if (kind == INT4) channels(INT4, x, weight, scales, bias, y, n, out, in, first, last);
    else if (kind == NF4) channels(NF4, x, weight, scales, bias, y, n, out, in, first, last);
    else channels(INT8, x, weight, scales, bias, y, n, out, in, first, last);
    if (more)
        for (long row = 0; row < n; row++)
            for (long o = first; o < last; o++) y[row * out + o] += more[row * out + o];
}

/* channels of each thread out of `out`, in whole tiles */
static long share_of(long out, long threads) { return (out / threads + TILE) / TILE * TILE; }

static long lesser(long a, long b) { return a < b ? a : b; }

/* `some_channels` of all channels, divided among threads; memory: `columns_memory` floats */
void product(int kind, const float *x, const char *weight, const float *scales, const float *bias, const float *more, float *y,
             float *memory, long n, long out, long in, int threads) {
    const long share = share_of(out, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (n > ROWS) {
#pragma omp for schedule(static, 1)
            for (long part = 0; part < threads; part++) turn(x, memory, n, in, in * part / threads, in * (part + 1) / threads);
        }
#pragma omp for schedule(static, 1)
        for (long part = 0; part < threads; part++)
            some_channels(kind, n > ROWS ? memory : x, weight, scales, bias, more, y, n, out, in, lesser(part * share, out),
                          lesser((part + 1) * share, out));
    }
}

/* y (out, in) in float32: weights of a kind, without scales (NULL) or times those of each channel */
INLINE void widen_rows(const int kind, const char *weight, const float *scales, float *y, long out, long in, int threads) {
    const size_t row_bytes = bytes_of(kind, in);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long o = 0; o < out; o++) {
        const char *row = weight + o * row_bytes;
        const float scale = scales ? scales[o] : 1.0f;
        long i = 0;
        for (; i + LANES <= in; i += LANES) *(floats *)(y + o * in + i) = load(kind, row, i) * scale;
        for (; i < in; i++) y[o * in + i] = load_one(kind, row, i) * scale;
    }
}

void widen(int kind, const char *weight, const float *scales, float *y, long out, long in, int threads) {
    if (kind == BFLOAT16) widen_rows(BFLOAT16, weight, scales, y, out, in, threads);
    else if (kind == INT4) widen_rows(INT4, weight, scales, y, out, in, threads);
    else if (kind == NF4) widen_rows(NF4, weight, scales, y, out, in, threads);
    else if (kind == INT8) widen_rows(INT8, weight, scales, y, out, in, threads);
}

/* What lies between the products of a block: a call each, where torch takes three to six operations. */

/* y (n, width) of x (n, width): each row over its root mean square, times weight (width) */
void rms_norm(const float *x, const float *weight, float eps, float *y, long n, long width) {
    for (long row = 0; row < n; row++, x += width, y += width) {
        float part[16] = {0}, square = 0.0f;
        long i = 0;
        for (; i + 16 <= width; i += 16)
            for (int lane = 0; lane < 16; lane++) part[lane] += x[i + lane] * x[i + lane];
        for (; i < width; i++) square += x[i] * x[i];
        for (int lane = 0; lane < 16; lane++) square += part[lane];
        const float factor = 1.0f / sqrtf(square / width + eps);
        for (i = 0; i < width; i++) y[i] = x[i] * factor * weight[i];
    }
}

/* turn the first `heads` vectors (D) of each token in x (tokens, all, D), in place: x cos + roll(x, D / 2) sin, by tables
 * (positions, D) that the tokens take in turn */
void rotate(float *x, const float *cosine, const float *sine, long tokens, long positions, long heads, long all, long D) {
    const long half = D / 2;
    for (long token = 0; token < tokens; token++) {
        const float *c = cosine + token % positions * D, *s = sine + token % positions * D;
        for (long head = 0; head < heads; head++) {
            float *low = x + (token * all + head) * D, *high = low + half;
            for (long i = 0; i < half; i++) {
                const float a = low[i], b = high[i];
                low[i] = a * c[i] + b * s[i];
                high[i] = b * c[i + half] + a * s[i + half];
            }
        }
    }
}
