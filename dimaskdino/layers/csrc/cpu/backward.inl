// The backward pass. Included by kernels.inl inside the namespace of one instruction set.

// Lane numbers as vector constants.
template <int... I>
struct Indices {};
template <int N, int... I>
struct Counting : Counting<N - 1, N - 1, I...> {};
template <int... I>
struct Counting<0, I...> {
  typedef Indices<I...> type;
};

// The lane of (a, b) that moves to lane j when every segment of `length` lanes is split in half: first come the lower
// halves of a's segments, then those of b's; with `upper`, the upper halves.
constexpr int halved_lane(int j, int width, int length, bool upper) {
  const int half = length / 2, segment = j / half, segments = width / length;
  return (segment < segments ? 0 : width) + segment % segments * length + j % half + (upper ? half : 0);
}

template <class V, class A, int W, int Length, bool Upper, int... I>
inline V halves(V a, V b, Indices<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, halved_lane(I, W, Length, Upper)...);
#else
  typedef typename VectorOf<typename SameSize<A>::type, W>::type Mask;
  return __builtin_shuffle(a, b, Mask{halved_lane(I, W, Length, Upper)...});
#endif
}

// Sums each of W vectors over its lanes, into one vector: folds pairs until every lane holds the sum of one vector.
template <class A, int W, int Length = W>
struct Fold {
  static inline Vec<A, W> sums(const Vec<A, W>* vectors) {
    constexpr int count = Length;  // vectors left to fold
    Vec<A, W> folded[count / 2];
    typedef typename Counting<W>::type Lane;
    for (int i = 0; i < count / 2; ++i) {
      const Vec<A, W> a = vectors[2 * i], b = vectors[2 * i + 1];
      folded[i] = halves<Vec<A, W>, A, W, Length, false>(a, b, Lane()) + halves<Vec<A, W>, A, W, Length, true>(a, b, Lane());
    }
    return Fold<A, W, Length / 2>::sums(folded);
  }
};
template <class A, int W>
struct Fold<A, W, 1> {
  static inline Vec<A, W> sums(const Vec<A, W>* vectors) {
    return vectors[0];
  }
};

template <class T>
struct Backward {
  typedef typename Accumulate<T>::type A;

  static size_t scratch_bytes(const Arguments& args) {
    int64_t bytes = Block<A>::bytes(Forward<T>::capacity(args));
    bytes += Scratch::bytes<A>(Forward<T>::query_block(args) * args.channels);
    if (args.framed) {
      const int64_t frame = args.frame_tokens * args.channels;
      bytes += Scratch::bytes<T>(frame) + Scratch::bytes<A>(frame);
    }
    return bytes;
  }

  // Adds one sample's share to the gradients of its four tokens. `dots` gets the products of their values and
  // grad_output, not yet summed over the lanes.
  template <int W, int V, bool Framed>
  static inline void add_sample(const Block<A>& block, int64_t i, const A* grad, int64_t channels, const T* value, A* sums,
                                int64_t step, Vec<A, W>* dots) {
    const int64_t first = block.index[i] * step, down = block.row[i] * step;
    const int64_t tokens[4] = {first, first + step, first + down, first + down + step};
    for (int c = 0; c < 4; ++c) dots[c] = Vec<A, W>{};
    for (int64_t channel = 0; channel < channels; channel += W * V) {
      Vec<A, W> grads[V];
      for (int v = 0; v < V; ++v) grads[v] = load<W>(grad + channel + v * W);
      for (int c = 0; c < 4; ++c) {
        if (!Framed && !(block.inside[i] >> c & 1)) continue;
        const T* from = value + tokens[c] + channel;
        A* to = sums + tokens[c] + channel;
        for (int v = 0; v < V; ++v) {
          dots[c] += grads[v] * load<W>(from + v * W);
          store<W>(load<W>(to + v * W) + block.corner[c][i] * grads[v], to + v * W);
        }
      }
    }
  }

  template <int W, int V, bool Framed>
  static void add_samples(const Block<A>& block, int64_t count, int64_t per_query, const A* grads, int64_t channels,
                          const T* value, A* sums, int64_t step) {
    constexpr int group = W >= 4 ? W / 4 : 1;  // samples whose dots fill one vector
    int64_t query = 0, left = per_query;
    for (int64_t i = 0; i < count; i += group) {
      Vec<A, W> dots[4 * group] = {};
      for (int g = 0; g < group && i + g < count; ++g) {
        add_sample<W, V, Framed>(block, i + g, grads + query * channels, channels, value, sums, step, dots + 4 * g);
        if (--left == 0) {
          left = per_query;
          ++query;
        }
      }
      if (W >= 4) {
        store<W>(Fold<A, W>::sums(dots), block.dots + 4 * i);
      } else {
        for (int c = 0; c < 4; ++c) {
          A sum = 0;
          for (int lane = 0; lane < W; ++lane) sum += dots[c][lane];
          block.dots[4 * i + c] = sum;
        }
      }
    }
  }

