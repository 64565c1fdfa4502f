/* Quantization with error feedback (numerics/feedback.py), 64 rows at a time: each column of them is
 * contiguous, all of their errors so far stay in the second-level cache, and a panel of 64 columns,
 * what it is to be quantized after and its codes in the first.
 */
#define _GNU_SOURCE
#include <float.h>
#include <stdlib.h>

#include "codebook.h"
#include "common.h"
#include "pairs.h"
#include "product.h"
#include "transpose.h"
#include "uniform.h"

enum { DONE = 0, NO_MEMORY = 1 };

#define ROWS 64  /* of a group; TILE in product.h, ACROSS_PAIRS in pairs.h */
#define PANEL 64 /* columns between two products with all errors so far */
#define DEPTH 128 /* float32 errors that stay in the first-level cache */

/* The fields of native_feedback.py's _Feedback, in its order. All matrices are row-major, and float32
 * where nothing else is said. */
typedef struct {
    int64_t rows, columns;
    int64_t size;        /* elements of a block, the last one short */
    int32_t flattened;   /* blocks run over the flattened matrix, else along each row */
    int32_t store;       /* dtype that the values are rounded to before they are subtracted */
    int32_t kind;        /* dtype of `weight` */
    const Codebook *codebook; /* or NULL */
    Uniform uniform;
    int32_t rank;
    const float *left;   /* (rows, rank): the target is weight - left x right */
    const float *right;  /* (columns, rank), in the order of feedback */
    const int64_t *order; /* columns, quantized from the last of these to the first */
    int32_t half;        /* `factor` is bfloat16, and errors are multiplied as such */
    const void *factor;  /* (columns, columns) in that order, unit upper triangular */
    const float *scales; /* of the blocks */
    const uint8_t *zeros; /* their zero points, or NULL */
    const void *weight;
    float *residual;     /* out: weight - values */
    uint16_t *narrow;    /* out: the residual in bfloat16, or NULL */
    uint8_t *codes;      /* out */
    double *sums;        /* out, one a group: squares of the residual */
} Feedback;

/* What one thread works in. Columns of a group are rows of ROWS values here. */
typedef struct {
    float *columns;     /* (columns, ROWS): targets, later the values that they became */
    uint8_t *codes;     /* (columns, ROWS) */
    void *errors;       /* of the columns in order, behind those that are missing in the first
                           panel: (.., ROWS), or in pairs as pairs.h has them */
    float *left;        /* (rank, ROWS) */
    float *scales, *zeros; /* (blocks of a row, ROWS) */
    float *wide;        /* (ROWS, TURNED) */
    float factor[PANEL][PANEL], added[PANEL][ROWS], recent[PANEL][ROWS];
    int64_t phase[ROWS]; /* where in its first block each row begins */
    int64_t height;      /* rows there are */
    int aligned;         /* all begin with a block */
#ifdef HAS_PAIRS
    Pairs pairs;
#endif
} Work;

#ifdef HAS_PAIRS
int loftq_feedback_in_pairs(void) { return 1; }
#else
int loftq_feedback_in_pairs(void) { return 0; }
#endif

static int64_t panels(const Feedback *s) { return (s->columns + PANEL - 1) / PANEL; }

static int64_t blocks_of_a_row(const Feedback *s) {
    int64_t whole = (s->columns + s->size - 1) / s->size;
    return s->flattened ? whole + 1 : whole;
}

/* Of rows [first, first + height): targets before their product, in the order of the matrix. */
static void take_rows(const Feedback *s, Work *w, int64_t first) {
    for (int64_t column = 0; column < s->columns; column += TURNED) {
        int64_t width = s->columns - column < TURNED ? s->columns - column : TURNED;
        float turned[TURNED][ROWS];
        for (int64_t i = 0; i < w->height; i++)
            widen(s->weight, s->kind, (first + i) * s->columns + column, width,
                  w->wide + i * TURNED);
        for (int i = 0; i < ROWS; i += TURNED)
            transpose_16(w->wide + i * TURNED, TURNED, turned[0] + i, ROWS);
        memcpy(w->columns + column * ROWS, turned, (size_t)(width * ROWS) * sizeof(float));
    }
    for (int64_t i = 0; i < w->height; i++)
        for (int k = 0; k < s->rank; k++) w->left[k * ROWS + i] = s->left[(first + i) * s->rank + k];
}

