"""What running out of memory looks like, in the words of everyone who allocates."""

from __future__ import annotations

import errno

from edgetune.errors import EdgetuneError

# All words of a row stand in the message (lower case). From the sources and binaries of torch 2.14, numpy, glibc and
# ONNX Runtime, from what real steps raised under RLIMIT_DATA, and from public threads (named where the words say
# nothing of memory).
_SIGNS: tuple[tuple[str, ...], ...] = (
    ("out of memory",),  # CUDA, HIP, XPU, MPS, Pillow, sqlite, libgomp
    ("outofmemory",),  # hipErrorOutOfMemory
    ("out_of_", "memory"),  # Vulkan and SYCL: out_of_host_memory, ERROR_OUT_OF_DEVICE_MEMORY
    ("out of ", " memory"),
    ("out_of_resources",),
    ("resource exhausted",),
    ("resource_exhausted",),
    ("allocate memory",),  # torch's CPU allocator: can't; the C library: cannot; ONNX Runtime: failed to
    ("unable to allocate",),  # numpy
    ("failed to allocate",),
    ("could not allocate",),
    ("couldn't allocate",),
    ("allocation failed",),
    ("failed allocation",),
    ("not enough memory",),  # torch on Windows
    ("insufficient memory",),  # zlib, libjpeg, LAPACK
    ("bad_alloc",),
    ("bad allocation",),  # the same by Microsoft's library
    ("posix_memalign",),  # pytorch#31302
    ("os error 12",),  # Rust
    ("errno 12]",),
    ("failed to map segment",),  # loading a shared library: numpy#14148
    ("could not create a primitive",),  # oneDNN tells no status: flower#3761
    ("could not execute a primitive",),
    ("could not create a memory",),
    ("could not create a descriptor for",),
    ("could not create a zero memory",),
    ("could not create a stream",),
    ("_alloc_failed",),  # CUBLAS_STATUS_, CUDNN_STATUS_, CUSPARSE_STATUS_
    ("errormemoryallocation",),  # cudaErrorMemoryAllocation
    ("cublas_status_not_initialized",),  # no room for a handle: tensorflow#9489, aihwkit#479
    ("cudnn_status_not_initialized",),
    ("unable to find a valid cudnn algorithm",),
    ("unable to find an engine to execute",),
    ("cudnn_status_not_supported", "non-contiguous"),  # torch-max-mem#11
    ("cuda driver error: device not ready",),  # torch-max-mem#45
    ("nvml_success == r",),  # Jetson, MIG: pytorch#185240
    ("internal assert failed", "cachingallocator"),  # torch-max-mem#45
    ("nvmapmem",),  # NvMapMemAllocInternalTagged, NvMapMemHandleAlloc: llama.cpp#23732
    ("invalid buffer size",),  # MPS
)  # fmt: skip
# A thread can also be refused for other reasons than the room for its stack, so these say so under a limit only.
_THREAD_SIGNS = (
    "can't start new thread",
    "thread creation failed",
    "pthread_create",
    "resource temporarily unavailable",
)
# Known on Arm boards and no lack of memory: the loader's fixed room for thread-local variables.
_NO_SIGN = "static tls"

# What is wrong with the program or its input stays so with less memory used.
_NEVER = (
    EdgetuneError, TypeError, ValueError, LookupError, AssertionError, AttributeError, NameError, ArithmeticError,
    RecursionError, NotImplementedError, SyntaxError,
)  # fmt: skip
_MEMORY_ERRNOS = (errno.ENOMEM, errno.ENOBUFS)
_LONGEST_CHAIN = 32


def is_out_of_memory(error: BaseException, *, left_bytes: int | None, needed_bytes: int | None) -> bool:
    """Whether an error means that memory ran out, in whatever words an allocator said it.

    `left_bytes`: under the limit when the error was caught (None without one), `needed_bytes`: what the step was
    predicted to add. When less is left than that, an unrecognised RuntimeError, SystemError or OSError (unless its
    errno names another cause) counts too. What the error was raised from or amid is looked at as well, so a step must
    not be replayed inside the handler: its errors would have the first one in their chain.
    An error of edgetune's own counts if it was raised from one that says so: an image that there was no memory to decode.
    It works with no memory left: nothing is imported or opened, and if even that fails, the answer is yes.
    """
    while isinstance(error, EdgetuneError) and error.__cause__ is not None:
        error, needed_bytes = error.__cause__, None
    if isinstance(error, _NEVER) or not isinstance(error, Exception):
        return False
    try:
        link: BaseException | None = error
        for _ in range(_LONGEST_CHAIN):
            if link is None:
                break
            if not isinstance(link, _NEVER) and _says_so(link, under_limit=left_bytes is not None):
                return True
            link = link.__cause__ or link.__context__
        if left_bytes is None or needed_bytes is None or left_bytes >= needed_bytes:
            return False
        if isinstance(error, OSError):
            return error.errno in (None, errno.EAGAIN)
        return isinstance(error, RuntimeError | SystemError)
    except MemoryError:
        return True


def _says_so(error: BaseException, *, under_limit: bool) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _MEMORY_ERRNOS):
        return True
    if any("OutOfMemory" in kind.__name__ for kind in type(error).__mro__):
        return True
    try:
        text = str(error).lower()
    except MemoryError:
        raise
    except Exception:  # an error that can't even be printed says nothing
        return False
    if _NO_SIGN in text:
        return False
    return any(all(word in text for word in words) for words in _SIGNS) or (
        under_limit and any(words in text for words in _THREAD_SIGNS)
    )
