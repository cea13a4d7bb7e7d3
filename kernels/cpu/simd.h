// Sixteen floats at a time, in one AVX-512 register or two AVX2 registers.
//
// Every operation works lane by lane or in one fixed tree, and nothing is contracted behind our back
// (-ffp-contract=off), so both forms give the same bits and a result depends on its inputs alone.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

#define INLINE inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))

struct bf16 {
    uint16_t bits;
};

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr int LANES = 16;
constexpr int PANEL = 64;  // output features of a packed panel, see packing.py

INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

#ifdef __AVX512F__

struct V16 {
    __m512 v;
};

INLINE V16 zeros() { return {_mm512_setzero_ps()}; }
INLINE V16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
INLINE V16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE V16 load(const bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
INLINE V16 load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
INLINE void store(float* p, V16 a) { _mm512_storeu_ps(p, a.v); }
INLINE void store(bf16* p, V16 a) {
    __m512i bits = _mm512_castps_si512(a.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
INLINE V16 operator+(V16 a, V16 b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE V16 operator-(V16 a, V16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE V16 operator*(V16 a, V16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE V16 operator/(V16 a, V16 b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE V16 fma(V16 a, V16 b, V16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second argument where either is NaN.
INLINE V16 max(V16 a, V16 b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE V16 min(V16 a, V16 b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE V16 nearest(V16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2**n for whole n, by adding to the exponent: a and the product must be normal numbers.
INLINE V16 scale_by_power(V16 a, V16 n) {
    __m512i shift = _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), shift))};
}
// One bit a lane: a >= b.
INLINE uint32_t at_least(V16 a, V16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
INLINE uint32_t above(V16 a, V16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
// a where limit >= bound, else 0.
INLINE V16 where_at_least(V16 limit, V16 bound, V16 a) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(limit.v, bound.v, _CMP_GE_OQ), a.v)};
}
// a where it is a number, else b.
INLINE V16 numbers_or(V16 a, V16 b) {
    return {_mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q), a.v)};
}
// Lanes first .. last - 1 of a, and b elsewhere. The bounds may lie outside 0 .. 16.
INLINE V16 lanes_or(V16 a, int first, int last, V16 b) {
    uint32_t low = first <= 0 ? 0 : first >= LANES ? 0xffffu : (1u << first) - 1;
    uint32_t high = last <= 0 ? 0 : last >= LANES ? 0xffffu : (1u << last) - 1;
    return {_mm512_mask_mov_ps(b.v, __mmask16(high & ~low), a.v)};
}
// Lane i of a where bit i is set, of b elsewhere.
INLINE V16 bits_or(V16 a, uint32_t bits, V16 b) { return {_mm512_mask_mov_ps(b.v, __mmask16(bits), a.v)}; }
INLINE __m256 fold_add(V16 a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
}
INLINE __m256 fold_max(V16 a) {
    return _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
}

#else

struct V16 {
    __m256 low, high;
};

INLINE V16 zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE V16 broadcast(float x) {
    __m256 v = _mm256_set1_ps(x);
    return {v, v};
}
INLINE V16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE __m256 load8(const bf16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE V16 load(const bf16* p) { return {load8(p), load8(p + 8)}; }
INLINE __m256 load8(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
INLINE V16 load(const int8_t* p) { return {load8(p), load8(p + 8)}; }
INLINE void store(float* p, V16 a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}
INLINE void store8(bf16* p, __m256 a) {
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
INLINE void store(bf16* p, V16 a) {
    store8(p, a.low);
    store8(p + 8, a.high);
}
INLINE V16 operator+(V16 a, V16 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
INLINE V16 operator-(V16 a, V16 b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
INLINE V16 operator*(V16 a, V16 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
INLINE V16 operator/(V16 a, V16 b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
INLINE V16 fma(V16 a, V16 b, V16 c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE V16 max(V16 a, V16 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
INLINE V16 min(V16 a, V16 b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
INLINE V16 nearest(V16 a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, mode), _mm256_round_ps(a.high, mode)};
}
INLINE __m256 scale8(__m256 a, __m256 n) {
    __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), shift));
}
INLINE V16 scale_by_power(V16 a, V16 n) { return {scale8(a.low, n.low), scale8(a.high, n.high)}; }
INLINE uint32_t signs(__m256 low, __m256 high) {
    return uint32_t(_mm256_movemask_ps(low)) | uint32_t(_mm256_movemask_ps(high)) << 8;
}
INLINE uint32_t at_least(V16 a, V16 b) {
    return signs(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ));
}
INLINE uint32_t above(V16 a, V16 b) {
    return signs(_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ));
}
INLINE V16 where_at_least(V16 limit, V16 bound, V16 a) {
    return {_mm256_and_ps(_mm256_cmp_ps(limit.low, bound.low, _CMP_GE_OQ), a.low),
            _mm256_and_ps(_mm256_cmp_ps(limit.high, bound.high, _CMP_GE_OQ), a.high)};
}
INLINE V16 numbers_or(V16 a, V16 b) {
    return {_mm256_blendv_ps(b.low, a.low, _mm256_cmp_ps(a.low, a.low, _CMP_ORD_Q)),
            _mm256_blendv_ps(b.high, a.high, _mm256_cmp_ps(a.high, a.high, _CMP_ORD_Q))};
}
INLINE __m256 lanes8_or(__m256 a, int first, int last, __m256 b) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i kept = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane),
                                       _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane));
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(kept));
}
INLINE V16 lanes_or(V16 a, int first, int last, V16 b) {
    return {lanes8_or(a.low, first, last, b.low), lanes8_or(a.high, first - 8, last - 8, b.high)};
}
INLINE __m256 bits8_or(__m256 a, uint32_t bits, __m256 b) {
    __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), each), each);
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(set));
}
INLINE V16 bits_or(V16 a, uint32_t bits, V16 b) { return {bits8_or(a.low, bits, b.low), bits8_or(a.high, bits >> 8, b.high)}; }
INLINE __m256 fold_add(V16 a) { return _mm256_add_ps(a.low, a.high); }
INLINE __m256 fold_max(V16 a) { return _mm256_max_ps(a.low, a.high); }

