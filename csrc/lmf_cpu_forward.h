// Eq. 2 to 7 on the CPU, some vectors of rows at a time, and the sums of their losses.
#pragma once

#include "lmf_cpu_row_sums.h"
#include "lmf_math.h"
#include "simd_wide.h"

namespace lmf {
namespace LMF_ISA {

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
    const RowSums<W> whole = {anchor, load_wide(&rows.t1[first]), load_wide(&rows.t2[first]),
                              load_wide(&rows.z_y[first])};
    const Gap<W> gap(whole, ignored);
    Term<W> focal = {zero, zero, zero}, ldam = focal;
    if (o.beta != 0) {
      focal = focal_term<W>(gap, whole.t1, look_up(tables.focal_weight), o);
      accumulate(sums.focal, sum_parts(focal.loss));
    }
    if (o.alpha != 0) {
      const auto w_ldam = look_up(tables.ldam_weight);
      ldam = ldam_term<W>(gap, whole.t2, look_up(tables.margins), w_ldam, o);
      accumulate(sums.ldam, sum_parts(ldam.loss));
      accumulate(sums.weight, sum_parts(W::select(ignored, zero, w_ldam)));
    }
    const int64_t left = count - first;
    A* const saved = static_cast<A*>(p.saved) + row + first;
    store_wide(saved, anchor, left);
    store_wide(saved + p.rows, focal.c, left);
    store_wide(saved + 2 * p.rows, ldam.c, left);
    store_wide(saved + 3 * p.rows, focal.g, left);
    store_wide(saved + 4 * p.rows, ldam.g, left);
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
          row_sums<T, A, both>(p, scale, z + lane * p.strides.inner, lane, rows);
        }
      } else {
        tile_sums<T, A, both>(p, scale, z, count, staged, rows);
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

}  // namespace LMF_ISA
}  // namespace lmf
