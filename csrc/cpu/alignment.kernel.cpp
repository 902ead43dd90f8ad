// Sinkhorn transport between the frames of clips, both directions of a pair from one kernel matrix.
#include "alignment_frames.h"
#include "alignment_pair.h"
#include "transport_move.h"

namespace objslot::OBJSLOT_ISA {

// The transport between two frames of a clip, as a problem of its own.
static TransportProblem pair_of(const AlignmentProblem& p, int64_t clip, int64_t first, int64_t second) {
  const Element arithmetic = p.element == Element::float64 ? Element::float64 : Element::float32;
  const auto frame = [&](const void* base, int64_t index, int64_t width_of_rows, Element element) {
    const char* bytes = static_cast<const char*>(base);
    return bytes ? bytes + (clip * p.frames + index) * p.n * width_of_rows * size_of(element) : nullptr;
  };
  TransportProblem pair{};
  pair.element = p.element;
  pair.value_element = arithmetic;
  pair.x = frame(p.tokens, first, p.features, p.element);
  pair.y = frame(p.tokens, second, p.features, p.element);
  pair.values = frame(p.values, second, p.channels, arithmetic);
  pair.a = frame(p.masses, first, 1, arithmetic);
  pair.b = frame(p.masses, second, 1, arithmetic);
  pair.batch = 1;
  pair.n = pair.m = p.n;
  pair.features = p.features;
  pair.channels = p.channels;
  pair.cosine = p.cosine;
  pair.shortest = p.shortest;
  pair.eps = p.eps;
  pair.n_iters = p.n_iters;
  pair.tol = -1;
  return pair;
}

// What a thread works in.
template <class T>
struct AlignmentWork {
  Stage<T> stage;
  PairWork<T> pair;
  float* tops;  // (n): the largest scores of the rows
};

template <class T>
static AlignmentWork<T> lay_out(Arena& arena, const AlignmentProblem& p, const SinkhornTables& sinkhorn, bool tiles) {
  const int64_t whole = round_up(p.n, 32), lanes = padded<T>(p.channels);
  const auto scaling = [&] { return Scaling<T>{arena.take<T>(whole), arena.take<T>(whole), arena.take<T>(whole)}; };
  AlignmentWork<T> w{};
  w.pair.offset = arena.take<T>(whole);
  w.pair.weights = arena.take<T>(whole * lanes);
  w.pair.collected = arena.take<T>(whole * lanes);
  w.pair.row_values = arena.take<T>(value_rows * lanes);
  w.pair.forth = scaling();
  w.pair.back = scaling();
  w.stage = lay_out<T>(arena, pair_of(p, 0, 0, 0), sinkhorn, false, tiles, 1);
  w.tops = arena.take<float>(whole);
  return w;
}

// The frames whose tokens are the columns of pairs with the `partners` frames after them, around the end: every pair
// once, and pairs of neighbours in turn for frames that have one more and one less.
struct Columns {
  int64_t frame, partners;
  static OBJSLOT_INLINE_MEMBER Columns at(int64_t place, int64_t frames) {
    if (frames % 2) return {place, frames / 2};
    const int64_t frame = place / 2 + place % 2 * (frames / 2);
    return {frame, frames / 2 - place % 2};
  }
};

// The two frames of a pair, and where it puts what they get: moved (target, source, n, channels).
struct Frames {
  int64_t clip, first, second;
};

template <class T>
static Pair<T> pair_between(const AlignmentProblem& p, const Frames& f, T* kernel, int64_t stride, T scale, T* moved) {
  const int64_t size = p.n * p.channels;
  const T* masses = static_cast<const T*>(p.masses);
  const T* values = static_cast<const T*>(p.values);
  const auto at = [&](const T* base, int64_t frame, int64_t step) {
    return base ? base + (f.clip * p.frames + frame) * step : nullptr;
  };
  return {kernel,
          stride,
          p.n,
          p.channels,
          p.n_iters,
          scale,
          at(masses, f.first, p.n),
          at(masses, f.second, p.n),
          at(values, f.first, size),
          at(values, f.second, size),
          moved + (f.first * p.frames + f.second) * size,
          moved + (f.second * p.frames + f.first) * size};
}

// A pair by the general way, whose scalings left the range.
template <class T>
static void move_pair(const AlignmentProblem& p, const Frames& f, const SinkhornTables& sinkhorn, bool tiles,
                      const Stage<T>& stage, T* moved) {
  const int64_t size = p.n * p.channels;
  const auto alone = [](const auto& work) { work(Team{}); };
  const auto go = [&](int64_t target, int64_t source) {
    move(pair_of(p, f.clip, target, source), {moved + (target * p.frames + source) * size, nullptr}, sinkhorn, 0, stage,
         tiles, 1, alone);
  };
  go(f.first, f.second);
  go(f.second, f.first);
}

// Everything that some frames of a clip have a part in.
template <class T>
static void align_columns(const AlignmentProblem& p, int64_t clip, int64_t begin, int64_t end,
                          const SinkhornTables& sinkhorn, bool tiles, AlignmentWork<T> w, T* moved) {
  const auto alone = [](const auto& work) { work(Team{}); };
  const T scale = T(1.44269504088896340736 / p.eps);
  for (int64_t place = begin; place < end; ++place) {
    const Columns columns = Columns::at(place, p.frames);
    bool laid = false;
    for (int64_t step = 1; step <= columns.partners; ++step) {
      const Frames frames{clip, (columns.frame + step) % p.frames, columns.frame};
      const TransportProblem problem = pair_of(p, clip, frames.first, frames.second);
      point_at(problem, 0, w.stage);
      // Factors on tiles and on vectors have the same place.
      laid = make_scores(problem, w.stage, tiles, laid, alone) == tiles;
      bool safe;
      {
        const FlushSubnormals flush;
        for (int64_t i = 0; i < p.n; ++i) w.pair.offset[i] = -largest(w.stage.scores + i * w.stage.stride, p.n) * scale;
        safe = solve_pair(pair_between(p, frames, w.stage.scores, w.stage.stride, scale, moved), w.pair);
      }
      if (safe) continue;
      move_pair(p, frames, sinkhorn, tiles, w.stage, moved);
      laid = false;
    }
  }
}

#ifdef OBJSLOT_TILES
// The same from digits. They take the place of the parts in bfloat16, which a pair goes back to where it must.
static void align_columns_by_digits(const AlignmentProblem& p, int64_t clip, int64_t begin, int64_t end,
                                    const SinkhornTables& sinkhorn, const FrameRows& d, const AlignmentWork<float>& w,
                                    float* moved) {
  const int64_t depth = byte_blocks(p.features), size = digit_bytes(p.features), stride = w.stage.stride;
  uint8_t* rows = reinterpret_cast<uint8_t*>(w.stage.left);
  uint8_t* right = reinterpret_cast<uint8_t*>(w.stage.right);
  const auto lay = [&](int64_t frame, int64_t first) {
    lay_digits(tokens_of(p, clip, frame), p.n, p.features, first, d.size + frame * d.rows, rows);
  };
  for (int64_t place = begin; place < end; ++place) {
    const Columns columns = Columns::at(place, p.frames);
    bool laid = false;
    for (int64_t step = 1; step <= columns.partners; ++step) {
      const Frames frames{clip, (columns.frame + step) % p.frames, columns.frame};
      const DigitTarget target{
          w.stage.scores, stride, p.n, d.row_scale + frames.first * d.rows, d.column_scale + frames.second * d.rows,
          w.tops};
      {
        const FlushSubnormals flush;
        for (int64_t j = 0; j < p.n && !laid; j += tile_rows) {
          lay(frames.second, j);
          lay_digits_across(rows, p.features, right + j / tile_rows * size);
        }
        laid = true;
        {
          const TileRegisters registers;
          for (int64_t i = 0; i < p.n; i += tile_rows) {
            lay(frames.first, i);
            multiply_digits(rows, right, depth, target, i);
          }
        }
        for (int64_t i = 0; i < p.n; ++i) w.pair.offset[i] = -w.tops[i];
        if (solve_pair(pair_between(p, frames, w.stage.scores, stride, 1.f, moved), w.pair)) continue;
      }
      move_pair(p, frames, sinkhorn, true, w.stage, moved);
      laid = false;
    }
  }
}
#endif

// What a frame gets from the others, in the order of the frames.
template <class T>
static void add_up_frame(const AlignmentProblem& p, int64_t frame, const T* moved, T* out) {
  const int64_t size = p.n * p.channels;
  for (int64_t k = 0; k < size; ++k) out[k] = 0;
  for (int64_t source = 0; source < p.frames; ++source) {
    if (source == frame) continue;
    const T* part = moved + (frame * p.frames + source) * size;
    for (int64_t k = 0; k < size; ++k) out[k] += part[k];
  }
}

template <class T>
static int64_t share_of_workspace(const AlignmentProblem& p, const SinkhornTables& sinkhorn, bool tiles) {
  Arena arena{nullptr};
  lay_out<T>(arena, p, sinkhorn, tiles);
  return arena.used;
}

// What belongs to a clip: what its frames get from each other, and the sizes of their tokens.
template <class T>
struct ClipWork {
  T* moved;
  FrameRows rows;
};

template <class T>
static ClipWork<T> lay_out_clip(Arena& arena, const AlignmentProblem& p) {
  return {arena.take<T>(p.frames * p.frames * p.n * p.channels), lay_out_rows(arena, p)};
}

template <class T>
static int64_t clip_bytes(const AlignmentProblem& p) {
  Arena arena{nullptr};
  lay_out_clip<T>(arena, p);
  return arena.used;
}

// The threads that work on a clip call stage(begin, end, worker) for shares of its frames.
template <class T, class Share>
static void align_clip(const AlignmentProblem& p, int64_t clip, const SinkhornTables& sinkhorn, bool tiles,
                       const ClipWork<T>& c, T* out, const Share& share) {
  bool by_digits = false;
#ifdef OBJSLOT_TILES
  if constexpr (sizeof(T) == 4) {
    if (tiles && p.element == Element::float32 && p.features <= most_digit_terms) {
      share([&](int64_t begin, int64_t end, const AlignmentWork<T>&) {
        for (int64_t frame = begin; frame < end; ++frame) measure_frame(p, clip, frame, c.rows);
      });
      by_digits = suited_digits(p, c.rows);
    }
    if (by_digits)
      share([&](int64_t begin, int64_t end, const AlignmentWork<T>& w) {
        align_columns_by_digits(p, clip, begin, end, sinkhorn, c.rows, w, c.moved);
      });
  }
#endif
  if (!by_digits)
    share([&](int64_t begin, int64_t end, const AlignmentWork<T>& w) {
      align_columns(p, clip, begin, end, sinkhorn, tiles, w, c.moved);
    });
  share([&](int64_t begin, int64_t end, const AlignmentWork<T>&) {
    for (int64_t index = begin; index < end; ++index)
      add_up_frame(p, index, c.moved, out + (clip * p.frames + index) * p.n * p.channels);
  });
}

// Whole clips for each thread, or all threads on one clip where there are fewer clips than threads.
template <class T>
static void align(const AlignmentProblem& p, T* out, const SinkhornTables& sinkhorn, bool tiles, char* base,
                  int threads) {
  const int64_t size = share_of_workspace<T>(p, sinkhorn, tiles), clip_size = clip_bytes<T>(p);
  const auto work = [&](int worker) {
    Arena arena = Arena::in(base + worker * size);
    return lay_out<T>(arena, p, sinkhorn, tiles);
  };
  const auto clip_work = [&](int64_t index) {
    Arena arena{base + threads * size + index * clip_size};
    return lay_out_clip<T>(arena, p);
  };
  if (p.clips < threads) {
    const auto share = [&](const auto& stage) {
      parallel_for(p.frames, threads, [&](int64_t begin, int64_t end, int worker) { stage(begin, end, work(worker)); });
    };
    for (int64_t clip = 0; clip < p.clips; ++clip) align_clip(p, clip, sinkhorn, tiles, clip_work(0), out, share);
    return;
  }
  parallel_for(p.clips, threads, [&](int64_t begin, int64_t end, int worker) {
    const AlignmentWork<T> own = work(worker);
    const auto share = [&](const auto& stage) { stage(0, p.frames, own); };
    for (int64_t clip = begin; clip < end; ++clip) align_clip(p, clip, sinkhorn, tiles, clip_work(worker), out, share);
  });
}

template <class T>
static int64_t workspace_of(const AlignmentProblem& p, const SinkhornTables& sinkhorn, bool tiles, int threads) {
  return threads * (share_of_workspace<T>(p, sinkhorn, tiles) + clip_bytes<T>(p));
}

static int64_t workspace(const AlignmentProblem& p, const SinkhornTables& sinkhorn, bool tiles, int threads) {
  return p.element == Element::float64 ? workspace_of<double>(p, sinkhorn, tiles, threads)
                                       : workspace_of<float>(p, sinkhorn, tiles, threads);
}

static void run(const AlignmentProblem& p, void* out, const SinkhornTables& sinkhorn, bool tiles, void* workspace,
                int threads) {
  // Only where there is nothing to do.
  if (!workspace) return;
  char* base = static_cast<char*>(workspace);
  p.element == Element::float64 ? align(p, static_cast<double*>(out), sinkhorn, tiles, base, threads)
                                : align(p, static_cast<float*>(out), sinkhorn, tiles, base, threads);
}

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(AlignmentKernels, workspace, run)
