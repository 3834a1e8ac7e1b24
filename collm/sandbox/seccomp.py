"""The system calls that the sandbox allows, as the bytes of a seccomp filter (classic BPF).

Every call that is not listed here fails with "operation not permitted": sockets, ptrace, mount, bpf, keyctl, userfaultfd,
io_uring, namespaces, shared memory, and calls of later kernels. There are two filters. `ZYGOTE` is installed by bubblewrap and
allows fork. `PROGRAM` is added in the forked child before untrusted code runs; it forbids new processes and threads, starting
another program, sending signals and raising its own limits.
"""

from __future__ import annotations

import platform
import struct
from typing import Literal

from collm.errors import SandboxError

# name=number, from the kernel's headers; the two tables hold the same names where both machines have the call.
_NUMBERS = {
    "x86_64": """
    read=0 write=1 readv=19 writev=20 pread64=17 pwrite64=18 preadv=295 pwritev=296 preadv2=327 pwritev2=328 open=2
    openat=257 openat2=437 close=3 close_range=436 stat=4 fstat=5 lstat=6 newfstatat=262 statx=332 access=21 faccessat=269
    faccessat2=439 lseek=8 getdents64=217 readlink=89 readlinkat=267 getcwd=79 chdir=80 fchdir=81 mkdir=83 mkdirat=258
    rmdir=84 unlink=87 unlinkat=263 rename=82 renameat=264 renameat2=316 link=86 linkat=265 symlink=88 symlinkat=266
    truncate=76 ftruncate=77 fallocate=285 fsync=74 fdatasync=75 chmod=90 fchmod=91 fchmodat=268 umask=95 utimensat=280
    statfs=137 fstatfs=138 fadvise64=221 flock=73 sendfile=40 copy_file_range=326 dup=32 dup2=33 dup3=292 pipe=22 pipe2=293
    poll=7 ppoll=271 select=23 pselect6=270 epoll_create1=291 epoll_ctl=233 epoll_wait=232 epoll_pwait=281 eventfd2=290
    mmap=9 munmap=11 mprotect=10 mremap=25 madvise=28 brk=12 mincore=27 msync=26 rt_sigaction=13 rt_sigprocmask=14
    rt_sigreturn=15 rt_sigpending=127 rt_sigtimedwait=128 rt_sigsuspend=130 sigaltstack=131 pause=34 alarm=37 getitimer=36
    setitimer=38 nanosleep=35 clock_nanosleep=230 clock_gettime=228 clock_getres=229 gettimeofday=96 time=201 times=100
    getrusage=98 sysinfo=99 uname=63 getpid=39 getppid=110 gettid=186 getuid=102 geteuid=107 getgid=104 getegid=108
    getresuid=118 getresgid=120 getgroups=115 getpgrp=111 getpgid=121 getsid=124 getpriority=140 sched_yield=24
    sched_getaffinity=204 getcpu=309 futex=202 set_robust_list=273 set_tid_address=218 rseq=334 restart_syscall=219
    arch_prctl=158 getrandom=318 getrlimit=97 exit=60 exit_group=231 membarrier=324 clone=56 fork=57 execve=59 wait4=61
    waitid=247 kill=62 prctl=157 seccomp=317 setrlimit=160 clone3=435 prlimit64=302 fcntl=72 ioctl=16
    """,
    "aarch64": """
    read=63 write=64 readv=65 writev=66 pread64=67 pwrite64=68 preadv=69 pwritev=70 preadv2=286 pwritev2=287 openat=56
    openat2=437 close=57 close_range=436 fstat=80 newfstatat=79 statx=291 faccessat=48 faccessat2=439 lseek=62 getdents64=61
    readlinkat=78 getcwd=17 chdir=49 fchdir=50 mkdirat=34 unlinkat=35 renameat=38 renameat2=276 linkat=37 symlinkat=36
    truncate=45 ftruncate=46 fallocate=47 fsync=82 fdatasync=83 fchmod=52 fchmodat=53 umask=166 utimensat=88 statfs=43
    fstatfs=44 fadvise64=223 flock=32 sendfile=71 copy_file_range=285 dup=23 dup3=24 pipe2=59 ppoll=73 pselect6=72
    epoll_create1=20 epoll_ctl=21 epoll_pwait=22 eventfd2=19 mmap=222 munmap=215 mprotect=226 mremap=216 madvise=233 brk=214
    mincore=232 msync=227 rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139 rt_sigpending=136 rt_sigtimedwait=137
    rt_sigsuspend=133 sigaltstack=132 getitimer=102 setitimer=103 nanosleep=101 clock_nanosleep=115 clock_gettime=113
    clock_getres=114 gettimeofday=169 times=153 getrusage=165 sysinfo=179 uname=160 getpid=172 getppid=173 gettid=178
    getuid=174 geteuid=175 getgid=176 getegid=177 getresuid=148 getresgid=150 getgroups=158 getpgid=155 getsid=156
    getpriority=141 sched_yield=124 sched_getaffinity=123 getcpu=168 futex=98 set_robust_list=99 set_tid_address=96 rseq=293
    restart_syscall=128 getrandom=278 getrlimit=163 exit=93 exit_group=94 membarrier=283 clone=220 execve=221 wait4=260
    waitid=95 kill=129 prctl=167 seccomp=277 setrlimit=164 clone3=435 prlimit64=261 fcntl=25 ioctl=29
    """,
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Beyond these, a call is allowed whatever its arguments are.
_ZYGOTE_ONLY = frozenset(["fork", "execve", "wait4", "waitid", "kill", "prctl", "seccomp", "setrlimit"])
_BY_ARGUMENT = frozenset(["clone", "clone3", "prlimit64", "fcntl", "ioctl"])
_NEW_NAMESPACE = 0x7E020080  # CLONE_NEW*: mount, cgroup, UTS, IPC, user, PID, network, time
_FCNTL_SIGNALS = (8, 10, 15, 1031)  # F_SETOWN, F_SETSIG, F_SETOWN_EX could signal somebody else; F_SETPIPE_SZ takes memory
_IOCTL_ALLOWED = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX

_LOAD, _EQUAL, _ANY_BIT, _RETURN, _AND = 0x20, 0x15, 0x45, 0x06, 0x54
_SHARED_MEMORY = 0x21  # MAP_SHARED | MAP_ANONYMOUS: each such mapping takes a file's worth of kernel memory
_ALLOW, _KILL, _DENY, _MISSING = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # the last two: EPERM, ENOSYS
_NR, _ARCH, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; arguments are 8 bytes each, low half first


def machine() -> str:
    """This machine's name in the tables.

    Raises:
        SandboxError: The filter has no table for it.
    """
    name = platform.machine()
    if name not in _NUMBERS:
        raise SandboxError(
            f"the sandbox knows the system calls of {' and '.join(_NUMBERS)}, but this machine is {name!r}. "
            "Use one of those, or a task that runs no code."
        )
    return name


def syscalls(name: str) -> dict[str, int]:
    """The numbers of the calls that one of the filters names, on machine `name`."""
    return {call: int(number) for call, number in (entry.split("=") for entry in _NUMBERS[name].split())}


def seccomp_filter(role: Literal["zygote", "program"], name: str | None = None) -> bytes:
    """The filter as an array of struct sock_filter, 8 bytes each: what bubblewrap's --seccomp and prctl take.

    Args:
        role: "zygote" may fork and start a program; "program" may not.
        name: The machine; this one if left out.
    """
    name = name or machine()
    numbers = syscalls(name)
    code = [_op(_LOAD, _ARCH), _op(_EQUAL, _AUDIT_ARCH[name], 1, 0), _op(_RETURN, _KILL), _op(_LOAD, _NR)]
    for call, number in numbers.items():
        if call not in _BY_ARGUMENT and (role == "zygote" or call not in {*_ZYGOTE_ONLY, "mmap"}):
            code += [_op(_EQUAL, number, 0, 1), _op(_RETURN, _ALLOW)]
    # glibc falls back to clone, whose flags a filter can read, where clone3 does not exist.
    code += [_op(_EQUAL, numbers["clone3"], 0, 1), _op(_RETURN, _MISSING)]
    if role == "zygote":
        code += [_op(_EQUAL, numbers["clone"], 0, 4), _op(_LOAD, _ARGUMENT), _op(_ANY_BIT, _NEW_NAMESPACE, 1, 0)]
        code += [_op(_RETURN, _ALLOW), _op(_RETURN, _DENY)]
    else:
        code += [_op(_EQUAL, numbers["mmap"], 0, 5), _op(_LOAD, _ARGUMENT + 24), _op(_AND, _SHARED_MEMORY)]
        code += [_op(_EQUAL, _SHARED_MEMORY, 0, 1), _op(_RETURN, _DENY), _op(_RETURN, _ALLOW)]
    # prlimit64 on oneself (pid 0) only.
    code += [_op(_EQUAL, numbers["prlimit64"], 0, 4), _op(_LOAD, _ARGUMENT), _op(_EQUAL, 0, 0, 1)]
    code += [_op(_RETURN, _ALLOW), _op(_RETURN, _DENY)]
    code += _by_second_argument(numbers["fcntl"], _FCNTL_SIGNALS, listed=_DENY, other=_ALLOW)
    code += _by_second_argument(numbers["ioctl"], _IOCTL_ALLOWED, listed=_ALLOW, other=_DENY)
    code.append(_op(_RETURN, _DENY))
    return b"".join(code)


def _by_second_argument(number: int, values: tuple[int, ...], *, listed: int, other: int) -> list[bytes]:
    tests = [op for value in values for op in (_op(_EQUAL, value, 0, 1), _op(_RETURN, listed))]
    return [_op(_EQUAL, number, 0, len(tests) + 2), _op(_LOAD, _ARGUMENT + 8), *tests, _op(_RETURN, other)]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
