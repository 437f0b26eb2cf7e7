// The transducer's scores, and its gradients from logits that are computed again, in units of cells that lie
// in the second-level cache.
//
// Work of one cell is independent of all others, up to the sums over an utterance's frames or labels, whose
// order depends on its own lengths only: hence neither threads nor the rest of the batch change a bit.
#include "cpu/transducer.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/parallel.h"

namespace dpk {
namespace {

// Frames of an utterance whose sum over frames is one partial sum, made by one thread: enough that partial
// sums, [U+1,H] each, take little memory.
constexpr int64_t kSliceFrames = 32;

// Partial sums are in memory for as many utterances at a time as fit in about this much.
constexpr int64_t kPartialBytes = int64_t{32} << 20;

struct Slice {
  const Utterance* utterance;
  int64_t first, frames;
  int64_t partial;  // which partial sum of its group of utterances
};

// Each worker's memory, made when the worker first needs it.
template <class R>
class Units {
 public:
  Units(const Joint<R>& joint, bool backward, int workers)
      : joint_(joint), backward_(backward), units_(static_cast<size_t>(workers)) {}
  Unit<R>& of(int worker) {
    std::unique_ptr<Unit<R>>& unit = units_[static_cast<size_t>(worker)];
    if (!unit) unit = std::make_unique<Unit<R>>(joint_, backward_);
    return *unit;
  }

 private:
  const Joint<R>& joint_;
  const bool backward_;
  std::vector<std::unique_ptr<Unit<R>>> units_;
};

template <class R>
std::vector<Cell> cells_of(const Joint<R>& joint, const Utterance& utterance, int64_t first, int64_t frames) {
  std::vector<Cell> cells;
  for (int64_t t = first; t < first + frames; ++t)
    for (int64_t u = 0; u < utterance.width(); ++u)
      cells.push_back({utterance.index, t, u, joint.place(utterance.index, t, u)});
  return cells;
}

// ---- forward

template <class R>
class Scores {
 public:
  Scores(const Joint<R>& joint, double sigma, R* scores, R* normalizers)
      : joint_(joint),
        sigma_(sigma),
        scores_(scores),
        normalizers_(normalizers),
        stride_(2 + joint.given.durations),
        parts_(static_cast<int64_t>(joint.segments.size())) {}

  // The kept logits become log-probabilities once their normalizer is known: the score itself holds them
  // until then.
  void run(Unit<R>& unit, const Cell* cells, int64_t count) const {
    const int64_t columns = joint_.k.columns;
    const Scratch<R> most(unit.capacity()), sum(unit.capacity());
    unit.take(cells, count);
    for (int64_t s = 0; s < parts_; ++s) {
      const Segment& segment = joint_.segments[static_cast<size_t>(s)];
      std::fill_n(most.get(), unit.capacity(), -std::numeric_limits<R>::infinity());
      std::fill_n(sum.get(), unit.capacity(), R(0));
      for (int64_t row = 0; row < segment.count; row += joint_.block_rows) {
        const int64_t rows = std::min(joint_.block_rows, segment.count - row), start = segment.start + row;
        unit.logits(start, rows);
        for (int64_t g = 0; g < unit.used_groups(); ++g)
          joint_.k.add_exponentials(unit.block(g), joint_.bias(start), rows, most.get() + g * columns,
                                    sum.get() + g * columns);
        for (int64_t c = 0; c < count; ++c)
          keep(cells[c], s, unit.block(c / columns) + c % columns, row, rows);
      }
      for (int64_t c = 0; c < count; ++c) finish(cells[c], s, most.get()[c], sum.get()[c]);
    }
  }

 private:
  void keep(const Cell& cell, int64_t s, const R* logits, int64_t row, int64_t rows) const {
    R* const score = scores_ + cell.place * stride_;
    const int64_t columns = joint_.k.columns;
    if (s == 1) {
      for (int64_t d = 0; d < rows; ++d) score[2 + row + d] = logits[d * columns];
      return;
    }
    const int64_t wanted[] = {joint_.given.blank, joint_.label(cell)};
    for (int n = 0; n < 2; ++n)
      if (wanted[n] >= row && wanted[n] < row + rows) score[n] = logits[(wanted[n] - row) * columns];
  }

  void finish(const Cell& cell, int64_t s, R most, R sum) const {
    const double normalizer = static_cast<double>(most) + std::log(static_cast<double>(sum));
    normalizers_[cell.place * parts_ + s] = static_cast<R>(normalizer);
    R* const score = scores_ + cell.place * stride_;
    const int64_t first = s == 0 ? 0 : 2;
    const int64_t end = s == 1 ? stride_ : joint_.label(cell) < 0 ? 1 : 2;
    for (int64_t n = first; n < end; ++n)
      score[n] = static_cast<R>(static_cast<double>(score[n]) - normalizer - (s == 0 ? sigma_ : 0.0));
  }