#endif

// A line of a bfloat16 matrix whose lines lie in pairs, [lines / 2, columns, 2], as matrix instructions take them.
struct PairedLine {
    const bf16* pairs;
    int odd;

    PairedLine operator+(int columns) const { return {pairs + 2 * columns, odd}; }
};

INLINE V16 load(PairedLine line) {
#ifdef __AVX512F__
    __m512i pairs = _mm512_loadu_si512(line.pairs);
    return {_mm512_castsi512_ps(line.odd ? _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000)))
                                         : _mm512_slli_epi32(pairs, 16))};
#else
    __m256i low = _mm256_loadu_si256((const __m256i*)line.pairs);
    __m256i high = _mm256_loadu_si256((const __m256i*)(line.pairs + 16));
    __m256i mask = _mm256_set1_epi32(int(0xffff0000));
    low = line.odd ? _mm256_and_si256(low, mask) : _mm256_slli_epi32(low, 16);
    high = line.odd ? _mm256_and_si256(high, mask) : _mm256_slli_epi32(high, 16);
    return {_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)};
#endif
}

INLINE float sum(V16 a) {
    __m256 eight = fold_add(a);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float largest(V16 a) {
    __m256 eight = fold_max(a);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// The first `count` of sixteen values; the others read as 0 and are not written.
#ifdef __AVX512F__
INLINE __mmask16 first_lanes(int count) { return count >= LANES ? 0xffff : __mmask16((1u << count) - 1); }
INLINE V16 load_part(const float* p, int count) { return {_mm512_maskz_loadu_ps(first_lanes(count), p)}; }
INLINE void store_part(float* p, V16 a, int count) { _mm512_mask_storeu_ps(p, first_lanes(count), a.v); }
INLINE V16 load_part(const bf16* p, int count) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
INLINE V16 load_part(const int8_t* p, int count) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(count), p)))};
}
INLINE void store_part(bf16* p, V16 a, int count) {
    bf16 all[LANES];
    store(all, a);
    _mm256_mask_storeu_epi16(p, first_lanes(count), _mm256_loadu_si256((const __m256i*)all));
}
#else
template <class T>
INLINE V16 load_part(const T* p, int count) {
    if (count >= LANES) return load(p);
    T part[LANES] = {};
    std::memcpy(part, p, count * sizeof(T));
    return load(part);
}
template <class T>
INLINE void store_part(T* p, V16 a, int count) {
    if (count >= LANES) return store(p, a);
    T part[LANES];
    store(part, a);
    std::memcpy(p, part, count * sizeof(T));
}
#endif

// The nearest whole numbers, from -128 to 127; -128 for NaN.
INLINE void store_whole(int8_t* p, V16 a, int count) {
    int32_t whole[LANES];
#ifdef __AVX512F__
    _mm512_storeu_si512(whole, _mm512_cvtps_epi32(a.v));
#else
    _mm256_storeu_si256((__m256i*)whole, _mm256_cvtps_epi32(a.low));
    _mm256_storeu_si256((__m256i*)(whole + 8), _mm256_cvtps_epi32(a.high));
#endif
    for (int i = 0; i < (count < LANES ? count : LANES); ++i)
        p[i] = int8_t(whole[i] < -128 ? -128 : whole[i] > 127 ? 127 : whole[i]);
}

// e**x to 1 ulp or so: Cody and Waite's reduction and Cephes' polynomial. 0 below -86 (and for -inf), constant
// above 88.
INLINE V16 exp(V16 x) {
    V16 lowest = broadcast(-86.0f);
    V16 bounded = min(max(x, lowest), broadcast(88.0f));
    V16 power = nearest(bounded * broadcast(1.44269504f));
    V16 r = fma(power, broadcast(-0.693359375f), bounded);
    r = fma(power, broadcast(2.12194440e-4f), r);
    V16 y = broadcast(1.9875691500e-4f);
    y = fma(y, r, broadcast(1.3981999507e-3f));
    y = fma(y, r, broadcast(8.3334519073e-3f));
    y = fma(y, r, broadcast(4.1665795894e-2f));
    y = fma(y, r, broadcast(1.6666665459e-1f));
    y = fma(y, r, broadcast(5.0000001201e-1f));
    y = fma(y, r * r, r) + broadcast(1.0f);
    return where_at_least(x, lowest, scale_by_power(y, power));
}
INLINE float exp1(float x) {
    float lanes[LANES];
    store(lanes, exp(broadcast(x)));
    return lanes[0];
}
