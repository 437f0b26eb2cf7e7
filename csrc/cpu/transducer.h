// The transducer's joint network in blocks of cells: logits of many cells from packed weights, which stay in
// the second-level cache.
#pragma once

#include <unistd.h>

#include <memory>
#include <vector>

#include "cpu/transducer_isa.h"
#include "cpu/views.h"
#include "transducer_kernels.h"

namespace dpk {

// Rows of vectors that `joint` and `add_cell` read are padded to a multiple of this.
constexpr int64_t kJointAlign = 16;

void check_transducer(const dpk_transducer& joint);

// The cells of one utterance.
struct Utterance {
  int64_t index, frames, labels;
  int64_t width() const { return labels + 1; }
  int64_t cells() const { return frames * width(); }
};

// One cell: its frame, its position among the labels, and its place [i][t][u] in scores and normalizers.
struct Cell {
  int64_t utterance, t, u, place;
};

// Rows of the weight: V tokens, then D durations, each padded to whole panels.
struct Segment {
  int64_t first, count;  // of the weight's rows
  int64_t start;         // in the packed rows
};

// The second-level cache of this machine in bytes, of which the unit of work takes three quarters. It changes
// no bit: a cell's results do not depend on its unit.
inline int64_t second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return int64_t{1} << 20;
}

// What all threads read.
template <class R>
class Joint {
 public:
  // `backward`: the weight is packed for products with the logits' gradients too.
  Joint(const dpk_transducer& given, bool backward, int32_t threads);

  const dpk_transducer& given;
  const JointMicro<R>& k;
  const int64_t hidden, padded_hidden;  // H; H padded to kJointAlign
  const int64_t block_rows;             // packed rows of the weight whose logits are in memory at a time
  std::vector<Segment> segments;
  std::vector<Utterance> utterances;

  int64_t classes() const { return given.weight.size[1] - given.durations; }
  int64_t frames() const { return given.encoder.size[1]; }
  int64_t width() const { return given.predictor.size[1]; }
  int64_t place(int64_t i, int64_t t, int64_t u) const { return (i * frames() + t) * width() + u; }
  int64_t hidden_panels() const { return ceil_div(hidden, k.rows); }
  int64_t label(const Cell& cell) const {  // of the arc that emits one; -1 where no label is left
    const int64_t labels = given.target_lengths[cell.utterance];
    return cell.u < labels ? given.targets[cell.utterance * (width() - 1) + cell.u] : -1;
  }
  // How many groups of cells a unit of work has.
  int64_t groups_at_once() const;
  // Threads worth waking for so many cells.
  int threads_for(int64_t cells, int32_t threads) const;

  const R* forward_panel(int64_t row) const { return forward_.get() + row * hidden; }
  const R* backward_panel(int64_t panel, int64_t row) const {
    return backward_->get() + (panel * packed_rows_ + row) * k.rows;
  }
  const R* bias(int64_t row) const { return bias_.get() + row; }

 private:
  void pack(int32_t threads, bool backward);

  const int64_t packed_rows_;
  Scratch<R> forward_, bias_;
  std::unique_ptr<Scratch<R>> backward_;
};

// A worker's memory: z and logits of a unit of cells, and the derivatives by z.
template <class R>
class Unit {
 public:
  Unit(const Joint<R>& joint, bool backward);

  // Takes the next cells, at most capacity().
  void take(const Cell* cells, int64_t count);
  int64_t capacity() const { return groups_ * joint_.k.columns; }

  // Computes the products of a block of rows [start, start + rows) of a segment for all groups.
  void logits(int64_t start, int64_t rows);
  // Adds this block's part of the derivative by z.
  void multiply_back(int64_t start, int64_t rows);

  // z of cell c [H padded], rounded as the output layer reads it; overwritten by the next group's.
  const R* z(int64_t c) const { return rows_.get() + c * joint_.padded_hidden; }

  int64_t used_groups() const { return ceil_div(count_, joint_.k.columns); }
  R* block(int64_t group) const { return block_.get() + group * joint_.block_rows * joint_.k.columns; }
  R* of_z(int64_t group) const {
    return of_z_.get() + group * joint_.hidden_panels() * joint_.k.rows * joint_.k.columns;
  }
  // The derivatives by z of a group's cells, cell by cell.
  const R* of_z_by_cell(int64_t group);

  // The inputs of a cell, padded to kJointAlign, until the next call.
  void load(const Cell& cell);
  const R* encoder() const { return encoder_.get(); }
  const R* predictor() const { return predictor_.get(); }

 private:
  const Joint<R>& joint_;
  const int64_t groups_;
  int64_t count_ = 0;
  Scratch<R> packed_, block_, of_z_, rows_, encoder_, predictor_;
};

}  // namespace dpk
