// The inner loops of the transducer's joint network, compiled once per instruction set.
//
// Cells lie across the lanes of vectors: `columns` cells form a group, and a matrix of a group holds one row
// of `columns` entries for each class or feature. No lane depends on another, so a cell has the same bits in
// every place of every group.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace dpk {

template <class R>
struct JointMicro {
  int rows, columns;  // of the outputs of `product`; columns is Micro<R>::nr

  // out [rows][columns] = sum over j < k of a[j*rows + m] * b[j*columns + n], or += where add: the new sum
  // starts at 0.
  void (*product)(const R* a, const R* b, int64_t k, R* out, bool add);

  // z[h] = act(e[h] + p[h]), h < n, a multiple of 16; rounded to element type `dtype`.
  void (*joint)(const R* e, const R* p, int64_t n, int32_t activation, int32_t dtype, R* z);

  // logits [count][columns] += bias[row]; then sum becomes sum of exp(logit - most) over these and the
  // earlier rows, with the largest logit `most` (in the beginning -infinity and 0).
  void (*add_exponentials)(R* logits, const R* bias, int64_t count, R* most, R* sum);

  // logits [count][columns] become exp(logit + bias[row] - normalizer) * scale.
  void (*softmax)(R* logits, const R* bias, int64_t count, const R* normalizers, const R* scales);

  // A cell's derivative by e + p, d[h] = of_z[h] * act'(e[h] + p[h]) * scale, n a multiple of 16, is added to
  // of_encoder and to of_predictor.
  void (*add_cell)(const R* of_z, const R* e, const R* p, int64_t n, int32_t activation, R scale,
                   R* of_encoder, R* of_predictor);

  // to[c*ld + j] = from[j*columns + c] for c < columns, j < n.
  void (*transpose)(const R* from, int64_t n, R* to, int64_t ld);
};

#define DPK_DECLARE(isa)                 \
  namespace isa {                        \
  const JointMicro<float>& joint_f32();  \
  const JointMicro<double>& joint_f64(); \
  }
DPK_FOR_EACH_ISA(DPK_DECLARE)
#undef DPK_DECLARE

template <class R>
const JointMicro<R>& joint_micro();
template <>
inline const JointMicro<float>& joint_micro<float>() {
  return DPK_DISPATCH(joint_f32)();
}
template <>
inline const JointMicro<double>& joint_micro<double>() {
  return DPK_DISPATCH(joint_f64)();
}

}  // namespace dpk
