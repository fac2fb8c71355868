// Bytes of files: local ones by descriptor, remote ones by a function.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

// Reads n bytes at an offset of a remote file, which has no descriptor; returns 0 or an errno.
typedef std::function<int(int64_t file, int64_t offset, int64_t n, char* out)> RemoteRead;

const int kTruncated = 61;  // ENODATA: the file is shorter than its header states

int read_all(int fd, char* p, size_t n, int64_t at);

// Writes to an offset of a file, or with fd -1 to an address. early: starts the transfer to the
// disk at once, so that a later fsync has less to do.
int write_all(int fd, const char* p, size_t n, int64_t at, bool early);

// Reads n bytes. file: a descriptor, or -1 - number of a remote file.
int read_bytes(const RemoteRead& remote, int64_t file, int64_t offset, int64_t n, char* out);