/* The parameters of their blocks, one block of every row after the other. */
static void take_parameters(const Feedback *s, Work *w, int64_t first) {
    int64_t count = blocks_of_a_row(s), whole = (s->columns + s->size - 1) / s->size;
    int64_t all = s->flattened ? (s->rows * s->columns + s->size - 1) / s->size : s->rows * whole;
    w->aligned = 1;
    for (int64_t i = 0; i < w->height; i++) {
        int64_t at = (first + i) * s->columns;
        int64_t begin = s->flattened ? at / s->size : (first + i) * whole;
        w->phase[i] = s->flattened ? at % s->size : 0;
        w->aligned &= w->phase[i] == 0;
        for (int64_t block = 0; block < count; block++) {
            int64_t source = begin + block < all ? begin + block : all - 1;
            w->scales[block * ROWS + i] = s->scales[source];
            if (s->zeros) w->zeros[block * ROWS + i] = (float)s->zeros[source];
        }
    }
}

/* Subtract the product from the targets of panel columns [start, stop) of the order. */
static void subtract_panel(const Feedback *s, Work *w, int64_t start, int64_t stop) {
    for (int64_t column = start; column < stop; column += TILE_ROWS) {
        const float *rows[TILE_ROWS];
        float product[TILE_ROWS][TILE];
        for (int i = 0; i < TILE_ROWS; i++)
            rows[i] = s->right + (column + i < stop ? column + i : column) * s->rank;
        multiply_tile(rows, w->left, s->rank, product);
        for (int i = 0; i < TILE_ROWS && column + i < stop; i++) {
            float *target = w->columns + s->order[column + i] * ROWS;
            for (int j = 0; j < ROWS; j++) target[j] -= product[i][j];
        }
    }
}

/* added = factor[start:stop, stop:] @ errors[stop:] */
static void add_errors(const Feedback *s, Work *w, int64_t start, int64_t stop) {
    int64_t missing = panels(s) * PANEL - s->columns;
    memset(w->added, 0, sizeof w->added);
#ifdef HAS_PAIRS
    if (s->half) {
        const uint16_t *factor = s->factor;
        const uint32_t *errors = w->errors;
        for (int64_t from = stop; from < s->columns; from += PAIR_DEPTH) {
            int64_t depth = s->columns - from < PAIR_DEPTH ? s->columns - from : PAIR_DEPTH;
            for (int64_t row = start; row < stop; row += w->pairs.rows) {
                int height = (int)(stop - row < w->pairs.rows ? stop - row : w->pairs.rows);
                multiply_pairs(&w->pairs, factor + row * s->columns + from, s->columns, height,
                               errors + (missing + from) / 2 * ROWS, depth, w->added[row - start]);
            }
        }
        return;
    }
#endif
    const float *factor = s->factor, *errors = w->errors;
    for (int64_t from = stop; from < s->columns; from += DEPTH) {
        int depth = (int)(s->columns - from < DEPTH ? s->columns - from : DEPTH);
        for (int64_t row = start; row < stop; row += TILE_ROWS) {
            const float *rows[TILE_ROWS];
            float product[TILE_ROWS][TILE];
            for (int i = 0; i < TILE_ROWS; i++)
                rows[i] = factor + (row + i < stop ? row + i : row) * s->columns + from;
            multiply_tile(rows, errors + (missing + from) * ROWS, depth, product);
            for (int i = 0; i < TILE_ROWS && row + i < stop; i++)
                for (int j = 0; j < ROWS; j++) w->added[row - start + i][j] += product[i][j];
        }
    }
}

/* The parameters of one column of the matrix, `own` being room for them. */
static void parameters_of(const Feedback *s, const Work *w, int64_t column, const float **scales,
                          const float **zeros, float own[ROWS]) {
    int64_t block = column / s->size, rest = column % s->size;
    *scales = w->scales + block * ROWS;
    *zeros = w->zeros + block * ROWS;
    if (w->aligned) return; /* as they always are where there are zero points */
    for (int i = 0; i < ROWS; i++) {
        int64_t index = block + (rest + w->phase[i] >= s->size);
        own[i] = w->scales[index * ROWS + i];
    }
    *scales = own;
}