  // Turns a sample's four dots into the gradients of x and y (in pixels) and of the attention weight, in place.
  static void finish_samples(const Block<A>& block, int64_t count) {
    A *__restrict x = block.x, *__restrict y = block.y, *__restrict weight = block.weight;
    const A* __restrict dots = block.dots;
    for (int64_t i = 0; i < count; ++i) {
      const A d0 = dots[4 * i], d1 = dots[4 * i + 1], d2 = dots[4 * i + 2], d3 = dots[4 * i + 3];
      const A right = x[i], down = y[i], left = A(1) - right, up = A(1) - down, share = weight[i];
      weight[i] = up * (left * d0 + right * d1) + down * (left * d2 + right * d3);
      x[i] = share * (up * (d1 - d0) + down * (d3 - d2));
      y[i] = share * (left * (d2 - d0) + right * (d3 - d1));
    }
  }

  static void write_weights(const Arguments& args, const Rows& rows, int64_t queries, const Block<A>& block) {
    for (int64_t query = 0; query < queries; ++query) {
      memcpy(static_cast<A*>(args.grad_weights) + rows.start + query * rows.step, block.weight + query * rows.count,
             rows.count * sizeof(A));
    }
  }

  static void write_locations(const Arguments& args, const Rows& rows, int64_t queries, const Block<A>& block) {
    for (int64_t query = 0, i = 0; query < queries; ++query) {
      A* to = static_cast<A*>(args.grad_locations) + 2 * (rows.start + query * rows.step);
      for (int64_t k = 0; k < rows.count; ++k, ++i) {
        to[2 * k] = block.x[i] * block.width[i];
        to[2 * k + 1] = block.y[i] * block.height[i];
      }
    }
  }

  template <class C>
  static void write_offsets(const Arguments& args, const Rows& rows, int64_t first_row, int64_t queries,
                            const Block<A>& block) {
    const A share = A(0.5) / static_cast<A>(args.points);
    for (int64_t query = 0, i = 0; query < queries; ++query) {
      C* to = static_cast<C*>(args.grad_offsets) + 2 * (rows.start + query * rows.step);
      const A* reference = static_cast<const A*>(args.reference) + (first_row + query) * args.reference_size;
      const bool box = args.reference_size == 4;
      for (int64_t k = 0; k < rows.count; ++k, ++i) {
        const A scale_x = box ? block.width[i] * (share * reference[2]) : A(1);
        const A scale_y = box ? block.height[i] * (share * reference[3]) : A(1);
        from_accumulate(block.x[i] * scale_x, to + 2 * k);
        from_accumulate(block.y[i] * scale_y, to + 2 * k + 1);
      }
    }
  }

  // Sums over the points of a level. The caller sums over heads and levels.
  template <class C>
  static void write_references(const Arguments& args, const Rows& rows, int64_t queries, const Block<A>& block) {
    const A share = A(0.5) / static_cast<A>(args.points);
    for (int64_t query = 0, i = 0; query < queries; ++query) {
      const int64_t start = rows.start + query * rows.step;
      const C* offsets = static_cast<const C*>(args.offsets) + 2 * start;
      A* to = static_cast<A*>(args.grad_reference) + start / args.points * args.reference_size;
      for (int64_t k = 0; k < rows.count; to += args.reference_size) {
        A x = 0, y = 0, width = 0, height = 0;
        for (int64_t point = 0; point < args.points; ++point, ++k, ++i) {
          const A grad_x = block.x[i] * block.width[i], grad_y = block.y[i] * block.height[i];
          x += grad_x;
          y += grad_y;
          width += grad_x * share * to_accumulate(offsets[2 * k]);
          height += grad_y * share * to_accumulate(offsets[2 * k + 1]);
        }
        to[0] = x;
        to[1] = y;
        if (args.reference_size == 4) {
          to[2] = width;
          to[3] = height;
        }
      }
    }
  }

  template <class C>
  static void write_fused(const Arguments& args, const Rows& rows, int64_t first_row, int64_t queries, const Block<A>& block) {
    write_offsets<C>(args, rows, first_row, queries, block);
    if (args.grad_reference) write_references<C>(args, rows, queries, block);
  }

  static void read_grads(const Arguments& args, int64_t first_row, int64_t head, int64_t queries, A* grads) {
    const T* from = static_cast<const T*>(args.grad_output) + (first_row * args.heads + head) * args.channels;
    for (int64_t query = 0; query < queries; ++query, from += args.heads * args.channels, grads += args.channels) {
      for (int64_t channel = 0; channel < args.channels; ++channel) grads[channel] = to_accumulate(from[channel]);
    }
  }

