// The kernels, once per instruction set: the including file sets the compiler's target, DIMASKDINO_ISA (the namespace)
// and DIMASKDINO_VECTOR_BYTES (the widest vector worth using).
//
// A task takes a block of queries of one head. First it works out where all its samples lie (`locate`, loops over
// arrays, one sample a lane), then it gathers (one sample after the other, channels in the lanes).

#include <string.h>

#if DIMASKDINO_VECTOR_BYTES >= 32
#include <immintrin.h>
#endif

#include "kernels.h"

namespace dimaskdino {
namespace cpu {
namespace DIMASKDINO_ISA {
namespace {

#include "simd.h"

constexpr int64_t kBlockSamples = 256;  // per task and block, so that their coefficients stay in the first cache

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Cuts pieces off the scratch memory.
struct Scratch {
  char* next;
  template <class X>
  X* take(int64_t count) {
    X* piece = reinterpret_cast<X*>(next);
    next += bytes<X>(count);
    return piece;
  }
  template <class X>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(X)) + 63) / 64 * 64;
  }
};

// The samples of a block, as arrays: sample i belongs to query i / per_query of the block.
template <class A>
struct Block {
  // What depends on the level alone, the same for every query.
  A *width, *height;
  int32_t *row, *origin;
  // What depends on the sample.
  A *x, *y, *weight;   // in pixels of the level; attention weight
  int32_t* index;      // of the upper left token
  uint8_t* inside;     // bits of the four corners that lie inside; not used where framed
  A* corner[4];        // bilinear weights of the four corners times the attention weight
  A* dots;             // four a sample: the corners' values times grad_output

  static constexpr int64_t kSlack = DIMASKDINO_VECTOR_BYTES / sizeof(A);  // dots are stored in whole vectors

  static int64_t bytes(int64_t capacity) {
    return 9 * Scratch::bytes<A>(capacity) + Scratch::bytes<A>(4 * capacity + kSlack) +
           3 * Scratch::bytes<int32_t>(capacity) + Scratch::bytes<uint8_t>(capacity);
  }
  Block(Scratch& scratch, int64_t capacity) {
    A** arrays[] = {&width, &height, &x, &y, &weight};
    for (A** array : arrays) *array = scratch.take<A>(capacity);
    for (int c = 0; c < 4; ++c) corner[c] = scratch.take<A>(capacity);
    dots = scratch.take<A>(4 * capacity + kSlack);
    row = scratch.take<int32_t>(capacity);
    origin = scratch.take<int32_t>(capacity);
    index = scratch.take<int32_t>(capacity);
    inside = scratch.take<uint8_t>(capacity);
  }

  // Levels first to last (exclusive), the pattern repeated for every query of a block.
  void set_levels(const Arguments& args, int64_t first, int64_t last, int64_t queries) {
    int64_t i = 0;
    const int64_t frame_offset = args.levels[first].frame_start, offset = args.levels[first].start;
    for (int64_t query = 0; query < queries; ++query) {
      for (int64_t level = first; level < last; ++level) {
        const LevelShape& shape = args.levels[level];
        for (int64_t point = 0; point < args.points; ++point, ++i) {
          width[i] = static_cast<A>(shape.width);
          height[i] = static_cast<A>(shape.height);
          row[i] = static_cast<int32_t>(args.framed ? frame_row(shape.width) : shape.width);
          origin[i] = static_cast<int32_t>(args.framed ? shape.frame_start - frame_offset + kFrame * row[i] + kFrame
                                                       : shape.start - offset);
        }
      }
    }
  }