/* Quantize panel columns [start, stop) of the order, the last first. */
static void quantize_panel(const Feedback *s, Work *w, int64_t start, int64_t stop) {
    int64_t width = stop - start, missing = panels(s) * PANEL - s->columns;
    for (int64_t i = 0; i < width; i++)
        widen(s->factor, s->half ? BFLOAT16 : FLOAT32, (start + i) * s->columns + start, width,
              w->factor[i]);
    for (int64_t column = width - 1; column >= 0; column--) {
        int64_t place = s->order[start + column];
        float *restrict target = w->columns + place * ROWS, *restrict error = w->recent[column];
        const float *restrict added = w->added[column], *scales, *zeros;
        float wanted[ROWS], values[ROWS], own[ROWS];
        for (int i = 0; i < ROWS; i++) {
            float x = target[i] + added[i]; /* after an overflow, which the residual shows: finite */
            x = x != x ? 0.0f : x;
            x = x > FLT_MAX ? FLT_MAX : x;
            wanted[i] = x < -FLT_MAX ? -FLT_MAX : x;
        }
        parameters_of(s, w, place, &scales, &zeros, own);
        if (s->codebook)
            codebook_each(s->codebook, wanted, ROWS, scales, w->codes + place * ROWS, values);
        else
            uniform_each(wanted, ROWS, scales, zeros, (float)s->uniform.top,
                         w->codes + place * ROWS, values);
        round_values(values, ROWS, s->store);
        for (int i = 0; i < ROWS; i++) {
            error[i] = target[i] - values[i];
            target[i] = values[i];
        }
        for (int64_t before = 0; before < column; before++) {
            float factor = w->factor[before][column];
            float *restrict sum = w->added[before];
            for (int i = 0; i < ROWS; i++) sum[i] += factor * error[i];
        }
    }
    if (!s->half) {
        memcpy((float *)w->errors + (missing + start) * ROWS, w->recent,
               (size_t)(width * ROWS) * sizeof(float));
        return;
    }
    if (start == 0) return; /* nobody comes after these, and they need not be pairs */
    for (int64_t column = 0; column < width; column += 2) {
        uint32_t *restrict pairs = (uint32_t *)w->errors + (missing + start + column) / 2 * ROWS;
        const float *restrict low = w->recent[column], *restrict high = w->recent[column + 1];
        for (int i = 0; i < ROWS; i++)
            pairs[i] = (uint32_t)bfloat16_bits(low[i]) | (uint32_t)bfloat16_bits(high[i]) << 16;
    }
}

/* Codes and residual of rows [first, first + height) to their places; the residual's squares. */
static double give_rows(const Feedback *s, Work *w, int64_t first) {
    double total = 0.0;
    for (int64_t column = 0; column < s->columns; column += TURNED) {
        int width = (int)(s->columns - column < TURNED ? s->columns - column : TURNED);
        float turned[ROWS][TURNED];
        for (int i = 0; i < ROWS; i += TURNED)
            transpose_16(w->columns + column * ROWS + i, ROWS, turned[i], TURNED);
        for (int64_t i = 0; i < w->height; i++) {
            int64_t at = (first + i) * s->columns + column;
            float weight[TURNED], *restrict residual = s->residual + at;
            uint8_t *restrict codes = s->codes + at;
            const uint8_t *restrict source = w->codes + column * ROWS + i;
            widen(s->weight, s->kind, at, width, weight);
            for (int j = 0; j < width; j++) {
                float rest = weight[j] - turned[i][j];
                residual[j] = rest;
                total += (double)rest * (double)rest;
                codes[j] = source[j * ROWS];
            }
            if (s->narrow)
                for (int j = 0; j < width; j++) s->narrow[at + j] = bfloat16_bits(residual[j]);
        }
    }
    return total;
}

static void *zeroed(int64_t count, size_t size) { return calloc((size_t)count, size); }

/* Groups [first, last) of ROWS rows. */
int loftq_feedback(const Feedback *s, int64_t first, int64_t last) {
    int64_t whole = panels(s) * PANEL, turned = s->columns + TURNED, count = blocks_of_a_row(s);
    Work *w = zeroed(1, sizeof(Work));
    int status = NO_MEMORY;
    if (!w) return NO_MEMORY;
    w->columns = zeroed(turned * ROWS, sizeof(float));
    w->codes = zeroed(s->columns * ROWS, 1);
    w->errors = zeroed(whole * ROWS, s->half ? 2 : sizeof(float));
    w->left = zeroed((s->rank ? s->rank : 1) * ROWS, sizeof(float));
    w->scales = zeroed(count * ROWS, sizeof(float));
    w->zeros = zeroed(count * ROWS, sizeof(float));
    w->wide = zeroed(ROWS * TURNED, sizeof(float));
    if (w->columns && w->codes && w->errors && w->left && w->scales && w->zeros && w->wide) {
#ifdef HAS_PAIRS
        w->pairs = begin_pairs();
#endif
        for (int64_t group = first; group < last; group++) {
            int64_t row = group * ROWS;
            w->height = s->rows - row < ROWS ? s->rows - row : ROWS;
            take_rows(s, w, row);
            take_parameters(s, w, row);
            for (int64_t stop = s->columns; stop > 0; stop -= PANEL) {
                int64_t start = stop > PANEL ? stop - PANEL : 0;
                subtract_panel(s, w, start, stop);
                add_errors(s, w, start, stop);
                quantize_panel(s, w, start, stop);
            }
            s->sums[group] = give_rows(s, w, row);
        }
#ifdef HAS_PAIRS
        end_pairs(&w->pairs);
#endif
        status = DONE;
    }
    free(w->columns);
    free(w->codes);
    free(w->errors);
    free(w->left);
    free(w->scales);
    free(w->zeros);
    free(w->wide);
    free(w);
    return status;
}
