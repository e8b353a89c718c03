// The vectorised CPU kernels, included once for each instruction set (see simd.h for LMF_ISA).
//
// Two walks over the logits, one mathematics:
//   Tile: up to kTileRows rows at a time, a lane a row, classes one after the other. For few classes and for dense
//         prediction, where neighbouring rows are neighbours in memory (lmf_cpu_tile.h moves them in and out).
//   Row:  one row at a time, a lane a class. For many classes that are neighbours in memory.
// Forward stages a chunk of logits in L1 with the target's own logit replaced by -inf, so that the inner loops know
// only competitors, and combines chunks online: logits are read from memory once, whatever C is.
#pragma once

#include "lmf_cpu.h"
#include "lmf_cpu_tile.h"
#include "lmf_math.h"
#include "simd.h"
#include "simd_wide.h"

namespace lmf {
namespace LMF_ISA {

constexpr int kRowChunk = kTileRows * kTileClasses;  // logits of one row staged at a time
constexpr int32_t kIgnored = -1;
constexpr int kComparedClasses = 16;  // up to which each class asks all rows whether it is their target

// Which exponentials eq. 1 needs: those of both scales, or of one (s = 1, alpha = 0 or beta = 0).
struct Exponentials {
  bool both;
  double scale;  // of the only one
  explicit Exponentials(const Problem& p)
      : both(p.alpha != 0 && p.beta != 0 && p.s != 1), scale(p.alpha != 0 && p.beta == 0 ? p.s : 1.0) {}
};

// Neighbouring classes, more than which take the row walk: from there on transposing tiles costs more than reducing
// rows. Backward needs a whole vector.
constexpr int kTileMostClassesForward = 128, kTileMostClassesBackward = 16;

inline bool use_row_walk(const Problem& p, int tile_most) { return p.strides.classes == 1 && p.classes > tile_most; }

template <typename A>
using Scale = typename VectorMath<A>::Scale;

template <typename A>
constexpr A infinity() {
  return std::numeric_limits<A>::infinity();
}

// ---- eq. 1
// -----------------------------------------------------------------------------------------------------------

// Statistics of up to kTileRows rows, and their labels (kIgnored where a row is not kept).
template <typename A>
struct alignas(64) Rows {
  A m[kTileRows], t1[kTileRows], t2[kTileRows], z_y[kTileRows];
  int32_t y[kTileRows];
};

// The exponent of what turns sums relative to m into sums relative to next >= m; 0 where both are -inf.
template <typename M>
inline typename M::Value change_of(typename M::Value m, typename M::Value next) {
  return M::select(m == next, M::of(0), m - next);
}

template <typename M, bool both>
struct Sums {
  using V = typename M::Value;
  V t1 = M::of(0), t2 = M::of(0);

