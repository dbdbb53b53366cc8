// Stands for the toolkit's header: IEEE half precision, converted by hand so that any g++ will do.
#pragma once

#include <cuda_runtime.h>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const unsigned sign = static_cast<unsigned>(x.bits & 0x8000) << 16;
  const int exponent = (x.bits >> 10) & 31;
  const unsigned fraction = x.bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  const float magnitude = exponent ? ldexpf(static_cast<float>(1024 + fraction), exponent - 25)
                                   : ldexpf(static_cast<float>(fraction), -24);
  return sign ? -magnitude : magnitude;
}

// To the nearest, ties to even: x as a multiple of the spacing of halfs around it.
inline __half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = fabsf(x);
  if (magnitude != magnitude) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  frexpf(magnitude, &exponent);
  if (magnitude == 0 || exponent < -13) exponent = -13;
  const auto steps = static_cast<unsigned>(nearbyintf(ldexpf(magnitude, 11 - exponent)));
  return {static_cast<uint16_t>(sign | ((static_cast<unsigned>(exponent + 13) << 10) + steps))};
}
