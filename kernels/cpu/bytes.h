// Sixteen words of four bytes at a time: the products of unsigned and signed bytes that quantized weights need.
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
INLINE W16 low_halves(W16 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
INLINE W16 high_halves(W16 a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
// sums + the four products in each word of unsigned bytes below 128 / any unsigned bytes, and signed bytes.
#ifdef __AVX512VNNI__
INLINE W16 add_products_7bit(W16 sums, W16 a, W16 b) { return {_mm512_dpbusd_epi32(sums.v, a.v, b.v)}; }
INLINE W16 add_products(W16 sums, W16 a, W16 b) { return {_mm512_dpbusd_epi32(sums.v, a.v, b.v)}; }
#else
INLINE W16 add_products_7bit(W16 sums, W16 a, W16 b) {
    __m512i pairs = _mm512_maddubs_epi16(a.v, b.v);
    return {_mm512_add_epi32(sums.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
}
INLINE W16 add_products(W16 sums, W16 a, W16 b) {
    __m512i even = _mm512_madd_epi16(_mm512_and_si512(a.v, _mm512_set1_epi16(255)),
                                     _mm512_srai_epi16(_mm512_slli_epi16(b.v, 8), 8));
    __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(a.v, 8), _mm512_srai_epi16(b.v, 8));
    return {_mm512_add_epi32(sums.v, _mm512_add_epi32(even, odd))};
}
#endif
// add_products with the word at x for all. GCC, left to itself, loads all words of a tile before it uses one, and then
// has no registers left.
INLINE W16 add_products_at(W16 sums, W16 a, const int32_t* x) {
#ifdef __AVX512VNNI__
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums.v) : "v"(a.v), "m"(*x));
    return sums;
#else
    return add_products(sums, a, {_mm512_set1_epi32(*x)});
#endif
}
INLINE W16 operator+(W16 a, W16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
template <int BITS>
INLINE W16 shift_left(W16 a) { return {_mm512_slli_epi32(a.v, BITS)}; }
INLINE V16 to_floats(W16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
// Sixteen float16.
INLINE V16 load_halves(const void* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
// Whole numbers of -128 .. 127 to bytes.
INLINE void store_bytes(int8_t* p, V16 a) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
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
INLINE W16 low_halves(W16 a) {
    __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(a.low, mask), _mm256_and_si256(a.high, mask)};
}
INLINE W16 high_halves(W16 a) {
    return low_halves({_mm256_srli_epi16(a.low, 4), _mm256_srli_epi16(a.high, 4)});
}
INLINE __m256i add_7bit(__m256i sums, __m256i a, __m256i b) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
INLINE W16 add_products_7bit(W16 sums, W16 a, W16 b) {
    return {add_7bit(sums.low, a.low, b.low), add_7bit(sums.high, a.high, b.high)};
}
INLINE __m256i add_8bit(__m256i sums, __m256i a, __m256i b) {
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)),
                                     _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
}
INLINE W16 add_products(W16 sums, W16 a, W16 b) {
    return {add_8bit(sums.low, a.low, b.low), add_8bit(sums.high, a.high, b.high)};
}
INLINE W16 add_products_at(W16 sums, W16 a, const int32_t* x) { return add_products(sums, a, broadcast_word(*x)); }
INLINE W16 operator+(W16 a, W16 b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
template <int BITS>
INLINE W16 shift_left(W16 a) { return {_mm256_slli_epi32(a.low, BITS), _mm256_slli_epi32(a.high, BITS)}; }
INLINE V16 to_floats(W16 a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
INLINE V16 load_halves(const void* p) {
    const __m128i* halves = (const __m128i*)p;
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
INLINE void store_bytes(int8_t* p, V16 a) {
    __m256i low = _mm256_cvtps_epi32(a.low), high = _mm256_cvtps_epi32(a.high);
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i*)p, bytes);
}
INLINE V16 absolute(V16 a) {
    __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(a.low, mask), _mm256_and_ps(a.high, mask)};
}

#endif

INLINE W16 broadcast_word(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return broadcast_word(word);
}