  const Joint<R>& joint_;
  const double sigma_;
  R* const scores_;
  R* const normalizers_;
  const int64_t stride_, parts_;
};

// ---- backward

// A cell's g is scale * (factor * softmax(logits) - flow / scale at the emitted kinds), scale the largest of
// its flows: what the products see is about 1, so that a cell of small probability makes no subnormal
// numbers, which are slow.
struct Scaled {
  Cell cell;
  double scale;
};

template <class R>
class Gradients {
 public:
  Gradients(const Joint<R>& joint, const R* normalizers, const R* flows, const R* grad_losses)
      : joint_(joint),
        normalizers_(normalizers),
        flows_(flows),
        grad_losses_(grad_losses),
        stride_(2 + joint.given.durations),
        parts_(static_cast<int64_t>(joint.segments.size())) {}

  // The cells with a flow: in all others g is exactly 0.
  std::vector<Scaled> active(const Utterance& utterance, int64_t first, int64_t frames) const {
    std::vector<Scaled> found;
    for (const Cell& cell : cells_of(joint_, utterance, first, frames)) {
      double scale = 0.0;
      bool any = false;
      for (int64_t n = 0; n < stride_; ++n) {
        const double flow = static_cast<double>(flows_[cell.place * stride_ + n]);
        any |= flow != 0.0;  // also a NaN
        scale = std::max(scale, std::fabs(flow));
      }
      if (any) found.push_back({cell, scale > 0.0 ? scale : 1.0});
    }
    return found;
  }

  // What g and the derivative by z of a cell are multiplied with at the end.
  double factor(const Scaled& scaled) const {
    return scaled.scale * static_cast<double>(grad_losses_[scaled.cell.utterance]);
  }

  // body(segment, row, rows) for every block of g. Its padded rows are 0: logits of zero weights.
  template <class Body>
  void for_blocks(Unit<R>& unit, const Scaled* cells, int64_t count, Body&& body) const {
    const int64_t columns = joint_.k.columns;
    std::vector<Cell> taken;
    for (int64_t c = 0; c < count; ++c) taken.push_back(cells[c].cell);
    unit.take(taken.data(), count);
    const Scratch<R> normalizers(unit.capacity()), factors(unit.capacity());
    for (int64_t s = 0; s < parts_; ++s) {
      for (int64_t c = 0; c < unit.capacity(); ++c) {
        normalizers.get()[c] = c < count ? normalizers_[cells[c].cell.place * parts_ + s] : R(0);
        factors.get()[c] = c < count ? static_cast<R>(through(cells[c]) / cells[c].scale) : R(0);
      }
      const Segment& segment = joint_.segments[static_cast<size_t>(s)];
      for (int64_t row = 0; row < segment.count; row += joint_.block_rows) {
        const int64_t rows = std::min(joint_.block_rows, segment.count - row), start = segment.start + row;
        unit.logits(start, rows);
        for (int64_t g = 0; g < unit.used_groups(); ++g)
          joint_.k.softmax(unit.block(g), joint_.bias(start), rows, normalizers.get() + g * columns,
                           factors.get() + g * columns);
        for (int64_t c = 0; c < count; ++c)
          subtract(cells[c], s, unit.block(c / columns) + c % columns, row, rows);
        body(segment, row, rows);
      }
    }
  }

 private:
  double flow(const Scaled& scaled, int64_t n) const {
    return static_cast<double>(flows_[scaled.cell.place * stride_ + n]);
  }
  double through(const Scaled& scaled) const { return flow(scaled, 0) + flow(scaled, 1); }

  void subtract(const Scaled& scaled, int64_t s, R* logits, int64_t row, int64_t rows) const {
    const int64_t columns = joint_.k.columns;
    if (s == 1) {
      for (int64_t d = 0; d < rows; ++d)
        logits[d * columns] -= static_cast<R>(flow(scaled, 2 + row + d) / scaled.scale);
      return;
    }
    const int64_t wanted[] = {joint_.given.blank, joint_.label(scaled.cell)};
    for (int n = 0; n < 2; ++n)
      if (wanted[n] >= row && wanted[n] < row + rows)
        logits[(wanted[n] - row) * columns] -= static_cast<R>(flow(scaled, n) / scaled.scale);
  }

