// Eq. 8 on the CPU.
#pragma once

#include "lmf_cpu_walk.h"

namespace lmf {
namespace LMF_ISA {

// r1 c1 and r2 c2 of up to kTileRows rows (their sum in rc1 when there is one exponential), and -(r1 g1 + r2 g2).
template <typename A>
struct alignas(64) Coefficients {
  A m[kTileRows], rc1[kTileRows], rc2[kTileRows], grad_y[kTileRows];
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
      return load_some(static_cast<const A*>(p.saved) + k * p.rows + row + lane, count - lane);
    };
    // Reduction none, without denominators.
    if (p.grad_output_stride) r1 = r2 = load_some(grad_output + row + lane, count - lane);
    const V c1 = read(1), c2 = read(2);
    // A silent term contributes 0 even where its denominator is 0.
    const V rc1 = M::select(c1 == zero, zero, r1 * c1), rc2 = M::select(c2 == zero, zero, r2 * c2);
    const V g1 = M::select(c1 == zero, zero, r1 * read(3)), g2 = M::select(c2 == zero, zero, r2 * read(4));
    store(&c.m[lane], read(0));
    store(&c.rc1[lane], both ? rc1 : rc1 + rc2);
    store(&c.rc2[lane], rc2);
    store(&c.grad_y[lane], -(g1 + g2));
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
    store_some(grad + j * grad_stride + lane, M::of(c.grad_y[lane]), 1);
  }
}

// The same for all of a few classes, as in compared_sums. `streamed` stores pass the caches: with as many streams
// of writes as classes, fetching what is to be overwritten takes longer than the kernel.
template <typename S, typename G, typename A, bool both>
void compared_gradients(const S* z, int64_t stride, G* grad, int64_t grad_stride, int64_t classes, Scale<A> s,
                        int64_t count, const Coefficients<A>& c, const int32_t* y, bool streamed) {
  using M = VectorMath<A>;
  using V = typename M::Value;
  using Mask = typename M::Mask;
  for (int64_t lane = 0; lane < count; lane += M::kLanes, z += M::kLanes, grad += M::kLanes) {
    const V m = load(&c.m[lane]), rc1 = load(&c.rc1[lane]), rc2 = load(&c.rc2[lane]);
    const V grad_y = load(&c.grad_y[lane]);
    const Mask silent = load(&c.live[lane]) == M::of(0), target = M::load_labels(&y[lane]);
    for (int64_t j = 0; j < classes; j++) {
      const V competitor = competitor_gradient<M, both>(load(z + j * stride) - m, rc1, rc2, s);
      const V value = M::select(target == Mask{} + int32_t(j), grad_y, competitor);
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
  if (uint64_t(y) < uint64_t(p.classes)) store_some(grad + y, M::of(c.grad_y[lane]), 1);
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