  // Pixel coordinates to the upper left token and the weights of the corners; x and y become the distances from that
  // token. A coordinate that is not finite or lies beyond the level is moved to where all four corners are outside.
  template <bool Framed>
  void locate(int64_t count) {
    if (!Framed) find_inside(count);
    constexpr int W = DIMASKDINO_VECTOR_BYTES / sizeof(A);
    typedef Vec<A, W> Reals;
    typedef Vec<int32_t, W> Counts;
    typedef Vec<uint32_t, W> Bits;
    const Reals one = Reals{} + A(1), beyond = Reals{} - A(2);
    for (int64_t i = 0; i < count; i += W) {  // the arrays end in whole vectors
      Reals px = load<W>(x + i), py = load<W>(y + i);
      const Reals far_x = load<W>(width + i), far_y = load<W>(height + i), share = load<W>(weight + i);
      px = px > beyond ? px : beyond;  // not a number is not greater
      py = py > beyond ? py : beyond;
      px = px < far_x ? px : far_x;
      py = py < far_y ? py : far_y;
      const Counts column = floor_of<A, W>(px), line = floor_of<A, W>(py);
      const Reals right = px - __builtin_convertvector(column, Reals), down = py - __builtin_convertvector(line, Reals);
      const Reals lower = share * down, upper = share * (one - down);
      store<W>(upper * (one - right), corner[0] + i);
      store<W>(upper * right, corner[1] + i);
      store<W>(lower * (one - right), corner[2] + i);
      store<W>(lower * right, corner[3] + i);
      // Lanes past the last sample hold anything: unsigned numbers cannot overflow.
      const Bits lines = (Bits)line * (Bits)load<W>(row + i);
      store<W>((Counts)((Bits)load<W>(origin + i) + lines + (Bits)column), index + i);
      store<W>(right, x + i);
      store<W>(down, y + i);
    }
  }

  void find_inside(int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const A far_x = width[i] - A(1), far_y = height[i] - A(1);
      const bool left = x[i] >= A(0) && x[i] < width[i], right = x[i] >= A(-1) && x[i] < far_x;
      const bool upper = y[i] >= A(0) && y[i] < height[i], lower = y[i] >= A(-1) && y[i] < far_y;
      inside[i] = static_cast<uint8_t>((upper & left) | (upper & right) << 1 | (lower & left) << 2 | (lower & right) << 3);
    }
  }
};

// Rows [query, query + queries) of (B, Q, H, L, P) tensors: where the levels from `first` on begin.
struct Rows {
  int64_t start, step, count;  // in samples
  Rows(const Arguments& args, int64_t batch, int64_t head, int64_t query, int64_t first, int64_t last) {
    const int64_t samples = args.num_levels * args.points;
    start = ((batch * args.queries + query) * args.heads + head) * samples + first * args.points;
    step = args.heads * samples;
    count = (last - first) * args.points;
  }
};

// The rows of one head lie far apart, which the processor does not foresee: asked for one block ahead. An address past
// the end of the tensor does no harm.
template <class X>
inline void prefetch(const X* from, int64_t count) {
  const char* address = reinterpret_cast<const char*>(from);
  for (int64_t offset = 0; offset < count * static_cast<int64_t>(sizeof(X)); offset += 64) __builtin_prefetch(address + offset);
}

template <class A>
void read_locations(const Arguments& args, const Rows& rows, int64_t queries, Block<A>& block) {
  // Promises that nothing overlaps, without which the loops do not become vector code.
  A *__restrict x = block.x, *__restrict y = block.y;
  const A *__restrict width = block.width, *__restrict height = block.height;
  for (int64_t query = 0; query < queries; ++query, x += rows.count, y += rows.count) {
    const A* __restrict from = static_cast<const A*>(args.locations) + 2 * (rows.start + query * rows.step);
    prefetch(from + 2 * queries * rows.step, 2 * rows.count);
    for (int64_t i = 0; i < rows.count; ++i) {
      x[i] = from[2 * i] * width[i] - A(0.5);
      y[i] = from[2 * i + 1] * height[i] - A(0.5);
    }
  }
}

