/* One read of a tensor, up to five sums for each unit.
 *
 * The tensor is seen as (rows, units, inner). With inner == 1 (channels last, tokens) a strip of
 * neighbouring units is summed down the rows in registers, tile by tile of rows that lie together
 * and fit the cache, each tile fetching the one below it; otherwise each unit's run of inner
 * values is summed across. Counts are integers and exact; sums are taken in float over at most
 * BLOCK values a lane and then added in double, in an order that depends on the shape alone.
 *
 * Vectors are the compiler's own (GCC, Clang); no flag that lets it reorder sums or drop NaN.
 */
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
/* Vectors of units in a strip. One sum alone leaves registers for a wider one, and the wider the
 * strip the longer the runs of memory it reads. */
#define STRIP 6
#if LANES == 16
#define WIDE 24
#else
#define WIDE 12
#endif
/* Unrolled, a strip's sums live in registers; as a loop they would live in memory. */
#ifdef __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 24")
#endif
#define BLOCK 512
/* Bytes of rows read together, and vectors of units whose sums are held meanwhile. */
#define TILE 131072
#define PANEL 64

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef double vd __attribute__((vector_size(8 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

enum { ABSOLUTE = 1, POSITIVE = 2, INSIDE = 4, NEAR = 8, OFFSET = 16, SUMS = 5 };

typedef struct {
    int32_t intervals;
    float low[4], high[4];
    float middle, near;
} limits;

typedef struct {
    vf absolute, offset;
    vi positive, inside, near;
} sums;

static inline vf load_float(const void *at) {
    vf x;
    memcpy(&x, at, sizeof x);
    return x;
}

static inline vf load_bfloat(const void *at) {
    vh half;
    memcpy(&half, at, sizeof half);
    vi wide = __builtin_convertvector(half, vi) << 16;
    vf x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

static inline vf magnitude(vf x) {
    vi bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= 0x7fffffff;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* `what` is a constant wherever this is inlined, so what is not asked for costs nothing. `live`
 * masks lanes beyond the end, which hold zeros. */
static inline __attribute__((always_inline)) void add(sums *s, vf x, vi live, int what,
                                                      const limits *by) {
    if (what & ABSOLUTE) s->absolute += magnitude(x);
    if (what & POSITIVE) s->positive -= (x > 0.0f);
    if (what & NEAR) s->near -= (magnitude(x) <= by->near) & live;
    if (what & OFFSET) {
        vf off = magnitude(x - by->middle);
        vi bits;
        memcpy(&bits, &off, sizeof bits);
        bits &= live;
        memcpy(&off, &bits, sizeof off);
        s->offset += off;
    }
    if (what & INSIDE) {
        vi in = (x >= by->low[0]) & (x <= by->high[0]);
        for (int i = 1; i < by->intervals; i++) in |= (x >= by->low[i]) & (x <= by->high[i]);
        s->inside -= in & live;
    }
}

static inline __attribute__((always_inline)) void flush_strip(const sums *s, double *out,
                                                              long units, int lanes, int what) {
    for (int k = 0; k < lanes; k++) {
        if (what & ABSOLUTE) out[k] += s->absolute[k];
        if (what & POSITIVE) out[units + k] += s->positive[k];
        if (what & INSIDE) out[2 * units + k] += s->inside[k];
        if (what & NEAR) out[3 * units + k] += s->near[k];
        if (what & OFFSET) out[4 * units + k] += s->offset[k];
    }
}

static inline __attribute__((always_inline)) vf part(const char *at, int lanes, int bfloat) {
    /* The last few units of a row: never read past them. */
    char room[4 * LANES] = {0};
    memcpy(room, at, (size_t)lanes * (bfloat ? 2 : 4));
    return bfloat ? load_bfloat(room) : load_float(room);
}

/* Adds rows first to last of `count` neighbouring vectors of units to their sums. */
static inline __attribute__((always_inline)) void strip(const char *x, long first, long last,
                                                        long units, long u, int count, long tile,
                                                        sums *held, int what, const limits *by,
                                                        int bfloat) {
    const long width = bfloat ? 2 : 4;
    const vi all = ((vi){0}) - 1;
    sums s[WIDE];
    for (int k = 0; k < count; k++) s[k] = held[k];
    for (long r = first; r < last; r++) {
        const char *at = x + (r * units + u) * width;
        UNROLLED
        for (int k = 0; k < count; k++) {
            const char *here = at + k * LANES * width;
            /* Memory's own read-ahead loses its way in strips. */
            __builtin_prefetch(here + tile * units * width, 0, 2);
            add(&s[k], bfloat ? load_bfloat(here) : load_float(here), all, what, by);
        }
    }
    for (int k = 0; k < count; k++) held[k] = s[k];
}

static inline __attribute__((always_inline)) void sum_all(const char *x, long rows, long units,
                                                          long inner, double *out, int what,
                                                          const limits *by, int bfloat) {
    const long width = bfloat ? 2 : 4;
    const vi all = ((vi){0}) - 1;
    if (inner == 1) {
        for (long left = 0; left < units; left += PANEL * LANES) {
            const long right = left + PANEL * LANES < units ? left + PANEL * LANES : units;
            const long fit = TILE / ((right - left) * width);
            const long tile = fit < 4 ? 4 : fit > BLOCK ? BLOCK : fit;
            for (long top = 0; top < rows; top += BLOCK) {
                const long bottom = top + BLOCK < rows ? top + BLOCK : rows;
                sums held[PANEL];
                memset(held, 0, sizeof held);
                for (long first = top; first < bottom; first += tile) {
                    const long last = first + tile < bottom ? first + tile : bottom;
                    long u = left;
                    sums *s = held;
#define STRIPS(N)                                                                        \
    for (; u + (N) * LANES <= right; u += (N) * LANES, s += (N))                         \
        strip(x, first, last, units, u, (N), tile, s, what, by, bfloat);
                    if (what == ABSOLUTE) {
                        STRIPS(WIDE)
                        STRIPS(WIDE / 2)
                    }
                    STRIPS(STRIP)
                    STRIPS(STRIP / 2)
                    STRIPS(1)
                    if (u < right)
                        for (long r = first; r < last; r++)
                            add(s, part(x + (r * units + u) * width, (int)(right - u), bfloat),
                                all, what, by);
                }
                for (long u = left; u < right; u += LANES)
                    flush_strip(&held[(u - left) / LANES], out + u, units,
                                right - u < LANES ? (int)(right - u) : LANES, what);
            }
        }
        return;
    }
    for (long r = 0; r < rows; r++)
        for (long u = 0; u < units; u++) {
            const char *run = x + (r * units + u) * inner * width;
            double total[2] = {0, 0};
            long counts[3] = {0, 0, 0};
            for (long begin = 0; begin < inner; begin += BLOCK * LANES) {
                const long end = begin + BLOCK * LANES < inner ? begin + BLOCK * LANES : inner;
                sums s;
                memset(&s, 0, sizeof s);
                long i = begin;
                for (; i + LANES <= end; i += LANES) {
                    const char *here = run + i * width;
                    add(&s, bfloat ? load_bfloat(here) : load_float(here), all, what, by);
                }
                if (i < end) {
                    vi live;
                    for (int k = 0; k < LANES; k++) live[k] = k < end - i ? -1 : 0;
                    add(&s, part(run + i * width, (int)(end - i), bfloat), live, what, by);
                }
                for (int k = 0; k < LANES; k++) {
                    if (what & ABSOLUTE) total[0] += s.absolute[k];
                    if (what & OFFSET) total[1] += s.offset[k];
                    if (what & POSITIVE) counts[0] += s.positive[k];
                    if (what & INSIDE) counts[1] += s.inside[k];
                    if (what & NEAR) counts[2] += s.near[k];
                }
            }
            if (what & ABSOLUTE) out[u] += total[0];
            if (what & POSITIVE) out[units + u] += (double)counts[0];
            if (what & INSIDE) out[2 * units + u] += (double)counts[1];
            if (what & NEAR) out[3 * units + u] += (double)counts[2];
            if (what & OFFSET) out[4 * units + u] += total[1];
        }
}

#define CASE(W)                                                                          \
    case (W):                                                                            \
        if (bfloat) sum_all(x, rows, units, inner, out, (W), by, 1);                     \
        else sum_all(x, rows, units, inner, out, (W), by, 0);                            \
        return 1;

/* Adds to out (SUMS, units). Returns 1, or 0 where this combination is not built. */
int unit_sums(const char *x, long rows, long units, long inner, int bfloat, int what,
              const limits *by, double *out) {
    switch (what) {
        CASE(ABSOLUTE)
        CASE(POSITIVE | INSIDE)
        CASE(ABSOLUTE | NEAR)
        CASE(ABSOLUTE | NEAR | OFFSET)
        CASE(ABSOLUTE | POSITIVE | NEAR)
        CASE(ABSOLUTE | POSITIVE | INSIDE | NEAR | OFFSET)
    }
    return 0;
}

/* Adds up what `pieces` blocks of `count` sums hold, in their order. */
void add_up(const double *parts, long pieces, long count, double *out) {
    for (long i = 0; i < count; i++) out[i] = 0;
    for (long p = 0; p < pieces; p++)
        for (long i = 0; i < count; i++) out[i] += parts[p * count + i];
}

/* A tensor cut into pieces of `step` rows, and where sums go: parts (pieces, SUMS, units), then
 * out (SUMS, units). */
typedef struct {
    int64_t rows, units, inner, step, pieces;
    int32_t bfloat, what;
    limits by;
    double *parts, *out;
} job;

/* All sums of a tensor by one thread: the last piece first, which was written last and is partly
 * still in the cache. */
void all_sums(const char *x, const job *j) {
    const long block = SUMS * j->units, a_row = j->units * j->inner * (j->bfloat ? 2 : 4);
    memset(j->parts, 0, (size_t)(j->pieces * block) * sizeof(double));
    for (long p = j->pieces - 1; p >= 0; p--) {
        const long first = p * j->step, left = j->rows - first;
        unit_sums(x + first * a_row, left < j->step ? left : j->step, j->units, j->inner,
                  j->bfloat, j->what, &j->by, j->parts + p * block);
    }
    add_up(j->parts, j->pieces, block, j->out);
}

/* One read of a batch's gradient g beside the weight w: adds g to `total` (rows, inner), and for
 * each row sum g^2, sum |g|, sum |w g| and the count of g == 0 to out (4, rows). */
void gradient_sums(const float *w, const float *g, float scale, float *total, long rows,
                   long inner, double *out) {
    for (long r = 0; r < rows; r++) {
        const float *wr = w + r * inner, *gr = g + r * inner;
        float *tr = total ? total + r * inner : 0;
        double squares = 0, absolute = 0, products = 0;
        long zeros = 0;
        for (long begin = 0; begin < inner; begin += BLOCK * LANES) {
            const long end = begin + BLOCK * LANES < inner ? begin + BLOCK * LANES : inner;
            /* Gradients may be so small that their squares are 0 in float. */
            vd a = {0}, c = {0};
            vf b = {0};
            vi zero = {0};
            long i = begin;
            for (; i + LANES <= end; i += LANES) {
                const vf x = load_float(gr + i) * scale, y = load_float(wr + i);
                if (tr) {
                    const vf sum = load_float(tr + i) + x;
                    memcpy(tr + i, &sum, sizeof sum);
                }
                const vd wide = __builtin_convertvector(x, vd);
                const vd by = __builtin_convertvector(magnitude(y), vd);
                a += wide * wide;
                b += magnitude(x);
                c += __builtin_convertvector(magnitude(x), vd) * by;
                zero -= (x == 0.0f);
            }
            for (int k = 0; k < LANES; k++) {
                squares += a[k];
                absolute += b[k];
                products += c[k];
                zeros += zero[k];
            }
            for (; i < end; i++) {
                const float x = gr[i] * scale;
                const double product = (double)x * wr[i];
                if (tr) tr[i] += x;
                squares += (double)x * x;
                absolute += x < 0 ? -x : x;
                products += product < 0 ? -product : product;
                zeros += x == 0;
            }
        }
        out[r] += squares;
        out[rows + r] += absolute;
        out[2 * rows + r] += products;
        out[3 * rows + r] += (double)zeros;
    }
}

/* Adds up sums by row, (4, rows), to (4). */
void across(const double *by_row, long rows, double *out) {
    for (long k = 0; k < 4; k++) {
        double sum = 0;
        for (long r = 0; r < rows; r++) sum += by_row[k * rows + r];
        out[k] = sum;
    }
}

typedef struct {
    const float *w, *g;
    float *total;
    int64_t rows, inner;
} weight;

/* `gradient_sums` of n weights by one thread, summed over rows: out (n, 4), room for (4, rows) of
 * the longest. */
void all_gradients(const weight *each, long n, float scale, double *room, double *out) {
    for (long i = 0; i < n; i++) {
        const weight *j = each + i;
        memset(room, 0, (size_t)(4 * j->rows) * sizeof(double));
        gradient_sums(j->w, j->g, scale, j->total, j->rows, j->inner, room);
        across(room, j->rows, out + 4 * i);
    }
}

/* One read of n values: with d = (x - pivot) * scale adds sum d, sum d^2, sum d^3, sum d^4 and the count of
 * |x| < near to out (5). */
void moment_sums(const float *x, long n, float pivot, float scale, float near, double *out) {
    for (long begin = 0; begin < n; begin += BLOCK * LANES) {
        const long end = begin + BLOCK * LANES < n ? begin + BLOCK * LANES : n;
        vf one = {0}, two = {0}, three = {0}, four = {0};
        vi close = {0};
        long i = begin;
        for (; i + LANES <= end; i += LANES) {
            const vf v = load_float(x + i), d = (v - pivot) * scale, square = d * d;
            one += d;
            two += square;
            three += square * d;
            four += square * square;
            close -= (magnitude(v) < near);
        }
        for (int k = 0; k < LANES; k++) {
            out[0] += one[k];
            out[1] += two[k];
            out[2] += three[k];
            out[3] += four[k];
            out[4] += close[k];
        }
        for (; i < end; i++) {
            const double d = ((double)x[i] - pivot) * scale;
            out[0] += d;
            out[1] += d * d;
            out[2] += d * d * d;
            out[3] += d * d * d * d;
            out[4] += (x[i] < 0 ? -x[i] : x[i]) < near;
        }
    }
}
