/* Values of sixteen codes at a time, from a table of sixteen: a register where there is one.
 *
 * Entries are what is stored, float32 bits or 16 bits, and repeat where there are fewer codes, so
 * that the high bits of an index need no mask. Sixteen codes take 2 * bits bytes, bits <= 4; the
 * first of them begins a byte. */
#ifndef LOFTQ_DEQUANTIZE_H
#define LOFTQ_DEQUANTIZE_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Little-endian on any machine, and a plain load where that is the machine's order. */
INLINE uint32_t bytes_of_2(const uint8_t *p) {
    return p[0] | (uint32_t)p[1] << 8;
}

INLINE uint32_t bytes_of_4(const uint8_t *p) {
    return bytes_of_2(p) | bytes_of_2(p + 2) << 16;
}

INLINE uint64_t bytes_of(const uint8_t *p, int count) {
    if (count == 8) return bytes_of_4(p) | (uint64_t)bytes_of_4(p + 4) << 32;
    if (count == 6) return bytes_of_4(p) | (uint64_t)bytes_of_2(p + 4) << 32;
    if (count == 4) return bytes_of_4(p);
    if (count == 3) return bytes_of_2(p) | (uint32_t)p[2] << 16;
    return bytes_of_2(p);
}

#if defined(__AVX512BW__)

#include <immintrin.h>

typedef struct {
    __m512i entries, bytes, shifts;
} Lookup;

INLINE Lookup lookup_of(int bits) {
    /* Lanes 0 to 7 take the first `bits` bytes, lanes 8 to 15 the next, each shifted to its code. */
    int32_t bytes[16], shifts[16];
    for (int i = 0; i < 16; i++) {
        bytes[i] = 0x03020100 + (i < 8 ? 0 : 0x01010101 * bits);
        shifts[i] = i % 8 * bits;
    }
    return (Lookup){_mm512_setzero_si512(), _mm512_loadu_si512(bytes), _mm512_loadu_si512(shifts)};
}

INLINE void set_entries(Lookup *lookup, const uint32_t entries[16]) {
    lookup->entries = _mm512_loadu_si512(entries);
}

INLINE void sixteen(const Lookup *lookup, const uint8_t *packed, int bits, int width, char *out) {
    __m512i word = _mm512_set1_epi64((int64_t)bytes_of(packed, 2 * bits));
    __m512i spread = _mm512_shuffle_epi8(word, lookup->bytes);
    __m512i codes = _mm512_srlv_epi32(spread, lookup->shifts);
    __m512i values = _mm512_permutexvar_epi32(codes, lookup->entries);
    if (width == 4) _mm512_storeu_si512(out, values);
    else _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16(values));
}

#elif defined(__AVX2__)

#include <immintrin.h>

typedef struct {
    __m256i low, high, shifts;
} Lookup;

INLINE Lookup lookup_of(int bits) {
    int32_t shifts[8];
    for (int i = 0; i < 8; i++) shifts[i] = i * bits;
    __m256i none = _mm256_setzero_si256();
    return (Lookup){none, none, _mm256_loadu_si256((const __m256i *)shifts)};
}

INLINE void set_entries(Lookup *lookup, const uint32_t entries[16]) {
    lookup->low = _mm256_loadu_si256((const __m256i *)entries);
    lookup->high = _mm256_loadu_si256((const __m256i *)(entries + 8));
}

INLINE __m256i eight(const Lookup *lookup, const uint8_t *packed, int bits) {
    __m256i word = _mm256_set1_epi32((int32_t)bytes_of(packed, bits));
    __m256i codes = _mm256_srlv_epi32(word, lookup->shifts);
    __m256i values = _mm256_permutevar8x32_epi32(lookup->low, codes);
    if (bits < 4) return values;
    __m256i others = _mm256_permutevar8x32_epi32(lookup->high, codes);
    __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)); /* bit 3 as the sign */
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(values), _mm256_castsi256_ps(others), fourth));
}