  inline void add(V d, typename M::Scale s) {
    if (both) {
      t1 += M::exp(d);
      t2 += M::exp(d, s);
    } else {
      t1 += M::exp(d, s);
    }
  }
  inline void rescale(V change, typename M::Scale s) {
    if (both) {
      t1 *= M::exp(change);
      t2 *= M::exp(change, s);
    } else {
      t1 *= M::exp(change, s);
    }
  }
  template <typename A>
  inline void store_to(Rows<A>& rows, int64_t lane) const {
    store(&rows.t1[lane], t1);
    store(&rows.t2[lane], both ? t2 : t1);
  }
};

// Rows of few classes, a lane a row; class j of row `lane` is z[j * stride + lane], in memory or staged. Each class
// asks all rows whether it is their target: cheaper than writing -inf for the targets one by one.
template <typename S, typename A, bool both>
void compared_statistics(const S* z, int64_t stride, int64_t classes, Scale<A> s, int64_t count, Rows<A>& rows) {
  using M = VectorMath<A>;
  using V = typename M::Value;
  using Mask = typename M::Mask;
  for (int64_t lane = 0; lane < count; lane += M::kLanes, z += M::kLanes) {
    const Mask y = M::load_labels(&rows.y[lane]);
    V m = M::of(-infinity<A>()), z_y = M::of(0);
    for (int64_t j = 0; j < classes; j++) {
      const V value = load(z + j * stride);
      const Mask is_target = y == Mask{} + int32_t(j);
      m = M::select(is_target, m, M::max(value, m));
      z_y = M::select(is_target, value, z_y);
    }
    const V anchor = M::select(m == M::of(-infinity<A>()), M::of(0), m);
    Sums<M, both> sums;
    for (int64_t j = 0; j < classes; j++) {
      const Mask is_target = y == Mask{} + int32_t(j);
      sums.add(M::select(is_target, M::of(-infinity<A>()), load(z + j * stride) - anchor), s);
    }
    sums.store_to(rows, lane);
    store(&rows.m[lane], m);
    store(&rows.z_y[lane], z_y);
  }
}

// The tile walk: `count` rows from `z`, which one stride connects; a lane a row.
template <typename T, typename A, bool both>
void tile_statistics(const Problem& p, Scale<A> s, const T* z, int64_t count, A* staged, Rows<A>& rows) {
  using M = VectorMath<A>;
  using V = typename M::Value;
  const Tile<const T> tile(z, p.logits_end, p.strides, p.classes, count);
  if (p.classes <= kComparedClasses) {
    if (tile.is_whole_vectors(M::kLanes)) {
      return compared_statistics<T, A, both>(tile.z, tile.class_stride, p.classes, s, count, rows);
    }
    stage_tile(tile, 0, p.classes, staged);
    return compared_statistics<A, A, both>(staged, kTileRows, p.classes, s, count, rows);
  }
  const int64_t chunk_size = balanced_chunk(p.classes);
  for (int64_t first = 0; first < p.classes; first += chunk_size) {
    const int64_t chunk = p.classes - first < chunk_size ? p.classes - first : chunk_size;
    stage_tile(tile, first, chunk, staged);
    for (int64_t lane = 0; lane < count; lane++) {
      const int64_t j = rows.y[lane] - first;
      if (j < 0 || j >= chunk) continue;
      rows.z_y[lane] = staged[j * kTileRows + lane];
      staged[j * kTileRows + lane] = -infinity<A>();
    }
    for (int64_t lane = 0; lane < count; lane += M::kLanes) {
      const A* const competitors = staged + lane;
      const V m = first ? load(&rows.m[lane]) : M::of(-infinity<A>());
      V next = m;
      for (int64_t j = 0; j < chunk; j++) next = M::max(load(competitors + j * kTileRows), next);
      const V anchor = M::select(next == M::of(-infinity<A>()), M::of(0), next);
      Sums<M, both> sums;
      if (first) {
        sums = {load(&rows.t1[lane]), load(&rows.t2[lane])};
        sums.rescale(change_of<M>(m, next), s);
      }
      for (int64_t j = 0; j < chunk; j++) sums.add(load(competitors + j * kTileRows) - anchor, s);
      sums.store_to(rows, lane);
      store(&rows.m[lane], next);
    }
  }
}

// A chunk of a row in vectors of competitors: those in memory without the target's, which is replaced by one whose
// target is -inf, and a tail that is filled up with -inf.
template <typename T, typename A>
class Competitors {
  using M = VectorMath<A>;
  using V = typename M::Value;
  static constexpr int kLanes = M::kLanes, kUnroll = 4;

 public:
  // `target` is its place in the chunk, or outside.
  Competitors(const T* z, int64_t count, int64_t target)
      : z_(z), whole_(count / kLanes * kLanes), gap_(whole_), extra_{M::of(-infinity<A>()), M::of(-infinity<A>())} {
    const auto lanes = lane_numbers<M>();
    const auto number = [&](int64_t lane) { return lanes - lanes + decltype(lanes[0] + 0)(lane); };
    const bool known = uint64_t(target) < uint64_t(count);
    if (known && target < whole_) {
      gap_ = target / kLanes * kLanes;
      extra_[0] = M::select(lanes == number(target - gap_), extra_[0], load(z + gap_));
    }
    if (whole_ < count) {  // the last lanes of a vector that ends with the chunk, or the first of one that does not
      const int64_t rest = count - whole_, begin = whole_ ? count - kLanes : 0, first = whole_ ? kLanes - rest : 0;
      const V tail = whole_ ? load(z + begin) : load_some(z, rest);
      const auto out = (lanes < number(first)) | (lanes >= number(first + rest)) |
                       (lanes == number(known ? target - begin : kLanes));
      extra_[1] = M::select(out, extra_[1], tail);
    }
  }

