// For loops that are also compiled for AVX2 (the dynamic linker picks what the processor has), and their exponential.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define DIMASKDINO_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define DIMASKDINO_CLONES
#endif

namespace dimaskdino {

// exp(x) for x <= 0, within 3 units in the last place; -87 and below give about 1e-38.
inline float exp_of_negative(float x) {
  x = x > -87.0f ? x : -87.0f;
  const float power = static_cast<float>(static_cast<int32_t>(x * 1.44269504f - 0.5f));  // truncation rounds to nearest
  const float rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const int32_t bits = (static_cast<int32_t>(power) + 127) << 23;
  float scale;
  memcpy(&scale, &bits, sizeof(scale));
  return sum * scale;
}

}  // namespace dimaskdino
