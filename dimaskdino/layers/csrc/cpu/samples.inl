// Locations and weights of the samples of a block of queries: reading, softmax, corners. Included by kernels.inl inside
// the namespace of one instruction set.

constexpr int64_t kBlockSamples = 256;  // per task and block, so that their coefficients stay in the L1 cache

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Hands out pieces of the scratch memory.
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

// The samples of a block as arrays; sample i belongs to query i / per_query of the block.
template <class A>
struct Block {
  // These depend on the level alone and are the same for every query.
  A *width, *height;
  int32_t *row, *origin;
  // These depend on the sample.
  A *x, *y, *weight;   // in pixels of the level; attention weight
  int32_t* index;      // of the upper left token
  uint8_t* inside;     // a bit for each corner that lies inside; not used if framed
  A* corner[4];        // bilinear weights of the four corners times the attention weight
  A* dots;             // four per sample: the corners' values times grad_output

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

  // Repeats the sizes of levels first to last (exclusive) for every query of a block.
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

  // Turns pixel coordinates into the upper left token and the corners' weights; x and y become distances from that
  // token. A coordinate that is not finite or lies beyond the level moves to where all four corners are outside.
  template <bool Framed>
  void locate(int64_t count) {
    if (!Framed) find_inside(count);
    constexpr int W = DIMASKDINO_VECTOR_BYTES / sizeof(A);
    typedef Vec<A, W> Reals;
    typedef Vec<int32_t, W> Counts;
    typedef Vec<uint32_t, W> Bits;
    const Reals one = Reals{} + A(1), beyond = Reals{} - A(2);
    for (int64_t i = 0; i < count; i += W) {  // the arrays are padded to whole vectors
      Reals px = load<W>(x + i), py = load<W>(y + i);
      const Reals far_x = load<W>(width + i), far_y = load<W>(height + i), share = load<W>(weight + i);
      px = px > beyond ? px : beyond;  // false for NaN
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
      // Lanes past the last sample may hold anything, so use unsigned numbers: their overflow is defined.
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

// Where the levels from `first` on begin in rows [query, query + queries) of (B, Q, H, L, P) tensors.
struct Rows {
  int64_t start, step, count;  // in samples
  Rows(const Arguments& args, int64_t batch, int64_t head, int64_t query, int64_t first, int64_t last) {
    const int64_t samples = args.num_levels * args.points;
    start = ((batch * args.queries + query) * args.heads + head) * samples + first * args.points;
    step = args.heads * samples;
    count = (last - first) * args.points;
  }
};

// Prefetches a block ahead, because the rows of one head lie too far apart for the processor's own prefetching. An
// address past the end of the tensor does no harm.
template <class X>
inline void prefetch(const X* from, int64_t count) {
  const char* address = reinterpret_cast<const char*>(from);
  for (int64_t offset = 0; offset < count * static_cast<int64_t>(sizeof(X)); offset += 64) __builtin_prefetch(address + offset);
}

template <class A>
void read_locations(const Arguments& args, const Rows& rows, int64_t queries, Block<A>& block) {
  // __restrict promises that nothing overlaps; without it the loops are not vectorized.
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

// For points, reference + offset / size of the level; for boxes, reference + offset / P * half of the box. In pixels.
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

// exp(logit - largest) / sum, as in torch: NaN if all are minus infinity, or if one is infinite or NaN. Works in
// vectors, the last of which is padded with logits of no weight.
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
