// Memory for weights: in huge pages where the system grants them, which is worth a third of the streaming speed.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lockstep {

class HugeBuffer {
 public:
  HugeBuffer() = default;
  explicit HugeBuffer(size_t bytes) : bytes_(bytes) {
#if defined(__linux__)
    if (bytes >= HUGE) {
      size_t whole = (bytes + HUGE - 1) / HUGE * HUGE;
      void* p = mmap(nullptr, whole + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      map_ = p, mapped_ = whole + HUGE;
      data_ = reinterpret_cast<char*>((reinterpret_cast<size_t>(p) + HUGE - 1) / HUGE * HUGE);
      madvise(data_, whole, MADV_HUGEPAGE);  // not granted: small pages are slower, not wrong
      return;
    }
#endif
    data_ = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64));
    if (!data_) throw std::bad_alloc();
  }
  ~HugeBuffer() {
#if defined(__linux__)
    if (map_) {
      munmap(map_, mapped_);
      return;
    }
#endif
    std::free(data_);
  }
  HugeBuffer(const HugeBuffer&) = delete;
  HugeBuffer& operator=(const HugeBuffer&) = delete;
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t HUGE = 2 << 20;
  char* data_ = nullptr;
  void* map_ = nullptr;
  size_t bytes_ = 0, mapped_ = 0;
};

}  // namespace lockstep
