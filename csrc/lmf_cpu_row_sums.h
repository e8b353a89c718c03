// Eq. 1 on the CPU: m, T1 and T2 of rows, and the logit of their target.
//
// Inner loops know only competitors: the target's own logit is -inf for them. Logits are read from memory once,
// whatever C is: a chunk lies in L1 for its largest logit and then for its exponentials, and chunks are combined
// online. Tiles of many classes are staged, since lines of many planes push each other out of the cache.
#pragma once

#include "lmf_cpu_walk.h"

namespace lmf {
namespace LMF_ISA {

constexpr int kRowChunk = kTileRows * kTileClasses;  // logits of a row that are combined at a time

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
void compared_sums(const S* z, int64_t stride, int64_t classes, Scale<A> s, int64_t count, Rows<A>& rows) {
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
void tile_sums(const Problem& p, Scale<A> s, const T* z, int64_t count, A* staged, Rows<A>& rows) {
  using M = VectorMath<A>;
  using V = typename M::Value;
  const Tile<const T> tile(z, p.logits_end, p.strides, p.classes, count);
  if (p.classes <= kComparedClasses) {
    if (tile.is_whole_vectors(M::kLanes)) {
      return compared_sums<T, A, both>(tile.z, tile.class_stride, p.classes, s, count, rows);
    }
    stage_tile(tile, 0, p.classes, staged);
    return compared_sums<A, A, both>(staged, kTileRows, p.classes, s, count, rows);
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
  Competitors(const T* z, int64_t count, int64_t target) : z_(z), extra_{M::of(-infinity<A>()), M::of(-infinity<A>())} {
    const int64_t whole = count / kLanes * kLanes;
    const auto lanes = lane_numbers<M>();
    const auto number = [](int64_t lane) { return typename M::Mask{} + int32_t(lane); };
    const bool known = uint64_t(target) < uint64_t(count);
    ranges_[0] = {0, whole};
    ranges_[1] = {whole, whole};
    if (known && target < whole) {
      const int64_t own = target / kLanes * kLanes;
      ranges_[0].last = own;
      ranges_[1].first = own + kLanes;
      extra_[0] = M::select(lanes == number(target - own), extra_[0], load(z + own));
    }
    if (whole < count) {  // the last lanes of a vector that ends with the chunk, or the first of one that does not
      const int64_t rest = count - whole, begin = whole ? count - kLanes : 0, first = whole ? kLanes - rest : 0;
      const V tail = whole ? load(z + begin) : load_some(z, rest);
      const auto out = (lanes < number(first)) | (lanes >= number(first + rest)) |
                       (lanes == number(known ? target - begin : kLanes));
      extra_[1] = M::select(out, extra_[1], tail);
    }
  }

  A largest(A m) const {
    V most[kUnroll];
    for (int u = 0; u < kUnroll; u++) most[u] = M::of(m);
    for (const auto& [first, last] : ranges_) {
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
    for (const auto& [first, last] : ranges_) {
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
  const T* z_;
  Range ranges_[2];  // of whole vectors, before and after the target's
  V extra_[2];
};

// The row walk: one row of neighbouring classes; a lane a class.
template <typename T, typename A, bool both>
void row_sums(const Problem& p, Scale<A> s, const T* z, int64_t lane, Rows<A>& rows) {
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
void sums_rows(const SumsArguments& p, Scale<A> scale, int64_t begin, int64_t end) {
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
        row_sums<T, A, both>(p, scale, z + lane * p.strides.inner, lane, rows);
      }
    } else {
      tile_sums<T, A, both>(p, scale, z, count, staged, rows);
    }
    const A* const found[4] = {rows.m, rows.t1, rows.t2, rows.z_y};
    for (int k = 0; k < 4; k++) {
      A* const saved = static_cast<A*>(p.sums) + k * p.rows + row;
      for (int64_t lane = 0; lane < count; lane++) saved[lane] = found[k][lane];
    }
  }
}

template <typename T>
void sums(const SumsArguments& p, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const FlushSubnormals flush;
  const Exponentials exponentials(p);
  if (exponentials.both) {
    sums_rows<T, A, true>(p, Scale<A>(A(p.s)), begin, end);
  } else {
    sums_rows<T, A, false>(p, Scale<A>(A(exponentials.scale)), begin, end);
  }
}

}  // namespace LMF_ISA
}  // namespace lmf
