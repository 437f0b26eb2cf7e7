// The processor's modes that make results depend on the caller: subnormal numbers read or written as zero.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace dpk {

// While an object of this class exists, its thread computes with subnormal numbers, under any setting of
// torch.set_flush_denormal: the bounds of csrc/cpu/bounds.h allow for a flushed result, not for an input that
// another thread sees and this one does not (1e-40 times 1e38 is no rounding error).
class IeeeMode {
 public:
  IeeeMode() : before_(get()) {
    if ((before_ & kFlush) != 0) set(before_ & ~kFlush);
  }
  ~IeeeMode() {
    if ((before_ & kFlush) != 0) set(before_);
  }
  IeeeMode(const IeeeMode&) = delete;
  IeeeMode& operator=(const IeeeMode&) = delete;

 private:
#if defined(__SSE__)
  static constexpr uint64_t kFlush = 0x8040;  // MXCSR: flush to zero, denormals are zeros
  static uint64_t get() { return _mm_getcsr(); }
  static void set(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t{1} << 24;  // FPCR.FZ
  static uint64_t get() {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t get() { return 0; }
  static void set(uint64_t) {}
#endif

  uint64_t before_;
};

}  // namespace dpk
