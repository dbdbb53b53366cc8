// The forward pass, and the framed copies of the values, which both passes read. Included by kernels.inl inside the
// namespace of one instruction set.

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

  // Whether a task makes the framed copy of its head itself instead of finding it in args.frames.
  static bool frames_own(const Arguments& args) {
    return args.framed && !args.frames;
  }

  static size_t scratch_bytes(const Arguments& args) {
    return Block<A>::bytes(capacity(args)) +
           (frames_own(args) ? Scratch::bytes<T>(args.frame_tokens * args.channels) : 0);
  }

  // Copies one row of a head's tokens into its frame. `line` counts from the first row of zeros.
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

  // Copies levels first to last (exclusive) of one head into frames that start with level first.
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

  // Computes one block of queries.
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
