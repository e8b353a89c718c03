// Moves tiles of logits and gradients, up to kTileRows rows by kTileClasses classes, between memory and a staged
// copy in the accumulation type: staged[class * kTileRows + row], so that a vector holds one class of many rows.
#pragma once

#include "lmf_cpu.h"
#include "simd.h"

namespace lmf {
namespace LMF_ISA {

constexpr int kTileRows = 64;     // also the rows that share one evaluation of lmf_math.h
constexpr int kTileClasses = 64;  // 16 KiB of float are staged at a time

// Chunks of nearly equal size, none above kTileClasses; with two of them each fills more than a vector.
inline int64_t balanced_chunk(int64_t classes) {
  const int64_t chunks = (classes + kTileClasses - 1) / kTileClasses;
  return (classes + chunks - 1) / chunks;
}

// Rows [begin, end) in tiles of at most kTileRows rows that one stride connects; without a division a tile.
class Walk {
 public:
  int64_t row, count;  // of the tile; none is left when the count is 0

  Walk(const Problem& p, int64_t begin, int64_t end)
      : row(begin),
        count(0),
        end_(end),
        inner_size_(p.inner_size),
        outer_(begin / p.inner_size),
        inner_(begin % p.inner_size) {
    measure();
  }
  // Of the tile's first row, in elements.
  int64_t offset(const Strides& strides) const { return outer_ * strides.outer + inner_ * strides.inner; }
  void advance() {
    row += count;
    inner_ += count;
    if (inner_ == inner_size_) {
      inner_ = 0;
      outer_++;
    }
    measure();
  }

 private:
  void measure() {
    const int64_t connected = inner_size_ - inner_, left = end_ - row;
    count = connected < left ? connected : left;
    if (count > kTileRows) count = kTileRows;
  }
  const int64_t end_, inner_size_;
  int64_t outer_, inner_;
};

// Rows that one stride connects, and all their classes.
template <typename T>
struct Tile {
  T* z;             // row 0, class 0
  const void* end;  // of the tensor's memory; null where nothing may be touched beyond a row
  int64_t class_stride, row_stride, classes, rows;

  Tile(T* z, const void* end, const Strides& strides, int64_t classes, int64_t rows)
      : z(z), end(end), class_stride(strides.classes), row_stride(strides.inner), classes(classes), rows(rows) {}