// reference + offset / size of the level, or reference + offset / points * half of the box, in pixels.
template <class A, class C>
void read_offsets(const Arguments& args, const Rows& rows, int64_t first_row, int64_t queries, Block<A>& block) {
  A *__restrict x = block.x, *__restrict y = block.y;
  const A *__restrict width = block.width, *__restrict height = block.height;
  for (int64_t query = 0; query < queries; ++query, x += rows.count, y += rows.count) {
    const C* __restrict from = static_cast<const C*>(args.offsets) + 2 * (rows.start + query * rows.step);
    const A* reference = static_cast<const A*>(args.reference) + (first_row + query) * args.reference_size;
    if (args.reference_size == 2) {
      for (int64_t i = 0; i < rows.count; ++i) {
        x[i] = reference[0] * width[i] - A(0.5) + to_accumulate(from[2 * i]);
        y[i] = reference[1] * height[i] - A(0.5) + to_accumulate(from[2 * i + 1]);
      }
    } else {
      const A share = A(0.5) / static_cast<A>(args.points);
      for (int64_t i = 0; i < rows.count; ++i) {
        x[i] = (reference[0] + to_accumulate(from[2 * i]) * (share * reference[2])) * width[i] - A(0.5);
        y[i] = (reference[1] + to_accumulate(from[2 * i + 1]) * (share * reference[3])) * height[i] - A(0.5);
      }
    }
  }
}

template <class A>
void read_weights(const Arguments& args, const Rows& rows, int64_t queries, Block<A>& block) {
  for (int64_t query = 0; query < queries; ++query) {
    const A* from = static_cast<const A*>(args.weights) + rows.start + query * rows.step;
    prefetch(from + queries * rows.step, rows.count);
    memcpy(block.weight + query * rows.count, from, rows.count * sizeof(A));
  }
}

// exp(logit - largest) / sum, as torch does: NaN where all are minus infinity or one is infinite or NaN. In vectors, the
// last one filled up with logits that weigh nothing.
template <class A, class C>
void softmax_row(const C* logits, A* weights, int64_t count) {
  constexpr int W = DIMASKDINO_VECTOR_BYTES / sizeof(A);
  typedef Vec<A, W> Reals;
  const int64_t whole = count / W * W;
  A last[W];
  if (whole < count) {
    for (int i = 0; i < W; ++i) last[i] = whole + i < count ? to_accumulate(logits[whole + i]) : -__builtin_inf();
  }
  Reals largest = Reals{} - static_cast<A>(__builtin_inf());
  for (int64_t i = 0; i < whole; i += W) {
    const Reals logit = load<W>(logits + i);
    largest = logit > largest ? logit : largest;
  }
  if (whole < count) largest = load<W>(last) > largest ? load<W>(last) : largest;
  const Reals shift = Reals{} + Across<A, W>::largest(largest);
  Reals sum = {};
  for (int64_t i = 0; i < whole; i += W) {
    const Reals weight = exp_negative<W>(load<W>(logits + i) - shift);
    sum += weight;
    store<W>(weight, weights + i);
  }
  if (whole < count) {
    const Reals weight = exp_negative<W>(load<W>(last) - shift);
    sum += weight;
    store<W>(weight, last);
  }
  const A scale = A(1) / Across<A, W>::sum(sum);
  for (int64_t i = 0; i < whole; i += W) store<W>(load<W>(weights + i) * scale, weights + i);
  for (int64_t i = whole; i < count; ++i) weights[i] = last[i - whole] * scale;
}

// Calls work(Lanes<width>, Lanes<vectors at once>) with the widest vectors that the channels fill.
template <int N>
struct Lanes {
  static constexpr int value = N;
};
template <class A, class Work>
void with_lanes(int64_t channels, const Work& work) {
  constexpr int widest = DIMASKDINO_VECTOR_BYTES / sizeof(A);
  if (channels % (2 * widest) == 0) {
    work(Lanes<widest>(), Lanes<2>());
  } else if (channels % widest == 0) {
    work(Lanes<widest>(), Lanes<1>());
  } else if (widest > 8 && channels % 8 == 0) {
    work(Lanes<(widest > 8 ? 8 : 4)>(), Lanes<1>());
  } else if (channels % 4 == 0) {
    work(Lanes<4>(), Lanes<1>());
  } else {
    work(Lanes<1>(), Lanes<1>());
  }
}

