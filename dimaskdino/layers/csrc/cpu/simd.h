// Vectors of a given width as extensions of GCC and Clang, conversions between them and the storage dtypes, and the
// exponential. Included by kernels.inl inside the namespace of one instruction set.

template <class A, int W>
struct VectorOf {
  typedef A type __attribute__((vector_size(W * sizeof(A))));
};
template <class A, int W>
using Vec = typename VectorOf<A, W>::type;

// The integer type of a float's size, for masks and lane numbers.
template <class A>
struct SameSize {
  typedef int32_t type;
};
template <>
struct SameSize<double> {
  typedef int64_t type;
};

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct Accumulate {
  typedef float type;
};
template <>
struct Accumulate<double> {
  typedef double type;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Half to float: a multiplication changes the exponent's bias, which also handles subnormal numbers.
template <class U>
inline U half_to_float_bits(U half) {
  return ((half & 0x8000u) << 16) | ((half & 0x7fffu) << 13);
}

inline float to_accumulate(float x) {
  return x;
}
inline double to_accumulate(double x) {
  return x;
}
inline float to_accumulate(BFloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
inline float to_accumulate(Half x) {
  const float scaled = bit_cast<float>(half_to_float_bits<uint32_t>(x.bits)) * 0x1p112f;
  const bool special = (x.bits & 0x7c00u) == 0x7c00u;  // infinite or NaN
  return special ? bit_cast<float>(bit_cast<uint32_t>(scaled) | 0x7f800000u) : scaled;
}

inline void from_accumulate(float x, float* out) {
  *out = x;
}
inline void from_accumulate(double x, double* out) {
  *out = x;
}
// Both round to nearest, ties to even.
inline void from_accumulate(float x, BFloat16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  out->bits = static_cast<uint16_t>(x != x ? quiet : rounded);
}
inline void from_accumulate(float x, Half* out) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // would round to more than 65504
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the half's bits in the lowest bits
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

template <int W>
inline Vec<float, W> load(const float* from) {
  Vec<float, W> vec;
  memcpy(&vec, from, sizeof(vec));
  return vec;
}
template <int W>
inline Vec<double, W> load(const double* from) {
  Vec<double, W> vec;
  memcpy(&vec, from, sizeof(vec));
  return vec;
}
template <int W>
inline Vec<int32_t, W> load(const int32_t* from) {
  Vec<int32_t, W> vec;
  memcpy(&vec, from, sizeof(vec));
  return vec;
}
// 16 bits to 32, a vector at a time: GCC 12 compiles the portable form to three instructions.
template <int W>
struct Widen {
  static inline Vec<uint32_t, W> load(const uint16_t* from) {
    Vec<uint16_t, W> narrow;
    memcpy(&narrow, from, sizeof(narrow));
    return __builtin_convertvector(narrow, Vec<uint32_t, W>);
  }
};
#if DIMASKDINO_VECTOR_BYTES >= 64
template <>
struct Widen<16> {
  static inline Vec<uint32_t, 16> load(const uint16_t* from) {
    // The form with a mask, because GCC 12 warns about an uninitialized operand in the form without.
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return bit_cast<Vec<uint32_t, 16>>(_mm512_maskz_cvtepu16_epi32(0xffff, narrow));
  }
};
#endif
#if DIMASKDINO_VECTOR_BYTES >= 32
template <>
struct Widen<8> {
  static inline Vec<uint32_t, 8> load(const uint16_t* from) {
    return bit_cast<Vec<uint32_t, 8>>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
};
#endif

template <int W>
inline Vec<float, W> load(const BFloat16* from) {
  return bit_cast<Vec<float, W>>(Widen<W>::load(&from->bits) << 16);
}
template <int W>
inline Vec<float, W> load(const Half* from) {
  const Vec<uint32_t, W> wide = Widen<W>::load(&from->bits);
  const Vec<uint32_t, W> bits = bit_cast<Vec<uint32_t, W>>(bit_cast<Vec<float, W>>(half_to_float_bits(wide)) * 0x1p112f);
  const Vec<uint32_t, W> special = bit_cast<Vec<uint32_t, W>>((wide & 0x7c00u) == 0x7c00u);
  return bit_cast<Vec<float, W>>(bits | (special & 0x7f800000u));
}
// Every processor with AVX2 or AVX-512 can convert in one instruction.
#if DIMASKDINO_VECTOR_BYTES >= 64
template <>
inline Vec<float, 16> load<16>(const Half* from) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return bit_cast<Vec<float, 16>>(_mm512_maskz_cvtph_ps(0xffff, narrow));
}
#endif
#if DIMASKDINO_VECTOR_BYTES >= 32
template <>
inline Vec<float, 8> load<8>(const Half* from) {
  return bit_cast<Vec<float, 8>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
#endif

template <int W>
inline void store(Vec<float, W> vec, float* to) {
  memcpy(to, &vec, sizeof(vec));
}
template <int W>
inline void store(Vec<double, W> vec, double* to) {
  memcpy(to, &vec, sizeof(vec));
}
template <int W>
inline void store(Vec<int32_t, W> vec, int32_t* to) {
  memcpy(to, &vec, sizeof(vec));
}
template <int W>
inline void store(Vec<float, W> vec, Half* to) {
  for (int i = 0; i < W; ++i) from_accumulate(vec[i], to + i);
}
#if DIMASKDINO_VECTOR_BYTES >= 64
template <>
inline void store<16>(Vec<float, 16> vec, Half* to) {
  const __m256i narrow = _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(vec), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
}
#endif
#if DIMASKDINO_VECTOR_BYTES >= 32
template <>
inline void store<8>(Vec<float, 8> vec, Half* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(bit_cast<__m256>(vec), _MM_FROUND_TO_NEAREST_INT));
}
#endif
template <int W>
inline void store(Vec<float, W> vec, BFloat16* to) {
  const Vec<uint32_t, W> bits = bit_cast<Vec<uint32_t, W>>(vec);
  const Vec<uint32_t, W> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  const Vec<uint16_t, W> narrow = __builtin_convertvector(vec != vec ? quiet : rounded, Vec<uint16_t, W>);
  memcpy(to, &narrow, sizeof(narrow));
}

// The floor of x, which must fit in 32 bits: truncates, and subtracts one where that rounded up.
template <class A, int W>
inline Vec<int32_t, W> floor_of(Vec<A, W> x) {
  const Vec<int32_t, W> cut = __builtin_convertvector(x, Vec<int32_t, W>);
  const auto went_up = x < __builtin_convertvector(cut, Vec<A, W>);  // -1 where true
  return cut + __builtin_convertvector(went_up, Vec<int32_t, W>);
}

// The maximum and the sum of a vector's lanes, by repeated halving.
template <class A, int W>
struct Across {
  typedef Vec<A, W / 2> HalfOf;
  static inline void split(Vec<A, W> vec, HalfOf* low, HalfOf* high) {
    memcpy(low, &vec, sizeof(HalfOf));
    memcpy(high, reinterpret_cast<const char*>(&vec) + sizeof(HalfOf), sizeof(HalfOf));
  }
  static inline A largest(Vec<A, W> vec) {
    HalfOf low, high;
    split(vec, &low, &high);
    return Across<A, W / 2>::largest(low > high ? low : high);
  }
  static inline A sum(Vec<A, W> vec) {
    HalfOf low, high;
    split(vec, &low, &high);
    return Across<A, W / 2>::sum(low + high);
  }
};
template <class A>
struct Across<A, 1> {
  static inline A largest(Vec<A, 1> vec) {
    return vec[0];
  }
  static inline A sum(Vec<A, 1> vec) {
    return vec[0];
  }
};

// exp(x) for x <= 0, within 2 units in the last place: 2^n times a polynomial in the remainder, which lies between
// -ln 2 / 2 and ln 2 / 2.
template <int W>
inline Vec<float, W> exp_negative(Vec<float, W> x) {
  typedef Vec<float, W> Reals;
  typedef Vec<int32_t, W> Counts;
  const Reals scaled = x * 1.44269504088896341f, least = Reals{} - 127.0f;
  const Counts n = __builtin_convertvector(scaled > least ? scaled - 0.5f : least, Counts);
  const Reals whole = __builtin_convertvector(n, Reals);
  const Reals rest = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  Reals sum = Reals{} + 1.0f / 5040;
  sum = sum * rest + 1.0f / 720;
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  const Reals result = sum * bit_cast<Reals>((n + 127) << 23);
  return x < Reals{} - 87.0f ? Reals{} : result;
}
template <int W>
inline Vec<double, W> exp_negative(Vec<double, W> x) {
  for (int i = 0; i < W; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
