/* Blocks of 16 x 16 values of 32 bits, turned. */
#ifndef LOFTQ_TRANSPOSE_H
#define LOFTQ_TRANSPOSE_H

#include "common.h"

#define TURNED 16

#if defined(__AVX512F__)
#include <immintrin.h>

/* to[j * to_stride + i] = from[i * from_stride + j]; strides in values. */
static inline void transpose_16(const void *from, int64_t from_stride, void *to, int64_t to_stride) {
    const int32_t *source = (const int32_t *)from;
    int32_t *target = (int32_t *)to;
    __m512i a[16], b[16];
    UNROLL for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(source + i * from_stride);
    UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    /* a[4 g + c] holds columns c, c + 4, c + 8, c + 12 of rows 4 g to 4 g + 3, a quarter each. */
    UNROLL for (int c = 0; c < 4; c++) {
        __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
        __m512i high = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        __m512i low2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
        __m512i high2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        b[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
        b[8 + c] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        b[4 + c] = _mm512_shuffle_i32x4(high, high2, 0x88);
        b[12 + c] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
    UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_si512(target + i * to_stride, b[i]);
}
#else
static inline void transpose_16(const void *from, int64_t from_stride, void *to, int64_t to_stride) {
    for (int i = 0; i < TURNED; i++)
        for (int j = 0; j < TURNED; j++)
            memcpy((char *)to + 4 * (j * to_stride + i),
                   (const char *)from + 4 * (i * from_stride + j), 4);
}
#endif

#endif
