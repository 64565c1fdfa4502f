/* A range of blocks of packed codes to what they mean: levels[code] * scale, or
 * (code - zero) * scale, in float32, rounded once to what is stored. The bits are those of
 * decoding.py's tensor operations.
 *
 * Up to 4 bits a block's values are tabulated first: multiplication and rounding are done once a
 * level, the rest is look-ups. */
#include "dequantize.h"

#define RUN 256
#define NOT_UNROLLED _Pragma("GCC unroll 1")

enum { TO_FLOAT32 = 0, TO_BFLOAT16 = 1, TO_FLOAT16 = 2 };

/* The fields of decoding.py's _Call, in its order. */
typedef struct {
    int64_t columns;       /* of a row; blocks over the flattened matrix: of all of it */
    int64_t size;          /* elements of a block, the last one of a row short */
    int64_t scale_step;    /* 1, or 0 where all blocks share one scale */
    int32_t bits, store;
    const uint8_t *packed;
    const float *scales;
    const float *levels;   /* (2**bits,) or NULL */
    const uint8_t *zeros;  /* packed; NULL with levels */
    void *out;
} Dequantize;

/* Float32 bits to 16 bits, to the nearest, ties to even. 32 bits wide throughout, without branches:
 * sixteen at once. */
INLINE uint32_t bfloat16_of(uint32_t bits) {
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded;
}

INLINE uint32_t float16_of(uint32_t bits) {
    uint32_t a = bits & 0x7fffffffu, subnormal;
    uint32_t normal = (a - (112u << 23) + 0xfffu + (a >> 13 & 1u)) >> 13;
    float shifted;
    memcpy(&shifted, &a, 4);
    shifted += 0.5f; /* rounds to multiples of 2^-24, the smallest subnormal */
    memcpy(&subnormal, &shifted, 4);
    uint32_t rounded = a < 0x38800000u ? subnormal - 0x3f000000u : normal;
    rounded = a >= 0x477ff000u ? 0x7c00u : rounded; /* from 65520 on */
    rounded = a > 0x7f800000u ? 0x7e00u : rounded;
    return (bits >> 16 & 0x8000u) | rounded;
}

INLINE uint32_t stored(float x, int store) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (store == TO_FLOAT32) return bits;
    return store == TO_BFLOAT16 ? bfloat16_of(bits) : float16_of(bits);
}

INLINE void put(void *out, int64_t k, uint32_t bits, int width) {
    if (width == 4) ((uint32_t *)out)[k] = bits;
    else ((uint16_t *)out)[k] = (uint16_t)bits;
}

INLINE uint32_t code_at(const uint8_t *packed, int64_t k, int bits) {
    const uint8_t *p = packed + (k * bits >> 3);
    int shift = (int)(k * bits & 7);
    uint32_t word = *p;
    if (shift + bits > 8) word |= (uint32_t)p[1] << 8;
    return word >> shift & ((1u << bits) - 1u);
}

/* Codes of at most 4 bits, elements `at` to `stop`. */
INLINE void tabulated(const Dequantize *d, Lookup *lookup, const float base[16], float zero,
                      float scale, int64_t at, int64_t stop, int bits, int store) {
    int width = store == TO_FLOAT32 ? 4 : 2;
    uint32_t entries[16];
    NOT_UNROLLED for (int k = 0; k < 16; k++) entries[k] = stored((base[k] - zero) * scale, store);
    set_entries(lookup, entries);
    for (; at % 8 != 0 && at < stop; at++)
        put(d->out, at, entries[code_at(d->packed, at, bits)], width);
    for (; at + 16 <= stop; at += 16)
        sixteen(lookup, d->packed + at / 8 * bits, bits, width, (char *)d->out + at * width);
    for (; at < stop; at++) put(d->out, at, entries[code_at(d->packed, at, bits)], width);
}

/* Codes of 8 bits, of which a block has fewer than there are levels. */
INLINE void computed(const Dequantize *d, const Levels *table, float zero, float scale, int64_t at, int64_t stop,
                     int store) {
    float buffer[RUN];
    const float *restrict levels = d->levels;
    for (; at < stop; at += RUN) {
        int n = (int)(stop - at < RUN ? stop - at : RUN);
        const uint8_t *restrict codes = d->packed + at;
        float *restrict values = store == TO_FLOAT32 ? (float *)d->out + at : buffer;
        if (levels) {
            int i = 0;
            for (; i + 64 <= n; i += 64) sixty_four(table, codes + i, scale, values + i);
            for (; i < n; i++) values[i] = levels[codes[i]] * scale;
        } else
            for (int i = 0; i < n; i++) values[i] = ((float)codes[i] - zero) * scale;
        if (store != TO_FLOAT32) {
            uint16_t *restrict out = (uint16_t *)d->out + at;
            for (int i = 0; i < n; i++) out[i] = (uint16_t)stored(values[i], store);
        }
    }
}

