// The kernels' views of the C ABI's tensors, their checks, and scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "common/status.h"
#include "cpu/micro.h"
#include "cpu_kernels.h"

namespace dpk {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_to(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int64_t element_size(dpk_dtype dtype) { return dtype == DPK_F64 ? 8 : dtype == DPK_F32 ? 4 : 2; }

template <class R>
constexpr dpk_dtype kDtype = sizeof(R) == 4 ? DPK_F32 : DPK_F64;

inline const char* at(const dpk_tensor& v, int64_t i, int64_t t, int64_t j) {
  if (v.data == nullptr) return nullptr;  // of an empty tensor, and C++ lets nothing be added to it
  const int64_t offset = i * v.stride[0] + t * v.stride[1] + j * v.stride[2];
  return static_cast<const char*>(v.data) + offset * element_size(v.dtype);
}

// Columns [first, first + count) of every frame.
inline dpk_tensor columns_of(dpk_tensor v, int64_t first, int64_t count) {
  v.data = const_cast<char*>(at(v, 0, 0, first));
  v.size[2] = count;
  return v;
}

// Whether n entries, `stride` bytes apart, have no set bit but signs. Bits, not values: a processor set to
// read subnormals as zero must not hide them. Nearly always the first entry tells.
template <class Bits>
bool are_zero(const char* entries, int64_t stride, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    Bits bits;
    __builtin_memcpy(&bits, entries + j * stride, sizeof(Bits));
    if (static_cast<Bits>(bits << 1) != 0) return false;
  }
  return true;
}

// Whether columns [j0, j0 + n) of a frame are all zero.
inline bool is_zero(const dpk_tensor& v, int64_t i, int64_t t, int64_t j0, int64_t n) {
  const int64_t size = element_size(v.dtype), stride = v.stride[2] * size;
  const char* entries = at(v, i, t, j0);
  if (size == 2) return are_zero<uint16_t>(entries, stride, n);
  if (size == 4) return are_zero<uint32_t>(entries, stride, n);
  return are_zero<uint64_t>(entries, stride, n);
}

inline void check_tensor(const char* name, const dpk_tensor& v) {
  for (int64_t size : v.size)
    if (size < 0) invalid_argument("%s has the negative size %lld", name, static_cast<long long>(size));
  if (v.dtype != DPK_F32 && v.dtype != DPK_F64 && v.dtype != DPK_F16 && v.dtype != DPK_BF16)
    invalid_argument("%s has element type %d; give F32, F64, F16 or BF16", name, static_cast<int>(v.dtype));
  if (v.data == nullptr && v.size[0] * v.size[1] * v.size[2] != 0) invalid_argument("%s is NULL", name);
}

inline void check_same(const char* what, int64_t a, int64_t b) {
  if (a != b)
    invalid_argument("%s differ: %lld and %lld", what, static_cast<long long>(a), static_cast<long long>(b));
}

// name[i] must be in 0..most.
inline void check_range(const char* name, int64_t i, int64_t given, int64_t most) {
  if (given < 0 || given > most)
    invalid_argument("%s[%lld] is %lld; it must be in 0..%lld", name, static_cast<long long>(i),
                     static_cast<long long>(given), static_cast<long long>(most));
}

inline void check_lengths(const int64_t* lengths, int64_t batch, int64_t frames) {
  for (int64_t i = 0; lengths != nullptr && i < batch; ++i) check_range("lengths", i, lengths[i], frames);
}

inline void check_out(dpk_dtype dtype) {
  if (dtype != DPK_F32 && dtype != DPK_F64)
    invalid_argument("out has element type %d; give F32 or F64", static_cast<int>(dtype));
}

inline int64_t length_of(const int64_t* lengths, int64_t i, int64_t frames) {
  return lengths == nullptr ? frames : lengths[i];
}

// Calls body(R()) with R = double when an input is F64, else float.
template <class Body>
void for_arithmetic(bool wide, Body&& body) {
  if (wide)
    body(double());
  else
    body(float());
}

// Scratch memory on a cache line, uninitialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(
            64, static_cast<size_t>(round_to(count * static_cast<int64_t>(sizeof(T)) + 1, 64))))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Memory of one call's panels, uninitialised, on a cache line. A worker's block is kept for its next call:
// fresh pages from the system cost more than the packing, and so do lines of another core's cache.
class Workspace {
 public:
  explicit Workspace(int64_t bytes, int worker = 0);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
  int worker_;
};

// Frames [t0, t0+count) x columns [j0, j0+columns) of one sample with unit column stride: in place where the
// tensor has it and element type R, and columns is a multiple of `width`; else converted into `space` (count
// x round_to(columns, width)) with zeros in added columns.
template <class R>
struct Rows {
  const R* data;
  int64_t ld;

  Rows(const dpk_tensor& v, int64_t i, int64_t t0, int64_t count, int64_t j0, int64_t columns, int64_t width,
       R* space) {
    if (v.dtype == kDtype<R> && v.stride[2] == 1 && columns % width == 0) {
      data = reinterpret_cast<const R*>(at(v, i, t0, j0));
      ld = v.stride[1];
      return;
    }
    data = space;
    ld = round_to(columns, width);
    for (int64_t t = 0; t < count; ++t) {
      R* row = space + t * ld;
      const char* from = at(v, i, t0 + t, j0);
      if (v.dtype == kDtype<R> && v.stride[2] == 1)
        std::copy_n(reinterpret_cast<const R*>(from), columns, row);
      else
        micro<R>().load(from, v.dtype, v.stride[2], columns, row);
      for (int64_t j = columns; j < ld; ++j) row[j] = R(0);
    }
  }
};

// `count` elements of an output of type F32 or F64, from `index` on, as float64 and back; that is where a
// float32 output is rounded.
inline void read_out(const void* out, dpk_dtype dtype, int64_t index, int64_t count, double* values) {
  if (dtype == DPK_F64)
    std::copy_n(static_cast<const double*>(out) + index, count, values);
  else
    std::copy_n(static_cast<const float*>(out) + index, count, values);
}
inline void write_out(void* out, dpk_dtype dtype, int64_t index, int64_t count, const double* values) {
  if (dtype == DPK_F64)
    std::copy_n(values, count, static_cast<double*>(out) + index);
  else
    for (int64_t j = 0; j < count; ++j) static_cast<float*>(out)[index + j] = static_cast<float>(values[j]);
}

// The number of threads worth waking for a number of elementary operations (vectors of 16): waking one takes
// 5 to 50 microseconds, as long as some 10^5 operations. The number does not change a result.
inline int worthwhile_threads(int32_t threads, double operations) {
  if (threads < 1) invalid_argument("threads is %d; it must be at least 1", static_cast<int>(threads));
  return operations < 1e5 ? 1 : threads;
}

}  // namespace dpk