// Sums one query's samples into V vectors of W channels each.
template <int W, int V, bool Framed, class T, class A>
inline void gather(const Block<A>& block, int64_t begin, int64_t end, const T* value, int64_t step, T* output) {
  Vec<A, W> sums[4][V] = {};
  for (int64_t i = begin; i < end; ++i) {
    const T* first = value + block.index[i] * step;
    const int64_t down = block.row[i] * step;
    const T* tokens[4] = {first, first + step, first + down, first + down + step};
    for (int c = 0; c < 4; ++c) {
      if (!Framed && !(block.inside[i] >> c & 1)) continue;
      for (int v = 0; v < V; ++v) sums[c][v] += block.corner[c][i] * load<W>(tokens[c] + v * W);
    }
  }
  for (int v = 0; v < V; ++v) store<W>((sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v]), output + v * W);
}

template <class T>
struct Forward {
  typedef typename Accumulate<T>::type A;

  static int64_t query_block(const Arguments& args) {
    const int64_t fitting = kBlockSamples / (args.num_levels * args.points);
    return smaller(fitting > 1 ? fitting : 1, args.queries);
  }

  static int64_t capacity(const Arguments& args) {
    return query_block(args) * args.num_levels * args.points;
  }

  // Whether a task makes the framed copy of its head by itself, rather than find it in args.frames.
  static bool frames_own(const Arguments& args) {
    return args.framed && !args.frames;
  }

  static size_t scratch_bytes(const Arguments& args) {
    return Block<A>::bytes(capacity(args)) +
           (frames_own(args) ? Scratch::bytes<T>(args.frame_tokens * args.channels) : 0);
  }

  // One row of tokens of one head into its frame. `line` counts from the first row of zeros.
  static void pack_row(const Arguments& args, int64_t batch, int64_t head, const LevelShape& shape, int64_t line, T* frame) {
    const int64_t row = frame_row(shape.width), step = args.heads * args.channels;
    T* to = frame + line * row * args.channels;
    const bool last = line == shape.height + 2 * kFrame - 1;
    if (line < kFrame || line >= kFrame + shape.height) {
      memset(to, 0, (row + (last ? kFrame : 0)) * args.channels * sizeof(T));
      return;
    }
    memset(to, 0, kFrame * args.channels * sizeof(T));
    to += kFrame * args.channels;
    const int64_t token = shape.start + (line - kFrame) * shape.width;
    const T* from = static_cast<const T*>(args.value) + ((batch * args.tokens + token) * args.heads + head) * args.channels;
    for (int64_t column = 0; column < shape.width; ++column, to += args.channels, from += step) {
      memcpy(to, from, args.channels * sizeof(T));
    }
  }

  // Levels first to last (exclusive) of one head into frames that begin with the first.
  static void pack_levels(const Arguments& args, int64_t batch, int64_t head, int64_t first, int64_t last, T* frames) {
    for (int64_t level = first; level < last; ++level) {
      const LevelShape& shape = args.levels[level];
      T* frame = frames + (shape.frame_start - args.levels[first].frame_start) * args.channels;
      for (int64_t line = 0; line < shape.height + 2 * kFrame; ++line) pack_row(args, batch, head, shape, line, frame);
    }
  }

