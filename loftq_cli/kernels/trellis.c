/* The codes of a trellis by Viterbi's search, with the bits of numerics/quantizers/viterbi.py.
 *
 * A state is a window of 5 codes of 2 bits, the last code in the lowest bits. A group is the states
 * that differ in it: they come from the same four states, those that end with the group's codes.
 * Costs lie so that the loops have no strides: of state 4 g + k in cost[k][g]. */
#include <float.h>
#include <stdlib.h>

#include "common.h"

#define WINDOW 10
#define STATES (1 << WINDOW)
#define GROUPS (STATES / 4)
#define PART (GROUPS / 4)
#define SEQUENCE 256 /* rows */
#define SHORTEST 24  /* rows of a sequence that is a ring */
#define SEAM 32      /* rows on either side of a ring's seam that its first state is found from */
#define PANEL 64     /* columns at most */

enum { DONE = 0, NO_MEMORY = 1 };

/* The fields of native_trellis.py's _Rings, in its order; rings are contiguous. */
typedef struct {
    int64_t length;      /* SHORTEST to SEQUENCE */
    const float *wanted; /* (count, length) */
    const float *scales; /* (count, length): a code costs (wanted - scale * level)^2 */
    const float *levels; /* (STATES,) */
    uint8_t *codes;      /* out (count, length) */
} Rings;

/* The fields of native_trellis.py's _Panel, in its order; columns are contiguous. */
typedef struct {
    int64_t rows, columns;
    int32_t store;        /* dtype that the values are rounded to before they are subtracted */
    const float *targets; /* (columns, rows) */
    const float *added;   /* (columns, rows): errors of earlier panels */
    const float *factor;  /* (columns, columns), upper triangular */
    const float *scales;  /* (columns, rows) */
    const float *levels;  /* (STATES,) */
    const float *alone;   /* (4,), ascending: levels of codes that choose alone */
    uint8_t *codes;       /* out (columns, rows) */
    float *values;        /* out (columns, rows) */
} Panel;

typedef struct {
    float levels[4][GROUPS], cost[4][GROUPS], least[GROUPS];
    uint8_t from[SEQUENCE][4][PART]; /* of group 4 h + k in [k][h]: the first code of where it comes from */
    float wanted[2 * SEAM], scales[2 * SEAM];
    uint8_t codes[2 * SEAM];
    float errors[PANEL][SEQUENCE];
} Work;

static Work *begin(const float *levels) {
    Work *w = malloc(sizeof(Work));
    if (w)
        for (int i = 0; i < STATES; i++) w->levels[i & 3][i >> 2] = levels[i];
    return w;
}

static void take_least(Work *w, uint8_t (*from)[PART]) {
    float least[4][PART];
    for (int k = 0; k < 4; k++) {
        const float *restrict cost = w->cost[k];
        float *restrict part = least[k];
        uint8_t *restrict chosen = from[k];
        for (int h = 0; h < PART; h++) {
            float a = cost[h], b = cost[h + PART], c = cost[h + 2 * PART], d = cost[h + 3 * PART];
            float low = b < a ? b : a, high = d < c ? d : c;
            uint8_t first = b < a ? 1 : 0, second = d < c ? 3 : 2;
            chosen[h] = high < low ? second : first;
            part[h] = high < low ? high : low;
        }
    }
    for (int h = 0; h < PART; h++) {
        w->least[4 * h] = least[0][h];
        w->least[4 * h + 1] = least[1][h];
        w->least[4 * h + 2] = least[2][h];
        w->least[4 * h + 3] = least[3][h];
    }
}

static void add_costs(Work *w, float wanted, float scale) {
    for (int k = 0; k < 4; k++) {
        const float *restrict levels = w->levels[k], *restrict least = w->least;
        float *restrict cost = w->cost[k];
        for (int g = 0; g < GROUPS; g++) {
            float error = wanted - scale * levels[g];
            cost[g] = least[g] + error * error;
        }
    }
}

/* The best codes of n weights. `before`: the group that they begin in and end before, or -1. */
static void search(Work *w, const float *wanted, const float *scales, int64_t n, int before,
                   uint8_t *codes) {
    for (int g = 0; g < GROUPS; g++) w->least[g] = before < 0 || g == before ? 0.0f : INFINITY;
    for (int64_t t = 0; t < n; t++) {
        if (t) take_least(w, w->from[t]);
        add_costs(w, wanted[t], scales[t]);
    }
    int state = before < 0 ? 0 : before;
    for (int s = 0; s < STATES; s++)
        if ((before < 0 || s % GROUPS == before) && w->cost[s & 3][s >> 2] < w->cost[state & 3][state >> 2])
            state = s;
    for (int64_t t = n - 1; t >= 0; t--) {
        int g = state >> 2;
        codes[t] = (uint8_t)(state & 3);
        state = g + (t ? w->from[t][g & 3][g >> 2] * GROUPS : 0);
    }
}

