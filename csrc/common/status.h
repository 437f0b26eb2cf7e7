// Error reporting of native code: it throws dpk::Error, which dpk::guard() converts to a status at the C ABI.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "common/ieee.h"
#include "dpkernels.h"

namespace dpk {

class Error : public std::runtime_error {
 public:
  Error(dpk_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  dpk_status status() const { return status_; }

 private:
  dpk_status status_;
};

// Throws Error(DPK_INVALID_ARGUMENT) with a printf-style message that names the argument and its value.
[[noreturn]] void invalid_argument(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Remembers the message for dpk_last_error() of this thread and returns the status.
dpk_status report(dpk_status status, const char* message) noexcept;

// Runs the body of one C ABI function; no exception leaves it.
template <class Body>
dpk_status guard(Body&& body) noexcept {
  const IeeeMode mode;
  try {
    body();
    return DPK_OK;
  } catch (const Error& error) {
    return report(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return report(DPK_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return report(DPK_INTERNAL, error.what());
  } catch (...) {
    return report(DPK_INTERNAL, "unknown exception");
  }
}

}  // namespace dpk
