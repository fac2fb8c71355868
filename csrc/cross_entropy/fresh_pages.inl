// Pages of memory that nobody has written yet.

// Lets the system provide all pages of a piece of memory in one call, not by a fault each. Pages
// that are there already would only cost time: the one in the middle tells.
static inline void provide_pages(void* memory, int64_t bytes) {
#if defined(MADV_POPULATE_WRITE)
  const uintptr_t page = 4096, first = uintptr_t(memory) / page * page;
  const uintptr_t last = uintptr_t(memory) + uintptr_t(bytes);
  unsigned char resident = 1;
  void* middle = reinterpret_cast<void*>((first + last) / 2 / page * page);
  if (mincore(middle, page, &resident) == 0 && !(resident & 1))
    madvise(reinterpret_cast<void*>(first), last - first, MADV_POPULATE_WRITE);
#else
  (void)memory;
  (void)bytes;
#endif
}
