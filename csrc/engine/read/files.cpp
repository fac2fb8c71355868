#include "engine/read/files.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

const int64_t kWriteBack = 8 << 20;  // bytes handed to the disk at a time

static_assert(kTruncated == ENODATA, "kTruncated is ENODATA");

int read_all(int fd, char* p, size_t n, int64_t at) {
  while (n) {
    const ssize_t r = pread(fd, p, n, at);
    if (r < 0 && errno == EINTR) continue;
    if (r < 0) return errno;
    if (r == 0) return kTruncated;
    p += r;
    n -= size_t(r);
    at += r;
  }
  return 0;
}

int write_all(int fd, const char* p, size_t n, int64_t at, bool early) {
  if (fd < 0) {
    std::memcpy(reinterpret_cast<char*>(at), p, n);
    return 0;
  }
  while (n) {
    const ssize_t r = pwrite(fd, p, n, at);
    if (r < 0 && errno == EINTR) continue;
    if (r <= 0) return r < 0 ? errno : EIO;
#ifdef SYNC_FILE_RANGE_WRITE
    const int64_t window = (at + r) / kWriteBack - 1;  // the last one that is complete
    if (early && at / kWriteBack <= window)            // a hint: fsync does the rest
      sync_file_range(fd, window * kWriteBack, kWriteBack, SYNC_FILE_RANGE_WRITE);
#endif
    p += r;
    n -= size_t(r);
    at += r;
  }
  return 0;
}

int read_bytes(const RemoteRead& remote, int64_t file, int64_t offset, int64_t n, char* out) {
  return file >= 0 ? read_all(int(file), out, size_t(n), offset)
                   : remote(-1 - file, offset, n, out);
}