INLINE void blocks(const Dequantize *d, int64_t first, int64_t last, int bits, int store) {
    int64_t groups = (d->columns + d->size - 1) / d->size;
    int64_t row = first / groups, group = first % groups;
    Lookup lookup = lookup_of(bits);
    float base[16];
    if (bits <= 4)
        for (int k = 0; k < 16; k++) {
            int code = k & ((1 << bits) - 1);
            base[k] = d->levels ? d->levels[code] : (float)code;
        }
    Levels table = {0};
    if (bits == 8 && d->levels) table = levels_of(d->levels);
    for (int64_t block = first; block < last; block++) {
        int64_t begin = group * d->size, end = begin + d->size;
        int64_t at = row * d->columns + begin;
        int64_t stop = row * d->columns + (end < d->columns ? end : d->columns);
        float scale = d->scales[block * d->scale_step];
        float zero = d->zeros ? (float)code_at(d->zeros, block, bits) : 0.0f;
        if (bits == 8) computed(d, &table, zero, scale, at, stop, store);
        else tabulated(d, &lookup, base, zero, scale, at, stop, bits, store);
        if (++group == groups) {
            group = 0;
            row++;
        }
    }
}

INLINE void any_store(const Dequantize *d, int64_t first, int64_t last, int bits) {
    if (d->store == TO_BFLOAT16) blocks(d, first, last, bits, TO_BFLOAT16);
    else if (d->store == TO_FLOAT16) blocks(d, first, last, bits, TO_FLOAT16);
    else blocks(d, first, last, bits, TO_FLOAT32);
}

static void range(const Dequantize *d, int64_t first, int64_t last) {
    if (d->bits == 2) any_store(d, first, last, 2);
    else if (d->bits == 3) any_store(d, first, last, 3);
    else if (d->bits == 4) any_store(d, first, last, 4);
    else any_store(d, first, last, 8);
}

/* All `count` blocks. OpenMP's threads stay awake for a while after a call, which makes a second one
 * worth its while for a matrix of a million elements; built without it, one thread does the work. */
void loftq_dequantize(const Dequantize *d, int64_t count, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int32_t part = 0; part < threads; part++)
        range(d, count * part / threads, count * (part + 1) / threads);
}

#define SEQUENCE 256  /* rows whose codes choose levels together (numerics/quantizers/trellis_code.py) */
#define SHORTEST 24   /* fewer of them choose alone */
#define TILE 2048     /* columns that a thread decodes at a time */

/* The fields of native_decoding.py's _Trellis, in its order. */
typedef struct {
    int64_t rows, columns;
    int64_t size;        /* elements of a block of the flattened matrix, the last one short */
    int32_t store;
    const uint8_t *packed;
    const float *scales;
    const float *levels; /* (1024,) */
    const float *alone;  /* (4,): the levels of codes that choose alone */
    void *out;
} Trellis;

/* The codes of `width` elements from `at` on move into the numbers of their levels. */
INLINE void move_in(const uint8_t *packed, int64_t at, int64_t width, uint16_t mask,
                    uint16_t *restrict numbers) {
    int64_t j = 0;
    if (at % 4 == 0)
        for (; j + 4 <= width; j += 4) {
            uint8_t four = packed[(at + j) / 4];
            for (int k = 0; k < 4; k++)
                numbers[j + k] = (uint16_t)((numbers[j + k] << 2 | (four >> 2 * k & 3)) & mask);
        }
    for (; j < width; j++)
        numbers[j] = (uint16_t)((numbers[j] << 2 | code_at(packed, at + j, 2)) & mask);
}

/* Rows from `first` to the end of their sequence, `width` columns from `column` on. */
INLINE void sequence(const Trellis *d, int64_t first, int64_t column, int64_t width, int store) {
    int64_t length = d->rows - first < SEQUENCE ? d->rows - first : SEQUENCE;
    const float *restrict levels = length < SHORTEST ? d->alone : d->levels;
    uint16_t numbers[TILE] = {0}, mask = length < SHORTEST ? 3 : 1023;
    float values[TILE];
    for (int64_t row = length < SHORTEST ? 0 : -4; row < length; row++) {
        int64_t at = (first + (row < 0 ? row + length : row)) * d->columns + column;
        move_in(d->packed, at, width, mask, numbers);
        if (row < 0) continue;
        for (int64_t j = 0; j < width;) {
            int64_t block = (at + j) / d->size, stop = (block + 1) * d->size - at;
            float scale = d->scales[block];
            for (stop = stop < width ? stop : width; j < stop; j++)
                values[j] = levels[numbers[j]] * scale;
        }
        if (store == TO_FLOAT32) memcpy((float *)d->out + at, values, (size_t)width * sizeof(float));
        else {
            uint16_t *restrict out = (uint16_t *)d->out + at;
            for (int64_t j = 0; j < width; j++) out[j] = (uint16_t)stored(values[j], store);
        }
    }
}

static void tiles(const Trellis *d, int64_t first, int64_t last) {
    int64_t across = (d->columns + TILE - 1) / TILE;
    for (int64_t tile = first; tile < last; tile++) {
        int64_t row = tile / across * SEQUENCE, column = tile % across * TILE;
        int64_t width = d->columns - column < TILE ? d->columns - column : TILE;
        if (d->store == TO_BFLOAT16) sequence(d, row, column, width, TO_BFLOAT16);
        else if (d->store == TO_FLOAT16) sequence(d, row, column, width, TO_FLOAT16);
        else sequence(d, row, column, width, TO_FLOAT32);
    }
}

/* The whole matrix. */
void loftq_dequantize_trellis(const Trellis *d, int32_t threads) {
    int64_t count = (d->rows + SEQUENCE - 1) / SEQUENCE * ((d->columns + TILE - 1) / TILE);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int32_t part = 0; part < threads; part++)
        tiles(d, count * part / threads, count * (part + 1) / threads);
}
