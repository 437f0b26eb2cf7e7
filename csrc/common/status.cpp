#include "common/status.h"

#include <cstdarg>
#include <cstdio>

namespace dpk {
namespace {

// A fixed buffer, so that reporting "out of memory" needs no memory.
thread_local char last_error[1024] = "";

}  // namespace

void invalid_argument(const char* format, ...) {
  char message[sizeof(last_error)];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  throw Error(DPK_INVALID_ARGUMENT, message);
}

dpk_status report(dpk_status status, const char* message) noexcept {
  std::snprintf(last_error, sizeof(last_error), "%s", message);
  return status;
}

}  // namespace dpk

int32_t dpk_abi_version(void) { return DPK_ABI_VERSION; }

const char* dpk_version(void) { return DPK_VERSION; }

const char* dpk_last_error(void) { return dpk::last_error; }
