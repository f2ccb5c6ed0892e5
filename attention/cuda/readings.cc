#include "attention/cuda/readings.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/cpu/exp.h"
#include "attention/scan_terms.h"
#include "attention/sketch.h"

namespace kvservice::cuda {
namespace {

// CTAs of a scan that run on one multiprocessor at the same time.
constexpr uint32_t kScanCtas = 3;

// Roundings of a logit, in units of 2^-24 ||qs|| ||k||: eight channels in a chain, at most five
// levels of lanes, the scaled query, the product, and one to spare for products of these.
constexpr double kLogitRoundings = 8 + 5 + 1 + 1 + 1;

// Bounds of a mass whose nearest log is set; attention/cpu/attend_kernel.cc (BoundMass) says why.
void BoundMass(const LayerShape& shape, double query_norm, const HeadSums& sums,
               uint32_t chain_tokens, uint32_t head, Partial* part) {
  const double size = query_norm * KeyNormUp(sums.key_squares_max);
  if (!(size <= kLogitMax)) {
    part->upper[head] = {std::numeric_limits<double>::infinity()};
    part->lower[head] = {kLogZero};
    part->arithmetic[head] = std::numeric_limits<double>::infinity();
    return;
  }
  const double cap = shape.logit_softcap;
  const double error = size * (kLogitRoundings * 0x1p-24 + kExpArgumentError) + cap * kTanhError;
  const double rho = std::expm1(error + kMassError);
  const double moved =
      rho < 0.5 ? 2.0 * rho / (1.0 - rho) : std::numeric_limits<double>::infinity();
  part->arithmetic[head] = moved + (chain_tokens + 32.0) * 0x1p-24 + kMassError;
  const double lse = part->lse[head];
  part->upper[head] = {lse == kLogZero ? lse : WidenUp(lse + error + kMassError)};
  part->lower[head] = {lse == kLogZero ? lse : WidenDown(lse - error - kMassError)};
}

// Words that hold at least one token.
uint32_t CountPages(const TokenMask& tokens) {
  return static_cast<uint32_t>(
      std::count_if(tokens.begin(), tokens.end(), [](uint64_t word) { return word != 0; }));
}

}  // namespace

// Eight squares per lane and five levels of lanes, a rounding of 2^-24 each.
float LargestKeyNorm(float squares) {
  return RoundUpToFloat(std::sqrt(static_cast<double>(squares) * (1.0 + 0x1p-19) + 0x1p-120));
}

double KeyNormUp(float squares) {
  return std::sqrt(static_cast<double>(squares) * (1.0 + 0x1p-14) + 0x1p-120);
}

uint64_t JobTarget(uint64_t total, size_t set_count, uint64_t places, uint64_t least) {
  const uint64_t full = places > 2 * set_count ? places - set_count : places;
  return std::max(least, (total + full - 1) / std::max<uint64_t>(full, 1));
}

uint32_t AttendPlaces(const Context& context, const AttendCall& call) {
  const AttendTiling tiling = AttendTilingOf(call);
  const uint32_t tiles = (call.head_count_max + tiling.heads - 1) / tiling.heads;
  return std::max<uint32_t>(1, tiling.ctas * context.multiprocessors / tiles);
}

uint32_t ScanPlaces(const Context& context) { return 4 * kScanCtas * context.multiprocessors; }

CacheShape ShapeOf(const KvLayout& layout) {
  const SketchLayout sketch(layout.head_dim);
  const auto number = [](size_t x) { return static_cast<uint32_t>(x); };
  CacheShape shape;
  shape.head_dim = layout.head_dim;
  shape.kv_head_count = layout.kv_head_count;
  shape.dtype = static_cast<int>(layout.dtype);
  shape.vector_bytes = layout.vector_bytes();
  shape.row_bytes = layout.row_bytes();
  shape.directions = sketch.direction_count;
  shape.lo = number(sketch.lo);
  shape.step = number(sketch.step);
  shape.pj = number(sketch.pj);
  shape.r = number(sketch.r);
  shape.vn = number(sketch.vn);
  shape.ps = number(sketch.ps);
  shape.exact = number(sketch.exact);
  shape.norms = number(sketch.norms);
  shape.version = number(sketch.version);
  shape.page_bytes = number(sketch.page_bytes);
  return shape;
}

namespace {

void SetMasses(const LayerShape& shape, const HeadQueries& queries, bool bounded,
               uint32_t chain_tokens, const HeadSums* sums, Partial* part) {
  for (uint32_t head = 0; head < queries.head_count; ++head) {
    part->lse[head] =
        sums[head].sum == 0.0 ? kLogZero : sums[head].reference * kLn2 + std::log(sums[head].sum);
    if (bounded) {
      BoundMass(shape, queries.norm[head], sums[head], chain_tokens, head, part);
    } else {
      part->upper[head] = {std::numeric_limits<double>::infinity()};
      part->arithmetic[head] = std::numeric_limits<double>::infinity();
    }
  }
}

}  // namespace

Partial PartialOf(const LayerShape& shape, const HeadQueries& queries, bool bounded,
                  uint32_t chain_tokens, const HeadSums* sums, const double* out) {
  const uint32_t dim = shape.layout.head_dim;
  Partial part;
  part.Resize(queries.head_count, dim);
  if (out != nullptr) std::copy_n(out, size_t{queries.head_count} * dim, part.out.begin());
  SetMasses(shape, queries, bounded, chain_tokens, sums, &part);
  return part;
}

void MassesOf(const LayerShape& shape, const HeadQueries& queries, bool bounded,
              uint32_t chain_tokens, const HeadSums* sums, Partial* part) {
  part->Resize(queries.head_count, 0);
  SetMasses(shape, queries, bounded, chain_tokens, sums, part);
}

void Readings::Begin(const LayerShape& shape) {
  shape_ = &shape;
  attends_.clear();
  scans_.clear();
  to_device_.Reset();
  to_host_.Reset();
  scratch_.Reset();
}

const uint64_t* Readings::UploadMask(const TokenMask& tokens) {
  const Slot<uint64_t> slot = to_device_.Take<uint64_t>(tokens.size());
  std::copy(tokens.begin(), tokens.end(), slot.host);
  return slot.device;
}

const float* Readings::UploadQueries(const Group& group) {
  const std::vector<float>& qs = group.queries().qs;
  const size_t count = size_t{group.head_count()} * shape_->layout.head_dim;
  const Slot<float> slot = to_device_.Take<float>(count);
  std::copy_n(qs.begin(), count, slot.host);
  return slot.device;
}

const uint32_t* Readings::UploadVisible(const Group& group) {
  const Slot<uint32_t> slot = to_device_.Take<uint32_t>(size_t{2} * group.head_count());
  const uint32_t base = group.block_begin() * kBlockTokens;
  for (uint32_t head = 0; head < group.head_count(); ++head) {
    slot.host[2 * head] = std::max(group.queries().visible_begin[head], base) - base;
    slot.host[2 * head + 1] = std::max(group.queries().visible_end[head], base) - base;
  }
  return slot.device;
}

void Readings::Attend(const RowTables& row, const Group& group, const TokenMask& tokens,
                      bool read_values, Partial* to) {
  AttendReading reading{};
  reading.token_count = CountTokens(tokens);
  if (reading.token_count == 0) return;
  const uint32_t heads = group.head_count();
  reading.group = &group;
  reading.tokens = &tokens;
  reading.to = to;
  reading.sums = to_host_.Take<HeadSums>(heads);
  reading.out = to_host_.Take<double>(size_t{heads} * shape_->layout.head_dim);
  AttendSet& set = reading.set;
  set.slices = row.slices + group.block_begin();
  set.tokens = UploadMask(tokens);
  set.qs = UploadQueries(group);
  set.visible = UploadVisible(group);
  set.out = reading.out.device;
  set.sums = reading.sums.device;
  set.head_count = heads;
  set.kv_head = group.kv_head();
  set.read_values = read_values;
  reading.bound_masses = group.bounds_masses();
  attends_.push_back(reading);
}

void Readings::Scan(const RowTables& row, const Group& group, const TokenMask& tokens,
                    ScanWeights* to) {
  ScanReading reading{};
  reading.page_count = CountPages(tokens);
  if (reading.page_count == 0) return;
  const uint32_t heads = group.head_count();
  const uint32_t dim = shape_->layout.head_dim;
  const size_t pages = size_t{heads} * tokens.size();
  reading.group = &group;
  reading.tokens = &tokens;
  reading.to = to;
  reading.weights = to_host_.Take<float>(pages * kBlockTokens);
  reading.reference = to_host_.Take<int32_t>(pages);
  reading.page_sum = to_host_.Take<float>(pages);
  if (to->bounded) {
    reading.lower_share = to_host_.Take<float>(pages);
    reading.estimate_share = to_host_.Take<float>(pages);
  }
  ScanSet& set = reading.set;
  set.sketches = row.sketches + group.block_begin();
  set.tokens = UploadMask(tokens);
  set.qs = UploadQueries(group);
  set.visible = UploadVisible(group);
  const ScanQueries& queries = group.scan_queries();
  const Slot<float> qw = to_device_.Take<float>(size_t{SketchDirections(dim)} * heads);
  for (uint32_t j = 0; j < SketchDirections(dim); ++j) {
    std::copy_n(queries.qw[j].begin(), heads, qw.host + size_t{j} * heads);
  }
  set.qw = qw.device;
  if (to->bounded) {
    const Slot<float> metric = to_device_.Take<float>(dim);
    std::copy_n(group.table().metric.begin(), dim, metric.host);
    set.metric = metric.device;
    const Slot<float> x = to_device_.Take<float>(size_t{heads} * dim);
    std::copy_n(queries.x.begin(), size_t{heads} * dim, x.host);
    set.x = x.device;
    const Slot<double> norm = to_device_.Take<double>(size_t{4} * heads);
    for (uint32_t head = 0; head < heads; ++head) {
      norm.host[4 * head] = queries.norm[head];
      norm.host[4 * head + 1] = queries.weight[head];
      norm.host[4 * head + 2] = queries.used[head];
      norm.host[4 * head + 3] = queries.x_norm[head];
    }
    set.norm = norm.device;
  }
  set.weights = reading.weights.device;
  set.reference = reading.reference.device;
  set.page_sum = reading.page_sum.device;
  set.lower_share = reading.lower_share.device;
  set.estimate_share = reading.estimate_share.device;
  set.head_count = heads;
  set.kv_head = group.kv_head();
  set.block_count = static_cast<uint32_t>(tokens.size());
  scans_.push_back(reading);
}

// Cuts one set into jobs of about `target` tokens, at whole words.
void Readings::CutIntoJobs(AttendReading* reading, uint64_t target, std::vector<AttendJob>* jobs) {
  const TokenMask& tokens = *reading->tokens;
  uint64_t size = 0;
  uint32_t first = 0;
  const auto words = static_cast<uint32_t>(tokens.size());
  uint32_t left = reading->token_count;
  for (uint32_t word = 0; word < words && left > 0; ++word) {
    const auto count = static_cast<uint32_t>(std::popcount(tokens[word]));
    left -= count;
    size += count;
    if (size == 0) first = word + 1;
    if (size == 0 || (size < target && left > 0)) continue;
    jobs->push_back({.set = reading->index,
                     .index = reading->set.job_count++,
                     .first_word = first,
                     .word_count = word + 1 - first});
    reading->job_tokens_max = std::max(reading->job_tokens_max, static_cast<uint32_t>(size));
    size = 0;
    first = word + 1;
  }
}

// Rows whose masses are bounded and rows whose are not are different kernels.
void Readings::StartAttends(bool bounded) {
  AttendCall call;
  call.shape = ShapeOf(shape_->layout);
  call.softcap = shape_->logit_softcap;
  call.bound_masses = bounded;
  uint64_t total = 0;
  uint32_t set_count = 0;
  for (AttendReading& reading : attends_) {
    if (reading.bound_masses != bounded) continue;
    reading.index = set_count++;
    total += reading.token_count;
    call.head_count_max = std::max(call.head_count_max, reading.set.head_count);
  }
  if (set_count == 0) return;
  const AttendTiling tiling = AttendTilingOf(call);
  const uint32_t tiles = (call.head_count_max + tiling.heads - 1) / tiling.heads;
  const uint64_t places = AttendPlaces(context_, call);
  const uint64_t target = JobTarget(total, set_count, places, kJobTokensMin);
  std::vector<AttendJob> jobs;
  const Slot<AttendSet> sets = to_device_.Take<AttendSet>(set_count);
  const size_t ticket_count = size_t{set_count} * tiles;
  const Slot<uint32_t> tickets = to_device_.Take<uint32_t>(ticket_count);
  std::fill_n(tickets.host, ticket_count, 0);
  for (AttendReading& reading : attends_) {
    if (reading.bound_masses != bounded) continue;
    CutIntoJobs(&reading, target, &jobs);
    AttendSet& set = reading.set;
    set.tickets = tickets.device + size_t{reading.index} * tiles;
    if (set.job_count > 1) {
      const size_t parts = size_t{set.job_count} * set.head_count;
      set.part_sums = scratch_.Take<HeadSums>(parts).device;
      set.parts = scratch_.Take<float>(parts * shape_->layout.head_dim).device;
    }
    sets.host[reading.index] = set;
  }
  const Slot<AttendJob> job_slot = to_device_.Take<AttendJob>(jobs.size());
  std::copy(jobs.begin(), jobs.end(), job_slot.host);
  call.sets = sets.device;
  call.jobs = job_slot.device;
  call.job_count = static_cast<uint32_t>(jobs.size());
  attend_calls_.push_back(call);
}

// Plans with a proof and plans without one are different kernels.
void Readings::StartScans(bool bounded) {
  ScanCall call;
  call.shape = ShapeOf(shape_->layout);
  call.softcap = shape_->logit_softcap;
  call.bounded = bounded;
  call.radius_scale = context_.radius_scale;
  uint64_t total = 0;
  size_t set_count = 0;
  for (const ScanReading& reading : scans_) {
    if (reading.to->bounded != bounded) continue;
    total += reading.page_count;
    ++set_count;
    call.head_count_max = std::max(call.head_count_max, reading.set.head_count);
  }
  if (set_count == 0) return;
  const uint64_t places = ScanPlaces(context_);
  const uint64_t target = JobTarget(total, set_count, places, kJobPagesMin);
  std::vector<ScanSet> sets;
  std::vector<ScanJob> jobs;
  for (const ScanReading& reading : scans_) {
    if (reading.to->bounded != bounded) continue;
    const auto set = static_cast<uint32_t>(sets.size());
    sets.push_back(reading.set);
    uint64_t size = 0;
    uint32_t first = 0;
    for (uint32_t block = 0; block < reading.set.block_count; ++block) {
      size += (*reading.tokens)[block] != 0 ? 1 : 0;
      if (size == 0) first = block + 1;
      if (size == 0 || (size < target && block + 1 < reading.set.block_count)) continue;
      jobs.push_back({.set = set, .first_block = first, .block_count = block + 1 - first});
      size = 0;
      first = block + 1;
    }
  }
  const Slot<ScanSet> set_slot = to_device_.Take<ScanSet>(sets.size());
  std::copy(sets.begin(), sets.end(), set_slot.host);
  const Slot<ScanJob> job_slot = to_device_.Take<ScanJob>(jobs.size());
  std::copy(jobs.begin(), jobs.end(), job_slot.host);
  call.sets = set_slot.device;
  call.jobs = job_slot.device;
  call.job_count = static_cast<uint32_t>(jobs.size());
  scan_calls_.push_back(call);
}

void Readings::Run() {
  if (empty()) return;
  attend_calls_.clear();
  scan_calls_.clear();
  StartAttends(false);
  StartAttends(true);
  StartScans(false);
  StartScans(true);
  to_device_.Upload(context_.stream);
  for (const ScanCall& call : scan_calls_) Check(cuda::Scan(call, context_.stream), "scan");
  for (const AttendCall& call : attend_calls_) Check(cuda::Attend(call, context_.stream), "attend");
  to_host_.Download(context_.stream);
  Check(cudaStreamSynchronize(context_.stream), "readings");
  for (const AttendReading& reading : attends_) FinishAttend(reading);
  for (const ScanReading& reading : scans_) FinishScan(reading);
}

void Readings::FinishAttend(const AttendReading& reading) const {
  const Partial part =
      PartialOf(*shape_, reading.group->queries(), reading.bound_masses, reading.job_tokens_max,
                reading.sums.host, reading.set.read_values ? reading.out.host : nullptr);
  MergePartials(shape_->layout.head_dim, part, reading.to);
}

void Readings::FinishScan(const ScanReading& reading) const {
  ScanWeights& to = *reading.to;
  const size_t pages = size_t{reading.set.head_count} * reading.set.block_count;
  std::vector<float>& numbers = to.bounded ? to.upper : to.estimate;
  std::memcpy(numbers.data(), reading.weights.host, pages * kBlockTokens * sizeof(float));
  std::memcpy(to.reference.data(), reading.reference.host, pages * sizeof(int32_t));
  std::memcpy(to.page_sum.data(), reading.page_sum.host, pages * sizeof(float));
  if (!to.bounded) return;
  std::memcpy(to.lower_share.data(), reading.lower_share.host, pages * sizeof(float));
  std::memcpy(to.estimate_share.data(), reading.estimate_share.host, pages * sizeof(float));
}

void GroupReader::Set(const Context& context, const LayerShape& shape, uint32_t kv_head,
                      const RowTables& row, uint32_t block_begin, const PageHead* heads,
                      const uint8_t* value_codes) {
  context_ = context;
  shape_ = &shape;
  kv_head_ = kv_head;
  row_ = row;
  block_begin_ = block_begin;
  heads_ = heads;
  value_codes_ = value_codes;
}

ValueNorms GroupReader::BoundValueNorms(absl::Span<const uint64_t> tokens,
                                        uint32_t block_begin) const {
  float largest = 0.0F;
  for (uint32_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] == 0) continue;
    largest = std::max(largest, heads_[block_begin + i - block_begin_].value_squares);
  }
  return ValueNormsOf(largest);
}

