// The hardware limit, to judge kernels by.
#pragma once
#include <optional>
#include <string>

namespace qdeploy {

// 1e9 multiply-accumulates a second of one core at best with the instructions of `isa`: `precision` is "int8" (any
// codes with VNNI, else small ones, of which eight products fit 16 bits in sum) or "float32". The fastest slice of
// about `seconds` of measuring. None where there is no loop for it; throws InputError for an instruction set that this
// CPU has not.
std::optional<double> peak_gmacs(const std::string& isa, const std::string& precision, double seconds);

}  // namespace qdeploy
