// The C ABI of dpkernels: raw pointers, sizes, and a thread count or a CUDA stream; every call returns a
// status. This header includes the others, so it is the complete ABI.
//
// Nothing here throws or keeps a pointer after it returns. Sizes and strides are int64 and count elements. A
// library that reports another dpk_abi_version() than the caller was written for must not be used.
#ifndef DPKERNELS_H
#define DPKERNELS_H

#include "dpk_types.h"

#ifdef __cplusplus
extern "C" {
#endif

DPK_API int32_t dpk_abi_version(void);

// Version of the package that the library was built from.
DPK_API const char* dpk_version(void);

// The reason for the last failed call of this thread, valid until its next call; "" if none failed.
DPK_API const char* dpk_last_error(void);

// ---- CPU library
// -----------------------------------------------------------------------------------------------------

// The instruction set that kernels use on this machine: "baseline" (what every CPU of the architecture has),
// "avx2" or "avx512".
DPK_API const char* dpk_isa(void);

// Uses another instruction set from now on, for tests and measurements; "" or NULL returns to the best one.
// DPK_INVALID_ARGUMENT when this CPU does not have it.
DPK_API dpk_status dpk_set_isa(const char* name);

// ChaCha20 (RFC 8439), blocks `counter`, `counter` + 1, ...: out[64 * blocks] bytes. key has 32 bytes,
// nonce 12. The counter has 32 bits and never wraps: a counter outside of 0 .. 2^32 - 1, and
// counter + blocks > 2^32, is refused. Same bits for every `threads` >= 1.
DPK_API dpk_status dpk_cpu_chacha20_keystream(const uint8_t* key, int64_t counter, const uint8_t* nonce,
                                              int64_t blocks, int32_t threads, uint8_t* out);

// `count` standard normals from that keystream, 8 to a block, in pairs of 16 bytes: two little-endian words
// w0, w1 give sqrt(-2 ln u) cos(2 pi v) and then the same with sin, u = (w0 + 1) 2^-64, v = w1 2^-64
// (box_muller in csrc/common/chacha20.h). Computed in double; dtype F64 stores that, F32 its rounding. Same
// bits on every device.
DPK_API dpk_status dpk_cpu_chacha20_normal(const uint8_t* key, int64_t counter, const uint8_t* nonce,
                                           int64_t count, dpk_dtype dtype, int32_t threads, void* out);

// The transform alone, for inspection at chosen words: out[2i], out[2i+1] are the two normals of words[2i]
// and words[2i+1].
DPK_API dpk_status dpk_cpu_box_muller(const uint64_t* words, int64_t pairs, double* out);

// ---- CUDA library
// ----------------------------------------------------------------------------------------------------
// Enqueued on `stream` (a cudaStream_t) of the current device; `out` is device memory. key and nonce are host
// memory, read before the call returns. A failed launch is reported at once; a failure while the kernel runs
// is reported by a later CUDA call.

DPK_API dpk_status dpk_cuda_chacha20_keystream(const uint8_t* key, int64_t counter, const uint8_t* nonce,
                                               int64_t blocks, uint8_t* out, void* stream);
DPK_API dpk_status dpk_cuda_chacha20_normal(const uint8_t* key, int64_t counter, const uint8_t* nonce,
                                            int64_t count, dpk_dtype dtype, void* out, void* stream);

#ifdef __cplusplus
}
#endif

#include "cpu_kernels.h"
#include "grouped_kernels.h"
#include "optim_kernels.h"
#include "transducer_kernels.h"

#endif  // DPKERNELS_H