INLINE void sixteen(const Lookup *lookup, const uint8_t *packed, int bits, int width, char *out) {
    __m256i first = eight(lookup, packed, bits), second = eight(lookup, packed + bits, bits);
    if (width == 4) {
        _mm256_storeu_si256((__m256i *)out, first);
        _mm256_storeu_si256((__m256i *)(out + 32), second);
    } else {
        __m256i narrow = _mm256_packus_epi32(first, second); /* its quarters: 0 2 1 3 */
        _mm256_storeu_si256((__m256i *)out, _mm256_permute4x64_epi64(narrow, 0xd8));
    }
}

#else

typedef struct {
    uint32_t entries[16];
} Lookup;

INLINE Lookup lookup_of(int bits) {
    (void)bits;
    return (Lookup){{0}};
}

INLINE void set_entries(Lookup *lookup, const uint32_t entries[16]) {
    memcpy(lookup->entries, entries, sizeof lookup->entries);
}

INLINE void sixteen(const Lookup *lookup, const uint8_t *packed, int bits, int width, char *out) {
    uint64_t word = bytes_of(packed, 2 * bits);
    for (int i = 0; i < 16; i++, out += width) {
        uint32_t entry = lookup->entries[word >> (i * bits) & 15];
        uint16_t narrow = (uint16_t)entry;
        if (width == 4) memcpy(out, &entry, 4);
        else memcpy(out, &narrow, 2);
    }
}

#endif

/* The levels of 64 codes of 8 bits, as float32. */
#if defined(__AVX512VBMI__)

typedef struct {
    __m512i planes[4][4], order; /* byte b of every level, 64 levels a register */
} Levels;

INLINE Levels levels_of(const float *levels) {
    Levels table;
    uint8_t plane[256];
    for (int b = 0; b < 4; b++) {
        for (int k = 0; k < 256; k++) plane[k] = ((const uint8_t *)(levels + k))[b];
        for (int q = 0; q < 4; q++) table.planes[b][q] = _mm512_loadu_si512(plane + 64 * q);
    }
    /* So that interleaving, which stays within quarters of a register, ends in order. */
    table.order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return table;
}

INLINE void sixty_four(const Levels *table, const uint8_t *packed, float scale, float *out) {
    __m512i codes = _mm512_permutexvar_epi32(table->order, _mm512_loadu_si512(packed)), bytes[4];
    __mmask64 upper = _mm512_movepi8_mask(codes);
    for (int b = 0; b < 4; b++) {
        const __m512i *plane = table->planes[b];
        __m512i low = _mm512_permutex2var_epi8(plane[0], codes, plane[1]);
        __m512i high = _mm512_permutex2var_epi8(plane[2], codes, plane[3]);
        bytes[b] = _mm512_mask_blend_epi8(upper, low, high);
    }
    for (int half = 0; half < 2; half++) {
        __m512i first = half ? _mm512_unpackhi_epi8(bytes[0], bytes[1])
                             : _mm512_unpacklo_epi8(bytes[0], bytes[1]);
        __m512i second = half ? _mm512_unpackhi_epi8(bytes[2], bytes[3])
                              : _mm512_unpacklo_epi8(bytes[2], bytes[3]);
        __m512 factor = _mm512_set1_ps(scale);
        __m512i low = _mm512_unpacklo_epi16(first, second);
        __m512i high = _mm512_unpackhi_epi16(first, second);
        _mm512_storeu_ps(out + 32 * half, _mm512_mul_ps(_mm512_castsi512_ps(low), factor));
        _mm512_storeu_ps(out + 32 * half + 16, _mm512_mul_ps(_mm512_castsi512_ps(high), factor));
    }
}

#else

typedef const float *Levels;

INLINE Levels levels_of(const float *levels) {
    return levels;
}

INLINE void sixty_four(const Levels *table, const uint8_t *packed, float scale, float *out) {
    for (int i = 0; i < 64; i++) out[i] = (*table)[packed[i]] * scale;
}

#endif
#endif