  // Copies the framed sums, without their frame, to grad_value, in its dtype and layout.
  static void unpack(const Arguments& args, int64_t batch, int64_t head, const LevelShape& shape, const A* frame) {
    T* to = static_cast<T*>(args.grad_value) + ((batch * args.tokens + shape.start) * args.heads + head) * args.channels;
    for (int64_t line = 0; line < shape.height; ++line) {
      const A* from = frame + ((line + kFrame) * frame_row(shape.width) + kFrame) * args.channels;
      for (int64_t column = 0; column < shape.width; ++column, to += args.heads * args.channels) {
        for (int64_t channel = 0; channel < args.channels; ++channel) from_accumulate(*from++, to + channel);
      }
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
    Block<A> block(scratch, Forward<T>::capacity(args));
    A* grads = scratch.take<A>(Forward<T>::query_block(args) * args.channels);
    const int64_t frame = Framed ? args.frame_tokens * args.channels : 0;
    T* values = scratch.take<T>(frame);
    A* sums = scratch.take<A>(frame);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / args.level_splits, batch = slice / args.heads, head = slice % args.heads;
      const int64_t first = task % args.level_splits, last = args.level_splits == 1 ? args.num_levels : first + 1;
      if (Framed) {
        Forward<T>::pack_levels(args, batch, head, first, last, values);
        memset(sums, 0, frame_end(args, first, last) * args.channels * sizeof(A));
        slice_of_levels<W, V, true>(args, batch, head, first, last, block, grads, values, sums);
        for (int64_t level = first; level < last; ++level) {
          const LevelShape& shape = args.levels[level];
          unpack(args, batch, head, shape, sums + (shape.frame_start - args.levels[first].frame_start) * args.channels);
        }
      } else {
        const int64_t start = ((batch * args.tokens + args.levels[first].start) * args.heads + head) * args.channels;
        slice_of_levels<W, V, false>(args, batch, head, first, last, block, grads,
                                     static_cast<const T*>(args.value) + start, static_cast<A*>(args.grad_sums) + start);
      }
    }
  }

  // The number of tokens in the frames of levels first to last (exclusive).
  static int64_t frame_end(const Arguments& args, int64_t first, int64_t last) {
    const LevelShape& shape = args.levels[last - 1];
    return shape.frame_start + frame_size(shape.height, shape.width) - args.levels[first].frame_start;
  }

  template <int W, int V, bool Framed>
  static void slice_of_levels(const Arguments& args, int64_t batch, int64_t head, int64_t first, int64_t last,
                              Block<A>& block, A* grads, const T* value, A* sums) {
    const int64_t size = Forward<T>::query_block(args), step = Framed ? args.channels : args.heads * args.channels;
    block.set_levels(args, first, last, size);
    for (int64_t query = 0; query < args.queries; query += size) {
      const int64_t queries = smaller(size, args.queries - query), first_row = batch * args.queries + query;
      const Rows rows(args, batch, head, query, first, last);
      const int64_t count = queries * rows.count;
      read_grads(args, first_row, head, queries, grads);
      Forward<T>::read_samples(args, rows, first_row, queries, block);
      block.template locate<Framed>(count);
      add_samples<W, V, Framed>(block, count, rows.count, grads, args.channels, value, sums, step);
      finish_samples(block, count);
      write_weights(args, rows, queries, block);
      if (args.locations) {
        write_locations(args, rows, queries, block);
      } else if (args.low_precision) {
        write_fused<T>(args, rows, first_row, queries, block);
      } else {
        write_fused<A>(args, rows, first_row, queries, block);
      }
    }
  }

  // weight * (gradient - sum of weight * gradient)
  template <class C>
  static void softmax_as(const Arguments& args, int64_t begin, int64_t end) {
    const int64_t count = args.num_levels * args.points;
    for (int64_t row = begin; row < end; ++row) {
      const A* weights = static_cast<const A*>(args.weights) + row * count;
      const A* grads = static_cast<const A*>(args.grad_weights) + row * count;
      C* grad_logits = static_cast<C*>(args.grad_logits) + row * count;
      A sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += weights[i] * grads[i];
      for (int64_t i = 0; i < count; ++i) from_accumulate(weights[i] * (grads[i] - sum), grad_logits + i);
    }
  }

  static void softmax(const Arguments& args, int64_t begin, int64_t end) {
    if (args.low_precision) {
      softmax_as<T>(args, begin, end);
    } else {
      softmax_as<A>(args, begin, end);
    }
  }};