  A largest(A m) const {
    V most[kUnroll];
    for (int u = 0; u < kUnroll; u++) most[u] = M::of(m);
    for (const auto& [first, last] : ranges()) {
      int64_t j = first;
      for (; j + kUnroll * kLanes <= last; j += kUnroll * kLanes) {
        for (int u = 0; u < kUnroll; u++) most[u] = M::max(load(z_ + j + u * kLanes), most[u]);
      }
      for (; j < last; j += kLanes) most[0] = M::max(load(z_ + j), most[0]);
    }
    for (int k = 0; k < 2; k++) most[k + 1] = M::max(extra_[k], most[k + 1]);
    return M::largest(M::max(M::max(most[0], most[1]), M::max(most[2], most[3])));
  }

  // `ahead` follows in memory, in this row or the next: it arrives while the exponentials are busy.
  template <bool both>
  void add_to(Sums<M, both>& sums, V anchor, Scale<A> s, const T* ahead) const {
    for (const auto& [first, last] : ranges()) {
      for (int64_t j = first; j < last; j += kLanes) {
        __builtin_prefetch(ahead + j);
        sums.add(load(z_ + j) - anchor, s);
      }
    }
    for (const V& extra : extra_) sums.add(extra - anchor, s);
  }

 private:
  struct Range {
    int64_t first, last;
  };
  struct Ranges {
    Range range[2];
    const Range* begin() const { return range; }
    const Range* end() const { return range + 2; }
  };
  Ranges ranges() const { return {{{0, gap_}, {gap_ + kLanes, whole_}}}; }
  const T* z_;
  int64_t whole_, gap_;  // gap_: where the target's vector is left out; whole_ if it is not there
  V extra_[2];
};

// The row walk: one row of neighbouring classes; a lane a class.
template <typename T, typename A, bool both>
void row_statistics(const Problem& p, Scale<A> s, const T* z, int64_t lane, Rows<A>& rows) {
  using M = VectorMath<A>;
  A m = -infinity<A>();
  Sums<M, both> sums;
  for (int64_t first = 0; first < p.classes; first += kRowChunk) {
    const int64_t chunk = p.classes - first < kRowChunk ? p.classes - first : kRowChunk;
    const int64_t target = rows.y[lane] - first;
    if (target >= 0 && target < chunk) rows.z_y[lane] = load_some(z + first + target, 1)[0];
    const Competitors<T, A> competitors(z + first, chunk, target);
    const A next = competitors.largest(m);
    if (first) sums.rescale(change_of<M>(M::of(m), M::of(next)), s);
    competitors.add_to(sums, M::of(next == -infinity<A>() ? A(0) : next), s, z + first + chunk);
    m = next;
  }
  rows.m[lane] = m;
  rows.t1[lane] = M::sum(sums.t1);
  rows.t2[lane] = both ? M::sum(sums.t2) : rows.t1[lane];
}

// Eq. 1 alone, over a slice of the classes. Every row is walked, with or without its target in the slice.
template <typename T, typename A, bool both>
void statistics_rows(const StatisticsArguments& p, Scale<A> scale, int64_t begin, int64_t end) {
  const bool row_walk = use_row_walk(p, kTileMostClassesForward);
  alignas(64) A staged[kTileRows * kTileClasses];
  Rows<A> rows = {};
  for (Walk walk(p, begin, end); walk.count; walk.advance()) {
    const int64_t row = walk.row, count = walk.count;
    for (int64_t lane = 0; lane < count; lane++) {
      const int64_t y = p.target[row + lane], local = y - p.first_class;
      rows.y[lane] = y != p.ignore_index && uint64_t(local) < uint64_t(p.classes) ? int32_t(local) : kIgnored;
      rows.z_y[lane] = 0;
    }
    const T* const z = static_cast<const T*>(p.logits) + walk.offset(p.strides);
    if (row_walk) {
      for (int64_t lane = 0; lane < count; lane++) {
        row_statistics<T, A, both>(p, scale, z + lane * p.strides.inner, lane, rows);
      }
    } else {
      tile_statistics<T, A, both>(p, scale, z, count, staged, rows);
    }
    const A* const found[4] = {rows.m, rows.t1, rows.t2, rows.z_y};
    for (int k = 0; k < 4; k++) {
      A* const saved = static_cast<A*>(p.statistics) + k * p.rows + row;
      for (int64_t lane = 0; lane < count; lane++) saved[lane] = found[k][lane];
    }
  }
}

template <typename T>
void statistics(const StatisticsArguments& p, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const FlushSubnormals flush;
  const Exponentials exponentials(p);
  if (exponentials.both) {
    statistics_rows<T, A, true>(p, Scale<A>(A(p.s)), begin, end);
  } else {
    statistics_rows<T, A, false>(p, Scale<A>(A(exponentials.scale)), begin, end);
  }
}

// ---- eq. 2 to 7, a vector of rows at a time
// ---------------------------------------------------------------------------

// A block's sums, a lane each, so that they add up in vectors and in one order.
template <typename A>
struct LaneSums {
  static constexpr int kLanes = VectorMath<A>::kLanes;
  double ldam[kLanes] = {}, focal[kLanes] = {}, weight[kLanes] = {};