  static void pack(const Arguments& args, int64_t begin, int64_t end) {
    const int64_t rows = frame_rows(args);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / rows;
      int64_t line = task % rows, level = 0;
      for (; line >= args.levels[level].height + 2 * kFrame; ++level) line -= args.levels[level].height + 2 * kFrame;
      const LevelShape& shape = args.levels[level];
      T* frame = static_cast<T*>(args.frames) + (slice * args.frame_tokens + shape.frame_start) * args.channels;
      pack_row(args, slice / args.heads, slice % args.heads, shape, line, frame);
    }
  }

  static void read_samples(const Arguments& args, const Rows& rows, int64_t first_row, int64_t queries, Block<A>& block) {
    if (args.locations) {
      read_locations(args, rows, queries, block);
    } else if (args.low_precision) {
      read_offsets<A, T>(args, rows, first_row, queries, block);
    } else {
      read_offsets<A, A>(args, rows, first_row, queries, block);
    }
    if (args.weights) {
      read_weights(args, rows, queries, block);
      return;
    }
    for (int64_t query = 0; query < queries; ++query) {
      softmax_samples(args, rows.start + query * rows.step, rows.count, block.weight + query * rows.count);
    }
  }

  static void softmax_samples(const Arguments& args, int64_t start, int64_t count, A* weights) {
    if (args.low_precision) {
      softmax_row(static_cast<const T*>(args.logits) + start, weights, count);
    } else {
      softmax_row(static_cast<const A*>(args.logits) + start, weights, count);
    }
  }

  static void run(const Arguments& args, int64_t begin, int64_t end, void* memory) {
    with_lanes<A>(args.channels, [&](auto width, auto vectors) {
      if (args.framed) {
        tasks<decltype(width)::value, decltype(vectors)::value, true>(args, begin, end, memory);
      } else {
        tasks<decltype(width)::value, decltype(vectors)::value, false>(args, begin, end, memory);
      }
    });
  }

  template <int W, int V, bool Framed>
  static void tasks(const Arguments& args, int64_t begin, int64_t end, void* memory) {
    Scratch scratch{static_cast<char*>(memory)};
    Block<A> block(scratch, capacity(args));
    T* own_frames = frames_own(args) ? scratch.take<T>(args.frame_tokens * args.channels) : nullptr;
    const int64_t size = query_block(args), blocks = (args.queries + size - 1) / size;
    const int64_t tasks_per_slice = own_frames ? 1 : blocks;
    block.set_levels(args, 0, args.num_levels, size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / tasks_per_slice, batch = slice / args.heads, head = slice % args.heads;
      const T* value = static_cast<const T*>(args.value) + (batch * args.tokens * args.heads + head) * args.channels;
      if (Framed && !own_frames) value = static_cast<const T*>(args.frames) + slice * args.frame_tokens * args.channels;
      if (own_frames) {
        pack_levels(args, batch, head, 0, args.num_levels, own_frames);
        value = own_frames;
      }
      const int64_t first = own_frames ? 0 : task % blocks, last = own_frames ? blocks : first + 1;
      for (int64_t i = first; i < last; ++i) queries_of_head<W, V, Framed>(args, batch, head, i * size, block, value);
    }
  }

  // One block of queries.
  template <int W, int V, bool Framed>
  static void queries_of_head(const Arguments& args, int64_t batch, int64_t head, int64_t first, Block<A>& block,
                              const T* value) {
    const int64_t queries = smaller(query_block(args), args.queries - first), first_row = batch * args.queries + first;
    const int64_t samples = args.num_levels * args.points, step = Framed ? args.channels : args.heads * args.channels;
    read_samples(args, Rows(args, batch, head, first, 0, args.num_levels), first_row, queries, block);
    block.template locate<Framed>(queries * samples);
    T* output = static_cast<T*>(args.output) + (first_row * args.heads + head) * args.channels;
    for (int64_t query = 0; query < queries; ++query, output += args.heads * args.channels) {
      for (int64_t channel = 0; channel < args.channels; channel += W * V) {
        gather<W, V, Framed>(block, query * samples, (query + 1) * samples, value + channel, step, output + channel);
      }
    }
  }

  static void softmax(const Arguments& args, void* weights, int64_t begin, int64_t end) {
    const int64_t count = args.num_levels * args.points;
    for (int64_t row = begin; row < end; ++row) {
      softmax_samples(args, row * count, count, static_cast<A*>(weights) + row * count);
    }
  }
};

#include "backward.inl"

template <class T>
constexpr Kernels kernels_for() {
  return {Forward<T>::pack,          Forward<T>::run,     Forward<T>::query_block,     Backward<T>::run,
          Forward<T>::scratch_bytes, Backward<T>::scratch_bytes, Forward<T>::softmax, Backward<T>::softmax};
}

constexpr Kernels kTable[kNumDtypes] = {kernels_for<float>(), kernels_for<double>(), kernels_for<Half>(),
                                        kernels_for<BFloat16>()};

}  // namespace
}  // namespace DIMASKDINO_ISA
}  // namespace cpu
}  // namespace dimaskdino
