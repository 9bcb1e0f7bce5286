/* A decoding step: one token of each row through all blocks of a decoder of Llama's or GPT-2's kind, in float32.
 *
 * Between the products of a token lie some forty small operations a block, which cost as much to call as to compute. Here
 * threads stay together from the first block to the last and meet where one needs what the others have computed.
 * How many there are changes no number: output channels, heads and chunks of keys are divided, never a sum.
 */
#include "row_products.c"
#include <omp.h>

enum { RMS_NORM, LAYER_NORM };
enum { SILU, GELU, GELU_TANH, RELU };
enum { CHUNK = 256 }; /* keys that are weighed at a time, by one thread */

/* as the structures of decode_step.py */
typedef struct {
    long kind, out, in;
    const char *weight;
    const float *scales, *bias;
} Matrix;

typedef struct {
    const float *weight, *bias; /* each may be NULL */
} Norm;

typedef struct {
    Norm norm1, norm2, head_norm; /* head_norm: of queries and keys, (H + K, D) */
    Matrix qkv, o, up, down;      /* up: of the gate too, before it, if there is one */
} Layer;

typedef struct {
    long n_layers, C, H, K, D, F;
    long norm, head_norm, activation, gated;
    float eps, head_eps, scale, unused;
} Shape;

typedef struct {
    float *k, *v;           /* (layers, rows, K, columns, D) */
    long layer, row, head;  /* floats from one to the next */
    const long *first;      /* (B), the first column that a row sees */
    long column;            /* where the new token goes, the last one that it sees */
} Cache;

/* e^x to 2 units in the last place, at least e^-87 and at most e^88; loops over it become vector code */
INLINE float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the nearest integer of x / ln 2 is in the last bits */
    const float n = shifted - 12582912.0f, r = x - n * 0.693145752f - n * 1.42860677e-6f;
    const float series = 1 + r * (1 + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720))))));
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + (127u << 23); /* 2^n */
    float power;
    memcpy(&power, &bits, sizeof power);
    return series * power;
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

