// The transducer's joint network: checks, packed weights, and the products of a unit of cells.
#include <algorithm>

#include "common/parallel.h"
#include "cpu/transducer.h"

namespace dpk {
namespace {

constexpr int64_t kBlockRows = 256;

int64_t packed_rows(const dpk_transducer& given, int64_t rows) {
  return round_to(given.weight.size[1] - given.durations, rows) + round_to(given.durations, rows);
}

}  // namespace

void check_transducer(const dpk_transducer& given) {
  check_tensor("encoder", given.encoder);
  check_tensor("predictor", given.predictor);
  check_tensor("weight", given.weight);
  const int64_t batch = given.encoder.size[0], outputs = given.weight.size[1];
  check_same("the batch sizes of encoder and predictor", batch, given.predictor.size[0]);
  check_same("the widths of encoder and predictor", given.encoder.size[2], given.predictor.size[2]);
  check_same("the widths of encoder and weight", given.encoder.size[2], given.weight.size[2]);
  check_same("the matrices of weight and 1", given.weight.size[0], 1);
  for (const dpk_dtype dtype : {given.predictor.dtype, given.weight.dtype})
    check_same("the element types of encoder and the other states", given.encoder.dtype, dtype);
  if (given.bias.data != nullptr) {
    check_tensor("bias", given.bias);
    check_same("the entries of bias and the rows of weight", given.bias.size[2], outputs);
    check_same("the element types of encoder and bias", given.encoder.dtype, given.bias.dtype);
  }
  if (given.predictor.size[1] < 1) invalid_argument("predictor has no state; it needs U+1 >= 1");
  if (given.durations < 0 || given.durations > outputs)
    invalid_argument("durations is %lld; it must be in 0..%lld", static_cast<long long>(given.durations),
                     static_cast<long long>(outputs));
  const int64_t classes = outputs - given.durations;
  if (given.blank < 0 || given.blank >= classes)
    invalid_argument("blank is %lld; there are %lld token classes", static_cast<long long>(given.blank),
                     static_cast<long long>(classes));
  if (given.activation != DPK_RELU && given.activation != DPK_TANH)
    invalid_argument("activation is %d; give DPK_RELU or DPK_TANH", static_cast<int>(given.activation));
  const int64_t labels = given.predictor.size[1] - 1;
  for (int64_t i = 0; i < batch; ++i) {
    check_range("frame_lengths", i, given.frame_lengths[i], given.encoder.size[1]);
    check_range("target_lengths", i, given.target_lengths[i], labels);
    for (int64_t u = 0; u < given.target_lengths[i]; ++u) {
      const int64_t label = given.targets[i * labels + u];
      if (label < 0 || label >= classes || label == given.blank)
        invalid_argument("targets[%lld] holds %lld; labels are in 0..%lld and not the blank, %lld",
                         static_cast<long long>(i), static_cast<long long>(label),
                         static_cast<long long>(classes - 1), static_cast<long long>(given.blank));
    }
  }
}

template <class R>
Joint<R>::Joint(const dpk_transducer& tensors, bool backward, int32_t threads)
    : given(tensors),
      k(joint_micro<R>()),
      hidden(tensors.encoder.size[2]),
      padded_hidden(round_to(hidden, kJointAlign)),
      block_rows(kBlockRows / k.rows * k.rows),
      packed_rows_(packed_rows(tensors, k.rows)),
      forward_(packed_rows_ * hidden),
      bias_(packed_rows_) {
  segments.push_back({0, classes(), 0});
  if (given.durations > 0) segments.push_back({classes(), given.durations, round_to(classes(), k.rows)});
  for (int64_t i = 0; i < given.encoder.size[0]; ++i)
    utterances.push_back({i, given.frame_lengths[i], given.target_lengths[i]});
  if (backward) backward_ = std::make_unique<Scratch<R>>(packed_rows_ * hidden_panels() * k.rows);
  pack(threads, backward);
}

// Panels of k.rows rows of the weight, feature by feature, and for the way back panels of k.rows features,
// row by row; zeros where there is no row or feature.
template <class R>
void Joint<R>::pack(int32_t threads, bool backward) {
  const int64_t rows = k.rows, panels = packed_rows_ / rows, features = hidden_panels() * rows;
  const int workers =
      worthwhile_threads(threads, static_cast<double>(packed_rows_) * static_cast<double>(hidden) / 4);
  const Scratch<R> spaces(workers * rows * features);
  parallel_for(panels, workers, [&](int64_t panel, int worker) {
    R* const space = spaces.get() + worker * rows * features;
    std::fill_n(space, rows * features, R(0));
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t row = panel * rows + m;
      const Segment& segment = row >= segments.back().start ? segments.back() : segments.front();
      R& bias = bias_.get()[row];
      bias = R(0);
      if (row - segment.start >= segment.count) continue;
      const int64_t from = segment.first + row - segment.start;
      const dpk_tensor& weight = given.weight;
      micro<R>().load(at(weight, 0, from, 0), weight.dtype, weight.stride[2], hidden, space + m * features);
      if (given.bias.data != nullptr)
        micro<R>().load(at(given.bias, 0, 0, from), given.bias.dtype, 1, 1, &bias);
    }
    R* const forward = forward_.get() + panel * rows * hidden;
    for (int64_t j = 0; j < hidden; ++j)
      for (int64_t m = 0; m < rows; ++m) forward[j * rows + m] = space[m * features + j];
    if (!backward) return;
    for (int64_t j = 0; j < features; j += rows)
      for (int64_t m = 0; m < rows; ++m)
        std::copy_n(space + m * features + j, rows,
                    backward_->get() + (j / rows * packed_rows_ + panel * rows + m) * rows);
  });
}

