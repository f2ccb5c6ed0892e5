// Whether something that is measured again and again grows, or only moves.

#ifndef KVSERVICE_TESTS_STRESS_TREND_H_
#define KVSERVICE_TESTS_STRESS_TREND_H_

#include <vector>

namespace kvservice::testing {

// Growth from the first sample to the last of a straight line through them (least squares), and
// three standard errors of it. Zero of too few samples.
struct Trend {
  double growth = 0.0;
  double noise = 0.0;
};

// Of samples that are independent of each other, but for the line.
Trend TrendOf(const std::vector<double>& samples);

// Of samples that are not: what breathes is above its line for many samples and then below it, and
// each tells less than a sample of its own would; the error above would be too small by the square
// root of how many move together. So samples are taken together in kBatchCount batches of
// consecutive ones, and the line is laid through the means of batches (without the first samples
// that do not fill one). Means of batches much longer than a breath are nearly independent, and
// their scatter about the line, with kBatchCount - 2 degrees of freedom, is what tells how well it
// is known:
//
//   noise = 3 n sqrt(sum of squared residuals / (n - 2) / sum of (i - (n - 1) / 2)^2)
//
// for the means i = 0 ... n - 1 of n = kBatchCount batches. Too few batches would make the error
// itself uncertain, too many would be shorter than a breath.
constexpr int kBatchCount = 20;
Trend BatchTrendOf(const std::vector<double>& samples);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_TREND_H_
