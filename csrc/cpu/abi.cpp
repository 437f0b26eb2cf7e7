// The instruction set in use, which is detected once and lowered by tests.
#include <atomic>
#include <cstring>

#include "common/isa.h"
#include "common/status.h"

namespace dpk {
namespace {

const char* const names[] = {"baseline", "avx2", "avx512"};

Isa supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> value{supported()};
  return value;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

}  // namespace dpk

const char* dpk_isa(void) { return dpk::names[static_cast<int>(dpk::isa())]; }

dpk_status dpk_set_isa(const char* name) {
  return dpk::guard([&] {
    const dpk::Isa best = dpk::supported();
    if (name == nullptr || *name == '\0') {
      dpk::chosen() = best;
      return;
    }
    for (int i = 0; i <= static_cast<int>(best); ++i) {
      if (std::strcmp(name, dpk::names[i]) == 0) {
        dpk::chosen() = static_cast<dpk::Isa>(i);
        return;
      }
    }
    dpk::invalid_argument("isa is \"%s\"; this CPU runs up to \"%s\" of baseline, avx2, avx512", name,
                          dpk::names[static_cast<int>(best)]);
  });
}
