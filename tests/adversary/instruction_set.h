// Chooses the instruction set that the CPU device's kernels run on. Not while a device works.

#ifndef KVSERVICE_TESTS_ADVERSARY_INSTRUCTION_SET_H_
#define KVSERVICE_TESTS_ADVERSARY_INSTRUCTION_SET_H_

#include <string>
#include <vector>

namespace kvservice::adversary {

// "AVX2", "SSE4": those that this machine has and the kernels are compiled for, best first.
std::vector<std::string> InstructionSets();
// False if `name` is none of them; "" = the best.
bool UseInstructionSet(const std::string& name);

}  // namespace kvservice::adversary

#endif  // KVSERVICE_TESTS_ADVERSARY_INSTRUCTION_SET_H_
