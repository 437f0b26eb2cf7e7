// The block of memory that calls hand on to each other.
#include <atomic>
#include <utility>

#include "cpu/views.h"

namespace dpk {
namespace {

// More than this is given back to the system: a rare long sample is no reason to hold its memory for good.
constexpr int64_t kMostKept = int64_t{32} << 20;

// In front of the memory that is handed out, and as large as a cache line.
struct alignas(64) Header {
  int64_t bytes;
};

// Owned by whoever exchanges it out; no lock that a fork could find taken. Two calls at once: the second
// allocates.
std::atomic<Header*> kept{nullptr};

}  // namespace

Workspace::Workspace(int64_t bytes) {
  Header* block = kept.exchange(nullptr);
  if (block == nullptr || block->bytes < bytes) {
    std::free(block);
    const int64_t size = round_to(bytes + static_cast<int64_t>(sizeof(Header)), alignof(Header));
    void* memory = std::aligned_alloc(alignof(Header), static_cast<size_t>(size));
    if (memory == nullptr) throw std::bad_alloc();
    block = new (memory) Header{size - static_cast<int64_t>(sizeof(Header))};
  }
  data_ = block + 1;
}

Workspace::~Workspace() {
  Header* block = static_cast<Header*>(data_) - 1;
  if (block->bytes <= kMostKept) block = kept.exchange(block);
  std::free(block);
}

}  // namespace dpk
