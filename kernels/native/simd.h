// Vectors of 16 floats, and the two ways in which memory holds numbers: float and bfloat16.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

using bf16 = uint16_t;

// A failure of a kernel's arguments never reaches this code: the launchers in Python have checked them.
#define EXPORT extern "C" __attribute__((visibility("default")))

static inline __m512 widen(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

static inline __m512 load16(const bf16* from) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

static inline __m512 load16(const bf16* from, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, from)); }

static inline void store16(bf16* to, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(values));
}

static inline void store16(bf16* to, __m512 values, __mmask16 mask) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

static inline __mmask16 first(int64_t count) {
    return count >= 16 ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

// 2^x for finite x <= 0, relative error 4e-6: what it is used for is rounded to bfloat16 (4e-3).
static inline __m512 exp2_finite16(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    // Taylor series of 2^rest for |rest| <= 1/2.
    __m512 y = _mm512_set1_ps(9.618129e-3f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

// The same for minus infinity, too: about 0.
static inline __m512 exp2_16(__m512 x) { return exp2_finite16(_mm512_max_ps(x, _mm512_set1_ps(-126.0f))); }

static constexpr float LOG2_E = 1.44269504f;

// x / (1 + e^-x), by e^-|x|: no power overflows.
static inline __m512 silu16(__m512 x) {
    const __m512 power =
        exp2_16(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-LOG2_E)));
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_mul_ps(x, _mm512_div_ps(_mm512_mask_blend_ps(negative, one, power), _mm512_add_ps(one, power)));
}
