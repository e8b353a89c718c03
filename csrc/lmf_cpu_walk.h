// What the CPU kernels have in common: two walks over the logits.
//   Tile: up to kTileRows rows at a time, a lane a row, classes one after the other. For few classes and for dense
//         prediction, where neighbouring rows are neighbours in memory (lmf_cpu_tile.h moves them in and out).
//   Row:  one row at a time, a lane a class. For many classes that are neighbours in memory.
#pragma once

#include "lmf_cpu_tile.h"
#include "simd.h"

namespace lmf {
namespace LMF_ISA {

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

}  // namespace LMF_ISA
}  // namespace lmf
