// Sums over all paths of a transducer's utterances: forward and backward variables in float64, one utterance
// a thread.
#include <cmath>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "cpu/views.h"
#include "transducer_kernels.h"

namespace dpk {
namespace {

constexpr double kImpossible = -std::numeric_limits<double>::infinity();

// Moves `ahead` frames and `emits` labels (0: the blank); its score is that of the kind, and in a TDT that of
// the duration `duration` as well (-1: an RNN-T).
struct Arc {
  int64_t ahead, emits, duration;
};

std::vector<Arc> arcs_of(const int64_t* durations, int64_t count) {
  if (count == 0) return {{1, 0, -1}, {0, 1, -1}};
  std::vector<Arc> arcs;
  for (int64_t emits = 0; emits < 2; ++emits)
    for (int64_t d = 0; d < count; ++d)
      if (emits == 1 || durations[d] > 0) arcs.push_back({durations[d], emits, d});
  return arcs;
}

// ln of the sum of e^term, with a NaN among the terms never lost: every comparison with it is false.
double log_sum(const std::vector<double>& terms) {
  double largest = kImpossible, sum = 0.0;
  for (const double term : terms)
    if (!(term <= largest)) largest = term;
  if (largest == kImpossible) return largest;
  for (const double term : terms) sum += std::exp(term - largest);
  return largest + std::log(sum);
}

template <class R>
class Lattice {
 public:
  Lattice(const R* scores, int64_t row, int64_t frames, int64_t labels, const std::vector<Arc>& arcs,
          int64_t count)
      : scores_(scores), row_(row), frames_(frames), width_(labels + 1), arcs_(arcs), kinds_(2 + count) {}

  // Returns the loss; writes the flows where it is finite.
  double run(R* flows) {
    if (frames_ == 0) return -kImpossible;
    backward();
    const double total = beta_[0];
    if (!std::isfinite(total)) return -kImpossible;
    forward();
    std::vector<double> cell(static_cast<size_t>(kinds_));
    for (int64_t t = 0; t < frames_; ++t)
      for (int64_t u = 0; u < width_; ++u) {
        std::fill(cell.begin(), cell.end(), 0.0);
        for (const Arc& arc : arcs_) {
          const double flow = std::exp(alpha_[at(t, u)] + score(arc, t, u) + onward(arc, t, u) - total);
          cell[static_cast<size_t>(arc.emits)] += flow;
          if (arc.duration >= 0) cell[static_cast<size_t>(2 + arc.duration)] += flow;
        }
        for (int64_t n = 0; n < kinds_; ++n)
          flows[(t * row_ + u) * kinds_ + n] = static_cast<R>(cell[static_cast<size_t>(n)]);
      }
    return -total;
  }

 private:
  size_t at(int64_t t, int64_t u) const { return static_cast<size_t>(t * width_ + u); }

  double score(const Arc& arc, int64_t t, int64_t u) const {
    const R* own = scores_ + (t * row_ + u) * kinds_;
    const double of_kind = static_cast<double>(own[arc.emits]);
    return arc.duration < 0 ? of_kind : of_kind + static_cast<double>(own[2 + arc.duration]);
  }

  // Log-probability of the rest of all paths after this arc from (t, u). A blank after the last label that
  // leaves the last frame ends a path.
  double onward(const Arc& arc, int64_t t, int64_t u) const {
    // compared before they are added: a duration may be as large as an int64
    if (arc.ahead >= frames_ - t)
      return arc.ahead == frames_ - t && arc.emits == 0 && u == width_ - 1 ? 0.0 : kImpossible;
    return u + arc.emits < width_ ? beta_[at(t + arc.ahead, u + arc.emits)] : kImpossible;
  }

  void backward() {
    beta_.assign(at(frames_, 0), kImpossible);
    std::vector<double> terms;
    for (int64_t t = frames_ - 1; t >= 0; --t)
      for (int64_t u = width_ - 1; u >= 0; --u) {
        terms.clear();
        for (const Arc& arc : arcs_) {
          const double rest = onward(arc, t, u);
          if (rest != kImpossible) terms.push_back(score(arc, t, u) + rest);
        }
        beta_[at(t, u)] = log_sum(terms);
      }
  }

  void forward() {
    alpha_.assign(at(frames_, 0), kImpossible);
    alpha_[0] = 0.0;
    std::vector<double> terms;
    for (int64_t t = 0; t < frames_; ++t)
      for (int64_t u = 0; u < width_; ++u) {
        if (t == 0 && u == 0) continue;
        terms.clear();
        for (const Arc& arc : arcs_)
          if (arc.ahead <= t && arc.emits <= u)
            terms.push_back(alpha_[at(t - arc.ahead, u - arc.emits)] +
                            score(arc, t - arc.ahead, u - arc.emits));
        alpha_[at(t, u)] = log_sum(terms);
      }
  }

  const R* const scores_;
  const int64_t row_, frames_, width_;
  const std::vector<Arc>& arcs_;
  const int64_t kinds_;
  std::vector<double> alpha_, beta_;
};

template <class R>
void lattice(const void* scores, int64_t batch, int64_t frames, int64_t width, const int64_t* durations,
             int64_t count, const int64_t* frame_lengths, const int64_t* target_lengths, int32_t threads,
             void* losses, void* flows) {
  const std::vector<Arc> arcs = arcs_of(durations, count);
  const int64_t own = frames * width * (2 + count);
  const double work = 8.0 * static_cast<double>(batch * own);
  parallel_for(batch, worthwhile_threads(threads, work), [&](int64_t i, int) {
    Lattice<R> of(static_cast<const R*>(scores) + i * own, width, frame_lengths[i], target_lengths[i], arcs,
                  count);
    static_cast<R*>(losses)[i] = static_cast<R>(of.run(static_cast<R*>(flows) + i * own));
  });
}

void check(dpk_dtype dtype, int64_t batch, int64_t frames, int64_t width, const int64_t* durations,
           int64_t count, const int64_t* frame_lengths, const int64_t* target_lengths) {
  if (dtype != DPK_F32 && dtype != DPK_F64)
    invalid_argument("scores has element type %d; give F32 or F64", static_cast<int>(dtype));
  if (batch < 0 || frames < 0 || width < 1 || count < 0)
    invalid_argument("scores has the sizes %lld, %lld, %lld and %lld durations; give sizes >= 0 and U+1 >= 1",
                     static_cast<long long>(batch), static_cast<long long>(frames),
                     static_cast<long long>(width), static_cast<long long>(count));
  for (int64_t d = 0; d < count; ++d)
    if (durations[d] < 0)
      invalid_argument("durations[%lld] is %lld; it must be >= 0", static_cast<long long>(d),
                       static_cast<long long>(durations[d]));
  for (int64_t i = 0; i < batch; ++i) {
    check_range("frame_lengths", i, frame_lengths[i], frames);
    check_range("target_lengths", i, target_lengths[i], width - 1);
  }
}

}  // namespace
}  // namespace dpk

dpk_status dpk_cpu_transducer_lattice(const void* scores, dpk_dtype dtype, int64_t batch, int64_t frames,
                                      int64_t width, const int64_t* durations, int64_t count,
                                      const int64_t* frame_lengths, const int64_t* target_lengths,
                                      int32_t threads, void* losses, void* flows) {
  using namespace dpk;
  return guard([&] {
    check(dtype, batch, frames, width, durations, count, frame_lengths, target_lengths);
    (dtype == DPK_F64 ? lattice<double> : lattice<float>)(scores, batch, frames, width, durations, count,
                                                          frame_lengths, target_lengths, threads, losses,
                                                          flows);
  });
}
