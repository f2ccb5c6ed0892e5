#include "attention/cuda/arena.h"

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <cstdlib>

namespace kvservice::cuda {
namespace {

constexpr size_t kChunkBytesMin = size_t{1} << 20;

}  // namespace

void Check(cudaError_t code, std::string_view what) {
  if (code == cudaSuccess) return;
  std::fprintf(stderr, "CUDA device failed in %.*s: %s (%s)\n", static_cast<int>(what.size()),
               what.data(), cudaGetErrorString(code), cudaGetErrorName(code));
  std::fflush(stderr);
  std::_Exit(kDeviceFaultExitCode);
}

Arena::~Arena() { Free(); }

void Arena::Free() {
  // Codes are not checked: at the end of a process there may be no device any more.
  for (const Chunk& chunk : chunks_) {
    cudaFreeHost(chunk.host);
    cudaFree(chunk.device);
  }
  chunks_.clear();
}

void Arena::AddChunk(size_t bytes) {
  Chunk chunk;
  chunk.bytes = bytes;
  if (sides_ != Sides::kHost) {
    Check(cudaMalloc(reinterpret_cast<void**>(&chunk.device), bytes), "cudaMalloc");
  }
  if (sides_ != Sides::kDevice) {
    Check(cudaMallocHost(reinterpret_cast<void**>(&chunk.host), bytes), "cudaMallocHost");
  }
  chunks_.push_back(chunk);
}

// Twice as much as before, so that a growing need ends in few chunks.
void Arena::Grow(size_t bytes) {
  size_t total = kChunkBytesMin;
  for (const Chunk& chunk : chunks_) total += chunk.bytes;
  AddChunk(std::max(total, bytes));
}

void Arena::Upload(cudaStream_t stream) {
  for (const Chunk& chunk : chunks_) {
    if (chunk.used == 0) continue;
    Check(cudaMemcpyAsync(chunk.device, chunk.host, chunk.used, cudaMemcpyHostToDevice, stream),
          "upload");
  }
}

void Arena::Download(cudaStream_t stream) {
  for (const Chunk& chunk : chunks_) {
    if (chunk.used == 0) continue;
    Check(cudaMemcpyAsync(chunk.host, chunk.device, chunk.used, cudaMemcpyDeviceToHost, stream),
          "download");
  }
}

Stretch Arena::ToDevice() const {
  assert(is_in_one_piece());
  if (chunks_.empty()) return {};
  const Chunk& chunk = chunks_.front();
  return {.from = reinterpret_cast<const uint4*>(chunk.host),
          .to = reinterpret_cast<uint4*>(chunk.device),
          .count = static_cast<uint32_t>(chunk.used / sizeof(uint4))};
}

Stretch Arena::ToHost() const {
  assert(is_in_one_piece());
  if (chunks_.empty()) return {};
  const Chunk& chunk = chunks_.front();
  return {.from = reinterpret_cast<const uint4*>(chunk.device),
          .to = reinterpret_cast<uint4*>(chunk.host),
          .count = static_cast<uint32_t>(chunk.used / sizeof(uint4))};
}

void Arena::Reset() {
  if (chunks_.size() > 1) {
    size_t total = 0;
    for (const Chunk& chunk : chunks_) total += chunk.bytes;
    Free();
    AddChunk(total);
  }
  for (Chunk& chunk : chunks_) chunk.used = 0;
}

}  // namespace kvservice::cuda