void GroupReader::BoundValues(uint32_t block, float* bounds) const {
  const uint8_t* codes = value_codes_ + size_t{block - block_begin_} * kBlockTokens;
  for (uint32_t t = 0; t < kBlockTokens; ++t) {
    bounds[t] = RoundUpToFloat(static_cast<double>(ValueNormMax(block)) *
                               static_cast<double>(kRadiusScale[codes[t]]));
  }
}

void GroupReader::Score(const ScoreTask& task, kvservice::Score* scores, float* values) const {
  const uint32_t dim = shape_->layout.head_dim;
  const auto count = static_cast<uint32_t>(task.positions.size());
  const std::lock_guard<std::mutex> lock(context_.score_memory->mutex);
  Arena& to_device = context_.score_memory->to_device;
  Arena& to_host = context_.score_memory->to_host;
  to_device.Reset();
  to_host.Reset();
  const Slot<float> qs = to_device.Take<float>(dim);
  std::copy_n(&task.queries->qs[size_t{task.head} * dim], dim, qs.host);
  const Slot<uint32_t> positions = to_device.Take<uint32_t>(count);
  std::copy(task.positions.begin(), task.positions.end(), positions.host);
  const Slot<TokenScore> results = to_host.Take<TokenScore>(count);
  Slot<float> rows;
  if (values != nullptr) rows = to_host.Take<float>(size_t{count} * dim);
  ScoreCall call;
  call.shape = ShapeOf(shape_->layout);
  call.slices = row_.slices;
  call.qs = qs.device;
  call.positions = positions.device;
  call.scores = results.device;
  call.values = rows.device;
  call.kv_head = task.kv_head;
  call.token_count = count;
  to_device.Upload(context_.stream);
  Check(cuda::Score(call, context_.stream), "score");
  to_host.Download(context_.stream);
  Check(cudaStreamSynchronize(context_.stream), "score");
  const float cap = shape_->logit_softcap;
  for (uint32_t i = 0; i < count; ++i) {
    const double error = task.queries->norm[task.head] * KeyNormUp(results.host[i].key_squares) *
                         kLogitRoundings * 0x1p-24;
    scores[i].logit = Softcap(cap, static_cast<double>(results.host[i].logit));
    scores[i].error = error * (1.0 + 0x1p-40) + static_cast<double>(cap) * 0x1p-40;
  }
  if (values != nullptr) std::copy_n(rows.host, size_t{count} * dim, values);
}