  void add_to(Partial& partial) const {
    for (int lane = 0; lane < kLanes; lane++) {
      partial.ldam += ldam[lane];
      partial.focal += focal[lane];
      partial.weight += weight[lane];
    }
  }
};

template <typename V>
inline void accumulate(double* sums, V values) {
  for (int lane = 0; lane < int(sizeof(V) / sizeof(values[0])); lane++) sums[lane] += double(values[lane]);
}

// Margins or class weights by label; a table that is not there holds `absent`.
template <typename A>
class Lookup {
  using M = VectorMath<A>;
  using V = typename M::Value;

 public:
  Lookup(const void* table, int64_t classes, A absent) : table_(static_cast<const A*>(table)) {
    A values[2 * M::kLanes];
    for (A& value : values) value = absent;
    in_registers_ = !table || classes <= M::kRegisterTable;
    for (int64_t j = 0; table && in_registers_ && j < classes; j++) values[j] = table_[j];
    low_ = load(values);
    high_ = load(values + M::kLanes);
  }
  inline V operator()(typename M::Mask y) const {
    if (!table_) return low_;
    return in_registers_ ? M::permute(low_, high_, y) : M::gather(table_, y);
  }

 private:
  const A* table_;
  bool in_registers_;
  V low_, high_;
};

template <typename A>
struct Tables {
  Lookup<A> margins, ldam_weight, focal_weight;
  explicit Tables(const ForwardArguments& p)
      : margins(p.margins, p.classes, 0),
        ldam_weight(p.ldam_weight, p.classes, 1),
        focal_weight(p.focal_weight, p.classes, 1) {}
};

// Flat, since a call inside moves whole vectors through memory.
template <typename A>
__attribute__((flatten)) void finish_rows(const ForwardArguments& p, const Options<A>& o, const Tables<A>& tables,
                                          int64_t row, int64_t count, Rows<A>& rows, LaneSums<A>& sums) {
  using M = VectorMath<A>;
  using W = WideMath<M>;
  static_assert(kTileRows % W::kLanes == 0);
  const auto zero = W::of(0);
  for (int64_t lane = count; lane % W::kLanes; lane++) rows.y[lane] = kIgnored;
  for (int64_t first = 0; first < count; first += W::kLanes) {
    const auto y = each([&](int i) { return M::load_labels(&rows.y[first + i * M::kLanes]); });
    const auto ignored = each([&](int i) { return y.v[i] < 0; });
    const auto look_up = [&](const Lookup<A>& table) {
      return each([&](int i) { return table(ignored.v[i] ? y.v[i] - y.v[i] : y.v[i]); });
    };
    const auto m = load_wide(&rows.m[first]);
    const auto anchor = W::select(m == W::of(-infinity<A>()), zero, m);
    const Statistics<W> statistics = {anchor, load_wide(&rows.t1[first]), load_wide(&rows.t2[first]),
                                      load_wide(&rows.z_y[first])};
    const Gap<W> gap(statistics, ignored);
    Term<W> focal = {zero, zero, zero}, ldam = focal;
    if (o.beta != 0) {
      focal = focal_term<W>(gap, statistics.t1, look_up(tables.focal_weight), o);
      accumulate(sums.focal, sum_parts(focal.loss));
    }
    if (o.alpha != 0) {
      const auto w_ldam = look_up(tables.ldam_weight);
      ldam = ldam_term<W>(gap, statistics.t2, look_up(tables.margins), w_ldam, o);
      accumulate(sums.ldam, sum_parts(ldam.loss));
      accumulate(sums.weight, sum_parts(W::select(ignored, zero, w_ldam)));
    }
    const int64_t left = count - first;
    A* const stats = static_cast<A*>(p.stats) + row + first;
    store_wide(stats, anchor, left);
    store_wide(stats + p.rows, focal.c, left);
    store_wide(stats + 2 * p.rows, ldam.c, left);
    store_wide(stats + 3 * p.rows, focal.g, left);
    store_wide(stats + 4 * p.rows, ldam.g, left);
    if (p.row_loss) {
      store_wide(static_cast<A*>(p.row_loss) + row + first, o.alpha * ldam.loss + o.beta * focal.loss, left);
    }
  }
}

template <typename A>
void read_labels(const ForwardArguments& p, int64_t row, int64_t count, Rows<A>& rows, Partial& partial) {
  int64_t kept = 0, bad = 0;
  for (int64_t lane = 0; lane < count; lane++) {
    const int64_t y = p.target[row + lane];
    const bool ignored = y == p.ignore_index, inside = uint64_t(y) < uint64_t(p.classes);
    rows.y[lane] = !ignored & inside ? int32_t(y) : kIgnored;
    kept += !ignored;
    bad += !ignored & !inside;
  }
  partial.kept += kept;
  for (int64_t lane = 0; bad && partial.bad_row < 0; lane++) {
    const int64_t y = p.target[row + lane];
    if (y != p.ignore_index && uint64_t(y) >= uint64_t(p.classes)) partial.bad_row = row + lane;
  }
}

// Each block of rows has a partial sum of its own, so that their sum does not depend on the number of threads.
template <typename T, typename A, bool both>
void forward_rows(const ForwardArguments& p, Scale<A> scale, int64_t begin, int64_t end, int64_t rows_per_block,
                  Partial* partials) {
  const Options<A> options = {A(p.alpha), A(p.beta), A(p.gamma), A(p.s)};
  const Tables<A> tables(p);
  const bool row_walk = use_row_walk(p, kTileMostClassesForward);
  alignas(64) A staged[kTileRows * kTileClasses];
  Rows<A> rows = {};
  for (int64_t first = begin; first < end; first += rows_per_block, partials++) {
    LaneSums<A> sums;
    const int64_t last = end - first < rows_per_block ? end : first + rows_per_block;
    for (Walk walk(p, first, last); walk.count; walk.advance()) {
      const int64_t row = walk.row, count = walk.count;
      read_labels(p, row, count, rows, *partials);
      const T* const z = static_cast<const T*>(p.logits) + walk.offset(p.strides);
      if (row_walk) {
        for (int64_t lane = 0; lane < count; lane++) {
          if (rows.y[lane] == kIgnored) continue;
          row_statistics<T, A, both>(p, scale, z + lane * p.strides.inner, lane, rows);
        }
      } else {
        tile_statistics<T, A, both>(p, scale, z, count, staged, rows);
      }
      finish_rows(p, options, tables, row, count, rows, sums);
    }
    sums.add_to(*partials);
  }
}

template <typename T>
void forward(const ForwardArguments& p, int64_t begin, int64_t end, int64_t rows_per_block, Partial* partials) {
  using A = typename Accumulate<T>::type;
  const FlushSubnormals flush;
  const Exponentials exponentials(p);
  if (exponentials.both) {
    forward_rows<T, A, true>(p, Scale<A>(A(p.s)), begin, end, rows_per_block, partials);
  } else {
    forward_rows<T, A, false>(p, Scale<A>(A(exponentials.scale)), begin, end, rows_per_block, partials);
  }
}

// ---- eq. 8
// ------------------------------------------------------------------------------------------------------------

// r1 c1 and r2 c2 of up to kTileRows rows (their sum in rc1 when there is one exponential), and -(r1 g1 + r2 g2).
template <typename A>
struct alignas(64) Coefficients {
  A m[kTileRows], rc1[kTileRows], rc2[kTileRows], at_target[kTileRows];
  A live[kTileRows];  // 0 where the row's gradient is a stored zero, whatever its logits hold
};

template <typename A, bool both>
void read_coefficients(const BackwardArguments& p, int64_t row, int64_t count, Coefficients<A>& c) {
  using M = VectorMath<A>;
  using V = typename M::Value;
  const V zero = M::of(0);
  const A* const grad_output = static_cast<const A*>(p.grad_output);
  V r1 = M::of(*grad_output / A(p.focal_denominator)), r2 = M::of(*grad_output / A(p.ldam_denominator));
  for (int64_t lane = 0; lane < count; lane += M::kLanes) {
    const auto read = [&](int k) {
      const A* const stats = static_cast<const A*>(p.stats) + k * p.rows + row + lane;
      return count - lane >= M::kLanes ? load(stats) : load_some(stats, count - lane);
    };
    if (p.grad_output_stride) {  // reduction none, without denominators
      r1 = r2 = count - lane >= M::kLanes ? load(grad_output + row + lane)
                                          : load_some(grad_output + row + lane, count - lane);
    }
    const V c1 = read(1), c2 = read(2);
    // A silent term contributes 0 even where its denominator is 0.
    const V k1 = M::select(c1 == zero, zero, r1 * c1), k2 = M::select(c2 == zero, zero, r2 * c2);
    const V g1 = M::select(c1 == zero, zero, r1 * read(3)), g2 = M::select(c2 == zero, zero, r2 * read(4));
    store(&c.m[lane], read(0));
    store(&c.rc1[lane], both ? k1 : k1 + k2);
    store(&c.rc2[lane], k2);
    store(&c.at_target[lane], -(g1 + g2));
    store(&c.live[lane], M::select((c1 == zero) & (c2 == zero), zero, M::of(1)));
  }
}

// The gradient at a competitor. At the target, where d may be positive, it is meaningless and overwritten.
template <typename M, bool both>
inline typename M::Value competitor_gradient(typename M::Value d, typename M::Value rc1, typename M::Value rc2,
                                             typename M::Scale s) {
  return both ? rc1 * M::exp(d) + rc2 * M::exp(d, s) : rc1 * M::exp(d, s);
}

// Classes first, first + 1, ... of whole vectors of rows, in memory or staged: class first + j of row `lane` is
// z[j * stride + lane]. `grad` may be `z`. Labels y count from class 0.
template <typename S, typename G, typename A, bool both>
void class_gradients(const S* z, int64_t stride, G* grad, int64_t grad_stride, int64_t first, int64_t classes,
                     Scale<A> s, int64_t count, const Coefficients<A>& c, const int32_t* y) {
  using M = VectorMath<A>;
  using V = typename M::Value;
  for (int64_t j = 0; j < classes; j++) {
    const S* const from = z + j * stride;
    G* const to = grad + j * grad_stride;
    for (int64_t lane = 0; lane < count; lane += M::kLanes) {
      // The next tile continues here; with as many streams as classes no hardware foresees that.
      __builtin_prefetch(from + kTileRows + lane);
      __builtin_prefetch(to + kTileRows + lane, 1);
      const V d = load(from + lane) - load(&c.m[lane]);
      const V value = competitor_gradient<M, both>(d, load(&c.rc1[lane]), load(&c.rc2[lane]), s);
      store(to + lane, M::select(load(&c.live[lane]) == M::of(0), M::of(0), value));
    }
  }
  for (int64_t lane = 0; lane < count; lane++) {
    const int64_t j = y[lane] - first;
    if (y[lane] == kIgnored || c.live[lane] == 0 || j < 0 || j >= classes) continue;
    store_some(grad + j * grad_stride + lane, M::of(c.at_target[lane]), 1);
  }
}

// The same for all of a few classes, as in compared_statistics. `streamed` stores pass the caches: with as many streams
// of writes as classes, fetching what is to be overwritten takes longer than the kernel.
template <typename S, typename G, typename A, bool both>
void compared_gradients(const S* z, int64_t stride, G* grad, int64_t grad_stride, int64_t classes, Scale<A> s,
                        int64_t count, const Coefficients<A>& c, const int32_t* y, bool streamed) {
  using M = VectorMath<A>;
  using V = typename M::Value;
  using Mask = typename M::Mask;
  for (int64_t lane = 0; lane < count; lane += M::kLanes, z += M::kLanes, grad += M::kLanes) {
    const V m = load(&c.m[lane]), rc1 = load(&c.rc1[lane]), rc2 = load(&c.rc2[lane]);
    const V at_target = load(&c.at_target[lane]);
    const Mask silent = load(&c.live[lane]) == M::of(0), target = M::load_labels(&y[lane]);
    for (int64_t j = 0; j < classes; j++) {
      const V competitor = competitor_gradient<M, both>(load(z + j * stride) - m, rc1, rc2, s);
      const V value = M::select(target == Mask{} + int32_t(j), at_target, competitor);
      const V result = M::select(silent, M::of(0), value);
      if (streamed) {
        stream(grad + j * grad_stride, result);
      } else {
        store(grad + j * grad_stride, result);
      }
    }
  }
}

template <typename T, typename A, bool both>
void tile_gradient(const BackwardArguments& p, Scale<A> s, int64_t row, const T* z, T* to, int64_t count, A* staged,
                   const Coefficients<A>& c) {
  const Tile<const T> logits(z, p.logits_end, p.strides, p.classes, count);
  const Tile<T> grad(to, nullptr, p.grad_strides, p.classes, count);
  const bool compared = p.classes <= kComparedClasses;
  const int64_t stride = logits.class_stride, grad_stride = grad.class_stride;
  alignas(64) int32_t y[kTileRows];
  for (int64_t lane = 0; lane < count; lane++) {
    const int64_t label = p.target[row + lane];
    y[lane] = uint64_t(label) < uint64_t(p.classes) ? int32_t(label) : kIgnored;
  }
  if (logits.is_whole_vectors(VectorMath<A>::kLanes) && grad.is_whole_vectors(VectorMath<A>::kLanes)) {
    if (compared) {
      const bool streamed = p.stream_grad && is_aligned(to) && is_aligned(to + grad_stride);
      compared_gradients<T, T, A, both>(z, stride, to, grad_stride, p.classes, s, count, c, y, streamed);
    } else {
      class_gradients<T, T, A, both>(z, stride, to, grad_stride, 0, p.classes, s, count, c, y);
    }
    return;
  }
  const int64_t chunk_size = balanced_chunk(p.classes);
  for (int64_t first = 0; first < p.classes; first += chunk_size) {
    const int64_t chunk = p.classes - first < chunk_size ? p.classes - first : chunk_size;
    stage_tile(logits, first, chunk, staged);
    if (compared) {
      compared_gradients<A, A, A, both>(staged, kTileRows, staged, kTileRows, chunk, s, count, c, y, false);
    } else {
      class_gradients<A, A, A, both>(staged, kTileRows, staged, kTileRows, first, chunk, s, count, c, y);
    }
    write_tile(grad, first, chunk, staged);
  }
}

template <typename T, typename A, bool both>
void row_gradient(const BackwardArguments& p, Scale<A> s, int64_t y, const T* z, T* grad, int64_t lane,
                  const Coefficients<A>& c) {
  using M = VectorMath<A>;
  using V = typename M::Value;
  constexpr int kLanes = M::kLanes;
  const int64_t whole = p.classes / kLanes * kLanes, last = p.classes - kLanes;
  if (c.live[lane] == 0) {
    for (int64_t j = 0; j < whole; j += kLanes) store(grad + j, M::of(0));
    store_some(grad + whole, M::of(0), p.classes - whole);
    return;
  }
  const V m = M::of(c.m[lane]), rc1 = M::of(c.rc1[lane]), rc2 = M::of(c.rc2[lane]);
  // The vector that ends with the row may overlap the one before: read while it holds logits, written afterwards.
  V tail = m;
  if (whole < p.classes) tail = competitor_gradient<M, both>(load(z + last) - m, rc1, rc2, s);
  for (int64_t j = 0; j < whole; j += kLanes) {
    store(grad + j, competitor_gradient<M, both>(load(z + j) - m, rc1, rc2, s));
  }
  if (whole < p.classes) store(grad + last, tail);
  // In no class here where the classes are a slice. Forward looked at the labels, but not necessarily at these: one
  // that was changed since then must not write elsewhere.
  if (uint64_t(y) < uint64_t(p.classes)) store_some(grad + y, M::of(c.at_target[lane]), 1);
}

template <typename T, typename A, bool both>
void backward_rows(const BackwardArguments& p, Scale<A> scale, int64_t begin, int64_t end) {
  const bool row_walk = use_row_walk(p, kTileMostClassesBackward) && p.grad_strides.classes == 1;
  alignas(64) A staged[kTileRows * kTileClasses];
  Coefficients<A> coefficients = {};
  for (Walk walk(p, begin, end); walk.count; walk.advance()) {
    const int64_t row = walk.row, count = walk.count;
    const T* const z = static_cast<const T*>(p.logits) + walk.offset(p.strides);
    T* const grad = static_cast<T*>(p.grad_logits) + walk.offset(p.grad_strides);
    read_coefficients<A, both>(p, row, count, coefficients);
    if (row_walk) {
      for (int64_t lane = 0; lane < count; lane++) {
        row_gradient<T, A, both>(p, scale, p.target[row + lane], z + lane * p.strides.inner,
                                 grad + lane * p.grad_strides.inner, lane, coefficients);
      }
    } else {
      tile_gradient<T, A, both>(p, scale, row, z, grad, count, staged, coefficients);
    }
  }
}

template <typename T>
void backward(const BackwardArguments& p, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const FlushSubnormals flush;
  const Exponentials exponentials(p);
  if (exponentials.both) {
    backward_rows<T, A, true>(p, Scale<A>(A(p.s)), begin, end);
  } else {
    backward_rows<T, A, false>(p, Scale<A>(A(exponentials.scale)), begin, end);
  }
  if (p.stream_grad) fence();
}

}  // namespace LMF_ISA
}  // namespace lmf

#define LMF_KERNELS_OF(FUNCTION)                                                               \
  {lmf::LMF_ISA::FUNCTION<lmf::LMF_ISA::Half>, lmf::LMF_ISA::FUNCTION<lmf::LMF_ISA::BFloat16>, \
   lmf::LMF_ISA::FUNCTION<float>, lmf::LMF_ISA::FUNCTION<double>}
#define LMF_KERNEL_TABLE(NAME) {NAME, LMF_KERNELS_OF(forward), LMF_KERNELS_OF(backward), LMF_KERNELS_OF(statistics)}
