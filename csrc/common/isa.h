// Code compiled once per instruction set, and the choice between the copies at run time.
//
// A file listed in DPK_CPU_ISA_SOURCES (CMakeLists.txt) is compiled with DPK_ISA = baseline, and on x86-64
// also avx2 and avx512. Its header declares, and the file defines, everything inside the namespace of that
// name:
//
//     // x_isa.h                                             // x_isa.cpp
//     #define DPK_DECLARE(isa) \                             #include "cpu/x_isa.h"
//       namespace dpk::isa { void square(float* v, int64_t n); }   namespace dpk::DPK_ISA {
//     DPK_FOR_EACH_ISA(DPK_DECLARE)                          void square(float* v, int64_t n) { ... }
//     #undef DPK_DECLARE                                     }
//
// and ordinary code calls `DPK_DISPATCH(square)(v, n)`. Predefined macros (__AVX512F__, __FMA__) say which
// copy is being compiled.
//
// Rule: such a file calls no inline function or template of the standard library (std::vector, std::thread,
// ...), and its own helpers sit in its namespace. The linker keeps one copy of an inline function, and that
// could be the AVX-512 one, which then runs on a CPU without it. tests/build checks the object files.
#pragma once

namespace dpk {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

// The best instruction set that was built and that this CPU and its operating system support, or the one set
// by dpk_set_isa().
Isa isa();

}  // namespace dpk

#if defined(__x86_64__)
#define DPK_FOR_EACH_ISA(macro) macro(baseline) macro(avx2) macro(avx512)
#define DPK_DISPATCH(function)                                   \
  (::dpk::isa() == ::dpk::Isa::avx512 ? &::dpk::avx512::function \
   : ::dpk::isa() == ::dpk::Isa::avx2 ? &::dpk::avx2::function   \
                                      : &::dpk::baseline::function)
#else
#define DPK_FOR_EACH_ISA(macro) macro(baseline)
#define DPK_DISPATCH(function) (&::dpk::baseline::function)
#endif