  const Joint<R>& joint_;
  const R* const normalizers_;
  const R* const flows_;
  const R* const grad_losses_;
  const int64_t stride_, parts_;
};

template <class R>
class StateGradients {
 public:
  StateGradients(const Joint<R>& joint, const Gradients<R>& gradients, R* of_encoder, R* of_predictor)
      : joint_(joint), gradients_(gradients), of_encoder_(of_encoder), of_predictor_(of_predictor) {}

  void run(int32_t threads) const {
    const int64_t hidden = joint_.hidden, padded = joint_.padded_hidden;
    for (size_t first = 0, end; first < joint_.utterances.size(); first = end) {
      std::vector<Slice> slices;
      int64_t partials = 0, cells = 0;
      for (end = first; end < joint_.utterances.size(); ++end) {
        const Utterance& utterance = joint_.utterances[end];
        const int64_t count = ceil_div(utterance.frames, kSliceFrames);
        const int64_t rows = partials + count * utterance.width();
        if (end > first && rows * padded * int64_t{sizeof(R)} > kPartialBytes) break;
        for (int64_t n = 0; n < count; ++n)
          slices.push_back({&utterance, n * kSliceFrames,
                            std::min(kSliceFrames, utterance.frames - n * kSliceFrames),
                            partials + n * utterance.width()});
        partials = rows;
        cells += utterance.cells();
      }
      const Scratch<R> sums(partials * padded);
      const int workers = joint_.threads_for(cells, threads);
      Units<R> units(joint_, true, workers);
      parallel_for(static_cast<int64_t>(slices.size()), workers, [&](int64_t n, int worker) {
        add(units.of(worker), slices[static_cast<size_t>(n)], sums.get());
      });
      for (const Slice& slice : slices)
        for (int64_t u = 0; u < slice.utterance->width(); ++u) {
          R* const out = of_predictor_ + (slice.utterance->index * joint_.width() + u) * hidden;
          const R* const sum = sums.get() + (slice.partial + u) * padded;
          for (int64_t j = 0; j < hidden; ++j) out[j] = slice.first == 0 ? sum[j] : out[j] + sum[j];
        }
    }
  }

 private:
  void add(Unit<R>& unit, const Slice& slice, R* sums) const {
    const int64_t padded = joint_.padded_hidden, columns = joint_.k.columns;
    R* const of_predictor = sums + slice.partial * padded;
    std::fill_n(of_predictor, slice.utterance->width() * padded, R(0));
    const Scratch<R> of_encoder(slice.frames * padded);
    std::fill_n(of_encoder.get(), slice.frames * padded, R(0));
    const std::vector<Scaled> cells = gradients_.active(*slice.utterance, slice.first, slice.frames);
    const int64_t all = static_cast<int64_t>(cells.size());
    for (int64_t first = 0; first < all; first += unit.capacity()) {
      const int64_t count = std::min(unit.capacity(), all - first);
      const Scaled* const own = cells.data() + first;
      gradients_.for_blocks(unit, own, count, [&](const Segment& segment, int64_t row, int64_t rows) {
        unit.multiply_back(segment.start + row, rows);
      });
      for (int64_t c = 0; c < count; ++c) {
        const R* const by_cell = c % columns == 0 ? unit.of_z_by_cell(c / columns) : unit.z(0);
        const Cell& cell = own[c].cell;
        unit.load(cell);
        joint_.k.add_cell(by_cell + c % columns * padded, unit.encoder(), unit.predictor(), padded,
                          joint_.given.activation, static_cast<R>(gradients_.factor(own[c])),
                          of_encoder.get() + (cell.t - slice.first) * padded, of_predictor + cell.u * padded);
      }
    }
    for (int64_t t = 0; t < slice.frames; ++t)
      std::copy_n(of_encoder.get() + t * padded, joint_.hidden,
                  of_encoder_ + (slice.utterance->index * joint_.frames() + slice.first + t) * joint_.hidden);
  }

