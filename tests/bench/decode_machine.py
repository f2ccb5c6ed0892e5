"""Where a decode loop's tensors are: a GPU, with graphs and copies that run on by themselves, or
the CPU, on which the same loops run one operation after the other."""

import contextlib
import platform
import time

import numpy as np
import torch
from torch.nn.attention import SDPBackend

from kvservice import cuda_stream


def host_tensor(array):
    """A numpy array's memory as a torch tensor; bf16 bits become bfloat16."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def processor():
    """The processor's name and the number of its CPUs."""
    name = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        name = f"{names[0]}, {len(names)} CPUs" if names else name
    return name


class CpuMachine:
    """Everything happens at once and in order."""

    device = "cpu"
    backends = {"math": SDPBackend.MATH}

    def describe(self):
        return f"{processor()}; no GPU; torch {torch.__version__}"

    def new_stream(self):
        return None

    def on(self, stream):
        return contextlib.nullcontext()

    def new_pool(self):
        return None

    def capture(self, function, stream, pool):
        """What runs `function` on the stream; it has run before this returns."""
        function()
        return function

    def synchronize(self, stream):
        """Waits for everything on the stream."""

    def pin(self, array):
        """Whether copies from and to this memory need no detour."""
        return True

    def attend(self, prepared, stream):
        """Makes a prepared call where the stream is."""
        prepared.ring()
        prepared.wait()

    def mark(self, stream):
        """A time in the stream, for seconds_between."""
        return time.perf_counter()

    def seconds_between(self, first, second):
        return second - first

    def pinned_like(self, tensor):
        return torch.empty_like(tensor, device="cpu")


class CudaMachine:
    """One GPU. Graphs of a pool run one after the other."""

    device = "cuda"
    backends = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
    }

    def __init__(self, *, has_graphs):
        self._has_graphs = has_graphs
        self._pinned = {}

    def describe(self):
        return (
            f"{torch.cuda.get_device_name()}; {processor()}; torch {torch.__version__}, "
            f"cuDNN {torch.backends.cudnn.version()}" + ("" if self._has_graphs else "; no graphs")
        )

    def new_stream(self):
        return torch.cuda.Stream()

    def on(self, stream):
        return torch.cuda.stream(stream)

    def new_pool(self):
        return torch.cuda.graph_pool_handle()

    def capture(self, function, stream, pool):
        """What launches `function` as a graph on the stream; it has run before this returns."""
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            function()  # libraries allocate at their first call, which a graph cannot hold
            stream.synchronize()
            if not self._has_graphs:
                return function
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool)
            try:
                function()
            finally:
                graph.capture_end()
        return graph.replay

    def synchronize(self, stream):
        """Waits for everything on the stream."""
        stream.synchronize()

    def pin(self, array):
        """Whether copies from and to this memory need no detour: it is registered with the driver,
        and kept, until the process ends. Harmless to repeat."""
        address = array.__array_interface__["data"][0]
        if address not in self._pinned:
            code = torch.cuda.cudart().cudaHostRegister(address, array.nbytes, 0)
            self._pinned[address] = array, int(code) == 0
            if int(code) != 0:
                # Or the next kernel would be blamed for it.
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device="cuda").add_(1)
        return self._pinned[address][1]

    def pinned_like(self, tensor):
        return torch.empty_like(tensor, device="cpu", pin_memory=True)

    def attend(self, prepared, stream):
        """Enqueues a prepared call."""
        cuda_stream.call(stream.cuda_stream, prepared)

    def mark(self, stream):
        """A time in the stream, for seconds_between once that is there."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def seconds_between(self, first, second):
        return first.elapsed_time(second) * 1e-3


def machine_named(device, *, has_graphs=True):
    """The machine of --device."""
    return CudaMachine(has_graphs=has_graphs) if device == "cuda" else CpuMachine()
