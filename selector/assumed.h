// What the theory behind the selectors says before anything is measured. These numbers rest on
// assumptions that nobody checks while serving, so they are reported in fields of their own whose
// names begin with `assumed_`, next to certificates and never mixed with them. At thresholds of
// practical use the first is often 1 and more, which says nothing: that is worth knowing too.
//
// Source: Gao et al., "Near-Oracle KV Selection via Pre-hoc Sparsity" (arXiv 2602.08329), as
// far as it states formulas; the forms below are derivations of ours. P is the softmax
// distribution of a query head over its tokens, TV the total variation distance, the *excess* of a
// set is what it drops beyond what the best set of the same size drops.
//
// Pure functions; any thread. Every result is at least 0; where arithmetic has no answer it is the
// function's largest value, which says nothing.

#ifndef KVSERVICE_SELECTOR_ASSUMED_H_
#define KVSERVICE_SELECTOR_ASSUMED_H_

#include <cstdint>

#include "attention/log_mass.h"

namespace kvservice {

// TV(P, P') <= tanh(osc / 4) when the logits of P' differ from those of P by numbers whose largest
// and smallest are `oscillation` apart. A theorem, and tight: two tokens reach it.
double TotalVariationBound(double oscillation);

// Excess of a set under P' that is the best of its size under P: at most 2 TV(P, P'), because what
// it keeps falls by TV and what its rival keeps rises by TV. A theorem; at most 1.
double TransferredExcess(double oscillation);

// ||q - q'|| of queries with norms a and b at an angle of this cosine.
double QueryDistance(double a, double b, double cosine);

// CIS: excess of a list that was chosen for one query and is used for another, `query_distance`
// away. Logits differ by scale (q' - q).k, whose oscillation is at most scale ||q' - q|| times the
// diameter of the keys, at most twice their largest norm. Logit soft-caps only shrink it.
//
// Assumed: that the list is the best of its size for the query it was made for, moved to the
// present position (distances are taken before rotation). It was chosen by estimates, for all
// query heads of a group together, when there were fewer tokens.
double AssumedSharingExcess(double key_norm_max, double query_distance, double scale);

// PSAW: mass beyond the latest `visible_tokens` positions, sinks apart: C exp(-lambda distance),
// at most 1. Assumed: that attention decays like this, with a (C, lambda) that was fitted to a
// layer on calibration data.
double AssumedHiddenMass(double decay_scale, double decay_rate, double visible_tokens);

// ETF: excess of a choice that a shallower layer made for the frozen tokens, if that layer's logits
// are within `logit_drift` of this layer's: an oscillation of at most twice the drift. Assumed: the
// drift, which was calibrated.
double AssumedFreezingExcess(double logit_drift);

// Upper bound in nats of the mutual information between context and attended index that is lost
// when a mean share `dropped_mass` of attention over `token_count` tokens is dropped: g(d) = h(d) +
// d ln N (our derivation, g1). Rounded up; d is clamped to [0, 1] and g is taken at its maximum
// beyond the point where it starts to fall. Assumed: that the mean over the calls seen is the mean.
double MutualInformationBoundNats(MassUpper dropped_mass, uint64_t token_count);

}  // namespace kvservice

#endif  // KVSERVICE_SELECTOR_ASSUMED_H_