  const Joint<R>& joint_;
  const Gradients<R>& gradients_;
  R* const of_encoder_;
  R* const of_predictor_;
};

// x and g of all cells, slice by slice.
template <class R>
void output_cells(const Joint<R>& joint, const Gradients<R>& gradients, int32_t threads, R* x, R* g) {
  std::vector<Slice> slices;
  int64_t cells = 0;
  for (const Utterance& utterance : joint.utterances) {
    for (int64_t t = 0; t < utterance.frames; t += kSliceFrames)
      slices.push_back({&utterance, t, std::min(kSliceFrames, utterance.frames - t), 0});
    cells += utterance.cells();
  }
  const int64_t columns = joint.k.columns, padded = joint.padded_hidden, outputs = joint.given.weight.size[1];
  const int workers = joint.threads_for(cells, threads);
  Units<R> units(joint, false, workers);
  parallel_for(static_cast<int64_t>(slices.size()), workers, [&](int64_t n, int worker) {
    const Slice& slice = slices[static_cast<size_t>(n)];
    Unit<R>& unit = units.of(worker);
    const Scratch<R> z(padded);
    for (const Cell& cell : cells_of(joint, *slice.utterance, slice.first, slice.frames)) {
      unit.load(cell);
      joint.k.joint(unit.encoder(), unit.predictor(), padded, joint.given.activation,
                    joint.given.encoder.dtype, z.get());
      std::copy_n(z.get(), joint.hidden, x + cell.place * joint.hidden);
    }
    const std::vector<Scaled> found = gradients.active(*slice.utterance, slice.first, slice.frames);
    const int64_t all = static_cast<int64_t>(found.size());
    const Scratch<R> rows_of_g(columns * joint.block_rows);
    for (int64_t first = 0; first < all; first += unit.capacity()) {
      const int64_t count = std::min(unit.capacity(), all - first);
      const Scaled* const own = found.data() + first;
      gradients.for_blocks(unit, own, count, [&](const Segment& segment, int64_t row, int64_t rows) {
        for (int64_t c = 0; c < count; ++c) {
          if (c % columns == 0) joint.k.transpose(unit.block(c / columns), rows, rows_of_g.get(), rows);
          const R factor = static_cast<R>(gradients.factor(own[c]));
          const R* const from = rows_of_g.get() + c % columns * rows;
          R* const to = g + own[c].cell.place * outputs + segment.first + row;
          for (int64_t j = 0; j < rows; ++j) to[j] = from[j] * factor;
        }
      });
    }
  });
}

template <class R>
void scores_of(const dpk_transducer& given, double sigma, int32_t threads, R* scores, R* normalizers) {
  const Joint<R> joint(given, false, threads);
  std::vector<Cell> cells;
  for (const Utterance& utterance : joint.utterances) {
    const std::vector<Cell> own = cells_of(joint, utterance, 0, utterance.frames);
    cells.insert(cells.end(), own.begin(), own.end());
  }
  const Scores<R> of(joint, sigma, scores, normalizers);
  const int64_t all = static_cast<int64_t>(cells.size());
  const int workers = joint.threads_for(all, threads);
  const int64_t at_once = joint.groups_at_once() * joint.k.columns;
  Units<R> units(joint, false, workers);
  parallel_for(ceil_div(all, at_once), workers, [&](int64_t n, int worker) {
    of.run(units.of(worker), cells.data() + n * at_once, std::min(at_once, all - n * at_once));
  });
}

}  // namespace
}  // namespace dpk

dpk_status dpk_cpu_transducer_scores(const dpk_transducer* joint, double sigma, int32_t threads, void* scores,
                                     void* normalizers) {
  using namespace dpk;
  return guard([&] {
    check_transducer(*joint);
    for_arithmetic(joint->encoder.dtype == DPK_F64, [&](auto r) {
      using R = decltype(r);
      scores_of<R>(*joint, sigma, threads, static_cast<R*>(scores), static_cast<R*>(normalizers));
    });
  });
}

dpk_status dpk_cpu_transducer_gradients(const dpk_transducer* joint, const void* normalizers,
                                        const void* flows, const void* grad_losses, int32_t threads,
                                        void* of_encoder, void* of_predictor) {
  using namespace dpk;
  return guard([&] {
    check_transducer(*joint);
    for_arithmetic(joint->encoder.dtype == DPK_F64, [&](auto r) {
      using R = decltype(r);
      const Joint<R> packed(*joint, true, threads);
      const Gradients<R> gradients(packed, static_cast<const R*>(normalizers), static_cast<const R*>(flows),
                                   static_cast<const R*>(grad_losses));
      StateGradients<R>(packed, gradients, static_cast<R*>(of_encoder), static_cast<R*>(of_predictor))
          .run(threads);
    });
  });
}

dpk_status dpk_cpu_transducer_cells(const dpk_transducer* joint, const void* normalizers, const void* flows,
                                    const void* grad_losses, int32_t threads, void* x, void* g) {
  using namespace dpk;
  return guard([&] {
    check_transducer(*joint);
    for_arithmetic(joint->encoder.dtype == DPK_F64, [&](auto r) {
      using R = decltype(r);
      const Joint<R> packed(*joint, false, threads);
      const Gradients<R> gradients(packed, static_cast<const R*>(normalizers), static_cast<const R*>(flows),
                                   static_cast<const R*>(grad_losses));
      output_cells<R>(packed, gradients, threads, static_cast<R*>(x), static_cast<R*>(g));
    });
  });
}
