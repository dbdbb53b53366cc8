// For loops that are also compiled for AVX2 (the dynamic linker picks what the processor has): vectors of eight floats,
// which compilers make of these loops' scalars in some versions alone, and their exponential.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define DIMASKDINO_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define DIMASKDINO_CLONES
#endif
// Functions of vectors become parts of their callers, which alone say for which instruction set they are compiled.
#define DIMASKDINO_PART inline __attribute__((always_inline))

namespace dimaskdino {

constexpr int kLanes = 8;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

DIMASKDINO_PART Floats load_floats(const float* from) {
  Floats x;
  memcpy(&x, from, sizeof(x));
  return x;
}

DIMASKDINO_PART void store_floats(Floats x, float* to) {
  memcpy(to, &x, sizeof(x));
}

// Where a comparison holds the one, else the other.
DIMASKDINO_PART Floats choose(Ints holds, Floats yes, Floats no) {
  return (Floats)((holds & (Ints)yes) | (~holds & (Ints)no));
}

// exp(x) for x <= 0, within 3 units in the last place; -87 and below, and NaN, give about 1e-38.
DIMASKDINO_PART Floats exp_of_negative(Floats x) {
  const Floats least = Floats{} - 87.0f;
  x = choose(x > least, x, least);
  // Truncation rounds to nearest.
  const Ints whole = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const Floats power = __builtin_convertvector(whole, Floats);
  const Floats rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;
  Floats sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  return sum * (Floats)((whole + 127) << 23);
}

// softplus(x) = positive + log(factor): a sum of logarithms is the logarithm of a product.
struct Squashed {
  Floats positive, factor, sigmoid;
};

DIMASKDINO_PART Squashed squash(Floats x) {
  const Floats zero{}, above = choose(x > zero, x, zero), small = exp_of_negative(x - above - above), factor = small + 1.0f;
  return {above, factor, choose(x > zero, zero + 1.0f, small) / factor};
}

}  // namespace dimaskdino
