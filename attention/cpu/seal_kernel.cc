#include "attention/cpu/seal_kernel.h"

// All that the encoding includes: from here, none of it may be compiled for one target alone.
#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/float16.h"
#include "attention/log_mass.h"
#include "attention/sketch.h"

// clang-format off
#include "attention/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/cpu/seal_kernel.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
#define KVSERVICE_SKETCH_NAMESPACE HWY_NAMESPACE
#include "attention/sketch_encode-inl.h"
#undef KVSERVICE_SKETCH_NAMESPACE

namespace kvservice {
namespace HWY_NAMESPACE {

void SealPageTarget(const KvLayout& layout, const std::byte* rows, uint32_t block_index,
                    const SketchTable& table, std::byte* page) {
  encoding::EncodePage(layout, rows, block_index, table, page);
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvservice {

HWY_EXPORT(SealPageTarget);

void SealPage(const KvLayout& layout, const std::byte* rows, uint32_t block_index,
              const SketchTable& table, std::byte* page) {
  HWY_DYNAMIC_DISPATCH(SealPageTarget)(layout, rows, block_index, table, page);
}

}  // namespace kvservice
#endif  // HWY_ONCE