  bool rows_are_neighbours() const { return row_stride == 1; }
  bool is_whole_vectors(int lanes) const { return rows_are_neighbours() && rows % lanes == 0; }
  bool classes_are_neighbours() const { return class_stride == 1; }
};

// Applies `function(class)` to the first class of each square of kLanes classes in a chunk. The last square ends with
// the chunk and may overlap the one before; a chunk of fewer classes is one square that sticks out.
template <int kLanes, typename Function>
inline void for_squares(int64_t chunk, const Function& function) {
  for (int64_t j = 0; j < chunk; j += kLanes) function(j + kLanes <= chunk || chunk < kLanes ? j : chunk - kLanes);
}

template <typename T>
inline void stage_contiguous_classes(const Tile<const T>& tile, int64_t first, int64_t chunk,
                                     typename Accumulate<T>::type* staged) {
  using M = VectorMath<typename Accumulate<T>::type>;
  for (int64_t lane = 0; lane < tile.rows; lane += M::kLanes) {
    for_squares<M::kLanes>(chunk, [&](int64_t j) {
      typename M::Value square[M::kLanes];
      const T* const z = tile.z + lane * tile.row_stride + first + j;
      const int64_t rows = tile.rows - lane;
      // Fewer classes than lanes: a whole vector reaches into the next rows, which must exist.
      const T* const last = z + (M::kLanes - 1) * tile.row_stride;
      if (rows >= M::kLanes && (chunk >= M::kLanes || static_cast<const void*>(last + M::kLanes) <= tile.end)) {
#pragma GCC unroll 16
        for (int i = 0; i < M::kLanes; i++) square[i] = load(z + i * tile.row_stride);
      } else {
        for (int i = 0; i < M::kLanes; i++) square[i] = load_some(z + i * tile.row_stride, i < rows ? chunk - j : 0);
      }
      transpose<M>(square);
#pragma GCC unroll 16
      for (int i = 0; i < M::kLanes; i++) store(staged + (j + i) * kTileRows + lane, square[i]);
    });
  }
}

template <typename T>
inline void write_contiguous_classes(const Tile<T>& tile, int64_t first, int64_t chunk,
                                     const typename Accumulate<T>::type* staged) {
  using M = VectorMath<typename Accumulate<T>::type>;
  const bool dense = tile.row_stride == tile.classes;
  for (int64_t lane = 0; lane < tile.rows; lane += M::kLanes) {
    for_squares<M::kLanes>(chunk, [&](int64_t j) {
      typename M::Value square[M::kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < M::kLanes; i++) square[i] = load(staged + (j + i) * kTileRows + lane);
      transpose<M>(square);
      T* const z = tile.z + lane * tile.row_stride + first + j;
      const int64_t rows = tile.rows - lane;
      // Fewer classes than lanes: a whole vector may spill into rows of this tile that are written later.
      const bool spill = dense && (M::kLanes - 1) * tile.classes + M::kLanes <= rows * tile.classes;
      if (rows >= M::kLanes && (chunk >= M::kLanes || spill)) {
#pragma GCC unroll 16
        for (int i = 0; i < M::kLanes; i++) store(z + i * tile.row_stride, square[i]);
      } else {
        for (int i = 0; i < M::kLanes && i < rows; i++) store_some(z + i * tile.row_stride, square[i], chunk - j);
      }
    });
  }
}

// Fills staged[class - first][row]; rows beyond the tile's hold something finite or other.
template <typename T>
void stage_tile(const Tile<const T>& tile, int64_t first, int64_t chunk, typename Accumulate<T>::type* staged) {
  using M = VectorMath<typename Accumulate<T>::type>;
  if (tile.classes_are_neighbours() && !tile.rows_are_neighbours()) {
    return stage_contiguous_classes<T>(tile, first, chunk, staged);
  }
  const int64_t whole = tile.rows_are_neighbours() ? tile.rows / M::kLanes * M::kLanes : 0;
  for (int64_t j = 0; j < chunk; j++) {
    const T* z = tile.z + (first + j) * tile.class_stride;
    for (int64_t lane = 0; lane < whole; lane += M::kLanes) {
      // The next tile continues here; with as many streams as classes no hardware foresees that.
      __builtin_prefetch(z + kTileRows + lane);
      store(staged + j * kTileRows + lane, load(z + lane));
    }
    for (int64_t lane = whole; lane < tile.rows; lane += M::kLanes) {
      T lanes[M::kLanes] = {};
      for (int i = 0; i < M::kLanes && lane + i < tile.rows; i++) lanes[i] = z[(lane + i) * tile.row_stride];
      store(staged + j * kTileRows + lane, load(lanes));
    }
  }
}

template <typename T>
void write_tile(const Tile<T>& tile, int64_t first, int64_t chunk, const typename Accumulate<T>::type* staged) {
  using M = VectorMath<typename Accumulate<T>::type>;
  if (tile.classes_are_neighbours() && !tile.rows_are_neighbours()) {
    return write_contiguous_classes<T>(tile, first, chunk, staged);
  }
  const int64_t whole = tile.rows_are_neighbours() ? tile.rows / M::kLanes * M::kLanes : 0;
  for (int64_t j = 0; j < chunk; j++) {
    T* z = tile.z + (first + j) * tile.class_stride;
    for (int64_t lane = 0; lane < whole; lane += M::kLanes) {
      __builtin_prefetch(z + kTileRows + lane, 1);
      store(z + lane, load(staged + j * kTileRows + lane));
    }
    for (int64_t lane = whole; lane < tile.rows; lane += M::kLanes) {
      T lanes[M::kLanes];
      store(lanes, load(staged + j * kTileRows + lane));
      for (int i = 0; i < M::kLanes && lane + i < tile.rows; i++) z[(lane + i) * tile.row_stride] = lanes[i];
    }
  }
}

}  // namespace LMF_ISA
}  // namespace lmf
