"""Dense attention of PyTorch (cuDNN and flash) on the cases of cuda_kernels, for comparison.

    torch_sdpa.py [BATCHxTOKENSxQUERYHEADSxKVHEADSxDIM ...]

Times are those of replays of a CUDA graph that holds two calls on different caches, by events.
"""

import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

CASES = [(1, 8192, 32, 8, 128), (1, 32768, 32, 8, 128), (1, 131072, 32, 8, 128),
         (8, 32768, 32, 8, 128), (8, 131072, 32, 8, 128), (16, 4096, 32, 32, 128),
         (8, 32768, 32, 4, 128), (32, 8192, 32, 8, 64)]


def measure(backend, batch, length, q_heads, kv_heads, dim):
    """Microseconds of one call, the median of 20 replays."""
    copies = max(2, -(-400_000_000 // (4 * batch * length * kv_heads * dim)))
    shape = (batch, kv_heads, length, dim)
    caches = [(torch.randn(shape, device="cuda", dtype=torch.bfloat16),
               torch.randn(shape, device="cuda", dtype=torch.bfloat16)) for _ in range(copies)]
    q = torch.randn((batch, q_heads, 1, dim), device="cuda", dtype=torch.bfloat16)

    def run():
        with sdpa_kernel(backend):
            for k, v in caches:
                torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for replay in range(23):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if replay >= 3:
            times.append(begin.elapsed_time(end) * 1e3 / copies)
    return statistics.median(times)


def main():
    print(torch.cuda.get_device_name(), torch.__version__, torch.backends.cudnn.version())
    named = [tuple(int(number) for number in text.split("x")) for text in sys.argv[1:]]
    for case in named or CASES:
        batch, length, q_heads, kv_heads, dim = case
        size = 4 * batch * length * kv_heads * dim
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION),
                              ("flash", SDPBackend.FLASH_ATTENTION)):
            try:
                us = measure(backend, *case)
            except RuntimeError as error:
                print(f"{name} {case}: {str(error).splitlines()[0]}")
                continue
            print(f"{name:24} B{batch:<3} L{length:<6} {q_heads:2}q/{kv_heads}kv d{dim:<3} "
                  f"{size / 1e6:9.2f} MB {us:9.2f} us {size / us / 1e3:7.0f} GB/s", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
