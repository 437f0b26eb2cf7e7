// The common types of the C ABI's headers: version, statuses and element types. Include dpkernels.h instead.
#ifndef DPK_TYPES_H
#define DPK_TYPES_H

#include <stdint.h>

#define DPK_API __attribute__((visibility("default")))

// Incremented whenever a signature or the meaning of an argument changes.
#define DPK_ABI_VERSION 1

typedef int32_t dpk_status;
enum {
  DPK_OK = 0,
  DPK_INVALID_ARGUMENT = 1,
  DPK_OUT_OF_MEMORY = 2,
  DPK_UNSUPPORTED = 3,  // a valid request that this build or this machine cannot serve
  DPK_CUDA_ERROR = 4,
  DPK_INTERNAL = 5,
};

// Element types of tensors.
typedef int32_t dpk_dtype;
enum {
  DPK_F32 = 0,
  DPK_F64 = 1,
  DPK_F16 = 2,
  DPK_BF16 = 3,
  DPK_I64 = 4,
};

#endif  // DPK_TYPES_H
