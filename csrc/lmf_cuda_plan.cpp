// The shape of the work: which kernel, how many lanes a row and how many blocks. A function of shapes, strides and the
// number of multiprocessors alone, so that sums come out the same in every run.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "lmf_cuda.h"

namespace lmf {
namespace cuda {

constexpr int kVectorBytes = 16;
constexpr int kLaneClasses = 32;   // classes that a lane keeps in registers
constexpr int kMaxLaneBits = 8;    // 256 lanes a row
constexpr int kFewestPixels = 32;  // rows for which reading across rows is worth while
// Blocks that a multiprocessor holds at once, by the registers of the kernels: more of them in a grid whose blocks walk
// over several tiles would wait for a second, emptier turn.
constexpr int kBlocksOfProcessor = 8, kRowsBlocksOfProcessor = 2;

static int bytes_of(Element element) { return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2; }

static int64_t ceil_divide(int64_t n, int64_t d) { return (n + d - 1) / d; }

static int log2_ceil(int64_t n) {
  int bits = 0;
  while ((int64_t{1} << bits) < n) bits++;
  return bits;
}

// Whether every vector of neighbouring rows is aligned: its address, and what leads from it to the others.
static bool aligned(const void* data, const Steps& strides, int64_t stride_c, const Rows& rows, int bytes) {
  const int64_t V = kVectorBytes / bytes;
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && strides.s2 == 1 && stride_c % V == 0 &&
         strides.s1 % V == 0 && strides.s0 % V == 0 && rows.count % V == 0 && (rows.levels == 1 || rows.inner % V == 0);
}

// What forward and backward decide in the same way.
static Launch plan(Work& work, Element element, const Steps& strides, int64_t stride_c, bool flat, bool wide,
                   bool dense, int multiprocessors) {
  const int bytes = bytes_of(element);
  const int64_t rows = work.rows.count;
  // Double precision has one kernel, for two exponentials: fewer instantiations.
  const bool same_rate = element != Element::kDouble && (!work.ldam || !work.focal || work.s == 1);
  const double log2_e = element == Element::kDouble ? 1 : 1.4426950408889634;
  work.rate1 = (work.focal || !same_rate ? 1 : work.s) * log2_e;
  work.rate2 = work.s * log2_e;
  work.chunk = work.classes;
  work.chunks = 1;

  Launch launch{};
  launch.element = element;
  launch.width = 1;
  launch.exponentials = same_rate ? 1 : 2;
  if (strides.s2 < stride_c && rows >= kFewestPixels) {
    launch.regime = Regime::kPixels;
    launch.threads = kPixelsThreads;
    const int64_t V = kVectorBytes / bytes, enough = 2 * multiprocessors, image = std::max<int64_t>(1, work.rows.inner);
    const int64_t tile = kPlaneElements - V, tiles = rows / image * ceil_divide(image, tile);
    int64_t blocks = ceil_divide(rows, kPixelsThreads);
    if (wide && bytes < 8 && rows >= V * kPixelsThreads * enough) {
      launch.width = static_cast<int>(V);
      blocks = ceil_divide(rows, V * kPixelsThreads);
    } else if (dense && tiles >= enough && image * 2 >= tile) {  // at least half of the threads have a row
      launch.regime = Regime::kPlanes;
      launch.threads = kPlanesThreads;
      blocks = tiles;
    }
    launch.blocks = static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 30));
  } else if (flat && int64_t{work.classes} * bytes <= kFlatBytes) {
    launch.regime = Regime::kFlat;
    launch.threads = kFlatThreads;
    launch.shared_bytes = static_cast<unsigned>(kFlatThreads * work.classes * bytes + kVectorBytes);
    launch.blocks = static_cast<unsigned>(std::min<int64_t>(ceil_divide(rows, kFlatThreads), 1 << 30));
  } else {
    launch.regime = Regime::kRows;
    launch.threads = kRowsThreads;
    work.lane_bits = std::min(
        kMaxLaneBits, std::max(log2_ceil(ceil_divide(work.classes, kLaneClasses)),
                               std::min(2, log2_ceil(ceil_divide(int64_t{work.classes} * bytes, kVectorBytes)))));
    const int64_t groups = kRowsThreads >> work.lane_bits;
    const int64_t most = std::min(1 << work.lane_bits, kWarp);
    // As many tiles for each block that the device holds, and as many rows in each tile.
    const int64_t at_once = groups * kRowsBlocksOfProcessor * multiprocessors;
    const int64_t tiles = std::max<int64_t>(1, ceil_divide(rows, at_once * most));
    work.rows_per_group = static_cast<int>(std::max<int64_t>(1, ceil_divide(rows, at_once * tiles)));
    launch.blocks = static_cast<unsigned>(std::min<int64_t>(ceil_divide(rows, groups * work.rows_per_group), 1 << 30));
    // Half of the device would have no row: several blocks share one, if it has more than what one takes in two steps.
    const int64_t step = kRowsThreads * kLaneClasses, places = kRowsBlocksOfProcessor * multiprocessors;
    if (rows > 0 && rows < kTileRows && rows * 2 <= places && work.classes > 2 * step) {
      const int64_t steps = ceil_divide(ceil_divide(work.classes, places / rows), step);
      work.chunk = static_cast<int>(std::min<int64_t>(step * steps, work.classes));
      work.chunks = static_cast<int>(ceil_divide(work.classes, work.chunk));
      launch.blocks = static_cast<unsigned>(rows * work.chunks);
    }
  }
  return launch;
}

// Blocks walk over the tiles, so that few of them have something to add up.
template <typename Params>
static Launch plan_sums(Params& p, Element element, bool dense, int multiprocessors) {
  const bool flat = p.work.rows.levels == 1 && p.stride_c == 1 && p.strides.s2 == p.work.classes;
  const bool wide = aligned(p.logits, p.strides, p.stride_c, p.work.rows, bytes_of(element));
  Launch launch = plan(p.work, element, p.strides, p.stride_c, flat, wide, dense, multiprocessors);
  const unsigned most = static_cast<unsigned>(multiprocessors) *
                        (launch.regime == Regime::kRows ? kRowsBlocksOfProcessor : kBlocksOfProcessor);
  if (p.work.chunks == 1) launch.blocks = std::max(1u, std::min(launch.blocks, most));
  return launch;
}

Launch plan_forward(ForwardParams& p, Element element, int multiprocessors) {
  return plan_sums(p, element, p.strides.s2 == 1, multiprocessors);
}

// Without planes: see lmf_cuda_row_sums.cu.
Launch plan_sums(SumsParams& p, Element element, int multiprocessors) {
  return plan_sums(p, element, false, multiprocessors);
}

Launch plan_backward(BackwardParams& p, Element element, int multiprocessors) {
  const int bytes = bytes_of(element);
  const bool flat = p.work.rows.levels == 1 && p.stride_c == 1 && p.grad_stride_c == 1 &&
                    p.strides.s2 == p.work.classes && p.grad_strides.s2 == p.work.classes;
  const bool wide = aligned(p.logits, p.strides, p.stride_c, p.work.rows, bytes) &&
                    aligned(p.grad_logits, p.grad_strides, p.grad_stride_c, p.work.rows, bytes);
  const bool dense = p.strides.s2 == 1 && p.grad_strides.s2 == 1;
  return plan(p.work, element, p.strides, p.stride_c, flat, wide, dense, multiprocessors);
}

}  // namespace cuda
}  // namespace lmf
