/* Products y = x W^T + b of few rows x, with weights of 32, 16 or 8 bits, in float32.
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

enum { FLOAT32, BFLOAT16, INT8 };
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

INLINE size_t size_of(const int kind) { return kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1; }

/* LANES weights as floats */
INLINE floats load(const int kind, const char *p) {
    if (kind == FLOAT32) return *(const floats *)p;
    if (kind == BFLOAT16) return (floats)(__builtin_convertvector(*(const halves *)p, words) << 16);
#if defined(__AVX512F__)
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else /* widths that double are what processors have instructions for */
    shorts wide = __builtin_convertvector(*(const bytes *)p, shorts);
    return __builtin_convertvector(__builtin_convertvector(wide, ints), floats);
#endif
}

/* one weight as float */
INLINE float load_one(const int kind, const char *p) {
    if (kind == INT8) return (float)*(const int8_t *)p;
    uint32_t bits = 0;
    memcpy((char *)&bits + (kind == BFLOAT16 ? 2 : 0), p, size_of(kind)); /* little endian: a bfloat16 is the upper half */
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
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
    const size_t size = size_of(kind);
    floats sum[4][SUMS] = {{{0}}};
    long i = 0;
    for (; i + SUMS * LANES <= in; i += SUMS * LANES) {
        if (kind == FLOAT32)
            UNROLL for (size_t at = 0; at < SUMS * LANES * size; at += 64) __builtin_prefetch(w + i * size + AHEAD + at, 0, 2);
        UNROLL for (int s = 0; s < SUMS; s++) {
            const long at = i + s * LANES;
            const floats weight = load(kind, w + at * size);
            UNROLL for (int r = 0; r < R; r++) sum[r][s] += *(const floats *)(x + r * in + at) * weight;
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        float dot = sum_of(sum[r][0] + sum[r][1]);
        for (long rest = i; rest < in; rest++) dot += x[r * in + rest] * load_one(kind, w + rest * size);
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
    const size_t size = size_of(kind);
    const long end = in / LANES * LANES, next = TILE * in * (long)size;
    floats sum[TILE][TILE] = {{{0}}};
    for (long i = 0; i < end; i += LANES) {
        floats weight[TILE];
        UNROLL for (int q = 0; q < TILE; q++) {
            const char *at = w + (q * in + i) * size;
            if (i * size % 64 == 0) __builtin_prefetch(at + next, 0, 2); /* of the next four channels, into the second cache */
            weight[q] = load(kind, at);
        }
        UNROLL for (int r = 0; r < TILE; r++) {
            const floats row = *(const floats *)(x + r * in + i);
            UNROLL for (int q = 0; q < TILE; q++) sum[r][q] += row * weight[q];
        }
    }
    UNROLL for (int r = 0; r < TILE; r++)
        UNROLL for (int q = 0; q < TILE; q++) {
            float dot = sum_of(sum[r][q]);
            for (long rest = end; rest < in; rest++) dot += x[r * in + rest] * load_one(kind, w + (q * in + rest) * size);
            y[r * stride + q] = dot * scales[q] + bias[q];
        }
}
#else
enum { TILE = 1 };
#endif

/* y (n, out) of x (n, in) and W (out, in) of the kind, for channels from `first` up to `last` */
INLINE void channels(const int kind, const float *x, const char *weight, const float *scales, const float *bias, float *y,
                     long n, long out, long in, long first, long last) {
    long o = first;
#if defined(__AVX512F__)
    for (; o + TILE <= last && n >= TILE; o += TILE) {
        const char *w = weight + o * in * size_of(kind);
        float factor[TILE], start[TILE];
        for (int q = 0; q < TILE; q++) factor[q] = scales ? scales[o + q] : 1.0f, start[q] = bias ? bias[o + q] : 0.0f;
        long row = 0;
        for (; row + TILE <= n; row += TILE) tile(kind, x + row * in, w, in, factor, start, y + row * out + o, out);
        for (int q = 0; q < TILE; q++)
            for (long rest = row; rest < n; rest++)
                dots(kind, 1, x + rest * in, w + q * in * size_of(kind), in, factor[q], start[q], y + rest * out + o + q, out);
    }
#endif
    for (; o < last; o++)
        channel(kind, x, weight + o * in * size_of(kind), n, in, scales ? scales[o] : 1.0f, bias ? bias[o] : 0.0f, y + o, out);
}

/* channels from `first` up to `last` of y (n, out) = x (n, in) W^T of the kind, times scales (out), plus bias (out), plus
 * more (n, out); each of the last three may be NULL */
static void some_channels(int kind, const float *x, const char *weight, const float *scales, const float *bias, const float *more,
                          float *y, long n, long out, long in, long first, long last) {
    if (kind == FLOAT32) channels(FLOAT32, x, weight, scales, bias, y, n, out, in, first, last);
    else if (kind == BFLOAT16) channels(BFLOAT16, x, weight, scales, bias, y, n, out, in, first, last);
    else channels(INT8, x, weight, scales, bias, y, n, out, in, first, last);
    if (more)
        for (long row = 0; row < n; row++)
            for (long o = first; o < last; o++) y[row * out + o] += more[row * out + o];
}

/* channels of each thread out of `out`, in whole tiles */
static long share_of(long out, long threads) { return (out / threads + TILE) / TILE * TILE; }

static long lesser(long a, long b) { return a < b ? a : b; }

/* `some_channels` of all channels, divided among threads */
void product(int kind, const float *x, const char *weight, const float *scales, const float *bias, const float *more, float *y,
             long n, long out, long in, int threads) {
    const long share = share_of(out, threads);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (long part = 0; part < threads; part++)
        some_channels(kind, x, weight, scales, bias, more, y, n, out, in, lesser(part * share, out), lesser((part + 1) * share, out));
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