template <class R>
int64_t Joint<R>::groups_at_once() const {
  const int64_t bytes = (hidden + hidden_panels() * k.rows + block_rows) * k.columns * int64_t{sizeof(R)};
  return std::clamp<int64_t>(second_level_cache() * 3 / 4 / bytes, 1, 16);
}

template <class R>
int Joint<R>::threads_for(int64_t cells, int32_t threads) const {
  return worthwhile_threads(threads, static_cast<double>(cells) * static_cast<double>(hidden) *
                                         static_cast<double>(packed_rows_) / 16);
}

template <class R>
Unit<R>::Unit(const Joint<R>& joint, bool backward)
    : joint_(joint),
      groups_(joint.groups_at_once()),
      packed_(capacity() * joint.hidden),
      block_(capacity() * joint.block_rows),
      of_z_(backward ? capacity() * joint.hidden_panels() * joint.k.rows : 0),
      rows_(joint.k.columns * joint.padded_hidden),
      encoder_(joint.padded_hidden),
      predictor_(joint.padded_hidden) {
  for (R* row : {encoder_.get(), predictor_.get()}) std::fill_n(row, joint.padded_hidden, R(0));
}

template <class R>
void Unit<R>::load(const Cell& cell) {
  const dpk_tensor &e = joint_.given.encoder, &p = joint_.given.predictor;
  micro<R>().load(at(e, cell.utterance, cell.t, 0), e.dtype, e.stride[2], joint_.hidden, encoder_.get());
  micro<R>().load(at(p, cell.utterance, cell.u, 0), p.dtype, p.stride[2], joint_.hidden, predictor_.get());
}

template <class R>
void Unit<R>::take(const Cell* cells, int64_t count) {
  count_ = count;
  const int64_t columns = joint_.k.columns, ld = joint_.padded_hidden;
  for (int64_t first = 0; first < count; first += columns) {
    for (int64_t c = 0; c < columns; ++c) {
      R* const row = rows_.get() + c * ld;
      if (first + c >= count) {
        std::fill_n(row, ld, R(0));
        continue;
      }
      load(cells[first + c]);
      joint_.k.joint(encoder(), predictor(), ld, joint_.given.activation, joint_.given.encoder.dtype, row);
    }
    micro<R>().wide.transpose(rows_.get(), ld, joint_.hidden, packed_.get() + first * joint_.hidden);
  }
}

template <class R>
void Unit<R>::logits(int64_t start, int64_t rows) {
  const int64_t columns = joint_.k.columns;
  for (int64_t row = 0; row < rows; row += joint_.k.rows)
    for (int64_t g = 0; g < used_groups(); ++g)
      joint_.k.product(joint_.forward_panel(start + row), packed_.get() + g * columns * joint_.hidden,
                       joint_.hidden, block(g) + row * columns, false);
}

template <class R>
void Unit<R>::multiply_back(int64_t start, int64_t rows) {
  const int64_t columns = joint_.k.columns;
  for (int64_t g = 0; g < used_groups(); ++g)
    for (int64_t panel = 0; panel < joint_.hidden_panels(); ++panel)
      joint_.k.product(joint_.backward_panel(panel, start), block(g), round_to(rows, joint_.k.rows),
                       of_z(g) + panel * joint_.k.rows * columns, start > 0);
}

template <class R>
const R* Unit<R>::of_z_by_cell(int64_t group) {
  std::fill_n(rows_.get(), joint_.k.columns * joint_.padded_hidden, R(0));
  joint_.k.transpose(of_z(group), joint_.hidden, rows_.get(), joint_.padded_hidden);
  return rows_.get();
}

template class Joint<float>;
template class Joint<double>;
template class Unit<float>;
template class Unit<double>;

}  // namespace dpk
