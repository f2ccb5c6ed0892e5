// The hardware's exponential against a double one, for every float that a weight can be made from.

#include "attention/cuda/exp2.h"

#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <iostream>

namespace kvservice::cuda {
namespace {

TEST(CudaExp2, IsAsExactAsBoundsAssume) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU";
  double* worst = nullptr;
  ASSERT_EQ(cudaMalloc(reinterpret_cast<void**>(&worst), sizeof(*worst)), cudaSuccess);
  ASSERT_EQ(cudaMemset(worst, 0, sizeof(*worst)), cudaSuccess);
  // From 2^-126 to 2.
  const auto raise = [&](float from, float to) {
    return RaiseToExp2Error(std::bit_cast<uint32_t>(from), std::bit_cast<uint32_t>(to), worst,
                            nullptr);
  };
  ASSERT_EQ(raise(0.0F, 1.0F), cudaSuccess);
  ASSERT_EQ(raise(-0.0F, -126.0F), cudaSuccess);
  double found = 0.0;
  ASSERT_EQ(cudaMemcpy(&found, worst, sizeof(found), cudaMemcpyDeviceToHost), cudaSuccess);
  cudaFree(worst);
  std::cout << "largest error: " << found << " of log2\n";
  EXPECT_GT(found, 0.0);
  EXPECT_LE(found, static_cast<double>(kExp2Error));
}

}  // namespace
}  // namespace kvservice::cuda
