// Steps of a climb.

#ifndef KVSERVICE_TESTS_ADVERSARY_MUTATE_H_
#define KVSERVICE_TESTS_ADVERSARY_MUTATE_H_

#include "tests/adversary/layer_case.h"

namespace kvservice::adversary {

// Changes one thing about a case: a channel's scale, the place of a token, a sign, a query, the
// last bits of some numbers. Numbers stay finite.
void Mutate(Chance* chance, LayerCase* layer_case);

}  // namespace kvservice::adversary

#endif  // KVSERVICE_TESTS_ADVERSARY_MUTATE_H_