/* y (n) = act(x (n)), times more (n) if it is given */
static void activate(long activation, const float *x, const float *more, float *y, long n) {
    switch (activation) {
    case SILU: for (long i = 0; i < n; i++) y[i] = x[i] * sigmoid(x[i]); break;
    case GELU: for (long i = 0; i < n; i++) y[i] = x[i] * 0.5f * (1.0f + erff(x[i] * 0.70710678f)); break;
    case GELU_TANH: /* (1 + tanh z) / 2 = sigmoid(2 z) */
        for (long i = 0; i < n; i++) y[i] = x[i] * sigmoid(1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
        break;
    default: for (long i = 0; i < n; i++) y[i] = x[i] > 0.0f || x[i] != x[i] ? x[i] : 0.0f; /* NaN stays */
    }
    if (more)
        for (long i = 0; i < n; i++) y[i] *= more[i];
}

static void normalize(long kind, const Norm *norm, float eps, const float *x, float *y, long n, long width) {
    if (kind == RMS_NORM) {
        rms_norm(x, norm->weight, eps, y, n, width);
        return;
    }
    for (long row = 0; row < n; row++, x += width, y += width) {
        double sum = 0.0, square = 0.0;
        for (long i = 0; i < width; i++) sum += x[i];
        const float mean = (float)(sum / width);
        for (long i = 0; i < width; i++) square += (double)(x[i] - mean) * (x[i] - mean);
        const float factor = 1.0f / sqrtf((float)(square / width) + eps);
        for (long i = 0; i < width; i++) y[i] = (x[i] - mean) * factor * norm->weight[i] + (norm->bias ? norm->bias[i] : 0.0f);
    }
}

INLINE float dot(const float *a, const float *b, long n) {
    floats sum = {0};
    long i = 0;
    for (; i + LANES <= n; i += LANES) sum += *(const floats *)(a + i) * *(const floats *)(b + i);
    float all = sum_of(sum);
    for (; i < n; i++) all += a[i] * b[i];
    return all;
}

/* one query (D) over keys and values (n, D), n > 0: the weighted sum to y (D), the largest score and the sum of weights to
 * `largest` and `total`; y is divided by total only in the end, since chunks are added first. scores: room for n */
static void attend(const float *q, const float *k, const float *v, long n, long D, float scale, float *scores, float *y,
                   float *largest, float *total) {
    float most = -INFINITY, part[16] = {0}, sum = 0.0f;
    for (long j = 0; j < n; j++) scores[j] = dot(q, k + j * D, D) * scale;
    for (long j = 0; j < n; j++) most = scores[j] > most ? scores[j] : most;
    for (long j = 0; j < n; j++) scores[j] = exp_of(scores[j] - most);
    long j = 0;
    for (; j + 16 <= n; j += 16)
        for (int lane = 0; lane < 16; lane++) part[lane] += scores[j + lane];
    for (; j < n; j++) sum += scores[j];
    for (int lane = 0; lane < 16; lane++) sum += part[lane];
    long d = 0;
    for (; d + 4 * LANES <= D; d += 4 * LANES) { /* four sums in registers */
        floats s[4] = {{0}};
        for (j = 0; j < n; j++)
            UNROLL for (int i = 0; i < 4; i++) s[i] += scores[j] * *(const floats *)(v + j * D + d + i * LANES);
        memcpy(y + d, s, sizeof s);
    }
    for (long i = d; i < D; i++) y[i] = 0.0f;
    for (j = 0; j < n && d < D; j++)
        for (long i = d; i < D; i++) y[i] += scores[j] * v[j * D + i];
    *largest = most, *total = sum;
}

/* queries, keys and values y (B, H + 2 K, D) of the new tokens: normed and turned in place, keys and values to the cache */
static void place_heads(const Shape *s, const Layer *layer, float *y, const float *cosine, const float *sine, long positions,
                        float *k, float *v, const Cache *cache, long B, long thread, long threads) {
    const long all = s->H + 2 * s->K, D = s->D;
    for (long unit = thread; unit < B * all; unit += threads) {
        const long row = unit / all, head = unit % all;
        float *x = y + unit * D;
        if (head < s->H + s->K && layer->head_norm.weight) {
            const Norm norm = {layer->head_norm.weight + head * D, layer->head_norm.bias ? layer->head_norm.bias + head * D : NULL};
            normalize(s->head_norm, &norm, s->head_eps, x, x, 1, D);
        }
        const long position = positions > 1 ? row : 0;
        if (head < s->H + s->K && cosine) rotate(x, cosine + position * D, sine + position * D, 1, 1, 1, 1, D);
        if (head < s->H) continue;
        float *past = head < s->H + s->K ? k + (head - s->H) * cache->head : v + (head - s->H - s->K) * cache->head;
        memcpy(past + row * cache->row + cache->column * D, x, D * sizeof *x);
    }
}

/* attention of the queries in y (B, H + 2 K, D) to the cache, (B, H, D) to `attended`; parts (B, H, chunks, D + 2) are sums by
 * chunks of keys, which meet in `join_chunks` if there are several */
static void attend_chunks(const Shape *s, const float *y, const float *k, const float *v, const Cache *cache, long B, long chunks,
                          float *parts, float *scores, long thread, long threads) {
    const long H = s->H, D = s->D, group = H / s->K;
    for (long unit = thread; unit < B * H * chunks; unit += threads) {
        const long chunk = unit / (B * H), row = unit % (B * H) / H, head = unit % H; /* heads of one key head together */
        const long first = cache->first[row] + chunk * CHUNK, n = lesser(CHUNK, cache->column + 1 - first);
        if (n <= 0) continue;
        const long at = row * cache->row + head / group * cache->head + first * D;
        float *part = parts + ((row * H + head) * chunks + chunk) * (D + 2);
        attend(y + (row * (H + 2 * s->K) + head) * D, k + at, v + at, n, D, s->scale, scores, part, part + D, part + D + 1);
    }
}

static void join_chunks(const Shape *s, const float *parts, float *attended, const Cache *cache, long B, long chunks, long thread,
                        long threads) {
    const long D = s->D;
    for (long unit = thread; unit < B * s->H; unit += threads) {
        const long keys = cache->column + 1 - cache->first[unit / s->H], n = (keys + CHUNK - 1) / CHUNK;
        const float *part = parts + unit * chunks * (D + 2);
        float most = -INFINITY, total = 0.0f, *y = attended + unit * D;
        for (long c = 0; c < n; c++) most = part[c * (D + 2) + D] > most ? part[c * (D + 2) + D] : most;
        for (long d = 0; d < D; d++) y[d] = 0.0f;
        for (long c = 0; c < n; c++, part += D + 2) {
            const float weight = exp_of(part[D] - most);
            total += weight * part[D + 1];
            for (long d = 0; d < D; d++) y[d] += weight * part[d];
        }
        for (long d = 0; d < D; d++) y[d] /= total;
    }
}

/* x (B, in) as products take it: more than ROWS as columns, which threads turn together and wait for */
static const float *as_input(const float *x, float *columns, long B, long in, long thread, long threads) {
    if (B <= ROWS) return x;
    turn(x, columns, B, in, in * thread / threads, in * (thread + 1) / threads);
#pragma omp barrier
    return columns;
}

static void multiply(const Matrix *m, const float *x, float *columns, const float *more, float *y, long B, long thread, long threads) {
    const long share = share_of(m->out, threads);
    x = as_input(x, columns, B, m->in, thread, threads);
    some_channels((int)m->kind, x, m->weight, m->scales, m->bias, more, y, B, m->out, m->in, lesser(thread * share, m->out),
                  lesser((thread + 1) * share, m->out));
}

/* hidden (B, F) of an MLP, for this thread's channels: the gate's and the other's of a channel by one thread */
static void multiply_up(const Shape *s, const Matrix *m, const float *x, float *columns, float *up, float *hidden, long B, long thread,
                        long threads) {
    x = as_input(x, columns, B, m->in, thread, threads);
    const long F = s->F, share = share_of(F, threads), first = lesser(thread * share, F), last = lesser(first + share, F);
    for (long half = 0; half <= s->gated; half++)
        some_channels((int)m->kind, x, m->weight, m->scales, m->bias, NULL, up, B, m->out, m->in, half * F + first, half * F + last);
    for (long row = 0; row < B; row++) {
        const float *gate = up + row * m->out + first;
        activate(s->activation, gate, s->gated ? gate + F : NULL, hidden + row * F + first, last - first);
    }
}

static long chunks_of(const Cache *cache, long B) {
    long most = 0;
    for (long row = 0; row < B; row++) {
        const long n = (cache->column + CHUNK - cache->first[row]) / CHUNK;
        most = n > most ? n : most;
    }
    return most;
}

/* floats for the inputs of any product as columns */
static long columns_of(const Shape *s, long B) {
    const long widest = s->F > s->C ? s->F : s->C;
    return columns_memory(B, widest > s->H * s->D ? widest : s->H * s->D);
}

/* floats of memory that a step needs */
long decode_step_memory(const Shape *s, const Cache *cache, long B, long threads) {
    const long heads = B * (s->H + 2 * s->K) * s->D + B * s->H * s->D + B * s->H * chunks_of(cache, B) * (s->D + 2);
    return columns_of(s, B) + threads * (B * s->C + CHUNK) + heads + B * s->C +
           B * s->F * (2 + s->gated);
}

/* x (B, C), embeddings of a token of each row, becomes its hidden states after all blocks; keys and values go to the cache.
 * cosine, sine: (positions, D), 1 or B, or NULL; memory: as `decode_step_memory` says */
void decode_step(const Shape *s, const Layer *layers, float *x, const float *cosine, const float *sine, long positions,
                 const Cache *cache, long B, int wanted, float *memory) {
    const long chunks = chunks_of(cache, B), C = s->C;
    float *columns = memory, *y = columns + columns_of(s, B), *attended = y + B * (s->H + 2 * s->K) * s->D, *parts = attended + B * s->H * s->D;
    float *between = parts + B * s->H * chunks * (s->D + 2), *up = between + B * C, *hidden = up + B * s->F * (1 + s->gated);
    float *own = hidden + B * s->F;
#pragma omp parallel num_threads(wanted) if (wanted > 1)
    {
        const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
        float *normed = own + thread * (B * C + CHUNK), *scores = normed + B * C; /* each thread norms all: sooner than to wait */
        for (long l = 0; l < s->n_layers; l++) {
            const Layer *layer = layers + l;
            float *k = cache->k + l * cache->layer, *v = cache->v + l * cache->layer;
            normalize(s->norm, &layer->norm1, s->eps, x, normed, B, C);
            multiply(&layer->qkv, normed, columns, NULL, y, B, thread, threads);
#pragma omp barrier
            place_heads(s, layer, y, cosine, sine, positions, k, v, cache, B, thread, threads);
#pragma omp barrier
            attend_chunks(s, y, k, v, cache, B, chunks, parts, scores, thread, threads);
#pragma omp barrier
            join_chunks(s, parts, attended, cache, B, chunks, thread, threads);
#pragma omp barrier
            multiply(&layer->o, attended, columns, x, between, B, thread, threads);
#pragma omp barrier
            normalize(s->norm, &layer->norm2, s->eps, between, normed, B, C);
            multiply_up(s, &layer->up, normed, columns, up, hidden, B, thread, threads);
#pragma omp barrier
            multiply(&layer->down, hidden, columns, between, x, B, thread, threads);
#pragma omp barrier
        }
    }
}