/* The group that a ring best begins in: of the codes around its seam, those before it. */
static int group_before(Work *w, const float *wanted, const float *scales, int64_t n) {
    int64_t half = n / 2 < SEAM ? n / 2 : SEAM;
    for (int64_t i = 0; i < 2 * half; i++) {
        int64_t row = (n - half + i) % n;
        w->wanted[i] = wanted[row];
        w->scales[i] = scales[row];
    }
    search(w, w->wanted, w->scales, 2 * half, -1, w->codes);
    int group = 0;
    for (int64_t i = half - (WINDOW / 2 - 1); i < half; i++) group = group << 2 | w->codes[i];
    return group;
}

/* The best codes of a ring, found in units of a power of two, so that no square overflows. */
static void ring(Work *w, const float *wanted, const float *scales, int64_t n, uint8_t *codes) {
    float values[SEQUENCE], own[SEQUENCE], most = largest(scales, (int)n);
    int exponent = 0;
    if (most > 0.0f) frexpf(most, &exponent);
    exponent = exponent > 100 ? 100 : exponent < -100 ? -100 : exponent;
    float unit = ldexpf(1.0f, -exponent);
    for (int64_t i = 0; i < n; i++) {
        float x = wanted[i] * unit;
        x = x > 1e15f ? 1e15f : x;
        values[i] = x < -1e15f ? -1e15f : x;
        own[i] = scales[i] * unit;
    }
    search(w, values, own, n, group_before(w, values, own, n), codes);
}

/* Rings [first, last). */
int loftq_trellis(const Rings *s, int64_t first, int64_t last) {
    Work *w = begin(s->levels);
    if (!w) return NO_MEMORY;
    for (int64_t i = first; i < last; i++)
        ring(w, s->wanted + i * s->length, s->scales + i * s->length, s->length,
             s->codes + i * s->length);
    free(w);
    return DONE;
}

/* Codes that choose alone. */
static void alone(const Panel *s, const float *wanted, const float *scales, int64_t n,
                  uint8_t *codes) {
    for (int64_t i = 0; i < n; i++) {
        int best = 0;
        for (int k = 1; k < 4; k++)
            if (fabsf(wanted[i] - scales[i] * s->alone[k]) < fabsf(wanted[i] - scales[i] * s->alone[best]))
                best = k;
        codes[i] = (uint8_t)best;
    }
}

static float level_of(const Panel *s, const uint8_t *codes, int64_t n, int64_t row) {
    if (n < SHORTEST) return s->alone[codes[row]];
    int number = 0;
    for (int i = 0; i < WINDOW / 2; i++) number |= codes[(row + n - i) % n] << 2 * i;
    return s->levels[number];
}

/* All columns of sequences [first, last) of their rows, the last column first: each after the errors
 * of those behind it. */
int loftq_trellis_panel(const Panel *s, int64_t first, int64_t last) {
    Work *w = begin(s->levels);
    if (!w) return NO_MEMORY;
    for (int64_t sequence = first; sequence < last; sequence++) {
        int64_t row = sequence * SEQUENCE, n = s->rows - row < SEQUENCE ? s->rows - row : SEQUENCE;
        for (int64_t column = s->columns - 1; column >= 0; column--) {
            int64_t at = column * s->rows + row;
            const float *restrict target = s->targets + at, *restrict scales = s->scales + at;
            float sum[SEQUENCE] = {0}, wanted[SEQUENCE];
            for (int64_t later = column + 1; later < s->columns; later++) {
                float factor = s->factor[column * s->columns + later];
                const float *restrict error = w->errors[later];
                for (int64_t i = 0; i < n; i++) sum[i] += factor * error[i];
            }
            for (int64_t i = 0; i < n; i++) {
                float x = target[i] + s->added[at + i] + sum[i];
                x = x != x ? 0.0f : x; /* after an overflow, which the residual shows: finite */
                x = x > FLT_MAX ? FLT_MAX : x;
                wanted[i] = x < -FLT_MAX ? -FLT_MAX : x;
            }
            uint8_t *codes = s->codes + at;
            float *values = s->values + at;
            if (n < SHORTEST) alone(s, wanted, scales, n, codes);
            else ring(w, wanted, scales, n, codes);
            for (int64_t i = 0; i < n; i++) values[i] = level_of(s, codes, n, i) * scales[i];
            round_values(values, (int)n, s->store);
            for (int64_t i = 0; i < n; i++) w->errors[column][i] = target[i] - values[i];
        }
    }
    free(w);
    return DONE;
}
