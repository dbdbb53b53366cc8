// Measures the polygons of a COCO file from their text: a file of COCO's size has sixty million coordinates, of which
// nothing else is needed to tell that they are sound. Used by dimaskdino/data/validation/screen.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace dimaskdino {
namespace {

using at::Tensor;

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

double power_of_ten(int exponent) {
  constexpr double small[] = {1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9};
  return exponent < 10 ? small[exponent] : std::pow(10.0, exponent);
}

// Reads JSON from `at` up to `end`; what is not as expected makes `good` false.
struct Reader {
  const char* at;
  const char* end;
  bool good = true;

  char next() {
    while (at < end && (*at == ' ' || *at == '\n' || *at == '\t' || *at == '\r')) ++at;
    return at < end ? *at : '\0';
  }

  bool take(char expected) {
    const bool found = next() == expected;
    at += found;
    return found;
  }

  // A number, to within rounding.
  double number() {
    const bool negative = take('-');
    double digits = 0.0;
    int scale = 0;
    const char* first = at;
    for (; at < end && *at >= '0' && *at <= '9'; ++at) digits = 10.0 * digits + (*at - '0');
    good &= at > first;
    if (at < end && *at == '.') {
      for (++at; at < end && *at >= '0' && *at <= '9'; ++at, --scale) digits = 10.0 * digits + (*at - '0');
    }
    if (at < end && (*at == 'e' || *at == 'E')) {
      ++at;
      const bool small = at < end && *at == '-';
      at += small || (at < end && *at == '+');
      int exponent = 0;
      for (; at < end && *at >= '0' && *at <= '9'; ++at) exponent = std::min(10 * exponent + (*at - '0'), 9999);
      scale += small ? -exponent : exponent;
    }
    if (scale < 0) digits /= power_of_ten(-scale);
    if (scale > 0) digits *= power_of_ten(scale);
    return negative ? -digits : digits;
  }
};

struct Measures {
  double low_x = std::numeric_limits<double>::infinity(), low_y = low_x, high_x = -low_x, high_y = -low_x, area = 0.0;
};

// Adds a polygon, "[x, y, x, y, x, y, ...]"; false where it is anything else.
bool add_polygon(Reader& reader, Measures* all) {
  if (!reader.take('[')) return false;
  double first_x = 0.0, first_y = 0.0, last_x = 0.0, last_y = 0.0, twice = 0.0;
  int64_t points = 0;
  do {
    reader.next();
    const double x = reader.number();
    if (!reader.good || !reader.take(',')) return false;
    reader.next();
    const double y = reader.number();
    if (!reader.good) return false;
    if (points == 0) first_x = x, first_y = y;
    twice += last_x * y - x * last_y;
    last_x = x, last_y = y;
    all->low_x = std::min(all->low_x, x), all->high_x = std::max(all->high_x, x);
    all->low_y = std::min(all->low_y, y), all->high_y = std::max(all->high_y, y);
    ++points;
  } while (reader.take(','));
  all->area += std::abs(twice + last_x * first_y - first_x * last_y) / 2.0;
  return points >= 3 && reader.take(']');
}

bool add_mask(Reader& reader, Measures* all) {
  if (!reader.take('[')) return false;
  do {
    if (!add_polygon(reader, all)) return false;
  } while (reader.take(','));
  return reader.take(']') && reader.next() == '\0';
}

// Extents x, y, x, y and areas (n, 5) of n masks, whose JSON ends at `ends` in `text`; not a number for other things
// than polygons of three points or more.
Tensor measured_polygons(const Tensor& text, const Tensor& ends) {
  constexpr const char* op = "dimaskdino::measured_polygons";
  TORCH_CHECK_TYPE(text.scalar_type() == at::kByte && ends.scalar_type() == at::kLong, op, ": text must be uint8 and ends int64.");
  TORCH_CHECK_VALUE(text.dim() == 1 && ends.dim() == 1 && text.is_contiguous() && ends.is_contiguous(), op,
                    ": text and ends must be contiguous vectors.");
  const char* from = reinterpret_cast<const char*>(text.const_data_ptr<uint8_t>());
  const int64_t* end = ends.const_data_ptr<int64_t>();
  Tensor measures = at::empty({ends.numel(), 5}, text.options().dtype(at::kDouble));
  double* row = measures.mutable_data_ptr<double>();
  for (int64_t i = 0, start = 0; i < ends.numel(); start = end[i++], row += 5) {
    TORCH_CHECK_INDEX(start <= end[i] && end[i] <= text.numel(), op, ": an end lies outside the text or before the last.");
    Reader reader{from + start, from + end[i]};
    Measures all;
    const bool good = add_mask(reader, &all);
    const double found[] = {all.low_x, all.low_y, all.high_x, all.high_y, all.area};
    for (int j = 0; j < 5; ++j) row[j] = good ? found[j] : kNone;
  }
  return measures;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dimaskdino, m) { m.def("measured_polygons(Tensor text, Tensor ends) -> Tensor"); }

TORCH_LIBRARY_IMPL(dimaskdino, CPU, m) { m.impl("measured_polygons", &measured_polygons); }

}  // namespace dimaskdino
