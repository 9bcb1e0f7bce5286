/* Products y = x W^T + b of few rows x, with weights of 32, 16, 8 or 4 bits, in float32.
 *
 * A decoding step multiplies one row of each sequence with every weight, so it is as fast as weights come from memory. Each
 * weight is read once, in order, and becomes a float in a register, while those that follow are fetched. Output
 * channels are divided among threads; how many there are changes no number.
 */
#include "weights.c"

enum { AHEAD = 4096 }; /* bytes between float32 weights that are multiplied and those that are fetched; narrower ones come by themselves */
enum { SUMS = 2 }; /* running sums of one result: an addition takes four cycles, and two begin in each */

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

/* More than ROWS are turned into columns, SIDE rows beside each other: (groups, in, SIDE). Then a vector holds one number of
 * each row, a weight multiplies all of them at once, and nothing is added across a vector. Weights become floats once for
 * all rows, a part of some channels at a time, in a cache. SIDE is the width of a register; a sum for each of ABREAST channels
 * stays in one. */
#if defined(__AVX512F__)
enum { SIDE = 16, ABREAST = 24, ROWS = 8 };
#elif defined(__AVX2__)
enum { SIDE = 8, ABREAST = 12, ROWS = 4 };
#else
enum { SIDE = 4, ABREAST = 12, ROWS = 4 };
#endif
enum { MANY = 64, PART = 64 }; /* rows at most; weights of a channel that are floats at a time */
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
    float part[ABREAST * PART] __attribute__((aligned(64))) = {0}, sums[MANY / SIDE][ABREAST * SIDE] __attribute__((aligned(64)));
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
