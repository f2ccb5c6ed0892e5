// Which instruction sets the kernels of this folder are compiled for; included before any Highway
// header. The least on x86 is SSE4 (2008), because g++ 12 cannot compile Highway's fallback without
// vectors. AVX3_DL adds the byte dot product that scans live on. Scalable vectors (SVE) are left
// out: the kernels count lanes at compile time.

#ifndef KVSERVICE_ATTENTION_CPU_TARGETS_H_
#define KVSERVICE_ATTENTION_CPU_TARGETS_H_

#if defined(__x86_64__)
#define HWY_BASELINE_TARGETS HWY_SSE4
#endif
#define HWY_WANT_AVX3_DL
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)

#endif  // KVSERVICE_ATTENTION_CPU_TARGETS_H_