std::vector<const std::byte*> GroupReader::Boxes(absl::Span<const uint32_t> blocks,
                                                 std::vector<std::byte>* storage) const {
  const SketchLayout layout(shape_->layout.head_dim);
  std::vector<const std::byte*> pages;
  for (const uint32_t block : blocks) {
    pages.push_back(row_.view.sketches[block] + kv_head_ * layout.page_bytes);
  }
  return Fetch(pages, layout.lo, layout.page_bytes, storage);
}

std::vector<const std::byte*> GroupReader::Keys(absl::Span<const uint32_t> positions,
                                                std::vector<std::byte>* storage) const {
  const KvLayout& layout = shape_->layout;
  std::vector<const std::byte*> rows;
  for (const uint32_t position : positions) {
    rows.push_back(row_.view.Row(layout, kv_head_, position));
  }
  return Fetch(rows, 0, layout.vector_bytes(), storage);
}

float GroupReader::KeyNormMax(uint32_t begin, uint32_t end) const {
  const std::lock_guard<std::mutex> lock(context_.score_memory->mutex);
  Arena& to_host = context_.score_memory->to_host;
  to_host.Reset();
  const Slot<float> squares = to_host.Take<float>(1);
  KeyNormCall call;
  call.shape = ShapeOf(shape_->layout);
  call.slices = row_.slices;
  call.squares_max = squares.device;
  call.kv_head = kv_head_;
  call.begin = begin;
  call.end = end;
  Check(cuda::LargestKey(call, context_.stream), "key norms");
  to_host.Download(context_.stream);
  Check(cudaStreamSynchronize(context_.stream), "key norms");
  return LargestKeyNorm(*squares.host);
}

std::vector<const std::byte*> GroupReader::Fetch(absl::Span<const std::byte* const> from,
                                                 size_t offset, size_t bytes,
                                                 std::vector<std::byte>* storage) const {
  std::vector<const std::byte*> copies;
  if (from.empty()) return copies;
  storage->resize(from.size() * bytes);
  const std::lock_guard<std::mutex> lock(context_.score_memory->mutex);
  // Only the host side is used; copies to other memory of the host would wait for each other.
  Arena& to_host = context_.score_memory->to_host;
  to_host.Reset();
  const size_t size = bytes - offset;
  const Slot<std::byte> slot = to_host.Take<std::byte>(from.size() * size);
  for (size_t i = 0; i < from.size(); ++i) {
    Check(cudaMemcpyAsync(slot.host + i * size, from[i] + offset, size, cudaMemcpyDeviceToHost,
                          context_.stream),
          "fetch");
  }
  Check(cudaStreamSynchronize(context_.stream), "fetch");
  for (size_t i = 0; i < from.size(); ++i) {
    std::byte* to = storage->data() + i * bytes;
    std::memcpy(to + offset, slot.host + i * size, size);
    copies.push_back(to);
  }
  return copies;
}

}  // namespace kvservice::cuda
