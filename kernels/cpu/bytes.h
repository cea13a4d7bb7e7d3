// Sixteen words of 32 bits at a time: the products of whole numbers that quantized weights need.
//
// All sums are exact in 32 bits, so every instruction set gives the same integers.
#pragma once

#include "simd.h"

#ifdef __AVX512F__

struct W16 {
    __m512i v;
};

INLINE W16 no_words() { return {_mm512_setzero_si512()}; }
INLINE W16 load_words(const void* p) { return {_mm512_loadu_si512(p)}; }
INLINE W16 broadcast_word(int32_t word) { return {_mm512_set1_epi32(word)}; }
// sums + the two products in each word of signed half words. Where that takes two instructions, GCC, left to itself, makes
// all products of a tile before it adds one, and then has no registers left.
INLINE W16 add_products(W16 sums, W16 a, W16 b) {
#ifdef __AVX512VNNI__
    return {_mm512_dpwssd_epi32(sums.v, a.v, b.v)};
#else
    __m512i products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(sums.v), "=&v"(products) : "v"(a.v), "v"(b.v));
    return sums;
#endif
}
// The lowest BITS bits of each half word, after those of a shift to the right.
template <int BITS>
INLINE W16 low_bits(W16 a, int shift) {
    return {_mm512_and_si512(_mm512_srli_epi16(a.v, shift), _mm512_set1_epi16((1 << BITS) - 1))};
}
INLINE W16 operator+(W16 a, W16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
template <int BITS>
INLINE W16 shift_left(W16 a) { return {_mm512_slli_epi32(a.v, BITS)}; }
INLINE V16 to_floats(W16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
// Sixteen float16.
INLINE V16 load_halves(const void* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
// Whole numbers of -32768 .. 32767 to half words.
INLINE void store_half_words(int16_t* p, V16 a) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v)));
}
INLINE V16 absolute(V16 a) { return {_mm512_abs_ps(a.v)}; }

#else

struct W16 {
    __m256i low, high;
};

INLINE W16 no_words() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE W16 load_words(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
INLINE W16 broadcast_word(int32_t word) {
    __m256i v = _mm256_set1_epi32(word);
    return {v, v};
}
INLINE __m256i add_products8(__m256i sums, __m256i a, __m256i b) {
    __m256i products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(a), "x"(b));
    return sums;
}
INLINE W16 add_products(W16 sums, W16 a, W16 b) {
    return {add_products8(sums.low, a.low, b.low), add_products8(sums.high, a.high, b.high)};
}
template <int BITS>
INLINE W16 low_bits(W16 a, int shift) {
    __m256i mask = _mm256_set1_epi16((1 << BITS) - 1);
    return {_mm256_and_si256(_mm256_srli_epi16(a.low, shift), mask), _mm256_and_si256(_mm256_srli_epi16(a.high, shift), mask)};
}
INLINE V16 to_floats(W16 a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
INLINE V16 load_halves(const void* p) {
    const __m128i* halves = (const __m128i*)p;
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
INLINE void store_half_words(int16_t* p, V16 a) {
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(words, 0xd8));
}
INLINE V16 absolute(V16 a) {
    __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(a.low, mask), _mm256_and_ps(a.high, mask)};
}

#endif
