// The parts of choosing that are plain arithmetic, for one thread: which words a plan's ranges
// make, into which step of a histogram a score falls, where the histogram has its threshold, and
// how a set is cut into jobs. Device code uses them; so do tests on the host.
//
// Scores are shares of a head's attention, never negative. Steps are their upper 16 bits (128 per
// octave, as the host's choice has them), bins the upper 12 bits (8 per octave).

#ifndef KVSERVICE_ATTENTION_CUDA_CHOICE_INL_H_
#define KVSERVICE_ATTENTION_CUDA_CHOICE_INL_H_

#include <bit>
#include <cstdint>

#ifdef __CUDACC__
#define KVSERVICE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KVSERVICE_HOST_DEVICE inline
#endif

namespace kvservice::cuda {

inline constexpr uint32_t kWordTokens = 64;

// Bins cover [2^-77, 8); what is below or above is in the first or the last.
inline constexpr uint32_t kBins = 640;
inline constexpr uint32_t kStepsOfBin = 16;
inline constexpr int32_t kBinShift = 20;
inline constexpr int32_t kStepShift = 16;
inline constexpr int32_t kFirstBin = ((127 + 3) << 3) - static_cast<int32_t>(kBins);
// Shares of a bin are added up in integers: in units of the bin's upper edge and 2^-11.
inline constexpr float kShareUnits = 2048.0F;

// Ranges of a row that a plan speaks about, in tokens from the group's first word on.
struct ChoiceRanges {
  uint32_t begin = 0;  // seen: [begin, end)
  uint32_t end = 0;
  uint32_t sink_end = 0;
  uint32_t visible_begin = 0;
  uint32_t local_begin = 0;
};

struct ChoiceWords {
  uint64_t all = 0;
  uint64_t always = 0;
  uint64_t middle = 0;  // the rest of `all` is hidden
};

// The tokens of word `word` that lie in [begin, end).
KVSERVICE_HOST_DEVICE uint64_t WordOfRange(uint32_t word, uint32_t begin, uint32_t end) {
  const uint64_t first = uint64_t{word} * kWordTokens;
  const uint64_t low = begin > first ? begin : first;
  const uint64_t high = end < first + kWordTokens ? end : first + kWordTokens;
  if (low >= high) return 0;
  return (~uint64_t{0} >> (kWordTokens - (high - first))) & (~uint64_t{0} << (low - first));
}

// `exact`: the tokens that have no sketch.
KVSERVICE_HOST_DEVICE ChoiceWords WordsOf(const ChoiceRanges& ranges, uint32_t word,
                                          uint64_t exact) {
  ChoiceWords words;
  words.all = WordOfRange(word, ranges.begin, ranges.end);
  words.always = words.all & (WordOfRange(word, 0, ranges.sink_end) |
                              WordOfRange(word, ranges.local_begin, ranges.end) | exact);
  words.middle = words.all & ~words.always & WordOfRange(word, ranges.visible_begin, ranges.end);
  return words;
}

KVSERVICE_HOST_DEVICE int32_t BitsOf(float score) {
#ifdef __CUDA_ARCH__
  return __float_as_int(score);
#else
  return std::bit_cast<int32_t>(score);
#endif
}
KVSERVICE_HOST_DEVICE float FloatOfBits(int32_t bits) {
#ifdef __CUDA_ARCH__
  return __int_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

// Step of a score, from the first bin's first on.
KVSERVICE_HOST_DEVICE uint32_t StepOf(float score) {
  constexpr auto kSteps = static_cast<int32_t>(kBins * kStepsOfBin);
  const int32_t step =
      (BitsOf(score) >> kStepShift) - kFirstBin * static_cast<int32_t>(kStepsOfBin);
  const int32_t most = step < kSteps ? step : kSteps - 1;
  return static_cast<uint32_t>(most > 0 ? most : 0);
}
KVSERVICE_HOST_DEVICE uint32_t BinOf(float score) { return StepOf(score) / kStepsOfBin; }

// The least score of a bin; that of kBins is where all bins end.
KVSERVICE_HOST_DEVICE float BinEdge(uint32_t bin) {
  return FloatOfBits((kFirstBin + static_cast<int32_t>(bin)) << kBinShift);
}

// A share as it is added up in the bin of its token's score: kShareUnits / BinEdge(bin + 1) units
// per share, at most kShareUnits.
KVSERVICE_HOST_DEVICE uint32_t UnitsOf(float share, float units_per_share) {
  const float units = share * units_per_share;
  return units < kShareUnits ? static_cast<uint32_t>(2.0F * units + 1.0F) / 2
                             : static_cast<uint32_t>(kShareUnits);
}
KVSERVICE_HOST_DEVICE double ShareOfUnits(uint32_t units, uint32_t bin) {
  return static_cast<double>(units) * static_cast<double>(BinEdge(bin + 1)) /
         static_cast<double>(kShareUnits);
}

// Of so many tokens of a bin it is assumed that they are spread evenly in it.
inline constexpr uint32_t kEvenTokens = 64;

// The score below which tokens may be dropped, in the first bin that may not be dropped as a whole:
// the bins below hold `below` and it holds `mass`, in `count` tokens.
KVSERVICE_HOST_DEVICE float ThresholdWithin(uint32_t bin, double mass, uint32_t count, double below,
                                            double limit) {
  const auto low = static_cast<double>(BinEdge(bin));
  // Nothing is known of what lies beyond the edges.
  const bool even = count >= kEvenTokens && bin > 0 && bin + 1 < kBins;
  if (!even || !(below < limit) || !(mass > 0.0)) return BinEdge(bin);
  const double part = (limit - below) / mass;
  const double high = BinEdge(bin + 1);
  return static_cast<float>(low + (part < 1.0 ? part : 1.0) * (high - low));
}

// A sample of a group's tokens is taken by runs of eight tokens of a block: one of every so many,
// that as many are left as one CTA holds in registers.
inline constexpr uint32_t kRunTokens = 8;
inline constexpr uint32_t kRunsOfBlock = kWordTokens / kRunTokens;
KVSERVICE_HOST_DEVICE constexpr uint32_t SampledRuns(uint32_t heads) {
  return heads <= 8 ? 512 : 256;
}
// How many one run stands for.
KVSERVICE_HOST_DEVICE uint32_t SampleStride(uint32_t blocks, uint32_t heads) {
  const uint32_t stride = (blocks * kRunsOfBlock + SampledRuns(heads) - 1) / SampledRuns(heads);
  return stride > 0 ? stride : 1;
}
// The i-th run of a sample: any of those that it stands for, so that no place in blocks counts
// more than others.
KVSERVICE_HOST_DEVICE uint32_t SampledRun(uint32_t i, uint32_t stride) {
  constexpr uint32_t kOdd = 0x9e3779b1U;
  return i * stride + static_cast<uint32_t>(uint64_t{i * kOdd} * stride >> 32);
}

// Thresholds of a sample are looked for among steps of 64 per octave, from the first bin's first
// on.
inline constexpr uint32_t kStepsOfOctave = 64;
inline constexpr uint32_t kSearchSteps = kBins * 8;
KVSERVICE_HOST_DEVICE float SearchEdge(uint32_t step) {
  return FloatOfBits((kFirstBin << kBinShift) + static_cast<int32_t>(step << (kBinShift - 3)));
}
// The last step whose edge is not above a score, or the first.
KVSERVICE_HOST_DEVICE uint32_t SearchStepOf(float score) {
  const int32_t step = (BitsOf(score) - (kFirstBin << kBinShift)) >> (kBinShift - 3);
  const int32_t last = static_cast<int32_t>(kSearchSteps) - 1;
  const int32_t most = step < last ? step : last;
  return static_cast<uint32_t>(most > 0 ? most : 0);
}

// Jobs of a set of `tokens` tokens, none of more than about `target`.
KVSERVICE_HOST_DEVICE uint32_t JobsOf(uint32_t tokens, uint32_t target) {
  return tokens <= target ? 1 : (tokens + target - 1) / target;
}
// Blocks of a span. Jobs begin with spans, so that there are not many places to look at.
KVSERVICE_HOST_DEVICE uint32_t SpanBlocksOf(uint32_t blocks) {
  constexpr uint32_t kSpansWanted = 256;
  constexpr uint32_t kSpanBlocksMax = 8;
  uint32_t span = 1;
  while (span < kSpanBlocksMax && span * kSpansWanted < blocks) span *= 2;
  return span;
}
// The job that a word or span belongs to which `before` tokens of its set come before. The tokens
// times the jobs are below 2^32.
KVSERVICE_HOST_DEVICE uint32_t JobOfWord(uint32_t before, uint32_t tokens, uint32_t jobs) {
  if (tokens == 0) return 0;
  const uint32_t job = before * jobs / tokens;
  return job < jobs ? job : jobs - 1;
}

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_CHOICE_INL_H_
