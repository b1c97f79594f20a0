// A shim around ptrace() for user-mode-linux on processors with AMX (LD_PRELOAD, see start_uml in lab).
//
// The kernel process saves and restores the vector registers of its processes with PTRACE_GETREGSET and PTRACE_SETREGSET in
// a buffer whose size was settled when AMX did not exist. The machine's kernel truncates when it reads, but refuses to write
// anything but the whole state: "ptrace set fp regs failed, errno = 14". So we read and write the whole state, hand out its
// beginning, and lay the caller's beginning over what the process has. The rest (the tiles) is unused: a process must ask
// for AMX, and the guest's kernel knows no such question.
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef NT_X86_XSTATE
#define NT_X86_XSTATE 0x202
#endif

// Not on the stack: the caller's is a kernel stack of a few KB. One is enough: the kernel process has a single thread.
static char whole[65536];

static long get_whole(pid_t pid, struct iovec *iov) {
  iov->iov_base = whole;
  iov->iov_len = sizeof whole;
  return syscall(SYS_ptrace, PTRACE_GETREGSET, pid, NT_X86_XSTATE, iov);
}

static long xstate(int request, pid_t pid, struct iovec *caller) {
  struct iovec iov;
  long r = get_whole(pid, &iov);
  if (r < 0) return r;
  size_t n = caller->iov_len < iov.iov_len ? caller->iov_len : iov.iov_len;
  if (request == PTRACE_GETREGSET) {
    memcpy(caller->iov_base, whole, n);
    caller->iov_len = n;
    return r;
  }
  memcpy(whole, caller->iov_base, n);
  return syscall(SYS_ptrace, PTRACE_SETREGSET, pid, NT_X86_XSTATE, &iov);
}

long ptrace(enum __ptrace_request request, ...) {
  va_list args;
  va_start(args, request);
  pid_t pid = va_arg(args, pid_t);
  void *addr = va_arg(args, void *);
  void *data = va_arg(args, void *);
  va_end(args);

  if ((request == PTRACE_GETREGSET || request == PTRACE_SETREGSET) && (unsigned long)addr == NT_X86_XSTATE)
    return xstate(request, pid, data);
  // As glibc does it: the kernel puts the word that was asked for where data points, glibc returns it.
  if (request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA || request == PTRACE_PEEKUSER) {
    long word;
    long r = syscall(SYS_ptrace, request, pid, addr, &word);
    if (r < 0) return r;
    errno = 0;
    return word;
  }
  return syscall(SYS_ptrace, request, pid, addr, data);
}
